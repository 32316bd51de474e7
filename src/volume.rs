//! Volumes, as they are written and as a plan has them. A volume routes one path of the rootfs to a host path.
//!
//! Nothing here touches the host. Nothing knows images: where the target lies inside one is found by the backend, inside the root.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Kind, Result, show};

/// Longest container path taken: PATH_MAX of Linux, less the terminating NUL (limits.h).
pub const MAX_TARGET_LEN: usize = 4095;
/// Longest component of a container path: NAME_MAX of Linux.
pub const MAX_NAME_LEN: usize = 255;
/// Most volumes in one rootfs: the route table tags node ids with one byte.
pub const MAX_VOLUMES: usize = 200;
/// How a volume is written, for help and errors.
pub const GRAMMAR: &str = "SRC:DST[:OPTION,...]";
/// Every option of a volume and what it does, for help and errors.
pub const OPTIONS: &[(&str, &str)] = &[
    ("ro", "read-only"),
    ("rw", "writable (the default)"),
    ("copy", "a SRC that is missing or an empty directory is filled once with what the image has at DST"),
    ("exec", "programs in it can be run (the default)"),
    ("noexec", "they cannot"),
    ("suid", "setuid and setgid bits and file capabilities work"),
    ("nosuid", "they do not (the default)"),
    ("dev", "device nodes work"),
    ("nodev", "they do not (the default, unless SRC itself is one)"),
];

/// The names of all options, as a sentence has them.
fn option_names() -> String {
    OPTIONS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// The paragraph on volumes in the help of `fsprov mount`.
pub fn help() -> String {
    let options: Vec<_> = OPTIONS.iter().map(|(name, what)| format!("{name}: {what}")).collect();
    format!(
        "Volumes: {GRAMMAR}. A SRC that begins with / is absolute, one that begins with . is relative to the current directory; both must \
         exist, except with `copy`. Any other SRC lies below --sandbox and is made if missing. DST is absolute, inside the rootfs. \
         Write `\\:` for a colon in a path. Options: {}.",
        options.join("; ")
    )
}

/// An absolute path inside the rootfs with no `.`, `..`, empty component or NUL. Never `/` itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ContainerPath(#[serde(with = "crate::pathtext")] PathBuf);

impl ContainerPath {
    /// Validate. A trailing slash is dropped; `.` and `..` are refused, not folded: symlinks would make folding wrong.
    pub fn new(path: &OsStr) -> Result<Self> {
        let refuse = |why: &'static str| {
            Err(Error::new(Kind::Usage, "read container path", show(path), why)
                .hint("write DST as an absolute path inside the rootfs, for example /data"))
        };
        let bytes = path.as_bytes();
        if !bytes.starts_with(b"/") {
            return refuse("it must be absolute");
        }
        if bytes.len() > MAX_TARGET_LEN {
            return refuse("it is longer than 4095 bytes");
        }
        if bytes.contains(&0) {
            return refuse("it holds a NUL byte");
        }
        let trimmed = match bytes.iter().rposition(|&b| b != b'/') {
            Some(last) => &bytes[1..=last],
            None => return refuse("the root itself cannot be a volume"),
        };
        for name in trimmed.split(|&b| b == b'/') {
            match name {
                b"" => return refuse("it has an empty component (//)"),
                b"." | b".." => return refuse("it has a component . or .."),
                name if name.len() > MAX_NAME_LEN => return refuse("it has a component longer than 255 bytes"),
                _ => {}
            }
        }
        let mut whole = b"/".to_vec();
        whole.extend_from_slice(trimmed);
        Ok(ContainerPath(PathBuf::from(OsString::from_vec(whole))))
    }

    /// The path, absolute.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The path without its leading slash.
    pub fn relative(&self) -> &Path {
        self.0.strip_prefix("/").unwrap_or(&self.0)
    }

    /// The names from the root down.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &OsStr> {
        self.0.components().filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            _ => None,
        })
    }
}

impl fmt::Display for ContainerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(&self.0))
    }
}

/// May the container write to it?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Read-only, with everything mounted below it.
    Ro,
    /// Writable.
    Rw,
}

/// What works in a volume beside reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Powers {
    /// Are programs run?
    pub exec: bool,
    /// Do setuid and setgid bits and file capabilities work? Then root inside, who writes to the volume, makes programs that run
    /// as root for everyone on this host who reaches the source.
    pub suid: bool,
    /// Do device nodes work? `None`: where the source itself is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<bool>,
}

impl Default for Powers {
    fn default() -> Self {
        Powers { exec: true, suid: false, dev: None }
    }
}

