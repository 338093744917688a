//! Control registers, MSRs, descriptor tables, segments, clocks, old instructions.

use strata_engine::x86::MsrIndex;

use super::super::Next;
use super::*;
use crate::cpu::Privilege;

fn wrmsr(machine: &mut Machine, index: MsrIndex, value: u64) -> Result<Next, Fault> {
    machine.cpu.gpr[1] = index.0.into();
    (machine.cpu.gpr[0], machine.cpu.gpr[2]) = (value & 0xffff_ffff, value >> 32);
    machine.run(&[0x0f, 0x30])
}

fn rdmsr(machine: &mut Machine, index: MsrIndex) -> Result<u64, Fault> {
    machine.cpu.gpr[1] = index.0.into();
    machine.run(&[0x0f, 0x32])?;
    Ok(machine.cpu.gpr[2] << 32 | machine.cpu.gpr[0])
}

#[test]
fn msrs_hold_what_they_may() {
    let mut machine = Machine::new();
    for (index, value) in [
        (MsrIndex::LSTAR, 0xffff_8000_1234_5678),
        (MsrIndex::STAR, u64::MAX),
        (MsrIndex::GS_BASE, 0x7fff_ffff_f000),
        (MsrIndex::KERNEL_GS_BASE, u64::MAX),
        (MsrIndex::TSC_AUX, 5),
        (MsrIndex::PAT, 0x0007_0105_0600_0406),
        (MsrIndex::MTRR_DEFAULT_TYPE, 0xc06),
        (MsrIndex(0x201), 0x3fff_ffff_f800),
        (MsrIndex::SPEC_CTRL, 1),
        (MsrIndex::KVM_PV_EOI, 0x1001),
    ] {
        assert_eq!(
            wrmsr(&mut machine, index, value),
            Ok(Next::Continue),
            "{index:x?}"
        );
        assert_eq!(rdmsr(&mut machine, index), Ok(value), "{index:x?}");
    }
    for (index, value) in [
        (MsrIndex::LSTAR, 1 << 47),
        (MsrIndex::EFER, 1 << 12),
        (MsrIndex::EFER, 0),
        (MsrIndex::PAT, 2),
        (MsrIndex::TSC_AUX, 1 << 32),
        (MsrIndex(0x200), 7),
        (MsrIndex::ARCH_CAPABILITIES, 0),
        (MsrIndex(0x4b56_4d03), 0),
        (MsrIndex(0xc001_0015), 0),
        (MsrIndex(0xffff_ffff), 0),
    ] {
        assert_eq!(
            wrmsr(&mut machine, index, value),
            Err(REFUSED),
            "{index:x?}"
        );
    }
    assert_eq!(rdmsr(&mut machine, MsrIndex::PRED_CMD), Err(REFUSED));
    assert_eq!(
        rdmsr(&mut machine, MsrIndex::ARCH_CAPABILITIES).map(|v| v & 3),
        Ok(3)
    );
    // LMA stays whatever is written, LME does not change under paging.
    assert_eq!(
        wrmsr(&mut machine, MsrIndex::EFER, 0x901),
        Ok(Next::Continue)
    );
    assert_eq!(machine.cpu.efer, 0xd01);
    machine.user(USER_CS);
    assert_eq!(rdmsr(&mut machine, MsrIndex::LSTAR), Err(REFUSED));
}

#[test]
fn all_msrs_of_a_state_come_back() {
    let mut machine = Machine::new();
    wrmsr(&mut machine, MsrIndex::KERNEL_GS_BASE, 77).unwrap();
    wrmsr(&mut machine, MsrIndex::TSC_ADJUST, 1000).unwrap();
    wrmsr(&mut machine, MsrIndex(0x26f), 0x0606_0606_0606_0606).unwrap();
    let saved = machine.exec().save_msrs();
    let count = machine.env.model.msrs().count();
    assert_eq!(saved.len(), count);
    let mut other = Machine::new();
    other.exec().restore_msrs(&saved).unwrap();
    assert_eq!(other.exec().save_msrs(), saved);
    assert_eq!(
        other.cpu.tsc_offset, 0,
        "the counter's offset is another part of the state"
    );
}

