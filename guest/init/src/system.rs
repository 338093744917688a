//! Safe wrappers of the system calls the first process needs.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

/// Turns the C convention of -1 into an error.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Mounts a file system that has no backing device.
pub fn mount(kind: &CStr, target: &CStr, flags: libc::c_ulong, data: &CStr) -> io::Result<()> {
    // SAFETY: all strings end in NUL and outlive the call; the kernel copies them.
    check(unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })
    .map(drop)
}

/// Mounts a file system on a device.
pub fn mount_device(
    device: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
) -> io::Result<()> {
    // SAFETY: all strings end in NUL and outlive the call; the kernel copies them.
    check(unsafe {
        libc::mount(
            device.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            ptr::null(),
        )
    })
    .map(drop)
}

/// Moves what is mounted at `from`.
pub fn move_mount(from: &CStr, to: &CStr) -> io::Result<()> {
    // SAFETY: both strings end in NUL and outlive the call; the kernel copies them.
    check(unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            ptr::null(),
            libc::MS_MOVE,
            ptr::null(),
        )
    })
    .map(drop)
}

/// Makes what is mounted at `target` the root of everything, and of this process.
pub fn switch_root(target: &CStr) -> io::Result<()> {
    // SAFETY: all strings end in NUL and outlive the calls, which copy them.
    unsafe {
        check(libc::chdir(target.as_ptr()))?;
        check(libc::mount(
            c".".as_ptr(),
            c"/".as_ptr(),
            ptr::null(),
            libc::MS_MOVE,
            ptr::null(),
        ))?;
        check(libc::chroot(c".".as_ptr()))?;
        check(libc::chdir(c"/".as_ptr())).map(drop)
    }
}

/// Becomes another program, without arguments and with our environment and `added`.
pub fn execute(program: &CStr, added: Option<&CStr>) -> io::Error {
    let arguments = [program.as_ptr(), ptr::null()];
    let own: Vec<CString> = std::env::vars_os()
        .map(|(name, value)| {
            let mut setting = name.into_encoded_bytes();
            setting.push(b'=');
            setting.extend(value.as_encoded_bytes());
            c_string(&setting)
        })
        .collect();
    let environment: Vec<*const libc::c_char> = own
        .iter()
        .map(|setting| setting.as_ptr())
        .chain(added.map(CStr::as_ptr))
        .chain([ptr::null()])
        .collect();
    // SAFETY: the path and both arrays, which end in null pointers, outlive the call, as do the strings in them.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::new(
        io::Error::last_os_error().kind(),
        format!(
            "{}: {}",
            program.to_string_lossy(),
            io::Error::last_os_error()
        ),
    )
}

/// Detaches whatever is mounted at `target`, or makes it read-only if it is in use.
pub fn unmount(target: &CStr) {
    // SAFETY: the string ends in NUL; neither call keeps it.
    unsafe {
        if libc::umount2(target.as_ptr(), 0) != 0 {
            let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
            libc::mount(
                ptr::null(),
                target.as_ptr(),
                ptr::null(),
                flags,
                ptr::null(),
            );
        }
    }
}

/// Sets the name `uname` reports.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe the string.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Brings an interface up. The loopback interface gets its addresses by itself.
pub fn interface_up(name: &str) -> io::Result<()> {
    // SAFETY: a plain system call; the result is checked before it becomes an owned descriptor.
    let socket = unsafe {
        OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_INET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
        ))?)
    };
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid `ifreq` that outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })
        .map(drop)
}

/// Gives the calling process the start of a program of its own: a new session, with `terminal` (if any) as its
/// controlling terminal, and no blocked signals (they would stay so through exec).
///
/// Only makes system calls, so it may run between fork and exec.
pub fn lead_session(terminal: Option<BorrowedFd>) -> io::Result<()> {
    let mut none = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set before it is read; the other calls have no pointers.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            none.as_ptr(),
            ptr::null_mut(),
        ))?;
        check(libc::setsid())?;
        match terminal {
            Some(terminal) => {
                check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 1)).map(drop)
            }
            None => Ok(()),
        }
    }
}

/// Tells a terminal its size in characters.
pub fn set_window_size(terminal: BorrowedFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// Waits until a terminal has sent everything written to it. What is not a terminal has nothing to wait for.
pub fn drain(terminal: BorrowedFd) {
    // SAFETY: a system call without pointers.
    unsafe { libc::tcdrain(terminal.as_raw_fd()) };
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Killed(u8),
}

impl Ended {
    /// Reads the status word of `waitpid`.
    pub fn from_status(status: libc::c_int) -> Ended {
        if libc::WIFSIGNALED(status) {
            Ended::Killed(libc::WTERMSIG(status) as u8)
        } else {
            Ended::Exited(libc::WEXITSTATUS(status) as u8)
        }
    }
}

/// The next dead child, if there is one: its id and how it ended. An error means there are no children at all.
pub fn reap() -> io::Result<Option<(u32, Ended)>> {
    let mut status = 0;
    // SAFETY: the status outlives the call.
    let pid = check(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    Ok((pid > 0).then(|| (pid as u32, Ended::from_status(status))))
}

/// A set of signals that this process takes one at a time with [`Signals::next`] and that do nothing else.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks the signals from now on.
    pub fn block(signals: &[libc::c_int]) -> Signals {
        let mut set = MaybeUninit::uninit();
        // SAFETY: `sigemptyset` initialises the set, the other calls only read or change it; all signal numbers are valid.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for &signal in signals {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let set = set.assume_init();
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            Signals(set)
        }
    }

    /// Waits for one of the signals, at most `limit_ms` milliseconds if that is given.
    pub fn next(&self, limit_ms: Option<i64>) -> Option<libc::c_int> {
        let limit = limit_ms.map(|ms| libc::timespec {
            tv_sec: ms / 1000,
            tv_nsec: ms % 1000 * 1_000_000,
        });
        let limit = limit
            .as_ref()
            .map_or(ptr::null(), |limit| limit as *const libc::timespec);
        // SAFETY: the set is initialised, the limit is null or a valid time; nobody asks for details of the signal.
        let signal = unsafe { libc::sigtimedwait(&raw const self.0, ptr::null_mut(), limit) };
        (signal > 0).then_some(signal)
    }

    /// Undoes the blocking, for a child that wants to live as usual.
    pub fn unblock(&self) {
        // SAFETY: the set is initialised.
        unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const self.0, ptr::null_mut()) };
    }
}

