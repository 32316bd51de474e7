//! How a path, which is any bytes, is written in JSON, which is text: a string where it is UTF-8, else
//! `{"bytes": "2f61ff"}` (lowercase hex of every byte). For `#[serde(with = "crate::pathtext")]`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathText {
    Text(String),
    Bytes { bytes: String },
}

/// Write a path in the form above.
pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => PathText::Text(text.to_owned()),
        None => PathText::Bytes { bytes: data_encoding::HEXLOWER.encode(path.as_os_str().as_bytes()) },
    }
    .serialize(to)
}

/// Read a path in the form above.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    Ok(match PathText::deserialize(from)? {
        PathText::Text(text) => PathBuf::from(text),
        PathText::Bytes { bytes } => {
            let bytes = data_encoding::HEXLOWER.decode(bytes.as_bytes()).map_err(D::Error::custom)?;
            PathBuf::from(OsString::from_vec(bytes))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Holder {
        #[serde(with = "super")]
        path: PathBuf,
    }

    #[test]
    fn any_bytes_survive() {
        for (bytes, json) in [(&b"/a b\n"[..], r#"{"path":"/a b\n"}"#), (&b"/\xff"[..], r#"{"path":{"bytes":"2fff"}}"#)]
        {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let text = serde_json::to_string(&Holder { path: path.clone() }).unwrap();
            assert_eq!(text, json);
            assert_eq!(serde_json::from_str::<Holder>(&text).unwrap().path, path);
        }
    }
}
