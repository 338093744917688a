//! Lock-step: a second vCPU in the reference configuration follows the first and compares at every block exit.
//!
//! The leader runs as usual, but instrumented: it counts steps, folds every store into a rolling hash, and sends its
//! registers at each block exit together with all inputs it took ([`strata_engine::Inputs`]) down a channel. The
//! follower has a memory of its own, copied at the start, no devices and no clock; it replays the inputs one
//! instruction at a time and must find the same registers, flags, vectors and store hash at the same step.
//!
//! A *step* is a retired instruction, a delivered exception or interrupt, or one part of a repeated string
//! instruction. Limits: one vCPU; devices whose backends write guest memory from their own threads make a recording
//! that cannot be followed exactly.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use strata_engine::{EngineError, Input, Inputs, VcpuStats};
use strata_memory::{Gpa, GuestMemory, WriteObserver};

use crate::apic::ApicBus;
use crate::cpu::{Cpu, flags};
use crate::dispatch::{NoBus, Translated};
use crate::env::Env;
use crate::peers::Peers;
use crate::translate::Options;

/// Events in one message.
const BATCH: usize = 1024;
/// Messages the leader may be ahead.
const AHEAD: usize = 16;

/// What both sides must agree on.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Snapshot {
    steps: u64,
    rip: u64,
    gpr: [u64; 16],
    flags: u64,
    mxcsr: u32,
    vectors: u64,
    stores: u64,
}

impl Snapshot {
    fn of(cpu: &Cpu, rip: u64, stores: u64) -> Snapshot {
        let fold = |hash, ymm: &[u64; 4]| ymm.iter().fold(hash, |hash, &word| mix(hash, word));
        Snapshot {
            steps: cpu.retired,
            rip,
            gpr: cpu.gpr,
            flags: cpu.arith & flags::ARITH
                | cpu.system_flags & flags::SYSTEM
                | cpu.interrupts_on << 9,
            mxcsr: cpu.mxcsr,
            vectors: cpu.ymm.0.iter().fold(0, fold),
            stores,
        }
    }
}

