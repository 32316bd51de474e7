//! What a user asks for, and what of it and of the image becomes the program: parsing and putting together, without a look at the host.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::config::{Extra, Network};
use crate::error::{Error, Kind, Result};
use crate::image::execution::Execution;

/// The capabilities of root in a container: podman's and containers-common's since 2022.
const USUAL_CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// What programs are looked for in where neither the image nor the user says.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a program needs to write where the rest is read-only (podman's `--read-only-tmpfs`).
const WRITABLE_DIRS: [&str; 3] = ["/run", "/tmp", "/var/tmp"];
/// As podman passes them on: a program inside is behind the same proxy.
const PROXIES: [&str; 8] =
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY"];

/// The user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum UserNs {
    /// Root is you, the other ids are your subordinate ids; for root: none of its own
    Host,
    /// You are yourself, and every other id one of your subordinate ids
    KeepId,
    /// Each run gets subordinate ids that no other run has, as many as the image needs
    Auto,
}

/// What a user asks of a program and its surroundings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Options {
    /// In place of the image's entry point; empty: none at all.
    pub(crate) entrypoint: Option<Vec<String>>,
    /// The program's arguments, or the program.
    pub(crate) command: Vec<String>,
    /// `NAME=VALUE`, or `NAME`: as it is here.
    pub(crate) environment: Vec<String>,
    /// In place of the image's.
    pub(crate) working_directory: Option<String>,
    /// In place of the image's.
    pub(crate) user: Option<String>,
    /// `PATH[:OPTION,...]`.
    pub(crate) tmpfs: Vec<String>,
    /// Is the rootfs read-only?
    pub(crate) read_only: bool,
    /// A terminal of its own?
    pub(crate) terminal: bool,
    /// Its host name.
    pub(crate) hostname: Option<String>,
    /// Its network; `None`: the host's.
    pub(crate) network: Option<Network>,
    /// Its user namespace; `None`: the host's.
    pub(crate) userns: Option<UserNs>,
    /// More capabilities.
    pub(crate) cap_add: Vec<String>,
    /// Less.
    pub(crate) cap_drop: Vec<String>,
    /// `none`, or a profile's path; `None`: the installed one.
    pub(crate) seccomp: Option<String>,
}

impl Options {
    /// The network.
    pub(crate) fn network(&self) -> Network {
        self.network.unwrap_or(Network::Host)
    }

    /// Program and arguments: as podman and docker put them together.
    pub(crate) fn args(&self, image: &Execution) -> Result<Vec<String>> {
        let (mut args, own) = match &self.entrypoint {
            // The image's command belongs to the image's entry point.
            Some(entrypoint) => (entrypoint.clone(), &[][..]),
            None => (image.entrypoint.clone(), &image.command[..]),
        };
        args.extend(if self.command.is_empty() { own } else { &self.command }.iter().cloned());
        if args.is_empty() {
            return Err(Error::new(Kind::Usage, "run", "", "the image names no program to run")
                .hint("give a command after the image: `fsprov run IMAGE sh`"));
        }
        Ok(args)
    }