/// A volume as the user wrote it: `SRC:DST[:OPTION,...]`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct VolumeSpec {
    /// Host path: absolute, or below the sandbox. What was written relative to the current directory begins with `.`, until
    /// [`VolumeSpec::from_directory`] made it absolute.
    #[serde(with = "crate::pathtext")]
    pub source: PathBuf,
    /// Where it appears in the rootfs.
    pub target: ContainerPath,
    /// `ro` or `rw`; `rw` where not said.
    pub access: Access,
    /// Is a missing or empty source filled from the image?
    pub fill: Fill,
    /// What works in it.
    pub powers: Powers,
}

/// What happens to a source that is missing or an empty directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Fill {
    /// Nothing: a missing relative one is made, empty.
    Never,
    /// It gets what the image has at the target, once (`copy`).
    Once,
}

impl VolumeSpec {
    /// Read `SRC:DST[:OPTION,...]`; `\:` and `\\` stand for a colon and a backslash in a path.
    /// Options: see [`OPTIONS`]. An unknown or repeated one is an error.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let refuse = |why: String| {
            Error::new(Kind::Usage, "read volume", show(text), why)
                .hint(format!("write {GRAMMAR}; the options are {}", option_names()))
        };
        let mut fields = split_fields(text.as_bytes()).into_iter();
        let (Some(source), Some(target), options, None) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(refuse("it needs SRC and DST, with a colon between them".into()));
        };
        if source.is_empty() {
            return Err(refuse("the source is empty".into()));
        }
        if source.contains(&0) {
            return Err(refuse("the source holds a NUL byte".into()));
        }
        let source = PathBuf::from(OsString::from_vec(source));
        if is_below_sandbox(&source) && !source.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(refuse(format!(
                "a source below the sandbox cannot have .. in it; write ./{} for one below the current directory",
                show(&source)
            )));
        }
        if options.is_none()
            && let Some((path, said)) = trailing_options(&target)
        {
            let source = source.display();
            return Err(refuse(format!("options follow a colon: write {source}:{path}:{said}"))
                .hint(format!("for a path that ends like this write {source}:{path},{said}:rw")));
        }
        let target = ContainerPath::new(OsStr::from_bytes(&target))?;
        let (mut access, mut fill, mut exec, mut suid, mut dev) = (None, None, None, None, None);
        for option in options.as_deref().map(|o| o.split(|&b| b == b',')).into_iter().flatten() {
            let again = match option {
                b"ro" => access.replace(Access::Ro).is_some(),
                b"rw" => access.replace(Access::Rw).is_some(),
                b"copy" => fill.replace(Fill::Once).is_some(),
                b"exec" => exec.replace(true).is_some(),
                b"noexec" => exec.replace(false).is_some(),
                b"suid" => suid.replace(true).is_some(),
                b"nosuid" => suid.replace(false).is_some(),
                b"dev" => dev.replace(true).is_some(),
                b"nodev" => dev.replace(false).is_some(),
                b"z" | b"Z" => {
                    let why = "options z and Z are podman's, for SELinux; fsprov sets no labels, and needs none";
                    return Err(refuse(why.into()).hint("leave it out"));
                }
                b"U" => {
                    let why =
                        "option U is podman's, and gives the source another owner; fsprov changes no owners of yours";
                    return Err(refuse(why.into())
                        .hint("leave it out; with `fsprov run --userns=keep-id` you own it inside, too"));
                }
                other => {
                    return Err(refuse(format!("unknown option {:?}", String::from_utf8_lossy(other))));
                }
            };
            if again {
                let option = String::from_utf8_lossy(option).into_owned();
                return Err(refuse(format!("option {option} is given twice, or with its opposite")));
            }
        }
        let (access, fill) = (access.unwrap_or(Access::Rw), fill.unwrap_or(Fill::Never));
        let powers = Powers { exec: exec.unwrap_or(true), suid: suid.unwrap_or(false), dev };
        Ok(VolumeSpec { source, target, access, fill, powers })
    }

    /// A source that begins with `.` made absolute: it is relative to `current`; one that begins with `~/` lies below `home`.
    #[must_use]
    pub fn from_directory(mut self, current: &Path, home: Option<&Path>) -> Self {
        if let (Ok(below), Some(home)) = (self.source.strip_prefix("~"), home) {
            self.source = home.join(below);
        } else if self.source.as_os_str().as_bytes().starts_with(b".") {
            // `./` goes, `..` stays: what it means depends on symlinks.
            let named = self.source.components().filter(|c| !matches!(c, Component::CurDir));
            self.source = current.join(named.collect::<PathBuf>());
        }
        self
    }

    /// Does the source lie below the sandbox?
    pub fn is_below_sandbox(&self) -> bool {
        is_below_sandbox(&self.source)
    }
}

