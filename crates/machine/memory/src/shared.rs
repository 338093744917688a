//! Memory that two processes of the host share, to hand bytes to each other. It is never guest RAM.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;

use crate::MemoryError;
use crate::region::Region;

/// A mapping that a peer may change at any time. So bytes are copied out before they are looked at, and no reference to
/// them exists but to single atomics.
pub struct SharedMemory {
    region: Region,
    size: u64,
}

impl SharedMemory {
    /// New memory, zeroed, `size` being a positive multiple of the page size. `name` shows in the host's lists of maps.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn create(name: &CStr, size: u64) -> Result<SharedMemory, MemoryError> {
        let region = Region::new(name, size)?;
        Ok(SharedMemory { region, size })
    }

    /// Maps what a peer has created, `size` bytes as agreed.
    ///
    /// # Errors
    /// The file has another length, or the peer could still cut it (which would end us with SIGBUS); or the host refuses.
    pub fn open(file: OwnedFd, size: u64) -> Result<SharedMemory, MemoryError> {
        // SAFETY: no memory is handed over.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let file = std::fs::File::from(file);
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || length != size || size == 0 {
            return Err(MemoryError::NotSealed(size));
        }
        let region = Region::map(file.into(), size)?;
        Ok(SharedMemory { region, size })
    }

    /// Bytes of it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file, to be sent to the peer.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.region.file()
    }

    /// Copies bytes out; false (and nothing copied) if they are not all inside.
    #[must_use]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        self.region.copy_out(offset, into)
    }

    /// Copies bytes in; false (and nothing copied) if they do not all fit.
    #[must_use]
    pub fn write(&self, offset: u64, from: &[u8]) -> bool {
        self.region.copy_in(offset, from)
    }

    /// A 32-bit atomic at an aligned offset inside.
    pub fn atomic_u32(&self, offset: u64) -> Option<&AtomicU32> {
        self.region.atomic_u32(offset)
    }
}

impl std::fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedMemory")
            .field("size", &self.size)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    #[test]
    fn both_sides_see_the_same_bytes() {
        let one = SharedMemory::create(c"strata-test", 8192).unwrap();
        let two = SharedMemory::open(one.file().try_clone_to_owned().unwrap(), 8192).unwrap();
        assert!(one.write(5000, b"hello"));
        let mut bytes = [0; 5];
        assert!(two.read(5000, &mut bytes));
        assert_eq!(&bytes, b"hello");
        two.atomic_u32(64).unwrap().store(7, Ordering::Release);
        assert_eq!(one.atomic_u32(64).unwrap().load(Ordering::Acquire), 7);
        assert!(!two.read(8190, &mut bytes) && !two.write(u64::MAX, b"x"));
        assert!(two.atomic_u32(8192).is_none() && two.atomic_u32(2).is_none());
    }

    #[test]
    fn a_file_that_can_be_cut_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let refused = SharedMemory::open(file.into(), 8192);
        assert!(matches!(refused, Err(MemoryError::NotSealed(8192))));
        let one = SharedMemory::create(c"strata-test", 8192).unwrap();
        let other = one.file().as_fd().try_clone_to_owned().unwrap();
        assert!(SharedMemory::open(other, 4096).is_err());
    }
}
