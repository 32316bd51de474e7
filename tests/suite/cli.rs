//! The command line is a contract: its words, exit codes, and the shape of its JSON.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::{Enter, Lane, Need, Stage, system};

const VERBS: &[&[&str]] = &[
    &["mount"],
    &["unmount"],
    &["umount"],
    &["list"],
    &["inspect"],
    &["probe"],
    &["recover"],
    &["image", "import"],
    &["image", "list"],
    &["image", "show"],
    &["image", "rm"],
    &["image", "index"],
    &["image", "verify"],
    &["image", "gc"],
    &["image", "du"],
    &["image", "flatten"],
    &["completions"],
    &["man"],
];

case!("help_has_an_example_for_every_verb", on::user, |stage: &Stage| {
    for verb in VERBS {
        for flag in ["--help", "-h"] {
            let said = stage.fsprov(verb.iter().copied().chain([flag])).run().ok();
            assert!(said.out().contains("Usage: fsprov"), "{}", said.describe());
            assert!(said.out().contains("Example"), "{}", said.describe());
            assert!(said.err().is_empty(), "{}", said.describe());
        }
        // Options that every verb takes are told by every verb.
        assert!(stage.fsprov(verb.iter().copied().chain(["--help"])).run().out().contains("--root"), "{verb:?}");
    }
    for verb in VERBS.iter().filter(|v| !["unmount", "umount", "rm", "completions", "man"].contains(&v[v.len() - 1])) {
        let said = stage.fsprov(verb.iter().copied().chain(["--help"])).run();
        assert!(said.out().contains("--json"), "every verb that prints has --json: {}", said.describe());
    }
    let mount = stage.fsprov(["mount", "--help"]).run().out();
    for word in [
        "--backend",
        "auto",
        "bind",
        "fuse",
        "--sandbox",
        "SRC:DST",
        "ro",
        "rw",
        "--id",
        "--foreground",
        "IMAGE",
        "ROOTFS",
    ] {
        assert!(mount.contains(word), "mount --help does not say {word}:\n{mount}");
    }
    let said = stage.fsprov(["--help"]).run().ok().out();
    for word in ["mount", "unmount", "list", "inspect", "probe", "image", "completions", "man", "Exit codes"] {
        assert!(said.contains(word), "--help does not say {word}:\n{said}");
    }
    let said = stage.fsprov(["--version"]).run().ok().out();
    assert_eq!(said.trim(), concat!("fsprov ", env!("CARGO_PKG_VERSION")));
});

case!("wrong_usage_is_exit_code_2", on::user, |stage: &Stage| {
    let table: &[(&[&str], &str)] = &[
        (&["mout"], "mount"),
        (&["mount"], "<IMAGE>"),
        (&["mount", "./x"], "<ROOTFS>"),
        (&["mount", "--backend", "zfs", "./x", "r"], "bind"),
        (&["mount", "--no-such-option", "./x", "r"], "--no-such-option"),
        (&["mount", "--id", "a/b", "./x", "r"], "a/b"),
        (&["mount", "--id", "..", "./x", "r"], ".."),
        (&["mount", "--id", "", "./x", "r"], "id"),
        (&["mount", "-v", "nonsense", "./x", "r"], "SRC:DST"),
        (&["mount", "", "r"], "image name"),
        (&["mount", "a\nb", "r"], "image"),
        (&["unmount"], "ROOTFS"),
        (&["unmount", "--all", "x"], "--all"),
        (&["inspect"], "ROOTFS"),
        (&["list", "extra"], "extra"),
        (&["completions"], "SHELL"),
        (&["completions", "csh"], "bash"),
        (&["man", "no-such-verb"], "no-such-verb"),
        (&["image"], "import"),
        (&["image", "import"], "PATH"),
        (&["--root", "", "list"], "--root"),
    ];
    for (args, text) in table {
        let said = stage.fsprov(args.iter().copied()).run().fails(2, &[text]);
        assert!(said.out().is_empty(), "errors go to stderr: {}", said.describe());
    }
});