fn mix(hash: u64, word: u64) -> u64 {
    (hash.rotate_left(7) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

enum Event {
    Input(Input),
    Exit(Box<Snapshot>),
}

/// Device writes to guest memory since the last look.
#[derive(Default)]
struct Recorder {
    memory: Mutex<Option<GuestMemory>>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl WriteObserver for Recorder {
    fn device_wrote(&self, gpa: Gpa, len: u64) {
        let memory = self
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if memory.is_some_and(|memory| memory.read(gpa, &mut bytes).is_ok()) {
            self.writes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((gpa.0, bytes));
        }
    }
}

/// The tracing side of a vCPU.
pub(crate) enum Tracer {
    /// Sends what happens.
    Leader(Leader),
    /// Only folds its own stores.
    Follower {
        /// Rolling hash of stores.
        stores: u64,
    },
}

impl Tracer {
    /// Folds a store into the hash.
    pub fn stored(&mut self, linear: u64, bytes: &[u8]) {
        let stores = match self {
            Tracer::Leader(leader) => &mut leader.stores,
            Tracer::Follower { stores } => stores,
        };
        *stores = bytes.iter().fold(mix(*stores, linear), |hash, &byte| {
            mix(hash, u64::from(byte))
        });
    }
}

/// The sending end.
pub(crate) struct Leader {
    stores: u64,
    batch: Vec<Event>,
    last_steps: u64,
    sender: Option<SyncSender<Vec<Event>>>,
    follower: Option<JoinHandle<Result<(), String>>>,
    done: Arc<AtomicU64>,
    sent: u64,
    recorder: Arc<Recorder>,
}

impl Leader {
    /// Copies the vCPU and its memory and starts the follower.
    pub fn start(vcpu: &mut Translated) -> Result<Leader, EngineError> {
        let memory = copy_memory(&vcpu.env().memory)?;
        let apic = ApicBus::new(vcpu.env().clock.tsc_hz()).add(vcpu.env().apic.id());
        let peers = Peers::new(memory.clone(), 1);
        let me = peers.join(0)?;
        let env = Env {
            slots: memory.slots(),
            memory,
            model: Arc::clone(&vcpu.env().model),
            clock: Arc::clone(&vcpu.env().clock),
            tsc: Arc::clone(&vcpu.env().tsc),
            apic,
            peers,
            me,
            inputs: Inputs::Live,
            stats: VcpuStats::default(),
            exit_counts: Default::default(),
            doorbells: Arc::default(),
            divergence: None,
        };
        let options = Options {
            reference: true,
            count: true,
            trace: true,
            yields: false,
        };
        let mut follower = Translated::new(env, options)?;
        let state = strata_engine::Vcpu::state(vcpu);
        strata_engine::Vcpu::set_state(&mut follower, &state)?;
        follower.cpu_mut().retired = vcpu.cpu().retired;
        follower.replay();
        follower.set_tracer(Tracer::Follower { stores: 0 });
        let (sender, receiver) = sync_channel(AHEAD);
        let done = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&done);
        let thread = std::thread::Builder::new().name("follower".into());
        let thread = thread
            .spawn(move || follow(follower, &receiver, &counter))
            .map_err(|source| EngineError::Host {
                what: "starting the lock-step thread",
                source,
            })?;
        let recorder = Arc::new(Recorder::default());
        *recorder
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(vcpu.env().memory.clone());
        vcpu.env().memory.set_recorder(Some(recorder.clone()));
        Ok(Leader {
            stores: 0,
            batch: Vec::with_capacity(BATCH),
            last_steps: u64::MAX,
            sender: Some(sender),
            follower: Some(thread),
            done,
            sent: 0,
            recorder,
        })
    }

    /// Notes device writes as inputs that are visible after `at` steps.
    pub fn device_writes(&mut self, at: u64, inputs: &mut Inputs) {
        for (gpa, bytes) in self
            .recorder
            .writes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            inputs.arrived(Input::DeviceWrite { at, gpa, bytes });
        }
    }

    /// A block was left for `rip`. False once the follower has found a difference.
    pub fn exit(&mut self, cpu: &Cpu, rip: u64, inputs: &mut Inputs) -> bool {
        if let Inputs::Record(log) = inputs {
            self.batch.extend(log.inputs.drain(..).map(Event::Input));
        }
        if cpu.retired != self.last_steps {
            self.last_steps = cpu.retired;
            self.sent += 1;
            self.batch
                .push(Event::Exit(Box::new(Snapshot::of(cpu, rip, self.stores))));
        }
        self.batch.len() < BATCH || self.flush()
    }

    fn flush(&mut self) -> bool {
        let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
        self.sender
            .as_ref()
            .is_some_and(|sender| sender.send(batch).is_ok())
    }

    /// Waits until the follower has compared everything sent; its verdict.
    pub fn settle(&mut self) -> Result<u64, EngineError> {
        let alive = self.flush();
        while alive && self.done.load(Ordering::Acquire) < self.sent {
            if self.follower.as_ref().is_none_or(JoinHandle::is_finished) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let done = self.done.load(Ordering::Acquire);
        if done >= self.sent {
            Ok(done)
        } else {
            Err(self.verdict())
        }
    }

    /// Ends the follower and returns what it found.
    fn verdict(&mut self) -> EngineError {
        self.sender = None;
        let found = self.follower.take().map(JoinHandle::join);
        let text = match found {
            Some(Ok(Err(text))) => text,
            Some(Err(_)) => "the follower panicked".to_owned(),
            _ => "the follower ended early".to_owned(),
        };
        EngineError::Diverged(text)
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(follower) = self.follower.take() {
            let _ = follower.join();
        }
    }
}

fn copy_memory(from: &GuestMemory) -> Result<GuestMemory, EngineError> {
    let failed = |error: strata_memory::MemoryError| {
        EngineError::Internal(format!("copying guest memory: {error}"))
    };
    let to = GuestMemory::new();
    let mut page = [0u8; 4096];
    for slot in from.slots().iter() {
        to.add_slot(slot.gpa(), slot.size(), slot.kind())
            .map_err(failed)?;
        for offset in (0..slot.size()).step_by(4096) {
            let gpa = Gpa(slot.gpa().0 + offset);
            from.read(gpa, &mut page).map_err(failed)?;
            if page.iter().any(|&byte| byte != 0) {
                to.load(gpa, &page).map_err(failed)?;
            }
        }
    }
    Ok(to)
}

fn follow(
    mut vcpu: Translated,
    receiver: &Receiver<Vec<Event>>,
    done: &AtomicU64,
) -> Result<(), String> {
    let _guard = vcpu.enter_thread().map_err(|error| error.to_string())?;
    let mut last = None;
    while let Ok(batch) = receiver.recv() {
        for event in batch {
            match event {
                Event::Input(input) => vcpu.push_input(input),
                Event::Exit(expected) => {
                    while vcpu.cpu().retired < expected.steps {
                        vcpu.follow_step(&NoBus)
                            .map_err(|error| format!("{error}; last equal: {last:x?}"))?;
                    }
                    let found = Snapshot::of(vcpu.cpu(), vcpu.cpu().rip, vcpu.stores());
                    if found != *expected {
                        return Err(difference(&expected, &found, last));
                    }
                    last = Some((expected.steps, expected.rip));
                    done.fetch_add(1, Ordering::Release);
                }
            }
        }
    }
    Ok(())
}

/// Says in which registers the two sides differ.
fn difference(expected: &Snapshot, found: &Snapshot, last: Option<(u64, u64)>) -> String {
    use std::fmt::Write;
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let mut text = String::new();
    let _ = match last {
        Some((steps, rip)) => write!(text, "equal up to step {steps} at {rip:#x}, then:"),
        None => write!(text, "different from the first block:"),
    };
    let mut add = |name: &str, optimised: u64, reference: u64| {
        if optimised != reference {
            let _ = write!(text, " {name} {optimised:#x}, reference {reference:#x};");
        }
    };
    add("step", expected.steps, found.steps);
    add("rip", expected.rip, found.rip);
    for ((name, &a), &b) in NAMES.iter().zip(&expected.gpr).zip(&found.gpr) {
        add(name, a, b);
    }
    add("rflags", expected.flags, found.flags);
    add("mxcsr", expected.mxcsr.into(), found.mxcsr.into());
    add("hash of vectors", expected.vectors, found.vectors);
    add("hash of stores", expected.stores, found.stores);
    text
}
