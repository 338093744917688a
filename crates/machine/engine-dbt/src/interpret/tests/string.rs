//! String instructions against a model that moves one byte array element after element.

use proptest::prelude::*;

use super::super::Next;
use super::super::string::compare_flags;
use super::{DATA, HOLE, Machine};
use crate::cpu::flags;
use crate::env::Fault;

/// Bytes of memory that the model covers, from [`DATA`] on.
const LEN: usize = 3 * 4096;

#[derive(Clone, Copy, Debug)]
struct Case {
    /// 0 MOVS, 1 STOS, 2 LODS, 3 CMPS, 4 SCAS.
    operation: u8,
    /// None, F3, F2.
    prefix: u8,
    log_size: u32,
    down: bool,
    wide_address: bool,
    source: usize,
    destination: usize,
    count: usize,
    accumulator: u64,
}

impl Case {
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(match self.prefix {
            1 => Some(0xf3),
            2 => Some(0xf2),
            _ => None,
        });
        if !self.wide_address {
            out.push(0x67);
        }
        match self.log_size {
            1 => out.push(0x66),
            3 => out.push(0x48),
            _ => {}
        }
        let opcode = [0xa4, 0xaa, 0xac, 0xa6, 0xae][usize::from(self.operation)];
        out.push(opcode | u8::from(self.log_size > 0));
        out
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let near = 0usize..3;
    (
        (0u8..5, 0u8..3, 0u32..4, any::<bool>(), any::<bool>()),
        (
            0..LEN,
            prop_oneof![(0..LEN).boxed(), near.boxed()],
            0usize..1500,
            any::<u64>(),
            any::<bool>(),
        ),
    )
        .prop_map(
            |(
                (operation, prefix, log_size, down, wide_address),
                (source, other, count, accumulator, overlap),
            )| {
                // Half of the cases overlap closely.
                let destination = if overlap {
                    source.saturating_sub(8) + other % 17
                } else {
                    other
                };
                Case {
                    operation,
                    prefix,
                    log_size,
                    down,
                    wide_address,
                    source,
                    destination,
                    count,
                    accumulator,
                }
            },
        )
}

fn element(memory: &[u8], at: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&memory[at..at + size]);
    u64::from_le_bytes(bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn runs_are_the_same_as_elements(case in cases(), seed in any::<u8>()) {
        let size = 1usize << case.log_size;
        // Keep all elements inside of the model's memory.
        let room = |at: usize| if case.down { at / size } else { (LEN - at) / size };
        let fits = |at: usize| at + size <= LEN;
        prop_assume!(fits(case.source) && fits(case.destination));
        let count = if case.prefix == 0 { 1 } else { case.count.min(room(case.source)).min(room(case.destination)) };
        let mut machine = Machine::new();
        // Few distinct values, so that comparisons go on for a while.
        let mut memory: Vec<u8> = (0..LEN).map(|i| if i % 97 == usize::from(seed) { 1 } else { 0 }).collect();
        if case.operation < 3 {
            memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 + i / 256) as u8);
        }
        machine.put(DATA, &memory);
        machine.cpu.gpr[0] = if case.operation == 4 { 0 } else { case.accumulator };
        machine.cpu.gpr[1] = count as u64;
        machine.cpu.gpr[6] = DATA + case.source as u64;
        machine.cpu.gpr[7] = DATA + case.destination as u64;
        if case.down {
            machine.cpu.system_flags |= flags::DF;
        }
        let bytes = case.bytes();
        machine.finish(&bytes).unwrap();

        let (mut source, mut destination, mut left) = (case.source as i64, case.destination as i64, count);
        let mut accumulator = machine.cpu.gpr[0];
        if case.operation == 2 {
            accumulator = case.accumulator;
        }
        let mask = if size == 8 { u64::MAX } else { (1 << (size * 8)) - 1 };
        let step = if case.down { -(size as i64) } else { size as i64 };
        let mut arith = None;
        while left > 0 {
            let (s, d) = (source as usize, destination as usize);
            match case.operation {
                0 => memory.copy_within(s..s + size, d),
                1 => memory[d..d + size].copy_from_slice(&accumulator.to_le_bytes()[..size]),
                2 => {
                    let value = element(&memory, s, size);
                    accumulator = if size == 4 { value } else { accumulator & !mask | value };
                }
                _ => {
                    let a = if case.operation == 3 { element(&memory, s, size) } else { accumulator & mask };
                    arith = Some(compare_flags(a, element(&memory, d, size), size));
                }
            }
            if matches!(case.operation, 0 | 2 | 3) { source += step; }
            if case.operation != 2 { destination += step; }
            left -= 1;
            let equal = arith.is_some_and(|a| a & flags::ZF != 0);
            if case.prefix == 0 || arith.is_some() && (case.prefix == 1) != equal {
                break;
            }
        }
        let expected_count = if case.prefix == 0 { count } else { left };
        prop_assert_eq!(machine.cpu.gpr[1], expected_count as u64);
        prop_assert_eq!(machine.cpu.gpr[6].wrapping_sub(DATA), source as u64);
        prop_assert_eq!(machine.cpu.gpr[7].wrapping_sub(DATA), destination as u64);
        prop_assert_eq!(machine.cpu.gpr[0], accumulator);
        if let Some(arith) = arith {
            prop_assert_eq!(machine.cpu.arith, arith);
        }
        prop_assert!(machine.bytes::<LEN>(DATA)[..] == memory[..]);
    }
}

