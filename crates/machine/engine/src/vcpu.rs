//! The engine and vCPU traits: create, run until exit, kick, read and write state.

use std::sync::Arc;

use crate::{Doorbell, DoorbellAddress, InterruptSink, VcpuStats};

/// Index of a vCPU in its machine, from 0; also its initial APIC ID on x86.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct VcpuId(pub u32);

/// A guest instruction set: what its vCPU state is.
pub trait Arch: 'static {
    /// The complete architectural state of one vCPU, as values.
    type State: Clone + Send + 'static;
    /// Name as users write it, for example `x86-64`.
    const NAME: &'static str;
}

/// Where a vCPU's loads, stores and port accesses go that do not hit RAM.
///
/// Called on the vCPU's own thread. `data` is 1, 2, 4 or 8 bytes, little endian; reads of nothing fill it with ones.
pub trait IoBus: Send + Sync {
    /// Reads device memory at guest-physical address `gpa`.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// Writes device memory at guest-physical address `gpa`.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// Reads an I/O port.
    fn port_in(&self, port: u16, data: &mut [u8]);
    /// Writes an I/O port.
    fn port_out(&self, port: u16, data: &[u8]);
    /// A level-triggered interrupt with this vector was acknowledged (EOI broadcast to I/O APICs).
    fn end_of_interrupt(&self, vector: u8);
}

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Exit {
    /// Somebody called [`Kicker::kick`].
    Kicked,
    /// The vCPU shut down: a triple fault on x86.
    Shutdown,
    /// The vCPU waits for a start-up message from another vCPU and can only be started or kicked.
    WaitingForStartup,
    /// A breakpoint of a debugger was met, or its step is done.
    Debug,
}

/// What a debugger wants of a vCPU. The guest sees nothing of it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct GuestDebug {
    /// Come back with [`Exit::Debug`] after one instruction, or at the first one of an exception's handler. No interrupt
    /// is taken before it unless the vCPU is halted.
    pub step: bool,
    /// Come back with [`Exit::Debug`] before the instruction at any of these linear addresses, also if the run begins
    /// there.
    pub breakpoints: Vec<u64>,
}

/// An engine could not create or run a vCPU: the machine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something this engine needs.
    #[error("this host cannot run the {engine} engine: {reason}")]
    Unsupported {
        /// The engine's name.
        engine: &'static str,
        /// What is missing.
        reason: String,
    },
    /// A system call of the engine failed.
    #[error("{what} failed")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The state given to the vCPU is not one that the architecture allows.
    #[error("the CPU state is not valid: {0}")]
    InvalidState(String),
    /// The engine found its own state broken; the vCPU cannot run on.
    #[error("internal error of the engine: {0}")]
    Internal(String),
    /// A lock-step run and its reference differ.
    #[error("lock-step: {0}")]
    Diverged(String),
    /// A recorded run could not be replayed.
    #[error("replay diverged: {0}")]
    Replay(#[from] crate::InputError),
}

/// One engine instance serves one machine.
pub trait Engine: Send + Sync {
    /// The guest instruction set.
    type Arch: Arch;

    /// Name as users write it: `translate`, `kvm`.
    fn name(&self) -> &'static str;

    /// Creates vCPU `id` in its reset state. Each id once.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu<Self::Arch>>, EngineError>;

    /// Where devices send message-signalled interrupts. May be called from any thread.
    fn interrupts(&self) -> Arc<dyn InterruptSink>;

    /// Binds an address to an event: a guest write there calls `bell` instead of [`IoBus`]. May be called while running.
    fn add_doorbell(&self, at: DoorbellAddress, bell: Arc<dyn Doorbell>)
    -> Result<(), EngineError>;

    /// Removes a doorbell; unknown addresses are ignored.
    fn remove_doorbell(&self, at: DoorbellAddress);

    /// Slots of guest memory came or went, or the dirty log was started: when this returns, no vCPU works with what it
    /// knew of memory before. Not to be called on a vCPU's own thread. Engines that ask memory each time need not do
    /// anything.
    fn memory_changed(&self) {}
}

/// Interrupts a running vCPU from another thread.
pub trait Kicker: Send + Sync {
    /// Makes the current or next [`Vcpu::run`] return [`Exit::Kicked`] soon. Never blocks.
    fn kick(&self);
}

/// One virtual CPU.
pub trait Vcpu<A: Arch>: Send {
    /// Runs guest code until something must be decided outside. Halting waits inside.
    fn run(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError>;

    /// Copies the whole architectural state out. Only between runs.
    fn state(&mut self) -> A::State;

    /// Replaces the whole architectural state. Only between runs.
    fn set_state(&mut self, state: &A::State) -> Result<(), EngineError>;

    /// A handle that other threads use to interrupt this vCPU.
    fn kicker(&self) -> Arc<dyn Kicker>;

    /// Sets what a debugger wants, in place of what it wanted before. Only between runs.
    fn debug(&mut self, _wish: &GuestDebug) -> Result<(), EngineError> {
        Err(EngineError::Internal(
            "this engine cannot be debugged".to_owned(),
        ))
    }

    /// What this vCPU did so far.
    fn stats(&self) -> VcpuStats;
}
