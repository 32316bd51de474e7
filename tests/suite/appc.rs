//! AppC beyond one archive: discovery, signatures, a store of Mesos's used in place, the configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::common::harness::{case, on};
use crate::common::images::{chmod, make_small_tree};
use crate::common::server::{Answer, Asked, Server};
use crate::common::walk::{assert_same, picture};
use crate::common::{Enter, Lane, Need, Stage};

/// An ACI of a manifest and a file `content`.
fn aci(manifest: &serde_json::Value, content: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [("manifest", manifest.to_string()), ("rootfs/content", content.to_owned())] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).expect("tar");
    }
    tar.into_inner().expect("tar")
}

fn manifest(name: &str, version: &str, dependencies: serde_json::Value) -> serde_json::Value {
    json!({"acKind": "ImageManifest", "acVersion": "0.8.11", "name": name, "dependencies": dependencies, "labels": [
        {"name": "version", "value": version}, {"name": "os", "value": "linux"}, {"name": "arch", "value": "amd64"}]})
}

fn config(stage: &Stage, text: &str) -> PathBuf {
    stage.write("config.toml", text)
}

#[track_caller]
fn names(stage: &Stage) -> Vec<String> {
    let images = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    let all = images.as_array().expect("an array");
    all.iter().map(|image| image["names"][0].as_str().expect("a name").to_owned()).collect()
}

/// What several servers and directories have: the right image, one of another name, one of another version, one with dependencies,
/// one that stands on itself.
fn wares() -> Vec<(&'static str, Vec<u8>)> {
    let on = |name: &str| json!([{"imageName": name, "labels": [{"name": "os", "value": "linux"}]}]);
    let none = json!([]);
    vec![
        ("example.com/app-1.0-linux-amd64.aci", aci(&manifest("example.com/app", "1.0", none.clone()), "app")),
        ("example.com/liar-1.0-linux-amd64.aci", aci(&manifest("example.com/app", "1.0", none.clone()), "liar")),
        ("example.com/old-1.0-linux-amd64.aci", aci(&manifest("example.com/old", "0.9", none.clone()), "old")),
        ("example.com/latest-latest-linux-amd64.aci", aci(&manifest("example.com/latest", "7", none.clone()), "l")),
        (
            "example.com/top-1.0-linux-amd64.aci",
            aci(&manifest("example.com/top", "1.0", on("example.com/middle")), "top"),
        ),
        (
            "example.com/middle-latest-linux-amd64.aci",
            aci(&manifest("example.com/middle", "3", on("example.com/base")), "middle"),
        ),
        ("example.com/base-latest-linux-amd64.aci", aci(&manifest("example.com/base", "2", none), "base")),
        ("example.com/a-latest-linux-amd64.aci", aci(&manifest("example.com/a", "1", on("example.com/b")), "a")),
        ("example.com/b-latest-linux-amd64.aci", aci(&manifest("example.com/b", "1", on("example.com/a")), "b")),
        (
            "example.com/wrong-id-1.0-linux-amd64.aci",
            aci(
                &manifest(
                    "example.com/wrong-id",
                    "1.0",
                    json!([{"imageName": "example.com/base", "imageID": "sha512-00"}]),
                ),
                "w",
            ),
        ),
    ]
}

