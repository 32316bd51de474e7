//! The rootfs shows what the image holds.

use crate::common::harness::on;
use crate::common::walk::{assert_same, picture};
use crate::common::{Case, Stage};

pub(crate) const SAME_TREE: Case = Case::new("same_tree_as_the_source", on::every_backend, |stage: &Stage| {
    let image = stage.full_image();
    let want = picture(&image);
    assert!(want.len() > 2000, "the source should have been seen whole: {} paths", want.len());
    let rootfs = stage.mount(&image, "rootfs", [] as [&str; 0]);
    // Twice: the second time from the kernel's caches.
    for pass in ["first walk", "second walk"] {
        assert_same(&want, &picture(&rootfs), pass);
    }
    stage.unmount(&rootfs);
    assert_same(&want, &picture(&image), "the image after unmount");
});
