//! Who runs the program: `USER[:GROUP]`, looked up in the image's own /etc/passwd and /etc/group.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::sys::fs::{open_in_root, read_bounded};

/// Longest passwd or group file read; a machine of 10,000 users has about 1 MB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Ids as the image has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Further groups.
    pub(crate) groups: Vec<u32>,
    /// The home directory, where passwd has one.
    pub(crate) home: Option<String>,
}

/// What of the image is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    passwd: String,
    group: String,
}

impl Files {
    /// Of the rootfs that `root` is: links in it are followed within it.
    pub(crate) fn of(root: impl AsFd) -> Result<Self> {
        let read = |path: &str| match open_in_root(root.as_fd(), Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => {
                let bytes = read_bounded("read the image's", path, std::fs::File::from(file), MAX_FILE_BYTES)?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(String::new()),
            Err(e) => Err(Error::sys("open the image's", path, e)),
        };
        Ok(Files { passwd: read("etc/passwd")?, group: read("etc/group")? })
    }

    /// `USER[:GROUP]`, names or numbers; empty: root. A number need not be in the files, a name must.
    pub(crate) fn find(&self, text: &str) -> Result<Identity> {
        let (user, group) = text.split_once(':').map_or((text, ""), |(user, group)| (user, group));
        let user = if user.is_empty() { "0" } else { user };
        let entry = rows(&self.passwd).find(|row| row.first() == Some(&user)).or_else(|| {
            let by_number =
                |row: &Vec<&str>| row.get(2).is_some_and(|uid| number(uid).is_some() && number(uid) == number(user));
            rows(&self.passwd).find(by_number)
        });
        let (mut identity, name) = match (entry, number(user)) {
            (Some(row), _) => {
                let id = |n: usize| row.get(n).and_then(|text| number(text));
                let (Some(uid), Some(gid)) = (id(2), id(3)) else { return Err(not_found("user", user, "/etc/passwd")) };
                let home = row.get(5).filter(|home| home.starts_with('/')).map(|home| (*home).to_owned());
                (Identity { uid, gid, groups: Vec::new(), home }, row.first().copied().unwrap_or(""))
            }
            (None, Some(uid)) => (Identity { uid, ..Identity::default() }, ""),
            (None, None) => return Err(not_found("user", user, "/etc/passwd")),
        };
        if group.is_empty() {
            identity.groups = self.groups_of(name, identity.gid);
        } else {
            // As docker and podman: who names a group gets that one alone.
            identity.gid = self.group(group)?;
        }
        Ok(identity)
    }

    fn group(&self, text: &str) -> Result<u32> {
        let by_name = rows(&self.group).find(|row| row.first() == Some(&text));
        by_name
            .and_then(|row| number(row.get(2)?))
            .or_else(|| number(text))
            .ok_or_else(|| not_found("group", text, "/etc/group"))
    }

    fn groups_of(&self, name: &str, primary: u32) -> Vec<u32> {
        let is_member =
            |row: &Vec<&str>| !name.is_empty() && row.get(3).is_some_and(|all| all.split(',').any(|one| one == name));
        let mut groups: Vec<u32> = rows(&self.group).filter(is_member).filter_map(|row| number(row.get(2)?)).collect();
        groups.retain(|gid| *gid != primary);
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    // passwd(5) has 7 fields; an image's line of a million colons is not a million.
    text.lines().map(|line| line.trim().splitn(8, ':').collect())
}

/// 4294967295 means "no change" to setuid(2), and is not an id.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn not_found(what: &str, name: &str, file: &str) -> Error {
    Error::new(
        Kind::NotFound,
        format!("find {what}"),
        format!("{name:?}"),
        format!("the image's {file} does not have it"),
    )
    .hint("give a number, or a name that the image has: --user UID:GID")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_of_the_image() {
        let files = Files {
            passwd: "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34:w:/var/www:/bin/sh\n12:x:77:78::/n:/bin/sh\nodd\n"
                .into(),
            group: "root:x:0:\nwww:x:34:\nadm:x:4:www,root\ntty:x:5:other\nsame:x:34:www\n".into(),
        };
        for (text, uid, gid, groups, home) in [
            ("", 0, 0, &[4][..], Some("/root")),
            ("www", 33, 34, &[4], Some("/var/www")),
            ("33", 33, 34, &[4], Some("/var/www")),
            ("www:tty", 33, 5, &[], Some("/var/www")),
            ("www:99", 33, 99, &[], Some("/var/www")),
            ("1000", 1000, 0, &[], None),
            ("1000:1000", 1000, 1000, &[], None),
            // A name of digits goes before the number.
            ("12", 77, 78, &[], Some("/n")),
            (":adm", 0, 4, &[], Some("/root")),
        ] {
            let want = Identity { uid, gid, groups: groups.to_vec(), home: home.map(Into::into) };
            assert_eq!(files.find(text).unwrap(), want, "{text:?}");
        }
        for bad in ["nobody", "www:nogroup", "-1", "4294967295"] {
            let error = files.find(bad).unwrap_err();
            assert!(error.kind() == Kind::NotFound && error.to_string().contains("does not have it"), "{bad}: {error}");
        }
        assert_eq!(Files::default().find("").unwrap(), Identity::default(), "an image without passwd");
    }
}