case!("completions_and_manual_pages", on::user, |stage: &Stage| {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = stage.fsprov(["completions", shell]).run().ok();
        // tests/completions.rs types to those that ask.
        let words: &[_] =
            if ["elvish", "powershell"].contains(&shell) { &["mount", "unmount", "sandbox"] } else { &["complete"] };
        for word in words {
            assert!(said.out().contains(word), "{shell} completions do not know {word}");
        }
    }
    let page = stage.fsprov(["man"]).run().ok().out();
    assert!(page.contains(".TH fsprov") && page.contains(".SH NAME"), "{page}");
    for verb in VERBS.iter().filter(|v| v[0] != "umount") {
        let page = stage.fsprov(["man"].iter().chain(*verb).copied()).run().ok().out();
        assert!(page.contains(".SH"), "{verb:?}: {page}");
    }
});

case!("a_closed_pipe_is_a_quiet_exit", on::user, &[Need::Tool("bash"), Need::Tool("head")], |stage: &Stage| {
    let fsprov = super::shell_quote(&crate::common::stage::program());
    for args in ["completions bash", "man", "probe --json", "--help", "image import --help"] {
        // The reader is gone before the first byte: `sleep` gives it the time.
        let line = format!("(sleep 0.2; {fsprov} {args}; echo code=$? >&2) | true");
        let said = stage.tool("bash", ["-c", &line]).run();
        assert!(said.err().trim() == "code=0", "{args}: {}", said.describe());
    }
    // No stdout at all, and one that is full: no panic; a result that could not be written is a failure.
    let said = stage.tool("bash", ["-c", &format!("{fsprov} man >/dev/full")]).run();
    said.fails(1, &["stdout", "No space left on device"]);
    for closed in [">&-", "2>&-", "<&-", ">&- 2>&- <&-"] {
        let said = stage.tool("bash", ["-c", &format!("{fsprov} list {closed}")]).run();
        assert!(said.code().is_some_and(|c| c <= 1), "{closed}: {}", said.describe());
        assert!(!said.err().contains("panicked"), "{closed}: {}", said.describe());
    }
},);

case!("bad_images", on::once_each, |stage: &Stage| {
    stage.write("text", "not an archive");
    stage.write("empty", "");
    stage.mkdir("store-like");
    stage.write("store-like/manifest", "not JSON");
    stage.mkdir("store-like/rootfs");
    let table: &[(&str, i32, &str)] = &[
        ("/nonexistent/image", 3, "/nonexistent/image"),
        ("./nowhere", 3, "nowhere"),
        ("no-such-image", 3, "no-such-image"),
        ("example.com/debian:12", 3, "example.com/debian:12"),
        ("./text", 1, "text"),
        ("./empty", 1, "empty"),
    ];
    for (image, code, text) in table {
        let said = stage.fsprov(["mount", image, "rootfs"]).run();
        said.fails(*code, &[text]);
        stage.assert_nothing_left(image);
        assert!(!stage.path("rootfs").exists(), "{image}: a refused mount made its mount point");
    }
    let id = format!("sha512-{}", "0".repeat(128));
    stage.fsprov(["mount", &id, "rootfs"]).run().fails(3, &["sha512-000000000000"]);
    stage.fsprov(["inspect", "nothing"]).run().fails(3, &["nothing", "fsprov list"]);
});

