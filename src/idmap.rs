//! `--uid-map`, `--gid-map`, `--squash`: parse, validate, and find the user's subordinate ids.
//!
//! Parsing touches no environment; `auto` reads /etc/passwd, /etc/subuid and /etc/subgid (subuid(5)).

use std::path::Path;

use crate::error::{Error, Kind, Result, show};
use crate::plan::{IdRange, Ownership};
use crate::sys::fs::read_bounded;

/// Most ranges in one map: the kernel's limit for a user namespace since 4.15 (user_namespaces(7)).
const MAX_RANGES: usize = 340;
/// Longest /etc/subuid read; a machine of 100,000 users has about 3 MB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// One `--uid-map` or `--gid-map` argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapArg {
    /// `auto`: root of the image is the user, the rest come from the user's subordinate ids.
    Auto,
    /// `none`: ids are presented as they are in the image.
    None,
    /// `CONTAINER:HOST:COUNT`.
    Range(IdRange),
}

impl std::str::FromStr for MapArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "auto" {
            return Ok(MapArg::Auto);
        }
        if text == "none" {
            return Ok(MapArg::None);
        }
        let refuse = |why: &str| {
            Error::new(Kind::Usage, "read id map", format!("{text:?}"), why)
                .hint("write CONTAINER:HOST:COUNT in decimal, or auto, or none")
        };
        let numbers: Vec<u32> = text
            .split(':')
            .map(|n| n.parse().map_err(|_| refuse("it is not three whole numbers up to 4294967295")))
            .collect::<Result<_>>()?;
        let [inside, outside, count] = numbers[..] else {
            return Err(refuse("it is not three whole numbers"));
        };
        if count == 0 {
            return Err(refuse("the count is 0"));
        }
        // 4294967295 is (uid_t)-1, "no change" to chown(2), and never an id.
        if [inside, outside].iter().any(|first| first.checked_add(count).is_none()) {
            return Err(refuse("it reaches past 4294967294"));
        }
        Ok(MapArg::Range(IdRange { inside, outside, count }))
    }
}

/// Read `UID:GID` of `--squash`.
pub fn parse_squash(text: &str) -> Result<(u32, u32)> {
    let ids = text.split_once(':').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
    ids.filter(|&(u, g)| u != u32::MAX && g != u32::MAX).ok_or_else(|| {
        Error::new(Kind::Usage, "read ids", format!("{text:?}"), "write UID:GID in decimal, for example 1000:1000")
    })
}

/// Where the ids of a user are written down.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// /etc/passwd: login names.
    pub passwd: &'a Path,
    /// /etc/subuid.
    pub subuid: &'a Path,
    /// /etc/subgid.
    pub subgid: &'a Path,
}

impl Files<'_> {
    /// Those of this host.
    pub fn of_host() -> Files<'static> {
        Files { passwd: Path::new("/etc/passwd"), subuid: Path::new("/etc/subuid"), subgid: Path::new("/etc/subgid") }
    }
}

/// Put the arguments together: ranges as written; `auto` looked up for the user and group `user`. `None`: nothing was said.
pub fn ownership(
    uid_args: &[MapArg],
    gid_args: &[MapArg],
    squash: Option<(u32, u32)>,
    user: (u32, u32),
    files: Files<'_>,
) -> Result<Option<Ownership>> {
    if squash.is_none() && uid_args.is_empty() && gid_args.is_empty() {
        return Ok(None);
    }
    if squash.is_some() && !(uid_args.is_empty() && gid_args.is_empty()) {
        return Err(Error::new(
            Kind::Usage,
            "read id map",
            "",
            "--squash and a map exclude one another; leave one of them out",
        ));
    }
    // One of them alone would leave the image's own ids on the other side.
    let (uid_args, gid_args) = match (uid_args, gid_args) {
        ([MapArg::Auto], []) | ([], [MapArg::Auto]) => (&[MapArg::Auto][..], &[MapArg::Auto][..]),
        both => both,
    };
    Ok(Some(Ownership {
        uids: ranges("--uid-map", uid_args, || auto(user.0, user.0, files.subuid, files))?,
        gids: ranges("--gid-map", gid_args, || auto(user.0, user.1, files.subgid, files))?,
        squash,
    }))
}

