//! Filters of system calls (seccomp(2)): a list of what is allowed, of everything else nothing.
//!
//! What is not on the list says EPERM, except: clone3(2), whose arguments a filter cannot see, and calls made after these lists, say ENOSYS,
//! upon which a C library takes the older way; another architecture's calls and x32's end the process.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition as Condition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

pub(crate) type Call = libc::c_long;

/// Calls from here on are newer than the lists, whose author knew Linux 6.18. One numbering for all architectures since 424
/// (scripts/syscall.tbl).
const FIRST_UNKNOWN: u32 = 470;

/// May device nodes be made?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// Yes: where they are made, none can be opened.
    Closed,
    /// No: one could be opened by whoever made it.
    Refused,
}

pub(crate) fn when(argument: u8, length: Length, is: Is, value: u64) -> Result<Condition, String> {
    Condition::new(argument, length, is, value).map_err(|e| e.to_string())
}

pub(crate) fn rule(conditions: Vec<Condition>) -> Result<SeccompRule, String> {
    SeccompRule::new(conditions).map_err(|e| e.to_string())
}

/// mknodat(2), by what is made.
pub(crate) fn nodes(devices: Devices) -> Result<Vec<SeccompRule>, String> {
    use Length::{Dword, Qword};
    let of_type = |kind: u32| when(2, Dword, Is::MaskedEq(u64::from(libc::S_IFMT)), u64::from(kind));
    let mut nodes: Vec<SeccompRule> = [0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK]
        .into_iter()
        .map(|kind| rule(vec![of_type(kind)?]))
        .collect::<Result<_, _>>()?;
    // Overlayfs's whiteout, which no driver answers for.
    nodes.push(rule(vec![of_type(libc::S_IFCHR)?, when(3, Qword, Is::Eq, 0)?])?);
    if devices == Devices::Closed {
        nodes.extend([rule(vec![of_type(libc::S_IFCHR)?])?, rule(vec![of_type(libc::S_IFBLK)?])?]);
    }
    Ok(nodes)
}

/// For mmap(2) and mprotect(2): memory, but none to be executed.
pub(crate) fn not_executable() -> Result<SeccompRule, String> {
    rule(vec![when(2, Length::Dword, Is::MaskedEq(libc::PROT_EXEC as u64), 0)?])
}

/// The filter that allows these calls: some whatever their arguments, by what needs them, others by rules of which one is enough. And how
/// many calls that is.
pub(crate) fn filter(
    allowed: &[(&str, &[Call])],
    checked: Vec<(Call, Vec<SeccompRule>)>,
) -> Result<(BpfProgram, usize), String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    // An empty chain of conditions: whatever the arguments.
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        allowed.iter().flat_map(|(_, calls)| *calls).map(|&call| (call, Vec::new())).collect();
    rules.extend(checked);
    let allowed = rules.len();
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch).map_err(|e| e.to_string())?;
    let mut program = BpfProgram::try_from(filter).map_err(|e| e.to_string())?;
    program.splice(AFTER_ARCHITECTURE..AFTER_ARCHITECTURE, before_the_list());
    Ok((program, allowed))
}

/// How many instructions the library's check of the architecture has, which ends the process where it is another one.
const AFTER_ARCHITECTURE: usize = 3;
/// Numbers with this bit are x32's (__X32_SYSCALL_BIT, asm/unistd.h), on the same architecture as far as a filter is told.
const X32: u32 = 0x4000_0000;

/// What the library has no words for: one answer for each filter is all it knows.
fn before_the_list() -> Vec<sock_filter> {
    let load_number = sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: 0 };
    // Go on to the next instruction, or jump over it.
    let jump = |test: u32, k: u32| sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt: 0, jf: 1, k };
    let give = |k: u32| sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let mut program = vec![load_number];
    if cfg!(target_arch = "x86_64") {
        program.extend([jump(libc::BPF_JGE, X32), give(libc::SECCOMP_RET_KILL_PROCESS)]);
    }
    program.extend([jump(libc::BPF_JEQ, libc::SYS_clone3 as u32), give(unknown)]);
    program.extend([jump(libc::BPF_JGE, FIRST_UNKNOWN), give(unknown)]);
    program
}