case!("an_appc_image_is_found_by_its_name_and_is_what_was_asked_for", on::once_each, |stage: &Stage| {
    let mirror = stage.mkdir("mirror");
    for (name, bytes) in wares() {
        let path = mirror.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("make dir");
        fs::write(path, bytes).expect("write");
    }
    let wares = wares();
    let server = Server::start(move |asked: &Asked| {
        let found = wares.iter().find(|(name, _)| asked.path.strip_prefix('/') == Some(*name));
        found.map_or_else(|| Answer::new(404, ""), |(_, bytes)| Answer::new(200, &bytes[..]))
    });
    let path = format!("{}/", mirror.display());
    // A path, as Mesos's appc_simple_discovery_uri_prefix may be; a file: URL; a web server of this host.
    for prefix in [path.clone(), format!("file://{path}"), format!("http://{}/", server.address)] {
        let config_of = |more: &str| {
            stage.write("config.toml", format!("discovery_prefixes = [\"/nowhere/\", {prefix:?}]\n{more}"))
        };
        let config = config_of("");
        let fetch = |what: &str| stage.fsprov(["image", "fetch", what]).env("FSPROV_CONFIG", &config).run();
        fetch("example.com/app:1.0").ok();
        fetch("example.com/latest").ok();
        fetch("example.com/liar:1.0").fails(1, &["what came calls itself example.com/app"]);
        fetch("example.com/old:1.0").fails(1, &["what came has the label version=0.9"]);
        fetch("example.com/app:1.0,channel=beta").fails(1, &["what came has no label channel"]);
        // What came could be another name's: nothing of it stays.
        assert_eq!(names(stage), ["example.com/app", "example.com/latest"], "{prefix}");
        // Dependencies first, and only what is missing.
        let said =
            stage.fsprov(["image", "fetch", "--json", "example.com/top:1.0"]).env("FSPROV_CONFIG", &config).run();
        let said = said.ok().json();
        let came: Vec<_> = said.as_array().expect("an array").iter().map(|one| one["name"].clone()).collect();
        assert_eq!(came, [json!("example.com/base"), json!("example.com/middle"), json!("example.com/top")]);
        server.asked();
        fetch("example.com/top:1.0").ok();
        assert!(server.asked().iter().all(|asked| !asked.path.contains("base")), "it is there");
        fetch("example.com/a")
            .fails(1, &["it depends on itself: example.com/a -> example.com/b,os=linux -> example.com/a"]);
        stage.fsprov(["image", "rm", "example.com/top", "example.com/middle", "example.com/base"]).run().ok();
        fetch("example.com/wrong-id:1.0").fails(1, &["and what depends on it says sha512-00"]);
        stage.fsprov(["image", "rm", "example.com/app", "example.com/latest"]).run().ok();
        assert_eq!(names(stage), [""; 0]);
        // Each of the three has a few KiB: together they are too much.
        let little = config_of(&format!("\n[limits]\ntotal_bytes = {}\n", 5 * 1024));
        if prefix.starts_with("http:") {
            let said = stage.fsprov(["image", "fetch", "example.com/top:1.0"]).env("FSPROV_CONFIG", &little).run();
            said.fails(1, &["all that is fetched for one image may have"]);
            stage.fsprov(["image", "gc", "--unused"]).run().ok();
        }
        let downloads = fs::read_dir(stage.state().join("cache/download")).map_or(0, Iterator::count);
        assert_eq!(downloads, 0, "nothing lies about");
    }
    let config = config(stage, &format!("discovery_prefixes = [{path:?}, \"http://192.0.2.1/\"]\n"));
    let nowhere = stage.fsprov(["image", "fetch", "none.invalid/x"]).env("FSPROV_CONFIG", &config).run();
    nowhere.fails(
        3,
        &[
            "none.invalid/x-latest-linux-",
            ": not there",
            "it would go over plain http",
            "no host none.invalid is known",
        ],
    );
    stage.fsprov(["image", "fetch", "Bad"]).run().fails(2, &["AC identifier"]);
});

/// An address of this host that nothing else listens at.
const META_HOST: &str = "127.83.21.5";

