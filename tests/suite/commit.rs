//! `fsprov diff` and `fsprov commit`: what a writable rootfs changed, as a list and as an image.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::{XattrFlags, setxattr};

use crate::common::harness::{case, on};
use crate::common::walk::{assert_same, picture};
use crate::common::{Lane, Need, Stage, images};

const NAME: &str = "example.com/small";

fn import(stage: &Stage) {
    let image = stage.small_image();
    stage.fsprov(["image", "import", "--name", NAME]).arg(&image).run().ok();
}

fn change(rootfs: &Path) {
    let at = |name: &str| rootfs.join(name);
    fs::write(at("etc/hosts"), "changed").expect("write");
    fs::remove_file(at("bin/tool")).expect("remove");
    fs::remove_dir_all(at("usr/share")).expect("remove");
    fs::create_dir_all(at("usr/share/new")).expect("make");
    fs::write(at("usr/share/new/file"), "new").expect("write");
    fs::write(at("home/u/more"), "more").expect("write");
    fs::hard_link(at("home/u/more"), at("home/more")).expect("link");
    symlink("/etc/hosts", at("home/link")).expect("link");
    fs::set_permissions(at("data"), fs::Permissions::from_mode(0o700)).expect("chmod");
    // Of a directory, and nothing else of it.
    setxattr(at("var/lib"), "user.note", b"a note", XattrFlags::empty()).expect("set an attribute");
    // Its content stays in the image.
    fs::set_permissions(at("etc/passwd"), fs::Permissions::from_mode(0o600)).expect("chmod");
    // Made for what is mounted there; and read, which changes nothing.
    fs::create_dir(at("run/secrets")).expect("make");
    fs::read(at("etc/passwd")).expect("read");
}

const CHANGES: &str = "D /bin/tool\nC /bin\nC /data\nC /etc\nC /etc/hosts\nC /etc/passwd\nC /home\nA /home/link\nA /home/more\nC /home/u\nA /home/u/more\n\
                       C /usr\nC /usr/share\nD /usr/share/doc\nA /usr/share/new\nA /usr/share/new/file\nC /var\nC /var/lib\n";

fn sorted(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_by_key(|line| line.get(2..));
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn keeps_changes(lane: &Lane) -> bool {
    on::overlay(lane) || on::fuse(lane)
}

case!("changes_are_listed_and_become_an_image", keeps_changes, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), "", "nothing yet");
    change(&rootfs);
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), sorted(CHANGES));
    let told = stage.fsprov(["diff", "--json"]).arg(&rootfs).run().ok().json();
    assert_eq!(told["deleted"], serde_json::json!(["/bin/tool", "/usr/share/doc"]));
    assert_eq!(told["added"].as_array().map(Vec::len), Some(5));
    let want = picture(&rootfs);
    let made = stage.fsprov(["commit", "--json", "-m", "a note", "web", "example.com/next:1"]).run().ok().json();
    assert_eq!((&made["name"], &made["outcome"]), (&"example.com/next:1".into(), &"created".into()), "{made}");
    // The same rootfs again would be another image: its time is another. A name that is held is not taken.
    let refused = stage.fsprov(["commit", "web", "example.com/next:1"]).run();
    refused.fails_saying(&["example.com/next:1", "choose another name, or take this one with --replace"]);
    let again = stage.mount("example.com/next:1", "again", ["--writable", "--id", "again"]);
    assert_same(&want, &picture(&again), "the committed image");
    assert_eq!(stage.fsprov(["diff", "again"]).run().ok().out(), "");
    // One more upon that: OCI's history goes on.
    fs::remove_file(again.join("home/link")).expect("remove");
    fs::write(again.join("etc/passwd"), "x").expect("write");
    let want = picture(&again);
    stage.fsprov(["commit", "again", "example.com/last:1"]).run().ok();
    stage.unmount(&rootfs);
    stage.unmount(&again);
    let shown = stage.fsprov(["image", "show", "--json", "example.com/last:1"]).run().ok().json();
    assert_eq!(shown["layers"].as_array().map(Vec::len), Some(3), "{shown:#}");
    let config = &shown["config"];
    let history = config["history"].as_array().expect("a history");
    assert_eq!(history.len(), 3, "{config:#}");
    assert_eq!(
        (&history[1]["comment"], &history[1]["created_by"]),
        (&"a note".into(), &"fsprov commit web example.com/next:1".into())
    );
    let last = stage.mount("example.com/last:1", "last", [] as [&str; 0]);
    assert_same(&want, &picture(&last), "the last image");
    stage.unmount(&last);
    stage.fsprov(["image", "verify"]).run().ok();
    stage.assert_nothing_left("after all");
});

