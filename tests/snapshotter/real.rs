//! With the real containerd and runc: `scripts/containerd` says where they are (FSPROV_TEST_CONTAINERD); without it none of this is asked for.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::cri::{self, Cri};
use crate::images::{self, Entry, Image};
use crate::served::{Served, is_by_fuse, wait_for};

crate::tests![
    ctr_pulls_runs_and_survives_a_kill,
    a_kubelet_pulls_what_the_store_has_without_a_byte_of_its_layers,
    pods_eight_at_a_time_leave_nothing,
    kills_under_eight_containers_are_not_felt,
    times_beside_overlayfs,
    pods_with_user_namespaces_copy_nothing,
];

/// Where Debian's packages are unpacked.
pub(crate) const PLACE: &str = "FSPROV_TEST_CONTAINERD";
/// Where those of a newer Debian are: containerd 1.7, and CNI's plugins. Without it there is nothing to do for a test that needs them.
const NEWER: &str = "FSPROV_TEST_CONTAINERD_NEWER";

fn debian() -> PathBuf {
    std::env::var_os(PLACE).expect("scripts/containerd sets it").into()
}

fn path_with_theirs() -> std::ffi::OsString {
    let theirs = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|dir| debian().join(dir));
    let ours = std::env::var_os("PATH").expect("PATH");
    std::env::join_paths(theirs.into_iter().chain(std::env::split_paths(&ours))).expect("no colon")
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What containerd and its shims leave in /run is not this machine's.
fn cover_run() {
    let run = rustix::mount::mount("tmpfs", "/run", "tmpfs", rustix::mount::MountFlags::empty(), Some(c"mode=0755"));
    run.expect("mount a tmpfs on /run");
}

/// A registry, a containerd, and the snapshotter.
struct Node {
    containerd: Option<Running>,
    _registry: Running,
    port: u16,
    served: Served,
    /// Which one CRI uses.
    snapshotter: &'static str,
    kind: Containerd,
}

/// Which containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Containerd {
    /// 1.6.
    Old,
    /// 1.7, from this place; with or without the capability of fsprov to show other owners.
    New(PathBuf, bool),
}

impl Node {
    fn new() -> Self {
        cover_run();
        Self::with("fsprov", Containerd::Old)
    }

