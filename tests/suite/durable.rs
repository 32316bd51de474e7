//! The store's promise: whatever fails, and whenever the power goes, what is in the store is whole, and doing it again works.
//!
//! As in `faults`, the steps are found by a run that logs them: a step added to the program is tested here without a line.
//! `FSPROV_TEST_EVERY=1` takes every passing of each step, and faults that last, too; without it the first and the last of each,
//! dying at both and failing at the first.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::faults::{Step, steps_in};
use super::store::{pack, small_aci_tree};
use crate::common::harness::{case, on};
use crate::common::images::make_small_tree;
use crate::common::stage::Call;
use crate::common::{Enter, Lane, Need, Stage};

/// A state root in memory where that can be had: every import syncs the file system of its store.
struct Place<'a> {
    stage: &'a Stage,
    root: tempfile::TempDir,
}

impl<'a> Place<'a> {
    fn new(stage: &'a Stage) -> Self {
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() { shm } else { &stage.dir };
        let root = tempfile::Builder::new().prefix("fsprov-t.").tempdir_in(parent).expect("make a state root");
        Place { stage, root }
    }

    fn call<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Call<'a> {
        self.stage.fsprov(["image"]).args(args).env("FSPROV_ROOT", self.root.path())
    }

    fn staged(&self) -> Vec<PathBuf> {
        let list = fs::read_dir(self.root.path().join("staging"));
        list.map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default()
    }

    #[track_caller]
    fn assert_clean(&self, when: &str) {
        let said = self.call(["verify", "--json"]).run();
        assert_eq!((said.code(), said.out().trim()), (Some(0), "[]"), "{when}: {}", said.describe());
    }
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// Layers as archives: each with a file of its own, the second with a whiteout and an opaque directory.
pub(super) fn layers(stage: &Stage) -> Vec<Vec<u8>> {
    let one = stage.mkdir("layer-1");
    make_small_tree(&one.join("tree"));
    fs::create_dir_all(one.join("tree/opt")).expect("mkdir");
    fs::write(one.join("tree/opt/lower"), "lower").expect("write");
    let two = stage.mkdir("layer-2/tree/opt");
    fs::write(two.join(".wh..wh..opq"), "").expect("write");
    fs::write(two.join("upper"), "upper").expect("write");
    fs::write(stage.path("layer-2/tree/.wh.usr"), "").expect("write");
    ["layer-1", "layer-2"]
        .map(|name| {
            stage
                .tool("tar", ["--numeric-owner", "--sort=name", "--mtime=@1", "-C"])
                .arg(stage.path(name).join("tree"))
                .args(["-cf", "-", "."])
                .run()
                .ok()
                .stdout
        })
        .into()
}

