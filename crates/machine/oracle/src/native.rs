//! The native side: a child process that runs cases on the host's CPU.
//!
//! The child maps code and data at their fixed addresses, loads the whole register state, and jumps; the code ends at
//! an exit stub or in a signal handler on an alternate stack. Every general register including RSP, and FS and GS,
//! belong to the case meanwhile. The child makes no system calls but reading, writing, signal return and exit:
//! seccomp kills it should a case try.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;

use crate::layout::{
    BATCH, CODE, CODE_SIZE, DATA, HIGH, LINE, PAGE, READ_ONLY, RW_PAGES, TRAMPOLINE, TRAMPOLINE_32,
    Template, USER_CS, USER_DS,
};
use crate::state::{Case, DONE, State, TIMEOUT, off};

/// What parent and child share.
#[repr(C)]
pub struct Shared {
    /// Cases in this batch.
    pub count: u32,
    /// The case that runs, for post-mortems.
    pub running: u32,
    /// What the writable data pages hold before each case.
    pub template: Template,
    /// The read-only page.
    pub read_only: Page,
    /// The cases.
    pub cases: [Case; BATCH],
}

/// A page of bytes.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u8; 4096]);

/// The child and what is shared with it.
pub struct Native {
    shared: *mut Shared,
    code: *mut u8,
    to_child: OwnedFd,
    from_child: OwnedFd,
    pid: libc::pid_t,
}

// SAFETY: the mappings are private to this value; the child only touches them between `run`'s write and read.
unsafe impl Send for Native {}

static mut OUT: State = State::ZERO;
static mut HOST_RSP: u64 = 0;
static mut HOST_FS: u64 = 0;
static mut IN_GUEST: u64 = 0;
static mut TICKS: u32 = 0;

std::arch::global_asm!(
    // enter(rdi = &State): runs the case; comes back with everything in OUT.
    ".globl strata_oracle_enter",
    "strata_oracle_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + {host_rsp}], rsp",
    "rdfsbase rax", "mov [rip + {host_fs}], rax",
    "fxrstor64 [rdi + {fx}]",
    "vmovups ymm0, [rdi + {ymm}]", "vmovups ymm1, [rdi + {ymm} + 32]", "vmovups ymm2, [rdi + {ymm} + 64]",
    "vmovups ymm3, [rdi + {ymm} + 96]", "vmovups ymm4, [rdi + {ymm} + 128]", "vmovups ymm5, [rdi + {ymm} + 160]",
    "vmovups ymm6, [rdi + {ymm} + 192]", "vmovups ymm7, [rdi + {ymm} + 224]", "vmovups ymm8, [rdi + {ymm} + 256]",
    "vmovups ymm9, [rdi + {ymm} + 288]", "vmovups ymm10, [rdi + {ymm} + 320]", "vmovups ymm11, [rdi + {ymm} + 352]",
    "vmovups ymm12, [rdi + {ymm} + 384]", "vmovups ymm13, [rdi + {ymm} + 416]", "vmovups ymm14, [rdi + {ymm} + 448]",
    "vmovups ymm15, [rdi + {ymm} + 480]",
    "mov qword ptr [rip + {in_guest}], 1",
    "mov rax, [rdi + {fs}]", "wrfsbase rax", "mov rax, [rdi + {gs}]", "wrgsbase rax",
    "mov rsp, rdi",
    "mov rax, [rsp]", "mov rcx, [rsp + 8]", "mov rdx, [rsp + 16]", "mov rbx, [rsp + 24]", "mov rbp, [rsp + 40]",
    "mov rsi, [rsp + 48]", "mov rdi, [rsp + 56]", "mov r8, [rsp + 64]", "mov r9, [rsp + 72]", "mov r10, [rsp + 80]",
    "mov r11, [rsp + 88]", "mov r12, [rsp + 96]", "mov r13, [rsp + 104]", "mov r14, [rsp + 112]",
    "mov r15, [rsp + 120]",
    "lea rsp, [rsp + {iret}]",
    "iretq",
    // exit: where code that ran to its end arrives.
    ".globl strata_oracle_exit",
    "strata_oracle_exit:",
    "mov [rip + {out}], rax", "mov [rip + {out} + 8], rcx", "mov [rip + {out} + 16], rdx",
    "mov [rip + {out} + 24], rbx", "mov [rip + {out} + 32], rsp", "mov [rip + {out} + 40], rbp",
    "mov [rip + {out} + 48], rsi", "mov [rip + {out} + 56], rdi", "mov [rip + {out} + 64], r8",
    "mov [rip + {out} + 72], r9", "mov [rip + {out} + 80], r10", "mov [rip + {out} + 88], r11",
    "mov [rip + {out} + 96], r12", "mov [rip + {out} + 104], r13", "mov [rip + {out} + 112], r14",
    "mov [rip + {out} + 120], r15",
    "mov rsp, [rip + {host_rsp}]",
    "pushfq", "pop qword ptr [rip + {out} + {rflags}]",
    "mov qword ptr [rip + {out} + {vector}], {done}",
    // finish: where the signal handler sends code that faulted.
    ".globl strata_oracle_finish",
    "strata_oracle_finish:",
    "mov rsp, [rip + {host_rsp}]",
    "rdfsbase rax", "mov [rip + {out} + {fs}], rax", "rdgsbase rax", "mov [rip + {out} + {gs}], rax",
    "mov rax, [rip + {host_fs}]", "wrfsbase rax",
    "lea rdi, [rip + {out}]",
    "fxsave64 [rdi + {fx}]",
    "vmovups [rdi + {ymm}], ymm0", "vmovups [rdi + {ymm} + 32], ymm1", "vmovups [rdi + {ymm} + 64], ymm2",
    "vmovups [rdi + {ymm} + 96], ymm3", "vmovups [rdi + {ymm} + 128], ymm4", "vmovups [rdi + {ymm} + 160], ymm5",
    "vmovups [rdi + {ymm} + 192], ymm6", "vmovups [rdi + {ymm} + 224], ymm7", "vmovups [rdi + {ymm} + 256], ymm8",
    "vmovups [rdi + {ymm} + 288], ymm9", "vmovups [rdi + {ymm} + 320], ymm10", "vmovups [rdi + {ymm} + 352], ymm11",
    "vmovups [rdi + {ymm} + 384], ymm12", "vmovups [rdi + {ymm} + 416], ymm13", "vmovups [rdi + {ymm} + 448], ymm14",
    "vmovups [rdi + {ymm} + 480], ymm15",
    "mov qword ptr [rip + {in_guest}], 0",
    "fninit",
    "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
    "push 0x202", "popfq",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    // signal: puts the host's FS base and AC back around the handler.
    ".globl strata_oracle_signal",
    "strata_oracle_signal:",
    "push r12",
    "rdfsbase r12",
    "mov rax, [rip + {host_fs}]", "wrfsbase rax",
    // AC alone: sigreturn does not restore ID and NT, so they must stay.
    "pushfq",
    "and qword ptr [rsp], -0x40001",
    "popfq",
    "call {handler}",
    "wrfsbase r12",
    "pop r12",
    "ret",
    host_rsp = sym HOST_RSP,
    host_fs = sym HOST_FS,
    in_guest = sym IN_GUEST,
    out = sym OUT,
    handler = sym handler,
    done = const DONE,
    fx = const off::FX,
    ymm = const off::YMM,
    fs = const off::FS,
    gs = const off::GS,
    iret = const off::IRET,
    rflags = const off::RFLAGS,
    vector = const off::VECTOR,
);

