//! `fsprov bench`: how each backend does here, on the user's own image. scripts/bench is the long form, with peers.

use std::ffi::OsString;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use serde::Serialize;

use super::{Format, Global, complete, output};
use crate::backend::{self, Detach, Support};
use crate::error::{Error, Kind, Result, show};
use crate::id::ImageRef;
use crate::plan::{BackendKind, Live, Restraint};
use crate::provisioner::{Changes, Cover, Provisioner, Record, Request, Selector};
use crate::sys::signals::Termination;

/// How often each is measured; the middle one is shown. Odd.
const ROUNDS: usize = 3;
/// Small files read in one measurement: what a language's runtime opens when it starts, and more.
const SMALL_FILES: usize = 2000;
/// Largest of them.
const SMALL: u64 = 64 << 10;
/// As much of the largest file is read.
const LARGE: u64 = 256 << 20;
/// As many names are looked at: a walk of /usr, and an end for what is much larger.
const WALK: usize = 200_000;

#[derive(Debug, Args)]
#[command(after_help = "\
Each backend that works here mounts the image in a temporary directory; the tree is walked and read three times, and the medians \
are compared with a kernel bind mount (if you may not make one: with the image's own directory, which is as fast). x1.0 means as fast \
as that, x2.0 twice as long. `copy` is left out: it takes as long as copying the image, and is then as fast as the directory.

Example:
  fsprov bench ./some/rootfs")]
pub(super) struct Bench {
    #[command(flatten)]
    format: Format,
    /// The image, or a directory that is a root filesystem
    #[arg(default_value = "/usr", add = ArgValueCompleter::new(complete::images_and_paths))]
    image: OsString,
}

/// Seconds. The unit is part of the name in the JSON.
#[derive(Clone, Debug, Serialize)]
#[allow(clippy::struct_field_names)]
struct Times {
    #[serde(skip_serializing_if = "Option::is_none")]
    mount_s: Option<f64>,
    first_walk_s: f64,
    second_walk_s: f64,
    small_files_s: f64,
    small_files_again_s: f64,
    large_file_s: f64,
}

#[derive(Serialize)]
struct Row {
    subject: String,
    #[serde(flatten)]
    times: Times,
}

#[derive(Serialize)]
struct Missing {
    backend: BackendKind,
    reason: String,
    remedy: String,
}

#[derive(Serialize)]
struct Report {
    image: String,
    names: usize,
    small_files: usize,
    large_file_bytes: u64,
    /// Does the fuse backend answer from an index (an imported image), or ask the directory?
    indexed: bool,
    /// The first row is what the others are compared with.
    rows: Vec<Row>,
    missing: Vec<Missing>,
}

/// What there is to read in an image, relative to its root; found once, so that every backend reads the same.
struct Work {
    names: usize,
    small: Vec<PathBuf>,
    large: Option<(PathBuf, u64)>,
}

impl Bench {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        let image = ImageRef::parse(&self.image)?;
        let provisioner = global.provisioner()?;
        let stage = tempfile::Builder::new()
            .prefix("fsprov-bench-")
            .tempdir()
            .map_err(|e| Error::io("make", "a temporary directory", e))?;
        let mut missing = Vec::new();
        let mut subjects = Vec::new();
        for kind in [BackendKind::Bind, BackendKind::Fuse, BackendKind::Overlay] {
            match backend::of(kind).host_support(provisioner.host()) {
                Support::Yes => subjects.push(kind),
                Support::No { reason, remedy } => missing.push(Missing { backend: kind, reason, remedy }),
            }
        }
        let signals = Termination::catch()?;
        let mut work: Option<Work> = None;
        let mut rows: Vec<(String, Vec<Times>)> = Vec::new();
        let mut indexed = false;
        for round in 0..ROUNDS {
            for kind in subjects.clone() {
                if signals.came() {
                    return Err(Error::new(Kind::Io, "measure", show(&self.image), "interrupted"));
                }
                let (mut placed, record, mounted) = match put(&provisioner, &image, stage.path(), kind) {
                    Ok(put) => put,
                    // It works here, but not for this image: many layers under bind. A later round fails as it did.
                    Err(error) if round == 0 && error.kind() == Kind::Unsupported => {
                        missing.push(Missing { backend: kind, reason: error.to_string(), remedy: String::new() });
                        subjects.retain(|k| *k != kind);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let rootfs = record.plan.rootfs.clone();
                indexed |= record.plan.index.is_some();
                let single = match record.plan.layers.as_slice() {
                    [layer] => Some(layer.root.clone()),
                    _ => None,
                };
                if work.is_none() && single.is_none() {
                    // Only the rootfs shows what many layers are together. What was looked at is warm: put it in place again.
                    work = Some(look(&rootfs));
                    placed.take_away()?;
                    placed = put(&provisioner, &image, stage.path(), kind)?.0;
                }
                let work = work.get_or_insert_with(|| look(single.as_ref().unwrap_or(&rootfs)));
                if let Some(layer) = single.filter(|_| kind == subjects[0] && !subjects.contains(&BackendKind::Bind)) {
                    note(&mut rows, "directory", measure(&layer, work, None));
                }
                note(&mut rows, kind.name(), measure(&rootfs, work, Some(mounted)));
                placed.take_away()?;
            }
        }
        let Some(work) = work else {
            return Err(Error::new(
                Kind::Unsupported,
                "measure",
                show(&self.image),
                "no backend works here for this image",
            )
            .hint("`fsprov probe` tells what each needs"));
        };
        let report = Report {
            image: show(&self.image),
            names: work.names,
            small_files: work.small.len(),
            large_file_bytes: work.large.as_ref().map_or(0, |(_, size)| *size),
            indexed,
            rows: rows.into_iter().map(|(subject, times)| Row { subject, times: medians(&times) }).collect(),
            missing,
        };
        if self.format.json { output::json(&report) } else { tell(&report) }
    }
}

/// A rootfs that is taken away however the measurement ends.
struct Placed<'a> {
    provisioner: &'a Provisioner,
    rootfs: Option<PathBuf>,
}

impl Placed<'_> {
    fn take_away(&mut self) -> Result<()> {
        let Some(rootfs) = self.rootfs.take() else { return Ok(()) };
        self.provisioner.destroy(&Selector::parse(rootfs.as_os_str()), Detach::Lazy).map(|_| ())
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            log::error!(target: "fsprov::cli", "{error}");
        }
    }
}

