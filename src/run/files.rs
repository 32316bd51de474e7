//! The files that a container gets from who runs it: /etc/hosts, /etc/hostname, /etc/resolv.conf, /run/.containerenv.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use super::config::{Extra, Network};
use crate::error::{Error, Result};
use crate::sys::durable::replace_at;
use crate::sys::fs::read_bounded;

/// Longest file of the host that is taken over.
const MAX_BYTES: u64 = 1 << 20;

/// What they say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About<'a> {
    /// The host name inside.
    pub(crate) hostname: &'a str,
    /// The network inside.
    pub(crate) network: Network,
    /// The rootfs's id.
    pub(crate) id: &'a str,
    /// What was asked for as the image, and its id.
    pub(crate) image: &'a str,
    /// Its id, where it has one.
    pub(crate) image_id: &'a str,
    /// Is it run by a user other than root?
    pub(crate) is_rootless: bool,
}

/// Make them in `dir`, whose path is `shown`. Each is to be mounted at the path beside it, and everyone inside may read it.
pub(crate) fn write(dir: impl AsFd, shown: &Path, about: About<'_>) -> Result<Vec<Extra>> {
    let make = |name: &str, at: &str, text: &str| {
        let from: PathBuf = shown.join(name);
        replace_at(&dir, name, &from, text.as_bytes(), Some(Mode::from_raw_mode(0o644)))?;
        Ok::<_, Error>(Extra::File { at: at.to_owned(), from })
    };
    Ok(vec![
        make("hosts", "/etc/hosts", &hosts(&of_host("/etc/hosts", about.network), about.hostname))?,
        make("hostname", "/etc/hostname", &format!("{}\n", about.hostname))?,
        make("resolv.conf", "/etc/resolv.conf", &of_host("/etc/resolv.conf", about.network))?,
        make("containerenv", "/run/.containerenv", &containerenv(about))?,
    ])
}

/// What the host has there, for a container that shares its network. Empty where it has nothing that can be read.
fn of_host(path: &str, network: Network) -> String {
    if network == Network::None {
        return String::new();
    }
    let read = std::fs::File::open(path)
        .map_err(|e| Error::io("open", path, e))
        .and_then(|file| read_bounded("read", path, file, MAX_BYTES));
    match read {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) => {
            log::info!("{e}");
            String::new()
        }
    }
}

/// The host's names, and the container's own where they lack it.
fn hosts(host: &str, hostname: &str) -> String {
    let has = |name: &str| {
        let line =
            |line: &str| line.split('#').next().unwrap_or("").split_ascii_whitespace().skip(1).any(|word| word == name);
        host.lines().any(line)
    };
    let mut text = host.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    if !has("localhost") {
        text.push_str("127.0.0.1\tlocalhost\n::1\tlocalhost\n");
    }
    if !has(hostname) {
        text.extend(["127.0.1.1\t", hostname, "\n"]);
    }
    text
}

/// In podman's form (podman-run(1)): programs look for the file, and some read `rootless`.
fn containerenv(about: About<'_>) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        "engine={}\nname={}\nid={}\nimage={}\nimageid={}\nrootless={}\n",
        quoted(concat!("fsprov-", env!("CARGO_PKG_VERSION"))),
        quoted(about.id),
        quoted(about.id),
        quoted(about.image),
        quoted(about.image_id),
        u8::from(about.is_rootless)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_host_and_its_own() {
        assert_eq!(hosts("", "box"), "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\tbox\n");
        assert_eq!(hosts("127.0.0.1 localhost box # x", "box"), "127.0.0.1 localhost box # x\n");
        assert_eq!(hosts("127.0.0.1 localhost # box\n", "box"), "127.0.0.1 localhost # box\n127.0.1.1\tbox\n");
    }

    #[test]
    fn written_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let about = About {
            hostname: "h",
            network: Network::None,
            id: "web",
            image: "a\"b",
            image_id: "sha256-00",
            is_rootless: true,
        };
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "whole").unwrap();
        std::os::unix::fs::symlink("victim", dir.path().join("hosts")).unwrap();
        let files = write(std::fs::File::open(dir.path()).unwrap(), dir.path(), about).unwrap();
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "whole", "a link is replaced, and not followed");
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((read("hostname").as_str(), read("resolv.conf").as_str()), ("h\n", ""));
        let said = read("containerenv");
        assert!(said.contains("id=\"web\"\nimage=\"a\\\"b\"\n") && said.ends_with("rootless=1\n"), "{said}");
        let at: Vec<_> = files.iter().map(|f| if let Extra::File { at, .. } = f { at.as_str() } else { "" }).collect();
        assert_eq!(at, ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv"]);
    }
}
