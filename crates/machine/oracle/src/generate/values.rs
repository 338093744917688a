//! Register and memory contents: numbers at the edges, and pointers that make operands hit what matters.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::Program;
use crate::layout::{CODE, CODE_SIZE, DATA, HIGH, PAGE, RW_PAGES, Template, USER_CS, USER_CS_32};
use crate::rng::Rng;
use crate::state::State;

/// A number that tends to be at an edge.
fn number(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => 0,
        1 => rng.below(16),
        2 => !rng.below(16),
        3 => 1 << rng.below(64),
        4 => (1u64 << rng.below(64)).wrapping_sub(1),
        5 => rng.pick(&[
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            i64::MAX as u64,
        ]),
        6 => rng.bits() & 0xffff_ffff,
        7 => hot_address(rng, 64),
        _ => rng.bits(),
    }
}

fn float32(rng: &mut Rng) -> u32 {
    match rng.below(8) {
        0 => rng.pick(&[
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_0000,
        ]),
        1 => rng.pick(&[
            0x7fa0_0001,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x4f00_0000,
            0xcf00_0000,
            0x3f00_0000,
        ]),
        2 => rng.bits() as u32 & 0x807f_ffff,
        3 => (rng.below(200) as f32 - 100.0).to_bits(),
        4 => (rng.bits() as f32).to_bits(),
        5 => ((rng.below(2000) as f32 - 1000.0) / 4.0).to_bits(),
        _ => rng.bits() as u32,
    }
}

fn float64(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.pick(&[
            0,
            1 << 63,
            1f64.to_bits(),
            (-1f64).to_bits(),
            f64::INFINITY.to_bits(),
            0xfff8 << 48,
        ]),
        1 => rng.pick(&[
            0x7ff4_0000_0000_0001,
            1,
            (1 << 52) - 1,
            1 << 52,
            f64::MAX.to_bits(),
            0x43e0_0000_0000_0000,
        ]),
        2 => rng.bits() & 0x800f_ffff_ffff_ffff,
        3 => (rng.below(200) as f64 - 100.0).to_bits(),
        4 => (rng.bits() as f64).to_bits(),
        5 => f64::from(f32::from_bits(float32(rng))).to_bits(),
        _ => rng.bits(),
    }
}

/// Mantissa, sign and exponent of an 80-bit number.
fn float80(rng: &mut Rng) -> (u64, u16) {
    let sign = (rng.byte() as u16 & 1) << 15;
    let one = 1u64 << 63;
    let (mantissa, exponent) = match rng.below(10) {
        0 => (0, 0),
        1 => (one, 0x3fff),
        2 => (one, 0x7fff),
        3 => (one | 1 << 62 | rng.bits() >> 3, 0x7fff),
        4 => (one | rng.bits() >> 3, 0x7fff),
        5 => (rng.bits() >> 1, 0),
        6 => (rng.bits(), rng.bits() as u16 & 0x7fff),
        _ => (one | rng.bits(), 0x3fff + rng.below(140) as u16 - 70),
    };
    (mantissa, sign | exponent)
}

/// Fills memory with numbers of all kinds.
pub fn fill_page(rng: &mut Rng, page: &mut [u8; 4096]) {
    for chunk in page.chunks_exact_mut(16) {
        let (a, b) = match rng.below(6) {
            0 => (number(rng), number(rng)),
            1 => (float64(rng), float64(rng)),
            2 => {
                let mut pair = || u64::from(float32(rng)) | u64::from(float32(rng)) << 32;
                (pair(), pair())
            }
            3 => {
                let (mantissa, top) = float80(rng);
                (mantissa, u64::from(top) | rng.bits() << 16)
            }
            4 => (rng.below(64) << 32 | rng.below(64), rng.below(1 << 40)),
            _ => (rng.bits(), rng.bits()),
        };
        chunk[..8].copy_from_slice(&a.to_le_bytes());
        chunk[8..].copy_from_slice(&b.to_le_bytes());
    }
}

/// An address worth accessing.
pub fn hot_address(rng: &mut Rng, bits: u32) -> u64 {
    let address = anywhere(rng);
    if bits == 64 || address <= u64::from(u32::MAX) {
        return address;
    }
    // The high page and the edges of canonical addresses mean nothing to 32-bit code; the top of its own space does.
    if rng.chance(20) {
        u64::from(u32::MAX) - rng.below(70)
    } else {
        DATA + (address & 0xfff)
    }
}