    /// The environment: the usual, then the image's, then what was asked for; each name once, the last value counts. `here` is this process's.
    pub(crate) fn environment(
        &self,
        image: &Execution,
        home: &str,
        hostname: &str,
        here: impl Fn(&str) -> Option<String>,
    ) -> Vec<String> {
        let mut all: Vec<(String, String)> = Vec::new();
        let mut set = |name: &str, value: String| match all.iter_mut().find(|(have, _)| have == name) {
            Some((_, old)) => *old = value,
            None => all.push((name.to_owned(), value)),
        };
        set("PATH", PATH.to_owned());
        set("container", "fsprov".to_owned());
        if self.terminal {
            set("TERM", "xterm".to_owned());
        }
        for name in PROXIES {
            if let Some(value) = here(name) {
                set(name, value);
            }
        }
        let mut has_home = false;
        for pair in &image.environment {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            has_home |= name == "HOME";
            set(name, value.to_owned());
        }
        for pair in &self.environment {
            match pair.split_once('=') {
                Some((name, value)) => {
                    has_home |= name == "HOME";
                    set(name, value.to_owned());
                }
                None => {
                    if let Some(value) = here(pair) {
                        has_home |= pair == "HOME";
                        set(pair, value);
                    }
                }
            }
        }
        if !has_home {
            set("HOME", home.to_owned());
        }
        if !all.iter().any(|(name, _)| name == "HOSTNAME") {
            all.push(("HOSTNAME".to_owned(), hostname.to_owned()));
        }
        all.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// Where the program begins.
    pub(crate) fn working_directory(&self, image: &Execution) -> Result<String> {
        let dir =
            self.working_directory.clone().or_else(|| image.working_directory.clone()).unwrap_or_else(|| "/".into());
        if dir.starts_with('/') {
            return Ok(dir);
        }
        if self.working_directory.is_some() {
            return Err(Error::new(Kind::Usage, "read --workdir", &dir, "it must be an absolute path in the image"));
        }
        Ok(format!("/{dir}"))
    }

    /// The bounding set.
    pub(crate) fn capabilities(&self) -> Result<BTreeSet<String>> {
        let mut all: BTreeSet<String> = USUAL_CAPABILITIES.map(Into::into).into();
        let (add, drop) = (capability_names(&self.cap_add)?, capability_names(&self.cap_drop)?);
        if drop.contains("ALL") {
            all.clear();
        }
        if add.contains("ALL") {
            all = every_capability();
        }
        all.retain(|one| !drop.contains(one));
        all.extend(add.into_iter().filter(|one| one != "ALL"));
        Ok(all)
    }

    /// Those that were asked for by name: a user other than root has them as well.
    pub(crate) fn ambient(&self) -> Result<BTreeSet<String>> {
        Ok(capability_names(&self.cap_add)?.into_iter().filter(|one| one != "ALL").collect())
    }

    /// The tmpfs that were asked for, and those without which little runs on a read-only rootfs. `resolve` says where a path leads, and
    /// `volumes` are where the volumes' do.
    pub(crate) fn tmpfs(
        &self,
        image: &Execution,
        resolve: impl Fn(&str) -> PathBuf,
        volumes: &[PathBuf],
    ) -> Result<Vec<Extra>> {
        let mut all: Vec<(PathBuf, Extra)> = Vec::new();
        for text in &self.tmpfs {
            let (at, options) = text.split_once(':').unwrap_or((text, ""));
            if !at.starts_with('/') || at.split('/').any(|part| part == "..") || at == "/" {
                return Err(Error::new(Kind::Usage, "read --tmpfs", text, "it must be an absolute path in the image")
                    .hint("write PATH[:OPTION,...], for example /tmp:size=64m"));
            }
            let place = resolve(at);
            if volumes.contains(&place) {
                return Err(Error::new(Kind::Usage, "mount tmpfs", at, "a volume is to be mounted there, too")
                    .hint("leave out this --tmpfs, or that -v"));
            }
            let one = tmpfs(at, &place, options.split(',').filter(|option| !option.is_empty()));
            all.push((place, one));
        }
        if self.read_only {
            let usual = WRITABLE_DIRS.iter().copied().chain(image.volumes.iter().map(String::as_str));
            for at in usual {
                let place = resolve(at);
                let is_taken = volumes.contains(&place) || all.iter().any(|(taken, _)| *taken == place);
                if at.starts_with('/') && place != Path::new("/") && !is_taken {
                    let one = tmpfs(at, &place, std::iter::empty());
                    all.push((place, one));
                }
            }
        }
        Ok(all.into_iter().map(|(_, one)| one).collect())
    }
}

/// The option of a tmpfs that begins with what the image has there.
pub(super) const COPY_UP: &str = "tmpcopyup";

/// With what the image has there, as podman's. Mounted where the path leads, so that it and what lies below come in their order.
fn tmpfs<'a>(at: &str, place: &Path, options: impl Iterator<Item = &'a str>) -> Extra {
    let mut all: Vec<String> = ["rprivate", "nosuid", "nodev", COPY_UP].map(Into::into).into();
    for option in options {
        let opposite = match option {
            "suid" => "nosuid",
            "dev" => "nodev",
            "notmpcopyup" => COPY_UP,
            _ => "",
        };
        all.retain(|have| have != opposite && have != option);
        if option != "notmpcopyup" {
            all.push(option.to_owned());
        }
    }
    let place = place.to_str().filter(|place| *place != "/").unwrap_or(at);
    Extra::Tmpfs { at: place.trim_end_matches('/').to_owned(), options: all }
}

/// `chown`, `CAP_CHOWN`, `all`: in the kernel's form. `ALL` stays.
fn capability_names(given: &[String]) -> Result<BTreeSet<String>> {
    let known = every_capability();
    let read = |text: &String| {
        let upper = text.to_ascii_uppercase();
        if upper == "ALL" {
            return Ok(upper);
        }
        let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        if known.contains(&name) {
            return Ok(name);
        }
        Err(Error::new(Kind::Usage, "read capability", text, "Linux has no such capability")
            .hint("capabilities(7) lists them; `all` means every one"))
    };
    given.iter().flat_map(|text| text.split(',')).map(|text| read(&text.to_owned())).collect()
}

