//! Interrupts: the local APIC's priorities, IF and its shadows, non-maskable interrupts, the I/O APIC's edges and levels.

use super::asm;
use super::check::{equal, holds};
use super::trap::{self, Action, attempt0, attempt1, code};
use super::{apic, user};

const SERIAL: u64 = 0x3f8;
/// The serial port's pin of the I/O APIC.
const SERIAL_PIN: u64 = 4;

asm! {
    /// STI, an instruction, CLI: the interrupt comes after the first instruction.
    fn sti_one() { "sti" ".globl suite_after_sti" "mov eax, 1" "suite_after_sti:" "mov eax, 2" "cli" "ret" }
    fn after_sti() { "lea rax, [rip + suite_after_sti]" "ret" }
    /// STI and CLI: nothing comes.
    fn sti_nothing() { "sti" "cli" "ret" }
    /// STI while IF is set has no shadow; the second one neither.
    fn sti_twice() { "sti" "sti" "suite_sti_twice:" "cli" "ret" }
    fn after_sti_twice() { "lea rax, [rip + suite_sti_twice]" "ret" }
    /// MOV SS has a shadow of one instruction.
    fn move_ss() { "mov ecx, 0x10" "sti" "mov ss, ecx" "cli" "ret" }
    fn popf_if() { "push 0x202" "popfq" "suite_popf:" "nop" "cli" "ret" }
    fn after_popf() { "lea rax, [rip + suite_popf]" "ret" }
    fn halt() { "sti" "hlt" "suite_halt:" "cli" "ret" }
    fn after_halt() { "lea rax, [rip + suite_halt]" "ret" }
    fn iret_if() { "mov rax, rsp" "push 0x10" "push rax" "push 0x202" "push 8" "lea rax, [rip + suite_iret]" "push rax" "iretq" "suite_iret: nop" "cli" "ret" }
    fn after_iret() { "lea rax, [rip + suite_iret]" "ret" }
    fn user_waits() { "mov ecx, 1000000" "2: dec ecx" "jnz 2b" "int 0x80" }
}

/// Requests a vector of this CPU.
fn request(vector: u64) {
    apic::send(apic::SELF | vector);
}

/// Forgets what came, and lets in whatever waits.
fn open() -> u64 {
    trap::clear_log();
    asm::sti_cli();
    trap::log()
}

pub fn run() {
    apic::enable();
    // The masked pair of interrupt controllers is not there to be asked.
    equal("version", apic::get(apic::VERSION) & 0xff, 0x14);
    for vector in 0x30..0x100 {
        trap::on(vector, Action::End);
    }
    // User code's way back.
    trap::on(0x80, Action::Escape);
    delivery();
    priorities();
    user_code();
    non_maskable();
    errors();
    io_apic();
}

fn delivery() {
    trap::clear_log();
    request(0x40);
    equal("nothing with IF clear", trap::logged(), 0);
    equal("it is requested", apic::bit(apic::IRR, 0x40), 1);
    equal("it comes", open(), 0x40);
    equal("and is gone", apic::bit(apic::IRR, 0x40), 0);
    equal("once", open(), 0);
    request(0x41);
    request(0x41);
    equal("twice requested, once seen", open(), 0x41);
    trap::on(0x41, Action::Escape);
    request(0x41);
    let outcome = attempt0(sti_one);
    equal("after the shadow of STI", outcome.trap().rip, after_sti());
    equal("the flags it saved", outcome.trap().flags & 0x200, 0x200);
    equal("in service", apic::bit(apic::ISR, 0x41), 1);
    apic::end();
    equal("not in service", apic::bit(apic::ISR, 0x41), 0);
    request(0x41);
    equal("STI and CLI", attempt0(sti_nothing).code(), trap::NONE);
    equal(
        "STI twice",
        attempt0(sti_twice).trap().rip,
        after_sti_twice(),
    );
    apic::end();
    request(0x41);
    equal("POPF", attempt0(popf_if).trap().rip, after_popf());
    apic::end();
    request(0x41);
    equal("IRET", attempt0(iret_if).trap().rip, after_iret());
    apic::end();
    request(0x41);
    equal(
        "HLT with an interrupt waiting",
        attempt0(halt).trap().rip,
        after_halt(),
    );
    apic::end();
    trap::on(0x41, Action::End);
    attempt0(move_ss);
    open();
    // A handler's frame returns to where it was, and IF comes back with it.
    request(0x42);
    trap::clear_log();
    asm::sti();
    let flags = asm::flags();
    asm::cli();
    equal("one vector while IF was set", trap::log(), 0x42);
    equal("IF is set after it", flags & 0x200, 0x200);
}

