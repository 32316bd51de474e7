//! The cases. Each file is one subject; a case says which lanes it is for.

use std::path::Path;

use crate::common::Case;

mod agent;
mod alone;
mod apart;
mod appc;
mod cli;
mod clients;
mod crash;
mod destroy;
mod durable;
mod enosys;
mod faults;
mod fdstore;
mod filled;
mod front;
mod hardened;
mod layers;
mod live;
mod mounted;
mod posix;
mod races;
mod readonly;
mod recover;
mod registry;
mod setuid;
mod store;
mod swapped;
mod swapper;
mod traced;
mod tree;
mod volumes;
mod writers;

/// Every case.
pub(crate) const CASES: &[Case] = &[
    agent::AUTO_GOES_ON,
    agent::AUTO_LAYERS,
    agent::AUTO_WRITABLE,
    agent::INSIDE,
    agent::LEAKED,
    agent::NESTED,
    agent::REFLINK,
    agent::ROUNDS,
    agent::WAITS,
    agent::WRITABLE,
    alone::IMAGE_HELD,
    alone::LATER_WORKER,
    alone::LEFT_BEHIND,
    alone::STOPPED,
    alone::USED_THERE,
    apart::BOUNDED,
    apart::KILLED,
    apart::LIES,
    apart::NOT_ORPHANED,
    apart::TAKEN_OVER,
    apart::WHO_THEY_ARE,
    appc::CONFIG,
    appc::ESCAPES,
    appc::FETCHES,
    appc::MESOS,
    appc::META,
    appc::NAMES_HELD,
    appc::SIGNATURES,
    cli::AUTO,
    cli::BAD_IMAGES,
    cli::COMPLETIONS_AND_MAN,
    cli::HELP,
    cli::JSON_SHAPES,
    cli::NO_FUSERMOUNT,
    cli::NO_PRIVILEGE,
    cli::PIPES,
    cli::PROBE,
    cli::STATE_ROOT,
    cli::SWITCHED_OFF,
    cli::USAGE,
    clients::BWRAP,
    clients::APT,
    clients::CARGO,
    clients::CHROOT,
    clients::GIT,
    clients::IDMAPPED,
    clients::SQLITE,
    crash::ALONE,
    crash::KILLED_SEEN,
    crash::KILLED_UNSEEN,
    crash::LOST,
    crash::NOT_NOTED,
    crash::NOT_SENT_AGAIN,
    crash::POISON,
    crash::RESTARTED,
    destroy::AT_ONCE,
    destroy::BUSY,
    destroy::COPY_IN_USE,
    destroy::DETACHED,
    destroy::ENOUGH,
    destroy::FOREGROUND,
    destroy::FOREIGN_BENEATH,
    destroy::FOREIGN_MOUNTS,
    destroy::LEAVES_NOTHING,
    destroy::MOUNT_POINT_KINDS,
    destroy::ONE_PLACE_ONE_ROOTFS,
    destroy::OVER_THE_IMAGE,
    destroy::SERVER_KILLED,
    destroy::STATE_IS_PRIVATE,
    destroy::SYSTEMD,
    destroy::TWICE,
    destroy::UNMOUNTED_BY_HAND,
    durable::FULL_DISK,
    durable::IN_USE_UNSEEN,
    durable::IMPORT_STEPS,
    durable::REPAIRED,
    durable::UPKEEP_STEPS,
    enosys::FALLBACKS,
    faults::DESTROY_BREAKS,
    faults::PROVISION_DIES,
    faults::PROVISION_FAILS,
    fdstore::ADOPTED,
    fdstore::STALE,
    fdstore::TAKEN_OVER,
    filled::EXISTING,
    filled::FILLED,
    filled::KILLED,
    filled::WHAT_THE_INDEX_SAYS,
    layers::MORE_THAN_MAY_BE_OPEN,
    layers::OTHERS,
    layers::SAME_TREE,
    live::ACLS,
    live::TTL,
    live::WRITEBACK,
    mounted::ATTACKED,
    mounted::CAPPED,
    mounted::MODEL,
    front::COPIED_DEVICES,
    front::CTRL_C,
    front::CTRL_C_BESIDE,
    front::CTRL_C_EXPORT,
    front::EXPORT_OUT,
    front::GC_COUNTS,
    front::HERE,
    front::IMAGE_NAMES,
    front::LENIENT_ONCE,
    front::NEW_SANDBOX,
    front::NO_CONFIG,
    front::OTHER_WORDS,
    front::OVER,
    front::PLATFORM,
    front::ROOTS_FILES,
    front::SHORT_IDS,
    hardened::CONFINED,
    hardened::EVERY_KIND,
    hardened::EXHAUSTED,
    hardened::FEW,
    hardened::FOREIGN_CALLS,
    hardened::MANY_NAMELESS,
    hardened::TAKEN_OVER,
    posix::HANDLES,
    posix::MAPPED,
    posix::SAME_ANSWERS,
    posix::TWO_WRITERS,
    races::LAYER_TAKEN,
    races::ALL_AT_ONCE,
    readonly::EVERY_CHANGE_IS_EROFS,
    readonly::LOCKED_FLAGS_STAY,
    readonly::PROGRAMS_SAY_READ_ONLY,
    readonly::READ_ONLY_IN_SLAVES,
    recover::AFTER_A_CRASH,
    recover::COPY_AFTER_REBOOT,
    recover::DEAD_SERVER,
    recover::HEALING_DIES,
    recover::HEALS,
    recover::REBOOT,
    recover::WRITABLE_CRASH,
    registry::DEBIAN,
    registry::LAYERS,
    registry::LIES,
    registry::LOGINS,
    registry::PLATFORMS,
    registry::PULLED_TO_MOUNT,
    registry::RESUMES,
    registry::TLS,
    setuid::EVERY_VOLUME,
    setuid::FILLED,
    setuid::HARMLESS,
    setuid::MADE,
    setuid::REFUSED,
    setuid::SU,
    setuid::WORKS_INSIDE,
    store::AT_ONCE,
    store::BARE_TREE,
    store::BROKEN_IMAGES,
    store::DIRECTORIES,
    store::EVERY_COMPRESSION,
    store::EXPECTED_ID,
    store::HOSTILE_ARCHIVES,
    store::IMPORT_BREAKS,
    store::IN_USE,
    store::LIST_AND_SHOW,
    store::NAMES,
    store::ODD_NAMES,
    store::SAME_TREE,
    store::SHAPES,
    store::TRUE_OWNERS,
    store::UPKEEP,
    swapped::CHANGES,
    swapped::CONFIGURED,
    swapped::COPIED_FILE,
    swapped::FILLED_FILE,
    swapped::IMPORTED,
    swapped::MODE_OF_A_SOURCE,
    swapped::MOUNTED_ELSEWHERE,
    swapped::MOVED,
    swapped::OPENED_ONCE,
    swapped::RECOVERED,
    swapper::EVERY_STEP,
    swapper::TIGHT_LOOP,
    traced::NO_PATHS,
    tree::COPY_IS_WRITABLE,
    tree::SAME_TREE,
    volumes::ACROSS,
    volumes::ALIASES,
    volumes::EVERY_KIND,
    volumes::MISSING_POINT_MADE_UP,
    volumes::MISSING_POINT_REFUSED,
    volumes::NESTED,
    volumes::NO_ESCAPE,
    volumes::ODD_PATHS,
    volumes::OWNERS,
    volumes::SANDBOX_ESCAPE,
    volumes::ROOTFS_WITHIN,
    volumes::SOURCE_IS_MADE,
    volumes::SUBMOUNTS,
    volumes::THROUGH_SYMLINKS,
    volumes::WRONG_REQUESTS,
    writers::EXECUTE_ONLY,
    writers::FULL,
    writers::DISK_FAILS,
    writers::OTHERS,
    writers::RESERVED,
    writers::SET_ID_AT_ONCE,
    writers::SET_ID,
];

/// A command as a line of sh.
fn in_shell(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| shell_quote(Path::new(word))).collect::<Vec<_>>().join(" ")
}

/// A path as one word of sh.
fn shell_quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}
