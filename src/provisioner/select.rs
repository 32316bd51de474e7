//! Which backend: the one asked for, or the first that can serve this request on this host.

use rustix::io::Errno;

use crate::backend::{self, Support};
use crate::error::{Error, Kind, Result, show};
use crate::host::{Finding, Host};
use crate::plan::{BackendKind, Plan};

/// A backend that cannot serve, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rejected {
    /// Which.
    pub backend: BackendKind,
    /// Why not.
    pub reason: String,
    /// What can be done about it; may be empty.
    pub remedy: String,
}

impl Rejected {
    /// The reason after the backend's name between these, if it does not name the backend itself.
    fn said(&self, before: &str, after: &str) -> String {
        let Rejected { backend, reason, .. } = self;
        let names_itself = reason.contains(&format!("the {backend} backend"));
        if names_itself { reason.clone() } else { format!("{before}{backend}{after}: {reason}") }
    }
}

/// The backend chosen, and those tried before it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Choice {
    /// The one.
    pub backend: BackendKind,
    /// Tried before it, in order.
    pub rejected: Vec<Rejected>,
}

/// Choose. With `asked` only that one is tried.
pub(super) fn choose(host: &Host, plan: &Plan, asked: Option<BackendKind>) -> Result<Choice> {
    choose_by(plan, asked, Vec::new(), |kind| support(host, plan, kind))
}

/// The next choice of `auto`, after `error` came from mounting by the last one. The error itself comes back where another backend would
/// have it too.
pub(super) fn choose_after(host: &Host, plan: &Plan, last: Choice, error: Error) -> Result<Choice> {
    let Choice { backend, mut rejected } = last;
    let reason = error.to_string();
    match Blame::of(&error) {
        None => return Err(error),
        Some(Blame::Kernel) => host.learn(backend, Finding::no(&*reason, "")),
        Some(Blame::Surroundings) => {}
    }
    reject(&mut rejected, Rejected { backend, reason, remedy: String::new() });
    choose_by(plan, None, rejected, |kind| support(host, plan, kind))
}

fn support(host: &Host, plan: &Plan, kind: BackendKind) -> Support {
    host.learned(kind).map_or_else(|| backend::of(kind).support(host, plan), |no| Support::from(&no))
}

/// Would another way of `auto` perhaps do it?
pub(super) fn may_go_on(error: &Error) -> bool {
    Blame::of(error).is_some()
}

/// What made a backend fail while mounting, when it is not the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blame {
    /// The kernel, or a filter around us, lacks something: it will fail the next time too.
    Kernel,
    /// A policy, or a file system that this plan uses, refuses: another plan may pass.
    Surroundings,
}

impl Blame {
    fn of(error: &Error) -> Option<Self> {
        if error.left_something() {
            return None;
        }
        match error.errno() {
            Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NODEV) => Some(Blame::Kernel),
            Some(Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::BADF) => Some(Blame::Surroundings),
            None if error.kind() == Kind::Unsupported => Some(Blame::Surroundings),
            _ => None,
        }
    }
}

fn reject(rejected: &mut Vec<Rejected>, one: Rejected) {
    log::info!("backend {}: {}", one.backend, one.reason);
    rejected.push(one);
}