/// As podman has it: a path begins with `/` or `.`, anything else is a name.
fn is_below_sandbox(source: &Path) -> bool {
    !source.as_os_str().as_bytes().starts_with(b".") && source.is_relative()
}

/// `PATH,OPTION,...` where a colon was meant: the path, and the options.
fn trailing_options(target: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(target).ok()?;
    let (path, said) = text.split_once(',')?;
    said.split(',').all(|word| OPTIONS.iter().any(|(name, _)| *name == word)).then_some((path, said))
}

fn split_fields(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = vec![Vec::new()];
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match (byte, rest.peek()) {
            (b'\\', Some(&next @ (b':' | b'\\'))) => {
                rest.next();
                fields.last_mut().expect("never empty").push(next);
            }
            (b':', _) => fields.push(Vec::new()),
            (byte, _) => fields.last_mut().expect("never empty").push(byte),
        }
    }
    fields
}

/// Is the source a directory or a single file?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Form {
    /// A directory: its whole tree appears at the target.
    Directory,
    /// One regular file.
    File,
    /// One socket, FIFO or device node: kernel backends bind it, the FUSE server refuses it.
    Special,
}

/// A volume whose source was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Host path, absolute, symlinks resolved.
    #[serde(with = "crate::pathtext")]
    pub source: PathBuf,
    /// Where it appears in the rootfs.
    pub target: ContainerPath,
    /// `ro` or `rw`.
    pub access: Access,
    /// Directory, file or special file.
    pub form: Form,
    /// What works in it. A record that does not say is older than this, and gets what is usual.
    #[serde(default)]
    pub powers: Powers,
}

impl Volume {
    /// Do device nodes in it work?
    pub fn has_devices(&self) -> bool {
        self.powers.dev.unwrap_or(self.form == Form::Special)
    }
}

