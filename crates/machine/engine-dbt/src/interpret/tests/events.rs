//! Exceptions, interrupts, system calls and returns, in all modes.

use super::super::{Event, Next, Origin};
use super::*;

const HANDLER: u64 = 0xffff_8000_0000_1000;
const INTERRUPT_GATE: u64 = 0x8e;
const TRAP_GATE: u64 = 0x8f;

fn event(machine: &Machine, vector: u8, origin: Origin) -> Event {
    Event {
        vector,
        error: None,
        origin,
        rip: machine.cpu.rip,
    }
}

#[test]
fn an_interrupt_of_user_code_goes_through_the_tss_and_returns() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    machine.gate(0x40, HANDLER, INTERRUPT_GATE, 0);
    machine
        .cpu
        .set_rflags(0x2 | flags::IF | flags::TF | flags::NT | flags::CF);
    let image = machine.cpu.rflags();
    assert_eq!(machine.exec().inject(0x40, false), Next::Continue);
    assert_eq!((machine.cpu.rip, machine.cpu.cpl()), (HANDLER, 0));
    assert_eq!(machine.cpu.rflags(), 2 | flags::CF);
    assert_eq!(machine.cpu.segments[2].selector, 0);
    let rsp = machine.cpu.gpr[4];
    assert_eq!(rsp, KERNEL_STACK - 40);
    let frame: Vec<u64> = (0..5).map(|i| machine.u64(rsp + i * 8)).collect();
    assert_eq!(frame, [CODE, USER_CS.into(), image, STACK, USER_DS.into()]);
    // NT stays in the image; IRET with NT set in the current flags would fault, and it is not.
    machine.run(&[0x48, 0xcf]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (CODE, 3, STACK)
    );
    assert_eq!(machine.cpu.rflags(), image);
    assert_eq!(machine.cpu.segments[2].selector, USER_DS);
    assert!(machine.cpu.code_64());
}

#[test]
fn nested_interrupts_keep_a_null_stack_segment() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    machine.gate(0x40, HANDLER, INTERRUPT_GATE, 0);
    machine.exec().inject(0x40, false);
    machine.cpu.gpr[4] -= 8;
    let outer = machine.cpu.gpr[4];
    machine.exec().inject(0x40, false);
    // The new frame is aligned.
    assert_eq!(machine.cpu.gpr[4], (outer & !15) - 40);
    assert_eq!(machine.u64(machine.cpu.gpr[4] + 32), 0);
    machine.run(&[0x48, 0xcf]).unwrap();
    assert_eq!(
        (
            machine.cpu.gpr[4],
            machine.cpu.cpl(),
            machine.cpu.segments[2].selector
        ),
        (outer, 0, 0)
    );
}

#[test]
fn nmis_use_the_interrupt_stack_table_and_block_each_other_until_iret() {
    let mut machine = Machine::new();
    machine.gate(2, HANDLER, INTERRUPT_GATE, 1);
    machine.cpu.halted = true;
    machine.exec().inject(0, true);
    assert!(machine.cpu.nmi_blocked && !machine.cpu.halted);
    assert_eq!(machine.cpu.gpr[4], IST_STACK - 40);
    machine.run(&[0x48, 0xcf]).unwrap();
    assert!(!machine.cpu.nmi_blocked);
    assert_eq!(machine.cpu.segments[2].selector, KERNEL_DS);
}

#[test]
fn faults_push_codes_and_set_resume_in_the_image() {
    let mut machine = Machine::new();
    machine.gate(14, HANDLER, INTERRUPT_GATE, 0);
    machine.gate(1, HANDLER, TRAP_GATE, 0);
    assert_eq!(
        machine.exec().raise(Fault::page(0xdead_0000, 7)),
        Next::Continue
    );
    assert_eq!(machine.cpu.cr2, 0xdead_0000);
    assert_eq!(machine.u64(machine.cpu.gpr[4]), 7);
    assert_eq!(machine.u64(machine.cpu.gpr[4] + 24) & flags::RF, flags::RF);
    machine.cpu.interrupts_on = 1;
    machine.cpu.dr7 |= 1 << 13;
    machine.exec().raise_trap(1);
    assert_eq!(machine.u64(machine.cpu.gpr[4] + 16) & flags::RF, 0);
    assert!(machine.flag(flags::IF), "a trap gate leaves interrupts on");
    assert_eq!(machine.cpu.dr7 & 1 << 13, 0);
}

