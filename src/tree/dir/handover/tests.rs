use super::*;
use rustix::fs::{MemfdFlags, memfd_create};

#[derive(Default)]
struct Nobody;
impl Keeper for Nobody {
    fn keep(&self, _: Node, _: BorrowedFd<'_>) {}
    fn release(&self, _: Node) {}
}

fn memory() -> OwnedFd {
    memfd_create("test", MemfdFlags::CLOEXEC).unwrap()
}

struct Files([OwnedFd; 2]);

impl Files {
    fn new() -> Self {
        Files([memory(), memory()])
    }
    /// As they are now: the writer goes on.
    fn copy(&self) -> Self {
        Files(self.0.each_ref().map(|from| {
            let from = File::from(from.try_clone().unwrap());
            let mut bytes = vec![0; from.metadata().unwrap().len() as usize];
            from.read_exact_at(&mut bytes, 0).unwrap();
            let to = File::from(memory());
            to.write_all_at(&bytes, 0).unwrap();
            to.into()
        }))
    }
    fn take_over(&self) -> (HandoverLog, Inherited) {
        let logs = [self.0[0].try_clone().unwrap(), self.0[1].try_clone().unwrap()];
        let (handover, inherited, _) =
            HandoverLog::take_over(Handover { logs, kept: Vec::new(), keeper: Arc::new(Nobody) });
        (handover, inherited)
    }
}

fn identity(ino: u64) -> Identity {
    Identity { dev: 7, ino, generation: 3 }
}

fn alias(parent: Node, name: &str) -> Alias {
    Alias { parent, name: name.as_bytes().into() }
}

#[test]
fn the_next_process_reads_what_the_last_one_wrote() {
    let files = Files::new();
    let (log, empty) = files.take_over();
    assert!(empty.nodes.is_empty() && empty.handles.is_empty() && empty.devices.is_empty());
    log.device(8);
    log.node(5, identity(5), 0o100_000, &[alias(1, "a")]);
    log.node(5, identity(5), 0o100_000, &[alias(1, "b\n"), alias(1, "a")]);
    log.node(6, identity(6), 0o040_000, &[]);
    log.forget(6);
    let file = HandleNote { node: 5, flags: 2, directory: false };
    log.open(1, file);
    log.open(2, HandleNote { node: 5, flags: 0, directory: true });
    log.close(2);
    drop(log);
    for _ in 0..2 {
        let (_, inherited) = files.take_over();
        assert_eq!(inherited.devices, [8]);
        let note =
            NodeNote { node: 5, identity: identity(5), kind: 0o100_000, aliases: vec![alias(1, "b\n"), alias(1, "a")] };
        assert_eq!(inherited.nodes.into_iter().collect::<Vec<_>>(), [(5, note)]);
        assert_eq!(inherited.handles.into_iter().collect::<Vec<_>>(), [(1, file)]);
    }
}

#[test]
fn a_record_cut_short_at_any_byte_is_left_out_and_written_over() {
    let whole = {
        let files = Files::new();
        let (log, _) = files.take_over();
        log.node(5, identity(5), 1, &[alias(1, "first")]);
        let first = log.log().files[0].length;
        log.node(6, identity(6), 1, &[alias(1, "second")]);
        let mut bytes = vec![0; log.log().files[0].length as usize];
        log.log().files[0].file.read_exact_at(&mut bytes, 0).unwrap();
        (bytes, first)
    };
    for cut in whole.1..whole.0.len() as u64 {
        let files = Files::new();
        let (log, _) = files.take_over();
        log.log().files[0].file.write_all_at(&whole.0[..cut as usize], 0).unwrap();
        let (log, inherited) = files.take_over();
        assert_eq!(inherited.nodes.len(), 1, "cut at {cut}");
        log.node(7, identity(7), 1, &[alias(1, "third")]);
        let mut nodes: Vec<_> = files.take_over().1.nodes.into_keys().collect();
        nodes.sort_unstable();
        assert_eq!(nodes, [5, 7], "cut at {cut}");
    }
}

#[test]
fn copying_keeps_what_lives_and_a_copy_cut_short_does_not_count() {
    let files = Files::new();
    let (log, _) = files.take_over();
    log.device(9);
    log.open(4, HandleNote { node: 5, flags: 1, directory: false });
    while log.log().files[0].length < SMALL {
        log.node(5, identity(5), 1, &[alias(1, "old")]);
    }
    let copying = log.start_copying().expect("long enough");
    assert!(log.start_copying().is_none(), "one at a time");
    log.node(6, identity(6), 1, &[alias(1, "meanwhile")]);
    copying.node(5, identity(5), 1, &[alias(1, "old")]);
    // Killed here, the first file is still the one that counts.
    let half = files.copy().take_over().1;
    assert_eq!((half.nodes.len(), half.handles.len()), (2, 1));
    copying.finish();
    log.forget(6);
    assert_eq!(log.log().files[0].length, 0);
    assert!(log.log().files[1].length < 1000);
    let (log, inherited) = files.take_over();
    assert_eq!(log.log().current, 1);
    assert_eq!(inherited.nodes.into_keys().collect::<Vec<_>>(), [5]);
    assert_eq!((inherited.devices, inherited.handles.len()), (vec![9], 1));
}

#[test]
fn an_intent_stands_until_its_thread_comes_with_the_next_one() {
    use crate::tree::resend::{CurrentRequest, answering};
    let files = Files::new();
    let (log, _) = files.take_over();
    let intent = Intent { first: Some(identity(5)), second: None, size: Some(9) };
    let intend = |log: &HandoverLog, unique, intent| {
        answering(CurrentRequest { unique, is_resent: false }, || log.intend(|| intent))
    };
    assert_eq!(intend(&log, 10, intent), None);
    drop(log);
    let (log, inherited) = files.take_over();
    assert_eq!(inherited.intents.into_iter().collect::<Vec<_>>(), [(10, intent)]);
    // Sent again: what it was before it was begun, not what it is now, through another death too.
    assert_eq!(intend(&log, 10, Intent::default()), Some(intent));
    drop(log);
    let (log, _) = files.take_over();
    assert_eq!(intend(&log, 10, Intent::default()), Some(intent));
    assert_eq!(intend(&log, 12, Intent::default()), None);
    let (log, inherited) = files.take_over();
    assert_eq!(inherited.intents.into_keys().collect::<Vec<_>>(), [12]);
    while !log.log().is_long() {
        log.node(5, identity(5), 1, &[alias(1, "old")]);
    }
    log.start_copying().expect("long enough").finish();
    assert_eq!(files.copy().take_over().1.intents.into_keys().collect::<Vec<_>>(), [12], "copied");
}

#[test]
fn records_of_every_length_survive_where_one_mapping_ends() {
    let files = Files::new();
    let (log, _) = files.take_over();
    let name = |node: Node| "n".repeat(1 + node as usize % 251);
    let mut last = 0;
    while log.log().files[0].length < 5 * WINDOW / 2 {
        last += 1;
        log.node(last, identity(last), 1, &[alias(1, &name(last))]);
    }
    assert_eq!(log.log().files[0].file.metadata().unwrap().len(), 3 * WINDOW);
    let inherited = files.copy().take_over().1;
    assert_eq!(inherited.nodes.len() as u64, last);
    for (node, note) in inherited.nodes {
        assert_eq!(note.aliases, [alias(1, &name(node))]);
    }
}

#[test]
fn what_a_kill_left_behind_the_last_record_is_gone() {
    let files = Files::new();
    let (log, _) = files.take_over();
    log.node(5, identity(5), 1, &[alias(1, "whole")]);
    let end = log.log().files[0].length;
    drop(log);
    // A record of which the first bytes are missing; a name in it looks like a record.
    let inner = Record::new(Kind::Forget).number(5);
    let torn = [&[0xff; HEADER + 9][..], &inner.header(), &inner.bytes].concat();
    File::from(files.0[0].try_clone().unwrap()).write_all_at(&torn, end).unwrap();
    let (log, _) = files.take_over();
    // As long as what stood before the inner record.
    log.forget(6);
    assert_eq!(log.log().files[0].length, end + (HEADER + 9) as u64);
    drop(log);
    assert_eq!(files.take_over().1.nodes.into_keys().collect::<Vec<_>>(), [5]);
}
