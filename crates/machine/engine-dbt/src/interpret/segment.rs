//! Segment descriptors and the loading of segment registers (Intel SDM vol. 3, chapters 3 and 5).

use iced_x86::{Code, Instruction, Mnemonic, Register};
use strata_engine::x86::Segment;

use super::Flow;
use super::operand::{CS, SS};
use crate::cpu::flags;
use crate::env::{Access, Exec, Fault};

/// Descriptor types of system segments.
pub mod system {
    #![allow(missing_docs)]
    pub const TSS_16: u16 = 1;
    pub const LDT: u16 = 2;
    pub const CALL_GATE_16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const TSS: u16 = 9;
    pub const CALL_GATE: u16 = 12;
    pub const BUSY: u16 = 2;
}

/// #NP(selector).
pub fn not_present(error: u32) -> Fault {
    Fault {
        vector: 11,
        error: Some(error),
        cr2: 0,
    }
}

/// #TS(selector).
pub fn invalid_tss(error: u32) -> Fault {
    Fault {
        vector: 10,
        error: Some(error),
        cr2: 0,
    }
}

/// Error code that names a selector.
pub fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// An 8-byte descriptor, where it was read from, and its second half if it is a system descriptor of long mode.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub raw: u64,
    pub high: u64,
    pub address: u64,
}

impl Descriptor {
    /// Attributes as [`Segment::attributes`] keeps them.
    pub fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }
    pub fn kind(&self) -> u16 {
        self.attributes() & 15
    }
    /// Neither code nor data.
    pub fn is_system(&self) -> bool {
        self.attributes() & 0x10 == 0
    }
    pub fn is_code(&self) -> bool {
        self.attributes() & 0x18 == 0x18
    }
    pub fn is_conforming(&self) -> bool {
        self.attributes() & 0x1c == 0x1c
    }
    pub fn is_writable_data(&self) -> bool {
        self.attributes() & 0x1a == 0x12
    }
    pub fn is_readable(&self) -> bool {
        !self.is_system() && (!self.is_code() || self.attributes() & 2 != 0)
    }
    pub fn is_long_code(&self) -> bool {
        self.is_code() && self.attributes() & 0x2000 != 0
    }
    pub fn default_32(&self) -> bool {
        self.attributes() & 0x4000 != 0
    }
    pub fn present(&self) -> bool {
        self.attributes() & 0x80 != 0
    }
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    pub fn base(&self) -> u64 {
        let low = self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000;
        low | (self.high & 0xffff_ffff) << 32
    }
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attributes() & 0x8000 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }
    /// The register's value after loading it with `selector`.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes(),
        }
    }
    /// Offset and selector of a gate.
    pub fn gate_target(&self) -> (u16, u64) {
        let offset =
            self.raw & 0xffff | self.raw >> 32 & 0xffff_0000 | (self.high & 0xffff_ffff) << 32;
        ((self.raw >> 16) as u16, offset)
    }
}

/// A segment register that holds nothing.
pub fn null_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attributes: 0,
    }
}

