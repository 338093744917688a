//! PUSH, POP, LEAVE, PUSHF: stack memory goes through the same check as any other.

use iced_x86::{Instruction, OpKind};

use super::block::Builder;
use super::operand::host_register;
use crate::asm::reg::{R8, R10, R11, RAX, RBP, RCX};
use crate::cpu::off;
use crate::mmu::OperandAccess;
use crate::raw::Raw;

impl Builder<'_> {
    /// Puts `source + disp`, as a stack address, into R10: SP, ESP or RSP wide, SS base added.
    pub fn stack_address(&mut self, source: u8, disp: i32) {
        let wide = self.mode.bits() == 64;
        self.asm.lea(R10, Some(source), None, disp, !wide);
        if !wide {
            if self.mode.stack_16() {
                self.truncate_address();
            }
            self.add_segment(2);
        }
    }

    /// Adds `disp` to the guest's stack pointer at its width.
    pub fn move_stack(&mut self, disp: i32) {
        if self.mode.bits() == 64 {
            self.asm.lea(R8, Some(R8), None, disp, false);
        } else if self.mode.stack_16() {
            self.asm.lea(R10, Some(R8), None, disp, true);
            self.asm.mov_16(R8, R10);
        } else {
            self.asm.lea(R8, Some(R8), None, disp, true);
        }
    }

    /// Pushes the context's scratch word 1.
    pub fn push_temp(&mut self, instr: &Instruction, size: usize) {
        self.stack_address(R8, -(size as i32));
        self.access(instr, OperandAccess::Write, size, true, |b| {
            b.asm.load_ctx(RCX, off::temp(1));
            b.asm.move_sized(true, RCX, R10, R11, size);
            b.move_stack(-(size as i32));
            None
        });
    }

    /// Pushes a number.
    pub fn push_known(&mut self, instr: &Instruction, size: usize, value: u64) {
        self.stack_address(R8, -(size as i32));
        self.access(instr, OperandAccess::Write, size, true, |b| {
            b.asm.mov_imm(RCX, value);
            b.asm.move_sized(true, RCX, R10, R11, size);
            b.move_stack(-(size as i32));
            None
        });
    }

    /// Reads the top of the stack into RCX (zero-extended) and goes on with it there. Does not move the stack.
    fn peek(&mut self, instr: &Instruction, source: u8, size: usize) {
        self.stack_address(source, 0);
        self.access(instr, OperandAccess::Read, size, true, |b| {
            if size == 2 {
                b.asm.mov_imm(RCX, 0);
            }
            b.asm.move_sized(false, RCX, R10, R11, size);
            None
        });
    }

    /// PUSH.
    pub fn push(&mut self, instr: &Instruction) -> bool {
        let size = self.push_size(instr);
        match instr.op0_kind() {
            OpKind::Register => {
                let number = instr.op0_register().full_register().number() as u8;
                self.stack_address(R8, -(size as i32));
                self.access(instr, OperandAccess::Write, size, true, |b| {
                    let from = host_register(number).unwrap_or_else(|| {
                        b.asm.load_ctx(RCX, off::gpr(number));
                        RCX
                    });
                    b.asm.move_sized(true, from, R10, R11, size);
                    b.move_stack(-(size as i32));
                    None
                });
            }
            OpKind::Memory => {
                self.linear_address(instr, 0);
                let stack = self.stack_segment(instr);
                self.access(instr, OperandAccess::Read, size, stack, |b| {
                    b.asm.move_sized(false, RCX, R10, R11, size);
                    b.asm.store_ctx(off::temp(1), RCX);
                    None
                });
                self.push_temp(instr, size);
            }
            _ => {
                let value = instr.immediate(0);
                self.push_known(instr, size, value);
            }
        }
        true
    }

    fn push_size(&self, instr: &Instruction) -> usize {
        // The stack pointer's decrement is the operand size: 2, or the mode's 4 or 8.
        instr.stack_pointer_increment().unsigned_abs() as usize
    }

    /// POP.
    pub fn pop(&mut self, instr: &Instruction, raw: Raw) -> bool {
        let size = self.push_size(instr);
        let _ = raw;
        if instr.op0_kind() == OpKind::Register {
            let number = instr.op0_register().full_register().number() as u8;
            self.peek(instr, R8, size);
            if number == 4 {
                // POP RSP: the increment is lost under the value popped.
                if size == 2 {
                    self.asm.store_ctx(off::temp(1), RCX);
                    self.move_stack(2);
                    self.asm.load_ctx(RCX, off::temp(1));
                }
                self.write_guest(4, RCX, size);
            } else {
                self.write_guest(number, RCX, size);
                self.move_stack(size as i32);
            }
            return true;
        }
        self.peek(instr, R8, size);
        self.asm.store_ctx(off::temp(1), RCX);
        self.linear_address(instr, size as i32);
        let stack = self.stack_segment(instr);
        self.access(instr, OperandAccess::Write, size, stack, |b| {
            b.asm.load_ctx(RCX, off::temp(1));
            b.asm.move_sized(true, RCX, R10, R11, size);
            b.move_stack(size as i32);
            None
        });
        true
    }

    /// LEAVE.
    pub fn leave(&mut self, instr: &Instruction) -> bool {
        let size = self.push_size_of_leave(instr);
        self.peek(instr, RBP, size);
        if self.mode.bits() == 64 {
            self.asm.lea(R8, Some(RBP), None, size as i32, false);
        } else if self.mode.stack_16() {
            self.asm.lea(R10, Some(RBP), None, size as i32, true);
            self.asm.mov_16(R8, R10);
        } else {
            self.asm.lea(R8, Some(RBP), None, size as i32, true);
        }
        self.write_guest(5, RCX, size);
        true
    }

    fn push_size_of_leave(&self, instr: &Instruction) -> usize {
        match instr.code() {
            iced_x86::Code::Leavew => 2,
            iced_x86::Code::Leaved => 4,
            _ => 8,
        }
    }

    /// PUSHFQ: arithmetic flags from the host, the others from the context.
    pub fn push_flags(&mut self, instr: &Instruction) -> bool {
        let size = self.push_size(instr);
        self.asm.store_ctx(off::temp(0), RAX);
        // lahf; seto al; movzx ecx, ah; movzx eax, al; rorx eax, eax, 21 (OF to bit 11)
        self.asm
            .bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb6, 0xcc, 0x0f, 0xb6, 0xc0]);
        self.asm.bytes(&[0xc4, 0xe3, 0x7b, 0xf0, 0xc0, 21]);
        self.asm.lea(RCX, Some(RCX), Some((RAX, 1)), 0, false);
        self.asm.load_ctx(RAX, off::INTERRUPTS_ON);
        // rorx eax, eax, 23 (IF to bit 9)
        self.asm.bytes(&[0xc4, 0xe3, 0x7b, 0xf0, 0xc0, 23]);
        self.asm.lea(RCX, Some(RCX), Some((RAX, 1)), 0, false);
        self.asm.load_ctx(RAX, off::SYSTEM_FLAGS);
        self.asm.lea(RCX, Some(RCX), Some((RAX, 1)), 0, false);
        self.asm.store_ctx(off::temp(1), RCX);
        self.asm.load_ctx(RAX, off::temp(0));
        self.push_temp(instr, size);
        true
    }
}
