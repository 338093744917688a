//! What kernels do all the time is done without leaving translated code, and comes to the same as in the interpreter.

use iced_x86::code_asm::*;
use strata_engine::x86::{CpuState, DescriptorTable};
use strata_engine::{Exit, Vcpu, VcpuStats};
use strata_memory::Gpa;

use super::{CODE, STACK, TestMachine};

const GDT: u64 = 0x9000;
const DATA: u64 = 0x20_0000;
const ROUNDS: u64 = 200;

/// User code calls a kernel in turns with its own work; the kernel returns by SYSRET and by IRET.
fn program() -> (Vec<u8>, u64) {
    let mut a = CodeAssembler::new(64).unwrap();
    let [mut user, mut handler, mut by_iret, mut done] = [(); 4].map(|()| a.create_label());
    a.mov(r15, ROUNDS).unwrap();
    a.mov(r14, STACK - 0x800).unwrap();
    a.lea(rcx, ptr(user)).unwrap();
    a.mov(r11d, 0x8d7).unwrap();
    a.sysretq().unwrap();
    a.set_label(&mut user).unwrap();
    a.adc(rbx, 0).unwrap();
    a.lea(rsp, ptr(r14 - 64)).unwrap();
    a.mov(eax, 0x1122_3344).unwrap();
    a.mov(rdi, DATA + 0x100).unwrap();
    a.mov(ecx, 5).unwrap();
    a.rep().stosd().unwrap();
    a.sub(rdi, 3).unwrap();
    a.stc().unwrap();
    a.syscall().unwrap();
    a.jmp(user).unwrap();
    a.set_label(&mut handler).unwrap();
    a.swapgs().unwrap();
    a.mov(r13, rsp).unwrap();
    a.mov(rsp, STACK).unwrap();
    a.push(rcx).unwrap();
    a.push(r11).unwrap();
    a.cld().unwrap();
    // One byte on: a pattern is repeated.
    a.mov(rsi, DATA + 0x100).unwrap();
    a.lea(rdi, ptr(rsi + 1)).unwrap();
    a.mov(ecx, 7).unwrap();
    a.rep().movsb().unwrap();
    a.mov(eax, ss).unwrap();
    a.add(rbp, rax).unwrap();
    a.mov(rax, cr3).unwrap();
    a.add(rbp, rax).unwrap();
    a.pushfq().unwrap();
    a.popfq().unwrap();
    a.adc(rbp, 0).unwrap();
    a.swapgs().unwrap();
    a.pop(r11).unwrap();
    a.pop(rcx).unwrap();
    a.dec(r15).unwrap();
    a.jz(done).unwrap();
    a.test(r15, 1).unwrap();
    a.jz(by_iret).unwrap();
    a.mov(rsp, r13).unwrap();
    a.sysretq().unwrap();
    a.set_label(&mut by_iret).unwrap();
    a.push(0x23).unwrap();
    a.push(r13).unwrap();
    a.push(r11).unwrap();
    a.push(0x2b).unwrap();
    a.push(rcx).unwrap();
    a.iretq().unwrap();
    a.set_label(&mut done).unwrap();
    a.xor(eax, eax).unwrap();
    a.xor(edx, edx).unwrap();
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let made = a.assemble_options(CODE, options).unwrap();
    let handler = made.label_ip(&handler).unwrap();
    (made.inner.code_buffer, handler)
}

fn run(reference: bool) -> (CpuState, VcpuStats, Vec<u8>) {
    let mut machine = TestMachine::new(reference);
    let (code, handler) = program();
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffffu64,
    ];
    for (entry, at) in gdt.into_iter().zip((GDT..).step_by(8)) {
        machine.memory.write_u64(Gpa(at), entry).unwrap();
    }
    let cpu = machine.vcpu.cpu_mut();
    cpu.gdtr = DescriptorTable {
        base: GDT,
        limit: 47,
    };
    for index in [0, 3, 4, 5] {
        cpu.segments[index].selector = 0;
    }
    (cpu.star, cpu.lstar, cpu.sfmask) = (0x0018_0008 << 32, handler, 0x4_7700);
    cpu.kernel_gs_base = 0x1234_5000;
    assert_eq!(machine.run(&code), Exit::Kicked);
    let state = machine.vcpu.state();
    let mut data = vec![0; 0x200];
    machine.memory.read(Gpa(DATA), &mut data).unwrap();
    (state, machine.vcpu.stats(), data)
}

#[test]
fn a_kernel_stays_in_translated_code() {
    let (state, stats, data) = run(false);
    let (expected, slow, expected_data) = run(true);
    assert_eq!(state, expected);
    assert_eq!(data, expected_data);
    assert_eq!(stats.instructions, slow.instructions);
    assert_eq!(state.gpr[3], ROUNDS);
    assert!(slow.interpreted > ROUNDS * 10, "{}", slow.interpreted);
    assert!(stats.interpreted < 60, "{}", stats.interpreted);
}
