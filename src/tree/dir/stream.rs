//! Where the reader of an open directory stands.

use std::os::fd::OwnedFd;

use rustix::fs::{self, FileType, RawDir, SeekFrom};

use crate::tree::Result;

/// Bytes of entries taken from the kernel at once: what glibc's readdir asks for.
const BATCH: usize = 32 << 10;

/// Entries that were taken from the kernel and not yet given on.
#[derive(Debug, Default)]
pub(super) struct Stream {
    items: Vec<Item>,
    names: Vec<u8>,
    /// The next one to give.
    at: usize,
    /// Where the next one to give stands; where the descriptor stands if there is no next one.
    cookie: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) ino: u64,
    pub(super) cookie: u64,
    pub(super) kind: u32,
    name: (u32, u32),
}

impl Stream {
    /// Stand at `cookie`.
    pub(super) fn seek(&mut self, fd: &OwnedFd, cookie: u64) -> Result<()> {
        // From the start means from the start: what was made since must show (rewinddir(3)).
        if cookie == 0 || cookie != self.cookie {
            fs::seek(fd, SeekFrom::Start(cookie))?;
            self.items.clear();
            self.at = 0;
            self.cookie = cookie;
        }
        Ok(())
    }

    /// The next entry; None at the end.
    pub(super) fn next(&mut self, fd: &OwnedFd) -> Result<Option<(Item, &[u8])>> {
        if self.at == self.items.len() {
            self.fill(fd)?;
        }
        Ok(self.items.get(self.at).map(|item| (*item, &self.names[item.name.0 as usize..item.name.1 as usize])))
    }

    pub(super) fn taken(&mut self) {
        self.cookie = self.items[self.at].cookie;
        self.at += 1;
    }

    fn fill(&mut self, fd: &OwnedFd) -> Result<()> {
        self.items.clear();
        self.names.clear();
        self.at = 0;
        let mut buffer = Box::<[u8]>::new_uninit_slice(BATCH);
        let mut entries = RawDir::new(fd, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let start = self.names.len() as u32;
            self.names.extend_from_slice(entry.file_name().to_bytes());
            self.items.push(Item {
                ino: entry.ino(),
                cookie: entry.next_entry_cookie(),
                kind: match entry.file_type() {
                    FileType::Unknown => 0,
                    kind => kind.as_raw_mode(),
                },
                name: (start, self.names.len() as u32),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}