/// Put the image in place by one backend, and say how long that took.
fn put<'a>(
    provisioner: &'a Provisioner,
    image: &ImageRef,
    stage: &Path,
    kind: BackendKind,
) -> Result<(Placed<'a>, Record, Duration)> {
    let request = Request {
        image: image.clone(),
        rootfs: stage.join("rootfs"),
        cover: Cover::Refuse,
        backend: Some(kind),
        sandbox: None,
        volumes: Vec::new(),
        id: None,
        changes: Changes::Refused,
        upper: None,
        stubs: false,
        live: Live::default(),
        restraint: Restraint::default(),
        ownership: None,
        ends_with: None,
    };
    let begin = Instant::now();
    let record = provisioner.provision(&request)?;
    let placed = Placed { provisioner, rootfs: Some(record.plan.rootfs.clone()) };
    Ok((placed, record, begin.elapsed()))
}

fn note(rows: &mut Vec<(String, Vec<Times>)>, subject: &str, times: Times) {
    match rows.iter_mut().find(|(s, _)| s == subject) {
        Some((_, all)) => all.push(times),
        None => rows.push((subject.to_owned(), vec![times])),
    }
}

/// Walk a tree: every name is asked for its attributes. What cannot be entered is passed over, by every backend alike.
fn walk(root: &Path, mut found: impl FnMut(&Path, &fs::Metadata)) -> usize {
    let mut names = 0;
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(items) = fs::read_dir(&directory) else { continue };
        for item in items.flatten() {
            if names == WALK {
                return names;
            }
            names += 1;
            let Ok(metadata) = item.metadata() else { continue };
            let path = item.path();
            found(&path, &metadata);
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    names
}

/// Choose what to read. It warms the machine's caches, too, so that no backend is the first to wait for the disk.
fn look(root: &Path) -> Work {
    let (mut small, mut large) = (Vec::new(), None::<(PathBuf, u64)>);
    let names = walk(root, |path, metadata| {
        let Ok(relative) = path.strip_prefix(root) else { return };
        if !metadata.is_file() || fs::File::open(path).is_err() {
            return;
        }
        if metadata.len() <= SMALL && small.len() < SMALL_FILES {
            small.push(relative.to_owned());
        }
        if large.as_ref().is_none_or(|(_, size)| *size < metadata.len()) {
            large = Some((relative.to_owned(), metadata.len()));
        }
    });
    let work = Work { names, small, large: large.map(|(path, size)| (path, size.min(LARGE))) };
    let _ = measure(root, &work, None);
    work
}

fn measure(root: &Path, work: &Work, mounted: Option<Duration>) -> Times {
    let seconds = |work: &mut dyn FnMut()| {
        let begin = Instant::now();
        work();
        begin.elapsed().as_secs_f64()
    };
    let mut buffer = vec![0; 1 << 20];
    let mut read = |path: &Path, limit: u64| {
        let Ok(file) = fs::File::open(root.join(path)) else { return };
        let mut file = file.take(limit);
        while file.read(&mut buffer).is_ok_and(|n| n > 0) {}
    };
    let mut walked = || {
        walk(root, |_, _| ());
    };
    let (first_walk_s, second_walk_s) = (seconds(&mut walked), seconds(&mut walked));
    let mut small = || work.small.iter().for_each(|path| read(path, SMALL));
    let (small_files_s, small_files_again_s) = (seconds(&mut small), seconds(&mut small));
    let large_file_s = seconds(&mut || {
        if let Some((path, size)) = &work.large {
            read(path, *size);
        }
    });
    let mount_s = mounted.map(|m| m.as_secs_f64());
    Times { mount_s, first_walk_s, second_walk_s, small_files_s, small_files_again_s, large_file_s }
}

fn medians(all: &[Times]) -> Times {
    let median = |pick: fn(&Times) -> f64| {
        let mut values: Vec<f64> = all.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    Times {
        mount_s: all.iter().all(|t| t.mount_s.is_some()).then(|| median(|t| t.mount_s.unwrap_or_default())),
        first_walk_s: median(|t| t.first_walk_s),
        second_walk_s: median(|t| t.second_walk_s),
        small_files_s: median(|t| t.small_files_s),
        small_files_again_s: median(|t| t.small_files_again_s),
        large_file_s: median(|t| t.large_file_s),
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1000.0)
}

/// `12.3 ms x1.4`: the time, and how many times that of the first row.
fn compared(seconds: f64, base: f64) -> String {
    if base > 0.0 { format!("{} x{:.1}", milliseconds(seconds), seconds / base) } else { milliseconds(seconds) }
}

fn tell(report: &Report) -> Result<()> {
    let Some(base) = report.rows.first().map(|r| r.times.clone()) else { return Ok(()) };
    output::line(&format!(
        "{}: {} names walked, {} small files and {} of a large one read; medians of {ROUNDS}, compared with {}",
        report.image,
        report.names,
        report.small_files,
        output::size(report.large_file_bytes),
        report.rows[0].subject
    ))?;
    let rows: Vec<[String; 7]> = report
        .rows
        .iter()
        .map(|Row { subject, times: t }| {
            [
                subject.clone(),
                t.mount_s.map_or_else(|| "-".into(), milliseconds),
                compared(t.first_walk_s, base.first_walk_s),
                compared(t.second_walk_s, base.second_walk_s),
                compared(t.small_files_s, base.small_files_s),
                compared(t.small_files_again_s, base.small_files_again_s),
                compared(t.large_file_s, base.large_file_s),
            ]
        })
        .collect();
    let heading = ["BACKEND", "MOUNT", "FIRST WALK", "AGAIN", "SMALL FILES", "AGAIN", "LARGE FILE"];
    output::table(heading, &rows)?;
    output::line("")?;
    output::line("x1.0 means: as fast as the first row; x2.0 takes twice as long. Shorter bars are faster.")?;
    for (name, pick) in MEASURED {
        output::line(name)?;
        let longest = report.rows.iter().map(|row| pick(&row.times)).fold(0.0, f64::max);
        for row in &report.rows {
            let seconds = pick(&row.times);
            output::line(&format!("  {:9} {} {}", row.subject, drawn(seconds, longest), milliseconds(seconds)))?;
        }
    }
    output::line("")?;
    for missing in &report.missing {
        output::line(&format!("{}: no: {}", missing.backend, missing.reason))?;
        if !missing.remedy.is_empty() {
            output::line(&format!("    {}", missing.remedy))?;
        }
    }
    let fuse = BackendKind::Fuse.name();
    if report.rows[0].subject == fuse {
        output::line(
            "Nothing here shows this image without fuse: run it as root to compare with the kernel's own backends.",
        )?;
    } else if let Some(fuse) = report.rows.iter().find(|r| r.subject == fuse) {
        output::line(&meaning(&fuse.times, &base, report.indexed))?;
    }
    Ok(())
}

type Pick = fn(&Times) -> f64;

/// What is drawn, and its name.
const MEASURED: [(&str, Pick); 5] = [
    ("first walk of the tree", |t| t.first_walk_s),
    ("the same again", |t| t.second_walk_s),
    ("reading small files", |t| t.small_files_s),
    ("the same again", |t| t.small_files_again_s),
    ("reading a large file", |t| t.large_file_s),
];
/// Cells of the longest bar: with name and figure it fits 80 columns.
const BAR_CELLS: u16 = 50;

/// A bar in the terminal, by eighths of a cell.
fn drawn(value: f64, longest: f64) -> String {
    const PARTS: [&str; 8] = ["", "\u{258f}", "\u{258e}", "\u{258d}", "\u{258c}", "\u{258b}", "\u{258a}", "\u{2589}"];
    let eighths = if longest > 0.0 { (value / longest * f64::from(BAR_CELLS * 8)).round() as usize } else { 0 };
    format!("{}{}", "\u{2588}".repeat(eighths / 8), PARTS[eighths % 8])
}

/// Slower than this is worth a word: below, measurements of one run differ by as much.
const NOTICEABLE: f64 = 1.3;

/// What the figures of the fuse backend mean for the user.
fn meaning(fuse: &Times, base: &Times, indexed: bool) -> String {
    let ratio = |pick: fn(&Times) -> f64| pick(fuse).max(1e-9) / pick(base).max(1e-9);
    let first = ratio(|t| t.first_walk_s);
    let again = ratio(|t| t.second_walk_s).max(ratio(|t| t.small_files_again_s));
    if again <= NOTICEABLE {
        return format!(
            "Under fuse, what was used once costs no more than with the kernel alone; the first look at it costs {first:.1} times as much."
        );
    }
    let slower = format!("Under fuse, what was used before costs {again:.1} times what the kernel alone takes");
    if indexed {
        format!(
            "{slower}. The image is served from its index, so the kernel answers most of that by itself: was the machine busy \
             meanwhile? If a second run says the same, a backend of the kernel (`--backend bind` or `overlay`, where it works) is faster."
        )
    } else {
        format!(
            "{slower}: a plain directory is asked again and again. Import it (`fsprov image import`), and it is served from an index."
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(value: f64) -> Times {
        Times {
            mount_s: Some(value),
            first_walk_s: value,
            second_walk_s: value,
            small_files_s: value,
            small_files_again_s: value,
            large_file_s: value,
        }
    }

    #[test]
    fn bars_are_as_long_as_what_they_show() {
        assert_eq!(drawn(2.0, 2.0), "\u{2588}".repeat(50));
        assert_eq!(drawn(1.0, 2.0), "\u{2588}".repeat(25));
        assert_eq!(drawn(1.0, 400.0), "\u{258f}");
        assert_eq!((drawn(0.0, 1.0), drawn(0.0, 0.0)), (String::new(), String::new()));
    }

    #[test]
    fn the_middle_one_counts() {
        let all = [times(9.0), times(1.0), times(2.0)];
        assert!((medians(&all).first_walk_s - 2.0).abs() < f64::EPSILON);
        assert_eq!(medians(&all).mount_s, Some(2.0));
        assert_eq!(medians(&[Times { mount_s: None, ..times(1.0) }]).mount_s, None);
    }

    #[test]
    fn a_walk_sees_every_name_and_the_choice_is_relative() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/small"), b"x").unwrap();
        fs::write(dir.path().join("large"), vec![0; 100_000]).unwrap();
        let work = look(dir.path());
        assert_eq!((work.names, work.small), (3, vec![PathBuf::from("d/small")]));
        assert_eq!(work.large, Some((PathBuf::from("large"), 100_000)));
    }

    #[test]
    fn what_it_means_follows_from_the_ratios() {
        assert!(meaning(&times(1.0), &times(1.0), false).contains("no more than with the kernel"));
        for (indexed, advised) in [(true, false), (false, true)] {
            let said = meaning(&times(5.0), &times(1.0), indexed);
            assert!(said.contains("5.0 times"), "{said}");
            assert_eq!(said.contains("image import"), advised, "{said}");
        }
        assert_eq!(compared(0.010, 0.005), "10.0 ms x2.0");
        assert_eq!(compared(0.010, 0.0), "10.0 ms");
    }
}