#[test]
fn a_repeated_move_stops_at_the_fault_and_can_go_on() {
    let mut machine = Machine::new();
    machine.cpu.gpr[1] = 100;
    machine.cpu.gpr[6] = DATA;
    machine.cpu.gpr[7] = HOLE - 40;
    let fault = machine.run(&[0xf3, 0xa4]).unwrap_err();
    assert_eq!((fault.vector, fault.cr2, fault.error), (14, HOLE, Some(2)));
    assert_eq!(
        (machine.cpu.gpr[1], machine.cpu.gpr[6], machine.cpu.gpr[7]),
        (60, DATA + 40, HOLE)
    );
    // One element across the end of the page faults as a whole.
    machine.cpu.gpr[7] = HOLE - 4;
    let fault = machine.run(&[0x48, 0xa5]).unwrap_err();
    assert_eq!((fault.cr2, machine.cpu.gpr[7]), (HOLE, HOLE - 4));
}

#[test]
fn long_moves_come_back_for_interrupts_and_no_count_does_nothing() {
    let mut machine = Machine::new();
    machine.cpu.gpr[1] = 20_000;
    machine.cpu.gpr[7] = 0x60_0000;
    assert_eq!(machine.run(&[0xf3, 0xaa]), Ok(Next::RepeatLater));
    assert_eq!(machine.cpu.gpr[1], 20_000 - 16384);
    assert_eq!(machine.run(&[0xf3, 0xaa]), Ok(Next::Continue));
    assert_eq!(
        (machine.cpu.gpr[1], machine.cpu.gpr[7]),
        (0, 0x60_0000 + 20_000)
    );
    machine.cpu.gpr[7] = HOLE;
    machine.run(&[0xf3, 0xaa]).unwrap();
    // Single-stepping sees every element.
    machine.cpu.gpr[1] = 2;
    machine.cpu.gpr[7] = DATA;
    machine.cpu.system_flags |= flags::TF;
    assert_eq!(machine.run(&[0xf3, 0xaa]), Ok(Next::RepeatLater));
    assert_eq!(machine.cpu.gpr[1], 1);
}

