//! Exceptions: each vector that code can cause, its error code, the stack it comes on, faults of faults.

use super::asm::{self, read, write};
use super::boot::{EMPTY, IDT, TSS, gdt, selector};
use super::check::{equal, holds, kills_emulation};
use super::paging::{self, TABLE};
use super::trap::{self, Action, Outcome, attempt, attempt0, attempt1, code, stack_top};
use super::user;

asm! {
    fn divide_by_zero() { "xor ecx, ecx" "mov eax, 1" "cdq" "div ecx" "ret" }
    fn divide_too_much() { "mov eax, 0" "mov edx, 5" "mov ecx, 5" "div ecx" "ret" }
    fn divide_most_negative() { "mov eax, 0x80000000" "cdq" "mov ecx, -1" "idiv ecx" "ret" }
    fn icebp() { ".byte 0xf1" "ret" }
    fn breakpoint() { "int3" "ret" }
    fn breakpoint_long() { ".byte 0xcd, 3" "ret" }
    fn undefined() { "ud2" "ret" }
    fn undefined_lock() { ".byte 0xf0, 0x90" "ret" }
    fn undefined_long() { ".byte 0x06" "ret" }
    fn x87_with(bits) { "mov rax, cr0" "or rax, rdi" "mov cr0, rax" "fnop" "ret" }
    fn wait_with(bits) { "mov rax, cr0" "or rax, rdi" "mov cr0, rax" "fwait" "ret" }
    fn sse_with(bits) { "mov rax, cr0" "or rax, rdi" "mov cr0, rax" "xorps xmm0, xmm0" "ret" }
    fn mmx_with(bits) { "mov rax, cr0" "or rax, rdi" "mov cr0, rax" "emms" "ret" }
    fn clear_ts() { "mov rax, cr0" "or rax, 8" "mov cr0, rax" "clts" "fnop" "xorps xmm0, xmm0" "mov rax, cr0" "ret" }
    fn general_cr() { "mov eax, 1" "mov cr0, rax" "ret" }
    fn software(vector) { "int 0x47" "ret" }
    fn load_ds(selector) { "mov ds, edi" "mov eax, 0x10" "mov ds, eax" "ret" }
    fn load_ss(selector) { "mov ss, edi" "mov eax, 0x10" "mov ss, eax" "ret" }
    fn load_fs(selector) { "mov fs, edi" "xor eax, eax" "mov fs, eax" "ret" }
    fn load_tr(selector) { "ltr di" "ret" }
    fn load_ldt(selector) { "lldt di" "ret" }
    fn far_return(selector) { "push rdi" "lea rax, [rip + 2f]" "push rax" "retfq" "2: ret" }
    fn bad_iret(selector) { "mov rax, rsp" "push 0x10" "push rax" "push 2" "push rdi" "lea rax, [rip + 2f]" "push rax" "iretq" "2: ret" }
    fn iret_bad_ss(selector) { "mov rax, rsp" "push rdi" "push rax" "push 2" "push 0x2b" "lea rax, [rip + 2f]" "push rax" "iretq" "2: ret" }
    fn misaligned_sse() { "lea rdi, [rsp - 64]" "or rdi, 8" "movaps xmm0, [rdi + 1]" "ret" }
    fn stack_hole() { "mov rcx, rsp" "mov rax, 0x800000000008" "mov rsp, rax" "push rax" "mov rsp, rcx" "ret" }
    fn too_long() { ".fill 15, 1, 0x66" "nop" "ret" }
    fn too_long_legal() { ".fill 14, 1, 0x66" "nop" "ret" }
    fn wrmsr_reserved() { "mov ecx, 0xc0000080" "mov eax, -1" "mov edx, -1" "wrmsr" "ret" }
    fn rdmsr_unknown() { "mov ecx, 0x12345678" "rdmsr" "ret" }
    fn swapgs_user() { "swapgs" "int 0x80" }
    fn cli_user() { "cli" "int 0x80" }
    fn hlt_user() { "hlt" "int 0x80" }
    fn in_user(port) { "mov edx, edi" "xor eax, eax" "in al, dx" "int 0x80" }
    fn in32_user(port) { "mov edx, edi" "in eax, dx" "int 0x80" }
    fn int_user() { ".byte 0xcd, 0x47" "int 0x80" }
    fn int3_user() { "int3" "int 0x80" }
    fn cr0_user() { "mov rax, cr0" "int 0x80" }
    fn wrmsr_user() { "mov ecx, 0xc0000080" "xor eax, eax" "xor edx, edx" "wrmsr" "int 0x80" }
    fn lgdt_user() { "lgdt [rsp]" "int 0x80" }
    fn invlpg_user() { "invlpg [rsp]" "int 0x80" }
    fn align_user(offset) { "pushfq" "or dword ptr [rsp], 0x40000" "popfq" "lea rcx, [rsp - 64]" "and rcx, -16" "mov eax, [rcx + rdi]" "int 0x80" }
    fn popf_tf_user() { "push 0x302" "popfq" "nop" "int 0x80" }
    fn popf_user() { "push 0x3202" "popfq" "pushfq" "pop rax" "int 0x80" }
    fn clts_user() { "clts" "int 0x80" }
    fn load_ss_user() { "mov eax, 0x10" "mov ss, eax" "int 0x80" }
    fn many_registers() {
        "mov rax, rsp" "and rsp, -16" "push rax" "push 0"
        "mov rcx, 0x1111" "mov rdx, 0x2222" "mov rsi, 0x3333" "mov rdi, 0x4444" "mov r8, 0x5555" "mov r9, 0x6666"
        "mov r10, 0x7777" "mov r11, 0x8888" "mov rax, 0x9999" "stc"
        "int 0x47"
        "adc rax, rcx" "xor rax, rdx" "rol rax, 7" "add rax, rsi" "rol rax, 7" "xor rax, rdi" "rol rax, 7" "add rax, r8"
        "rol rax, 7" "xor rax, r9" "rol rax, 7" "add rax, r10" "rol rax, 7" "xor rax, r11"
        "pop rcx" "pop rsp" "ret"
    }
}

