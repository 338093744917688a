//! When x87, MMX and vector instructions may run, and the x87 environment in memory (Intel SDM vol. 1, chapter 8.1).

use iced_x86::{CpuidFeature as F, EncodingKind, Instruction, MemorySize};

use super::Flow;
use super::xsave::{Image, get, initial_image, put};
use crate::cpu::control;
use crate::env::{Access, Exec, Fault};

/// Offset of register ST(0) in an image; they are 16 bytes apart.
const REGISTERS_AT: usize = 32;
/// Bits 11..13 of the status word: the number of the register that is ST(0).
const TOP: u32 = 11;
const EXCEPTIONS: u16 = 0x3f;
/// Summary of unmasked exceptions, and the busy bit that mirrors it.
const SUMMARY: u16 = 0x8080;

impl Exec<'_> {
    /// #NM or #UD if control registers forbid this x87, MMX or vector instruction now (SDM vol. 3, 2.5 and 14.1).
    pub(super) fn check_vector_enabled(&self, instr: &Instruction) -> Result<(), Fault> {
        if !crate::table::uses_vector(instr) {
            return Ok(());
        }
        let emulated = self.cpu.cr0 & control::CR0_EM != 0;
        let switched = self.cpu.cr0 & control::CR0_TS != 0;
        let features = instr.code().cpuid_features();
        if features
            .iter()
            .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
        {
            return if emulated || switched {
                Err(Fault::NO_DEVICE)
            } else {
                Ok(())
            };
        }
        let refused = if instr.code().encoding() == EncodingKind::VEX {
            let enabled = self.cpu.cr4 & control::CR4_OSXSAVE != 0 && self.cpu.xcr0 & 6 == 6;
            !enabled || !self.is_protected()
        } else if features.contains(&F::MMX) {
            emulated
        } else {
            emulated || self.cpu.cr4 & control::CR4_OSFXSR == 0
        };
        match (refused, switched) {
            (true, _) => Err(Fault::UNDEFINED),
            (false, true) => Err(Fault::NO_DEVICE),
            (false, false) => Ok(()),
        }
    }

    /// WAIT looks at CR0.MP together with CR0.TS, and at nothing else of CR0.
    pub(super) fn wait(&mut self) -> Result<Flow, Fault> {
        const BOTH: u64 = control::CR0_MP | control::CR0_TS;
        if self.cpu.cr0 & BOTH == BOTH {
            return Err(Fault::NO_DEVICE);
        }
        if status_word(&self.x87_image()) & SUMMARY != 0 {
            return Err(Fault::plain(16));
        }
        Ok(Flow::Next)
    }

    pub(super) fn fnstenv(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let wide = instr.memory_size() == MemorySize::FpuEnv28;
        let mut image = self.x87_image();
        let environment = environment(&image, wide);
        let linear = self.address(instr, 0, environment.len(), Access::Write)?;
        self.store(linear, &environment)?;
        // Storing the environment masks all exceptions.
        let control = control_word(&image) | EXCEPTIONS;
        put(&mut image, 0, &control.to_le_bytes());
        update_summary(&mut image);
        self.set_x87_image(&image);
        Ok(Flow::Next)
    }

    pub(super) fn fnsave(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let wide = instr.memory_size() == MemorySize::FpuState108;
        let image = self.x87_image();
        let mut bytes = environment(&image, wide);
        for i in 0..8 {
            bytes.extend_from_slice(&get::<10>(&image, REGISTERS_AT + i * 16));
        }
        let linear = self.address(instr, 0, bytes.len(), Access::Write)?;
        self.store(linear, &bytes)?;
        // As FNINIT does: the registers are empty, but keep their contents.
        let mut fresh = initial_image();
        put(&mut fresh, REGISTERS_AT, &physical_registers(&image));
        self.set_x87_image(&fresh);
        Ok(Flow::Next)
    }

    /// #MF if an unmasked exception waits, as every x87 instruction that is not an FN form.
    fn check_pending(&mut self) -> Result<(), Fault> {
        let image = self.x87_image();
        if status_word(&image) & SUMMARY & 0x80 != 0 {
            Err(Fault::plain(16))
        } else {
            Ok(())
        }
    }

    pub(super) fn fldenv(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.check_pending()?;
        let wide = instr.memory_size() == MemorySize::FpuEnv28;
        let size = if wide { 28 } else { 14 };
        let linear = self.address(instr, 0, size, Access::Read)?;
        let mut bytes = [0; 28];
        self.load(linear, bytes.get_mut(..size).unwrap_or(&mut []))?;
        let old = self.x87_image();
        let registers = physical_registers(&old);
        let mut image = old;
        load_environment(&mut image, &bytes, wide);
        put_physical_registers(&mut image, &registers);
        self.set_x87_image(&image);
        Ok(Flow::Next)
    }

    pub(super) fn frstor(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.check_pending()?;
        let wide = instr.memory_size() == MemorySize::FpuState108;
        let head = if wide { 28 } else { 14 };
        let linear = self.address(instr, 0, head + 80, Access::Read)?;
        let mut bytes = [0; 108];
        self.load(linear, bytes.get_mut(..head + 80).unwrap_or(&mut []))?;
        let mut image = initial_image();
        load_environment(&mut image, &bytes, wide);
        for i in 0..8 {
            put(
                &mut image,
                REGISTERS_AT + i * 16,
                &get::<10>(&bytes, head + i * 10),
            );
        }
        self.set_x87_image(&image);
        Ok(Flow::Next)
    }

    /// An MMX register.
    pub(super) fn mmx(&mut self, number: usize) -> u64 {
        let image = self.x87_image();
        u64::from_le_bytes(get(&physical_registers(&image), number * 16))
    }

    /// What every MMX instruction but EMMS does to the x87 state: ST(0) is register 0 and all are in use.
    pub(super) fn enter_mmx(&mut self) {
        let mut image = self.x87_image();
        let registers = physical_registers(&image);
        let status = status_word(&image) & !(7 << TOP);
        put(&mut image, 2, &status.to_le_bytes());
        put(&mut image, 4, &[0xff]);
        put_physical_registers(&mut image, &registers);
        self.set_x87_image(&image);
    }
}

