//! What does it cost to make an index, to open one, and to check one?
#![allow(missing_docs)] // criterion's macros make public items

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fsprov::internals::index::{Builder, Index, Whiteouts};

mod support;

fn build(c: &mut Criterion) {
    let mut group = c.benchmark_group("index");
    group.sample_size(10);
    for directories in [10, 1000] {
        let files = directories * 100;
        group.throughput(Throughput::Elements(u64::from(files)));
        group.bench_function(BenchmarkId::new("add entries", files), |b| {
            b.iter_with_large_drop(|| support::image(directories, 100));
        });
        group.bench_function(BenchmarkId::new("write", files), |b| {
            b.iter_batched(
                || support::image(directories, 100),
                |builder| builder.finish().expect("within limits"),
                BatchSize::PerIteration,
            );
        });
        let index = support::mapped(directories, 100);
        group.bench_function(BenchmarkId::new("verify", files), |b| {
            b.iter(|| index.verify().expect("undamaged"));
        });
    }
    group.finish();
}

fn open(c: &mut Criterion) {
    let mut group = c.benchmark_group("open index");
    let dir = tempfile::tempdir().expect("a temporary directory");
    for directories in [1, 10_000] {
        let path = dir.path().join(directories.to_string());
        support::image(directories, 10).write_file(&path).expect("an index");
        group.bench_function(BenchmarkId::from_parameter(directories * 10), |b| {
            b.iter(|| black_box(Index::open(&path).expect("undamaged")));
        });
    }
    group.finish();
}

fn merge(c: &mut Criterion) {
    let layers: Vec<Index> = (0..100).map(|_| support::mapped(10, 10)).collect();
    let mut group = c.benchmark_group("merge");
    group.sample_size(10);
    group.bench_function("100 layers of 100 files", |b| {
        b.iter(|| {
            let mut builder = Builder::new();
            for layer in &layers {
                builder.begin_layer(Whiteouts::Oci).expect("at most 4096");
                builder.add_index(layer, |_, _| true).expect("undamaged");
            }
            black_box(builder.finish().expect("within limits"))
        });
    });
    group.finish();
}

criterion_group!(benches, build, open, merge);
criterion_main!(benches);
