//! Attempts from inside the jail at what must not be possible: each is made for real, by a plain system call.

use std::sync::atomic::{AtomicI32, Ordering};

use serde::{Deserialize, Serialize};

use crate::filter::STOPS;

/// One attempt and what came of it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Attempt {
    /// What was tried.
    pub what: String,
    /// It was done: the jail has a hole.
    pub done: bool,
    /// The filter would have stopped the process.
    pub stopped: bool,
    /// The system's error number.
    pub error: i32,
}

/// Tries everything.
pub fn probe() -> Vec<Attempt> {
    ATTEMPTS
        .iter()
        .map(|(what, attempt)| {
            STOPS.store(false, Ordering::SeqCst);
            let result = attempt();
            let error = if result == -1 {
                std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
            } else {
                0
            };
            Attempt {
                what: (*what).to_owned(),
                done: result != -1,
                stopped: STOPS.load(Ordering::SeqCst),
                error,
            }
        })
        .collect()
}

type Try = fn() -> libc::c_long;

const PAGE: usize = 4096;

/// A system call by its number.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: if the kernel does what is asked, the jail has failed and the test with it; the arguments are
        // constants or buffers that live until the call returns.
        unsafe { libc::syscall(libc::$number $(, $argument)*) }
    };
}

const ATTEMPTS: &[(&str, Try)] = &[
    ("open a file to read", || {
        open(c"/etc/passwd", libc::O_RDONLY)
    }),
    ("open a file to write", || {
        open(c"/tmp/strata-probe", libc::O_RDWR | libc::O_CREAT)
    }),
    ("open its own memory", || {
        open(c"/proc/self/mem", libc::O_RDWR)
    }),
    ("open by openat2", || {
        let how = [0_u64; 3];
        call!(
            SYS_openat2,
            libc::AT_FDCWD,
            c"/etc/passwd".as_ptr(),
            how.as_ptr(),
            size_of_val(&how)
        )
    }),
    ("look at a file", || {
        let mut about = [0_u8; 256];
        call!(SYS_stat, c"/etc/passwd".as_ptr(), about.as_mut_ptr())
    }),
    ("remove a file", || {
        call!(
            SYS_unlinkat,
            libc::AT_FDCWD,
            c"/tmp/strata-probe".as_ptr(),
            0
        )
    }),
    ("connect to TCP", || {
        let socket = call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return socket;
        }
        let address: libc::sockaddr_in = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: 22_u16.to_be(),
            sin_addr: libc::in_addr {
                s_addr: u32::from_be_bytes([127, 0, 0, 1]).to_be(),
            },
            sin_zero: [0; 8],
        };
        call!(
            SYS_connect,
            socket,
            &raw const address,
            size_of_val(&address)
        )
    }),
    ("connect to a Unix socket", || {
        let socket = call!(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return socket;
        }
        let mut address = libc::sockaddr_un {
            sun_family: libc::AF_UNIX as u16,
            sun_path: [0; 108],
        };
        for (to, from) in address.sun_path.iter_mut().zip(b"/tmp/strata-probe.sock") {
            *to = *from as libc::c_char;
        }
        call!(
            SYS_connect,
            socket,
            &raw const address,
            size_of_val(&address)
        )
    }),
    ("make a UDP socket", || {
        call!(SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0)
    }),
    ("make a pair of sockets", || {
        let mut pair = [0_i32; 2];
        call!(
            SYS_socketpair,
            libc::AF_UNIX,
            libc::SOCK_STREAM,
            0,
            pair.as_mut_ptr()
        )
    }),
    // Of the sockets that a network gave it, some would take these; a number that is no descriptor is enough to see who
    // refuses.
    ("connect a socket elsewhere", || {
        let address = [0_u16; 8];
        call!(SYS_connect, -1, address.as_ptr(), size_of_val(&address))
    }),
    ("give a socket an address", || {
        let address = [libc::AF_INET as u16, 0, 0, 0, 0, 0, 0, 0];
        call!(SYS_bind, -1, address.as_ptr(), size_of_val(&address))
    }),
    ("listen", || call!(SYS_listen, -1, 1)),
    ("send to an address of its choice", || {
        let address = [libc::AF_INET as u16, 0, 0, 0, 0, 0, 0, 0];
        let len = size_of_val(&address);
        call!(SYS_sendto, -1, c"x".as_ptr(), 1, 0, address.as_ptr(), len)
    }),
    ("send a message with a name", || {
        let message = [0_u64; 7];
        call!(SYS_sendmsg, -1, message.as_ptr(), 0)
    }),
    ("send several messages", || {
        let messages = [0_u64; 8];
        call!(SYS_sendmmsg, -1, messages.as_ptr(), 1, 0)
    }),
    ("route packets otherwise", || {
        let mark = 1_i32;
        let len = size_of_val(&mark);
        call!(
            SYS_setsockopt,
            -1,
            libc::IPPROTO_IP,
            libc::IP_TRANSPARENT,
            &raw const mark,
            len
        )
    }),
    ("make a raw socket", || {
        call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0)
    }),
    ("fork", || ended(call!(SYS_fork))),
    ("fork by clone", || {
        ended(call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0))
    }),
    ("fork by clone3", || {
        let arguments = [0_u64; 8];
        ended(call!(
            SYS_clone3,
            arguments.as_ptr(),
            size_of_val(&arguments)
        ))
    }),
    ("run a program", || {
        let none: [*const libc::c_char; 1] = [std::ptr::null()];
        call!(
            SYS_execve,
            c"/bin/true".as_ptr(),
            none.as_ptr(),
            none.as_ptr()
        )
    }),
    ("trace its parent", || {
        call!(SYS_ptrace, libc::PTRACE_ATTACH, parent(), 0, 0)
    }),
    ("read its parent's memory", || {
        let mut byte = [0_u8; 1];
        let local = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: ATTEMPTS.as_ptr().cast_mut().cast(),
            iov_len: 1,
        };
        call!(
            SYS_process_vm_readv,
            parent(),
            &raw const local,
            1,
            &raw const remote,
            1,
            0
        )
    }),
    ("signal its parent", || call!(SYS_kill, parent(), 0)),
    ("signal a thread of another process", || {
        call!(SYS_tgkill, parent(), parent(), 0)
    }),
    ("map executable memory", || {
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        call!(
            SYS_mmap,
            0,
            PAGE,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0
        )
    }),
    ("make memory executable", || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = call!(
            SYS_mmap,
            0,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0
        );
        call!(SYS_mprotect, at, PAGE, libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("make memory executable by key", || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = call!(
            SYS_mmap,
            0,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0
        );
        call!(SYS_pkey_mprotect, at, PAGE, libc::PROT_EXEC, -1)
    }),
    ("make a file in memory", || {
        call!(SYS_memfd_create, c"probe".as_ptr(), 0)
    }),
    ("handle page faults", || call!(SYS_userfaultfd, 0)),
    ("load a BPF program", || call!(SYS_bpf, 0, 0, 0)),
    ("set up io_uring", || {
        let mut parameters = [0_u8; 120];
        call!(SYS_io_uring_setup, 1, parameters.as_mut_ptr())
    }),
    ("use keys", || call!(SYS_keyctl, 0, -3, 0, 0, 0)),
    ("add a key", || {
        call!(
            SYS_add_key,
            c"user".as_ptr(),
            c"probe".as_ptr(),
            c"x".as_ptr(),
            1,
            -3
        )
    }),
    ("watch performance", || {
        let mut attributes = [0_u8; 128];
        call!(SYS_perf_event_open, attributes.as_mut_ptr(), 0, -1, -1, 0)
    }),
    ("mount", || {
        let none: *const libc::c_char = std::ptr::null();
        call!(
            SYS_mount,
            c"none".as_ptr(),
            c"/".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            none
        )
    }),
    ("change its root", || call!(SYS_chroot, c"/".as_ptr())),
    ("make namespaces", || {
        call!(SYS_unshare, libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
    }),
    ("join namespaces", || call!(SYS_setns, 0, 0)),
    ("become root", || call!(SYS_setuid, 0)),
    ("get capabilities", || {
        let header = [0x2008_0522_u32, 0];
        let all = [u32::MAX; 6];
        call!(SYS_capset, header.as_ptr(), all.as_ptr())
    }),
    ("load a kernel module", || {
        call!(SYS_finit_module, 0, c"".as_ptr(), 0)
    }),
    ("set the time", || {
        let now = [1_u64, 0];
        call!(SYS_clock_settime, 0, now.as_ptr())
    }),
    ("type on a terminal", || {
        call!(SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr())
    }),
    ("be dumped and traced again", || {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
    }),
    ("handle the jail's signal", || {
        let action = [0_usize; 4];
        call!(SYS_rt_sigaction, libc::SIGSYS, action.as_ptr(), 0, 8)
    }),
    ("open a file by its handle", || {
        call!(SYS_open_by_handle_at, 0, 0, 0)
    }),
    ("take a process's descriptor", || {
        call!(SYS_pidfd_open, 1, 0)
    }),
];

fn open(path: &std::ffi::CStr, flags: libc::c_int) -> libc::c_long {
    call!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o600)
}

/// A fork that was made ends at once in the child.
fn ended(pid: libc::c_long) -> libc::c_long {
    if pid == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    pid
}

/// The process that started this one. From a process namespace of our own it has no number: another has to do.
fn parent() -> libc::c_long {
    libc::c_long::from(PARENT.load(Ordering::SeqCst))
}

/// A number that no thread of ours has.
const NOBODY: i32 = 30_000;

static PARENT: AtomicI32 = AtomicI32::new(NOBODY);

/// To be called before the filter is there.
pub(crate) fn remember_parent() {
    let parent = rustix::process::getppid().map_or(NOBODY, |pid| pid.as_raw_nonzero().get());
    PARENT.store(parent, Ordering::SeqCst);
}
