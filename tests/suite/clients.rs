//! Real programs on a real root filesystem: Debian minbase, imported and mounted by the one who runs them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::volumes::{sandbox, volume};
use crate::common::harness::{case, on};
use crate::common::run::Outcome;
use crate::common::{Enter, Need, Stage, images, needs};

const NAME: &str = "example.com/debian-minbase";

/// What runs in the rootfs, and what it must say.
const COMMANDS: &[(&str, &str)] = &[
    ("apt-get --version", "apt 2."),
    ("perl -e 'use POSIX; printf qq(%d\\n), 6 * 7'", "42"),
    ("dpkg -l", "ii  dpkg "),
    ("dpkg --verify; echo status $?", "status 0"),
    ("cat /etc/os-release", "VERSION_CODENAME=bookworm"),
    ("find /usr /etc -xdev | wc -l | awk '{ print ($1 > 4000) ? \"many\" : \"few: \" $1 }'", "many"),
    ("md5sum --quiet -c /var/lib/dpkg/info/coreutils.md5sums && echo unharmed", "unharmed"),
    ("ls -ld /tmp | cut -c1-10", "drwxrwxrwt"),
];

/// Import and mount, with a writable /tmp and a file volume; run the commands by `run`; look at the volume from the host.
fn use_debian(stage: &Stage, run: impl Fn(&Path, &str) -> Outcome) {
    let archive = images::minbase_aci().expect("the Debian archive");
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
    let resolv = stage.write("resolv.conf", "nameserver 192.0.2.1\n");
    let mut options = sandbox(stage).to_vec();
    options.extend(volume("tmp", "/tmp", "rw"));
    options.extend(volume(&resolv, "/etc/resolv.conf", "ro"));
    if stage.lane.enter != Enter::Root {
        // No device on an ordinary user's mount works, and `perl -e` opens /dev/null.
        options.extend(volume("/dev/null", "/dev/null", "rw"));
    } else {
        options.push("--suid".into());
    }
    let rootfs = stage.mount(NAME, "rootfs", options);
    for (command, answer) in COMMANDS {
        let said = run(&rootfs, command);
        assert!(said.code() == Some(0) && said.out().contains(answer), "it should say {answer:?}: {}", said.describe());
    }
    // Written inside, seen on the host at once; and the other way round.
    run(&rootfs, "echo from inside >/tmp/inside && cat /etc/resolv.conf").ok();
    assert_eq!(fs::read_to_string(stage.path("sandbox/tmp/inside")).expect("read"), "from inside\n");
    stage.write("sandbox/tmp/outside", "from the host\n");
    assert_eq!(run(&rootfs, "cat /tmp/outside").ok().out(), "from the host\n");
    let copy = stage.lane.backend == "copy";
    for command in ["touch /etc/x", "rm /etc/passwd", "mkdir /var/lib/x"].iter().filter(|_| copy) {
        run(&rootfs, command).ok();
    }
    let refused = ["touch /etc/x", "rm /etc/passwd", "mkdir /var/lib/x", "echo x >/etc/resolv.conf"];
    // The last one is a volume.
    for command in refused.iter().skip(if copy { 3 } else { 0 }) {
        let said = run(&rootfs, command);
        assert!(said.code() != Some(0) && said.err().contains("Read-only file system"), "{}", said.describe());
    }
    stage.unmount(&rootfs);
    assert_eq!(fs::read_to_string(stage.path("sandbox/tmp/inside")).expect("read"), "from inside\n");
    stage.fsprov(["image", "rm", NAME]).run().ok();
}

case!("debian_in_bubblewrap", on::volumes, &[Need::Minbase, Need::Tool("bwrap")], |stage: &Stage| {
    use_debian(stage, |rootfs, command| {
        let bind = rootfs.as_os_str();
        // No --tmpfs /tmp: that is the volume. The rest of the line is facts/clients.md's.
        stage
            .tool("bwrap", ["--unshare-all", "--uid", "0", "--gid", "0", "--bind"])
            .arg(bind)
            .arg("/")
            .arg("--dev")
            .arg("/dev")
            .arg("--proc")
            .arg("/proc")
            .arg("sh")
            .arg("-c")
            .arg(command)
            .run()
    });
});

case!("debian_in_chroot", on::volumes, &[Need::Minbase], |stage: &Stage| {
    use_debian(stage, |rootfs, command| {
        let how: &[&str] = if stage.lane.enter == Enter::User { &["-r", "chroot"] } else { &["-m", "chroot"] };
        stage.tool("unshare", how).arg(rootfs).args(["sh", "-c", command]).run()
    });
});

/// A directory in a writable volume of a rootfs; commands run on it from the host's side of the mount.
fn on_a_volume(stage: &Stage) -> std::path::PathBuf {
    let image = stage.small_image();
    let backing = stage.mkdir("vol");
    stage.mount(&image, "rootfs", volume(&backing, "/data", "rw")).join("data")
}

