//! The second step: a filter on the system calls of all threads.
//!
//! Three answers: what a running machine needs is done; what libraries try in passing and can do without fails with an
//! error; anything else stops the process, and its last word is the number of the call. Arguments are looked at where
//! they make the difference: memory never becomes executable, a clone is a thread of this process, an `ioctl` belongs
//! to KVM.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// With what status a stopped process ends if its last word was said.
const STOPPED: libc::c_int = 70;
/// Group of KVM's `ioctl` numbers.
const KVM_GROUP: u64 = 0xae00;
/// Those bits of an `ioctl` number.
const GROUP_BITS: u64 = 0xff00;

/// What the machine behind the filter is.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// It runs on the hardware engine.
    pub kvm: bool,
    /// Where the number of a call that stops the process is written to, as a line of JSON.
    pub report: RawFd,
    /// Calls that would stop the process fail instead: for [`crate::probe`] alone.
    pub survive: bool,
}

/// The filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The handler for stopped calls cannot be set.
    #[error("no handler can be set")]
    Handler(#[source] io::Error),
    /// The filter cannot be put together: a fault of ours.
    #[error("the filter is not valid")]
    Backend(#[from] seccompiler::BackendError),
    /// The kernel refuses it.
    #[error("the kernel refuses it")]
    Refused(#[from] seccompiler::Error),
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls that a running machine makes, whatever their arguments.
const NEEDED: [libc::c_long; 63] = [
    // Memory: what there is, given back and asked for; what may become executable is checked below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads: to wait for each other, and to end.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Signals: a fault in translated code is one.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // Descriptors that are open: disks, pipes, sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_flock,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getrandom,
    libc::SYS_getcpu,
];

/// Calls that libraries make in passing, to look at the host: they fail, and nothing is lost.
const REFUSED: [libc::c_long; 22] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
];

/// Closes the process off for good. To be called when all is built, on any thread; it is for all of them.
///
/// # Errors
/// If the kernel refuses; what was laid down before stays.
pub fn seal(filter: Filter) -> Result<(), SealError> {
    REPORT.store(filter.report, Ordering::SeqCst);
    SURVIVE.store(filter.survive, Ordering::SeqCst);
    if filter.survive {
        crate::probe::remember_parent();
    }
    handle_stops().map_err(SealError::Handler)?;
    for program in programs(filter.kvm)? {
        apply_filter_all_threads(&program)?;
    }
    Ok(())
}

/// The filters: of several answers to a call the kernel takes the strictest.
fn programs(kvm: bool) -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let arch = TargetArch::x86_64;
    let mut allowed = unconditional(&NEEDED);
    allowed.extend(conditional()?);
    allowed.extend(unconditional(&REFUSED));
    // Its flags are in memory, where a filter cannot look; without it the C library uses the older call.
    allowed.extend(unconditional(&[libc::SYS_clone3]));
    let stop = SeccompFilter::new(allowed, SeccompAction::Trap, SeccompAction::Allow, arch)?;
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let mut in_passing = unconditional(&REFUSED);
    in_passing.extend(other_ioctls(kvm)?);
    let refuse = SeccompFilter::new(in_passing, SeccompAction::Allow, refuse, arch)?;
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let newer = unconditional(&[libc::SYS_clone3]);
    let absent = SeccompFilter::new(newer, SeccompAction::Allow, absent, arch)?;
    Ok([refuse.try_into()?, absent.try_into()?, stop.try_into()?])
}

fn unconditional(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Calls that are needed with some arguments only.
fn conditional() -> Result<Rules, seccompiler::BackendError> {
    let argument = |number, op, value| SeccompCondition::new(number, Len::Dword, op, value as u64);
    let without = |number, bits: libc::c_int| argument(number, Op::MaskedEq(bits as u64), 0);
    let with = |number, bits: libc::c_int| argument(number, Op::MaskedEq(bits as u64), bits);
    let mut rules = Rules::new();
    let mut allow = |call, ways: Vec<SeccompCondition>| {
        let ways: Result<Vec<SeccompRule>, _> = ways
            .into_iter()
            .map(|condition| SeccompRule::new(vec![condition]))
            .collect();
        ways.map(|ways| rules.insert(call, ways))
    };
    // No memory that can be executed, in any way to get some.
    allow(libc::SYS_mmap, vec![without(2, libc::PROT_EXEC)?])?;
    allow(libc::SYS_mprotect, vec![without(2, libc::PROT_EXEC)?])?;
    allow(libc::SYS_clone, vec![with(0, libc::CLONE_THREAD)?])?;
    // Only files that are open already.
    allow(libc::SYS_statx, vec![with(2, libc::AT_EMPTY_PATH)?])?;
    allow(libc::SYS_newfstatat, vec![with(3, libc::AT_EMPTY_PATH)?])?;
    // The handler of stopped calls stays.
    allow(
        libc::SYS_rt_sigaction,
        vec![argument(0, Op::Ne, libc::SIGSYS)?],
    )?;
    // No other process: this one, by the number that it sees for itself.
    let own = rustix::process::getpid().as_raw_nonzero().get();
    allow(libc::SYS_tgkill, vec![argument(0, Op::Eq, own)?])?;
    allow(
        libc::SYS_prctl,
        vec![argument(0, Op::Eq, libc::PR_SET_NAME)?],
    )?;
    allow(
        libc::SYS_setsockopt,
        vec![argument(1, Op::Eq, libc::SOL_SOCKET)?],
    )?;
    // A socket's error, and no more of what there is to know about one.
    allow(
        libc::SYS_getsockopt,
        vec![argument(1, Op::Eq, libc::SOL_SOCKET)?],
    )?;
    // To whom a socket is connected, and to nobody else.
    let nowhere = SeccompCondition::new(4, Len::Qword, Op::Eq, 0)?;
    allow(libc::SYS_sendto, vec![nowhere])?;
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_OFD_SETLK,
        libc::F_OFD_GETLK,
    ];
    let commands: Result<_, _> = commands
        .map(|command| argument(1, Op::Eq, command))
        .into_iter()
        .collect();
    allow(libc::SYS_fcntl, commands?)?;
    // With any argument: those that are not ours fail by the other filter.
    rules.insert(libc::SYS_ioctl, Vec::new());
    Ok(rules)
}

/// `ioctl` on anything but KVM, or to make a descriptor not block.
fn other_ioctls(kvm: bool) -> Result<Rules, seccompiler::BackendError> {
    // Linux takes 32 bits of the number, whatever is above.
    let not = |value| SeccompCondition::new(1, Len::Dword, Op::Ne, value);
    let nonblocking = not(libc::FIONBIO)?;
    let mut ways = Vec::new();
    if kvm {
        // "Not that group" is that one of its bits differs.
        for bit in (8..16).map(|bit| 1_u64 << bit) {
            let differs = !KVM_GROUP & GROUP_BITS & bit;
            let other = SeccompCondition::new(1, Len::Dword, Op::MaskedEq(bit), differs)?;
            ways.push(SeccompRule::new(vec![nonblocking.clone(), other])?);
        }
    } else {
        ways.push(SeccompRule::new(vec![nonblocking])?);
    }
    Ok(Rules::from([(libc::SYS_ioctl, ways)]))
}

static REPORT: AtomicI32 = AtomicI32::new(-1);
static SURVIVE: AtomicBool = AtomicBool::new(false);
/// Whether a call was stopped and survived.
pub(crate) static STOPS: AtomicBool = AtomicBool::new(false);

fn handle_stops() -> io::Result<()> {
    // SAFETY: a handler that makes only system calls that the filter allows, in a structure that is otherwise empty.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = stopped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        if libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        // A thread with the signal blocked would die without a word.
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    Ok(())
}

/// The call was not made. Says which one it was and ends the process.
extern "C" fn stopped(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let _ = info;
    // SAFETY: the kernel passes a context that is valid until we return.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // The kernel leaves the number of the call there.
    let number = registers
        .get(libc::REG_RAX as usize)
        .map_or(0, |rax| (*rax).unsigned_abs());
    if SURVIVE.load(Ordering::SeqCst) {
        STOPS.store(true, Ordering::SeqCst);
        if let Some(rax) = registers.get_mut(libc::REG_RAX as usize) {
            *rax = -i64::from(libc::EPERM);
        }
        return;
    }
    let line = last_word(number);
    // SAFETY: plain system calls on a buffer of our own.
    unsafe {
        libc::write(
            REPORT.load(Ordering::SeqCst),
            line.as_ptr().cast(),
            line.len(),
        );
        libc::_exit(STOPPED);
    }
}

/// The line that tells which call stopped the process. Made without allocating: the process may be in any state.
pub fn last_word(number: u64) -> [u8; 33] {
    let mut line = *b"\n{\"stopped-by-jail\":         0}\n\n";
    let mut rest = number;
    for digit in line
        .iter_mut()
        .rev()
        .filter(|byte| matches!(byte, b' ' | b'0'))
    {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_fit() {
        for kvm in [false, true] {
            for program in programs(kvm).unwrap() {
                assert!(program.len() < 4096, "{}", program.len());
            }
        }
    }

    #[test]
    fn no_call_is_both_needed_and_refused() {
        for call in REFUSED {
            assert!(!NEEDED.contains(&call), "{call}");
            assert!(!conditional().unwrap().contains_key(&call), "{call}");
        }
    }
}
