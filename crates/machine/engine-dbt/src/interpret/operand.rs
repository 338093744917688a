//! Operands: registers by name, effective addresses, memory operands, the stack.

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::Ymm;
use crate::env::{Access, Exec, Fault};

/// Index of RSP in [`crate::cpu::Cpu::gpr`].
pub const RSP: usize = 4;
/// Index of SS.
pub const SS: usize = 2;
/// Index of CS.
pub const CS: usize = 1;

/// A stack pointer in motion: the register follows with [`Exec::set_stack`] when the instruction is sure to complete.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub pointer: u64,
    pub mask: u64,
}

/// All ones in the low `size` bytes.
pub fn size_mask(size: usize) -> u64 {
    if size >= 8 {
        u64::MAX
    } else {
        (1 << (size * 8)) - 1
    }
}

impl Exec<'_> {
    /// A general register by its number; 0 if there is none of this number.
    pub fn reg(&self, number: usize) -> u64 {
        self.cpu.gpr.get(number).copied().unwrap_or(0)
    }

    /// Writes `size` bytes of a general register: 4 clear the upper half, less leave the rest.
    pub fn set_reg(&mut self, number: usize, value: u64, size: usize) {
        if let Some(slot) = self.cpu.gpr.get_mut(number) {
            *slot = match size {
                8 => value,
                4 => value & 0xffff_ffff,
                _ => *slot & !size_mask(size) | value & size_mask(size),
            };
        }
    }

    /// Value of a general or segment register, zero-extended.
    pub fn named(&self, register: Register) -> u64 {
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                self.reg(register as usize - Register::AH as usize) >> 8 & 0xff
            }
            _ if register.is_gpr() => {
                self.reg(register.full_register().number()) & size_mask(register.size())
            }
            _ if register.is_segment_register() => self
                .cpu
                .segments
                .get(register.number())
                .map_or(0, |s| u64::from(s.selector)),
            _ => 0,
        }
    }

    /// Writes a general register.
    pub fn set_named(&mut self, register: Register, value: u64) {
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                let number = register as usize - Register::AH as usize;
                let old = self.reg(number);
                self.set_reg(number, old & !0xff00 | (value & 0xff) << 8, 8);
            }
            _ => self.set_reg(register.full_register().number(), value, register.size()),
        }
    }

    /// Offset of memory operand `op` in its segment; `element` picks a lane of a vector index.
    pub fn offset(&self, instr: &Instruction, op: u32, element: usize) -> u64 {
        instr
            .virtual_address(op, element, |register, lane, lane_size| {
                Some(if register.is_segment_register() {
                    0
                } else if register.is_vector_register() {
                    let vector = self.vector(register.number());
                    vector_lane(&vector, lane, lane_size)
                } else {
                    self.named(register)
                })
            })
            .unwrap_or(0)
    }

    /// Index of the segment of memory operand `op`.
    pub fn segment_of(&self, instr: &Instruction, op: u32) -> usize {
        match instr.op_kind(op) {
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => 0,
            // In 64-bit code overrides of anything but FS and GS mean nothing.
            OpKind::Memory
                if self.cpu.code_64()
                    && !matches!(instr.memory_segment(), Register::FS | Register::GS) =>
            {
                let stack = matches!(
                    instr.memory_base().full_register(),
                    Register::RSP | Register::RBP
                );
                if stack { 2 } else { 3 }
            }
            _ => instr.memory_segment().number(),
        }
    }

    /// Linear address of memory operand `op`, checked for `size` bytes.
    pub fn address(
        &self,
        instr: &Instruction,
        op: u32,
        size: usize,
        access: Access,
    ) -> Result<u64, Fault> {
        self.linear(
            self.segment_of(instr, op),
            self.offset(instr, op, 0),
            size,
            access,
        )
    }

    /// Linear address `by` bytes into memory operand `op`, checked for `size` bytes.
    pub fn address_at(
        &self,
        instr: &Instruction,
        op: u32,
        by: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Fault> {
        let offset = self.offset(instr, op, 0).wrapping_add(by) & self.address_mask(instr);
        self.linear(self.segment_of(instr, op), offset, size, access)
    }

    /// All ones in the address size of a memory operand.
    pub fn address_mask(&self, instr: &Instruction) -> u64 {
        let registers = [instr.memory_base(), instr.memory_index()];
        let size = registers
            .iter()
            .filter(|r| r.is_gpr() || r.is_ip())
            .map(|r| r.size())
            .max();
        size_mask(size.unwrap_or_else(|| match instr.memory_displ_size() {
            0 | 1 => self.cpu.code_bits() as usize / 8,
            size => size as usize,
        }))
    }

    /// Reads up to 8 bytes at a linear address.
    pub fn load_sized(&mut self, linear: u64, size: usize) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        if let Some(part) = bytes.get_mut(..size) {
            self.load(linear, part)?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes up to 8 bytes at a linear address.
    pub fn store_sized(&mut self, linear: u64, value: u64, size: usize) -> Result<(), Fault> {
        self.store(linear, value.to_le_bytes().get(..size).unwrap_or(&[]))
    }

    /// Reads operand `op`: a register, an immediate or memory of the size the instruction says.
    pub fn read_operand(&mut self, instr: &Instruction, op: u32) -> Result<u64, Fault> {
        match instr.op_kind(op) {
            OpKind::Register => Ok(self.named(instr.op_register(op))),
            OpKind::Memory => {
                let size = instr.memory_size().size();
                let linear = self.address(instr, op, size, Access::Read)?;
                self.load_sized(linear, size)
            }
            _ => Ok(instr.immediate(op)),
        }
    }

    /// Writes operand `op`: a register or memory.
    pub fn write_operand(&mut self, instr: &Instruction, op: u32, value: u64) -> Result<(), Fault> {
        if instr.op_kind(op) == OpKind::Register {
            self.set_named(instr.op_register(op), value);
            return Ok(());
        }
        let size = instr.memory_size().size();
        let linear = self.address(instr, op, size, Access::Write)?;
        self.store_sized(linear, value, size)
    }

    /// A vector register; zero if there is none of this number.
    pub fn vector(&self, number: usize) -> Ymm {
        self.cpu.ymm.0.get(number).copied().unwrap_or_default()
    }

    /// Writes a whole vector register.
    pub fn set_vector(&mut self, number: usize, value: Ymm) {
        if let Some(slot) = self.cpu.ymm.0.get_mut(number) {
            *slot = value;
        }
    }

    /// The stack as it is.
    pub fn stack(&self) -> Stack {
        let mask = if self.cpu.code_64() {
            u64::MAX
        } else if self.cpu.segments[SS].default_32() {
            0xffff_ffff
        } else {
            0xffff
        };
        Stack {
            pointer: self.cpu.gpr[RSP] & mask,
            mask,
        }
    }

    /// Moves the stack pointer.
    pub fn set_stack(&mut self, stack: Stack) {
        let rsp = &mut self.cpu.gpr[RSP];
        *rsp = if stack.mask == 0xffff {
            *rsp & !0xffff
        } else {
            0
        } | stack.pointer & stack.mask;
    }

    /// Pushes `size` bytes.
    pub fn push(&mut self, stack: &mut Stack, value: u64, size: usize) -> Result<(), Fault> {
        let pointer = stack.pointer.wrapping_sub(size as u64) & stack.mask;
        let linear = self.linear(SS, pointer, size, Access::Write)?;
        self.store_sized(linear, value, size)?;
        stack.pointer = pointer;
        Ok(())
    }

    /// Pushes several values, the first one first, so that either all or none are written.
    pub fn push_all_or_none(
        &mut self,
        stack: &mut Stack,
        values: &[u64],
        size: usize,
    ) -> Result<(), Fault> {
        let mut check = *stack;
        for _ in values {
            check.pointer = check.pointer.wrapping_sub(size as u64) & check.mask;
            let linear = self.linear(SS, check.pointer, size, Access::Write)?;
            self.probe(linear, size, Access::Write)?;
        }
        for &value in values {
            self.push(stack, value, size)?;
        }
        Ok(())
    }

    /// Pops `N` values of `size` bytes, with one access where they lie in a row.
    pub fn pop_many<const N: usize>(
        &mut self,
        stack: &mut Stack,
        size: usize,
    ) -> Result<[u64; N], Fault> {
        let mut values = [0; N];
        let mut bytes = [0; 64];
        let total = N * size;
        let in_a_row = stack
            .pointer
            .checked_add(total as u64)
            .is_some_and(|end| end <= stack.mask);
        let frame = bytes
            .get_mut(..total)
            .filter(|_| in_a_row && self.cpu.code_64());
        let Some(frame) = frame else {
            for value in &mut values {
                *value = self.pop(stack, size)?;
            }
            return Ok(values);
        };
        let linear = self.linear(SS, stack.pointer, total, Access::Read)?;
        self.load(linear, frame)?;
        for (value, slot) in values.iter_mut().zip(frame.chunks_exact(size)) {
            let mut word = [0; 8];
            if let Some(part) = word.get_mut(..size) {
                part.copy_from_slice(slot);
            }
            *value = u64::from_le_bytes(word);
        }
        stack.pointer = stack.pointer.wrapping_add(total as u64);
        Ok(values)
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, stack: &mut Stack, size: usize) -> Result<u64, Fault> {
        let linear = self.linear(SS, stack.pointer, size, Access::Read)?;
        let value = self.load_sized(linear, size)?;
        stack.pointer = stack.pointer.wrapping_add(size as u64) & stack.mask;
        Ok(value)
    }
}

/// One lane of a vector, zero-extended; `size` 4 or 8 bytes.
pub fn vector_lane(vector: &Ymm, lane: usize, size: usize) -> u64 {
    let word = vector.get(lane * size / 8).copied().unwrap_or(0);
    if size == 8 {
        word
    } else {
        word >> (lane % 2 * 32) & 0xffff_ffff
    }
}

/// Replaces one lane of a vector.
pub fn set_vector_lane(vector: &mut Ymm, lane: usize, size: usize, value: u64) {
    if let Some(word) = vector.get_mut(lane * size / 8) {
        let shift = if size == 8 { 0 } else { lane % 2 * 32 };
        let mask = size_mask(size) << shift;
        *word = *word & !mask | value << shift & mask;
    }
}
