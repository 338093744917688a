//! Modes that a modern kernel leaves within its first instructions or never enters: real mode, protected mode without
//! paging, the older page tables; and the exceptions that only debuggers and careful programs ask for.

use iced_x86::code_asm::*;
use strata_engine::Exit;
use strata_engine::x86::Segment;
use strata_memory::Gpa;

use super::{CODE, STACK, TestMachine, flat};
use crate::cpu::{Cpu, flags};
use crate::env::Fault;

fn code(
    bits: u32,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut asm = CodeAssembler::new(bits).unwrap();
    build(&mut asm).unwrap();
    asm.assemble(if bits == 16 { 0 } else { CODE }).unwrap()
}

/// Runs a program in both configurations, after `set_up`.
fn run(program: &[u8], set_up: impl Fn(&mut TestMachine), check: impl Fn(&mut TestMachine)) {
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        set_up(&mut machine);
        assert_eq!(machine.run(program), Exit::Kicked);
        check(&mut machine);
    }
}

/// Like [`run`], for a program that ends in an exception: gives it and RIP.
fn fault(program: &[u8], set_up: impl Fn(&mut TestMachine)) -> (Fault, u64) {
    let mut ends = [false, true].map(|reference| {
        let mut machine = TestMachine::new(reference);
        set_up(&mut machine);
        machine.vcpu.stop_on_exception(true);
        machine.run(program);
        (
            machine.vcpu.take_stopped().expect("no exception"),
            machine.vcpu.cpu().rip,
        )
    });
    assert_eq!(ends[0], ends[1]);
    std::mem::replace(&mut ends[0], (Fault::UNDEFINED, 0))
}

/// Real mode with CS at [`CODE`], the stack segment at 0x70000, DS at 0x40000 and ES at 0x50000.
fn real_mode(cpu: &mut Cpu) {
    cpu.reset();
    for (index, base) in [(0, 0x5_0000), (1, CODE), (2, 0x7_0000), (3, 0x4_0000)] {
        let attributes = if index == 1 { 0x9b } else { 0x93 };
        cpu.set_segment(
            index,
            Segment {
                selector: (base >> 4) as u16,
                base,
                limit: 0xffff,
                attributes,
            },
        );
    }
    cpu.rip = 0;
    cpu.gpr[4] = 0xdead_0000;
}

/// 32-bit protected mode, flat, without paging.
fn protected_mode(cpu: &mut Cpu) {
    cpu.reset();
    cpu.set_segment(1, flat(8, 0xc09b));
    for index in [0, 2, 3, 4, 5] {
        cpu.set_segment(index, flat(16, 0xc093));
    }
    cpu.cr0 = 0x11;
    cpu.rip = CODE;
    cpu.gpr[4] = STACK;
}

#[test]
fn real_mode_adds_bases_and_wraps_offsets() {
    let program = code(16, |a| {
        a.mov(bx, 0xfff0u32)?;
        a.mov(si, 0x20u32)?;
        a.mov(word_ptr(bx + si), 0x1234u32)?; // DS:0x10
        a.mov(word_ptr(bp + 0x30), 0x5678u32)?; // SS:0x30
        a.mov(word_ptr(si).es(), bx)?; // ES:0x20
        a.db(&[0x66, 0x68, 0x44, 0x33, 0x22, 0x11])?; // push dword 0x11223344
        a.pop(edi)?;
        a.mov(dword_ptr(0x100), edi)?;
        a.push(bx)?; // SP wraps from 0 to 0xfffe
        a.pop(dx)?;
        a.mov(ax, word_ptr(0x10))?;
        a.mov(ecx, 0x12345u32)?;
        a.lea(di, dword_ptr(ecx * 2))?;
        a.bts(word_ptr(bx + si), cx)?;
        Ok(())
    });
    run(
        &program,
        |m| {
            real_mode(m.vcpu.cpu_mut());
            m.vcpu.cpu_mut().gpr[5] = 0xabcd_0000;
        },
        |m| {
            assert_eq!(m.memory.read_u16(Gpa(0x4_0010)).unwrap(), 0x1234);
            assert_eq!(m.memory.read_u16(Gpa(0x7_0030)).unwrap(), 0x5678);
            assert_eq!(m.memory.read_u16(Gpa(0x5_0020)).unwrap(), 0xfff0);
            assert_eq!(m.memory.read_u32(Gpa(0x4_0100)).unwrap(), 0x1122_3344);
            assert_eq!(m.memory.read_u32(Gpa(0x7_fffc)).unwrap(), 0xfff0_3344);
            assert_eq!(m.gpr(2) & 0xffff, 0xfff0);
            assert_eq!(m.gpr(0) & 0xffff, 0x1234);
            assert_eq!(m.gpr(7) & 0xffff, 0x468a);
            // Bit 0x2345 lies 0x234 words further, 5 bits in.
            assert_eq!(
                m.memory.read_u16(Gpa(0x4_0010 + 0x234 * 2)).unwrap(),
                1 << 5
            );
            assert_eq!(m.gpr(4) >> 16, 0xdead, "the upper half of ESP stays");
        },
    );
}