case!("the_state_root_is_where_it_is_told", on::user, |stage: &Stage| {
    let image = stage.small_image();
    let mount =
        |name: &str| ["mount".into(), "--backend".into(), "fuse".into(), image.clone().into_os_string(), name.into()];
    // The option before and after the verb, relative to the working directory; it wins over the variable.
    for (i, args) in [
        [&["--root".into(), "other".into()][..], &mount("r0")[..]].concat(),
        [&mount("r1")[..], &["--root".into(), "other".into()][..]].concat(),
    ]
    .into_iter()
    .enumerate()
    {
        stage.fsprov(args).run().ok();
        assert!(!stage.state().join("containers").exists(), "FSPROV_ROOT was used in spite of --root");
        let listed = stage.fsprov(["--root", "other", "list", "--json"]).run().ok().json();
        assert_eq!(listed.as_array().map(Vec::len), Some(1));
        assert_eq!(stage.fsprov(["list", "--json"]).run().ok().json(), Value::Array(Vec::new()));
        let rootfs = format!("./r{i}");
        stage.fsprov(["unmount", &rootfs]).run().fails(3, &["--root"]);
        stage.fsprov(["--root", "other", "unmount", &rootfs]).run().ok();
    }
    // By the environment: XDG_DATA_HOME, else ~/.local/share.
    for (name, value, place) in [("XDG_DATA_HOME", "xdg", "xdg/fsprov"), ("HOME", "home2", "home2/.local/share/fsprov")]
    {
        let dir = stage.mkdir(value);
        let call = |args: Vec<&OsStr>| {
            let mut call = stage.fsprov(args);
            call.command.env_remove("FSPROV_ROOT").env_remove("XDG_DATA_HOME");
            call.env(name, &dir)
        };
        call(vec!["mount".as_ref(), "--backend".as_ref(), "fuse".as_ref(), image.as_os_str(), "r".as_ref()]).run().ok();
        assert!(stage.path(place).join("containers").is_dir(), "{name}");
        call(vec!["unmount".as_ref(), "./r".as_ref()]).run().ok();
    }
    // One that cannot be made.
    let closed = stage.mkdir("closed");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).expect("chmod");
    let said = stage.fsprov(["--root", "closed/state"]).arg("mount").arg(&image).arg("rootfs").run();
    said.fails_saying(&["closed/state", "--root"]);
    assert!(!stage.path("rootfs").exists());
});

/// Everything that a JSON value says about its shape: a line for each leaf, with its path and type.
fn shape(value: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, lines: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, &format!("{path}.{key}"), lines);
                }
            }
            Value::Array(all) => {
                if all.is_empty() {
                    lines.push(format!("{path}[]"));
                }
                for value in all {
                    walk(value, &format!("{path}[]"), lines);
                }
            }
            Value::Null => lines.push(format!("{path} null")),
            Value::Bool(_) => lines.push(format!("{path} bool")),
            Value::Number(_) => lines.push(format!("{path} number")),
            Value::String(_) => lines.push(format!("{path} string")),
        }
    }
    let mut lines = Vec::new();
    walk(value, "", &mut lines);
    lines.sort();
    lines.dedup();
    lines
}

#[track_caller]
pub(crate) fn assert_shape(value: &Value, want: &str, what: &str) {
    let got = shape(value);
    let mut want: Vec<&str> = want.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    want.sort_unstable();
    assert_eq!(
        got, want,
        "{what}: programs read this; if the change is meant, it belongs into CHANGELOG.md. It is:\n{value:#}"
    );
}

const ROOTFS: &str = "
    .backend string
    .created string
    .id string
    .image.id null
    .image.name null
    .image.reference string
    .layers[].root string
    .mount_id number
    .mount_namespace number
    .nodev bool
    .nosuid bool
    .rootfs string
    .state string
    .volumes[].access string
    .volumes[].form string
    .volumes[].powers.exec bool
    .volumes[].powers.suid bool
    .volumes[].source string
    .volumes[].target string
";

const SERVER: &str = "
    .supervisor_pid number
    .worker_pid number
";

