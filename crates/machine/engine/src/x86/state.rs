//! The architectural state of one x86-64 vCPU, as values: what engines read, write, save and migrate.

use serde::{Deserialize, Serialize};

use crate::Arch;

/// The x86-64 guest architecture.
#[derive(Debug)]
pub struct X86;

impl Arch for X86 {
    type State = CpuState;
    const NAME: &'static str = "x86-64";
}

/// A segment register with its hidden part (Intel SDM vol. 3, 3.4.3). `limit` in bytes, expanded.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Last valid offset, granularity applied.
    pub limit: u32,
    /// Descriptor bits 8..=23 of the second word: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
}

impl Segment {
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }
    /// The L bit: 64-bit code.
    pub fn long(&self) -> bool {
        self.attributes & 0x2000 != 0
    }
    /// The D/B bit: 32-bit default.
    pub fn default_32(&self) -> bool {
        self.attributes & 0x4000 != 0
    }
    /// The P bit.
    pub fn present(&self) -> bool {
        self.attributes & 0x80 != 0
    }
    /// True for a null selector loaded in long mode or an unusable register.
    pub fn null(&self) -> bool {
        self.selector & 0xfffc == 0
    }
}

/// Index of a segment register, in encoding order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum SegmentIndex {
    /// Extra.
    Es = 0,
    /// Code.
    Cs = 1,
    /// Stack.
    Ss = 2,
    /// Data.
    Ds = 3,
    /// F.
    Fs = 4,
    /// G.
    Gs = 5,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct MsrEntry {
    /// Register number.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// What the vCPU does (multiprocessor state).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub enum MpState {
    /// Runs instructions.
    #[default]
    Runnable,
    /// In HLT.
    Halted,
    /// After INIT or reset of an application processor: waits for SIPI.
    WaitForSipi,
}

/// An event that was accepted but not yet delivered.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct PendingEvent {
    /// The vector.
    pub vector: u8,
    /// The error code, for exceptions that have one.
    pub error: Option<u32>,
    /// True for an exception, false for an interrupt or NMI.
    pub exception: bool,
}

/// The local APIC's registers (Intel SDM vol. 3, 11.4): the 4 KiB page in xAPIC layout, one u32 each 16 bytes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ApicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Registers by offset / 16; 64 of them.
    pub registers: Vec<u32>,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub tsc_deadline: u64,
    /// Machine nanoseconds at which the one-shot or periodic timer fires next, if armed.
    pub timer_deadline_ns: Option<u64>,
}

/// The extended state in the standard (not compacted) XSAVE format.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct XsaveState {
    /// The area: 512 bytes legacy, 64 header, then components at their CPUID offsets.
    pub bytes: Vec<u8>,
}

/// Everything about one vCPU.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15 (encoding order).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS, bit 1 always set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8: the task priority class.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// All other MSRs that the CPU model has, ascending by index.
    pub msrs: Vec<MsrEntry>,
    /// x87, SSE, AVX.
    pub xsave: XsaveState,
    /// The local APIC, unless the machine has none.
    pub apic: Option<ApicState>,
    /// Multiprocessor state.
    pub mp_state: MpState,
    /// True for one instruction after STI, MOV SS or POP SS.
    pub interrupt_shadow: bool,
    /// True from an NMI's delivery to the next IRET.
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An accepted event waits for delivery.
    pub pending: Option<PendingEvent>,
    /// Guest TSC = machine TSC + this, wrapping.
    pub tsc_offset: u64,
    /// Ticks per second.
    pub tsc_hz: u64,
}
