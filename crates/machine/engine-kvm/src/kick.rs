//! What other threads may do to a vCPU: bring it out of the kernel.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::VcpuFd;
use strata_engine::{EngineError, Kicker};

/// Set in [`Shared::ext_int`] beside the vector.
const ASSERTED: u16 = 0x100;

/// The part of a vCPU that other threads reach.
///
/// A kick sets `immediate_exit`, which makes the next `KVM_RUN` return at once, and signals the thread in case it is in
/// one already. The flag is set before the signal, so whichever of the two the thread meets first brings it out.
#[derive(Default)]
pub struct Shared {
    target: Mutex<Target>,
    kicked: AtomicBool,
    ext_int: AtomicU16,
}

#[derive(Default)]
struct Target {
    flag: Option<ImmediateExit>,
    /// The thread in [`Shared::enter`], if any.
    thread: Option<libc::pid_t>,
}

/// Address of `kvm_run::immediate_exit`.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only accessed atomically, and `detach` removes it before the mapping goes away.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(&self, value: u8) {
        // SAFETY: see `Send` above; the byte is in memory shared with the kernel, which reads it by itself.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds to a vCPU, which must stay until [`Shared::detach`].
    pub fn attach(&self, fd: &mut VcpuFd) {
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        self.lock().flag = Some(ImmediateExit(flag.cast_const().cast()));
    }

    /// The vCPU goes away.
    pub fn detach(&self) {
        self.lock().flag = None;
    }

    /// The calling thread runs the vCPU until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> Result<Running, EngineError> {
        kick_signal()?;
        // SAFETY: gettid has no preconditions.
        self.lock().thread = Some(unsafe { libc::gettid() });
        Ok(Running(Arc::clone(self)))
    }

    /// After an interrupted `KVM_RUN`: was it a kick? Further kicks count again.
    pub fn take_kick(&self) -> bool {
        // In this order: a kick that comes between the two sets the flag again and interrupts the next run.
        if let Some(flag) = &self.lock().flag {
            flag.set(0);
        }
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Drives the line of an 8259 into this vCPU.
    pub fn set_ext_int(&self, vector: Option<u8>) {
        let value = vector.map_or(0, |vector| ASSERTED | u16::from(vector));
        self.ext_int.store(value, Ordering::SeqCst);
        if value != 0 {
            self.interrupt();
        }
    }

    /// The vector on that line.
    pub fn ext_int(&self) -> Option<u8> {
        let value = self.ext_int.load(Ordering::SeqCst);
        (value & ASSERTED != 0).then_some(value as u8)
    }

    /// The vCPU acknowledged the interrupt on the line.
    pub fn take_ext_int(&self) {
        self.ext_int.store(0, Ordering::SeqCst);
    }

    /// Makes the current or next `KVM_RUN` end soon.
    fn interrupt(&self) {
        let target = self.lock();
        if let Some(flag) = &target.flag {
            flag.set(1);
        }
        if let Some(thread) = target.thread {
            // SAFETY: signals a thread of this process, which has a handler; the lock keeps the thread inside `enter`'s
            // guard, so the number is not somebody else's.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

impl Kicker for Shared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.interrupt();
    }
}

/// A thread runs a vCPU while this lives.
pub struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().thread = None;
    }
}

/// The signal that brings threads out of `KVM_RUN`: the first one that the C library leaves to programs.
pub fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes sure that the signal interrupts system calls of the calling thread and does nothing else.
pub fn kick_signal() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let code = *INSTALLED.get_or_init(|| {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: all zeros is a valid `sigaction` without flags, so that system calls are interrupted.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler touches nothing.
        let done = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        if done == 0 { 0 } else { last_error() }
    });
    let fail = |code| EngineError::Host {
        what: "setting up the signal that interrupts CPUs",
        source: std::io::Error::from_raw_os_error(code),
    };
    if code != 0 {
        return Err(fail(code));
    }
    // SAFETY: `set` is made by sigemptyset before it is used.
    let code = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if code == 0 { Ok(()) } else { Err(fail(code)) }
}

fn last_error() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}