/// What an ordinary user gets who says nothing: as `auto`, with the user's own ids alone where there are no others.
pub fn usual(user: (u32, u32), files: Files<'_>) -> Result<Ownership> {
    let name = login_name(user.0, &read_if_there(files.passwd)?);
    let ids = |own, file| {
        let mut all = vec![IdRange { inside: 0, outside: own, count: 1 }];
        all.extend(subordinate(user.0, name.as_deref(), &read_if_there(file)?));
        Ok::<_, Error>(all)
    };
    Ok(Ownership { uids: ids(user.0, files.subuid)?, gids: ids(user.1, files.subgid)?, squash: None })
}

/// What that file gives to a name that need be no user's.
pub(crate) fn subordinate_of(name: &str, file: &Path) -> Result<Vec<IdRange>> {
    Ok(subordinate(u32::MAX, Some(name), &read_if_there(file)?))
}

fn ranges(flag: &str, args: &[MapArg], auto: impl FnOnce() -> Result<Vec<IdRange>>) -> Result<Vec<IdRange>> {
    let refuse = |why: &'static str| Error::new(Kind::Usage, "read", flag, why);
    let mut ranges = match args {
        [MapArg::Auto] => return auto(),
        [MapArg::None] => return Ok(Vec::new()),
        all => all
            .iter()
            .map(|arg| match arg {
                MapArg::Range(range) => Ok(*range),
                MapArg::Auto | MapArg::None => {
                    Err(refuse("auto and none cannot be combined with ranges; give one of them alone"))
                }
            })
            .collect::<Result<Vec<_>>>()?,
    };
    if ranges.len() > MAX_RANGES {
        return Err(refuse("the kernel takes at most 340 ranges"));
    }
    for first in [|r: &IdRange| r.inside, |r: &IdRange| r.outside] {
        ranges.sort_by_key(first);
        if ranges.windows(2).any(|pair| first(&pair[0]) + pair[0].count > first(&pair[1])) {
            return Err(refuse("two ranges overlap; make them disjoint"));
        }
    }
    ranges.sort_by_key(|r| r.inside);
    Ok(ranges)
}

/// Container id 0 is `own`; the rest are subordinate ids.
fn auto(uid: u32, own: u32, file: &Path, files: Files<'_>) -> Result<Vec<IdRange>> {
    let name = login_name(uid, &read(files.passwd)?);
    let text = read(file)?;
    let mut all = vec![IdRange { inside: 0, outside: own, count: 1 }];
    all.extend(subordinate(uid, name.as_deref(), &text));
    if all.len() > 1 {
        return Ok(all);
    }
    let name = name.unwrap_or_else(|| uid.to_string());
    let free = first_free(&[&read_if_there(files.subuid)?, &read_if_there(files.subgid)?]);
    let range = format!("{free}-{}", free.saturating_add(SHARE - 1));
    Err(Error::new(Kind::NotFound, "find subordinate ids of", &name, format!("{} has none for this user", show(file)))
        .hint(format!("as root: usermod --add-subuids {range} --add-subgids {range} {name}; or use --uid-map none")))
}

/// Container ids 1 and up are the subordinate ids of user `uid`, in the order of the file, as podman and newuidmap(1) users arrange
/// them.
fn subordinate(uid: u32, name: Option<&str>, text: &str) -> Vec<IdRange> {
    let mut next = 1_u32;
    let mut all = Vec::new();
    for line in text.lines() {
        let fields: Vec<_> = line.split(':').collect();
        let [owner, first, count] = fields[..] else { continue };
        if Some(owner) != name && owner.parse() != Ok(uid) {
            continue;
        }
        if let (Ok(outside), Ok(count @ 1..)) = (first.parse(), count.parse::<u32>()) {
            all.push(IdRange { inside: next, outside, count });
            next = next.saturating_add(count);
        }
    }
    all
}

/// How many ids one user is given (SUB_UID_COUNT of login.defs(5)), and where they begin (SUB_UID_MIN).
const SHARE: u32 = 65_536;
const FIRST: u32 = 100_000;

/// The first id beyond all that subuid(5) and subgid(5) give to somebody.
fn first_free(texts: &[&str]) -> u32 {
    let end = |line: &str| {
        let mut numbers = line.split(':').skip(1).map(|n| n.parse::<u32>().ok());
        numbers.next()??.checked_add(numbers.next()??)
    };
    texts.iter().flat_map(|text| text.lines()).filter_map(end).max().unwrap_or(0).max(FIRST)
}

