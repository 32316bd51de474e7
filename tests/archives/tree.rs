//! The store from the outside: what goes in comes out, what is damaged is found, what is shared is one.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use fsprov::id::ImageRef;
use fsprov::internals::paths::StatePaths;
use fsprov::store::{Damage, Held, ImageSource, ImportOptions, Outcome, Prune, Repair, Store};
use libtest_mimic::Failed;
use sha2::{Digest as _, Sha512};

use super::tarball::{CHR, HARD, Head, SYM, Tar, head, octal};

fn store(root: &Path) -> Result<Store, Failed> {
    Ok(Store::open(&StatePaths::new(root.to_owned()))?)
}

fn named(name: &str) -> ImportOptions {
    ImportOptions { name: Some(name.into()), ..ImportOptions::default() }
}

fn by_name(name: &str) -> ImageRef {
    ImageRef::Name(name.into())
}

pub(crate) fn directory_round_trip() -> Result<(), Failed> {
    let top = tempfile::tempdir()?;
    let tree = top.path().join("tree");
    fs::create_dir_all(tree.join("a/b"))?;
    fs::write(tree.join("a/file"), "x".repeat(100_000))?;
    fs::write(tree.join("a/b").join("n".repeat(200)), "long")?;
    fs::hard_link(tree.join("a/file"), tree.join("a/b/again"))?;
    symlink("../file", tree.join("a/b/link"))?;
    fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o500))?;
    let first = store(&top.path().join("one"))?;
    let source = ImageSource::Directory(tree.clone());
    let imported = first.import(&source, &named("example.com/tree"))?;
    assert_eq!(imported.outcome, Outcome::Created);
    assert_eq!(first.import(&source, &named("example.com/tree"))?.outcome, Outcome::Existing);
    let mut archive = Vec::new();
    first.export_aci(&by_name("example.com/tree"), &mut archive)?;
    let digest = fsprov::id::ImageId::from_sha512(&Sha512::digest(&archive).into());
    assert_eq!(digest, imported.id, "the export is the archive that the id is of");
    // Out as an OCI layout, and in again: the same tree.
    let layout = top.path().join("layout");
    first.export_oci(&by_name("example.com/tree"), &layout)?;
    let back = first.import(&ImageSource::Directory(layout), &named("again"))?;
    let (mut one, mut two) = (Vec::new(), Vec::new());
    first.export_tar(&by_name("example.com/tree"), &mut one)?;
    first.export_tar(&ImageRef::Id(back.id.clone()), &mut two)?;
    assert!(one == two, "the OCI layout holds another tree");
    let flat = first.flatten(&ImageRef::Id(back.id), "example.com/flat", Held::Refuse)?;
    let mut three = Vec::new();
    first.export_tar(&ImageRef::Id(flat.id), &mut three)?;
    assert!(one == three, "flattened, it is another tree");
    // What is told of the way: from nothing to all, in more steps than there are images.
    let told = std::cell::RefCell::new(Vec::new());
    assert!(first.verify_told(Repair::No, &|progress| told.borrow_mut().push(progress))?.is_empty());
    let told = told.into_inner();
    assert!(told.is_sorted_by_key(|progress| progress.read) && told.len() > 8, "{told:?}");
    assert!(told.iter().all(|progress| progress.total == Some(told[told.len() - 1].read)), "{told:?}");
    // An export that is stopped on its way leaves nothing.
    let out = top.path().join("out");
    fs::create_dir(&out)?;
    let stop = |progress: fsprov::store::Progress| match progress.read {
        0..20_000 => Ok(()),
        _ => Err(fsprov::Error::new(fsprov::Kind::Io, "export", "", "stopped")),
    };
    assert!(first.export_oci_told(&by_name("example.com/tree"), &out.join("layout"), &stop).is_err());
    assert_eq!(fs::read_dir(&out)?.count(), 0);
    fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o700))?;
    Ok(())
}

type Harm = fn(&Path) -> std::io::Result<()>;

