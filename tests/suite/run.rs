//! `fsprov run` and `fsprov bundle`: each option, and what it does inside, with every runtime there is to be; how it ends; what it leaves.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use crate::common::harness::case;
use crate::common::run::Outcome;
use crate::common::{Enter, Lane, Need, Stage, images, stage, system};

/// Those of Debian, and the one of FSPROV_TEST_RUNTIME, a path or a name (docs/run.md).
fn runtimes() -> Vec<String> {
    ["crun", "runc"].map(str::to_owned).into_iter().chain(std::env::var("FSPROV_TEST_RUNTIME")).collect()
}

/// What youki 0.7 does not do, and what is said of it; once it does, these go (docs/run.md).
const OF_YOUKI: &[(&str, &str)] = &[
    ("tmpfs", "does not fill a tmpfs"),
    // It asks systemd for a cgroup for every container with a user namespace of its own.
    ("user namespace", "systemd"),
];

/// What of a runtime's lacks is met where it is asked for this.
fn lacks(runtime: &str, what: &str) -> Option<&'static str> {
    let told = OF_YOUKI.iter().find(|(lacking, _)| *lacking == what).map(|(_, said)| *said);
    told.filter(|_| runtime.contains("youki"))
}

const TERMINAL: &[Need] = &[Need::Minbase, Need::Tool("crun"), Need::Tool("script")];
const NEEDS: &[Need] = &[Need::Minbase, Need::Tool("crun"), Need::Tool("runc"), Need::Tool("newuidmap"), Need::DevFuse];
/// The name that the image gets.
const NAME: &str = "example.com/debian-minbase";

/// Run this as a script of bash, on a terminal. What it wrote to it.
fn on_a_terminal(stage: &Stage, text: &str) -> Vec<String> {
    stage.write("job", text);
    let said = script(stage, "timeout 80 script -qec 'exec bash job' /dev/null </dev/null").ok();
    stage.note(said.describe());
    // `script` types ^@ at the end of its stdin.
    said.out().lines().map(|line| line.trim_start_matches("^@").trim().to_owned()).collect()
}

