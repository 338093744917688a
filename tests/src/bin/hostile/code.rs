//! Guest code: bytes at random, and instructions that reach deep into the machine more often than chance would.

use super::rng::Rng;
use super::world;

/// Ports where something is.
pub const PORTS: [(u16, u16); 8] = [
    (0x3f8, 8),
    (0x70, 2),
    (0x60, 5),
    (0x600, 12),
    (0xcf8, 8),
    (0x505, 1),
    (0xf4, 1),
    (0x20, 2),
];

const MSRS: [u32; 30] = [
    0x10,
    0x1b,
    0x3a,
    0x3b,
    0x8b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x1a0,
    0x1d9,
    0x200,
    0x250,
    0x277,
    0x2ff,
    0x6e0,
    0x800,
    0x808,
    0x830,
    0xda0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

/// Opcodes of one byte that are special in some way.
const SPECIAL: [u8; 78] = [
    0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0x62, 0x63, 0x6c,
    0x6d, 0x6e, 0x6f, 0x8c, 0x8e, 0x8f, 0x9a, 0x9b, 0x9c, 0x9d, 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab,
    0xac, 0xad, 0xae, 0xaf, 0xc2, 0xc3, 0xc4, 0xc5, 0xc8, 0xc9, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf,
    0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0xe0, 0xe3, 0xe4, 0xe5,
    0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xeb, 0xec, 0xed, 0xee, 0xef, 0xf1, 0xfa, 0xfb, 0xff,
];

/// Plain ones.
const PLAIN: [u8; 24] = [
    0x00, 0x01, 0x03, 0x13, 0x19, 0x21, 0x29, 0x31, 0x39, 0x50, 0x58, 0x69, 0x81, 0x83, 0x85, 0x86,
    0x87, 0x88, 0x89, 0x8b, 0x8d, 0xc1, 0xd3, 0xf7,
];

const PREFIXES: [u8; 11] = [
    0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65, 0x48, 0x4f,
];

/// A piece of code of about `len` bytes.
pub fn code(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        match rng.below(16) {
            0 => (0..rng.below(24)).for_each(|_| out.push(rng.byte())),
            1..=3 => system(rng, &mut out),
            4 => device(rng, &mut out),
            5 => out.extend([0xeb, rng.byte()]),
            6 => out.extend([0x70 | rng.byte() & 15, rng.byte() & 0x3f]),
            7 => {
                out.push(0xb8 | rng.byte() & 7);
                out.extend((rng.interesting() as u32).to_le_bytes());
            }
            8 => {
                out.extend([0x48, 0xb8 | rng.byte() & 7]);
                out.extend(rng.interesting().to_le_bytes());
            }
            9 => {
                // The next instructions are stored over.
                out.extend([0xc6, 0x05]);
                out.extend((rng.below(64) as u32).to_le_bytes());
                out.push(rng.byte());
            }
            _ => plain(rng, &mut out),
        }
    }
    out
}

/// One instruction with random operands.
fn plain(rng: &mut Rng, out: &mut Vec<u8>) {
    for _ in 0..rng.pick(&[0, 0, 1, 1, 2]) {
        out.push(rng.pick(&PREFIXES));
    }
    match rng.below(10) {
        0..=3 => out.push(rng.pick(&PLAIN)),
        4..=5 => out.push(rng.pick(&SPECIAL)),
        6..=7 => out.extend([0x0f, rng.byte()]),
        8 => out.extend([0x0f, rng.pick(&[0x38, 0x3a]), rng.byte()]),
        _ => out.extend([
            0xc4,
            rng.pick(&[0xe1, 0xe2, 0xe3, 0xc1, 0x62]),
            rng.byte() & 0x7f,
            rng.byte(),
        ]),
    }
    out.push(rng.byte());
    if rng.chance(50) {
        out.extend((rng.interesting() as u32).to_le_bytes());
    }
}

/// `mov r32, value`.
fn load(out: &mut Vec<u8>, register: u8, value: u32) {
    out.push(0xb8 | register);
    out.extend(value.to_le_bytes());
}

