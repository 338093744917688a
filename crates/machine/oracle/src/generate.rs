//! Random cases: a sequence of instructions, and a state in which it does something worth seeing.

mod encode;
mod values;

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};
use strata_engine::x86::CpuModel;
use strata_engine_dbt::table::{FeatureSet, is_hint};

use crate::coverage::Kind;
use crate::exclude;
use crate::layout::{CASE_ROOM, CASE_SHIFT, CODE, DATA, PAGE, TAIL, Template};
use crate::rng::Rng;
use crate::state::State;

use encode::Shape;
pub use values::{fill_page, hot_address};

/// One case before it runs.
#[derive(Clone)]
pub struct Program {
    /// Linear address of the first byte.
    pub start: u64,
    /// 64 or 32.
    pub bits: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The instructions in order.
    pub instructions: Vec<Instruction>,
    /// Where it starts from.
    pub init: State,
}

impl Program {
    /// Linear address behind the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The same case with instruction `n` replaced by NOPs.
    pub fn without(&self, n: usize) -> Program {
        let mut less = self.clone();
        let instr = less.instructions[n];
        let at = (instr.ip() - self.start) as usize;
        less.bytes[at..at + instr.len()].fill(0x90);
        less
    }
}

/// What cases are made from.
pub struct Generator {
    /// By code size.
    sizes: [(u32, Shapes); 2],
    features: FeatureSet,
}

struct Shapes {
    all: Vec<Shape>,
    /// Indices of shapes without vector or x87 operands, so that those get their share.
    plain: Vec<usize>,
    /// Every shape with every kind of operand that it can have, which cases begin with in turn.
    forms: Vec<(usize, Option<Kind>)>,
}

impl Generator {
    /// A generator for everything that `model` has.
    pub fn new(model: &CpuModel) -> Generator {
        let features = FeatureSet::of(model);
        let sizes = [64, 32].map(|bits| {
            let all: Vec<Shape> = valid_codes(&features, bits)
                .filter_map(|code| Shape::of(code, bits))
                .collect();
            let plain = (0..all.len()).filter(|&i| !all[i].vector).collect();
            let forms = all
                .iter()
                .enumerate()
                .flat_map(|(i, shape)| shape.kinds().into_iter().map(move |kind| (i, kind)))
                .collect();
            (bits, Shapes { all, plain, forms })
        });
        Generator { sizes, features }
    }

    fn shapes(&self, bits: u32) -> &Shapes {
        let [(_, wide), (_, narrow)] = &self.sizes;
        if bits == 64 { wide } else { narrow }
    }