/// A runtime that writes its pid file elsewhere, after `begin`; it is in its place after `wait`, which runs beside, and is no child of the runtime:
/// crun waits for all that it has.
fn late_with_its_pid(stage: &Stage, runtime: &str, begin: &str, wait: &str) -> std::path::PathBuf {
    let path = stage.path(format!("{runtime}-late"));
    let text = format!(
        "#!/bin/bash\nargs=() before=\nfor word; do\n  [ \"$before\" = --pid-file ] && {{ file=$word; word=$word.late; }}\n  \
         args+=(\"$word\"); before=$word\ndone\n\
         if [ -n \"${{file-}}\" ]; then\n  {begin}\n  ( ({wait}; mv \"$file.late\" \"$file\") & )\nfi\n\
         exec {runtime} \"${{args[@]}}\"\n"
    );
    fs::write(&path, text).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

/// Root, and an ordinary user.
fn lanes(lane: &Lane) -> bool {
    lane.name == "root" || lane.name == "user"
}

fn import(stage: &Stage) {
    let archive = images::minbase_aci().expect("the Debian archive");
    stage.fsprov(["image", "import"]).arg(&archive).run().ok();
}

/// `fsprov run OPTIONS IMAGE sh -c COMMAND`.
fn run(stage: &Stage, runtime: &str, options: &[&str], command: &str) -> Outcome {
    stage
        .fsprov(["run", "--runtime", runtime])
        .args(options)
        .args([NAME, "sh", "-c", command])
        .env("FROM_HERE", "here")
        .run()
}

/// A script of sh with `$F` for the program under test.
fn script(stage: &Stage, text: &str) -> Outcome {
    stage.tool("sh", ["-c", text]).env("F", stage::program()).run()
}

/// Options, a command inside, and what it prints. A row is what docs/run.md says of an option.
const TABLE: &[(&[&str], &str, &[&str])] = &[
    (&[], "id -u; stat -c '%a %U:%G' /etc/shadow /bin/su", &["0\n640 root:shadow\n4755 root:root\n"]),
    (
        &[],
        "touch /new && chown www-data:tty /new && stat -c %U:%G /new && rm /etc/shadow && mkdir /var/lib/x && echo done",
        &["www-data:tty", "done"],
    ),
    (&[], "cp /usr/bin/id /tmp/i && chmod 4755 /tmp/i && setpriv --reuid 33 --clear-groups /tmp/i -u", &["0\n"]),
    (
        &[],
        "ls -d /proc/1/fd /sys/kernel /dev/pts/ptmx /dev/shm /dev/mqueue && echo >/dev/null && head -c1 /dev/zero | wc -c",
        &["/proc/1/fd\n", "1\n"],
    ),
    (
        &[],
        "cat /etc/resolv.conf >/tmp/r && cat /etc/hosts /run/.containerenv",
        &["localhost", "engine=\"fsprov-", "image=\"example.com/debian-minbase\""],
    ),
    (
        &[],
        "cat /proc/kcore 2>/dev/null | wc -c; echo 1 2>&1 >/proc/sys/kernel/printk; ls /sys/firmware | wc -l",
        &["0\n", "Read-only file system", "0\n"],
    ),
    (&[], "grep CapEff /proc/self/status; tr '\\0' ' ' </proc/1/cmdline", &["00000000800405fb", "sh -c"]),
    (
        &["--read-only"],
        "touch /x 2>&1; touch /tmp/x /run/x /var/tmp/x && echo written",
        &["Read-only file system", "written"],
    ),
    (
        &["--read-only"],
        "for f in /etc/hosts /etc/hostname /etc/resolv.conf; do (echo x >>$f) 2>/dev/null || echo kept $f; done",
        &["kept /etc/hosts\nkept /etc/hostname\nkept /etc/resolv.conf\n"],
    ),
    (&["-v", "./vol:/mnt/v"], "cat /mnt/v/f && echo new >/mnt/v/new", &["from outside"]),
    (
        &["-v", "./vol:/no/such/place:ro"],
        "cat /no/such/place/f; touch /no/such/place/x 2>&1",
        &["from outside", "Read-only file system"],
    ),
    (&["--sandbox", "work", "-v", "data:/data"], "echo kept >/data/kept", &[]),
    (
        &["--tmpfs", "/etc/apt:size=1m"],
        "stat -f -c %T /etc/apt; ls /etc/apt; findmnt -no SIZE /etc/apt",
        &["tmpfs", "sources.list", "1M"],
    ),
    (&["-w", "/a/b"], "pwd", &["/a/b"]),
    (
        &["-e", "A=1 2", "-e", "FROM_HERE", "-e", "NOT_HERE"],
        "env",
        &["A=1 2\n", "FROM_HERE=here\n", "HOME=/root\n", "container=fsprov\n"],
    ),
    (&["--env-file", "env"], "echo $C $D", &["c d e\n"]),
    (
        &["-u", "www-data"],
        "id -un; echo $HOME; grep CapEff /proc/self/status",
        &["www-data\n/var/www\n", "0000000000000000"],
    ),
    (&["-u", "33:tty"], "id -u; id -g", &["33\n5\n"]),
    (&["-u", "4321"], "id -u; cat /etc/shadow 2>&1", &["4321\n", "Permission denied"]),
    (&["--hostname", "box"], "hostname; cat /etc/hostname; grep -w box /etc/hosts", &["box\nbox\n", "127.0.1.1"]),
    (&["--network", "none"], "ls /sys/class/net; cat /etc/resolv.conf; grep -c : /proc/net/dev", &["lo\n", "1\n"]),
    (
        &["--cap-drop", "all"],
        "grep CapEff /proc/self/status; chown 33 /tmp 2>&1",
        &["0000000000000000", "not permitted"],
    ),
    (
        &["--cap-drop", "all", "--cap-add", "chown"],
        "chown 33 /tmp && grep CapEff /proc/self/status",
        &["0000000000000001"],
    ),
    (&["--cap-add", "all"], "grep -c CapEff /proc/self/status", &["1\n"]),
    (&["--cap-add", "SYS_PTRACE"], "grep CapEff /proc/self/status", &["00000000800c05fb"]),
    (&["-u", "33", "--cap-add", "net_bind_service"], "grep CapAmb /proc/self/status", &["0000000000000400"]),
    (&["--seccomp", "none"], "grep Seccomp: /proc/self/status", &["Seccomp:\t0"]),
    (
        &["--seccomp", "profile.json"],
        "grep Seccomp: /proc/self/status; mkdir /tmp/d 2>&1",
        &["Seccomp:\t2", "Function not implemented"],
    ),
    (&["--entrypoint", "[\"/usr/bin/env\", \"X=1\"]"], "echo $X", &["1\n"]),
];

/// Everything is allowed but mkdir(2).
const PROFILE: &str = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#;

case!("run_every_option", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    stage.mkdir("vol");
    stage.write("vol/f", "from outside\n");
    stage.write("env", "# comment\nC=c\nD=d e\n");
    stage.write("profile.json", PROFILE);
    for runtime in &runtimes() {
        let mut wrong = String::new();
        for (options, command, answers) in TABLE {
            let said = run(stage, runtime, options, command);
            if let Some(why) = lacks(runtime, "tmpfs").filter(|_| options.contains(&"--tmpfs")) {
                said.fails(125, &[why]);
                continue;
            }
            for answer in answers.iter().filter(|answer| !said.out().contains(*answer)) {
                wrong.push_str(&format!("{options:?} should say {answer:?}:\n{}\n", said.describe()));
            }
        }
        assert!(wrong.is_empty(), "{runtime}:\n{wrong}");
        assert_eq!(fs::read_to_string(stage.path("vol/new")).expect("read"), "new\n");
        assert_eq!(fs::read_to_string(stage.path("work/data/kept")).expect("read"), "kept\n");
        fs::remove_file(stage.path("vol/new")).expect("remove");
        fs::remove_dir_all(stage.path("work")).expect("remove");
        match lacks(runtime, "user namespace") {
            _ if stage.lane.enter != Enter::User => {}
            None => kept_id(stage, runtime),
            Some(why) => drop(run(stage, runtime, &["--userns", "keep-id"], "true").fails(125, &[why])),
        }
        // Nothing that one of them did is there for the next.
        run(stage, runtime, &[], "test ! -e /new && test -e /etc/shadow").ok();
        stage.assert_nothing_left("after the table");
    }
    assert_eq!(fs::read_dir(stage.state().join("run")).expect("list").count(), 0);
});