const GENERAL: u64 = code(13, 0);

fn is(name: &str, outcome: Outcome, want: u64) {
    equal(name, outcome.code(), want);
}

pub fn run() {
    by_vector();
    selectors();
    user_code();
    stacks();
    faults_of_faults();
}

fn by_vector() {
    is("divide by zero", attempt0(divide_by_zero), code(0, 0));
    is(
        "divide: quotient too large",
        attempt0(divide_too_much),
        code(0, 0),
    );
    is(
        "divide: most negative by -1",
        attempt0(divide_most_negative),
        code(0, 0),
    );
    let outcome = attempt0(divide_by_zero);
    equal(
        "a fault's RIP",
        outcome.trap().rip - trap::at(divide_by_zero),
        8,
    );
    is("INT1", attempt0(icebp), code(1, 0));
    is("INT3", attempt0(breakpoint), code(3, 0));
    equal(
        "a trap's RIP",
        attempt0(breakpoint).trap().rip - trap::at(breakpoint),
        1,
    );
    is("INT 3 in two bytes", attempt0(breakpoint_long), code(3, 0));
    equal(
        "its RIP",
        attempt0(breakpoint_long).trap().rip - trap::at(breakpoint_long),
        2,
    );
    is("UD2", attempt0(undefined), code(6, 0));
    is("LOCK NOP", attempt0(undefined_lock), code(6, 0));
    is("PUSH ES", attempt0(undefined_long), code(6, 0));
    is("15 prefixes and an opcode", attempt0(too_long), GENERAL);
    is(
        "14 prefixes and an opcode",
        attempt0(too_long_legal),
        trap::NONE,
    );
    is("FNOP with CR0.TS", attempt1(x87_with, 8), code(7, 0));
    is("FWAIT with CR0.TS", attempt1(wait_with, 8), code(7, 0));
    is("XORPS with CR0.TS", attempt1(sse_with, 8), code(7, 0));
    is("EMMS with CR0.TS", attempt1(mmx_with, 8), code(7, 0));
    equal("CR0 after CLTS", attempt0(clear_ts).value & 0xf, 3);
    is("FNOP with CR0.EM", attempt1(x87_with, 4), code(7, 0));
    is("XORPS with CR0.EM", attempt1(sse_with, 4), code(6, 0));
    is("EMMS with CR0.EM", attempt1(mmx_with, 4), code(6, 0));
    is(
        "EMMS with CR0.EM and TS",
        attempt1(mmx_with, 12),
        code(6, 0),
    );
    is("CR0 without PE", attempt0(general_cr), GENERAL);
    is("MOVAPS misaligned", attempt0(misaligned_sse), GENERAL);
    is("a push in the hole", attempt0(stack_hole), code(12, 0));
    is("EFER, all ones", attempt0(wrmsr_reserved), GENERAL);
    is("an MSR that is none", attempt0(rdmsr_unknown), GENERAL);
    is("INT 0x47", attempt1(software, 0), code(0x47, 0));
    // A gate that is not there, and one beyond the table: the error code says which.
    let gate = read(IDT + 0x470);
    write(IDT + 0x470, gate & !(1 << 47));
    is(
        "INT to a gate that is not present",
        attempt1(software, 0),
        code(11, 0x47 << 3 | 2),
    );
    write(IDT + 0x470, gate & !(0xf << 40));
    is(
        "INT to a gate of no type",
        attempt1(software, 0),
        code(13, 0x47 << 3 | 2),
    );
    write(IDT + 0x470, gate & !0xffff_0000);
    is(
        "INT to a gate without selector",
        attempt1(software, 0),
        GENERAL,
    );
    write(IDT + 0x470, gate & !0xffff_0000 | selector::DATA << 16);
    is(
        "INT to a data segment",
        attempt1(software, 0),
        code(13, selector::DATA),
    );
    write(IDT + 0x470, gate);
    // A trap gate leaves IF, an interrupt gate clears it; both clear TF, NT and RF.
    trap::on(0x47, Action::Resume);
    equal(
        "registers after an interrupt",
        attempt0(many_registers).value,
        {
            let mix = |sum: u64, add: bool, value: u64| if add { sum + value } else { sum ^ value };
            let values = [0x2222, 0x3333, 0x4444, 0x5555, 0x6666, 0x7777, 0x8888];
            let first = 0x9999 + 0x1111 + 1;
            values
                .iter()
                .enumerate()
                .fold(first, |sum: u64, (index, &value)| {
                    let turned = if index == 0 { sum } else { sum.rotate_left(7) };
                    mix(turned, index % 2 == 1, value)
                })
        },
    );
    trap::on(0x47, Action::Escape);
}