fn anywhere(rng: &mut Rng) -> u64 {
    // Offsets: mostly aligned and not at the edge.
    let inside = |rng: &mut Rng| match rng.below(8) {
        0 => 1024 + rng.below(1024),
        1..=2 => 1024 + rng.below(64) * 16,
        _ => 1024 + rng.below(16) * 64,
    };
    let edge = |rng: &mut Rng| PAGE - 1 - rng.below(36);
    match rng.below(100) {
        0..=51 => DATA + inside(rng),
        52..=63 => DATA + PAGE + inside(rng),
        64..=71 => DATA + edge(rng),
        72..=75 => DATA + PAGE + edge(rng),
        76..=77 => DATA + 2 * PAGE + inside(rng),
        78..=79 => DATA + 2 * PAGE + edge(rng),
        80..=83 => DATA + 3 * PAGE + inside(rng),
        84 => DATA + 3 * PAGE + edge(rng),
        85..=88 => DATA + 4 * PAGE + inside(rng),
        89..=93 => HIGH + inside(rng),
        94 => HIGH + edge(rng),
        95 => 0x7fff_ffff_ffff - rng.below(40),
        96 => 0x8000_0000_0000 + rng.below(64),
        97 => rng.pick(&[
            0x8000_0000_0000,
            0xffff_7fff_ffff_fff8,
            0x1234_5678_9abc_def0,
            0xffff_8000_0000_0000,
        ]),
        98 => rng.below(40).wrapping_neg(),
        // Code nobody runs: what other cases left behind may be cut anywhere when it is jumped to.
        _ => CODE + CODE_SIZE - PAGE + 64 * rng.below(16),
    }
}

/// What the template holds at `address`, if that is a writable page.
fn memory_at(template: &Template, address: u64) -> Option<u64> {
    let page = RW_PAGES.iter().position(|&page| page == address & !0xfff)?;
    let offset = (address & 0xfff) as usize;
    let bytes = template.0[page].get(offset..offset + 8)?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Values for all registers, so that the instructions of `program` find good operands.
pub fn state(rng: &mut Rng, program: &mut Program, template: &Template) {
    let mut init = State::ZERO;
    init.rip = program.start;
    for register in &mut init.gpr {
        *register = number(rng);
    }
    init.gpr[4] = if rng.chance(85) {
        DATA + 4 * PAGE + 2048 + rng.below(32) * 8
    } else {
        hot_address(rng, program.bits)
    };
    init.fs = if rng.chance(50) {
        rng.below(64) * 8
    } else {
        DATA + rng.below(64) * 64
    };
    init.gs = if rng.chance(50) {
        HIGH + rng.below(64) * 64
    } else {
        rng.below(64).wrapping_neg()
    };
    flags(rng, &mut init);
    vectors(rng, &mut init);
    x87(rng, &mut init);
    init.cs = u64::from(if program.bits == 64 {
        USER_CS
    } else {
        USER_CS_32
    });
    if program.bits == 32 {
        for register in &mut init.gpr[..8] {
            *register &= 0xffff_ffff;
        }
        for base in [&mut init.fs, &mut init.gs] {
            *base &= 0xffff_ffff;
        }
    }
    let mut fixed = 1u16 << 4;
    for instr in &program.instructions {
        operands(rng, program.bits, instr, &mut init, &mut fixed, template);
    }
    program.init = init;
}

fn flags(rng: &mut Rng, init: &mut State) {
    init.rflags = 0x202 | rng.bits() & 0x8d5;
    for (percent, bit) in [(12, 10), (2, 8), (2, 14), (2, 18), (5, 21)] {
        if rng.chance(percent) {
            init.rflags |= 1 << bit;
        }
    }
}

fn vectors(rng: &mut Rng, init: &mut State) {
    for ymm in &mut init.ymm {
        let kind = rng.below(5);
        for word in ymm {
            *word = match kind {
                0 => number(rng),
                1 => u64::from(float32(rng)) | u64::from(float32(rng)) << 32,
                2 => float64(rng),
                3 => rng.below(48) << 32 | rng.below(48),
                _ => rng.bits(),
            };
        }
    }
    let mut mxcsr = 0x1f80 | (rng.bits() as u32 & 0x3f);
    if rng.chance(30) {
        mxcsr |= rng.bits() as u32 & 0xe040;
    }
    if rng.chance(10) {
        mxcsr &= !(rng.bits() as u32 & 0x1f80);
    }
    init.set_mxcsr(mxcsr);
}

fn x87(rng: &mut Rng, init: &mut State) {
    let mut control = 0x37fu16;
    if rng.chance(30) {
        control = control & 0xff | (rng.bits() as u16 & 0xf00);
    }
    if rng.chance(15) {
        control &= !(rng.bits() as u16 & 0x3f);
    }
    let mut status = (rng.bits() as u16) & 0x7f00 & !0x8000;
    if rng.chance(20) {
        status |= rng.bits() as u16 & 0x7f;
        // With pending exceptions most x87 code does nothing but fault.
        if rng.chance(70) {
            control |= 0x3f;
        }
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    let tags = match rng.below(4) {
        0 => 0xff,
        1 => 0,
        _ => rng.byte(),
    };
    let fx = &mut init.fx.0;
    fx[0..2].copy_from_slice(&control.to_le_bytes());
    fx[2..4].copy_from_slice(&status.to_le_bytes());
    fx[4] = tags;
    for i in 0..8 {
        let (mantissa, top) = float80(rng);
        fx[32 + i * 16..40 + i * 16].copy_from_slice(&mantissa.to_le_bytes());
        fx[40 + i * 16..42 + i * 16].copy_from_slice(&top.to_le_bytes());
    }
}

fn general(register: Register) -> Option<usize> {
    register.is_gpr().then(|| match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            register as usize - Register::AH as usize
        }
        _ => register.full_register().number(),
    })
}

