//! Pull: from Debian's own registry, compared with what umoci unpacks; and from one that lies.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::common::harness::{PICTURE, case, on};
use crate::common::images::{Maker, chmod, make_full_tree, minbase_source, set_time};
use crate::common::needs::{test_user, without_fallbacks};
use crate::common::oci::{INDEX, Image, MANIFEST, digest, ranged};
use crate::common::server::{Answer, Asked, Server};
use crate::common::walk::{Picture, assert_same, from_lines, picture};
use crate::common::{Enter, Lane, Need, Stage, system};

/// docker-registry, stopped when dropped.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    /// `more` goes below `http:` of its configuration.
    fn start(stage: &Stage, more: &str) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("address");
        let data = stage.mkdir("registry-data");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {free}\n{more}",
            data.display()
        );
        let config = stage.write("registry.yml", config);
        let log = fs::File::create(stage.path("registry.log")).expect("log");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(config)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log)
            .spawn()
            .expect("start docker-registry");
        let registry = Registry { child, address: free.to_string() };
        assert!(
            system::eventually(Duration::from_secs(30), || TcpStream::connect(free).is_ok()),
            "docker-registry does not answer: {}",
            fs::read_to_string(stage.path("registry.log")).unwrap_or_default()
        );
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn pack_layer(stage: &Stage, tree: &Path) -> Vec<u8> {
    let path = stage.path("layer.tar");
    stage
        .tool("tar", ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--format=posix", "--sort=name", "-C"])
        .arg(tree)
        .arg("-cf")
        .arg(&path)
        .arg(".")
        .run()
        .ok();
    fs::read(path).expect("read layer")
}

fn put(root: &Path, name: &str, content: &str, mode: u32) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("make dir");
    fs::write(&path, content).unwrap_or_else(|e| panic!("write {name}: {e}"));
    chmod(&path, mode);
}

/// Times that do not depend on when the tree was made, so that only what the layers say can be compared.
fn old(root: &Path, secs: i64) {
    for entry in fs::read_dir(root).expect("list").flatten() {
        let path = entry.path();
        if entry.file_type().expect("type").is_dir() {
            old(&path, secs);
        }
        set_time(&path, secs, 0);
    }
    set_time(root, secs, 0);
}

/// Two layers that change what lies below: whiteouts, an opaque directory, kinds that change, owners, links, devices, attributes.
fn upper_layers(stage: &Stage) -> Vec<Vec<u8>> {
    let mknod = |path: PathBuf, kind, device| {
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, rustix::fs::Mode::from_raw_mode(0o640), device)
            .expect("mknod");
    };
    let own = |path: PathBuf, uid, gid| std::os::unix::fs::lchown(path, Some(uid), Some(gid)).expect("chown");
    let one = stage.mkdir("layer1");
    put(&one, "opt/.wh.gone", "", 0o644);
    put(&one, "opt/.wh.gone-dir", "", 0o644);
    put(&one, "opt/opaque/.wh..wh..opq", "", 0o644);
    put(&one, "opt/opaque/new", "new", 0o640);
    put(&one, "opt/was-dir", "a file now", 0o600);
    put(&one, "opt/was-file/inside", "a directory now", 0o644);
    put(&one, "opt/owned", "owned anew", 0o640);
    own(one.join("opt/owned"), 42, 43);
    put(&one, "opt/setuid", "setuid", 0o755);
    own(one.join("opt/setuid"), 7, 8);
    chmod(&one.join("opt/setuid"), 0o6755);
    put(&one, "opt/link-1", "linked", 0o644);
    fs::hard_link(one.join("opt/link-1"), one.join("opt/link-2")).expect("link");
    fs::hard_link(one.join("opt/link-1"), one.join("opt/link-3")).expect("link");
    symlink("../opt/owned", one.join("opt/was-link-target")).expect("symlink");
    mknod(one.join("opt/block"), rustix::fs::FileType::BlockDevice, rustix::fs::makedev(259, 70_000));
    mknod(one.join("opt/char"), rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    mknod(one.join("opt/fifo"), rustix::fs::FileType::Fifo, 0);
    chmod(&one.join("opt"), 0o751);
    own(one.join("opt"), 5, 6);
    old(&one, 1_500_000_000);
    let two = stage.mkdir("layer2");
    put(&two, "opt/gone", "back again", 0o604);
    put(&two, "opt/.wh.link-1", "", 0o644);
    put(&two, "opt/opaque/b/c2", "another", 0o644);
    put(&two, "opt/was-link-target/now-a-dir", "x", 0o644);
    put(&two, "opt/capable", "c", 0o755);
    let caps = [&[1, 0, 0, 2][..], &[0; 16][..]].concat();
    let set = |name: &str, value: &[u8]| {
        rustix::fs::setxattr(two.join("opt/capable"), name, value, rustix::fs::XattrFlags::empty()).expect("setxattr");
    };
    set("security.capability", &caps);
    set("user.note", b"of the third layer");
    chmod(&two.join("opt"), 0o751);
    own(two.join("opt"), 5, 6);
    old(&two, 1_600_000_000);
    vec![pack_layer(stage, &one), pack_layer(stage, &two)]
}

