//! The local images. Must not know backends.
