//! What a case starts from and ends with: registers, outcome, changed memory. Shared with the native child as bytes.

use crate::layout::{LINE, RW_LINES, RW_PAGES, Template};

/// Register state. `#[repr(C)]`: the native runner's assembly uses the offsets in [`off`].
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    /// Where it starts, or where it ended.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FS base.
    pub fs: u64,
    /// GS base.
    pub gs: u64,
    /// How it ended: an exception vector, [`DONE`] or [`TIMEOUT`].
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// CR2 of a page fault.
    pub cr2: u64,
    /// RIP, CS, RFLAGS, RSP, SS for IRETQ.
    pub iret: [u64; 5],
    /// Code segment selector: [`crate::layout::USER_CS`] or [`crate::layout::USER_CS_32`].
    pub cs: u64,
    #[doc(hidden)]
    pub pad: [u64; 3],
    /// YMM0..YMM15.
    pub ymm: [[u64; 4]; 16],
    /// FXSAVE64 image: x87 and MXCSR; its XMM part is not used.
    pub fx: Fx,
}

/// An FXSAVE64 image.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Fx(pub [u8; 512]);

/// `State::vector` of code that ran to its end.
pub const DONE: u64 = 0x100;
/// `State::vector` of code that did not end.
pub const TIMEOUT: u64 = 0x101;
/// `State::vector` of an engine that failed.
pub const BROKEN: u64 = 0x102;

/// Offsets for assembly.
pub mod off {
    #![allow(missing_docs)]
    use super::State;
    use std::mem::offset_of;
    pub const RFLAGS: usize = offset_of!(State, rflags);
    pub const FS: usize = offset_of!(State, fs);
    pub const GS: usize = offset_of!(State, gs);
    pub const VECTOR: usize = offset_of!(State, vector);
    pub const RIP: usize = offset_of!(State, rip);
    pub const IRET: usize = offset_of!(State, iret);
    pub const YMM: usize = offset_of!(State, ymm);
    pub const FX: usize = offset_of!(State, fx);
}

impl State {
    /// All zero.
    pub const ZERO: State = State {
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        fs: 0,
        gs: 0,
        vector: 0,
        error: 0,
        cr2: 0,
        iret: [0; 5],
        cs: 0,
        pad: [0; 3],
        ymm: [[0; 4]; 16],
        fx: Fx([0; 512]),
    };

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx.0[24], self.fx.0[25], self.fx.0[26], self.fx.0[27]])
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.fx.0[24..28].copy_from_slice(&value.to_le_bytes());
    }
}

/// Lines of the writable data pages that differ from their template.
#[repr(C)]
#[derive(Clone)]
pub struct Lines {
    /// How many.
    pub count: u32,
    /// Which, ascending.
    pub index: [u16; RW_LINES],
    /// Their bytes.
    pub bytes: [[u64; LINE / 8]; RW_LINES],
}

impl Lines {
    /// No lines.
    pub fn new() -> Box<Lines> {
        // SAFETY: all fields are integers or arrays of integers.
        unsafe { Box::new_zeroed().assume_init() }
    }

    /// The lines in use: number and bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &[u64; LINE / 8])> {
        self.index
            .iter()
            .copied()
            .zip(&self.bytes)
            .take(self.count as usize)
    }

    /// Makes the bytes in `ranges` (linear addresses, end excluded) what they were at the start.
    pub fn forget(&mut self, ranges: &[(u64, u64)], template: &Template) {
        let mut kept = 0;
        for at in 0..self.count as usize {
            let index = self.index[at];
            let (page, offset) = (
                usize::from(index) * LINE / 4096,
                usize::from(index) * LINE % 4096,
            );
            let mut bytes = [0u8; LINE];
            for (to, word) in bytes.chunks_exact_mut(8).zip(&self.bytes[at]) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            let before = &template.0[page][offset..offset + LINE];
            for (i, (byte, &old)) in bytes.iter_mut().zip(before).enumerate() {
                let linear = RW_PAGES[page] + (offset + i) as u64;
                if ranges
                    .iter()
                    .any(|&(from, to)| linear >= from && linear < to)
                {
                    *byte = old;
                }
            }
            if bytes != *before {
                self.index[kept] = index;
                for (to, word) in self.bytes[kept].iter_mut().zip(bytes.chunks_exact(8)) {
                    *to = u64::from_le_bytes(word.try_into().unwrap_or_default());
                }
                kept += 1;
            }
        }
        self.count = kept as u32;
    }

    /// Finds the lines of one page that changed, and puts them back. `first` is the page's first line number.
    ///
    /// # Safety
    /// `live` and `template` point at 4096 bytes each, aligned to 64, that nobody else uses now.
    pub unsafe fn collect(&mut self, first: u16, live: *mut u8, template: *const u8) {
        for line in 0..4096 / LINE {
            // SAFETY: within the pages, aligned.
            let (now, then) = unsafe {
                (
                    &mut *live.add(line * LINE).cast::<[u64; 8]>(),
                    &*template.add(line * LINE).cast::<[u64; 8]>(),
                )
            };
            let mut differ = 0;
            for (a, b) in now.iter().zip(then) {
                differ |= a ^ b;
            }
            if differ != 0 && (self.count as usize) < RW_LINES {
                let at = self.count as usize;
                self.index[at] = first + line as u16;
                self.bytes[at] = *now;
                self.count += 1;
                *now = *then;
            }
        }
    }
}

/// One case in memory shared with the native child.
#[repr(C)]
pub struct Case {
    /// Start.
    pub init: State,
    /// End.
    pub result: State,
    /// Changed memory.
    pub lines: Lines,
}