/// All that the specification's runtimes know, in the kernel's order (capability.h), and that this process may give: in a container or a
/// virtual machine its root may lack some.
fn every_capability() -> BTreeSet<String> {
    const NAMES: &str = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE \
         NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE \
         SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM \
         BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE";
    let may_be_given = |&(number, _): &(usize, &str)| {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // One that this kernel does not know is EINVAL.
        rustix::thread::capability_is_in_bounding_set(one).unwrap_or(false)
    };
    NAMES.split_ascii_whitespace().enumerate().filter(may_be_given).map(|(_, name)| format!("CAP_{name}")).collect()
}

/// `--entrypoint`: a program, or a JSON list of one with arguments; empty: none.
pub(crate) fn entrypoint(text: &str) -> Result<Vec<String>> {
    if text.starts_with('[') {
        return serde_json::from_str(text).map_err(|e| {
            Error::new(Kind::Usage, "read --entrypoint", text, e).hint("write a program, or a list: '[\"sh\", \"-c\"]'")
        });
    }
    Ok(if text.is_empty() { Vec::new() } else { vec![text.to_owned()] })
}

/// The lines of an `--env-file`, as podman and docker read it: `NAME=VALUE`, `NAME`, `# comment`.
pub(crate) fn env_file(text: &str, shown: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        check_environment(line).map_err(|e| e.within("read --env-file", format!("{shown}, line {}", number + 1)))?;
        all.push(line.to_owned());
    }
    Ok(all)
}

