//! Single-stepping and the breakpoints of DR0 to DR3 (Intel SDM vol. 3, chapter 18).
//!
//! While a breakpoint is on, the mode word makes every block one instruction whose accesses all take the slow path,
//! where they are compared with the debug registers. Execute breakpoints fault before their instruction, everything
//! else traps after it.

use crate::cpu::{Cpu, control, flags};

/// DR6: an instruction was single-stepped.
const DR6_BS: u64 = 1 << 14;

/// What debug exception the current instruction ends in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Debug {
    /// Breakpoints met by its accesses, as the low bits of DR6.
    pub hits: u64,
    /// Breakpoints that the MOV SS before it met.
    pub carried: u64,
    /// It is single-stepped.
    pub step: bool,
    /// It is MOV SS or POP SS: nothing traps before the next instruction has ended.
    pub shadow: bool,
    /// It entered a handler, which is not stepped into.
    pub entered: bool,
}

/// What a breakpoint waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Watched {
    /// The first byte of an instruction.
    Execute,
    /// A load.
    Read,
    /// A store.
    Write,
    /// A port.
    Port,
}

impl Cpu {
    /// True while DR7 enables some breakpoint.
    pub fn watching(&self) -> bool {
        self.dr7 & 0xff != 0
    }

    /// The breakpoints that `len` bytes at `address` meet, as the low bits of DR6.
    fn breakpoints(&self, address: u64, len: u64, what: Watched) -> u64 {
        let mut hits = 0;
        for (i, &register) in self.dr.iter().enumerate() {
            let enabled = self.dr7 >> (2 * i) & 3 != 0;
            let kind = match self.dr7 >> (16 + 4 * i) & 3 {
                0 => what == Watched::Execute,
                1 => what == Watched::Write,
                2 => what == Watched::Port && self.cr4 & control::CR4_DE != 0,
                _ => matches!(what, Watched::Read | Watched::Write),
            };
            let size = match self.dr7 >> (18 + 4 * i) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = register & !(size - 1);
            let overlap = address.wrapping_sub(start) < size || start.wrapping_sub(address) < len;
            if enabled && kind && overlap {
                hits |= 1 << i;
            }
        }
        hits
    }

    /// Notes the breakpoints that an access meets.
    pub fn note_access(&mut self, address: u64, len: usize, what: Watched) {
        if self.watching() {
            self.debug.hits |= self.breakpoints(address, len as u64, what);
        }
    }

    /// Before an instruction: true if an execute breakpoint faults. DR6 then says which.
    pub fn debug_before(&mut self) -> bool {
        let shadow = std::mem::take(&mut self.debug.shadow);
        let carried = if shadow { self.debug.hits } else { 0 };
        let step = self.system_flags & flags::TF != 0;
        self.debug = Debug {
            hits: carried,
            carried,
            step,
            ..Debug::default()
        };
        if !self.watching() || shadow || self.system_flags & flags::RF != 0 {
            return false;
        }
        let base = if self.code_64() {
            0
        } else {
            self.segments[1].base
        };
        let hits = self.breakpoints(self.rip.wrapping_add(base), 1, Watched::Execute);
        if hits != 0 {
            self.dr6 = self.dr6 & !15 | hits;
        }
        hits != 0
    }

    /// After an instruction that completed: true if it ends in a trap. DR6 then says why.
    pub fn debug_after(&mut self) -> bool {
        let Debug {
            mut hits,
            carried,
            mut step,
            shadow,
            entered,
        } = self.debug;
        if entered {
            // What MOV SS held back comes out in the handler of the software interrupt after it.
            (hits, step) = (carried, false);
        }
        if shadow || (hits == 0 && !step) {
            return false;
        }
        self.dr6 = self.dr6 & !15 | hits | if step { DR6_BS } else { 0 };
        self.halted = false;
        true
    }
}