#[test]
fn software_interrupts_need_the_gates_privilege() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    machine.gate(0x80, HANDLER, INTERRUPT_GATE, 0);
    machine.gate(3, HANDLER, INTERRUPT_GATE | 0x60, 0);
    assert_eq!(
        machine.run(&[0xcd, 0x80]),
        Err(Fault::protection(0x80 * 8 + 2))
    );
    assert_eq!(machine.cpu.rip, CODE);
    machine.gate(0x80, HANDLER, INTERRUPT_GATE | 0x60, 0);
    machine.run(&[0xcd, 0x80]).unwrap();
    assert_eq!(machine.u64(machine.cpu.gpr[4]), CODE + 2);
    machine.run(&[0x48, 0xcf]).unwrap();
    machine.cpu.rip = CODE;
    machine.run(&[0xcc]).unwrap();
    assert_eq!(machine.u64(machine.cpu.gpr[4]), CODE + 1);
    // Not present, not a gate, beyond the limit.
    machine.gate(0x81, HANDLER, 0x6e, 0);
    machine.gate(0x82, HANDLER, 0xe5, 0);
    machine.cpu.idtr.limit = 0x83 * 16 - 1;
    assert_eq!(
        machine.run(&[0xcd, 0x81]),
        Err(Fault {
            vector: 11,
            error: Some(0x81 * 8 + 2),
            cr2: 0
        })
    );
    assert_eq!(
        machine.run(&[0xcd, 0x82]),
        Err(Fault::protection(0x82 * 8 + 2))
    );
    assert_eq!(
        machine.run(&[0xcd, 0x83]),
        Err(Fault::protection(0x83 * 8 + 2))
    );
}

#[test]
fn faults_upon_faults_double_or_shut_down() {
    let mut machine = Machine::new();
    machine.gate(8, HANDLER, INTERRUPT_GATE, 1);
    machine.gate(14, HANDLER + 1, INTERRUPT_GATE, 0);
    // #GP's gate is missing: #NP upon #GP is a double fault with code 0.
    assert_eq!(machine.exec().raise(Fault::protection(0)), Next::Continue);
    assert_eq!(
        (machine.cpu.rip, machine.u64(machine.cpu.gpr[4])),
        (HANDLER, 0)
    );
    // A page fault while #UD (benign) is delivered is just a page fault.
    machine.gate(6, HANDLER, INTERRUPT_GATE, 0);
    machine.cpu.gpr[4] = HOLE + 0x100;
    machine.gate(14, HANDLER + 1, INTERRUPT_GATE, 1);
    machine.exec().raise(Fault::UNDEFINED);
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cr2 & !0xfff),
        (HANDLER + 1, HOLE)
    );
    // A page fault upon a page fault doubles.
    machine.gate(14, HANDLER + 1, INTERRUPT_GATE, 0);
    machine.cpu.gpr[4] = HOLE + 0x100;
    machine.exec().raise(Fault::page(0, 0));
    assert_eq!(machine.cpu.rip, HANDLER);
    // And with nowhere to go, the machine shuts down.
    machine.cpu.idtr.limit = 0;
    assert_eq!(machine.exec().raise(Fault::UNDEFINED), Next::Shutdown);
}

#[test]
fn errors_on_the_way_of_external_events_say_so() {
    let mut machine = Machine::new();
    let external = event(&machine, 0x55, Origin::External);
    assert_eq!(
        machine.exec().deliver(external),
        Err(Fault::protection(0x55 * 8 + 3))
    );
    machine.user(USER_CS);
    machine.gate(0x55, HANDLER, INTERRUPT_GATE, 0);
    machine.cpu.tr.limit = 10;
    let before = (machine.cpu.gpr, machine.cpu.segments, machine.cpu.rip);
    let fault = machine.exec().deliver(external).unwrap_err();
    assert_eq!(
        fault,
        Fault {
            vector: 10,
            error: Some(0x41),
            cr2: 0
        }
    );
    assert_eq!(
        before,
        (machine.cpu.gpr, machine.cpu.segments, machine.cpu.rip)
    );
}

