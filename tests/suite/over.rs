//! An overlay over a FUSE mount of the image, as `auto` makes it in a user namespace of several ids.

use crate::common::harness::case;
use crate::common::{Lane, Need, Stage, images, stage};

const NEEDS: &[Need] = &[Need::Minbase, Need::Tool("newuidmap"), Need::DevFuse, Need::UserNamespaces];
const NEEDS_FAULTS: &[Need] =
    &[Need::Minbase, Need::Tool("newuidmap"), Need::DevFuse, Need::UserNamespaces, Need::Failpoints];
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
        $F list | awk 'NR > 1 {{ print $1, $2, $3, $5 }}'
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
        "mounted {NAME} at {at} (id web, backend overlay)\nweb ready overlay {at}\n640 0:42\n4755 0:0\noverlay\n\
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

case!("an_overlay_over_fuse_is_one_rootfs", |lane: &Lane| lane.name == "user", NEEDS, |stage: &Stage| {
    stage.fsprov(["image", "import"]).arg(images::minbase_aci().expect("the Debian archive")).run().ok();
    let at = stage.path("rootfs");
    let told = |text: &str| -> serde_json::Value { serde_json::from_str(text).expect("JSON") };

    // It has the id that was given, whoever asks, and both parts' particulars.
    let text = format!(
        "$F mount --json --id web --writable {NAME} rootfs | tr '\\n' ' '; echo; echo x >rootfs/x; $F inspect --json web | tr '\\n' ' '; echo
        $F list --json | tr '\\n' ' '; echo; $F inspect --json rootfs | tr '\\n' ' '; echo"
    );
    let end = "; $F list -q; $F restart rootfs; $F stats rootfs >/dev/null; $F mount --writable {NAME} rootfs || $F unmount $($F list -q)";
    let out = inside(stage, "--map-auto", &format!("{text}{}", end.replace("{NAME}", NAME)));
    let mut lines = out.lines();
    let mut next = || lines.next().unwrap_or_default();
    let (mounted, by_id, listed, by_path) = (told(next()), told(next()), told(next()), told(next()));
    assert_eq!(by_id, by_path);
    assert_eq!(listed, serde_json::json!([by_id]));
    for one in [&mounted, &by_id] {
        assert_eq!(one["id"], "web");
        assert_eq!((&one["state"], &one["backend"]), (&"ready".into(), &"overlay".into()));
        assert_eq!(one["rootfs"], at.to_str().expect("text"));
        assert_eq!(one["image"]["name"], NAME);
        assert!(one["index"].is_string() && one["worker_pid"].is_number(), "{one}");
        assert!(one["layers"][0].to_string().contains("/images/"), "{one}");
        assert!(one["changes"]["path"].is_string(), "{one}");
    }
    assert!(by_id["changes"]["files"].as_u64() >= Some(1), "{by_id}");
    assert_eq!(next(), "web");
    assert!(next().starts_with(&format!("restarted {} (worker ", at.display())), "{out}");
    assert_eq!(next(), format!("unmounted {} (id web)", at.display()));
    stage.assert_nothing_left("after the first");

    // The beginning of an id is enough; and --all says each once.
    let text = format!(
        "$F mount --writable {NAME} rootfs >/dev/null; id=$($F list -q); $F unmount $(echo $id | cut -c 1-5) | sed s/$id/ID/
        $F mount --id web --writable {NAME} rootfs >/dev/null; $F unmount --all"
    );
    let want = format!("unmounted {at} (id ID)\nunmounted {at} (id web)\n", at = at.display());
    assert_eq!(inside(stage, "--map-auto", &text), want);
    stage.assert_nothing_left("after the second");
});

case!("an_overlay_over_fuse_is_recovered_as_a_whole", |lane: &Lane| lane.name == "user", NEEDS, |stage: &Stage| {
    stage.fsprov(["image", "import"]).arg(images::minbase_aci().expect("the Debian archive")).run().ok();
    let text = format!(
        r#"$F mount --id web --writable {NAME} rootfs >/dev/null
        rows() {{ $F list | awk 'NR > 1 {{ print $1, $2, $3 }}'; }}
        recover() {{ $F recover "$@" | awk 'NR > 1 {{ print $1, $2 }}'; }}
        recover --keep web
        rows
        die() {{ kill -9 $($F inspect --json web | sed -n 's/.*"\(supervisor\|worker\)_pid": \([0-9]*\).*/\2/p'); }}
        die
        until rows | grep -q dead; do sleep 0.1; done
        rows
        recover
        rows
        stat -c '%u:%g' rootfs/etc/shadow
        touch rootfs/etc/x
        umount rootfs
        rows
        recover
        touch rootfs/etc/x
        recover --keep other
        rows"#
    );
    let want = "web kept\nweb ready overlay\nweb dead overlay\nweb healed\nweb ready overlay\n0:42\nweb gone overlay\nweb healed\nweb destroyed\n";
    assert_eq!(inside(stage, "--map-auto", &text), want);
    stage.assert_nothing_left("after all");
});

case!("half_of_an_overlay_over_fuse_is_recovered", |lane: &Lane| lane.name == "user", NEEDS_FAULTS, |stage: &Stage| {
    stage.fsprov(["image", "import"]).arg(images::minbase_aci().expect("the Debian archive")).run().ok();
    // The image is mounted, and the overlay never will be.
    let text = format!(
        "FAILPOINTS='provision.claim=1*off->return(kill)' $F mount --id web --writable {NAME} rootfs 2>/dev/null || echo killed
        $F list | awk 'NR > 1 {{ print $1, $2 }}'; $F recover | awk 'NR > 1 {{ print $1, $2 }}'"
    );
    assert_eq!(inside(stage, "--map-auto", &text), "killed\nweb interrupted\nweb destroyed\n");
    stage.assert_nothing_left("after all");
});
