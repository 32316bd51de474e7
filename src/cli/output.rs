//! What goes to stdout: a line, a table, fields, JSON. The only place that prints, and so the place where what is not printable is
//! escaped ([`printable`]): no verb can forget it.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::error::{Error, Kind, Result};
use crate::printable;

fn put(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("write to", "stdout", e))
}

/// Print text of several lines. What comes from others belongs into [`line`], [`table`] or [`fields`], where its line breaks are escaped too.
pub(super) fn text(text: &str) -> Result<()> {
    put(&printable::block(text))
}

/// Print one line.
pub(super) fn line(line: &str) -> Result<()> {
    put(&format!("{}\n", printable::line(line)))
}

/// Names and values, one pair a line, as text.
pub(super) fn fields<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut all = String::new();
    for (name, value) in rows {
        let _ = writeln!(all, "{name:15} {}", printable::line(&value));
    }
    all
}

/// Print a value as indented JSON.
pub(super) fn json(value: &impl serde::Serialize) -> Result<()> {
    let mut all = serde_json::to_string_pretty(value).map_err(|e| Error::new(Kind::Io, "write JSON", "", e))?;
    all.push('\n');
    put(&printable::json(&all))
}

/// Print rows below a heading, columns aligned. Nothing where there is no row.
pub(super) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| std::array::from_fn(|at| printable::line(&row[at]).into_owned())).collect();
    let mut widths = heading.map(|h| h.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut all = String::new();
    for row in std::iter::once(&heading.map(str::to_owned)).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        all.push_str(line.trim_end());
        all.push('\n');
    }
    put(&all)
}

/// `1 image`, `2 images`.
pub(super) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Bytes for people: 1023 B, 1.5 KiB, 181.4 MiB.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    // Tenths in whole numbers: rounded half up.
    let unit = (0..UNITS.len()).rev().find(|u| bytes >> (10 * u) > 0).unwrap_or(0);
    if unit == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10 + (1 << (10 * unit - 1))) >> (10 * unit);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A time for people: 2026-11-24 03:55 (UTC).
pub(super) fn date(seconds_since_1970: i64) -> String {
    const FORM: &[time::format_description::FormatItem<'_>] =
        time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]");
    time::OffsetDateTime::from_unix_timestamp(seconds_since_1970)
        .ok()
        .and_then(|t| t.format(FORM).ok())
        .unwrap_or_else(|| seconds_since_1970.to_string())
}

/// Say on stderr what else was done.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable::line(text));
}

/// Do it to each. One that fails is told, and the others have their turn; of several that fail the exit code is 1.
pub(super) fn each<T>(op: &'static str, items: &[T], mut work: impl FnMut(&T) -> Result<()>) -> Result<()> {
    if let [only] = items {
        return work(only);
    }
    let mut failed = 0;
    for item in items {
        if let Err(error) = work(item) {
            complain(&error);
            failed += 1;
        }
    }
    if failed == 0 { Ok(()) } else { Err(Error::new(Kind::Io, op, "", format!("{failed} of {} failed", items.len()))) }
}

/// Say on stderr what went wrong.
pub(super) fn complain(error: &Error) {
    // Where stderr is closed there is nobody to tell.
    for (number, line) in error.lines().enumerate() {
        let _ = writeln!(std::io::stderr(), "{}{}", if number == 0 { "fsprov: " } else { "" }, printable::line(&line));
    }
}

/// Did the reader of our stdout go away? Then we are done.
pub(super) fn is_broken_pipe(error: &Error) -> bool {
    error.errno() == Some(rustix::io::Errno::PIPE) && error.subject() == "stdout"
}

#[cfg(test)]
mod tests {
    use super::{date, size};

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00");
        assert_eq!(date(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn sizes() {
        for (bytes, want) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (190_000_000, "181.2 MiB")] {
            assert_eq!(size(bytes), want);
        }
    }
}
