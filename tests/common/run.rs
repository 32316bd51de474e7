//! Running a program and keeping what it said. Output goes to files, not pipes: a server that kept our pipe open would hang the
//! test instead of failing the one case that looks for it.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest that one command may take, 90 s of a case's 240: far above anything the suite runs, so that what hangs is told from what is
/// slow.
fn command_limit() -> Duration {
    super::harness::case_limit() * 3 / 8
}

/// How a command ended and what it said.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) line: String,
    pub(crate) status: Option<ExitStatus>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) took: Duration,
}

impl Outcome {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.and_then(|s| s.code())
    }

    pub(crate) fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    pub(crate) fn describe(&self) -> String {
        let how = match self.status {
            None => format!("killed after {:?}: it hung", command_limit()),
            Some(s) => match (s.code(), s.signal()) {
                (Some(code), _) => format!("exit {code}"),
                (None, signal) => format!("signal {signal:?}"),
            },
        };
        let mut text = format!("$ {}\n  {how} after {:.0?}\n", self.line, self.took);
        for (name, bytes) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(6000)]).into_owned();
            for line in shown.lines() {
                _ = writeln!(text, "  {name}| {line}");
            }
        }
        text
    }

    /// It must have exited with 0.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert!(self.code() == Some(0), "this should have succeeded:\n{}", self.describe());
        self
    }

    /// It must have exited with `code`, and said each of `texts` on stderr.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, texts: &[&str]) -> Self {
        assert!(self.code() == Some(code), "this should have exited with {code}:\n{}", self.describe());
        let said = self.err();
        for text in texts {
            assert!(said.contains(text), "stderr should say {text:?}:\n{}", self.describe());
        }
        self
    }

    /// It must have failed with one of our own exit codes, and said each of `texts` on stderr.
    #[track_caller]
    pub(crate) fn fails_saying(self, texts: &[&str]) -> Self {
        let code = self.code().filter(|code| (1..=5).contains(code));
        let Some(code) = code else { panic!("this should have failed with exit code 1 to 5:\n{}", self.describe()) };
        self.fails(code, texts)
    }

    /// stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        match serde_json::from_slice(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("stdout should be JSON: {error}\n{}", self.describe()),
        }
    }
}

/// Run it to its end, and do `beside` again and again meanwhile.
pub(crate) fn run_beside(mut command: Command, mut beside: impl FnMut()) -> Outcome {
    let mut line = String::new();
    for word in std::iter::once(command.get_program()).chain(command.get_args()) {
        line.push_str(&quote(word));
        line.push(' ');
    }
    let (mut out, mut err) = (tempfile::tempfile().expect("temp file"), tempfile::tempfile().expect("temp file"));
    command.stdout(out.try_clone().expect("dup")).stderr(err.try_clone().expect("dup"));
    command.stdin(Stdio::null());
    let started = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("start {line}: {e}"));
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break Some(status);
        }
        if started.elapsed() > command_limit() {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        beside();
        std::thread::sleep(Duration::from_millis(2));
    };
    let read = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind().expect("rewind");
        file.read_to_end(&mut bytes).expect("read output");
        bytes
    };
    Outcome { line, status, stdout: read(&mut out), stderr: read(&mut err), took: started.elapsed() }
}

fn quote(word: &OsStr) -> String {
    let text = word.as_encoded_bytes().escape_ascii().to_string();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.,:=+@%".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) { text } else { format!("'{text}'") }
}

/// Anything that can stand in an argument list.
pub(crate) fn words<I: IntoIterator<Item = S>, S: Into<OsString>>(args: I) -> Vec<OsString> {
    args.into_iter().map(Into::into).collect()
}
