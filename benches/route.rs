//! What does the route table add to a lookup, with and without volumes beside it?
#![allow(missing_docs)] // criterion's macros make public items

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use fsprov::internals::plan::Ownership;
use fsprov::internals::tree::image::{ImageTree, Trust};
use fsprov::internals::tree::route::RouteTree;
use fsprov::internals::tree::{Caller, Lookup, Node, ROOT, Tree};
use fsprov::volume::{Access, ContainerPath, Form};

mod support;

fn image() -> Arc<dyn Tree> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let layer = std::fs::File::open(dir.path()).expect("just made");
    let index = support::mapped(100, 100);
    Arc::new(ImageTree::open(index, vec![layer.into()], Ownership::default(), Trust::Size).expect("one layer"))
}

fn route(c: &mut Criterion) {
    let caller = Caller { uid: 0, gid: 0, pid: 0 };
    let mut group = c.benchmark_group("route");
    let mut measure = |name: BenchmarkId, tree: &dyn Tree| {
        let find = |parent: Node, name: &str| match tree.lookup(&caller, parent, name.as_ref()) {
            Ok(Lookup::Found(entry)) => entry.attr.node,
            other => panic!("{name}: {other:?}"),
        };
        let directory = find(find(find(ROOT, "usr"), "share"), "package-00007");
        let wanted = "module_0042.cpython-311.pyc".as_ref();
        group.bench_function(name, |b| {
            b.iter(|| black_box(tree.lookup(&caller, directory, wanted).expect("it is there")));
        });
    };
    measure(BenchmarkId::new("lookup", "no table"), &*image());
    for volumes in [0, 1, 100] {
        let routes = (0..volumes)
            .map(|v| {
                let target = ContainerPath::new(format!("/volume/{v}").as_ref()).expect("a good path");
                (target, Form::Directory, Access::Ro, image())
            })
            .collect();
        let table = RouteTree::build(image(), routes).expect("places that the image lacks");
        measure(BenchmarkId::new("lookup", volumes), &table);
    }
    group.finish();
}

criterion_group!(benches, route);
criterion_main!(benches);
