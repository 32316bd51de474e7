//! The processes that read archives: what they cannot do, what they may take, and that none outlives who asked.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::store::{pack, small_aci_tree};
use crate::common::harness::{case, on};
use crate::common::stage::Call;
use crate::common::system::{self, Process, eventually};
use crate::common::{Enter, Need, Stage};

/// An archive that both are needed for, and the id it must get.
fn compressed(stage: &Stage) -> (PathBuf, String) {
    let plain = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let sum = stage.tool("sha512sum", [&plain]).run().ok().out();
    let packed = stage.tool("gzip", ["-c"]).arg(&plain).run().ok().stdout;
    let id = format!("sha512-{}", sum.split_whitespace().next().expect("a digest"));
    (stage.write("small.aci.gz", packed), id)
}

fn import<'a>(stage: &'a Stage, archive: &Path) -> Call<'a> {
    stage.fsprov(["image", "import"]).arg(archive)
}

/// Which walls are taken away, to see that the others do.
const WALLS_TAKEN: [(&str, &str); 2] = [("all walls", ""), ("no landlock", ";walls.landlock=return")];

// A decoder and an unpacker that were taken over try what they can think of, and get nowhere; the import is what it would have been.
case!(
    "a_reader_of_archives_that_was_taken_over_gets_nowhere",
    on::once_each,
    &[Need::Failpoints, Need::Tool("gzip"), Need::MountCalls],
    |stage: &Stage| {
        let (archive, id) = compressed(stage);
        let host = stage.mkdir("host");
        let secret = stage.write("host/secret", "secret");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).expect("chmod");
        let before = fs::metadata(&secret).expect("stat");
        let mut neighbour = Command::new("sleep").arg("300").current_dir(&host).spawn().expect("start a neighbour");
        let told = format!("{}:{}:{}", system::my_pid(), neighbour.id(), host.display());
        let mut report = String::new();
        for (walls, taken) in WALLS_TAKEN {
            let points = format!("decoder.escapes=return({told});unpacker.escapes=return({told}){taken}");
            let said = import(stage, &archive).arg("--json").env("FAILPOINTS", &points).run().ok();
            assert_eq!(said.json()["id"], id, "{walls}");
            let text = said.err();
            let lines: Vec<&str> = text.lines().filter(|line| line.contains("escapes: ")).collect();
            assert_eq!(lines.len(), 2, "the decoder and the unpacker: {}", said.describe());
            for line in lines {
                let words: Vec<&str> = line.split_once("escapes: ").expect("a report").1.split(' ').collect();
                let tried: usize = words[0].parse().expect("a number");
                assert!(tried >= 60, "{walls}: {line}");
                assert_eq!(words[2], "0", "{walls}: {line}");
                assert!(line.contains("own_root: true"), "{walls}: {line}");
                assert_eq!(line.contains("landlock: true"), taken.is_empty(), "{walls}: {line}");
                assert_eq!(line.contains("own_user: true"), stage.lane.is_real_root(), "{walls}: {line}");
                report += &format!("{}, {walls}: {line}\n", stage.lane.name);
            }
            stage.fsprov(["image", "verify"]).run().ok();
            stage.fsprov(["image", "rm", &id]).run().ok();
        }
        assert_eq!(fs::read_to_string(&secret).expect("read"), "secret");
        let after = fs::metadata(&secret).expect("stat");
        let what = |meta: &fs::Metadata| (meta.mode(), meta.uid(), meta.mtime(), meta.mtime_nsec(), meta.ctime_nsec());
        assert_eq!(what(&after), what(&before), "the file of the host was changed");
        assert_eq!(fs::read_dir(&host).expect("list").count(), 1, "something was made");
        assert!(neighbour.try_wait().expect("look").is_none(), "the neighbour was ended");
        neighbour.kill().expect("end it");
        neighbour.wait().expect("end it");
        if let Some(path) = std::env::var_os("FSPROV_TEST_REPORT") {
            let mut file = fs::File::options().append(true).create(true).open(path).expect("open the report");
            file.write_all(report.as_bytes()).expect("write the report");
        }
    },
);

// One that takes memory or time without end is ended, and the error says which.
case!(
    "a_reader_of_archives_takes_no_more_than_it_may",
    on::once_each,
    &[Need::Failpoints, Need::Tool("gzip")],
    |stage: &Stage| {
        let (archive, _) = compressed(stage);
        for who in ["decoder", "unpacker"] {
            for (what, words) in
                [("memory", ["needs more than", "MiB to be read"]), ("time", ["more processor time", "1 s for each"])]
            {
                let limit = if what == "time" { ";archive.cpu_seconds=return(1)" } else { "" };
                let points = format!("{who}.hog=return({what}){limit}");
                let said = import(stage, &archive).env("FAILPOINTS", &points).run().fails(1, &["small.aci.gz"]);
                assert!(words.iter().all(|word| said.err().contains(word)), "{who}, {what}: {}", said.describe());
                stage.assert_nothing_left(&format!("after the {who} took {what}"));
                let staged = fs::read_dir(stage.state().join("staging")).expect("list").count();
                assert_eq!(staged, 0, "{who}, {what}: left in staging");
            }
        }
        import(stage, &archive).run().ok();
    },
);

