//! LAR, LSL, VERR, VERW, ARPL: what user code may ask about descriptors.

use iced_x86::{Instruction, Mnemonic};

use super::Flow;
use super::segment::{Descriptor, selector_error};
use crate::cpu::flags;
use crate::env::{Exec, Fault};

impl Exec<'_> {
    fn set_zero_flag(&mut self, on: bool) {
        self.cpu.arith = self.cpu.arith & !flags::ZF | if on { flags::ZF } else { 0 };
    }

    /// The descriptor of a selector if there is one that the current and requested privilege may see. Memory faults
    /// of the table itself are faults.
    fn visible(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        if selector_error(selector) == 0 {
            return Ok(None);
        }
        let descriptor = match self.descriptor(selector, Fault::protection) {
            Ok(descriptor) => descriptor,
            Err(Fault { vector: 13, .. }) => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let privilege = self.cpu.cpl().max((selector & 3) as u8);
        Ok(Some(descriptor).filter(|d| d.is_conforming() || d.dpl() >= privilege))
    }

    pub(super) fn load_rights_or_limit(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        let selector = self.read_selector(instr, 1)?;
        let limit = instr.mnemonic() == Mnemonic::Lsl;
        // System types that the instruction knows (SDM vol. 2, tables in LAR and LSL).
        let known = |d: &Descriptor, long: bool| match d.kind() {
            _ if !d.is_system() => true,
            2 | 9 | 11 => true,
            1 | 3 => !long,
            12 => !limit,
            4 | 5 => !limit && !long,
            _ => false,
        };
        let long = self.cpu.long_mode();
        let found = self.visible(selector)?.filter(|d| known(d, long));
        self.set_zero_flag(found.is_some());
        if let Some(descriptor) = found {
            let value = if limit {
                u64::from(descriptor.limit())
            } else {
                descriptor.raw >> 32 & 0x00f0_ff00
            };
            self.set_named(instr.op0_register(), value);
        }
        Ok(Flow::Next)
    }

    pub(super) fn verify(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        let selector = self.read_selector(instr, 0)?;
        let write = instr.mnemonic() == Mnemonic::Verw;
        let allowed = |d: &Descriptor| {
            if write {
                d.is_writable_data()
            } else {
                d.is_readable()
            }
        };
        let ok = self.visible(selector)?.is_some_and(|d| allowed(&d));
        self.set_zero_flag(ok);
        Ok(Flow::Next)
    }

    pub(super) fn arpl(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.is_protected() {
            return Err(Fault::UNDEFINED);
        }
        let to = self.read_selector(instr, 0)?;
        let from = self.read_selector(instr, 1)?;
        let raise = to & 3 < from & 3;
        let value = u64::from(to & !3 | from & 3);
        if raise && instr.op0_kind() == iced_x86::OpKind::Register {
            // 16 bits at every operand size.
            self.set_reg(instr.op0_register().full_register().number(), value, 2);
        } else if raise {
            self.write_selector(instr, 0, value)?;
        }
        self.set_zero_flag(raise);
        Ok(Flow::Next)
    }
}
