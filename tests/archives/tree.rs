//! The store from the outside: what goes in comes out, what is damaged is found, what is shared is one.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use fsprov::id::ImageRef;
use fsprov::paths::StatePaths;
use fsprov::store::{ImageSource, ImportOptions, Outcome, Prune, Repair, Store};
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
    let flat = first.flatten(&ImageRef::Id(back.id), "example.com/flat")?;
    let mut three = Vec::new();
    first.export_tar(&ImageRef::Id(flat.id), &mut three)?;
    assert!(one == three, "flattened, it is another tree");
    assert!(first.verify(Repair::No)?.is_empty());
    fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o700))?;
    Ok(())
}

pub(crate) fn damage_is_found() -> Result<(), Failed> {
    type Harm = fn(&Path) -> std::io::Result<()>;
    let harms: [(&str, &str, Harm); 9] = [
        ("a byte changed", "/a", |dir| fs::write(dir.join("rootfs/a"), "CONTENT")),
        ("a file cut", "/a", |dir| fs::write(dir.join("rootfs/a"), "con")),
        ("a file lost", "/a", |dir| fs::remove_file(dir.join("rootfs/a"))),
        ("a file more", "/more", |dir| fs::write(dir.join("rootfs/more"), "")),
        ("a link turned", "/l", |dir| {
            fs::remove_file(dir.join("rootfs/l"))?;
            symlink("elsewhere", dir.join("rootfs/l"))
        }),
        ("a file become a directory", "/a", |dir| {
            fs::remove_file(dir.join("rootfs/a"))?;
            fs::create_dir(dir.join("rootfs/a"))
        }),
        ("the manifest lost", "manifest", |dir| fs::remove_file(dir.join("manifest"))),
        ("the index changed", "index", |dir| {
            let mut bytes = fs::read(dir.join("index"))?;
            let last = bytes.len() - 100;
            bytes[last] ^= 1;
            fs::write(dir.join("index"), bytes)
        }),
        ("the record empty", "meta.json", |dir| fs::write(dir.join("meta.json"), "")),
    ];
    let top = tempfile::tempdir()?;
    let mut tar = Tar::aci();
    tar.file(b"rootfs/a", b"content");
    tar.link(SYM, b"rootfs/l", b"a");
    let archive = top.path().join("x.aci");
    fs::write(&archive, tar.end())?;
    let source = ImageSource::Archive(archive);
    for (name, part, harm) in harms {
        let store = store(&top.path().join(name))?;
        let imported = store.import(&source, &ImportOptions::default())?;
        assert!(store.verify(Repair::No)?.is_empty(), "{name}: before");
        harm(&store.paths().image(&imported.id))?;
        let found = store.verify(Repair::No)?;
        assert!(found.iter().any(|damage| damage.id == imported.id && damage.part == part), "{name}: {found:?}");
        let found = store.verify(Repair::SetAside)?;
        assert!(found.iter().all(|damage| damage.set_aside), "{name}: {found:?}");
        assert!(store.ids()?.is_empty() && store.verify(Repair::No)?.is_empty(), "{name}: it is still there");
        assert_eq!(store.import(&source, &ImportOptions::default())?.outcome, Outcome::Created, "{name}");
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
    let done = store.gc(Prune::UnusedImages, &used)?;
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
