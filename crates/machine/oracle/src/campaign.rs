//! Batches of cases through both sides, and what is done about a difference.

use std::fmt::Write;

use anyhow::{Context, Result};
use iced_x86::{Code, Instruction, Mnemonic as M, Register, RflagsBits};

use crate::compare::{Tolerance, differences};
use crate::coverage::Coverage;
use crate::generate::{Generator, Program, fill_page, leaves_undefined};
use crate::guest::{Guest, model};
use crate::layout::{BATCH, BATCHES, CASE_ROOM, CASE_SHIFT, CODE, RW_PAGES, TAIL, Template};
use crate::layout::{TRAMPOLINE, TRAMPOLINE_32};
use crate::native::Native;
use crate::rng::Rng;
use crate::state::{DONE, Lines, State, TIMEOUT};

/// Both sides and the generator.
pub struct Campaign {
    seed: u64,
    generator: Generator,
    native: Native,
    guests: Vec<(&'static str, Guest)>,
    read_only: [u8; 4096],
    template: Box<Template>,
    lines: Box<Lines>,
    /// What was exercised.
    pub coverage: Coverage,
    /// Cases run so far.
    pub cases: u64,
    /// Cases that did not end in time, natively.
    pub timeouts: u64,
    /// Runs in the engine whose native side ended in a fault.
    pub faults: u64,
    /// Runs in the engine of which nothing was compared, see [`Tolerance::either`].
    pub tolerated: u64,
}

/// A case that ended differently.
pub struct Difference {
    /// Batch and case that made it.
    pub batch: u64,
    /// Number in the batch.
    pub case: usize,
    /// The smallest form found.
    pub program: Program,
    /// What differs, in words.
    pub text: String,
}

/// Fill of the code region between cases: HLT, which faults in user code.
const FILL: u8 = 0xf4;

impl Campaign {
    /// Starts both sides.
    pub fn new(seed: u64) -> Result<Campaign> {
        let mut read_only = [0; 4096];
        fill_page(&mut Rng::new(seed, u64::MAX), &mut read_only);
        Ok(Campaign {
            seed,
            generator: Generator::new(&model()?),
            native: Native::start(&read_only).context("the native child")?,
            guests: vec![
                ("optimised", Guest::new(false, &read_only)?),
                ("reference", Guest::new(true, &read_only)?),
            ],
            read_only,
            template: Box::new(Template([[0; 4096]; RW_PAGES.len()])),
            lines: Lines::new(),
            coverage: Coverage::default(),
            cases: 0,
            timeouts: 0,
            faults: 0,
            tolerated: 0,
        })
    }

    /// The generator.
    pub fn generator(&self) -> &Generator {
        &self.generator
    }

    /// The cases of a batch.
    pub fn programs(&mut self, batch: u64) -> Vec<Program> {
        let mut rng = Rng::new(self.seed, batch);
        for page in &mut self.template.0 {
            fill_page(&mut rng, page);
        }
        let base = CODE + (batch % BATCHES) * BATCH as u64 * CASE_ROOM;
        // Every fourth batch is 32-bit code.
        let (bits, turn) = if batch % 4 == 3 {
            (32, batch / 4)
        } else {
            (64, batch / 4 * 3 + batch % 4)
        };
        (0..BATCH as u64)
            .map(|i| {
                let turn = turn * BATCH as u64 + i;
                self.generator
                    .program(&mut rng, base + i * CASE_ROOM, bits, turn, &self.template)
            })
            .collect()
    }

    /// Runs a batch; returns what differed.
    pub fn batch(&mut self, batch: u64) -> Result<Vec<Difference>> {
        let programs = self.programs(batch);
        let base = CODE + (batch % BATCHES) * BATCH as u64 * CASE_ROOM + CASE_SHIFT;
        let found = self.run(&programs, base, BATCH as u64 * CASE_ROOM)?;
        for program in &programs {
            self.coverage.add(program);
        }
        self.cases += programs.len() as u64;
        let mut out = Vec::new();
        for (case, text) in found {
            let (program, text) = self.shrink(&programs[case], text, base)?;
            out.push(Difference {
                batch,
                case,
                program,
                text,
            });
        }
        Ok(out)
    }

