//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, alone and repeated (Intel SDM vol. 1, 7.3.9).
//!
//! A repeated instruction does a bounded amount of work, leaves its state in RCX, RSI and RDI and is begun again. Here
//! is one element at a time, which is right everywhere; whole runs within a page are next door.

use iced_x86::{CodeSize, Instruction, Mnemonic as M, OpKind, Register};

use super::Flow;
use super::operand::size_mask;
use crate::cpu::flags;
use crate::env::{Access, Exec, Fault};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;
const ES: usize = 0;

/// Bytes a repeated instruction works on before interrupts get a chance. It counts elements, however slow they are:
/// where a repetition is left must be the same in a run that replays this one.
const WORK_BYTES: usize = 16 << 10;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    In,
    Out,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Repeat {
    Once,
    /// REP: as often as RCX says.
    Count,
    /// REPE and REPNE of comparisons: while the elements are equal, or not.
    While(bool),
}

/// A decoded string instruction.
#[derive(Clone, Copy, Debug)]
pub struct StringOp {
    pub operation: Operation,
    pub repeat: Repeat,
    /// Bytes of an element.
    pub size: usize,
    /// Bytes of an address.
    pub address_size: usize,
    /// Segment of the source.
    pub segment: usize,
    /// DF.
    pub down: bool,
}

impl StringOp {
    fn new(instr: &Instruction, down: bool) -> Option<StringOp> {
        let operation = match instr.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Operation::Move,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Operation::Store,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Operation::Load,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Operation::Compare,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Operation::Scan,
            M::Insb | M::Insw | M::Insd => Operation::In,
            M::Outsb | M::Outsw | M::Outsd => Operation::Out,
            _ => return None,
        };
        let compares = matches!(operation, Operation::Compare | Operation::Scan);
        let repeat = match (instr.has_rep_prefix(), instr.has_repne_prefix()) {
            (false, false) => Repeat::Once,
            (_, repne) if compares => Repeat::While(!repne),
            _ => Repeat::Count,
        };
        let address_size = (0..instr.op_count()).find_map(|i| match instr.op_kind(i) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        })?;
        let size = instr.memory_size().size();
        // In 64-bit code overrides of anything but FS and GS mean nothing.
        let segment = match instr.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ if instr.code_size() == CodeSize::Code64 => Register::DS,
            segment => segment,
        };
        Some(StringOp {
            operation,
            repeat,
            size,
            address_size,
            segment: segment.number(),
            down,
        })
    }

    pub fn address_mask(&self) -> u64 {
        size_mask(self.address_size)
    }

    fn uses_source(&self) -> bool {
        matches!(
            self.operation,
            Operation::Move | Operation::Load | Operation::Compare | Operation::Out
        )
    }

    fn uses_destination(&self) -> bool {
        !matches!(self.operation, Operation::Load | Operation::Out)
    }
}

/// What one or more elements came to.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Elements done.
    pub done: u64,
    /// A comparison ended the repetition.
    pub stop: bool,
}