#[test]
fn real_mode_calls_and_interrupts() {
    let program = code(16, |a| {
        let mut function = a.create_label();
        let mut top = a.create_label();
        let mut done = a.create_label();
        a.xor(ax, ax)?;
        a.mov(cx, 10u32)?;
        a.set_label(&mut top)?;
        a.call(function)?;
        a.loop_(top)?;
        a.int(0x21)?;
        a.jmp(done)?;
        a.set_label(&mut function)?;
        a.add(ax, cx)?;
        a.ret()?;
        a.set_label(&mut done)?;
        a.nop()
    });
    run(
        &program,
        |m| {
            real_mode(m.vcpu.cpu_mut());
            m.vcpu.cpu_mut().gpr[4] = 0x100;
            m.memory.write(Gpa(0x21 * 4), &[0, 0, 0, 0x30]).unwrap();
            // inc bx; iret
            m.memory.write(Gpa(0x3_0000), &[0x43, 0xcf]).unwrap();
        },
        |m| {
            assert_eq!((m.gpr(0), m.gpr(3), m.gpr(4)), (55, 1, 0x100));
        },
    );
}

#[test]
fn segment_limits_hold() {
    let word_at_the_end = code(16, |a| a.mov(ax, word_ptr(0xffff)));
    let (end, _) = fault(&word_at_the_end, |m| real_mode(m.vcpu.cpu_mut()));
    assert_eq!(end, Fault::protection(0));

    let program = code(32, |a| {
        a.mov(eax, dword_ptr(0xffc))?;
        a.mov(dword_ptr(0xffd), eax)
    });
    let limited = |m: &mut TestMachine| {
        protected_mode(m.vcpu.cpu_mut());
        let data = Segment {
            limit: 0xfff,
            ..flat(16, 0x4093)
        };
        m.vcpu.cpu_mut().set_segment(3, data);
    };
    assert_eq!(fault(&program, limited), (Fault::protection(0), CODE + 5));

    let read_only = |m: &mut TestMachine| {
        protected_mode(m.vcpu.cpu_mut());
        m.vcpu.cpu_mut().set_segment(3, flat(16, 0xc091));
    };
    assert_eq!(fault(&program, read_only), (Fault::protection(0), CODE + 5));

    let past_the_end = |m: &mut TestMachine| {
        protected_mode(m.vcpu.cpu_mut());
        m.vcpu.cpu_mut().set_segment(
            1,
            Segment {
                limit: CODE as u32 + 4,
                ..flat(8, 0x409b)
            },
        );
    };
    let jump = code(32, |a| {
        let mut target = a.create_label();
        a.jmp(target)?;
        a.db(&[0x90; 8])?;
        a.set_label(&mut target)?;
        a.nop()
    });
    assert_eq!(fault(&jump, past_the_end).0, Fault::protection(0));
}

#[test]
fn protected_mode_without_paging() {
    let program = code(32, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.xor(eax, eax)?;
        a.set_label(&mut top)?;
        a.add(eax, ecx)?;
        a.inc(edx)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        a.pushad()?;
        a.popad()?;
        a.mov(ebx, 0xffff_fff0u32)?;
        a.mov(dword_ptr(ebx + 0x4_0010), eax)?; // wraps to 0x40000
        a.popcnt(si, ax)
    });
    run(
        &program,
        |m| protected_mode(m.vcpu.cpu_mut()),
        |m| {
            assert_eq!((m.gpr(0), m.gpr(2)), (5050, 0x600 + 100));
            assert_eq!(m.memory.read_u32(Gpa(0x4_0000)).unwrap(), 5050);
            assert_eq!(m.gpr(6), u64::from(5050u32.count_ones()));
        },
    );
}

