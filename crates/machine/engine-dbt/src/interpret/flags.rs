//! PUSHF, POPF, CLI, STI (Intel SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::Flow;
use crate::cpu::flags;
use crate::env::{Exec, Fault};

fn image_size(instr: &Instruction) -> usize {
    match instr.mnemonic() {
        Mnemonic::Pushfq | Mnemonic::Popfq => 8,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 2,
    }
}

impl Exec<'_> {
    pub(super) fn push_flags(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if self.is_virtual_8086() && self.iopl() < 3 {
            return Err(Fault::protection(0));
        }
        let image = self.cpu.rflags() & !(flags::VM | flags::RF);
        let mut stack = self.stack();
        self.push(&mut stack, image, image_size(instr))?;
        self.set_stack(stack);
        Ok(Flow::Next)
    }

    pub(super) fn pop_flags(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if self.is_virtual_8086() && self.iopl() < 3 {
            return Err(Fault::protection(0));
        }
        let size = image_size(instr);
        let mut stack = self.stack();
        let image = self.pop(&mut stack, size)?;
        self.set_stack(stack);
        let mut allowed = flags::ARITH | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;
        if self.cpu.cpl() <= self.iopl() {
            allowed |= flags::IF;
        }
        if self.cpu.cpl() == 0 {
            allowed |= flags::IOPL;
        }
        self.restore_flags(image, allowed, size);
        Ok(Flow::Next)
    }

    pub(super) fn cli(&mut self) -> Result<Flow, Fault> {
        self.check_io_privilege()?;
        self.cpu.interrupts_on = 0;
        Ok(Flow::Next)
    }

    /// Interrupts are held off for one more instruction if they were off.
    pub(super) fn sti(&mut self) -> Result<Flow, Fault> {
        self.check_io_privilege()?;
        self.cpu.interrupt_shadow = self.cpu.interrupts_on == 0;
        self.cpu.interrupts_on = 1;
        Ok(Flow::Next)
    }

    /// #GP(0) if CPL is above IOPL.
    fn check_io_privilege(&self) -> Result<(), Fault> {
        if self.cpu.cpl() > self.iopl() {
            Err(Fault::protection(0))
        } else {
            Ok(())
        }
    }
}
