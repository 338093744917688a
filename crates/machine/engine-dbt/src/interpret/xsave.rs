//! FXSAVE, FXRSTOR and the XSAVE family (Intel SDM vol. 1, chapters 10.5 and 13).
//!
//! SSE and AVX state is in the context and handled here; the x87 part, which lives in the host's unit while translated
//! code runs, goes through the host's own FXSAVE64 and FXRSTOR64. Instruction and data pointers of the last x87
//! instruction are not kept: the host's would be addresses of the translation, so all forms store zeros there, and
//! with zeros the 32-bit and 64-bit layouts are the same.

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};
use strata_engine::x86::xsave_size;

use super::Flow;
use super::operand::size_mask;
use crate::cpu::{FxArea, control};
use crate::env::{Access, Exec, Fault};

/// MXCSR bits that exist.
pub const MXCSR_MASK: u32 = 0xffff;
const MXCSR_INIT: u32 = 0x1f80;
/// Offsets in the legacy area.
const MXCSR_AT: usize = 24;
const REGISTERS_AT: usize = 32;
const XMM_AT: usize = 160;
/// Offset of the XSAVE header.
const HEADER_AT: u64 = 512;
/// Offset of the upper halves of YMM registers.
const YMM_AT: u64 = 576;

/// State components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

/// The x87 part of a legacy area: bytes 0..24 and 32..160, the rest unused.
pub type Image = [u8; 512];

/// The x87 part after FNINIT with empty registers.
pub fn initial_image() -> Image {
    let mut image = [0; 512];
    [image[0], image[1]] = 0x037fu16.to_le_bytes();
    image
}

/// A copy of `bytes` at `at` in an image.
pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = image.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// `N` bytes at `at` of an image.
pub fn get<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    image
        .get(at..at + N)
        .and_then(|part| part.try_into().ok())
        .unwrap_or([0; N])
}

/// A save area in guest memory: direct when it lies in one page of RAM.
struct Area {
    linear: u64,
    direct: Option<*mut u8>,
}

