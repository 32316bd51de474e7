//! From a request, its image and what was seen of its paths to a plan: data in, data out. Nothing here touches the host.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::Request;
use super::look::{Seen, changes_name};
use super::request::{Changes, Cover};
use crate::error::Result;
use crate::id::ContainerId;
use crate::paths::ContainerPaths;
use crate::plan::{IndexFile, Layer, Ownership, Plan, Scratch};
use crate::store::ResolvedImage;
use crate::volume::{self, ContainerPath, Fill, Form, Volume};

/// What is wanted, and what must be made for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    /// What a backend is told.
    pub(super) plan: Plan,
    /// The sandbox: what is made below it belongs to its owner.
    pub(super) sandbox: Option<PathBuf>,
    /// Directories to be made for the mount point, outermost first. They end with the rootfs.
    pub(super) made: Vec<PathBuf>,
    /// May the mount point have something in it?
    pub(super) cover: Cover,
    /// Directories to be made for the sandbox, outermost first. They stay.
    pub(super) sandbox_made: Vec<PathBuf>,
    /// Directories to be made for changes that stay, outermost first. They stay too.
    pub(super) upper_made: Vec<PathBuf>,
    /// Directories to be made as sources of volumes, or for those to lie in, outermost first. They stay.
    pub(super) sources: Vec<PathBuf>,
    /// Targets of volumes whose sources are filled from the image.
    pub(super) fill: BTreeSet<ContainerPath>,
}