fn below_opt(root: &Path) {
    for (name, content) in [
        ("opt/gone", "gone"),
        ("opt/gone-dir/x/y", "gone"),
        ("opt/opaque/a", "hidden"),
        ("opt/opaque/b/c", "hidden"),
        ("opt/was-dir/x", "x"),
        ("opt/was-file", "a file"),
        ("opt/owned", "owned"),
    ] {
        put(root, name, content, 0o644);
    }
}

/// The program and this test program, where the ordinary user can run them; and how he runs them.
pub(crate) struct AsUser<'a> {
    stage: &'a Stage,
    pub(crate) dir: PathBuf,
    ids: [String; 2],
}

impl<'a> AsUser<'a> {
    pub(crate) fn new(stage: &'a Stage) -> Self {
        let user = test_user().expect("the test user");
        let dir = stage.mkdir("user");
        for (from, name) in
            [(std::env::current_exe().expect("exe"), "tests"), (crate::common::stage::program(), "fsprov")]
        {
            fs::copy(&from, dir.join(name)).expect("copy");
            chmod(&dir.join(name), 0o755);
        }
        let (uid, gid) = (user.uid.parse().expect("uid"), user.gid.parse().expect("gid"));
        std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).expect("chown");
        AsUser { stage, dir, ids: [user.uid, user.gid] }
    }

    pub(crate) fn call(&self, program: &str) -> crate::common::stage::Call<'_> {
        let [uid, gid] = &self.ids;
        let call = self.stage.tool("setpriv", ["--reuid", uid, "--regid", gid, "--init-groups", "--"]);
        call.arg(self.dir.join(program))
            .env("HOME", &self.dir)
            .env("FSPROV_ROOT", self.dir.join("state"))
            .cwd(&self.dir)
    }

    /// Mount by fuse, look, unmount.
    #[track_caller]
    fn seen(&self, image: &str) -> Picture {
        let rootfs = self.dir.join("rootfs");
        self.call("fsprov").args(["mount", "--backend", "fuse", "--uid-map", "none", image]).arg(&rootfs).run().ok();
        let said = self.call("tests").env(PICTURE, &rootfs).run().ok().out();
        self.call("fsprov").arg("unmount").arg(&rootfs).run().ok();
        from_lines(&said)
    }
}