#[test]
fn the_tsc_its_adjustment_and_the_clock_page_move_together() {
    let mut machine = Machine::new();
    wrmsr(&mut machine, MsrIndex::KVM_SYSTEM_TIME, DATA + 1).unwrap();
    let first = machine.bytes::<32>(DATA);
    assert_eq!(
        (first[0], first[29]),
        (2, 1),
        "an even version, a stable clock"
    );
    // The clock stands at 0 and ticks at 2.5 GHz: factor 0.4 is 0xcccccccc / 2^33.
    assert_eq!(first[24..29], [0xcc, 0xcc, 0xcc, 0xcc, 0xff]);
    wrmsr(&mut machine, MsrIndex::TSC, 5_000_000).unwrap();
    assert_eq!(rdmsr(&mut machine, MsrIndex::TSC), Ok(5_000_000));
    assert_eq!(rdmsr(&mut machine, MsrIndex::TSC_ADJUST), Ok(5_000_000));
    assert_eq!(machine.u64(DATA + 8), 5_000_000);
    assert_eq!(machine.bytes::<1>(DATA), [4]);
    wrmsr(&mut machine, MsrIndex::TSC_ADJUST, 0).unwrap();
    machine.run(&[0x0f, 0x31]).unwrap();
    assert_eq!((machine.cpu.gpr[0], machine.cpu.gpr[2]), (0, 0));
    wrmsr(&mut machine, MsrIndex::KVM_WALL_CLOCK, DATA + 64).unwrap();
    let seconds = u32::from_le_bytes(machine.bytes(DATA + 68));
    assert!(seconds > 1_700_000_000);
    // Nobody answers there: no effect, no fault.
    wrmsr(&mut machine, MsrIndex::KVM_SYSTEM_TIME, (1 << 40) + 1).unwrap();
}

#[test]
fn the_apic_is_reached_by_msrs_and_cr8() {
    let mut machine = Machine::new();
    assert_eq!(rdmsr(&mut machine, MsrIndex(0x802)), Err(REFUSED));
    wrmsr(&mut machine, MsrIndex::APIC_BASE, 0xfee0_0d00).unwrap();
    assert_eq!(rdmsr(&mut machine, MsrIndex(0x803)), Ok(0x0005_0014));
    wrmsr(&mut machine, MsrIndex(0x80f), 0x1ff).unwrap();
    wrmsr(&mut machine, MsrIndex(0x83f), 0x44).unwrap();
    assert!(machine.env.apic.pending());
    machine
        .asm(|a| a.mov(iced_x86::code_asm::cr8, iced_x86::code_asm::rax))
        .unwrap_err();
    machine.cpu.gpr[0] = 4;
    machine
        .asm(|a| a.mov(iced_x86::code_asm::cr8, iced_x86::code_asm::rax))
        .unwrap();
    assert!(!machine.env.apic.pending());
    assert_eq!(rdmsr(&mut machine, MsrIndex(0x808)), Ok(0x40));
}

#[test]
fn cpuid_says_what_the_vcpu_has() {
    let mut machine = Machine::new();
    machine.cpu.gpr[0] = u64::MAX << 32 | 1;
    machine.run(&[0x0f, 0xa2]).unwrap();
    assert_eq!(machine.cpu.gpr[0], 0x606a6);
    assert_eq!(machine.cpu.gpr[1] >> 27 & 1, 1, "OSXSAVE follows CR4");
    machine.cpu.cr4 &= !control::CR4_OSXSAVE;
    machine.cpu.gpr[0] = 1;
    machine.run(&[0x0f, 0xa2]).unwrap();
    assert_eq!(machine.cpu.gpr[1] >> 27 & 1, 0);
    assert_eq!(machine.run(&[0x0f, 0x01, 0xd0]), Err(Fault::UNDEFINED));
}

