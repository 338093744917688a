//! One memfd mapped between guard ranges: all the unsafe code that touches guest RAM from Rust.

use crate::MemoryError;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// Inaccessible bytes on either side of guest RAM. Wide enough that an engine's bounded displacement from a good
/// address (a 32-byte vector, a small constant offset) cannot step over it.
const GUARD: usize = 1 << 20;

/// What the host process may do with a range of guest RAM through its mapping.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Protection {
    /// Neither read nor write.
    None,
    /// Read only.
    Read,
    /// Read and write: how every mapping starts.
    ReadWrite,
}

impl Protection {
    const fn bits(self) -> libc::c_int {
        match self {
            Protection::None => libc::PROT_NONE,
            Protection::Read => libc::PROT_READ,
            Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// Host memory that backs one slot. The mapping lives as long as the value.
///
/// Guest code and other threads change the bytes at any time. So Rust never holds a reference to them: copies go by
/// raw pointer, and fields with an ordering go by atomics.
pub(crate) struct Region {
    reservation: NonNull<u8>,
    reserved: usize,
    base: NonNull<u8>,
    size: usize,
    file: OwnedFd,
}

// SAFETY: the region is plain shared memory owned by this value and unmapped only in `drop`; every access through it
// is bounds-checked and by raw pointer or atomic, so no thread can break another's aliasing or lifetime assumptions.
unsafe impl Send for Region {}
// SAFETY: see above; `&Region` offers nothing that `Region` on another thread would not.
unsafe impl Sync for Region {}

fn host_error(operation: &'static str) -> MemoryError {
    MemoryError::Host {
        operation,
        source: io::Error::last_os_error(),
    }
}

impl Region {
    /// `size` bytes of zeros, `size` being a positive multiple of the page size.
    pub(crate) fn new(name: &CStr, size: u64) -> Result<Region, MemoryError> {
        Region::map(sealed_memfd(name, size)?, size)
    }

    /// Maps a file of `size` bytes that nobody can shrink.
    pub(crate) fn map(file: OwnedFd, size: u64) -> Result<Region, MemoryError> {
        let too_big = |operation| MemoryError::Host {
            operation,
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        };
        let bytes = usize::try_from(size).map_err(|_| too_big("a mapping"))?;
        let reserved = bytes
            .checked_add(2 * GUARD)
            .ok_or_else(|| too_big("a mapping"))?;
        // SAFETY: an anonymous reservation at an address of the kernel's choice touches no existing mapping.
        let reservation = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let reservation = mapped(reservation).ok_or_else(|| host_error("address space"))?;
        // SAFETY: GUARD is less than `reserved`, so the result is inside the reservation.
        let base = unsafe { reservation.add(GUARD) };
        let region = Region {
            reservation,
            reserved,
            base,
            size: bytes,
            file,
        };
        // SAFETY: the fixed mapping lies wholly inside the reservation made above, which nobody else knows of.
        let inside = unsafe {
            libc::mmap(
                base.as_ptr().cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                region.file.as_raw_fd(),
                0,
            )
        };
        mapped(inside).ok_or_else(|| host_error("a mapping"))?;
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the range is the mapping just made; neither advice changes its contents. Advice may be refused
            // by old kernels without harm, so the result does not matter.
            unsafe { libc::madvise(base.as_ptr().cast(), bytes, advice) };
        }
        Ok(region)
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.file.as_fd()
    }

    /// The host address of `len` bytes at `offset`, if they lie inside.
    fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.size {
            return None;
        }
        // SAFETY: `offset` is at most `size`, so the pointer stays inside the mapping or one past its end.
        Some(unsafe { self.base.as_ptr().add(offset) })
    }

    /// Copies guest bytes out; false (and nothing copied) if they are not all inside.
    #[must_use]
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, into.len()) else {
            return false;
        };
        // SAFETY: `at` proved the source in bounds; the destination is a Rust slice, which cannot be guest RAM
        // because no reference to guest RAM is ever made. A racing guest store can only make the copied bytes mixed.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes in; false (and nothing copied) if they do not all fit.
    #[must_use]
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) -> bool {
        let Some(to) = self.at(offset, from.len()) else {
            return false;
        };
        // SAFETY: as in `copy_out`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        true
    }

    /// Sets `len` bytes to `value`; false (and nothing written) if they are not all inside.
    #[must_use]
    pub(crate) fn fill(&self, offset: u64, len: usize, value: u8) -> bool {
        let Some(to) = self.at(offset, len) else {
            return false;
        };
        // SAFETY: `at` proved the destination in bounds.
        unsafe { std::ptr::write_bytes(to, value, len) };
        true
    }

    /// A 16-bit atomic at an aligned offset inside.
    pub(crate) fn atomic_u16(&self, offset: u64) -> Option<&AtomicU16> {
        let at = self
            .at(offset, 2)
            .filter(|at| at.cast::<u16>().is_aligned())?;
        // SAFETY: in bounds, aligned, and mapped as long as `self` is borrowed. Guest accesses are plain x86 moves
        // or locked operations, which are single-copy atomic for aligned operands.
        Some(unsafe { AtomicU16::from_ptr(at.cast()) })
    }

    /// A 32-bit atomic at an aligned offset inside.
    pub(crate) fn atomic_u32(&self, offset: u64) -> Option<&AtomicU32> {
        let at = self
            .at(offset, 4)
            .filter(|at| at.cast::<u32>().is_aligned())?;
        // SAFETY: as for `atomic_u16`.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// A 64-bit atomic at an aligned offset inside.
    pub(crate) fn atomic_u64(&self, offset: u64) -> Option<&AtomicU64> {
        let at = self
            .at(offset, 8)
            .filter(|at| at.cast::<u64>().is_aligned())?;
        // SAFETY: as for `atomic_u16`.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// Changes what this process may do with `len` bytes at `offset` (both multiples of the page size, inside).
    pub(crate) fn protect(
        &self,
        offset: u64,
        len: usize,
        protection: Protection,
    ) -> Result<(), MemoryError> {
        let at = self
            .at(offset, len)
            .ok_or_else(|| host_error("a change of protection"))?;
        // SAFETY: `at` proved the range inside this region's own mapping.
        if unsafe { libc::mprotect(at.cast(), len, protection.bits()) } != 0 {
            return Err(host_error("a change of protection"));
        }
        Ok(())
    }

    /// Gives `len` bytes at `offset` back to the host; they read as zeros afterwards.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let (Ok(start), Ok(count)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len))
        else {
            return Err(MemoryError::Host {
                operation: "release of pages",
                source: io::Error::from_raw_os_error(libc::EINVAL),
            });
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: `fallocate` takes no address; the descriptor is owned by `self`.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, count) } != 0 {
            return Err(host_error("release of pages"));
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the reservation (with the mapping in it) belongs to this value alone, and borrowed atomics end
        // before it does. Failure would only leak address space.
        unsafe { libc::munmap(self.reservation.as_ptr().cast(), self.reserved) };
    }
}

fn mapped(address: *mut libc::c_void) -> Option<NonNull<u8>> {
    if address == libc::MAP_FAILED {
        None
    } else {
        NonNull::new(address.cast())
    }
}

/// A memfd of `size` bytes that nobody can shrink: a shorter file would turn accesses into SIGBUS.
fn sealed_memfd(name: &CStr, size: u64) -> Result<OwnedFd, MemoryError> {
    // SAFETY: `name` is a NUL-terminated string.
    let raw =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if raw < 0 {
        return Err(host_error("a memory file"));
    }
    // SAFETY: `raw` is a descriptor just made and owned by nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(raw) };
    let length = libc::off_t::try_from(size).map_err(|_| host_error("a memory file's size"))?;
    // SAFETY: no memory is handed over.
    if unsafe { libc::ftruncate(file.as_raw_fd(), length) } != 0 {
        return Err(host_error("a memory file's size"));
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is handed over.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(host_error("a memory file's seals"));
    }
    Ok(file)
}
