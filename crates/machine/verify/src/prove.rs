//! The proof: what each register may hold at each instruction, and that no memory operand goes astray.
//!
//! Blocks have no loops, so one walk in order is enough: each instruction sees what holds on every way to it. A check
//! speaks of the *value* that was checked. Values never change, only registers get new ones, so a redefinition between
//! check and use cannot be missed.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{
    Code, Instruction, InstructionInfo, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use crate::allow::refusal;
use crate::flow::{Call, Exit, Flow, Graph, Node};
use crate::layout::{Emitted, JumpArrays, Layout, TlbArrays, Usage};
use crate::operand::Place;
use crate::value::{Def, Fact, Value, Values, Window};

const RCX: usize = 1;
pub const RSP: usize = 4;
pub const R10: usize = 10;
pub const R11: usize = 11;

/// What was proven of a block.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Instructions.
    pub instructions: u64,
    /// Memory operands in the context, the caches among them.
    pub context: u64,
    /// Memory operands under a check or from the slow path.
    pub checked: u64,
}

/// What holds before an instruction.
#[derive(Clone)]
pub struct State {
    registers: [Value; 16],
    /// Scratch words by offset.
    pub scratch: Vec<(u32, Value)>,
    pub facts: BTreeSet<Fact>,
}

type Refused = Result<(), &'static str>;

pub struct Prover<'a> {
    pub layout: &'a Layout,
    block: &'a Emitted<'a>,
    pub tlb: TlbArrays,
    pub jump: JumpArrays,
    pub values: Values,
    pub counts: Counts,
}

impl<'a> Prover<'a> {
    /// Walks the whole block.
    pub fn run(
        layout: &'a Layout,
        block: &'a Emitted<'a>,
        graph: &Graph,
    ) -> Result<Counts, String> {
        let arrays = layout.tlb.get(block.privilege).copied();
        let Some((tlb, jump)) = arrays.zip(layout.jump.get(block.privilege).copied()) else {
            return Err("no such privilege".into());
        };
        let mut prover = Prover {
            layout,
            block,
            tlb,
            jump,
            values: Values::default(),
            counts: Counts::default(),
        };
        let mut info = InstructionInfoFactory::new();
        let mut states = BTreeMap::new();
        states.insert(0, prover.entry());
        for &offset in &graph.order {
            let (Some(node), Some(state)) = (graph.nodes.get(&offset), states.remove(&offset))
            else {
                return Err(format!("{offset:#x}: nothing is known here"));
            };
            prover
                .node(node, state, &mut states, &mut info)
                .map_err(|why| format!("{offset:#x}: {}: {why}", node.instr))?;
        }
        Ok(prover.counts)
    }

    fn entry(&mut self) -> State {
        let mut registers = [self.values.secret(0); 16];
        for (number, register) in registers.iter_mut().enumerate() {
            if !matches!(number, RCX | RSP | R10 | R11) {
                *register = self.values.any();
            }
        }
        let words = self.layout.fields.iter();
        let words = words.filter(|field| matches!(field.usage, Usage::Scratch { .. }));
        State {
            registers,
            scratch: words
                .map(|field| (field.offset, self.values.secret(0)))
                .collect(),
            facts: BTreeSet::new(),
        }
    }

