//! Several vCPUs, each on a thread of its own: shared counters, code that others change, start-up and interrupts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use strata_engine::x86::MpState;
use strata_engine::{Engine, Exit, Inputs, MachineClock, Vcpu, VcpuId};
use strata_memory::{Gpa, GuestMemory};

use super::{END, TestBus, long_mode, page_tables};
use crate::cpu::Cpu;
use crate::dispatch::Translated;
use crate::{Translator, TranslatorConfig};

/// Code of vCPU `n`: a page of its own.
fn code_of(n: usize) -> u64 {
    0x1_0000 + n as u64 * 0x1000
}

type Built = Result<(), iced_x86::IcedError>;

/// A program for vCPU `n`, ended.
fn program(n: usize, build: impl Fn(usize, &mut CodeAssembler) -> Built) -> Vec<u8> {
    let mut asm = CodeAssembler::new(64).unwrap();
    build(n, &mut asm).unwrap();
    let mut bytes = asm.assemble(code_of(n)).unwrap();
    bytes.extend(END);
    bytes
}

struct Machine {
    memory: GuestMemory,
    engine: Translator,
    vcpus: Vec<Translated>,
}

impl Machine {
    fn new(count: usize, reference: bool) -> Machine {
        let memory = page_tables();
        let clock = Arc::new(MachineClock::new(1_000_000_000));
        clock.start();
        let engine = Translator::new(TranslatorConfig {
            memory: memory.clone(),
            clock,
            model: strata_engine::x86::CpuModel::named("baseline").unwrap(),
            vcpus: count as u32,
            reference,
            count: false,
            lockstep: 0,
        })
        .unwrap();
        engine.inspect(Arc::new(strata_verify::Verifier::new()));
        let vcpus = (0..count as u32)
            .map(|id| engine.create_with_inputs(VcpuId(id), Inputs::Live).unwrap())
            .collect();
        Machine {
            memory,
            engine,
            vcpus,
        }
    }

    /// Puts a program on each vCPU, in 64-bit mode with a stack.
    fn load(&mut self, build: impl Fn(usize, &mut CodeAssembler) -> Built) {
        for (n, vcpu) in self.vcpus.iter_mut().enumerate() {
            self.memory
                .write(Gpa(code_of(n)), &program(n, &build))
                .unwrap();
            let cpu: &mut Cpu = vcpu.cpu_mut();
            long_mode(cpu);
            cpu.wait_for_sipi = false;
            cpu.rip = code_of(n);
            cpu.gpr[4] = 0x8_0000 + n as u64 * 0x1000;
            cpu.idtr = strata_engine::x86::DescriptorTable {
                base: 0x5000,
                limit: 0xfff,
            };
            cpu.gdtr = strata_engine::x86::DescriptorTable {
                base: 0x6000,
                limit: 0xff,
            };
        }
        // Code and data of ring 0, as `long_mode` has them loaded.
        self.memory
            .write_u64(Gpa(0x6008), 0x00af_9b00_0000_ffff)
            .unwrap();
        self.memory
            .write_u64(Gpa(0x6010), 0x00cf_9300_0000_ffff)
            .unwrap();
    }

    /// A gate of the shared interrupt table.
    fn gate(&self, vector: u64, to: u64) {
        let low = (to & 0xffff) | 8 << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48;
        self.memory
            .write_u64(Gpa(0x5000 + vector * 16), low)
            .unwrap();
        self.memory
            .write_u64(Gpa(0x5008 + vector * 16), to >> 32)
            .unwrap();
    }

