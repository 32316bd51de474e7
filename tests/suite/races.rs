//! Importers, provisioners and a collector at once: nothing in use is lost, and there is one copy of everything.
//!
//! `FSPROV_TEST_ROUNDS=1000` sets how often each of them goes (10 otherwise); give that `FSPROV_TEST_LIMIT=3600`, too.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::durable::{layered, layers};
use super::store::{pack, small_aci_tree};
use crate::common::harness::{case, on};
use crate::common::stage::program;
use crate::common::{Enter, Need, Stage, system};

const EACH: usize = 4;
/// How often a provisioner looks for an image that the collector may just have taken. Each try is a process: some seconds.
const TRIES: usize = 500;

/// What is imported, under which name it is found, and files of it with their contents.
type Source = (PathBuf, &'static str, [(&'static str, &'static str); 2]);

/// What every thread needs to run commands: the stage itself stays with the one that made it.
struct Shared {
    dir: PathBuf,
    state: PathBuf,
    backend: Option<&'static str>,
    images: Vec<Source>,
}

impl Shared {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(program());
        command.args(args).env_clear().current_dir(&self.dir);
        command.env("LC_ALL", "C").env("HOME", self.dir.join("home")).env("FSPROV_ROOT", &self.state);
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.output().expect("start fsprov")
    }

    fn must(&self, args: &[&str]) -> String {
        let said = self.run(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(said.status.success(), "fsprov {args:?}: {}: {}", said.status, text(&said.stderr));
        text(&said.stdout)
    }

    /// Mount, look, unmount; gives how many tries it took.
    fn provision(&self, number: usize, round: usize) -> usize {
        let (_, name, files) = &self.images[(number + round) % self.images.len()];
        let rootfs = format!("./rootfs-{number}");
        for tries in 1..=TRIES {
            let mut args = vec!["mount"];
            args.extend(self.backend.into_iter().flat_map(|backend| ["--backend", backend]));
            args.extend([name, &*rootfs]);
            let said = self.run(&args);
            match said.status.code() {
                Some(0) => {}
                // It was collected: nobody used it.
                Some(3) => continue,
                _ => panic!("round {round}: mount {name}: {}", String::from_utf8_lossy(&said.stderr)),
            }
            let at = self.dir.join(&rootfs);
            for (file, content) in files {
                let got = std::fs::read_to_string(at.join(file));
                assert!(got.as_deref().is_ok_and(|text| text == *content), "round {round}: {name}: {file}: {got:?}");
            }
            let refused = self.run(&["image", "rm", name]);
            let code = refused.status.code();
            assert_eq!(
                code,
                Some(4),
                "round {round}: rm of {name} in use: {}",
                String::from_utf8_lossy(&refused.stderr)
            );
            // Not in any cache of the kernel's: it comes from the store now.
            let listed = std::fs::read_dir(at.join("etc")).map(Iterator::count);
            assert!(listed.as_ref().is_ok_and(|count| *count > 0), "round {round}: {name}: {listed:?}");
            self.must(&["unmount", &rootfs]);
            return tries;
        }
        panic!("round {round}: {name} was never there");
    }
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

// An importer that found a layer in the store, and a clean-up that takes it before it is used.
case!("a_layer_that_gc_takes_is_unpacked_again", on::once_each, &[Need::Failpoints], |stage: &Stage| {
    let layout = layered(stage, "layout", &layers(stage), false);
    let import = || stage.fsprov(["image", "import"]).arg(&layout);
    import().run().ok();
    stage.fsprov(["image", "rm", "layout"]).run().ok();
    let mut slow = import().env("FAILPOINTS", "store.add_layer=1*return(stop)");
    let mut importer = slow.command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start");
    let pid = importer.id() as i32;
    let has_found = || system::descendants_of(system::my_pid()).into_iter().any(|p| p.pid == pid && p.state == 'T');
    assert!(system::eventually(Duration::from_secs(30), has_found));
    let collected = stage.fsprov(["image", "gc", "--json"]).run().ok().json();
    assert_eq!(collected["layers"].as_array().map(Vec::len), Some(2), "{collected}");
    system::go_on(pid);
    let mut said = String::new();
    std::io::Read::read_to_string(importer.stderr.as_mut().expect("piped"), &mut said).expect("read");
    assert!(importer.wait().expect("wait").success(), "{said}");
    assert_eq!(stage.fsprov(["image", "verify", "--json"]).run().ok().out().trim(), "[]");
    assert_eq!(entries(&stage.state().join("layers")), 2);
});

case!("importers_provisioners_and_gc_at_once", on::once_each, &[Need::DevFuse], |stage: &Stage| {
    let rounds = std::env::var("FSPROV_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let both = layers(stage);
    let small = [("etc/hosts", "127.0.0.1 localhost\n"); 2];
    let upper = [("etc/hosts", "127.0.0.1 localhost\n"), ("opt/upper", "upper")];
    let lower = [("etc/hosts", "127.0.0.1 localhost\n"), ("opt/lower", "lower")];
    // In memory where that can be had: each import syncs its file system.
    let shm = Path::new("/dev/shm");
    let memory = tempfile::Builder::new()
        .prefix("fsprov-t.")
        .tempdir_in(if shm.is_dir() { shm } else { &stage.dir })
        .expect("make a state root");
    let shared = Shared {
        dir: stage.dir.clone(),
        state: memory.path().join("state"),
        backend: (stage.lane.enter != Enter::Root).then_some("fuse"),
        images: vec![
            (pack(stage, &small_aci_tree(stage, "tree"), "small.aci"), "example.com/small", small),
            (layered(stage, "layout", &both, false), "layout", upper),
            (layered(stage, "docker", &both, true), "docker", upper),
            (layered(stage, "lower", &both[..1], false), "lower", lower),
        ],
    };
    // A long run says where it is.
    let lane = stage.lane.name;
    let tell = |said: &str| {
        if std::env::var_os("FSPROV_TEST_TELL").is_some() {
            let path = format!("/tmp/fsprov-races-{}.txt", lane);
            std::fs::write(path, format!("{}: {said}\n", lane)).expect("write");
        }
    };
    let (working, collections, tries) = (AtomicBool::new(true), AtomicUsize::new(0), AtomicUsize::new(0));
    // Whoever fails ends the others: the scope waits for all of them.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.store(false, Ordering::Relaxed);
            }
        }
    }
    std::thread::scope(|scope| {
        let _ends = Ends(&working);
        let collector = scope.spawn(|| {
            while working.load(Ordering::Relaxed) {
                shared.must(&["image", "gc", "--unused"]);
                collections.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut busy = Vec::new();
        for number in 0..EACH {
            let (shared, tries, tell, working) = (&shared, &tries, &tell, &working);
            busy.push(scope.spawn(move || {
                let _ends = Ends(working);
                for round in (0..rounds).take_while(|_| working.load(Ordering::Relaxed)) {
                    let (source, ..) = &shared.images[(number + round) % shared.images.len()];
                    shared.must(&["image", "import", source.to_str().expect("UTF-8")]);
                }
            }));
            busy.push(scope.spawn(move || {
                let _ends = Ends(working);
                for round in (0..rounds).take_while(|_| working.load(Ordering::Relaxed)) {
                    if number == 0 && round % 50 == 0 {
                        tell(&format!("round {round} of {rounds}"));
                    }
                    tries.fetch_add(shared.provision(number, round), Ordering::Relaxed);
                }
            }));
        }
        // Importers end first: then the images must come from somewhere for who still looks for one.
        let mut failed = None;
        while !busy.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            for (source, ..) in &shared.images {
                shared.must(&["image", "import", source.to_str().expect("UTF-8")]);
            }
        }
        for thread in busy {
            failed = thread.join().err().or(failed);
        }
        working.store(false, Ordering::Relaxed);
        collector.join().expect("the collector");
        if let Some(panic) = failed {
            std::panic::resume_unwind(panic);
        }
    });
    for (source, ..) in &shared.images {
        shared.must(&["image", "import", source.to_str().expect("UTF-8")]);
    }
    assert_eq!(shared.must(&["image", "verify", "--json"]).trim(), "[]");
    assert_eq!(entries(&shared.state.join("images")), shared.images.len());
    assert_eq!(entries(&shared.state.join("layers")), both.len(), "one copy of each layer");
    assert_eq!(entries(&shared.state.join("staging")), 0);
    assert_eq!(entries(&shared.state.join("containers")), 0);
    assert!(!shared.state.join("aside").exists(), "something was damaged");
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    let sum = format!(
        "{rounds} rounds: {} mounts in {} tries, {} collections",
        EACH * rounds,
        count(&tries),
        count(&collections)
    );
    stage.note(sum.clone());
    tell(&sum);
});