    fn node(
        &mut self,
        node: &Node,
        mut state: State,
        states: &mut BTreeMap<u32, State>,
        info: &mut InstructionInfoFactory,
    ) -> Refused {
        let instr = &node.instr;
        self.counts.instructions += 1;
        if let Some(why) = refusal(instr) {
            return Err(why);
        }
        if node.link {
            self.leaves(&state)?;
        }
        match node.flow {
            Flow::Next => {
                if instr.is_stack_instruction() {
                    return Err("the host's stack");
                }
                self.effects(instr, info.info(instr), &mut state)?;
                self.pass(node.end, state, states);
            }
            Flow::Jump(to) => self.pass(to, state, states),
            Flow::Branch(to) => {
                self.pass(to, state.clone(), states);
                self.pass(node.end, state, states);
            }
            Flow::IfZero(to) => {
                let mut zero = state.clone();
                let fact = match self.values.def(register(&state, RCX)) {
                    Def::TagPage { tags, of, last } => Some(Fact::Hit { tags, of, last }),
                    Def::JumpSum(of) => Some(Fact::Jump(of)),
                    Def::SlotSum(slot) => Some(Fact::Slot(slot)),
                    _ => None,
                };
                zero.facts.extend(fact);
                self.pass(to, zero, states);
                self.pass(node.end, state, states);
            }
            Flow::Exit(exit) => {
                self.leaves(&state)?;
                if exit != Exit::Request {
                    self.number(&state)?;
                }
                if matches!(exit, Exit::Lookup | Exit::Request | Exit::System) {
                    self.public(&state, R10, 8)?;
                }
                if exit == Exit::System {
                    // It is added to the count of retired instructions.
                    self.public(&state, R11, 8)?;
                }
            }
            Flow::Call(call) => {
                self.leaves(&state)?;
                self.call(call, &mut state)?;
                self.pass(node.end, state, states);
            }
            Flow::Indirect => {
                self.leaves(&state)?;
                if instr.op0_kind() != OpKind::Memory {
                    return Err("a jump to a register's value");
                }
                let fact = match self.place(instr, &state, 8, true, false)? {
                    Place::JumpTarget(of) => Fact::Jump(of),
                    Place::SlotTarget(slot) => Fact::Slot(slot),
                    _ => return Err("a jump to an address that is not from the jump cache"),
                };
                if !state.facts.contains(&fact) {
                    return Err("a jump to a target whose tag was not checked");
                }
            }
        }
        Ok(())
    }

    /// Adds what holds on one way to `to`.
    fn pass(&mut self, to: u32, state: State, states: &mut BTreeMap<u32, State>) {
        match states.remove(&to) {
            None => states.insert(to, state),
            Some(other) => states.insert(to, self.join(&other, &state)),
        };
    }

    /// What holds on both ways.
    fn join(&mut self, a: &State, b: &State) -> State {
        let mut registers = a.registers;
        for (mine, other) in registers.iter_mut().zip(b.registers) {
            *mine = self.join_values(*mine, other);
        }
        let pair = |state: &State| (register(state, R10), register(state, R11));
        if pair(a) != pair(b) {
            let (mine, others) = (self.windows(a, pair(a)), self.windows(b, pair(b)));
            let both = mine
                .iter()
                .chain(&others)
                .filter(|w| mine.iter().any(|m| covers(m, w.size, w.write)))
                .filter(|w| others.iter().any(|m| covers(m, w.size, w.write)))
                .max_by_key(|w| (w.write, w.size));
            if let Some(&window) = both {
                let number = self.values.number();
                registers[R10] = self.values.of(Def::Base { window, number });
                registers[R11] = self.values.of(Def::Offset { number });
            }
        }
        let scratch = a.scratch.iter().zip(&b.scratch);
        State {
            registers,
            scratch: scratch
                .map(|(&(offset, mine), &(_, other))| (offset, self.join_values(mine, other)))
                .collect(),
            facts: a.facts.intersection(&b.facts).copied().collect(),
        }
    }

    fn join_values(&mut self, a: Value, b: Value) -> Value {
        if a == b {
            return a;
        }
        match self.values.clean(a).min(self.values.clean(b)) {
            8 => self.values.any(),
            clean => self.values.secret(clean),
        }
    }

    /// Code outside may show the guest its registers from here on.
    fn leaves(&self, state: &State) -> Refused {
        for (number, &value) in state.registers.iter().enumerate() {
            if !matches!(number, RCX | RSP | R10 | R11) && self.values.clean(value) < 8 {
                return Err("a guest register holds a host address");
            }
        }
        Ok(())
    }

