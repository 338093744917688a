//! Small programs through the whole engine: translated and interpreted code, page tables, exits.

mod debugger;
mod groups;
mod kernel;
mod modes;
mod smp;

use std::sync::{Arc, Mutex};

use strata_engine::x86::{CpuModel, Segment};
use strata_engine::{Exit, Inputs, IoBus, Kicker, MachineClock, Vcpu, VcpuId};
use strata_memory::{Gpa, GuestMemory, SlotKind};

use crate::cpu::Cpu;
use crate::dispatch::Translated;
use crate::{Translator, TranslatorConfig};

/// A bus that kicks the vCPU when port 0xf4 is written and keeps what other ports got.
#[derive(Default)]
pub struct TestBus {
    kicker: Mutex<Option<Arc<dyn Kicker>>>,
    /// Bytes written to ports other than 0xf4.
    pub output: Mutex<Vec<(u16, Vec<u8>)>>,
}

impl IoBus for TestBus {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(gpa as u8);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.output
            .lock()
            .unwrap()
            .push((gpa as u16, data.to_vec()));
    }
    fn port_in(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        if port == 0xf4 {
            self.kicker.lock().unwrap().as_ref().unwrap().kick();
        } else {
            self.output.lock().unwrap().push((port, data.to_vec()));
        }
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A machine of 16 MiB with identity page tables at 0x1000, code at 0x10000, stack below 0x80000, in long mode.
pub struct TestMachine {
    pub memory: GuestMemory,
    pub vcpu: Translated,
    pub bus: TestBus,
    _engine: Translator,
}

/// Where programs are loaded.
pub const CODE: u64 = 0x1_0000;
/// Top of the stack.
pub const STACK: u64 = 0x8_0000;
/// `out 0xf4, al`: ends a program.
pub const END: [u8; 2] = [0xe6, 0xf4];

pub fn flat(selector: u16, attributes: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    }
}

/// Puts a vCPU in 64-bit mode at CPL 0 with everything enabled that the model has.
pub fn long_mode(cpu: &mut Cpu) {
    cpu.set_segment(1, flat(8, 0xa09b));
    for index in [0, 2, 3, 4, 5] {
        cpu.set_segment(index, flat(16, 0xc093));
    }
    cpu.cr0 = 0x8001_0033;
    cpu.cr3 = 0x1000;
    cpu.cr4 = 0x0004_06a0;
    cpu.efer = 0xd01;
    cpu.xcr0 = 7;
    cpu.rip = CODE;
    cpu.gpr[4] = STACK;
    cpu.set_rflags(2);
}

/// 16 MiB of memory with identity page tables at 0x1000.
pub fn page_tables() -> GuestMemory {
    let memory = GuestMemory::new();
    memory.add_slot(Gpa(0), 16 << 20, SlotKind::Ram).unwrap();
    memory.write_u64(Gpa(0x1000), 0x2007).unwrap();
    memory.write_u64(Gpa(0x2000), 0x3007).unwrap();
    for i in 0..512u64 {
        memory
            .write_u64(Gpa(0x3000 + i * 8), (i << 21) | 0x87)
            .unwrap();
    }
    memory
}

impl TestMachine {
    pub fn new(reference: bool) -> TestMachine {
        let memory = page_tables();
        let engine = Translator::new(TranslatorConfig {
            memory: memory.clone(),
            clock: Arc::new(MachineClock::new(1_000_000_000)),
            model: CpuModel::named("baseline").unwrap(),
            vcpus: 1,
            reference,
            count: true,
            lockstep: 0,
        })
        .unwrap();
        engine.inspect(Arc::new(strata_verify::Verifier::new()));
        let mut vcpu = engine.create_with_inputs(VcpuId(0), Inputs::Live).unwrap();
        let bus = TestBus::default();
        *bus.kicker.lock().unwrap() = Some(vcpu.kicker());
        long_mode(vcpu.cpu_mut());
        TestMachine {
            memory,
            vcpu,
            bus,
            _engine: engine,
        }
    }

    /// Loads a program, adds the end, runs it.
    pub fn run(&mut self, program: &[u8]) -> Exit {
        self.memory.write(Gpa(CODE), program).unwrap();
        self.memory
            .write(Gpa(CODE + program.len() as u64), &END)
            .unwrap();
        self.vcpu.run(&self.bus).unwrap()
    }

    pub fn gpr(&self, n: usize) -> u64 {
        self.vcpu.cpu().gpr[n]
    }
}