/// Plan the rootfs `id`.
pub(super) fn plan(
    id: &ContainerId,
    request: &Request,
    ownership: Ownership,
    image: &ResolvedImage,
    seen: Seen,
    container: &ContainerPaths,
) -> Result<Planned> {
    let Seen { rootfs: (rootfs, made), sandbox, upper, sources: found } = seen;
    let (sandbox, sandbox_made) = sandbox.unzip();
    let sandbox_made = sandbox_made.unwrap_or_default();
    let (mut volumes, mut sources, mut fill) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (spec, source) in request.volumes.iter().zip(found) {
        let is_filled = spec.fill == Fill::Once && (source.missing > 0 || source.is_empty);
        // One that is filled appears when it is whole: only what it lies in is made.
        let missing = source.path.ancestors().take(source.missing).skip(usize::from(is_filled));
        let mut missing: Vec<_> = missing.map(PathBuf::from).collect();
        missing.reverse();
        sources.extend(missing.into_iter().filter(|path| !sources.contains(path)).collect::<Vec<_>>());
        if is_filled {
            fill.insert(spec.target.clone());
        }
        let form = if source.missing > 0 && !is_filled { Form::Directory } else { source.form };
        volumes.push(Volume {
            source: source.path,
            target: spec.target.clone(),
            access: spec.access,
            form,
            powers: spec.powers,
        });
    }
    let (upper, upper_made) = upper.unzip();
    let changes_stay = upper.is_some();
    let scratch = match (request.changes, upper, &sandbox) {
        (Changes::Refused, ..) => None,
        (Changes::Ephemeral, Some(upper), _) => Some(Scratch(upper)),
        // In the sandbox, where there is one: they are the executor's bytes.
        (Changes::Ephemeral, None, Some(sandbox)) => Some(Scratch(sandbox.join(changes_name(id)))),
        (Changes::Ephemeral, None, None) => Some(Scratch(container.backend().join("changes"))),
    };
    let plan = Plan {
        id: id.clone(),
        rootfs,
        layers: image.layers.iter().map(|root| Layer { root: root.clone() }).collect(),
        index: image.index.clone().map(IndexFile),
        is_filtered: image.is_filtered,
        has_whiteouts: image.has_whiteouts,
        volumes: volume::order(volumes)?,
        ownership,
        scratch,
        changes_stay,
        stubs: request.stubs,
        live: request.live,
        restraint: request.restraint,
        state_dir: container.backend(),
    };
    plan.require_layers()?;
    let upper_made = upper_made.unwrap_or_default();
    Ok(Planned { plan, sandbox, made, cover: request.cover, sandbox_made, upper_made, sources, fill })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Kind;
    use crate::id::ImageRef;
    use crate::paths::StatePaths;
    use crate::provisioner::look::SeenSource;
    use crate::volume::VolumeSpec;

    fn image(layers: &[&str]) -> ResolvedImage {
        ResolvedImage {
            id: None,
            name: None,
            layers: layers.iter().map(PathBuf::from).collect(),
            index: Some("/store/index".into()),
            manifest: None,
            is_filtered: false,
            has_whiteouts: true,
        }
    }

    fn request(volumes: &[&str], changes: Changes) -> Request {
        Request {
            image: ImageRef::Path("/image".into()),
            rootfs: "made/rootfs".into(),
            cover: Cover::Refuse,
            backend: None,
            sandbox: None,
            volumes: volumes.iter().map(|v| VolumeSpec::parse(v.as_ref()).unwrap()).collect(),
            id: None,
            ownership: None,
            stubs: false,
            live: crate::plan::Live::default(),
            restraint: crate::plan::Restraint::default(),
            changes,
            upper: None,
            ends_with: None,
        }
    }

    /// A source as it was seen: its path, how much of it is missing, what it is.
    fn source(path: &str, missing: usize, form: Form, is_empty: bool) -> SeenSource {
        SeenSource { path: path.into(), missing, form, is_empty }
    }

    fn planned(volumes: &[&str], sources: &[SeenSource], sandbox: Option<&str>, changes: Changes) -> Result<Planned> {
        let seen = Seen {
            rootfs: ("/m/made/rootfs".into(), vec!["/m/made".into(), "/m/made/rootfs".into()]),
            sandbox: sandbox.map(|path| (path.into(), Vec::new())),
            upper: None,
            sources: sources.to_vec(),
        };
        let id = "one".parse().unwrap();
        let container = StatePaths::new("/state".into()).container(&id);
        let ownership = Ownership::default();
        plan(&id, &request(volumes, changes), ownership, &image(&["/l/0", "/l/1"]), seen, &container)
    }

    #[test]
    fn requests_and_their_plans() {
        use Form::{Directory, File};
        // Volumes, their sources as seen, the sandbox; then: sources in the plan by target, what is made, what is filled.
        type Row<'a> = (
            &'a [&'a str],
            &'a [SeenSource],
            Option<&'a str>,
            &'a [(&'a str, &'a str, Form)],
            &'a [&'a str],
            &'a [&'a str],
        );
        let table: &[Row<'_>] = &[
            (&[], &[], None, &[], &[], &[]),
            (
                &["/h/there:/data:ro"],
                &[source("/h/there", 0, Directory, false)],
                None,
                &[("/data", "/h/there", Directory)],
                &[],
                &[],
            ),
            // Outer before inner; what is missing below the sandbox is made, each directory once.
            (
                &["a/c:/data/in", "a/b:/data"],
                &[source("/s/a/c", 2, Directory, false), source("/s/a/b", 2, Directory, false)],
                Some("/s"),
                &[("/data", "/s/a/b", Directory), ("/data/in", "/s/a/c", Directory)],
                &["/s/a", "/s/a/c", "/s/a/b"],
                &[],
            ),
            // One to be filled is not made, only what it lies in; it becomes what the image has.
            (
                &["new/db:/etc/db:rw,copy"],
                &[source("/s/new/db", 2, File, false)],
                Some("/s"),
                &[("/etc/db", "/s/new/db", File)],
                &["/s/new"],
                &["/etc/db"],
            ),
            (
                &["e:/x:copy"],
                &[source("/s/e", 0, Directory, true)],
                Some("/s"),
                &[("/x", "/s/e", Directory)],
                &[],
                &["/x"],
            ),
            // What has something in it stays as it is; so does an empty one that nobody asked to fill.
            (
                &["e:/x:copy"],
                &[source("/s/e", 0, Directory, false)],
                Some("/s"),
                &[("/x", "/s/e", Directory)],
                &[],
                &[],
            ),
            (&["e:/x"], &[source("/s/e", 0, Directory, false)], Some("/s"), &[("/x", "/s/e", Directory)], &[], &[]),
        ];
        for (volumes, sources, sandbox, want, made, filled) in table {
            let planned = planned(volumes, sources, *sandbox, Changes::Refused).unwrap();
            let got = planned.plan.volumes.iter().map(|v| (v.target.as_path(), v.source.as_path(), v.form));
            let want: Vec<_> = want.iter().map(|(t, s, f)| (Path::new(t), Path::new(s), *f)).collect();
            assert_eq!(got.collect::<Vec<_>>(), want, "{volumes:?}");
            assert_eq!(planned.sources, made.iter().map(PathBuf::from).collect::<Vec<_>>(), "{volumes:?}");
            assert_eq!(
                planned.fill.iter().map(ContainerPath::as_path).collect::<Vec<_>>(),
                filled.iter().map(Path::new).collect::<Vec<_>>()
            );
            assert_eq!(planned.made, [Path::new("/m/made"), Path::new("/m/made/rootfs")]);
            assert_eq!(
                planned.plan.layers.iter().map(|l| l.root.as_path()).collect::<Vec<_>>(),
                [Path::new("/l/0"), Path::new("/l/1")]
            );
            assert_eq!(planned.plan.state_dir, Path::new("/state/containers/one/backend"));
            assert!(planned.plan.has_whiteouts && planned.plan.scratch.is_none());
        }
    }

    #[test]
    fn changes_are_kept_in_the_sandbox_or_by_us() {
        let scratch = |sandbox, changes| planned(&[], &[], sandbox, changes).unwrap().plan.scratch.map(|s| s.0);
        assert_eq!(scratch(Some("/s"), Changes::Ephemeral), Some("/s/.fsprov-one".into()));
        assert_eq!(scratch(None, Changes::Ephemeral), Some("/state/containers/one/backend/changes".into()));
        assert_eq!(scratch(Some("/s"), Changes::Refused), None);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let twice = planned(
            &["/h:/data", "/h:/data/"],
            &[source("/h", 0, Form::Directory, false), source("/h", 0, Form::Directory, false)],
            None,
            Changes::Refused,
        );
        assert_eq!(twice.unwrap_err().kind(), Kind::Usage);
        let below_a_file = planned(
            &["/f:/data", "/h:/data/x"],
            &[source("/f", 0, Form::File, false), source("/h", 0, Form::Directory, false)],
            None,
            Changes::Refused,
        );
        assert!(below_a_file.unwrap_err().to_string().contains("/data, which is a single file"));
        let id: ContainerId = "one".parse().unwrap();
        let container = StatePaths::new("/state".into()).container(&id);
        let seen = Seen { rootfs: ("/r".into(), Vec::new()), sandbox: None, upper: None, sources: Vec::new() };
        let ownership = Ownership::default();
        let none = plan(&id, &request(&[], Changes::Refused), ownership, &image(&[]), seen, &container).unwrap_err();
        assert!(none.to_string().contains("the image has no filesystem layer"), "{none}");
    }
}