// Discovery by a page's tags asks at port 80 (443 with TLS), which only root may serve.
case!(
    "an_appc_image_is_found_by_the_tags_of_a_page",
    |lane: &Lane| on::once_each(lane) && lane.enter == Enter::Root,
    |stage: &Stage| {
        let name = format!("{META_HOST}/team/app");
        let bytes = aci(&manifest(&name, "1.0", json!([])), "found");
        let (ours, page_of) = (name.clone(), name.clone());
        let _server = Server::at(&format!("{META_HOST}:80"), move |asked: &Asked| {
            if asked.path == "/?ac-discovery=1" {
                // Only the page of the host itself has tags; the first does not fit, the second is not there.
                let page = format!(
                    "<html><head><meta name=ac-discovery content='other.com http://{META_HOST}/no.{{ext}}'>\
                     <meta name=ac-discovery content='{META_HOST} http://{META_HOST}/gone/{{name}}.{{ext}}'>\
                     <meta name=ac-discovery content='{META_HOST}/team http://{META_HOST}/s/{{os}}/{{arch}}/{{name}}-{{version}}.{{ext}}'>\
                     </head><body><meta name=ac-discovery content='{META_HOST} http://{META_HOST}/body.aci'>"
                );
                return Answer::new(200, page).with("Content-Type", "text/html");
            }
            if asked.path == format!("/s/linux/amd64/{page_of}-1.0.aci") {
                return Answer::new(200, &bytes[..]);
            }
            Answer::new(404, "")
        });
        let fetch = |what: &str| stage.fsprov(["image", "fetch", what]).run();
        fetch(&format!("{ours}:1.0,os=linux,arch=amd64")).ok();
        assert_eq!(names(stage), std::slice::from_ref(&name));
        fetch(&format!("{ours}:2.0,arch=amd64")).fails(3, &["/team/app-2.0.aci: not there"]);
    },
);

