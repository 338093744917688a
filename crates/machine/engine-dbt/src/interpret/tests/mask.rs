//! Masked moves and gathers.

use super::*;

fn words(values: [u32; 8]) -> [u64; 4] {
    let mut out = [0; 4];
    for (i, value) in values.into_iter().enumerate() {
        out[i / 2] |= u64::from(value) << (i % 2 * 32);
    }
    out
}

const ON: u32 = 0x8000_0000;

#[test]
fn masked_lanes_are_not_touched() {
    let mut machine = Machine::new();
    // Only the first two lanes are mapped.
    machine.cpu.gpr[0] = HOLE - 8;
    machine.put(HOLE - 8, &[1, 0, 0, 0, 2, 0, 0, 0]);
    machine.cpu.ymm.0[1] = words([ON, ON, 0, 1, 0, 0, 0, 0]);
    machine.cpu.ymm.0[0] = [u64::MAX; 4];
    // vpmaskmovd ymm0, ymm1, [rax]
    machine.run(&[0xc4, 0xe2, 0x75, 0x8c, 0x00]).unwrap();
    assert_eq!(machine.cpu.ymm.0[0], words([1, 2, 0, 0, 0, 0, 0, 0]));
    // vmaskmovps [rax], ymm1, ymm2
    machine.cpu.ymm.0[2] = words([7, 8, 9, 9, 9, 9, 9, 9]);
    machine.run(&[0xc4, 0xe2, 0x75, 0x2e, 0x10]).unwrap();
    assert_eq!(machine.bytes::<8>(HOLE - 8), [7, 0, 0, 0, 8, 0, 0, 0]);
    // A fault in the third lane leaves the first two alone.
    machine.cpu.ymm.0[1] = words([ON, ON, ON, 0, 0, 0, 0, 0]);
    machine.cpu.ymm.0[2] = words([1; 8]);
    assert_eq!(
        machine.run(&[0xc4, 0xe2, 0x75, 0x2e, 0x10]),
        Err(Fault::page(HOLE, 2))
    );
    assert_eq!(machine.bytes::<8>(HOLE - 8), [7, 0, 0, 0, 8, 0, 0, 0]);
    // vmaskmovpd xmm: 8-byte lanes, upper half cleared.
    machine.cpu.gpr[0] = DATA;
    machine.put_u64(DATA + 8, 0x1234);
    machine.cpu.ymm.0[1] = [0, 1 << 63, 1 << 63, 1 << 63];
    machine.cpu.ymm.0[0] = [u64::MAX; 4];
    machine.run(&[0xc4, 0xe2, 0x71, 0x2d, 0x00]).unwrap();
    assert_eq!(machine.cpu.ymm.0[0], [0, 0x1234, 0, 0]);
}

#[test]
fn masked_bytes_go_to_rdi() {
    let mut machine = Machine::new();
    machine.cpu.gpr[7] = HOLE - 4;
    machine.cpu.ymm.0[0] = [0x0706_0504_0302_0100, 0, 0, 0];
    machine.cpu.ymm.0[1] = [0x0000_0000_8000_0080, 0, 0, 0];
    machine.run(&[0x66, 0x0f, 0xf7, 0xc1]).unwrap();
    assert_eq!(machine.bytes::<4>(HOLE - 4), [0, 0, 0, 3]);
    machine.cpu.ymm.0[1][1] = 0x80;
    assert_eq!(
        machine.run(&[0x66, 0x0f, 0xf7, 0xc1]).unwrap_err().vector,
        14
    );
}

#[test]
fn gathers_keep_what_they_loaded_before_a_fault() {
    let mut machine = Machine::new();
    for i in 0..16 {
        machine.put(DATA + i * 4, &(100 + i as u32).to_le_bytes());
    }
    machine.cpu.gpr[0] = DATA;
    machine.cpu.ymm.0[0] = [u64::MAX; 4];
    machine.cpu.ymm.0[1] = words([0, 3, 5, 15, 1, 2, 4, 6]);
    machine.cpu.ymm.0[2] = words([ON, ON, 0, ON, ON, ON, ON, ON]);
    // vpgatherdd ymm0, [rax + ymm1*4], ymm2
    machine.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x88]).unwrap();
    assert_eq!(
        machine.cpu.ymm.0[0],
        words([100, 103, u32::MAX, 115, 101, 102, 104, 106])
    );
    assert_eq!(machine.cpu.ymm.0[2], [0; 4]);
    // Negative indices, 8-byte elements with 4-byte indices; the second element faults.
    machine.put_u64(DATA - 16, 0xabcd);
    machine.cpu.ymm.0[1] = words([-2i32 as u32, ((HOLE - DATA) / 8) as u32, 0, 0, 0, 0, 0, 0]);
    machine.cpu.ymm.0[2] = [u64::MAX; 4];
    machine.cpu.ymm.0[0] = [5; 4];
    // vpgatherdq xmm0, [rax + xmm1*8], xmm2
    assert_eq!(
        machine.run(&[0xc4, 0xe2, 0xe9, 0x90, 0x04, 0xc8]),
        Err(Fault::page(HOLE, 0))
    );
    assert_eq!(
        (
            machine.cpu.ymm.0[0][..2].to_vec(),
            machine.cpu.ymm.0[2][..2].to_vec()
        ),
        (vec![0xabcd, 5], vec![0, u64::MAX])
    );
    machine.cpu.ymm.0[1] = words([0; 8]);
    machine.run(&[0xc4, 0xe2, 0xe9, 0x90, 0x04, 0xc8]).unwrap();
    assert_eq!(machine.cpu.ymm.0[0], [0xabcd, 100 | 101 << 32, 0, 0]);
    // vgatherqps xmm0, [rax + xmm1*4], xmm2: two elements, the rest zero.
    machine.cpu.ymm.0[1] = [1, 2, 0, 0];
    machine.cpu.ymm.0[2] = [u64::MAX; 4];
    machine.cpu.ymm.0[0] = [u64::MAX; 4];
    machine.run(&[0xc4, 0xe2, 0x69, 0x93, 0x04, 0x88]).unwrap();
    assert_eq!(machine.cpu.ymm.0[0], [101 | 102 << 32, 0, 0, 0]);
    // The same register twice.
    let mut decoder = Decoder::with_ip(
        64,
        &[0xc4, 0xe2, 0x7d, 0x90, 0x04, 0x88],
        CODE,
        DecoderOptions::NO_INVALID_CHECK,
    );
    let instr = decoder.decode();
    assert_eq!(machine.exec().interpret(&instr), Err(Fault::UNDEFINED));
}
