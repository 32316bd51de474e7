//! Which backend: the one asked for, or the first that can serve this request on this host.

use crate::backend::{self, Support};
use crate::error::{Error, Kind, Result, show};
use crate::host::Host;
use crate::plan::{BackendKind, Plan};

/// A backend that cannot serve, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Which.
    pub backend: BackendKind,
    /// Why not.
    pub reason: String,
    /// What can be done about it; may be empty.
    pub remedy: String,
}

/// The backend chosen, and those tried before it.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The one.
    pub backend: BackendKind,
    /// Tried before it, in order.
    pub rejected: Vec<Rejected>,
}

/// Choose. With `asked` only that one is tried.
pub(super) fn choose(host: &Host, plan: &Plan, asked: Option<BackendKind>) -> Result<Choice> {
    choose_by(plan, asked, |kind| backend::of(kind).support(host, plan))
}

fn choose_by(plan: &Plan, asked: Option<BackendKind>, support: impl Fn(BackendKind) -> Support) -> Result<Choice> {
    let candidates = asked.as_ref().map_or(&backend::AUTO_ORDER[..], std::slice::from_ref);
    let mut rejected = Vec::new();
    for &kind in candidates {
        match support(kind) {
            Support::Yes => return Ok(Choice { backend: kind, rejected }),
            Support::No { reason, remedy } => {
                log::info!("backend {kind}: {reason}");
                rejected.push(Rejected { backend: kind, reason, remedy });
            }
        }
    }
    let error = |cause: String| Error::new(Kind::Unsupported, "provision", show(&plan.rootfs), cause);
    Err(match rejected.as_slice() {
        [one] if asked.is_some() => {
            let error = error(format!("the {} backend cannot: {}", one.backend, one.reason));
            if one.remedy.is_empty() { error } else { error.hint(one.remedy.clone()) }
        }
        all => error(
            all.iter()
                .map(|r| match r.remedy.as_str() {
                    "" => format!("{}: {}", r.backend, r.reason),
                    remedy => format!("{}: {} ({remedy})", r.backend, r.reason),
                })
                .fold("no backend can serve it".to_owned(), |text, one| format!("{text}\n  {one}")),
        ),
    })
}
