//! Memory operands: what each one is, and whether it may be that.

use iced_x86::{Code, Instruction, InstructionInfo, Mnemonic, OpAccess, OpKind, Register};

use crate::layout::Usage;
use crate::prove::{Prover, R10, R11, RSP, State, full, register};
use crate::value::{Def, Fact, Tags, Value, Window};

/// What a memory operand is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// A field of the context that starts there.
    Field(u32, Usage),
    TlbMask,
    PageMask,
    JumpMask,
    Tag(Tags, Value),
    Delta(Value),
    JumpTag(Value),
    JumpTarget(Value),
    SlotTag(u64),
    SlotTarget(u64),
    /// Under a check.
    Guest,
}

impl Prover<'_> {
    /// Memory that the sum of two values leads to.
    pub fn windows(&self, state: &State, (a, b): (Value, Value)) -> Vec<Window> {
        let mut windows = Vec::new();
        for (one, other) in [(a, b), (b, a)] {
            match (self.values.def(one), self.values.def(other)) {
                (Def::Host { window, .. }, Def::Const(0)) => windows.push(window),
                (Def::Base { window, number }, Def::Offset { number: same }) if number == same => {
                    windows.push(window);
                }
                (Def::Delta(of), _) if of == other => {
                    windows.extend(state.facts.iter().filter_map(|fact| match *fact {
                        Fact::Hit {
                            tags,
                            of: hit,
                            last,
                        } if hit == of => Some(Window {
                            size: last + 1,
                            write: tags == Tags::Write,
                        }),
                        _ => None,
                    }));
                }
                _ => {}
            }
        }
        windows
    }

    /// Memory that an address leads to.
    pub fn reach(&self, instr: &Instruction, state: &State) -> Vec<Window> {
        let base = scratch_register(instr.memory_base());
        let index = scratch_register(instr.memory_index());
        match (base, index) {
            (Some(base), None) if instr.memory_index() == Register::None => {
                match self.values.def(register(state, base)) {
                    Def::Host { window, .. } => vec![window],
                    _ => Vec::new(),
                }
            }
            (Some(base), Some(index)) if instr.memory_index_scale() == 1 => {
                self.windows(state, (register(state, base), register(state, index)))
            }
            _ => Vec::new(),
        }
    }

    /// Says what the memory operand is, if it is anything that may be touched.
    pub fn place(
        &mut self,
        instr: &Instruction,
        state: &State,
        size: usize,
        read: bool,
        write: bool,
    ) -> Result<Place, &'static str> {
        if instr.memory_segment() != Register::DS && instr.memory_segment() != Register::SS {
            return Err("a segment with a base");
        }
        let displacement = instr.memory_displacement64() as i64;
        if instr.memory_base() != Register::RSP {
            let inside = |w: &Window| {
                usize::try_from(displacement)
                    .is_ok_and(|at| at + size <= w.size as usize && (w.write || !write))
            };
            if !self.reach(instr, state).iter().any(inside) {
                return Err("a memory operand that no check covers");
            }
            self.counts.checked += 1;
            return Ok(Place::Guest);
        }
        self.counts.context += 1;
        let Ok(offset) = u32::try_from(displacement) else {
            return Err("below the context");
        };
        let load = read && !write && size == 8;
        if instr.memory_index() != Register::None {
            if instr.memory_index_scale() != 8 || !instr.memory_index().is_gpr64() || !load {
                return Err("an index into the context that is none of a cache");
            }
            let index = register(state, instr.memory_index().number());
            return match self.values.def(index) {
                Def::Index(of) if offset == self.tlb.read => Ok(Place::Tag(Tags::Read, of)),
                Def::Index(of) if offset == self.tlb.write => Ok(Place::Tag(Tags::Write, of)),
                Def::Index(of) if offset == self.tlb.delta => Ok(Place::Delta(of)),
                Def::JumpIndex(of) if offset == self.jump.tag => Ok(Place::JumpTag(of)),
                Def::JumpIndex(of) if offset == self.jump.target => Ok(Place::JumpTarget(of)),
                _ => Err("an index into the context that is not bounded"),
            };
        }
        let layout = self.layout;
        if instr.mnemonic() == Mnemonic::Pext && load {
            for (mask, place) in [
                (layout.tlb_mask, Place::TlbMask),
                (layout.page_mask, Place::PageMask),
                (layout.jump_mask, Place::JumpMask),
            ] {
                if offset == mask {
                    return Ok(place);
                }
            }
        }
        let slot = |array: u32| {
            let at = offset.checked_sub(array)?;
            (at % 8 == 0 && u64::from(at / 8) < layout.jump_entries && load)
                .then_some(u64::from(at / 8))
        };
        if let Some(slot) = slot(self.jump.tag) {
            return Ok(Place::SlotTag(slot));
        }
        if let Some(slot) = slot(self.jump.target) {
            return Ok(Place::SlotTarget(slot));
        }
        let end = u64::from(offset) + size as u64;
        for field in &layout.fields {
            if offset < field.offset || end > u64::from(field.offset) + u64::from(field.size) {
                continue;
            }
            let whole = offset == field.offset && size == 8;
            return match field.usage {
                Usage::ReadOnly if write => Err("a store to a field that may only be read"),
                Usage::Scratch { .. } if !whole => Err("a part of a scratch word"),
                usage => Ok(Place::Field(field.offset, usage)),
            };
        }
        Err("a part of the context that is none of translated code's business")
    }

    /// Judges the memory operand, if there is one that is accessed.
    pub fn operand(
        &mut self,
        instr: &Instruction,
        info: &InstructionInfo,
        state: &State,
    ) -> Result<Option<Place>, &'static str> {
        let mut memory = None;
        for i in 0..instr.op_count() {
            match instr.op_kind(i) {
                OpKind::Memory => memory = Some(i),
                OpKind::Register
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return Err("an operand that is never emitted"),
            }
        }
        let lea = instr.mnemonic() == Mnemonic::Lea;
        if info.used_memory().len() != usize::from(memory.is_some() && !lea) {
            return Err("memory operands that are not written in it");
        }
        let Some(operand) = memory else {
            return Ok(None);
        };
        if instr.is_ip_rel_memory_operand() {
            return Err("an address relative to the host's instruction pointer");
        }
        if lea {
            if full(instr.memory_base()) == Some(RSP) {
                return Err("the context's address as data");
            }
            return Ok(None);
        }
        let (read, write) = match info.op_access(operand) {
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            _ => return Err("a memory operand without an access"),
        };
        let size = match instr.code() {
            // Some processors load four bytes.
            Code::Movsxd_r16_rm16 => 4,
            _ => instr.memory_size().size(),
        };
        if size == 0 {
            return Err("a memory operand of unknown size");
        }
        let bits = matches!(
            instr.mnemonic(),
            Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts
        );
        if bits && instr.op1_kind() == OpKind::Register {
            let number = full(instr.op1_register()).unwrap_or(RSP);
            let inside = match self.values.def(register(state, number)) {
                Def::UpTo { max, .. } | Def::Const(max) => max < size as u64 * 8,
                _ => false,
            };
            if !inside {
                return Err("a bit outside of the operand");
            }
        }
        let place = self.place(instr, state, size, read, write)?;
        if let Place::Field(offset, Usage::Scratch { .. }) = place {
            let moved = matches!(
                instr.code(),
                Code::Mov_r64_rm64 | Code::Mov_rm64_r64 | Code::Mov_rm64_imm32
            );
            let word = state.scratch.iter().find(|word| word.0 == offset);
            let clean = word.map_or(0, |word| self.values.clean(word.1));
            if !moved && (write || clean < 8) {
                return Err("a scratch word that is not just moved");
            }
        }
        Ok(Some(place))
    }
}

/// R10 and R11, the only registers that hold addresses.
fn scratch_register(register: Register) -> Option<usize> {
    match register {
        Register::R10 => Some(R10),
        Register::R11 => Some(R11),
        _ => None,
    }
}