#[test]
fn older_page_tables() {
    let program = code(32, |a| {
        a.mov(dword_ptr(0x40_1234), 0x1122_3344)?;
        a.mov(eax, dword_ptr(0x80_0234))
    });
    // 32-bit tables: a 4 MiB page, a table with one page, and a 4 MiB page elsewhere.
    let two_levels = |m: &mut TestMachine| {
        let cpu = m.vcpu.cpu_mut();
        protected_mode(cpu);
        (cpu.cr0, cpu.cr3, cpu.cr4) = (0x8000_0011, 0x5000, 0x10);
        for (at, entry) in [
            (0x5000, 0x83),
            (0x5004, 0x6003),
            (0x6004, 0x4_0003),
            (0x5008, 0x80_0083),
        ] {
            m.memory.write_u32(Gpa(at), entry).unwrap();
        }
        m.memory.write_u32(Gpa(0x80_0234), 77).unwrap();
    };
    let pae = |m: &mut TestMachine| {
        let cpu = m.vcpu.cpu_mut();
        protected_mode(cpu);
        (cpu.cr0, cpu.cr3, cpu.cr4) = (0x8000_0011, 0x5020, 0x20);
        for (at, entry) in [
            (0x5020, 0x6001),
            (0x6000, 0x83),
            (0x6010, 0x7003),
            (0x7008, 0x4_0003),
            (0x6020, 0x80_0083),
        ] {
            m.memory.write_u64(Gpa(at), entry).unwrap();
        }
        m.memory.write_u32(Gpa(0x80_0234), 77).unwrap();
    };
    let check = |m: &mut TestMachine| {
        assert_eq!(m.memory.read_u32(Gpa(0x4_0234)).unwrap(), 0x1122_3344);
        assert_eq!(m.gpr(0), 77);
    };
    run(&program, two_levels, check);
    run(&program, pae, check);
    let missing = code(32, |a| a.mov(byte_ptr(0x40_5000), 1));
    for tables in [&two_levels as &dyn Fn(&mut TestMachine), &pae] {
        assert_eq!(fault(&missing, tables), (Fault::page(0x40_5000, 2), CODE));
    }
}

/// The path of an application processor's trampoline: real mode, protected mode, long mode.
#[test]
fn from_a_startup_vector_to_long_mode() {
    const PAGE: u64 = 0x9000;
    let write =
        |m: &mut TestMachine, at: u64, bytes: &[u8]| m.memory.write(Gpa(at), bytes).unwrap();
    for reference in [false, true] {
        let mut m = TestMachine::new(reference);
        let mut real = CodeAssembler::new(16).unwrap();
        real.cli().unwrap();
        real.mov(ax, cs).unwrap();
        real.mov(ds, ax).unwrap();
        real.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x08]).unwrap(); // lgdt [0x800], 32 bits
        real.mov(eax, cr0).unwrap();
        real.or(eax, 1).unwrap();
        real.mov(cr0, eax).unwrap();
        real.db(&[0x66, 0xea, 0x00, 0x92, 0x00, 0x00, 0x08, 0x00])
            .unwrap(); // jmp dword 8:0x9200
        write(&mut m, PAGE, &real.assemble(0).unwrap());
        let mut gdt = vec![0x1f, 0];
        gdt.extend((PAGE as u32 + 0x810).to_le_bytes());
        write(&mut m, PAGE + 0x800, &gdt);
        for (i, descriptor) in [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
        ]
        .iter()
        .enumerate()
        {
            m.memory
                .write_u64(Gpa(PAGE + 0x810 + i as u64 * 8), *descriptor)
                .unwrap();
        }
        let mut protected = CodeAssembler::new(32).unwrap();
        protected.mov(ax, 0x10u32).unwrap();
        protected.mov(ds, eax).unwrap();
        protected.mov(ss, eax).unwrap();
        protected.mov(esp, STACK as u32).unwrap();
        protected.mov(eax, 0x20).unwrap();
        protected.mov(cr4, eax).unwrap();
        protected.mov(eax, 0x1000).unwrap();
        protected.mov(cr3, eax).unwrap();
        protected.mov(ecx, 0xc000_0080u32).unwrap();
        protected.rdmsr().unwrap();
        protected.or(eax, 0x100).unwrap();
        protected.wrmsr().unwrap();
        protected.mov(eax, cr0).unwrap();
        protected.or(eax, 0x8000_0000u32 as i32).unwrap();
        protected.mov(cr0, eax).unwrap();
        // Still 32-bit code, in compatibility mode now.
        protected.push(0x18).unwrap();
        protected.push(CODE as i32).unwrap();
        protected.retf().unwrap();
        write(
            &mut m,
            PAGE + 0x200,
            &protected.assemble(PAGE + 0x200).unwrap(),
        );
        let cpu = m.vcpu.cpu_mut();
        cpu.reset();
        cpu.start_at((PAGE >> 12) as u8);
        let program = code(64, |a| a.mov(r15, 0x1122_3344_5566_7788u64));
        assert_eq!(m.run(&program), Exit::Kicked);
        assert_eq!(m.gpr(15), 0x1122_3344_5566_7788);
        assert!(m.vcpu.cpu().code_64());
    }
}

