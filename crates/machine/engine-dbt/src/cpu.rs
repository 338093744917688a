//! The vCPU context: everything translated code, the stubs and the interpreter share, at fixed offsets.
//!
//! Translated code reaches it through the host's `rsp`. Fields that emitted code touches are listed in [`off`]; the
//! others may move freely.

use std::sync::atomic::{AtomicU32, Ordering};

use strata_engine::x86::{DescriptorTable, Segment};

use crate::caches::{
    CodePages, Dropped, JUMP_ENTRIES, JumpCache, LargePages, SoftTlb, TLB_LEAST, WalkCache,
};

/// Bytes of the bounce buffer an operand may take (an XSAVE area never bounces; the interpreter copies it).
pub const BOUNCE_SIZE: usize = 256;

/// Index of the TLB and jump cache a mode uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Privilege {
    /// CPL 0, 1 or 2.
    Supervisor = 0,
    /// CPL 3.
    User = 1,
}

/// A 32-byte vector register, low half first.
pub type Ymm = [u64; 4];

/// One vCPU. `#[repr(C)]`: emitted code uses the offsets in [`off`].
#[repr(C, align(64))]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15. Complete whenever Rust runs; while translated code runs only
    /// R8..R11 live here.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS; equals the linear address when CS.base is 0).
    pub rip: u64,
    /// Arithmetic flags as the host's EFLAGS bits (CF PF AF ZF SF OF), valid whenever Rust runs.
    pub arith: u64,
    /// 1 if IF is set, else 0. A field of its own so that CLI and STI are one store.
    pub interrupts_on: u64,
    /// All other RFLAGS bits: TF DF IOPL NT RF VM AC VIF VIP ID. Bit 1 is not kept here.
    pub system_flags: u64,
    /// What the vCPU must look at at the next check: bits of [`request`]. Set by any thread, atomically.
    pub request: u32,
    /// Not 0 if an interrupt waits for IF: looked at together with `request` one instruction after STI.
    pub deferred: u32,
    /// Retired instructions, in instrumented runs.
    pub retired: u64,
    /// PAUSE instructions until the host's thread gives way to others, where several vCPUs may spin.
    pub pauses: u64,
    /// Scratch of emitted code.
    pub temp: [u64; 8],
    /// Mask for `pext` that selects the TLB index: bits from 12 on, as many as the TLBs' size asks for.
    pub tlb_mask: u64,
    /// Mask for `pext` that selects the page number (bits 12..64).
    pub page_mask: u64,
    /// Mask for `pext` that selects the jump-cache index.
    pub jump_mask: u64,
    /// The stack pointer of the Rust code that entered translated code.
    pub host_rsp: u64,
    /// Why translated code was left, see `stubs`.
    pub exit_reason: u64,
    /// A value that goes with the reason: a site's address.
    pub exit_info: u64,
    /// MXCSR of the guest while Rust runs.
    pub mxcsr: u32,
    /// MXCSR of Rust code while translated code runs.
    pub host_mxcsr: u32,
    /// Address of the slow-access callback's environment.
    pub env: u64,
    /// Scratch of the stubs in `stubs::system`.
    pub system: [u64; 8],
    /// Where those stubs go: the stubs `interpret`, `lookup`, `request` and `block_exit`.
    pub to_stub: [u64; 4],
    /// Not 0 if `block_exit` must be told where they go on.
    pub traced: u64,
    /// By [`Privilege`], not 0 if 64-bit code of CPL 0 or 3 may be entered through the jump cache, neither stepped nor
    /// with alignment checks.
    pub fast: [u64; 2],
    /// Where the number of stores is that others are making to code that this vCPU may have, or 0 if IRET, which
    /// serializes, must look at more than that.
    pub fast_iret: u64,
    /// Address of the [`crate::tsc::TscLine`] that RDTSC reads, or 0.
    pub tsc_line: u64,
    /// Segment bases of ES, CS, SS, DS, FS, GS for emitted code; always equal to `segments[i].base`.
    pub seg_base: [u64; 6],
    /// Where operands that cannot be reached directly are copied. Aligned 64.
    pub bounce: Bounce,
    /// YMM0..YMM15 while Rust runs.
    pub ymm: VectorFile,
    /// The soft TLBs by [`Privilege`].
    pub tlb: [SoftTlb; 2],
    /// The jump caches by [`Privilege`].
    pub jump: [JumpCache; 2],
    /// Where they hold parts of large pages.
    pub large: LargePages,
    /// What they dropped.
    pub dropped: Dropped,
    /// What walks went through.
    pub walks: WalkCache,
    /// Where code is, by [`Privilege`].
    pub code_pages: [CodePages; 2],
    /// Walks and fetches remember; they do not in the reference configuration.
    pub remembers: bool,

    /// ES, CS, SS, DS, FS, GS. Change bases only through [`Cpu::set_segment`].
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
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
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// Guest TSC minus machine TSC.
    pub tsc_offset: u64,
    /// One instruction long after STI, MOV SS, POP SS no interrupt is taken.
    pub interrupt_shadow: bool,
    /// What debug exception the current instruction ends in.
    pub debug: crate::debug::Debug,
    /// From an NMI's delivery to the next IRET.
    pub nmi_blocked: bool,
    /// In HLT.
    pub halted: bool,
    /// Application processor that waits for SIPI.
    pub wait_for_sipi: bool,
    /// True if the host's x87 unit holds the guest's state now (between enter and leave of the run loop).
    pub fpu_live: bool,
    /// x87 and legacy SSE in FXSAVE64 format while not live; the XMM part is stale (see `ymm`).
    pub fx: FxArea,
}