    /// RCX names something by number.
    fn number(&self, state: &State) -> Result<u64, &'static str> {
        match self.values.def(register(state, RCX)) {
            Def::Const(number) => Ok(number),
            _ => Err("RCX is no constant"),
        }
    }

    /// The guest may learn the low `size` bytes of a register.
    fn public(&self, state: &State, number: usize, size: usize) -> Refused {
        if usize::from(self.values.clean(register(state, number))) < size {
            return Err("a host address is used as data");
        }
        Ok(())
    }

    fn call(&mut self, call: Call, state: &mut State) -> Refused {
        let mut window = None;
        if let Call::System { given } = call {
            self.number(state)?;
            if given {
                self.public(state, R10, 8)?;
            }
        } else if call == Call::BlockExit {
            self.public(state, R10, 8)?;
        } else {
            let site = u32::try_from(self.number(state)?).ok();
            let Some(site) = site.and_then(self.block.site) else {
                return Err("no such site");
            };
            if call == Call::Slow {
                self.public(state, R10, 8)?;
                window = Some(Window {
                    size: site.size,
                    write: site.write,
                });
            }
        }
        state.facts.clear();
        for value in &mut state.registers {
            *value = self.forget(*value);
        }
        for (offset, value) in &mut state.scratch {
            let field = self.layout.fields.iter().find(|f| f.offset == *offset);
            let kept = field.is_some_and(|f| f.usage == Usage::Scratch { kept: true });
            *value = if kept {
                self.forget(*value)
            } else {
                self.values.secret(0)
            };
        }
        state.registers[RCX] = self.values.secret(0);
        if matches!(call, Call::System { .. }) {
            for (number, value) in state.registers.iter_mut().enumerate() {
                *value = match number {
                    RCX | RSP | R10 | R11 => self.values.secret(0),
                    _ => self.values.any(),
                };
            }
            return Ok(());
        }
        state.registers[R11] = self.values.of(Def::Const(0));
        match (call, window) {
            (Call::Slow, Some(window)) => {
                let number = self.values.number();
                state.registers[R10] = self.values.of(Def::Host { window, number });
            }
            (Call::Stored | Call::BlockExit, _) => {}
            _ => state.registers[R10] = self.values.secret(0),
        }
        Ok(())
    }

    /// What is left of a value after a call.
    fn forget(&mut self, value: Value) -> Value {
        if !self.values.fleeting(value) {
            return value;
        }
        match self.values.clean(value) {
            8 => self.values.any(),
            clean => self.values.secret(clean),
        }
    }

    /// An instruction that goes on at the next one.
    fn effects(
        &mut self,
        instr: &Instruction,
        info: &InstructionInfo,
        state: &mut State,
    ) -> Refused {
        let place = self.operand(instr, info, state)?;
        let value = self.known_result(instr, place, state)?;
        if value.is_none() {
            self.reads(instr, info, state)?;
        }
        self.writes(info, state)?;
        if let Some(value) = value {
            match place {
                Some(Place::Field(offset, _)) if instr.op0_kind() == OpKind::Memory => {
                    for word in state.scratch.iter_mut().filter(|word| word.0 == offset) {
                        word.1 = value;
                    }
                }
                _ => set(state, instr.op0_register().number(), value),
            }
        }
        Ok(())
    }

    /// The value of the destination where more is known of it than that it is some value.
    fn known_result(
        &mut self,
        instr: &Instruction,
        place: Option<Place>,
        state: &State,
    ) -> Result<Option<Value>, &'static str> {
        let code = instr.code();
        let value = |operand| register(state, full(operand).unwrap_or(RSP));
        let def = match (code, place) {
            (Code::Mov_r64_rm64 | Code::Mov_rm64_r64, None) => {
                if full(instr.op1_register()) == Some(RSP) {
                    return Err("the context's address as data");
                }
                return Ok(Some(value(instr.op1_register())));
            }
            (Code::Mov_rm64_r64, Some(Place::Field(_, Usage::Scratch { .. }))) => {
                return Ok(Some(value(instr.op1_register())));
            }
            (Code::Mov_r64_rm64, Some(Place::Field(offset, Usage::Scratch { .. }))) => {
                let word = state.scratch.iter().find(|word| word.0 == offset);
                return Ok(word.map(|word| word.1));
            }
            (
                Code::Mov_r32_imm32
                | Code::Mov_rm32_imm32
                | Code::Mov_rm64_imm32
                | Code::Mov_r64_imm64,
                None | Some(Place::Field(_, Usage::Scratch { .. })),
            ) => Def::Const(instr.immediate(1)),
            (Code::Mov_r64_rm64, Some(Place::Tag(tags, of))) => Def::Tag { tags, of },
            (Code::Mov_r64_rm64, Some(Place::Delta(of))) => Def::Delta(of),
            (Code::Mov_r64_rm64, Some(Place::JumpTag(of))) => Def::JumpTag(of),
            (Code::Mov_r64_rm64, Some(Place::SlotTag(slot))) => Def::SlotTag(slot),
            (Code::VEX_Pext_r64_r64_rm64, Some(mask)) => {
                let of = value(instr.op1_register());
                self.public(state, full(instr.op1_register()).unwrap_or(RSP), 8)?;
                match (mask, self.values.def(of)) {
                    (Place::TlbMask, _) => Def::Index(of),
                    (Place::JumpMask, Def::Mixed(of)) => Def::JumpIndex(of),
                    (Place::PageMask, Def::TagSum { tags, of, last }) => {
                        Def::TagPage { tags, of, last }
                    }
                    _ => return Ok(None),
                }
            }
            (Code::VEX_Rorx_r64_rm64_imm8, None) if instr.immediate(2) == 12 => {
                self.public(state, full(instr.op1_register()).unwrap_or(RSP), 8)?;
                Def::Turned(value(instr.op1_register()))
            }
            (Code::VEX_Shrx_r64_rm64_r64, None) => {
                match self.values.def(value(instr.op2_register())) {
                    Def::Const(count) => {
                        self.public(state, full(instr.op1_register()).unwrap_or(RSP), 8)?;
                        Def::UpTo {
                            max: u64::MAX >> (count & 63),
                            number: self.values.number(),
                        }
                    }
                    _ => return Ok(None),
                }
            }
            (Code::Lea_r64_m, None) => return self.sum(instr, state).map(Some),
            (Code::Lea_r32_m | Code::Lea_r16_m, None) => {
                let public = [instr.memory_base(), instr.memory_index()]
                    .into_iter()
                    .filter_map(full)
                    .all(|number| self.values.clean(register(state, number)) == 8);
                return if public {
                    Ok(None)
                } else {
                    Err("a host address is used as data")
                };
            }
            (_, Some(Place::Field(..) | Place::Guest) | None) => return Ok(None),
            _ => return Err("a cache's entry in an instruction that is never emitted"),
        };
        Ok(Some(self.values.of(def)))
    }

    /// LEA of 64 bits.
    fn sum(&mut self, instr: &Instruction, state: &State) -> Result<Value, &'static str> {
        let disp = instr.memory_displacement64();
        let wide = |register: Register| register == Register::None || register.is_gpr64();
        if !wide(instr.memory_base()) || !wide(instr.memory_index()) {
            let narrow = [instr.memory_base(), instr.memory_index()];
            let mut numbers = narrow.into_iter().filter_map(full);
            return if numbers.all(|number| self.values.clean(register(state, number)) == 8) {
                Ok(self.values.any())
            } else {
                Err("a host address is used as data")
            };
        }
        let base = full(instr.memory_base()).map(|number| register(state, number));
        let index = full(instr.memory_index()).map(|number| register(state, number));
        let once = instr.memory_index_scale() == 1;
        if let (Some(base), Some(index), true) = (base, index, once) {
            for (one, other) in [(base, index), (index, base)] {
                let def = match (self.values.def(one), self.values.def(other)) {
                    (Def::Tag { tags, of }, _) if of == other && disp < 4096 => Def::TagSum {
                        tags,
                        of,
                        last: disp as u32,
                    },
                    (Def::JumpTag(of), _) if of == other && disp == 0 => Def::JumpSum(of),
                    (Def::Turned(of), _) if of == other && disp == 0 => Def::Mixed(of),
                    (Def::SlotTag(slot), Def::Const(address))
                        if disp == 0 && self.layout.jump_slot(address) == slot =>
                    {
                        Def::SlotSum(slot)
                    }
                    _ => continue,
                };
                return Ok(self.values.of(def));
            }
            let reach = self.reach(instr, state);
            // Of several, that which allows most.
            if let Some(&window) = reach.iter().max_by_key(|w| (w.write, w.size))
                && disp == 0
            {
                let number = self.values.number();
                return Ok(self.values.of(Def::Host { window, number }));
            }
        }
        if let (Some(base), None) = (base, index)
            && let Def::Const(number) = self.values.def(base)
        {
            return Ok(self.values.of(Def::Const(number.wrapping_add(disp))));
        }
        let public = [base, index]
            .into_iter()
            .flatten()
            .all(|value| self.values.clean(value) == 8);
        Ok(if public {
            self.values.any()
        } else {
            self.values.secret(0)
        })
    }

    /// Registers that are read other than as an address hold what the guest may learn.
    fn reads(&self, instr: &Instruction, info: &InstructionInfo, state: &State) -> Refused {
        let cleared = matches!(instr.mnemonic(), Mnemonic::Xor | Mnemonic::Sub)
            && instr.op0_kind() == OpKind::Register
            && instr.op1_kind() == OpKind::Register
            && instr.op0_register() == instr.op1_register()
            && instr.op0_register().size() >= 4;
        if cleared && full(instr.op0_register()) != Some(RSP) {
            // The result is zero whatever was there.
            return Ok(());
        }
        let mut written_out = [false; 16];
        for i in 0..instr.op_count() {
            if instr.op_kind(i) != OpKind::Register {
                continue;
            }
            let Some(number) = full(instr.op_register(i)) else {
                continue;
            };
            if number == RSP {
                return Err("the host's stack pointer as data");
            }
            if let Some(flag) = written_out.get_mut(number) {
                *flag = true;
            }
            if !matches!(info.op_access(i), OpAccess::Write | OpAccess::CondWrite) {
                self.public(state, number, last_byte(instr.op_register(i)))?;
            }
        }
        let addresses = [full(instr.memory_base()), full(instr.memory_index())];
        for used in info.used_registers() {
            let Some(number) = full(used.register()) else {
                continue;
            };
            let explicit = written_out.get(number).copied().unwrap_or(true);
            if explicit || addresses.contains(&Some(number)) {
                continue;
            }
            if !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite) {
                self.public(state, number, last_byte(used.register()))?;
            }
        }
        Ok(())
    }

    /// Registers that are written hold new values.
    fn writes(&mut self, info: &InstructionInfo, state: &mut State) -> Refused {
        for used in info.used_registers() {
            let Some(number) = full(used.register()) else {
                continue;
            };
            let partial = match used.access() {
                OpAccess::Write | OpAccess::ReadWrite => used.register().size() < 4,
                OpAccess::CondWrite | OpAccess::ReadCondWrite => true,
                _ => continue,
            };
            if number == RSP {
                return Err("the host's stack pointer is changed");
            }
            let old = self.values.clean(register(state, number));
            let value = if !partial || old == 8 {
                self.values.any()
            } else if matches!(used.access(), OpAccess::Write | OpAccess::ReadWrite)
                && last_byte(used.register()) == used.register().size()
            {
                self.values.secret(old.max(used.register().size() as u8))
            } else {
                self.values.secret(old)
            };
            set(state, number, value);
        }
        Ok(())
    }
}

fn covers(window: &Window, size: u32, write: bool) -> bool {
    size <= window.size && (window.write || !write)
}

/// Number of the general register that `register` is or is a part of.
pub fn full(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}

/// Bytes of the full register up to the last one of this part.
fn last_byte(register: Register) -> usize {
    match register {
        Register::AH | Register::BH | Register::CH | Register::DH => 2,
        other => other.size(),
    }
}

#[allow(clippy::indexing_slicing, reason = "the index is masked")]
pub fn register(state: &State, number: usize) -> Value {
    state.registers[number & 15]
}

#[allow(clippy::indexing_slicing, reason = "the index is masked")]
fn set(state: &mut State, number: usize, value: Value) {
    state.registers[number & 15] = value;
}