/// Chooses values of the registers that `instr` addresses with or depends on, where no earlier instruction did.
fn operands(
    rng: &mut Rng,
    bits: u32,
    instr: &Instruction,
    init: &mut State,
    fixed: &mut u16,
    template: &Template,
) {
    let mut set = |init: &mut State, register: usize, value: u64| {
        if *fixed & (1 << register) == 0 {
            init.gpr[register] = if bits == 64 {
                value
            } else {
                value & 0xffff_ffff
            };
            *fixed |= 1 << register;
            true
        } else {
            false
        }
    };
    let mut target = None;
    if (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory) {
        let base = general(instr.memory_base());
        let index = general(instr.memory_index());
        let segment = match instr.memory_segment() {
            Register::FS => init.fs,
            Register::GS => init.gs,
            _ => 0,
        };
        let aim = hot_address(rng, bits);
        if let Some(index) = index
            && Some(index) != base
            && base.is_some()
        {
            set(init, index, rng.below(24).wrapping_sub(4));
        }
        if instr.is_vsib() {
            let register = instr.memory_index().number();
            let wide = instr.is_vsib64();
            for word in &mut init.ymm[register % 16] {
                *word = if wide {
                    rng.below(64)
                } else {
                    rng.below(64) << 32 | rng.below(64)
                };
            }
        }
        let scaled = |init: &State| {
            index.map_or(0, |index| {
                init.gpr[index].wrapping_mul(u64::from(instr.memory_index_scale()))
            })
        };
        if let Some(base) = base {
            let value = aim
                .wrapping_sub(segment)
                .wrapping_sub(instr.memory_displacement64())
                .wrapping_sub(scaled(init));
            if set(init, base, value) {
                target = Some(aim);
            }
        } else if let Some(index) = index {
            let scale = u64::from(instr.memory_index_scale());
            let aim = aim
                .wrapping_sub(segment)
                .wrapping_sub(instr.memory_displacement64());
            set(init, index, aim / scale);
        } else {
            target = Some(instr.memory_displacement64().wrapping_add(segment));
        }
    }
    let chance = rng.chance(70);
    match instr.mnemonic() {
        M::Bt | M::Bts | M::Btr | M::Btc if instr.op0_kind() == OpKind::Memory => {
            if let Some(register) = general(instr.op1_register()).filter(|_| chance) {
                set(init, register, rng.below(1024).wrapping_sub(512));
            }
        }
        M::Div | M::Idiv if chance => {
            let negative = instr.mnemonic() == M::Idiv && rng.chance(50);
            set(init, 2, if negative { u64::MAX } else { 0 });
            if instr.op0_register().size() == 1 || instr.memory_size().size() == 1 {
                let value = rng.below(2000);
                set(init, 0, value);
            }
        }
        M::Cmpxchg if chance => {
            let equal = match (instr.op0_kind(), target) {
                (OpKind::Register, _) => general(instr.op0_register()).map(|r| init.gpr[r]),
                (_, Some(target)) => memory_at(template, target),
                _ => None,
            };
            if let Some(equal) = equal {
                set(init, 0, equal);
            }
        }
        M::Cmpxchg8b | M::Cmpxchg16b if chance => {
            if let Some(target) = target
                && let (Some(low), Some(high)) = (
                    memory_at(template, target),
                    memory_at(template, target.wrapping_add(8)),
                )
            {
                if instr.mnemonic() == M::Cmpxchg8b {
                    set(init, 0, low);
                    set(init, 2, low >> 32);
                } else {
                    set(init, 0, low);
                    set(init, 2, high);
                }
            }
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz if chance => {
            let upper = rng.bits() << 32;
            let value = rng.below(3) | if rng.chance(30) { upper } else { 0 };
            set(init, 1, value);
        }
        M::Leave | M::Enter => {
            let value = if chance {
                DATA + PAGE + 1024 + rng.below(32) * 8
            } else {
                hot_address(rng, bits)
            };
            set(init, 5, value);
        }
        M::Xlatb => {
            let value = hot_address(rng, bits);
            set(init, 3, value);
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            let value = hot_address(rng, bits);
            set(init, 7, value);
        }
        _ => {}
    }
    if instr.is_string_instruction() {
        let (a, b) = (hot_address(rng, bits), hot_address(rng, bits));
        set(init, 6, a);
        set(init, 7, b);
        let count = if rng.chance(95) {
            rng.below(40)
        } else {
            rng.below(3000)
        };
        set(init, 1, count);
        if rng.chance(30) {
            set(init, 0, memory_at(template, b).unwrap_or(0));
        }
    }
}