/// The bounce buffer.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; BOUNCE_SIZE]);

/// The vector registers.
#[repr(C, align(64))]
pub struct VectorFile(pub [Ymm; 16]);

/// A 512-byte FXSAVE64 image.
#[repr(C, align(64))]
pub struct FxArea(pub [u8; 512]);

/// Bits of [`Cpu::request`].
pub mod request {
    /// An interrupt or NMI may be deliverable: ask the local APIC.
    pub const INTERRUPT: u32 = 1;
    /// `Kicker::kick` was called.
    pub const KICK: u32 = 2;
    /// A device or another vCPU wrote to a page that holds translated code.
    pub const CODE_WRITTEN: u32 = 4;
    /// Tags for stores must be dropped, see `peers`.
    pub const QUESTION: u32 = 8;
    /// Provisional blocks may be confirmed.
    pub const LOOK: u32 = 16;
    /// Another vCPU wants to run alone.
    pub const GIVE_WAY: u32 = 32;
    /// What a halted vCPU need not wake up for: it comes before anything else when it does.
    pub const QUIET: u32 = CODE_WRITTEN | QUESTION | LOOK | GIVE_WAY;
}

/// RFLAGS bits.
pub mod flags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
    /// What [`super::Cpu::system_flags`] may hold.
    pub const SYSTEM: u64 = TF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// Control-register and EFER bits.
pub mod control {
    #![allow(missing_docs)]
    pub const CR0_PE: u64 = 1;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_SCE: u64 = 1;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

/// A context with room below it: translated code's stack pointer is the context's address, and calls of the slow path
/// push one return address.
#[repr(C, align(64))]
pub struct Context {
    stack: [u64; 8],
    cpu: Cpu,
}

impl std::ops::Deref for Context {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        &self.cpu
    }
}

impl std::ops::DerefMut for Context {
    fn deref_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

impl Cpu {
    /// A vCPU in its state after reset (Intel SDM vol. 3, table 10-1), on the heap because of its size.
    pub fn boxed() -> Box<Context> {
        // SAFETY: all fields are integers, arrays of integers or bools, for which zero is a valid value.
        let mut cpu: Box<Context> = unsafe { Box::new_zeroed().assume_init() };
        cpu.resize_tlb(TLB_LEAST);
        cpu.page_mask = !0xfff;
        cpu.jump_mask = JUMP_ENTRIES as u64 - 1;
        cpu.pauses = 1;
        cpu.walks = WalkCache::EMPTY;
        cpu.code_pages = [CodePages::NONE; 2];
        cpu.reset();
        cpu
    }