/// Each kind of damage to an image: what it is, the part that must be named, how it is done (given the image's directory).
const HARMS: [(&str, &str, Harm); 20] = [
    ("a byte changed", "/a", |dir| keep_time(&dir.join("rootfs/a"), || fs::write(dir.join("rootfs/a"), "CONTENT"))),
    ("a file cut", "/a", |dir| fs::write(dir.join("rootfs/a"), "con")),
    ("a file lost", "/a", |dir| fs::remove_file(dir.join("rootfs/a"))),
    ("a file more", "/more", |dir| fs::write(dir.join("rootfs/more"), "")),
    ("a directory more", "/d/more", |dir| fs::create_dir(dir.join("rootfs/d/more"))),
    ("a directory lost", "/d", |dir| fs::remove_dir_all(dir.join("rootfs/d"))),
    ("a link turned", "/l", |dir| {
        fs::remove_file(dir.join("rootfs/l"))?;
        symlink("elsewhere", dir.join("rootfs/l"))
    }),
    ("a file become a directory", "/a", |dir| {
        fs::remove_file(dir.join("rootfs/a"))?;
        fs::create_dir(dir.join("rootfs/a"))
    }),
    ("a hard link parted", "/h", |dir| {
        fs::remove_file(dir.join("rootfs/h2"))?;
        fs::copy(dir.join("rootfs/h1"), dir.join("rootfs/h2")).map(drop)
    }),
    ("a hard link made", "/h1", |dir| {
        fs::remove_file(dir.join("rootfs/twin"))?;
        fs::hard_link(dir.join("rootfs/h1"), dir.join("rootfs/twin"))
    }),
    ("the whole tree lost", "rootfs", |dir| fs::remove_dir_all(dir.join("rootfs"))),
    ("the manifest lost", "manifest", |dir| fs::remove_file(dir.join("manifest"))),
    ("the manifest changed, and still one", "manifest", |dir| {
        let text = fs::read_to_string(dir.join("manifest"))?;
        fs::write(dir.join("manifest"), text.replace("example.com/x", "example.com/y"))
    }),
    ("the index changed", "index", |dir| {
        let mut bytes = fs::read(dir.join("index"))?;
        let last = bytes.len() - 100;
        bytes[last] ^= 1;
        fs::write(dir.join("index"), bytes)
    }),
    ("the index cut", "index", |dir| {
        let bytes = fs::read(dir.join("index"))?;
        fs::write(dir.join("index"), &bytes[..bytes.len() / 2])
    }),
    ("the index lost", "index", |dir| fs::remove_file(dir.join("index"))),
    ("the record empty", "meta.json", |dir| fs::write(dir.join("meta.json"), "")),
    ("the record changed, and still one", "meta.json", |dir| {
        let text = fs::read_to_string(dir.join("meta.json"))?;
        fs::write(dir.join("meta.json"), text.replace("example.com/x", "example.com/y"))
    }),
    ("the record lost", "meta.json", |dir| fs::remove_file(dir.join("meta.json"))),
    ("something beside", "stray", |dir| fs::write(dir.join("stray"), "")),
];

/// Damage that shows only where the tree on the disk is the image's: as root.
const ROOTS_HARMS: [(&str, &str, Harm); 6] = [
    ("another owner", "/a", |dir| std::os::unix::fs::chown(dir.join("rootfs/a"), Some(1), Some(1))),
    ("another mode", "/d", |dir| fs::set_permissions(dir.join("rootfs/d"), fs::Permissions::from_mode(0o777))),
    ("another time", "/a", |dir| keep_time(&dir.join("rootfs/l"), || fs::write(dir.join("rootfs/a"), "content"))),
    ("another device", "/null", |dir| {
        let path = dir.join("rootfs/null");
        fs::remove_file(&path)?;
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let kind = rustix::fs::FileType::CharacterDevice;
        Ok(rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, rustix::fs::makedev(1, 5))?)
    }),
    ("an attribute lost", "/noted", |dir| Ok(rustix::fs::removexattr(dir.join("rootfs/noted"), "user.note")?)),
    ("an attribute more", "/a", |dir| {
        keep_time(&dir.join("rootfs/a"), || {
            Ok(rustix::fs::setxattr(dir.join("rootfs/a"), "user.more", b"x", rustix::fs::XattrFlags::empty())?)
        })
    }),
];