#[test]
fn the_way_into_long_mode_and_out_of_it() {
    let mut machine = Machine::new();
    machine.protected();
    machine.cpu.cr4 &= !control::CR4_PAE;
    machine.cpu.gpr[0] = machine.cpu.cr0 | control::CR0_PG;
    wrmsr(&mut machine, MsrIndex::EFER, 0x100).unwrap();
    machine.cpu.gpr[0] = machine.cpu.cr0 | control::CR0_PG;
    assert_eq!(
        machine.run(&[0x0f, 0x22, 0xc0]),
        Err(REFUSED),
        "without PAE"
    );
    machine.cpu.cr4 |= control::CR4_PAE;
    machine.run(&[0x0f, 0x22, 0xc0]).unwrap();
    assert!(machine.cpu.long_mode() && !machine.cpu.code_64());
    // PAE cannot go now; paging can, from compatibility mode.
    machine.cpu.gpr[1] = machine.cpu.cr4 & !control::CR4_PAE;
    assert_eq!(machine.run(&[0x0f, 0x22, 0xe1]), Err(REFUSED));
    machine.cpu.gpr[0] = machine.cpu.cr0 & !control::CR0_PG;
    machine.run(&[0x0f, 0x22, 0xc0]).unwrap();
    assert_eq!(machine.cpu.efer & 0x500, 0x100);
}

