//! A process in namespaces of its own: another run of this program, with nothing inherited but what it is given.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::thread::CapabilitySet;

/// What a jailed process has of its own. `CLONE_NEWUSER` comes on top where the rest needs it.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWPID;
/// Status of a child that could not become the program.
const NOT_EXECUTED: libc::c_int = 127;

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// The file.
    pub path: &'a CStr,
    /// Its arguments, the name first.
    pub arguments: &'a [CString],
    /// Its environment, each as `NAME=VALUE`.
    pub environment: &'a [CString],
    /// Its descriptors, from 0 on. There will be no others.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// Namespaces of its own.
    pub namespaces: bool,
}

/// A process that was made.
#[derive(Debug)]
pub struct Spawned {
    /// Its number.
    pub pid: i32,
    /// Why it has no namespaces of its own, if it has none.
    pub namespaces: Result<(), String>,
}

/// Everything the child needs, made before it exists: between its birth and the program it must not allocate.
struct Prepared {
    path: *const c_char,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    descriptors: Vec<RawFd>,
    /// The line for its user and group map, if it gets a user namespace.
    maps: Option<(CString, CString)>,
}

/// Runs a program as a child process.
///
/// # Errors
/// If the system makes no process.
pub fn spawn(program: &Program<'_>) -> io::Result<Spawned> {
    let mut prepared = Prepared {
        path: program.path.as_ptr(),
        arguments: ended(program.arguments),
        environment: ended(program.environment),
        descriptors: program.descriptors.iter().map(AsRawFd::as_raw_fd).collect(),
        maps: None,
    };
    if !program.namespaces {
        let pid = start(0, &prepared)?;
        let namespaces = Err("it was not asked for".to_owned());
        return Ok(Spawned { pid, namespaces });
    }
    let mut flags = NAMESPACES;
    if !is_administrator() {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        prepared.maps = Some((
            CString::new(format!("0 {} 1\n", user.as_raw()))?,
            CString::new(format!("0 {} 1\n", group.as_raw()))?,
        ));
        flags |= libc::CLONE_NEWUSER;
    }
    match start(flags, &prepared) {
        Ok(pid) => Ok(Spawned {
            pid,
            namespaces: Ok(()),
        }),
        Err(refusal) => {
            prepared.maps = None;
            let pid = start(0, &prepared)?;
            let namespaces = Err(text(&refusal));
            Ok(Spawned { pid, namespaces })
        }
    }
}

/// Pointers to strings, and the null that ends them.
fn ended(strings: &[CString]) -> Vec<*const c_char> {
    let ends = std::iter::once(std::ptr::null());
    strings
        .iter()
        .map(|text| text.as_ptr())
        .chain(ends)
        .collect()
}

/// The words of a system's error without its number.
pub(crate) fn text(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text.get(..end).unwrap_or_default().to_owned()
}

/// Whether namespaces can be had without one for users.
fn is_administrator() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn start(flags: libc::c_int, prepared: &Prepared) -> io::Result<i32> {
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM and without a stack this is a fork: the child has a copy of this thread and of all
    // memory. It makes nothing but system calls until it becomes another program.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(flags | libc::SIGCHLD),
            none,
            none,
            none,
            none,
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => become_program(prepared),
        pid => Ok(pid as i32),
    }
}

/// In the child: allocates nothing, takes no lock, does not return.
fn become_program(prepared: &Prepared) -> ! {
    let count = prepared.descriptors.len() as libc::c_int;
    // SAFETY: plain system calls on memory that was made before the child was. Descriptors are first copied out of the
    // way of the numbers that they will have.
    unsafe {
        if let Some((user, group)) = &prepared.maps {
            write_file(c"/proc/self/setgroups", c"deny");
            write_file(c"/proc/self/uid_map", user);
            write_file(c"/proc/self/gid_map", group);
        }
        let mut lowest = count;
        for fd in &prepared.descriptors {
            lowest = lowest.max(*fd + 1);
        }
        for (target, fd) in prepared.descriptors.iter().enumerate() {
            if libc::dup2(*fd, lowest + target as libc::c_int) < 0 {
                libc::_exit(NOT_EXECUTED);
            }
        }
        for target in 0..count {
            if libc::dup2(lowest + target, target) < 0 {
                libc::_exit(NOT_EXECUTED);
            }
        }
        libc::syscall(libc::SYS_close_range, count, libc::c_uint::MAX, 0);
        libc::execve(
            prepared.path,
            prepared.arguments.as_ptr(),
            prepared.environment.as_ptr(),
        );
        libc::_exit(NOT_EXECUTED)
    }
}

/// In the child. What is refused here shows when the root is changed.
///
/// # Safety
/// Always sound; unsafe only because it is called between clone and exec.
unsafe fn write_file(path: &CStr, content: &CStr) {
    // SAFETY: constant strings and a descriptor of our own.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, content.as_ptr().cast(), content.count_bytes());
            libc::close(fd);
        }
    }
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The descriptors from number `first` on that this process was started with, until the first that is not open. They
/// can be taken once, before anything else is opened.
pub fn inherited(first: RawFd, count: usize) -> Vec<OwnedFd> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Vec::new();
    }
    (first..)
        .take(count)
        // SAFETY: asks only whether the descriptor is open.
        .take_while(|fd| unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0)
        // SAFETY: it is open, nothing in this process has opened it, and nobody else takes it.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}
