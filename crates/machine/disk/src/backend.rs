//! The contract between block devices and storage.

use crate::error::DiskError;

/// The unit in which guests address disks, in bytes. Every disk's size is a multiple of it.
pub const SECTOR_SIZE: u64 = 512;

/// A disk that can be read and, unless it is read-only, changed.
///
/// Offsets and lengths are bytes and need no alignment. Every method may block, may be called from
/// any thread, and either does all that it was asked or returns an error; after an error the bytes
/// in the range are unspecified, bytes outside it are untouched. A request that touches a byte
/// outside the disk fails with [`DiskError::OutOfRange`] and does nothing. An empty request inside
/// the disk succeeds.
///
/// A read sees every write that returned before the read began. Writes survive a crash of the host
/// only once a later [`flush`](Self::flush) has returned.
pub trait DiskBackend: Send + Sync + std::fmt::Debug {
    /// Size in bytes: a multiple of [`SECTOR_SIZE`], not zero, the same for as long as it is open.
    fn size(&self) -> u64;

    /// Whether every change is refused with [`DiskError::ReadOnly`].
    fn readonly(&self) -> bool;

    /// Fills `buf` with the bytes at `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// Replaces the bytes at `offset` by `buf`.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError>;

    /// Space is given back in pieces of this many bytes: a power of two. A hint for those who discard.
    fn granularity(&self) -> u32 {
        4096
    }

    /// Makes every write that has returned durable.
    fn flush(&self) -> Result<(), DiskError>;

    /// Brings into the file what is not in it yet, because nothing will be written for now. Not a flush: it outlives
    /// this process, but not a crash of the host.
    fn close(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Says that the content of a range no longer matters: reads of it may give zeroes or the old
    /// bytes until it is written again. Backends give the space back where they can.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// Makes a range read as zeroes. With `may_unmap` the space may be given back; without it the
    /// backend keeps it reserved where it can.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError>;
}

/// Checks that `len` bytes at `offset` lie inside a disk of `size` bytes.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, len, size }),
    }
}

/// The length of a buffer as a disk length.
pub(crate) fn len_of(buf: &[u8]) -> u64 {
    buf.len() as u64
}
