//! The interpreter (Popek and Goldberg's): what is sensitive, rare or too irregular to translate.
//!
//! [`Exec::interpret`] runs one instruction; [`Exec::raise`] and [`Exec::inject`] deliver exceptions and interrupts.
//! An instruction either completes, with RIP moved on, or returns its fault with nothing architectural changed; the
//! repeated string instructions and gathers keep what they did before a fault, as on the real processor.
//!
//! Limitations: the T bit of a task raises no debug exception; the pointers to the last
//! x87 instruction and operand read as zero; the word that KVM's PV EOI names is never set, so that a guest ends every
//! interrupt by its APIC.

mod control;
mod cpuid;
mod event;
mod far;
mod flags;
mod interrupt_return;
mod io;
mod legacy;
mod mask;
mod msr;
mod operand;
mod pvclock;
mod segment;
mod segment_query;
mod string;
mod string_bulk;
mod syscall;
mod table_register;
mod task;
#[cfg(test)]
mod tests;
mod x87;
mod xsave;

use iced_x86::{Instruction, Mnemonic as M};

use crate::cpu::flags as rflags;
use crate::env::{Exec, Fault};

pub use event::{Event, Origin};
pub use msr::Msrs;

/// What the dispatcher does after an instruction or an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Go on at RIP.
    Continue,
    /// HLT: wait for an interrupt, then go on at RIP.
    Halt,
    /// Triple fault.
    Shutdown,
    /// A repeated string instruction was left part-way: RIP still points at it, the registers say where to go on.
    RepeatLater,
}

/// Turns of a loop with PAUSE, some microseconds, after which another thread of the host may be what it waits for.
const PAUSES: u64 = 128;

/// How an instruction ended, before RIP is moved.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flow {
    /// RIP moves to the next instruction.
    Next,
    /// RIP was set.
    Jumped,
    /// RIP moves on, then the processor halts.
    Halt,
    /// RIP stays: more work is left.
    Again,
}

