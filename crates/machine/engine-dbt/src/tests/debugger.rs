//! A debugger's breakpoints and steps, of which the guest sees nothing.

use strata_engine::{Exit, GuestDebug, Vcpu};
use strata_memory::Gpa;

use super::{CODE, END, TestMachine};

/// `mov ecx, 3`, then `inc eax`, `dec ecx`, `jnz` back to the first of them, and the end.
const LOOP: [u8; 11] = [0xb9, 3, 0, 0, 0, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa];
const DEC: u64 = CODE + 7;

fn machine() -> TestMachine {
    let machine = TestMachine::new(false);
    machine.memory.load(Gpa(CODE), &LOOP).unwrap();
    let end = Gpa(CODE + LOOP.len() as u64);
    machine.memory.load(end, &END).unwrap();
    machine
}

fn run(machine: &mut TestMachine, step: bool, breakpoints: &[u64]) -> Exit {
    let breakpoints = breakpoints.to_vec();
    machine
        .vcpu
        .debug(&GuestDebug { step, breakpoints })
        .unwrap();
    machine.vcpu.run(&machine.bus).unwrap()
}

#[test]
fn a_breakpoint_stops_before_its_instruction_each_time() {
    let mut machine = machine();
    for pass in 1..=3 {
        assert_eq!(run(&mut machine, false, &[DEC]), Exit::Debug);
        // Without a step it is the same place again.
        assert_eq!(run(&mut machine, false, &[DEC]), Exit::Debug);
        let cpu = machine.vcpu.cpu();
        assert_eq!((cpu.rip, cpu.gpr[0], cpu.gpr[1]), (DEC, pass, 4 - pass));
        assert_eq!(run(&mut machine, true, &[]), Exit::Debug);
        assert_eq!(machine.vcpu.cpu().rip, DEC + 2);
        assert_eq!(machine.vcpu.cpu().gpr[1], 3 - pass);
    }
    assert_eq!(run(&mut machine, false, &[DEC]), Exit::Kicked);
    assert_eq!(machine.vcpu.cpu().gpr[0], 3);
}

#[test]
fn steps_go_through_code_that_has_run_as_one_block() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, false, &[]), Exit::Kicked);
    machine.vcpu.cpu_mut().rip = CODE;
    let mut path = Vec::new();
    for _ in 0..10 {
        assert_eq!(run(&mut machine, true, &[]), Exit::Debug);
        path.push(machine.vcpu.cpu().rip - CODE);
    }
    assert_eq!(path, [5, 7, 9, 5, 7, 9, 5, 7, 9, 11]);
    // No trap flag was left behind, and none is seen.
    assert_eq!(machine.vcpu.state().rflags & 1 << 8, 0);
    assert_eq!(run(&mut machine, false, &[]), Exit::Kicked);
}

#[test]
fn a_breakpoint_where_nothing_can_be_decoded_stops_all_the_same() {
    let mut machine = machine();
    machine.memory.load(Gpa(DEC), &[0x0f, 0x0b]).unwrap();
    assert_eq!(run(&mut machine, false, &[DEC]), Exit::Debug);
    assert_eq!(machine.vcpu.cpu().rip, DEC);
}