/// An OCI layout, or with `docker` an archive as `docker save` makes it.
pub(super) fn layered(stage: &Stage, name: &str, layers: &[Vec<u8>], docker: bool) -> PathBuf {
    let dir = stage.mkdir(name);
    let blobs = stage.mkdir(format!("{name}/blobs/sha256"));
    let put = |bytes: &[u8]| {
        fs::write(blobs.join(hex(bytes)), bytes).expect("write");
        (hex(bytes), bytes.len())
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", hex(layer))).collect();
    let config = serde_json::json!({
        "architecture": fsprov::internals::image::oci::Platform::host().architecture, "os": "linux", "author": name,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put(&serde_json::to_vec(&config).expect("json"));
    let put_layers: Vec<_> = layers.iter().map(|layer| put(layer)).collect();
    if docker {
        let paths: Vec<String> = put_layers.iter().map(|(hex, _)| format!("blobs/sha256/{hex}")).collect();
        let manifest =
            serde_json::json!([{"Config": format!("blobs/sha256/{}", config.0), "Layers": paths, "RepoTags": [name]}]);
        fs::write(dir.join("manifest.json"), manifest.to_string()).expect("write");
        let archive = stage.path(format!("{name}.tar"));
        stage.tool("tar", ["-C"]).arg(&dir).arg("-cf").arg(&archive).args(["manifest.json", "blobs"]).run().ok();
        return archive;
    }
    let describe = |media: &str, (hex, size): &(String, usize)| serde_json::json!({"mediaType": format!("application/vnd.oci.image.{media}"), "digest": format!("sha256:{hex}"), "size": size});
    let layers: Vec<_> = put_layers.iter().map(|layer| describe("layer.v1.tar", layer)).collect();
    let manifest =
        serde_json::json!({"schemaVersion": 2, "config": describe("config.v1+json", &config), "layers": layers});
    let manifest = put(manifest.to_string().as_bytes());
    let mut named = describe("manifest.v1+json", &manifest);
    named["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [named]});
    fs::write(dir.join("index.json"), index.to_string()).expect("write");
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
    dir
}

/// What is done to a store, and how it is brought to where that can be done.
struct Verb<'a> {
    name: &'static str,
    args: Vec<String>,
    prepare: Box<dyn Fn(&Place<'_>) + 'a>,
    /// What it makes outside of the store.
    output: Option<PathBuf>,
    /// Exit codes of a second go that are fine, too.
    also: &'static [i32],
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// All images away, and what only they needed.
fn empty(place: &Place<'_>) {
    place.call(["gc", "--unused"]).run().ok();
}

fn chosen(all: Vec<Step>) -> Vec<Step> {
    if std::env::var_os("FSPROV_TEST_EVERY").is_some() {
        return all;
    }
    let names: Vec<String> = all.iter().map(|step| step.name.clone()).collect();
    let is_end = |at: usize| !names[..at].contains(&names[at]) || !names[at + 1..].contains(&names[at]);
    all.into_iter().enumerate().filter(|(at, _)| is_end(*at)).map(|(_, step)| step).collect()
}

case!(
    "the_store_is_whole_whatever_step_of_an_import_fails_or_dies",
    on::once_each,
    &[Need::Failpoints],
    |stage: &Stage| every_step(stage, |verb| verb.starts_with("import ")),
);

case!(
    "the_store_is_whole_whatever_step_of_its_upkeep_fails_or_dies",
    on::once_each,
    &[Need::Failpoints],
    |stage: &Stage| every_step(stage, |verb| !verb.starts_with("import ")),
);

fn every_step(stage: &Stage, is_meant: fn(&str) -> bool) {
    let place = Place::new(stage);
    let aci = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    let layers = layers(stage);
    let layout = layered(stage, "layout", &layers, false);
    let docker = layered(stage, "docker", &layers, true);
    let plain = stage.path("plain");
    make_small_tree(&plain);
    let out = |name: &str| Some(stage.path(name));
    let imports = |what: PathBuf| {
        move |place: &Place<'_>| {
            empty(place);
            place.call(["import"]).arg(&what).run().ok();
        }
    };
    let verb = |name, args: &[&str], prepare: Box<dyn Fn(&Place<'_>)>| Verb {
        name,
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        prepare,
        output: None,
        also: &[],
    };
    let (exported, exported_oci) = (out("exported.aci"), out("exported-layout"));
    let mut verbs = vec![
        verb("import an ACI", &["import", &text(&aci)], Box::new(empty)),
        verb("import an OCI layout", &["import", &text(&layout)], Box::new(empty)),
        verb("import a docker archive", &["import", &text(&docker)], Box::new(empty)),
        verb("import a directory", &["import", "--name", "example.com/plain", &text(&plain)], Box::new(empty)),
        Verb { also: &[3], ..verb("rm", &["rm", "layout"], Box::new(imports(layout.clone()))) },
        verb("gc", &["gc", "--unused"], Box::new(imports(layout.clone()))),
        verb("flatten", &["flatten", "--name", "example.com/flat", "layout"], Box::new(imports(layout.clone()))),
        Verb {
            output: exported.clone(),
            ..verb("export an ACI", &["export", "layout", "exported.aci"], Box::new(imports(layout.clone())))
        },
        Verb {
            output: exported_oci.clone(),
            ..verb(
                "export an OCI layout",
                &["export", "--format", "oci", "layout", "exported-layout"],
                Box::new(imports(layout.clone())),
            )
        },
        verb("name an image once more", &["import", "--name", "again", &text(&aci)], Box::new(imports(aci.clone()))),
        verb("repair", &["verify", "--repair"], {
            let import = imports(aci.clone());
            Box::new(move |place: &Place<'_>| {
                import(place);
                let images = fs::read_dir(place.root.path().join("images")).expect("list");
                for image in images.flatten() {
                    fs::write(image.path().join("manifest"), "{}").expect("damage");
                }
            })
        }),
    ];
    if stage.lane.enter == Enter::Root {
        verbs.push(verb("index", &["index", "example.com/small"], Box::new(imports(aci.clone()))));
    }
    verbs.retain(|verb| is_meant(verb.name));
    let is_long = std::env::var_os("FSPROV_TEST_EVERY").is_some();
    let mut tried = 0;
    for verb in &verbs {
        let clear = || {
            for path in verb.output.iter() {
                if path.is_dir() { fs::remove_dir_all(path).expect("remove") } else { drop(fs::remove_file(path)) }
            }
        };
        (verb.prepare)(&place);
        let log = place.call(&verb.args).env("FSPROV_LOG", "fsprov::fault=trace").run().ok().err();
        let steps = chosen(steps_in(&log));
        assert!(!steps.is_empty(), "{}: it passes no step", verb.name);
        for step in &steps {
            let mut faults = vec![step.with("kill")];
            if is_long || step.is_first() {
                faults.push(step.with("ENOSPC"));
            }
            if is_long {
                faults.push(step.with_for_good("ENOSPC"));
            }
            for fault in faults {
                let when = format!("{} with {fault}", verb.name);
                clear();
                (verb.prepare)(&place);
                let outcome = place.call(&verb.args).env("FAILPOINTS", &fault).run();
                let code = outcome.code();
                assert!(matches!(code, None | Some(0 | 1)), "{when}: {}", outcome.describe());
                assert!(code.is_some() || fault.contains("kill"), "{when}: {}", outcome.describe());
                if code == Some(1) && verb.name != "repair" {
                    assert!(outcome.err().contains("No space left"), "{when}: {}", outcome.describe());
                }
                if code.is_some() {
                    assert!(place.staged().is_empty(), "{when}: left in staging: {:?}", place.staged());
                }
                // An output is whole or not there.
                if let Some(path) = verb.output.as_ref().filter(|path| path.exists()) {
                    let other = Place::new(stage);
                    let again = other.call(["import"]).arg(path).run();
                    assert_eq!(again.code(), Some(0), "{when}: a part of the output: {}", again.describe());
                    clear();
                }
                if verb.name != "repair" {
                    place.assert_clean(&when);
                }
                let again = place.call(&verb.args).run();
                assert!(
                    again.code().is_some_and(|code| code == 0 || verb.also.contains(&code)),
                    "{when}, again: {}",
                    again.describe()
                );
                place.call(["gc"]).run().ok();
                assert!(place.staged().is_empty(), "{when}: gc left {:?}", place.staged());
                place.assert_clean(&format!("{when}, done again"));
                tried += 1;
            }
        }
        clear();
    }
    stage.note(format!("{tried} faults in {} verbs", verbs.len()));
    assert!(tried > 50, "{tried} faults only");
    if std::env::var_os("FSPROV_TEST_TELL").is_some() {
        let name = format!("/tmp/fsprov-steps-{}.txt", std::process::id());
        fs::write(name, format!("{}: {tried} faults in {} verbs\n", stage.lane.name, verbs.len())).expect("write");
    }
    // Of a killed export of a file nothing stays: it had no name. (A layout's directory beside its place does.)
    let left = fs::read_dir(&stage.dir).expect("list").flatten();
    let half_made: Vec<_> = left
        .filter(|e| e.file_name().to_string_lossy().starts_with(".new-") && e.path().is_file())
        .map(|e| e.file_name())
        .collect();
    assert!(half_made.is_empty(), "{half_made:?}");
}

// A disk that is really full, at one size after another: the import fails and says so, or works; the store is whole.
case!(
    "a_full_disk_leaves_the_store_whole",
    |lane: &Lane| lane.backend.is_empty() && lane.enter == Enter::Root,
    |stage: &Stage| {
        let tree = small_aci_tree(stage, "tree");
        for n in 0..20_u32 {
            let noise: Vec<u8> = (0..20_000_u32).map(|at| ((at + n).wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            fs::write(tree.join(format!("rootfs/noise-{n}")), noise).expect("write");
        }
        let aci = pack(stage, &tree, "small.aci");
        let layout = layered(stage, "layout", &layers(stage), false);
        let (mut failed, mut worked) = (0, 0);
        for pages in (8..200).step_by(6) {
            let at = stage.mkdir("disk");
            stage.tool("mount", ["-t", "tmpfs", "-o", &format!("size={}k", pages * 4), "full"]).arg(&at).run().ok();
            let call = |args: &[&str]| stage.fsprov(["image"]).args(args).env("FSPROV_ROOT", at.join("state"));
            for source in [&aci, &layout] {
                let said = call(&["import"]).arg(source).run();
                if said.code() == Some(0) {
                    worked += 1;
                } else {
                    said.fails(1, &["No space left"]);
                    failed += 1;
                }
                let staged = fs::read_dir(at.join("state/staging")).map_or(0, Iterator::count);
                assert_eq!(staged, 0, "{pages} pages: a failed import left something in staging");
                if at.join("state/images").is_dir() {
                    let said = call(&["verify", "--json"]).run();
                    assert_eq!(said.out().trim(), "[]", "{pages} pages: {}", said.describe());
                }
            }
            // With room it works after all.
            stage.tool("mount", ["-o", "remount,size=64m"]).arg(&at).run().ok();
            call(&["import"]).arg(&aci).run().ok();
            call(&["import"]).arg(&layout).run().ok();
            call(&["verify"]).run().ok();
            stage.tool("umount", [at.as_os_str()]).run().ok();
        }
        assert!(failed >= 10 && worked >= 2, "{failed} failed and {worked} worked: the sizes are wrong");
    },
);

// A rootfs that was unmounted lazily while in use is served on: its image stays until the last user is gone.
case!("an_image_stays_while_a_lazily_unmounted_rootfs_is_used", on::fuse, |stage: &Stage| {
    use std::io::Read as _;
    let archive = pack(stage, &small_aci_tree(stage, "tree"), "small.aci");
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    let rootfs = stage.mount("example.com/small", "rootfs", [] as [&str; 0]);
    let dir = fs::File::open(rootfs.join("etc")).expect("open");
    stage.fsprov(["unmount", "--lazy"]).arg(&rootfs).run().ok();
    stage.fsprov(["image", "rm", "example.com/small"]).run().fails(4, &["lazily"]);
    stage.fsprov(["image", "gc", "--unused"]).run().ok();
    let mut text = String::new();
    let flags = rustix::fs::OFlags::RDONLY;
    let hosts = rustix::fs::openat(&dir, "hosts", flags, rustix::fs::Mode::empty()).expect("open below");
    fs::File::from(hosts).read_to_string(&mut text).expect("read");
    assert_eq!(text, "127.0.0.1 localhost\n");
    drop(dir);
    crate::common::system::survivors(std::time::Duration::from_secs(5));
    stage.fsprov(["image", "gc", "--unused"]).run().ok();
    stage.fsprov(["image", "show", "example.com/small"]).run().fails(3, &[]);
});

// What `verify --repair` imports again is the image that it was: names, layers and all.
case!("what_is_repaired_is_what_it_was", on::once_each, |stage: &Stage| {
    let place = Place::new(stage);
    let layers = layers(stage);
    let layout = layered(stage, "layout", &layers, false);
    let other = layered(stage, "other", &layers[..1], true);
    for path in [&layout, &other] {
        place.call(["import"]).arg(path).run().ok();
    }
    place.call(["import", "--name", "second-name"]).arg(&layout).run().ok();
    let list = || {
        let mut all = place.call(["list", "--json"]).run().ok().json();
        all.as_array_mut().expect("an array").iter_mut().for_each(|one| one["imported_at"] = 0.into());
        all
    };
    let before = list();
    // The layer that both have.
    let lower = place.root.path().join("layers").join(format!("sha256-{}", hex(&layers[0])));
    fs::write(lower.join("rootfs/etc/hosts"), "127.0.0.2 elsewhere\n").expect("damage");
    let said = place.call(["verify", "--json"]).run();
    assert_eq!(said.code(), Some(1), "{}", said.describe());
    let found = said.json();
    let names: Vec<&str> = found.as_array().expect("an array").iter().filter_map(|d| d["part"].as_str()).collect();
    assert!(names.contains(&"/etc/hosts") && names.iter().filter(|n| **n == "layers").count() == 2, "{found:#}");
    let done = place.call(["verify", "--repair", "--json"]).run().ok().json();
    assert!(done.as_array().expect("an array").iter().all(|d| d["reimported"] == true), "{done:#}");
    place.assert_clean("repaired");
    assert_eq!(list(), before);
    // What was damaged lies aside, and can be had back as space.
    assert!(place.call(["du"]).run().ok().out().contains("set aside"));
    assert_eq!(place.call(["gc", "--json"]).run().ok().json()["set_aside"], 0);
    let collected = place.call(["gc", "--aside", "--json"]).run().ok().json();
    assert!(collected["set_aside"].as_u64() >= Some(3) && collected["bytes"].as_u64() > Some(0), "{collected:#}");
    assert_eq!(fs::read_dir(place.root.path().join("aside")).expect("read").count(), 0);
    assert!(!place.call(["du"]).run().ok().out().contains("set aside"));
    place.assert_clean("after the damaged ones were removed");
});
