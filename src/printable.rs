//! What strangers wrote (names, labels, paths, errors about them), made fit for a terminal or a log: the one function for it.
//!
//! An escape sequence in an image's name could else retitle, repaint or type into the terminal of who lists it, a newline forge a line
//! of a log, and a bidirectional control show one name as another (CVE-2021-42574).

use std::borrow::Cow;
use std::fmt::Write as _;

/// What would not show, or would change how other text shows: controls (C1 and DEL too), separators of lines, and of what Unicode calls
/// format characters those that reorder, join or hide.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

fn escape(text: &str, stays: impl Fn(char) -> bool, write: impl Fn(&mut String, char)) -> Cow<'_, str> {
    let goes = |c: char| is_hidden(c) && !stays(c);
    if !text.contains(goes) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if goes(c) { write(&mut out, c) } else { out.push(c) }
    }
    out.into()
}

fn as_rust(out: &mut String, c: char) {
    out.extend(c.escape_default());
}

/// One line: whatever is not printable is escaped, line breaks too.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escape(text, |_| false, as_rust)
}

/// Text of several lines of our own making: line breaks and tabs stay. What others wrote in it went through [`line()`].
pub(crate) fn block(text: &str) -> Cow<'_, str> {
    escape(text, |c| matches!(c, '\n' | '\t'), as_rust)
}

/// JSON as it was written, with `\u` escapes for what is not printable: who parses it gets the same values.
pub(crate) fn json(text: &str) -> Cow<'_, str> {
    // Outside of its strings JSON has none but line breaks.
    escape(
        text,
        |c| c == '\n',
        |out, c| {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_not_show_is_escaped_and_what_shows_is_not() {
        for (text, want) in [
            ("debian:12 umläut-日本 e\u{301}", "debian:12 umläut-日本 e\u{301}"),
            ("a\u{1b}[2Jb\u{7}", "a\\u{1b}[2Jb\\u{7}"),
            ("a\nfsprov: all is well\r\t", "a\\nfsprov: all is well\\r\\t"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("a\u{202e}cba\u{2066}\u{200b}", "a\\u{202e}cba\\u{2066}\\u{200b}"),
        ] {
            assert_eq!(line(text), want);
        }
        assert!(matches!(line("plain"), Cow::Borrowed(_)));
        assert_eq!(block("a\n\tb\u{1b}"), "a\n\tb\\u{1b}");
    }

    #[test]
    fn json_stays_what_it_says() {
        let value = serde_json::json!({ "name": "a\u{1b}[2J\u{9b}\u{7f}\u{202e}\u{e0041}\n日本" });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = json(&text);
        assert!(!shown.contains(|c| is_hidden(c) && c != '\n'), "{shown:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