    /// Runs programs whose code lies in `base..base + size`.
    fn run(&mut self, programs: &[Program], base: u64, size: u64) -> Result<Vec<(usize, String)>> {
        let mut code = vec![FILL; size as usize];
        let shared = self.native.shared();
        shared.count = programs.len() as u32;
        shared.template.clone_from(&self.template);
        for (program, case) in programs.iter().zip(&mut shared.cases) {
            case.init = program.init;
            let at = (program.start - base) as usize;
            code[at..at + program.bytes.len()].copy_from_slice(&program.bytes);
            let tail = at + program.bytes.len();
            let end = if program.bits == 64 {
                TRAMPOLINE
            } else {
                TRAMPOLINE_32
            };
            let jump = end.wrapping_sub(program.end() + TAIL as u64) as u32;
            code[tail] = 0xe9;
            code[tail + 1..tail + TAIL].copy_from_slice(&jump.to_le_bytes());
        }
        self.native.write_code(base, &code);
        if let Err(error) = self.native.run() {
            let running = self.native.shared().running as usize;
            let text = programs.get(running).map_or(String::new(), describe);
            self.native = Native::start(&self.read_only)?;
            return Err(error).context(text);
        }
        let mut found = Vec::new();
        for (name, guest) in &mut self.guests {
            guest.write_code(base, &code)?;
            guest.load(&self.template);
            for (i, program) in programs.iter().enumerate() {
                let case = &mut self.native.shared().cases[i];
                if case.result.vector == TIMEOUT {
                    self.timeouts += 1;
                    continue;
                }
                let end = guest.run(&program.init, &self.template, &mut self.lines);
                let tolerance = tolerance(program, &case.result, &end);
                self.faults += u64::from(case.result.vector != DONE);
                self.tolerated += u64::from(tolerance.either);
                if tolerance.bytes.iter().any(|(from, to)| from != to) {
                    self.lines.forget(&tolerance.bytes, &self.template);
                    case.lines.forget(&tolerance.bytes, &self.template);
                }
                let text = differences(&case.result, &case.lines, &end, &self.lines, tolerance);
                if !text.is_empty() && found.iter().all(|(n, _)| *n != i) {
                    found.push((i, format!(" ({name} configuration)\n{text}")));
                }
            }
        }
        Ok(found)
    }

    /// Runs these instructions, which must not branch, from 1024 random states.
    pub fn bytes(&mut self, bits: u32, bytes: &[u8]) -> Result<Vec<Difference>> {
        let mut out = Vec::new();
        for batch in 0..8 {
            let base = CODE + (batch % BATCHES) * BATCH as u64 * CASE_ROOM;
            let mut rng = Rng::new(self.seed, batch);
            for page in &mut self.template.0 {
                fill_page(&mut rng, page);
            }
            let programs: Vec<Program> = (0..BATCH as u64)
                .map(|i| {
                    let start = base + i * CASE_ROOM + CASE_SHIFT + rng.below(64);
                    self.generator
                        .given(&mut rng, start, bits, bytes, &self.template)
                })
                .collect();
            let found = self.run(&programs, base + CASE_SHIFT, BATCH as u64 * CASE_ROOM)?;
            for (case, text) in found {
                out.push(Difference {
                    batch,
                    case,
                    program: programs[case].clone(),
                    text,
                });
            }
        }
        Ok(out)
    }