/// `--userns=keep-id`: the user inside, and root's files root's; what it writes is the user's.
fn kept_id(stage: &Stage, runtime: &str) {
    let uid = rustix::process::getuid().as_raw();
    let command = "id -u; stat -c %U:%G /etc/shadow; cat /etc/shadow 2>&1; stat -c %u /mnt/v/f; touch /mnt/v/mine";
    let said = run(stage, runtime, &["--userns", "keep-id", "-v", "./vol:/mnt/v"], command).ok().out();
    let want = format!("{uid}\nroot:shadow\ncat: /etc/shadow: Permission denied\n{uid}\n");
    assert_eq!(said, want, "{runtime}");
    assert_eq!(fs::metadata(stage.path("vol/mine")).expect("stat").uid(), uid);
    let root = run(
        stage,
        runtime,
        &["--userns", "keep-id", "-u", "root"],
        "id -u; touch /etc/x && chown 1:1 /etc/x && echo done",
    );
    assert_eq!(root.ok().out(), "0\ndone\n", "{runtime}");
}

// `--userns=auto`: two at once share no id, their root is nobody here, and a closed directory above the rootfs hinders neither. For root
// the ids are those that subuid(5) gives to the name `containers`.
case!("run_with_ids_of_its_own", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    let is_root = stage.lane.enter != Enter::User;
    if is_root {
        run(stage, "crun", &["--userns", "auto"], "true").fails(125, &["containers", "/etc/subuid"]);
        stage.write("subid", "containers:300000:4096\n");
    }
    stage.mkdir("vol");
    stage.write("vol/f", "from outside\n");
    let first = if is_root { 300_000 } else { 1 };
    let begin = if is_root {
        "unshare -m sh -c 'mount --bind subid /etc/subuid && mount --bind subid /etc/subgid && . ./both'"
    } else {
        ". ./both"
    };
    for runtime in runtimes().iter().filter(|runtime| is_root || lacks(runtime, "user namespace").is_none()) {
        let program = "grep -o '[0-9].*' /proc/self/uid_map /proc/self/gid_map | tr -s ' ' | cut -d: -f2; stat -c %a-%U:%G /etc/shadow /bin/su
            touch /new && chown www-data:tty /new && stat -c %U:%G /new; stat -c %U /mnt/v; cat /mnt/v/f; id -u; sleep 0.1";
        let wait = "echo >/mnt/s/$0; until test -e /mnt/s/one && test -e /mnt/s/two; do sleep 0.05; done";
        let one = |name: &str| {
            format!(
                "\"$F\" run --runtime {runtime} --userns auto -v ./vol:/mnt/v:ro -v ./shared:/mnt/s {NAME} sh -c \"$P; $W\" {name} >{name} &"
            )
        };
        let (program, one, two) = (program.replace('\'', "'\\''"), one("one"), one("two"));
        let both =
            format!("P='{program}'\nW='{wait}'\nrm -rf shared; mkdir shared; chmod 777 shared\n{one}\n{two}\nwait\n");
        stage.write("both", &both);
        script(stage, begin).ok();
        for name in ["one", "two"] {
            let owner = fs::metadata(stage.path(name)).expect("stat").uid();
            assert_eq!(owner, rustix::process::getuid().as_raw(), "{runtime}: stdout's file belongs to who began it");
        }
        let said = ["one", "two"].map(|name| fs::read_to_string(stage.path(name)).expect("read"));
        let starts: std::collections::BTreeSet<u32> = said
            .iter()
            .map(|said| {
                let lines: Vec<&str> = said.lines().collect();
                let map: Vec<u32> = lines[0].split(' ').map(|n| n.parse().expect("a number")).collect();
                assert_eq!((map[0], map[2]), (0, 1024), "{said}");
                assert_eq!(lines[0], lines[1], "user and group ids: {said}");
                let rest = ["640-root:shadow", "4755-root:root", "www-data:tty", "nobody", "from outside", "0"];
                assert_eq!(lines[2..], rest, "{runtime}");
                map[1]
            })
            .collect();
        assert_eq!(starts, [first, first + 1024].into(), "{runtime}: {said:?}");
        stage.assert_nothing_left("after two with ids of their own");
    }
    // A runtime in a directory that is covered, by its name and by a link's.
    let covered = stage.state().join("crun");
    fs::copy("/usr/bin/crun", &covered).expect("copy");
    std::os::unix::fs::symlink("crun", stage.state().join("link-to-crun")).expect("link");
    for name in ["crun", "link-to-crun"] {
        let runtime = stage.state().join(name);
        let text = format!("\"$F\" run --runtime {} --userns auto {NAME} echo it runs", runtime.display());
        stage.write("both", &text);
        assert_eq!(script(stage, begin).ok().out(), "it runs\n", "{name}");
    }
    // Others may pass the state root, and not what is in it.
    for open in [stage.path(""), stage.state()] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    // Volumes below a tmpfs, one in the other; and what is made in a volume belongs to its owner.
    fs::create_dir(stage.path("vol/inner")).expect("mkdir");
    let volumes = "--tmpfs /srv -v ./vol:/srv/a -v ./shared:/srv/a/inner -v ./vol:/w -w /w/new";
    stage.write(
        "both",
        format!(
            "\"$F\" run --userns auto {volumes} {NAME} sh -c 'cat /srv/a/f; test -e /srv/a/inner/one && echo it runs'"
        ),
    );
    assert_eq!(script(stage, begin).ok().out(), "from outside\nit runs\n");
    let made = fs::metadata(stage.path("vol/new")).expect("stat").uid();
    assert_eq!(made, rustix::process::getuid().as_raw());
    if !is_root {
        run(stage, "crun", &["--userns", "auto", "-u", "65536"], "true")
            .fails(125, &["needs 66560 ids", "/etc/subuid"]);
        assert_eq!(run(stage, "crun", &["--userns", "auto", "-u", "2000"], "id -u").ok().out(), "2000\n");
    }
});