// Directories made again below a removed one hide what the image has in them. Where one of the image took the place of another (FUSE moves it, mv copies
// it elsewhere) and lost a name that both had, there is a whiteout in an opaque directory: the name is told once.
case!("what_is_gone_below_a_replaced_directory_is_listed_once", keeps_changes, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    let text = "rm -r home && mkdir -p home/u && rm -r var && mv run var && rmdir var/lock";
    stage.tool("sh", ["-c", text]).cwd(&rootfs).run().ok();
    let want = "C /home\nC /home/u\nD /home/u/notes\nD /run\nC /var\nD /var/lib\nD /var/lock\nD /var/run\n";
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), want);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after all");
});

// No image has sockets; what one has replaced is gone from it all the same.
case!("what_a_socket_replaced_is_gone", keeps_changes, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    fs::remove_dir_all(rootfs.join("usr/share")).expect("remove");
    fs::remove_file(rootfs.join("etc/passwd")).expect("remove");
    for name in ["usr/share", "etc/passwd", "home/new"] {
        std::os::unix::net::UnixListener::bind(rootfs.join(name)).expect("bind");
    }
    let want = "C /etc\nD /etc/passwd\nC /home\nC /usr\nD /usr/share\n";
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), want);
    stage.fsprov(["commit", "web", "example.com/next:1"]).run().ok();
    stage.unmount(&rootfs);
    let next = stage.mount("example.com/next:1", "next", [] as [&str; 0]);
    for name in ["usr/share", "etc/passwd", "home/new"] {
        assert!(next.join(name).symlink_metadata().is_err(), "{name} is there");
    }
    stage.unmount(&next);
    stage.assert_nothing_left("after all");
});

/// Commit while a program is idle: it makes the file that its last argument names, and waits for the end of its input.
fn commit_while(stage: &Stage, rootfs: &Path, program: &str, args: &[&str]) {
    let mut program = std::process::Command::new(program);
    program.args(args).arg(stage.path("ready")).current_dir(rootfs);
    let mut program = program.stdin(std::process::Stdio::piped()).spawn().expect("start a program");
    let patience = std::time::Duration::from_secs(20);
    assert!(crate::common::system::eventually(patience, || stage.path("ready").exists()));
    stage.fsprov(["commit", "web", "example.com/next:1"]).run().ok();
    drop(program.stdin.take());
    program.wait().expect("it ends");
}

// What a program that is idle has written through mmap(2) and not synced.
case!("what_was_written_through_memory_is_committed", on::fuse, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    let text = "import mmap, os, sys\nfile = os.open('etc/passwd', os.O_RDWR)\nmemory = mmap.mmap(file, 4)\nmemory[:4] = b'MMAP'\n\
                open(sys.argv[1], 'w').close()\nsys.stdin.read()";
    commit_while(stage, &rootfs, "python3", &["-c", text]);
    stage.unmount(&rootfs);
    let next = stage.mount("example.com/next:1", "next", [] as [&str; 0]);
    assert!(fs::read(next.join("etc/passwd")).expect("read").starts_with(b"MMAP"));
    stage.unmount(&next);
    stage.assert_nothing_left("after all");
});

fn keeps_acls(lane: &Lane) -> bool {
    keeps_changes(lane) && lane.is_real_root()
}