    /// Replaces instructions by NOPs as long as something still differs.
    fn shrink(&mut self, program: &Program, text: String, base: u64) -> Result<(Program, String)> {
        let size = BATCH as u64 * CASE_ROOM;
        let mut best = (program.clone(), text);
        for n in 0..program.instructions.len() {
            let less = best.0.without(n);
            if let Some((_, text)) = self.run(std::slice::from_ref(&less), base, size)?.pop() {
                best = (less, text);
            }
        }
        Ok(best)
    }
}

/// What a case leaves to the processor. This list may only shrink.
fn tolerance<'a>(program: &'a Program, end: &'a State, guest: &'a State) -> Tolerance {
    // MXCSR.MM exists on AMD's processors alone, and not in the model.
    let mut out = Tolerance {
        either: end.mxcsr() & 0x2_0000 != 0,
        ..Tolerance::default()
    };
    for instr in program
        .instructions
        .iter()
        .filter(|instr| leaves_undefined(instr))
    {
        let undefined = instr.rflags_undefined();
        for (bit, flag) in [
            (RflagsBits::OF, 0x800),
            (RflagsBits::SF, 0x80),
            (RflagsBits::ZF, 0x40),
            (RflagsBits::AF, 0x10),
            (RflagsBits::CF, 1),
            (RflagsBits::PF, 4),
        ] {
            out.flags |= if undefined & bit != 0 { flag } else { 0 };
        }
    }
    // The address and opcode of the last x87 instruction are the processor's choice, MXCSR_MASK is the model's.
    if let Some(last) = program
        .instructions
        .last()
        .filter(|_| matches!(end.vector, DONE | 1))
    {
        let (first, second) = match last.code() {
            Code::Fxsave_m512byte | Code::Fxsave64_m512byte => ((6, 24), (28, 32)),
            Code::Fnstenv_m14byte | Code::Fnsave_m94byte => ((6, 14), (0, 0)),
            Code::Fnstenv_m28byte | Code::Fnsave_m108byte => ((12, 28), (0, 0)),
            _ => ((0, 0), (0, 0)),
        };
        let at = last
            .virtual_address(0, 0, |register, _, _| Some(named(end, register)))
            .unwrap_or(0);
        let at = if program.bits == 64 {
            at
        } else {
            at & 0xffff_ffff
        };
        out.bytes = [first, second].map(|(from, to)| (at.wrapping_add(from), at.wrapping_add(to)));
    }
    // The fault that came first: cases branch forward only.
    let fault = |state: &'a State| {
        let at = |instr: &&Instruction| state.vector != DONE && instr.ip() == state.rip;
        program.instructions.iter().find(at).map(|i| (i, state))
    };
    let first = [fault(end), fault(guest)]
        .into_iter()
        .flatten()
        .min_by_key(|(instr, _)| instr.ip());
    let Some((last, faulted)) = first else {
        return out;
    };
    match last.mnemonic() {
        // Large areas are touched in no particular order.
        M::Fxrstor
        | M::Fxrstor64
        | M::Frstor
        | M::Fldenv
        | M::Fxsave
        | M::Fxsave64
        | M::Fnsave
        | M::Fnstenv => out.any_fault = true,
        // So are 80-bit numbers, by parts.
        M::Fld | M::Fstp | M::Fbld | M::Fbstp if last.memory_size().size() == 10 => {
            out.any_fault = true
        }
        // So are the two operands of comparisons, and the stack and the target of calls.
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Call | M::Bound => out.any_fault = true,
        // "Exceptions associated with addressing memory may still be signaled" for bytes masked off (SDM vol. 2).
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => out.either = true,
        // So are the lanes of masked moves, at the end of 32-bit offsets.
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            out.any_fault = program.bits == 32;
        }
        // Processors differ on whether what was popped or pushed before a fault stays.
        M::Popa | M::Popad | M::Pusha | M::Pushad => out.either = true,
        // So are the lanes of gathers; and a single-step trap that is due for lanes gathered before a fault comes first
        // on some processors.
        _ if last.is_vsib() => {
            out.any_fault = program.bits == 32;
            out.either |= program.init.rflags & 0x100 != 0;
        }
        _ => {}
    }
    // Which operands of vector and x87 instructions must be aligned when AC is set is the processor's choice.
    out.either |= end.vector == 17 && last.memory_size().size() > 8;
    // AMD's processors want offsets to be canonical before FS or GS base is added, Intel's only linear addresses.
    // Operands of FS or GS across the end of 32-bit offsets do or do not fault, likewise.
    if matches!(last.memory_segment(), Register::FS | Register::GS) {
        let canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
        let size = last.memory_size().size().max(64) as u64 - 1;
        out.either |= (0..last.op_count()).any(|operand| {
            let offset = last.virtual_address(operand, 0, |register, _, _| {
                Some(if register.is_gpr() {
                    named(faulted, register)
                } else {
                    0
                })
            });
            offset.is_some_and(|offset| {
                (program.bits == 32 && (last.is_vsib() || offset > u64::from(u32::MAX) - size))
                    || !canonical(offset)
                    || !canonical(offset.wrapping_add(size))
                    || offset.checked_add(size).is_none()
            })
        });
    }
    out
}

/// Value of an address register, or base of a segment.
fn named(state: &State, register: Register) -> u64 {
    match register {
        Register::FS => state.fs,
        Register::GS => state.gs,
        _ if register.is_gpr() => {
            let unused = 64 - 8 * register.size().clamp(1, 8);
            state.gpr[register.full_register().number() % 16] << unused >> unused
        }
        _ => 0,
    }
}

/// A case in words.
pub fn describe(program: &Program) -> String {
    let mut out = String::new();
    for instr in &program.instructions {
        let at = (instr.ip() - program.start) as usize;
        let len = if instr.is_invalid() { 15 } else { instr.len() };
        let bytes = program
            .bytes
            .get(at..(at + len).min(program.bytes.len()))
            .unwrap_or(&[]);
        if bytes.iter().all(|&b| b == 0x90) {
            continue;
        }
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(out, "  {:#x}: {hex:30} {instr}", instr.ip());
    }
    let s = &program.init;
    let _ = writeln!(out, "  gpr {:x?}", s.gpr);
    let _ = writeln!(
        out,
        "  rip {:#x} rflags {:#x} fs {:#x} gs {:#x} mxcsr {:#x} fcw {:x?} fsw {:x?} ftw {:#x}",
        s.rip,
        s.rflags,
        s.fs,
        s.gs,
        s.mxcsr(),
        &s.fx.0[0..2],
        &s.fx.0[2..4],
        s.fx.0[4]
    );
    out
}