case!("run_exit_codes_signals_and_kills", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    for runtime in &runtimes() {
        run(stage, runtime, &[], "exit 42").fails(42, &[]);
        run(stage, runtime, &[], "kill -9 $$; exit 3").fails(3, &[]);
        let program = |words: &[&str]| stage.fsprov(["run", "--runtime", runtime, NAME]).args(words).run();
        program(&["nope"]).fails(127, &["nope", "the image has no such program"]);
        program(&["/etc/nope"]).fails(127, &["/etc/nope"]);
        program(&["/etc"]).fails(126, &["/etc", "it is a directory"]);
        program(&["/etc/passwd"]).fails(126, &["/etc/passwd", "no x in its mode"]);
        stage.mkdir("bad");
        for (text, why) in [("garbage", "its format is unknown"), ("#! /nope -x\n", "lacks its interpreter /nope")] {
            stage.write("bad/program", text);
            fs::set_permissions(stage.path("bad/program"), fs::Permissions::from_mode(0o755)).expect("chmod");
            let call = stage.fsprov(["run", "--runtime", runtime, "-v", "./bad:/bad", NAME, "/bad/program"]);
            call.run().fails(126, &["/bad/program", why]);
        }
        // Options end with the image.
        let call =
            stage.fsprov(["run", "--runtime", runtime, "--entrypoint", "grep", NAME, "-e", "^root:", "/etc/passwd"]);
        assert_eq!(call.run().ok().out(), "root:x:0:0:root:/root:/bin/bash\n", "{runtime}");
        stage
            .fsprov(["run", "--runtime", runtime, "-u", "nobody-here", NAME, "true"])
            .run()
            .fails(125, &["nobody-here", "/etc/passwd"]);
        // What the runtime says is passed on, and is not taken for the program's exit code.
        let name = Path::new(runtime).file_name().expect("a name").to_str().expect("text");
        run(stage, runtime, &["--tmpfs", "/x:nonsense=1"], "exit 0").fails(125, &[name]);
        // Stdin: passed on where that is asked for.
        let text = format!(
            "echo typed | $F run --runtime {runtime} -i {NAME} cat; echo typed | $F run --runtime {runtime} {NAME} wc -c"
        );
        assert_eq!(script(stage, &text).ok().out(), "typed\n0\n");
        // A signal reaches the program once, and its answer is the exit code.
        let text = format!(
            "rm -f out; $F run --runtime {runtime} {NAME} sh -c 'trap \"echo got\" USR1; trap \"echo end; exit 9\" TERM; echo ready; while :; do sleep 0.1; done' >out &
             P=$!; until grep -qs ready out; do sleep 0.05; done; kill -USR1 $P; until grep -q got out; do sleep 0.05; done; sleep 0.3; kill -TERM $P
             wait $P; echo code $?; cat out"
        );
        assert_eq!(script(stage, &text).ok().out(), "code 9\nready\ngot\nend\n", "{runtime}");
        stage.assert_nothing_left("after runs that ended");
        for (who, what) in [("$P", "the command"), ("$(ps -o pid= --ppid $P)", "the process in the middle")] {
            let text = format!(
                "rm -f out; $F run --id web --runtime {runtime} {NAME} sh -c 'echo ready; sleep 1000' >out &
                 P=$!; until grep -qs ready out; do sleep 0.05; done; $F list -q; kill -9 {who}; wait $P; true"
            );
            let said = script(stage, &text).ok();
            assert!(said.out().lines().any(|line| line == "web"), "it is listed while it runs: {}", said.describe());
            let gone = system::eventually(Duration::from_secs(20), || stage.records().is_empty());
            assert!(gone, "{runtime}: {what} was killed, and this stayed: {:?}", stage.records());
            stage.assert_nothing_left(&format!("after {what} was killed"));
        }
    }
    // Killed before the runtime told which process is the container's first, as runc does when that runs already.
    let pause = "for n in {1..100}; do [ ! -s \"$file.late\" ] || break; sleep 0.05; done; sleep 1";
    let late = late_with_its_pid(stage, "runc", "true", pause);
    for who in ["$P", "$(ps -o pid= --ppid $P)"] {
        let text = format!(
            "rm -f out; $F run --id web --runtime {} {NAME} sh -c 'echo ready; sleep 1000' >out &
             P=$!; until grep -qs ready out; do sleep 0.05; done; kill -9 {who}; wait $P; true",
            late.display()
        );
        script(stage, &text).ok();
        let gone = system::eventually(Duration::from_secs(20), || stage.records().is_empty());
        assert!(gone, "{who} was killed early, and this stayed: {:?}", stage.records());
        stage.assert_nothing_left(&format!("after {who} was killed early"));
    }
});

