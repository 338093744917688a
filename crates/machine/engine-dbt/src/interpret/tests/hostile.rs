//! A guest can be wrong, never the host: random instructions and events on random state end in a fault or not, but
//! never in a panic, and never outside of the guest's memory (which guard pages would show).

use proptest::prelude::*;

use super::*;

/// Numbers that are near something.
fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..0x100,
        (0u64..0x100).prop_map(u64::wrapping_neg),
        (0u64..16 << 20),
        (0u64..0x40).prop_map(|n| HOLE - 0x20 + n),
        (0u64..0x40).prop_map(|n| 0xffff_ffe0 + n),
        (0u64..0x40).prop_map(|n| (1 << 47) - 0x20 + n),
        (0u64..0x40).prop_map(|n| (u64::MAX << 47) - 0x20 + n),
        (0u32..64).prop_map(|n| 1 << n),
    ]
}

/// Opcode bytes that lead to the interpreter more often than chance would.
fn opcodes() -> impl Strategy<Value = Vec<u8>> {
    let prefixes = prop::collection::vec(
        prop::sample::select(vec![
            0x66u8, 0x67, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65, 0x48, 0x40, 0x4f,
        ]),
        0..3,
    );
    let one = prop::sample::select(vec![
        0x06u8, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0x62, 0x63,
        0x6c, 0x6d, 0x6e, 0x6f, 0x8c, 0x8e, 0x9a, 0x9c, 0x9d, 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab,
        0xac, 0xad, 0xae, 0xaf, 0xc4, 0xc5, 0xc8, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf, 0xd4, 0xd5,
        0xd6, 0xd7, 0xd9, 0xdd, 0xe4, 0xe5, 0xe6, 0xe7, 0xea, 0xec, 0xed, 0xee, 0xef, 0xf1, 0xf4,
        0xfa, 0xfb, 0xfc, 0xfd, 0xff,
    ])
    .prop_map(|b| vec![b]);
    let two = prop::sample::select(vec![
        0x00u8, 0x01, 0x02, 0x03, 0x05, 0x06, 0x07, 0x08, 0x09, 0x20, 0x21, 0x22, 0x23, 0x30, 0x31,
        0x32, 0x33, 0x34, 0x35, 0xa0, 0xa1, 0xa2, 0xa8, 0xa9, 0xae, 0xb2, 0xb4, 0xb5, 0xc7, 0xf7,
    ])
    .prop_map(|b| vec![0x0f, b]);
    let vex = (
        prop::sample::select(vec![
            0x2cu8, 0x2d, 0x2e, 0x2f, 0x8c, 0x8e, 0x90, 0x91, 0x92, 0x93,
        ]),
        any::<u8>(),
    )
        .prop_map(|(opcode, payload)| vec![0xc4, 0xe2, payload & 0xfc | 1, opcode]);
    let tail = prop::collection::vec(any::<u8>(), 12);
    (prefixes, prop_oneof![3 => one, 3 => two, 1 => vex], tail).prop_map(
        |(mut bytes, opcode, tail)| {
            bytes.extend(opcode);
            bytes.extend(tail);
            bytes
        },
    )
}

#[derive(Clone, Debug)]
struct World {
    gpr: Vec<u64>,
    mode: u8,
    seed: u64,
    tables: Vec<u64>,
    limits: Vec<u16>,
    flags: u64,
    registers: Vec<u64>,
}

fn worlds() -> impl Strategy<Value = World> {
    (
        prop::collection::vec(interesting(), 16),
        0u8..6,
        any::<u64>(),
        prop::collection::vec(interesting(), 4),
        prop::collection::vec(any::<u16>(), 3),
        any::<u64>(),
        prop::collection::vec(interesting(), 6),
    )
        .prop_map(
            |(gpr, mode, seed, tables, limits, flags, registers)| World {
                gpr,
                mode,
                seed,
                tables,
                limits,
                flags,
                registers,
            },
        )
}

