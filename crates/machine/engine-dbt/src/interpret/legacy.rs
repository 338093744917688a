//! Instructions of the 8086's and 80186's time: decimal adjustment, PUSHA, ENTER, BOUND, XLAT.

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::Flow;
use super::operand::{RSP, SS, size_mask};
use crate::cpu::flags::{AF, CF, PF, SF, ZF};
use crate::env::{Access, Exec, Fault};

const RBP: usize = 5;

/// SF, ZF and PF of a byte.
fn byte_flags(value: u8) -> u64 {
    let zero = if value == 0 { ZF } else { 0 };
    let sign = if value & 0x80 != 0 { SF } else { 0 };
    let parity = if value.count_ones().is_multiple_of(2) {
        PF
    } else {
        0
    };
    zero | sign | parity
}

impl Exec<'_> {
    /// AAA, AAS, AAM, AAD, DAA, DAS, SALC. Flags that the manual leaves undefined are cleared.
    pub(super) fn decimal(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let ax = self.cpu.gpr[0] as u16;
        let [al, ah] = ax.to_le_bytes();
        let (carry, adjust) = (self.cpu.arith & CF != 0, self.cpu.arith & AF != 0);
        let half = al & 15 > 9 || adjust;
        let (result, flags) = match instr.mnemonic() {
            M::Aaa | M::Aas => {
                let adjusted = match instr.mnemonic() {
                    M::Aaa if half => ax.wrapping_add(0x106),
                    M::Aas if half => ax.wrapping_sub(6).wrapping_sub(0x100),
                    _ => ax,
                };
                (adjusted & 0xff0f, if half { CF | AF } else { 0 })
            }
            M::Aam => {
                let base = instr.immediate8();
                if base == 0 {
                    return Err(Fault::plain(0));
                }
                let low = al % base;
                (u16::from_le_bytes([low, al / base]), byte_flags(low))
            }
            M::Aad => {
                let value = al.wrapping_add(ah.wrapping_mul(instr.immediate8()));
                (value.into(), byte_flags(value))
            }
            M::Daa | M::Das => {
                let high = al > 0x99 || carry;
                let correction = if half { 6 } else { 0 } + if high { 0x60 } else { 0 };
                let subtract = instr.mnemonic() == M::Das;
                let value = if subtract {
                    al.wrapping_sub(correction)
                } else {
                    al.wrapping_add(correction)
                };
                // DAS borrows out of the low step too (SDM vol. 2, DAS).
                let out = high || (subtract && half && al < 6);
                let flags =
                    byte_flags(value) | if half { AF } else { 0 } | if out { CF } else { 0 };
                (u16::from_le_bytes([value, ah]), flags)
            }
            // SALC sets AL from the carry flag and leaves the flags alone.
            _ => (
                u16::from_le_bytes([if carry { 0xff } else { 0 }, ah]),
                self.cpu.arith,
            ),
        };
        self.set_reg(0, result.into(), 2);
        self.cpu.arith = flags;
        Ok(Flow::Next)
    }

    pub(super) fn push_all(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = if instr.mnemonic() == M::Pushad { 4 } else { 2 };
        let [ax, cx, dx, bx, sp, bp, si, di, ..] = self.cpu.gpr;
        let mut stack = self.stack();
        self.push_all_or_none(&mut stack, &[ax, cx, dx, bx, sp, bp, si, di], size)?;
        self.set_stack(stack);
        Ok(Flow::Next)
    }

    pub(super) fn pop_all(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = if instr.mnemonic() == M::Popad { 4 } else { 2 };
        let mut stack = self.stack();
        let mut values = [0; 8];
        for value in values.iter_mut().rev() {
            *value = self.pop(&mut stack, size)?;
        }
        for (number, value) in values
            .into_iter()
            .enumerate()
            .filter(|(number, _)| *number != RSP)
        {
            self.set_reg(number, value, size);
        }
        self.set_stack(stack);
        Ok(Flow::Next)
    }

    /// ENTER size, level.
    pub(super) fn enter(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = match instr.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let bytes = u64::from(instr.immediate16());
        let level = u64::from(instr.immediate8_2nd() & 31);
        let mut stack = self.stack();
        let frame_pointer = self.reg(RBP);
        self.push(&mut stack, frame_pointer, size)?;
        let frame = stack.pointer;
        for i in 1..level {
            let at = frame_pointer.wrapping_sub(i * size as u64) & stack.mask;
            let linear = self.linear(SS, at, size, Access::Read)?;
            let value = self.load_sized(linear, size)?;
            self.push(&mut stack, value, size)?;
        }
        if level > 0 {
            self.push(&mut stack, frame, size)?;
        }
        stack.pointer = stack.pointer.wrapping_sub(bytes) & stack.mask;
        // The new stack top must be writable, or the instruction faults (SDM vol. 2, ENTER).
        let linear = self.linear(SS, stack.pointer, size, Access::Write)?;
        self.probe(linear, size, Access::Write)?;
        self.set_reg(RBP, frame & size_mask(size), size);
        self.set_stack(stack);
        Ok(Flow::Next)
    }

    pub(super) fn bound(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let register = instr.op0_register();
        let size = register.size();
        // Two operands in a row, each with its own alignment.
        let linear = self.address(instr, 1, size, Access::Read)?;
        let second = self.address_at(instr, 1, size as u64, size, Access::Read)?;
        let sign = |value: u64| {
            if size == 2 {
                i64::from(value as i16)
            } else {
                i64::from(value as i32)
            }
        };
        let lower = sign(self.load_sized(linear, size)?);
        let upper = sign(self.load_sized(second, size)?);
        let index = sign(self.named(register));
        if index < lower || index > upper {
            Err(Fault::plain(5))
        } else {
            Ok(Flow::Next)
        }
    }

    /// XLAT: AL becomes the byte at [rBX + AL].
    pub(super) fn translate_byte(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let linear = self.address(instr, 0, 1, Access::Read)?;
        let value = self.load_u8(linear)?;
        self.set_reg(0, value.into(), 1);
        Ok(Flow::Next)
    }
}