case!(
    "run_with_a_terminal",
    lanes,
    &[Need::Minbase, Need::Tool("crun"), Need::Tool("runc"), Need::Tool("script")],
    |stage: &Stage| {
        import(stage);
        for runtime in &runtimes() {
            let inner = format!(
                "stty rows 33 cols 101; stty -g >before; $F run -it --runtime {runtime} {NAME} sh -c \"tty; stty size; exit 5\"; echo code $?; stty -g >after"
            );
            let text = format!("script -qec '{inner}' /dev/null </dev/null");
            let said = script(stage, &text).ok();
            // youki 0.7 makes no terminal of its own in the foreground: the program has this one.
            let terminal = if runtime.contains("youki") { "not a tty" } else { "/dev/pts/0" };
            for answer in [terminal, "code 5", "33 101"] {
                assert!(said.out().contains(answer), "{runtime} should say {answer:?}: {}", said.describe());
            }
            let read = |name: &str| fs::read_to_string(stage.path(name)).expect("read");
            assert_eq!(read("before"), read("after"), "{runtime}: the terminal is as it was");
        }
    },
);

// crun 1.8 looks at its terminal no more once it has seen the program end: here it sees that first, having waited for who reads its pid file.
case!("run_with_a_terminal_loses_no_output", lanes, TERMINAL, |stage: &Stage| {
    import(stage);
    let read = "sleep 0.5; cat \"$file.late\" >\"$file.new\"; mv \"$file.new\" \"$file.late\"";
    let slow = late_with_its_pid(stage, "crun", "mkfifo \"$file.late\"", read);
    let run = format!("$F run -it --runtime {} {NAME}", slow.display());
    let lines = on_a_terminal(stage, &format!("{run} sh -c 'seq 300; exit 5'; echo code $?"));
    let want: Vec<_> = (1..=300).map(|n| n.to_string()).chain(["code 5".to_owned()]).collect();
    assert_eq!(lines, want);
});

// The program is told when the window changes its size, and sees the new one.
case!(
    "run_with_a_terminal_follows_its_size",
    lanes,
    &[Need::Minbase, Need::Tool("crun"), Need::Tool("runc"), Need::Tool("script")],
    |stage: &Stage| {
        import(stage);
        for runtime in ["crun", "runc"] {
            let program = "trap \\\"stty size; exit 7\\\" WINCH; echo ready >/mark/ready; while :; do sleep 0.1; done";
            let inner = format!(
                "stty rows 33 cols 101; T=$(tty); (until [ -e mark/ready ]; do sleep 0.05; done; stty -F $T rows 44 cols 55) & \
             $F run -it -v ./mark:/mark --runtime {runtime} {NAME} sh -c \"{program}\"; echo code $?"
            );
            let said =
                script(stage, &format!("rm -rf mark; mkdir mark; script -qec '{inner}' /dev/null </dev/null")).ok();
            assert!(said.out().contains("44 55") && said.out().contains("code 7"), "{runtime}: {}", said.describe());
        }
    }
);