// Debian's package manager installs a package in a container of an ordinary user: nothing but the volumes can be written.
case!(
    "apt_get_installs_onto_filled_volumes",
    |lane| lane.name == "fuse-user",
    &[Need::Minbase, Need::Tool("bwrap")],
    |stage: &Stage| {
        let archive = images::minbase_aci().expect("the Debian archive");
        stage.fsprov(["image", "import"]).arg(&archive).run().ok();
        let mut options = sandbox(stage).to_vec();
        // Where dpkg puts what a package brings, and what it keeps itself.
        for dir in ["etc", "usr", "var"] {
            options.extend(volume(dir, &format!("/{dir}"), "rw,copy"));
        }
        options.extend(volume("tmp", "/tmp", "rw"));
        let rootfs = stage.mount(NAME, "rootfs", options);
        let inside = |command: &str| {
            let mut call = stage
                .tool("bwrap", ["--unshare-all", "--share-net", "--uid", "0", "--gid", "0", "--bind"])
                .arg(&rootfs)
                .args(["/", "--dev", "/dev", "--proc", "/proc", "--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf"]);
            for proxy in ["http_proxy", "https_proxy"] {
                if let Some(value) = std::env::var_os(proxy) {
                    call = call.env(proxy, value);
                }
            }
            call.args(["sh", "-c", command]).run()
        };
        // One id is mapped in this container, so apt cannot become its user _apt.
        let apt = "apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 -o Acquire::Languages=none";
        inside(&format!("{apt} update && {apt} install -y --no-install-recommends hello")).ok();
        let said = inside("hello && dpkg --verify hello && dpkg --audit && dpkg -s hello | grep ^Status").ok();
        assert_eq!(said.out(), "Hello, world!\nStatus: install ok installed\n");
        // On the host it is a file of this user's; the image is as it was.
        assert!(stage.path("sandbox/usr/bin/hello").is_file());
        inside(&format!("{apt} purge -y hello && ! test -e /usr/bin/hello && dpkg --verify")).ok();
        stage.unmount(&rootfs);
        let bare = stage.mount(NAME, "rootfs", [] as [&str; 0]);
        assert!(!bare.join("usr/bin/hello").exists() && bare.join("usr/bin/dpkg").exists());
    },
);

// Two writers and a reader at once, with a rollback journal and with a write-ahead log, whose index is a shared mapping.
case!("sqlite_on_a_volume_stays_whole", on::fuse, &[Need::Tool("sqlite3")], |stage: &Stage| {
    const ROWS: usize = 100;
    let dir = on_a_volume(stage);
    for mode in ["delete", "wal"] {
        let base = dir.join(format!("{mode}.db"));
        let sql = |text: &str| stage.tool("sqlite3", ["-batch", "-bail"]).arg(&base).arg(text).run().ok().out();
        let made = sql(&format!("pragma journal_mode={mode}; create table t(who, n, filler);"));
        assert_eq!(made.trim(), mode);
        let inserts = |who: &str| -> String {
            let each = |n| format!("insert into t values('{who}', {n}, hex(randomblob(400)));\n");
            format!(".timeout 60000\n{}", (0..ROWS).map(each).collect::<String>())
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = ["one", "two"]
                .map(|who| (stage.write(format!("{mode}-{who}.sql"), inserts(who)), base.clone()))
                .into_iter()
                .map(|(script, base)| {
                    scope.spawn(move || {
                        let mut command = std::process::Command::new("sqlite3");
                        command.args(["-batch", "-bail"]).arg(base).arg(format!(".read {}", script.display()));
                        command.output().expect("run sqlite3")
                    })
                })
                .collect();
            for writer in writers {
                let output = writer.join().expect("writer");
                assert!(output.status.success(), "{mode}: {output:?}");
            }
        });
        let counted =
            sql("select who, count(*), count(distinct n) from t group by who order by who; pragma integrity_check;");
        assert_eq!(counted, format!("one|{ROWS}|{ROWS}\ntwo|{ROWS}|{ROWS}\nok\n"), "{mode}");
    }
    // The host opens the same database.
    let host = stage.path("vol/wal.db");
    let check = stage.tool("sqlite3", ["-batch"]).arg(host).arg("pragma integrity_check; select count(*) from t;");
    assert_eq!(check.run().ok().out(), format!("ok\n{}\n", 2 * ROWS));
});