case!("json_keeps_its_shape", on::read_only, |stage: &Stage| {
    let image = stage.small_image();
    let mut args = vec!["--json".into()];
    args.extend(sandbox(stage));
    args.extend(volume("tmp", "/tmp", "rw"));
    let mounted = stage.mount_call(&image, "rootfs", args).run().ok().json();
    let want = if stage.lane.is_fuse() { format!("{ROOTFS}{SERVER}") } else { ROOTFS.to_owned() };
    assert_shape(&mounted, &want, "mount --json");
    let listed = stage.fsprov(["list", "--json"]).run().ok().json();
    assert_shape(&listed[0], &want, "list --json");
    let inspected = stage.fsprov(["inspect", "--json", "./rootfs"]).run().ok().json();
    assert_shape(&inspected, &want, "inspect --json");
    // And its values.
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    assert_eq!(inspected, listed[0]);
    assert_eq!(inspected, mounted);
    for (pointer, value) in [
        ("/backend", stage.lane.backend.to_owned()),
        ("/state", "ready".into()),
        ("/rootfs", stage.path("rootfs").display().to_string()),
        ("/layers/0/root", image.display().to_string()),
        ("/volumes/0/source", stage.path("sandbox/tmp").display().to_string()),
        ("/volumes/0/target", "/tmp".into()),
        ("/volumes/0/access", "rw".into()),
        ("/volumes/0/form", "directory".into()),
        ("/image/reference", image.display().to_string()),
    ] {
        assert_eq!(inspected.pointer(pointer).and_then(Value::as_str), Some(&*value), "{pointer}");
    }
    if stage.lane.is_fuse() {
        let pids: Vec<i64> = stage.servers().iter().map(|p| p.pid.into()).collect();
        let worker = inspected.pointer("/worker_pid").and_then(Value::as_i64).expect("a pid");
        assert!(pids.contains(&worker), "worker {worker} is one of {pids:?}");
    }
    let mount = system::mounts().into_iter().rfind(|m| m.point == stage.path("rootfs")).expect("mounted");
    assert_eq!(inspected.pointer("/mount_id").and_then(Value::as_u64), Some(mount.id));
    // For people, the same things.
    let table = stage.fsprov(["list"]).run().ok().out();
    let text = stage.fsprov(["inspect", "./rootfs"]).run().ok().out();
    for word in ["ready", stage.lane.backend, "rootfs"] {
        assert!(table.contains(word) && text.contains(word), "{word}:\n{table}\n{text}");
    }
    let id = inspected.pointer("/id").and_then(Value::as_str).expect("an id").to_owned();
    stage.fsprov(["unmount", &id]).run().ok();
    assert_eq!(stage.fsprov(["list", "--json"]).run().ok().json(), Value::Array(Vec::new()));
    assert_eq!(stage.fsprov(["list"]).run().ok().out(), "");
});

case!("probe_says_yes_or_why_not", |_: &Lane| true, |stage: &Stage| {
    let said = stage.fsprov(["probe", "--json"]).run().ok().json();
    let backends = said["backends"].as_array().expect("an array of backends");
    let find = |name: &str| {
        backends.iter().find(|b| b["backend"] == name).unwrap_or_else(|| panic!("{name} is missing: {said:#}"))
    };
    for backend in backends {
        let works = backend["works"].as_bool().expect("works is yes or no");
        let reason = backend["reason"].as_str().unwrap_or_default();
        assert_eq!(works, reason.is_empty(), "a reason exactly where it does not work: {backend:#}");
    }
    // What this lane is for must be what the probe finds.
    if !stage.lane.backend.is_empty() {
        assert_eq!(find(stage.lane.backend)["works"], true, "{said:#}");
    }
    match stage.lane.enter {
        Enter::Root | Enter::Userns => assert_eq!(said["auto"], "bind"),
        Enter::User => {
            let bind = find("bind");
            assert_eq!(bind["works"], false);
            assert!(bind["remedy"].as_str().is_some_and(|r| r.contains("unshare")), "{bind:#}");
        }
    }
    let text = stage.fsprov(["probe"]).run().ok().out();
    for backend in backends {
        let name = backend["backend"].as_str().expect("a name");
        assert!(text.lines().any(|l| l.starts_with(name)), "{name}: {text}");
    }
},);