// The group's mode bits are the ACL's mask, as long as there is one.
case!("nobody_gains_access_when_acls_are_left_out", keeps_acls, &[Need::Tool("setfacl")], |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    let text =
        "echo s >secret && chgrp 33 secret && chmod 600 secret && mkfifo -m 600 fifo && setfacl -m u:2:rw secret fifo
        setfacl -m d:u:2:rwx data && setfacl -m u:2:--- etc/hosts && setfacl -m u:2:rwx usr/share";
    stage.tool("sh", ["-c", text]).cwd(&rootfs).run().ok();
    let listed = stage.fsprov(["diff", "web"]).run().ok().out();
    // Of a directory an ACL alone may be changed.
    assert_eq!(listed, "C /data\nC /etc\nC /etc/hosts\nA /fifo\nA /secret\nC /usr\nC /usr/share\n");
    let said = stage.fsprov(["commit", "web", "example.com/next:1"]).run().ok().err();
    assert!(said.contains("those of 4 more") && said.contains("images have no ACLs"), "{said}");
    stage.unmount(&rootfs);
    let next = stage.mount("example.com/next:1", "next", [] as [&str; 0]);
    let mode = |name: &str| fs::metadata(next.join(name)).expect(name).permissions().mode() & 0o7777;
    assert_eq!(
        ["secret", "fifo", "data", "etc/hosts", "usr/share"].map(mode),
        [0o600, 0o600, 0o755, 0o600, 0o755],
        "secret, fifo, data, etc/hosts, usr/share"
    );
    stage.unmount(&next);
    stage.assert_nothing_left("after all");
});

case!(
    "nobody_gains_access_by_the_import_of_a_directory_with_acls",
    keeps_acls,
    &[Need::Tool("setfacl")],
    |stage: &Stage| {
        let text = "mkdir -p tree/data tree/usr && cd tree && echo s >secret && chgrp 33 secret && chmod 600 secret && mkfifo -m 600 fifo
        setfacl -m u:2:rw secret fifo && setfacl -m d:u:2:rwx data && setfacl -m u:2:rwx usr && chmod 644 fifo && ln secret zecret";
        stage.tool("sh", ["-ec", text]).run().ok();
        let said = stage.fsprov(["image", "import", "tree", "--name", "example.com/tree"]).run().ok().err();
        assert!(said.contains("those of 3 more") && said.contains("images have no ACLs"), "{said}");
        let rootfs = stage.mount("example.com/tree", "rootfs", [] as [&str; 0]);
        let mode = |name: &str| fs::metadata(rootfs.join(name)).expect(name).permissions().mode() & 0o7777;
        let names = ["secret", "zecret", "fifo", "data", "usr"];
        assert_eq!(names.map(mode), [0o600, 0o600, 0o604, 0o755, 0o755], "{names:?}");
        stage.unmount(&rootfs);
        stage.assert_nothing_left("after all");
    }
);

// /var/log/lastlog is such a file: as an archive from outside it would be refused.
case!("a_file_that_is_mostly_holes_is_committed", keeps_changes, |stage: &Stage| {
    const SIZE: u64 = 300 << 20;
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    let file = fs::File::create(rootfs.join("var/lastlog")).expect("create");
    file.set_len(SIZE).expect("lengthen");
    file.write_all_at(b"x", SIZE - 10).expect("write");
    drop(file);
    stage.fsprov(["commit", "web", "example.com/next:1"]).run().ok();
    stage.unmount(&rootfs);
    let next = stage.mount("example.com/next:1", "next", [] as [&str; 0]);
    let file = fs::File::open(next.join("var/lastlog")).expect("open");
    let mut end = [1; 10];
    file.read_exact_at(&mut end, SIZE - 10).expect("read");
    assert_eq!((file.metadata().expect("look").len(), &end), (SIZE, b"x\0\0\0\0\0\0\0\0\0"));
    drop(file);
    stage.unmount(&next);
    stage.assert_nothing_left("after all");
});

// With --writeback the kernel gathers what a program writes: it is in no file of the server's yet, and not at once when the kernel is asked to write it.
case!("what_the_kernel_gathered_is_committed", on::fuse, |stage: &Stage| {
    import(stage);
    let call = stage.mount_call(NAME, "rootfs", ["--writable", "--writeback", "--id", "web"]);
    call.env("FAILPOINTS", "serve.write=sleep(1000)").run().ok();
    let rootfs = stage.path("rootfs");
    // By a process that starts no other: each close of a copy of its descriptor would write it out.
    let text = "exec >etc/open; printf gathered; : 3>\"$1\"; read line";
    commit_while(stage, &rootfs, "sh", &["-c", text, "sh"]);
    stage.unmount(&rootfs);
    let next = stage.mount("example.com/next:1", "next", [] as [&str; 0]);
    assert_eq!(fs::read_to_string(next.join("etc/open")).expect("read"), "gathered");
    stage.unmount(&next);
    stage.assert_nothing_left("after all");
});

