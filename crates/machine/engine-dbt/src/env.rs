//! What a vCPU works with besides its registers: memory, model, clock, APIC, inputs, counters.

use std::collections::BTreeMap;
use std::sync::Arc;

use strata_engine::x86::CpuModel;
use strata_engine::{
    Doorbell, DoorbellAddress, DoorbellSpace, ExitCause, InputError, Inputs, IoBus, MachineClock,
    VcpuStats,
};
use strata_memory::{GuestMemory, SlotTable};

use crate::apic::Apic;
use crate::cpu::Cpu;
use crate::kick::VcpuShared;
use crate::peers::Peers;
use crate::tsc::Tsc;

/// A guest exception to be delivered. Everything architectural is as before the instruction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fault {
    /// Exception vector.
    pub vector: u8,
    /// Error code, where the vector has one.
    pub error: Option<u32>,
    /// The address that goes to CR2, for page faults.
    pub cr2: u64,
}

impl Fault {
    /// An exception without error code.
    pub const fn plain(vector: u8) -> Self {
        Fault {
            vector,
            error: None,
            cr2: 0,
        }
    }
    /// #UD.
    pub const UNDEFINED: Fault = Fault::plain(6);
    /// #NM.
    pub const NO_DEVICE: Fault = Fault::plain(7);
    /// #GP(error).
    pub const fn protection(error: u32) -> Self {
        Fault {
            vector: 13,
            error: Some(error),
            cr2: 0,
        }
    }
    /// #SS(error).
    pub const fn stack(error: u32) -> Self {
        Fault {
            vector: 12,
            error: Some(error),
            cr2: 0,
        }
    }
    /// #PF(error) at `linear`.
    pub const fn page(linear: u64, error: u32) -> Self {
        Fault {
            vector: 14,
            error: Some(error),
            cr2: linear,
        }
    }
}

/// What kind of memory access is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or the write half of a read-modify-write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// The vCPU's surroundings.
pub struct Env {
    /// Guest-physical memory.
    pub memory: GuestMemory,
    /// Its slots as last seen.
    pub slots: Arc<SlotTable>,
    /// The CPU model.
    pub model: Arc<CpuModel>,
    /// Machine time.
    pub clock: Arc<MachineClock>,
    /// The time-stamp counter, which follows it.
    pub tsc: Arc<Tsc>,
    /// This vCPU's local APIC.
    pub apic: Arc<Apic>,
    /// The vCPUs of the machine.
    pub peers: Arc<Peers>,
    /// What they see of this one.
    pub me: Arc<VcpuShared>,
    /// Where non-determinism comes from.
    pub inputs: Inputs,
    /// Counters.
    pub stats: VcpuStats,
    /// Exits by cause, in the order of [`EXIT_CAUSES`].
    pub exit_counts: [u64; EXIT_CAUSES.len()],
    /// Addresses bound to events, shared by all vCPUs of the machine.
    pub doorbells: Arc<Doorbells>,
    /// Why a replay cannot go on.
    pub divergence: Option<InputError>,
}

/// Addresses bound to events.
pub type Doorbells = std::sync::RwLock<BTreeMap<DoorbellAddress, Arc<dyn Doorbell>>>;

/// All causes, by number.
const EXIT_CAUSES: [ExitCause; 7] = [
    ExitCause::Lookup,
    ExitCause::Interpret,
    ExitCause::Exception,
    ExitCause::Request,
    ExitCause::Mmio,
    ExitCause::Port,
    ExitCause::Halt,
];

impl Env {
    /// Counts an exit.
    pub fn count_exit(&mut self, cause: ExitCause) {
        if let Some(count) = self.exit_counts.get_mut(cause as usize) {
            *count += 1;
        }
    }

    /// Exits so far by cause; causes that never came are left out.
    pub fn exits(&self) -> BTreeMap<ExitCause, u64> {
        EXIT_CAUSES
            .into_iter()
            .zip(self.exit_counts)
            .filter(|&(_, count)| count > 0)
            .collect()
    }

    /// Notes that a replay asked for something that was not recorded; the run loop ends the run.
    pub fn diverged(&mut self, error: InputError) {
        self.divergence.get_or_insert(error);
    }

    /// Calls the doorbell bound to this write, if there is one.
    pub fn ring_doorbell(&self, space: DoorbellSpace, address: u64, data: &[u8]) -> bool {
        let bells = self
            .doorbells
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if bells.is_empty() {
            return false;
        }
        let mut bytes = [0u8; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        let exact = DoorbellAddress {
            space,
            address,
            value: Some(value),
        };
        let any = DoorbellAddress {
            space,
            address,
            value: None,
        };
        let Some(bell) = bells.get(&exact).or_else(|| bells.get(&any)).cloned() else {
            return false;
        };
        drop(bells);
        bell.ring(value);
        true
    }
}

/// A vCPU at work in Rust: its context, its surroundings and the bus. What interpreter routines get.
pub struct Exec<'a> {
    /// The context.
    pub cpu: &'a mut Cpu,
    /// The surroundings.
    pub env: &'a mut Env,
    /// Devices.
    pub bus: &'a dyn IoBus,
    /// The code cache, told of every store to a page that holds translated code.
    pub code: &'a mut crate::code::CodeMap,
}