    fn with(snapshotter: &'static str, kind: Containerd) -> Self {
        let served = Served::new();
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port();
        let log =
            |name: &str| std::fs::File::options().create(true).append(true).open(served.path(name)).expect("a log");
        let config = format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: false}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
            served.path("blobs").display()
        );
        std::fs::write(served.path("registry.yml"), config).expect("write");
        let registry = Command::new("docker-registry")
            .arg("serve")
            .arg(served.path("registry.yml"))
            .stdin(Stdio::null())
            .stdout(log("registry.log"))
            .stderr(log("registry.log"))
            .spawn()
            .expect("run docker-registry");
        wait_for("the registry", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        let mut node = Node { containerd: None, _registry: Running(registry), port, served, snapshotter, kind };
        node.start_containerd();
        node
    }

    fn address(&self) -> PathBuf {
        self.served.containerd()
    }

    /// Where its programs are.
    fn theirs(&self) -> PathBuf {
        match &self.kind {
            Containerd::Old => debian(),
            Containerd::New(place, _) => place.clone(),
        }
    }

    /// With its shim, and this Debian's runc, which runs on this libc.
    fn path(&self) -> std::ffi::OsString {
        let Containerd::New(place, _) = &self.kind else { return path_with_theirs() };
        let bin = self.served.path("bin");
        std::fs::create_dir_all(&bin).expect("make");
        let _ = std::os::unix::fs::symlink(
            place.join("usr/bin/containerd-shim-runc-v2"),
            bin.join("containerd-shim-runc-v2"),
        );
        std::env::join_paths([bin].into_iter().chain(std::env::split_paths(&path_with_theirs()))).expect("no colon")
    }

    /// A network for pods that have one of their own.
    fn cni(&self) -> String {
        let Containerd::New(place, _) = &self.kind else { return String::new() };
        let dir = self.served.path("cni");
        std::fs::create_dir_all(&dir).expect("make");
        let config = r#"{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.99.0.0/16"}}]}"#;
        std::fs::write(dir.join("10-pods.conflist"), config).expect("write");
        let bin = place.join("usr/lib/cni");
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{}\"\nconf_dir = \"{}\"\n",
            bin.display(),
            dir.display()
        )
    }

    fn start_containerd(&mut self) {
        let at = |name: &str| self.served.path(name).display().to_string();
        let hosts = self.served.path(&format!("certs/127.0.0.1:{}", self.port));
        std::fs::create_dir_all(&hosts).expect("make");
        let url = format!("http://127.0.0.1:{}", self.port);
        std::fs::write(hosts.join("hosts.toml"), format!("server = \"{url}\"\n[host.\"{url}\"]\n")).expect("write");
        let config = format!(
            "version = 2\nroot = \"{root}\"\nstate = \"{state}\"\n[grpc]\naddress = \"{address}\"\n\
             [proxy_plugins.fsprov]\ntype = \"snapshot\"\naddress = \"{socket}\"\n{capabilities}\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"127.0.0.1:{port}/pause:1\"\nrestrict_oom_score_adj = true\n\
             disable_apparmor = true\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"{snapshotter}\"\n\
             disable_snapshot_annotations = false\n\
             [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"{certs}\"\n{cni}\
             [plugins.\"io.containerd.gc.v1.scheduler\"]\nstartup_delay = \"100ms\"\nschedule_delay = \"0ms\"\nmutation_threshold = 1\n",
            root = at("cd/root"),
            state = at("cd/state"),
            address = self.address().display(),
            socket = self.served.socket().display(),
            port = self.port,
            snapshotter = self.snapshotter,
            certs = at("certs"),
            capabilities =
                if matches!(self.kind, Containerd::New(_, true)) { "capabilities = [\"remap-ids\"]\n" } else { "" },
            cni = self.cni(),
        );
        std::fs::write(self.served.path("containerd.toml"), config).expect("write");
        // A kubelet stats it (ImageFsInfo).
        std::fs::create_dir_all(self.served.path("cd/root/io.containerd.snapshotter.v1.fsprov")).expect("make");
        let log =
            std::fs::File::options().create(true).append(true).open(self.served.path("containerd.log")).expect("a log");
        let child = Command::new(self.theirs().join("usr/bin/containerd"))
            .arg("--config")
            .arg(self.served.path("containerd.toml"))
            .env("PATH", self.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("clone"))
            .stderr(log)
            .spawn()
            .expect("run containerd");
        self.containerd = Some(Running(child));
        let address = self.address();
        wait_for("containerd", || std::os::unix::net::UnixStream::connect(&address).is_ok());
        wait_for("its plugins", || self.ctr(&["plugins", "ls"]).contains("fsprov"));
    }

    fn try_ctr(&self, args: &[&str]) -> Result<String, String> {
        let said = Command::new(debian().join("usr/bin/ctr"))
            .arg("--address")
            .arg(self.address())
            .args(args)
            .env("PATH", path_with_theirs())
            .stdin(Stdio::null())
            .output()
            .expect("run ctr");
        let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
        if said.status.success() { Ok(text) } else { Err(text) }
    }

    fn ctr(&self, args: &[&str]) -> String {
        self.try_ctr(args).unwrap_or_else(|text| panic!("ctr {args:?}: {text}\n{}", self.log()))
    }

    fn log(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.served.path(name)).unwrap_or_default();
        let text = read("containerd.log");
        let last: Vec<&str> = text.lines().rev().take(30).collect();
        format!("{}\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"), read("log"))
    }

    fn push(&self, image: &Image, name: &str) -> String {
        let tar = self.served.path(&format!("{name}.archive"));
        let run = |command: &mut Command| {
            let said = command.output().expect("run");
            assert!(said.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said.stderr));
        };
        run(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&image.dir).arg("."));
        let to = format!("127.0.0.1:{}/{name}:1", self.port);
        run(Command::new("skopeo")
            .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("docker-archive:{}", tar.display()))
            .arg(format!("docker://{to}")));
        to
    }

    /// Blobs that were asked of the registry with GET since `from`.
    fn fetched(&self, from: usize) -> Vec<String> {
        let text = std::fs::read_to_string(self.served.path("registry.log")).unwrap_or_default();
        let is_blob = |line: &&str| line.contains("\"GET /v2/") && line.contains("/blobs/");
        text.lines().skip(from).filter(is_blob).map(str::to_owned).collect()
    }

    fn registry_lines(&self) -> usize {
        std::fs::read_to_string(self.served.path("registry.log")).unwrap_or_default().lines().count()
    }

    fn mounts(&self) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        table.lines().filter(|line| line.contains(&*self.served.path("").to_string_lossy())).count()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Containers of a test that failed go with their shims.
        if let Ok(all) = self.try_ctr(&["-n", "default", "task", "ls", "-q"]) {
            for id in all.split_whitespace() {
                let _ = self.try_ctr(&["-n", "default", "task", "rm", "-f", id]);
            }
        }
        self.containerd = None;
    }
}