// At each step that a commit passes it is killed once: the rootfs and its changes are as they were, the store is whole, and there is the image or none.
case!("a_commit_that_dies_at_any_step_can_be_made_again", keeps_changes, &[Need::Failpoints], |stage: &Stage| {
    const NEXT: &str = "example.com/next:1";
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web"]);
    change(&rootfs);
    let want = picture(&rootfs);
    let commit = || stage.fsprov(["commit", "web", NEXT]);
    let remove = || {
        stage.fsprov(["image", "rm", NEXT]).run().ok();
        stage.fsprov(["image", "gc"]).run().ok();
    };
    let mut steps = super::faults::steps_in(&commit().env("FSPROV_LOG", "fsprov::fault=trace").run().ok().err());
    steps.retain(super::faults::Step::is_first);
    assert!(steps.len() > 10, "it passes {} steps", steps.len());
    remove();
    let mut killed = 0;
    for step in &steps {
        let outcome = commit().env("FAILPOINTS", step.with("kill")).run();
        killed += usize::from(outcome.code().is_none());
        assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), sorted(CHANGES), "{step}");
        stage.fsprov(["image", "verify"]).run().ok();
        if stage.fsprov(["image", "show", NEXT]).run().code() != Some(0) {
            commit().run().ok();
        }
        let next = stage.mount(NEXT, "next", [] as [&str; 0]);
        assert_same(&want, &picture(&next), &format!("{step}: the image"));
        stage.unmount(&next);
        remove();
    }
    assert_same(&want, &picture(&rootfs), "the rootfs");
    assert!(killed > 5, "only {killed} of {} died", steps.len());
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after all");
});

// Owners and modes that an ordinary user may not set are noted beside the files: the image has them.
case!("owners_that_are_noted_are_committed", |lane: &Lane| lane.name == "fuse-user", |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web", "--upper", "changes"]);
    let file = rootfs.join("etc/noted");
    fs::write(&file, "x").expect("write");
    fs::create_dir(rootfs.join("etc/closed")).expect("make");
    for (path, mode) in [(&file, 0o4000), (&rootfs.join("etc/closed"), 0o2001)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    // As fuse-overlayfs and podman write them: another owner, a veil and a mark of an opaque directory as files.
    let upper = stage.path("changes/upper");
    let noted = "33:42:0100640";
    rustix::fs::setxattr(
        upper.join("etc/noted"),
        "user.containers.override_stat",
        noted.as_bytes(),
        rustix::fs::XattrFlags::empty(),
    )
    .expect("note");
    fs::write(upper.join("etc/.wh.hosts"), "").expect("veil");
    fs::create_dir_all(upper.join("home/u")).expect("make");
    fs::write(upper.join("home/u/.wh..wh..opq"), "").expect("mark");
    stage.fsprov(["commit", "web", "example.com/next:1"]).run().ok();
    let listed = stage.fsprov(["diff", "web"]).run().ok().out();
    assert_eq!(listed, "C /etc\nA /etc/closed\nD /etc/hosts\nA /etc/noted\nC /home\nC /home/u\nD /home/u/notes\n");
    stage.unmount(&rootfs);
    stage.fsprov(["image", "export", "--format", "tar", "example.com/next:1", "next.tar"]).run().ok();
    let shown = stage.tool("tar", ["--numeric-owner", "-tvf", "next.tar"]).run().ok().out();
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    for want in ["-rw-r----- 33/42 ", &format!("d-----S--x {uid}/{gid} ")] {
        assert!(shown.lines().any(|line| line.starts_with(want)), "{want}: {shown}");
    }
});