// Clone, check, change, merge, pack, check again.
case!("git_on_a_volume_stays_whole", on::fuse, &[Need::Tool("git")], |stage: &Stage| {
    let dir = on_a_volume(stage);
    let script = r#"
            set -e
            export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.com GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.com
            git init -q -b main origin; cd origin
            for d in a b c; do mkdir -p $d/$d; for f in 1 2 3 4 5 6 7 8; do seq $f 300 >$d/$d/$f; done; done
            ln -s a/a/1 link; chmod +x a/a/2; git add -A; git commit -qm first
            git checkout -qb side; echo side >>a/a/1; git commit -qam side; git checkout -q main
            cd "$1"; git clone -q --no-local "$OLDPWD" clone; cd clone
            test -z "$(git status --porcelain)"; git fsck --full --strict
            echo change >>b/b/1; git mv c/c moved; rm a/a/3
            test "$(git status --porcelain | wc -l)" -ge 10
            git add -A; git commit -qm second; git merge -q -m merge origin/side; test -z "$(git status --porcelain)"
            git checkout -q HEAD~1; git checkout -q main; git stash list; git gc -q --prune=now; git fsck --full --strict
            git worktree add -q ../tree side 2>/dev/null || git worktree add -q -b side ../tree origin/side
            test -z "$(git -C ../tree status --porcelain)"; tail -1 ../tree/a/a/1
        "#;
    let said = stage.tool("sh", ["-c", script, "sh"]).arg(&dir).run().ok();
    assert_eq!(said.out(), "side\n");
    // Seen from the host it is the same repository.
    let status = stage.tool("git", ["-C"]).arg(stage.path("vol/clone")).args(["fsck", "--full"]).run();
    status.ok();
},);

// A build script that runs, a library, a program that runs as soon as it is linked, a change and what follows from it.
case!("cargo_builds_on_a_volume", on::fuse, &[Need::Tool("cc")], |stage: &Stage| {
    let dir = on_a_volume(stage);
    let package = dir.join("hello");
    let write = |name: &str, text: &str| {
        let path = package.join(name);
        fs::create_dir_all(path.parent().expect("it has one")).expect("mkdir");
        fs::write(path, text).expect("write");
    };
    write(
        "Cargo.toml",
        "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\nword = { path = \"word\" }\n[workspace]\n",
    );
    write("build.rs", "fn main() { println!(\"cargo:rustc-env=BUILT=built\"); }");
    write("src/main.rs", "fn main() { println!(\"{} {}\", word::WORD, env!(\"BUILT\")); }\n#[test]\nfn it() {}");
    write("word/Cargo.toml", "[package]\nname = \"word\"\nversion = \"0.1.0\"\nedition = \"2021\"\n");
    write("word/src/lib.rs", "pub const WORD: &str = \"one\";");
    let bin = images::toolchain().join("bin");
    let cargo = |args: &[&str]| {
        let call = stage.tool(&bin.join("cargo").to_string_lossy(), args.iter().copied()).cwd(&package);
        let call = call.env("RUSTC", bin.join("rustc")).env("CARGO_HOME", stage.path("home/cargo"));
        call.env("CARGO_BUILD_JOBS", "2").run()
    };
    assert_eq!(cargo(&["run", "--offline", "--quiet"]).ok().out(), "one built\n");
    assert!(!cargo(&["build", "--offline"]).ok().err().contains("Compiling"), "nothing changed, nothing to build");
    write("word/src/lib.rs", "pub const WORD: &str = \"two, and longer\";");
    assert_eq!(cargo(&["run", "--offline", "--quiet"]).ok().out(), "two, and longer built\n");
    cargo(&["clean", "--offline"]).ok();
    assert!(!package.join("target/debug").exists());
},);

// Root's mount can be idmapped by others, as systemd-nspawn --private-users-ownership=map and podman's `:idmap` do, where no volume needs
// to know who asks.
case!(
    "roots_mount_can_be_idmapped",
    |lane| on::fuse(lane) && lane.enter == Enter::Root,
    &[Need::MountCalls],
    |stage: &Stage| {
        let image = stage.small_image();
        fs::write(image.join("etc/secret"), "of root").expect("write");
        images::chmod(&image.join("etc/secret"), 0o600);
        let rootfs = stage.mount(&image, "rootfs", [""; 0]);
        let map = |from: &Path| {
            let args = ["mount", "--backend", "bind", "--uid-map", "0:100000:1000", "--gid-map", "0:200000:1000"];
            stage.fsprov(args).arg(from).arg("mapped").run()
        };
        if needs::kernel() < (6, 12) {
            map(&rootfs).fails(5, &["does not take id maps"]);
            return;
        }
        map(&rootfs).ok();
        let mapped = stage.path("mapped");
        let owner = fs::metadata(mapped.join("etc/hosts")).map(|m| (m.uid(), m.gid())).expect("stat");
        assert_eq!(owner, (100_000, 200_000));
        let read = |uid: &str| {
            let ids = ["--reuid", uid, "--regid", uid, "--clear-groups", "cat"];
            stage.tool("setpriv", ids).arg(mapped.join("etc/secret")).run()
        };
        assert_eq!(read("100000").ok().out(), "of root");
        read("1").fails(1, &["Permission denied"]);
        // Not mapped, it is as it was.
        assert_eq!(fs::metadata(rootfs.join("etc/hosts")).map(|m| m.uid()).expect("stat"), 0);
        stage.unmount(&mapped);
        stage.unmount(&rootfs);
        let with_volume = stage.mount(&image, "with-volume", volume(stage.mkdir("v"), "/data", "rw"));
        map(&with_volume).fails(5, &["does not take id maps"]);
        stage.unmount(&with_volume);
    },
);
