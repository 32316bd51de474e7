//! Manifests: parse and validate. Must not know the disk layout.

pub mod appc;
pub mod discovery;
pub mod oci;
pub mod signature;

use crate::error::{Error, Kind, Result};

/// Deepest JSON taken. serde_json stops at 128 by itself; no manifest seen goes past 10.
pub const MAX_JSON_DEPTH: usize = 32;

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
    if json_depth(bytes) > MAX_JSON_DEPTH {
        return refuse(Kind::Limit, format!("it nests deeper than {MAX_JSON_DEPTH} levels"));
    }
    serde_json::from_slice(bytes).or_else(|e| refuse(Kind::Invalid, e.to_string()))
}

/// Deepest nesting of `[` and `{` outside strings.
fn json_depth(bytes: &[u8]) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                most = most.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_counted_outside_strings() {
        for (text, want) in [("{}", 1), (r#"{"a":[{"b":"[[[["}]}"#, 3), (r#""\"[""#, 0), ("]]]]", 0)] {
            assert_eq!(json_depth(text.as_bytes()), want, "{text}");
        }
        let deep = "[".repeat(MAX_JSON_DEPTH + 1);
        let error = parse_json::<serde_json::Value>("manifest", deep.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Limit);
    }
}