/// Run gpg on a home of the case's own.
#[track_caller]
fn gpg(stage: &Stage, args: &[&str]) -> Vec<u8> {
    let home = stage.path("gnupg");
    if !home.exists() {
        fs::create_dir(&home).expect("make dir");
        chmod(&home, 0o700);
    }
    let call = stage.tool("gpg", ["--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]);
    call.env("GNUPGHOME", &home).args(args).run().ok().stdout
}

/// The agent that gpg starts for a home ends with it.
fn end_agent(stage: &Stage) {
    stage.tool("gpgconf", ["--kill", "all"]).env("GNUPGHOME", stage.path("gnupg")).run();
    crate::common::system::survivors(Duration::from_secs(30));
}

case!(
    "a_keyring_asks_for_a_good_signature",
    on::once_each,
    &[Need::Tool("gpg"), Need::Tool("gpgconf"), Need::Tool("gzip")],
    |stage: &Stage| {
        let archive = stage.write("app.aci", aci(&manifest("example.com/app", "1.0", json!([])), "signed"));
        let other = stage.write("other.aci", aci(&manifest("example.com/app", "1.0", json!([])), "not signed"));
        let dir = stage.path("gnupg");
        for (who, kind, expire) in [
            ("good@example.com", "ed25519", "never"),
            ("rsa@example.com", "rsa2048", "never"),
            ("stranger@example.com", "ed25519", "never"),
            ("revoked@example.com", "ed25519", "never"),
            // Both of it in 2020.
            ("expired@example.com", "ed25519", "seconds=3600"),
        ] {
            let time = |hour| if expire == "never" { [].as_slice() } else { hour };
            let key = ["--quick-gen-key", who, kind, "sign", expire];
            gpg(stage, &[time(&["--faked-system-time", "20200101T000000"]), &key].concat());
            let asc = stage.path(format!("{who}.asc"));
            let sign = ["--armor", "--local-user", who, "--output", asc.to_str().expect("text"), "--detach-sign"];
            let signed = [archive.to_str().expect("text")];
            gpg(stage, &[time(&["--faked-system-time", "20200101T000100"]), &sign, &signed].concat());
        }
        let binary = stage.path("binary.sig");
        gpg(
            stage,
            &[
                "--local-user",
                "good@example.com",
                "--output",
                binary.to_str().expect("text"),
                "--detach-sign",
                archive.to_str().expect("text"),
            ],
        );
        // gpg writes a revocation for each key it makes, with a colon before it so that nobody imports it by mistake.
        let listed =
            String::from_utf8(gpg(stage, &["--list-keys", "--with-colons", "revoked@example.com"])).expect("text");
        let print =
            listed.lines().find_map(|line| line.strip_prefix("fpr:")?.split(':').nth(8)).expect("a fingerprint");
        let revocation =
            fs::read_to_string(dir.join(format!("openpgp-revocs.d/{print}.rev"))).expect("read revocation");
        let revocation = stage.write("revocation", revocation.replace(":-----BEGIN", "-----BEGIN"));
        gpg(stage, &["--import", revocation.to_str().expect("text")]);
        let keys = stage.mkdir("keys");
        let mut armored = Vec::new();
        for who in ["good@example.com", "expired@example.com"] {
            armored.extend(gpg(stage, &["--armor", "--export", who]));
        }
        fs::write(keys.join("armored.asc"), armored).expect("write");
        fs::write(keys.join("binary.gpg"), gpg(stage, &["--export", "rsa@example.com", "revoked@example.com"]))
            .expect("write");
        end_agent(stage);

        let config = config(stage, &format!("keyring = {keys:?}\n"));
        let import = |path: &Path, more: &[&str]| {
            stage.fsprov(["image", "import"]).arg(path).args(more).env("FSPROV_CONFIG", &config).run()
        };
        import(&archive, &[]).fails(1, &["a keyring is configured", "app.aci.asc", "--signature"]);
        for (signature, said) in [
            ("stranger@example.com.asc", "the keyring has no key"),
            ("revoked@example.com.asc", "revoked@example.com ("),
            ("expired@example.com.asc", "has expired"),
            ("app.aci", "not an OpenPGP signature"),
            ("none.asc", "there is no signature"),
        ] {
            import(&archive, &["--signature", signature]).fails(1, &[said]);
        }
        import(&archive, &["--signature", "revoked@example.com.asc"]).fails(1, &["is revoked"]);
        import(&other, &["--signature", "good@example.com.asc"]).fails(1, &["does not fit the file"]);
        // The same bytes with one after them are others.
        let longer = [fs::read(&archive).expect("read"), vec![0]].concat();
        import(&stage.write("longer.aci", longer), &["--signature", "good@example.com.asc"])
            .fails(1, &["does not fit"]);
        assert_eq!(names(stage), [""; 0], "nothing came in");
        stage.mkdir("mnt");
        stage
            .fsprov(["mount", "./app.aci", "mnt"])
            .env("FSPROV_CONFIG", &config)
            .run()
            .fails_saying(&["a keyring is configured"]);
        let piped =
            stage.tool("sh", ["-c", "cat app.aci | \"$0\" image import -"]).arg(crate::common::stage::program());
        piped.env("FSPROV_CONFIG", &config).run().fails(1, &["a stream has no signature"]);
        let rm = || drop(stage.fsprov(["image", "rm", "example.com/app"]).run().ok());
        for signature in ["good@example.com.asc", "rsa@example.com.asc", "binary.sig"] {
            import(&archive, &["--signature", signature]).ok();
            rm();
        }
        // Beside the archive; over the tar of a compressed archive.
        let read = |name: &str| fs::read(stage.path(name)).expect("read");
        stage.write("app.aci.asc", read("good@example.com.asc"));
        import(&archive, &[]).ok();
        rm();
        let zipped = stage.write("zipped.aci", stage.tool("gzip", ["-c"]).arg(&archive).run().ok().stdout);
        import(&zipped, &["--signature", "good@example.com.asc"]).ok();
        rm();
        import(&zipped, &["--no-signature"]).ok();
        // That its id is in the store does not sign it.
        stage.write("copy.aci", read("app.aci"));
        let mount = |what: &str, config: &Path| stage.fsprov(["mount", what, "mnt"]).env("FSPROV_CONFIG", config).run();
        mount("./copy.aci", &config).fails_saying(&["there is no signature"]);
        let refuse = stage.write("refuse.toml", format!("keyring = {keys:?}\nunsigned = \"refuse\"\n"));
        let refused = ["unsigned = \"refuse\""];
        mount("example.com/app", &refuse).fails_saying(&["no signature of it is recorded", refused[0]]);
        // Signed, it is recorded by whom, and asked for on use.
        stage.write("copy.aci.asc", read("good@example.com.asc"));
        mount("./copy.aci", &config).ok();
        stage.fsprov(["unmount", "mnt"]).run().ok();
        let shown = stage.fsprov(["image", "show", "--json", "example.com/app"]).run().ok().json();
        assert!(shown["signed_by"]["user"].to_string().contains("good@example.com"), "{shown:#}");
        fs::remove_file(stage.path("copy.aci.asc")).expect("remove");
        for what in ["./copy.aci", "example.com/app"] {
            mount(what, &refuse).ok();
            stage.fsprov(["unmount", "mnt"]).run().ok();
        }
        let rsa_alone = stage.mkdir("rsa-alone");
        fs::copy(keys.join("binary.gpg"), rsa_alone.join("keys")).expect("copy");
        let other = stage.write("other.toml", format!("keyring = {rsa_alone:?}\nunsigned = \"refuse\"\n"));
        mount("example.com/app", &other).fails_saying(&["has no key", "any more"]);
        // What cannot be signed is refused: directories, layouts.
        let plain = stage.path("plain");
        make_small_tree(&plain);
        stage.fsprov(["image", "export", "--format", "oci", "example.com/app", "layout"]).run().ok();
        for what in ["plain", "layout"] {
            let from = stage.fsprov(["image", "import", what, "--name", "unsigned"]);
            from.env("FSPROV_CONFIG", &refuse).run().fails(1, &refused);
            mount(&format!("./{what}"), &refuse).fails_saying(&refused);
        }
        rm();
        // A key may be for some names only.
        for (prefix, said) in
            [("example.com,other", Some("is for names that begin with example.com/other/")), ("example.com", None)]
        {
            let bound = stage.mkdir(format!("bound-{prefix}"));
            let dir = bound.join("prefix.d").join(prefix);
            fs::create_dir_all(&dir).expect("make dir");
            fs::copy(keys.join("armored.asc"), dir.join("key")).expect("copy");
            let config = stage.write("bound.toml", format!("keyring = {bound:?}\n"));
            let call = stage.fsprov(["image", "import", "--signature", "good@example.com.asc", "app.aci"]);
            let done = call.env("FSPROV_CONFIG", &config).run();
            match said {
                Some(said) => drop(done.fails(1, &[said])),
                None => drop(done.ok()),
            }
        }
        rm();
        // Without a keyring nothing is asked for, and a signature that is named is not passed over in silence.
        stage.fsprov(["image", "import"]).arg(&archive).run().ok();
        rm();
        let said = stage.fsprov(["image", "import", "--signature", "binary.sig"]).arg(&archive).run();
        said.fails(2, &["no keyring is configured to check it against"]);
        // Discovery fetches the signature; without one the image does not come.
        let (bytes, asc) = (read("app.aci"), read("good@example.com.asc"));
        let server = Server::start(move |asked: &Asked| match asked.path.as_str() {
            "/good/example.com/app-1.0-linux-amd64.aci" | "/bare/example.com/app-1.0-linux-amd64.aci" => {
                Answer::new(200, &bytes[..])
            }
            "/good/example.com/app-1.0-linux-amd64.aci.asc" => Answer::new(200, &asc[..]),
            _ => Answer::new(404, ""),
        });
        for (place, is_signed) in [("bare", false), ("good", true)] {
            let prefix = format!("http://{}/{place}/", server.address);
            let config = stage.write("fetch.toml", format!("keyring = {keys:?}\ndiscovery_prefixes = [{prefix:?}]\n"));
            let said =
                stage.fsprov(["image", "fetch", "example.com/app:1.0,arch=amd64"]).env("FSPROV_CONFIG", &config).run();
            if is_signed {
                said.ok()
            } else {
                said.fails(1, &["a keyring is configured, and there is no signature"])
            };
        }
        assert_eq!(names(stage), ["example.com/app"]);
        let config = stage.write("config.toml", "keyring = \"/nowhere\"\n");
        stage
            .fsprov(["image", "import"])
            .arg(&archive)
            .env("FSPROV_CONFIG", &config)
            .run()
            .fails(3, &["read keyring /nowhere"]);
    },
);

// A name is an entry to trust. With the name `debian` in the store, an archive that calls itself so must not become it.
case!("an_import_takes_no_name_that_nobody_gave_it", on::once_each, |stage: &Stage| {
    let name = "example.com/debian";
    let make = |file: &str, version: &str, content: &str| {
        stage.write(file, aci(&manifest(name, version, json!([])), content));
    };
    make("good.aci", "1", "good");
    make("evil.aci", "latest", "evil");
    make("worse.aci", "1", "worse");
    let import = |args: &[&str]| stage.fsprov(["image", "import", "--json"]).args(args).run();
    let id_of = |what: &str| stage.fsprov(["image", "show", "--json", what]).run().ok().json();
    let good = import(&["good.aci"]).ok().json()["id"].clone();
    let evil = import(&["evil.aci", "--name", "quarantine/x"]).ok().json()["id"].clone();
    assert_eq!(id_of("quarantine/x")["names"], json!(["quarantine/x"]), "only the name that was given");
    assert_eq!(id_of(name)["id"], good);
    // What stands on the name stands on what it means.
    let on = json!([{"imageName": name}]);
    stage.write("app.aci", aci(&manifest("example.com/app", "1", on), "app"));
    import(&["app.aci"]).ok();
    assert_eq!(id_of("example.com/app")["dependencies"], json!([good]));
    // Without a name of its own it would take one that is held: it must be asked for.
    for file in ["evil.aci", "worse.aci"] {
        import(&[file]).fails(1, &["name image example.com/debian", "has this name", "--replace"]);
        assert_eq!(id_of(name)["id"], good, "{file}");
    }
    let listed = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    assert_eq!(listed.as_array().map(Vec::len), Some(3), "what was refused is not there");
    // Mounted by its path, it gets no name.
    stage.mkdir("mnt");
    stage.fsprov(["mount", "./worse.aci", "mnt"]).run().ok();
    stage.fsprov(["unmount", "mnt"]).run().ok();
    assert_eq!(id_of(name)["id"], good);
    // Another of the same labels takes its place, and is remembered.
    let worse = import(&["worse.aci", "--replace"]).ok().json()["id"].clone();
    let now = id_of(name);
    assert_eq!((&now["id"], &now["before"][0]["image"], &now["before"][0]["name"]), (&worse, &good, &json!(name)));
    assert_eq!(id_of(good.as_str().expect("an id"))["names"], json!([]));
    let shown = stage.fsprov(["image", "show", name]).run().ok().out();
    assert!(shown.contains(&format!("before          {name} was {}", good.as_str().expect("an id"))), "{shown}");
    // One of other labels stands beside it, by its version.
    import(&["evil.aci", "--replace"]).ok();
    assert_eq!((&id_of(name)["id"], &id_of(&format!("{name}:1"))["id"]), (&evil, &worse));
    let before = id_of(name)["before"].clone();
    let chain: Vec<_> = before.as_array().expect("a list").iter().map(|one| one["image"].clone()).collect();
    assert_eq!(chain, [worse, good], "the whole history");
});

// What others wrote reaches a terminal escaped, and JSON exact.
case!("what_others_wrote_is_escaped_on_its_way_to_a_terminal", on::once_each, |stage: &Stage| {
    const EVIL: &str = "a\u{1b}]0;pwned\u{7}\u{1b}[2J\u{9b}31m\u{202e}\n9:9";
    let image = crate::common::oci::Image::small("content");
    let mut layer = flate2::read::GzDecoder::new(&image.blobs[&image.layers[0]][..]);
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut layer, &mut tar).expect("gunzip");
    let config = json!({"architecture": "amd64", "os": "linux", "variant": EVIL,
            "rootfs": {"type": "layers", "diff_ids": [crate::common::oci::digest(&tar)]}});
    let docker = json!([{"Config": "c.json", "RepoTags": [EVIL], "Layers": ["l.tar"]}]);
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("manifest.json", docker.to_string().into_bytes()),
        ("c.json", config.to_string().into_bytes()),
        ("l.tar", tar),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &bytes[..]).expect("tar");
    }
    stage.write("docker.tar", archive.into_inner().expect("tar"));
    let mut annotated = manifest("example.com/notes", "1", json!([]));
    annotated["annotations"] = json!([{"name": "note", "value": EVIL}]);
    stage.write("notes.aci", aci(&annotated, "x"));
    let is_clean = |what: &str, text: &[u8]| {
        let text = String::from_utf8_lossy(text);
        let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(bad) && !text.contains("\n9:9"), "{what}: {text:?}");
    };
    let run = |args: &[&str]| {
        let said = stage.fsprov(["--verbose", "--verbose"]).args(args).run();
        is_clean(&args.join(" "), &said.stdout);
        is_clean(&args.join(" "), &said.stderr);
        said
    };
    let id = run(&["image", "import", "--json", "docker.tar"]).ok().json()["id"].as_str().expect("an id").to_owned();
    run(&["image", "import", "notes.aci"]).ok();
    let listed = run(&["image", "list", "--json"]).ok().json();
    let exact = listed.as_array().expect("a list").iter().find(|one| one["id"] == *id).expect("it is there").clone();
    assert_eq!(exact["names"], json!([EVIL]), "JSON says what it is");
    assert!(exact["labels"].to_string().contains(&json!(EVIL).to_string()));
    for verb in
        [&["image", "list"][..], &["image", "show", &id], &["image", "show", "example.com/notes"], &["image", "du"]]
    {
        run(verb).ok();
    }
    stage.mkdir("mnt");
    run(&["mount", &id, "mnt"]).ok();
    run(&["list"]).ok();
    run(&["inspect", "mnt"]).ok();
    run(&["unmount", "mnt"]).ok();
    run(&["image", "import", "--name", EVIL, "notes.aci"]).fails(2, &[]);
    run(&["image", "show", EVIL]).fails(2, &["a\\x1b]0;pwned"]);
    run(&["image", "rm", &id]).ok();
});