fn assemble(
    build: impl FnOnce(&mut iced_x86::code_asm::CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut asm = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    build(&mut asm).unwrap();
    asm.assemble(CODE).unwrap()
}

fn both(program: &[u8], check: impl Fn(&TestMachine)) {
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        assert_eq!(machine.run(program), Exit::Kicked);
        check(&machine);
    }
}

use iced_x86::code_asm::*;

#[test]
fn registers_and_memory() {
    let program = assemble(|a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(r9, rax)?;
        a.mov(rcx, 5u64)?;
        a.lea(r10, qword_ptr(rcx * 8 + 0x4_0000))?;
        a.mov(qword_ptr(r10), r9)?;
        a.add(qword_ptr(r10), rcx)?;
        a.mov(r11, qword_ptr(r10))?;
        a.mov(rsi, r10)?;
        a.mov(ah, byte_ptr(rsi + 1))?;
        a.push(r11)?;
        a.pop(rdx)?;
        a.mov(ch, al)?;
        a.xchg(cl, ch)?;
        a.mov(dword_ptr(0x4_0ffe), 0x0102_0304)?;
        a.mov(ebx, dword_ptr(0x4_0ffe))?;
        a.shl(rbx, cl)?;
        a.bts(qword_ptr(0x4_2000), rcx)?;
        Ok(())
    });
    both(&program, |m| {
        assert_eq!(m.gpr(11), 0x1122_3344_5566_778d);
        assert_eq!(m.gpr(2), 0x1122_3344_5566_778d);
        assert_eq!(m.gpr(0), 0x1122_3344_5566_7788);
        assert_eq!(m.gpr(1), 0x0588);
        assert_eq!(m.gpr(3), 0x0102_0304 << 8);
        assert_eq!(m.gpr(4), STACK);
        assert_eq!(
            m.memory.read_u64(Gpa(0x4_2000 + 0x588 / 64 * 8)).unwrap(),
            1 << (0x588 % 64)
        );
    });
}

#[test]
fn loops_calls_and_flags() {
    let program = assemble(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut done = a.create_label();
        a.xor(eax, eax)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        a.stc()?;
        a.mov(rdx, qword_ptr(0x4_0000))?;
        a.adc(eax, 0)?;
        a.jmp(done)?;
        a.set_label(&mut f)?;
        a.add(eax, ecx)?;
        a.ret()?;
        a.set_label(&mut done)?;
        a.pushfq()?;
        a.pop(rbx)?;
        Ok(())
    });
    both(&program, |m| {
        assert_eq!(m.gpr(0), 500_501);
        assert_eq!(m.gpr(1), 0);
        assert_eq!(m.vcpu.stats().instructions, 2 + 1000 * 5 + 4 + 2 + 1);
    });
}

#[test]
fn a_program_may_rewrite_itself() {
    let program = assemble(|a| {
        let mut patched = a.create_label();
        a.mov(byte_ptr(CODE + 0x20), 7)?;
        a.nop()?;
        a.jmp(patched)?;
        a.set_label(&mut patched)?;
        a.nop_1(dword_ptr(rax))?;
        Ok(())
    });
    // mov eax, 1 whose immediate is written by the program itself just before.
    let mut program = program;
    program.resize(0x1f, 0x90);
    program.extend([0xb8, 1, 0, 0, 0]);
    both(&program, |m| assert_eq!(m.gpr(0), 7));
}

#[test]
fn string_instructions_may_rewrite_code() {
    for down in [false, true] {
        let program = assemble(|a| {
            // A function `mov eax, imm; ret` at 0x20000, called, then overwritten as one of several elements by
            // STOS (0xc3 alone: EAX stays) and by MOVS (from 0x30000), called after each.
            a.mov(rbx, 0x2_0000u64)?;
            for (at, byte) in [(0, 0xb8), (1, 7), (2, 0), (3, 0), (4, 0), (5, 0xc3)] {
                a.mov(byte_ptr(rbx + at), byte)?;
                a.mov(
                    byte_ptr(rbx + 0x1_0000 + at),
                    if at == 1 { 9 } else { byte },
                )?;
            }
            a.call(rbx)?;
            a.mov(r12d, eax)?;
            if down {
                a.std()?;
            }
            let start = if down { 39 } else { -16 };
            a.mov(eax, 0xc3)?;
            a.lea(rdi, ptr(rbx + start))?;
            a.mov(ecx, 56)?;
            a.rep().stosb()?;
            a.call(rbx)?;
            a.mov(r13d, eax)?;
            a.lea(rdi, ptr(rbx + start))?;
            a.lea(rsi, ptr(rbx + start + 0x1_0000))?;
            a.mov(ecx, 56)?;
            a.rep().movsb()?;
            a.call(rbx)?;
            a.mov(r14d, eax)?;
            a.cld()
        });
        both(&program, |m| {
            assert_eq!((m.gpr(12), m.gpr(13), m.gpr(14)), (7, 0xc3, 9));
        });
    }
}