/// Do it and set the file's time back: what changes bytes on a disk does not change their time.
fn keep_time(path: &Path, harm: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
    let before = fs::symlink_metadata(path)?.modified()?;
    harm()?;
    if fs::symlink_metadata(path)?.is_symlink() { Ok(()) } else { fs::File::open(path)?.set_modified(before) }
}

pub(crate) fn damage_is_found() -> Result<(), Failed> {
    let is_root = rustix::process::geteuid().is_root();
    let top = tempfile::tempdir()?;
    let mut tar = Tar::aci();
    tar.file(b"rootfs/a", b"content");
    tar.link(SYM, b"rootfs/l", b"a");
    tar.file(b"rootfs/h1", b"linked");
    tar.link(HARD, b"rootfs/h2", b"rootfs/h1");
    tar.file(b"rootfs/twin", b"linked");
    tar.dir(b"rootfs/d");
    tar.pax(&[("SCHILY.xattr.user.note", b"value")]);
    tar.file(b"rootfs/noted", b"");
    if is_root {
        tar.any(CHR, b"rootfs/null");
    }
    let archive = top.path().join("x.aci");
    fs::write(&archive, tar.end())?;
    let source = ImageSource::Archive(archive.clone());
    let mut harms = HARMS.to_vec();
    if is_root {
        harms.extend(ROOTS_HARMS);
    }
    for (name, part, harm) in harms {
        let store = store(&top.path().join(name))?;
        let imported = store.import(&source, &ImportOptions::default())?;
        assert_eq!(store.verify(Repair::No)?, [], "{name}: before");
        harm(&store.paths().image(&imported.id))?;
        // Which of two names that were one is no more cannot be told: the part begins so.
        let is_named = |damage: &Damage| damage.id.as_ref() == Some(&imported.id) && damage.part.starts_with(part);
        let found = store.verify(Repair::No)?;
        assert!(found.iter().any(is_named), "{name}: {found:?}");
        assert!(found.iter().all(|damage| !damage.set_aside), "{name}: nothing was asked for");
        // Aside, where the source is gone; and anew when it is there again.
        let away = top.path().join("away");
        fs::rename(&archive, &away)?;
        let found = store.verify(Repair::Reimport)?;
        assert!(found.iter().all(|damage| damage.set_aside && !damage.reimported), "{name}: {found:?}");
        assert!(store.ids()?.is_empty() && store.verify(Repair::No)?.is_empty(), "{name}: it is still there");
        fs::rename(&away, &archive)?;
        assert_eq!(store.import(&source, &ImportOptions::default())?.outcome, Outcome::Created, "{name}");
        harm(&store.paths().image(&imported.id))?;
        let knows_source = !name.starts_with("the record");
        let found = store.verify(Repair::Reimport)?;
        assert!(found.iter().all(|damage| damage.reimported == knows_source), "{name}: {found:?}");
        assert_eq!(store.ids()?.len(), usize::from(knows_source), "{name}");
        assert_eq!(store.verify(Repair::No)?, [], "{name}: mended");
        fsprov::internals::sys::remove::remove_tree(store.paths().root())?;
    }
    // What belongs to no image.
    let store = store(&top.path().join("strays"))?;
    fs::create_dir(store.paths().images().join("sha512-short"))?;
    fs::write(store.paths().layers().join("note"), "")?;
    let found = store.verify(Repair::SetAside)?;
    let parts: Vec<_> = found.iter().map(|damage| (damage.id.is_none(), &*damage.part)).collect();
    assert_eq!(parts, [(true, "images/sha512-short"), (true, "layers/note")]);
    assert_eq!(store.verify(Repair::No)?, []);
    Ok(())
}

