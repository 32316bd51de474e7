//! The rule that nothing can be opened but what was named (landlock(7)).

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

/// The newest rules that are asked for.
pub(crate) const KNOWN: ABI = ABI::V5;

/// Before the second version (Linux 5.19) no name can be moved between directories under any rule.
pub(crate) fn is_offered() -> bool {
    let try_it = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    let offered =
        crate::fault::point("walls.landlock").map_err(|e| e.to_string()).and(try_it.map_err(|e| e.to_string()));
    offered.inspect_err(|e| log::debug!(target: super::TARGET, "no landlock: {e}")).is_ok()
}

/// From now on nothing can be done but this below these, no port be used, and no process outside be signalled. `false`: this kernel has no
/// landlock that would do.
///
/// Descriptors that are open stay good. The process must have said no_new_privs, or have CAP_SYS_ADMIN.
pub(crate) fn restrict<'a>(
    allowed: impl IntoIterator<Item = (BorrowedFd<'a>, BitFlags<AccessFs>)>,
) -> Result<bool, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        // No signals to processes of ours beside it (Linux 6.12).
        .scope(Scope::Signal)?
        .create()?
        .no_new_privs(false);
    for (place, access) in allowed {
        rules = rules.add_rule(PathBeneath::new(place, access))?;
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}
