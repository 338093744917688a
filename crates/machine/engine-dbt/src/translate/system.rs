//! Sensitive instructions that need not leave translated code: a few words of the context, or a stub
//! (`stubs::system`), which itself turns to the interpreter where the case is not the usual one.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::block::Builder;
use crate::asm::reg::R11;
use crate::asm::reg::{R10, RCX};
use crate::code::InterpretSite;
use crate::cpu::off;
use crate::mmu::OperandAccess;

impl Builder<'_> {
    /// Emits one. False if the block ends with it.
    pub fn system(&mut self, instr: &Instruction) -> bool {
        // The tracer hears of stores and of everything that is no function of the guest's state.
        let told = self.options.trace
            && (instr.is_string_instruction() || matches!(instr.mnemonic(), M::Rdtsc | M::Rdtscp));
        if self.options.reference || self.mode.is_single() || told {
            return self.interpret(instr, None);
        }
        let stubs = self.stubs.system;
        match instr.mnemonic() {
            M::Syscall => self.jump_to_stub(instr, stubs.syscall),
            M::Sysretq => self.jump_to_stub(instr, stubs.sysret),
            M::Iretq => self.jump_to_stub(instr, stubs.iret),
            M::Swapgs => self.call_stub(instr, stubs.swapgs),
            M::Rdtsc => self.call_stub(instr, stubs.rdtsc),
            M::Rdtscp => self.call_stub(instr, stubs.rdtscp),
            M::Cld => self.call_stub(instr, stubs.cld),
            M::Popfq => self.pop_flags(instr),
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase if self.mode.has_bases() => {
                self.base(instr)
            }
            M::Mov => self.move_special(instr),
            _ if instr.is_string_instruction() => self.repeated(instr),
            _ => self.interpret(instr, None),
        }
    }

    /// RCX = a site for the interpreter.
    fn site(&mut self, instr: &Instruction) {
        let site = self.code.add_interpret_site(InterpretSite {
            instr: *instr,
            index: self.index,
            fault: None,
        });
        self.asm.mov_imm(RCX, u64::from(site));
    }

    fn call_stub(&mut self, instr: &Instruction, stub: u64) -> bool {
        self.site(instr);
        self.asm.call_to(stub);
        true
    }

    fn jump_to_stub(&mut self, instr: &Instruction, stub: u64) -> bool {
        let counted = if self.options.count {
            u64::from(self.index) + 1
        } else {
            0
        };
        self.asm.mov_imm(R10, self.next_rip);
        self.asm.mov_imm(R11, counted);
        self.site(instr);
        self.asm.jmp_to(stub);
        false
    }

    /// POPFQ at CPL 0. An interrupt may wait for IF, so the block ends.
    fn pop_flags(&mut self, instr: &Instruction) -> bool {
        self.stack_address(crate::asm::reg::R8, 0);
        self.access(instr, OperandAccess::Read, 8, true, |b| {
            b.asm.move_sized(false, RCX, R10, R11, 8);
            b.asm.mov(R10, RCX);
            None
        });
        self.call_stub(instr, self.stubs.system.popf);
        self.move_stack(8);
        self.index += 1;
        self.fall_through(true);
        self.index -= 1;
        false
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    fn base(&mut self, instr: &Instruction) -> bool {
        let register = instr.op0_register();
        let (number, size) = (register.full_register().number() as u8, register.size());
        let (fs, write) = match instr.mnemonic() {
            M::Rdfsbase => (true, false),
            M::Rdgsbase => (false, false),
            M::Wrfsbase => (true, true),
            _ => (false, true),
        };
        if !write {
            let segment = if fs { 4 } else { 5 };
            self.asm.load_ctx(R10, off::seg_base(segment));
            self.write_guest(number, R10, size);
            return true;
        }
        self.read_guest(R10, number);
        if size == 4 {
            self.asm.mov_32(R10, R10);
        }
        let stubs = self.stubs.system;
        self.call_stub(instr, if fs { stubs.wrfsbase } else { stubs.wrgsbase })
    }

    /// MOV from a segment or control register to a general one.
    fn move_special(&mut self, instr: &Instruction) -> bool {
        let (to, from) = (instr.op0_register(), instr.op1_register());
        let number = to.full_register().number() as u8;
        if from.is_segment_register() {
            self.asm.load_ctx_16(R10, off::selector(from.number()));
            self.write_guest(number, R10, to.size());
            return true;
        }
        let Some(field) = off::control(from.number()) else {
            return self.interpret(instr, None);
        };
        self.asm.load_ctx(R10, field);
        self.write_guest(number, R10, 8);
        true
    }

    /// MOVS and STOS with REP.
    fn repeated(&mut self, instr: &Instruction) -> bool {
        let segment = !matches!(instr.segment_prefix(), Register::FS | Register::GS);
        let (kind, wide) = if matches!(instr.mnemonic(), M::Movsb | M::Movsw | M::Movsd | M::Movsq)
        {
            let wide =
                instr.op0_kind() == OpKind::MemoryESRDI && instr.op1_kind() == OpKind::MemorySegRSI;
            (&self.stubs.system.rep_movs, wide)
        } else {
            let wide = instr.op0_kind() == OpKind::MemoryESRDI;
            (&self.stubs.system.rep_stos, wide)
        };
        let repeats = instr.has_rep_prefix() || instr.has_repne_prefix();
        let log = instr.memory_size().size().trailing_zeros() as usize;
        let stub = kind.get(self.privilege()).and_then(|stubs| stubs.get(log));
        match stub {
            Some(&stub) if repeats && segment && wide && !self.mode.slow(3) => {
                self.call_stub(instr, stub)
            }
            _ => self.interpret(instr, None),
        }
    }
}
