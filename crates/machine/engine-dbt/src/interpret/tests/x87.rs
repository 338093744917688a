//! Save areas and the x87 environment, compared with the host's own instructions.

use std::arch::asm;

use proptest::prelude::*;

use super::super::xsave::{get, put};
use super::*;
use crate::cpu::FxArea;

/// A plausible x87 image with the given control and status words, tags and register bytes.
fn image(control: u16, status: u16, tags: u8, registers: &[u8]) -> FxArea {
    let mut area = FxArea([0; 512]);
    put(&mut area.0, 0, &(control & 0x1f3f | 0x40).to_le_bytes());
    // Without pending exceptions, so that waiting instructions run.
    put(&mut area.0, 2, &(status & 0x7f00).to_le_bytes());
    put(&mut area.0, 4, &[tags]);
    put(&mut area.0, 24, &0x1f80u32.to_le_bytes());
    for i in 0..8 {
        put(&mut area.0, 32 + i * 16, &registers[i * 10..i * 10 + 10]);
    }
    area
}

/// What the host stores for FNSAVE (28 bytes of environment, then registers) of an image.
fn host_fnsave(area: &FxArea) -> [u8; 108] {
    let mut out = [0; 108];
    let mut before = FxArea([0; 512]);
    // SAFETY: loads and stores aligned local areas; XMM registers are declared, the x87 state is put back.
    unsafe {
        asm!(
            "fxsave64 [{before}]", "fxrstor64 [{area}]", "fnsave [{out}]", "fxrstor64 [{before}]",
            before = in(reg) &mut before, area = in(reg) area, out = in(reg) &mut out,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    out
}

/// Bytes of FNSAVE's area that hold pointers and the opcode.
fn without_pointers(mut area: [u8; 108]) -> [u8; 108] {
    area[12..28].fill(0);
    area
}

proptest! {
    #[test]
    fn fnsave_stores_what_the_host_stores_and_frstor_takes_it_back(
        control in any::<u16>(), status in any::<u16>(), tags in any::<u8>(),
        mut registers in prop::collection::vec(any::<u8>(), 80), kinds in prop::collection::vec(0u8..5, 8),
    ) {
        // Zeros, infinities, denormals and unnormals among the ordinary numbers.
        for (i, kind) in kinds.iter().enumerate() {
            let register = &mut registers[i * 10..i * 10 + 10];
            match kind {
                0 => register.fill(0),
                1 => { register[8] = 0xff; register[9] |= 0x7f; }
                2 => { register[8] = 0; register[9] &= 0x80; }
                3 => register[7] |= 0x80,
                _ => register[7] &= 0x7f,
            }
        }
        let area = image(control, status, tags, &registers);
        let mut machine = Machine::new();
        machine.cpu.fx = FxArea(area.0);
        machine.cpu.gpr[0] = DATA;
        machine.run(&[0xdd, 0x30]).unwrap();
        prop_assert_eq!(without_pointers(machine.bytes(DATA)), without_pointers(host_fnsave(&area)));
        prop_assert_eq!(get::<8>(&machine.cpu.fx.0, 0), [0x7f, 3, 0, 0, 0, 0, 0, 0]);
        machine.run(&[0xdd, 0x20]).unwrap();
        prop_assert_eq!(get::<6>(&machine.cpu.fx.0, 0), get::<6>(&area.0, 0));
        prop_assert_eq!(get::<128>(&machine.cpu.fx.0, 32), get::<128>(&area.0, 32));
        // The environment alone, in its 16-bit form.
        machine.run(&[0x66, 0xd9, 0x30]).unwrap();
        prop_assert_eq!(u16::from_le_bytes(get(&machine.cpu.fx.0, 0)) & 0x3f, 0x3f);
        machine.run(&[0x66, 0xd9, 0x20]).unwrap();
        prop_assert_eq!(get::<160>(&machine.cpu.fx.0, 0)[..6].to_vec(), area.0[..6].to_vec());
        prop_assert_eq!(get::<128>(&machine.cpu.fx.0, 32), get::<128>(&area.0, 32));
    }

    #[test]
    fn what_xsave_stores_xrstor_loads(
        values in prop::collection::vec(any::<u64>(), 64), requested in 0u64..8, zero in 0usize..4,
    ) {
        let mut machine = Machine::new();
        for (i, register) in machine.cpu.ymm.0.iter_mut().enumerate() {
            register.copy_from_slice(&values[i * 4..i * 4 + 4]);
            if zero & 1 != 0 { register[2..].fill(0); }
            if zero & 2 != 0 { register[..2].fill(0); }
        }
        machine.cpu.mxcsr = 0x1f80 | (values[0] as u32 & 0x7f);
        machine.cpu.fx = FxArea(image(0x37f, 0x3800, 0xff, &[3; 80]).0);
        let (ymm, mxcsr, fx) = (machine.cpu.ymm.0, machine.cpu.mxcsr, machine.cpu.fx.0);
        (machine.cpu.gpr[0], machine.cpu.gpr[2], machine.cpu.gpr[1]) = (requested, 0, DATA);
        // xsave64 [rcx] over two pages, xsaveopt64 within one.
        let at = if requested & 1 == 0 { DATA + 0x1000 - 64 } else { DATA };
        machine.cpu.gpr[1] = at;
        let opcode: &[u8] = if zero & 1 == 0 { &[0x48, 0x0f, 0xae, 0x21] } else { &[0x48, 0x0f, 0xae, 0x31] };
        machine.run(opcode).unwrap();
        let present = machine.u64(at + 512);
        prop_assert_eq!(present & !requested, 0);
        machine.cpu.ymm.0 = [[9; 4]; 16];
        machine.cpu.mxcsr = 0x1fa0;
        machine.cpu.fx.0[0] = 0x7e;
        machine.run(&[0x48, 0x0f, 0xae, 0x29]).unwrap();
        for (now, then) in machine.cpu.ymm.0.iter().zip(ymm) {
            let low: &[u64] = if requested & 2 != 0 { &then[..2] } else { &[9, 9] };
            let high: &[u64] = if requested & 4 != 0 { &then[2..] } else { &[9, 9] };
            prop_assert_eq!((&now[..2], &now[2..]), (low, high));
        }
        prop_assert_eq!(machine.cpu.mxcsr, if requested & 6 != 0 { mxcsr } else { 0x1fa0 });
        prop_assert_eq!(machine.cpu.fx.0[0], if requested & 1 != 0 { fx[0] } else { 0x7e });
    }
}

#[test]
fn save_areas_are_checked() {
    let mut machine = Machine::new();
    let (xsave, xrstor): (&[u8], &[u8]) = (&[0x0f, 0xae, 0x21], &[0x0f, 0xae, 0x29]);
    (machine.cpu.gpr[0], machine.cpu.gpr[1]) = (7, DATA + 16);
    assert_eq!(machine.run(xsave), Err(REFUSED), "64-byte alignment");
    machine.cpu.gpr[1] = DATA;
    machine.run(xsave).unwrap();
    assert_eq!(machine.u64(DATA + 512), 0, "all in the initial state");
    for (offset, value) in [(512, 8), (520, 1 << 63), (528, 1), (24, 0x1_0000)] {
        let old = machine.u64(DATA + offset);
        machine.put_u64(DATA + offset, value);
        assert_eq!(machine.run(xrstor), Err(REFUSED), "{offset}");
        machine.put_u64(DATA + offset, old);
    }
    machine.put_u64(DATA + 536, 1);
    machine.run(xrstor).unwrap();
    machine.cpu.gpr[1] = HOLE - 576;
    assert_eq!(machine.run(xsave), Err(Fault::page(HOLE, 2)));
    machine.cpu.cr0 |= control::CR0_TS;
    assert_eq!(machine.run(xsave), Err(Fault::NO_DEVICE));
    assert_eq!(machine.run(&[0x0f, 0xae, 0x01]), Err(Fault::NO_DEVICE));
    machine.cpu.cr4 &= !control::CR4_OSXSAVE;
    assert_eq!(machine.run(xsave), Err(Fault::UNDEFINED));
}

#[test]
fn fxsave_leaves_the_software_bytes_alone_and_fxrstor_checks_mxcsr() {
    let mut machine = Machine::new();
    machine.put(DATA, &[0xee; 512]);
    machine.cpu.gpr[1] = DATA;
    machine.cpu.ymm.0[15] = [1, 2, 3, 4];
    machine.run(&[0x48, 0x0f, 0xae, 0x01]).unwrap();
    assert_eq!((machine.u64(DATA + 400), machine.u64(DATA + 408)), (1, 2));
    assert_eq!(machine.bytes::<96>(DATA + 416), [0xee; 96]);
    assert_eq!(
        machine.bytes::<8>(DATA + 24),
        [0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]
    );
    machine.cpu.ymm.0[15] = [0; 4];
    machine.run(&[0x0f, 0xae, 0x09]).unwrap();
    assert_eq!(machine.cpu.ymm.0[15], [1, 2, 0, 0]);
    machine.put_u64(DATA + 24, 0xffff_0000);
    assert_eq!(machine.run(&[0x0f, 0xae, 0x09]), Err(REFUSED));
    machine.cpu.gpr[1] = DATA + 8;
    assert_eq!(machine.run(&[0x0f, 0xae, 0x01]), Err(REFUSED));
}

#[test]
fn live_state_in_the_hosts_unit_is_the_guests() {
    let mut machine = Machine::new();
    machine.cpu.fx = FxArea(image(0x27f, 0x1800, 0x18, &[0x80; 80]).0);
    machine.cpu.gpr[1] = DATA;
    let expected = get::<128>(&machine.cpu.fx.0, 32);
    machine.cpu.load_fpu();
    let saved = machine.run(&[0x48, 0x0f, 0xae, 0x01]);
    let word: u16 = u16::from_le_bytes(machine.bytes(DATA));
    machine.put(DATA, &[0x7f, 0x0c]);
    let restored = machine.run(&[0x48, 0x0f, 0xae, 0x09]);
    machine.cpu.store_fpu();
    assert_eq!(
        (saved, restored, word),
        (Ok(Next::Continue), Ok(Next::Continue), 0x27f)
    );
    assert_eq!(machine.bytes::<128>(DATA + 32), expected);
    assert_eq!(machine.cpu.fx.0[..2], [0x7f, 0x0c]);
}

#[test]
fn control_registers_switch_vector_instructions_off() {
    let mut machine = Machine::new();
    let (x87, mmx, sse, avx): (&[u8], &[u8], &[u8], &[u8]) = (
        &[0xd9, 0x30],
        &[0x0f, 0xf7, 0xc1],
        &[0x66, 0x0f, 0xf7, 0xc1],
        &[0xc5, 0xf9, 0xf7, 0xc1],
    );
    (machine.cpu.gpr[0], machine.cpu.gpr[7]) = (DATA, DATA);
    for bytes in [x87, mmx, sse, avx] {
        machine.run(bytes).unwrap();
    }
    machine.cpu.cr0 |= control::CR0_TS;
    for bytes in [x87, mmx, sse, avx] {
        assert_eq!(machine.run(bytes), Err(Fault::NO_DEVICE), "{bytes:02x?}");
    }
    machine.cpu.cr0 ^= control::CR0_TS | control::CR0_EM;
    assert_eq!(machine.run(x87), Err(Fault::NO_DEVICE));
    assert_eq!(machine.run(mmx), Err(Fault::UNDEFINED));
    assert_eq!(machine.run(sse), Err(Fault::UNDEFINED));
    machine.cpu.cr0 &= !control::CR0_EM;
    machine.cpu.cr4 &= !control::CR4_OSFXSR;
    assert_eq!(machine.run(sse), Err(Fault::UNDEFINED));
    assert_eq!(machine.run(avx), Ok(Next::Continue));
    machine.cpu.xcr0 = 3;
    assert_eq!(machine.run(avx), Err(Fault::UNDEFINED));
}