#[test]
fn control_registers_refuse_what_is_reserved() {
    let mut machine = Machine::new();
    let mut write = |register: u8, value: u64| {
        machine.cpu.gpr[0] = value;
        machine.run(&[0x0f, 0x22, 0xc0 | register << 3])
    };
    assert_eq!(write(0, 0x8001_0031 | 1 << 32), Err(REFUSED));
    assert_eq!(
        write(0, 0x8001_0030),
        Err(REFUSED),
        "paging without protection"
    );
    assert_eq!(write(0, 0xa001_0031), Err(REFUSED), "NW without CD");
    assert_eq!(write(0, 0x1), Err(REFUSED), "paging off in 64-bit code");
    for bit in [0, 12, 13, 17, 21, 22, 63] {
        assert_eq!(write(4, 1 << 5 | 1 << bit), Err(REFUSED), "CR4 bit {bit}");
    }
    assert_eq!(write(4, 0x0015_0ee8), Ok(Next::Continue));
    assert_eq!(write(3, 1 << 46), Err(REFUSED));
    assert_eq!(write(3, 0x1000), Ok(Next::Continue));
    machine.run(&[0x0f, 0x06]).unwrap();
    machine.user(USER_CS);
    for bytes in [
        &[0x0f, 0x20, 0xc0][..],
        &[0x0f, 0x06],
        &[0xf4],
        &[0x0f, 0x01, 0x38],
        &[0x0f, 0x09],
    ] {
        assert_eq!(machine.run(bytes), Err(REFUSED), "{bytes:02x?}");
    }
    assert_eq!(machine.cpu.privilege(), Privilege::User);
    // UMIP.
    machine.cpu.gpr[0] = DATA;
    assert_eq!(machine.run(&[0x0f, 0x01, 0x00]), Err(REFUSED));
    machine.cpu.cr4 &= !control::CR4_UMIP;
    machine.run(&[0x0f, 0x01, 0x00]).unwrap();
    assert_eq!(
        machine.bytes::<10>(DATA),
        [0x4f, 0, 0, 0x50, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn debug_registers() {
    let mut machine = Machine::new();
    machine.cpu.gpr[0] = 0x0fff_27ff;
    machine.run(&[0x0f, 0x23, 0xf8]).unwrap();
    assert_eq!(machine.cpu.dr7, 0x0fff_27ff & 0xffff_2bff | 0x400);
    // GD is set: any access is a debug exception.
    assert_eq!(machine.run(&[0x0f, 0x21, 0xc0]), Err(Fault::plain(1)));
    assert_ne!(machine.cpu.dr6 & 1 << 13, 0);
    machine.cpu.dr7 = 0x400;
    machine.run(&[0x0f, 0x21, 0xe0]).unwrap();
    assert_eq!(machine.cpu.gpr[0], machine.cpu.dr6, "DR4 is DR6");
    machine.cpu.cr4 |= control::CR4_DE;
    assert_eq!(machine.run(&[0x0f, 0x21, 0xe0]), Err(Fault::UNDEFINED));
    machine.cpu.gpr[0] = 1 << 32;
    assert_eq!(machine.run(&[0x0f, 0x23, 0xf0]), Err(REFUSED));
}

#[test]
fn tables_and_system_segments() {
    let mut machine = Machine::new();
    machine.put(DATA, &[0xff, 0x01, 0x00, 0x60, 0, 0, 0, 0x80, 0xff, 0xff]);
    machine.cpu.gpr[0] = DATA;
    machine.run(&[0x0f, 0x01, 0x18]).unwrap();
    assert_eq!(
        (machine.cpu.idtr.limit, machine.cpu.idtr.base),
        (0x1ff, 0xffff_8000_0000_6000)
    );
    // The TSS: available, then busy.
    machine.cpu.gpr[0] = TSS_SELECTOR.into();
    machine.cpu.tr = Segment::default();
    machine.run(&[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!(
        (
            machine.cpu.tr.base,
            machine.cpu.tr.limit,
            machine.cpu.tr.attributes & 15
        ),
        (TSS, 0xff, 11)
    );
    assert_eq!(
        machine.run(&[0x0f, 0x00, 0xd8]),
        Err(Fault::protection(0x40)),
        "busy"
    );
    machine.run(&[0x0f, 0x00, 0xc9]).unwrap();
    assert_eq!(machine.cpu.gpr[1], 0x40);
    // No LDT, a wrong type, beyond the table.
    machine.cpu.gpr[0] = 0;
    machine.run(&[0x0f, 0x00, 0xd0]).unwrap();
    assert!(machine.cpu.ldtr.null());
    for selector in [0x10, 0x44, 0x100] {
        machine.cpu.gpr[0] = selector;
        assert_eq!(
            machine.run(&[0x0f, 0x00, 0xd0]),
            Err(Fault::protection(selector as u32))
        );
    }
}

#[test]
fn data_segments_are_checked_and_marked() {
    let mut machine = Machine::new();
    let load = |machine: &mut Machine, modrm: u8, selector: u16| {
        machine.cpu.gpr[0] = selector.into();
        machine.run(&[0x8e, modrm])
    };
    assert_eq!(load(&mut machine, 0xd8, USER_DS), Ok(Next::Continue));
    assert_eq!(machine.cpu.segments[3].attributes, 0xc0f3);
    assert_eq!(machine.u64(GDT + 0x20) >> 40 & 1, 1, "accessed");
    assert_eq!(load(&mut machine, 0xd8, 0), Ok(Next::Continue));
    assert_eq!(
        load(&mut machine, 0xd8, TSS_SELECTOR),
        Err(Fault::protection(0x40))
    );
    assert_eq!(load(&mut machine, 0xd8, 0x58), Err(Fault::protection(0x58)));
    assert_eq!(
        load(&mut machine, 0xd8, 0x0f),
        Err(Fault::protection(0x0c)),
        "no LDT"
    );
    // The stack segment: same privilege, writable; null only below CPL 3.
    assert_eq!(load(&mut machine, 0xd0, KERNEL_DS), Ok(Next::Continue));
    assert!(machine.cpu.interrupt_shadow);
    assert_eq!(load(&mut machine, 0xd0, 0), Ok(Next::Continue));
    assert_eq!(
        load(&mut machine, 0xd0, USER_DS),
        Err(Fault::protection(0x20))
    );
    assert_eq!(
        load(&mut machine, 0xd0, KERNEL_CS),
        Err(Fault::protection(8))
    );
    machine.put_u64(GDT + 0x38, 0x00cf_1200_0000_ffff);
    assert_eq!(
        load(&mut machine, 0xd8, 0x38),
        Err(Fault {
            vector: 11,
            error: Some(0x38),
            cr2: 0
        })
    );
    assert_eq!(load(&mut machine, 0xd0, 0x38), Err(Fault::stack(0x38)));
    machine.user(USER_CS);
    assert_eq!(load(&mut machine, 0xd0, 0), Err(REFUSED));
    assert_eq!(
        load(&mut machine, 0xd8, KERNEL_DS),
        Err(Fault::protection(0x10))
    );
    // push fs; pop gs.
    machine.run(&[0x0f, 0xa0]).unwrap();
    assert_eq!(
        (machine.cpu.gpr[4], machine.u64(STACK - 8)),
        (STACK - 8, USER_DS.into())
    );
    machine.run(&[0x0f, 0xa9]).unwrap();
    assert_eq!(
        (machine.cpu.gpr[4], machine.cpu.segments[5].selector),
        (STACK, USER_DS)
    );
    machine.put(DATA, &[1, 2, 3, 4, 0x23, 0]);
    machine.cpu.gpr[0] = DATA;
    machine.run(&[0x0f, 0xb5, 0x08]).unwrap();
    assert_eq!(
        (machine.cpu.gpr[1], machine.cpu.segments[5].selector),
        (0x0403_0201, USER_DS)
    );
}

#[test]
fn user_code_may_ask_about_descriptors() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    let mut ask = |bytes: &[u8], selector: u64| {
        (machine.cpu.gpr[0], machine.cpu.gpr[1]) = (selector, 0x77);
        machine.run(bytes).unwrap();
        (machine.flag(flags::ZF), machine.cpu.gpr[1])
    };
    let (lar, lsl, verr, verw) = (
        &[0x0f, 0x02, 0xc8][..],
        &[0x0f, 0x03, 0xc8][..],
        &[0x0f, 0x00, 0xe0][..],
        &[0x0f, 0x00, 0xe8][..],
    );
    assert_eq!(ask(lar, USER_DS.into()), (true, 0x00cf_f200 & 0xf0_ff00));
    assert_eq!(ask(lsl, USER_DS.into()), (true, 0xffff_ffff));
    assert_eq!(ask(lar, KERNEL_DS.into()), (false, 0x77));
    assert_eq!(ask(lsl, 0), (false, 0x77));
    assert!(
        ask(verr, USER_CS.into()).0 && !ask(verw, USER_CS.into()).0 && ask(verw, USER_DS.into()).0
    );
    assert!(!ask(verr, KERNEL_DS.into()).0 && !ask(verr, 0x1000).0);
}

#[test]
fn bases_and_swapgs() {
    let mut machine = Machine::new();
    machine.cpu.gpr[0] = 0xffff_8000_0000_0000;
    machine.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]).unwrap();
    assert_eq!(
        (machine.cpu.segments[5].base, machine.cpu.seg_base[5]),
        (0xffff_8000_0000_0000, 0xffff_8000_0000_0000)
    );
    machine.cpu.kernel_gs_base = 5;
    machine.run(&[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!(
        (machine.cpu.segments[5].base, machine.cpu.kernel_gs_base),
        (5, 0xffff_8000_0000_0000)
    );
    machine.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc9]).unwrap();
    assert_eq!(machine.cpu.gpr[1], 5);
    machine.cpu.gpr[0] = 1 << 50;
    assert_eq!(machine.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Err(REFUSED));
    machine.cpu.cr4 &= !control::CR4_FSGSBASE;
    assert_eq!(
        machine.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]),
        Err(Fault::UNDEFINED)
    );
}