impl World {
    fn build(&self) -> Machine {
        let mut machine = Machine::new();
        let mut state = self.seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        // Descriptors, gates, TSS and operands at random, but often of a type that means something.
        for i in 0..0x200 {
            let mut value = next();
            if i % 3 != 0 {
                value = value & !(0xff << 40) | (0x80 | next() & 0x7f) << 40;
            }
            machine.put_u64(0x5000 + i * 8, value);
        }
        for i in 0..256 {
            machine.put_u64(DATA + i * 8, next());
            machine.put_u64(STACK - 1024 + i * 8, next() & 0xffff_00ff_ffff);
        }
        match self.mode {
            0 => machine.real(),
            1 => machine.protected(),
            2 => machine.user(USER_CS),
            3 => machine.user(USER_CS32),
            4 => {
                machine.protected();
                machine.user(USER_CS32);
            }
            _ => {}
        }
        let allowed = flags::ARITH | flags::IF | flags::SYSTEM;
        machine
            .cpu
            .set_rflags(self.flags & allowed & if self.mode == 4 { u64::MAX } else { !flags::VM });
        machine.cpu.gpr.copy_from_slice(&self.gpr);
        if self.seed & 3 != 0 {
            machine.cpu.gpr[4] = STACK;
        }
        let cpu = &mut machine.cpu;
        if self.seed & 4 != 0 {
            cpu.gdtr = DescriptorTable {
                base: self.tables[0],
                limit: self.limits[0],
            };
            cpu.idtr = DescriptorTable {
                base: self.tables[1],
                limit: self.limits[1],
            };
            cpu.tr.base = self.tables[2];
            cpu.tr.limit = self.limits[2].into();
            cpu.ldtr = Segment {
                selector: 0x40,
                base: self.tables[3],
                limit: 0xff,
                attributes: 0x82,
            };
        }
        let [a, b, c, d, e, f] = self.registers[..] else {
            unreachable!()
        };
        // WRMSR lets only canonical addresses in.
        let address = |value: u64| (value as i64) << 16 >> 16;
        (cpu.lstar, cpu.sysenter_eip, cpu.kernel_gs_base) =
            (address(a) as u64, address(d) as u64, address(f) as u64);
        (cpu.star, cpu.sysenter_cs, cpu.dr7) = (b, c & 0xffff_ffff, e);
        for (i, register) in cpu.ymm.0.iter_mut().enumerate() {
            *register = [self.gpr[i], a.rotate_left(i as u32), b, c];
        }
        machine
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_instructions_and_events_do_no_harm(
        world in worlds(), code in prop::collection::vec(opcodes(), 1..6), vector in any::<u8>(), error in any::<u32>(),
    ) {
        let mut machine = world.build();
        for bytes in code {
            let bits = machine.cpu.code_bits();
            let rip = machine.cpu.rip;
            let instr = Decoder::with_ip(bits, &bytes, rip, DecoderOptions::NONE).decode();
            if instr.is_invalid() {
                continue;
            }
            let before = (machine.cpu.rip, machine.cpu.rflags(), machine.cpu.segments, machine.cpu.cr0);
            match machine.exec().interpret(&instr) {
                Ok(_) => {}
                Err(fault) => {
                    let after = (machine.cpu.rip, machine.cpu.rflags(), machine.cpu.segments, machine.cpu.cr0);
                    // Comparisons that got part of the way have set flags.
                    if !instr.is_string_instruction() {
                        prop_assert_eq!(after, before, "{:?} {:02x?}", instr.code(), bytes);
                    }
                    let _ = machine.exec().raise(fault);
                }
            }
            prop_assert!(machine.env.divergence.is_none());
        }
        let _ = machine.exec().inject(vector, error & 1 != 0);
        let _ = machine.exec().raise(Fault { vector, error: Some(error), cr2: 0 });
        let saved = machine.exec().save_msrs();
        prop_assert!(machine.exec().restore_msrs(&saved).is_ok());
    }
}
