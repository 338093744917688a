//! IRET in all modes (Intel SDM vol. 2, IRET).

use iced_x86::{Instruction, Mnemonic};
use strata_engine::x86::Segment;

use super::Flow;
use super::operand::{CS, SS, Stack, size_mask};
use crate::cpu::flags;
use crate::env::{Exec, Fault};

/// Flags that IRET restores at every privilege, besides the arithmetic ones.
const ALWAYS: u64 = flags::TF | flags::DF | flags::NT | flags::RF | flags::AC | flags::ID;

impl Exec<'_> {
    pub(super) fn interrupt_return(
        &mut self,
        instr: &Instruction,
        next_rip: u64,
    ) -> Result<Flow, Fault> {
        let size = match instr.mnemonic() {
            Mnemonic::Iretq => 8,
            Mnemonic::Iretd => 4,
            _ => 2,
        };
        let flow = if self.is_protected() {
            if self.cpu.system_flags & flags::NT == 0 {
                self.interrupt_return_protected(size)?
            } else if self.cpu.long_mode() {
                return Err(Fault::protection(0));
            } else {
                self.return_to_task(next_rip)?;
                Flow::Jumped
            }
        } else {
            self.interrupt_return_real(size)?
        };
        self.cpu.nmi_blocked = false;
        Ok(flow)
    }

    fn interrupt_return_real(&mut self, size: usize) -> Result<Flow, Fault> {
        let v8086 = self.is_virtual_8086();
        if v8086 && self.iopl() < 3 {
            return Err(Fault::protection(0));
        }
        let mut stack = self.stack();
        let rip = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        let image = self.pop(&mut stack, size)?;
        let target = self.real_segment(CS, selector);
        if rip > u64::from(target.limit) {
            return Err(Fault::protection(0));
        }
        self.set_stack(stack);
        self.cpu.set_segment(CS, target);
        self.cpu.rip = rip;
        let iopl = if v8086 { 0 } else { flags::IOPL };
        self.restore_flags(image, flags::ARITH | ALWAYS | flags::IF | iopl, size);
        Ok(Flow::Jumped)
    }

    fn interrupt_return_protected(&mut self, size: usize) -> Result<Flow, Fault> {
        let cpl = self.cpu.cpl();
        let from_64 = self.cpu.code_64();
        let mut stack = self.stack();
        let [rip, selector, image] = self.pop_many(&mut stack, size)?;
        let selector = selector as u16;
        if image & flags::VM != 0 && cpl == 0 && size == 4 && !self.cpu.long_mode() {
            return self.return_to_virtual_8086(stack, rip, selector, image);
        }
        let mut code = self.return_target(selector)?;
        let new_cpl = (selector & 3) as u8;
        // 64-bit code always has a stack in its frame.
        let frame_stack = if from_64 || new_cpl > cpl {
            let [rsp, ss] = self.pop_many(&mut stack, size)?;
            Some((
                self.fetch_stack_segment(
                    ss as u16,
                    new_cpl,
                    code.is_long_code(),
                    Fault::protection,
                )?,
                rsp,
            ))
        } else {
            None
        };
        self.check_target(&code, rip)?;
        self.mark_accessed(&mut code)?;
        let mut allowed = flags::ARITH | ALWAYS;
        if cpl <= self.iopl() {
            allowed |= flags::IF;
        }
        if cpl == 0 {
            allowed |= flags::IOPL | flags::VIF | flags::VIP;
        }
        if let Some((segment, rsp)) = frame_stack {
            self.leave_to(&code, selector, rip, segment, rsp);
        } else {
            self.set_stack(stack);
            self.set_code_segment(&code, selector, new_cpl);
            self.cpu.rip = rip;
        }
        self.restore_flags(image, allowed, size);
        Ok(Flow::Jumped)
    }

    fn return_to_virtual_8086(
        &mut self,
        mut stack: Stack,
        rip: u64,
        cs: u16,
        image: u64,
    ) -> Result<Flow, Fault> {
        let mut words = [0; 6];
        for word in &mut words {
            *word = self.pop(&mut stack, 4)?;
        }
        let [esp, ss, es, ds, fs, gs] = words;
        self.cpu
            .set_rflags(image & (flags::ARITH | flags::SYSTEM | flags::IF));
        let selectors = [es, cs.into(), ss, ds, fs, gs];
        for (index, selector) in selectors.into_iter().enumerate() {
            let selector = selector as u16;
            let base = u64::from(selector) << 4;
            self.cpu.set_segment(
                index,
                Segment {
                    selector,
                    base,
                    limit: 0xffff,
                    attributes: 0xf3,
                },
            );
        }
        self.cpu.rip = rip & 0xffff;
        self.cpu.gpr[super::operand::RSP] = esp;
        debug_assert_eq!(self.cpu.segments[SS].dpl(), 3);
        Ok(Flow::Jumped)
    }

    /// Replaces the flags in `allowed` by those of an image of `size` bytes.
    pub(super) fn restore_flags(&mut self, image: u64, allowed: u64, size: usize) {
        let allowed = allowed & size_mask(size);
        let old = self.cpu.rflags();
        self.cpu.set_rflags(old & !allowed | image & allowed);
        if !self.cpu.watching() {
            // Without breakpoints nothing looks at RF, so it is as good as used up.
            self.cpu.system_flags &= !flags::RF;
        }
    }
}
