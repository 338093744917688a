//! Counters of what a vCPU did: the figures behind `strata stats`.

use serde::{Deserialize, Serialize};

/// Why translated code was left for the dispatcher.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitCause {
    /// The next block had to be looked up or translated.
    Lookup,
    /// An instruction the interpreter runs.
    Interpret,
    /// A guest exception.
    Exception,
    /// An interrupt, a kick or a timer.
    Request,
    /// Device memory.
    Mmio,
    /// An I/O port.
    Port,
    /// HLT or MWAIT.
    Halt,
}

/// Counters of one vCPU since its creation. `instructions` is counted in instrumented runs only, otherwise 0.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct VcpuStats {
    /// Retired guest instructions (instrumented runs).
    pub instructions: u64,
    /// Of these, instructions that the interpreter ran.
    pub interpreted: u64,
    /// Memory operands that went over the bounce buffer (page crossings, devices, pages with code).
    pub bounced: u64,
    /// Instructions run by assembly stubs without leaving translated code (instrumented runs).
    pub stubs: u64,
    /// Blocks translated.
    pub blocks_translated: u64,
    /// Guest instructions translated.
    pub instructions_translated: u64,
    /// Nanoseconds spent translating.
    pub translation_ns: u64,
    /// Blocks dropped because their bytes or mappings changed.
    pub blocks_invalidated: u64,
    /// Times the whole code cache was emptied.
    pub cache_flushes: u64,
    /// Soft-TLB entries filled.
    pub tlb_fills: u64,
    /// Soft-TLB flushes.
    pub tlb_flushes: u64,
    /// Guest page faults delivered.
    pub page_faults: u64,
    /// Guest exceptions delivered, page faults included.
    pub exceptions: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Steps that are no retired instruction: deliveries and parts of repeated string instructions (instrumented runs).
    pub other_steps: u64,
    /// Block exits that lock-step found equal to the reference configuration.
    pub compared_exits: u64,
    /// Exits by cause.
    pub exits: std::collections::BTreeMap<ExitCause, u64>,
}