// What this host or this user cannot do: exit code 5, with the reason and the remedy.
case!(
    "what_is_not_possible_here_is_exit_code_5",
    on::user,
    &[Need::DevFuse, Need::Tool("fusermount3"), Need::UserNamespaces],
    |stage: &Stage| {
        let image = stage.small_image();
        let mount = |backend: &str| {
            stage.fsprov([
                "mount".as_ref(),
                "--backend".as_ref(),
                backend.as_ref(),
                image.as_os_str(),
                "rootfs".as_ref(),
            ])
        };
        mount("bind").run().fails(5, &["bind", "unshare"]);
        stage.assert_nothing_left("after bind without privilege");
        // A process that can gain no privilege gets none from fusermount3 either.
        let fsprov = crate::common::stage::program();
        let bare = |args: &[&OsStr]| stage.tool("setpriv", ["--no-new-privs"]).arg(&fsprov).args(args).run();
        let mount_bare = |backend: &str| {
            bare(&["mount".as_ref(), "--backend".as_ref(), backend.as_ref(), image.as_os_str(), "rootfs".as_ref()])
        };
        mount_bare("fuse").fails(5, &["fusermount3", "no_new_privs"]);
        stage.assert_nothing_left("after fuse without privilege to gain");
        let said = mount_bare("auto").fails(5, &["bind", "fuse", "overlay", "fusermount3"]);
        assert!(said.err().lines().count() >= 4, "every backend has its line: {}", said.describe());
        stage.assert_nothing_left("after auto without privilege to gain");
        let probe = bare(&["probe".as_ref(), "--json".as_ref()]).ok().json();
        assert_eq!(probe["auto"], Value::Null, "{probe:#}");
        // /dev/fuse closed: a file of the first namespace's root, 0600 or 0640, stands in its place.
        let masked = format!(
            "mount --bind /etc/shadow /dev/fuse && exec {} \"$@\"",
            super::shell_quote(&crate::common::stage::program())
        );
        let args = ["--user", "--map-root-user", "--mount", "sh", "-c", &masked, "sh", "mount", "--backend", "fuse"];
        stage.tool("unshare", args).arg(&image).arg("rootfs").run().fails(5, &["/dev/fuse", "Permission denied"]);
        stage.assert_nothing_left("after fuse without /dev/fuse");
        assert!(!stage.path("rootfs").exists());
    },
);

// A machine without the package fuse3, as its ordinary user finds it. Root masks the program in the case's own namespace.
case!(
    "without_fusermount3_the_remedy_names_its_package",
    |lane: &Lane| lane.backend.is_empty() && lane.enter == Enter::Root,
    &[Need::DevFuse, Need::Tool("fusermount3"), Need::TestUser],
    |stage: &Stage| {
        let image = stage.small_image();
        for dir in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .chain(["/usr/bin".into(), "/bin".into()])
        {
            for name in ["fusermount3", "fusermount"] {
                // What is no program any more: an empty file that nobody may run.
                if let Ok(real) = dir.join(name).canonicalize() {
                    stage.tool("mount", ["--bind"]).arg(stage.write("nothing", "")).arg(real).run().ok();
                }
            }
        }
        let user = crate::common::needs::test_user().expect("needed above");
        let fsprov = stage.path("fsprov");
        fs::copy(crate::common::stage::program(), &fsprov).expect("copy the program");
        stage.tool("chown", ["-R", &user.name]).arg(stage.mkdir("theirs")).run().ok();
        for (backend, words) in [("fuse", &["fusermount3", "fuse3"][..]), ("auto", &["bind", "overlay", "fusermount3"])]
        {
            stage
                .tool("setpriv", ["--reuid", &user.uid, "--regid", &user.gid, "--init-groups"])
                .arg(&fsprov)
                .args(["mount", "--root", "theirs/state", "--backend", backend])
                .arg(&image)
                .arg("theirs/rootfs")
                .run()
                .fails(5, words);
            assert!(!stage.path("theirs/rootfs").exists());
        }
    },
);

