//! What the walls around a process of ours are built of; who stands behind which is said where it is started (`daemon`, `store`).

pub(crate) mod calls;
#[cfg(feature = "failpoints")]
pub(crate) mod escapes;
pub(crate) mod files;
pub(crate) mod root;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

const TARGET: &str = "fsprov::walls";

/// All of these.
pub(crate) fn union(all: &[CapabilitySet]) -> CapabilitySet {
    all.iter().fold(CapabilitySet::empty(), |sum, one| sum.union(*one))
}

/// Keep these, of those that the process has. No program that is started gets any of the rest, no matter who owns it (the bounding set).
pub(crate) fn drop_capabilities(needed: CapabilitySet) -> rustix::io::Result<CapabilitySet> {
    let mut sets = capabilities(None)?;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            // EINVAL: this kernel has fewer.
            if !needed.contains(one) && rustix::thread::remove_capability_from_bounding_set(one).is_err() {
                break;
            }
        }
    }
    // EINVAL: a kernel before 4.3.
    let _ = rustix::thread::clear_ambient_capability_set();
    sets.effective &= needed;
    sets.permitted &= needed;
    sets.inheritable = CapabilitySet::empty();
    set_capabilities(None, sets)?;
    Ok(sets.effective)
}
