//! Debugging: single steps, breakpoints on instructions, data and ports, and the flags that hold them back.

use super::asm;
use super::check::{equal, kills_emulation};
use super::trap::{self, Action, NONE, attempt0, attempt1, code};
use super::user;

asm! {
    /// Three instructions with TF set, then TF is cleared.
    fn steps() { "pushfq" "or qword ptr [rsp], 0x100" "popfq" "mov eax, 1" "mov eax, 2" "nop" "pushfq" "and qword ptr [rsp], -257" "popfq" "ret" }
    fn step_one() { "pushfq" "or qword ptr [rsp], 0x100" "popfq" "suite_step: nop" "suite_step_next: nop" "ret" }
    fn step_next() { "lea rax, [rip + suite_step_next]" "ret" }
    fn step_ss() { "mov ecx, 0x10" "pushfq" "or qword ptr [rsp], 0x100" "popfq" "mov ss, ecx" "nop" "suite_step_ss: nop" "ret" }
    fn step_ss_next() { "lea rax, [rip + suite_step_ss]" "ret" }
    fn step_rep() { "mov ecx, 5" "lea rdi, [rsp - 64]" "pushfq" "or qword ptr [rsp], 0x100" "popfq" "rep stosb" "pushfq" "and qword ptr [rsp], -257" "popfq" "ret" }
    fn step_pushf() { "pushfq" "or qword ptr [rsp], 0x100" "popfq" "pushfq" "pop rax" "mov rcx, rax" "and rcx, -257" "push rcx" "popfq" "ret" }
    fn step_fault() { "pushfq" "or qword ptr [rsp], 0x100" "popfq" "suite_step_fault: ud2" "ret" }
    fn step_int() { "pushfq" "or qword ptr [rsp], 0x100" "popfq" "int 0x47" "nop" "ret" }
    fn target() { "nop" "mov eax, 5" "suite_target: add eax, 1" "ret" }
    fn target_at() { "lea rax, [rip + suite_target]" "ret" }
    fn store8(address) { "mov byte ptr [rdi], 1" "suite_stored: ret" }
    fn stored() { "lea rax, [rip + suite_stored]" "ret" }
    fn load8(address) { "mov al, [rdi]" "ret" }
    fn load_far(address) { "mov rax, [rdi - 4]" "ret" }
    fn stores(address) { "mov ecx, 16" "mov eax, 1" "rep stosb" "ret" }
    fn in_port() { "mov edx, 0x3ff" "in al, dx" "suite_in: ret" }
    fn in_next() { "lea rax, [rip + suite_in]" "ret" }
    fn set_dr1(value) { "mov dr1, rdi" "ret" }
    fn dr4() { "mov rax, dr4" "ret" }
    fn dr0() { "mov rax, dr0" "ret" }
    fn user_step() { "nop" "int 0x80" }
    fn user_dr() { "mov rax, dr7" "int 0x80" }
    fn iret_tf() { "mov rax, rsp" "push 0x10" "push rax" "push 0x102" "push 8" "lea rax, [rip + 2f]" "push rax" "iretq" "2: nop" "nop" "ret" }
    fn resume_over() {
        // An interrupt return with RF set passes an instruction breakpoint once.
        "mov rax, rsp" "push 0x10" "push rax" "push 0x10002" "push 8" "lea rax, [rip + suite_resume]" "push rax" "iretq"
        "suite_resume: nop" "mov eax, 7" "ret"
    }
    fn resume_at() { "lea rax, [rip + suite_resume]" "ret" }
    fn icebp() { ".byte 0xf1" "ret" }
    fn store_locked(address) { "lock inc dword ptr [rdi]" "ret" }
}

/// Bits of DR6 that are always set.
const ONES: u64 = 0xffff_0ff0;
const STEP: u64 = 1 << 14;

/// DR6 without the bits that are always set; it is cleared.
fn why() -> u64 {
    let value = asm::dr6();
    asm::set_dr6(ONES);
    value & !ONES
}

pub fn run() {
    equal("DR6 after reset", asm::dr6(), ONES);
    equal("DR7 after reset", asm::dr7(), 0x400);
    steps_of_one();
    if !kills_emulation("breakpoints") {
        breakpoints();
        registers();
    }
}

fn steps_of_one() {
    trap::on(1, Action::Resume);
    let before = trap::count();
    attempt0(steps);
    // Three, PUSHF, AND and POPF.
    equal("steps", trap::count() - before, 6);
    equal("DR6", why(), STEP);
    let before = trap::count();
    attempt0(step_rep);
    equal("steps of a repetition", trap::count() - before, 5 + 3);
    let outcome = attempt0(step_pushf);
    equal("PUSHF while stepping has TF", outcome.value & 0x100, 0x100);
    why();
    trap::on(1, Action::Escape);
    let outcome = attempt0(step_one);
    equal("after one instruction", outcome.trap().rip, step_next());
    equal("TF in its flags", outcome.trap().flags & 0x100, 0x100);
    let outcome = attempt0(step_ss);
    equal("MOV SS holds it back", outcome.trap().rip, step_ss_next());
    why();
    let outcome = attempt0(step_fault);
    equal("a fault is not a step", outcome.code(), code(6, 0));
    equal("DR6 of a fault", why(), 0);
    equal("its flags", outcome.trap().flags & 0x1_0100, 0x1_0100);
    let outcome = attempt0(step_int);
    equal("INT clears TF", outcome.code(), code(0x47, 0));
    why();
    equal("IRET to TF", attempt0(iret_tf).code(), code(1, 0));
    equal("DR6 of IRET to TF", why(), STEP);
    user::set_flags(0x102);
    let outcome = user::run0(user_step);
    equal("a step of user code", outcome.code(), code(1, 0));
    equal(
        "after one instruction",
        outcome.trap().rip,
        user::address(trap::at(user_step)) + 1,
    );
    user::set_flags(2);
    equal("DR6", why(), STEP);
    // INT1 is a debug exception without a reason.
    equal("INT1", attempt0(icebp).code(), code(1, 0));
    equal("DR6 of INT1", why(), 0);
}