/// Something that changes what the machine is.
fn system(rng: &mut Rng, out: &mut Vec<u8>) {
    match rng.below(14) {
        0..=2 => {
            load(out, 1, rng.pick(&MSRS).wrapping_add(rng.pick(&[0, 0, 1])));
            load(out, 0, rng.interesting() as u32);
            load(out, 2, (rng.interesting() >> 32) as u32);
            out.extend([0x0f, rng.pick(&[0x30, 0x30, 0x32])]);
        }
        3..=4 => {
            // A control or debug register.
            load(out, 0, rng.interesting() as u32);
            let register = rng.pick(&[0u8, 2, 3, 4, 8, 7]);
            out.extend([
                0x0f,
                rng.pick(&[0x22, 0x22, 0x20, 0x23, 0x21]),
                0xc0 | (register & 7) << 3,
            ]);
        }
        5 => {
            // CR0 and CR4 with a few bits turned over.
            let register = rng.pick(&[0u8, 4]) << 3;
            out.extend([0x0f, 0x20, 0xc0 | register, 0x35]);
            out.extend((1u32 << rng.below(24) | 1 << rng.below(32)).to_le_bytes());
            out.extend([0x0f, 0x22, 0xc0 | register]);
        }
        6 => out.extend([
            0x0f,
            rng.pick(&[0x00, 0x01]),
            0x05 | (rng.byte() & 7) << 3,
            rng.byte(),
            0,
            0,
            0,
        ]),
        7 => {
            load(out, 0, rng.below(0x100) as u32);
            out.extend([0x0f, 0x00, 0xc0 | rng.byte() & 0x3f & !7]);
        }
        8 => {
            load(out, 0, rng.below(0x100) as u32);
            out.extend([0x8e, 0xc0 | rng.byte() & 0x38]);
        }
        9 => out.extend([0xcd, rng.byte()]),
        10 => out.extend([
            0x0f,
            rng.pick(&[0x05, 0x07, 0x34, 0x35, 0x0b, 0xa2, 0x31, 0x08, 0x09, 0x06]),
        ]),
        11 => out.extend([
            0x0f,
            0x01,
            rng.pick(&[
                0xc1, 0xc8, 0xc9, 0xca, 0xcb, 0xd0, 0xd1, 0xf8, 0xf9, 0xd9, 0xfa,
            ]),
        ]),
        12 => out.extend([0x0f, 0xc7 | (rng.byte() & 1) << 5, rng.byte(), rng.byte()]),
        _ => out.push(rng.pick(&[
            0xf4, 0xfa, 0xfb, 0x9d, 0xcf, 0xcb, 0xc3, 0xcc, 0xf1, 0xfb, 0xfb,
        ])),
    }
}

/// An access to a port or to device memory.
fn device(rng: &mut Rng, out: &mut Vec<u8>) {
    if rng.chance(50) {
        let (base, len) = rng.pick(&PORTS);
        load(out, 2, u32::from(base) + rng.below(u64::from(len)) as u32);
        load(out, 0, rng.interesting() as u32);
        out.push(rng.pick(&[0xec, 0xed, 0xee, 0xef, 0x6c, 0x6e, 0x6d, 0x6f]));
    } else {
        load(out, 3, rng.device() as u32);
        load(out, 0, rng.interesting() as u32);
        match rng.below(6) {
            0 => out.extend([0x8b, 0x03]),
            1 => out.extend([0x89, 0x03]),
            2 => out.extend([0xf0, 0x0f, 0xb1, 0x0b]),
            3 => out.extend([0x0f, 0x11, 0x03]),
            4 => out.extend([0xff, 0x23]),
            _ => {
                load(out, 7, rng.device() as u32);
                load(out, 6, rng.below(world::RAM) as u32);
                load(out, 1, rng.below(0x40) as u32);
                out.extend([0xf3, rng.pick(&[0xa4, 0xa5, 0xaa, 0xab, 0xae, 0xa6])]);
            }
        }
    }
}