fn priorities() {
    for vector in [0x51, 0x93, 0x32, 0xe0, 0x7f] {
        request(vector);
    }
    equal("by priority", open(), 0xe0937f5132);
    apic::set(apic::TPR, 0x70);
    for vector in [0x6f, 0x70, 0x7f, 0x81, 0xf0] {
        request(vector);
    }
    equal("above the task's priority", open(), 0xf0_81);
    equal("PPR", apic::get(apic::PPR), 0x70);
    asm::set_cr8(6);
    equal("TPR follows CR8", apic::get(apic::TPR), 0x60);
    equal("one class lower", open(), 0x7f_70);
    apic::set(apic::TPR, 0x2f);
    equal("CR8 follows TPR", asm::cr8(), 2);
    equal("the rest", open(), 0x6f);
    apic::set(apic::TPR, 0);

    // Without an end of interrupt, only higher classes come.
    trap::on(0x65, Action::Resume);
    request(0x65);
    equal("in service", open(), 0x65);
    equal(
        "PPR of what is in service",
        apic::get(apic::PPR) & 0xf0,
        0x60,
    );
    for vector in [0x45, 0x6f, 0x70] {
        request(vector);
    }
    equal("only above the one in service", open(), 0x70);
    apic::end();
    equal("after its end", open(), 0x6f_45);
    trap::on(0x65, Action::End);

    // Switched off by software, nothing comes; what is there stays.
    request(0x50);
    apic::set(apic::SPURIOUS, 0xff);
    apic::set(apic::SPURIOUS, 0x1ff);
    open();
    // Vectors below 16 are refused.
    apic::set(apic::ESR, 0);
    apic::send(apic::SELF | 0x0f);
    apic::set(apic::ESR, 0);
    holds(
        "an illegal vector is an error",
        apic::get(apic::ESR) & 0x60 != 0,
    );
    apic::set(apic::ESR, 0);
    // To all, and to nobody but others.
    apic::send(apic::ALL | 0x61);
    equal("to all", open(), 0x61);
    apic::send(apic::OTHERS | 0x62);
    equal("to others", open(), 0);
    apic::send_to(0, 0x63);
    equal("to this one by number", open(), 0x63);
    apic::send_to(0xff, 0x64);
    equal("to everybody by number", open(), 0x64);
    // Logical, flat.
    apic::set(apic::LDR, 2 << 24);
    apic::send_to(2, 1 << 11 | 0x66);
    equal("to a logical group", open(), 0x66);
    apic::send_to(5, 1 << 11 | 0x67);
    equal("to another group", open(), 0);
}

fn user_code() {
    trap::on(0x48, Action::Escape);
    user::set_flags(0x202);
    request(0x48);
    let outcome = user::run0(user_waits);
    equal("user code is interrupted", outcome.code(), code(0x48, 0));
    equal(
        "before its first instruction",
        outcome.trap().cs,
        user::CODE,
    );
    apic::end();
    // What user code does not mask, only IF does.
    user::set_flags(2);
    request(0x48);
    equal(
        "user code with IF clear",
        user::run0(user_waits).code(),
        code(0x80, 0),
    );
    trap::on(0x48, Action::End);
    equal("and then", open(), 0x48);
}

