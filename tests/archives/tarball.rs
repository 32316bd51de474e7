//! Archives byte by byte, so that they can say what no tool would write. Shares no code with the program.

pub(crate) const FILE: u8 = b'0';
pub(crate) const HARD: u8 = b'1';
pub(crate) const SYM: u8 = b'2';
pub(crate) const CHR: u8 = b'3';
pub(crate) const BLK: u8 = b'4';
pub(crate) const DIR: u8 = b'5';
pub(crate) const FIFO: u8 = b'6';

/// One header's fields, all of them free.
#[derive(Clone)]
pub(crate) struct Head {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: Vec<u8>,
    pub(crate) uid: Vec<u8>,
    pub(crate) gid: Vec<u8>,
    pub(crate) size: Vec<u8>,
    pub(crate) mtime: Vec<u8>,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) is_gnu: bool,
}

pub(crate) fn octal(value: u64, width: usize) -> Vec<u8> {
    format!("{value:0w$o}\0", w = width - 1).into_bytes()
}

pub(crate) fn head(name: &[u8], kind: u8) -> Head {
    Head {
        name: name.to_vec(),
        kind,
        link: Vec::new(),
        mode: octal(if kind == DIR { 0o755 } else { 0o644 }, 8),
        uid: octal(0, 8),
        gid: octal(0, 8),
        size: octal(0, 12),
        mtime: octal(1, 12),
        major: 0,
        minor: 0,
        is_gnu: false,
    }
}

#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    /// An ACI that has its manifest and its root already.
    pub(crate) fn aci() -> Self {
        let mut tar = Tar::default();
        tar.file(b"manifest", br#"{"acKind":"ImageManifest","acVersion":"0.8.11","name":"example.com/x"}"#);
        tar.entry(&head(b"rootfs", DIR), b"");
        tar
    }

    pub(crate) fn block(&mut self, head: &Head) {
        let mut block = [0_u8; 512];
        let mut put = |at: usize, most: usize, bytes: &[u8]| {
            let length = bytes.len().min(most);
            block[at..at + length].copy_from_slice(&bytes[..length]);
        };
        put(0, 100, &head.name);
        put(100, 8, &head.mode);
        put(108, 8, &head.uid);
        put(116, 8, &head.gid);
        put(124, 12, &head.size);
        put(136, 12, &head.mtime);
        put(156, 1, &[head.kind]);
        put(157, 100, &head.link);
        put(257, 8, if head.is_gnu { b"ustar  \0" } else { b"ustar\x0000" });
        put(329, 8, &octal(head.major.into(), 8));
        put(337, 8, &octal(head.minor.into(), 8));
        self.seal(block);
    }

    pub(crate) fn seal(&mut self, mut block: [u8; 512]) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&block);
    }

    pub(crate) fn body(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(crate) fn entry(&mut self, head: &Head, content: &[u8]) {
        let mut head = head.clone();
        if !content.is_empty() {
            head.size = octal(content.len() as u64, 12);
        }
        self.block(&head);
        self.body(content);
    }

    pub(crate) fn file(&mut self, name: &[u8], content: &[u8]) {
        self.entry(&head(name, FILE), content);
    }

    pub(crate) fn dir(&mut self, name: &[u8]) {
        self.entry(&head(name, DIR), b"");
    }

    pub(crate) fn link(&mut self, kind: u8, name: &[u8], target: &[u8]) {
        self.entry(&Head { link: target.to_vec(), ..head(name, kind) }, b"");
    }

    /// An entry of a kind, made so that it could do harm where it lands.
    pub(crate) fn any(&mut self, kind: u8, name: &[u8]) {
        let harm = match kind {
            HARD => Head { link: b"rootfs/first".to_vec(), ..head(name, kind) },
            SYM => Head { link: b"/etc/passwd".to_vec(), ..head(name, kind) },
            CHR => Head { major: 1, minor: 3, mode: octal(0o666, 8), ..head(name, kind) },
            BLK => Head { major: 8, minor: 0, ..head(name, kind) },
            DIR => Head { mode: octal(0o777, 8), ..head(name, kind) },
            _ => head(name, kind),
        };
        self.entry(&harm, if kind == FILE { b"escaped" } else { b"" });
    }

    /// An extension record: PAX (`x`, `g`) or GNU (`L`, `K`).
    pub(crate) fn extension(&mut self, kind: u8, body: &[u8]) {
        self.entry(&Head { is_gnu: matches!(kind, b'L' | b'K'), ..head(b"ext", kind) }, body);
    }

    pub(crate) fn pax(&mut self, records: &[(&str, &[u8])]) {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.extension(b'x', &body);
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest + 1..).find(|n| *n == rest + n.to_string().len()).expect("a length that counts itself");
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}
