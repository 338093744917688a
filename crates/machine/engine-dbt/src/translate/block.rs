//! The block builder: fetch, decode, treat each instruction, finish.

use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic,
};

use super::group::Missed;
use super::{MAX_INSTRUCTIONS, Mode, Options};
use crate::asm::{Asm, Here};
use crate::code::{BREAKPOINT, CodeMap, FaultPoint, InterpretSite, Key, Link, Next};
use crate::cpu::{Privilege, off};
use crate::raw::Raw;
use crate::stubs::Stubs;
use crate::table::{
    Accesses, FeatureSet, OperandUse, RegisterUse, Treatment, memory_use, treatment, uses_vector,
};

/// Guest bytes for one block.
#[derive(Clone, Copy, Debug)]
pub struct Fetch<'a> {
    /// Bytes from the block's start to the end of its page, or across it for an instruction that does not fit.
    pub bytes: &'a [u8],
    /// Bytes that lie in the first page.
    pub in_page: usize,
}

/// A finished block, not yet in the cache.
#[derive(Debug, Default)]
pub struct Translated {
    /// Host code.
    pub code: Vec<u8>,
    /// Guest bytes it was made from.
    pub len: u32,
    /// Guest instructions.
    pub instructions: u32,
    /// Links, offsets relative to the code.
    pub links: Vec<Link>,
    /// Fault points, offsets relative to the code.
    pub points: Vec<FaultPoint>,
}

/// What one translation leaves to the next: memory.
pub struct Workspace {
    decoded: Vec<Decoded>,
    cold: Vec<Cold>,
    uses: Vec<RegisterUse>,
    info: InstructionInfoFactory,
    done: Translated,
}

impl Default for Workspace {
    fn default() -> Self {
        Workspace {
            decoded: Vec::new(),
            cold: Vec::new(),
            uses: Vec::new(),
            info: InstructionInfoFactory::new(),
            done: Translated::default(),
        }
    }
}

impl Workspace {
    /// Takes back a block that is in the cache now.
    pub fn recycle(&mut self, done: Translated) {
        self.done = done;
    }
}

/// An instruction of the block.
#[derive(Clone, Copy)]
pub(super) struct Decoded {
    pub instr: Instruction,
    pub raw: Option<Raw>,
    pub how: Treatment,
    /// What a plain instruction does with its operands.
    pub accesses: Accesses,
    /// What it does with that in memory.
    pub memory: Option<OperandUse>,
    /// It works on vectors or the x87 stack, and may fault by itself.
    pub vector: bool,
    /// Guest bytes up to its end.
    end: usize,
}

/// A block that needs bytes of the next page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NeedsNextPage;

/// The bytes of an instruction to run a second copy of, in the block's code, and where in them it may fault.
pub(super) type Copied = (Range<usize>, Option<(usize, FaultPoint)>);

/// Code that is only reached when something is not as usual, emitted after the block.
#[derive(Clone)]
pub(super) enum Cold {
    /// A memory operand missed the TLB.
    Slow {
        /// rel32 that leads here.
        from: Here,
        /// The site.
        site: u32,
        /// Where to go on.
        back: Here,
        /// For stores: the instruction to run here, its fault point, and then commit.
        op: Option<Copied>,
    },
    /// A direct jump.
    Goto {
        /// rel32 that leads here.
        from: Here,
        /// Target RIP.
        target: u64,
        /// Instructions retired when it is taken.
        retired: u16,
        /// Look at the request word first.
        check: bool,
    },
    /// A group's check failed.
    Group(Missed),
    /// A request is pending at a jump to `target`.
    Request {
        /// rel32 that leads here.
        from: Here,
        /// Where the guest goes on.
        target: u64,
    },
}

/// Bytes of the longest instruction.
const MAX_INSTRUCTION: usize = 15;