/// A store as Mesos leaves it, with a manifest as its own tests write it.
fn mesos_store(stage: &Stage) -> (PathBuf, PathBuf) {
    let id = format!("sha512-{}", "3c".repeat(64));
    let image = stage.mkdir("mesos").join("images").join(id);
    make_small_tree(&image.join("rootfs"));
    let text = json!({"acKind": "ImageManifest", "acVersion": "0.6.1", "name": "foo.com/bar",
        "labels": [{"name": "version", "value": "1.0.0"}, {"name": "arch", "value": "amd64"}, {"name": "os", "value": "linux"}],
        "annotations": [{"name": "created", "value": "1438983392"}]});
    fs::write(image.join("manifest"), text.to_string()).expect("write");
    fs::create_dir(stage.path("mesos/staging")).expect("make dir");
    (stage.path("mesos"), image)
}

case!("a_mesos_store_is_used_in_place", on::every_backend, |stage: &Stage| {
    let (store, image) = mesos_store(stage);
    let before = picture(&store);
    let want = picture(&image.join("rootfs"));
    let config = config(stage, &format!("mesos_stores = [{store:?}]\n"));
    let id = image.file_name().and_then(|name| name.to_str()).expect("an id").to_owned();
    for reference in ["foo.com/bar", "foo.com/bar:1.0.0,os=linux", &id, &id[..20], image.to_str().expect("text")] {
        stage.mount_call(reference, "rootfs", [] as [&str; 0]).env("FSPROV_CONFIG", &config).run().ok();
        assert_same(&want, &picture(&stage.path("rootfs")), reference);
        stage.unmount("rootfs");
    }
    assert_same(&before, &picture(&store), "nothing was written to it");
    let unknown = stage.mount_call("foo.com/baz", "rootfs", [] as [&str; 0]).env("FSPROV_CONFIG", &config).run();
    unknown.fails(3, &["the store has no image of this name or id", "fsprov image pull"]);
    // What has no slash is a name of the store, also where a directory is called so.
    stage.mkdir("here");
    let call = stage.mount_call("here", "rootfs", [] as [&str; 0]).env("FSPROV_CONFIG", &config).cwd(stage.path(""));
    call.run().fails(3, &["the store has no image of this name or id", "write ./here"]);
    let own = stage.fsprov(["image", "list", "--json"]).run().ok().json();
    assert_eq!(own, json!([]), "our own store stays empty");
    // What it would have to put together from several images, or leave out, is refused: not a tree that lacks or shows too much.
    let plain = fs::read_to_string(image.join("manifest")).expect("read");
    for (key, value) in [("dependencies", json!([{"imageName": "foo.com/base"}])), ("pathWhitelist", json!(["/etc"]))] {
        let mut changed: serde_json::Value = serde_json::from_str(&plain).expect("JSON");
        changed[key] = value;
        fs::write(image.join("manifest"), changed.to_string()).expect("write");
        let call = stage.mount_call("foo.com/bar", "rootfs", [] as [&str; 0]).env("FSPROV_CONFIG", &config);
        call.run().fails(5, &[key, "import"]);
        stage.assert_nothing_left(key);
    }
});