// An unpacker that was taken over by a part of an archive, and says it is done, gives no image the id of what came before that part.
case!("an_unpacker_that_stops_early_makes_no_image", on::once_each, &[Need::Failpoints], |stage: &Stage| {
    let tree = small_aci_tree(stage, "tree");
    // More than pipes hold.
    stage.write("tree/rootfs/big", vec![7; 8 << 20]);
    let archive = pack(stage, &tree, "big.aci");
    let points = "unpacker.lies=return(at once)";
    import(stage, &archive).env("FAILPOINTS", points).run().fails(1, &["big.aci", "stopped before its end"]);
    assert_eq!(stage.fsprov(["image", "list", "--json"]).run().ok().json(), serde_json::json!([]));
    stage.assert_nothing_left("after an unpacker that lies");
},);

fn readers() -> Vec<Process> {
    system::reap();
    let all = system::descendants_of(system::my_pid());
    all.into_iter().filter(|p| p.state != 'Z' && p.command.starts_with("fsprov: archive")).collect()
}

/// An import of an archive that comes slowly; it waits for more.
fn slow_import(stage: &Stage, archive: &Path) -> (std::process::Child, std::process::ChildStdin) {
    let mut call = stage.fsprov(["image", "import", "-"]);
    let said = fs::File::create(stage.path("said")).expect("create");
    let mut child =
        call.command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(said).spawn().expect("start an import");
    let mut to = child.stdin.take().expect("stdin");
    let bytes = fs::read(archive).expect("read");
    to.write_all(&bytes[..bytes.len() / 2]).expect("write a half");
    assert!(eventually(Duration::from_secs(20), || readers().len() == 2), "{:?}", readers());
    (child, to)
}

// Whoever imports may be killed or interrupted: nobody goes on reading.
case!("no_reader_of_archives_outlives_its_import", on::once_each, &[Need::Tool("gzip")], |stage: &Stage| {
    use rustix::process::{Pid, Signal, kill_process};
    let (archive, _) = compressed(stage);
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let (mut child, _to) = slow_import(stage, &archive);
        kill_process(Pid::from_child(&child), signal).expect("kill");
        child.wait().expect("wait");
        assert!(eventually(Duration::from_secs(30), || readers().is_empty()), "{signal:?}: {:?}", readers());
        // What is half made goes with the next.
        stage.fsprov(["image", "gc"]).run().ok();
        stage.assert_nothing_left(&format!("after {signal:?}"));
    }
},);

// One that is killed fails the import, and nothing is left.
case!(
    "an_import_whose_reader_is_killed_fails_and_leaves_nothing",
    on::once_each,
    &[Need::Tool("gzip")],
    |stage: &Stage| {
        let (archive, _) = compressed(stage);
        for which in [0, 1] {
            let (mut child, to) = slow_import(stage, &archive);
            let mut all = readers();
            all.sort_by_key(|process| process.pid);
            system::kill(all[which].pid);
            drop(to);
            let status = child.wait().expect("wait");
            let said = fs::read_to_string(stage.path("said")).expect("read");
            assert_eq!(status.code(), Some(1), "{said}");
            // The one that lives may be the first to tell what it misses.
            assert!(said.contains("was killed") || said.contains("import standard input"), "{said}");
            let staged = fs::read_dir(stage.state().join("staging")).expect("list").count();
            assert_eq!(staged, 0, "left in staging: {said}");
            stage.assert_nothing_left("after a reader was killed");
        }
    },
);

// Where root imports, the readers have a user of their own and of root's powers those that placing takes.
case!(
    "the_readers_of_archives_are_nobody",
    |lane| on::once_each(lane) && lane.enter == Enter::Root,
    &[Need::Tool("gzip")],
    |stage: &Stage| {
        let (mut child, to) = slow_import(stage, &compressed(stage).0);
        let field = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let mut seen = Vec::new();
        // They may still be raising their walls.
        assert!(eventually(Duration::from_secs(20), || {
            seen = readers()
                .iter()
                .filter_map(|p| fs::read_to_string(format!("/proc/{}/status", p.pid)).ok())
                .filter(|status| field(status, "Seccomp:") == ["2"])
                .collect();
            seen.len() == 2
        }));
        let mut users = Vec::new();
        let mut capabilities = Vec::new();
        for status in &seen {
            let uids = field(status, "Uid:");
            assert!(uids[..3].iter().all(|uid| *uid == uids[0] && uid.parse::<u32>().expect("a uid") >= 0x7000_0000));
            users.push(uids[0].clone());
            assert!(field(status, "Groups:").is_empty(), "{status}");
            assert_eq!(field(status, "NoNewPrivs:"), ["1"]);
            assert_eq!(field(status, "Threads:"), ["1"]);
            capabilities.push(u64::from_str_radix(&field(status, "CapPrm:")[0], 16).expect("hex"));
            assert_eq!(field(status, "CapPrm:"), field(status, "CapBnd:"));
        }
        assert_ne!(users[0], users[1]);
        capabilities.sort_unstable();
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP (capability.h).
        assert_eq!(capabilities, [0, 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31]);
        drop(to);
        child.wait().expect("wait");
    },
);
