//! What the guest starts from: memory full of code, page tables, descriptors and rings, and a CPU in some state.

use strata_engine::x86::{CpuState, DescriptorTable, Segment};
use strata_memory::{Gpa, GuestMemory};

use super::code;
use super::rng::Rng;

/// Bytes of RAM.
pub const RAM: u64 = 16 << 20;
/// Where code lies at first: eight pages.
const CODE: u64 = 0x10_0000;
/// Handlers that go on behind what faulted: `add qword [rsp], 3; iretq`, and one that drops an error code first.
const HANDLERS: u64 = 0x10_8000;
const SKIP: [u8; 27] = [
    0x48, 0x83, 0x04, 0x24, 0x03, 0x48, 0xcf, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
    0x48, 0x83, 0xc4, 0x08, 0x48, 0x83, 0x04, 0x24, 0x03, 0x48, 0xcf,
];
/// Page tables: sixteen.
const TABLES: u64 = 0x20_0000;
/// Descriptor tables and task segments.
const DESCRIPTORS: u64 = 0x30_0000;
/// Queues of devices.
pub const RINGS: u64 = 0x40_0000;
const PAGES: u64 = 16;
const PAGE: u64 = 4096;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;

/// Fills memory.
pub fn fill(rng: &mut Rng, memory: &GuestMemory) {
    for page in 0..8 {
        let bytes = code::code(rng, PAGE as usize);
        put(memory, CODE + page * PAGE, &bytes[..PAGE as usize]);
    }
    // Real mode's low memory: vectors, and code there, too.
    let mut low: Vec<u8> = (0..256u64)
        .flat_map(|_| (rng.below(0x3000) as u32).to_le_bytes())
        .collect();
    low.extend(code::code(rng, 0x3000));
    put(memory, 0, &low[..0x3000]);
    put(memory, HANDLERS, &SKIP);
    tables(rng, memory);
    descriptors(rng, memory);
    for page in 0..PAGES {
        let words: Vec<u8> = (0..512)
            .flat_map(|_| ring_word(rng).to_le_bytes())
            .collect();
        put(memory, RINGS + page * PAGE, &words);
    }
}

fn put(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    // What is not RAM keeps what it has.
    let _ = memory.write(Gpa(at), bytes);
}

/// Half of a descriptor, or ring indices.
fn ring_word(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.interesting(),
        1 => rng.below(RAM),
        // A length, flags and a next descriptor.
        2..=5 => {
            let len = match rng.below(8) {
                0 => rng.next() as u32,
                1 => 0,
                _ => rng.below(0x2000) as u32,
            };
            u64::from(len) | rng.below(8) << 32 | rng.below(20) << 48
        }
        6 => rng.below(16) | rng.below(16) << 16 | rng.below(16) << 32,
        _ => RINGS + rng.below(PAGES * PAGE),
    }
}

