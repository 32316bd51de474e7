//! The cases. Each file is one subject; a case says which lanes it is for.

use std::path::Path;

use crate::common::Case;

mod agent;
mod alone;
mod apart;
mod appc;
mod cli;
mod clients;
mod commit;
mod crash;
mod destroy;
mod durable;
mod engines;
mod enosys;
mod faults;
mod fdstore;
mod filled;
mod front;
mod hardened;
mod layers;
mod live;
mod mounted;
mod over;
mod posix;
mod races;
mod readonly;
mod recover;
mod registry;
mod run;
mod setuid;
mod store;
mod swapped;
mod swapper;
mod traced;
mod tree;
mod upper;
mod volumes;
mod writers;

inventory::collect!(Case);

/// Every case, by name.
pub(crate) fn cases() -> Vec<&'static Case> {
    let mut all: Vec<&Case> = inventory::iter::<Case>().collect();
    all.sort_by_key(|case| case.name);
    let twice = all.windows(2).find(|two| two[0].name == two[1].name);
    assert!(twice.is_none(), "two cases have one name: {}", twice.map_or("", |two| two[0].name));
    all
}

/// A command as a line of sh.
fn in_shell(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| shell_quote(Path::new(word))).collect::<Vec<_>>().join(" ")
}

/// A path as one word of sh.
fn shell_quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}
