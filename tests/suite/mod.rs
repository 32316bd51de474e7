//! The cases. Each file is one subject; a case says which lanes it is for.

use crate::common::Case;

mod tree;

/// Every case.
pub(crate) const CASES: &[Case] = &[tree::SAME_TREE];
