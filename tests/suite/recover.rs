//! `fsprov recover`: after a crash, what is on the disk and in mountinfo is the truth.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::destroy::health;
use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::needs::has_mount_calls;
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Need, Stage, system};

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

case!("recover_keeps_heals_and_destroys", on::volumes, |stage: &Stage| {
    let image = stage.small_image();
    let vol = stage.mkdir("vol");
    for id in ["fine", "gone", "unknown"] {
        let mut options = vec!["--id".into(), id.into()];
        options.extend(volume(&vol, "/data", "rw"));
        stage.mount(&image, id, options);
    }
    stage.write("vol/kept", "kept");
    // One is unmounted by hand; under FUSE another server is killed, so there are dead ones as well.
    // A copy is no mount: it loses its volume.
    let gone = if stage.lane.backend == "copy" { "gone/data" } else { "gone" };
    if stage.lane.enter == Enter::User {
        stage.tool("fusermount3", ["-u"]).arg(stage.path(gone)).run().ok();
    } else {
        stage.tool("umount", ["-R"]).arg(stage.path(gone)).run().ok();
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

case!("recover_starts_a_dead_server_again", on::fuse, |stage: &Stage| {
    let image = stage.small_image();
    let mut options = vec!["--id".into(), "one".into()];
    options.extend(volume(stage.mkdir("vol"), "/data", "rw"));
    let rootfs = stage.mount(&image, "rootfs", options);
    for server in stage.servers() {
        system::kill(server.pid);
    }
    assert!(system::survivors(Duration::from_secs(30)).is_empty());
    assert_eq!(health(stage), "dead");
    assert_eq!(recover(stage, &[]), [outcome("one", "healed")]);
    assert_eq!(health(stage), "ready");
    fs::write(rootfs.join("data/x"), "x").expect("write");
    assert_eq!(system::mounts().iter().filter(|m| m.point == rootfs).count(), 1, "the dead mount is not beneath");
});

// Records of another boot: no mount, no process, whatever the record says. A pid in them is somebody else's.
case!("recover_after_a_reboot", on::every_backend, |stage: &Stage| {
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
        let again = if wanted == "healed" { vec![outcome("one", "kept")] } else { Vec::new() };
        assert_eq!(recover(stage, args), again, "twice is once");
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

/// Every step of a mount with these options and of its unmount dies once; then `recover`, twice, and nothing may be left that is not
/// whole: no mount, process, record, directory, and no byte of a volume lost.
fn dies_at_each_step(stage: &Stage, options: &[&str]) {
    let image = stage.small_image();
    let before = picture(&image);
    let volumes = stage.lane.has_volumes();
    let mount = || {
        let mut all = vec!["--id".into(), "one".into()];
        all.extend(sandbox(stage));
        all.extend(options.iter().map(OsString::from));
        if volumes {
            all.extend(volume("tmp", "/tmp", "rw"));
            all.extend(volume("outer/lib", "/var/lib", "ro"));
        }
        stage.mount_call(&image, "made/rootfs", all)
    };
    let unmount = || stage.fsprov(["unmount", "one"]);
    let kept = stage.path("sandbox/tmp/kept");
    let provision = super::faults::steps(stage, mount());
    let destroy = super::faults::steps(stage, unmount());
    assert!(provision.len() >= 3 && !destroy.is_empty(), "{} and {} steps", provision.len(), destroy.len());
    stage.note(format!("{} steps of provision, {} of destroy\n", provision.len(), destroy.len()));
    for (step, is_destroy) in provision.iter().map(|s| (s, false)).chain(destroy.iter().map(|s| (s, true))) {
        let died = if is_destroy {
            mount().run().ok();
            if volumes {
                fs::write(&kept, &step.name).expect("write");
            }
            unmount().env("FAILPOINTS", step.with("kill")).run()
        } else {
            mount().env("FAILPOINTS", step.with("kill")).run()
        };
        // Half a second: a server whose caller died takes everything back.
        system::survivors(Duration::from_millis(500));
        let said = recover(stage, &[]);
        assert!(
            said.iter().all(|(_, what)| what == "destroyed" || what == "healed" || what == "kept"),
            "{step}: {}: {said:?}",
            died.describe()
        );
        let again = recover(stage, &[]);
        assert!(again.iter().all(|(_, what)| what == "kept"), "{step}: twice is once: {again:?}");
        if !again.is_empty() {
            assert_eq!(health(stage), "ready", "{step}: what was kept is whole");
            assert!(stage.path("made/rootfs/etc/hosts").exists(), "{step}");
            assert_eq!(recover(stage, &["--keep", "another"]), [outcome("one", "destroyed")], "{step}");
        }
        stage.assert_nothing_left(&format!("after {step} died and recover"));
        assert!(!stage.path("made").exists(), "{step}: directories made for the mount point stayed");
        let sandbox = fs::read_dir(stage.path("sandbox")).expect("the sandbox stays");
        let hidden = sandbox.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(".fsprov")).count();
        assert_eq!(hidden, 0, "{step}: changes of a rootfs that is gone stayed");
        if is_destroy && volumes {
            assert_eq!(fs::read_to_string(&kept).expect("a volume keeps what is in it"), step.name);
        }
    }
    assert_same(&before, &picture(&image), "the image");
}

case!(
    "recover_after_each_step_of_provision_and_destroy_died",
    on::every_backend,
    &[Need::Failpoints],
    |stage: &Stage| dies_at_each_step(stage, &[]),
);

case!("recover_after_each_step_of_a_writable_one_died", on::overlay, &[Need::Failpoints], |stage: &Stage| {
    dies_at_each_step(stage, &["--writable"])
},);

// A known rootfs whose healing is cut short is healed by the next `recover`.
case!("recover_that_died_is_done_again", on::read_only, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    let take_away = || {
        if stage.lane.enter == Enter::User {
            stage.tool("fusermount3", ["-u"]).arg(stage.path("rootfs")).run().ok();
        } else {
            stage.tool("umount", ["-R"]).arg(stage.path("rootfs")).run().ok();
        }
        system::survivors(Duration::from_secs(2));
    };
    stage.mount(&image, "rootfs", ["--id", "one"]);
    take_away();
    let found = super::faults::steps(stage, stage.fsprov(["recover"]));
    assert!(found.len() >= 3, "recover passes {} steps", found.len());
    for step in &found {
        take_away();
        stage.fsprov(["recover"]).env("FAILPOINTS", step.with("kill")).run();
        system::survivors(Duration::from_millis(500));
        stage.fsprov(["recover"]).run().ok();
        assert_eq!(health(stage), "ready", "{step}");
        assert_eq!(recover(stage, &[]), [outcome("one", "kept")], "{step}");
    }
});

// A copy outlives the boot: what the container wrote into it is still there, and its volumes are attached again.
case!("a_copy_and_its_changes_outlive_a_reboot", on::copy, |stage: &Stage| {
    let image = stage.small_image();
    let mut options = vec!["--id".into(), "one".into()];
    if stage.lane.has_volumes() {
        options.extend(volume(stage.mkdir("vol"), "/data", "rw"));
    }
    let rootfs = stage.mount(&image, "rootfs", options);
    fs::write(rootfs.join("etc/hosts"), "the container's own").expect("write");
    let file = stage.records()[0].join("record.json");
    let reboot = || {
        if stage.lane.has_volumes() {
            stage.tool("umount", [rootfs.join("data")]).run().ok();
        }
        let mut record: Value = serde_json::from_str(&fs::read_to_string(&file).expect("read")).expect("JSON");
        record["boot_id"] = "00000000-0000-4000-8000-000000000000".into();
        // Disks are found in another order. Without statx(2) nothing but the device tells their directories apart.
        if has_mount_calls() {
            record["traces"]["copied"]["dev"] = 4242.into();
        }
        fs::write(&file, record.to_string()).expect("write");
    };
    for _ in 0..2 {
        reboot();
        let wanted = if stage.lane.has_volumes() { "healed" } else { "kept" };
        assert_eq!(recover(stage, &[]), [outcome("one", wanted)]);
        assert_eq!(recover(stage, &[]), [outcome("one", "kept")]);
        assert_eq!(health(stage), "ready");
        assert_eq!(fs::read_to_string(rootfs.join("etc/hosts")).expect("read"), "the container's own");
        if stage.lane.has_volumes() {
            fs::write(rootfs.join("data/kept"), "kept").expect("write");
            assert_eq!(fs::read_to_string(stage.path("vol/kept")).expect("read"), "kept");
        }
    }
    reboot();
    assert_eq!(recover(stage, &["--keep", "another"]), [outcome("one", "destroyed")]);
    assert!(!rootfs.exists(), "the files go with the record");
    assert_eq!(stage.path("vol/kept").exists(), stage.lane.has_volumes(), "a volume's stay");
    stage.assert_nothing_left("after recovery");
});