fn login_name(uid: u32, passwd: &str) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// As [`read`]; nothing where there is no such file.
fn read_if_there(path: &Path) -> Result<String> {
    match read(path) {
        Err(e) if e.kind() == Kind::NotFound => Ok(String::new()),
        other => other,
    }
}

fn read(path: &Path) -> Result<String> {
    const OP: &str = "read";
    let file = std::fs::File::open(path).map_err(|e| Error::io(OP, show(path), e))?;
    let bytes = read_bounded(OP, show(path), file, MAX_FILE_BYTES)?;
    String::from_utf8(bytes).map_err(|e| Error::new(Kind::Invalid, OP, show(path), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(args: &[&str]) -> Result<Vec<IdRange>> {
        let args: Vec<MapArg> = args.iter().map(|a| a.parse()).collect::<Result<_>>()?;
        ranges("--uid-map", &args, || unreachable!("no auto here"))
    }

    #[test]
    fn grammar_and_overlaps() {
        assert_eq!(
            map(&["1:100000:65535", "0:1000:1"]).unwrap(),
            [IdRange { inside: 0, outside: 1000, count: 1 }, IdRange { inside: 1, outside: 100_000, count: 65_535 }]
        );
        for bad in [
            &["0:0"][..],
            &["0:0:0"],
            &["0:0:-1"],
            &["a:b:c"],
            &["0:0:1:2"],
            &["1:0:4294967295"],
            &["0:10:5", "4:100:1"],
            &["0:10:5", "10:14:1"],
            &["auto", "0:0:1"],
        ] {
            assert_eq!(map(bad).map_err(|e| e.kind()), Err(Kind::Usage), "{bad:?}");
        }
        assert_eq!(parse_squash("1:2").unwrap(), (1, 2));
        assert!(parse_squash("1").is_err() && parse_squash("1:-1").is_err() && parse_squash("1:4294967295").is_err());
    }

    #[test]
    fn auto_takes_every_range_of_the_user_by_name_or_number() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let passwd = write("passwd", "root:x:0:0::/:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n");
        let subuid = write("subuid", "bob:1:5\nann:100000:65536\n1000:300000:10\n# odd\nann:x:y\n");
        let subgid = write("subgid", "bob:1:5\nann:7:3\n");
        let files = Files { passwd: &passwd, subuid: &subuid, subgid: &subgid };
        let found = ownership(&[MapArg::Auto], &[], None, (1000, 50), files).unwrap().unwrap();
        assert_eq!(
            found.uids,
            [
                IdRange { inside: 0, outside: 1000, count: 1 },
                IdRange { inside: 1, outside: 100_000, count: 65_536 },
                IdRange { inside: 65_537, outside: 300_000, count: 10 },
            ]
        );
        let gids = [IdRange { inside: 0, outside: 50, count: 1 }, IdRange { inside: 1, outside: 7, count: 3 }];
        assert_eq!(found.gids, gids, "auto of one is auto of both");
        assert_eq!(ownership(&[], &[MapArg::Auto], None, (1000, 50), files).unwrap().as_ref(), Some(&found));
        assert_eq!(usual((1000, 50), files).unwrap(), found);
        let own = MapArg::Range(IdRange { inside: 0, outside: 50, count: 1 });
        assert_eq!(ownership(&[MapArg::Auto], &[own], None, (1000, 50), files).unwrap().unwrap().gids, gids[..1]);
        let none = Files { subgid: &write("none", "bob:200000:65536\n"), ..files };
        let usual = usual((1000, 50), none).unwrap();
        assert_eq!((usual.uids, &usual.gids[..]), (found.uids, &gids[..1]), "without an error");
        let none = ownership(&[], &[MapArg::Auto], None, (1000, 50), none).unwrap_err();
        assert_eq!(none.kind(), Kind::NotFound, "{none}");
        // The next range that is nobody's, in either file.
        assert!(
            none.to_string().contains("usermod --add-subuids 300010-365545 --add-subgids 300010-365545 ann"),
            "{none}"
        );
        assert_eq!(first_free(&["", "x:5:5"]), 100_000);
        assert_eq!(ownership(&[], &[], None, (1000, 50), files).unwrap(), None);
        assert_eq!(ownership(&[MapArg::None], &[], None, (1000, 50), files).unwrap(), Some(Ownership::default()));
        assert!(ownership(&[MapArg::Auto], &[], Some((0, 0)), (1000, 50), files).is_err());
    }
}
