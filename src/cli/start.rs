//! What somebody reads who does not know the verbs yet: a start for `fsprov` alone, a hint for the words of other tools.

/// `fsprov` by itself.
pub(super) const START: &str = "\
fsprov puts a container image's root filesystem in place, with or without root.

  fsprov image pull debian:12                    get an image (`fsprov image import FILE` takes one you have)
  fsprov run -it debian:12                       run a program in it
  fsprov mount -v .:/src debian:12 rootfs        mount it at ./rootfs, with this directory at /src
  bwrap --unshare-all --uid 0 --gid 0 --bind rootfs / --dev /dev --proc /proc sh
  fsprov unmount rootfs

`fsprov help` lists the commands, `fsprov probe` tells what works on this host.
";

/// Words of podman, docker, skopeo, and what they are here.
const ELSEWHERE: &[(&[&str], &str)] = &[
    (&["pull"], "`fsprov image pull REF` gets an image from a registry"),
    (&["images"], "`fsprov image list` shows the images"),
    (&["import", "load"], "`fsprov image import FILE` takes an archive or a directory"),
    (&["export", "save"], "`fsprov image export IMAGE FILE` writes an image"),
    (&["rmi"], "`fsprov image rm IMAGE` removes an image"),
    (&["tag"], "`fsprov image tag IMAGE NAME` gives an image another name"),
    (&["prune", "gc"], "`fsprov image gc` removes what nothing uses"),
    (&["ps", "containers"], "`fsprov list` shows what is mounted"),
    (&["rm", "stop", "kill", "delete"], "`fsprov unmount ROOTFS` takes a rootfs away"),
    (
        &["exec", "start", "create", "shell", "enter"],
        "`fsprov run -it IMAGE` runs a program in an image, in the foreground and once; podman and containerd have containers that stay",
    ),
    (&["logs"], "`fsprov stats ROOTFS` shows what a FUSE server does; its log is in `fsprov inspect ROOTFS`"),
    (&["info", "doctor", "check"], "`fsprov probe` tells what works on this host"),
    (&["build"], "fsprov builds no images; `fsprov image import` takes those that buildah, docker or mmdebstrap make"),
    (&["login"], "logins are those of `podman login` and `docker login`"),
];

/// What is meant by a verb that is not ours.
pub(super) fn hint(verb: &str) -> Option<&'static str> {
    ELSEWHERE.iter().find(|(words, _)| words.contains(&verb)).map(|(_, hint)| *hint)
}

/// Options of `podman run` and `docker run` that `fsprov run` lacks, and what there is.
const NOT_OF_RUN: &[(&[&str], &str)] = &[
    (&["-d", "--detach"], "it runs in the foreground; podman and containerd have containers that stay"),
    (
        &["-p", "--publish", "-P", "--publish-all", "--expose"],
        "the program has this host's network, and its ports are this host's; leave it out",
    ),
    (&["--mount"], "`-v SRC:DST[:ro]` routes a directory or a file, `--tmpfs PATH` makes a tmpfs"),
    (&["--security-opt"], "`--seccomp FILE|none` names a profile"),
    (&["--privileged"], "`--cap-add all --seccomp none` gives most of it"),
    (&["--pull"], "what the store lacks is pulled; `fsprov image pull IMAGE` gets the newest"),
    (&["--uidmap", "--gidmap"], "`--userns keep-id` and `--userns auto` are what there is"),
    (
        &["-m", "--memory", "--cpus", "--cpu-shares", "--pids-limit", "--memory-swap", "--cgroup-parent"],
        "it sets no limits: `systemd-run --user --scope -p MemoryMax=1G fsprov run ...` does",
    ),
];

/// What is meant by an option of `run` that is not ours.
pub(super) fn hint_of_run(option: &str) -> Option<&'static str> {
    NOT_OF_RUN.iter().find(|(words, _)| words.contains(&option)).map(|(_, hint)| *hint)
}