pub(super) struct Builder<'a> {
    pub asm: Asm,
    pub mode: Mode,
    pub options: Options,
    pub key: Key,
    pub code: &'a mut CodeMap,
    pub stubs: &'a Stubs,
    pub cold: Vec<Cold>,
    pub links: Vec<Link>,
    pub points: Vec<FaultPoint>,
    pub decoded: Vec<Decoded>,
    pub uses: Vec<RegisterUse>,
    pub info: &'a mut InstructionInfoFactory,
    /// Instructions before the current one.
    pub index: u16,
    /// RIP of the current instruction.
    pub current_rip: u64,
    /// RIP after the current instruction.
    pub next_rip: u64,
    /// Where the guest goes on if a store of the current instruction ends the block.
    pub after_store: Next,
    /// Goes into the next operand's [`crate::code::MemSite::masked`].
    pub masked: Option<u32>,
    first_link: u32,
}

/// Translates the block at `key`.
pub fn translate(
    key: Key,
    fetch: Fetch<'_>,
    code: &mut CodeMap,
    stubs: &Stubs,
    features: &FeatureSet,
    options: Options,
    workspace: &mut Workspace,
) -> Result<Translated, NeedsNextPage> {
    let first_link = code.next_link();
    let base = code.next_address();
    let space = workspace;
    let before = std::mem::take(&mut space.done);
    let mut builder = Builder {
        asm: Asm::reuse(before.code, base),
        mode: Mode(key.mode),
        options,
        key,
        code,
        stubs,
        cold: emptied(&mut space.cold),
        links: cleared(before.links),
        points: cleared(before.points),
        decoded: emptied(&mut space.decoded),
        uses: emptied(&mut space.uses),
        info: &mut space.info,
        index: 0,
        current_rip: key.rip,
        next_rip: key.rip,
        after_store: Next::Known(key.rip),
        masked: None,
        first_link,
    };
    let whole = builder.decode(fetch, features);
    let result = whole.map(|()| builder.emit(fetch));
    let (len, instructions) = (result.unwrap_or(0) as u32, u32::from(builder.index));
    if result.is_ok() {
        builder.emit_rest();
    }
    let done = Translated {
        code: builder.asm.code,
        len,
        instructions,
        links: builder.links,
        points: builder.points,
    };
    (space.decoded, space.cold, space.uses) = (builder.decoded, builder.cold, builder.uses);
    match result {
        Ok(_) => Ok(done),
        Err(needs) => {
            space.recycle(done);
            Err(needs)
        }
    }
}

fn emptied<T>(vec: &mut Vec<T>) -> Vec<T> {
    cleared(std::mem::take(vec))
}

fn cleared<T>(mut vec: Vec<T>) -> Vec<T> {
    vec.clear();
    vec
}

/// True if no block goes on behind an instruction that is treated so.
fn ends(instr: &Instruction, how: Treatment) -> bool {
    use Treatment as T;
    match how {
        T::Call | T::Ret | T::Jump | T::Interpret | T::Undefined | T::NoDevice => true,
        T::System => matches!(
            instr.mnemonic(),
            Mnemonic::Syscall | Mnemonic::Sysretq | Mnemonic::Iretq | Mnemonic::Popfq
        ),
        _ => false,
    }
}