/// Turns breakpoint 0 on: DR7's R/W and LEN bits.
fn watch(m: &mut TestMachine, address: u64, control: u64) {
    let cpu = m.vcpu.cpu_mut();
    cpu.dr[0] = address;
    cpu.dr7 = 0x402 | control << 16;
    cpu.cr4 |= 8;
}

#[test]
fn breakpoints() {
    let program = code(64, |a| {
        a.mov(ebx, dword_ptr(0x4_0004))?; // 7 bytes
        a.nop()?;
        a.mov(dword_ptr(0x4_0000), ebx)?; // 7 bytes
        a.in_(al, 0x70)?;
        a.nop()
    });
    let debug = Fault::plain(1);
    // Execute: before the instruction. Write, read or write, and port: after it.
    assert_eq!(
        fault(&program, |m| watch(m, CODE + 7, 0)),
        (debug, CODE + 7)
    );
    assert_eq!(
        fault(&program, |m| watch(m, 0x4_0002, 0b0101)),
        (debug, CODE + 15)
    );
    assert_eq!(
        fault(&program, |m| watch(m, 0x4_0007, 0b0011)),
        (debug, CODE + 7)
    );
    assert_eq!(
        fault(&program, |m| watch(m, 0x70, 0b0010)),
        (debug, CODE + 17)
    );
    // A write breakpoint does not see the load; RF hides an execute breakpoint for one instruction.
    run(
        &program,
        |m| watch(m, 0x4_0004, 0b1101),
        |m| assert_eq!(m.vcpu.cpu().dr6 & 15, 0),
    );
    run(
        &program,
        |m| {
            watch(m, CODE, 0);
            m.vcpu.cpu_mut().system_flags |= flags::RF;
        },
        |m| assert_eq!(m.vcpu.cpu().system_flags & flags::RF, 0),
    );
}

#[test]
fn a_repeated_string_instruction_stops_at_a_breakpoint() {
    let program = code(64, |a| {
        a.mov(edi, 0x4_0000)?;
        a.mov(ecx, 100)?;
        a.rep().stosb()
    });
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        watch(&mut machine, 0x4_0009, 0b0001);
        machine.vcpu.stop_on_exception(true);
        machine.run(&program);
        assert_eq!(machine.vcpu.take_stopped(), Some(Fault::plain(1)));
        assert_eq!((machine.gpr(1), machine.gpr(7)), (90, 0x4_000a));
        assert_eq!(machine.vcpu.cpu().dr6 & 15, 1);
    }
}

#[test]
fn single_steps() {
    let program = code(64, |a| {
        a.mov(ss, eax)?; // 2 bytes; holds the trap back
        a.nop()?;
        a.nop()
    });
    let stepping = |m: &mut TestMachine| {
        let cpu = m.vcpu.cpu_mut();
        cpu.gpr[0] = 16;
        cpu.set_rflags(2 | flags::TF);
        cpu.gdtr.base = 0x9000;
        cpu.gdtr.limit = 0x1f;
        m.memory
            .write_u64(Gpa(0x9010), 0x00cf_9300_0000_ffff)
            .unwrap();
    };
    assert_eq!(fault(&program, stepping), (Fault::plain(1), CODE + 3));
    // An instruction that faults is not stepped over.
    let (end, rip) = fault(&[0x0f, 0x0b], stepping);
    assert_eq!((end, rip), (Fault::UNDEFINED, CODE));
}

#[test]
fn hypercalls_are_answered() {
    // vmcall; mov ebx, eax; vmmcall
    run(
        &[0x0f, 0x01, 0xc1, 0x89, 0xc3, 0x0f, 0x01, 0xd9],
        |_| {},
        |m| {
            assert_eq!((m.gpr(0) as i64, m.gpr(3) as u32 as i32), (-1000, -1000));
        },
    );
}

#[test]
fn user_code_may_ask_for_alignment_checks() {
    let program = code(64, |a| {
        a.mov(ebx, dword_ptr(0x4_0004))?;
        a.movups(xmm0, xmmword_ptr(0x4_0001))?;
        a.mov(bx, word_ptr(0x4_0001))
    });
    let user = |m: &mut TestMachine| {
        let cpu = m.vcpu.cpu_mut();
        cpu.set_segment(1, flat(0x1b, 0xa0fb));
        cpu.set_segment(2, flat(0x23, 0xc0f3));
        cpu.cr0 |= 1 << 18;
        cpu.set_rflags(2 | flags::AC);
    };
    assert_eq!(
        fault(&program, user),
        (
            Fault {
                vector: 17,
                error: Some(0),
                cr2: 0
            },
            CODE + 15
        )
    );
}