#[test]
fn syscall_and_sysret_cross_the_border() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    machine.cpu.star = u64::from(KERNEL_CS) << 32 | 0x1b << 48;
    machine.cpu.lstar = HANDLER;
    machine.cpu.sfmask = flags::IF | flags::DF | flags::TF;
    machine
        .cpu
        .set_rflags(2 | flags::IF | flags::DF | flags::ZF);
    let image = machine.cpu.rflags();
    machine.run(&[0x0f, 0x05]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.gpr[1], machine.cpu.gpr[11]),
        (HANDLER, CODE + 2, image)
    );
    assert_eq!(
        (machine.cpu.cpl(), machine.cpu.rflags()),
        (0, 2 | flags::ZF)
    );
    assert_eq!(
        (
            machine.cpu.segments[1].selector,
            machine.cpu.segments[2].selector
        ),
        (8, 16)
    );
    machine.run(&[0x48, 0x0f, 0x07]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.rflags(), machine.cpu.cpl()),
        (CODE + 2, image, 3)
    );
    assert_eq!(
        (
            machine.cpu.segments[1].selector,
            machine.cpu.segments[2].selector
        ),
        (0x2b, 0x23)
    );
    assert!(machine.cpu.code_64());
    assert_eq!(machine.run(&[0x48, 0x0f, 0x07]), Err(REFUSED), "at CPL 3");
    // To 32-bit code; and not to a non-canonical address.
    machine.run(&[0x0f, 0x05]).unwrap();
    machine.cpu.gpr[1] = 1 << 47;
    assert_eq!(machine.run(&[0x48, 0x0f, 0x07]), Err(REFUSED));
    machine.run(&[0x0f, 0x07]).unwrap();
    assert_eq!(
        (
            machine.cpu.code_bits(),
            machine.cpu.segments[1].selector,
            machine.cpu.rip
        ),
        (32, 0x1b, 0)
    );
    assert_eq!(
        machine.run(&[0x0f, 0x05]),
        Err(Fault::UNDEFINED),
        "32-bit code"
    );
}

#[test]
fn sysenter_and_sysexit_too() {
    let mut machine = Machine::new();
    machine.user(USER_CS32);
    assert_eq!(machine.run(&[0x0f, 0x34]), Err(REFUSED));
    (
        machine.cpu.sysenter_cs,
        machine.cpu.sysenter_esp,
        machine.cpu.sysenter_eip,
    ) = (8, KERNEL_STACK, HANDLER);
    machine.run(&[0x0f, 0x34]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.gpr[4], machine.cpu.cpl()),
        (HANDLER, KERNEL_STACK, 0)
    );
    assert!(machine.cpu.code_64());
    (machine.cpu.gpr[1], machine.cpu.gpr[2]) = (STACK, CODE);
    machine.run(&[0x0f, 0x35]).unwrap();
    assert_eq!(
        (
            machine.cpu.rip,
            machine.cpu.code_bits(),
            machine.cpu.segments[1].selector
        ),
        (CODE, 32, 0x1b)
    );
}

#[test]
fn far_returns_and_jumps_change_the_mode() {
    let mut machine = Machine::new();
    // retfq to 32-bit kernel code.
    machine.cpu.gpr[4] -= 16;
    machine.put_u64(STACK - 16, CODE + 0x100);
    machine.put_u64(STACK - 8, KERNEL_CS32.into());
    machine.run(&[0x48, 0xcb]).unwrap();
    assert_eq!(
        (machine.cpu.code_bits(), machine.cpu.rip, machine.cpu.gpr[4]),
        (32, CODE + 0x100, STACK)
    );
    // jmp far 0x08:CODE, back to 64-bit code.
    machine.run(&[0xea, 0, 0, 1, 0, 8, 0]).unwrap();
    assert_eq!((machine.cpu.code_bits(), machine.cpu.rip), (64, CODE));
    // retfq to user mode drops privileged data segments.
    machine.cpu.gpr[4] -= 32;
    for (i, value) in [CODE + 5, USER_CS.into(), STACK, USER_DS.into()]
        .into_iter()
        .enumerate()
    {
        machine.put_u64(STACK - 32 + i as u64 * 8, value);
    }
    machine.run(&[0x48, 0xca, 0x10, 0]).unwrap_err();
    machine.run(&[0x48, 0xcb]).unwrap();
    assert_eq!(
        (machine.cpu.cpl(), machine.cpu.rip, machine.cpu.gpr[4]),
        (3, CODE + 5, STACK)
    );
    assert!(machine.cpu.segments[3].null() && machine.cpu.segments[0].null());
    // No way back in without a gate.
    machine.put_u64(DATA, 0);
    machine.put(DATA, &[0, 0, 1, 0, 8, 0]);
    machine.cpu.gpr[0] = DATA;
    assert_eq!(machine.run(&[0xff, 0x28]), Err(Fault::protection(8)));
}