/// Busybox, and layers above it, as many as `layers` together.
fn image(served: &Served, name: &str, layers: usize) -> Image {
    let busybox = std::fs::read(debian().join("bin/busybox")).expect("busybox");
    let tree = served.path(&format!("{name}-0.tree/bin"));
    std::fs::create_dir_all(&tree).expect("make");
    std::fs::write(tree.join("busybox"), busybox).expect("write");
    std::fs::set_permissions(tree.join("busybox"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    for link in ["sh", "sleep", "cat", "echo", "ls", "mv", "true", "id"] {
        let _ = std::os::unix::fs::symlink("busybox", tree.join(link));
    }
    let base: &[Entry<'_>] = &[
        Entry::File("etc/passwd", "root:x:0:0::/:/bin/sh\n"),
        Entry::Dir("proc", 0o755),
        Entry::Dir("sys", 0o755),
        Entry::Dir("dev", 0o755),
        Entry::Dir("tmp", 0o1777),
        Entry::Dir(".", 0o755),
    ];
    let texts: Vec<String> = (1..layers).map(|n| format!("{name} {n}")).collect();
    let names: Vec<String> = (1..layers).map(|n| format!("layers/{n}")).collect();
    let entries: Vec<[Entry<'_>; 2]> = names
        .iter()
        .zip(&texts)
        .map(|(name, text)| [Entry::File(name, text), Entry::File("layers/last", text)])
        .collect();
    let all: Vec<images::Layer<'_>> = std::iter::once(base).chain(entries.iter().map(|e| &e[..])).collect();
    images::make(served, name, &all)
}

fn ctr_pulls_runs_and_survives_a_kill() {
    let mut node = Node::new();
    let image = image(&node.served, "app", 4);
    let name = node.push(&image, "app");
    node.ctr(&["image", "pull", "--plain-http", "--snapshotter", "fsprov", &name]);
    let said =
        node.ctr(&["run", "--snapshotter", "fsprov", "--net-host", "--rm", &name, "once", "/bin/cat", "/layers/last"]);
    assert_eq!(said.trim(), "app 3");
    // It writes a line each moment, while the snapshotter is killed and comes again.
    let script = "n=0; while true; do n=$((n+1)); echo $n > /count; /bin/cat /layers/1 > /dev/null || exit 1; /bin/sleep 0.05; done";
    node.ctr(&["run", "--snapshotter", "fsprov", "--net-host", "-d", &name, "web", "/bin/sh", "-c", script]);
    let count = |node: &Node, id: &str| {
        let said = node.ctr(&["task", "exec", "--exec-id", id, "web", "/bin/cat", "/count"]);
        said.trim().parse::<u64>().unwrap_or(0)
    };
    wait_for("the container", || count(&node, "first") > 0);
    for round in 0..3 {
        let before = count(&node, &format!("before-{round}"));
        node.served.kill();
        std::thread::sleep(Duration::from_millis(500));
        assert!(count(&node, &format!("still-{round}")) > before, "it goes on");
        let new = node.try_ctr(&["run", "--snapshotter", "fsprov", "--net-host", "--rm", &name, "none", "/bin/true"]);
        assert!(new.is_err(), "a new one needs the snapshotter");
        node.served.start(&[]);
        wait_for("containerd to connect again", || {
            node.try_ctr(&["run", "--snapshotter", "fsprov", "--net-host", "--rm", &name, "again", "/bin/true"]).is_ok()
        });
    }
    node.ctr(&["task", "rm", "-f", "web"]);
    node.ctr(&["container", "rm", "web"]);
    node.ctr(&["image", "rm", "--sync", &name]);
    let client = node.served.client();
    wait_for("the collection of garbage", || client.names(&[]).is_empty());
    wait_for("the disk", || node.served.entries("s").is_empty() && node.served.entries("gone").is_empty());
    assert_eq!(node.mounts(), 0);
}

/// An image of ten layers and one to hold a pod, each in the registry and in the store.
fn with_two_images() -> (Node, [String; 2]) {
    let node = Node::new();
    let made = [image(&node.served, "app", 10), image(&node.served, "pause", 1)];
    let names = [node.push(&made[0], "app"), node.push(&made[1], "pause")];
    for one in &made {
        images::import(&node.served, one);
    }
    (node, names)
}

fn a_kubelet_pulls_what_the_store_has_without_a_byte_of_its_layers() {
    let (node, names) = with_two_images();
    let cri = Cri::new(&node.address());
    let from = node.registry_lines();
    for name in &names {
        cri.pull(name).unwrap_or_else(|e| panic!("pull {name}: {e}\n{}", node.log()));
    }
    // Each image's configuration, and no more.
    let fetched = node.fetched(from);
    assert_eq!(fetched.len(), 2, "{fetched:#?}");
    let client = node.served.client();
    assert_eq!(client.names(&["kind==committed"]).len(), 10, "the two have one in common");
    let config = cri::sandbox("web", &node.served.path("pods"));
    let pod = cri.run_sandbox(&config).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
    let container =
        cri.start(&pod, &config, &names[0], &["/bin/sleep", "1000"]).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
    assert_eq!(cri.exec(&container, &["/bin/cat", "/layers/last", "/layers/4"]).expect("exec"), "app 9app 4");
    cri.exec(&container, &["/bin/sh", "-c", "echo mine > /layers/last"]).expect("exec");
    let kept = node.served.fsprov().args(["image", "gc", "--unused"]).output().expect("run fsprov");
    assert!(kept.status.success() && images::layers_in_store(&node.served) == 10, "{kept:?}");
    cri.remove_sandbox(&pod).expect("remove the pod");
    for name in &names {
        cri.remove_image(name).expect("remove the image");
    }
    wait_for("the collection of garbage", || client.names(&[]).is_empty());
    wait_for("the disk", || node.served.entries("s").is_empty() && node.served.entries("gone").is_empty());
    assert_eq!(node.mounts(), 0);
    let gone = node.served.fsprov().args(["image", "gc", "--unused"]).output().expect("run fsprov");
    assert!(gone.status.success() && images::layers_in_store(&node.served) == 0, "{gone:?}");
}

fn pods_eight_at_a_time_leave_nothing() {
    let pods: usize = std::env::var("FSPROV_TEST_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let (node, names) = with_two_images();
    let cri = Cri::new(&node.address());
    for name in &names {
        cri.pull(name).expect("pull");
    }
    let client: Client = node.served.client();
    let before = client.names(&[]).len();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let (address, logs): (PathBuf, PathBuf) = (node.address(), node.served.path("pods"));
    let one = |cri: &Cri, number: usize, logs: &Path| -> Result<(), tonic::Status> {
        let config = cri::sandbox(&format!("pod-{number}"), logs);
        let pod = cri.run_sandbox(&config)?;
        let container = cri.start(&pod, &config, &names[0], &["/bin/sleep", "1000"])?;
        assert_eq!(cri.exec(&container, &["/bin/cat", "/layers/last"])?, "app 9");
        cri.remove_sandbox(&pod)
    };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cri = Cri::new(&address);
                loop {
                    let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if number >= pods {
                        return;
                    }
                    one(&cri, number, &logs).unwrap_or_else(|e| panic!("pod {number}: {e}\n{}", node.log()));
                }
            });
        }
    });
    wait_for("the collection of garbage", || client.names(&[]).len() == before);
    wait_for("the disk", || node.served.entries("s").len() == before && node.served.entries("gone").is_empty());
    assert_eq!(node.mounts(), 0);
}

