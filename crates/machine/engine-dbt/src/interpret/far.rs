//! Far jumps, calls and returns: between segments, privileges and modes (Intel SDM vol. 3, 5.8).

use iced_x86::{Instruction, OpKind};
use strata_engine::x86::Segment;

use super::Flow;
use super::operand::{CS, SS, Stack, size_mask};
use super::segment::{Descriptor, invalid_tss, not_present, selector_error, system};
use crate::cpu::flags;
use crate::env::{Access, Exec, Fault};

/// Bytes of the largest frame: a call gate's 31 parameters, the old stack and the return address.
const FRAME_MAX: usize = 35 * 8;

/// A stack to switch to.
#[derive(Clone, Copy, Debug)]
pub struct NewStack {
    pub segment: Segment,
    pub pointer: u64,
}

impl Exec<'_> {
    pub(super) fn far_branch(&mut self, instr: &Instruction, next_rip: u64) -> Result<Flow, Fault> {
        let call = instr.code().is_call_far() || instr.code().is_call_far_indirect();
        let (selector, offset, size) = match instr.op0_kind() {
            OpKind::FarBranch16 => (
                instr.far_branch_selector(),
                u64::from(instr.far_branch16()),
                2,
            ),
            OpKind::FarBranch32 => (
                instr.far_branch_selector(),
                u64::from(instr.far_branch32()),
                4,
            ),
            OpKind::Memory => {
                let size = instr.memory_size().size() - 2;
                let offset_at = self.address(instr, 0, size + 2, Access::Read)?;
                let offset = self.load_sized(offset_at, size)?;
                let selector_at = self.address_at(instr, 0, size as u64, 2, Access::Read)?;
                (self.load_u16(selector_at)?, offset, size)
            }
            // Near branches are translated.
            _ => return Err(Fault::UNDEFINED),
        };
        if !self.is_protected() {
            return self.far_branch_real(selector, offset, size, call.then_some(next_rip));
        }
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::protection(0));
        }
        let descriptor = self.descriptor(selector, Fault::protection)?;
        if descriptor.is_code() {
            return self.far_to_code(descriptor, selector, offset, size, call.then_some(next_rip));
        }
        if self.names_task(&descriptor) {
            self.branch_to_task(&descriptor, selector, call, next_rip)?;
            return Ok(Flow::Jumped);
        }
        let gate = descriptor.is_system()
            && matches!(descriptor.kind(), system::CALL_GATE | system::CALL_GATE_16);
        if !gate || (descriptor.kind() == system::CALL_GATE_16 && self.cpu.long_mode()) {
            return Err(Fault::protection(error));
        }
        if descriptor.dpl() < self.cpu.cpl().max((selector & 3) as u8) {
            return Err(Fault::protection(error));
        }
        if !descriptor.present() {
            return Err(not_present(error));
        }
        self.through_call_gate(&descriptor, call.then_some(next_rip))
    }

    fn far_branch_real(
        &mut self,
        selector: u16,
        offset: u64,
        size: usize,
        return_to: Option<u64>,
    ) -> Result<Flow, Fault> {
        let target = self.real_segment(CS, selector);
        if offset > u64::from(target.limit) {
            return Err(Fault::protection(0));
        }
        if let Some(rip) = return_to {
            let mut stack = self.stack();
            let cs = self.cpu.segments[CS].selector;
            self.push_all_or_none(&mut stack, &[cs.into(), rip], size)?;
            self.set_stack(stack);
        }
        self.cpu.set_segment(CS, target);
        self.cpu.rip = offset & size_mask(size);
        Ok(Flow::Jumped)
    }

    /// To a code segment directly: the privilege stays.
    fn far_to_code(
        &mut self,
        mut descriptor: Descriptor,
        selector: u16,
        offset: u64,
        size: usize,
        return_to: Option<u64>,
    ) -> Result<Flow, Fault> {
        let error = selector_error(selector);
        let cpl = self.cpu.cpl();
        let allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl && (selector & 3) as u8 <= cpl
        };
        if !allowed
            || (self.cpu.long_mode() && descriptor.is_long_code() && descriptor.default_32())
        {
            return Err(Fault::protection(error));
        }
        if !descriptor.present() {
            return Err(not_present(error));
        }
        let offset = offset & size_mask(size);
        self.check_target(&descriptor, offset)?;
        self.mark_accessed(&mut descriptor)?;
        if let Some(rip) = return_to {
            let mut stack = self.stack();
            let cs = self.cpu.segments[CS].selector;
            self.push_all_or_none(&mut stack, &[cs.into(), rip], size)?;
            self.set_stack(stack);
        }
        self.set_code_segment(&descriptor, selector, cpl);
        self.cpu.rip = offset;
        Ok(Flow::Jumped)
    }

    /// Through a call gate, to the same or, for calls, a more privileged level.
    fn through_call_gate(
        &mut self,
        gate: &Descriptor,
        return_to: Option<u64>,
    ) -> Result<Flow, Fault> {
        let long = self.cpu.long_mode();
        let (selector, offset) = gate.gate_target();
        let size = match gate.kind() {
            system::CALL_GATE_16 => 2,
            _ if long => 8,
            _ => 4,
        };
        let offset = offset & size_mask(size);
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::protection(0));
        }
        let mut code = self.descriptor(selector, Fault::protection)?;
        let cpl = self.cpu.cpl();
        let wrong_size = long && (!code.is_long_code() || code.default_32());
        if !code.is_code() || code.dpl() > cpl || wrong_size {
            return Err(Fault::protection(error));
        }
        if return_to.is_none() && !code.is_conforming() && code.dpl() != cpl {
            return Err(Fault::protection(error));
        }
        if !code.present() {
            return Err(not_present(error));
        }
        self.check_target(&code, offset)?;
        let inner = return_to.is_some() && !code.is_conforming() && code.dpl() < cpl;
        let new_cpl = if inner { code.dpl() } else { cpl };
        if let Some(rip) = return_to {
            let (cs, ss) = (
                self.cpu.segments[CS].selector,
                self.cpu.segments[SS].selector,
            );
            if inner {
                let old = self.stack();
                let parameters = self.gate_parameters(gate, size)?;
                let new = self.inner_stack(new_cpl, 0)?;
                let mut values = vec![ss.into(), old.pointer];
                values.extend(parameters);
                values.extend([cs.into(), rip]);
                self.mark_accessed(&mut code)?;
                let pointer = self.push_on(new, &values, size, new_cpl, 0)?;
                self.cpu.set_segment(SS, new.segment);
                self.set_code_segment(&code, selector, new_cpl);
                let mask = self.stack().mask;
                self.set_stack(Stack { pointer, mask });
                self.cpu.rip = offset;
                return Ok(Flow::Jumped);
            }
            let mut stack = self.stack();
            self.push_all_or_none(&mut stack, &[cs.into(), rip], size)?;
            self.set_stack(stack);
        }
        self.mark_accessed(&mut code)?;
        self.set_code_segment(&code, selector, new_cpl);
        self.cpu.rip = offset;
        Ok(Flow::Jumped)
    }

    /// The parameters a legacy call gate copies from the caller's stack, in the order they are pushed.
    fn gate_parameters(&mut self, gate: &Descriptor, size: usize) -> Result<Vec<u64>, Fault> {
        let count = if self.cpu.long_mode() {
            0
        } else {
            gate.raw >> 32 & 31
        };
        let stack = self.stack();
        (0..count)
            .rev()
            .map(|i| {
                let pointer = stack.pointer.wrapping_add(i * size as u64) & stack.mask;
                let linear = self.linear(SS, pointer, size, Access::Read)?;
                self.load_sized(linear, size)
            })
            .collect()
    }

    /// The stack that the TSS names for a privilege level. `ext` is the error code's external bit.
    pub fn inner_stack(&mut self, cpl: u8, ext: u32) -> Result<NewStack, Fault> {
        let tr = self.cpu.tr;
        let error = selector_error(tr.selector) | ext;
        let level = u64::from(cpl);
        if self.cpu.long_mode() {
            let pointer = self.tss_word(4 + level * 8, 8, error)?;
            // A null selector whose RPL is the new level.
            return Ok(NewStack {
                segment: super::segment::null_segment(cpl.into()),
                pointer,
            });
        }
        let wide = tr.attributes & 8 != 0;
        let (pointer, selector) = if wide {
            (
                self.tss_word(4 + level * 8, 4, error)?,
                self.tss_word(8 + level * 8, 2, error)?,
            )
        } else {
            (
                self.tss_word(2 + level * 4, 2, error)?,
                self.tss_word(4 + level * 4, 2, error)?,
            )
        };
        let segment = self
            .fetch_stack_segment(selector as u16, cpl, false, invalid_tss)
            .map_err(|fault| Fault {
                error: fault
                    .error
                    .map(|e| if fault.vector == 14 { e } else { e | ext }),
                ..fault
            })?;
        Ok(NewStack { segment, pointer })
    }

    /// Reads a field of the TSS; #TS if it lies beyond the limit.
    pub fn tss_word(&mut self, offset: u64, size: usize, error: u32) -> Result<u64, Fault> {
        if offset + size as u64 - 1 > u64::from(self.cpu.tr.limit) {
            return Err(invalid_tss(error));
        }
        let linear = self.table_address(self.cpu.tr.base, offset);
        let mut bytes = [0; 8];
        self.load_system(linear, bytes.get_mut(..size).unwrap_or(&mut []))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a frame to a stack that is not yet current, the first value highest, and returns the new pointer.
    pub fn push_on(
        &mut self,
        stack: NewStack,
        values: &[u64],
        size: usize,
        cpl: u8,
        ext: u32,
    ) -> Result<u64, Fault> {
        let bytes = (values.len() * size) as u64;
        let mask = match size {
            8 => u64::MAX,
            _ if stack.segment.default_32() => 0xffff_ffff,
            _ => 0xffff,
        };
        let pointer = stack.pointer.wrapping_sub(bytes) & mask;
        let linear = if self.cpu.long_mode() {
            pointer
        } else {
            stack.segment.base.wrapping_add(pointer) & 0xffff_ffff
        };
        let last = pointer.wrapping_add(bytes - 1);
        let outside = if self.cpu.long_mode() {
            !crate::mmu::canonical(linear) || !crate::mmu::canonical(last)
        } else {
            let expand_down = stack.segment.attributes & 4 != 0;
            let limit = u64::from(stack.segment.limit);
            if expand_down {
                pointer <= limit
            } else {
                last > limit
            }
        };
        if outside {
            return Err(Fault::stack(selector_error(stack.segment.selector) | ext));
        }
        let mut frame = [0u8; FRAME_MAX];
        let frame = frame.get_mut(..bytes as usize).unwrap_or(&mut []);
        for (slot, value) in frame.chunks_exact_mut(size).rev().zip(values) {
            slot.copy_from_slice(value.to_le_bytes().get(..size).unwrap_or(&[0; 8]));
        }
        // A frame at privilege 3 is written as the (current) user would.
        if cpl == 3 {
            self.store(linear, frame)?
        } else {
            self.store_system(linear, frame)?
        }
        Ok(pointer)
    }

    pub(super) fn far_return(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = far_return_size(instr);
        let release = if instr.op_count() > 0 {
            instr.immediate(0) & 0xffff
        } else {
            0
        };
        let mut stack = self.stack();
        let rip = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        if !self.is_protected() {
            let target = self.real_segment(CS, selector);
            if rip > u64::from(target.limit) {
                return Err(Fault::protection(0));
            }
            self.cpu.set_segment(CS, target);
            self.cpu.rip = rip;
            stack.pointer = stack.pointer.wrapping_add(release);
            self.set_stack(stack);
            return Ok(Flow::Jumped);
        }
        let mut code = self.return_target(selector)?;
        let new_cpl = (selector & 3) as u8;
        stack.pointer = stack.pointer.wrapping_add(release) & stack.mask;
        if new_cpl == self.cpu.cpl() {
            self.check_target(&code, rip)?;
            self.mark_accessed(&mut code)?;
            self.set_stack(stack);
            self.set_code_segment(&code, selector, new_cpl);
            self.cpu.rip = rip;
            return Ok(Flow::Jumped);
        }
        let rsp = self.pop(&mut stack, size)?;
        let ss = self.pop(&mut stack, size)? as u16;
        let new_stack =
            self.fetch_stack_segment(ss, new_cpl, code.is_long_code(), Fault::protection)?;
        self.check_target(&code, rip)?;
        self.mark_accessed(&mut code)?;
        self.leave_to(&code, selector, rip, new_stack, rsp.wrapping_add(release));
        Ok(Flow::Jumped)
    }

    /// Checks the code segment that a far return or IRET goes to.
    pub fn return_target(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::protection(0));
        }
        let rpl = (selector & 3) as u8;
        let code = self.descriptor(selector, Fault::protection)?;
        let privilege = if code.is_conforming() {
            code.dpl() <= rpl
        } else {
            code.dpl() == rpl
        };
        let wrong_size = self.cpu.long_mode() && code.is_long_code() && code.default_32();
        if !code.is_code() || rpl < self.cpu.cpl() || !privilege || wrong_size {
            return Err(Fault::protection(error));
        }
        if !code.present() {
            return Err(not_present(error));
        }
        Ok(code)
    }

    /// The last step of a return to an outer level or with a stack from the frame. Cannot fail.
    pub fn leave_to(
        &mut self,
        code: &Descriptor,
        selector: u16,
        rip: u64,
        stack: Segment,
        rsp: u64,
    ) {
        let cpl = (selector & 3) as u8;
        let outer = cpl > self.cpu.cpl();
        self.set_code_segment(code, selector, cpl);
        self.cpu.rip = rip;
        self.cpu.set_segment(SS, stack);
        let mask = self.stack().mask;
        self.set_stack(Stack { pointer: rsp, mask });
        if outer {
            self.drop_privileged_segments(cpl);
        }
    }

    /// What every interrupt and exception does to RFLAGS in protected mode.
    pub fn clear_on_entry(&mut self) {
        self.cpu.system_flags &= !(flags::TF | flags::NT | flags::RF | flags::VM);
    }
}

fn far_return_size(instr: &Instruction) -> usize {
    use iced_x86::Code;
    match instr.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfq | Code::Retfq_imm16 => 8,
        _ => 4,
    }
}
