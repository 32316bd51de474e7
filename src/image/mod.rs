//! Manifests: parse and validate. Must not know the disk layout.
