//! GDTR, IDTR, LDTR and the task register.

use iced_x86::{Instruction, Mnemonic};
use strata_engine::x86::DescriptorTable;

use super::Flow;
use super::segment::{Descriptor, not_present, null_segment, selector_error, system};
use crate::env::{Access, Exec, Fault};
use crate::mmu::canonical;

impl Exec<'_> {
    pub(super) fn load_table(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.privileged()?;
        let size = if self.cpu.code_64() { 8 } else { 4 };
        let limit_at = self.address(instr, 0, 2 + size, Access::Read)?;
        let limit = self.load_u16(limit_at)?;
        let base_at = self.address_at(instr, 0, 2, size, Access::Read)?;
        let mut base = self.load_sized(base_at, size)?;
        if matches!(
            instr.code(),
            iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16
        ) {
            base &= 0xff_ffff;
        }
        if !canonical(base) {
            return Err(Fault::protection(0));
        }
        let table = DescriptorTable { base, limit };
        if instr.mnemonic() == Mnemonic::Lgdt {
            self.cpu.gdtr = table;
        } else {
            self.cpu.idtr = table;
        }
        Ok(Flow::Next)
    }

    pub(super) fn store_table(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.check_umip()?;
        let table = if instr.mnemonic() == Mnemonic::Sgdt {
            self.cpu.gdtr
        } else {
            self.cpu.idtr
        };
        let size = if self.cpu.code_64() { 8 } else { 4 };
        let linear = self.address(instr, 0, 2 + size, Access::Write)?;
        let mut bytes = [0; 10];
        let [low, high, base @ ..] = &mut bytes;
        [*low, *high] = table.limit.to_le_bytes();
        base.copy_from_slice(&table.base.to_le_bytes());
        self.store(linear, bytes.get(..2 + size).unwrap_or(&[]))?;
        Ok(Flow::Next)
    }

    /// A descriptor for LLDT or LTR: in the GDT, of one of these types, present.
    fn system_descriptor(&mut self, selector: u16, kinds: &[u16]) -> Result<Descriptor, Fault> {
        let error = selector_error(selector);
        if selector & 4 != 0 {
            return Err(Fault::protection(error));
        }
        let descriptor = self.descriptor(selector, Fault::protection)?;
        if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
            return Err(Fault::protection(error));
        }
        if !descriptor.present() {
            return Err(not_present(error));
        }
        if self.cpu.long_mode() && !canonical(descriptor.base()) {
            return Err(Fault::protection(error));
        }
        Ok(descriptor)
    }

    pub(super) fn lldt(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        self.privileged()?;
        let selector = self.read_selector(instr, 0)?;
        self.cpu.ldtr = if selector_error(selector) == 0 {
            null_segment(selector)
        } else {
            self.system_descriptor(selector, &[system::LDT])?
                .segment(selector)
        };
        Ok(Flow::Next)
    }

    pub(super) fn ltr(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        self.privileged()?;
        let selector = self.read_selector(instr, 0)?;
        if selector_error(selector) == 0 {
            return Err(Fault::protection(0));
        }
        let kinds = if self.cpu.long_mode() {
            &[system::TSS][..]
        } else {
            &[system::TSS, system::TSS_16]
        };
        let mut descriptor = self.system_descriptor(selector, kinds)?;
        self.mark_type(&mut descriptor, system::BUSY as u8)?;
        self.cpu.tr = descriptor.segment(selector);
        Ok(Flow::Next)
    }

    /// SLDT and STR.
    pub(super) fn store_system_selector(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        self.check_umip()?;
        let segment = if instr.mnemonic() == Mnemonic::Sldt {
            self.cpu.ldtr
        } else {
            self.cpu.tr
        };
        self.write_selector(instr, 0, segment.selector.into())?;
        Ok(Flow::Next)
    }
}
