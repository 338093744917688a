//! Groups: accesses that share a check because their addresses differ by constants.
//!
//! Fields of a structure, elements of an array at one index, pushes and pops, a frame's variables, global ones: where
//! the base moves by constants only, one look at the soft TLB covers them all, if they lie in one page. If they do not, or if that page is not plain RAM, the code goes on
//! in a block of its own that checks each access for itself, and in which faults are what they are.
//!
//! The group's host address stays in R10; R11 and RCX are free for its instructions. Everything that the guest may see,
//! its stack pointer too, is as it should be before each instruction that may fault or leave.

use std::ops::Range;

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use super::block::{Builder, Cold, Decoded};
use super::operand::{Place, host_register};
use crate::asm::Here;
use crate::asm::reg::{R8, R10, R11, RCX};
use crate::code::{Key, Link, MemSite, Next};
use crate::cpu::off;
use crate::mmu::OperandAccess;
use crate::table::{OperandUse, Treatment, waits_for_x87};

/// Bytes from the first to the last of a group: few enough that most groups lie in one page.
const SPAN: i64 = 256;
/// The number of RSP.
const STACK: u8 = 4;

/// Instructions that share a check.
pub(super) struct Group {
    /// Which of the block's.
    pub members: Range<usize>,
    /// What their addresses have in common.
    root: Root,
    /// The lowest byte, from where the root points at the start.
    low: i64,
    /// Bytes.
    span: usize,
    write: bool,
}

/// A group whose check failed.
#[derive(Clone)]
pub(super) struct Missed {
    /// rel32 that leads to its cold code.
    from: Here,
    /// Where to go on with the host address.
    back: Here,
    /// RIP of the first instruction.
    rip: u64,
    /// Instructions of the block before it.
    index: u16,
    /// Bytes of all operands.
    size: usize,
    access: OperandAccess,
}

/// What the addresses of a group differ from by constants.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Root {
    /// Guest register, which may move by constants; none for fixed addresses.
    base: Option<u8>,
    /// Guest register, which stays, and its scale.
    index: Option<(u8, u8)>,
}

impl Root {
    const STACK: Root = Root {
        base: Some(STACK),
        index: None,
    };

    /// True if an instruction writes to a register that it is made of.
    fn is_written(&self, instr: &Instruction) -> bool {
        let to = written(instr);
        to.is_some() && (to == self.base || to == self.index.map(|(register, _)| register))
    }

    /// How far an instruction without access moves it: by nothing, or by a constant. `None` if by anything else.
    fn step(&self, instr: &Instruction) -> Option<i64> {
        if !self.is_written(instr) {
            return Some(0);
        }
        let by_base = self
            .index
            .is_none_or(|(index, _)| written(instr) != Some(index));
        constant_step(instr).filter(|_| by_base)
    }
}

/// What an instruction is to a group.
enum Member {
    /// It may not be in it.
    Outside,
    /// It makes no access, and moves the base by so much.
    Within(i64),
    /// It accesses so many bytes, from where the root points before it; and moves it.
    Access {
        at: i64,
        size: usize,
        write: bool,
        moves: i64,
        /// The base holds something else afterwards, or the block ends.
        last: bool,
    },
}

/// True for instructions that use no general registers but those that are written in them.
fn explicit(decoded: &Decoded) -> bool {
    let instr = &decoded.instr;
    if decoded.vector {
        let implicit = matches!(
            instr.mnemonic(),
            M::Pcmpistri
                | M::Pcmpistrm
                | M::Pcmpestri
                | M::Pcmpestrm
                | M::Pcmpestri64
                | M::Pcmpestrm64
                | M::Vpcmpistri
                | M::Vpcmpistrm
                | M::Vpcmpestri
                | M::Vpcmpestrm
                | M::Vpcmpestri64
                | M::Vpcmpestrm64
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Maskmovq
        );
        return !implicit && !waits_for_x87(instr);
    }
    match instr.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movbe | M::Bswap => true,
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test | M::Adc | M::Sbb => true,
        M::Inc | M::Dec | M::Neg | M::Not | M::Shl | M::Shr | M::Sar | M::Rol | M::Ror => true,
        M::Bt | M::Popcnt | M::Tzcnt | M::Lzcnt => true,
        M::Imul => instr.op_count() > 1,
        _ => conditional(instr.code()),
    }
}

/// SETcc and CMOVcc.
fn conditional(code: Code) -> bool {
    let within =
        |first: Code, last: Code| (first as usize..=last as usize).contains(&(code as usize));
    within(Code::Seto_rm8, Code::Setg_rm8) || within(Code::Cmovo_r16_rm16, Code::Cmovg_r64_rm64)
}

