//! From guest bytes to host code: one block at a time.
//!
//! Guest registers stay in host registers, with three exceptions forced by what translated code needs for itself:
//! guest RSP is in R8 (host RSP is the context), guest RCX is in R9 (host RCX is the scratch register that `jrcxz`
//! tests without touching flags), and guest R8..R11, the least used ones, live in the context. R10 and R11 are the
//! other scratch registers. Guest arithmetic flags live in the host's EFLAGS and nothing emitted here clobbers them.

mod block;
mod branch;
mod group;
mod memory;
mod operand;
mod stack;
mod system;

pub use block::{Fetch, NeedsNextPage, Translated, Workspace, translate};

use strata_engine::x86::Segment;

use crate::cpu::{Cpu, control, flags};
use crate::table::Context;

/// Number of guest instructions in a block at most.
pub const MAX_INSTRUCTIONS: usize = 48;

/// How a translator is set.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Options {
    /// One instruction per block, every access through the slow path and the bounce buffer, no chaining.
    pub reference: bool,
    /// Count retired instructions.
    pub count: bool,
    /// Report stores and block exits to the tracer.
    pub trace: bool,
    /// Now and then a PAUSE gives the host's processor to another thread.
    pub yields: bool,
}

/// True if nothing of a segment has to be checked at an access: present, writable, without limit.
fn whole(segment: &Segment) -> bool {
    segment.limit == u32::MAX && segment.attributes & 0x9e == 0x92
}

/// The mode word: everything besides the bytes that decides what a block means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mode(pub u32);

impl Mode {
    const USER: u32 = 4;
    const CPL0: u32 = 8;
    const FPU_TRAP: u32 = 16;
    const NO_SSE: u32 = 32;
    const NO_AVX: u32 = 64;
    const SINGLE: u32 = 128;
    const NOT_FLAT: u32 = 256;
    const STACK_16: u32 = 512;
    const SLOW: u32 = 1024;
    const SLOW_FS: u32 = 2048;
    const SLOW_GS: u32 = 4096;
    const NO_BASES: u32 = 8192;
    const UNGROUPED: u32 = 16384;

    /// The mode a vCPU is in.
    pub fn of(cpu: &Cpu) -> Mode {
        let mut word = match cpu.code_bits() {
            64 => 2,
            32 => 1,
            _ => 0,
        };
        match cpu.cpl() {
            0 => word |= Mode::CPL0,
            3 => word |= Mode::USER,
            _ => {}
        }
        word |= Mode::allowed(cpu);
        if cpu.system_flags & flags::TF != 0 {
            word |= Mode::SINGLE;
        }
        if word & 3 != 2 {
            let [es, _, ss, ds, fs, gs] = &cpu.segments;
            if es.base != 0 || ss.base != 0 || ds.base != 0 {
                word |= Mode::NOT_FLAT;
            }
            if !ss.default_32() {
                word |= Mode::STACK_16;
            }
            if [es, ss, ds].into_iter().any(|segment| !whole(segment)) {
                word |= Mode::SLOW;
            }
            for (segment, bit) in [(fs, Mode::SLOW_FS), (gs, Mode::SLOW_GS)] {
                if !whole(segment) {
                    word |= bit;
                }
            }
        }
        if cpu.watching() {
            word |= Mode::SINGLE | Mode::SLOW | Mode::SLOW_FS | Mode::SLOW_GS;
        }
        if cpu.alignment_checked() {
            word |= Mode::SLOW | Mode::SLOW_FS | Mode::SLOW_GS;
        }
        Mode(word)
    }

    /// What control registers allow.
    fn allowed(cpu: &Cpu) -> u32 {
        let mut word = 0;
        if cpu.cr0 & (control::CR0_EM | control::CR0_TS) != 0 {
            word |= Mode::FPU_TRAP;
        }
        if cpu.cr4 & control::CR4_OSFXSR == 0 || cpu.cr0 & control::CR0_EM != 0 {
            word |= Mode::NO_SSE;
        }
        let protected = cpu.cr0 & control::CR0_PE != 0 && cpu.system_flags & flags::VM == 0;
        if cpu.cr4 & control::CR4_OSXSAVE == 0 || cpu.xcr0 & 6 != 6 || !protected {
            word |= Mode::NO_AVX;
        }
        if cpu.cr4 & control::CR4_FSGSBASE == 0 {
            word |= Mode::NO_BASES;
        }
        word
    }

    /// The mode of 64-bit code at CPL 0 or 3, as control registers are, that is not stepped, not watched and has no
    /// alignment checks.
    pub fn usual(cpu: &Cpu, user: bool) -> Mode {
        let privilege = if user { Mode::USER } else { Mode::CPL0 };
        Mode(2 | privilege | Mode::allowed(cpu))
    }

    /// The same mode, for exactly one instruction.
    pub fn single(self) -> Mode {
        Mode(self.0 | Mode::SINGLE)
    }

    /// The same mode, for code in which each access has a check of its own.
    pub fn ungrouped(self) -> Mode {
        Mode(self.0 | Mode::UNGROUPED)
    }

    /// The same mode, for code in which accesses may share a check.
    pub fn grouped(self) -> Mode {
        Mode(self.0 & !Mode::UNGROUPED)
    }

    /// Each access has a check of its own.
    pub fn is_ungrouped(self) -> bool {
        self.0 & Mode::UNGROUPED != 0
    }

    /// Linear address of `rip` in a code segment with that base.
    pub fn linear(self, rip: u64, cs_base: u64) -> u64 {
        let linear = rip.wrapping_add(cs_base);
        if self.bits() == 64 {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Code size in bits.
    pub fn bits(self) -> u32 {
        match self.0 & 3 {
            2 => 64,
            1 => 32,
            _ => 16,
        }
    }

    /// CPL 3.
    pub fn user(self) -> bool {
        self.0 & Mode::USER != 0
    }

    /// One instruction, then back to the dispatcher.
    pub fn is_single(self) -> bool {
        self.0 & Mode::SINGLE != 0
    }

    /// Some of DS, ES, SS has a base.
    pub fn segmented(self) -> bool {
        self.0 & Mode::NOT_FLAT != 0
    }

    /// Accesses in segment `seg` are checked for more than the soft TLB knows.
    pub fn slow(self, seg: usize) -> bool {
        let bit = match seg {
            1 if self.bits() != 64 => return true,
            4 => Mode::SLOW_FS,
            5 => Mode::SLOW_GS,
            _ => Mode::SLOW,
        };
        self.0 & bit != 0
    }

    /// RDFSBASE and its kin are there.
    pub fn has_bases(self) -> bool {
        self.0 & Mode::NO_BASES == 0
    }

    /// SP instead of ESP.
    pub fn stack_16(self) -> bool {
        self.0 & Mode::STACK_16 != 0
    }

    /// What the instruction table needs to know.
    pub fn context(self) -> Context {
        Context {
            bits: self.bits(),
            cpl0: self.0 & Mode::CPL0 != 0,
            fpu_trap: self.0 & Mode::FPU_TRAP != 0,
            no_sse: self.0 & Mode::NO_SSE != 0,
            no_avx: self.0 & Mode::NO_AVX != 0,
        }
    }
}