/// Push, pull as an ordinary user, mount by fuse: the tree is what umoci unpacks as root; and so are those of a docker archive and of
/// the layout.
#[track_caller]
fn same_as_umoci(stage: &Stage, lowest: Vec<u8>, also_imported: bool) {
    let mut tars = vec![lowest];
    tars.extend(upper_layers(stage));
    let image = Image::of(&tars, "amd64");
    drop(tars);
    let layout = stage.path("layout");
    image.layout(&layout, "v1");
    stage
        .tool("umoci", ["unpack", "--image"])
        .arg(format!("{}:v1", layout.display()))
        .arg(stage.path("bundle"))
        .run()
        .ok();
    let want = picture(&stage.path("bundle/rootfs"));
    assert!(want.len() > 100 && want.contains_key(&b"opt/link-2"[..]) && !want.contains_key(&b"opt/link-1"[..]));

    let registry = Registry::start(stage, "");
    let reference = format!("{}/test/layers:v1", registry.address);
    stage
        .tool("skopeo", ["--insecure-policy", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"])
        .arg(format!("oci:{}:v1", layout.display()))
        .arg(format!("docker://{reference}"))
        .run()
        .ok();
    let user = AsUser::new(stage);
    let pulled =
        user.call("fsprov").args(["image", "pull", "--json", "--platform", "linux/amd64", &reference]).run().ok();
    assert_eq!(pulled.json()["id"], json!(image.digest().replace(':', "-")));
    assert!(without_fallbacks(&pulled.err()).is_empty(), "quiet where stderr is no terminal: {}", pulled.err());
    assert_same(&want, &user.seen(&reference), "pulled, as umoci unpacks it");
    // Nothing is fetched twice, and nothing lies about.
    let again =
        user.call("fsprov").args(["image", "pull", "--json", "--platform", "linux/amd64", &reference]).run().ok();
    assert_eq!(again.json()["outcome"], json!("existing"));
    let downloads = user.dir.join("state/cache/download");
    assert_eq!(fs::read_dir(downloads).expect("list").count(), 0, "downloads are gone once they are imported");

    if !also_imported {
        return;
    }
    let archive = stage.path("docker.tar");
    stage
        .tool("skopeo", ["--insecure-policy", "copy", "--quiet"])
        .arg(format!("oci:{}:v1", layout.display()))
        .arg(format!("docker-archive:{}:example.com/docker:v1", archive.display()))
        .run()
        .ok();
    // Each from an empty store: a layer that is there would not be unpacked.
    for (source, name) in [(&archive, "from-docker"), (&layout, "from-layout")] {
        open_to_all(source);
        let user_state = user.dir.join("state");
        fs::remove_dir_all(&user_state).expect("empty the store");
        let import = ["image", "import", "--platform", "linux/amd64", "--name", name];
        user.call("fsprov").args(import).arg(source).run().ok();
        assert_same(&want, &user.seen(name), name);
    }
}

fn open_to_all(path: &Path) {
    let meta = fs::metadata(path).expect("stat");
    fs::set_permissions(path, fs::Permissions::from_mode(if meta.is_dir() { 0o755 } else { 0o644 })).expect("chmod");
}

const TOOLS: &[Need] = &[
    Need::Tool("docker-registry"),
    Need::Tool("skopeo"),
    Need::Tool("umoci"),
    Need::Tool("setpriv"),
    Need::Tool("fusermount3"),
    Need::DevFuse,
    Need::TestUser,
];

pub(crate) fn root_once(lane: &Lane) -> bool {
    on::once_each(lane) && lane.enter == Enter::Root
}

case!("a_pulled_image_is_what_umoci_unpacks", root_once, TOOLS, |stage: &Stage| {
    let tree = stage.mkdir("layer0");
    make_full_tree(&tree, Maker::RealRoot);
    fs::remove_file(tree.join("usr/socket")).expect("unlink");
    // GNU tar and we keep an empty attribute; Go's reader, and so umoci, takes the empty PAX value for "none".
    rustix::fs::removexattr(tree.join("usr/page"), "user.empty").expect("removexattr");
    below_opt(&tree);
    same_as_umoci(stage, pack_layer(stage, &tree), true);
});

case!(
    "a_pulled_debian_is_what_umoci_unpacks",
    root_once,
    &[
        Need::Minbase,
        Need::Tool("docker-registry"),
        Need::Tool("skopeo"),
        Need::Tool("umoci"),
        Need::Tool("setpriv"),
        Need::Tool("fusermount3"),
        Need::DevFuse,
        Need::TestUser,
    ],
    // FSPROV_TEST_LONG=1: as a docker archive and as a layout too.
    |stage: &Stage| {
        let debian = fs::read(minbase_source().expect("minbase")).expect("read minbase");
        same_as_umoci(stage, debian, std::env::var_os("FSPROV_TEST_LONG").is_some());
    },
);

#[track_caller]
fn nothing_came(stage: &Stage, what: &str) {
    let images = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    assert_eq!(images, json!([]), "{what}");
}

fn reference(server: &Server) -> String {
    format!("{}/a/b:v1", server.address)
}

/// A blob large enough to break off in, that does not compress.
fn large() -> Image {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, seed) in [("one", 1), ("two", 2)] {
        let content = crate::common::images::noise(2 << 20, seed);
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &content[..]).expect("tar");
    }
    Image::of(&[tar.into_inner().expect("tar")], "amd64")
}

fn pull<'a>(stage: &'a Stage, server: &Server) -> crate::common::stage::Call<'a> {
    stage.fsprov(["image", "pull", "--platform", "linux/amd64"]).arg(reference(server))
}