#[test]
fn ports_move_to_and_from_memory_and_the_map_guards_them() {
    let mut machine = Machine::new();
    machine.put(DATA, b"hello");
    (machine.cpu.gpr[1], machine.cpu.gpr[2], machine.cpu.gpr[6]) = (5, 0x3f8, DATA);
    machine.finish(&[0xf3, 0x6e]).unwrap();
    let sent: Vec<u8> = machine
        .bus
        .0
        .lock()
        .unwrap()
        .iter()
        .flat_map(|(_, data)| data.clone())
        .collect();
    assert_eq!(sent, b"hello");
    (machine.cpu.gpr[1], machine.cpu.gpr[2], machine.cpu.gpr[7]) = (2, 0x1234, DATA);
    machine.finish(&[0xf3, 0x66, 0x6d]).unwrap();
    assert_eq!(machine.bytes::<5>(DATA), [0x34, 0x34, 0x34, 0x34, b'o']);

    // User mode: the map begins at 0x68; port 0x60 may be used, 0x61 not.
    machine.user(super::USER_CS);
    machine.put(super::TSS + 102, &[0x68, 0]);
    machine.put(super::TSS + 0x68 + 12, &[0xfe, 0xff]);
    assert_eq!(machine.run(&[0xe4, 0x60]), Ok(Next::Continue));
    assert_eq!(machine.cpu.gpr[0] & 0xff, 0x60);
    assert_eq!(machine.run(&[0xe4, 0x61]), Err(super::REFUSED));
    assert_eq!(
        machine.run(&[0xe5, 0x60]),
        Err(super::REFUSED),
        "wider than the permission"
    );
    // Beyond the TSS's limit.
    machine.cpu.gpr[2] = 0x8000;
    assert_eq!(machine.run(&[0xec]), Err(super::REFUSED));
    machine.cpu.system_flags |= flags::IOPL;
    assert_eq!(machine.run(&[0xec]), Ok(Next::Continue));
}

#[test]
fn the_segment_of_the_source_can_be_overridden() {
    let mut machine = Machine::new();
    machine.put(DATA + 0x10, &[7]);
    machine.exec().write_segment_base(5, DATA).unwrap();
    machine.cpu.gpr[6] = 0x10;
    machine.run(&[0x65, 0xac]).unwrap();
    assert_eq!(machine.cpu.gpr[0], 7);
    // Non-canonical.
    machine.cpu.gpr[6] = 1 << 63;
    assert_eq!(machine.run(&[0xac]), Err(Fault::protection(0)));
}

/// The host's own comparison.
fn host_flags(left: u64, right: u64, size: usize) -> u64 {
    let out: u64;
    // SAFETY: compares registers and reads the flags through the stack.
    unsafe {
        match size {
            1 => {
                std::arch::asm!("cmp {0:l}, {1:l}", "pushfq", "pop {2}", in(reg) left, in(reg) right, out(reg) out)
            }
            2 => {
                std::arch::asm!("cmp {0:x}, {1:x}", "pushfq", "pop {2}", in(reg) left, in(reg) right, out(reg) out)
            }
            4 => {
                std::arch::asm!("cmp {0:e}, {1:e}", "pushfq", "pop {2}", in(reg) left, in(reg) right, out(reg) out)
            }
            _ => {
                std::arch::asm!("cmp {0}, {1}", "pushfq", "pop {2}", in(reg) left, in(reg) right, out(reg) out)
            }
        }
    }
    out & flags::ARITH
}

proptest! {
    #[test]
    fn comparisons_set_the_flags_of_the_host(left in any::<u64>(), right in any::<u64>(), same in any::<bool>()) {
        for size in [1, 2, 4, 8] {
            let mask = super::super::operand::size_mask(size);
            let left = left & mask;
            let right = if same { left } else { right & mask };
            prop_assert_eq!(compare_flags(left, right, size), host_flags(left, right, size));
        }
    }
}

#[test]
fn pages_that_the_soft_tlb_holds_are_used_as_they_are() {
    let mut machine = Machine::new();
    machine.put(DATA, b"0123456789abcdef");
    // Entries as translated code would have left them: loads from DATA's page, stores to the next one.
    let mut pending = None;
    for (at, access) in [
        (DATA, crate::mmu::OperandAccess::Read),
        (DATA + 4096, crate::mmu::OperandAccess::Write),
    ] {
        machine
            .exec()
            .slow_access(at, 8, access, false, false, &mut pending)
            .unwrap();
    }
    assert!(pending.is_none());
    // The walk would fault now; only the TLB knows the pages.
    machine.put_u64(0x1000, 0);
    (machine.cpu.gpr[1], machine.cpu.gpr[6], machine.cpu.gpr[7]) = (16, DATA, DATA + 4096);
    machine.finish(&[0xf3, 0xa4]).unwrap();
    assert_eq!(&machine.bytes::<16>(DATA + 4096), b"0123456789abcdef");
    (machine.cpu.gpr[1], machine.cpu.gpr[7]) = (1, DATA);
    machine.cpu.tlb[0].drop_writes();
    assert_eq!(machine.run(&[0xf3, 0xaa]).unwrap_err().vector, 14);
}