case!("the_configuration_says_where_each_value_came_from", on::once_each, |stage: &Stage| {
    let file = config(stage, "[limits]\nentries = 3\n[registry.\"reg.example.com:5000\"]\ninsecure = true\n");
    let shown = stage.fsprov(["config", "show"]).env("FSPROV_CONFIG", &file).run().ok().out();
    let line = |key: &str| shown.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    assert!(line("limits.entries ").ends_with("config.toml") && line("limits.entries ").contains(" 3 "), "{shown}");
    assert!(line("limits.depth").ends_with("default") && line("root ").ends_with("environment"), "{shown}");
    assert!(line("registry.\"reg.example.com:5000\"").contains("insecure"), "{shown}");
    let json = stage.fsprov(["config", "show", "--json"]).env("FSPROV_CONFIG", &file).run().ok().json();
    assert_eq!(json["limits"]["entries"]["value"], json!(3));
    assert_eq!(json["limits"]["entries"]["origin"]["file"], json!(file));
    // A limit holds, for what is imported and for what is mounted from an archive.
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["manifest", "rootfs/a", "rootfs/b", "rootfs/c", "rootfs/d"] {
        let text = if name == "manifest" { manifest("a", "1", json!([])).to_string() } else { String::new() };
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).expect("tar");
    }
    let archive = stage.write("many.aci", tar.into_inner().expect("tar"));
    stage.fsprov(["image", "import"]).arg(&archive).env("FSPROV_CONFIG", &file).run().fails(1, &["entries"]);
    stage.fsprov(["mount", "./many.aci", "mnt"]).env("FSPROV_CONFIG", &file).run().fails(1, &["entries"]);
    // The example is understood as it is, and says what the program says.
    let example = stage.fsprov(["config", "example"]).run().ok().stdout;
    let example = stage.write("example.toml", example);
    let same = |file: &Path| {
        let shown = stage.fsprov(["config", "show", "--json"]).env("FSPROV_CONFIG", file).run().ok().json();
        shown["discovery_prefixes"]["value"].clone()
    };
    assert_eq!(same(&example), json!(["https://"]));
    for (text, said) in [
        ("keyrin = \"/x\"", "keyrin"),
        ("[limits]\nfoo = 1", "limits.foo is unknown"),
        ("[registry.a]\nx = 1", "unknown field"),
    ] {
        let bad = config(stage, text);
        for verb in [&["config", "show"][..], &["image", "list"], &["mount", "/", "mnt"]] {
            stage.fsprov(verb.iter().copied()).env("FSPROV_CONFIG", &bad).run().fails(2, &["config.toml", said]);
        }
    }
});
