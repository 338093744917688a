//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS and GS bases.

use iced_x86::{Instruction, Mnemonic};
use strata_engine::x86::Segment;

use super::Flow;
use super::operand::{CS, RSP, SS};
use crate::cpu::{control, flags};
use crate::env::{Exec, Fault};
use crate::mmu::canonical;

/// RFLAGS bits that SYSRET restores: all but RF and VM.
const SYSRET_FLAGS: u64 = flags::ARITH | flags::IF | (flags::SYSTEM & !(flags::RF | flags::VM));

/// A flat code segment.
fn flat_code(selector: u16, dpl: u16, long: bool) -> Segment {
    let size = if long { 0x2000 } else { 0x4000 };
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: 0x809b | dpl << 5 | size,
    }
}

/// A flat stack segment.
fn flat_stack(selector: u16, dpl: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: 0xc093 | dpl << 5,
    }
}

impl Exec<'_> {
    pub(super) fn syscall(&mut self, next_rip: u64) -> Result<Flow, Fault> {
        // As on Intel's processors: 64-bit code only.
        if self.cpu.efer & control::EFER_SCE == 0 || !self.cpu.code_64() {
            return Err(Fault::UNDEFINED);
        }
        let image = self.cpu.rflags();
        self.cpu.gpr[1] = next_rip;
        self.cpu.gpr[11] = image;
        self.cpu.set_rflags(image & !self.cpu.sfmask);
        self.cpu.system_flags &= !(flags::RF | flags::VM);
        let selector = (self.cpu.star >> 32) as u16;
        self.cpu
            .set_segment(CS, flat_code(selector & 0xfffc, 0, true));
        self.cpu
            .set_segment(SS, flat_stack((selector & 0xfffc).wrapping_add(8), 0));
        self.cpu.rip = self.cpu.lstar;
        self.cpu.debug.step = self.trap_flag_set();
        Ok(Flow::Jumped)
    }

    pub(super) fn sysret(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if self.cpu.efer & control::EFER_SCE == 0 || !self.cpu.code_64() {
            return Err(Fault::UNDEFINED);
        }
        self.privileged()?;
        let to_64 = instr.mnemonic() == Mnemonic::Sysretq;
        let target = self.cpu.gpr[1];
        if to_64 && !canonical(target) {
            return Err(Fault::protection(0));
        }
        let base = (self.cpu.star >> 48) as u16;
        self.cpu.rip = if to_64 { target } else { target & 0xffff_ffff };
        self.cpu.set_rflags(self.cpu.gpr[11] & SYSRET_FLAGS);
        let code = if to_64 { base.wrapping_add(16) } else { base };
        self.cpu.set_segment(CS, flat_code(code | 3, 3, to_64));
        self.cpu
            .set_segment(SS, flat_stack(base.wrapping_add(8) | 3, 3));
        self.cpu.debug.step = self.trap_flag_set();
        Ok(Flow::Jumped)
    }

    /// SYSCALL and SYSRET are stepped if TF is set when they end.
    fn trap_flag_set(&self) -> bool {
        self.cpu.system_flags & flags::TF != 0
    }

    pub(super) fn sysenter(&mut self) -> Result<Flow, Fault> {
        let selector = self.cpu.sysenter_cs as u16 & 0xfffc;
        if self.cpu.cr0 & control::CR0_PE == 0 || selector == 0 {
            return Err(Fault::protection(0));
        }
        let long = self.cpu.long_mode();
        let width = if long { u64::MAX } else { 0xffff_ffff };
        self.cpu.interrupts_on = 0;
        self.cpu.system_flags &= !(flags::VM | flags::RF);
        self.cpu.gpr[RSP] = self.cpu.sysenter_esp & width;
        self.cpu.rip = self.cpu.sysenter_eip & width;
        self.cpu.set_segment(CS, flat_code(selector, 0, long));
        self.cpu
            .set_segment(SS, flat_stack(selector.wrapping_add(8), 0));
        Ok(Flow::Jumped)
    }

    pub(super) fn sysexit(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let base = self.cpu.sysenter_cs as u16 & 0xfffc;
        if self.cpu.cr0 & control::CR0_PE == 0 || base == 0 || self.cpu.cpl() != 0 {
            return Err(Fault::protection(0));
        }
        let to_64 = instr.mnemonic() == Mnemonic::Sysexitq;
        let (rsp, rip) = (self.cpu.gpr[1], self.cpu.gpr[2]);
        if to_64 && !(canonical(rsp) && canonical(rip)) {
            return Err(Fault::protection(0));
        }
        let width = if to_64 { u64::MAX } else { 0xffff_ffff };
        let (code, stack) = if to_64 { (32, 40) } else { (16, 24) };
        self.cpu.gpr[RSP] = rsp & width;
        self.cpu.rip = rip & width;
        self.cpu
            .set_segment(CS, flat_code(base.wrapping_add(code) | 3, 3, to_64));
        self.cpu
            .set_segment(SS, flat_stack(base.wrapping_add(stack) | 3, 3));
        Ok(Flow::Jumped)
    }

    pub(super) fn swapgs(&mut self) -> Result<Flow, Fault> {
        if !self.cpu.code_64() {
            return Err(Fault::UNDEFINED);
        }
        self.privileged()?;
        let gs = self.cpu.segments[5];
        let base = std::mem::replace(&mut self.cpu.kernel_gs_base, gs.base);
        self.cpu.set_segment(5, Segment { base, ..gs });
        Ok(Flow::Next)
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    pub(super) fn segment_base(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        if !self.cpu.code_64() || self.cpu.cr4 & control::CR4_FSGSBASE == 0 {
            return Err(Fault::UNDEFINED);
        }
        let register = instr.op0_register();
        let index = if matches!(instr.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) {
            4
        } else {
            5
        };
        if matches!(instr.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
            let base = self.cpu.segments.get(index).map_or(0, |s| s.base);
            self.set_named(register, base);
        } else {
            let base = self.named(register);
            self.write_segment_base(index, base)?;
        }
        Ok(Flow::Next)
    }
}
