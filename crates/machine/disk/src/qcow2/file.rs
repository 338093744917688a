//! The file that an image is in: reads and writes at offsets, growth, and barriers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::raw::punch_hole;

/// An open, locked image file.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    len: u64,
    /// A regular file grows; a block device does not.
    regular: bool,
    /// What was done to the file, for tests that break off anywhere.
    #[cfg(test)]
    pub(super) log: Option<Vec<Change>>,
}

/// A step of what was done to a file.
#[cfg(test)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Write(u64, Vec<u8>),
    Grow(u64),
    Punch(u64, u64),
    Sync,
}

impl ImageFile {
    pub(super) fn new(file: File, len: u64, regular: bool) -> ImageFile {
        ImageFile {
            file,
            len,
            regular,
            #[cfg(test)]
            log: None,
        }
    }

    /// Bytes in the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether what the file gains by growing reads as zeroes.
    pub(super) fn grows_by_zeroes(&self) -> bool {
        self.regular
    }

    /// Fills `buf`; what lies behind the end of the file reads as zeroes.
    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            match self.file.read_at(rest, at) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => {
                    at += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.note(Change::Write(offset, bytes.to_vec()));
        self.file.write_all_at(bytes, offset)?;
        self.len = self.len.max(offset.saturating_add(bytes.len() as u64));
        Ok(())
    }

    /// Makes the file at least `len` bytes long.
    pub(super) fn grow(&mut self, len: u64) -> io::Result<()> {
        if len <= self.len {
            return Ok(());
        }
        if !self.regular {
            return Err(io::ErrorKind::StorageFull.into());
        }
        #[cfg(test)]
        self.note(Change::Grow(len));
        self.file.set_len(len)?;
        self.len = len;
        Ok(())
    }

    /// Gives the space of a range back to the host where that is possible.
    pub(super) fn punch(&mut self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(Change::Punch(offset, len));
        punch_hole(&self.file, offset, len).map(|_| ())
    }

    /// Everything written so far is durable when this returns.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        #[cfg(test)]
        self.note(Change::Sync);
        self.file.sync_data()
    }

    #[cfg(test)]
    fn note(&mut self, change: Change) {
        if let Some(log) = &mut self.log {
            log.push(change);
        }
    }
}
