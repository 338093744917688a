//! Register operands: which host register stands for which guest register, and plain instructions put together anew.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::block::{Builder, Decoded};
use crate::asm::reg::{R8, R9, R10, R11, RAX, RCX};
use crate::code::FaultPoint;
use crate::cpu::off;
use crate::mmu::OperandAccess;
use crate::raw::{Encode, Raw, RmOperand};
use crate::table::{RegisterUse, Slot, implicit_rcx, register_uses};

/// The host register that holds guest register `number`, or `None` if it lives in the context.
pub(super) fn host_register(number: u8) -> Option<u8> {
    match number {
        1 => Some(R9),
        4 => Some(R8),
        8..=11 => None,
        other => Some(other),
    }
}

/// A guest register that needs a scratch register for one instruction.
#[derive(Clone, Copy)]
struct Loan {
    number: u8,
    high: bool,
    scratch: u8,
    read: bool,
    write: bool,
}

impl Loan {
    const NONE: Loan = Loan {
        number: 0,
        high: false,
        scratch: 0,
        read: false,
        write: false,
    };
}

/// Where the operand in memory of an instruction is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// There is none.
    None,
    /// There is none, and R10 is not free, in a group.
    Within,
    /// At `[R10 + R11]`.
    Checked,
    /// At this offset from R10, in a group.
    Grouped(i32),
}

/// At most four of something: an instruction has no more register operands.
struct Few<T> {
    items: [T; 4],
    len: usize,
}

impl<T: Copy> Few<T> {
    fn new(filler: T) -> Few<T> {
        Few {
            items: [filler; 4],
            len: 0,
        }
    }

    fn push(&mut self, item: T) {
        if let Some(place) = self.items.get_mut(self.len) {
            *place = item;
            self.len += 1;
        }
    }

    fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        self.items.get(self.len).copied()
    }
}

impl<T> std::ops::Deref for Few<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.items.get(..self.len).unwrap_or(&[])
    }
}

impl<T> std::ops::DerefMut for Few<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.items.get_mut(..self.len).unwrap_or(&mut [])
    }
}

/// True if an instruction without operand in memory may fault on the host.
fn may_fault(decoded: &Decoded) -> bool {
    decoded.vector
        || matches!(
            decoded.instr.mnemonic(),
            Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Wait
        )
}

