//! Only what is served can be opened (landlock(7)).

use std::os::fd::AsFd as _;
use std::path::Path;

use landlock::{Access as _, AccessFs, RulesetError};

use super::super::sources::Sources;
use crate::plan::Plan;
use crate::volume::{Access, Form};
use crate::walls::files;

/// Only layers, changes and volumes can be opened from now on, volumes for writing where they are `rw`; and of the rest fusectl for reading,
/// for figures of connections. `false`: this kernel has no landlock that would do.
pub(super) fn restrict(plan: &Plan, sources: &Sources) -> Result<bool, RulesetError> {
    let all = AccessFs::from_all(files::KNOWN);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let of_file = AccessFs::from_file(files::KNOWN);
    let mut allowed: Vec<_> = sources.layers.iter().map(|layer| (layer.as_fd(), read)).collect();
    allowed.extend(sources.index.iter().map(|index| (index.as_fd(), AccessFs::ReadFile.into())));
    allowed.extend(sources.upper.iter().map(|upper| (upper.as_fd(), all & !AccessFs::Execute)));
    allowed.extend(plan.volumes.iter().zip(&sources.volumes).map(|(volume, source)| {
        let of_form = if volume.form == Form::Directory { all } else { of_file };
        let access = match volume.access {
            Access::Rw => of_form & !AccessFs::Execute,
            Access::Ro => of_form & read,
        };
        (source.as_fd(), access)
    }));
    // Nothing of /proc: descriptors in /proc/self/fd lead to what has a rule, or not.
    let connections = crate::sys::fs::open_path(Path::new("/sys/fs/fuse"));
    allowed.extend(connections.iter().map(|fd| (fd.as_fd(), read)));
    files::restrict(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_served_can_be_opened_and_only_rw_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["layer", "rw", "rw/sub", "ro", "secret"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("f"), "x").unwrap();
        }
        let open = |name: &str| crate::sys::fs::open_path(&path(name)).unwrap();
        let volumes = vec![open("rw"), open("ro")];
        let sources = Sources { layers: vec![open("layer")], index: None, upper: None, volumes, in_use: None };
        let volume = |name: &str, access| crate::volume::Volume {
            source: path(name),
            target: crate::volume::ContainerPath::new(format!("/{name}").as_ref()).unwrap(),
            access,
            form: Form::Directory,
            powers: crate::volume::Powers::default(),
        };
        let plan = Plan {
            volumes: vec![volume("rw", Access::Rw), volume("ro", Access::Ro)],
            ..Plan::new("a".parse().unwrap(), "/r".into(), "/s".into())
        };
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            if !files::is_offered() || !restrict(&plan, &sources).unwrap() {
                crate::lacks("landlock");
                return;
            }
            let refused = |result: std::io::Result<()>, what: &str| {
                let errno = result.unwrap_err().raw_os_error();
                assert_eq!(errno, Some(libc::EACCES), "{what}");
            };
            let root = dir.path();
            let path = |name: &str| root.join(name);
            for served in ["layer/f", "rw/f", "rw/sub/f", "ro/f"] {
                assert_eq!(std::fs::read(path(served)).unwrap(), b"x", "{served}");
            }
            refused(std::fs::read(path("secret/f")).map(drop), "read beside");
            refused(std::fs::write(path("secret/n"), "x"), "write beside");
            refused(std::fs::write(path("layer/f"), "y"), "write to a layer");
            refused(std::fs::write(path("ro/f"), "y"), "write to a ro volume");
            refused(std::fs::create_dir(path("ro/n")), "make in a ro volume");
            std::fs::write(path("rw/n"), "y").unwrap();
            std::fs::create_dir(path("rw/d")).unwrap();
            // Between directories, and through a descriptor's magic link, as the tree does.
            std::fs::rename(path("rw/n"), path("rw/d/n")).unwrap();
            let file = std::fs::File::open(path("rw/d/n")).unwrap();
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            rustix::fs::linkat(
                rustix::fs::CWD,
                &link,
                rustix::fs::CWD,
                path("rw/sub/l"),
                rustix::fs::AtFlags::SYMLINK_FOLLOW,
            )
            .unwrap();
            std::fs::File::options().write(true).open(link).unwrap();
            std::fs::remove_file(path("rw/sub/l")).unwrap();
            refused(std::fs::read("/proc/self/status").map(drop), "read of a process");
        })
        .join()
        .unwrap();
    }
}
