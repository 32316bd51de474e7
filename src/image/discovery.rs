//! Where an AppC image of a name is found.