#[test]
fn a_call_gate_leads_to_the_kernels_stack() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    // A 64-bit call gate for everyone at selector 0x50.
    let handler = HANDLER;
    machine.put_u64(
        GDT + 0x50,
        handler & 0xffff | 8 << 16 | 0xec << 40 | (handler >> 16 & 0xffff) << 48,
    );
    machine.put_u64(GDT + 0x58, handler >> 32);
    machine.cpu.gdtr.limit = 0x5f;
    machine.put(DATA, &[0, 0, 0, 0, 0x53, 0]);
    machine.cpu.gpr[0] = DATA;
    machine.run(&[0xff, 0x18]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (HANDLER, 0, KERNEL_STACK - 32)
    );
    let frame: Vec<u64> = (0..4)
        .map(|i| machine.u64(KERNEL_STACK - 32 + i * 8))
        .collect();
    assert_eq!(frame, [CODE + 2, USER_CS.into(), STACK, USER_DS.into()]);
    machine.run(&[0x48, 0xcb]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (CODE + 2, 3, STACK)
    );
}

#[test]
fn real_mode_calls_interrupts_and_returns() {
    let mut machine = Machine::new();
    machine.real();
    machine.put(0x21 * 4, &[0x34, 0x12, 0x00, 0x20]);
    machine.cpu.set_rflags(2 | flags::IF | flags::CF);
    machine.run(&[0xcd, 0x21]).unwrap();
    assert_eq!(
        (
            machine.cpu.rip,
            machine.cpu.segments[1].base,
            machine.cpu.gpr[4]
        ),
        (0x1234, 0x2_0000, 0x7ffa)
    );
    assert_eq!(machine.bytes::<6>(0x7ffa), [2, 0, 0x00, 0x10, 0x03, 0x02]);
    assert!(!machine.flag(flags::IF));
    machine.run(&[0xcf]).unwrap();
    assert_eq!(
        (
            machine.cpu.rip,
            machine.cpu.segments[1].base,
            machine.cpu.gpr[4]
        ),
        (2, CODE, 0x8000)
    );
    assert!(machine.flag(flags::IF));
    machine.run(&[0x9a, 0x10, 0x00, 0x00, 0x30]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.segments[1].base),
        (0x10, 0x3_0000)
    );
    machine.run(&[0xcb]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.segments[1].selector),
        (7, 0x1000)
    );
    // Segment registers are bases here.
    machine.cpu.gpr[0] = 0x1234;
    machine.run(&[0x8e, 0xd8]).unwrap();
    assert_eq!(
        (machine.cpu.segments[3].base, machine.cpu.segments[3].limit),
        (0x1_2340, 0xffff)
    );
}

fn gate_32(machine: &mut Machine, vector: u8, handler: u64, attributes: u64) {
    let low = handler & 0xffff
        | u64::from(KERNEL_CS32) << 16
        | attributes << 40
        | (handler >> 16 & 0xffff) << 48;
    machine.put_u64(IDT + u64::from(vector) * 8, low);
}