/// `NAME=VALUE` or `NAME`.
pub(crate) fn check_environment(pair: &str) -> Result<()> {
    let name = pair.split('=').next().unwrap_or("");
    if name.is_empty() || name.contains(char::is_whitespace) || pair.contains('\0') {
        return Err(Error::new(
            Kind::Usage,
            "read environment",
            format!("{pair:?}"),
            "the name is empty or has a space in it",
        )
        .hint("write NAME=VALUE, or NAME for the value that it has here"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    /// The image's entry point and command, --entrypoint, arguments: what runs.
    type Row<'a> = (&'a [&'a str], &'a [&'a str], Option<&'a str>, &'a [&'a str], &'a [&'a str]);

    #[test]
    fn entry_point_command_and_arguments() {
        let image = |entrypoint: &[&str], command: &[&str]| Execution {
            entrypoint: strings(entrypoint),
            command: strings(command),
            ..Execution::default()
        };
        let table: &[Row<'_>] = &[
            (&[], &["sh"], None, &[], &["sh"]),
            (&[], &["sh"], None, &["id", "-u"], &["id", "-u"]),
            (&["/e"], &["a"], None, &[], &["/e", "a"]),
            (&["/e"], &["a"], None, &["b"], &["/e", "b"]),
            (&["/e"], &["a"], Some("/f"), &[], &["/f"]),
            (&["/e"], &["a"], Some("/f"), &["b"], &["/f", "b"]),
            (&["/e"], &["a"], Some(""), &["b"], &["b"]),
            (&["/e"], &[], Some(r#"["sh", "-c"]"#), &["id"], &["sh", "-c", "id"]),
        ];
        for (own, command, said, args, want) in table {
            let entrypoint = said.map(|text| entrypoint(text).unwrap());
            let options = Options { entrypoint, command: strings(args), ..Options::default() };
            assert_eq!(
                options.args(&image(own, command)).unwrap(),
                strings(want),
                "{own:?} {command:?} {said:?} {args:?}"
            );
        }
        assert_eq!(Options::default().args(&image(&[], &[])).unwrap_err().kind(), Kind::Usage);
        assert!(entrypoint("[1]").is_err());
    }

    #[test]
    fn the_last_value_of_a_name_counts() {
        let image = Execution { environment: strings(&["PATH=/i", "A=1", "E"]), ..Execution::default() };
        let options =
            Options { environment: strings(&["A=2", "B", "NOT", "C="]), terminal: true, ..Options::default() };
        let here = |name: &str| match name {
            "B" => Some("b".to_owned()),
            "http_proxy" => Some("http://p".to_owned()),
            _ => None,
        };
        let got = options.environment(&image, "/root", "h", here);
        let want = [
            "PATH=/i",
            "container=fsprov",
            "TERM=xterm",
            "http_proxy=http://p",
            "A=2",
            "E=",
            "B=b",
            "C=",
            "HOME=/root",
            "HOSTNAME=h",
        ];
        assert_eq!(got, want);
        let said = Options { environment: strings(&["HOME=/x", "HOSTNAME=y"]), ..Options::default() };
        let got = said.environment(&Execution::default(), "/root", "h", |_| None);
        assert_eq!(got, [&format!("PATH={PATH}"), "container=fsprov", "HOME=/x", "HOSTNAME=y"]);
    }

    #[test]
    fn files_of_environment() {
        assert_eq!(env_file("# c\n\nA=1\n  B = \n", "f").map_err(|e| e.kind()), Err(Kind::Usage));
        assert_eq!(env_file("# c\n\nA=1 # no comment\nB\n", "f").unwrap(), ["A=1 # no comment", "B"]);
        let error = env_file("A=1\n=x\n", "f").unwrap_err().to_string();
        assert!(error.contains("f, line 2"), "{error}");
    }

    #[test]
    fn capabilities_more_and_less() {
        let caps = |add: &[&str], drop: &[&str]| {
            Options { cap_add: strings(add), cap_drop: strings(drop), ..Options::default() }.capabilities()
        };
        let usual = caps(&[], &[]).unwrap();
        assert_eq!(usual.len(), 11);
        assert!(!usual.contains("CAP_SYS_ADMIN") && !usual.contains("CAP_MKNOD"));
        let more = caps(&["net_raw", "CAP_SYS_ADMIN"], &["chown"]).unwrap();
        assert!(more.contains("CAP_NET_RAW") && more.contains("CAP_SYS_ADMIN") && !more.contains("CAP_CHOWN"));
        assert_eq!(caps(&["kill"], &["all"]).unwrap(), ["CAP_KILL".to_owned()].into());
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
        let bounding = u64::from_str_radix(bounding, 16).unwrap();
        assert_eq!(caps(&["ALL"], &[]).unwrap().len(), bounding.count_ones() as usize);
        assert_eq!(caps(&["ALL"], &[]).unwrap().contains("CAP_SYS_RESOURCE"), bounding & 1 << 24 != 0);
        assert_eq!(caps(&["all"], &["kill,chown"]).unwrap().len() as u32, (bounding & !(1 << 5 | 1)).count_ones());
        let error = caps(&["root"], &[]).unwrap_err();
        assert!(error.kind() == Kind::Usage && error.to_string().contains("no such capability"), "{error}");
        let ambient = Options { cap_add: strings(&["all", "kill"]), ..Options::default() }.ambient().unwrap();
        assert_eq!(ambient, ["CAP_KILL".to_owned()].into());
    }

    #[test]
    fn where_a_tmpfs_is() {
        let image = Execution { volumes: strings(&["/data", "/tmp", "/var/tmp/"]), ..Execution::default() };
        let resolve = |at: &str| PathBuf::from(if at == "/var/run" { "/run" } else { at });
        let places = |options: &Options| -> Vec<String> {
            let all = options.tmpfs(&image, resolve, &["/data".into()]).unwrap();
            all.into_iter()
                .map(|extra| match extra {
                    Extra::Tmpfs { at, options } => format!("{at}:{}", options.join(",")),
                    _ => unreachable!(),
                })
                .collect()
        };
        let options = Options { tmpfs: strings(&["/tmp:size=1m,suid", "/x/"]), ..Options::default() };
        assert_eq!(
            places(&options),
            ["/tmp:rprivate,nodev,tmpcopyup,size=1m,suid", "/x:rprivate,nosuid,nodev,tmpcopyup"]
        );
        let read_only = Options { read_only: true, ..options };
        let at: Vec<_> =
            places(&read_only).into_iter().map(|text| text.split(':').next().unwrap().to_owned()).collect();
        assert_eq!(at, ["/tmp", "/x", "/run", "/var/tmp"]);
        let slash = Options { tmpfs: strings(&["/tmp/:size=1m", "/var/run"]), read_only: true, ..Options::default() };
        let usual = "rprivate,nosuid,nodev,tmpcopyup";
        assert_eq!(
            places(&slash),
            [format!("/tmp:{usual},size=1m"), format!("/run:{usual}"), format!("/var/tmp:{usual}")]
        );
        for bad in ["tmp", "/", "/a/../b"] {
            let options = Options { tmpfs: strings(&[bad]), ..Options::default() };
            assert_eq!(options.tmpfs(&image, resolve, &[]).map_err(|e| e.kind()).err(), Some(Kind::Usage), "{bad}");
        }
        let both = Options { tmpfs: strings(&["/data/"]), ..Options::default() };
        let error = both.tmpfs(&image, resolve, &["/data".into()]).unwrap_err();
        assert!(error.kind() == Kind::Usage && error.remedy().contains("-v"), "{error}");
    }

    #[test]
    fn where_it_begins() {
        let image = Execution { working_directory: Some("srv".into()), ..Execution::default() };
        assert_eq!(Options::default().working_directory(&image).unwrap(), "/srv");
        assert_eq!(Options::default().working_directory(&Execution::default()).unwrap(), "/");
        let said =
            |dir: &str| Options { working_directory: Some(dir.into()), ..Options::default() }.working_directory(&image);
        assert_eq!(said("/w").unwrap(), "/w");
        assert_eq!(said("w").unwrap_err().kind(), Kind::Usage);
    }
}
