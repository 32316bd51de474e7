//! The supervisor's end of the socket to who started it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::{GO, Order, Report};
use crate::error::{Error, Kind, Result};

/// Longest wait for the caller's word to go on: it writes its record in between.
const CALLER_PATIENCE: Duration = Duration::from_secs(60);

/// Who started us, until the rootfs is ready.
pub(super) struct Caller {
    stream: BufReader<UnixStream>,
}

impl From<UnixStream> for Caller {
    fn from(stream: UnixStream) -> Self {
        Caller { stream: BufReader::new(stream) }
    }
}

impl Caller {
    pub(super) fn order(&mut self) -> Result<Order> {
        const OP: &str = "read order";
        self.stream.get_ref().set_read_timeout(Some(CALLER_PATIENCE)).map_err(|e| Error::io(OP, "", e))?;
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(|e| Error::io(OP, "", e))?;
        serde_json::from_str(&line).map_err(|e| Error::new(Kind::Invalid, OP, "", e))
    }

    pub(super) fn tell(&mut self, report: &Report) -> Result<()> {
        const OP: &str = "report to caller";
        let mut text = serde_json::to_vec(report).map_err(|e| Error::new(Kind::Io, OP, "", e))?;
        text.push(b'\n');
        self.stream.get_mut().write_all(&text).map_err(|e| Error::io(OP, "", e))
    }

    /// Tell, and wait for the word to go on. An error: the caller gave up or died.
    pub(super) fn ask(&mut self, report: &Report) -> Result<()> {
        const OP: &str = "wait for the caller's word";
        self.tell(report)?;
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).map_err(|e| Error::io(OP, "", e))?;
        if line == GO { Ok(()) } else { Err(Error::new(Kind::Helper, OP, "", "the caller gave up")) }
    }
}