impl Builder<'_> {
    /// An instruction run as itself.
    pub fn plain(&mut self, decoded: &Decoded, raw: Raw) -> bool {
        let instr = &decoded.instr;
        let uses = self.register_uses(decoded);
        match decoded.memory {
            Some(memory) => {
                self.linear_address(instr, 0);
                let stack = self.stack_segment(instr);
                self.access(instr, memory.access, memory.size, stack, |b| {
                    b.operation(instr, raw, &uses, Place::Checked, true)
                });
            }
            // A memory form that accesses nothing is a NOP in all but name.
            None if (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory) => {}
            None => {
                self.operation(instr, raw, &uses, Place::None, may_fault(decoded));
            }
        }
        self.uses = uses;
        true
    }

    /// An instruction of a group.
    pub(super) fn grouped(&mut self, decoded: &Decoded, raw: Raw, place: Place) {
        let uses = self.register_uses(decoded);
        let faults = decoded.memory.is_some() || may_fault(decoded);
        self.operation(&decoded.instr, raw, &uses, place, faults);
        self.uses = uses;
    }

    /// The general-register operands, in memory that is to be given back.
    fn register_uses(&mut self, decoded: &Decoded) -> Vec<RegisterUse> {
        let mut uses = std::mem::take(&mut self.uses);
        register_uses(&decoded.instr, &decoded.accesses, &mut uses);
        if matches!(decoded.instr.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
            // A zero source leaves the destination as it was.
            for used in &mut uses {
                used.read = true;
            }
        }
        uses
    }

    /// The instruction itself between loads and stores of the registers that need a scratch register, with its operand
    /// in memory at `place`.
    pub fn operation(
        &mut self,
        instr: &Instruction,
        mut raw: Raw,
        uses: &[RegisterUse],
        place: Place,
        faults: bool,
    ) -> Option<FaultPoint> {
        let (rcx_in, rcx_out) = implicit_rcx(instr);
        let mut loans = Few::new(Loan::NONE);
        for used in uses {
            if used.high || host_register(used.number).is_none() {
                match loans
                    .iter_mut()
                    .find(|l| l.number == used.number && l.high == used.high)
                {
                    Some(loan) => {
                        loan.read |= used.read;
                        loan.write |= used.write;
                    }
                    None => loans.push(Loan {
                        number: used.number,
                        high: used.high,
                        scratch: 0,
                        read: used.read,
                        write: used.write,
                    }),
                }
            }
        }
        let rcx_free = !(rcx_in || rcx_out);
        let mut rm = match place {
            Place::None | Place::Within => RmOperand::Register(raw.rm()),
            Place::Checked => RmOperand::BaseIndex(R10, R11),
            Place::Grouped(offset) => RmOperand::BaseDisplacement(R10, offset),
        };
        let mut pool = Few::new(RCX);
        match place {
            Place::Checked => {
                if loans.len() > usize::from(rcx_free) {
                    self.asm.lea(R10, Some(R10), Some((R11, 1)), 0, false);
                    rm = RmOperand::Base(R10);
                    pool.push(R11);
                }
            }
            Place::Within | Place::Grouped(_) => pool.push(R11),
            Place::None => {
                pool.push(R11);
                pool.push(R10);
            }
        }
        if rcx_free {
            pool.push(RCX);
        }
        for loan in loans.iter_mut() {
            // Never empty: two register operands besides memory is the most there is.
            loan.scratch = pool.pop().unwrap_or(RCX);
        }
        // High bytes pass through host CL, so what stays there is loaded last.
        for in_rcx in [false, true] {
            for loan in loans
                .iter()
                .filter(|l| (l.scratch == RCX) == in_rcx && l.read)
            {
                self.borrow_register(loan);
            }
        }
        if rcx_in {
            self.asm.mov(RCX, R9);
        }
        let mut encode = Encode {
            raw,
            p66: raw.p66,
            reg: raw.reg(),
            rm: None,
            opcode_reg: None,
            vvvv: raw.vex.map_or(0, |vex| vex.vvvv),
            force_rex: false,
        };
        if raw.modrm.is_some() {
            encode.rm = Some(rm);
        }
        for used in uses {
            let loan = loans
                .iter()
                .find(|l| l.number == used.number && l.high == used.high);
            let host =
                loan.map_or_else(|| host_register(used.number).unwrap_or(RCX), |l| l.scratch);
            match used.slot {
                Slot::Reg => encode.reg = host,
                Slot::Rm => encode.rm = Some(RmOperand::Register(host)),
                Slot::Opcode => encode.opcode_reg = Some(host),
                Slot::Vvvv => encode.vvvv = host,
            }
            encode.force_rex |= used.size == 1;
        }
        if self.mode.bits() != 64 {
            raw = self.widen(instr, raw, &mut encode);
            encode.raw = raw;
        }
        let point = faults.then(|| self.fault_point(instr.ip()));
        encode.emit(&mut self.asm.code);
        for in_rcx in [true, false] {
            for loan in loans
                .iter()
                .filter(|l| (l.scratch == RCX) == in_rcx && l.write)
            {
                self.return_register(loan);
            }
        }
        if rcx_out {
            self.asm.mov(R9, RCX);
        }
        point
    }

    /// Encodings of 16- and 32-bit code that mean something else in 64-bit code.
    fn widen(&self, instr: &Instruction, raw: Raw, encode: &mut Encode) -> Raw {
        use iced_x86::MandatoryPrefix as M;
        let info = instr.op_code();
        encode.p66 =
            info.mandatory_prefix() == M::P66 || (raw.vex.is_none() && info.operand_size() == 16);
        let mut raw = raw;
        if raw.vex.is_none() && raw.map == 0 {
            match raw.opcode {
                0x40..=0x4f => {
                    let digit = u8::from(raw.opcode >= 0x48);
                    raw = raw.with_digit(0xff, digit);
                    encode.rm = encode.opcode_reg.take().map(RmOperand::Register);
                    encode.reg = digit;
                }
                0x82 => raw.opcode = 0x80,
                _ => {}
            }
        }
        raw
    }

    fn borrow_register(&mut self, loan: &Loan) {
        if !loan.high {
            self.asm.load_ctx(loan.scratch, off::gpr(loan.number));
            return;
        }
        if loan.number == 1 {
            self.asm.mov(RCX, R9);
        }
        self.asm.movzx_8_high(RCX, 4 + loan.number);
        if loan.scratch != RCX {
            self.asm.mov_32(loan.scratch, RCX);
        }
    }

    fn return_register(&mut self, loan: &Loan) {
        if !loan.high {
            self.asm.store_ctx(off::gpr(loan.number), loan.scratch);
            return;
        }
        if loan.number == 1 {
            // CH: guest RCX is in R9, and only host CH can be written.
            // R10 may hold another register still; R11 is free again after the instruction.
            let value = if loan.scratch == RCX {
                R11
            } else {
                loan.scratch
            };
            self.asm.mov(value, loan.scratch);
            self.asm.mov(RCX, R9);
            self.asm.xchg(RAX, value);
            self.asm.mov_high(5, RAX);
            self.asm.xchg(RAX, value);
            self.asm.mov(R9, RCX);
        } else {
            self.asm.mov(RCX, loan.scratch);
            self.asm.mov_high(4 + loan.number, RCX);
        }
    }

    /// Copies a guest register's full 64 bits into a host register.
    pub fn read_guest(&mut self, host: u8, number: u8) {
        match host_register(number) {
            Some(from) => self.asm.mov(host, from),
            None => self.asm.load_ctx(host, off::gpr(number)),
        }
    }

    /// Writes the low `size` bytes of a host register to a guest register as the architecture does: 4 bytes clear
    /// the upper half, fewer leave the rest. `host` must not be R11 for sizes 1 and 2; R11 is clobbered then.
    pub fn write_guest(&mut self, number: u8, host: u8, size: usize) {
        match host_register(number) {
            Some(to) => match size {
                8 => self.asm.mov(to, host),
                4 => self.asm.mov_32(to, host),
                2 => self.asm.mov_16(to, host),
                _ => self.asm.mov_8(to, host),
            },
            None => match size {
                8 => self.asm.store_ctx(off::gpr(number), host),
                4 => {
                    self.asm.mov_32(host, host);
                    self.asm.store_ctx(off::gpr(number), host);
                }
                _ => {
                    self.asm.load_ctx(R11, off::gpr(number));
                    if size == 2 {
                        self.asm.mov_16(R11, host);
                    } else {
                        self.asm.mov_8(R11, host);
                    }
                    self.asm.store_ctx(off::gpr(number), R11);
                }
            },
        }
    }

    /// LEA.
    pub fn lea(&mut self, instr: &Instruction, _raw: Raw) -> bool {
        self.effective_address(instr, 0);
        let destination = instr.op0_register();
        self.write_guest(
            destination.full_register().number() as u8,
            R10,
            destination.size(),
        );
        true
    }

    /// MOV between the accumulator and an absolute offset.
    pub fn mov_offset(&mut self, instr: &Instruction, raw: Raw) -> bool {
        let store = instr.op0_kind() == OpKind::Memory;
        let size = instr.memory_size().size();
        let mut mov = raw;
        mov.opcode = if store { 0x88 } else { 0x8a } | u8::from(size > 1);
        mov.modrm = Some(0);
        let mov = mov.with_imm(&[]);
        let access = if store {
            OperandAccess::Write
        } else {
            OperandAccess::Read
        };
        self.linear_address(instr, 0);
        let p66 = size == 2;
        let stack = self.stack_segment(instr);
        self.access(instr, access, size, stack, |b| {
            let encode = Encode {
                raw: mov,
                p66,
                reg: RAX,
                rm: Some(RmOperand::BaseIndex(R10, R11)),
                opcode_reg: None,
                vvvv: 0,
                force_rex: false,
            };
            encode.emit(&mut b.asm.code);
            None
        });
        true
    }

    /// BT, BTS, BTR, BTC of memory with a register offset: the operand lies offset / width operands away.
    pub fn bit_string(&mut self, instr: &Instruction, raw: Raw) -> bool {
        let register = instr.op1_register();
        let number = register.full_register().number() as u8;
        let size = register.size();
        let (log, wide) = match size {
            2 => (4, 2),
            4 => (5, 4),
            _ => (6, 8),
        };
        self.effective_address(instr, 0);
        self.read_guest(RCX, number);
        self.asm.sign_extend(RCX, RCX, size);
        self.asm.mov_imm(R11, log);
        self.asm.shift_x(2, RCX, RCX, R11);
        let narrow = instr.memory_base().size() == 4
            || instr.memory_index().size() == 4
            || self.mode.bits() != 64;
        self.asm.lea(R10, Some(R10), Some((RCX, wide)), 0, narrow);
        if instr.memory_base().size() == 2
            || instr.memory_index().size() == 2
            || instr.memory_displ_size() == 2
        {
            self.truncate_address();
        }
        self.add_segment(super::memory::segment_number(instr.memory_segment()));
        let access = if instr.mnemonic() == Mnemonic::Bt {
            OperandAccess::Read
        } else {
            OperandAccess::ReadWrite
        };
        let stack = self.stack_segment(instr);
        let p66 = size == 2;
        self.access(instr, access, size, stack, |b| {
            b.asm.lea(R10, Some(R10), Some((R11, 1)), 0, false);
            b.read_guest(RCX, number);
            b.asm.mov_imm(R11, 64 - log);
            b.asm.shift_x(1, RCX, RCX, R11);
            b.asm.shift_x(3, RCX, RCX, R11);
            let encode = Encode {
                raw,
                p66,
                reg: RCX,
                rm: Some(RmOperand::Base(R10)),
                opcode_reg: None,
                vvvv: 0,
                force_rex: false,
            };
            let point = b.fault_point(instr.ip());
            encode.emit(&mut b.asm.code);
            Some(point)
        });
        true
    }
}
