//! Host faults inside translated code become guest exceptions.
//!
//! An instruction run as itself may fault on the host exactly as on the bare CPU: divide errors, SSE alignment,
//! unmasked SIMD and x87 exceptions. The handler notes where and what, and lets the thread go on at a stub that
//! leaves translated code with all guest registers as they were. Faults anywhere else go to the previous handler.

use std::cell::Cell;
use std::sync::OnceLock;

use strata_engine::EngineError;

/// What the handler needs to know of the vCPU running on this thread, and what it leaves behind.
#[derive(Debug, Default)]
pub struct FaultFrame {
    /// Executable part of the code cache that holds translated code.
    pub range: (u64, u64),
    /// Where the thread goes on.
    pub resume: u64,
    /// Host instruction that faulted.
    pub pc: u64,
    /// Host exception vector.
    pub vector: u8,
    /// Address of a host page fault.
    pub address: u64,
}

thread_local! {
    static FRAME: Cell<*mut FaultFrame> = const { Cell::new(std::ptr::null_mut()) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGBUS, libc::SIGILL];

type Previous = [Option<libc::sigaction>; 4];

static PREVIOUS: OnceLock<Result<Previous, i32>> = OnceLock::new();

/// Installs the handlers, once per process.
pub fn install() -> Result<(), EngineError> {
    let result = PREVIOUS.get_or_init(|| {
        let mut previous: Previous = [None; 4];
        for (slot, signal) in previous.iter_mut().zip(SIGNALS) {
            // SAFETY: zeroed sigaction is valid; the handler has the SA_SIGINFO signature and is async-signal-safe.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut old: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigemptyset(&mut action.sa_mask);
                if libc::sigaction(signal, &action, &mut old) != 0 {
                    return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
                }
                *slot = Some(old);
            }
        }
        Ok(previous)
    });
    match result {
        Ok(_) => Ok(()),
        Err(code) => Err(EngineError::Host {
            what: "installing the fault handler",
            source: std::io::Error::from_raw_os_error(*code),
        }),
    }
}

#[allow(
    clippy::indexing_slicing,
    reason = "constant indices below the length of gregs"
)]
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let frame = FRAME.get();
    // SAFETY: the kernel passes a valid ucontext; FRAME is null or points at the frame of the run loop below us on
    // this very thread, which is suspended while we run.
    unsafe {
        let context = context.cast::<libc::ucontext_t>();
        let registers = &mut (*context).uc_mcontext.gregs;
        let pc = registers[libc::REG_RIP as usize] as u64;
        if !frame.is_null() && pc >= (*frame).range.0 && pc < (*frame).range.1 {
            (*frame).pc = pc;
            (*frame).vector = registers[libc::REG_TRAPNO as usize] as u8;
            (*frame).address = registers[libc::REG_CR2 as usize] as u64;
            registers[libc::REG_RIP as usize] = (*frame).resume as i64;
            return;
        }
        pass_on(signal, info, context.cast());
    }
}

/// Calls the handler that was there before us, or dies of the signal as if we were not there.
///
/// # Safety
/// Called from a signal handler with its own arguments.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = match PREVIOUS.get() {
        Some(Ok(previous)) => SIGNALS
            .iter()
            .position(|&s| s == signal)
            .and_then(|i| previous.get(i).copied().flatten()),
        _ => None,
    };
    // SAFETY: restoring the default action and calling a previously installed handler are what its owner expects.
    unsafe {
        match previous {
            Some(old) if old.sa_sigaction > 1 && old.sa_flags & libc::SA_SIGINFO != 0 => {
                let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(old.sa_sigaction);
                call(signal, info, context);
            }
            _ => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    }
}

/// An alternate signal stack and the fault frame of this thread, while it runs a vCPU.
#[derive(Debug)]
pub struct ThreadGuard {
    old_stack: libc::stack_t,
    old_frame: *mut FaultFrame,
    _stack: Vec<u8>,
}

const STACK_SIZE: usize = 64 << 10;

impl ThreadGuard {
    /// Prepares this thread.
    pub fn enter(frame: *mut FaultFrame) -> Result<ThreadGuard, EngineError> {
        let mut stack = vec![0u8; STACK_SIZE];
        // SAFETY: the stack outlives its registration: `drop` puts the old one back first.
        let old_stack = unsafe {
            let new = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: STACK_SIZE,
            };
            let mut old: libc::stack_t = std::mem::zeroed();
            if libc::sigaltstack(&new, &mut old) != 0 {
                return Err(EngineError::Host {
                    what: "setting the signal stack (sigaltstack)",
                    source: std::io::Error::last_os_error(),
                });
            }
            old
        };
        let old_frame = FRAME.replace(frame);
        Ok(ThreadGuard {
            old_stack,
            old_frame,
            _stack: stack,
        })
    }
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        FRAME.set(self.old_frame);
        // SAFETY: puts back what was registered before.
        unsafe {
            libc::sigaltstack(&self.old_stack, std::ptr::null_mut());
        }
    }
}
