//! Puts a container image's root filesystem in place: read-only, at a path you name, in milliseconds, with or without root.
//!
//! Arrows point one way: `cli -> provisioner -> {store, backend} -> {index, tree, sys} -> error`, and
//! `daemon -> fuse -> tree -> {index, sys}`. Store and backend never see each other: the provisioner hands a
//! [`plan::Plan`] from one to the other.

pub mod backend;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod error;
pub mod fault;
pub mod fuse;
pub mod host;
pub mod id;
pub mod idmap;
pub mod image;
pub mod index;
pub mod paths;
pub mod pathtext;
pub mod plan;
pub mod provisioner;
pub mod pull;
pub mod store;
pub mod sys;
pub mod tree;
pub mod volume;

pub use cli::main;
pub use error::{Error, Kind, Result};