    /// Runs every vCPU until its program ends; kicks all of them if that takes too long.
    fn run(&mut self) {
        let kickers: Vec<_> = self.vcpus.iter().map(Vcpu::kicker).collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .vcpus
                .iter_mut()
                .map(|vcpu| {
                    scope.spawn(|| {
                        let bus = TestBus::default();
                        *bus.kicker.lock().unwrap() = Some(vcpu.kicker());
                        assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
                    })
                })
                .collect();
            while threads.iter().any(|thread| !thread.is_finished()) {
                if Instant::now() > deadline {
                    for kicker in &kickers {
                        kicker.kick();
                    }
                    panic!("the vCPUs hang");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn word(&self, gpa: u64) -> u64 {
        self.memory.read_u64(Gpa(gpa)).unwrap()
    }
}

/// Each of four vCPUs adds to a counter that often by `step`, in both configurations.
fn count_together(at: u64, times: u32, step: impl Fn(&mut CodeAssembler) -> Built) {
    for reference in [false, true] {
        let mut machine = Machine::new(4, reference);
        let times = if reference { times / 20 } else { times };
        machine.load(|_, a| {
            let mut top = a.create_label();
            a.mov(rdi, at)?;
            a.mov(r12d, times)?;
            a.set_label(&mut top)?;
            a.nop()?;
            step(a)?;
            a.dec(r12d)?;
            a.jnz(top)
        });
        machine.run();
        let count = machine.word(at);
        assert_eq!(count, u64::from(times) * 4, "at {at:#x}, {reference}");
    }
}

/// Ordinary memory; a line of a page with code, and one that holds code itself; across two lines and two pages.
const PLACES: [(u64, u32); 5] = [
    (0x4_0000, 40_000),
    (0x1_0800, 20_000),
    (0x1_0048, 4_000),
    (0x4_003c, 4_000),
    (0x4_0ffc, 2_000),
];

#[test]
fn locked_increments_of_all_are_counted() {
    for (at, times) in PLACES {
        count_together(at, times, |a| a.lock().inc(qword_ptr(rdi)));
    }
}

#[test]
fn compare_and_exchange_of_all_is_counted() {
    for (at, times) in PLACES {
        count_together(at, times / 2, |a| {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(rdi))?;
            a.set_label(&mut again)?;
            a.lea(rcx, qword_ptr(rax + 1))?;
            a.lock().cmpxchg(qword_ptr(rdi), rcx)?;
            a.jnz(again)
        });
    }
}

#[test]
fn sixteen_bytes_are_exchanged_at_once() {
    for at in [0x4_0000, 0x1_0800] {
        count_together(at, 10_000, |a| {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(rdi))?;
            a.mov(rdx, qword_ptr(rdi + 8))?;
            a.set_label(&mut again)?;
            a.lea(rbx, qword_ptr(rax + 1))?;
            a.lea(rcx, qword_ptr(rdx - 1))?;
            a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
            a.jnz(again)
        });
    }
}

#[test]
fn a_lock_by_xchg_keeps_others_out() {
    for lock in [0x4_1000u64, 0x1_0840, 0x4_1ffe] {
        count_together(0x4_0000, 2_000, |a| {
            let mut again = a.create_label();
            let mut free = a.create_label();
            a.mov(rsi, lock)?;
            a.set_label(&mut again)?;
            a.mov(eax, 1)?;
            a.xchg(dword_ptr(rsi), eax)?;
            a.test(eax, eax)?;
            a.jz(free)?;
            a.pause()?;
            a.jmp(again)?;
            a.set_label(&mut free)?;
            a.inc(qword_ptr(rdi))?;
            a.mov(dword_ptr(rsi), 0)
        });
    }
}

#[test]
fn stores_do_not_tear() {
    for at in [0x4_0000u64, 0x1_0800, 0x1_0050] {
        let mut machine = Machine::new(2, false);
        machine.load(|n, a| {
            let mut top = a.create_label();
            let mut good = a.create_label();
            a.mov(rdi, at)?;
            a.xor(eax, eax)?;
            a.mov(r12d, 20_000)?;
            a.set_label(&mut top)?;
            a.nop()?;
            if n == 0 {
                a.mov(qword_ptr(rdi), rax)?;
                a.not(rax)?;
            } else {
                a.mov(rax, qword_ptr(rdi))?;
                a.lea(rdx, qword_ptr(rax + 1))?;
                a.cmp(rdx, 1)?;
                a.jbe(good)?;
                a.inc(qword_ptr(0x4_2000))?;
                a.set_label(&mut good)?;
            }
            a.dec(r12d)?;
            a.jnz(top)
        });
        // Where there was code before is neither.
        machine.memory.write_u64(Gpa(at), 0).unwrap();
        machine.run();
        assert_eq!(machine.word(0x4_2000), 0, "torn at {at:#x}");
    }
}

/// The modifying and the executing processor of SDM vol. 3, 9.1.3: `mov eax, imm32; ret` is changed, then a flag is
/// set; whoever sees the flag serializes and must get the new value.
fn modify(function: u64, flag: u64, rounds: u32, readers: usize) {
    let mut machine = Machine::new(readers + 1, false);
    let answer = |n: usize| flag + 8 + n as u64 * 8;
    machine.load(|n, a| {
        let mut top = a.create_label();
        let mut wait = a.create_label();
        let mut good = a.create_label();
        a.mov(rsi, flag)?;
        a.mov(rdi, function)?;
        a.mov(r12d, 1)?;
        a.set_label(&mut top)?;
        a.nop()?;
        if n == 0 {
            a.mov(dword_ptr(rdi + 1), r12d)?;
            a.mov(dword_ptr(rsi), r12d)?;
            for reader in 1..=readers {
                let mut wait = a.create_label();
                a.mov(r13, answer(reader))?;
                a.set_label(&mut wait)?;
                a.pause()?;
                a.cmp(dword_ptr(r13), r12d)?;
                a.jne(wait)?;
            }
        } else {
            a.set_label(&mut wait)?;
            // Old code runs all the time.
            a.call(rdi)?;
            a.pause()?;
            a.cmp(dword_ptr(rsi), r12d)?;
            a.jne(wait)?;
            a.mov(r14, rax)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.mov(rsi, flag)?;
            a.call(rdi)?;
            a.cmp(eax, r12d)?;
            a.je(good)?;
            a.lock().inc(qword_ptr(0x4_3000))?;
            a.set_label(&mut good)?;
            a.mov(r13, answer(n))?;
            a.mov(dword_ptr(r13), r12d)?;
        }
        a.inc(r12d)?;
        a.cmp(r12d, rounds)?;
        a.jbe(top)
    });
    machine
        .memory
        .write(Gpa(function), &[0xb8, 0, 0, 0, 0, 0xc3])
        .unwrap();
    machine.run();
    assert_eq!(machine.word(0x4_3000), 0, "old code ran at {function:#x}");
}

#[test]
fn code_that_another_changed_is_new_after_serializing() {
    modify(0x4_4000, 0x4_0000, 2_000, 1);
    modify(0x4_4000, 0x4_0000, 500, 3);
    // Flag and answers on the page, and in the line, of the code.
    modify(0x4_4000, 0x4_4800, 1_000, 2);
    modify(0x4_4000, 0x4_4008, 1_000, 2);
    // The immediate operand lies in the next page.
    modify(0x4_4ffe, 0x4_0000, 1_000, 2);
}

/// x2APIC on, accepting interrupts.
fn enable_apic(a: &mut CodeAssembler) -> Built {
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0x400)?;
    a.wrmsr()?;
    a.mov(ecx, 0x80f)?;
    a.mov(eax, 0x1ff)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Writes the interrupt command register.
fn send(a: &mut CodeAssembler, destination: u32, command: u32) -> Built {
    a.mov(ecx, 0x830)?;
    a.mov(edx, destination)?;
    a.mov(eax, command)?;
    a.wrmsr()
}

#[test]
fn interrupts_go_back_and_forth() {
    const HANDLER: u64 = 0x2_0000;
    const ROUNDS: u32 = 2_000;
    let mut machine = Machine::new(2, false);
    machine.load(|n, a| {
        let mut top = a.create_label();
        enable_apic(a)?;
        a.lock().inc(qword_ptr(0x4_2000))?;
        // Both are ready.
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(0x4_2000), 2)?;
        a.jne(wait)?;
        a.mov(rdi, 0x4_0000 + n as u64 * 8)?;
        a.mov(r12d, 1)?;
        a.set_label(&mut top)?;
        a.nop()?;
        if n == 0 {
            send(a, 1, 0x40)?;
        }
        // Halts until its handler has counted one more.
        let mut check = a.create_label();
        let mut come = a.create_label();
        a.set_label(&mut check)?;
        a.cli()?;
        a.cmp(dword_ptr(rdi), r12d)?;
        a.jae(come)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(check)?;
        a.set_label(&mut come)?;
        a.sti()?;
        if n == 1 {
            send(a, 0, 0x40)?;
        }
        a.inc(r12d)?;
        a.cmp(r12d, ROUNDS)?;
        a.jbe(top)
    });
    let mut asm = CodeAssembler::new(64).unwrap();
    asm.push(rax).unwrap();
    asm.push(rcx).unwrap();
    asm.push(rdx).unwrap();
    asm.inc(qword_ptr(rdi)).unwrap();
    asm.mov(ecx, 0x80b).unwrap();
    asm.xor(eax, eax).unwrap();
    asm.xor(edx, edx).unwrap();
    asm.wrmsr().unwrap();
    asm.pop(rdx).unwrap();
    asm.pop(rcx).unwrap();
    asm.pop(rax).unwrap();
    asm.iretq().unwrap();
    let handler = asm.assemble(HANDLER).unwrap();
    machine.memory.write(Gpa(HANDLER), &handler).unwrap();
    machine.gate(0x40, HANDLER);
    machine.run();
    assert_eq!(machine.word(0x4_0000), u64::from(ROUNDS));
    assert_eq!(machine.word(0x4_0008), u64::from(ROUNDS));
}

