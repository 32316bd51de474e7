//! Provision, destroy, list. Must not make mounts itself.