    /// What the model has.
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// The codes that are generated, with each kind of operand where that is for the generator to choose.
    pub fn forms(&self, bits: u32) -> impl Iterator<Item = (Code, Option<Kind>)> + '_ {
        let shapes = self.shapes(bits);
        shapes
            .forms
            .iter()
            .map(|&(i, kind)| (shapes.all[i].code, kind))
    }

    /// The forms that cannot be made, however often it is tried. Nothing is run.
    pub fn never_made(&self, rng: &mut Rng, bits: u32) -> Vec<(Code, Option<Kind>)> {
        let shapes = self.shapes(bits);
        let mut never =
            |form: &&_| (0..100).all(|_| self.formed(rng, CODE, bits, **form).is_none());
        let never: Vec<_> = shapes.forms.iter().filter(&mut never).collect();
        never
            .into_iter()
            .map(|&(i, kind)| (shapes.all[i].code, kind))
            .collect()
    }

    /// One case for the room at `room`, see [`crate::layout`]. Its first instruction, which always runs, has the form
    /// whose `turn` it is.
    pub fn program(
        &self,
        rng: &mut Rng,
        room: u64,
        bits: u32,
        turn: u64,
        template: &Template,
    ) -> Program {
        let count = if rng.chance(50) { 1 } else { 1 + rng.below(8) };
        // Now and then across a page end, else anywhere in the first half.
        let base = room + CASE_SHIFT;
        let to_page_end = base.next_multiple_of(PAGE) - base;
        let start = if to_page_end < CASE_ROOM && to_page_end > 0 && rng.chance(70) {
            base + to_page_end - rng.below(to_page_end.min(24)).min(to_page_end)
        } else {
            base + rng.below(CASE_ROOM - 8 * 15 - TAIL as u64 - 1)
        };
        let mut program = Program {
            start,
            bits,
            bytes: Vec::with_capacity(64),
            instructions: Vec::new(),
            init: State::ZERO,
        };
        let limit = (base + CASE_ROOM - start) as usize - TAIL;
        let forms = &self.shapes(bits).forms;
        let mut form = forms.get((turn % forms.len() as u64) as usize).copied();
        for _ in 0..count {
            let ip = program.end();
            let next = form
                .take()
                .and_then(|form| self.formed(rng, ip, bits, form));
            let Some((bytes, instr)) = next.or_else(|| self.instruction(rng, ip, bits)) else {
                continue;
            };
            if program.bytes.len() + bytes.len() > limit {
                break;
            }
            program.bytes.extend_from_slice(&bytes);
            program.instructions.push(instr);
            if instr.is_invalid() || leaves_undefined(&instr) {
                break;
            }
        }
        self.aim_branches(rng, &mut program);
        values::state(rng, &mut program, template);
        program
    }

    /// A case of these bytes from a random state.
    pub fn given(
        &self,
        rng: &mut Rng,
        start: u64,
        bits: u32,
        bytes: &[u8],
        template: &Template,
    ) -> Program {
        let instructions = Decoder::with_ip(bits, bytes, start, DecoderOptions::NONE)
            .into_iter()
            .collect();
        let mut program = Program {
            start,
            bits,
            bytes: bytes.to_vec(),
            instructions,
            init: State::ZERO,
        };
        values::state(rng, &mut program, template);
        program
    }

    /// One instruction of this form at `ip` that may be run natively.
    fn formed(
        &self,
        rng: &mut Rng,
        ip: u64,
        bits: u32,
        (shape, kind): (usize, Option<Kind>),
    ) -> Option<(Vec<u8>, Instruction)> {
        let shape = &self.shapes(bits).all[shape];
        (0..40).find_map(|_| {
            let bytes = shape.bytes(rng, kind);
            self.runnable(rng, ip, bits, bytes).filter(|(_, instr)| {
                instr.code() == shape.code && kind.is_none_or(|kind| Kind::of(instr) == kind)
            })
        })
    }

    /// Any instruction at `ip` that may be run natively, now and then none that a CPU has.
    fn instruction(&self, rng: &mut Rng, ip: u64, bits: u32) -> Option<(Vec<u8>, Instruction)> {
        let shapes = self.shapes(bits);
        (0..20).find_map(|_| {
            let bytes = if rng.chance(4) {
                (0..15).map(|_| rng.byte()).collect()
            } else if rng.chance(45) {
                shapes.all[rng.pick(&shapes.plain)].bytes(rng, None)
            } else {
                shapes.all[rng.below(shapes.all.len() as u64) as usize].bytes(rng, None)
            };
            let instr = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE).decode();
            if instr.is_invalid() {
                return (rng.chance(3) && exclude::invalid(&bytes).is_none())
                    .then_some((bytes, instr));
            }
            self.runnable(rng, ip, bits, bytes)
        })
    }

    /// The valid instruction that `bytes` begin with, its numbers made interesting, if it may be run natively.
    fn runnable(
        &self,
        rng: &mut Rng,
        ip: u64,
        bits: u32,
        mut bytes: Vec<u8>,
    ) -> Option<(Vec<u8>, Instruction)> {
        let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE);
        let instr = decoder.decode();
        if instr.is_invalid() {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&instr);
        bytes.truncate(instr.len());
        encode::tame(rng, bits, &mut bytes, &instr, &offsets);
        let instr = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE).decode();
        (!instr.is_invalid()
            && exclude::instruction(&instr, &bytes).is_none()
            && (self.features.allows(instr.code()) || is_hint(instr.code())))
        .then_some((bytes, instr))
    }

    /// Points direct branches forward to the start of a later instruction, or now and then to nowhere.
    fn aim_branches(&self, rng: &mut Rng, program: &mut Program) {
        let starts: Vec<u64> = program
            .instructions
            .iter()
            .map(Instruction::ip)
            .chain([program.end()])
            .collect();
        for i in 0..program.instructions.len() {
            let instr = program.instructions[i];
            let Some(width) = encode::branch_width(&instr) else {
                continue;
            };
            let later = &starts[i + 1..];
            let target = if width == 4 && rng.chance(3) {
                DATA + PAGE * 100 + rng.below(1 << 20)
            } else {
                rng.pick(later)
            };
            let at = (instr.next_ip() - program.start) as usize;
            let rel = target.wrapping_sub(instr.next_ip());
            program.bytes[at - width..at].copy_from_slice(&rel.to_le_bytes()[..width]);
            let from = (instr.ip() - program.start) as usize;
            program.instructions[i] = Decoder::with_ip(
                program.bits,
                &program.bytes[from..at],
                instr.ip(),
                DecoderOptions::NONE,
            )
            .decode();
        }
    }
}

/// Every code of 64-bit mode that the model has and that is not left out.
pub fn valid_codes(features: &FeatureSet, bits: u32) -> impl Iterator<Item = Code> + '_ {
    Code::values().filter(move |&code| {
        let op = code.op_code();
        op.is_instruction()
            && if bits == 64 {
                op.intel_decoder64()
            } else {
                op.intel_decoder32()
            }
            && !op.fwait()
            && code.mnemonic() != Mnemonic::INVALID
            && (features.allows(code)
                || (is_hint(code) && !code.cpuid_features().contains(&CpuidFeature::MPX)))
            && exclude::code(code).is_none()
    })
}

/// True for what leaves results undefined that the engine does not take from the host: nothing may follow.
pub fn leaves_undefined(instr: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instr.mnemonic(),
        M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Fxsave
            | M::Fxsave64
            | M::Fnstenv
            | M::Fnsave
    )
}
