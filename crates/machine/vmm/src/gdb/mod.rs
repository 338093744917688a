//! A machine under gdb: its vCPUs as threads, their registers, memory as they see it, breakpoints, steps.
//!
//! ```text
//!   gdb ──socket──▶ thread "gdb": session, target ──Ask──▶ the machine's event loop ──▶ parked vCPUs
//!                                                 ◀─Stop──
//! ```
//!
//! The machine begins stopped and waits for gdb. While it is stopped its time stands still. What gdb changes is in the
//! vCPUs and in memory; breakpoints are the engine's, and the guest does not see them.

mod paging;
mod registers;
mod session;
mod target;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::time::Duration;

use strata_engine::x86::CpuState;
use strata_engine::{GuestDebug, VcpuId};
use strata_memory::Gpa;

use crate::error::BuildError;
use crate::event::Event;
use crate::machine::Machine;

/// How long a machine that has ended waits for gdb to hear of it.
const FAREWELL: Duration = Duration::from_millis(300);
/// Bytes of a page: addresses beyond may lie elsewhere.
const PAGE: u64 = 4096;

/// What gdb wants of a stopped machine, unless it says otherwise.
#[derive(Debug)]
pub(crate) enum Ask {
    /// A vCPU's registers.
    State(u32),
    /// Other registers for a vCPU.
    SetState(u32, Box<CpuState>),
    /// Bytes at a linear address of a vCPU; as many as can be read.
    Read(u32, u64, usize),
    /// Bytes to a linear address of a vCPU.
    Write(u32, u64, Vec<u8>),
    /// These and no other breakpoints.
    Breakpoints(Vec<u64>),
    /// Go on: these vCPUs by one instruction, and others freely.
    Resume { steps: Vec<u32>, runs: Runs },
    /// Stop, if it runs.
    Stop,
    /// Go on without gdb.
    Leave,
}

/// Who runs besides those that step.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) enum Runs {
    /// All.
    #[default]
    All,
    /// These alone.
    Only(Vec<u32>),
}

/// The answer to an [`Ask`].
#[derive(Debug)]
pub(crate) enum Answer {
    /// It is done.
    Done,
    /// It cannot be done.
    Refused,
    /// Registers.
    State(Box<CpuState>),
    /// Memory.
    Bytes(Vec<u8>),
}

/// An [`Ask`] with the place for its answer.
#[derive(Debug)]
pub(crate) struct DebugRequest {
    pub(crate) ask: Ask,
    pub(crate) answer: SyncSender<Answer>,
}

/// The machine does not run any longer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stop {
    /// A vCPU met a breakpoint.
    Breakpoint(u32),
    /// A vCPU's step is done.
    Step(u32),
    /// It was asked to.
    Asked,
    /// It has ended.
    Ended,
}

/// The machine's side of a debugger.
pub(crate) struct Debugging {
    stops: Sender<Stop>,
    /// Closed when the session has ended.
    farewell: Receiver<()>,
    stopped: bool,
    /// A vCPU met something while all were being parked for another reason.
    pending: Option<u32>,
    steps: Vec<u32>,
    runs: Runs,
    breakpoints: Vec<u64>,
    /// Registers of vCPUs since the machine stopped.
    states: BTreeMap<u32, Box<CpuState>>,
}

impl Debugging {
    /// Whether a vCPU may run now.
    pub(crate) fn lets_run(&self, cpu: u32) -> bool {
        let free = match &self.runs {
            Runs::All => true,
            Runs::Only(cpus) => cpus.contains(&cpu),
        };
        !self.stopped && self.pending.is_none() && (free || self.steps.contains(&cpu))
    }

    /// Whether nothing may run, time included.
    pub(crate) fn holds(&self) -> bool {
        self.stopped || self.pending.is_some()
    }

    /// A vCPU met something while all were being parked.
    pub(crate) fn note(&mut self, cpu: u32) {
        self.pending.get_or_insert(cpu);
    }
}

