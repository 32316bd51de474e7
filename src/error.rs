//! The one error type: what was done, to what, why it failed, and what to do next.
//!
//! Only [`Kind`] decides an exit code or an errno; texts are for people. An undo that fails is attached to the first error
//! ([`Error::with_undo`]), it never takes its place.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it was. Decides the exit code ([`Kind::exit_code`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// The request itself is wrong: an argument, a volume, a combination of options.
    Usage,
    /// Something named does not exist.
    NotFound,
    /// Something to be made is there already.
    Exists,
    /// In use: a mount held by a process, an image held by a rootfs, a lock.
    Busy,
    /// This host or this user cannot do it.
    Unsupported,
    /// The kernel refused for want of permission.
    Permission,
    /// Data from outside breaks its format's rules: an archive, a manifest, an index, a record.
    Invalid,
    /// Data from outside exceeds one of our limits.
    Limit,
    /// Bytes are not what their digest says.
    Integrity,
    /// A system call failed for a reason not named above.
    Io,
    /// A helper process (`fusermount3`, our own server) failed.
    Helper,
}

impl Kind {
    /// The process exit code: 1 failed, 2 usage, 3 not found, 4 busy, 5 not possible on this host.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::Busy => 4,
            Kind::Unsupported => 5,
            Kind::Exists
            | Kind::Permission
            | Kind::Invalid
            | Kind::Limit
            | Kind::Integrity
            | Kind::Io
            | Kind::Helper => 1,
        }
    }

    /// The kind that an errno from a system call stands for, where nothing better is known.
    pub fn of_errno(errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        match errno {
            Errno::NOENT | Errno::NOTDIR => Kind::NotFound,
            Errno::EXIST => Kind::Exists,
            Errno::BUSY | Errno::TXTBSY | Errno::AGAIN => Kind::Busy,
            Errno::PERM | Errno::ACCESS => Kind::Permission,
            Errno::NOSYS | Errno::OPNOTSUPP => Kind::Unsupported,
            _ => Kind::Io,
        }
    }
}

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// An operation on a subject that failed, with its cause and, where there is one, the remedy.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    op: Cow<'static, str>,
    subject: String,
    source: Source,
    hint: Option<Cow<'static, str>>,
    undo: Vec<Error>,
    items: Vec<String>,
}

impl Error {
    /// `op` is a verb phrase ("mount volume"), `subject` what it was done to ("/data"), `cause` an error or a plain text.
    pub fn new(
        kind: Kind,
        op: impl Into<Cow<'static, str>>,
        subject: impl fmt::Display,
        cause: impl Into<Source>,
    ) -> Self {
        Error(Box::new(Inner {
            kind,
            op: op.into(),
            subject: subject.to_string(),
            source: cause.into(),
            hint: None,
            undo: Vec::new(),
            items: Vec::new(),
        }))
    }

    /// A failed system call: the kind follows from the errno.
    pub fn sys(op: impl Into<Cow<'static, str>>, subject: impl fmt::Display, errno: rustix::io::Errno) -> Self {
        Self::new(Kind::of_errno(errno), op, subject, std::io::Error::from(errno))
    }

    /// A failed I/O operation: the kind follows from its errno, where it has one.
    pub fn io(op: impl Into<Cow<'static, str>>, subject: impl fmt::Display, cause: std::io::Error) -> Self {
        let kind = rustix::io::Errno::from_io_error(&cause).map_or(Kind::Io, Kind::of_errno);
        Self::new(kind, op, subject, cause)
    }

    /// This error as the cause of a larger operation's, of the same kind: `import x.aci: place entry "a": ...`.
    #[must_use]
    pub fn within(self, op: impl Into<Cow<'static, str>>, subject: impl fmt::Display) -> Self {
        Self::new(self.kind(), op, subject, self)
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// The same error with another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Attach the failure of an undo step. The first error stays the error.
    #[must_use]
    pub fn with_undo(mut self, undo: Result<()>) -> Self {
        if let Err(error) = undo {
            self.0.undo.push(error);
        }
        self
    }

    /// What it consists of, a line each below it.
    #[must_use]
    pub fn items(mut self, items: impl IntoIterator<Item = String>) -> Self {
        self.0.items.extend(items);
        self
    }

    /// The error, and each of its items, as they are printed one below the other.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        std::iter::once(self.headline()).chain(self.0.items.iter().map(|item| format!("  {item}")))
    }

    fn headline(&self) -> String {
        let Inner { op, subject, source, hint, undo, .. } = &*self.0;
        let space = if subject.is_empty() { "" } else { " " };
        let mut text = format!("{op}{space}{subject}: {source}");
        if let Some(hint) = hint {
            text = format!("{text}; {hint}");
        }
        undo.iter().fold(text, |text, undo| format!("{text}; and undoing it failed: {undo}"))
    }

    /// Did an undo fail?
    pub fn left_something(&self) -> bool {
        !self.0.undo.is_empty()
    }

