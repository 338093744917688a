//! Code at privilege 3: the image is mapped a second time for it.

use super::boot::{USER, selector};
use super::trap::{self, Outcome};
use super::{asm, paging};
use core::sync::atomic::{AtomicU64, Ordering};

asm! {
    /// Goes to RDI with the selectors of a frame; RSI and RDX become the first arguments there.
    fn enter_64(code, a, b) {
        "push 0x23"
        "push qword ptr [suite_user_stack]"
        "push qword ptr [suite_user_flags]"
        "push 0x2b"
        "push rdi"
        "mov rdi, rsi"
        "mov rsi, rdx"
        "iretq"
    }
    /// As [`enter_64`], into 32-bit code.
    fn enter_32(code, a, b) {
        "push 0x23"
        "push qword ptr [suite_user_stack]"
        "push qword ptr [suite_user_flags]"
        "push 0x1b"
        "push rdi"
        "mov rdi, rsi"
        "mov rsi, rdx"
        "mov eax, 0x23"
        "mov ds, eax"
        "mov es, eax"
        "iretq"
    }
    fn set_stack(address) { "mov [suite_user_stack], rdi" "ret" }
    /// The flags that user code starts with.
    pub fn set_flags(flags) { "mov [suite_user_flags], rdi" "ret" }
    /// Reads.
    pub fn reads(address) { "mov rax, [rdi]" "int 0x80" }
    /// Writes.
    pub fn writes(address) { "mov [rdi], rax" "int 0x80" }
    /// Writes an instruction that returns.
    pub fn writes_return(address) { "mov byte ptr [rdi], 0xc3" "int 0x80" }
    /// Calls.
    pub fn calls(address) { "call rdi" "int 0x80" }
    /// Does nothing, in the kernel.
    pub fn nothing_at_all() { "nop" "nop" "ret" }
    /// Does nothing.
    pub fn nothing() { "int 0x80" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_user_stack: .quad 0",
    "suite_user_flags: .quad 2",
    ".text"
);

/// Where user code finds an address of the image.
pub fn address(of: u64) -> u64 {
    of + USER
}

/// The selector that 64-bit user code runs with.
pub const CODE: u64 = selector::USER_CODE;

fn prepare() {
    static STACK: AtomicU64 = AtomicU64::new(0);
    if STACK.load(Ordering::Relaxed) == 0 {
        STACK.store(address(paging::page() + 4096 - 64), Ordering::Relaxed);
    }
    set_stack(STACK.load(Ordering::Relaxed));
}

/// Runs 64-bit user code of the image until it traps.
pub fn run(code: u64, a: u64, b: u64) -> Outcome {
    prepare();
    let enter = enter_64 as extern "C" fn(u64, u64, u64) -> u64;
    trap::attempt(enter as usize as u64, address(code), a, b)
}

/// Runs 32-bit user code of the image until it traps.
pub fn run_32(code: u64, a: u64, b: u64) -> Outcome {
    prepare();
    let enter = enter_32 as extern "C" fn(u64, u64, u64) -> u64;
    trap::attempt(enter as usize as u64, address(code), a, b)
}

/// Runs a function with an argument.
pub fn run1(code: extern "C" fn(u64) -> u64, a: u64) -> Outcome {
    run(code as usize as u64, a, 0)
}

/// Runs a function without arguments.
pub fn run0(code: extern "C" fn() -> u64) -> Outcome {
    run(code as usize as u64, 0, 0)
}

/// The top of the stack that user code has.
pub fn stack() -> u64 {
    prepare();
    asm::read_user_stack()
}
