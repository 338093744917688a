//! What other threads may do to a vCPU: set request bits, wake it from HLT; and the engine's one timer thread.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use strata_engine::{Kicker, MachineClock};
use strata_memory::{Gpa, WriteObserver};

use crate::apic::Apic;
use crate::cpu::request;

/// The part of a vCPU that other threads reach.
#[derive(Default)]
pub struct VcpuShared {
    state: Mutex<SharedState>,
    wake: Condvar,
}

#[derive(Default)]
struct SharedState {
    /// The context's request word, while the vCPU exists.
    word: Option<RequestWord>,
    /// Device writes to pages with translated code, not yet seen by the vCPU.
    writes: Vec<(u64, u64)>,
}

/// Address of `Cpu::request`.
struct RequestWord(*const AtomicU32);

// SAFETY: the word is only accessed atomically, and `detach` removes it before the context goes away.
unsafe impl Send for RequestWord {}

impl RequestWord {
    fn get(&self) -> &AtomicU32 {
        // SAFETY: see `Send` above.
        unsafe { &*self.0 }
    }
}

impl VcpuShared {
    fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds to a context. The context must stay where it is until [`VcpuShared::detach`].
    pub fn attach(&self, word: &mut u32) {
        self.lock().word = Some(RequestWord((word as *mut u32).cast()));
    }

    /// The context goes away.
    pub fn detach(&self) {
        self.lock().word = None;
    }

    /// Sets request bits and wakes the vCPU.
    pub fn raise(&self, bits: u32) {
        let state = self.lock();
        if let Some(word) = &state.word {
            word.get().fetch_or(bits, Ordering::SeqCst);
        }
        drop(state);
        self.wake.notify_all();
    }

    /// Waits until a request bit is set. For the vCPU's own thread.
    pub fn wait(&self) {
        let mut state = self.lock();
        while state
            .word
            .as_ref()
            .is_some_and(|word| word.get().load(Ordering::SeqCst) == 0)
        {
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the device writes noted since the last call.
    pub fn take_writes(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.lock().writes)
    }
}

impl Kicker for VcpuShared {
    fn kick(&self) {
        self.raise(request::KICK);
    }
}

/// Tells all vCPUs of device writes to pages that hold translated code.
pub struct CodeWatcher(pub Mutex<Vec<Weak<VcpuShared>>>);

impl WriteObserver for CodeWatcher {
    fn device_wrote(&self, gpa: Gpa, len: u64) {
        let vcpus = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for vcpu in vcpus.iter().filter_map(Weak::upgrade) {
            vcpu.lock().writes.push((gpa.0, len));
            vcpu.raise(request::CODE_WRITTEN);
        }
    }
}

/// The timer thread: polls each APIC when its timer is due. Ends with the engine.
pub struct Timers {
    state: Arc<TimerState>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct TimerState {
    inner: Mutex<TimerInner>,
    changed: Condvar,
}

#[derive(Default)]
struct TimerInner {
    apics: Vec<Arc<Apic>>,
    moved: bool,
    ended: bool,
}

impl Timers {
    /// Starts the thread.
    pub fn start(clock: Arc<MachineClock>) -> std::io::Result<Timers> {
        let state = Arc::new(TimerState::default());
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("timers".into())
            .spawn(move || shared.run(&clock))?;
        Ok(Timers {
            state,
            thread: Some(thread),
        })
    }

    /// Serves one more APIC.
    pub fn add(&self, apic: &Arc<Apic>) {
        let state = Arc::downgrade(&self.state);
        self.state.lock().apics.push(Arc::clone(apic));
        apic.set_timer_moved(Arc::new(move || {
            if let Some(state) = state.upgrade() {
                state.lock().moved = true;
                state.changed.notify_one();
            }
        }));
    }
}

impl TimerState {
    fn lock(&self) -> MutexGuard<'_, TimerInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, clock: &MachineClock) {
        let mut inner = self.lock();
        while !inner.ended {
            inner.moved = false;
            let apics = inner.apics.clone();
            drop(inner);
            let now = clock.now_ns();
            let mut next = None::<u64>;
            for apic in &apics {
                apic.poll(now);
                next = [next, apic.next_deadline_ns()].into_iter().flatten().min();
            }
            inner = self.lock();
            if inner.moved || inner.ended {
                continue;
            }
            // While the machine clock stands, nothing becomes due: look again now and then.
            let wait = next.map(|at| at.saturating_sub(now).clamp(1_000, 100_000_000));
            inner = match wait {
                Some(ns) => {
                    let waited = self.changed.wait_timeout(inner, Duration::from_nanos(ns));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.state.lock().ended = true;
        self.state.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
