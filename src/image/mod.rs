//! Manifests: parse and validate. Must not know the disk layout.

pub mod appc;
pub mod discovery;
pub mod execution;
pub mod oci;
pub mod signature;

use crate::error::{Error, Kind, Result};

/// Deepest JSON taken. serde_json stops at 128 by itself; no manifest seen goes past 10.
pub const MAX_JSON_DEPTH: usize = 32;

/// Most values of one document, at whatever depth: an index of 1,024 manifests has 16,000. Each costs up to 640 bytes where it is an
/// object, of which 1 MiB of text could hold 150,000.
pub const MAX_JSON_VALUES: usize = 32_768;

/// Largest manifest taken: the AppC and OCI ones seen are below 64 KiB.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;

/// How strictly a manifest is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// To the letter of its specification.
    #[default]
    Strict,
    /// What Mesos takes: breaches of rules that nothing here depends on are warnings.
    Lenient,
}

/// Read JSON from outside: bounded in bytes and depth, before a parser sees it. Duplicate names in an object are for the
/// typed reader to refuse (serde does).
pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T> {
    let refuse = |kind, why: String| Err(Error::new(kind, "read", what, why));
    if bytes.len() > MAX_MANIFEST_BYTES {
        return refuse(Kind::Limit, format!("it has {} bytes: at most {MAX_MANIFEST_BYTES} are taken", bytes.len()));
    }
    let (depth, values) = json_size(bytes);
    if depth > MAX_JSON_DEPTH {
        return refuse(Kind::Limit, format!("it nests deeper than {MAX_JSON_DEPTH} levels"));
    }
    if values > MAX_JSON_VALUES {
        return refuse(Kind::Limit, format!("it has more than {MAX_JSON_VALUES} values"));
    }
    serde_json::from_slice(bytes).or_else(|e| refuse(Kind::Invalid, e.to_string()))
}

/// Outside strings: the deepest nesting of `[` and `{`, and how many values there are at most (each stands after one of `[{,`).
fn json_size(bytes: &[u8]) -> (usize, usize) {
    let (mut depth, mut most, mut values) = (0_usize, 0, 1);
    let (mut in_string, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                values += 1;
                most = most.max(depth);
            }
            b',' if !in_string => values += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    (most, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_and_values_are_counted_outside_strings() {
        for (text, want) in
            [("{}", (1, 2)), (r#"{"a":[{"b":"[[,["},1]}"#, (3, 5)), (r#""\"[""#, (0, 1)), ("]]]]", (0, 1))]
        {
            assert_eq!(json_size(text.as_bytes()), want, "{text}");
        }
        let many = format!("[{}0]", r#"{"":0},"#.repeat(MAX_JSON_VALUES / 2));
        let error = parse_json::<serde_json::Value>("manifest", many.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Limit, "each of these objects costs 640 bytes");
        let deep = "[".repeat(MAX_JSON_DEPTH + 1);
        let error = parse_json::<serde_json::Value>("manifest", deep.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Limit);
    }
}