// Who reads the terminal may go away, the command or the runtime may be killed: the program's terminal hangs up, and the user's is as it was.
case!("run_with_a_terminal_that_hangs_up", lanes, TERMINAL, |stage: &Stage| {
    import(stage);
    stage.mkdir("mark");
    let run = format!("$F run -it -v ./mark:/mark --runtime crun {NAME}");
    let text = format!(
        "T=$(tty); until_there() {{ until [ -e mark/$1 ]; do sleep 0.05; done; }}
        {run} yes | head -1
        {run} sh -c 'echo >/mark/a; while :; do echo x >/mark/x; echo x; sleep 0.3; done' <$T >slow & P=$!
        until_there a; kill -9 $(ps -o pid= --ppid $(ps -o pid= --ppid $P)); wait $P
        stty -g >before
        {run} sh -c 'trap \"echo >/mark/hup\" HUP; trap : TERM; echo >/mark/b; while :; do sleep 0.1; done' <$T & P=$!
        until_there b; stty -g >raw; kill -9 $P; wait $P
        for n in {{1..400}}; do stty -g >after; cmp -s before after && break; sleep 0.05; done
        until_there hup; echo done"
    );
    let lines = on_a_terminal(stage, &text);
    assert!(lines.contains(&"y".to_owned()) && lines.contains(&"done".to_owned()), "{lines:?}");
    let [before, raw, after] =
        ["before", "raw", "after"].map(|name| fs::read_to_string(stage.path(name)).expect("read"));
    assert_ne!(before, raw, "each key was passed on");
    assert_eq!(before, after, "the terminal is as it was");
    assert!(system::eventually(Duration::from_secs(20), || stage.records().is_empty()), "{:?}", stage.records());
});

// A program may close its terminal and open it again.
case!("run_with_a_terminal_opened_again", lanes, TERMINAL, |stage: &Stage| {
    import(stage);
    let program = "exec <&- >&- 2>&-; sleep 0.2; echo again >/dev/console";
    let text = format!("for n in {{1..8}}; do $F run -it --runtime crun {NAME} sh -c '{program}'; done");
    assert_eq!(on_a_terminal(stage, &text).iter().filter(|line| *line == "again").count(), 8);
});

// A job in the background waits for the terminal, as any other program does.
case!("run_with_a_terminal_in_the_background", lanes, TERMINAL, |stage: &Stage| {
    import(stage);
    let text = format!(
        "set -m; $F run -it --runtime crun {NAME} expr 20 + 22 &
        for n in {{1..800}}; do state=$(cut -d' ' -f3 /proc/$!/stat); [ $state = T ] && break; sleep 0.05; done
        echo $state; echo called; fg"
    );
    let mut lines = on_a_terminal(stage, &text);
    lines.retain(|line| ["T", "called", "42"].contains(&&**line));
    assert_eq!(lines, ["T", "called", "42"]);
});

/// Options, and where the volume is: at or below a place where the runtime mounts something.
const COVERED: &[(&[&str], &str)] = &[
    (&["--read-only", "-v", "./vol:/tmp/data"], "/tmp/data"),
    (&["--read-only", "-v", "./vol:/run/a/b"], "/run/a/b"),
    (&["--read-only", "-v", "./vol:/var/run"], "/run"),
    (&["--read-only", "-v", "./vol:/var/run/data"], "/run/data"),
    (&["--tmpfs", "/srv", "-v", "./vol:/srv/data"], "/srv/data"),
    (&["--tmpfs", "/srv", "-v", "./other:/srv/d", "--tmpfs", "/srv/d/t", "-v", "./vol:/srv/d/t/v"], "/srv/d/t/v"),
    (&["-v", "./vol:/dev/shm"], "/dev/shm"),
    (&["-v", "./vol:/dev/x/y"], "/dev/x/y"),
];