// Where a switch of this host keeps user namespaces from its users, the advice is not to make one but to set the switch.
case!("a_refusal_names_the_switch", on::user, &[Need::UserNamespaces], |stage: &Stage| {
    let image = stage.small_image();
    // The limit is each user namespace's own. This one does not own its mount namespace.
    let off = |args: &[&str]| {
        let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$@\"";
        let call = stage.tool("unshare", ["-Ur", "sh", "-c", script, "sh"]).arg(crate::common::stage::program());
        call.args(args.iter().copied())
    };
    let switch = "sysctl -w user.max_user_namespaces=";
    for backend in ["bind", "overlay"] {
        off(&["mount", "--backend", backend]).arg(&image).arg("rootfs").run().fails(5, &[switch, "--backend fuse"]);
    }
    let probe = off(&["probe", "--json"]).run().ok().json();
    let remedy = probe["host"]["user_namespaces"]["no"]["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains(switch), "{probe:#}");
    stage.assert_nothing_left("after refusals");
});

// Whichever process or thread is the one too many for this user: said at once, and nothing is left. (A worker that lacked a thread was
// waited for, 40 s, and was said to be slow.)
case!("a_limit_of_processes_is_named", on::user, &[Need::UserNamespaces, Need::Tool("prlimit")], |stage: &Stage| {
    let image = stage.small_image();
    // Since Linux 5.14 each user namespace counts for itself.
    let script = "prlimit --nproc=$0 \"$@\" && \"$1\" unmount k";
    let mount = |limit: u32| {
        let call = stage.tool("unshare", ["-Urm", "sh", "-c", script]).arg(limit.to_string());
        let call = call.arg(crate::common::stage::program()).args(["mount", "--backend", "fuse", "--id", "k"]);
        call.arg(&image).arg("rootfs").run()
    };
    let fails = (1..200).map(mount).take_while(|said| {
        let failed = said.code() != Some(0);
        let is_named = said.err().contains("ulimit -u") && said.took < std::time::Duration::from_secs(20);
        assert!(!failed || is_named, "{}", said.describe());
        failed
    });
    assert!(fails.count() >= 5);
    stage.assert_nothing_left("after mounts that had too few processes");
});

// `auto` takes the cheapest that can serve this request, and tells with --verbose why not another.
case!("auto_picks_the_first_that_can", |_: &Lane| true, |stage: &Stage| {
    let image = stage.small_image();
    let rootfs = stage.path("rootfs");
    let mut args: Vec<std::ffi::OsString> = vec!["--verbose".into(), "mount".into(), "--json".into()];
    args.extend([image.clone().into_os_string(), rootfs.clone().into_os_string()]);
    let said = stage.fsprov(args).run().ok();
    let backend = said.json()["backend"].clone();
    if stage.lane.enter == Enter::User {
        assert_eq!(backend, "fuse");
        assert!(said.err().contains("bind"), "why not bind: {}", said.describe());
    } else {
        assert_eq!(backend, "bind");
    }
    stage.unmount(&rootfs);
    // A mount point that the image lacks: not bind, which cannot make it.
    let [v, text] = volume(stage.mkdir("vol"), "/opt/new", "rw");
    let args =
        [OsStr::new("mount"), "--json".as_ref(), v.as_ref(), text.as_ref(), image.as_os_str(), rootfs.as_os_str()];
    let said = stage.fsprov(args).run().ok();
    assert_ne!(said.json()["backend"], "bind");
    fs::write(rootfs.join("opt/new/x"), "x").expect("write to the volume");
    assert!(stage.path("vol/x").exists());
    stage.unmount(&rootfs);
},);