impl Exec<'_> {
    /// Runs one instruction. `instr.ip()` is RIP, the offset in CS.
    pub fn interpret(&mut self, instr: &Instruction) -> Result<Next, Fault> {
        // A shadow covers one instruction, and so does RF; the instruction below may set either anew.
        let shadow = std::mem::take(&mut self.cpu.interrupt_shadow);
        let resume = self.cpu.system_flags & rflags::RF;
        self.cpu.system_flags &= !rflags::RF;
        let flow = match self.run(instr) {
            Ok(flow) => flow,
            Err(fault) => {
                self.cpu.interrupt_shadow = shadow;
                self.cpu.system_flags |= resume;
                return Err(fault);
            }
        };
        self.env.stats.interpreted += 1;
        match flow {
            Flow::Jumped => Ok(Next::Continue),
            Flow::Again => {
                // Between elements an execute breakpoint must not fault again.
                self.cpu.system_flags |= if self.cpu.watching() {
                    rflags::RF
                } else {
                    resume
                };
                Ok(Next::RepeatLater)
            }
            Flow::Next => {
                self.cpu.rip = self.next_rip(instr);
                Ok(Next::Continue)
            }
            Flow::Halt => {
                self.cpu.rip = self.next_rip(instr);
                self.cpu.halted = true;
                Ok(Next::Halt)
            }
        }
    }

    /// Offset of the instruction after `instr`.
    fn next_rip(&self, instr: &Instruction) -> u64 {
        let next = instr.ip().wrapping_add(instr.len() as u64);
        match self.cpu.code_bits() {
            64 => next,
            32 => next & 0xffff_ffff,
            _ => next & 0xffff,
        }
    }

    fn run(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if instr.has_lock_prefix() {
            // Nothing that runs here can be locked.
            return Err(Fault::UNDEFINED);
        }
        if instr.is_string_instruction() {
            return self.string_instruction(instr);
        }
        let next_rip = self.next_rip(instr);
        match instr.mnemonic() {
            M::Cpuid => self.cpuid(),
            M::Rdmsr => self.rdmsr(),
            M::Wrmsr => self.wrmsr(),
            M::Rdtsc => self.rdtsc(false),
            M::Rdtscp => self.rdtsc(true),
            M::Rdpid => self.rdpid(instr),
            M::Vmcall | M::Vmmcall => self.hypercall(),
            M::Rdpmc => Err(Fault::protection(0)),
            M::Rdrand | M::Rdseed => self.random(instr),

            M::Syscall => self.syscall(next_rip),
            M::Sysret | M::Sysretq => self.sysret(instr),
            M::Sysenter => self.sysenter(),
            M::Sysexit | M::Sysexitq => self.sysexit(instr),
            M::Swapgs => self.swapgs(),
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => self.segment_base(instr),

            M::Iret | M::Iretd | M::Iretq => self.interrupt_return(instr, next_rip),
            M::Int | M::Int1 | M::Int3 | M::Into => self.software_interrupt(instr, next_rip),
            M::Call | M::Jmp => self.far_branch(instr, next_rip),
            M::Retf => self.far_return(instr),

            M::Pushf | M::Pushfd | M::Pushfq => self.push_flags(instr),
            M::Popf | M::Popfd | M::Popfq => self.pop_flags(instr),
            M::Cli => self.cli(),
            M::Sti => self.sti(),
            M::Cld => self.direction(false),
            M::Std => self.direction(true),
            M::Hlt => self.hlt(),
            M::Pause => {
                self.cpu.pauses = PAUSES;
                std::thread::yield_now();
                Ok(Flow::Next)
            }
            M::Nop => Ok(Flow::Next),

            M::Mov => self.move_special(instr),
            M::Clts => self.clts(),
            M::Lmsw => self.lmsw(instr),
            M::Smsw => self.smsw(instr),
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.privileged().map(|()| Flow::Next),
            M::Invlpg => self.invlpg(instr),
            M::Clflush | M::Clflushopt | M::Clwb => self.flush_line(instr),
            M::Xgetbv => self.xgetbv(),
            M::Xsetbv => self.xsetbv(),

            M::Lgdt | M::Lidt => self.load_table(instr),
            M::Sgdt | M::Sidt => self.store_table(instr),
            M::Lldt => self.lldt(instr),
            M::Ltr => self.ltr(instr),
            M::Sldt | M::Str => self.store_system_selector(instr),
            M::Lar | M::Lsl => self.load_rights_or_limit(instr),
            M::Verr | M::Verw => self.verify(instr),
            M::Arpl => self.arpl(instr),
            M::Push => self.push_segment(instr),
            M::Pop => self.pop_segment(instr),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => self.load_far_pointer(instr),

            M::In => self.port_in(instr),
            M::Out => self.port_out(instr),

            M::Wait => self.wait(),
            M::Fxsave | M::Fxsave64 => self.fxsave(instr),
            M::Fxrstor | M::Fxrstor64 => self.fxrstor(instr),
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => self.xsave(instr),
            M::Xrstor | M::Xrstor64 => self.xrstor(instr),
            M::Aaa | M::Aas | M::Aam | M::Aad | M::Daa | M::Das | M::Salc => self.decimal(instr),
            M::Pusha | M::Pushad => self.push_all(instr),
            M::Popa | M::Popad => self.pop_all(instr),
            M::Enter => self.enter(instr),
            M::Bound => self.bound(instr),
            M::Xlatb => self.translate_byte(instr),
            _ => self.run_vector(instr),
        }
    }

    /// x87, MMX and vector instructions. Those that are translated come here while control registers forbid them.
    fn run_vector(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.check_vector_enabled(instr)?;
        match instr.mnemonic() {
            M::Fnstenv => self.fnstenv(instr),
            M::Fldenv => self.fldenv(instr),
            M::Fnsave => self.fnsave(instr),
            M::Frstor => self.frstor(instr),
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => self.mask_bytes(instr),
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => self.mask_lanes(instr),
            M::Vzeroall | M::Vzeroupper => self.zero_vectors(instr),
            M::Ldmxcsr | M::Vldmxcsr => self.load_mxcsr(instr),
            _ if instr.is_vsib() => self.gather(instr),
            _ => Err(Fault::UNDEFINED),
        }
    }

    /// #GP(0) unless at CPL 0.
    fn privileged(&self) -> Result<(), Fault> {
        if self.cpu.cpl() == 0 {
            Ok(())
        } else {
            Err(Fault::protection(0))
        }
    }

    /// Protected mode (with or without long mode), but not virtual-8086 mode.
    fn is_protected(&self) -> bool {
        self.cpu.cr0 & crate::cpu::control::CR0_PE != 0 && self.cpu.system_flags & rflags::VM == 0
    }

    /// Virtual-8086 mode.
    fn is_virtual_8086(&self) -> bool {
        self.cpu.cr0 & crate::cpu::control::CR0_PE != 0 && self.cpu.system_flags & rflags::VM != 0
    }

    /// I/O privilege level.
    fn iopl(&self) -> u8 {
        ((self.cpu.system_flags & rflags::IOPL) >> 12) as u8
    }
}