/// Damage to images that share layers: what is named, and whose it is.
pub(crate) fn damage_of_layers_is_found() -> Result<(), Failed> {
    let harms: [(&str, &str, &str, Harm); 7] = [
        ("a byte of the layer changed", "layer", "/a", |dir| fs::write(dir.join("layer/rootfs/a"), "CONTENT")),
        ("a file more in the layer", "layer", "/more", |dir| fs::write(dir.join("layer/rootfs/more"), "")),
        ("the layer's index lost", "layer", "index", |dir| fs::remove_file(dir.join("layer/index"))),
        ("the layer's record lost", "layer", "meta.json", |dir| fs::remove_file(dir.join("layer/meta.json"))),
        ("the layer lost", "image", "layers", |dir| fs::remove_dir_all(dir.join("layer"))),
        ("the config changed", "image", "config", |dir| fs::write(dir.join("image/config"), "{}")),
        ("the manifest changed", "image", "manifest", |dir| {
            let text = fs::read_to_string(dir.join("image/manifest"))?;
            fs::write(dir.join("image/manifest"), text + " ")
        }),
    ];
    let top = tempfile::tempdir()?;
    let tree = top.path().join("tree");
    fs::create_dir(&tree)?;
    fs::write(tree.join("a"), "content")?;
    let first = store(&top.path().join("first"))?;
    first.import(&ImageSource::Directory(tree), &named("example.com/tree"))?;
    let layout = top.path().join("layout");
    first.export_oci(&by_name("example.com/tree"), &layout)?;
    for (name, whose, part, harm) in harms {
        let store = store(&top.path().join(name))?;
        let imported = store.import(&ImageSource::Directory(layout.clone()), &named("x"))?;
        let layer = store.list()?[0].layers[0].clone();
        assert_eq!(store.verify(Repair::No)?, [], "{name}: before");
        let by_role = top.path().join("roles");
        fs::create_dir(&by_role)?;
        symlink(store.paths().image(&imported.id), by_role.join("image"))?;
        symlink(store.paths().layer(&layer), by_role.join("layer"))?;
        // Through the links: the last name of each path is below them.
        let harmed = match name {
            "the layer lost" => fs::remove_dir_all(store.paths().layer(&layer)),
            _ => harm(&by_role),
        };
        harmed?;
        fs::remove_dir_all(&by_role)?;
        let id = if whose == "layer" { &layer } else { &imported.id };
        let found = store.verify(Repair::No)?;
        assert!(found.iter().any(|d| d.id.as_ref() == Some(id) && d.part == part), "{name}: {found:?}");
        let found = store.verify(Repair::Reimport)?;
        assert!(found.iter().all(|damage| damage.reimported), "{name}: {found:?}");
        assert_eq!(store.verify(Repair::No)?, [], "{name}: mended");
    }
    Ok(())
}

pub(crate) fn layers_are_collected() -> Result<(), Failed> {
    let top = tempfile::tempdir()?;
    let store = store(&top.path().join("state"))?;
    let tree = top.path().join("tree");
    fs::create_dir(&tree)?;
    fs::write(tree.join("a"), "content")?;
    store.import(&ImageSource::Directory(tree), &named("example.com/tree"))?;
    // Two images that share their one layer: the same tree under two configs.
    let mut ids = Vec::new();
    for arch in ["amd64", "arm64"] {
        let layout = top.path().join(arch);
        store.export_oci(&by_name("example.com/tree"), &layout)?;
        rename_config(&layout, arch)?;
        let options = ImportOptions { platform: Some(format!("linux/{arch}").parse()?), ..named(arch) };
        ids.push(store.import(&ImageSource::Directory(layout), &options)?.id);
    }
    assert_ne!(ids[0], ids[1]);
    let layers = || fs::read_dir(store.paths().layers()).map(Iterator::count);
    assert_eq!(layers()?, 1, "one copy of the layer");
    assert!(store.usage()?.iter().filter(|usage| usage.shared_bytes > 0).count() == 2);
    let nobody = || Ok(Vec::new());
    store.remove(&ImageRef::Id(ids[0].clone()), &nobody)?;
    assert!(store.gc(Prune::Garbage, &nobody)?.layers.is_empty());
    let by = ids[1].clone();
    let used = move || Ok(vec![fsprov::store::Use { image: by.clone(), by: "rootfs x".into() }]);
    let refused = store.remove(&ImageRef::Id(ids[1].clone()), &used).expect_err("it is in use");
    assert_eq!(refused.kind(), fsprov::Kind::Busy);
    let parts: u64 = store.usage()?.iter().map(|usage| usage.own_bytes).sum();
    assert!(store.total_bytes()?.0 >= parts, "what is there is counted");
    assert!(store.gc(Prune::UnusedOlderThan { seconds: 3600 }, &used)?.images.is_empty(), "it is too young");
    let done = store.gc(Prune::UnusedOlderThan { seconds: 0 }, &used)?;
    assert_eq!((done.images.len(), layers()?), (1, 1));
    store.remove(&ImageRef::Id(ids[1].clone()), &nobody)?;
    assert_eq!(store.gc(Prune::Garbage, &nobody)?.layers.len(), 1);
    assert_eq!((layers()?, store.ids()?.len()), (0, 0));
    Ok(())
}

