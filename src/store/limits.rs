//! How much an archive may ask for. What is refused here is refused before it reaches the disk or our memory.

/// Caps on one import. [`Limits::default`] is for people's images; tests and careful agents go lower.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Entries of one archive, the directories on the way to them counted. A whole Debian desktop has some 500,000 files; an entry
    /// costs about 200 bytes of the disk beside the image until it is imported, and no memory.
    pub entries: u64,
    /// Bytes of all files together, holes counted: what the largest disks of single hosts hold.
    pub total_bytes: u64,
    /// Bytes of one file, holes counted: what ext4 with 4 KiB blocks can hold.
    pub file_bytes: u64,
    /// Bytes that a compressed (or sparse) archive may grow to before `ratio` is looked at: a small image of zeros is not a bomb.
    pub ratio_floor: u64,
    /// Bytes out for each byte in, past the floor. gzip cannot exceed 1032; xz, bzip2 and zstd bombs reach a million.
    pub ratio: u64,
    /// Directories above one another. Real trees stay below 100 (node_modules at its worst); each level costs us a
    /// descriptor, and the soft limit on those is often 1024.
    pub depth: usize,
    /// Bytes of one entry's extended attributes, names and values together: XATTR_SIZE_MAX of Linux is 64 KiB for one.
    pub xattr_bytes: usize,
    /// Extended attributes of one entry: each is held in memory, and one global record gives them to every entry. The kernel
    /// lists at most 64 KiB of names; files seen in images have below 10.
    pub xattrs: usize,
    /// Bytes of the extended attributes of all entries that are taken: names, values, and 128 for each, which stand for the
    /// memory that it takes until the index is written and for the system call that sets it.
    pub xattrs_total_bytes: u64,
    /// Bytes of one PAX or GNU extension record. It holds the xattrs, two paths and the map of a sparse file.
    pub extension_bytes: u64,
    /// Pieces of one sparse file: 16 bytes each in our memory, and as much again while there come more.
    pub sparse_pieces: usize,
    /// Bytes of a manifest. The AppC and OCI ones seen are below 64 KiB; it is held in memory.
    pub manifest_bytes: u64,
    /// Memory that an xz or zstd stream may ask for: most of what an import may take. `xz -8` asks for 33 MiB and `zstd -20` for 32;
    /// for the archives of `xz -9` (65 MiB) or `zstd --long=27` (128) it is raised.
    pub decoder_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: 8_000_000,
            total_bytes: 16 << 40,
            file_bytes: 16 << 40,
            ratio_floor: 128 << 20,
            ratio: 1100,
            depth: 256,
            xattr_bytes: 128 << 10,
            xattrs: 256,
            xattrs_total_bytes: 16 << 20,
            extension_bytes: 1 << 20,
            sparse_pieces: 1 << 18,
            manifest_bytes: 1 << 20,
            decoder_bytes: 34 << 20,
        }
    }
}

/// Each limit by its name in a configuration file.
macro_rules! by_name {
    ($($name:ident),* $(,)?) => {
        impl Limits {
            /// The names that [`Limits::set`] knows.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            /// Set one limit. False: there is none of this name, or it cannot be that large here.
            pub fn set(&mut self, name: &str, value: u64) -> bool {
                match name {
                    $(stringify!($name) => value.try_into().map(|value| self.$name = value).is_ok(),)*
                    _ => false,
                }
            }

            /// One limit.
            pub fn get(&self, name: &str) -> Option<u64> {
                match name {
                    $(stringify!($name) => Some(self.$name as u64),)*
                    _ => None,
                }
            }
        }
    };
}

by_name!(
    entries,
    total_bytes,
    file_bytes,
    ratio_floor,
    ratio,
    depth,
    xattr_bytes,
    xattrs,
    xattrs_total_bytes,
    extension_bytes,
    sparse_pieces,
    manifest_bytes,
    decoder_bytes,
);
