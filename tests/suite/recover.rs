//! `fsprov recover`: after a crash, what is on the disk and in mountinfo is the truth.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::destroy::health;
use super::volumes::{sandbox, volume};
use crate::common::harness::on;
use crate::common::{Case, Enter, Need, Stage, system};

/// What `recover` said of each id.
#[track_caller]
fn recover(stage: &Stage, args: &[&str]) -> Vec<(String, String)> {
    let said = stage.fsprov(["recover", "--json"].iter().chain(args).copied()).run().ok().json();
    let mut all: Vec<_> = said
        .as_array()
        .expect("an array")
        .iter()
        .map(|r| {
            let text = |key: &str| r[key].as_str().map_or_else(|| r[key].to_string(), str::to_owned);
            (text("id"), text("outcome"))
        })
        .collect();
    all.sort();
    all
}

fn outcome(id: &str, what: &str) -> (String, String) {
    (id.into(), what.into())
}

pub(crate) const HEALS: Case = Case::new("recover_keeps_heals_and_destroys", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let vol = stage.mkdir("vol");
    for id in ["fine", "gone", "unknown"] {
        let mut options = vec!["--id".into(), id.into()];
        options.extend(volume(&vol, "/data", "rw"));
        stage.mount(&image, id, options);
    }
    stage.write("vol/kept", "kept");
    // One is unmounted by hand; under FUSE another server is killed, so there are dead ones as well.
    if stage.lane.enter == Enter::User {
        stage.tool("fusermount3", ["-u"]).arg(stage.path("gone")).run().ok();
    } else {
        stage.tool("umount", ["-R"]).arg(stage.path("gone")).run().ok();
    }
    assert_eq!(
        recover(stage, &["--keep", "fine", "--keep", "gone"]),
        [outcome("fine", "kept"), outcome("gone", "healed"), outcome("unknown", "destroyed")]
    );
    for id in ["fine", "gone"] {
        assert_eq!(fs::read_to_string(stage.path(id).join("data/kept")).expect("read"), "kept", "{id}");
        assert!(stage.path(id).join("etc/hosts").exists(), "{id}");
    }
    assert!(!stage.path("unknown").exists());
    // Twice gives the same as once.
    assert_eq!(recover(stage, &[]), [outcome("fine", "kept"), outcome("gone", "kept")]);
    stage.fsprov(["unmount", "--all"]).run().ok();
    assert_eq!(fs::read_to_string(stage.path("vol/kept")).expect("read"), "kept");
    assert!(recover(stage, &[]).is_empty());
});

pub(crate) const DEAD_SERVER: Case = Case::new("recover_starts_a_dead_server_again", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let mut options = vec!["--id".into(), "one".into()];
    options.extend(volume(stage.mkdir("vol"), "/data", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);
    for server in stage.servers() {
        system::kill(server.pid);
    }
    assert!(system::survivors(Duration::from_secs(3)).is_empty());
    assert_eq!(health(stage), "dead");
    assert_eq!(recover(stage, &[]), [outcome("one", "healed")]);
    assert_eq!(health(stage), "ready");
    fs::write(rootfs.join("data/x"), "x").expect("write");
    assert_eq!(system::mounts().iter().filter(|m| m.point == rootfs).count(), 1, "the dead mount is not beneath");
});

/// Records of another boot: no mount, no process, whatever the record says. A pid in them is somebody else's.
pub(crate) const REBOOT: Case = Case::new("recover_after_a_reboot", on::every_backend, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.mount(&image, "rootfs", ["--id", "one"]);
    let file = stage.records()[0].join("record.json");
    let record = fs::read_to_string(&file).expect("read");
    stage.fsprov(["unmount", "one"]).run().ok();
    // An innocent process stands where the server's pid was.
    let mut innocent = std::process::Command::new("sleep").arg("60").spawn().expect("start");
    let mut value: Value = serde_json::from_str(&record).expect("JSON");
    value["boot_id"] = "00000000-0000-4000-8000-000000000000".into();
    for who in ["supervisor", "worker"] {
        if let Some(process) = value.pointer_mut(&format!("/traces/{who}")) {
            process["pid"] = innocent.id().into();
        }
    }
    for (wanted, args) in [("healed", &[][..]), ("destroyed", &["--keep", "another"][..])] {
        fs::create_dir_all(file.parent().expect("parent").join("backend")).expect("mkdir");
        fs::create_dir_all(&rootfs).expect("mkdir");
        fs::write(&file, value.to_string()).expect("write");
        assert_eq!(health(stage), "gone");
        assert_eq!(recover(stage, args), [outcome("one", wanted)]);
        assert!(innocent.try_wait().expect("wait").is_none(), "a process that only has the pid was killed");
        assert_eq!(rootfs.join("etc/hosts").exists(), wanted == "healed");
        if wanted == "healed" {
            stage.fsprov(["unmount", "one"]).run().ok();
        }
    }
    let _ = innocent.kill();
    let _ = innocent.wait();
    stage.assert_nothing_left("after recovery");
});

pub(crate) const AFTER_A_CRASH: Case = Case::needing(
    "recover_after_provision_died_at_each_step",
    on::every_backend,
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        let mount = || {
            let mut options = vec!["--id".into(), "one".into()];
            options.extend(sandbox(stage));
            options.extend(volume("tmp", "/tmp", "rw"));
            stage.mount_call(&image, "made/rootfs", options)
        };
        let found = super::faults::steps(stage, mount());
        stage.fsprov(["unmount", "one"]).run().ok();
        for step in &found {
            let died = mount().env("FAILPOINTS", step.with("kill")).run();
            system::survivors(Duration::from_millis(200));
            let said = recover(stage, &[]);
            if died.code().is_none() {
                assert!(
                    said.iter().all(|(_, what)| what == "destroyed" || what == "healed" || what == "kept"),
                    "{step}: {said:?}"
                );
            }
            assert_eq!(
                recover(stage, &[]).iter().filter(|(_, what)| what != "kept").count(),
                0,
                "{step}: twice is once"
            );
            stage.fsprov(["unmount", "--all"]).run().ok();
            stage.assert_nothing_left(&format!("after {step} died, recover and unmount"));
            assert!(!stage.path("made").exists(), "{step}: directories made for the mount point stayed");
        }
    },
);