    /// Puts the architectural state back to what it is after reset.
    pub fn reset(&mut self) {
        self.gpr = [0; 16];
        self.gpr[2] = 0x600;
        self.rip = 0xfff0;
        self.arith = 0;
        self.interrupts_on = 0;
        self.system_flags = 0;
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes: 0x93,
        };
        for (i, _) in [(); 6].iter().enumerate() {
            self.set_segment(i, data);
        }
        self.set_segment(
            1,
            Segment {
                selector: 0xf000,
                base: 0xffff_0000,
                limit: 0xffff,
                attributes: 0x9b,
            },
        );
        self.ldtr = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes: 0x82,
        };
        self.tr = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes: 0x8b,
        };
        self.gdtr = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        self.idtr = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        self.cr0 = 0x6000_0010;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.xcr0 = 1;
        self.dr = [0; 4];
        self.dr6 = 0xffff_0ff0;
        self.dr7 = 0x400;
        self.pat = 0x0007_0406_0007_0406;
        (
            self.star,
            self.lstar,
            self.cstar,
            self.sfmask,
            self.kernel_gs_base,
        ) = (0, 0, 0, 0, 0);
        (
            self.sysenter_cs,
            self.sysenter_esp,
            self.sysenter_eip,
            self.tsc_aux,
        ) = (0, 0, 0, 0);
        self.interrupt_shadow = false;
        self.debug = crate::debug::Debug::default();
        self.nmi_blocked = false;
        self.halted = false;
        self.mxcsr = 0x1f80;
        self.ymm.0 = [[0; 4]; 16];
        self.fx.0 = [0; 512];
        self.fx.0[0] = 0x7f;
        self.fx.0[1] = 0x03;
        self.fx.0[24] = 0x80;
        self.fx.0[25] = 0x1f;
        self.flush_tlb(true);
    }

    /// What INIT does: a reset that leaves alone caching, vectors, x87 and most model-specific registers (SDM vol. 3,
    /// table 10-1).
    pub fn init(&mut self) {
        let cached = self.cr0 & (control::CR0_CD | control::CR0_NW);
        let (xcr0, pat, mxcsr) = (self.xcr0, self.pat, self.mxcsr);
        let calls = (self.star, self.lstar, self.cstar, self.sfmask);
        let sysenter = (self.sysenter_cs, self.sysenter_esp, self.sysenter_eip);
        let (gs, aux) = (self.kernel_gs_base, self.tsc_aux);
        let (ymm, fx) = (self.ymm.0, self.fx.0);
        self.reset();
        self.cr0 = self.cr0 & !(control::CR0_CD | control::CR0_NW) | cached;
        (self.xcr0, self.pat, self.mxcsr) = (xcr0, pat, mxcsr);
        (self.star, self.lstar, self.cstar, self.sfmask) = calls;
        (self.sysenter_cs, self.sysenter_esp, self.sysenter_eip) = sysenter;
        (self.kernel_gs_base, self.tsc_aux) = (gs, aux);
        (self.ymm.0, self.fx.0) = (ymm, fx);
    }

    /// RFLAGS, put together.
    pub fn rflags(&self) -> u64 {
        (self.arith & flags::ARITH)
            | 2
            | (self.interrupts_on << 9)
            | (self.system_flags & flags::SYSTEM)
    }

    /// Takes RFLAGS apart. No privilege checks here.
    pub fn set_rflags(&mut self, value: u64) {
        self.arith = value & flags::ARITH;
        self.interrupts_on = (value >> 9) & 1;
        self.system_flags = value & flags::SYSTEM;
    }

    /// Current privilege level: SS.DPL... which equals CS's RPL outside of mode switches; 0 in real mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & control::CR0_PE == 0 {
            0
        } else if self.system_flags & flags::VM != 0 {
            3
        } else {
            (self.segments[1].selector & 3) as u8
        }
    }

    /// True if user code asked for #AC on unaligned accesses.
    pub fn alignment_checked(&self) -> bool {
        self.system_flags & flags::AC != 0 && self.cr0 & control::CR0_AM != 0 && self.cpl() == 3
    }

    /// TLB and jump cache in use.
    pub fn privilege(&self) -> Privilege {
        if self.cpl() == 3 {
            Privilege::User
        } else {
            Privilege::Supervisor
        }
    }

    /// True in long mode (64-bit or compatibility).
    pub fn long_mode(&self) -> bool {
        self.efer & control::EFER_LMA != 0
    }

    /// True in 64-bit mode.
    pub fn code_64(&self) -> bool {
        self.long_mode() && self.segments[1].long()
    }

    /// Code size in bits: 64, 32 or 16.
    pub fn code_bits(&self) -> u32 {
        if self.code_64() {
            64
        } else if self.segments[1].default_32() {
            32
        } else {
            16
        }
    }

    /// Loads a segment register with its hidden part, as values.
    pub fn set_segment(&mut self, index: usize, segment: Segment) {
        if let (Some(slot), Some(base)) =
            (self.segments.get_mut(index), self.seg_base.get_mut(index))
        {
            *slot = segment;
            *base = segment.base;
        }
    }

    fn request_word(&self) -> &AtomicU32 {
        // SAFETY: the field is a valid, aligned u32 that all threads access atomically.
        unsafe { AtomicU32::from_ptr((&raw const self.request).cast_mut()) }
    }

    /// The request word.
    pub fn request_bits(&self) -> u32 {
        self.request_word().load(Ordering::SeqCst)
    }

    /// Takes all request bits.
    pub fn take_requests(&mut self) -> u32 {
        self.request_word().swap(0, Ordering::SeqCst)
    }

    /// Sets request bits.
    pub fn raise_request(&mut self, bits: u32) {
        self.request_word().fetch_or(bits, Ordering::SeqCst);
    }

    /// Starts an application processor in real mode at page `vector` (SDM vol. 3, 9.4.4).
    pub fn start_at(&mut self, vector: u8) {
        self.wait_for_sipi = false;
        self.rip = 0;
        let selector = u16::from(vector) << 8;
        let code = Segment {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            attributes: 0x9b,
        };
        self.set_segment(1, code);
    }

    /// Gives the host's x87 unit the guest's state.
    pub fn load_fpu(&mut self) {
        // The XMM part is loaded from `ymm` on entry; MXCSR must be one that cannot fault here.
        if let Some(mxcsr) = self.fx.0.get_mut(24..28) {
            mxcsr.copy_from_slice(&0x1f80u32.to_le_bytes());
        }
        // SAFETY: `fx` is a 64-byte aligned, valid FXSAVE image; XMM registers are declared clobbered.
        unsafe {
            std::arch::asm!("fxrstor64 [{}]", in(reg) &raw const self.fx,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
        }
        self.fpu_live = true;
    }

    /// Takes the guest's state out of the host's x87 unit and leaves that as Rust code expects it.
    pub fn store_fpu(&mut self) {
        self.fpu_live = false;
        // SAFETY: `fx` is 512 writable bytes, aligned; FNINIT leaves an empty x87 stack.
        unsafe { std::arch::asm!("fxsave64 [{}]", "fninit", in(reg) &raw mut self.fx) };
    }

    /// Empties the soft TLBs and jump caches; global mappings stay unless `global`.
    pub fn flush_tlb(&mut self, global: bool) {
        if global {
            self.large = LargePages::NONE;
            self.dropped.all();
        } else {
            self.large.forget_local();
        }
        self.walks.clear();
        let entries = self.tlb.iter().map(|tlb| tlb.wanted(true)).max();
        if let Some(entries) = entries
            && self.tlb.iter().any(|tlb| tlb.entries() != entries)
        {
            self.resize_tlb(entries);
        }
        for (tlb, jump) in self.tlb.iter_mut().zip(self.jump.iter_mut()) {
            tlb.flush(global);
            jump.flush(global);
        }
        for pages in &mut self.code_pages {
            pages.flush(global);
        }
    }

    /// Enters the page at `page` in the soft TLB, which may grow by that.
    pub fn fill_tlb(&mut self, page: u64, delta: u64, store: bool, global: bool, user: bool) {
        let Some(tlb) = self.tlb.get_mut(usize::from(user)) else {
            return;
        };
        let entries = tlb.wanted(false);
        if entries != tlb.entries() {
            self.resize_tlb(entries);
        }
        if let Some(tlb) = self.tlb.get_mut(usize::from(user)) {
            tlb.fill(page, delta, store, global);
        }
    }

    /// Empties the soft TLBs, both of one size because they share the mask that selects an index.
    fn resize_tlb(&mut self, entries: usize) {
        for tlb in &mut self.tlb {
            tlb.resize(entries);
            self.tlb_mask = (tlb.entries() as u64 - 1) << 12;
        }
    }

    /// Drops what the TLBs and the jump caches hold of the page at `linear`, whatever its size, global or not (INVLPG).
    pub fn flush_page(&mut self, linear: u64) {
        let shift = self.large.shift(linear);
        self.dropped.page(linear, shift);
        self.walks.clear();
        for (tlb, jump) in self.tlb.iter_mut().zip(self.jump.iter_mut()) {
            tlb.drop_page(linear, shift);
            jump.drop_page(linear, shift);
        }
        for pages in &mut self.code_pages {
            pages.drop_page(linear, shift);
        }
    }
}

