//! What does one page of readdirplus cost the image tree (without the kernel's part)?
#![allow(missing_docs)] // criterion's macros make public items

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fsprov::internals::plan::Ownership;
use fsprov::internals::tree::image::{ImageTree, Trust};
use fsprov::internals::tree::{Caller, Fit, ListMode, Lookup, Node, ROOT, Tree as _};

mod support;

/// Entries of the bench's names (32 bytes) in one reply of 128 KiB: 152 bytes of fuse_direntplus and the name each.
const PAGE: usize = 700;

fn readdirplus(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let layer = std::fs::File::open(dir.path()).expect("just made");
    let tree = ImageTree::open(support::mapped(20, 5000), vec![layer.into()], Ownership::default(), Trust::Size)
        .expect("one layer");
    let caller = Caller { uid: 0, gid: 0, pid: 0 };
    let find = |parent: Node, name: &str| match tree.lookup(&caller, parent, name.as_ref()) {
        Ok(Lookup::Found(entry)) => entry.attr.node,
        other => panic!("{name}: {other:?}"),
    };
    let directory = find(find(find(ROOT, "usr"), "share"), "package-00007");
    let mut group = c.benchmark_group("readdirplus");
    group.throughput(Throughput::Elements(PAGE as u64));
    let mut cookie = 0;
    group.bench_function("page of 700", |b| {
        b.iter(|| {
            let mut given = 0;
            let mut last = 0;
            tree.readdir(&caller, directory, 0, cookie, ListMode::Plus, &mut |item| {
                if given == PAGE {
                    return Fit::Full;
                }
                given += 1;
                last = item.cookie;
                black_box(item);
                Fit::Taken
            })
            .expect("undamaged");
            cookie = if given < PAGE { 0 } else { last };
        });
    });
    group.finish();
}

criterion_group!(benches, readdirplus);
criterion_main!(benches);
