//! 32-bit user code below a 64-bit kernel: its segments, its stack, its ways into the kernel.

use super::asm;
use super::boot::{TSS, gdt, selector};
use super::check::{equal, holds};
use super::trap::{self, Outcome, code};
use super::user;

/// 32-bit code; it ends with `int 0x80`, and EAX is its result.
macro_rules! code32 {
    ($($(#[$meta:meta])* fn $name:ident { $($line:literal)* })+) => {
        asm! { $($(#[$meta])* fn $name() { ".code32" $($line)* "int 0x80" ".code64" })+ }
    };
}

code32! {
    fn nothing {}
    fn selectors { "mov eax, cs" "shl eax, 16" "mov ecx, ss" "mov ax, cx" }
    fn inc_dec { "mov eax, 5" ".byte 0x40" ".byte 0x40" ".byte 0x48" }
    fn bcd { "mov eax, 0x0f08" "aaa" "movzx ecx, ax" "mov al, 0x79" "add al, 0x35" "daa" "shl eax, 16" "or eax, ecx" }
    fn push_pop { "mov eax, esp" "push 1" "pushad" "sub eax, esp" "popad" "pop ecx" "mov eax, esp" ".byte 6" "sub eax, esp" ".byte 7" }
    fn wrap { "mov eax, 0xfffffffc" "lea ecx, [eax + 8]" "mov eax, ecx" }
    fn wraps_memory { "mov ecx, edi" "sub ecx, 0x10" "mov eax, [ecx + 0x10]" "mov edx, edi" "neg edx" "mov eax, [edi + edi + 0]" }
    fn upper { "mov eax, -1" "mov ecx, -1" "add eax, ecx" }
    fn limit { "mov eax, 0x63" "mov es, eax" "mov eax, es:[0xffc]" }
    fn limit_over { "mov eax, 0x63" "mov es, eax" "mov eax, es:[0xffd]" }
    fn limit_stack { "mov eax, 0x63" "mov ecx, esp" "mov ss, eax" "mov esp, 0x1008" "push 1" }
    fn code_write { "mov cs:[edi], eax" }
    fn null_segment { "xor eax, eax" "mov es, eax" "mov eax, es:[edi]" }
    fn into { "mov eax, 0x7fffffff" "inc eax" "into" }
    fn into_not { "xor eax, eax" "into" }
    fn bound { "push 10" "push 5" "mov eax, 11" ".byte 0x62, 0x04, 0x24" }
    fn bound_in { "push 10" "push 5" "mov eax, 10" ".byte 0x62, 0x04, 0x24" "add esp, 8" }
    fn far { "push 0x2b" "call 2f" "2: pop eax" "add eax, 6" "push eax" "retf" ".code64" "mov eax, 0x8765" "shl rax, 8" "int 0x80" ".code32" }
    fn arpl { "mov eax, 0x10" "mov ecx, 3" "arpl ax, cx" "setz cl" "movzx ecx, cl" "shl ecx, 16" "or eax, ecx" }
    fn lar { "mov ecx, 0x1b" "xor eax, eax" "lar eax, ecx" "and eax, 0xf0ff00" }
    fn lsl { "mov ecx, 0x63" "xor eax, eax" "lsl eax, ecx" }
    fn verify { "mov ecx, 0x58" "verw cx" "setz al" "mov ecx, 0x63" "verw cx" "setz ah" "movzx eax, ax" }
    fn far_call { "mov ecx, esp" "push 0" "push 0" ".byte 0x9a" ".long 0" ".word 0x10" }
    fn enter_leave { "mov ecx, esp" "enter 16, 0" "mov eax, ecx" "sub eax, esp" "leave" "sub ecx, esp" "shl ecx, 16" "or eax, ecx" }
    fn loop_16 { "mov ecx, 0x10003" "xor eax, eax" "2: inc eax" ".byte 0x67" "loop 2b" }
    fn string { "mov ecx, 64" "mov eax, 0x01020304" "rep stosd" "mov eax, [edi - 4]" }
    fn xlat { "push ebx" "mov ebx, edi" "mov byte ptr [edi + 7], 0x5a" "mov eax, 7" "xlatb" "pop ebx" }
    fn address_16 { "mov ebx, 0x10000" "mov eax, 1" ".byte 0x67, 0x8d, 0x47, 0xff" }
}

asm! {
    fn sysenter_32() { ".code32" "mov ecx, esp" "mov eax, 0x77" "sysenter" ".code64" }
    fn entered() { "mov [suite_entered], rsp" "mov ecx, cs" "shl rcx, 16" "mov edx, ss" "or rcx, rdx" "mov [suite_entered + 8], rcx" "pushfq" "pop rcx" "mov [suite_entered + 16], rcx" "int 0x47" }
    fn noted(index) { "mov rax, [suite_entered + rdi * 8]" "ret" }
    /// SYSEXIT to 32-bit code.
    fn sysexit(to, stack) { "mov rdx, rdi" "mov rcx, rsi" "sysexit" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_entered: .fill 3, 8, 0",
    ".text"
);

fn run_one(function: extern "C" fn() -> u64, argument: u64) -> Outcome {
    user::run_32(trap::at(function), argument, 0)
}

/// What EAX is at the end.
fn result(name: &str, function: extern "C" fn() -> u64, want: u64) {
    let outcome = run_one(function, 0);
    equal(name, outcome.code(), code(0x80, 0));
    equal(name, outcome.trap().rax, want);
}

fn faults(name: &str, function: extern "C" fn() -> u64, want: u64) {
    equal(name, run_one(function, 0).code(), want);
}

pub fn run() {
    let page = user::address(super::paging::page());
    let trap = run_one(nothing, 0).trap();
    equal("CS", trap.cs, selector::USER_CODE_32);
    equal("SS", trap.ss, selector::USER_DATA);
    equal("RSP", trap.rsp, user::stack());
    result("selectors", selectors, 0x001b_0023);
    result("INC and DEC in one byte", inc_dec, 6);
    result("AAA and DAA", bcd, 0x0f14_0f08);
    result("PUSH of segments", push_pop, 4);
    result("addresses wrap", wrap, 4);
    result("registers have 32 bits", upper, 0xffff_fffe);
    result("INTO without overflow", into_not, 0);
    result("BOUND inside", bound_in, 10);
    result("ARPL", arpl, 0x0001_0013);
    result("LAR", lar, 0x00c0_fb00);
    result("LSL", lsl, 0xfff);
    result("VERW", verify, 0x0100);
    result("ENTER and LEAVE", enter_leave, 20);
    result("LOOP with CX", loop_16, 3);
    result("LEA with 16 bits", address_16, 0xffff);
    faults("INTO", into, code(4, 0));
    faults("BOUND outside", bound, code(5, 0));
    faults("beyond a limit", limit_over, code(13, 0));
    faults("beyond the stack's limit", limit_stack, code(12, 0));
    faults("a write to code", code_write, code(13, 0));
    faults("a null segment", null_segment, code(13, 0));
    faults("a far call to the kernel's data", far_call, code(13, 0x10));
    let outcome = user::run_32(trap::at(string), page, 0);
    equal("STOSD", outcome.trap().rax, 0x0102_0304);
    equal(
        "XLATB",
        user::run_32(trap::at(xlat), page, 0).trap().rax,
        0x5a,
    );
    // Linear address 0xffc is in the kernel's memory.
    equal(
        "within a limit, not user's",
        run_one(limit, 0).code(),
        code(14, 5),
    );
    let outcome = run_one(far, 0);
    equal(
        "a far return to 64-bit code",
        outcome.trap().rax,
        0x0087_6500,
    );
    equal("its CS", outcome.trap().cs, selector::USER_CODE);
    // Memory wraps at 4 GiB: twice the address is not where 64-bit code would look.
    let outcome = user::run_32(trap::at(wraps_memory), page, 0);
    equal(
        "an address beyond 4 GiB",
        outcome.trap().cr2,
        (page * 2) & 0xffff_ffff,
    );
    // The frame's stack is the kernel's.
    trap::gate(0x80, 0, 3);
    let frame = run_one(nothing, 0).trap().frame;
    trap::gate(0x80, 1, 3);
    equal("RSP0", frame, asm::read(TSS + 4) - 40);
    sysenter();
    holds(
        "the descriptor is as it was",
        asm::read(gdt() + 0x18) >> 40 & 0xfb == 0xfb,
    );
}

/// SYSENTER: Intel's processors have it in all modes, AMD's not in long mode.
fn sysenter() {
    asm::wrmsr(0x174, 8);
    asm::wrmsr(0x175, trap::stack_top(0, 0) - 0x3000);
    asm::wrmsr(0x176, trap::at(entered));
    user::set_flags(0x246);
    let outcome = run_one(sysenter_32, 0);
    user::set_flags(2);
    if outcome.code() == code(6, 0) {
        return super::check::absent("SYSENTER");
    }
    equal("SYSENTER", outcome.code(), code(0x47, 0));
    equal("SYSENTER: RSP", noted(0), trap::stack_top(0, 0) - 0x3000);
    equal("SYSENTER: CS and SS", noted(1), 0x0008_0010);
    equal("SYSENTER: IF", noted(2) & 0x200, 0);
    let after = user::address(trap::at(nothing));
    let outcome = trap::attempt2(sysexit, after, user::stack());
    equal("SYSENTER: SYSEXIT", outcome.code(), code(0x80, 0));
    equal(
        "SYSENTER: SYSEXIT: CS",
        outcome.trap().cs,
        selector::USER_CODE_32,
    );
    equal(
        "SYSENTER: SYSEXIT: SS",
        outcome.trap().ss,
        selector::USER_DATA,
    );
    equal("SYSENTER: SYSEXIT: RSP", outcome.trap().rsp, user::stack());
    asm::wrmsr(0x174, 0);
    equal(
        "SYSENTER without CS",
        run_one(sysenter_32, 0).code(),
        code(13, 0),
    );
}