#[test]
fn time_and_chance() {
    let mut machine = Machine::new();
    machine.cpu.tsc_aux = 9;
    machine.run(&[0x0f, 0x01, 0xf9]).unwrap();
    assert_eq!(machine.cpu.gpr[1], 9);
    machine.run(&[0xf3, 0x0f, 0xc7, 0xf8]).unwrap();
    assert_eq!(machine.cpu.gpr[0], 9);
    machine.cpu.gpr[3] = u64::MAX;
    machine.run(&[0x0f, 0xc7, 0xf3]).unwrap();
    assert_eq!(
        (machine.cpu.gpr[3] >> 32, machine.cpu.arith),
        (0, flags::CF)
    );
    machine.user(USER_CS);
    machine.cpu.cr4 |= control::CR4_TSD;
    assert_eq!(machine.run(&[0x0f, 0x31]), Err(REFUSED));
    assert_eq!(machine.run(&[0x0f, 0x33]), Err(REFUSED));
}

#[test]
fn decimal_adjustments() {
    let mut machine = Machine::new();
    machine.protected();
    // Instruction bytes, AX and flags before, AX and CF and AF after (SDM's examples and hand-made ones).
    for (bytes, ax, before, after, carry) in [
        (&[0x27][..], 0x00ae, 0, 0x0014, true), // daa
        (&[0x27], 0x0079 + 0x35, 0, 0x0014, true),
        (&[0x27], 0x0012, 0, 0x0012, false),
        (&[0x2f], 0x00ee, flags::CF | flags::AF, 0x0088, true), // das
        (&[0x2f], 0x0005, flags::AF, 0x00ff, true),
        (&[0x37], 0x000b, 0, 0x0101, true), // aaa
        (&[0x37], 0x0005, 0, 0x0005, false),
        (&[0x3f], 0x020f, 0, 0x0109, true),         // aas
        (&[0xd4, 10], 0x003f, 0, 0x0603, false),    // aam
        (&[0xd5, 10], 0x0603, 0, 0x003f, false),    // aad
        (&[0xd6], 0x1234, flags::CF, 0x12ff, true), // salc
    ] {
        machine.cpu.gpr[0] = ax;
        machine.cpu.arith = before;
        machine.run(bytes).unwrap();
        assert_eq!(
            (machine.cpu.gpr[0], machine.flag(flags::CF)),
            (after, carry),
            "{bytes:02x?} {ax:#x}"
        );
    }
    assert_eq!(machine.run(&[0xd4, 0]), Err(Fault::plain(0)));
}

