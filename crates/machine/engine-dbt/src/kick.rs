//! What other threads may do to a vCPU: set request bits, wake it from HLT; and the engine's one timer thread.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use strata_engine::{Kicker, MachineClock};

use crate::apic::Apic;
use crate::cpu::request;

/// The part of a vCPU that other threads reach.
pub struct VcpuShared {
    id: u32,
    state: Mutex<SharedState>,
    wake: Condvar,
    /// It may use what it remembers of memory: it is neither halted nor parked.
    running: AtomicBool,
    /// The last question to drop tags for stores that it answered, see [`crate::peers`].
    answered: AtomicU64,
    /// Stores to its code that others are making right now.
    unsettled: AtomicU32,
}

#[derive(Default)]
struct SharedState {
    /// The context's request word, while the vCPU exists.
    word: Option<RequestWord>,
    /// Writes by others to pages with translated code, not yet seen by the vCPU.
    writes: Vec<(u64, u64)>,
    /// Questions not yet answered.
    questions: Questions,
    /// The number of the last one.
    asked: u64,
}

/// What a vCPU is asked to drop.
#[derive(Debug, Default)]
pub struct Questions {
    /// Tags for stores to these pages.
    pub pages: Vec<u64>,
    /// All tags for stores.
    pub all: bool,
    /// All it remembers of memory.
    pub everything: bool,
}

/// More pages than this, and all tags for stores go.
const QUESTIONS_MAX: usize = 64;
/// Writes kept one by one; a vCPU that has not looked for so long drops all its blocks.
const WRITES_MAX: usize = 4096;

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
    /// For vCPU `id`, which stands still.
    pub fn new(id: u32) -> VcpuShared {
        VcpuShared {
            id,
            state: Mutex::default(),
            wake: Condvar::new(),
            running: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            unsettled: AtomicU32::new(0),
        }
    }

    /// The vCPU's number.
    pub fn id(&self) -> u32 {
        self.id
    }

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
        self.set(&self.lock(), bits);
    }

    fn set(&self, state: &SharedState, bits: u32) {
        if let Some(word) = &state.word {
            word.get().fetch_or(bits, Ordering::SeqCst);
        }
        if bits & !request::QUIET != 0 {
            self.wake.notify_all();
        }
    }

    /// Waits until a request bit is set that is worth waking for. For the vCPU's own thread, which stands still.
    pub fn wait(&self) {
        let mut state = self.lock();
        while state.word.as_ref().is_some_and(|word| {
            let bits = word.get().load(Ordering::SeqCst);
            bits & !request::QUIET == 0
        }) {
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the writes noted since the last call.
    pub fn take_writes(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.lock().writes)
    }

    /// Somebody else wrote `len` bytes at `gpa`, where this vCPU translated from.
    pub fn code_written(&self, gpa: u64, len: u64) {
        let mut state = self.lock();
        if state.writes.len() >= WRITES_MAX {
            // All of memory.
            state.writes.clear();
            state.writes.push((0, u64::MAX));
        } else if state.writes.last() != Some(&(gpa, len)) {
            state.writes.push((gpa, len));
        }
        self.set(&state, request::CODE_WRITTEN);
    }

    /// Question `number`: drop tags for stores to `page`.
    pub fn ask_page(&self, page: u64, number: u64) {
        let mut state = self.lock();
        if state.questions.pages.len() >= QUESTIONS_MAX {
            state.questions.all = true;
        }
        if !state.questions.all {
            state.questions.pages.push(page);
        }
        self.question(state, number);
    }

    /// Question `number`: forget everything about memory.
    pub fn ask_everything(&self, number: u64) {
        let mut state = self.lock();
        state.questions.everything = true;
        self.question(state, number);
    }

    fn question(&self, mut state: MutexGuard<'_, SharedState>, number: u64) {
        state.asked = number;
        // Whoever stands still sees it before it does anything else.
        self.set(&state, request::QUESTION);
    }

    /// It is this vCPU's own question.
    pub fn asked_itself(&self, number: u64) {
        let mut state = self.lock();
        let answered = self.answered.load(Ordering::SeqCst) == state.asked;
        state.asked = number;
        if answered {
            self.answered.store(number, Ordering::SeqCst);
        }
    }

    /// The open questions, to be answered by [`VcpuShared::answer`] with the number.
    pub fn take_questions(&self) -> (Questions, u64) {
        let mut state = self.lock();
        (std::mem::take(&mut state.questions), state.asked)
    }

    /// Everything up to question `number` has been dropped.
    pub fn answer(&self, number: u64) {
        self.answered.fetch_max(number, Ordering::SeqCst);
    }

    /// True if this vCPU uses nothing any more that question `number` was about.
    pub fn has_answered(&self, number: u64) -> bool {
        !self.is_running() || self.answered.load(Ordering::SeqCst) >= number
    }

    /// See [`VcpuShared::is_running`].
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    /// False while the vCPU stands still: halted, parked, or waiting to run alone.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Keeps the vCPU from serializing until [`VcpuShared::release`].
    pub fn hold(&self) {
        self.unsettled.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends one [`VcpuShared::hold`].
    pub fn release(&self) {
        self.unsettled.fetch_sub(1, Ordering::SeqCst);
    }

    /// Where the number of stores to this vCPU's code is that others are in the middle of.
    pub fn unsettled(&self) -> *const AtomicU32 {
        &raw const self.unsettled
    }

    /// Waits until nobody is in the middle of a store to this vCPU's code.
    pub fn settle(&self) {
        while self.unsettled.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}

impl Kicker for VcpuShared {
    fn kick(&self) {
        self.raise(request::KICK);
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