impl Exec<'_> {
    /// Reads the descriptor a selector names. `fault` makes the fault for a selector beyond its table.
    pub fn descriptor(
        &mut self,
        selector: u16,
        fault: fn(u32) -> Fault,
    ) -> Result<Descriptor, Fault> {
        let error = selector_error(selector);
        let (base, limit) = if selector & 4 == 0 {
            (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit))
        } else if self.cpu.ldtr.null() || !self.cpu.ldtr.present() {
            return Err(fault(error));
        } else {
            (self.cpu.ldtr.base, self.cpu.ldtr.limit)
        };
        let offset = u32::from(selector & 0xfff8);
        if offset + 7 > limit {
            return Err(fault(error));
        }
        let address = self.table_address(base, u64::from(offset));
        let mut bytes = [0; 8];
        self.load_system(address, &mut bytes)?;
        let mut descriptor = Descriptor {
            raw: u64::from_le_bytes(bytes),
            high: 0,
            address,
        };
        if self.cpu.long_mode() && descriptor.is_system() && descriptor.kind() != 0 {
            if offset + 15 > limit {
                return Err(fault(error));
            }
            self.load_system(address.wrapping_add(8), &mut bytes)?;
            descriptor.high = u64::from_le_bytes(bytes);
        }
        Ok(descriptor)
    }

    /// Linear address of a byte in a system table: 32 bits outside of long mode.
    pub fn table_address(&self, base: u64, offset: u64) -> u64 {
        let address = base.wrapping_add(offset);
        if self.cpu.long_mode() {
            address
        } else {
            address & 0xffff_ffff
        }
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Fault> {
        self.mark_type(descriptor, 1)
    }

    /// Sets type bits of a descriptor, here and in memory.
    pub fn mark_type(&mut self, descriptor: &mut Descriptor, bits: u8) -> Result<(), Fault> {
        let wanted = descriptor.raw | u64::from(bits) << 40;
        if wanted != descriptor.raw {
            descriptor.raw = wanted;
            self.store_system(descriptor.address.wrapping_add(5), &[(wanted >> 40) as u8])?;
        }
        Ok(())
    }

    /// What a segment register would hold in real or virtual-8086 mode.
    pub fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.is_virtual_8086() {
            return Segment {
                selector,
                base,
                limit: 0xffff,
                attributes: 0xf3,
            };
        }
        let old = self.cpu.segments.get(index).copied().unwrap_or_default();
        // The hidden limit stays, which is what "unreal" mode lives on; what was unusable becomes usable.
        if old.present() {
            Segment {
                selector,
                base,
                ..old
            }
        } else {
            Segment {
                selector,
                base,
                limit: 0xffff,
                attributes: 0x93,
            }
        }
    }

    /// Checks a selector for a data segment register or SS and returns what the register would hold.
    fn fetch_segment(&mut self, index: usize, selector: u16) -> Result<Segment, Fault> {
        if !self.is_protected() {
            return Ok(self.real_segment(index, selector));
        }
        let error = selector_error(selector);
        if index == SS {
            let cpl = self.cpu.cpl();
            return self.fetch_stack_segment(selector, cpl, self.cpu.code_64(), Fault::protection);
        }
        if error == 0 {
            return Ok(null_segment(selector));
        }
        let mut descriptor = self.descriptor(selector, Fault::protection)?;
        let rpl = (selector & 3) as u8;
        let privileged = descriptor.is_conforming() || descriptor.dpl() >= rpl.max(self.cpu.cpl());
        if !descriptor.is_readable() || !privileged {
            return Err(Fault::protection(error));
        }
        if !descriptor.present() {
            return Err(not_present(error));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Checks a selector for SS at privilege `cpl`. `long`: the code that will use it is 64-bit, so null is allowed
    /// below CPL 3. `fault` is #GP, or #TS if the selector comes from a TSS.
    pub fn fetch_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        long: bool,
        fault: fn(u32) -> Fault,
    ) -> Result<Segment, Fault> {
        let error = selector_error(selector);
        let rpl = (selector & 3) as u8;
        if error == 0 {
            return if long && cpl < 3 && rpl == cpl {
                Ok(null_segment(selector))
            } else {
                Err(fault(0))
            };
        }
        let mut descriptor = self.descriptor(selector, fault)?;
        if rpl != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
            return Err(fault(error));
        }
        if !descriptor.present() {
            return Err(Fault::stack(error));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Loads a data segment register or SS.
    pub fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Fault> {
        let segment = self.fetch_segment(index, selector)?;
        self.cpu.set_segment(index, segment);
        Ok(())
    }

    pub(super) fn move_to_segment(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let index = instr.op0_register().number();
        if index == CS {
            return Err(Fault::UNDEFINED);
        }
        let selector = self.read_selector(instr, 1)?;
        self.load_segment(index, selector)?;
        self.shadow_after(index);
        Ok(Flow::Next)
    }

    /// After a load of SS neither interrupts nor debug traps come before the next instruction has ended.
    fn shadow_after(&mut self, index: usize) {
        self.cpu.interrupt_shadow = index == SS;
        self.cpu.debug.shadow = index == SS;
    }

    pub(super) fn move_from_segment(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let value = self.named(instr.op1_register());
        self.write_selector(instr, 0, value)?;
        Ok(Flow::Next)
    }

    /// A 16-bit selector from a register of any size or from memory.
    pub(super) fn read_selector(&mut self, instr: &Instruction, op: u32) -> Result<u16, Fault> {
        if instr.op_kind(op) == iced_x86::OpKind::Register {
            return Ok(self.named(instr.op_register(op)) as u16);
        }
        let linear = self.address(instr, op, 2, Access::Read)?;
        self.load_u16(linear)
    }

    /// Writes a selector: zero-extended to a register, 16 bits to memory whatever the operand size.
    pub(super) fn write_selector(
        &mut self,
        instr: &Instruction,
        op: u32,
        value: u64,
    ) -> Result<(), Fault> {
        if instr.op_kind(op) == iced_x86::OpKind::Register {
            self.set_named(instr.op_register(op), value);
            return Ok(());
        }
        let linear = self.address(instr, op, 2, Access::Write)?;
        self.store_u16(linear, value as u16)
    }

    pub(super) fn push_segment(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let value = self.named(instr.op0_register());
        let mut stack = self.stack();
        let size = push_size(instr);
        if size == 4 {
            // Only the low half is written (SDM vol. 2, PUSH).
            let pointer = stack.pointer.wrapping_sub(4) & stack.mask;
            let linear = self.linear(SS, pointer, 4, Access::Write)?;
            self.store_u16(linear, value as u16)?;
            stack.pointer = pointer;
        } else {
            self.push(&mut stack, value, size)?;
        }
        self.set_stack(stack);
        Ok(Flow::Next)
    }

    pub(super) fn pop_segment(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let index = instr.op0_register().number();
        let size = push_size(instr);
        let mut stack = self.stack();
        let linear = self.linear(SS, stack.pointer, size, Access::Read)?;
        let selector = self.load_u16(linear)?;
        stack.pointer = stack.pointer.wrapping_add(size as u64) & stack.mask;
        self.load_segment(index, selector)?;
        self.set_stack(stack);
        self.shadow_after(index);
        Ok(Flow::Next)
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub(super) fn load_far_pointer(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let register = instr.op0_register();
        let size = register.size();
        let linear = self.address(instr, 1, size + 2, Access::Read)?;
        let mut bytes = [0; 10];
        if let Some(part) = bytes.get_mut(..size + 2) {
            self.load(linear, part)?;
        }
        let selector = u16::from_le_bytes([
            bytes.get(size).copied().unwrap_or(0),
            bytes.get(size + 1).copied().unwrap_or(0),
        ]);
        let [a, b, c, d, e, f, g, h, ..] = bytes;
        let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let index = match instr.mnemonic() {
            Mnemonic::Les => Register::ES,
            Mnemonic::Lss => Register::SS,
            Mnemonic::Lfs => Register::FS,
            Mnemonic::Lgs => Register::GS,
            _ => Register::DS,
        };
        self.load_segment(index.number(), selector)?;
        self.set_named(register, offset & super::operand::size_mask(size));
        Ok(Flow::Next)
    }

    /// Clears the data segment registers that privilege `cpl` may not use, on the way out to it.
    pub fn drop_privileged_segments(&mut self, cpl: u8) {
        for index in [0, 3, 4, 5] {
            let Some(&segment) = self.cpu.segments.get(index) else {
                continue;
            };
            let data_or_nonconforming = segment.attributes & 0x1c != 0x1c;
            if !segment.null() && segment.present() && data_or_nonconforming && segment.dpl() < cpl
            {
                // Processors leave the base, which FS and GS still have in 64-bit mode.
                self.cpu.set_segment(
                    index,
                    Segment {
                        base: segment.base,
                        ..null_segment(0)
                    },
                );
            }
        }
    }

    /// Sets CS and with it the privilege level.
    pub fn set_code_segment(&mut self, descriptor: &Descriptor, selector: u16, cpl: u8) {
        self.cpu
            .set_segment(CS, descriptor.segment(selector & !3 | u16::from(cpl)));
    }

    /// Checks that `offset` lies in a code segment about to be entered.
    pub fn check_target(&self, descriptor: &Descriptor, offset: u64) -> Result<(), Fault> {
        let inside = if self.cpu.long_mode() && descriptor.is_long_code() {
            crate::mmu::canonical(offset)
        } else {
            offset <= u64::from(descriptor.limit())
        };
        if inside {
            Ok(())
        } else {
            Err(Fault::protection(0))
        }
    }

    /// True while instructions may end in a debug trap.
    pub fn trap_flag(&self) -> bool {
        self.cpu.system_flags & flags::TF != 0 || self.cpu.watching()
    }
}

/// Operand size of PUSH and POP of a segment register, from its encoding.
fn push_size(instr: &Instruction) -> usize {
    match instr.code() {
        Code::Pushw_FS
        | Code::Pushw_GS
        | Code::Pushw_CS
        | Code::Pushw_DS
        | Code::Pushw_ES
        | Code::Pushw_SS => 2,
        Code::Popw_FS | Code::Popw_GS | Code::Popw_DS | Code::Popw_ES | Code::Popw_SS => 2,
        Code::Pushq_FS | Code::Pushq_GS | Code::Popq_FS | Code::Popq_GS => 8,
        _ => 4,
    }
}