fn choose_by(
    plan: &Plan,
    asked: Option<BackendKind>,
    mut rejected: Vec<Rejected>,
    support: impl Fn(BackendKind) -> Support,
) -> Result<Choice> {
    let candidates = asked.as_ref().map_or(&backend::AUTO_ORDER[..], std::slice::from_ref);
    for &backend in candidates {
        if rejected.iter().any(|r| r.backend == backend) {
            continue;
        }
        match support(backend) {
            Support::Yes => return Ok(Choice { backend, rejected }),
            Support::No { reason, remedy } => reject(&mut rejected, Rejected { backend, reason, remedy }),
        }
    }
    let error = |cause: String| Error::new(Kind::Unsupported, "provision", show(&plan.rootfs), cause);
    Err(match rejected.as_slice() {
        [one] if asked.is_some() => {
            let error = error(one.said("the ", " backend cannot serve it"));
            if one.remedy.is_empty() { error } else { error.hint(one.remedy.clone()) }
        }
        all => error("no backend can serve it".to_owned()).items(all.iter().map(|r| match r.remedy.as_str() {
            "" => r.said("", ""),
            remedy => format!("{} ({remedy})", r.said("", "")),
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_goes_on_for_the_host_s_sake_and_for_no_other_reason() {
        let sys = |errno| Error::sys("make overlay of", "/r", errno);
        for errno in [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NODEV] {
            assert_eq!(Blame::of(&sys(errno)), Some(Blame::Kernel), "{errno}");
        }
        for errno in [Errno::PERM, Errno::ACCESS, Errno::INVAL, Errno::BADF] {
            assert_eq!(Blame::of(&sys(errno).hint("the kernel says: no")), Some(Blame::Surroundings), "{errno}");
        }
        for errno in [Errno::NOENT, Errno::BUSY, Errno::EXIST, Errno::NOSPC, Errno::IO, Errno::LOOP] {
            assert_eq!(Blame::of(&sys(errno)), None, "{errno}");
        }
        let text = |kind| Error::new(kind, "mount volume", "/data", "the image has no such directory");
        assert_eq!(Blame::of(&text(Kind::Unsupported)), Some(Blame::Surroundings));
        assert_eq!(Blame::of(&text(Kind::Usage)), None);
        // What is left of an attempt would be in the next one's way.
        assert_eq!(Blame::of(&sys(Errno::NOSYS).with_undo(Err(sys(Errno::BUSY)))), None);
    }

    type Change<'a> = &'a dyn Fn(&mut Plan);

    #[test]
    fn who_refuses_is_named_once() {
        use crate::plan::{Layer, Scratch};
        use BackendKind::{Bind, Copy, Overlay};
        let host = Host::probe();
        let no_devices = |plan: &mut Plan| plan.restraint.no_devices = true;
        let stubs = |plan: &mut Plan| plan.stubs = true;
        let writable = |plan: &mut Plan| plan.scratch = Some(Scratch("/changes".into()));
        let kept = |plan: &mut Plan| (plan.scratch, plan.changes_stay) = (Some(Scratch("/changes".into())), true);
        let two = |plan: &mut Plan| plan.layers = vec![Layer { root: "/a".into() }, Layer { root: "/b".into() }];
        let filtered = |plan: &mut Plan| plan.is_filtered = true;
        let whiteouts = |plan: &mut Plan| plan.has_whiteouts = true;
        let cases: &[(BackendKind, Change<'_>, &str)] = &[
            (
                Bind,
                &no_devices,
                "the bind backend cannot leave out device nodes; use --backend fuse or copy; --nodev keeps them from being opened",
            ),
            (
                Overlay,
                &no_devices,
                "the overlay backend cannot leave out device nodes; use --backend fuse or copy; --nodev keeps them from being opened",
            ),
            (Bind, &stubs, "the bind backend cannot make up mount points for engines; use --backend fuse, or copy"),
            (
                Overlay,
                &stubs,
                "the overlay backend cannot make up mount points for engines; use --backend fuse, or copy",
            ),
            (
                Bind,
                &writable,
                "the bind backend cannot make a writable rootfs; use --backend fuse, or overlay (as root, or inside `unshare -Urm`)",
            ),
            (
                Overlay,
                &kept,
                "the overlay backend cannot keep changes after `unmount`; use --backend fuse, or leave --upper out",
            ),
            (
                Copy,
                &kept,
                "the copy backend cannot keep changes after `unmount`; use --backend fuse, or leave --upper out",
            ),
            (
                Bind,
                &two,
                "multiple layers are not supported by the bind backend; use --backend fuse, or make it one layer with `fsprov image flatten`",
            ),
            (
                Bind,
                &whiteouts,
                "the bind backend cannot serve it: the image's layer has whiteouts, which a bind mount would show; use --backend fuse or overlay, or flatten the image",
            ),
            (
                Copy,
                &filtered,
                "the copy backend cannot serve it: the image's pathWhitelist leaves files out, which only its index does; use --backend fuse",
            ),
        ];
        for (backend, with, want) in cases {
            let mut plan = Plan::new("one".parse().unwrap(), "/r".into(), "/state".into());
            plan.layers = vec![Layer { root: "/a".into() }];
            with(&mut plan);
            let error = choose(&host, &plan, Some(*backend)).unwrap_err();
            assert_eq!(error.to_string(), format!("provision /r: {want}"));
        }
        // Of several, each line says whose it is.
        let mut plan = Plan::new("one".parse().unwrap(), "/r".into(), "/state".into());
        kept(&mut plan);
        two(&mut plan);
        let error = choose(&host, &plan, None).unwrap_err();
        for (line, want) in
            error.lines().skip(1).zip(["the bind backend cannot make", "the overlay backend cannot keep", "fuse: "])
        {
            assert!(line.trim_start().starts_with(want), "{line}");
        }
    }

    #[test]
    fn what_the_kernel_lacks_is_remembered_with_its_reason() {
        let host = Host::probe();
        assert_eq!(host.learned(BackendKind::Overlay), None);
        host.learn(BackendKind::Overlay, Finding::no("make overlay of /r: not supported", ""));
        let again = host.clone();
        host.learn(BackendKind::Overlay, Finding::no("later", ""));
        let no = Finding::no("make overlay of /r: not supported", "");
        assert_eq!(again.learned(BackendKind::Overlay), Some(no));
        assert_eq!(host.learned(BackendKind::Bind), None);
    }
}