impl Machine {
    /// Lets gdb connect to a listening socket. The machine does not run until gdb says so.
    ///
    /// # Errors
    /// If the system makes no thread for it.
    pub fn serve_gdb(&mut self, listener: OwnedFd) -> Result<(), BuildError> {
        let (stops, inbox) = channel();
        let (gone, farewell) = channel();
        let target = target::MachineTarget::new(self.events(), inbox, self.config().cpus);
        let machine = self.handle();
        std::thread::Builder::new()
            .name("gdb".to_owned())
            .spawn(move || {
                session::serve(&listener, target, &machine);
                drop(gone);
            })
            .map_err(|source| BuildError::Host {
                what: "a thread for gdb",
                source,
            })?;
        self.debugging = Some(Debugging {
            stops,
            farewell,
            stopped: true,
            pending: None,
            steps: Vec::new(),
            runs: Runs::All,
            breakpoints: Vec::new(),
            states: BTreeMap::new(),
        });
        Ok(())
    }

    /// A vCPU came back for the debugger.
    pub(crate) fn debug_exit(&mut self, cpu: u32) {
        let Some(debugging) = &self.debugging else {
            // Nobody wants it any longer.
            return self.go();
        };
        let stop = match debugging.steps.contains(&cpu) {
            true => Stop::Step(cpu),
            false => Stop::Breakpoint(cpu),
        };
        self.debug_stop(stop);
    }

    /// Stops everything and tells the debugger.
    fn debug_stop(&mut self, stop: Stop) {
        if self.debugging.as_ref().is_none_or(|d| d.stopped) {
            return;
        }
        self.park_all();
        self.stop_clock();
        let Some(debugging) = &mut self.debugging else {
            return;
        };
        debugging.stopped = true;
        debugging.pending = None;
        debugging.states.clear();
        // If the session is over it is about to ask for leave.
        let _ = debugging.stops.send(stop);
    }

    /// Does what gdb asks.
    pub(crate) fn debug(&mut self, request: DebugRequest) {
        let answer = self.debug_answer(request.ask);
        // The session may be gone.
        let _ = request.answer.send(answer);
    }

    fn debug_answer(&mut self, ask: Ask) -> Answer {
        let done = |done: bool| if done { Answer::Done } else { Answer::Refused };
        if !self.debugging.as_ref().is_some_and(|d| d.stopped)
            && !matches!(ask, Ask::Stop | Ask::Leave)
        {
            return Answer::Refused;
        }
        match ask {
            Ask::State(cpu) => self
                .debug_state(cpu)
                .map_or(Answer::Refused, |state| Answer::State(state.clone())),
            Ask::SetState(cpu, state) => done(self.set_debug_state(cpu, state)),
            Ask::Read(cpu, at, len) => {
                let bytes = self.debug_read(cpu, at, len);
                bytes.map_or(Answer::Refused, Answer::Bytes)
            }
            Ask::Write(cpu, at, bytes) => done(self.debug_write(cpu, at, &bytes).is_some()),
            Ask::Breakpoints(at) => done(self.set_breakpoints(at)),
            Ask::Resume { steps, runs } => {
                self.debug_resume(steps, runs);
                Answer::Done
            }
            Ask::Stop => {
                self.debug_stop(Stop::Asked);
                Answer::Done
            }
            Ask::Leave => {
                self.debug_stop(Stop::Asked);
                self.set_breakpoints(Vec::new());
                self.debug_resume(Vec::new(), Runs::All);
                Answer::Done
            }
        }
    }

    fn debug_state(&mut self, cpu: u32) -> Option<&mut Box<CpuState>> {
        if !self.debugging.as_ref()?.states.contains_key(&cpu) {
            let state = self.on_vcpu(cpu, |vcpu| Box::new(vcpu.state()))?;
            self.debugging.as_mut()?.states.insert(cpu, state);
        }
        self.debugging.as_mut()?.states.get_mut(&cpu)
    }

    fn set_debug_state(&mut self, cpu: u32, state: Box<CpuState>) -> bool {
        let copy = state.clone();
        let set = self.on_vcpu(cpu, move |vcpu| vcpu.set_state(&state).is_ok());
        if let (Some(true), Some(debugging)) = (set, &mut self.debugging) {
            debugging.states.insert(cpu, copy);
        }
        set == Some(true)
    }

