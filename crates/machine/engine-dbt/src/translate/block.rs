//! The block builder: fetch, decode, treat each instruction, finish.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic,
};

use super::{MAX_INSTRUCTIONS, Mode, Options};
use crate::asm::{Asm, Here};
use crate::code::{BREAKPOINT, CodeMap, FaultPoint, InterpretSite, Key, Link, Next};
use crate::cpu::{Privilege, off};
use crate::raw::Raw;
use crate::stubs::Stubs;
use crate::table::{FeatureSet, RegisterUse, Treatment, treatment};

/// Guest bytes for one block.
#[derive(Clone, Copy, Debug)]
pub struct Fetch<'a> {
    /// Bytes from the block's start to the end of its page, or across it for an instruction that does not fit.
    pub bytes: &'a [u8],
    /// Bytes that lie in the first page.
    pub in_page: usize,
}

/// A finished block, not yet in the cache.
#[derive(Debug)]
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

/// A block that needs bytes of the next page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NeedsNextPage;

/// The bytes of an instruction to run a second copy of, and where in them it may fault.
pub(super) type Copied = (Vec<u8>, Option<(usize, FaultPoint)>);

/// Code that is only reached when something is not as usual, emitted after the block.
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
    pub uses: Vec<RegisterUse>,
    pub info: InstructionInfoFactory,
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
) -> Result<Translated, NeedsNextPage> {
    let mode = Mode(key.mode);
    let limit = if options.reference || mode.is_single() {
        1
    } else {
        MAX_INSTRUCTIONS
    };
    let crossing = fetch.in_page < fetch.bytes.len();
    let mut decoder = Decoder::with_ip(mode.bits(), fetch.bytes, key.rip, DecoderOptions::NONE);
    let first_link = code.next_link();
    let base = code.next_address();
    let mut builder = Builder {
        asm: Asm::new(base),
        mode,
        options,
        key,
        code,
        stubs,
        cold: Vec::new(),
        links: Vec::new(),
        points: Vec::new(),
        uses: Vec::new(),
        info: InstructionInfoFactory::new(),
        index: 0,
        current_rip: key.rip,
        next_rip: key.rip,
        after_store: Next::Known(key.rip),
        masked: None,
        first_link,
    };
    let mut instr = Instruction::default();
    let mut after_sti = false;
    let mut last = limit;
    let end = loop {
        let start = decoder.position();
        if start >= fetch.in_page || usize::from(builder.index) >= last {
            builder.fall_through(after_sti);
            break start;
        }
        if builder.code.breakpoints.contains(&builder.linear(start)) {
            if builder.index > 0 {
                builder.fall_through(after_sti);
                break start;
            }
            instr.set_ip(key.rip);
            builder.interpret(&instr, Some(BREAKPOINT));
            builder.index += 1;
            break start + 1;
        }
        decoder.decode_out(&mut instr);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            if builder.index > 0 {
                builder.fall_through(after_sti);
                break start;
            }
            if !crossing {
                return Err(NeedsNextPage);
            }
        }
        let bytes = fetch.bytes.get(start..decoder.position()).unwrap_or(&[]);
        let offsets = decoder.get_constant_offsets(&instr);
        let raw = Raw::parse(bytes, mode.bits(), &instr, &offsets);
        let mut how = treatment(&instr, features, mode.context());
        if raw.is_none() && how != Treatment::Undefined {
            how = Treatment::Interpret;
        }
        if how == Treatment::PushFlags && mode.is_single() {
            // RF, which breakpoints use, is not pushed.
            how = Treatment::Interpret;
        }
        if how == Treatment::Sti
            && (usize::from(builder.index) + 1 >= last || decoder.position() >= fetch.in_page)
        {
            how = Treatment::Interpret;
        }
        builder.current_rip = instr.ip();
        builder.next_rip = builder.wrap(instr.next_ip());
        builder.after_store = Next::Known(builder.next_rip);
        let goes_on = builder.instruction(&instr, raw, how);
        builder.index += 1;
        if !goes_on || crossing {
            if goes_on {
                builder.fall_through(after_sti);
            }
            break decoder.position();
        }
        if after_sti {
            builder.fall_through(true);
            break decoder.position();
        }
        if builder.next_rip < builder.current_rip {
            // The instruction pointer wrapped, the bytes go on.
            builder.fall_through(false);
            break decoder.position();
        }
        if how == Treatment::Sti {
            after_sti = true;
            last = limit.max(usize::from(builder.index) + 1);
        }
    };
    let instructions = u32::from(builder.index);
    let (code, links, points) = builder.finish();
    Ok(Translated {
        code,
        len: end as u32,
        instructions,
        links,
        points,
    })
}

impl Builder<'_> {
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
    fn instruction(&mut self, instr: &Instruction, raw: Option<Raw>, how: Treatment) -> bool {
        let Some(raw) = raw else {
            return self.interpret(instr, (how == Treatment::Undefined).then_some(6));
        };
        match how {
            Treatment::Nop => true,
            Treatment::Plain if self.options.yields && instr.mnemonic() == Mnemonic::Pause => {
                self.pause(instr, raw)
            }
            Treatment::Plain => self.plain(instr, raw),
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
                self.plain(instr, raw)
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
    fn pause(&mut self, instr: &Instruction, raw: Raw) -> bool {
        use crate::asm::reg::RCX;
        self.asm.load_ctx(RCX, off::PAUSES);
        self.asm.lea(RCX, Some(RCX), None, -1, false);
        self.asm.store_ctx(off::PAUSES, RCX);
        let mut spin = Here(0);
        self.asm.unless_rcx_zero(|asm| spin = asm.jmp_later());
        self.interpret(instr, None);
        self.asm.patch_here(spin);
        self.plain(instr, raw)
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

    fn finish(mut self) -> (Vec<u8>, Vec<Link>, Vec<FaultPoint>) {
        for cold in std::mem::take(&mut self.cold) {
            self.emit_cold(cold);
        }
        (self.asm.code, self.links, self.points)
    }
}
