//! x86-64 as a guest: its state, its CPU models, its constants.

mod feature;
mod model;
mod msr;
mod state;

pub use feature::Feature;
pub use model::{
    APIC_BUS_HZ, CpuModel, CpuidContext, CpuidEntry, ModelError, PHYSICAL_BITS, xsave_size,
};
pub use msr::MsrIndex;
pub use state::{
    ApicState, CpuState, DescriptorTable, MpState, MsrEntry, PendingEvent, Segment, SegmentIndex,
    X86, XsaveState,
};