/// By how much an instruction moves the register that it writes, if by a constant.
fn constant_step(instr: &Instruction) -> Option<i64> {
    if instr.op0_register().size() != 8 {
        return None;
    }
    let immediate = || {
        matches!(
            instr.op1_kind(),
            OpKind::Immediate8to64 | OpKind::Immediate32to64
        )
        .then(|| instr.immediate(1) as i64)
    };
    match instr.mnemonic() {
        M::Add => immediate(),
        M::Sub => immediate().map(i64::wrapping_neg),
        M::Inc => Some(1),
        M::Dec => Some(-1),
        M::Lea if instr.memory_base() == instr.op0_register() => {
            let plain = instr.memory_index() == Register::None && !instr.has_lock_prefix();
            plain.then(|| instr.memory_displacement64() as i64)
        }
        _ => None,
    }
}

/// Number of the general register that an instruction writes to, by its first operand.
fn written(instr: &Instruction) -> Option<u8> {
    let reads = matches!(instr.mnemonic(), M::Cmp | M::Test | M::Bt);
    let register = instr.op0_register();
    (!reads && instr.op_count() > 0 && instr.op0_kind() == OpKind::Register && register.is_gpr())
        .then(|| register.full_register().number() as u8)
}

fn number(register: Register) -> u8 {
    register.full_register().number() as u8
}

/// True if a register that only part of is named is in a place that needs no REX.
fn high_byte(instr: &Instruction) -> bool {
    (0..instr.op_count()).any(|i| {
        instr.op_kind(i) == OpKind::Register
            && matches!(
                instr.op_register(i),
                Register::AH | Register::BH | Register::CH | Register::DH
            )
    })
}

/// General registers of an instruction that live in the context.
fn displaced(instr: &Instruction) -> usize {
    (0..instr.op_count())
        .filter(|&i| {
            instr.op_kind(i) == OpKind::Register && {
                let register = instr.op_register(i);
                register.is_gpr() && host_register(number(register)).is_none()
            }
        })
        .count()
}

/// The operand of a plain instruction: its root, and how far from it.
fn operand(instr: &Instruction) -> Option<(Root, i64)> {
    if matches!(instr.memory_segment(), Register::FS | Register::GS) {
        return None;
    }
    let (base, index) = (instr.memory_base(), instr.memory_index());
    if instr.is_ip_rel_memory_operand() {
        let root = Root {
            base: None,
            index: None,
        };
        return (base == Register::RIP).then(|| (root, instr.ip_rel_memory_address() as i64));
    }
    let index = match index {
        Register::None => None,
        index if index.is_gpr64() => Some((number(index), instr.memory_index_scale() as u8)),
        _ => return None,
    };
    let root = Root {
        base: Some(number(base)),
        index,
    };
    (base.is_gpr64()).then(|| (root, instr.memory_displacement64() as i64))
}

impl Decoded {
    /// The root of a group that begins with this instruction.
    fn group_root(&self) -> Option<Root> {
        match self.how {
            Treatment::Push | Treatment::Pop => Some(Root::STACK),
            Treatment::Plain => {
                self.memory?;
                operand(&self.instr).map(|(root, _)| root)
            }
            _ => None,
        }
    }

    /// What it is to a group with this root.
    fn member(&self, root: Root) -> Member {
        let instr = &self.instr;
        let moves_stack = matches!(
            self.how,
            Treatment::Push | Treatment::Pop | Treatment::Call | Treatment::Ret
        );
        if moves_stack && root != Root::STACK {
            return Member::Outside;
        }
        let push = |last| Member::Access {
            at: -8,
            size: 8,
            write: true,
            moves: -8,
            last,
        };
        let pop = |last| Member::Access {
            at: 0,
            size: 8,
            write: false,
            moves: 8,
            last,
        };
        let whole = instr.stack_pointer_increment().unsigned_abs() == 8;
        match self.how {
            Treatment::Nop | Treatment::JumpIf => Member::Within(0),
            Treatment::Push if whole && instr.op0_kind() != OpKind::Memory => push(false),
            Treatment::Pop
                if whole
                    && instr.op0_kind() == OpKind::Register
                    && number(instr.op0_register()) != STACK =>
            {
                pop(false)
            }
            Treatment::Call if instr.code() == Code::Call_rel32_64 => push(true),
            Treatment::Ret if matches!(instr.code(), Code::Retnq | Code::Retnq_imm16) => pop(true),
            Treatment::Lea if instr.op0_register().size() == 8 => {
                if instr.memory_base().size() == 4 || instr.memory_index().size() == 4 {
                    return Member::Outside;
                }
                root.step(instr).map_or(Member::Outside, Member::Within)
            }
            Treatment::Plain => self.plain_member(root),
            _ => Member::Outside,
        }
    }