#[test]
fn a_processor_starts_when_it_is_told_to() {
    let mut machine = Machine::new(2, false);
    assert_eq!(machine.vcpus[1].state().mp_state, MpState::WaitForSipi);
    machine.load(|_, a| {
        enable_apic(a)?;
        for round in 0..3u32 {
            let mut wait = a.create_label();
            // INIT, then start-up at 0x8000 twice, as everybody does.
            send(a, 1, 0x4500)?;
            send(a, 1, 0x4608)?;
            send(a, 1, 0x4608)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(0x4_0000), round as i32 + 1)?;
            a.jne(wait)?;
        }
        send(a, 1, 0x4500)
    });
    let mut asm = CodeAssembler::new(16).unwrap();
    let mut spin = asm.create_label();
    asm.mov(ax, 0x4000).unwrap();
    asm.mov(ds, ax).unwrap();
    asm.inc(dword_ptr(0)).unwrap();
    asm.set_label(&mut spin).unwrap();
    asm.jmp(spin).unwrap();
    let code = asm.assemble(0).unwrap();
    machine.memory.write(Gpa(0x8000), &code).unwrap();
    machine.vcpus[1].cpu_mut().reset();
    machine.vcpus[1].cpu_mut().wait_for_sipi = true;
    let [first, second] = &mut machine.vcpus[..] else {
        panic!()
    };
    std::thread::scope(|scope| {
        let kicker = second.kicker();
        let thread = scope.spawn(|| second.run(&TestBus::default()).unwrap());
        let bus = TestBus::default();
        *bus.kicker.lock().unwrap() = Some(first.kicker());
        assert_eq!(first.run(&bus).unwrap(), Exit::Kicked);
        std::thread::sleep(Duration::from_millis(20));
        kicker.kick();
        assert_eq!(thread.join().unwrap(), Exit::Kicked);
    });
    assert_eq!(machine.word(0x4_0000), 3);
    assert_eq!(machine.vcpus[1].state().mp_state, MpState::WaitForSipi);
}

