//! Functions in assembly, and those that everything else is made of: memory, ports, control registers.

/// Functions whose body is assembly. Arguments are in RDI, RSI, RDX, RCX, R8, R9, the result is in RAX; RBX, RBP and
/// R12 to R15 are preserved.
macro_rules! asm {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident),*) { $($line:literal)* })+) => {
        $(
            $(#[$meta])*
            #[unsafe(naked)]
            $vis extern "C" fn $name($($arg: u64),*) -> u64 {
                core::arch::naked_asm!($($line),*)
            }
        )+
    };
}

asm! {
    /// The 8 bytes at an address.
    pub fn read(address) { "mov rax, [rdi]" "ret" }
    /// Sets the 8 bytes at an address.
    pub fn write(address, value) { "mov [rdi], rsi" "ret" }
    /// The 4 bytes at an address.
    pub fn read32(address) { "mov eax, [rdi]" "ret" }
    /// Sets the 4 bytes at an address.
    pub fn write32(address, value) { "mov [rdi], esi" "ret" }
    /// The byte at an address.
    pub fn read8(address) { "movzx eax, byte ptr [rdi]" "ret" }
    /// Sets the byte at an address.
    pub fn write8(address, value) { "mov [rdi], sil" "ret" }
    /// Calls an address, for what it does.
    pub fn call(address) { "sub rsp, 8" "call rdi" "add rsp, 8" "ret" }
    /// Fills memory with a byte.
    pub fn fill(address, value, count) { "mov eax, esi" "mov rcx, rdx" "rep stosb" "ret" }
    /// Copies memory upwards.
    pub fn copy(to, from, count) { "mov rcx, rdx" "rep movsb" "ret" }

    /// The stack that user code is given.
    pub fn read_user_stack() { "mov rax, [suite_user_stack]" "ret" }

    pub fn in8(port) { "mov edx, edi" "xor eax, eax" "in al, dx" "ret" }
    pub fn in32(port) { "mov edx, edi" "xor eax, eax" "in eax, dx" "ret" }
    pub fn out8(port, value) { "mov edx, edi" "mov eax, esi" "out dx, al" "ret" }
    pub fn out16(port, value) { "mov edx, edi" "mov eax, esi" "out dx, ax" "ret" }
    pub fn out32(port, value) { "mov edx, edi" "mov eax, esi" "out dx, eax" "ret" }
    /// Writes a string to a port.
    pub fn outs8(port, address, count) { "mov rcx, rdx" "mov edx, edi" "rep outsb" "ret" }

    pub fn rdmsr(msr) { "mov ecx, edi" "rdmsr" "shl rdx, 32" "or rax, rdx" "ret" }
    pub fn wrmsr(msr, value) { "mov ecx, edi" "mov eax, esi" "mov rdx, rsi" "shr rdx, 32" "wrmsr" "ret" }
    pub fn rdtsc() { "rdtsc" "shl rdx, 32" "or rax, rdx" "ret" }
    pub fn xgetbv(index) { "mov ecx, edi" "xgetbv" "shl rdx, 32" "or rax, rdx" "ret" }
    pub fn xsetbv(index, value) { "mov ecx, edi" "mov eax, esi" "mov rdx, rsi" "shr rdx, 32" "xsetbv" "ret" }

    pub fn cr0() { "mov rax, cr0" "ret" }
    pub fn set_cr0(value) { "mov cr0, rdi" "ret" }
    pub fn cr2() { "mov rax, cr2" "ret" }
    pub fn set_cr2(value) { "mov cr2, rdi" "ret" }
    pub fn cr3() { "mov rax, cr3" "ret" }
    pub fn set_cr3(value) { "mov cr3, rdi" "ret" }
    pub fn cr4() { "mov rax, cr4" "ret" }
    pub fn set_cr4(value) { "mov cr4, rdi" "ret" }
    pub fn cr8() { "mov rax, cr8" "ret" }
    pub fn set_cr8(value) { "mov cr8, rdi" "ret" }
    pub fn dr6() { "mov rax, dr6" "ret" }
    pub fn set_dr6(value) { "mov dr6, rdi" "ret" }
    pub fn dr7() { "mov rax, dr7" "ret" }
    pub fn set_dr7(value) { "mov dr7, rdi" "ret" }
    pub fn set_dr0(value) { "mov dr0, rdi" "ret" }
    pub fn invlpg(address) { "invlpg [rdi]" "ret" }

    pub fn flags() { "pushfq" "pop rax" "ret" }
    pub fn sti() { "sti" "nop" "ret" }
    pub fn cli() { "cli" "ret" }
    /// Lets interrupts in for one instruction.
    pub fn sti_cli() { "sti" "nop" "cli" "ret" }
    pub fn pause() { "pause" "ret" }
    /// Waits for an interrupt.
    pub fn sti_hlt() { "sti" "hlt" "cli" "ret" }

    /// EAX of a CPUID leaf.
    pub fn cpuid_eax(leaf, subleaf) { "push rbx" "mov eax, edi" "mov ecx, esi" "cpuid" "pop rbx" "ret" }
    /// EBX of a CPUID leaf.
    pub fn cpuid_ebx(leaf, subleaf) { "push rbx" "mov eax, edi" "mov ecx, esi" "cpuid" "mov eax, ebx" "pop rbx" "ret" }
    /// ECX of a CPUID leaf.
    pub fn cpuid_ecx(leaf, subleaf) { "push rbx" "mov eax, edi" "mov ecx, esi" "cpuid" "mov eax, ecx" "pop rbx" "ret" }
    /// EDX of a CPUID leaf.
    pub fn cpuid_edx(leaf, subleaf) { "push rbx" "mov eax, edi" "mov ecx, esi" "cpuid" "mov eax, edx" "pop rbx" "ret" }
}