/// Give a layout's config another architecture, and what names it the new digests.
fn rename_config(layout: &Path, arch: &str) -> Result<(), Failed> {
    let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(bytes));
    let read = |path: &Path| -> Result<serde_json::Value, Failed> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let blob = |value: &serde_json::Value| layout.join("blobs/sha256").join(&value["digest"].as_str().unwrap()[7..]);
    let put = |value: &serde_json::Value, descriptor: &mut serde_json::Value| -> Result<(), Failed> {
        let bytes = serde_json::to_vec(value)?;
        descriptor["digest"] = format!("sha256:{}", hex(&bytes)).into();
        descriptor["size"] = bytes.len().into();
        Ok(fs::write(layout.join("blobs/sha256").join(hex(&bytes)), bytes)?)
    };
    let mut index = read(&layout.join("index.json"))?;
    let mut manifest = read(&blob(&index["manifests"][0]))?;
    let mut config = read(&blob(&manifest["config"]))?;
    config["architecture"] = arch.into();
    let mut descriptor = manifest["config"].clone();
    put(&config, &mut descriptor)?;
    manifest["config"] = descriptor;
    let mut descriptor = index["manifests"][0].clone();
    put(&manifest, &mut descriptor)?;
    index["manifests"][0] = descriptor;
    Ok(fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?)
}

/// Root's store has owners and devices on the disk, nobody's in the index alone: what comes out is the same.
pub(crate) fn exports_agree() -> Result<(), Failed> {
    let top = tempfile::tempdir()?;
    fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755))?;
    let mut tar = Tar::aci();
    tar.entry(&Head { uid: octal(1234, 8), mode: octal(0o4755, 8), ..head(b"rootfs/setuid", b'0') }, b"program");
    tar.entry(&Head { mode: octal(0, 8), uid: octal(7, 8), ..head(b"rootfs/closed", b'5') }, b"");
    tar.entry(&Head { major: 1, minor: 3, mode: octal(0o666, 8), ..head(b"rootfs/closed/null", CHR) }, b"");
    tar.link(HARD, b"rootfs/again", b"rootfs/setuid");
    tar.pax(&[("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0")]);
    tar.file(b"rootfs/ping", b"ping");
    let archive = top.path().join("x.aci");
    fs::write(&archive, tar.end())?;
    let roots = store(&top.path().join("root"))?;
    let source = ImageSource::Archive(archive.clone());
    let imported = roots.import(&source, &ImportOptions::default())?;
    assert_eq!(imported.on_disk, fsprov::store::OnDisk::Exact);
    let exe = top.path().join("importer");
    fs::copy(std::env::current_exe()?, &exe)?;
    let theirs = top.path().join("theirs");
    fs::create_dir(&theirs)?;
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o777))?;
    let state = theirs.join("state");
    let done = Command::new("setpriv")
        .args(["--reuid", super::NOBODY, "--regid", super::NOBODY, "--clear-groups"])
        .arg(&exe)
        .arg("--import")
        .args([&state, &archive])
        .output()?;
    assert!(String::from_utf8_lossy(&done.stdout).contains("ok sha512-"), "{done:?}");
    let nobodys = store(&state)?;
    assert_eq!(nobodys.list()?[0].on_disk, fsprov::store::OnDisk::IndexOnly);
    let (mut one, mut two) = (Vec::new(), Vec::new());
    roots.export_tar(&ImageRef::Id(imported.id.clone()), &mut one)?;
    nobodys.export_tar(&ImageRef::Id(imported.id), &mut two)?;
    assert!(one == two, "the exports differ");
    assert!(roots.verify(Repair::No)?.is_empty() && nobodys.verify(Repair::No)?.is_empty());
    Ok(())
}