case!("a_pull_that_broke_off_goes_on_where_it_ended", on::once_each, |stage: &Stage| {
    let image = large();
    let layer = image.layers[0].clone();
    let blob = image.blobs[&layer].clone();
    let half = blob.len() / 2;
    // The line breaks after half; then again and again, and then the registry stays away.
    let (ours, name) = (image.clone(), layer.clone());
    let server = Server::start(move |asked: &Asked| match ours.answer(asked) {
        honest if !asked.path.ends_with(&name) => honest,
        _ if asked.header("range").is_some() => Answer::new(503, ""),
        _ => Answer { length: Some(blob.len() as u64), ..Answer::new(200, &blob[..half]) },
    });
    pull(stage, &server).run().fails(1, &["503"]);
    nothing_came(stage, "after half");
    let parts: Vec<_> = walk(&stage.state().join("cache/download"), "part");
    assert_eq!(parts.len(), 1, "{parts:?}");
    assert_eq!(fs::metadata(&parts[0]).expect("stat").len(), half as u64);
    let ranges: Vec<_> = server.asked().iter().filter_map(|a| a.header("range").map(str::to_owned)).collect();
    assert!(!ranges.is_empty() && ranges.iter().all(|r| *r == format!("bytes={half}-")), "{ranges:?}");
    drop(server);
    // Another process goes on; it is killed while the registry is silent.
    let (ours, name, stop) = (image.clone(), layer.clone(), half + half / 2);
    let blob = image.blobs[&layer].clone();
    let server = Server::start(move |asked: &Asked| match ours.answer(asked) {
        honest if !asked.path.ends_with(&name) => honest,
        _ => {
            let from = asked.header("range").map_or(0, |_| half);
            let rest =
                Answer { hang: true, length: Some((blob.len() - from) as u64), ..Answer::new(206, &blob[from..stop]) };
            rest.with("Content-Range", format!("bytes {from}-{}/{}", blob.len() - 1, blob.len()))
        }
    });
    // The reference has another port, the image the same digest, which is what a download goes by.
    let mut call = pull(stage, &server);
    let mut child = call.command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
    let came = system::eventually(Duration::from_secs(60), || {
        walk(&stage.state().join("cache/download"), "part")
            .iter()
            .any(|p| fs::metadata(p).is_ok_and(|m| m.len() == stop as u64))
    });
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(came, "the rest did not come");
    drop(server);
    // And the last one asks for the rest alone.
    let ours = image.clone();
    let server = Server::start(move |asked: &Asked| ours.answer(asked));
    pull(stage, &server).run().ok();
    let ranges: Vec<_> = server
        .asked()
        .iter()
        .filter(|a| a.path.ends_with(&layer))
        .map(|a| a.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [Some(format!("bytes={stop}-"))]);
    stage.fsprov(["image", "verify"]).run().ok();
    assert_eq!(fs::read_dir(stage.state().join("cache/download")).expect("list").count(), 0);
    // What an earlier try left may be wrong: then it is fetched anew.
    stage.fsprov(["image", "rm"]).arg(reference(&server)).run().ok();
    stage.fsprov(["image", "gc"]).run().ok();
    let dir = stage.state().join("cache/download").join(image.digest().replace(':', "-")).join("blobs/sha256");
    fs::create_dir_all(&dir).expect("make dir");
    fs::write(dir.join(layer.trim_start_matches("sha256:")).with_extension("part"), "wrong").expect("write");
    pull(stage, &server).run().ok();
    stage.fsprov(["image", "verify"]).run().ok();
    // gc takes what broke off.
    fs::create_dir_all(&dir).expect("make dir");
    stage.fsprov(["image", "gc"]).run().ok();
    assert_eq!(fs::read_dir(stage.state().join("cache/download")).expect("list").count(), 0);
});

fn walk(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(walk(&path, extension));
        } else if path.extension().is_some_and(|have| have == extension) {
            found.push(path);
        }
    }
    found
}

/// One lie, and what must be said of it.
type Lie = (&'static str, Box<dyn Fn(&Image, &Asked) -> Option<Answer> + Send + Sync>, i32, &'static str);

