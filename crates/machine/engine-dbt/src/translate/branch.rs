//! Control flow: direct jumps are chained, others go through the jump cache; loops look at the request word.
//!
//! A direct jump starts as a jump to its own cold code, which probes the jump cache (emptied whenever a mapping
//! changes, so the probe stays valid under remapping) and else leaves for the dispatcher. Inside a page the dispatcher
//! then patches the jump to go straight to its target. Every cycle of control flow contains a backward, indirect or
//! page-crossing jump, and those look at the request word: that bounds the latency of interrupts and kicks.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::block::{Builder, Cold};
use crate::asm::Here;
use crate::asm::reg::{R8, R9, R10, R11, RCX, RSP};
use crate::caches::jump_index;
use crate::code::{BranchSite, Key, Link, Next};
use crate::cpu::off;
use crate::mmu::OperandAccess;
use crate::raw::Raw;

impl Builder<'_> {
    /// Adds to the count of retired instructions, in instrumented runs.
    fn count(&mut self, retired: u16) {
        if self.options.count && retired > 0 {
            self.asm.load_ctx(RCX, off::RETIRED);
            self.asm
                .lea(RCX, Some(RCX), None, i32::from(retired), false);
            self.asm.store_ctx(off::RETIRED, RCX);
        }
    }

    /// Tells the tracer that the block is left for `target`, or for the address in R10.
    fn trace_exit(&mut self, target: Option<u64>) {
        if self.options.trace {
            if let Some(target) = target {
                self.asm.mov_imm(R10, target);
            }
            self.asm.call_to(self.stubs.block_exit);
        }
    }

    /// Jumps to `stub` with R10 = `target` if a request is pending; with `deferred`, also if an interrupt waits.
    fn check_request(&mut self, target: Option<u64>, deferred: bool) {
        if deferred {
            self.asm.load_ctx(RCX, off::REQUEST);
        } else {
            self.asm.load_ctx_32(RCX, off::REQUEST);
        }
        let mut from = Here(0);
        let stub = self.stubs.request;
        match target {
            Some(target) => {
                self.asm.unless_rcx_zero(|asm| from = asm.jmp_later());
                self.cold.push(Cold::Request { from, target });
            }
            None => self.asm.unless_rcx_zero(|asm| asm.jmp_to(stub)),
        }
    }

    /// The block ends without a jump: goes on at the next instruction.
    pub fn fall_through(&mut self, after_sti: bool) {
        let len = self.next_rip;
        if after_sti {
            self.count(self.index);
            self.trace_exit(Some(len));
            self.check_request(Some(len), true);
            let from = self.asm.jmp_later();
            self.cold.push(Cold::Goto {
                from,
                target: len,
                retired: 0,
                check: false,
            });
            return;
        }
        self.goto(len, self.index);
    }

    /// A jump to a known target after `retired` instructions of this block.
    pub(super) fn goto(&mut self, target: u64, retired: u16) {
        let check = self.needs_check(target);
        self.count(retired);
        self.trace_exit(Some(target));
        if check && !self.mode.is_single() && !self.options.reference {
            self.check_request(Some(target), false);
        }
        let from = self.asm.jmp_later();
        self.cold.push(Cold::Goto {
            from,
            target,
            retired: 0,
            check: false,
        });
    }

    /// A conditional jump whose rel32 is at `from`.
    fn goto_if(&mut self, from: Here, target: u64, retired: u16) {
        let check = self.needs_check(target);
        self.cold.push(Cold::Goto {
            from,
            target,
            retired,
            check,
        });
    }

    /// True for jumps backward or out of the page.
    fn needs_check(&self, target: u64) -> bool {
        target <= self.current_rip || !self.same_page(target)
    }

    /// True if `target` lies in the page this block starts in.
    fn same_page(&self, target: u64) -> bool {
        let base = self.key.cs_base;
        (target.wrapping_add(base) ^ self.key.rip.wrapping_add(base)) & !0xfff == 0
    }

    /// Guest-physical address of `rip`, which lies in the page this block starts in.
    pub(super) fn physical(&self, rip: u64) -> u64 {
        (self.key.gpa & !0xfff) | (rip.wrapping_add(self.key.cs_base) & 0xfff)
    }

    /// Emits what `goto` and friends put off.
    pub(super) fn emit_cold(&mut self, cold: Cold) {
        match cold {
            Cold::Slow {
                from,
                site,
                back,
                op,
            } => self.emit_slow(from, site, back, op),
            Cold::Group(missed) => self.emit_missed(&missed),
            Cold::Request { from, target } => {
                self.asm.patch_here(from);
                self.asm.mov_imm(R10, target);
                self.asm.jmp_to(self.stubs.request);
            }
            Cold::Goto {
                from,
                target,
                retired,
                check,
            } => self.emit_goto(from, target, retired, check),
        }
    }

    fn emit_goto(&mut self, from: Here, target: u64, retired: u16, check: bool) {
        self.asm.patch_here(from);
        if self.mode.is_single() || self.options.reference {
            self.count(retired);
            if retired > 0 {
                self.trace_exit(Some(target));
            }
            self.asm.mov_imm(R10, target);
            self.asm.mov_imm(RCX, u64::from(u32::MAX));
            self.asm.jmp_to(self.stubs.lookup);
            return;
        }
        let mut patch = from;
        if check || (self.options.count && retired > 0) {
            // A thunk of its own does the bookkeeping; the jump behind it is the one that is chained.
            self.count(retired);
            if retired > 0 {
                self.trace_exit(Some(target));
            }
            if check {
                self.asm.load_ctx_32(RCX, off::REQUEST);
                let at = &mut patch;
                self.asm.unless_rcx_zero(|asm| *at = asm.jmp_later());
                let request = patch;
                patch = self.asm.jmp_later();
                self.asm.patch_here(request);
                self.asm.mov_imm(R10, target);
                self.asm.jmp_to(self.stubs.request);
            } else {
                patch = self.asm.jmp_later();
            }
            self.asm.patch_here(patch);
        }
        let cold = self.asm.here();
        let index = jump_index(target);
        let privilege = self.privilege();
        let link = self.next_link();
        let stub = self.stubs.link;
        self.asm.mov_imm(R10, target);
        self.asm
            .load_ctx(RCX, off::jump_tag(privilege) + index as u32 * 8);
        self.asm.lea(RCX, Some(RCX), Some((R10, 1)), 0, false);
        self.asm.unless_rcx_zero(|asm| {
            asm.mov_imm(RCX, u64::from(link));
            asm.jmp_to(stub);
        });
        self.asm
            .jmp_ctx(off::jump_target(privilege) + index as u32 * 8);
        let gpa = if self.same_page(target) {
            self.physical(target)
        } else {
            u64::MAX
        };
        let target = Key {
            gpa,
            rip: target,
            mode: self.mode.grouped().0,
            ..self.key
        };
        self.links.push(Link {
            patch: patch.0 as u32,
            cold: cold.0 as u32,
            target,
        });
    }

    /// Notes an indirect branch that has moved RSP by `moved`.
    fn branch_site(&mut self, moved: u32, counted: bool) -> u64 {
        let site = BranchSite {
            rip: self.current_rip,
            moved,
            counted,
            index: self.index,
        };
        u64::from(self.code.add_branch_site(site))
    }

    /// Before a CALL pushes: leaves for the dispatcher if the target, in RCX and scratch word 0, is not canonical.
    fn check_target(&mut self) {
        let site = self.branch_site(0, false);
        let lookup = self.stubs.lookup;
        // RCX - (its low 48 bits, sign-extended), without flags.
        self.asm.mov_imm(R10, 16);
        self.asm.shift_x(1, R11, RCX, R10);
        self.asm.shift_x(2, R11, R11, R10);
        self.asm.bytes(&[0x49, 0xf7, 0xd3]); // not r11
        self.asm.lea(RCX, Some(RCX), Some((R11, 1)), 1, false);
        self.asm.unless_rcx_zero(|asm| {
            asm.load_ctx(R10, off::temp(0));
            asm.mov_imm(RCX, site);
            asm.jmp_to(lookup);
        });
    }

    /// Jumps to the address in R10; RSP moved by `moved` already. The block ends.
    fn goto_indirect(&mut self, retired: u16, moved: u32) {
        let site = self.branch_site(moved, true);
        self.count(retired);
        self.trace_exit(None);
        if self.mode.is_single() || self.options.reference {
            self.asm.mov_imm(RCX, site);
            self.asm.jmp_to(self.stubs.lookup);
            return;
        }
        self.check_request(None, false);
        let privilege = self.privilege();
        let lookup = self.stubs.lookup;
        // The same as `jump_index`.
        self.asm.rotate_right(R11, R10, 12);
        self.asm.lea(R11, Some(R11), Some((R10, 1)), 0, false);
        self.asm.pext_ctx(R11, R11, off::JUMP_MASK);
        self.asm
            .load(RCX, RSP, Some((R11, 8)), off::jump_tag(privilege) as i32);
        self.asm.lea(RCX, Some(RCX), Some((R10, 1)), 0, false);
        self.asm.unless_rcx_zero(|asm| {
            asm.mov_imm(RCX, site);
            asm.jmp_to(lookup);
        });
        self.asm.jmp_ctx_indexed(R11, off::jump_target(privilege));
    }

    /// Bytes of a near branch's stack slot: 8 in 64-bit mode, else the operand size.
    fn branch_size(&self, instr: &Instruction) -> usize {
        use iced_x86::Code as C;
        match instr.code() {
            C::Call_rel16
            | C::Call_rm16
            | C::Retnw
            | C::Retnw_imm16
            | C::Jmp_rel16
            | C::Jmp_rel8_16
            | C::Jmp_rm16 => 2,
            C::Call_rel32_32 | C::Call_rm32 | C::Retnd | C::Retnd_imm16 => 4,
            C::Jmp_rel32_32 | C::Jmp_rel8_32 | C::Jmp_rm32 => 4,
            _ => 8,
        }
    }

    /// Loads an indirect branch's target into scratch word 0.
    fn indirect_target(&mut self, instr: &Instruction, size: usize) {
        if instr.op0_kind() == OpKind::Memory {
            self.linear_address(instr, 0);
            let stack = self.stack_segment(instr);
            self.access(instr, OperandAccess::Read, size, stack, |b| {
                if size == 2 {
                    b.asm.mov_imm(RCX, 0);
                }
                b.asm.move_sized(false, RCX, R10, R11, size);
                None
            });
        } else {
            let number = instr.op0_register().full_register().number() as u8;
            self.read_guest(RCX, number);
            match size {
                2 => self.asm.bytes(&[0x0f, 0xb7, 0xc9]), // movzx ecx, cx
                4 => self.asm.mov_32(RCX, RCX),
                _ => {}
            }
        }
        self.asm.store_ctx(off::temp(0), RCX);
    }

    /// CALL.
    pub fn call(&mut self, instr: &Instruction) -> bool {
        let size = self.branch_size(instr);
        let direct = instr.op0_kind() != OpKind::Register && instr.op0_kind() != OpKind::Memory;
        if !direct {
            self.indirect_target(instr, size);
            if self.mode.bits() == 64 {
                self.check_target();
            }
        }
        self.after_store = if direct {
            Next::Known(self.wrap(instr.near_branch_target()))
        } else {
            Next::Target
        };
        let back = self.wrap(instr.next_ip());
        self.push_known(instr, size, back);
        if direct {
            self.goto(self.wrap(instr.near_branch_target()), self.index + 1);
        } else {
            self.asm.load_ctx(R10, off::temp(0));
            self.goto_indirect(self.index + 1, 0);
        }
        false
    }

    /// RET.
    pub fn ret(&mut self, instr: &Instruction) -> bool {
        let size = self.branch_size(instr);
        self.stack_address(R8, 0);
        self.access(instr, OperandAccess::Read, size, true, |b| {
            if size == 8 {
                b.asm.load(R10, R10, Some((R11, 1)), 0);
                return None;
            }
            if size == 2 {
                b.asm.mov_imm(RCX, 0);
            }
            b.asm.move_sized(false, RCX, R10, R11, size);
            b.asm.store_ctx(off::temp(0), RCX);
            None
        });
        if size == 8 {
            self.return_to_r10(instr);
            return false;
        }
        let moved = returned(instr, size);
        self.move_stack(moved);
        self.asm.load_ctx(R10, off::temp(0));
        self.goto_indirect(self.index + 1, moved as u32);
        false
    }

    /// The rest of a RET of 64 bits whose target is in R10.
    pub(super) fn return_to_r10(&mut self, instr: &Instruction) {
        let moved = returned(instr, 8);
        self.move_stack(moved);
        self.goto_indirect(self.index + 1, moved as u32);
    }

    /// JMP.
    pub fn jump(&mut self, instr: &Instruction) -> bool {
        if matches!(instr.op0_kind(), OpKind::Register | OpKind::Memory) {
            let size = self.branch_size(instr);
            self.indirect_target(instr, size);
            self.asm.load_ctx(R10, off::temp(0));
            self.goto_indirect(self.index + 1, 0);
        } else {
            self.goto(self.wrap(instr.near_branch_target()), self.index + 1);
        }
        false
    }

    /// Jcc: the taken side leaves, the other goes on in this block.
    pub fn jump_if(&mut self, instr: &Instruction, raw: Raw) -> bool {
        let from = self.asm.jcc_later(raw.opcode & 15);
        self.goto_if(from, self.wrap(instr.near_branch_target()), self.index + 1);
        true
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ.
    pub fn jump_count(&mut self, instr: &Instruction) -> bool {
        use iced_x86::Code as C;
        let width = match instr.code() {
            C::Jcxz_rel8_16
            | C::Jcxz_rel8_32
            | C::Loop_rel8_16_CX
            | C::Loop_rel8_32_CX
            | C::Loope_rel8_16_CX
            | C::Loope_rel8_32_CX
            | C::Loopne_rel8_16_CX
            | C::Loopne_rel8_32_CX => 2,
            C::Jecxz_rel8_16
            | C::Jecxz_rel8_32
            | C::Jecxz_rel8_64
            | C::Loop_rel8_16_ECX
            | C::Loop_rel8_32_ECX
            | C::Loop_rel8_64_ECX
            | C::Loope_rel8_16_ECX
            | C::Loope_rel8_32_ECX
            | C::Loope_rel8_64_ECX
            | C::Loopne_rel8_16_ECX
            | C::Loopne_rel8_32_ECX
            | C::Loopne_rel8_64_ECX => 4,
            _ => 8,
        };
        let is_loop = !matches!(
            instr.mnemonic(),
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz
        );
        if is_loop {
            match width {
                8 => self.asm.lea(R9, Some(R9), None, -1, false),
                4 => self.asm.lea(R9, Some(R9), None, -1, true),
                _ => {
                    self.asm.lea(RCX, Some(R9), None, -1, true);
                    self.asm.mov_16(R9, RCX);
                }
            }
        }
        match width {
            8 => self.asm.mov(RCX, R9),
            4 => self.asm.mov_32(RCX, R9),
            _ => self.asm.bytes(&[0x41, 0x0f, 0xb7, 0xc9]), // movzx ecx, r9w
        }
        let target = self.wrap(instr.near_branch_target());
        let mut taken = Here(0);
        match instr.mnemonic() {
            Mnemonic::Loope => self.asm.unless_rcx_zero(|asm| taken = asm.jcc_later(4)),
            Mnemonic::Loopne => self.asm.unless_rcx_zero(|asm| taken = asm.jcc_later(5)),
            Mnemonic::Loop => self.asm.unless_rcx_zero(|asm| taken = asm.jmp_later()),
            _ => {
                let mut skip = Here(0);
                self.asm.unless_rcx_zero(|asm| skip = asm.jmp_later());
                taken = self.asm.jmp_later();
                self.asm.patch_here(skip);
            }
        }
        self.goto_if(taken, target, self.index + 1);
        true
    }
}

/// Bytes that a RET takes off the stack.
fn returned(instr: &Instruction, size: usize) -> i32 {
    let extra = if instr.op_count() > 0 {
        instr.immediate16()
    } else {
        0
    };
    size as i32 + i32::from(extra)
}