impl Builder<'_> {
    /// Takes the block's instructions apart, as far as it may go.
    fn decode(&mut self, fetch: Fetch<'_>, features: &FeatureSet) -> Result<(), NeedsNextPage> {
        let (mode, rip) = (self.mode, self.key.rip);
        let mut limit = if self.options.reference || mode.is_single() {
            1
        } else {
            MAX_INSTRUCTIONS
        };
        let crossing = fetch.in_page < fetch.bytes.len();
        let mut decoder = Decoder::with_ip(mode.bits(), fetch.bytes, rip, DecoderOptions::NONE);
        let context = mode.context();
        let mut instr = Instruction::default();
        while self.decoded.len() < limit {
            let start = decoder.position();
            if start >= fetch.in_page || self.breakpoint(start) {
                break;
            }
            decoder.decode_out(&mut instr);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                if !self.decoded.is_empty() {
                    break;
                }
                if !crossing {
                    return Err(NeedsNextPage);
                }
            }
            let end = decoder.position();
            let bytes = fetch.bytes.get(start..end).unwrap_or(&[]);
            let offsets = decoder.get_constant_offsets(&instr);
            let raw = Raw::parse(bytes, mode.bits(), &instr, &offsets);
            let mut how = treatment(&instr, features, context);
            if raw.is_none() && how != Treatment::Undefined {
                how = Treatment::Interpret;
            }
            if how == Treatment::PushFlags && mode.is_single() {
                // RF, which breakpoints use, is not pushed.
                how = Treatment::Interpret;
            }
            if how == Treatment::Sti {
                if self.decoded.len() + 1 >= limit || end >= fetch.in_page {
                    how = Treatment::Interpret;
                }
                // One more instruction, then interrupts are looked at.
                limit = limit.min(self.decoded.len() + 2);
            }
            let plain = matches!(how, Treatment::Plain | Treatment::Masked);
            let accesses = if plain {
                Accesses::of(&instr, self.info)
            } else {
                Accesses::NONE
            };
            self.decoded.push(Decoded {
                instr,
                raw,
                how,
                memory: memory_use(&instr, &accesses),
                accesses,
                vector: plain && uses_vector(&instr),
                end,
            });
            // The instruction pointer may wrap, the bytes go on.
            if ends(&instr, how) || crossing || self.wrap(instr.next_ip()) < instr.ip() {
                break;
            }
        }
        // STI holds interrupts off for one more instruction, which is not in this block.
        if self
            .decoded
            .last()
            .is_some_and(|last| last.how == Treatment::Sti)
        {
            match self.decoded.as_mut_slice() {
                [only] => only.how = Treatment::Interpret,
                _ => drop(self.decoded.pop()),
            }
        }
        Ok(())
    }

    /// True if a debugger's breakpoint is at this byte of the block.
    fn breakpoint(&self, offset: usize) -> bool {
        let breakpoints = &self.code.breakpoints;
        !breakpoints.is_empty() && breakpoints.contains(&self.linear(offset))
    }

    /// Sees to what follows from where an instruction is.
    pub(super) fn begin(&mut self, decoded: &Decoded) {
        self.current_rip = decoded.instr.ip();
        self.next_rip = self.wrap(decoded.instr.next_ip());
        self.after_store = Next::Known(self.next_rip);
    }

    /// Emits what was decoded. Returns how many guest bytes that is.
    fn emit(&mut self, fetch: Fetch<'_>) -> usize {
        if self.decoded.is_empty() && self.breakpoint(0) {
            let mut instr = Instruction::default();
            instr.set_ip(self.key.rip);
            self.interpret(&instr, Some(BREAKPOINT));
            self.index = 1;
            return 1.min(fetch.in_page);
        }
        let (mut at, mut end, mut after_sti) = (0, 0, false);
        while let Some(decoded) = self.decoded.get(at).copied() {
            let group = if after_sti { None } else { self.group_at(at) };
            if let Some(group) = group {
                let goes_on = self.emit_group(&group);
                at = group.members.end;
                let last = at.checked_sub(1).and_then(|last| self.decoded.get(last));
                end = last.map_or(end, |last| last.end);
                if !goes_on {
                    return end;
                }
                continue;
            }
            self.begin(&decoded);
            let goes_on = self.instruction(&decoded);
            self.index += 1;
            at += 1;
            end = decoded.end;
            if !goes_on {
                return end;
            }
            after_sti = decoded.how == Treatment::Sti || (after_sti && at == self.decoded.len());
        }
        self.fall_through(after_sti);
        end
    }

    /// Index of the TLB and jump cache in use.
    pub fn privilege(&self) -> usize {
        if self.mode.user() {
            Privilege::User as usize
        } else {
            Privilege::Supervisor as usize
        }
    }

    /// Linear address of a byte of the block.
    fn linear(&self, offset: usize) -> u64 {
        let linear = self.key.rip.wrapping_add(self.key.cs_base);
        let linear = linear.wrapping_add(offset as u64);
        match self.mode.bits() {
            64 => linear,
            _ => linear & 0xffff_ffff,
        }
    }

    /// Truncates an instruction pointer to the code size.
    pub fn wrap(&self, rip: u64) -> u64 {
        match self.mode.bits() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }

    /// Emits one instruction. False if the block ends with it.
    fn instruction(&mut self, decoded: &Decoded) -> bool {
        let (instr, how) = (&decoded.instr, decoded.how);
        let Some(raw) = decoded.raw else {
            return self.interpret(instr, (how == Treatment::Undefined).then_some(6));
        };
        match how {
            Treatment::Nop => true,
            Treatment::Plain if self.options.yields && instr.mnemonic() == Mnemonic::Pause => {
                self.pause(decoded, raw)
            }
            Treatment::Plain => self.plain(decoded, raw),
            // The tracer and the reference look at each lane.
            Treatment::Masked if self.options.trace || self.options.reference => {
                self.interpret(instr, None)
            }
            Treatment::Masked => {
                let site = InterpretSite {
                    instr: *instr,
                    index: self.index,
                    fault: None,
                };
                self.masked = Some(self.code.add_interpret_site(site));
                self.plain(decoded, raw)
            }
            Treatment::BitString => self.bit_string(instr, raw),
            Treatment::Lea => self.lea(instr, raw),
            Treatment::MovOffset => self.mov_offset(instr, raw),
            Treatment::Push => self.push(instr),
            Treatment::Pop => self.pop(instr, raw),
            Treatment::Leave => self.leave(instr),
            Treatment::Call => self.call(instr),
            Treatment::Ret => self.ret(instr),
            Treatment::Jump => self.jump(instr),
            Treatment::JumpIf => self.jump_if(instr, raw),
            Treatment::JumpCount => self.jump_count(instr),
            Treatment::Cli => {
                self.asm.store_ctx_imm(off::INTERRUPTS_ON, 0);
                true
            }
            Treatment::Sti => {
                self.asm.store_ctx_imm(off::INTERRUPTS_ON, 1);
                true
            }
            Treatment::PushFlags => self.push_flags(instr),
            Treatment::System => self.system(instr),
            Treatment::Interpret => self.interpret(instr, None),
            Treatment::Undefined => self.interpret(instr, Some(6)),
            Treatment::NoDevice => self.interpret(instr, Some(7)),
        }
    }

    /// PAUSE where other vCPUs may hold what this one spins for: every so often it is interpreted, which gives way to
    /// other threads of the host.
    fn pause(&mut self, decoded: &Decoded, raw: Raw) -> bool {
        use crate::asm::reg::RCX;
        self.asm.load_ctx(RCX, off::PAUSES);
        self.asm.lea(RCX, Some(RCX), None, -1, false);
        self.asm.store_ctx(off::PAUSES, RCX);
        let mut spin = Here(0);
        self.asm.unless_rcx_zero(|asm| spin = asm.jmp_later());
        self.interpret(&decoded.instr, None);
        self.asm.patch_here(spin);
        self.plain(decoded, raw)
    }

    /// Leaves for the interpreter; the block ends.
    pub fn interpret(&mut self, instr: &Instruction, fault: Option<u8>) -> bool {
        let fault = if instr.code() == Code::INVALID && fault != Some(BREAKPOINT) {
            // What is too long is a general protection fault, whatever it would be.
            Some(if instr.len() >= MAX_INSTRUCTION {
                13
            } else {
                6
            })
        } else {
            fault
        };
        let site = self.code.add_interpret_site(InterpretSite {
            instr: *instr,
            index: self.index,
            fault,
        });
        self.asm.mov_imm(crate::asm::reg::RCX, u64::from(site));
        self.asm.jmp_to(self.stubs.interpret);
        false
    }

    /// Notes that the host instruction emitted next may fault.
    pub fn fault_point(&mut self, rip: u64) -> FaultPoint {
        let point = FaultPoint {
            offset: self.asm.here().0 as u32,
            index: self.index,
            rip,
        };
        self.points.push(point);
        point
    }

    /// Number the next link of this block gets.
    pub fn next_link(&self) -> u32 {
        self.first_link + self.links.len() as u32
    }

    /// Emits what was put off.
    fn emit_rest(&mut self) {
        let mut next = 0;
        while let Some(cold) = self.cold.get(next).cloned() {
            self.emit_cold(cold);
            next += 1;
        }
    }
}
