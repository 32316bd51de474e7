//! The only place with `unsafe`: one call a block, its SAFETY line says why it is sound.
#![allow(unsafe_code)]