fn selectors() {
    is(
        "DS: not present",
        attempt1(load_ds, selector::NOT_PRESENT),
        code(11, selector::NOT_PRESENT),
    );
    is(
        "SS: not present",
        attempt1(load_ss, selector::NOT_PRESENT),
        code(12, selector::NOT_PRESENT),
    );
    is(
        "SS: read-only",
        attempt1(load_ss, selector::READ_ONLY),
        code(13, selector::READ_ONLY),
    );
    is(
        "SS: code",
        attempt1(load_ss, selector::CODE),
        code(13, selector::CODE),
    );
    is(
        "SS: user's",
        attempt1(load_ss, selector::USER_DATA),
        code(13, selector::USER_DATA & !3),
    );
    is("SS: null with privilege 3", attempt1(load_ss, 3), GENERAL);
    is("SS: null", attempt1(load_ss, 0), trap::NONE);
    is("DS: null", attempt1(load_ds, 3), trap::NONE);
    is(
        "DS: beyond the table",
        attempt1(load_ds, 0x1000),
        code(13, 0x1000),
    );
    is(
        "DS: local, without a table",
        attempt1(load_ds, 0x0c),
        code(13, 0x0c),
    );
    is(
        "FS: a task",
        attempt1(load_fs, selector::FIRST_TSS),
        code(13, selector::FIRST_TSS),
    );
    is(
        "TR: data",
        attempt1(load_tr, selector::DATA),
        code(13, selector::DATA),
    );
    if !kills_emulation("TR: null") {
        is("TR: null", attempt1(load_tr, 0), GENERAL);
    }
    is(
        "TR: busy",
        attempt1(load_tr, selector::FIRST_TSS),
        code(13, selector::FIRST_TSS),
    );
    is(
        "LDT: data",
        attempt1(load_ldt, selector::DATA),
        code(13, selector::DATA),
    );
    is("LDT: null", attempt1(load_ldt, 0), trap::NONE);
    is(
        "far return",
        attempt1(far_return, selector::CODE),
        trap::NONE,
    );
    is("far return to null", attempt1(far_return, 0), GENERAL);
    is(
        "far return to data",
        attempt1(far_return, selector::DATA),
        code(13, selector::DATA),
    );
    is("IRET to null", attempt1(bad_iret, 0), GENERAL);
    is(
        "IRET to data",
        attempt1(bad_iret, selector::DATA),
        code(13, selector::DATA),
    );
    is(
        "IRET to user code, kernel's stack",
        attempt1(iret_bad_ss, selector::DATA),
        code(13, selector::DATA),
    );
    is(
        "IRET to user code, no stack",
        attempt1(iret_bad_ss, 0),
        GENERAL,
    );
    holds(
        "the accessed bit is set",
        read(gdt() + selector::READ_ONLY) >> 40 & 1 == 1,
    );
    // A selector whose descriptor has the accessed bit clear gets it.
    let entry = gdt() + selector::LIMITED;
    write(entry, read(entry) & !(1 << 40));
    attempt1(load_ds, selector::LIMITED | 3);
    holds(
        "the accessed bit is set by a load",
        read(entry) >> 40 & 1 == 1,
    );
}