case!("what_has_no_changes_of_its_own", on::overlay, |stage: &Stage| {
    import(stage);
    let rootfs = stage.mount(NAME, "rootfs", ["--id", "web"]);
    stage.fsprov(["diff", "web"]).run().fails_saying(&["it is read-only", "--writable"]);
    stage.fsprov(["commit", "web", "example.com/x"]).run().fails_saying(&["it is read-only"]);
    stage.fsprov(["diff", "nobody"]).run().fails(3, &["no such rootfs"]);
    stage.unmount(&rootfs);
    // Of a directory: listed, but no image's.
    let tree = stage.path("image");
    let rootfs = stage.mount(&tree, "rootfs", ["--writable", "--id", "web"]);
    change(&rootfs);
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), sorted(CHANGES));
    stage
        .fsprov(["commit", "web", "example.com/x"])
        .run()
        .fails_saying(&["not of an image in the store", "image import"]);
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after all");
});

fn lanes(lane: &Lane) -> bool {
    lane.name == "root" || lane.name == "user"
}

const NEEDS: &[Need] = &[Need::Minbase, Need::Tool("crun"), Need::Tool("newuidmap"), Need::DevFuse];

// As an ordinary user the changes belong to ids that only a user namespace can read.
case!("a_program_that_runs_is_committed", lanes, NEEDS, |stage: &Stage| {
    let archive = images::minbase_aci().expect("the Debian archive");
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    let text = "$F run --id web --runtime crun example.com/debian-minbase sh -c '
            mkdir -m 700 /secret && echo s >/secret/file && chown -R www-data:tty /secret && rm /etc/shadow && echo h >/etc/hello
            echo ready; while :; do sleep 0.1; done' >out & P=$!
        until grep -qs ready out; do sleep 0.05; done
        $F diff web >diff; echo code $? >>diff; $F commit web example.com/changed >commit 2>&1; echo code $? >>commit
        kill -KILL $P; wait $P; true";
    stage.tool("sh", ["-c", text]).env("F", crate::common::stage::program()).run().ok();
    let read = |name: &str| fs::read_to_string(stage.path(name)).expect("read");
    assert_eq!(read("diff"), "C /etc\nA /etc/hello\nD /etc/shadow\nA /secret\nA /secret/file\ncode 0\n");
    assert!(read("commit").ends_with("code 0\n"), "{}", read("commit"));
    let look = "cat /secret/file /etc/hello && stat -c '%a %U:%G' /secret /secret/file && test ! -e /etc/shadow && ls -l /bin/su";
    let said = stage.fsprov(["run", "--runtime", "crun", "example.com/changed", "sh", "-c", look]).run().ok().out();
    assert!(said.starts_with("s\nh\n700 www-data:tty\n644 www-data:tty\n-rwsr-xr-x"), "{said}");
    let gone = crate::common::system::eventually(std::time::Duration::from_secs(20), || stage.records().is_empty());
    assert!(gone, "{:?}", stage.records());
    stage.assert_nothing_left("after all");
});

// Who owns the sandbox must not have something else read as the changes of a rootfs.
case!("changes_are_read_where_they_were_made", on::overlay, |stage: &Stage| {
    import(stage);
    stage.mkdir("box");
    let rootfs = stage.mount(NAME, "rootfs", ["--writable", "--id", "web", "--sandbox", "box"]);
    change(&rootfs);
    let changes = fs::read_dir(stage.path("box")).expect("list").next().expect("changes").expect("an entry").path();
    let aside = stage.path("box/aside");
    fs::create_dir_all(stage.path("elsewhere/upper")).expect("make");
    fs::write(stage.path("elsewhere/upper/secret"), "").expect("write");
    fs::rename(&changes, &aside).expect("rename");
    symlink(stage.path("elsewhere"), &changes).expect("link");
    stage.fsprov(["diff", "web"]).run().fails_saying(&["a symlink is in it now"]);
    stage.fsprov(["commit", "web", "example.com/next:1"]).run().fails_saying(&["a symlink is in it now"]);
    fs::remove_file(&changes).expect("remove");
    fs::create_dir_all(changes.join("upper")).expect("make");
    stage.fsprov(["diff", "web"]).run().fails_saying(&["another file or directory is there"]);
    fs::remove_dir_all(&changes).expect("remove");
    fs::rename(&aside, &changes).expect("rename");
    assert_eq!(stage.fsprov(["diff", "web"]).run().ok().out(), sorted(CHANGES));
    stage.unmount(&rootfs);
    stage.assert_nothing_left("after all");
});