asm! {
    /// Sends an NMI to this CPU from an NMI's handler, so that it waits for IRET.
    fn nmi_again(frame) {
        "mov ecx, 0xfee00300"
        "cmp qword ptr [suite_nmi_left], 0"
        "je 2f"
        "dec qword ptr [suite_nmi_left]"
        "mov rax, [suite_nmi_depth]"
        "inc qword ptr [suite_nmi_depth]"
        "mov dword ptr [rcx], 0x44400"
        "nop" "nop" "nop" "nop"
        // Had it come here, the depth would have grown.
        "mov rax, [suite_nmi_depth]"
        "or [suite_nmi_seen], rax"
        "dec qword ptr [suite_nmi_depth]"
        "2: ret"
    }
    fn set_nmis(count) { "mov [suite_nmi_left], rdi" "ret" }
    fn nmi_depth() { "mov rax, [suite_nmi_seen]" "ret" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_nmi_left: .quad 0",
    "suite_nmi_depth: .quad 0",
    "suite_nmi_seen: .quad 0",
    ".text"
);

fn non_maskable() {
    const NMI: u64 = apic::SELF | 4 << 8;
    // By its number: shorthands to itself may not be NMIs.
    let send = || apic::send_to(0, NMI & !apic::SELF);
    trap::on(2, Action::Resume);
    trap::clear_log();
    send();
    asm::pause();
    equal("an NMI comes with IF clear", trap::log(), 2);
    trap::on(2, Action::Escape);
    let outcome = attempt0(user::nothing_at_all);
    equal("none is left", outcome.code(), trap::NONE);
    let outcome = attempt1(send_nmi, 0);
    equal("an NMI", outcome.code(), code(2, 0));
    equal(
        "an NMI's stack",
        outcome.trap().frame,
        trap::stack_top(0, 2) - 40,
    );
    // Ten in a row, each sent by the handler of the one before: none nests.
    trap::calls(nmi_again);
    trap::on(2, Action::Call);
    set_nmis(10);
    trap::clear_log();
    send();
    asm::pause();
    equal("NMIs one after the other", trap::logged(), 11);
    equal("never one in another", nmi_depth(), 1);
    trap::on(2, Action::Escape);
}

asm! {
    fn send_nmi(unused) { "mov ecx, 0xfee00310" "mov dword ptr [rcx], 0" "mov ecx, 0xfee00300" "mov dword ptr [rcx], 0x4400" "nop" "nop" "nop" "nop" "ret" }
}

fn errors() {
    // Reserved local vectors, and registers that are only read.
    let before = apic::get(apic::VERSION);
    apic::set(apic::VERSION, 0);
    equal("the version stays", apic::get(apic::VERSION), before);
    apic::set(apic::LINT0, apic::MASKED | 0x80);
    equal(
        "a local vector",
        apic::get(apic::LINT0),
        apic::MASKED | 0x80,
    );
    equal("CPU 0 has number 0", apic::get(apic::ID) >> 24, 0);
}

/// Sets or clears the serial port's interrupt: its transmitter is always empty.
fn serial_interrupts(on: bool) {
    asm::out8(SERIAL + 1, if on { 2 } else { 0 });
}

fn io_apic() {
    equal("pins", apic::io_get(1) >> 16 & 0xff, 23);
    apic::route(SERIAL_PIN, apic::MASKED | 0x58);
    equal("a masked pin", apic::io_get(0x18), apic::MASKED | 0x58);
    asm::out8(SERIAL + 4, 8);
    serial_interrupts(true);
    equal("a masked pin interrupts not", open(), 0);
    asm::in8(SERIAL + 2);
    serial_interrupts(false);

    // Printing causes such interrupts too: everything is looked at first.
    apic::route(SERIAL_PIN, 0x58);
    serial_interrupts(true);
    let edge = [open(), open(), reason(), reason()];
    serial_interrupts(false);
    equal("an edge", edge[0], 0x58);
    equal("an edge comes once", edge[1], 0);
    equal("its reason", edge[2], 2);
    equal("its reason is read once", edge[3], 1);
    serial_interrupts(true);
    let second = open();
    reason();
    serial_interrupts(false);
    equal("a second edge", second, 0x58);

    // Level: it comes again until the reason is gone.
    const LEVEL: u64 = 1 << 15;
    const REMOTE: u64 = 1 << 14;
    trap::on(0x59, Action::Resume);
    apic::route(SERIAL_PIN, LEVEL | 0x59);
    serial_interrupts(true);
    let first = open();
    let (remote, mode, early) = (
        apic::io_get(0x18) & REMOTE,
        apic::bit(apic::TMR, 0x59),
        open(),
    );
    apic::end();
    let again = open();
    reason();
    apic::end();
    let (late, remote_late) = (open(), apic::io_get(0x18) & REMOTE);
    serial_interrupts(false);
    equal("a level", first, 0x59);
    equal("remote IRR while it is in service", remote, REMOTE);
    equal("TMR", mode, 1);
    equal("not again before its end", early, 0);
    equal("again after its end", again, 0x59);
    equal("no more when the reason is gone", late, 0);
    equal("remote IRR at the end", remote_late, 0);
    // An edge's end is nobody's business.
    apic::route(SERIAL_PIN, 0x5a);
    serial_interrupts(true);
    let (edge, mode) = (open(), apic::bit(apic::TMR, 0x5a));
    reason();
    serial_interrupts(false);
    apic::route(SERIAL_PIN, apic::MASKED);
    equal("an edge after levels", edge, 0x5a);
    equal("TMR of an edge", mode, 0);
}

/// Why the serial port interrupts, which asking may end.
fn reason() -> u64 {
    asm::in8(SERIAL + 2) & 0xf
}
