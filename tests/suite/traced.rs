//! What system calls say: once a mount has opened its places, no path of the host is looked up again.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use super::volumes::{sandbox, volume};
use crate::common::harness::case;
use crate::common::{Enter, Lane, Need, Stage, system};

/// Paths that may be looked up after that, and why. All others are what a user of the host may own.
const EXCEPTIONS: [(&str, &str); 6] = [
    ("/proc", "the kernel's own: descriptors of ours, mountinfo, ids"),
    ("/sys", "the kernel's own: connections of FUSE"),
    ("/dev", "devices: /dev/fuse, /dev/null"),
    ("/etc/ld.so", "the dynamic loader of the server's program"),
    ("/lib", "likewise: libraries"),
    ("/usr/lib", "likewise"),
];

/// The step after which everything is open.
const OPENED: &str = "provision.opened";

fn root(lane: &Lane) -> bool {
    lane.enter == Enter::Root && !lane.backend.is_empty()
}

case!(
    "no_path_of_the_host_is_looked_up_after_the_places_are_open",
    root,
    &[Need::Failpoints, Need::Tool("strace")],
    |stage: &Stage| {
        let image = stage.small_image();
        stage.mkdir("sandbox/a/b");
        let mut args: Vec<OsString> =
            ["-D", "-f", "-y", "-s", "4096", "-e", "trace=%file,write,fsconfig"].map(Into::into).into();
        args.extend(["-o".into(), stage.path("trace").into(), crate::common::stage::program().into()]);
        args.extend(["mount", "--id", "one", "--backend", stage.lane.backend].map(OsString::from));
        args.extend(sandbox(stage));
        args.extend(volume("a/b", "/data", "rw"));
        args.extend(volume("new", "/tmp", "ro"));
        args.extend([image.into_os_string(), stage.path("made/rootfs").into_os_string()]);
        stage.tool("strace", args).env("FSPROV_LOG", "fsprov::fault=trace").run().ok();
        // Servers are traced to their end, by a process that ends with the last of them.
        stage.unmount("made/rootfs");
        assert!(system::survivors(Duration::from_secs(30)).is_empty());
        let trace = fs::read_to_string(stage.path("trace")).expect("read the trace");
        let (before, after) = trace.split_once(OPENED).expect("it passed the step");
        assert!(looked_up(before).iter().any(|path| path == "/"), "it opened nothing before");
        let state = stage.state().display().to_string();
        let allowed =
            |path: &str| path.starts_with(&state) || EXCEPTIONS.iter().any(|(start, _)| path.starts_with(start));
        let bad: BTreeSet<_> = looked_up(after).into_iter().filter(|path| !allowed(path)).collect();
        assert!(bad.is_empty(), "looked up after {OPENED}: {bad:#?}");
    },
);

/// The absolute paths in a trace that `strace` wrote. The root directory is one: whoever opens it goes on from there. (A server makes
/// it its working directory, which opens nothing.)
fn looked_up(trace: &str) -> Vec<String> {
    let mut found = Vec::new();
    // The worker gives up the host's root for one of its own, and opens both for that alone (pivot_root(2)).
    let process = |line: &str| line.split_once(' ').map(|(pid, _)| pid.to_owned());
    let gave_up: Vec<_> = trace.lines().filter(|line| line.contains("pivot_root(")).filter_map(process).collect();
    for line in trace.lines().filter(|line| !line.contains("write(") && !line.contains("chdir(\"/\"")) {
        // PID CALL(ARGUMENTS) = RESULT; what is read from a symlink, or written into one, is no path that is looked up.
        let Some((call, arguments)) = line.split_once('(') else { continue };
        let quoted = arguments.split('"').skip(1).step_by(2);
        let (skip, count) = match call {
            call if call.contains("readlink") => (0, 1),
            call if call.contains("symlink") => (1, 1),
            _ => (0, usize::MAX),
        };
        let is_own_root = |path: &&str| *path == "/" && process(line).is_some_and(|pid| gave_up.contains(&pid));
        let quoted = quoted.filter(|path| !is_own_root(path));
        found.extend(quoted.skip(skip).take(count).filter(|text| text.starts_with('/')).map(str::to_owned));
    }
    found
}