    /// What sort of failure it was.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The subject of the failed operation, as text.
    pub fn subject(&self) -> &str {
        &self.0.subject
    }

    /// Why it failed, without operation and subject.
    pub fn cause(&self) -> String {
        self.0.source.to_string()
    }

    /// What the user can do about it; empty where nothing is known.
    pub fn remedy(&self) -> &str {
        self.0.hint.as_deref().unwrap_or_default()
    }

    /// The errno at the bottom of it, where there is one.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&*self.0.source);
        while let Some(error) = next {
            if let Some(inner) = error.downcast_ref::<Error>() {
                return inner.errno();
            }
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                return rustix::io::Errno::from_io_error(io);
            }
            next = error.source();
        }
        None
    }
}

/// An error as another process tells it: nothing of it is lost on the way but the types of its causes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SentError {
    kind: Kind,
    op: String,
    subject: String,
    cause: String,
    errno: Option<i32>,
    hint: Option<String>,
    undo: Vec<SentError>,
    #[serde(default)]
    items: Vec<String>,
}

impl From<&Error> for SentError {
    fn from(error: &Error) -> Self {
        let inner = &*error.0;
        SentError {
            kind: inner.kind,
            op: inner.op.to_string(),
            subject: inner.subject.clone(),
            cause: inner.source.to_string(),
            errno: error.errno().map(rustix::io::Errno::raw_os_error),
            hint: inner.hint.as_ref().map(ToString::to_string),
            undo: inner.undo.iter().map(SentError::from).collect(),
            items: inner.items.clone(),
        }
    }
}

/// A cause that came as text, with the errno that was at the bottom of it.
#[derive(Debug)]
struct SentCause {
    text: String,
    errno: Option<std::io::Error>,
}

impl fmt::Display for SentCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for SentCause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.errno.as_ref().map(|e| e as _)
    }
}

impl From<SentError> for Error {
    fn from(told: SentError) -> Self {
        let errno = told.errno.map(std::io::Error::from_raw_os_error);
        Error(Box::new(Inner {
            kind: told.kind,
            op: told.op.into(),
            subject: told.subject,
            source: Box::new(SentCause { text: told.cause, errno }),
            hint: told.hint.map(Into::into),
            undo: told.undo.into_iter().map(Error::from).collect(),
            items: told.items,
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, line) in self.lines().enumerate() {
            write!(f, "{}{line}", if number == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self})", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The cause is part of our own text already: what stands below it is next.
        self.0.source.source()
    }
}

/// A path as text for messages: quoted only where it holds something that would not show, control bytes escaped.
pub(crate) fn show(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    match path.to_str() {
        Some(text) if !text.is_empty() && !text.chars().any(|c| c.is_control() || c == '"') => text.to_owned(),
        _ => format!("\"{}\"", path.as_os_str().as_encoded_bytes().escape_ascii()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_operation_subject_cause_remedy_and_failed_undo() {
        let undo = Err(Error::sys("unmount", "/r", rustix::io::Errno::BUSY));
        let error = Error::new(Kind::Usage, "mount volume", "/data", "the image has no such directory")
            .hint("create it in the image, or use --backend fuse")
            .with_undo(undo);
        assert_eq!(
            error.to_string(),
            "mount volume /data: the image has no such directory; create it in the image, or use --backend fuse\
             ; and undoing it failed: unmount /r: Device or resource busy (os error 16)"
        );
        assert_eq!(error.kind().exit_code(), 2);
    }

    #[test]
    fn errno_is_found_below_an_io_error() {
        let error = Error::io("open", "/x", std::io::Error::from_raw_os_error(libc::ENOTCONN));
        assert_eq!(error.errno(), Some(rustix::io::Errno::NOTCONN));
        assert_eq!(error.kind(), Kind::Io);
        let larger = error.within("import", "y.aci");
        assert_eq!(larger.errno(), Some(rustix::io::Errno::NOTCONN));
        assert!(larger.to_string().starts_with("import y.aci: open /x: "), "{larger}");
    }

    #[test]
    fn an_error_told_by_another_process_is_the_same() {
        let first = Error::sys("mount", "/r", rustix::io::Errno::PERM).hint("run as root").with_undo(Err(Error::new(
            Kind::Helper,
            "stop",
            "7",
            "it will not",
        )));
        let json = serde_json::to_string(&SentError::from(&first)).unwrap();
        let second = Error::from(serde_json::from_str::<SentError>(&json).unwrap());
        assert_eq!(second.to_string(), first.to_string());
        assert_eq!((second.kind(), second.errno()), (Kind::Permission, Some(rustix::io::Errno::PERM)));
    }

    #[test]
    fn show_quotes_only_what_would_not_show() {
        assert_eq!(show("/a b,c"), "/a b,c");
        assert_eq!(show("/a\nb"), "\"/a\\nb\"");
    }
}