/// Writes, reads back, reads the image, and says so in /count; what is not as it was ends it.
const WORK: &str = "n=0; while true; do n=$((n+1)); echo $n > /work; [ \"$(/bin/cat /work)\" = $n ] || exit 1; \
                    [ \"$(/bin/cat /layers/1)\" = 'app 1' ] || exit 2; echo $n > /tmp/c && /bin/mv /tmp/c /count || exit 3; /bin/sleep 0.02; done";

/// SIGKILL of the snapshotter, of containerd, of both; by FUSE also of the worker below the containers, and of all three. FSPROV_TEST_KILLS: how many.
fn kills_under_eight_containers_are_not_felt() {
    /// Of the snapshotter, of containerd, of the worker.
    const KILLS: [(bool, bool, bool); 5] =
        [(true, false, false), (false, true, false), (true, true, false), (false, false, true), (true, true, true)];
    let kills: usize = std::env::var("FSPROV_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let mut node = Node::new();
    let image = image(&node.served, "app", 4);
    let name = node.push(&image, "app");
    images::import(&node.served, &image);
    node.ctr(&["image", "pull", "--plain-http", "--snapshotter", "fsprov", &name]);
    for id in 0..8 {
        let id = format!("web-{id}");
        node.ctr(&["run", "--snapshotter", "fsprov", "--net-host", "-d", &name, &id, "/bin/sh", "-c", WORK]);
    }
    // Where a container's files are seen from outside.
    let seen = |node: &Node, id: usize| -> u64 {
        let at = node.served.path(&format!("cd/state/io.containerd.runtime.v2.task/default/web-{id}/rootfs/count"));
        std::fs::read_to_string(at).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    wait_for("the containers", || (0..8).all(|id| seen(&node, id) > 0));
    for round in 0..kills {
        let before: Vec<u64> = (0..8).map(|id| seen(&node, id)).collect();
        let (of_snapshotter, of_containerd, of_worker) = KILLS[round % if is_by_fuse() { 5 } else { 3 }];
        if of_worker {
            for name in node.served.fuse_mounts() {
                node.served.kill_worker(&name);
            }
        }
        if of_snapshotter {
            node.served.kill();
        }
        if of_containerd {
            node.containerd = None;
        }
        // Another container is being made while it happens.
        std::thread::sleep(Duration::from_millis(100 + (round as u64 * 37) % 200));
        if of_snapshotter {
            node.served.start(&[]);
        }
        if of_containerd {
            node.start_containerd();
        }
        wait_for("the containers to go on", || (0..8).all(|id| seen(&node, id) > before[id] + 1));
        let id = format!("new-{round}");
        wait_for("a new container", || {
            let _ = node.try_ctr(&["task", "rm", "-f", &id]);
            let _ = node.try_ctr(&["container", "rm", &id]);
            node.try_ctr(&["run", "--snapshotter", "fsprov", "--net-host", "--rm", &name, &id, "/bin/true"]).is_ok()
        });
    }
    let tasks = node.ctr(&["task", "ls"]);
    assert_eq!(tasks.matches("RUNNING").count(), 8, "{tasks}");
    for id in 0..8 {
        let id = format!("web-{id}");
        node.ctr(&["task", "rm", "-f", &id]);
        node.ctr(&["container", "rm", &id]);
    }
    node.ctr(&["image", "rm", "--sync", &name]);
    let client = node.served.client();
    wait_for("the collection of garbage", || client.names(&[]).is_empty());
    wait_for("the disk", || node.served.entries("s").is_empty() && node.served.entries("gone").is_empty());
    assert_eq!(node.mounts(), 0);
    println!("{kills} kills under 8 containers, by FUSE: {}", is_by_fuse());
}

/// From RunPodSandbox to the first line that the container wrote.
fn first_output(node: &Node, cri: &Cri, name: &str, from: &str) -> Duration {
    let config = cri::sandbox(name, &node.served.path("pods"));
    let begin = Instant::now();
    let pod = cri.run_sandbox(&config).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
    cri.start(&pod, &config, from, &["/bin/echo", "out"]).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
    let log = node.served.path(&format!("pods/{name}/main.log"));
    while std::fs::metadata(&log).map_or(0, |meta| meta.len()) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(30), "no output");
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = begin.elapsed();
    // containerd 1.6 says so of a container that ends by itself just now.
    if let Err(error) = cri.remove_sandbox(&pod) {
        assert!(error.message().contains("ttrpc: closed"), "remove the pod: {error}");
        cri.remove_sandbox(&pod).expect("remove the pod");
    }
    took
}

fn kib(paths: &[PathBuf]) -> u64 {
    let said = Command::new("du").args(["-sck"]).args(paths.iter().filter(|path| path.exists())).output().expect("du");
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.lines().last().and_then(|line| line.split_whitespace().next()?.parse().ok()).expect("a total")
}

/// Times beside containerd's own snapshotter, one after the other in each round. FSPROV_TEST_TIMES: how many rounds; without it there is nothing to do.
fn times_beside_overlayfs() {
    let Some(rounds) = std::env::var("FSPROV_TEST_TIMES").ok().and_then(|n| n.parse::<usize>().ok()) else { return };
    cover_run();
    let nodes = [Node::with("fsprov", Containerd::Old), Node::with("overlayfs", Containerd::Old)];
    // Some thousand files of a real tree, in the fourth layer of ten.
    let tree = debian().join("usr/share/gocode/src/github.com/containerd");
    let made = |node: &Node, name: &str| {
        let to = node.served.path(&format!("{name}-3.tree/src"));
        std::fs::create_dir_all(&to).expect("make");
        assert!(Command::new("cp").arg("-a").arg(&tree).arg(&to).status().expect("cp").success());
        let image = image(&node.served, name, 10);
        node.push(&image, name)
    };
    let mut runs = [Vec::new(), Vec::new()];
    let mut pulls = [Vec::new(), Vec::new()];
    let mut names = Vec::new();
    for node in &nodes {
        let pause = image(&node.served, "pause", 1);
        node.push(&pause, "pause");
        names.push(made(node, "app"));
    }
    let cris: Vec<Cri> = nodes.iter().map(|node| Cri::new(&node.address())).collect();
    for round in 0..rounds {
        for turn in 0..2 {
            let at = (round + turn) % 2;
            let (node, cri, name) = (&nodes[at], &cris[at], &names[at]);
            let begin = Instant::now();
            cri.pull(name).expect("pull");
            let pulled = begin.elapsed();
            pulls[at].push(pulled + first_output(node, cri, &format!("first-{round}"), name));
            for again in 0..5 {
                runs[at].push(first_output(node, cri, &format!("run-{round}-{again}"), name));
            }
            if round + 1 < rounds {
                cri.remove_image(name).expect("remove the image");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    for (what, times) in [("RunPodSandbox to first output", &mut runs), ("pull, unpack and first output", &mut pulls)] {
        for all in times.iter_mut() {
            all.sort();
        }
        let middle = |at: usize| times[at][times[at].len() / 2].as_secs_f64() * 1e3;
        let ends = |at: usize| format!("{:?} to {:?}", times[at][0], times[at][times[at].len() - 1]);
        println!(
            "{what}: fsprov {:.0} ms ({}), overlayfs {:.0} ms ({}), ratio {:.2}",
            middle(0),
            ends(0),
            middle(1),
            ends(1),
            middle(0) / middle(1)
        );
    }
    // How much of it was in calls of the snapshotter.
    let asked =
        nodes[0].served.fsprov().args(["snapshotter", "--metrics", "--socket"]).arg(nodes[0].served.socket()).output();
    let asked = asked.expect("run fsprov");
    for line in
        String::from_utf8_lossy(&asked.stdout).lines().filter(|line| line.contains("_total{") && !line.ends_with(" 0"))
    {
        println!("{line}");
    }
    // The image in fsprov's store, for `fsprov mount`, and with containerd.
    let sizes: Vec<u64> = nodes
        .iter()
        .zip(&cris)
        .zip(&names)
        .map(|((node, cri), name)| {
            // The pods' own image, too: it has a layer in common.
            for one in [name, &format!("127.0.0.1:{}/pause:1", node.port)] {
                cri.remove_image(one).expect("remove the image");
            }
            std::thread::sleep(Duration::from_secs(2));
            node.served.client().cleanup().expect("clean up");
            let done = node.served.fsprov().args(["image", "import"]).arg(node.served.path("app")).status();
            assert!(done.expect("import").success());
            cri.pull(name).expect("pull");
            kib(&[node.served.path("root"), node.served.path("cd/root")])
        })
        .collect();
    println!(
        "disk: {} KiB with fsprov, {} KiB with overlayfs, ratio {:.2}",
        sizes[0],
        sizes[1],
        sizes[0] as f64 / sizes[1] as f64
    );
    println!("load at the end: {}", load.trim());
}

/// Pods with `hostUsers: false`: by fsprov's capability, and as containerd does it without, by a copy with other owners.
fn pods_with_user_namespaces_copy_nothing() {
    let Some(newer) = std::env::var_os(NEWER).map(PathBuf::from) else { return };
    cover_run();
    let used = |node: &Node| {
        let own: Vec<PathBuf> = ["layers", "snapshotter/s"].map(|name| node.served.path("root").join(name)).into();
        kib(&own)
    };
    let mut told = Vec::new();
    for can_remap in [true, false] {
        let node = Node::with("fsprov", Containerd::New(newer.clone(), can_remap));
        // Some thousand files, which a copy has to copy.
        let tree = node.served.path("app-3.tree/src");
        std::fs::create_dir_all(&tree).expect("make");
        let from = debian().join("usr/share/gocode/src/github.com/containerd");
        assert!(Command::new("cp").arg("-a").arg(&from).arg(&tree).status().expect("cp").success());
        let made = [image(&node.served, "app", 10), image(&node.served, "pause", 1)];
        let names = [node.push(&made[0], "app"), node.push(&made[1], "pause")];
        for one in &made {
            images::import(&node.served, one);
        }
        let cri = Cri::new(&node.address());
        for name in &names {
            cri.pull(name).unwrap_or_else(|e| panic!("pull {name}: {e}\n{}", node.log()));
        }
        let before = used(&node);
        let (mut took, mut pods) = (Vec::new(), Vec::new());
        for number in 0..3_u32 {
            let first = 200_000 + number * 65_536;
            let name = format!("pod-{number}");
            let config = cri::sandbox_of_users(&name, &node.served.path("pods"), first);
            let begin = Instant::now();
            let pod = cri.run_sandbox(&config).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
            pods.push(pod.clone());
            let script = "echo out; exec /bin/sleep 1000";
            let container = cri
                .start(&pod, &config, &names[0], &["/bin/sh", "-c", script])
                .unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
            let log = node.served.path(&format!("pods/{name}/main.log"));
            wait_for("output", || std::fs::metadata(&log).is_ok_and(|meta| meta.len() > 0));
            took.push(begin.elapsed());
            let exec = |words: &[&str]| cri.exec(&container, words).unwrap_or_else(|e| panic!("{e}\n{}", node.log()));
            let map = exec(&["/bin/cat", "/proc/self/uid_map"]);
            assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", &first.to_string(), "65536"]);
            // Owners are right inside, and what it writes has the host's ids of it.
            assert!(
                exec(&["/bin/ls", "-ln", "/layers/last"]).contains(" 0        0 "),
                "{}",
                exec(&["/bin/ls", "-ln", "/layers/last"])
            );
            assert_eq!(exec(&["/bin/cat", "/layers/last"]), "app 9");
            exec(&["/bin/sh", "-c", "echo mine > /layers/new && echo mine > /layers/last"]);
        }
        let grown = used(&node).saturating_sub(before);
        took.sort();
        told.push((can_remap, took[1], grown));
        let client = node.served.client();
        assert_eq!(client.names(&["kind==active"]).len(), 6, "{:?}", client.names(&[]));
        println!("remap-ids {can_remap}: time to first output {took:?}, {grown} KiB more on the disk for three pods");
        for pod in &pods {
            cri.remove_sandbox(pod).expect("remove the pod");
        }
        if can_remap {
            assert!(grown < 300, "nothing is copied: {grown} KiB");
        }
        drop(cri);
    }
}
