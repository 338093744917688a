//! The mutation engine: blocks taken apart, changed in one place, and put together again.

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpKind, Register};

use crate::flow::{call_rules, flow_rules, jump_rules, link_rules, system_rules};
use crate::guest::Block;

/// A changed block.
pub struct Mutant {
    pub rule: &'static str,
    pub code: Vec<u8>,
    pub links: Vec<(u32, u32)>,
    pub what: String,
}

/// A block's instructions, which lie one behind the other.
pub struct Parts<'a> {
    pub block: &'a Block,
    pub list: Vec<(usize, Instruction)>,
    pub out: Vec<Mutant>,
}

/// An inline check: numbers of its instructions.
#[derive(Clone, Copy)]
pub struct Check {
    /// `pext r11, r10, [tlb mask]`; the tag's load, the sum, `pext` of the page, `jrcxz`, `jmp` and the delta's load
    /// follow.
    pub first: usize,
    write: bool,
    last: u64,
    /// The instruction whose operand it is for.
    operation: usize,
}

/// Registers that the program does not write: what is put there, stays there.
pub const UNUSED: [Register; 2] = [Register::R13, Register::R15];

const TAG: usize = 1;
const SUM: usize = 2;
const PAGE: usize = 3;
const BRANCH: usize = 4;
const MISS: usize = 5;
pub const DELTA: usize = 6;

fn reads_context(instr: &Instruction) -> bool {
    has_memory(instr) && instr.memory_base() == Register::RSP
}

pub fn has_memory(instr: &Instruction) -> bool {
    instr.mnemonic() != Mnemonic::Lea
        && (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory)
}

fn stores(instr: &Instruction) -> bool {
    instr.op0_kind() == OpKind::Memory
        && !matches!(
            instr.mnemonic(),
            Mnemonic::Cmp
                | Mnemonic::Test
                | Mnemonic::Bt
                | Mnemonic::Jmp
                | Mnemonic::Mul
                | Mnemonic::Fld
        )
}

