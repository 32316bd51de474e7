//! containerd's filters (its package `filters`): what List is asked for.
//!
//! ```text
//! filter   = selector *("," selector)          all of them hold
//! selector = path [ operator value ]           without an operator: the field is there
//! path     = field *("." field)                "labels.\"containerd.io/x\""
//! operator = "==" | "!=" | "~="                "~=": a regular expression
//! field    = letters, digits, "_"; or quoted
//! value    = anything up to a comma or white space; or quoted
//! quoted   = "..." with Go's escapes; for a regular expression also |...| or /.../
//! ```
//!
//! Of several filters one has to hold; of none, everything is listed.

use regex_lite::Regex;

use super::record::Record;
use crate::error::{Error, Kind, Result};

/// Most filters in one request, and the longest of them: containerd asks with one or two of some hundred bytes.
const MAX_FILTERS: usize = 256;
const MAX_BYTES: usize = 16 << 10;
/// Most memory of one compiled expression.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// The filters of one request.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    Matches(Regex),
}

impl Filters {
    pub(super) fn parse(texts: &[String]) -> Result<Self> {
        if texts.len() > MAX_FILTERS {
            return Err(refuse("", format!("more than {MAX_FILTERS} filters")));
        }
        texts.iter().map(|text| parse(text)).collect::<Result<_>>().map(Filters)
    }

    /// Does one of them hold for this snapshot?
    pub(super) fn hold(&self, record: &Record) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.holds(record)))
    }
}

impl Selector {
    fn holds(&self, record: &Record) -> bool {
        let value = field(record, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value == wanted),
            Test::Unequal(wanted) => value.unwrap_or_default() != wanted,
            Test::Matches(regex) => value.is_some_and(|value| regex.is_match(value)),
        }
    }
}

fn field<'a>(record: &'a Record, path: &[String]) -> Option<&'a str> {
    match path[0].as_str() {
        "kind" => Some(record.kind.name()),
        "name" => Some(&record.name),
        // The empty one, too: containerd asks for `parent==""`.
        "parent" => Some(&record.parent),
        "labels" => record.labels.get(&path[1..].join(".")).map(String::as_str),
        _ => None,
    }
}

fn refuse(filter: &str, why: impl Into<String>) -> Error {
    let shown: String = filter.chars().take(200).collect();
    Error::new(Kind::Invalid, "read filter", format!("{shown:?}"), why.into())
}