/// Offsets of the fields that emitted code touches.
pub mod off {
    #![allow(missing_docs)]
    use super::{Cpu, Segment};
    use crate::caches::{JumpCache, SoftTlb};
    use std::mem::offset_of;

    pub const RIP: u32 = offset_of!(Cpu, rip) as u32;
    pub const ARITH: u32 = offset_of!(Cpu, arith) as u32;
    pub const INTERRUPTS_ON: u32 = offset_of!(Cpu, interrupts_on) as u32;
    pub const SYSTEM_FLAGS: u32 = offset_of!(Cpu, system_flags) as u32;
    pub const REQUEST: u32 = offset_of!(Cpu, request) as u32;
    pub const RETIRED: u32 = offset_of!(Cpu, retired) as u32;
    pub const PAUSES: u32 = offset_of!(Cpu, pauses) as u32;
    pub const TLB_MASK: u32 = offset_of!(Cpu, tlb_mask) as u32;
    pub const PAGE_MASK: u32 = offset_of!(Cpu, page_mask) as u32;
    pub const JUMP_MASK: u32 = offset_of!(Cpu, jump_mask) as u32;
    pub const HOST_RSP: u32 = offset_of!(Cpu, host_rsp) as u32;
    pub const EXIT_REASON: u32 = offset_of!(Cpu, exit_reason) as u32;
    pub const EXIT_INFO: u32 = offset_of!(Cpu, exit_info) as u32;
    pub const TRACED: u32 = offset_of!(Cpu, traced) as u32;
    pub const FAST_IRET: u32 = offset_of!(Cpu, fast_iret) as u32;
    pub const TSC_LINE: u32 = offset_of!(Cpu, tsc_line) as u32;
    pub const MXCSR: u32 = offset_of!(Cpu, mxcsr) as u32;
    pub const HOST_MXCSR: u32 = offset_of!(Cpu, host_mxcsr) as u32;

