//! Real programs on a real root filesystem: Debian minbase, imported and mounted by the one who runs them.

use std::fs;
use std::path::Path;

use super::volumes::{sandbox, volume};
use crate::common::harness::on;
use crate::common::run::Outcome;
use crate::common::{Case, Enter, Need, Stage, images};

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
    for command in ["touch /etc/x", "rm /etc/passwd", "echo x >/etc/resolv.conf", "mkdir /var/lib/x"] {
        let said = run(&rootfs, command);
        assert!(said.code() != Some(0) && said.err().contains("Read-only file system"), "{}", said.describe());
    }
    stage.unmount(&rootfs);
    assert_eq!(fs::read_to_string(stage.path("sandbox/tmp/inside")).expect("read"), "from inside\n");
    stage.fsprov(["image", "rm", NAME]).run().ok();
}

pub(crate) const BWRAP: Case =
    Case::needing("debian_in_bubblewrap", on::every_backend, &[Need::Minbase, Need::Tool("bwrap")], |stage: &Stage| {
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

pub(crate) const CHROOT: Case =
    Case::needing("debian_in_chroot", on::every_backend, &[Need::Minbase], |stage: &Stage| {
        use_debian(stage, |rootfs, command| {
            let how: &[&str] = if stage.lane.enter == Enter::User { &["-r", "chroot"] } else { &["-m", "chroot"] };
            stage.tool("unshare", how).arg(rootfs).args(["sh", "-c", command]).run()
        });
    });