impl<'a> Parts<'a> {
    pub fn of(block: &'a Block) -> Parts<'a> {
        let mut decoder = Decoder::with_ip(64, &block.code, block.address, DecoderOptions::NONE);
        let mut list = Vec::new();
        while decoder.can_decode() {
            let at = decoder.position();
            list.push((at, decoder.decode()));
        }
        Parts {
            block,
            list,
            out: Vec::new(),
        }
    }

    pub fn instr(&self, n: usize) -> Instruction {
        self.list[n].1
    }

    pub fn checks(&self) -> Vec<Check> {
        let tlb = &self.block.layout.tlb[self.block.privilege];
        let mut checks = Vec::new();
        for (n, (_, instr)) in self.list.iter().enumerate() {
            if instr.mnemonic() != Mnemonic::Pext
                || instr.memory_displacement64() != u64::from(self.block.layout.tlb_mask)
            {
                continue;
            }
            let operation = (n + DELTA + 1..self.list.len()).find(|&n| {
                has_memory(&self.instr(n)) && self.instr(n).memory_base() == Register::R10
            });
            checks.push(Check {
                first: n,
                write: self.instr(n + TAG).memory_displacement64() == u64::from(tlb.write),
                last: self.instr(n + SUM).memory_displacement64(),
                operation: operation.unwrap(),
            });
        }
        checks
    }

    /// Bytes of `instrs` in the place of instruction `n`, if they fit, padded; else behind the block, with jumps there
    /// and back, if a jump fits.
    pub fn replaced(&self, n: usize, instrs: &[Instruction]) -> Option<Vec<u8>> {
        let (at, old) = self.list[n];
        let mut code = self.block.code.clone();
        let encode = |at: usize| {
            let mut bytes = Vec::new();
            for instr in instrs {
                let mut encoder = Encoder::new(64);
                let ip = self.block.address + (at + bytes.len()) as u64;
                encoder.encode(instr, ip).ok()?;
                bytes.extend(encoder.take_buffer());
            }
            Some(bytes)
        };
        let mut bytes = encode(at)?;
        if bytes.len() <= old.len() {
            bytes.resize(old.len(), 0x90);
            code[at..at + bytes.len()].copy_from_slice(&bytes);
            return Some(code);
        }
        if old.len() < 5 {
            return None;
        }
        let there = code.len();
        let tail = encode(there)?;
        let back = (at + old.len()) as i32 - (there + tail.len() + 5) as i32;
        code[at..at + old.len()].fill(0x90);
        code[at] = 0xe9;
        code[at + 1..at + 5].copy_from_slice(&((there - at - 5) as i32).to_le_bytes());
        code.extend(tail);
        code.push(0xe9);
        code.extend(back.to_le_bytes());
        Some(code)
    }

    pub fn add(&mut self, rule: &'static str, n: usize, code: Option<Vec<u8>>) {
        let Some(code) = code else { return };
        if code == self.block.code {
            return;
        }
        let (at, old) = self.list[n];
        let what = format!("{at:#x}: {old}: {:02x?}", &code[at..at + old.len()]);
        self.out.push(Mutant {
            rule,
            code,
            links: self.block.links.clone(),
            what,
        });
    }

    /// Instruction `n` after `change`.
    pub fn change(&mut self, rule: &'static str, n: usize, change: impl FnOnce(&mut Instruction)) {
        let mut instr = self.instr(n);
        change(&mut instr);
        let code = self.replaced(n, &[instr]);
        self.add(rule, n, code);
    }

    pub fn displace(&mut self, rule: &'static str, n: usize, to: u64) {
        self.change(rule, n, |instr| set_displacement(instr, to));
    }

    /// Raw bytes in the place of instruction `n`.
    pub fn bytes(&mut self, rule: &'static str, n: usize, bytes: &[u8]) {
        let (at, old) = self.list[n];
        if bytes.len() > old.len() {
            return;
        }
        let mut code = self.block.code.clone();
        code[at..at + old.len()].fill(0x90);
        code[at..at + bytes.len()].copy_from_slice(bytes);
        self.add(rule, n, Some(code));
    }

    /// Instruction `n`, then `more`.
    pub fn insert(&mut self, rule: &'static str, n: usize, more: &[Instruction]) {
        let mut instrs = vec![self.instr(n)];
        instrs.extend(more);
        let code = self.replaced(n, &instrs);
        self.add(rule, n, code);
    }
}

fn set_displacement(instr: &mut Instruction, to: u64) {
    instr.set_memory_displacement64(to);
    instr.set_memory_displ_size(if to == 0 { 0 } else { 8 });
}

pub fn mov(to: Register, from: Register) -> Instruction {
    Instruction::with2(Code::Mov_r64_rm64, to, from).unwrap()
}

/// Offsets in and around the context that no block may touch at a constant offset.
fn forbidden(block: &Block) -> Vec<u64> {
    let layout = &block.layout;
    let free = |at: u64| {
        let field = layout
            .fields
            .iter()
            .any(|f| at + 8 > u64::from(f.offset) && at < u64::from(f.offset + f.size));
        let masks = [layout.tlb_mask, layout.page_mask, layout.jump_mask];
        let mask = masks
            .iter()
            .any(|&m| at + 8 > m.into() && at < u64::from(m) + 8);
        let jump = layout.jump.iter().any(|jump| {
            let bytes = layout.jump_entries * 8;
            at + 8 > jump.tag.into() && at < u64::from(jump.target) + bytes
        });
        !field && !mask && !jump
    };
    let mut offsets: Vec<u64> = (0..0x400)
        .step_by(4)
        .filter(|&at| free(at))
        .step_by(7)
        .collect();
    offsets.extend(
        layout
            .tlb
            .iter()
            .flat_map(|tlb| [tlb.read, tlb.write, tlb.delta].map(u64::from)),
    );
    offsets.extend([
        0x20_0000,
        0x7fff_0000,
        0u64.wrapping_sub(8),
        0u64.wrapping_sub(0x1000),
    ]);
    offsets
}

/// Instructions that must not stand in any block.
const NEVER: [(&str, &[u8]); 47] = [
    ("syscall", &[0x0f, 0x05]),
    ("sysenter", &[0x0f, 0x34]),
    ("sysret", &[0x48, 0x0f, 0x07]),
    ("int 0x80", &[0xcd, 0x80]),
    ("int3", &[0xcc]),
    ("int1", &[0xf1]),
    ("ud2", &[0x0f, 0x0b]),
    ("hlt", &[0xf4]),
    ("cli", &[0xfa]),
    ("std", &[0xfd]),
    ("in", &[0xec]),
    ("out", &[0xef]),
    ("outsb", &[0x6e]),
    ("rdtsc", &[0x0f, 0x31]),
    ("rdtscp", &[0x0f, 0x01, 0xf9]),
    ("rdpmc", &[0x0f, 0x33]),
    ("cpuid", &[0x0f, 0xa2]),
    ("rdmsr", &[0x0f, 0x32]),
    ("wrmsr", &[0x0f, 0x30]),
    ("wrpkru", &[0x0f, 0x01, 0xef]),
    ("rdpkru", &[0x0f, 0x01, 0xee]),
    ("xgetbv", &[0x0f, 0x01, 0xd0]),
    ("xsetbv", &[0x0f, 0x01, 0xd1]),
    ("vmcall", &[0x0f, 0x01, 0xc1]),
    ("monitor", &[0x0f, 0x01, 0xc8]),
    ("swapgs", &[0x0f, 0x01, 0xf8]),
    ("wrfsbase", &[0xf3, 0x48, 0x0f, 0xae, 0xd0]),
    ("rdgsbase", &[0xf3, 0x48, 0x0f, 0xae, 0xc8]),
    ("xrstor [r10]", &[0x41, 0x0f, 0xae, 0x2a]),
    ("fxrstor [r10]", &[0x41, 0x0f, 0xae, 0x0a]),
    ("fxsave [rsp]", &[0x0f, 0xae, 0x04, 0x24]),
    ("ldmxcsr [rsp]", &[0x0f, 0xae, 0x14, 0x24]),
    ("sgdt [rsp]", &[0x0f, 0x01, 0x04, 0x24]),
    ("str rax", &[0x48, 0x0f, 0x00, 0xc8]),
    ("mov fs, eax", &[0x8e, 0xe0]),
    ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
    ("push rax", &[0x50]),
    ("pop rax", &[0x58]),
    ("popfq", &[0x9d]),
    ("ret", &[0xc3]),
    ("iretq", &[0x48, 0xcf]),
    ("leave", &[0xc9]),
    ("rep movsb", &[0xf3, 0xa4]),
    ("stosq", &[0x48, 0xab]),
    ("xlatb", &[0xd7]),
    ("maskmovdqu", &[0x66, 0x0f, 0xf7, 0xc1]),
    ("call rax", &[0xff, 0xd0]),
];

/// Ways to let go of the context.
const STACK: [(&str, &[u8]); 8] = [
    ("mov rsp, rax", &[0x48, 0x89, 0xc4]),
    ("add rsp, 8", &[0x48, 0x83, 0xc4, 0x08]),
    ("xchg rsp, rax", &[0x48, 0x94]),
    ("lea rsp, [rsp+8]", &[0x48, 0x8d, 0x64, 0x24, 0x08]),
    ("mov spl, al", &[0x40, 0x88, 0xc4]),
    ("mov rax, rsp", &[0x48, 0x89, 0xe0]),
    ("lea rax, [rsp]", &[0x48, 0x8d, 0x04, 0x24]),
    ("add rax, rsp", &[0x48, 0x01, 0xe0]),
];

/// Other names for the same memory.
const ASTRAY: [(&str, &[u8]); 6] = [
    ("mov rax, [rax]", &[0x48, 0x8b, 0x00]),
    ("mov [rdi], rax", &[0x48, 0x89, 0x07]),
    (
        "mov rax, fs:[0]",
        &[0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0],
    ),
    ("mov eax, [rip]", &[0x8b, 0x05, 0, 0, 0, 0]),
    ("mov [0x1000], eax", &[0x89, 0x04, 0x25, 0, 0x10, 0, 0]),
    ("lea rax, [rip]", &[0x48, 0x8d, 0x05, 0, 0, 0, 0]),
];

/// Every mutant of a block.
pub fn mutants(block: &Block) -> Vec<Mutant> {
    let mut parts = Parts::of(block);
    for check in parts.checks() {
        check_rules(&mut parts, check);
    }
    context_rules(&mut parts);
    flow_rules(&mut parts);
    call_rules(&mut parts);
    system_rules(&mut parts);
    jump_rules(&mut parts);
    link_rules(&mut parts);
    // In the place of the last instruction of the way that is usual: whatever comes first is reached.
    for n in 0..parts.list.len().min(24) {
        for (name, bytes) in NEVER.iter().chain(&STACK).chain(&ASTRAY) {
            // One in a few, so that every one of them comes up somewhere.
            if (n * 7 + name.len() + parts.block.code.len()).is_multiple_of(11) {
                let rule = match () {
                    () if STACK.iter().any(|s| s.0 == *name) => "the host's stack pointer",
                    () if ASTRAY.iter().any(|s| s.0 == *name) => "memory without a check",
                    () => "an instruction that may not be there",
                };
                parts.bytes(rule, n, bytes);
            }
        }
    }
    parts.out
}

fn check_rules(parts: &mut Parts<'_>, check: Check) {
    let layout = parts.block.layout.clone();
    let (own, other) = (
        layout.tlb[parts.block.privilege],
        layout.tlb[1 - parts.block.privilege],
    );
    let jump = layout.jump[parts.block.privilege];
    let n = |part: usize| check.first + part;
    // The check is gone: a miss goes on as a hit.
    parts.bytes("no exit on a miss", n(MISS), &[]);
    let (at, _) = parts.list[n(BRANCH)];
    let over = parts.block.code[at + 1];
    parts.bytes("the check always passes", n(BRANCH), &[0xeb, over]);
    // jrcxz tests RCX alone: another condition says nothing.
    parts.bytes("another condition", n(BRANCH), &[0x74, over]);
    parts.bytes("another condition", n(BRANCH), &[0x73, over]);
    // The index: of another address, unbounded, or of another cache.
    for register in [
        Register::RAX,
        Register::R8,
        Register::R9,
        Register::R11,
        Register::RDI,
    ] {
        parts.change("the index of another address", n(0), |i| {
            i.set_op1_register(register)
        });
    }
    for mask in [layout.page_mask, layout.jump_mask, layout.tlb_mask + 4] {
        parts.displace("another mask for the index", n(0), mask.into());
    }
    for register in [Register::RAX, Register::R10, Register::R9] {
        parts.change("another register as index", n(TAG), |i| {
            i.set_memory_index(register)
        });
        parts.change("another register as index", n(DELTA), |i| {
            i.set_memory_index(register)
        });
    }
    for scale in [1, 2, 4] {
        parts.change("another scale", n(TAG), |i| i.set_memory_index_scale(scale));
        parts.change("another scale", n(DELTA), |i| {
            i.set_memory_index_scale(scale)
        });
    }
    // The tag: another array, or another entry.
    let mut arrays = vec![
        own.delta,
        other.read,
        other.write,
        jump.tag,
        own.read + 8,
        own.read - 8,
    ];
    if check.write {
        arrays.push(own.read);
    }
    for array in arrays {
        parts.displace("another tag", n(TAG), array.into());
    }
    // The sum: of another address, or of a part of the operand.
    for register in [Register::RAX, Register::R8, Register::R11, Register::RCX] {
        parts.change("the sum of another address", n(SUM), |i| {
            i.set_memory_index(register)
        });
    }
    for register in [Register::RAX, Register::R11] {
        parts.change("the sum without the tag", n(SUM), |i| {
            i.set_memory_base(register)
        });
    }
    parts.change("another scale", n(SUM), |i| i.set_memory_index_scale(2));
    for shorter in [check.last / 2, check.last.wrapping_sub(1)] {
        if shorter < check.last {
            parts.displace("a check of fewer bytes", n(SUM), shorter);
        }
    }
    parts.displace("a check below the operand", n(SUM), 0u64.wrapping_sub(1));
    parts.displace("a check beyond the page", n(SUM), 4096);
    parts.change("half of the sum", n(SUM), |i| {
        i.set_code(Code::Lea_r32_m);
        i.set_op0_register(Register::ECX);
    });
    // The page number: of something else, or with bits missing.
    for register in [Register::R10, Register::R11, Register::RAX] {
        parts.change("the page of something else", n(PAGE), |i| {
            i.set_op1_register(register)
        });
    }
    for mask in [layout.tlb_mask, layout.jump_mask, layout.page_mask - 4] {
        parts.displace("another mask for the page", n(PAGE), mask.into());
    }
    parts.change("the page into another register", n(PAGE), |i| {
        i.set_op0_register(Register::R9)
    });
    // The delta.
    for array in [
        own.read,
        own.write,
        other.delta,
        own.delta + 8,
        own.delta - 8,
        jump.target,
    ] {
        parts.displace("another delta", n(DELTA), array.into());
    }
    for register in [Register::RAX, Register::RCX, Register::R9] {
        parts.change("the delta into another register", n(DELTA), |i| {
            i.set_op0_register(register)
        });
    }
    parts.change("half of the delta", n(DELTA), |i| {
        i.set_code(Code::Mov_r32_rm32);
        i.set_op0_register(Register::R11D);
    });
    for from in [Register::RAX, Register::R9, Register::R10] {
        let code = parts.replaced(n(DELTA), &[mov(Register::R11, from)]);
        parts.add("the guest's number as delta", n(DELTA), code);
    }
    // What was checked is not what is used.
    let add = |to, from| Instruction::with2(Code::Add_rm64_r64, to, from).unwrap();
    for more in [
        mov(Register::R10, Register::RAX),
        mov(Register::R11, Register::RBX),
        add(Register::R10, Register::RAX),
        add(Register::R11, Register::R8),
        Instruction::with2(Code::Xchg_rm64_r64, Register::R10, Register::RAX).unwrap(),
        Instruction::with1(Code::Inc_rm64, Register::R10).unwrap(),
        Instruction::with1(Code::Setb_rm8, Register::R10L).unwrap(),
        Instruction::with2(Code::Cmovb_r64_rm64, Register::R10, Register::RAX).unwrap(),
    ] {
        parts.insert("redefined between check and use", n(DELTA), &[more]);
    }
    // The host's addresses in the guest's registers.
    for to in UNUSED {
        parts.insert(
            "a host address for the guest",
            n(DELTA),
            &[mov(to, Register::R11)],
        );
    }
    operand_rules(parts, check.operation, check.last + 1, check.write, false);
}

/// The operand itself: `size` bytes were checked. Behind the slow path the index is zero: to leave it out or to store
/// it changes nothing.
pub fn operand_rules(parts: &mut Parts<'_>, n: usize, size: u64, write: bool, slow: bool) {
    let instr = parts.instr(n);
    for register in [Register::RAX, Register::R8, Register::RBX, Register::RCX] {
        parts.change("another base", n, |i| i.set_memory_base(register));
        if instr.memory_index() != Register::None {
            parts.change("another index", n, |i| i.set_memory_index(register));
        }
    }
    if instr.memory_index() != Register::None {
        if !slow {
            parts.change("no index", n, |i| i.set_memory_index(Register::None));
        }
        for scale in [2, 4, 8] {
            parts.change("another scale", n, |i| i.set_memory_index_scale(scale));
        }
        parts.change("the context as base", n, |i| {
            i.set_memory_base(Register::RSP)
        });
    } else {
        parts.change("another index", n, |i| i.set_memory_index(Register::R11));
    }
    // What was checked may be more than this operand: that of a group.
    let (at, own) = (
        instr.memory_displacement64(),
        instr.memory_size().size() as u64,
    );
    let (below, above) = (0u64.wrapping_sub(at + 1), size - at - own + 1);
    for beyond in [size, below, 0x1000, above] {
        parts.displace("beside the operand", n, beyond);
    }
    parts.change("another segment", n, |i| i.set_segment_prefix(Register::FS));
    parts.change("another segment", n, |i| i.set_segment_prefix(Register::GS));
    parts.change("half of the address", n, |i| {
        i.set_memory_base(Register::R10D);
        if i.memory_index() != Register::None {
            i.set_memory_index(Register::R11D);
        }
    });
    let wider = match instr.code() {
        Code::Mov_r8_rm8 | Code::Mov_r32_rm32 | Code::Mov_r16_rm16 | Code::Movzx_r32_rm16 => {
            Some(Code::Mov_r64_rm64)
        }
        Code::Mov_rm8_r8 | Code::Mov_rm32_r32 | Code::Mov_rm16_r16 => Some(Code::Mov_rm64_r64),
        Code::Add_rm32_imm8 => Some(Code::Add_rm64_imm8),
        _ => None,
    };
    if let Some(code) = wider
        && at + 8 > size
    {
        let widen = |i: &mut Instruction| {
            i.set_code(code);
            for op in 0..i.op_count() {
                if i.op_kind(op) == OpKind::Register {
                    i.set_op_register(op, i.op_register(op).full_register());
                }
            }
        };
        parts.change("a wider operand", n, widen);
    }
    let vector = match instr.code() {
        Code::Mov_r64_rm64 => Some(Code::VEX_Vmovdqu_ymm_ymmm256),
        Code::Mov_rm64_r64 => Some(Code::VEX_Vmovdqu_ymmm256_ymm),
        _ => None,
    };
    if let Some(code) = vector
        && at + 32 > size
    {
        let widen = |i: &mut Instruction| {
            i.set_code(code);
            let op = u32::from(i.op0_kind() == OpKind::Memory);
            i.set_op_register(op, Register::YMM1);
        };
        parts.change("a wider operand", n, widen);
    }
    if !write && instr.code() == Code::Mov_r64_rm64 {
        let mut store = Instruction::default();
        store.set_code(Code::Mov_rm64_r64);
        store.set_op0_kind(OpKind::Memory);
        store.set_memory_base(instr.memory_base());
        store.set_memory_index(instr.memory_index());
        store.set_memory_index_scale(instr.memory_index_scale());
        store.set_op1_kind(OpKind::Register);
        store.set_op1_register(instr.op0_register());
        let code = parts.replaced(n, &[store]);
        parts.add("a store where a load was checked", n, code);
        parts.change("a store where a load was checked", n, |i| {
            i.set_code(Code::Xchg_rm64_r64);
            let register = i.op0_register();
            i.set_op0_kind(OpKind::Memory);
            i.set_op1_kind(OpKind::Register);
            i.set_op1_register(register);
        });
    }
    if instr.op1_kind() == OpKind::Register && instr.op0_kind() == OpKind::Memory {
        if instr.op1_register().is_gpr64() {
            let part = if slow || instr.memory_index() == Register::None {
                Register::R10
            } else {
                Register::R11
            };
            for secret in [part, Register::RSP] {
                parts.change("a host address into guest memory", n, |i| {
                    i.set_op1_register(secret)
                });
            }
        }
        if matches!(instr.mnemonic(), Mnemonic::Bts | Mnemonic::Bt) {
            parts.change("a bit of somewhere else", n, |i| {
                let wide = i.op1_register().is_gpr64();
                i.set_op1_register(if wide { Register::RAX } else { Register::EAX });
            });
        }
    }
}

/// Constant offsets in the context.
fn context_rules(parts: &mut Parts<'_>) {
    let forbidden = forbidden(parts.block);
    for n in 0..parts.list.len() {
        let instr = parts.instr(n);
        if !reads_context(&instr)
            || instr.memory_index() != Register::None
            || matches!(instr.mnemonic(), Mnemonic::Pext)
        {
            continue;
        }
        let rule = if stores(&instr) {
            "a store elsewhere in the context"
        } else {
            "a load from elsewhere in the context"
        };
        for &offset in forbidden.iter().skip(n % 5).step_by(5) {
            parts.displace(rule, n, offset);
        }
        for register in [Register::RAX, Register::R10, Register::RCX] {
            parts.change("an index into the context", n, |i| {
                i.set_memory_index(register);
                i.set_memory_index_scale(1);
            });
            parts.change("the guest's number as context", n, |i| {
                i.set_memory_base(register)
            });
        }
        if stores(&instr) {
            let layout = &parts.block.layout;
            let masks = [
                layout.tlb_mask,
                layout.page_mask,
                layout.jump_mask,
                layout.jump[0].tag,
            ];
            for mask in masks {
                parts.displace("a store to a mask or tag", n, mask.into());
            }
        }
    }
}

/// Changes that take nothing away.
pub fn equivalents(block: &Block) -> Vec<Mutant> {
    let mut parts = Parts::of(block);
    let own = block.layout.tlb[block.privilege];
    for check in parts.checks() {
        parts.displace("a check of more bytes", check.first + SUM, check.last + 8);
        parts.bytes("always a miss", check.first + BRANCH, &[]);
        if !check.write {
            parts.displace(
                "a load checked as a store",
                check.first + TAG,
                own.write.into(),
            );
        }
        parts.change("the sum the other way round", check.first + SUM, |i| {
            i.set_memory_base(Register::R10);
            i.set_memory_index(Register::RCX);
        });
    }
    parts.out
}
