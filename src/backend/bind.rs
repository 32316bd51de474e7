//! The bind backend: a read-only bind mount of the image's one layer. A few system calls, whatever the image's size.
//!
//! The mount is built detached and made read-only with all below it before it is attached, so no namespace ever sees a
//! writable view. Relies on the layer staying where it is.

use std::fmt::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::io::Errno;

use super::{Backend, Detach, Health, Support, attach, detach};
use crate::error::{Error, Kind, Result, show};
use crate::fault;
use crate::host::Host;
use crate::place::{Place, Places};
use crate::plan::{BackendKind, IdRange, Ownership, Plan};
use crate::sys::mount::{AttrSet, Piece};
use crate::sys::mountinfo::Table;
use crate::sys::process::UserNamespace;
use crate::traces::{Journal, Traces};

/// The bind backend.
#[derive(Debug)]
pub struct Bind;

impl Backend for Bind {
    fn kind(&self) -> BackendKind {
        BackendKind::Bind
    }

    fn host_support(&self, host: &Host) -> Support {
        (&host.mount).into()
    }

    fn support(&self, host: &Host, plan: &Plan) -> Support {
        let refusal = |e: &Error| Support::no(e.cause(), e.remedy());
        let layer = match check(plan) {
            Ok(layer) => layer,
            Err(e) => return refusal(&e),
        };
        // What whiteouts lie as on the disk (devices, `.wh.` files) a bind mount would show. Asked here alone: a rootfs recorded before
        // this was known comes back as it was.
        if plan.has_whiteouts {
            return Support::no(
                "the image's layer has whiteouts, which a bind mount would show",
                "use --backend fuse or overlay, or flatten the image",
            );
        }
        match self.host_support(host) {
            Support::Yes => {}
            no @ Support::No { .. } => return no,
        }
        if !plan.ownership.is_identity() {
            if let no @ Support::No { .. } = Support::from(host.idmapped_mounts()) {
                return no;
            }
            // Whether this layer's file system takes it shows only by trying; the mount is detached and goes again.
            let tried = Place::open(layer).map_err(|e| Error::sys(OP, show(layer), e)).and_then(|l| build(plan, &l));
            if let Err(e) = tried {
                return refusal(&e);
            }
        }
        attach::targets_support(BackendKind::Bind, layer, &plan.volumes)
    }

    fn provision(&self, _: &Host, plan: &Plan, places: &Places, journal: &mut Journal<'_>) -> Result<()> {
        check(plan)?;
        fault::point("bind.build")?;
        let layer = places.layers.first().ok_or_else(|| Error::new(Kind::Invalid, OP, "", "it was not opened"))?;
        let root = build(plan, layer)?;
        attach::put_in_place(BackendKind::Bind, plan, places, root, &attach::root_attrs(plan, READ_ONLY), journal)
    }

    fn destroy(&self, _: &Host, plan: &Plan, traces: &Traces, how: Detach) -> Result<bool> {
        detach::take_away(plan, traces, how)
    }

    fn health(&self, plan: &Plan, traces: &Traces, mounts: &Table) -> Health {
        detach::health(&plan.rootfs, traces, mounts)
    }
}

/// What the backend promises; the layer it will show.
fn check(plan: &Plan) -> Result<&Path> {
    plan.require_unfiltered()?;
    plan.require_read_only(BackendKind::Bind)?;
    plan.require_as_it_is(BackendKind::Bind)?;
    plan.single_layer(BackendKind::Bind)
}

const READ_ONLY: AttrSet<'static> =
    AttrSet { read_only: true, nosuid: false, nodev: false, noexec: false, private: true, idmap: None };

const OP: &str = "bind layer";

/// The root's mount, detached.
fn build(plan: &Plan, layer: &Place) -> Result<Piece> {
    let dir: OwnedFd = layer.try_clone()?.into();
    let layer = layer.path();
    let namespace = id_map(&plan.ownership)?;
    let attrs = AttrSet { idmap: namespace.as_ref().map(|fd| fd.as_fd()), ..attach::root_attrs(plan, READ_ONLY) };
    Piece::bind(dir, &plan.state_dir, &attrs).map_err(|e| match e {
        Errno::INVAL if namespace.is_some() => Error::new(
            Kind::Unsupported,
            OP,
            show(layer),
            "the file system that the layer lies on does not take id maps (overlay does not, nor most of FUSE)",
        )
        .hint("keep the store on ext4, xfs or btrfs (tmpfs from Linux 6.3 on), or use --backend fuse"),
        Errno::PERM if namespace.is_some() => Error::sys(OP, show(layer), e)
            .hint("id maps need CAP_SYS_ADMIN where the file system was mounted; or use --backend fuse"),
        Errno::NOSYS => Error::sys(OP, show(layer), e).hint("id maps need Linux 5.12; or use --backend fuse"),
        e => Error::sys(OP, show(layer), e),
    })
}

/// A user namespace whose maps are the presented ownership; `None` for the image's own.
fn id_map(ownership: &Ownership) -> Result<Option<OwnedFd>> {
    if ownership.squash.is_some() {
        return Err(Error::new(
            Kind::Unsupported,
            "map ids",
            "",
            "a bind mount cannot give every file to one user: the kernel maps ids one to one",
        )
        .hint("use --uid-map and --gid-map, or --backend fuse"));
    }
    if ownership.is_identity() {
        return Ok(None);
    }
    let held = UserNamespace::with_maps(&map_text(&ownership.uids), &map_text(&ownership.gids))?;
    held.open().map(Some)
}

/// The lines of /proc/PID/uid_map. In an idmapped mount an id on the disk is taken as one inside the namespace, and shown as
/// the one outside (mount_setattr(2)).
fn map_text(ranges: &[IdRange]) -> String {
    if ranges.is_empty() {
        return format!("0 0 {}\n", u32::MAX);
    }
    let mut text = String::new();
    for range in ranges {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.count);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_written_as_the_kernel_reads_them() {
        assert_eq!(map_text(&[]), "0 0 4294967295\n");
        let ranges =
            [IdRange { inside: 0, outside: 1000, count: 1 }, IdRange { inside: 1, outside: 100_000, count: 9 }];
        assert_eq!(map_text(&ranges), "0 1000 1\n1 100000 9\n");
    }

    #[test]
    fn squash_is_refused_by_name() {
        let error = id_map(&Ownership { squash: Some((0, 0)), ..Ownership::default() }).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("--backend fuse"), "{error}");
    }
}