// What a program writes to a volume must be on the host afterwards, whatever the runtime mounts above it.
case!("run_volumes_below_a_tmpfs_and_dev", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    stage.mkdir("vol");
    stage.mkdir("other");
    stage.write("vol/f", "from outside\n");
    let is_user = stage.lane.enter == Enter::User;
    for runtime in &runtimes() {
        let written = |options: &[&str], at: &str| {
            let command = format!("cat {at}/f && grep ' {at} ' /proc/self/mountinfo && echo new >{at}/new");
            let said = run(stage, runtime, options, &command).ok();
            let out = said.out();
            let flags = out.lines().last().and_then(|line| line.split(' ').nth(5)).unwrap_or_default();
            assert!(out.starts_with("from outside\n"), "{runtime}: {}", said.describe());
            assert!(flags.contains("nosuid,nodev"), "{runtime}: {}", said.describe());
            assert_eq!(fs::read_to_string(stage.path("vol/new")).expect("read"), "new\n", "{runtime}: {options:?}");
            fs::remove_file(stage.path("vol/new")).expect("remove");
        };
        COVERED.iter().for_each(|(options, at)| written(options, at));
        let command = "cat /tmp/v/f; touch /tmp/v/x 2>&1; touch /tmp/x && echo written";
        let said = run(stage, runtime, &["--read-only", "-v", "./vol:/tmp/v:ro"], command).ok().out();
        for answer in ["from outside\n", "Read-only file system", "written"] {
            assert!(said.contains(answer), "{runtime} should say {answer:?}: {said}");
        }
        // A file, and a device: the user's runtime has no list of devices that may be opened.
        let device = if is_user { ": 3<>/dev/fuse" } else { "test -c /dev/fuse" };
        run(stage, runtime, &["-v", "/dev/fuse:/dev/fuse"], device).ok();
        let file = run(stage, runtime, &["--read-only", "-v", "./vol/f:/run/.containerenv"], "cat /run/.containerenv");
        assert_eq!(file.ok().out(), "from outside\n", "{runtime}");
        if is_user && lacks(runtime, "user namespace").is_none() {
            written(&["--userns", "keep-id", "--read-only", "-v", "./vol:/run/a/b"], "/run/a/b");
            let said =
                run(stage, runtime, &["--userns", "auto", "--read-only", "-v", "./vol:/run/a/b"], "cat /run/a/b/f");
            assert_eq!(said.ok().out(), "from outside\n", "{runtime}");
            let made = run(stage, runtime, &["--userns", "auto", "--read-only", "-w", "/tmp/a/b"], "stat -c %U . ..");
            assert_eq!(made.ok().out(), "root\nroot\n", "{runtime}");
        }
        for (options, why) in [
            (["--tmpfs", "/srv/d", "-v", "./vol:/srv/d/"], "a volume is to be mounted there"),
            (["--tmpfs", "/run/d/", "-v", "./vol:/var/run/d"], "a volume is to be mounted there"),
            (["-v", "./other:/other:ro", "-v", "./vol:/other/no/such"], "read-only volume"),
            (["-v", "./vol:/proc", "-v", "./other:/other"], "the kernel's own /proc"),
        ] {
            let said = run(stage, runtime, &options, "true").fails(125, &[why]);
            assert!(!said.err().contains("--backend"), "{}", said.describe());
        }
        // The runtime has made the place of a file of its own in it, where the volume was /run.
        fs::remove_file(stage.path("vol/.containerenv")).expect("remove");
        assert_eq!(fs::read_dir(stage.path("vol")).expect("list").count(), 1, "{runtime}");
        stage.assert_nothing_left("after volumes that were put aside");
    }
    let bundle = stage.fsprov(["bundle", "--read-only", "-v", "./vol:/tmp/data", NAME, "b", "true"]).run();
    bundle.fails_saying(&["/tmp/data", "on top of it", "fsprov run"]);
    assert_eq!(fs::read_to_string(stage.path("vol/f")).expect("read"), "from outside\n");
    stage.assert_nothing_left("after a bundle that was refused");
});

case!("run_where_a_volume_or_a_tmpfs_is_the_place_of_a_usual_one", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    stage.mkdir("empty");
    for runtime in &runtimes() {
        // A read-only volume gets no file that the runtime would have to make.
        for (options, command) in [
            (vec!["-v", "./empty:/etc:ro"], "ls -A /etc"),
            (vec!["-v", "./empty:/run:ro"], "ls -A /run"),
            (vec!["--read-only", "-v", "./empty:/run:ro"], "ls -A /run"),
        ] {
            assert_eq!(run(stage, runtime, &options, command).ok().out(), "", "{runtime}: {options:?}");
        }
        let size = run(stage, runtime, &["--read-only", "--tmpfs", "/tmp/:size=1m"], "findmnt -no SIZE /tmp");
        assert_eq!(size.ok().out().trim(), "1M", "{runtime}");
    }
});

