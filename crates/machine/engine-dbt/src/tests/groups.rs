//! Accesses that share a check: in one page, across its end, and into one that is not there.

use iced_x86::code_asm::*;

use super::*;
use crate::env::Fault;

/// Where nothing is mapped: 2 MiB from here on.
const HOLE: u64 = 0x60_0000;

/// Runs a program in both configurations, with a hole in memory, until it faults there.
fn faults(program: &[u8], check: impl Fn(&TestMachine)) {
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        machine.memory.write_u64(Gpa(0x3018), 0).unwrap();
        machine.vcpu.stop_on_exception(true);
        assert_eq!(machine.run(program), Exit::Kicked);
        let fault: Fault = machine.vcpu.take_stopped().expect("no exception");
        assert_eq!(fault.vector, 14);
        assert!((HOLE..HOLE + 0x20_0000).contains(&fault.cr2));
        check(&machine);
    }
}

#[test]
fn pushes_that_fault_have_done_what_came_before() {
    let program = assemble(|a| {
        a.mov(rsp, HOLE + 0x20_0010)?;
        a.mov(eax, 1)?;
        a.mov(ebx, 2)?;
        a.mov(r9d, 3)?;
        a.sub(ebp, ebp)?;
        a.push(rax)?;
        a.push(rbx)?;
        a.push(r9)?;
        a.push(rax)
    });
    faults(&program, |m| {
        assert_eq!(m.gpr(4), HOLE + 0x20_0000);
        assert_eq!(m.memory.read_u64(Gpa(HOLE + 0x20_0008)).unwrap(), 1);
        assert_eq!(m.memory.read_u64(Gpa(HOLE + 0x20_0000)).unwrap(), 2);
        // ZF and PF of the subtraction.
        assert_eq!(m.vcpu.cpu().arith & 0x8d5, 0x44);
    });
}

#[test]
fn fields_that_fault_leave_the_registers_as_they_were() {
    let program = assemble(|a| {
        a.mov(rdi, HOLE - 16)?;
        a.mov(qword_ptr(rdi), 5)?;
        a.mov(r10d, 1)?;
        a.mov(eax, 7)?;
        a.mov(rdx, qword_ptr(rdi))?;
        a.add(r10, qword_ptr(rdi))?;
        a.add(rdi, 8)?;
        a.mov(eax, dword_ptr(rdi + 8))?;
        a.mov(edx, 9)
    });
    faults(&program, |m| {
        assert_eq!((m.gpr(0), m.gpr(2), m.gpr(10)), (7, 5, 6));
        assert_eq!(m.gpr(7), HOLE - 8);
    });
}

#[test]
fn fields_on_both_sides_of_a_page_end() {
    // In a loop that moves by 4 bytes: most of its rounds lie in one page, some do not.
    let program = assemble(|a| {
        let mut again = a.create_label();
        a.mov(rdi, 0x40_0f80u64)?;
        a.mov(ecx, 64)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rdi), ecx)?;
        a.add(dword_ptr(rdi + 24), 3)?;
        a.mov(r8d, dword_ptr(rdi + 8))?;
        a.lea(r11, ptr(rdi + r8 * 2))?;
        a.add(rax, r8)?;
        a.xor(rax, qword_ptr(rdi + 16))?;
        a.push(rax)?;
        a.push(r11)?;
        a.pop(rdx)?;
        a.pop(rbx)?;
        a.add(rax, rdx)?;
        a.add(rdi, 4)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    let seen = Mutex::new(Vec::new());
    both(&program, |m| {
        let mut bytes = vec![0; 0x300];
        m.memory.read(Gpa(0x40_0f00), &mut bytes).unwrap();
        seen.lock().unwrap().push((m.gpr(0), m.gpr(3), bytes));
    });
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen[0], seen[1]);
    assert_ne!(seen[0].0, 0);
}

#[test]
fn a_page_is_not_dirty_by_a_store_that_is_not_made() {
    // 4 KiB pages for the 2 MiB at 4 MiB; the load passes, the jump skips the store.
    let program = assemble(|a| {
        let mut over = a.create_label();
        a.mov(edi, 0x40_0000)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.test(rax, rax)?;
        a.je(over)?;
        a.mov(qword_ptr(rdi + 8), 1)?;
        a.set_label(&mut over)?;
        a.nop()
    });
    for reference in [false, true] {
        let mut machine = TestMachine::new(reference);
        machine.memory.write_u64(Gpa(0x3010), 0x5007).unwrap();
        machine.memory.write_u64(Gpa(0x5000), 0x40_0007).unwrap();
        assert_eq!(machine.run(&program), Exit::Kicked);
        // Accessed, not dirty.
        assert_eq!(machine.memory.read_u64(Gpa(0x5000)).unwrap(), 0x40_0027);
    }
}
