//! Work that a guest's kernel does: calls, faults, processes, threads, signals, files.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::{fs, ptr, thread};

use crate::sys::{self, Mapping, Random, mix};

/// The argument by which `exec` starts this program anew.
pub const EXEC_CHILD: &str = "--exec-child";
/// With which status that one ends.
pub const EXEC_STATUS: u8 = 17;

/// Calls that do next to nothing.
pub fn system_calls(units: u64) -> u64 {
    let mut same = 0;
    // SAFETY: a call without arguments that cannot fail.
    let parent = unsafe { libc::syscall(libc::SYS_getppid) };
    for _ in 0..units {
        // SAFETY: as above.
        same += u64::from(unsafe { libc::syscall(libc::SYS_getppid) } == parent);
    }
    same
}

/// First touches of 1,024 pages per unit.
pub fn page_faults(units: u64) -> u64 {
    const PAGES: usize = 1024;
    let mut sum = 0;
    for unit in 0..units {
        let memory = Mapping::new(PAGES * 4096);
        for page in 0..PAGES {
            memory.write(page * 4096 + 8, page as u8);
        }
        sum = mix(
            sum,
            u64::from(memory.read((unit as usize % PAGES) * 4096 + 8)),
        );
    }
    sum
}

/// A child writes to 512 pages that it shares with its parent, per unit.
pub fn copy_on_write(units: u64) -> u64 {
    const PAGES: usize = 512;
    let memory = Mapping::new(PAGES * 4096);
    (0..PAGES).for_each(|page| memory.write(page * 4096, page as u8));
    let mut sum = 0;
    for _ in 0..units {
        let child = sys::fork(|| {
            (0..PAGES).for_each(|page| memory.write(page * 4096 + 1, 1));
            (0..PAGES).fold(0_u8, |sum, page| {
                sum.wrapping_add(memory.read(page * 4096 + 1))
                    .wrapping_mul(3)
            })
        });
        sum = mix(sum, sys::wait(child));
    }
    mix(sum, u64::from(memory.read(1)))
}

/// Children that end at once.
pub fn fork(units: u64) -> u64 {
    (0..units).fold(0, |sum, unit| mix(sum, sys::wait(sys::fork(|| unit as u8))))
}

/// Children that become this program anew, which ends at once.
pub fn exec(units: u64) -> u64 {
    let Ok(argument) = std::ffi::CString::new(EXEC_CHILD) else {
        return 0;
    };
    let arguments = [c"bench".as_ptr(), argument.as_ptr(), ptr::null()];
    let environment = [ptr::null()];
    (0..units).fold(0, |sum, _| {
        let child = sys::fork(|| {
            // SAFETY: strings end in NUL, arrays in a null pointer, and all live until the call succeeds or fails.
            unsafe {
                libc::execve(
                    c"/proc/self/exe".as_ptr(),
                    arguments.as_ptr(),
                    environment.as_ptr(),
                )
            };
            1
        });
        mix(sum, sys::wait(child))
    })
}

fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors, which nobody else owns.
    unsafe {
        if libc::pipe(ends.as_mut_ptr()) != 0 {
            sys::fail("pipe");
        }
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    }
}

fn must<T>(result: std::io::Result<T>, what: &str) -> T {
    match result {
        Ok(value) => value,
        Err(error) => {
            eprintln!("bench: {what}: {error}");
            std::process::exit(1);
        }
    }
}

/// 64 KiB per unit from a child to its parent.
pub fn pipes(units: u64) -> u64 {
    const BYTES: usize = 64 << 10;
    let (mut reader, mut writer) = pipe();
    let child = sys::fork(|| {
        let mut random = Random::new(71);
        let bytes: Vec<u8> = (0..BYTES).map(|_| random.next() as u8).collect();
        (0..units).for_each(|_| must(writer.write_all(&bytes), "write"));
        0
    });
    let mut bytes = vec![0; BYTES];
    let mut sum = 0;
    for unit in 0..units {
        must(reader.read_exact(&mut bytes), "read");
        sum = mix(sum, u64::from(bytes[unit as usize % BYTES]));
    }
    mix(sum, sys::wait(child))
}

