//! What was exercised: instruction code (which includes operand sizes) × kind of operands; and what cannot be.

use std::collections::{HashMap, HashSet};

use iced_x86::{Code, Instruction, OpKind, Register};
use strata_engine_dbt::table::FeatureSet;

use crate::exclude;
use crate::generate::{Generator, Program};

/// Kinds of operands that are counted apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, Ord, PartialOrd)]
pub enum Kind {
    /// No memory operand.
    Register,
    /// A memory operand by base or index register.
    Memory,
    /// A memory operand by RIP or absolute address.
    Absolute,
    /// A memory operand with FS or GS base.
    Segment,
}

impl Kind {
    /// The kind of an instruction.
    pub fn of(instr: &Instruction) -> Kind {
        let memory = (0..instr.op_count()).any(|i| {
            !matches!(
                instr.op_kind(i),
                OpKind::Register
                    | OpKind::Immediate8
                    | OpKind::Immediate8_2nd
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
                    | OpKind::NearBranch16
                    | OpKind::NearBranch32
                    | OpKind::NearBranch64
            )
        });
        if !memory {
            return Kind::Register;
        }
        if matches!(instr.memory_segment(), Register::FS | Register::GS) {
            return Kind::Segment;
        }
        let registers = [instr.memory_base(), instr.memory_index()];
        let plain = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        if plain && registers.iter().all(|r| *r == Register::None || r.is_ip()) {
            return Kind::Absolute;
        }
        Kind::Memory
    }
}

/// Times each was exercised.
#[derive(Default)]
pub struct Coverage {
    counts: HashMap<(Code, Kind), u64>,
}

/// Fewer times than this is a gap.
pub const ENOUGH: u64 = 1000;

impl Coverage {
    /// Counts the instructions of a case.
    pub fn add(&mut self, program: &Program) {
        for instr in program
            .instructions
            .iter()
            .filter(|instr| !instr.is_invalid())
        {
            *self
                .counts
                .entry((instr.code(), Kind::of(instr)))
                .or_default() += 1;
        }
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Coverage) {
        for (key, count) in &other.counts {
            *self.counts.entry(*key).or_default() += count;
        }
    }

    /// How often this code and kind was exercised.
    pub fn count(&self, code: Code, kind: Kind) -> u64 {
        self.counts.get(&(code, kind)).copied().unwrap_or(0)
    }

    /// Codes and kinds that some case may have and too few had.
    pub fn missing(&self, generator: &Generator) -> Vec<(Code, Kind, u64)> {
        let all = [Kind::Register, Kind::Memory, Kind::Absolute, Kind::Segment];
        let forms: HashSet<_> = generator.forms(64).chain(generator.forms(32)).collect();
        let mut out: Vec<_> = forms
            .into_iter()
            .map(|(code, kind)| {
                let kinds = kind.as_slice();
                let kinds = if kinds.is_empty() { &all[..] } else { kinds };
                let count = kinds.iter().map(|&kind| self.count(code, kind)).sum();
                (code, kind.unwrap_or(Kind::Register), count)
            })
            .filter(|(_, _, count)| *count < ENOUGH)
            .collect();
        out.sort_by_key(|&(code, kind, _)| (code as usize, kind));
        out
    }
}

/// Codes of 64-bit mode that the model has and no case has, with the reason: what `coverage-gaps.txt` lists.
pub fn gaps(features: &FeatureSet) -> Vec<(Code, &'static str)> {
    Code::values()
        .filter(|&code| {
            let op = code.op_code();
            op.is_instruction()
                && (op.intel_decoder64() || op.intel_decoder32())
                && !op.fwait()
                && features.allows(code)
        })
        .filter_map(|code| exclude::code(code).map(|reason| (code, reason)))
        .collect()
}