fn lies() -> Vec<Lie> {
    fn of(asked: &Asked, image: &Image) -> bool {
        asked.path.ends_with(&image.layers[0])
    }
    fn on_manifest(asked: &Asked) -> bool {
        asked.path.contains("/manifests/")
    }
    fn manifest(change: impl Fn(&mut serde_json::Value), image: &Image) -> Answer {
        let mut value = serde_json::from_slice(&image.manifest).expect("json");
        change(&mut value);
        Answer::new(200, value.to_string()).with("Content-Type", MANIFEST)
    }
    vec![
        (
            "another blob of the same length",
            Box::new(|image, asked| {
                let mut blob = image.blobs[&image.layers[0]].clone();
                blob[20] ^= 1;
                of(asked, image).then(|| ranged(&blob, asked))
            }),
            1,
            "the registry sends something with the digest sha256:",
        ),
        (
            "a short blob, honestly measured",
            Box::new(|image, asked| {
                let blob = &image.blobs[&image.layers[0]];
                of(asked, image).then(|| Answer::new(200, &blob[..blob.len() - 9]))
            }),
            1,
            "and its manifest says",
        ),
        (
            "a short blob that says it is whole",
            Box::new(|image, asked| {
                let blob = &image.blobs[&image.layers[0]];
                let length = Some(blob.len() as u64);
                of(asked, image).then(|| Answer { length, ..Answer::new(200, &blob[..blob.len() - 9]) })
            }),
            1,
            image_cut(),
        ),
        (
            "a blob without an end",
            Box::new(|image, asked| {
                let blob = &image.blobs[&image.layers[0]];
                of(asked, image).then(|| Answer { repeat: 100_000, ..Answer::new(200, &blob[..]) })
            }),
            1,
            "and its manifest says",
        ),
        (
            "a manifest of a gigabyte",
            Box::new(|_, asked| {
                let huge = Answer { repeat: 1024, ..Answer::new(200, vec![b' '; 1 << 20]) };
                on_manifest(asked).then(|| huge.with("Content-Type", MANIFEST))
            }),
            1,
            "it has more than 1048576 bytes",
        ),
        (
            "redirects in a circle",
            Box::new(|image, asked| of(asked, image).then(|| Answer::new(307, "").with("Location", &*asked.path))),
            1,
            "it leads to more than 5 others",
        ),
        (
            "a redirect to another host without TLS",
            Box::new(|image, asked| {
                of(asked, image).then(|| Answer::new(302, "").with("Location", "http://192.0.2.1/secret"))
            }),
            1,
            "it would go over plain http",
        ),
        (
            "a redirect to a file",
            Box::new(|image, asked| {
                of(asked, image).then(|| Answer::new(302, "").with("Location", "file:///etc/passwd"))
            }),
            1,
            "read URL \"file:///etc/passwd\"",
        ),
        (
            "a redirect to nowhere",
            Box::new(|image, asked| of(asked, image).then(|| Answer::new(302, ""))),
            1,
            "it leads nowhere",
        ),
        (
            "a manifest that is called an index",
            Box::new(|image, asked| {
                on_manifest(asked).then(|| Answer::new(200, image.manifest.clone()).with("Content-Type", INDEX))
            }),
            1,
            "does not fit what it holds",
        ),
        (
            "a document that is both",
            Box::new(|image, asked| on_manifest(asked).then(|| manifest(|m| m["manifests"] = json!([]), image))),
            1,
            "it must be either an index",
        ),
        (
            "a page instead of a manifest",
            Box::new(|_, asked| {
                on_manifest(asked).then(|| Answer::new(200, "<html>log in</html>").with("Content-Type", "text/html"))
            }),
            1,
            "read OCI document",
        ),
        (
            "a layer that is no tar",
            Box::new(|image, asked| {
                on_manifest(asked).then(|| manifest(|m| m["layers"][0]["mediaType"] = json!("application/wasm"), image))
            }),
            5,
            "is not a layer that fsprov can unpack",
        ),
        (
            "a digest with a path in it",
            Box::new(|image, asked| {
                on_manifest(asked)
                    .then(|| manifest(|m| m["layers"][0]["digest"] = json!("sha256:../../../../etc/passwd"), image))
            }),
            1,
            "a digest must be `sha256:` and 64 lowercase hex digits",
        ),
        (
            "layers larger than any disk",
            Box::new(|image, asked| {
                on_manifest(asked).then(|| manifest(|m| m["layers"][0]["size"] = json!(u64::MAX - 1), image))
            }),
            1,
            "its layers have more than",
        ),
        (
            "a config that is too long",
            Box::new(|image, asked| {
                on_manifest(asked).then(|| manifest(|m| m["config"]["size"] = json!(1 << 30), image))
            }),
            1,
            "at most 1048576 are taken",
        ),
        (
            "more layers than diff ids",
            Box::new(|image, asked| {
                on_manifest(asked).then(|| {
                    manifest(
                        |m| {
                            let layer = m["layers"][0].clone();
                            m["layers"].as_array_mut().expect("layers").push(layer);
                        },
                        image,
                    )
                })
            }),
            1,
            "rootfs.diff_ids has 1 items and the manifest 2 layers",
        ),
        (
            "an index within an index, for ever",
            Box::new(|_, asked| {
                let body = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).to_string();
                on_manifest(asked).then(|| Answer::new(200, body).with("Content-Type", INDEX))
            }),
            3,
            "the index has none",
        ),
        (
            "no answer but errors",
            Box::new(|image, asked| {
                of(asked, image).then(|| Answer::new(500, r#"{"errors":[{"message":"the disk is gone"}]}"#))
            }),
            1,
            "it answers 500: the disk is gone",
        ),
        (
            "a blob that is not there",
            Box::new(|image, asked| of(asked, image).then(|| Answer::new(404, ""))),
            3,
            "it answers 404",
        ),
        (
            "no such image",
            Box::new(|_, asked| on_manifest(asked).then(|| Answer::new(404, ""))),
            3,
            "has no a/b with the tag v1",
        ),
        (
            "another range than was asked for",
            Box::new(|image, asked| {
                let blob = &image.blobs[&image.layers[0]];
                of(asked, image).then(|| {
                    if asked.header("range").is_none() {
                        let length = Some(blob.len() as u64);
                        return Answer { length, ..Answer::new(200, &blob[..10]) };
                    }
                    Answer::new(206, &blob[..])
                        .with("Content-Range", format!("bytes 0-{}/{}", blob.len() - 1, blob.len()))
                })
            }),
            1,
            "another range than asked for",
        ),
    ]
}

/// A blob cut short is asked for again, with a Range that this liar answers from the beginning: it never gets longer.
const fn image_cut() -> &'static str {
    "fetch sha256:"
}

