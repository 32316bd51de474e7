//! Rollback: every step of provision and destroy fails once, and dies once.
//!
//! The steps are found by running with the log of `fsprov::internals::fault`, so that a new step is tested without a line here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::destroy::health;
use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::run::Outcome;
use crate::common::stage::Call;
use crate::common::walk::{assert_same, picture};
use crate::common::{Need, Stage, system};

const LOG: &str = "fsprov::fault=trace";
/// Fewest steps that the enumeration must find: fewer means that it looks in the wrong place.
const FEWEST_STEPS: usize = 3;

fn mount<'a>(stage: &'a Stage, image: &std::path::Path) -> Call<'a> {
    let mut options = vec!["--id".into(), "one".into()];
    if stage.lane.has_volumes() {
        options.extend(sandbox(stage));
        options.extend(volume("tmp", "/tmp", "rw"));
        options.extend(volume("new/lib", "/var/lib", "ro"));
    }
    stage.mount_call(image, "made/rootfs", options)
}

fn unmount(stage: &Stage) -> Call<'_> {
    stage.fsprov(["unmount", "one"])
}

/// One passing of a step: its name, and how often it had been passed before.
pub(crate) struct Step {
    pub(crate) name: String,
    before: usize,
}

impl Step {
    /// FAILPOINTS for this passing alone: a fault that comes once, as faults do.
    pub(crate) fn with(&self, what: &str) -> String {
        let skip = if self.before == 0 { String::new() } else { format!("{}*off->", self.before) };
        format!("{}={skip}1*return({what})", self.name)
    }

    pub(crate) fn is_first(&self) -> bool {
        self.before == 0
    }

    /// FAILPOINTS for this passing and all later ones: a disk that stays full, also for who undoes.
    pub(crate) fn with_for_good(&self, what: &str) -> String {
        self.with(what).replace("1*return", "return")
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (passing {})", self.name, self.before + 1)
    }
}

/// Every passing of every step in a command's log.
pub(crate) fn steps_in(log: &str) -> Vec<Step> {
    let mut passed: BTreeMap<&str, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for name in log.lines().filter_map(|line| line.split_once("fsprov::fault]").map(|(_, name)| name.trim())) {
        let count = passed.entry(name).or_default();
        all.push(Step { name: name.to_owned(), before: *count });
        *count += 1;
    }
    all
}

/// The steps that a command passes. The server's own log counts too: it passes steps of its own.
pub(crate) fn steps(stage: &Stage, call: Call<'_>) -> Vec<Step> {
    let outcome = call.env("FSPROV_LOG", LOG).run().ok();
    let mut text = outcome.err();
    for record in stage.records() {
        text.push_str(&std::fs::read_to_string(record.join("backend/server.log")).unwrap_or_default());
    }
    steps_in(&text)
}

/// The volume made by the request is the only thing that a failed provision may leave: and it must not leave it either.
#[track_caller]
fn assert_clean(stage: &Stage, step: &Step, how: &str) {
    stage.assert_nothing_left(&format!("after {step} {how}"));
    assert!(!stage.path("made").exists(), "after {step} {how}: directories made for the mount point stayed");
}

fn undisturbed(outcome: &Outcome) -> bool {
    outcome.code() == Some(0)
}

case!("provision_fails_at_each_step_and_leaves_nothing", on::every_backend, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    let found = steps(stage, mount(stage, &image));
    unmount(stage).run().ok();
    assert!(found.len() >= FEWEST_STEPS, "provision passes {} steps", found.len());
    let _ = std::fs::remove_dir_all(stage.path("sandbox"));
    for (step, faults) in found.iter().flat_map(|s| [(s, s.with("EIO")), (s, s.with_for_good("EIO"))]) {
        let outcome = mount(stage, &image).env("FAILPOINTS", faults).run();
        // A step that only destroy's part of the way must get right may be survived; then it is a good rootfs.
        if undisturbed(&outcome) {
            assert_eq!(health(stage), "ready", "{step}");
            unmount(stage).run().ok();
        } else {
            outcome.fails(1, &[&step.name, "Input/output error"]);
            assert!(!stage.path("sandbox/new").exists(), "{step}: a volume source made for a failed mount stayed");
        }
        assert_clean(stage, step, "failed");
        let _ = std::fs::remove_dir_all(stage.path("sandbox"));
    }
    assert_same(&before, &picture(&image), "the image");
},);

case!("provision_dies_at_each_step_and_unmount_cleans", on::every_backend, &[Need::Failpoints], |stage: &Stage| {
    let image = stage.small_image();
    let before = picture(&image);
    let found = steps(stage, mount(stage, &image));
    unmount(stage).run().ok();
    assert!(found.len() >= FEWEST_STEPS, "provision passes {} steps", found.len());
    for step in &found {
        let outcome = mount(stage, &image).env("FAILPOINTS", step.with("kill")).run();
        if outcome.code().is_none() {
            // Killed. What is left must be known, and go by its name; where nothing was written yet there is nothing to find.
            let listed = stage.fsprov(["list", "--json"]).run().ok().json();
            let listed = listed.as_array().map_or(0, Vec::len);
            let had_record = !stage.records().is_empty();
            let cleaned = unmount(stage).run();
            let code = cleaned.code();
            assert!(
                code == Some(0) || (code == Some(3) && !had_record),
                "{step}: {listed} listed, record: {had_record}\n{}",
                cleaned.describe()
            );
            if !had_record {
                // The note that its mount point is taken has no record: recover tidies such up.
                stage.fsprov(["recover"]).run().ok();
            }
        } else {
            // A helper process died, not the command: then it must have failed cleanly, or got over it.
            assert!(outcome.code().is_some_and(|c| c <= 5), "{}", outcome.describe());
            if undisturbed(&outcome) {
                unmount(stage).run().ok();
            }
        }
        system::survivors(Duration::from_secs(2));
        assert_clean(stage, step, "died");
        // And the place is as good as new.
        mount(stage, &image).run().ok();
        unmount(stage).run().ok();
    }
    assert_same(&before, &picture(&image), "the image");
},);

case!(
    "destroy_fails_or_dies_at_each_step_and_can_be_repeated",
    on::every_backend,
    &[Need::Failpoints],
    |stage: &Stage| {
        let image = stage.small_image();
        mount(stage, &image).run().ok();
        let found = steps(stage, unmount(stage));
        assert!(!found.is_empty(), "destroy passes steps");
        for step in &found {
            for how in ["EIO", "kill"] {
                mount(stage, &image).run().ok();
                let kept = stage.path("sandbox/tmp/kept");
                if stage.lane.has_volumes() {
                    std::fs::write(&kept, &step.name).expect("write");
                }
                let outcome = unmount(stage).env("FAILPOINTS", step.with(how)).run();
                match (how, outcome.code()) {
                    ("EIO", Some(0)) | ("kill", Some(0..=5)) => {}
                    ("EIO", _) => drop(outcome.fails(1, &[&step.name])),
                    (_, None) => {}
                    _ => panic!("{step} {how}: {}", outcome.describe()),
                }
                if !stage.records().is_empty() {
                    unmount(stage).run().ok();
                }
                system::survivors(Duration::from_secs(2));
                assert_clean(stage, step, how);
                if stage.lane.has_volumes() {
                    let kept = std::fs::read_to_string(&kept).expect("volumes keep what is in them");
                    assert_eq!(kept, step.name);
                }
            }
        }
    },
);