#[test]
fn vectors_stay_in_the_host() {
    let program = assemble(|a| {
        a.mov(eax, 3)?;
        a.vmovd(xmm1, eax)?;
        a.vpbroadcastd(ymm2, xmm1)?;
        a.vmovdqu(ymmword_ptr(0x4_0ff0), ymm2)?;
        a.vpaddd(ymm3, ymm2, ymmword_ptr(0x4_0ff0))?;
        a.vmovd(r8d, xmm3)?;
        a.cvtsi2sd(xmm0, r8)?;
        a.addsd(xmm0, xmm0)?;
        a.cvttsd2si(r9, xmm0)?;
        Ok(())
    });
    both(&program, |m| {
        assert_eq!(m.gpr(8), 6);
        assert_eq!(m.gpr(9), 12);
    });
}

#[test]
fn masked_moves_touch_only_their_lanes() {
    let program = assemble(|a| {
        a.mov(eax, -1)?;
        a.vmovd(xmm1, eax)?; // lane 0 only
        a.mov(eax, 0x1234)?;
        a.vmovd(xmm2, eax)?;
        a.vpbroadcastd(ymm2, xmm2)?;
        for address in [0x4_0000u64, 0x4_0ff8] {
            a.vpmaskmovd(ymmword_ptr(address), ymm1, ymm2)?;
            a.vpmaskmovd(ymmword_ptr(address), ymm1, ymm2)?;
            a.vpmaskmovd(ymm3, ymm1, ymmword_ptr(address))?;
        }
        a.vmovd(ebx, xmm3)?;
        Ok(())
    });
    both(&program, |m| {
        for address in [0x4_0000, 0x4_0ff8] {
            assert_eq!(m.memory.read_u64(Gpa(address)).unwrap(), 0x1234);
        }
        assert_eq!(m.gpr(3), 0x1234);
    });
}

#[test]
fn an_invalidated_large_page_is_gone_as_a_whole() {
    // 2 MiB at 4 MiB move to 6 MiB; one INVLPG is for all of it.
    let program = assemble(|a| {
        a.mov(rbx, qword_ptr(0x40_0000))?;
        a.mov(rbx, qword_ptr(0x40_1000))?;
        a.mov(rcx, 0x60_0087u64)?;
        a.mov(qword_ptr(0x3010), rcx)?;
        a.invlpg(byte_ptr(0x40_0000))?;
        a.mov(rdx, qword_ptr(0x40_1000))?;
        Ok(())
    });
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        machine.memory.write_u64(Gpa(0x40_1000), 4).unwrap();
        machine.memory.write_u64(Gpa(0x60_1000), 6).unwrap();
        assert_eq!(machine.run(&program), Exit::Kicked);
        assert_eq!((machine.gpr(3), machine.gpr(2)), (4, 6));
    }
}

#[test]
fn jumps_between_pages_follow_a_global_mapping() {
    // The same CALL goes to 4 MiB, then to what is mapped there instead.
    let program = assemble(|a| {
        let mut outer = a.create_label();
        let mut inner = a.create_label();
        a.mov(ebp, 2)?;
        a.set_label(&mut outer)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut inner)?;
        a.call(0x40_0000)?;
        a.dec(ecx)?;
        a.jne(inner)?;
        a.add(rsi, rbx)?;
        a.mov(rdx, 0x60_0187u64)?;
        a.mov(qword_ptr(0x3010), rdx)?;
        a.invlpg(byte_ptr(0x40_0000))?;
        a.dec(ebp)?;
        a.jne(outer)?;
        Ok(())
    });
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        machine.memory.write_u64(Gpa(0x3010), 0x40_0187).unwrap();
        // mov ebx, imm32; ret
        for (at, value) in [(0x40_0000, 4), (0x60_0000, 6)] {
            let function = [0xbb, value, 0, 0, 0, 0xc3];
            machine.memory.write(Gpa(at), &function).unwrap();
        }
        assert_eq!(machine.run(&program), Exit::Kicked);
        assert_eq!(machine.gpr(6), 10);
    }
}