impl Exec<'_> {
    pub(super) fn string_instruction(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let down = self.cpu.system_flags & flags::DF != 0;
        let Some(op) = StringOp::new(instr, down) else {
            return Err(Fault::UNDEFINED);
        };
        if matches!(op.operation, Operation::In | Operation::Out) {
            self.check_port(self.reg(RDX) as u16, op.size)?;
        }
        if op.repeat == Repeat::Once {
            self.string_element(&op)?;
            self.advance(&op, 1);
            return Ok(Flow::Next);
        }
        let mut budget = if self.trap_flag() {
            1
        } else {
            (WORK_BYTES / op.size) as u64
        };
        loop {
            let count = self.reg(RCX) & op.address_mask();
            if count == 0 {
                return Ok(Flow::Next);
            }
            if budget == 0 {
                return Ok(Flow::Again);
            }
            let most = count.min(budget);
            let mut run = self.string_run(&op, most)?;
            if run.done == 0 {
                run = Run {
                    done: 1,
                    stop: self.string_element(&op)?,
                };
            }
            self.advance(&op, run.done);
            self.set_reg(RCX, count - run.done, op.address_size);
            if run.stop {
                return Ok(Flow::Next);
            }
            budget -= run.done;
        }
    }

    /// Offset of the current source or destination.
    pub fn string_offset(&self, op: &StringOp, destination: bool) -> u64 {
        self.reg(if destination { RDI } else { RSI }) & op.address_mask()
    }

    /// The accumulator, as wide as an element.
    pub fn string_accumulator(&self, op: &StringOp) -> u64 {
        self.reg(RAX) & size_mask(op.size)
    }

    /// Moves the address registers over `count` elements.
    fn advance(&mut self, op: &StringOp, count: u64) {
        let bytes = count.wrapping_mul(op.size as u64);
        let step = if op.down { bytes.wrapping_neg() } else { bytes };
        for (register, used) in [(RSI, op.uses_source()), (RDI, op.uses_destination())] {
            if used {
                let value = self.reg(register).wrapping_add(step);
                self.set_reg(register, value, op.address_size);
            }
        }
    }

    fn string_address(
        &self,
        op: &StringOp,
        destination: bool,
        access: Access,
    ) -> Result<u64, Fault> {
        let segment = if destination { ES } else { op.segment };
        self.linear(
            segment,
            self.string_offset(op, destination),
            op.size,
            access,
        )
    }

    /// One element. The answer is whether a comparison ends the repetition.
    fn string_element(&mut self, op: &StringOp) -> Result<bool, Fault> {
        match op.operation {
            Operation::Move => {
                let from = self.string_address(op, false, Access::Read)?;
                let value = self.load_sized(from, op.size)?;
                let to = self.string_address(op, true, Access::Write)?;
                self.store_sized(to, value, op.size)?;
            }
            Operation::Store => {
                let to = self.string_address(op, true, Access::Write)?;
                self.store_sized(to, self.string_accumulator(op), op.size)?;
            }
            Operation::Load => {
                let from = self.string_address(op, false, Access::Read)?;
                let value = self.load_sized(from, op.size)?;
                self.set_reg(RAX, value, op.size);
            }
            Operation::Compare | Operation::Scan => {
                let left = if op.operation == Operation::Compare {
                    let from = self.string_address(op, false, Access::Read)?;
                    self.load_sized(from, op.size)?
                } else {
                    self.string_accumulator(op)
                };
                let to = self.string_address(op, true, Access::Read)?;
                let right = self.load_sized(to, op.size)?;
                self.cpu.arith = compare_flags(left, right, op.size);
                return Ok(matches!(op.repeat, Repeat::While(equal) if equal != (left == right)));
            }
            Operation::In => {
                let to = self.string_address(op, true, Access::Write)?;
                // The port must not be read if the store will fault.
                self.probe(to, op.size, Access::Write)?;
                let value = self.read_port(self.reg(RDX) as u16, op.size);
                self.store_sized(to, value, op.size)?;
            }
            Operation::Out => {
                let from = self.string_address(op, false, Access::Read)?;
                let value = self.load_sized(from, op.size)?;
                self.write_port(self.reg(RDX) as u16, value, op.size);
            }
        }
        Ok(false)
    }
}

/// Arithmetic flags of `left - right`, both `size` bytes wide.
pub fn compare_flags(left: u64, right: u64, size: usize) -> u64 {
    let mask = size_mask(size);
    let sign = 1 << (size * 8 - 1);
    let result = left.wrapping_sub(right) & mask;
    let mut out = 0;
    for (bit, on) in [
        (flags::CF, left < right),
        (flags::PF, (result as u8).count_ones().is_multiple_of(2)),
        (flags::AF, (left ^ right ^ result) & 0x10 != 0),
        (flags::ZF, result == 0),
        (flags::SF, result & sign != 0),
        (flags::OF, (left ^ right) & (left ^ result) & sign != 0),
    ] {
        if on {
            out |= bit;
        }
    }
    out
}
