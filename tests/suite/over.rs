//! An overlay over a FUSE mount of the image, as `auto` makes it in a user namespace of several ids.

use crate::common::harness::case;
use crate::common::{Lane, Need, Stage, images, stage};

const NEEDS: &[Need] = &[Need::Minbase, Need::Tool("newuidmap"), Need::DevFuse, Need::UserNamespaces];
const NAME: &str = "example.com/debian-minbase";

/// A script of sh with `$F` for the program under test, in namespaces with all subordinate ids of this user, or with one id.
fn inside(stage: &Stage, ids: &str, text: &str) -> String {
    let args = ["--user", "--map-root-user", "--mount", ids, "sh", "-ec", text];
    let args = args.iter().filter(|arg| !arg.is_empty());
    stage.tool("unshare", args).env("F", stage::program()).run().ok().out().to_owned()
}

case!("auto_keeps_owners_and_changes_by_the_kernel", |lane: &Lane| lane.name == "user", NEEDS, |stage: &Stage| {
    stage.fsprov(["image", "import"]).arg(images::minbase_aci().expect("the Debian archive")).run().ok();
    let text = format!(
        r#"$F mount --id web --writable -v vol:/srv:rw --sandbox . {NAME} rootfs
        $F list | awk 'NR > 1 {{ print $1, $2, $3 }}'
        stat -c '%a %u:%g' rootfs/etc/shadow rootfs/usr/bin/su
        findmnt -no FSTYPE rootfs
        echo more >> rootfs/etc/passwd
        chown 33:4 rootfs/etc/passwd
        rm rootfs/etc/shadow
        touch rootfs/srv/written
        $F diff web
        $F commit web example.com/next:1 >/dev/null
        (cd rootfs && ! $F unmount "$OLDPWD/rootfs" 2>/dev/null) && $F unmount rootfs
        findmnt -rno TARGET | grep "$PWD" || true
        $F mount --writable --id next example.com/next:1 rootfs >/dev/null
        stat -c '%u:%g' rootfs/etc/passwd
        tail -n 1 rootfs/etc/passwd
        $F unmount next"#
    );
    let want = format!(
        "mounted {NAME} at {at} (id web.rootfs, backend overlay)\nweb ready fuse\nweb.rootfs ready overlay\n640 0:42\n4755 0:0\noverlay\n\
         C /etc\nC /etc/passwd\nD /etc/shadow\nunmounted {at} (id web)\n33:4\nmore\nunmounted {at} (id next)\n",
        at = stage.path("rootfs").display()
    );
    assert_eq!(inside(stage, "--map-auto", &text), want);
    // With one id there is nobody else to be shown.
    let text = format!(
        "$F mount --writable --id web {NAME} rootfs >/dev/null; $F list | awk 'NR > 1 {{ print $1, $3 }}'; $F unmount web"
    );
    let want = format!("web overlay\nunmounted {} (id web)\n", stage.path("rootfs").display());
    assert_eq!(inside(stage, "", &text), want);
    stage.assert_nothing_left("after all");
});