/// One byte to a child and back, per unit.
pub fn context_switch(units: u64) -> u64 {
    let (mut from_parent, mut to_child) = pipe();
    let (mut from_child, mut to_parent) = pipe();
    let child = sys::fork(|| {
        let mut byte = [0];
        for _ in 0..units {
            must(from_parent.read_exact(&mut byte), "read");
            byte[0] = byte[0].wrapping_add(1);
            must(to_parent.write_all(&byte), "write");
        }
        0
    });
    let mut byte = [0];
    for _ in 0..units {
        must(to_child.write_all(&byte), "write");
        must(from_child.read_exact(&mut byte), "read");
    }
    mix(u64::from(byte[0]), sys::wait(child))
}

/// Waits until `word` is no longer `value`.
fn futex_wait(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        // SAFETY: the word lives as long as the reference; without a timeout the null pointer is right.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                value,
                ptr::null::<libc::timespec>(),
            )
        };
    }
}

fn futex_set(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    // SAFETY: the word lives as long as the reference.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
}

/// Two threads that hand a turn to each other.
pub fn futex(units: u64) -> u64 {
    let turn = Arc::new(AtomicU32::new(0));
    let count = Arc::new(AtomicU64::new(0));
    let player = {
        let (turn, count) = (Arc::clone(&turn), Arc::clone(&count));
        thread::spawn(move || {
            for _ in 0..units {
                futex_wait(&turn, 0);
                count.fetch_add(1, Ordering::Relaxed);
                futex_set(&turn, 0);
            }
        })
    };
    for _ in 0..units {
        futex_wait(&turn, 1);
        futex_set(&turn, 1);
    }
    if player.join().is_err() {
        sys::fail("a thread ended early");
    }
    count.load(Ordering::Relaxed)
}

/// Threads that are started and ended.
pub fn threads(units: u64) -> u64 {
    (0..units).fold(0, |sum, unit| {
        match thread::spawn(move || unit.wrapping_mul(3)).join() {
            Ok(value) => mix(sum, value),
            Err(_) => sys::fail("a thread ended early"),
        }
    })
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handle(signal: i32) {
    HANDLED.fetch_add(signal as u64, Ordering::Relaxed);
}

/// Signals that the process sends itself and handles.
pub fn signals(units: u64) -> u64 {
    HANDLED.store(0, Ordering::Relaxed);
    // SAFETY: the action is plain data for which zero is valid; the handler only touches an atomic number.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(i32) as usize;
        if libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut()) != 0 {
            sys::fail("sigaction");
        }
        for _ in 0..units {
            libc::raise(libc::SIGUSR1);
        }
    }
    HANDLED.load(Ordering::Relaxed)
}

/// Mappings of 64 KiB made, touched once and removed.
pub fn mmap(units: u64) -> u64 {
    (0..units).fold(0, |sum, unit| {
        let memory = Mapping::new(64 << 10);
        memory.write(4096 * (unit as usize & 15), unit as u8);
        mix(sum, u64::from(memory.read(4096 * (unit as usize & 15))))
    })
}

/// A file written, looked up and read, 1 KiB at a time.
pub fn files(units: u64) -> u64 {
    // In memory wherever it runs, so that no host's disk is measured.
    let directory = Path::new("/dev/shm");
    let directory = if directory.is_dir() {
        directory
    } else {
        Path::new("/tmp")
    };
    let path = directory.join(format!("strata-bench-{}", std::process::id()));
    let mut sum = 0;
    for unit in 0..units / 10 + 1 {
        must(fs::write(&path, [unit as u8; 1024]), "write a file");
        for _ in 0..4 {
            sum = mix(sum, must(fs::metadata(&path), "look up a file").len());
        }
        let bytes = must(fs::read(&path), "read a file");
        sum = mix(sum, bytes.iter().map(|byte| u64::from(*byte)).sum());
    }
    must(fs::remove_file(&path), "remove a file");
    sum
}

/// Readings of the clock; counts the ones that went back.
pub fn clock(units: u64) -> u64 {
    let mut before = sys::monotonic_ns();
    let mut backwards = 0;
    for _ in 0..units {
        let now = sys::monotonic_ns();
        backwards += u64::from(now < before);
        before = now;
    }
    mix(units, backwards)
}