case!("a_registry_that_lies_is_not_believed", on::once_each, |stage: &Stage| {
    for (what, lie, code, said) in lies() {
        let image = Image::small(what);
        let ours = image.clone();
        let server = Server::start(move |asked: &Asked| lie(&ours, asked).unwrap_or_else(|| ours.answer(asked)));
        stage.note(format!("--- {what}\n"));
        pull(stage, &server).run().fails(code, &[said]);
        nothing_came(stage, what);
        assert!(server.asked().len() < 60, "{what}: it does not ask for ever");
    }
    // By digest, the digest counts.
    let image = Image::small("x");
    let ours = Image::small("y");
    let server = Server::start(move |_: &Asked| Answer::new(200, ours.manifest.clone()).with("Content-Type", MANIFEST));
    let reference = format!("{}/a/b@{}", server.address, image.digest());
    stage.fsprov(["image", "pull", &reference]).run().fails(1, &["the registry sends something with the digest"]);
    nothing_came(stage, "by digest");
    // An index that says another size.
    let ours = Image::small("z");
    let server = Server::start(move |asked: &Asked| {
        if asked.path.ends_with("/manifests/v1") {
            let mut one = ours.descriptor("amd64");
            one["size"] = json!(3);
            let index = json!({"schemaVersion": 2, "manifests": [one]}).to_string();
            return Answer::new(200, index).with("Content-Type", INDEX);
        }
        ours.answer(asked)
    });
    pull(stage, &server).run().fails(1, &["its index says 3"]);
    // Nobody is there at all.
    let free = server.address;
    drop(server);
    stage
        .fsprov(["image", "pull", &format!("{free}/a:v1")])
        .run()
        .fails(1, &["Connection refused", "is the server running"]);
    let text = stage.fsprov(["image", "pull", "no-such-host.invalid/a"]).run();
    text.fails(1, &["no host no-such-host.invalid is known"]);
    stage.fsprov(["image", "pull", "UPPER"]).run().fails(2, &["lowercase"]);
});

case!("the_platform_chooses_and_a_tag_moves", on::once_each, |stage: &Stage| {
    let images = [("amd64", Image::small("for amd64")), ("arm64", Image::small("for arm64"))];
    let newer = Image::small("newer");
    let round = std::sync::Arc::new(AtomicUsize::new(0));
    let (all, next, turn) = (images.clone(), newer.clone(), round.clone());
    let server = Server::start(move |asked: &Asked| {
        if asked.path.ends_with("/manifests/v1") && turn.load(Ordering::Relaxed) == 0 {
            let list: Vec<_> = all.iter().map(|(arch, image)| image.descriptor(arch)).collect();
            let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": list}).to_string();
            return Answer::new(200, index).with("Content-Type", INDEX);
        }
        if asked.path.ends_with("/manifests/v1") {
            return next.answer(asked);
        }
        let answers = all.iter().map(|(_, image)| image).chain([&next]).map(|image| image.answer(asked));
        answers.into_iter().find(|answer| answer.status < 400).unwrap_or_else(|| Answer::new(404, ""))
    });
    let name = reference(&server);
    let pull = |platform: &str| stage.fsprov(["image", "pull", "--json", "--platform", platform, &name]).run();
    let id = |image: &Image| json!(image.digest().replace(':', "-"));
    assert_eq!(pull("linux/amd64").ok().json()["id"], id(&images[0].1));
    // The tag means what was pulled last.
    assert_eq!(pull("linux/arm64").ok().json()["id"], id(&images[1].1));
    assert_eq!(stage.fsprov(["image", "show", "--json", &name]).run().ok().json()["id"], id(&images[1].1));
    pull("linux/s390x").fails(3, &["there is none for linux/s390x: there are linux/amd64, linux/arm64"]);
    round.store(1, Ordering::Relaxed);
    let came = pull("linux/amd64").ok().json();
    assert_eq!((&came["id"], &came["outcome"]), (&id(&newer), &json!("created")));
    assert_eq!(stage.fsprov(["image", "show", "--json", &name]).run().ok().json()["id"], id(&newer));
    let all = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    assert_eq!(all.as_array().map(Vec::len), Some(3), "the images are all there: {all:#}");
    // By digest, and what the image is called then.
    let by_digest = format!("{}/a/b@{}", server.address, images[0].1.digest());
    stage.fsprov(["image", "pull", &by_digest]).run().ok();
    assert_eq!(stage.fsprov(["image", "show", "--json", &by_digest]).run().ok().json()["id"], id(&images[0].1));
});

