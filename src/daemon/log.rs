//! The log of a server: lines on its stderr, which is its log file or a terminal; the file does not grow beyond a bound.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::fd::AsFd as _;
use std::str::FromStr as _;

use rustix::fs::FileType;

use crate::error::{Error, Kind};

/// Largest log file. Beyond it the older half goes: a server that complains for months must not fill a disk.
const MAX_LOG: u64 = 1024 * 1024;
/// How many bytes are written between two looks at the file's size.
const LOOK_EVERY: u64 = 16 * 1024;

/// Start logging to stderr. `role` tells the lines of supervisor and worker apart.
///
/// The level may be changed later ([`set_level`]), so the filter of FSPROV_LOG decides only where it is stricter.
pub(super) fn start(role: &'static str) {
    let filter = std::env::var("FSPROV_LOG").unwrap_or_else(|_| "fsprov=info".to_owned());
    let logger = env_logger::Builder::new()
        .parse_filters("trace")
        .format(move |out, record| {
            let time = out.timestamp_millis();
            let message = record.args().to_string();
            writeln!(out, "{time} {role} {} {} {}", record.level(), record.target(), crate::printable::line(&message))
        })
        .target(env_logger::Target::Pipe(Box::new(BoundedStderr::new())))
        .build();
    if log::set_boxed_logger(Box::new(Ours { logger })).is_ok() {
        log::set_max_level(level_of(&filter));
    }
}

/// Log this much from now on. `false`: not a level.
pub(super) fn set_level(level: &str) -> bool {
    let parsed = log::LevelFilter::from_str(level);
    if let Ok(level) = parsed {
        log::set_max_level(level);
    }
    parsed.is_ok()
}

/// The error for a text that [`set_level`] does not take.
pub(super) fn no_level(level: &str) -> Error {
    Error::new(Kind::Usage, "set log level", level, "must be one of off, error, warn, info, debug, trace")
}

/// The level that a filter (`info`, `fsprov=debug,fuser=warn`) gives this crate.
fn level_of(filter: &str) -> log::LevelFilter {
    let level = filter.split(',').filter_map(|part| match part.rsplit_once('=') {
        Some((target, level)) if target.starts_with("fsprov") => log::LevelFilter::from_str(level).ok(),
        Some(_) => None,
        None => log::LevelFilter::from_str(part).ok(),
    });
    level.max().unwrap_or(log::LevelFilter::Info)
}

/// Other crates' lines count from a warning on: fuser says a line for every request.
struct Ours {
    logger: env_logger::Logger,
}

impl log::Log for Ours {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("fsprov") || metadata.level() <= log::Level::Warn
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.logger.log(record);
        }
    }
    fn flush(&self) {
        self.logger.flush();
    }
}

struct BoundedStderr {
    /// The log file again, for reading what is kept; `None` where stderr is not a file.
    file: Option<File>,
    since_look: u64,
}

impl BoundedStderr {
    fn new() -> Self {
        let is_file = rustix::fs::fstat(io::stderr().as_fd())
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        let file = is_file.then(|| io::stderr().as_fd().try_clone_to_owned().ok().map(File::from)).flatten();
        BoundedStderr { file, since_look: 0 }
    }
}

impl Write for BoundedStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.since_look += bytes.len() as u64;
        if let Some(file) = self.file.as_mut().filter(|_| self.since_look >= LOOK_EVERY) {
            self.since_look = 0;
            // A log that cannot be shortened is written on.
            let _ = shorten(file, MAX_LOG);
        }
        io::stderr().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keep the newer half of a file that is longer than `limit`. Lines that another process writes meanwhile may be lost.
fn shorten(file: &mut File, limit: u64) -> io::Result<()> {
    let length = file.metadata()?.len();
    if length <= limit {
        return Ok(());
    }
    let mut kept = Vec::new();
    file.seek(SeekFrom::Start(length - limit / 2))?;
    file.take(limit).read_to_end(&mut kept)?;
    let start = kept.iter().position(|&b| b == b'\n').map_or(0, |at| at + 1);
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&kept[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_give_a_level() {
        for (filter, want) in [
            ("info", log::LevelFilter::Info),
            ("fsprov=debug,fuser=trace", log::LevelFilter::Debug),
            ("fsprov::fault=trace", log::LevelFilter::Trace),
            ("fuser=trace", log::LevelFilter::Info),
            ("off", log::LevelFilter::Off),
        ] {
            assert_eq!(level_of(filter), want, "{filter}");
        }
    }

    #[test]
    fn a_long_log_keeps_its_newer_lines() {
        let mut file = tempfile::tempfile().unwrap();
        for n in 0..100 {
            writeln!(file, "line {n:02}").unwrap();
        }
        shorten(&mut file, 1000).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 800, "under the limit: untouched");
        shorten(&mut file, 400).unwrap();
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("line 7") && text.ends_with("line 99\n") && text.len() <= 200, "{text}");
    }
}