fn control_word(image: &Image) -> u16 {
    u16::from_le_bytes(get(image, 0))
}

fn status_word(image: &Image) -> u16 {
    u16::from_le_bytes(get(image, 2))
}

fn top(image: &Image) -> usize {
    usize::from(status_word(image) >> TOP & 7)
}

/// Sets the summary bits from exceptions and masks.
fn update_summary(image: &mut Image) {
    let unmasked = status_word(image) & !control_word(image) & EXCEPTIONS != 0;
    let status = status_word(image) & !SUMMARY | if unmasked { SUMMARY } else { 0 };
    put(image, 2, &status.to_le_bytes());
}

/// The registers in the order of their numbers, 16 bytes each. An image has them in the order of the stack.
fn physical_registers(image: &Image) -> [u8; 128] {
    let mut out = [0; 128];
    for i in 0..8 {
        put(
            &mut out,
            (i + top(image)) % 8 * 16,
            &get::<16>(image, REGISTERS_AT + i * 16),
        );
    }
    out
}

fn put_physical_registers(image: &mut Image, registers: &[u8; 128]) {
    let top = top(image);
    for i in 0..8 {
        put(
            image,
            REGISTERS_AT + i * 16,
            &get::<16>(registers, (i + top) % 8 * 16),
        );
    }
}

/// The tag word with two bits per register: valid, zero, special, empty.
fn full_tags(image: &Image) -> u16 {
    let [in_use] = get::<1>(image, 4);
    let registers = physical_registers(image);
    (0..8).fold(0, |tags, i| {
        let mantissa = u64::from_le_bytes(get(&registers, i * 16));
        let exponent = u16::from_le_bytes(get(&registers, i * 16 + 8)) & 0x7fff;
        let tag = match (exponent, mantissa) {
            _ if in_use >> i & 1 == 0 => 3,
            (0, 0) => 1,
            (0 | 0x7fff, _) => 2,
            (_, mantissa) if mantissa >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (i * 2)
    })
}

/// The environment as FNSTENV stores it, 28 or 14 bytes; pointers are zero.
fn environment(image: &Image, wide: bool) -> Vec<u8> {
    let words = [
        control_word(image),
        status_word(image),
        full_tags(image),
        0,
        0,
        0,
        0,
    ];
    // Upper halves of the wide form are ones where a 16-bit register stands alone.
    let upper = [0xffff, 0xffff, 0xffff, 0, 0, 0, 0xffffu16];
    let both = words.iter().zip(upper);
    if wide {
        both.flat_map(|(&low, high)| (u32::from(high) << 16 | u32::from(low)).to_le_bytes())
            .collect()
    } else {
        both.flat_map(|(low, _)| low.to_le_bytes()).collect()
    }
}

/// Takes control, status and tags from an environment in memory.
fn load_environment(image: &mut Image, bytes: &[u8], wide: bool) {
    let step = if wide { 4 } else { 2 };
    let [control, status, tags] = [0, 1, 2].map(|i| u16::from_le_bytes(get(bytes, i * step)));
    // Bit 6 of the control word is always set, the others above 12 and 7 never.
    put(image, 0, &(control & 0x1f3f | 0x40).to_le_bytes());
    put(image, 2, &status.to_le_bytes());
    let in_use = (0..8)
        .filter(|i| tags >> (i * 2) & 3 != 3)
        .fold(0u8, |set, i| set | 1 << i);
    put(image, 4, &[in_use]);
    update_summary(image);
}
