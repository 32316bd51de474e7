//! The only importers of fuser. Must not know the store.