impl Exec<'_> {
    /// The guest's x87 state.
    pub(super) fn x87_image(&mut self) -> Image {
        let mut area = FxArea(self.cpu.fx.0);
        if self.cpu.fpu_live {
            // SAFETY: the area is 512 bytes and aligned; FXSAVE64 changes nothing else.
            unsafe { asm!("fxsave64 [{}]", in(reg) &mut area, options(nostack, preserves_flags)) };
        }
        let mut image = area.0;
        // FOP, FIP and FDP.
        put(&mut image, 6, &[0; 18]);
        image
    }

    /// Replaces the guest's x87 state. The image's other parts do not matter.
    pub(super) fn set_x87_image(&mut self, image: &Image) {
        let mut area = FxArea(*image);
        put(&mut area.0, 6, &[0; 18]);
        if !self.cpu.fpu_live {
            self.cpu.fx = area;
            return;
        }
        let mut mxcsr = 0u32;
        // SAFETY: STMXCSR stores four bytes to a local; the area is aligned and its MXCSR is the one in force, so
        // that FXRSTOR64 leaves that alone; the XMM registers it loads are declared as changed.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack, preserves_flags));
            put(&mut area.0, MXCSR_AT, &mxcsr.to_le_bytes());
            asm!("fxrstor64 [{}]", in(reg) &area, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack, preserves_flags));
        }
    }

    /// How many vector registers the current code can name.
    fn vector_count(&self) -> usize {
        if self.cpu.code_64() { 16 } else { 8 }
    }

    /// The low halves of the vector registers, or the high ones: 16 bytes each.
    fn vector_halves(&self, high: bool) -> [u8; 256] {
        let mut out = [0; 256];
        for (to, [a, b, c, d]) in out.chunks_exact_mut(16).zip(&self.cpu.ymm.0) {
            let (first, second) = if high { (c, d) } else { (a, b) };
            put(to, 0, &first.to_le_bytes());
            put(to, 8, &second.to_le_bytes());
        }
        out
    }

    /// Replaces the low halves, or the high ones, of the registers that the current code can name.
    fn set_vector_halves(&mut self, high: bool, bytes: &[u8]) {
        let count = self.vector_count();
        for (i, [a, b, c, d]) in self.cpu.ymm.0.iter_mut().take(count).enumerate() {
            let (first, second) = if high { (c, d) } else { (a, b) };
            *first = u64::from_le_bytes(get(bytes, i * 16));
            *second = u64::from_le_bytes(get(bytes, i * 16 + 8));
        }
    }

    /// XINUSE: the components that are not in their initial state.
    pub(super) fn components_in_use(&mut self) -> u64 {
        let image = self.x87_image();
        self.in_use(&image)
    }

    fn in_use(&self, image: &Image) -> u64 {
        let initial = initial_image();
        let x87 = image.get(..MXCSR_AT) != initial.get(..MXCSR_AT)
            || image
                .get(REGISTERS_AT..XMM_AT)
                .is_some_and(|registers| registers.iter().any(|&b| b != 0));
        let sse =
            self.cpu.mxcsr != MXCSR_INIT || self.cpu.ymm.0.iter().any(|[a, b, ..]| a | b != 0);
        let avx = self.cpu.ymm.0.iter().any(|[.., c, d]| c | d != 0);
        [(x87, X87), (sse, SSE), (avx, AVX)]
            .iter()
            .filter(|(on, _)| *on)
            .map(|(_, bit)| bit)
            .sum()
    }

    fn area(&mut self, linear: u64, size: usize, access: Access) -> Result<Area, Fault> {
        let first = self.ram_window(linear, access)?;
        let direct = first.filter(|(_, left)| *left >= size).map(|(at, _)| at);
        if direct.is_none() {
            self.probe(linear, size, access)?;
        }
        Ok(Area { linear, direct })
    }

    fn area_put(&mut self, area: &Area, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        match area.direct {
            Some(host) => {
                // SAFETY: `area` found the whole save area in one page of RAM.
                unsafe { host.add(at as usize).copy_from(bytes.as_ptr(), bytes.len()) };
                Ok(())
            }
            None => self.store(area.linear.wrapping_add(at), bytes),
        }
    }

    fn area_get(&mut self, area: &Area, at: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        match area.direct {
            Some(host) => {
                // SAFETY: as in `area_put`.
                unsafe {
                    host.add(at as usize)
                        .copy_to(bytes.as_mut_ptr(), bytes.len())
                };
                Ok(())
            }
            None => self.load(area.linear.wrapping_add(at), bytes),
        }
    }

    /// Address of a save area, with the checks that FXSAVE and FXRSTOR make.
    fn fx_address(&mut self, instr: &Instruction, access: Access) -> Result<u64, Fault> {
        if self.cpu.cr0 & (control::CR0_EM | control::CR0_TS) != 0 {
            return Err(Fault::NO_DEVICE);
        }
        let linear = self.address(instr, 0, 512, access)?;
        if linear & 15 != 0 {
            Err(Fault::protection(0))
        } else {
            Ok(linear)
        }
    }

    pub(super) fn fxsave(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let linear = self.fx_address(instr, Access::Write)?;
        let mut image = self.x87_image();
        put(&mut image, MXCSR_AT, &self.cpu.mxcsr.to_le_bytes());
        put(&mut image, MXCSR_AT + 4, &MXCSR_MASK.to_le_bytes());
        put(&mut image, XMM_AT, &self.vector_halves(false));
        // What lies beyond the registers is left as it was, but must be there.
        let area = self.area(linear, image.len(), Access::Write)?;
        let end = XMM_AT + self.vector_count() * 16;
        self.area_put(&area, 0, image.get(..end).unwrap_or(&image))?;
        Ok(Flow::Next)
    }

    pub(super) fn fxrstor(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let linear = self.fx_address(instr, Access::Read)?;
        let mut image = [0; 512];
        self.load(linear, &mut image)?;
        let mxcsr = u32::from_le_bytes(get(&image, MXCSR_AT));
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(Fault::protection(0));
        }
        self.set_x87_image(&image);
        self.cpu.mxcsr = mxcsr;
        self.set_vector_halves(false, image.get(XMM_AT..).unwrap_or(&[]));
        Ok(Flow::Next)
    }

    /// LDMXCSR. Bits that the model lacks are refused, whatever the host's CPU has.
    pub(super) fn load_mxcsr(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let linear = self.address(instr, 0, 4, Access::Read)?;
        let mut bytes = [0; 4];
        self.load(linear, &mut bytes)?;
        let mxcsr = u32::from_le_bytes(bytes);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(Fault::protection(0));
        }
        self.cpu.mxcsr = mxcsr;
        Ok(Flow::Next)
    }

    /// The checks of the XSAVE family. Returns the address and the components asked for.
    fn xsave_address(&mut self, instr: &Instruction, access: Access) -> Result<(u64, u64), Fault> {
        if self.cpu.cr4 & control::CR4_OSXSAVE == 0 {
            return Err(Fault::UNDEFINED);
        }
        if self.cpu.cr0 & control::CR0_TS != 0 {
            return Err(Fault::NO_DEVICE);
        }
        let mask = self.cpu.gpr[2] << 32 | self.cpu.gpr[0] & size_mask(4);
        let requested = mask & self.cpu.xcr0;
        let linear = self.address(instr, 0, xsave_size(requested) as usize, access)?;
        if linear & 63 != 0 {
            Err(Fault::protection(0))
        } else {
            Ok((linear, requested))
        }
    }

    /// XSAVE, and XSAVEOPT, which leaves components in their initial state alone.
    pub(super) fn xsave(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let optimised = matches!(instr.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
        let (linear, requested) = self.xsave_address(instr, Access::Write)?;
        let area = self.area(linear, xsave_size(requested) as usize, Access::Write)?;
        let image = self.x87_image();
        let in_use = self.in_use(&image);
        let wanted = if optimised {
            requested & in_use
        } else {
            requested
        };
        if wanted & X87 != 0 {
            self.area_put(&area, 0, image.get(..MXCSR_AT).unwrap_or(&[]))?;
            self.area_put(
                &area,
                REGISTERS_AT as u64,
                image.get(REGISTERS_AT..XMM_AT).unwrap_or(&[]),
            )?;
        }
        if requested & (SSE | AVX) != 0 {
            let pair = u64::from(MXCSR_MASK) << 32 | u64::from(self.cpu.mxcsr);
            self.area_put(&area, MXCSR_AT as u64, &pair.to_le_bytes())?;
        }
        for (component, at, high) in [(SSE, XMM_AT as u64, false), (AVX, YMM_AT, true)] {
            if wanted & component != 0 {
                let halves = self.vector_halves(high);
                self.area_put(
                    &area,
                    at,
                    halves.get(..self.vector_count() * 16).unwrap_or(&halves),
                )?;
            }
        }
        let mut present = [0; 8];
        self.area_get(&area, HEADER_AT, &mut present)?;
        let present = u64::from_le_bytes(present) & !requested | in_use & requested;
        self.area_put(&area, HEADER_AT, &present.to_le_bytes())?;
        Ok(Flow::Next)
    }

    pub(super) fn xrstor(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let (linear, requested) = self.xsave_address(instr, Access::Read)?;
        let size = xsave_size(requested) as usize;
        let area = self.area(linear, size, Access::Read)?;
        let mut bytes = [0; 832];
        self.area_get(&area, 0, bytes.get_mut(..size).unwrap_or(&mut []))?;
        let header = HEADER_AT as usize;
        let present = u64::from_le_bytes(get(&bytes, header));
        // Components that XCR0 lacks, the compacted format, reserved header bytes (SDM vol. 1, 13.8.1).
        let reserved: [u8; 16] = get(&bytes, header + 8);
        let mxcsr = u32::from_le_bytes(get(&bytes, MXCSR_AT));
        let loads_mxcsr = requested & (SSE | AVX) != 0;
        if present & !self.cpu.xcr0 != 0
            || reserved != [0; 16]
            || (loads_mxcsr && mxcsr & !MXCSR_MASK != 0)
        {
            return Err(Fault::protection(0));
        }
        if requested & X87 != 0 {
            let mut image = initial_image();
            if present & X87 != 0 {
                put(&mut image, 0, bytes.get(..XMM_AT).unwrap_or(&[]));
            }
            self.set_x87_image(&image);
        }
        if loads_mxcsr {
            self.cpu.mxcsr = mxcsr;
        }
        if requested & SSE != 0 {
            let xmm = bytes
                .get(XMM_AT..416)
                .filter(|_| present & SSE != 0)
                .unwrap_or(&[]);
            self.set_vector_halves(false, xmm);
        }
        if requested & AVX != 0 {
            let ymm = bytes
                .get(YMM_AT as usize..)
                .filter(|_| present & AVX != 0)
                .unwrap_or(&[]);
            self.set_vector_halves(true, ymm);
        }
        Ok(Flow::Next)
    }
}