    /// Where a linear address of a vCPU is, and how much of `len` lies in the same page.
    fn debug_place(&mut self, cpu: u32, at: u64, len: usize) -> Option<(Gpa, usize)> {
        let memory = self.memory().clone();
        let state = self.debug_state(cpu)?;
        let gpa = paging::translate(&memory, state, at)?;
        let in_page = PAGE - at % PAGE;
        Some((Gpa(gpa), len.min(in_page as usize)))
    }

    fn debug_read(&mut self, cpu: u32, at: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let linear = at.wrapping_add(done as u64);
            let Some((gpa, count)) = self.debug_place(cpu, linear, rest.len()) else {
                break;
            };
            if self.memory().read(gpa, rest.get_mut(..count)?).is_err() {
                break;
            }
            done += count;
        }
        bytes.truncate(done);
        (done > 0).then_some(bytes)
    }

    fn debug_write(&mut self, cpu: u32, at: u64, bytes: &[u8]) -> Option<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let linear = at.wrapping_add(done as u64);
            let (gpa, count) = self.debug_place(cpu, linear, rest.len())?;
            // A device write: the engine forgets what it made of these bytes.
            self.memory().write(gpa, rest.get(..count)?).ok()?;
            done += count;
        }
        Some(())
    }

    /// Sets the breakpoints of all vCPUs; all or none.
    fn set_breakpoints(&mut self, at: Vec<u64>) -> bool {
        let Some(debugging) = &mut self.debugging else {
            return false;
        };
        let before = std::mem::replace(&mut debugging.breakpoints, at);
        debugging.steps.clear();
        if self.tell_engine() {
            return true;
        }
        if let Some(debugging) = &mut self.debugging {
            debugging.breakpoints = before;
        }
        self.tell_engine();
        false
    }

    fn debug_resume(&mut self, steps: Vec<u32>, runs: Runs) {
        if let Some(debugging) = &mut self.debugging {
            (debugging.steps, debugging.runs) = (steps, runs);
            debugging.stopped = false;
            debugging.pending = None;
            debugging.states.clear();
        }
        self.tell_engine();
        self.go();
    }

    /// Tells every vCPU what the debugger wants. False if one refuses.
    fn tell_engine(&self) -> bool {
        let Some(debugging) = &self.debugging else {
            return false;
        };
        (0..self.config().cpus).all(|cpu| {
            let wish = GuestDebug {
                step: debugging.steps.contains(&cpu),
                breakpoints: debugging.breakpoints.clone(),
            };
            self.on_vcpu(cpu, move |vcpu| vcpu.debug(&wish).is_ok()) == Some(true)
        })
    }

    /// Lets the thread of a parked vCPU do something with it.
    fn on_vcpu<R: Send + 'static>(
        &self,
        cpu: u32,
        work: impl FnOnce(&mut crate::vcpu::AnyVcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, answered) = channel();
        let work = Box::new(move |vcpu: &mut crate::vcpu::AnyVcpu| {
            // The machine waits for it.
            let _ = answer.send(work(vcpu));
        });
        self.vcpu_thread(VcpuId(cpu))?.with(work);
        answered.recv().ok()
    }

    /// Tells the debugger that the machine has ended, and gives it the time to say so.
    pub(crate) fn end_debugging(&mut self) {
        if let Some(debugging) = self.debugging.take()
            && debugging.stops.send(Stop::Ended).is_ok()
        {
            let deadline = std::time::Instant::now() + FAREWELL;
            loop {
                let left = deadline.saturating_duration_since(std::time::Instant::now());
                match debugging.farewell.recv_timeout(left) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }
}

/// Asks the machine; none if it has ended.
fn ask(events: &Sender<Event>, ask: Ask) -> Option<Answer> {
    let (answer, answered) = std::sync::mpsc::sync_channel(1);
    let request = DebugRequest { ask, answer };
    events.send(Event::Debug(request)).ok()?;
    answered.recv().ok()
}