#[test]
fn control_bits_of_other_vendors_are_refused() {
    // MXCSR.MM, which AMD's processors have.
    let program = code(64, |a| a.ldmxcsr(dword_ptr(0x4_0000)));
    let value =
        |mxcsr| move |m: &mut TestMachine| m.memory.write_u32(Gpa(0x4_0000), mxcsr).unwrap();
    let protection = (Fault::protection(0), CODE);
    assert_eq!(fault(&program, value(0x2_1f80)), protection);
    run(&program, value(0x3f80), |m| {
        assert_eq!(m.vcpu.cpu().mxcsr, 0x3f80)
    });
}

/// The smallest system of two tasks: 0x18 is the first one's TSS, 0x20 the second one's, 0x28 a task gate to it.
fn two_tasks(m: &mut TestMachine, second: u32) {
    protected_mode(m.vcpu.cpu_mut());
    let tss = |base: u64| 0x0000_8900_0000_0067 | (base & 0xffff) << 16 | (base >> 16 & 0xff) << 32;
    let gdt = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        tss(0xa000) | 2 << 40,
        tss(0xb000),
        0x0000_8500_0020_0000,
    ];
    for (i, descriptor) in gdt.into_iter().enumerate() {
        m.memory
            .write_u64(Gpa(0x9000 + i as u64 * 8), descriptor)
            .unwrap();
    }
    // A task gate for #UD.
    m.memory
        .write_u64(Gpa(0x9100 + 6 * 8), 0x0000_8500_0020_0000)
        .unwrap();
    for (at, value) in [(32, second), (36, 2), (40, 0x77), (56, 0x7_0000)] {
        m.memory.write_u32(Gpa(0xb000 + at), value).unwrap();
    }
    for (i, selector) in [0x10, 8, 0x10, 0x10, 0x10, 0x10].into_iter().enumerate() {
        m.memory
            .write_u32(Gpa(0xb000 + 72 + i as u64 * 4), selector)
            .unwrap();
    }
    let cpu = m.vcpu.cpu_mut();
    (cpu.gdtr.base, cpu.gdtr.limit) = (0x9000, 0x2f);
    (cpu.idtr.base, cpu.idtr.limit) = (0x9100, 0xff);
    cpu.tr = Segment {
        selector: 0x18,
        base: 0xa000,
        limit: 0x67,
        attributes: 0x8b,
    };
}

#[test]
fn tasks_call_each_other_and_return() {
    let first = code(32, |a| {
        a.mov(ebx, 5)?;
        a.db(&[0x9a, 0, 0, 0, 0, 0x28, 0])?; // call far through the gate
        a.add(ebx, eax) // the first task's own registers again
    });
    let second = code(32, |a| {
        a.add(eax, 1)?;
        a.mov(dword_ptr(0x4_0000), eax)?;
        a.iretd()
    });
    run(
        &first,
        |m| {
            two_tasks(m, 0x2_0000);
            m.memory.write(Gpa(0x2_0000), &second).unwrap();
        },
        |m| {
            assert_eq!(m.memory.read_u32(Gpa(0x4_0000)).unwrap(), 0x78);
            assert_eq!((m.gpr(0), m.gpr(3)), (0, 5));
            assert_eq!(m.vcpu.cpu().tr.selector, 0x18);
            assert_eq!(m.vcpu.cpu().system_flags & flags::NT, 0);
            assert_eq!(m.memory.read_u16(Gpa(0xb000)).unwrap(), 0x18, "the link");
            let kind = |at| m.memory.read_u64(Gpa(at)).unwrap() >> 40 & 15;
            assert_eq!((kind(0x9018), kind(0x9020)), (11, 9), "which task is busy");
        },
    );
}

#[test]
fn a_task_handles_an_exception() {
    // The handler moves the first task's instruction pointer over the UD2.
    let handler = code(32, |a| {
        a.add(dword_ptr(0xa000 + 32), 2)?;
        a.iretd()
    });
    run(
        &[0x0f, 0x0b, 0x43], // ud2; inc ebx
        |m| {
            two_tasks(m, 0x2_0000);
            m.memory.write(Gpa(0x2_0000), &handler).unwrap();
        },
        |m| assert_eq!((m.gpr(3), m.vcpu.cpu().tr.selector), (1, 0x18)),
    );
}
