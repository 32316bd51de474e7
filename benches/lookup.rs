//! What does a lookup in the index cost, and would hashing beat the binary search?
#![allow(missing_docs)] // criterion's macros make public items

use std::collections::HashMap;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use fsprov::internals::index::read::InodeKind;

mod support;

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for (directories, files) in [(1000, 10), (100, 100), (10, 10_000)] {
        let index = support::mapped(directories, files);
        let share = index.find(b"usr/share").expect("undamaged").expect("made above");
        let InodeKind::Directory { first, count } = share.kind else { panic!("a directory") };
        let mut wanted = Vec::new();
        for at in first..first + count {
            let directory = index.inode(index.name(at).expect("undamaged").row).expect("undamaged");
            let InodeKind::Directory { first, count } = directory.kind else { panic!("a directory") };
            // A stride that is coprime to the counts: the order of an archive would flatter a cache.
            for i in 0..count {
                let name = index.name(first + (i * 7919) % count).expect("undamaged").name;
                wanted.push((directory, name.to_vec()));
            }
        }
        let mut at = 0;
        let mut next = |n: usize| {
            at = (at + 104_729) % n;
            at
        };
        group.bench_function(BenchmarkId::new("hit", files), |b| {
            b.iter(|| {
                let (directory, name) = &wanted[next(wanted.len())];
                black_box(index.lookup(directory, name).expect("undamaged").expect("it is there"))
            });
        });
        group.bench_function(BenchmarkId::new("miss", files), |b| {
            b.iter(|| black_box(index.lookup(&wanted[next(wanted.len())].0, b"module_x").expect("undamaged")));
        });
        let table: HashMap<(u32, &[u8]), u32> = wanted.iter().map(|(d, n)| ((d.row, n.as_slice()), d.row)).collect();
        group.bench_function(BenchmarkId::new("hashed, for comparison", files), |b| {
            b.iter(|| {
                let (directory, name) = &wanted[next(wanted.len())];
                black_box(table[&(directory.row, name.as_slice())])
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookup);
criterion_main!(benches);