fn parse(text: &str) -> Result<Vec<Selector>> {
    if text.len() > MAX_BYTES {
        return Err(refuse(text, format!("it is longer than {MAX_BYTES} bytes")));
    }
    let mut scan = Scan { text, at: 0 };
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(selectors);
    }
    loop {
        selectors.push(scan.selector()?);
        match scan.next() {
            None => return Ok(selectors),
            Some(',') => {}
            Some(other) => return Err(refuse(text, format!("{other:?} where a comma or the end was expected"))),
        }
    }
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl Scan<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        self.skip_space();
        let length = self.rest().find(|c| !matches!(c, '=' | '!' | '~')).unwrap_or(self.rest().len());
        let operator = self.rest()[..length].to_owned();
        self.at += length;
        let test = match operator.as_str() {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::Unequal(self.value(false)?),
            "~=" => {
                let value = self.value(true)?;
                let regex = regex_lite::RegexBuilder::new(&value).size_limit(MAX_REGEX_BYTES).build();
                Test::Matches(regex.map_err(|e| refuse(self.text, e.to_string()))?)
            }
            _ => return Err(refuse(self.text, format!("an operator is missing at byte {}", self.at))),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted('"'),
            _ => self.word(|c| c.is_ascii_alphanumeric() || c == '_'),
        }
    }

    fn value(&mut self, is_regex: bool) -> Result<String> {
        self.skip_space();
        match self.peek() {
            Some(quote @ '"') => self.quoted(quote),
            Some(quote @ ('|' | '/')) if is_regex => self.quoted(quote),
            Some('|' | '/') => Err(refuse(self.text, "only a regular expression may be in such quotes")),
            _ => self.word(|c| c != ',' && !c.is_whitespace() && !c.is_control()),
        }
    }

    fn word(&mut self, is_of_word: impl Fn(char) -> bool) -> Result<String> {
        let length = self.rest().find(|c| !is_of_word(c)).unwrap_or(self.rest().len());
        let word = self.rest()[..length].to_owned();
        if word.is_empty() {
            return Err(refuse(self.text, format!("a name or value is missing at byte {}", self.at)));
        }
        self.at += length;
        Ok(word)
    }

    /// What stands in quotes, Go's escapes undone (strconv.Unquote). Between other delimiters a backslash before one of them is all
    /// that means something.
    fn quoted(&mut self, quote: char) -> Result<String> {
        self.next();
        let mut bytes = Vec::new();
        loop {
            let Some(c) = self.next() else { return Err(refuse(self.text, "a quote has no end")) };
            if c == quote {
                break;
            }
            if c != '\\' {
                bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
                continue;
            }
            let Some(escaped) = self.next() else { return Err(refuse(self.text, "a quote has no end")) };
            if quote != '"' {
                if escaped != quote {
                    bytes.push(b'\\');
                }
                bytes.extend(escaped.encode_utf8(&mut [0; 4]).bytes());
                continue;
            }
            self.escape(escaped, &mut bytes)?;
        }
        String::from_utf8(bytes).map_err(|_| refuse(self.text, "an escape does not give UTF-8"))
    }

    fn escape(&mut self, escaped: char, bytes: &mut Vec<u8>) -> Result<()> {
        let simple = match escaped {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 11,
            '\\' => b'\\',
            '"' => b'"',
            'x' => return self.digits(2, 16).map(|value| bytes.push(value as u8)),
            'u' | 'U' => {
                let value = self.digits(if escaped == 'u' { 4 } else { 8 }, 16)?;
                let c = char::from_u32(value)
                    .ok_or_else(|| refuse(self.text, "an escape names a character that does not exist"))?;
                bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
                return Ok(());
            }
            '0'..='7' => {
                self.at -= 1;
                let value = self.digits(3, 8)?;
                let value = u8::try_from(value).map_err(|_| refuse(self.text, "an escape is more than a byte"))?;
                bytes.push(value);
                return Ok(());
            }
            other => return Err(refuse(self.text, format!("unknown escape \\{other}"))),
        };
        bytes.push(simple);
        Ok(())
    }

    fn digits(&mut self, count: usize, radix: u32) -> Result<u32> {
        let digits = self.rest().get(..count).unwrap_or_default();
        let value = (digits.chars().all(|c| c.is_digit(radix))).then(|| u32::from_str_radix(digits, radix).ok());
        let value = value.flatten().ok_or_else(|| refuse(self.text, "an escape is cut short"))?;
        self.at += count;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Kind as Is;
    use super::*;

    fn record() -> Record {
        let mut record = Record::new(1, "k8s.io/1/sha256:ab".into(), "below".into(), Is::Committed);
        for (name, value) in [("containerd.io/snapshot.ref", "sha256:39"), ("a", "b.c"), ("x.y", "é\"")] {
            record.labels.insert(name.into(), value.into());
        }
        record
    }

    #[test]
    fn what_holds_and_what_does_not() {
        let mut orphan = record();
        orphan.parent.clear();
        for (filter, with_parent, without) in [
            ("", true, true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:39", true, true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:39,parent==\"\"", false, true),
            ("labels.\"containerd.io/snapshot.ref\"==\"sha256:39\",parent==below", true, false),
            ("kind==committed", true, true),
            ("kind==active", false, false),
            ("kind!=active", true, true),
            ("labels.a", true, true),
            ("labels.b", false, false),
            ("labels.b!=x", true, true),
            ("labels.a==\"b.c\"", true, true),
            ("labels.a==b.c", true, true),
            ("labels.a == b.c,kind==committed", true, true),
            ("labels.b!=\"\"", false, false),
            ("labels.x.y==\"\\u00e9\\\"\"", true, true),
            ("labels.x.y==\"\\xc3\\xa9\\042\"", true, true),
            ("name~=|^k8s\\.io/|", true, true),
            ("name~=/^k8s\\.io\\/1\\//", true, true),
            ("name~=sha", true, true),
            ("name~=\"^sha\"", false, false),
            ("parent~=low", true, false),
            ("nosuch", false, false),
            ("nosuch==x", false, false),
        ] {
            let filters = Filters::parse(&[filter.to_owned()]).unwrap_or_else(|e| panic!("{filter}: {e}"));
            assert_eq!((filters.hold(&record()), filters.hold(&orphan)), (with_parent, without), "{filter}");
        }
        let any = Filters::parse(&["kind==view".into(), "name==\"k8s.io/1/sha256:ab\"".into()]).unwrap();
        assert!(any.hold(&record()), "one of several is enough");
        assert!(Filters::parse(&[]).unwrap().hold(&record()));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let long = "x".repeat(MAX_BYTES + 1);
        let big = "name~=\"((a{1000}){1000}){1000}\"";
        for filter in [
            ",",
            "a,",
            "a.",
            "==x",
            "a==/x/",
            "a===x",
            "a-b",
            "a==",
            "a==\"x",
            "a~=|x",
            "a b",
            "a=b",
            "a~=\"(\"",
            "a==\"\\q\"",
            "a==\"\\xf\"",
            "a==\"\\xff\"",
            "a==\"\\400\"",
            "a==\"\\",
            "a==\"\\ud800\"",
            big,
            &long,
            "\u{0}",
        ] {
            let said = Filters::parse(&[filter.to_owned()]).expect_err(filter).kind();
            assert_eq!(said, Kind::Invalid, "{filter}");
        }
        assert!(Filters::parse(&vec![String::new(); MAX_FILTERS + 1]).is_err());
    }
}