#[test]
fn a_change_of_memory_reaches_those_that_run() {
    let mut machine = Machine::new(2, false);
    machine.load(|n, a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.nop()?;
        a.inc(qword_ptr(0x4_0000 + n as u64 * 0x1000))?;
        a.cmp(qword_ptr(0x4_2000), 0)?;
        a.je(top)
    });
    let Machine {
        memory,
        engine,
        vcpus,
    } = &mut machine;
    std::thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(|| {
                let bus = TestBus::default();
                *bus.kicker.lock().unwrap() = Some(vcpu.kicker());
                vcpu.run(&bus).unwrap()
            });
        }
        let counters = [0x4_0000, 0x4_1000].map(Gpa);
        let count = |at| memory.read_u64(at).unwrap();
        while counters.iter().any(|&at| count(at) == 0) {
            std::thread::yield_now();
        }
        memory.start_dirty_log();
        engine.memory_changed();
        let slot = memory.slots().iter().next().unwrap().id();
        for _ in 0..100 {
            let before = counters.map(count);
            memory.take_dirty(slot).unwrap();
            while counters
                .iter()
                .zip(before)
                .any(|(&at, n)| count(at) < n + 2)
            {
                std::thread::yield_now();
            }
            let dirty = memory.take_dirty(slot).unwrap();
            assert_eq!(dirty[1] & 3, 3, "stores that the dirty log missed");
        }
        memory.write_u64(Gpa(0x4_2000), 1).unwrap();
    });
}