/// DR7 for breakpoint 0: enabled, with a kind (0 instruction, 1 write, 2 port, 3 access) and a length (less one).
const fn enable(kind: u64, length: u64) -> u64 {
    0x400 | 2 | kind << 16 | length << 18
}

fn breakpoints() {
    asm::set_dr0(target_at());
    asm::set_dr7(enable(0, 0));
    let outcome = attempt0(target);
    equal("an instruction breakpoint", outcome.code(), code(1, 0));
    equal("before the instruction", outcome.trap().rip, target_at());
    equal("RF in its flags", outcome.trap().flags & 0x1_0000, 0x1_0000);
    equal("DR6", why(), 1);
    trap::on(1, Action::Resume);
    equal("it goes on behind it", attempt0(target).value, 6);
    equal("DR6", why(), 1);
    trap::on(1, Action::Escape);
    asm::set_dr0(resume_at());
    equal("RF passes it", attempt0(resume_over).code(), NONE);
    asm::set_dr7(0x400);
    equal("not enabled", attempt0(target).code(), NONE);
    why();

    let word = super::paging::page();
    asm::set_dr0(word);
    asm::set_dr7(enable(1, 0));
    let outcome = attempt1(store8, word);
    equal("a write", outcome.code(), code(1, 0));
    equal("after the instruction", outcome.trap().rip, stored());
    equal("it has written", asm::read8(word), 1);
    equal("DR6", why(), 1);
    equal("a read is no write", attempt1(load8, word).code(), NONE);
    equal("a write beside it", attempt1(store8, word + 1).code(), NONE);
    equal(
        "a longer write over it",
        attempt1(stores_quad, word - 4).code(),
        code(1, 0),
    );
    why();
    equal(
        "a locked write",
        attempt1(store_locked, word).code(),
        code(1, 0),
    );
    why();
    asm::set_dr7(enable(3, 0));
    equal("an access", attempt1(load8, word).code(), code(1, 0));
    equal("DR6", why(), 1);
    equal(
        "a longer access over it",
        attempt1(load_far, word).code(),
        code(1, 0),
    );
    why();
    asm::set_dr7(enable(1, 3));
    equal(
        "the last of four bytes",
        attempt1(store8, word + 3).code(),
        code(1, 0),
    );
    equal("the fifth byte", attempt1(store8, word + 4).code(), NONE);
    why();
    asm::set_dr7(enable(1, 2));
    equal(
        "the last of eight bytes",
        attempt1(store8, word + 7).code(),
        code(1, 0),
    );
    why();
    // Two at once, of which one is not enabled: its bit may be set all the same, the other has to be.
    set_dr1(word);
    asm::set_dr7(enable(1, 0) | 8 | 1 << 20);
    equal("two breakpoints", attempt1(store8, word).code(), code(1, 0));
    equal("DR6 of both", why(), 3);
    // In the middle of a string.
    asm::set_dr0(word + 100);
    asm::set_dr7(enable(1, 0));
    let outcome = attempt1(stores, word + 92);
    equal("a string's write", outcome.code(), code(1, 0));
    equal("it has written", asm::read8(word + 100), 1);
    why();
    // Without CR4.DE, I/O breakpoints are undefined; with it they come after the access.
    asm::set_cr4(asm::cr4() | 8);
    asm::set_dr0(0x3ff);
    asm::set_dr7(enable(2, 0));
    let outcome = attempt0(in_port);
    equal("a port", outcome.code(), code(1, 0));
    equal("after the access", outcome.trap().rip, in_next());
    equal("DR6", why(), 1);
    asm::set_dr7(0x400);
    asm::set_dr0(0);
    set_dr1(0);
}

asm! {
    fn stores_quad(address) { "mov qword ptr [rdi], 1" "ret" }
}

fn registers() {
    equal("DR4 with CR4.DE", attempt0(dr4).code(), code(6, 0));
    asm::set_cr4(asm::cr4() & !8);
    equal("DR4 is DR6 without CR4.DE", attempt0(dr4).value, asm::dr6());
    equal(
        "DR7 above 32 bits",
        attempt1(asm::set_dr7, 1 << 32).code(),
        code(13, 0),
    );
    equal(
        "DR6 above 32 bits",
        attempt1(asm::set_dr6, 1 << 32).code(),
        code(13, 0),
    );
    equal("DR7 by user code", user::run0(user_dr).code(), code(13, 0));
    asm::set_dr7(0);
    equal("bit 10 of DR7 is always set", asm::dr7(), 0x400);
    asm::set_dr0(0x1234_5678_9abc_def0);
    equal("DR0 holds anything", dr0(), 0x1234_5678_9abc_def0);
    asm::set_dr0(0);
    // General detect: any access to debug registers traps, and the trap clears the bit.
    asm::set_dr7(0x2400);
    let outcome = attempt0(dr0);
    let reason = asm::dr6();
    asm::set_dr6(ONES);
    equal("general detect", outcome.code(), code(1, 0));
    equal("general detect: RIP", outcome.trap().rip, trap::at(dr0));
    equal("general detect: DR6", reason & !ONES, 1 << 13);
    equal("general detect: DR7", asm::dr7(), 0x400);
}