// Who starts it may have a umask, ignore SIGCHLD, or have nearly as many processes as it may.
case!("run_with_a_umask_sigchld_and_limits_of_its_parent", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    stage.mkdir("vol");
    stage.mkdir("m");
    for runtime in &runtimes() {
        let text = format!(
            "umask 077; $F run --runtime {runtime} -u 33 -w /new/dir -v ./vol:/vv/x {NAME} stat -c %a . .. /vv /vv/x"
        );
        assert_eq!(script(stage, &text).ok().out(), "755\n755\n755\n755\n", "{runtime}");
        let text = format!("trap '' CHLD; exec $F run --runtime {runtime} {NAME} echo it runs");
        assert_eq!(script(stage, &text).ok().out(), "it runs\n", "{runtime}");
    }
    script(stage, &format!("trap '' CHLD; exec $F mount --id m {NAME} m")).ok();
    stage.fsprov(["unmount", "m"]).run().ok();
    if stage.lane.enter == Enter::User {
        script(stage, &format!("prlimit --nproc=1 $F run {NAME} true")).fails(125, &["start a thread", "ulimit -u"]);
        let text = format!(
            "unshare -Urm $F --root one image import {} --name one >&2 && unshare -Urm $F --root one run --runtime crun one id -u",
            images::minbase_source().expect("minbase.tar").display()
        );
        assert_eq!(script(stage, &text).ok().out(), "0\n", "root of a user namespace with one id");
    }
    stage.assert_nothing_left("after runs that were started in other ways");
});

case!("run_sixteen_eight_at_a_time", lanes, NEEDS, |stage: &Stage| {
    import(stage);
    let text = format!(
        "seq 16 | xargs -P 8 -I N sh -c '\"$F\" run --runtime $(test $((N % 2)) = 0 && echo crun || echo runc) {NAME} sh -c \"echo x >/x && test N -gt 0\" || echo failed N'"
    );
    assert_eq!(script(stage, &text).ok().out(), "");
    stage.assert_nothing_left("after 16 runs");
    assert_eq!(fs::read_dir(stage.state().join("run")).expect("list").count(), 0);
});

case!("bundle_that_a_runtime_runs", lanes, &[Need::Minbase, Need::Tool("runc"), Need::DevFuse], |stage: &Stage| {
    import(stage);
    stage
        .fsprov([
            "bundle",
            "--id",
            "web",
            "-e",
            "A=1",
            "-w",
            "/etc",
            NAME,
            "b",
            "sh",
            "-c",
            "echo $A; pwd; id -u; exit 3",
        ])
        .run()
        .ok();
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(stage.path("b/config.json")).expect("read")).expect("JSON");
    assert_eq!(config["process"]["cwd"], "/etc");
    assert_eq!(config["root"]["path"], stage.path("b/rootfs").to_str().expect("text"));
    let is_user = stage.lane.enter == Enter::User;
    assert_eq!(config["root"]["readonly"], is_user);
    assert_eq!(config["linux"]["uidMappings"].is_array(), is_user);
    let said = stage.tool("runc", ["--root"]).arg(stage.path("runc")).args(["run", "--bundle", "b", "web"]).run();
    assert_eq!((said.code(), said.out().as_str()), (Some(3), "1\n/etc\n0\n"), "{}", said.describe());
    stage.fsprov(["bundle", NAME, "b", "true"]).run().fails_saying(&["b/rootfs"]);
    assert!(Path::new(&stage.path("b/config.json")).exists());
    stage.fsprov(["unmount", "web"]).run().ok();
    stage.assert_nothing_left("after unmount");
    // Below a link.
    stage.mkdir("e");
    std::os::unix::fs::symlink("e", stage.path("link")).expect("link");
    stage.fsprov(["bundle", "--id", "below", NAME, "link/b", "true"]).run().ok();
    assert!(stage.path("e/b/config.json").exists());
    stage.fsprov(["unmount", "below"]).run().ok();
    // In a directory of somebody else's, who put links there.
    stage.mkdir("d");
    stage.write("victim", "whole");
    for name in ["config.json", "hosts", "hostname", "resolv.conf", "containerenv"] {
        std::os::unix::fs::symlink("../victim", stage.path("d").join(name)).expect("link");
    }
    stage
        .tool("sh", ["-c", "umask 077; exec \"$F\" bundle --id links example.com/debian-minbase d true"])
        .env("F", stage::program())
        .run()
        .ok();
    assert_eq!(fs::read_to_string(stage.path("victim")).expect("read"), "whole", "a link was followed");
    assert_eq!(
        fs::metadata(stage.path("d/resolv.conf")).expect("stat").mode() & 0o777,
        0o644,
        "everyone inside may read it"
    );
    stage.fsprov(["unmount", "links"]).run().ok();
    // Another image's program that is not there: refused before anything is left.
    stage.fsprov(["bundle", "-u", "no-one", NAME, "c", "true"]).run().fails_saying(&["no-one", "/etc/passwd"]);
    stage.assert_nothing_left("after a refused bundle");
},);