/// An identity map of four levels at TABLES, of PAE at TABLES + 8 pages, of 32 bits at + 12; then some of it spoiled.
fn tables(rng: &mut Rng, memory: &GuestMemory) {
    let mut words = vec![0u64; (PAGES * 512) as usize];
    let table = |index: u64| (TABLES + index * PAGE) | PRESENT | WRITE | USER;
    words[0] = table(1);
    words[511] = table(0);
    words[256] = table(1);
    words[512] = table(2);
    words[512 + 3] = table(3);
    words[512 + 511] = table(2);
    for i in 0..512u64 {
        words[1024 + i as usize] = i << 21 | PRESENT | WRITE | USER | LARGE;
        words[1536 + i as usize] = (0xc000_0000 + (i << 21)) | PRESENT | WRITE | USER | LARGE;
        // Pages of 4 KiB for the first 2 MiB.
        words[2048 + i as usize] = i << 12 | PRESENT | WRITE | USER;
    }
    if rng.chance(50) {
        words[1024] = table(4);
    }
    for i in 0..4u64 {
        words[(8 * 512 + i) as usize] = (TABLES + (2 + i / 3) * PAGE) | PRESENT;
    }
    // 32-bit entries in pairs: pages of 4 MiB.
    for i in 0..512u64 {
        let entry = |n: u64| (n << 22 | PRESENT | WRITE | USER | LARGE) & 0xffff_ffff;
        words[(12 * 512 + i) as usize] = entry(2 * i) | entry(2 * i + 1) << 32;
    }
    let spoiled = match rng.below(4) {
        0 => 0,
        1 | 2 => rng.below(16),
        _ => rng.below(2000),
    };
    for _ in 0..spoiled {
        let near = rng.pick(&[512, 2560, PAGES * 512]);
        words[rng.below(near) as usize] = entry(rng);
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(memory, TABLES, &bytes);
}

/// A page-table entry: a loop, a device, a hole, a reserved bit, or something that works.
fn entry(rng: &mut Rng) -> u64 {
    let address = match rng.below(8) {
        0..=2 => TABLES + rng.below(PAGES) * PAGE,
        3 => rng.device() & !0xfff,
        4 => rng.below(RAM) & !0xfff,
        5 => CODE + rng.below(8) * PAGE,
        6 => rng.next() & 0x000f_ffff_ffff_f000,
        _ => rng.interesting() & !0xfff,
    };
    let mut flags = rng.next() & 0xfff;
    if rng.chance(85) {
        flags |= PRESENT;
    }
    if rng.chance(60) {
        flags |= WRITE | USER;
    }
    if rng.chance(70) {
        flags &= !LARGE;
    }
    if rng.chance(10) {
        flags |= 1 << (52 + rng.below(12));
    }
    address | flags
}

/// Descriptors of all kinds: first eight that mean something, then others; an IDT behind them, then task segments.
fn descriptors(rng: &mut Rng, memory: &GuestMemory) {
    let mut words = vec![
        0u64,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x0000_8900_0000_ffff | (DESCRIPTORS + 0x2000) << 16,
        0,
    ];
    while words.len() < 512 {
        let mut word = rng.next();
        if rng.chance(70) {
            word = word & !(0xff << 40) | (0x80 | rng.next() & 0x7f) << 40;
        }
        if rng.chance(50) {
            // A base or an offset in RAM.
            word &= 0x00ff_ff00_0000_ffff;
            word |= rng.below(RAM) << 16;
        }
        words.push(word);
    }
    // Gates: two words each, mostly to code.
    for vector in 0..256u64 {
        let with_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let tame = rng.chance(80);
        let to = match tame {
            true => HANDLERS + u64::from(with_error) * 16,
            false => CODE + rng.below(8 * PAGE),
        };
        let selector = match rng.below(10) {
            _ if tame => 8,
            0 => rng.next() & 0xffff,
            _ => rng.pick(&[8, 0x18, 0x28 | 3, 8, 8]),
        };
        let kind = match rng.below(10) {
            _ if tame => 0xee,
            0 => rng.next() & 0xff,
            1 => 0xee,
            2 => 0x8f,
            3 => 0x85,
            _ => 0x8e,
        };
        let ist = if !tame && rng.chance(10) {
            rng.below(8)
        } else {
            0
        };
        words.push(
            to & 0xffff | selector << 16 | ist << 32 | kind << 40 | (to >> 16 & 0xffff) << 48,
        );
        words.push(if !tame && rng.chance(5) {
            rng.next()
        } else {
            0
        });
    }
    while words.len() < (PAGES * 256) as usize {
        words.push(match rng.below(4) {
            0 => rng.interesting(),
            _ => CODE + rng.below(RAM - CODE),
        });
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(memory, DESCRIPTORS, &bytes);
}

/// The address that the low 48 bits stand for: no other gets into a base register.
fn canonical(address: u64) -> u64 {
    ((address as i64) << 16 >> 16) as u64
}

fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> Segment {
    Segment {
        selector,
        base,
        limit,
        attributes,
    }
}

/// A CPU in some mode, with `wild` of its values replaced.
pub fn state(rng: &mut Rng, reset: &CpuState, wild: u64) -> CpuState {
    let mut state = reset.clone();
    state.gpr.iter_mut().for_each(|r| *r = rng.interesting());
    state.gpr[4] = 0x50_0000 + rng.below(0x1000) * 8;
    state.rip = CODE + rng.below(8 * PAGE);
    state.rflags = 2 | rng.next() & 0xad5;
    if rng.chance(20) {
        state.rflags |= rng.pick(&[0x100, 0x4_0000, 0x4000, 0x3000, 0x40000]);
    }
    let (code, data, long) = (0xc09b, 0xc093, 0xa09b);
    let flat = |selector, attributes| segment(selector, 0, u32::MAX, attributes);
    let paged = 0x8001_0033;
    let features = 0x6a0 | rng.pick(&[0, 0, 4, 0x4_0000, 0x4_0000, 0x5_0000, 0x6_0800, 0x14_0000]);
    let (cs, ss) = match rng.below(8) {
        // Real mode.
        0 => {
            state.cr0 = 0x10;
            state.rip = rng.below(0x3000);
            state.gpr[4] = 0x8000;
            (segment(0, 0, 0xffff, 0x9b), segment(0, 0, 0xffff, 0x93))
        }
        // Protected mode without paging, with 4 MiB pages, with PAE; code of 32 or 16 bits.
        1..=3 => {
            let kind = rng.below(3);
            state.cr0 = if kind == 0 { 0x33 } else { paged };
            state.cr3 = TABLES + if kind == 2 { 8 } else { 12 } * PAGE;
            state.cr4 = if kind == 2 {
                features
            } else {
                features & !0x20 | 0x10
            };
            let code = if rng.chance(25) { 0x809b } else { code };
            (flat(0x18, code), flat(0x10, data))
        }
        // Compatibility mode, user or not.
        4 => {
            (state.cr0, state.cr3, state.cr4, state.efer) = (paged, TABLES, features, 0xd01);
            (flat(0x30 | 3, code | 0x60), flat(0x20 | 3, data | 0x60))
        }
        // 64-bit user code.
        5 => {
            (state.cr0, state.cr3, state.cr4, state.efer) = (paged, TABLES, features, 0xd01);
            (flat(0x28 | 3, long | 0x60), flat(0x20 | 3, data | 0x60))
        }
        _ => {
            (state.cr0, state.cr3, state.cr4, state.efer) = (paged, TABLES, features, 0xd01);
            (flat(8, long), flat(0x10, data))
        }
    };
    state.segments = [ss, cs, ss, ss, ss, ss];
    for i in [4, 5] {
        state.segments[i].base = canonical(rng.interesting());
    }
    state.gdtr = DescriptorTable {
        base: DESCRIPTORS,
        limit: 0xfff,
    };
    state.idtr = DescriptorTable {
        base: DESCRIPTORS + 0x1000,
        limit: 0xfff,
    };
    state.tr = segment(0x38, DESCRIPTORS + 0x2000, 0xffff, 0x8b);
    state.ldtr = segment(0x48, DESCRIPTORS + 0x800, 0x7ff, 0x82);
    state.xcr0 = rng.pick(&[7, 7, 3, 1]);
    if let Some(byte) = state.xsave.bytes.get_mut(24) {
        *byte = rng.byte() | 0x80;
    }
    for byte in state.xsave.bytes.iter_mut().skip(160) {
        *byte = rng.byte();
    }
    for _ in 0..wild {
        spoil(rng, &mut state);
    }
    state
}

/// Replaces one value.
fn spoil(rng: &mut Rng, state: &mut CpuState) {
    let value = rng.interesting();
    match rng.below(24) {
        0 => state.rip = value,
        1 => state.rflags = value | 2,
        2 => state.cr0 ^= 1 << rng.below(32),
        3 => state.cr3 = value,
        4 => state.cr4 ^= 1 << rng.below(24),
        5 => state.efer ^= 1 << rng.pick(&[0, 8, 10, 11]),
        6 => state.xcr0 = value,
        7 => state.dr[rng.below(4) as usize] = value,
        8 => state.dr7 = value,
        9 => state.gdtr.base = value,
        10 => state.idtr.base = value,
        11 => state.gdtr.limit = value as u16,
        12 => state.idtr.limit = value as u16,
        13 => state.tr.base = value,
        14 => state.ldtr.base = value,
        15 => state.cr8 = value,
        16 => state.interrupt_shadow = true,
        17 => state.tsc_offset = value,
        18 => state.gpr[4] = value,
        19 => {
            let count = state.msrs.len() as u64;
            if let Some(msr) = state.msrs.get_mut(rng.below(count) as usize) {
                msr.value = value;
            }
        }
        20 => {
            if let Some(apic) = &mut state.apic {
                let count = apic.registers.len() as u64;
                if let Some(register) = apic.registers.get_mut(rng.below(count) as usize) {
                    *register = value as u32;
                }
            }
        }
        _ => {
            let segment = &mut state.segments[rng.below(6) as usize];
            match rng.below(4) {
                0 => segment.base = canonical(value),
                1 => segment.limit = value as u32,
                2 => segment.attributes ^= 1 << rng.below(16),
                _ => segment.selector = value as u16,
            }
        }
    }
}