fn user_code() {
    is("SWAPGS by user code", user::run0(swapgs_user), GENERAL);
    is("CLI by user code", user::run0(cli_user), GENERAL);
    is("HLT by user code", user::run0(hlt_user), GENERAL);
    is("MOV CR0 by user code", user::run0(cr0_user), GENERAL);
    is("WRMSR by user code", user::run0(wrmsr_user), GENERAL);
    is("LGDT by user code", user::run0(lgdt_user), GENERAL);
    is("INVLPG by user code", user::run0(invlpg_user), GENERAL);
    is("CLTS by user code", user::run0(clts_user), GENERAL);
    is(
        "SS: kernel's, by user code",
        user::run0(load_ss_user),
        code(13, selector::DATA),
    );
    is("IN by user code", user::run1(in_user, 0x3fe), GENERAL);
    trap::allow_port(0, 0x3fe, true);
    is(
        "IN that the map allows",
        user::run1(in_user, 0x3fe),
        code(0x80, 0),
    );
    is(
        "IN of four ports, one allowed",
        user::run1(in32_user, 0x3fc),
        GENERAL,
    );
    trap::allow_port(0, 0x3fe, false);
    is("IN beyond the map", user::run1(in_user, 0x600), GENERAL);
    user::set_flags(0x3002);
    is("IN with IOPL 3", user::run1(in_user, 0x600), code(0x80, 0));
    is("CLI with IOPL 3", user::run0(cli_user), code(0x80, 0));
    equal("POPF with IOPL 3", user::run0(popf_user).trap().rax, 0x3202);
    user::set_flags(2);
    equal("POPF with IOPL 0", user::run0(popf_user).trap().rax, 2);
    is("POPF that sets TF", user::run0(popf_tf_user), code(1, 0));
    is(
        "INT 0x47 by user code",
        user::run0(int_user),
        code(13, 0x47 << 3 | 2),
    );
    is("INT3 by user code", user::run0(int3_user), code(3, 0));
    trap::gate(3, 1, 0);
    is(
        "INT3 by user code, kernel's gate",
        user::run0(int3_user),
        code(13, 3 << 3 | 2),
    );
    trap::gate(3, 1, 3);
    is(
        "misaligned, without CR0.AM",
        user::run1(align_user, 1),
        code(0x80, 0),
    );
    asm::set_cr0(asm::cr0() | 1 << 18);
    is(
        "misaligned, with CR0.AM",
        user::run1(align_user, 1),
        code(17, 0),
    );
    is(
        "aligned, with CR0.AM",
        user::run1(align_user, 4),
        code(0x80, 0),
    );
    asm::set_cr0(asm::cr0() & !(1 << 18));
    let trap = user::run0(user::nothing).trap();
    equal("a frame of user code: CS", trap.cs, user::CODE);
    equal("a frame of user code: SS", trap.ss, selector::USER_DATA);
    equal("a frame of user code: RSP", trap.rsp, user::stack());
    equal("a frame of user code: flags", trap.flags, 2);
}