/// Put volumes in mounting order (outer before inner) and refuse two on one path.
pub fn order(mut volumes: Vec<Volume>) -> Result<Vec<Volume>> {
    if volumes.len() > MAX_VOLUMES {
        return Err(Error::new(Kind::Limit, "read volumes", volumes.len(), "at most 200 volumes fit one rootfs"));
    }
    volumes.sort_by(|a, b| a.target.cmp(&b.target));
    for pair in volumes.windows(2) {
        if pair[0].target == pair[1].target {
            return Err(Error::new(
                Kind::Usage,
                "read volume",
                &pair[0].target,
                "two volumes have this container path",
            )
            .hint("give each a DST of its own"));
        }
        if pair[0].form != Form::Directory && pair[1].target.as_path().starts_with(pair[0].target.as_path()) {
            return Err(Error::new(
                Kind::Usage,
                "read volume",
                &pair[1].target,
                format!("it lies below {}, which is a single file", pair[0].target),
            )
            .hint("choose another DST for one of them"));
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammar() {
        let parse = |t: &str| VolumeSpec::parse(t.as_ref());
        let v = parse("tmp:/tmp").unwrap();
        assert_eq!((v.source.to_str(), v.target.as_path().to_str(), v.access), (Some("tmp"), Some("/tmp"), Access::Rw));
        assert_eq!(parse("/h:/home/:ro").unwrap().access, Access::Ro);
        assert_eq!((v.fill, parse("/h:/x:ro").unwrap().fill), (Fill::Never, Fill::Never));
        for (options, access) in [("copy", Access::Rw), ("rw,copy", Access::Rw), ("copy,ro", Access::Ro)] {
            let v = parse(&format!("/h:/x:{options}")).unwrap();
            assert_eq!((v.access, v.fill), (access, Fill::Once), "{options}");
        }
        let unknown = parse("a:/x:rw,zz").unwrap_err();
        assert!(unknown.to_string().contains("zz") && unknown.remedy().contains("ro, rw, copy"), "{unknown}");
        assert_eq!(parse(r"/a\:b\\c:/x").unwrap().source, Path::new(r"/a:b\c"));
        assert_eq!(parse("/a, b:/x y").unwrap().target.as_path(), Path::new("/x y"));
        for bad in [
            "",
            "a",
            "/a:",
            ":/b",
            "a:b",
            "a:/",
            "a:/x:",
            "a:/x:zz",
            "a:/x:ro,rw",
            "a:/x:copy,copy",
            "a:/x:rw,",
            "a:/x:ro:1",
            "a/../b:/x",
            "/tmp:/k,ro",
            "/tmp:/k,ro,nosuid",
            "a:/x/../y",
            "a:/./x",
            "a://x",
            "a:/x//y",
        ] {
            assert_eq!(parse(bad).map_err(|e| e.kind()), Err(Kind::Usage), "{bad}");
        }
        assert!(parse(&format!("a:/{}", "n".repeat(256))).is_err());
        let comma = parse("/tmp:/k,ro").unwrap_err().to_string();
        assert!(comma.contains("write /tmp:/k:ro") && comma.contains("/tmp:/k,ro:rw"), "{comma}");
        assert_eq!(parse("/tmp:/k,ro:rw").unwrap().target.as_path(), Path::new("/k,ro"));
        assert_eq!(parse("/tmp:/k,x").unwrap().target.as_path(), Path::new("/k,x"));
        assert!(parse(&format!("a:{}", "/nn".repeat(1366))).is_err());
    }

    #[test]
    fn sources_relative_to_the_current_directory_and_to_home() {
        let source = |text: &str| {
            let spec = VolumeSpec::parse(format!("{text}:/x").as_ref()).unwrap();
            spec.from_directory(Path::new("/cwd"), Some(Path::new("/home/u"))).source
        };
        for (text, want) in [
            (".", "/cwd"),
            ("./p", "/cwd/p"),
            ("..", "/cwd/.."),
            ("../p", "/cwd/../p"),
            (".hidden/p", "/cwd/.hidden/p"),
            ("~", "/home/u"),
            ("~/p", "/home/u/p"),
            ("~p", "~p"),
            ("/a", "/a"),
            ("name/p", "name/p"),
        ] {
            assert_eq!(source(text), Path::new(want), "{text}");
        }
        assert!(VolumeSpec::parse("name:/x".as_ref()).unwrap().is_below_sandbox());
        assert!(!VolumeSpec::parse("..:/x".as_ref()).unwrap().is_below_sandbox());
    }

    #[test]
    fn what_works_in_a_volume() {
        let powers = |options: &str| VolumeSpec::parse(format!("/h:/x{options}").as_ref()).map(|v| v.powers);
        let usual = Powers { exec: true, suid: false, dev: None };
        for (options, want) in [
            ("", usual),
            (":exec,nosuid", usual),
            (":nodev", Powers { dev: Some(false), ..usual }),
            (":ro,suid,dev", Powers { suid: true, dev: Some(true), ..usual }),
            (":noexec,rw", Powers { exec: false, ..usual }),
        ] {
            assert_eq!(powers(options).unwrap(), want, "{options}");
        }
        for bad in ["suid,nosuid", "nodev,dev", "exec,noexec", "suid,suid", "noexec,noexec"] {
            let error = powers(&format!(":{bad}")).unwrap_err();
            let last = bad.split(',').next_back().unwrap();
            assert_eq!(error.kind(), Kind::Usage, "{bad}");
            assert!(
                error.to_string().contains(&format!("option {last} is given twice, or with its opposite")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_volume_as_json_and_one_of_an_older_record() {
        let old = r#"{"source":"/s","target":"/t","access":"rw","form":"special"}"#;
        let volume: Volume = serde_json::from_str(old).unwrap();
        assert_eq!(
            (volume.powers, volume.has_devices()),
            (Powers::default(), true),
            "a device that was a volume works on"
        );
        let shown = serde_json::to_string(&volume).unwrap();
        assert_eq!(shown, format!("{},\"powers\":{{\"exec\":true,\"suid\":false}}}}", old.trim_end_matches('}')));
        let said = Volume { powers: Powers { exec: false, suid: true, dev: Some(false) }, ..volume };
        assert!(!said.has_devices());
        assert_eq!(serde_json::from_str::<Volume>(&serde_json::to_string(&said).unwrap()).unwrap(), said);
        assert!(!Volume { form: Form::Directory, powers: Powers::default(), ..said }.has_devices());
    }

    #[test]
    fn bytes_that_are_not_text_pass() {
        let v = VolumeSpec::parse(OsStr::from_bytes(b"/\xff:/\xfe")).unwrap();
        assert_eq!(v.target.as_path().as_os_str().as_bytes(), b"/\xfe");
    }

    #[test]
    fn outer_before_inner_and_no_two_on_one_path() {
        let volume = |target: &str, form| Volume {
            source: "/s".into(),
            target: ContainerPath::new(target.as_ref()).unwrap(),
            access: Access::Rw,
            form,
            powers: Powers::default(),
        };
        let ordered =
            order(vec![volume("/a/b", Form::Directory), volume("/a", Form::Directory), volume("/a-b", Form::File)])
                .unwrap();
        assert_eq!(ordered.iter().map(|v| v.target.to_string()).collect::<Vec<_>>(), ["/a", "/a/b", "/a-b"]);
        assert!(order(vec![volume("/a", Form::File), volume("/a/", Form::File)]).is_err());
        assert!(order(vec![volume("/a/b", Form::File), volume("/a", Form::File)]).is_err());
    }
}
