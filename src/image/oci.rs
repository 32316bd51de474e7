//! OCI manifests.