// From nothing to a rootfs in one command.
case!("mount_pulls_what_the_store_lacks", on::once_each, |stage: &Stage| {
    let image = Image::small("pulled");
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let (answers, count) = (image.clone(), asked.clone());
    let server = Server::start(move |asked: &Asked| {
        count.fetch_add(1, Ordering::Relaxed);
        answers.answer(asked)
    });
    let name = reference(&server);
    stage.mkdir("project");
    stage.fsprov(["mount", &name, "rootfs"]).run().fails(3, &["no image of this name"]);
    assert_eq!(asked.load(Ordering::Relaxed), 0, "nobody asked for it to be pulled");
    let mount = || stage.fsprov(["mount", "--pull", &name, "rootfs"]).run().ok();
    mount();
    stage.fsprov(["unmount", "./rootfs"]).run().ok();
    let so_far = asked.load(Ordering::Relaxed);
    assert!(so_far > 0, "it was pulled");
    mount();
    stage.fsprov(["unmount", "./rootfs"]).run().ok();
    assert_eq!(asked.load(Ordering::Relaxed), so_far, "what is there is not asked for");
});

case!("logins_are_found_and_sent_to_nobody_else", on::once_each, |stage: &Stage| {
    let basic = format!("Basic {}", data_encoding::BASE64.encode(b"me:secret"));
    let pair = data_encoding::BASE64.encode(b"me:secret");
    // An object store that must never see a login.
    let store =
        {
            let image = Image::small("private");
            Server::start(move |asked: &Asked| {
                if asked.header("authorization").is_some() { Answer::new(400, "") } else { image.answer(asked) }
            })
        };
    let moved = format!("http://{}", store.address);
    let registry = |bearer: bool| {
        let image = Image::small("private");
        let (basic, moved) = (basic.clone(), moved.clone());
        let own = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let realm = own.clone();
        let server = Server::start(move |asked: &Asked| {
            let realm = realm.lock().expect("lock").clone();
            let said = asked.header("authorization").unwrap_or_default();
            if asked.path.starts_with("/token") {
                let right = said == basic
                    && asked.path.contains("scope=repository%3Aa%2Fb%3Apull")
                    && asked.path.contains("service=test");
                return if right { Answer::new(200, r#"{"token":"t0ken"}"#) } else { Answer::new(401, "") };
            }
            let (want, challenge) = if bearer {
                ("Bearer t0ken", format!(r#"Bearer realm="http://{realm}/token?x=y",service="test",scope="ignored""#))
            } else {
                (&*basic, r#"Basic realm="a, \"quoted\" one""#.to_owned())
            };
            if said != want {
                return Answer::new(401, "").with("WWW-Authenticate", challenge);
            }
            if asked.path.contains("/blobs/") {
                return Answer::new(307, "").with("Location", format!("{moved}{}", asked.path));
            }
            image.answer(asked)
        });
        *own.lock().expect("lock") = server.address.to_string();
        server
    };
    let home = stage.path("home");
    for bearer in [false, true] {
        let server = registry(bearer);
        let name = reference(&server);
        let again = |stage: &Stage| {
            stage.fsprov(["image", "rm", &name]).run().ok();
            stage.fsprov(["image", "gc"]).run().ok();
        };
        let login = stage.fsprov(["image", "pull", &name]).run();
        login.fails(1, &["the registry wants a login", "podman login 127.0.0.1:", "$REGISTRY_AUTH_FILE"]);
        nothing_came(stage, "without a login");
        let file = |pair: &str| json!({"auths": {server.address.to_string(): {"auth": pair}}}).to_string();
        let wrong = stage.write("wrong.json", file(&data_encoding::BASE64.encode(b"me:wrong")));
        let denied = stage.fsprov(["image", "pull", &name]).env("REGISTRY_AUTH_FILE", &wrong).run();
        let denied = denied.fails(1, &["refuses the login it was given"]);
        assert!(!denied.err().contains("wrong\""), "no password in a message");
        let right = stage.write("right.json", file(&pair));
        stage.fsprov(["image", "pull", &name]).env("REGISTRY_AUTH_FILE", &right).run().ok();
        again(stage);
        // docker's own place, and a helper.
        fs::create_dir_all(home.join(".docker")).expect("make dir");
        fs::write(home.join(".docker/config.json"), file(&pair)).expect("write");
        stage.fsprov(["image", "pull", &name]).run().ok();
        again(stage);
        let helpers = json!({"credHelpers": {server.address.to_string(): "test"}}).to_string();
        fs::write(home.join(".docker/config.json"), helpers).expect("write");
        let script = "#!/bin/sh\nread host\n[ \"$1\" = get ] && [ -n \"$host\" ] && echo '{\"Username\":\"me\",\"Secret\":\"secret\"}'\n";
        let script = {
            fs::create_dir_all(stage.path("bin")).expect("make dir");
            stage.write("bin/docker-credential-test", script)
        };
        chmod(&script, 0o755);
        let path = format!("{}:/usr/bin:/bin", stage.path("bin").display());
        stage.fsprov(["image", "pull", &name]).env("PATH", path).run().ok();
        again(stage);
        fs::remove_dir_all(home.join(".docker")).expect("remove");
        // podman's place, and the configuration's.
        fs::create_dir_all(home.join(".config/containers")).expect("make dir");
        fs::write(home.join(".config/containers/auth.json"), file(&pair)).expect("write");
        stage.fsprov(["image", "pull", &name]).run().ok();
        again(stage);
        fs::remove_dir_all(home.join(".config")).expect("remove");
        let config = stage.write("config.toml", format!("auth_file = {:?}\n", right));
        stage.fsprov(["image", "pull", &name]).env("FSPROV_CONFIG", config).run().ok();
        again(stage);
    }
    let seen = store.asked();
    assert!(!seen.is_empty() && seen.iter().all(|asked| asked.header("authorization").is_none()), "{seen:?}");
},);

case!(
    "a_certificate_must_be_trusted",
    on::once_each,
    &[Need::Tool("docker-registry"), Need::Tool("openssl"), Need::Tool("skopeo")],
    |stage: &Stage| {
        stage
            .tool(
                "openssl",
                ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"],
            )
            .args([
                "-subj",
                "/CN=test",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
            ])
            .run()
            .ok();
        let (cert, key) = (stage.path("cert.pem"), stage.path("key.pem"));
        let tls = format!("  tls: {{certificate: {}, key: {}}}\n", cert.display(), key.display());
        let registry = Registry::start(stage, &tls);
        let image = Image::small("over TLS");
        image.layout(&stage.path("layout"), "v1");
        let name = format!("{}/a/b:v1", registry.address);
        stage
            .tool("skopeo", ["--insecure-policy", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:v1", stage.path("layout").display()))
            .arg(format!("docker://{name}"))
            .run()
            .ok();
        // It is on this host, where http would do; but it speaks TLS, so its certificate counts.
        stage.fsprov(["image", "pull", &name]).run().fails(1, &["its certificate is not trusted", "ca = "]);
        nothing_came(stage, "an untrusted certificate");
        let config = |more: String| stage.write("config.toml", format!("[registry.\"{}\"]\n{more}", registry.address));
        let trusted = config(format!("ca = {cert:?}\n"));
        stage.fsprov(["image", "pull", "--platform", "linux/amd64", &name]).env("FSPROV_CONFIG", &trusted).run().ok();
        let insecure = config("insecure = true\n".into());
        let said = stage.fsprov(["image", "pull", &name]).env("FSPROV_CONFIG", &insecure).run();
        said.fails(1, &["400"]);
        // A mirror is asked first, and what it lacks comes from the registry itself.
        let mirrored = |mirror: &str| {
            stage.write(
                "mirror.toml",
                format!(
                    "[registry.\"none.invalid\"]\nmirror = {mirror:?}\n[registry.\"{}\"]\nca = {cert:?}\n",
                    registry.address
                ),
            )
        };
        let path = mirrored(&format!("{}/a", registry.address));
        stage
            .fsprov(["image", "pull", "--platform", "linux/amd64", "none.invalid/b:v1"])
            .env("FSPROV_CONFIG", path)
            .run()
            .ok();
        let path = mirrored(&format!("{}/other", registry.address));
        let said = stage.fsprov(["image", "pull", "none.invalid/b:v1"]).env("FSPROV_CONFIG", path).run();
        said.fails(1, &["the mirror", "does not help", "no host none.invalid is known"]);
        assert_eq!(digest(&image.manifest), image.digest());
    },
);