    fn plain_member(&self, root: Root) -> Member {
        let instr = &self.instr;
        if !explicit(self) || high_byte(instr) {
            return Member::Outside;
        }
        let by_rcx = crate::table::implicit_rcx(instr) != (false, false);
        let memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        if displaced(instr) > if by_rcx { 1 } else { 2 } {
            return Member::Outside;
        }
        if !memory {
            return root.step(instr).map_or(Member::Outside, Member::Within);
        }
        let Some((_, at)) = operand(instr).filter(|(other, _)| *other == root) else {
            return Member::Outside;
        };
        let Some(OperandUse { access, size }) = self.memory else {
            return Member::Outside;
        };
        Member::Access {
            at,
            size,
            write: access != OperandAccess::Read,
            moves: 0,
            last: root.is_written(instr),
        }
    }
}

impl Builder<'_> {
    /// The group that begins with instruction `first`, if it is worth a check of its own.
    pub(super) fn group_at(&self, first: usize) -> Option<Group> {
        let (mode, options) = (self.mode, self.options);
        if mode.bits() != 64
            || mode.is_single()
            || mode.is_ungrouped()
            || mode.slow(2)
            || options.reference
        {
            return None;
        }
        let root = self.decoded.get(first)?.group_root()?;
        let (mut moved, mut low, mut high) = (0i64, i64::MAX, i64::MIN);
        let (mut accesses, mut write, mut end) = (0, false, first);
        // Past a jump that may be taken, or an instruction that may fault, a first store might never be made: its page
        // must not become dirty.
        let mut certain = true;
        for (index, decoded) in self.decoded.iter().enumerate().skip(first) {
            match decoded.member(root) {
                Member::Outside => break,
                Member::Within(moves) => moved = moved.checked_add(moves)?,
                Member::Access {
                    at,
                    size,
                    write: store,
                    moves,
                    last,
                } => {
                    // The tracer asks for the linear address after each store.
                    let sure = write || (certain && !decoded.vector);
                    if store && (options.trace || !sure) {
                        break;
                    }
                    let from = moved.checked_add(at)?;
                    let to = from.checked_add(size as i64)?;
                    let (lowest, highest) = (low.min(from), high.max(to));
                    if highest.checked_sub(lowest)? > SPAN {
                        break;
                    }
                    (low, high) = (lowest, highest);
                    write |= store;
                    accesses += 1;
                    end = index + 1;
                    moved = moved.checked_add(moves)?;
                    if last {
                        break;
                    }
                }
            }
            certain &= decoded.how != Treatment::JumpIf && !decoded.vector;
        }
        let near =
            root.base.is_none() || (i32::try_from(low).is_ok() && i32::try_from(high).is_ok());
        (accesses > 1 && near).then(|| Group {
            members: first..end,
            root,
            low,
            span: (high - low) as usize,
            write,
        })
    }

    /// Emits a group. False if the block ends with it.
    pub(super) fn emit_group(&mut self, group: &Group) -> bool {
        let Some(first) = self.decoded.get(group.members.start).copied() else {
            return true;
        };
        self.begin(&first);
        self.root_address(group);
        let from = self.check(group.span, group.write);
        let back = self.asm.here();
        self.asm.lea(R10, Some(R10), Some((R11, 1)), 0, false);
        let access = if group.write {
            OperandAccess::Write
        } else {
            OperandAccess::Read
        };
        self.cold.push(Cold::Group(Missed {
            from,
            back,
            rip: first.instr.ip(),
            index: self.index,
            size: group.span,
            access,
        }));
        // Where the base points now, from the group's lowest byte; and what of that its register does not say yet.
        let (mut at, mut owed) = (-group.low, 0i64);
        for index in group.members.clone() {
            let Some(decoded) = self.decoded.get(index).copied() else {
                break;
            };
            self.begin(&decoded);
            let instr = &decoded.instr;
            match decoded.how {
                Treatment::Push => {
                    if instr.op0_kind() == OpKind::Register && number(instr.op0_register()) == STACK
                    {
                        self.pay(&mut owed);
                    }
                    let from = self.pushed(instr);
                    self.asm.store(R10, (at - 8) as i32, from);
                    at -= 8;
                    owed -= 8;
                }
                Treatment::Pop => {
                    let to = number(instr.op0_register());
                    let host = host_register(to);
                    self.asm.load(host.unwrap_or(R11), R10, None, at as i32);
                    if host.is_none() {
                        self.asm.store_ctx(off::gpr(to), R11);
                    }
                    at += 8;
                    owed += 8;
                }
                Treatment::Call => {
                    self.pay(&mut owed);
                    let back = self.wrap(instr.next_ip());
                    self.asm.mov_imm(R11, back);
                    self.asm.store(R10, (at - 8) as i32, R11);
                    self.move_stack(-8);
                    self.goto(self.wrap(instr.near_branch_target()), self.index + 1);
                    self.index += 1;
                    return false;
                }
                Treatment::Ret => {
                    self.pay(&mut owed);
                    self.asm.load(R10, R10, None, at as i32);
                    self.return_to_r10(instr);
                    self.index += 1;
                    return false;
                }
                _ => {
                    self.pay(&mut owed);
                    self.emit_member(&decoded, group.root, &mut at);
                }
            }
            self.index += 1;
        }
        self.pay(&mut owed);
        true
    }

    fn emit_member(&mut self, decoded: &Decoded, root: Root, at: &mut i64) {
        let (instr, Some(raw)) = (&decoded.instr, decoded.raw) else {
            return;
        };
        match decoded.how {
            Treatment::JumpIf => {
                self.jump_if(instr, raw);
            }
            Treatment::Lea => {
                let to = number(instr.op0_register());
                let host = host_register(to).unwrap_or(R11);
                // The destination may be the index.
                self.address_into(instr, 0, R11, RCX);
                if host == R11 {
                    self.asm.store_ctx(off::gpr(to), R11);
                } else {
                    self.asm.mov(host, R11);
                }
            }
            Treatment::Plain => {
                let place = match operand(instr) {
                    Some((_, offset)) if decoded.memory.is_some() => {
                        Place::Grouped((*at + offset) as i32)
                    }
                    _ => Place::Within,
                };
                self.grouped(decoded, raw, place);
            }
            _ => {}
        }
        if decoded.memory.is_none() {
            *at += root.step(instr).unwrap_or(0);
        }
    }

    /// Puts the address of a group's lowest byte into R10. Clobbers R11.
    fn root_address(&mut self, group: &Group) {
        let Some(base) = group.root.base else {
            self.asm.mov_imm(R10, group.low as u64);
            return;
        };
        let mut host = |register, scratch| {
            host_register(register).unwrap_or_else(|| {
                self.asm.load_ctx(scratch, off::gpr(register));
                scratch
            })
        };
        let base = host(base, R10);
        let index = group.root.index;
        let index = index.map(|(register, scale)| (host(register, R11), scale));
        self.asm
            .lea(R10, Some(base), index, group.low as i32, false);
    }

    /// Makes the stack pointer what it should be.
    fn pay(&mut self, owed: &mut i64) {
        let owed = std::mem::take(owed);
        if owed != 0 {
            self.asm.lea(R8, Some(R8), None, owed as i32, false);
        }
    }

    /// Register that holds what a PUSH pushes.
    fn pushed(&mut self, instr: &Instruction) -> u8 {
        if instr.op0_kind() == OpKind::Register {
            let from = number(instr.op0_register());
            return host_register(from).unwrap_or_else(|| {
                self.asm.load_ctx(R11, off::gpr(from));
                R11
            });
        }
        self.asm.mov_imm(R11, instr.immediate(0));
        R11
    }

    /// The way of a group whose check failed: the slow path, once; and in the end a block without groups.
    pub(super) fn emit_missed(&mut self, missed: &Missed) {
        let rip = missed.rip;
        self.asm.patch_here(missed.from);
        let patch = self.asm.jmp_later();
        self.asm.patch_here(patch);
        let cold = self.asm.here();
        let site = self.code.add_mem_site(MemSite {
            rip,
            size: missed.size as u16,
            access: missed.access,
            segment: 3,
            stack: false,
            align: 1,
            x87: false,
            masked: None,
            group: Some(self.next_link()),
            locked: false,
            index: missed.index,
            next: Next::Known(rip),
        });
        self.asm.mov_imm(RCX, u64::from(site));
        self.asm.call_to(self.stubs.slow);
        self.asm.jmp(missed.back);
        self.links.push(Link {
            patch: patch.0 as u32,
            cold: cold.0 as u32,
            target: Key {
                gpa: self.physical(rip),
                rip,
                mode: self.mode.ungrouped().0,
                ..self.key
            },
        });
    }
}