#[test]
fn protected_mode_without_long_mode_has_its_own_frames() {
    let mut machine = Machine::new();
    machine.protected();
    gate_32(&mut machine, 0x30, 0x1234_5678, 0xee);
    // ESP0 and SS0.
    machine.put(TSS + 4, &(KERNEL_STACK as u32).to_le_bytes());
    machine.put(TSS + 8, &[0x10, 0]);
    machine.user(USER_CS32);
    machine.run(&[0xcd, 0x30]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (0x1234_5678, 0, KERNEL_STACK - 20)
    );
    let mut words = [0u32; 5];
    for (i, word) in words.iter_mut().enumerate() {
        *word = u32::from_le_bytes(machine.bytes(KERNEL_STACK - 20 + i as u64 * 4));
    }
    assert_eq!(
        words,
        [
            CODE as u32 + 2,
            USER_CS32.into(),
            2,
            STACK as u32,
            USER_DS.into()
        ]
    );
    machine.run(&[0xcf]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (CODE + 2, 3, STACK)
    );
    // With an error code and no change of privilege.
    machine.protected();
    for index in [0, 2, 3] {
        machine.cpu.set_segment(index, flat(KERNEL_DS, 0xc093));
    }
    gate_32(&mut machine, 13, 0x1000, 0x8e);
    machine.exec().raise(Fault::protection(0x18));
    assert_eq!((machine.cpu.rip, machine.cpu.gpr[4]), (0x1000, STACK - 16));
    assert_eq!(machine.bytes::<4>(STACK - 16), [0x18, 0, 0, 0]);
}

#[test]
fn virtual_8086_mode_is_entered_by_iret_and_left_by_interrupts() {
    let mut machine = Machine::new();
    machine.protected();
    gate_32(&mut machine, 0x30, 0x5000, 0xee);
    machine.put(TSS + 4, &(KERNEL_STACK as u32).to_le_bytes());
    machine.put(TSS + 8, &[0x10, 0]);
    let frame = [
        0x100,
        0x1000,
        (flags::VM | flags::IF | flags::IOPL | 2) as u32,
        0xfffe,
        0x2000,
        0x11,
        0x22,
        0x33,
        0x44,
    ];
    machine.cpu.gpr[4] = STACK - 36;
    for (i, word) in frame.iter().enumerate() {
        machine.put(STACK - 36 + i as u64 * 4, &u32::to_le_bytes(*word));
    }
    machine.run(&[0xcf]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.code_bits()),
        (0x100, 3, 16)
    );
    assert_eq!(
        machine.cpu.segments.map(|s| s.selector),
        [0x11, 0x1000, 0x2000, 0x22, 0x33, 0x44]
    );
    machine.run(&[0xcd, 0x30]).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.cpl(), machine.cpu.gpr[4]),
        (0x5000, 0, KERNEL_STACK - 36)
    );
    assert!(!machine.flag(flags::VM) && machine.cpu.segments[3].null());
    machine.run(&[0xcf]).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.gpr[4]), (0x102, 0xfffe));
    assert!(machine.flag(flags::VM));
    // Below IOPL 3, flags and interrupts are the monitor's.
    machine.cpu.system_flags &= !flags::IOPL;
    for bytes in [&[0xcd, 0x30][..], &[0x9c], &[0x9d], &[0xcf], &[0xfa]] {
        assert_eq!(machine.run(bytes), Err(REFUSED), "{bytes:02x?}");
    }
}

#[test]
fn flags_move_within_what_the_privilege_allows() {
    let mut machine = Machine::new();
    machine.user(USER_CS);
    let all = flags::ARITH
        | flags::IF
        | flags::IOPL
        | flags::DF
        | flags::AC
        | flags::ID
        | flags::RF
        | flags::VM;
    machine.put_u64(STACK, all);
    machine.run(&[0x9d]).unwrap();
    assert_eq!(
        machine.cpu.rflags(),
        2 | flags::ARITH | flags::DF | flags::AC | flags::ID
    );
    assert_eq!(machine.run(&[0xfa]), Err(REFUSED));
    machine.cpu.system_flags |= flags::IOPL;
    machine.put_u64(STACK + 8, flags::IF);
    machine.run(&[0x66, 0x9d]).unwrap();
    assert_eq!(
        machine.cpu.rflags(),
        2 | flags::IF | flags::AC | flags::ID | flags::IOPL,
        "the upper half stays"
    );
    machine.run(&[0x9c]).unwrap();
    assert_eq!(machine.u64(machine.cpu.gpr[4]), machine.cpu.rflags());
}