/// Splits the process in two. True in the child.
///
/// Callers must have one thread only: the child has no other.
pub fn fork() -> io::Result<Option<u32>> {
    // SAFETY: this process has one thread, so the child may do what the parent might.
    match check(unsafe { libc::fork() })? {
        0 => Ok(None),
        pid => Ok(Some(pid as u32)),
    }
}

/// Sends a signal to one process, or to all but the caller with `pid` -1.
pub fn kill(pid: i32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a system call without pointers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// What happens to the machine when the last process is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Power off.
    PowerOff,
    /// Start again.
    Reboot,
}

/// Writes back what is dirty, then ends the machine.
pub fn end_machine(ending: Ending) -> io::Error {
    let command = match ending {
        Ending::PowerOff => libc::RB_POWER_OFF,
        Ending::Reboot => libc::RB_AUTOBOOT,
    };
    // SAFETY: system calls without pointers.
    unsafe {
        libc::sync();
        libc::reboot(command);
    }
    io::Error::last_os_error()
}

/// A C string from a path the caller knows to hold no NUL; with one, the empty string, which every call refuses.
pub fn c_string(text: &[u8]) -> CString {
    CString::new(text).unwrap_or_default()
}

/// Makes reads and writes return at once.
pub fn set_nonblocking(file: BorrowedFd) -> io::Result<()> {
    // SAFETY: system calls without pointers.
    unsafe {
        let flags = check(libc::fcntl(file.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(
            file.as_raw_fd(),
            libc::F_SETFL,
            flags | libc::O_NONBLOCK,
        ))
        .map(drop)
    }
}

/// A descriptor that becomes readable when the child `pid` ends.
pub fn process_handle(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers; the result is checked before it becomes an owned descriptor.
    unsafe {
        let result = libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0);
        Ok(OwnedFd::from_raw_fd(check(result as libc::c_int)?))
    }
}

/// Waits until one of the descriptors is ready for what it is polled for, at most `limit_ms` (-1: no limit).
pub fn poll(entries: &mut [libc::pollfd], limit_ms: libc::c_int) -> io::Result<()> {
    // SAFETY: the slice is a valid array of that length.
    match check(unsafe {
        libc::poll(
            entries.as_mut_ptr(),
            entries.len() as libc::nfds_t,
            limit_ms,
        )
    }) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        result => result.map(drop),
    }
}

/// A new pseudo-terminal: the master's end and the terminal itself.
pub fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let unlock: libc::c_int = 0;
    // SAFETY: paths and arguments outlive the calls; results are checked before they become owned descriptors.
    unsafe {
        let master = OwnedFd::from_raw_fd(check(libc::open(c"/dev/ptmx".as_ptr(), flags))?);
        check(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))?;
        let terminal = check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?;
        Ok((master, OwnedFd::from_raw_fd(terminal)))
    }
}

/// The process group that gets what is typed on a terminal, asked at its master's end.
pub fn foreground_group(master: BorrowedFd) -> io::Result<i32> {
    let mut group: libc::pid_t = 0;
    // SAFETY: the number outlives the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPGRP, &raw mut group) })?;
    if group > 0 {
        Ok(group)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Listens on a vsock port for the host.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: the address is fully initialised and its true size is passed; the socket is checked before it is owned.
    unsafe {
        let socket = OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
        ))?);
        let mut address: libc::sockaddr_vm = MaybeUninit::zeroed().assume_init();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let size = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size,
        ))?;
        check(libc::listen(socket.as_raw_fd(), 64))?;
        Ok(socket)
    }
}

/// Takes the next connection.
pub fn accept(listener: BorrowedFd) -> io::Result<OwnedFd> {
    // SAFETY: nobody asks for the peer's address; the result is checked before it becomes an owned descriptor.
    unsafe {
        let flags = libc::SOCK_CLOEXEC;
        Ok(OwnedFd::from_raw_fd(check(libc::accept4(
            listener.as_raw_fd(),
            ptr::null_mut(),
            ptr::null_mut(),
            flags,
        ))?))
    }
}

/// Has the kernel reap this process's children, or leaves that to the process.
pub fn reap_automatically(automatic: bool) {
    let action = if automatic {
        libc::SIG_IGN
    } else {
        libc::SIG_DFL
    };
    // SAFETY: both are valid dispositions; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGCHLD, action) };
}

/// Gives the process the name that `ps` shows.
pub fn set_name(name: &CStr) {
    // SAFETY: the name ends in NUL; the kernel copies it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}
