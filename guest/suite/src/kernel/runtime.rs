//! What compiled code expects to find: memory functions, and where a panic goes.

use super::asm;

#[cfg(guest)]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    super::check::print(format_args!("{info}"));
    super::check::exit(2)
}

#[cfg_attr(guest, unsafe(no_mangle))]
extern "C" fn memcpy(to: u64, from: u64, count: u64) -> u64 {
    asm::copy(to, from, count);
    to
}

#[cfg_attr(guest, unsafe(no_mangle))]
extern "C" fn memset(to: u64, value: u64, count: u64) -> u64 {
    asm::fill(to, value, count);
    to
}

#[cfg_attr(guest, unsafe(no_mangle))]
extern "C" fn memmove(to: u64, from: u64, count: u64) -> u64 {
    move_bytes(to, from, count);
    to
}

asm! {
    fn move_bytes(to, from, count) {
        "mov rcx, rdx"
        "mov rax, rdi"
        "sub rax, rsi"
        "cmp rax, rdx"
        "jb 2f"
        "rep movsb"
        "ret"
        // The target begins inside the source: downwards.
        "2: lea rsi, [rsi + rcx - 1]"
        "lea rdi, [rdi + rcx - 1]"
        "std"
        "rep movsb"
        "cld"
        "ret"
    }

    #[cfg_attr(guest, unsafe(no_mangle))]
    fn memcmp(one, other, count) {
        "mov rcx, rdx"
        "xor eax, eax"
        "cmp eax, eax"
        "repe cmpsb"
        "je 2f"
        "movzx eax, byte ptr [rdi - 1]"
        "movzx ecx, byte ptr [rsi - 1]"
        "sub eax, ecx"
        "2: ret"
    }

    #[cfg_attr(guest, unsafe(no_mangle))]
    fn bcmp(one, other, count) {
        "mov rcx, rdx"
        "xor eax, eax"
        "cmp eax, eax"
        "repe cmpsb"
        "setne al"
        "ret"
    }
}

// `core` was compiled with tables for unwinding, which name this function; nothing here unwinds.
#[cfg(guest)]
core::arch::global_asm!(".globl rust_eh_personality", "rust_eh_personality: ud2");
