//! Images for the store: an unpacked docker archive, made with tar(1).

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

use crate::served::Served;

/// What becomes one layer.
pub(crate) type Layer<'a> = &'a [Entry<'a>];

pub(crate) enum Entry<'a> {
    File(&'a str, &'a str),
    /// A file, and no entry for the directories that it lies in.
    Bare(&'a str),
    Dir(&'a str, u32),
}

/// An image that was made: its layers' diff ids and its chain ids, bottom first.
pub(crate) struct Image {
    pub(crate) dir: PathBuf,
    pub(crate) diff_ids: Vec<String>,
    pub(crate) chains: Vec<String>,
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(&Sha256::digest(bytes)))
}

fn run(command: &mut Command) {
    let said = command.output().expect("run");
    assert!(said.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said.stderr));
}

/// The tar of a layer.
pub(crate) fn tar(served: &Served, name: &str, layer: Layer<'_>) -> PathBuf {
    tar_of(served, name, layer, None)
}

/// The same; `owner`: whose all of it is.
fn tar_of(served: &Served, name: &str, layer: Layer<'_>, owner: Option<u32>) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let (tree, tar) = (served.path(&format!("{name}.tree")), served.path(&format!("{name}.tar")));
    std::fs::create_dir_all(&tree).expect("make");
    let mut bare = Vec::new();
    for entry in layer {
        match entry {
            Entry::File(path, text) => {
                let at = tree.join(path);
                std::fs::create_dir_all(at.parent().expect("a parent")).expect("make");
                std::fs::write(at, text).expect("write");
            }
            Entry::Bare(path) => {
                let at = tree.join(path);
                std::fs::create_dir_all(at.parent().expect("a parent")).expect("make");
                std::fs::write(at, "").expect("write");
                bare.push(*path);
            }
            Entry::Dir(path, mode) => {
                std::fs::create_dir_all(tree.join(path)).expect("make");
                std::fs::set_permissions(tree.join(path), std::fs::Permissions::from_mode(*mode)).expect("chmod");
            }
        }
    }
    run(Command::new("tar")
        .args(["--numeric-owner", "--mtime=@1000000000", "--sort=name"])
        .args(owner.into_iter().flat_map(|id| [format!("--owner=:{id}"), format!("--group=:{id}")]))
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(&tree)
        .args(if bare.is_empty() { vec!["."] } else { bare }));
    tar
}

/// An unpacked docker archive of these layers, not in the store yet.
pub(crate) fn make(served: &Served, name: &str, layers: &[Layer<'_>]) -> Image {
    make_of(served, name, layers, None)
}

/// The same; `owner`: whose all files are.
pub(crate) fn make_of(served: &Served, name: &str, layers: &[Layer<'_>], owner: Option<u32>) -> Image {
    let dir = served.path(name);
    std::fs::create_dir_all(&dir).expect("make");
    let (mut diff_ids, mut chains, mut files) = (Vec::new(), Vec::<String>::new(), Vec::new());
    for (number, layer) in layers.iter().enumerate() {
        let from = tar_of(served, &format!("{name}-{number}"), layer, owner);
        let file = format!("{number}.tar");
        std::fs::copy(&from, dir.join(&file)).expect("copy");
        let diff_id = sha256(&std::fs::read(&from).expect("read"));
        let chain = chains.last().map_or(diff_id.clone(), |below| sha256(format!("{below} {diff_id}").as_bytes()));
        chains.push(chain);
        diff_ids.push(diff_id);
        files.push(file);
    }
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }, "os": "linux",
        "config": { "Cmd": ["/bin/sleep", "100000"] }, "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    std::fs::write(dir.join("config.json"), config.to_string()).expect("write");
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [format!("example.com/{name}:1")], "Layers": files }]);
    std::fs::write(dir.join("manifest.json"), manifest.to_string()).expect("write");
    Image { dir, diff_ids, chains }
}

/// Import one into the store.
pub(crate) fn import(served: &Served, image: &Image) {
    run(served.fsprov().args(["image", "import"]).arg(&image.dir));
}

/// Layers in the store.
pub(crate) fn layers_in_store(served: &Served) -> usize {
    std::fs::read_dir(served.path("root/layers")).map_or(0, |all| all.count())
}

pub(crate) fn layer_dir(served: &Served, diff_id: &str) -> PathBuf {
    Path::new(&served.path("root/layers")).join(diff_id.replace(':', "-"))
}
