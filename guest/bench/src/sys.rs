//! The few system calls that several classes need, made safe.

use std::io;
use std::ptr::{self, NonNull};

/// A clock that only goes forward, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Stays on the CPU where it runs now, so that hand-over between threads means the same with one virtual CPU and with many real ones.
pub fn pin_to_current_cpu() {
    // SAFETY: `set` is plain data for which zero is valid, and is alive during the call. A refusal changes nothing that matters.
    unsafe {
        let cpu = libc::sched_getcpu();
        if let Ok(cpu) = usize::try_from(cpu) {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }
}

/// Stops the benchmark: its environment is not as it needs it.
pub fn fail(what: &str) -> ! {
    eprintln!("bench: {what}: {}", io::Error::last_os_error());
    std::process::exit(1);
}

/// Anonymous memory of its own, unmapped when dropped.
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// Readable and writable memory in 4 KiB pages, none of them populated.
    pub fn new(bytes: usize) -> Mapping {
        let mapping = Mapping::with_protection(bytes, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the range is the mapping just made. Without huge pages in the kernel this fails, which is as good.
        unsafe { libc::madvise(mapping.start.as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) };
        mapping
    }

    /// Memory with `protection` (`PROT_*` bits).
    pub fn with_protection(bytes: usize, protection: i32) -> Mapping {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast::<libc::c_void>() != libc::MAP_FAILED => {
                Mapping { start, bytes }
            }
            _ => fail("mmap"),
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Start of the memory; valid as long as the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Writes one byte; `at` must be inside.
    pub fn write(&self, at: usize, byte: u8) {
        assert!(at < self.bytes);
        // SAFETY: inside the mapping, as checked; volatile, because other code may run or read these bytes.
        unsafe { self.start.as_ptr().add(at).write_volatile(byte) };
    }

    /// Reads one byte; `at` must be inside.
    pub fn read(&self, at: usize) -> u8 {
        assert!(at < self.bytes);
        // SAFETY: inside the mapping, as checked.
        unsafe { self.start.as_ptr().add(at).read_volatile() }
    }

    /// Copies `bytes` to `at`; they must fit.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        assert!(
            at.checked_add(bytes.len())
                .is_some_and(|end| end <= self.bytes)
        );
        // SAFETY: inside the mapping, as checked, and a mapping of our own overlaps no slice.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(at), bytes.len())
        };
    }

    /// Changes what may be done with the memory.
    pub fn protect(&self, protection: i32) {
        // SAFETY: the range is ours, and nothing holds references into it.
        if unsafe { libc::mprotect(self.start.as_ptr().cast(), self.bytes, protection) } != 0 {
            fail("mprotect");
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours and no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Forks; the child does `work` and exits with its result.
pub fn fork(work: impl FnOnce() -> u8) -> libc::pid_t {
    // SAFETY: the process has one thread whenever a class forks.
    match unsafe { libc::fork() } {
        -1 => fail("fork"),
        0 => {
            let status = work();
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(status)) }
        }
        child => child,
    }
}

/// Waits for a child; returns its exit status.
pub fn wait(child: libc::pid_t) -> u64 {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    if unsafe { libc::waitpid(child, &mut status, 0) } != child || !libc::WIFEXITED(status) {
        fail("waitpid");
    }
    libc::WEXITSTATUS(status) as u64
}

/// A pseudo-random sequence, the same everywhere (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Folds a value into a checksum.
#[inline]
pub fn mix(sum: u64, value: u64) -> u64 {
    (sum ^ value)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(23)
}
