//! From PVH's 32-bit entry, or a start-up IPI, to long mode; and the places of everything in memory.

use core::arch::global_asm;

use super::asm;
use super::check::Line;

/// Areas of the CPUs; each has four stacks of [`STACK`] bytes, with the address of its variables at their bottoms.
pub const CPU_AREAS: u64 = 0x30_0000;
/// Bytes of a CPU's area.
pub const CPU_AREA: u64 = 0x1_0000;
/// Bytes of a stack.
pub const STACK: u64 = 0x4000;
/// Where a CPU's variables are in its area.
pub const VARIABLES: u64 = 0x100;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x38_0000;
/// Task-state segments, a page for each CPU.
pub const TSS: u64 = 0x38_1000;
/// PML4, PDPT and four page directories: memory as it is up to 1 GiB, nothing up to 2 GiB, then 64 MiB of memory again,
/// for user code, and device memory from 3 GiB on.
pub const TABLES: u64 = 0x39_0000;
/// What [`super::paging::page`] gives away.
pub const HEAP: u64 = 0x40_0000;
/// Nothing is mapped here.
pub const EMPTY: u64 = 0x4000_0000;
/// Where user code finds the memory of the first 64 MiB.
pub const USER: u64 = 0x8000_0000;
/// Where other CPUs start.
pub const TRAMPOLINE: u64 = 0x8000;

/// Selectors of the descriptor table below.
pub mod selector {
    pub const CODE: u64 = 0x08;
    pub const DATA: u64 = 0x10;
    pub const USER_CODE_32: u64 = 0x1b;
    pub const USER_DATA: u64 = 0x23;
    pub const USER_CODE: u64 = 0x2b;
    pub const CODE_32: u64 = 0x38;
    pub const NOT_PRESENT: u64 = 0x50;
    pub const READ_ONLY: u64 = 0x58;
    pub const LIMITED: u64 = 0x60;
    pub const FIRST_TSS: u64 = 0x70;
}

global_asm!(
    ".section .note.pvh, \"a\", @note",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_start",
    ".data",
    ".balign 16",
    ".globl suite_gdt",
    "suite_gdt:",
    ".quad 0",
    ".quad 0x00af9b000000ffff", // 08: code, 64 bits
    ".quad 0x00cf93000000ffff", // 10: data
    ".quad 0x00cffb000000ffff", // 18: user code, 32 bits
    ".quad 0x00cff3000000ffff", // 20: user data
    ".quad 0x00affb000000ffff", // 28: user code, 64 bits
    ".quad 0x00cff3000000ffff", // 30: user data
    ".quad 0x00cf9b000000ffff", // 38: code, 32 bits
    ".quad 0x00009b000000ffff", // 40: code, 16 bits
    ".quad 0x000093000000ffff", // 48: data, 16 bits
    ".quad 0x00cf13000000ffff", // 50: data, not present
    ".quad 0x00cf91000000ffff", // 58: data, read-only
    ".quad 0x0040f30000000fff", // 60: user data, 4 KiB
    ".quad 0",
    ".fill 16, 8, 0", // 70: task-state segments of eight CPUs
    "suite_gdt_end:",
    "suite_gdt_pointer:",
    ".word suite_gdt_end - suite_gdt - 1",
    ".quad suite_gdt",
    ".text",
    ".code32",
    ".globl pvh_start",
    "pvh_start:",
    "cli",
    "cld",
    "mov esi, ebx",
    "mov edi, {tables}",
    "mov ecx, 0x6000 / 4",
    "xor eax, eax",
    "rep stosd",
    "mov dword ptr [{tables}], {tables} + 0x1007",
    "mov dword ptr [{tables} + 0x1000], {tables} + 0x2007",
    "mov dword ptr [{tables} + 0x1008], {tables} + 0x3007",
    "mov dword ptr [{tables} + 0x1010], {tables} + 0x4007",
    "mov dword ptr [{tables} + 0x1018], {tables} + 0x5007",
    // Pages of 2 MiB, present and writable.
    "2: mov eax, ecx",
    "shl eax, 21",
    "or eax, 0x83",
    "cmp ecx, 512",
    "jb 4f",
    "or eax, 0x18", // uncached
    "cmp ecx, 1536",
    "jae 4f",
    "and eax, 0x7fffffe7",
    "or eax, 4", // for user code
    "cmp ecx, 1024",
    "jb 3f",
    "cmp ecx, 1024 + 32",
    "jb 4f",
    "3: xor eax, eax",
    "4: mov [ecx * 8 + {tables} + 0x2000], eax",
    "inc ecx",
    "cmp ecx, 2048",
    "jb 2b",
    "suite_long_mode:",
    "lgdt [suite_gdt_pointer]",
    "mov eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, eax",
    "mov eax, {tables}",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x901", // NXE, LME, SCE
    "wrmsr",
    "mov eax, 0x80010033", // PG, WP, NE, ET, MP, PE
    "mov cr0, eax",
    ".byte 0xea",
    ".long suite_long",
    ".word 8",
    ".code64",
    "suite_long:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "fninit",
    // The APIC's number chooses the area.
    "mov eax, 1",
    "cpuid",
    "shr ebx, 24",
    "mov edi, ebx",
    "mov eax, ebx",
    "shl eax, 16",
    "lea rax, [rax + {areas}]",
    "lea rcx, [rax + {variables}]",
    "mov [rax], rcx",
    "mov [rax + {stack}], rcx",
    "mov [rax + {stack} * 2], rcx",
    "mov [rax + {stack} * 3], rcx",
    "lea rsp, [rax + {stack}]",
    "test edi, edi",
    "jnz 2f",
    "mov edi, esi",
    "call {main}",
    "2: call {main_of_others}",
    "ud2",
    // What other CPUs start with, to be copied to its place.
    ".globl suite_trampoline",
    ".globl suite_trampoline_end",
    ".code16",
    ".balign 16",
    "suite_trampoline:",
    "jmp 2f",
    ".balign 16",
    ".word suite_gdt_end - suite_gdt - 1",
    ".long suite_gdt",
    "2: cli",
    "xor ax, ax",
    "mov ds, ax",
    "lgdtd [{trampoline} + 16]",
    "mov eax, cr0",
    "or eax, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long suite_others_32",
    ".word 0x38",
    "suite_trampoline_end:",
    ".code32",
    "suite_others_32:",
    "mov eax, 0x10",
    "mov ds, eax",
    "jmp suite_long_mode",
    ".code64",
    tables = const TABLES,
    areas = const CPU_AREAS,
    variables = const VARIABLES,
    stack = const STACK,
    trampoline = const TRAMPOLINE,
    main = sym super::main,
    main_of_others = sym super::smp::main_of_others,
);

asm! {
    /// Where the descriptor table is.
    pub fn gdt() { "lea rax, [rip + suite_gdt]" "ret" }
    /// Puts the code that other CPUs start with into its place.
    pub fn place_trampoline(to) {
        "lea rsi, [rip + suite_trampoline]"
        "lea rcx, [rip + suite_trampoline_end]"
        "sub rcx, rsi"
        "rep movsb"
        "ret"
    }
}

/// The command line in PVH's start information.
pub fn command_line(info: u64) -> Line {
    let mut line = Line::new();
    let mut address = asm::read(info + 24);
    while address != 0 && asm::read8(address) != 0 {
        line.push(asm::read8(address) as u8);
        address += 1;
    }
    line
}