    /// Guest general register `n`.
    pub const fn gpr(n: u8) -> u32 {
        offset_of!(Cpu, gpr) as u32 + n as u32 * 8
    }
    /// Scratch word `n`.
    pub const fn temp(n: u8) -> u32 {
        offset_of!(Cpu, temp) as u32 + n as u32 * 8
    }
    /// Scratch word `n` of the system stubs.
    pub const fn system(n: u32) -> u32 {
        offset_of!(Cpu, system) as u32 + n * 8
    }
    /// Address `n` of the system stubs' ways out.
    pub const fn to_stub(n: u32) -> u32 {
        offset_of!(Cpu, to_stub) as u32 + n * 8
    }
    /// Whether privilege `n` may be entered through its jump cache.
    pub const fn fast(n: u32) -> u32 {
        offset_of!(Cpu, fast) as u32 + n * 8
    }
    /// Control register `n`: 0, 2, 3 or 4.
    pub const fn control(n: usize) -> Option<u32> {
        match n {
            0 => Some(offset_of!(Cpu, cr0) as u32),
            2 => Some(offset_of!(Cpu, cr2) as u32),
            3 => Some(offset_of!(Cpu, cr3) as u32),
            4 => Some(offset_of!(Cpu, cr4) as u32),
            _ => None,
        }
    }
    /// Selector of segment register `n`.
    pub const fn selector(n: usize) -> u32 {
        (offset_of!(Cpu, segments) + n * size_of::<Segment>() + offset_of!(Segment, selector))
            as u32
    }
    /// Base of segment `n`.
    pub const fn seg_base(n: usize) -> u32 {
        offset_of!(Cpu, seg_base) as u32 + n as u32 * 8
    }
    /// YMM register `n`.
    pub const fn ymm(n: u8) -> u32 {
        offset_of!(Cpu, ymm) as u32 + n as u32 * 32
    }
    /// First tag for loads of TLB `privilege`.
    pub const fn tlb_read(privilege: usize) -> u32 {
        (offset_of!(Cpu, tlb) + privilege * size_of::<SoftTlb>() + offset_of!(SoftTlb, read)) as u32
    }
    /// First tag for stores.
    pub const fn tlb_write(privilege: usize) -> u32 {
        (offset_of!(Cpu, tlb) + privilege * size_of::<SoftTlb>() + offset_of!(SoftTlb, write))
            as u32
    }
    /// First delta.
    pub const fn tlb_delta(privilege: usize) -> u32 {
        (offset_of!(Cpu, tlb) + privilege * size_of::<SoftTlb>() + offset_of!(SoftTlb, delta))
            as u32
    }
    /// First tag of jump cache `privilege`.
    pub const fn jump_tag(privilege: usize) -> u32 {
        (offset_of!(Cpu, jump) + privilege * size_of::<JumpCache>() + offset_of!(JumpCache, tag))
            as u32
    }
    /// First target.
    pub const fn jump_target(privilege: usize) -> u32 {
        (offset_of!(Cpu, jump) + privilege * size_of::<JumpCache>() + offset_of!(JumpCache, target))
            as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalidated_page_takes_its_jumps_along_and_no_others() {
        let mut cpu = Cpu::boxed();
        cpu.flush_tlb(true);
        let jump = &mut cpu.jump[0];
        let page = 0xffff_8000_1234_5000u64;
        for rip in [
            page - 0x1001,
            page - 1,
            page,
            page + 0xfff,
            page + 0x1000,
            0,
            u64::MAX,
        ] {
            jump.set(rip, rip, true, false, 1);
        }
        cpu.flush_page(page + 8);
        let left = |rip| cpu.jump[0].get(rip).is_some();
        assert!(left(page - 0x1001) && left(page + 0x1000) && left(0) && left(u64::MAX));
        assert!(!left(page - 1) && !left(page) && !left(page + 0xfff));
        assert!(cpu.jump[0].get(1).is_none(), "an empty entry hits nothing");
    }
}