#[test]
fn frames_bounds_and_tables() {
    let mut machine = Machine::new();
    machine.protected();
    for (i, register) in machine
        .cpu
        .gpr
        .iter_mut()
        .enumerate()
        .take(8)
        .filter(|(i, _)| *i != 4)
    {
        *register = 0x1111_1111 * (i as u64 + 1);
    }
    let before = machine.cpu.gpr;
    machine.run(&[0x60]).unwrap();
    assert_eq!(machine.cpu.gpr[4], STACK - 32);
    assert_eq!(machine.bytes::<4>(STACK - 20), (STACK as u32).to_le_bytes());
    machine.cpu.gpr = [0; 16];
    machine.cpu.gpr[4] = STACK - 32;
    machine.run(&[0x61]).unwrap();
    assert_eq!(machine.cpu.gpr, before);
    // enter 16, 2 copies one frame pointer.
    machine.cpu.gpr[5] = DATA + 0x100;
    machine.put(DATA + 0xfc, &[0xaa; 4]);
    machine.run(&[0xc8, 16, 0, 2]).unwrap();
    assert_eq!(
        (machine.cpu.gpr[5], machine.cpu.gpr[4]),
        (STACK - 4, STACK - 12 - 16)
    );
    assert_eq!(
        machine.bytes::<8>(STACK - 12),
        [0xfc, 0xff, 0x07, 0, 0xaa, 0xaa, 0xaa, 0xaa]
    );
    machine.put(DATA, &[0xfe, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
    machine.cpu.gpr[0] = DATA;
    for (index, ok) in [(-3i32, false), (-2, true), (5, true), (6, false)] {
        machine.cpu.gpr[1] = index as u32 as u64;
        assert_eq!(machine.run(&[0x62, 0x08]).is_ok(), ok, "{index}");
    }
    machine.cpu.gpr[3] = DATA;
    machine.cpu.gpr[0] = 4;
    machine.run(&[0xd7]).unwrap();
    assert_eq!(machine.cpu.gpr[0], 5);
}

#[test]
fn flushing_a_line_faults_like_a_load() {
    let mut machine = Machine::new();
    machine.cpu.gpr[0] = DATA;
    machine.run(&[0x0f, 0xae, 0x38]).unwrap();
    machine.cpu.gpr[0] = HOLE;
    assert_eq!(machine.run(&[0x0f, 0xae, 0x38]), Err(Fault::page(HOLE, 0)));
    assert_eq!(
        machine.run(&[0x0f, 0x01, 0x38]),
        Ok(Next::Continue),
        "invlpg does not"
    );
    assert_eq!(machine.run(&[0xf4]), Ok(Next::Halt));
    assert!(machine.cpu.halted);
}