unsafe extern "C" {
    fn strata_oracle_enter(state: *const State);
    fn strata_oracle_exit();
    fn strata_oracle_finish();
    fn strata_oracle_signal();
}

const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Takes the state at a fault out of the signal's context and goes on at `finish`.
unsafe extern "C" fn handler(
    signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
) {
    // SAFETY: the child has one thread; the statics are its own; the kernel passes a valid context.
    unsafe {
        if IN_GUEST == 0 {
            if signal == libc::SIGVTALRM {
                return;
            }
            libc::_exit(101);
        }
        let regs = &mut (*context).uc_mcontext.gregs;
        let out = &raw mut OUT;
        let out = &mut *out;
        if signal == libc::SIGVTALRM {
            TICKS += 1;
            if TICKS < 3 {
                return;
            }
            out.vector = TIMEOUT;
        } else {
            out.vector = regs[libc::REG_TRAPNO as usize] as u64;
        }
        for (to, &from) in out.gpr.iter_mut().zip(&GREGS) {
            *to = regs[from as usize] as u64;
        }
        out.rip = regs[libc::REG_RIP as usize] as u64;
        out.rflags = regs[libc::REG_EFL as usize] as u64;
        out.error = regs[libc::REG_ERR as usize] as u64;
        out.cr2 = regs[libc::REG_CR2 as usize] as u64;
        // A trap that the jump to the exit took: the case was at its end.
        if out.vector == 1
            && (out.rip == TRAMPOLINE
                || out.rip == TRAMPOLINE_32
                || out.rip == strata_oracle_exit as *const () as u64)
        {
            out.vector = DONE;
        }
        regs[libc::REG_RIP as usize] = strata_oracle_finish as *const () as i64;
        regs[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut regs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(USER_CS);
    }
}

fn failed(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for two descriptors, which then are ours.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(failed("pipe"));
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

fn map(at: u64, size: usize, protection: i32, flags: i32, fd: i32) -> io::Result<*mut u8> {
    let fixed = if at == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    // SAFETY: never replaces a mapping.
    let got = unsafe { libc::mmap(at as *mut _, size, protection, flags | fixed, fd, 0) };
    if got == libc::MAP_FAILED {
        return Err(failed("mmap"));
    }
    Ok(got.cast())
}

/// True if the host's kernel lets user code write FS and GS bases, which the child does around each case.
pub fn can_run() -> bool {
    // SAFETY: a plain query; bit 1 is FSGSBASE.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

impl Native {
    /// Starts a child.
    pub fn start(read_only: &[u8; 4096]) -> io::Result<Native> {
        if !can_run() {
            return Err(io::Error::other(
                "the host's kernel does not let user code write FS and GS bases",
            ));
        }
        // SAFETY: plain system calls; the descriptor is ours.
        let code_file = unsafe {
            let fd = libc::memfd_create(c"oracle-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, CODE_SIZE as i64) != 0 {
                return Err(failed("memfd"));
            }
            OwnedFd::from_raw_fd(fd)
        };
        let shared_flags = libc::MAP_SHARED;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let code = map(
            0,
            CODE_SIZE as usize,
            rw,
            shared_flags,
            code_file.as_raw_fd(),
        )?;
        let shared: *mut Shared = map(
            0,
            size_of::<Shared>(),
            rw,
            shared_flags | libc::MAP_ANONYMOUS,
            -1,
        )?
        .cast();
        // SAFETY: the mapping has that size.
        unsafe { (*shared).read_only.0 = *read_only };
        let (child_in, to_child) = pipe()?;
        let (from_child, child_out) = pipe()?;
        // SAFETY: the child calls only async-signal-safe functions.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(failed("fork"));
        }
        if pid == 0 {
            // The ends of other threads' children are closed too: each must see its own parent's end.
            // SAFETY: as above.
            unsafe {
                let ok = child(
                    shared,
                    code_file.as_raw_fd(),
                    child_in.as_raw_fd(),
                    child_out.as_raw_fd(),
                );
                libc::_exit(if ok.is_ok() { 0 } else { 102 });
            }
        }
        Ok(Native {
            shared,
            code,
            to_child,
            from_child,
            pid,
        })
    }

    /// The shared part, while the child waits.
    pub fn shared(&mut self) -> &mut Shared {
        // SAFETY: the child touches it only during `run`.
        unsafe { &mut *self.shared }
    }

    /// Writes code at a linear address of the code region.
    pub fn write_code(&mut self, linear: u64, bytes: &[u8]) {
        let at = (linear - CODE) as usize;
        assert!(at + bytes.len() <= CODE_SIZE as usize);
        // SAFETY: just checked; the child does not run now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code.add(at), bytes.len()) };
    }

    /// Runs the batch in `shared`. An error tells at which case the child died.
    pub fn run(&mut self) -> io::Result<()> {
        let mut byte = [1u8];
        // SAFETY: one byte each way on our own pipes.
        unsafe {
            if libc::write(self.to_child.as_raw_fd(), byte.as_ptr().cast(), 1) != 1 {
                return Err(failed("telling the child"));
            }
            loop {
                let got = libc::read(self.from_child.as_raw_fd(), byte.as_mut_ptr().cast(), 1);
                if got == 1 {
                    return Ok(());
                }
                if got < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                let running = (*self.shared).running;
                return Err(io::Error::other(format!(
                    "the native child died in case {running}"
                )));
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own child and mappings.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, null_mut(), 0);
            libc::munmap(self.shared.cast(), size_of::<Shared>());
            libc::munmap(self.code.cast(), CODE_SIZE as usize);
        }
    }
}

/// The child's whole life.
unsafe fn child(shared: *mut Shared, code: i32, input: i32, output: i32) -> io::Result<()> {
    // SAFETY: single-threaded from here on; only system calls and plain memory.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let trampoline = map(TRAMPOLINE, 4096, rw, private, -1)?;
        // jmp [rip + 2]; the pointer at offset 8.
        trampoline.copy_from_nonoverlapping([0xffu8, 0x25, 2, 0, 0, 0].as_ptr(), 6);
        trampoline
            .add(8)
            .cast::<u64>()
            .write(strata_oracle_exit as *const () as u64);
        // jmp far USER_CS:TRAMPOLINE, in 32-bit code.
        let mut far = [0xeau8, 0, 0, 0, 0, USER_CS as u8, 0];
        far[1..5].copy_from_slice(&(TRAMPOLINE as u32).to_le_bytes());
        trampoline
            .add((TRAMPOLINE_32 - TRAMPOLINE) as usize)
            .copy_from_nonoverlapping(far.as_ptr(), 7);
        libc::mprotect(trampoline.cast(), 4096, libc::PROT_READ | libc::PROT_EXEC);
        map(
            CODE,
            CODE_SIZE as usize,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_SHARED,
            code,
        )?;
        // Populate: an absent code page is not a fault the case may see.
        for at in (CODE..CODE + CODE_SIZE).step_by(4096) {
            (at as *const u8).read_volatile();
        }
        map(DATA, 2 * PAGE as usize, rw, private, -1)?;
        map(DATA + 4 * PAGE, PAGE as usize, rw, private, -1)?;
        map(HIGH, PAGE as usize, rw, private, -1)?;
        let read_only = map(READ_ONLY, PAGE as usize, rw, private, -1)?;
        read_only.copy_from_nonoverlapping((*shared).read_only.0.as_ptr(), 4096);
        libc::mprotect(read_only.cast(), 4096, libc::PROT_READ);
        segments();
        signals()?;
        confine()?;
        loop {
            let mut byte = [0u8];
            let got = libc::read(input, byte.as_mut_ptr().cast(), 1);
            if got < 0 && *libc::__errno_location() == libc::EINTR {
                continue;
            }
            if got != 1 {
                return Ok(());
            }
            batch(&mut *shared);
            if libc::write(output, byte.as_ptr().cast(), 1) != 1 {
                return Ok(());
            }
        }
    }
}

/// Gives every data segment register the flat segment that 32-bit code needs; the bases of FS and GS stay.
unsafe fn segments() {
    // SAFETY: in 64-bit code nothing but the bases matters, and those are put back.
    unsafe {
        std::arch::asm!(
            "mov ds, {ds:e}", "mov es, {ds:e}",
            "rdfsbase {base}", "mov fs, {ds:e}", "wrfsbase {base}",
            "rdgsbase {base}", "mov gs, {ds:e}", "wrgsbase {base}",
            ds = in(reg) u32::from(USER_DS), base = out(reg) _,
        );
    }
}

unsafe fn signals() -> io::Result<()> {
    const STACK: usize = 64 << 10;
    // SAFETY: a fresh stack, a handler of the right signature in assembly.
    unsafe {
        let stack = map(
            0,
            STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
        )?;
        let new = libc::stack_t {
            ss_sp: stack.cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        libc::sigaltstack(&new, null_mut());
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGVTALRM,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = strata_oracle_signal as *const () as usize;
            action.sa_flags =
                libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART;
            if signal != libc::SIGVTALRM {
                // Ticks wait while a fault is taken apart.
                libc::sigaddset(&mut action.sa_mask, libc::SIGVTALRM);
            }
            if libc::sigaction(signal, &action, null_mut()) != 0 {
                return Err(failed("sigaction"));
            }
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, null_mut());
        let tick = libc::timeval {
            tv_sec: 0,
            tv_usec: 10_000,
        };
        // Ticks of consumed time only: cases must not time out because the host is busy.
        let timer = libc::itimerval {
            it_interval: tick,
            it_value: tick,
        };
        if libc::setitimer(libc::ITIMER_VIRTUAL, &timer, null_mut()) != 0 {
            return Err(failed("setitimer"));
        }
        Ok(())
    }
}

/// Leaves the child four system calls.
unsafe fn confine() -> io::Result<()> {
    let stmt = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let equal = |k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: 0x15,
        jt,
        jf,
        k,
    };
    let filter = [
        stmt(0x20, 4), // load arch
        equal(0xc000_003e, 0, 5),
        stmt(0x20, 0), // load number
        equal(libc::SYS_read as u32, 4, 0),
        equal(libc::SYS_write as u32, 3, 0),
        equal(libc::SYS_rt_sigreturn as u32, 2, 0),
        equal(libc::SYS_exit_group as u32, 1, 0),
        stmt(0x06, libc::SECCOMP_RET_KILL_PROCESS),
        stmt(0x06, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program is a valid filter; the kernel copies it.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
        {
            return Err(failed("seccomp"));
        }
    }
    Ok(())
}

unsafe fn batch(shared: &mut Shared) {
    const LINES: u16 = (4096 / LINE) as u16;
    // SAFETY: the data pages are mapped writable; the cases' states are valid.
    unsafe {
        for (page, bytes) in RW_PAGES.iter().zip(&shared.template.0) {
            (*page as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), 4096);
        }
        for number in 0..shared.count.min(BATCH as u32) {
            shared.running = number;
            let case = &mut shared.cases[number as usize];
            case.init.iret = [
                case.init.rip,
                case.init.cs,
                case.init.rflags,
                case.init.gpr[4],
                u64::from(USER_DS),
            ];
            TICKS = 0;
            strata_oracle_enter(&case.init);
            case.result = (&raw const OUT).read();
            case.lines.count = 0;
            let mut first = 0;
            for (page, bytes) in RW_PAGES.iter().zip(&shared.template.0) {
                case.lines.collect(first, *page as *mut u8, bytes.as_ptr());
                first += LINES;
            }
        }
    }
}