asm! {
    fn ud2_off_by(offset) { "mov rcx, rsp" "sub rsp, rdi" "ud2" "mov rsp, rcx" "ret" }
}

/// Which stack a trap comes on, and how the frame is aligned.
fn stacks() {
    let frame = |ist| stack_top(0, ist) - 40;
    equal("first stack", attempt0(undefined).trap().frame, frame(1));
    trap::gate(6, 2, 0);
    equal("second stack", attempt0(undefined).trap().frame, frame(2));
    trap::gate(6, 0, 0);
    for offset in [0, 1, 8, 9, 15] {
        let trap = attempt1(ud2_off_by, offset).trap();
        equal(
            "the same stack, aligned to 16",
            (trap.rsp & !15) - trap.frame,
            40,
        );
    }
    trap::gate(0x80, 0, 3);
    equal(
        "RSP0 for user code",
        user::run0(user::nothing).trap().frame,
        stack_top(0, 0) - 0x2000 - 40,
    );
    trap::gate(0x80, 1, 3);
    trap::gate(6, 1, 0);
    // A stack that is not aligned is, downwards.
    let before = read(TSS + 0x24);
    write(TSS + 0x24, before - 5);
    equal(
        "a table's stack, aligned",
        attempt0(undefined).trap().frame,
        frame(1) - 16,
    );
    write(TSS + 0x24, before);
}

/// Exceptions whose delivery fails.
fn faults_of_faults() {
    let missing = EMPTY + 0x10_0000;
    let general = read(IDT + 13 * 16);
    // A general protection fault whose gate is not present: a contributory fault in a contributory one.
    write(IDT + 13 * 16, general & !(1 << 47));
    let outcome = attempt0(rdmsr_unknown);
    is("#NP in #GP", outcome, code(8, 0));
    equal(
        "#DF on its own stack",
        outcome.trap().frame,
        stack_top(0, 3) - 40,
    );
    is(
        "#NP in #PF",
        attempt(
            asm::read as extern "C" fn(u64) -> u64 as usize as u64,
            missing,
            0,
            0,
        ),
        code(14, 0),
    );
    write(IDT + 13 * 16, general);
    // #UD is benign: what its gate causes is reported by itself.
    let invalid = read(IDT + 6 * 16);
    write(IDT + 6 * 16, invalid & !(1 << 47));
    is("#NP in #UD", attempt0(undefined), code(11, 6 << 3 | 3));
    write(IDT + 6 * 16, invalid);
    let page_fault = read(IDT + 14 * 16);
    write(IDT + 14 * 16, page_fault & !(1 << 47));
    is(
        "#NP in #PF's gate",
        attempt1(asm::read, missing),
        code(8, 0),
    );
    write(IDT + 14 * 16, page_fault);
    // A page fault while a page fault is delivered, on a stack that is missing.
    let stack = read(TSS + 0x24);
    write(TSS + 0x24, missing);
    let outcome = attempt1(asm::read, missing + 0x5000);
    is("#PF in #PF", outcome, code(8, 0));
    equal(
        "CR2 is of the second",
        outcome.trap().cr2 & !0xfff,
        missing - 0x1000,
    );
    // #UD is benign: its stack's page fault is reported, on a stack of its own.
    trap::gate(14, 2, 0);
    let outcome = attempt0(undefined);
    is("#PF in #UD", outcome, code(14, 2));
    equal("its address", outcome.trap().cr2 & !0xfff, missing - 0x1000);
    equal("its instruction", outcome.trap().rip, trap::at(undefined));
    let outcome = attempt0(divide_by_zero);
    is("#PF in #DE", outcome, code(14, 2));
    // The page comes, the instruction runs again.
    paging::map(missing - 0x1000, paging::page(), TABLE);
    write(TSS + 0x24, stack);
    trap::gate(14, 1, 0);
    write(TSS + 0x24, 1 << 47);
    is(
        "a table's stack in the hole",
        attempt0(rdmsr_unknown),
        code(8, 0),
    );
    is(
        "#SS in #UD: its own stack is no better",
        attempt0(undefined),
        code(8, 0),
    );
    write(TSS + 0x24, stack);
}
