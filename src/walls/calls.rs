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
    /// No: one could be opened by its maker.
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
    let rules: Vec<_> = rules.into_iter().collect();
    let (mut program, parts) = (BpfProgram::new(), allowed.div_ceil(PART));
    // Each part ends by refusing what it does not allow: over it goes what is in a later one.
    for (number, part) in (1..).zip(rules.chunks(PART)) {
        let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let filter = SeccompFilter::new(part.iter().cloned().collect(), refuse, SeccompAction::Allow, arch);
        let part_program = filter.and_then(BpfProgram::try_from).map_err(|e| e.to_string())?;
        if program.is_empty() {
            program.extend_from_slice(&part_program[..AFTER_ARCHITECTURE]);
            program.extend(before_the_list());
        }
        let (last, over) = (part[part.len() - 1].0 as u32, part_program.len() as u32);
        if number < parts {
            program.extend([
                load_number(),
                when_number(libc::BPF_JGT, last),
                instruction(libc::BPF_JMP | libc::BPF_JA, 0, over),
            ]);
        }
        program.extend(part_program);
    }
    Ok((program, allowed))
}

/// From now on no thread of this process starts another: EPERM. RLIMIT_NPROC does not bind root. Behind a filter of
/// [`filter`] that allows [`closing_threads`].
pub(crate) fn close_threads() -> Result<(), String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let rules = BTreeMap::from([(libc::SYS_clone, Vec::new())]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).map_err(|e| e.to_string())?;
    let program = BpfProgram::try_from(filter).map_err(|e| e.to_string())?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| e.to_string())
}

/// What [`close_threads`] calls, beside prctl(2) with PR_SET_NO_NEW_PRIVS: one more filter for all threads.
pub(crate) fn closing_threads() -> Result<(Call, Vec<SeccompRule>), String> {
    let is = |argument, value| when(argument, Length::Qword, Is::Eq, value);
    let operation = is(0, libc::SECCOMP_SET_MODE_FILTER.into())?;
    Ok((libc::SYS_seccomp, vec![rule(vec![operation, is(1, libc::SECCOMP_FILTER_FLAG_TSYNC)?])?]))
}

/// How many instructions the library's check of the architecture has, which ends the process where it is another one.
const AFTER_ARCHITECTURE: usize = 3;
/// Numbers with this bit are x32's (__X32_SYSCALL_BIT, asm/unistd.h), on the same architecture as far as a filter is told.
const X32: u32 = 0x4000_0000;

/// How many system calls each part of the list has: the library's programs ask for one after the other, and when a filter is set the kernel
/// runs it for every number there is (seccomp_cache_prepare, kernel/seccomp.c).
const PART: usize = 8;

fn instruction(code: u32, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf, k }
}

fn load_number() -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)
}

/// Go on to the next instruction, or jump over it.
fn when_number(test: u32, k: u32) -> sock_filter {
    instruction(libc::BPF_JMP | test | libc::BPF_K, 1, k)
}

fn give(answer: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, answer)
}

/// What the library has no words for: one answer for each filter is all it knows.
fn before_the_list() -> Vec<sock_filter> {
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let mut program = vec![load_number()];
    if cfg!(target_arch = "x86_64") {
        program.extend([when_number(libc::BPF_JGE, X32), give(libc::SECCOMP_RET_KILL_PROCESS)]);
    }
    program.extend([when_number(libc::BPF_JEQ, libc::SYS_clone3 as u32), give(unknown)]);
    program.extend([when_number(libc::BPF_JGE, FIRST_UNKNOWN), give(unknown)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers to a call, as the kernel runs it (linux/bpf_common.h), and in how many steps.
    fn run(program: &[sock_filter], number: u32) -> (u32, usize) {
        let arch = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
        let (mut at, mut loaded) = (0, 0);
        for steps in 1.. {
            let one = &program[at];
            let jump = |is: bool| usize::from(if is { one.jt } else { one.jf });
            at += 1;
            match u32::from(one.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    loaded = [number, arch][one.k as usize / 4];
                }
                code if code == libc::BPF_JMP | libc::BPF_JA => at += one.k as usize,
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += jump(loaded == one.k),
                code if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => at += jump(loaded >= one.k),
                code if code == libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K => at += jump(loaded > one.k),
                code if code == libc::BPF_RET | libc::BPF_K => return (one.k, steps),
                code => panic!("instruction {code:#x} at {at}"),
            }
        }
        unreachable!()
    }

    #[test]
    fn what_is_on_the_list_is_allowed_and_nothing_else() {
        for length in [1, PART, PART + 1, 10 * PART - 1] {
            let allowed: Vec<Call> = (0..length as Call).map(|n| 3 * n + 2).collect();
            let (program, count) = filter(&[("a test", &allowed)], Vec::new()).unwrap();
            assert_eq!(count, length);
            for number in 0..FIRST_UNKNOWN {
                let expected = if allowed.contains(&Call::from(number)) {
                    libc::SECCOMP_RET_ALLOW
                } else if number == libc::SYS_clone3 as u32 {
                    libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()
                } else {
                    libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()
                };
                let (answer, steps) = run(&program, number);
                assert_eq!(answer, expected, "{number} of {length}");
                assert!(steps < 70, "{number} of {length}: {steps} steps");
            }
        }
    }
}
