//! Real mode and protected mode without paging: segments, wrap-around, the vector table, the way there and back.

use super::asm;
use super::check::equal;
use super::trap;

core::arch::global_asm!(
    // To real mode and back. RDI: the offset of 16-bit code in the page at 0x9000, which ends with a jump to 0x9000.
    // The results are four words at 0xa000.
    ".text",
    ".globl suite_real",
    "suite_real:",
    "push rbx",
    "push rbp",
    "mov [suite_real_stack], rsp",
    "lidt [suite_real_idt]",
    "mov [0x9038], di",
    "push 0x38",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    ".code32",
    "2: mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "and eax, 0xfffffeff",
    "wrmsr",
    "mov eax, 0x48",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    ".byte 0xea",
    ".long suite_real_16 - suite_real_page + 0x9000",
    ".word 0x40",
    // What is copied to 0x9000.
    ".balign 16",
    "suite_real_page:",
    ".code16",
    // Back: offset 0.
    "cli",
    "xor eax, eax",
    "mov ds, ax",
    "lgdtd [0x9030]",
    "mov eax, cr0",
    "or eax, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea",
    ".long suite_real_back",
    ".word 0x38",
    ".org suite_real_page + 0x30",
    ".word 0xff",
    ".long suite_gdt",
    ".org suite_real_page + 0x40",
    "suite_real_16:",
    "mov eax, cr0",
    "and al, 0xfe",
    "mov cr0, eax",
    ".byte 0xea",
    ".word suite_real_begin - suite_real_page",
    ".word 0x900",
    "suite_real_begin:",
    "xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, 0x8ff0",
    ".byte 0xff, 0x26", // jmp [0x9038]
    ".word 0x9038",
    // The cases. Each leaves its results at 0xa000.
    "suite_real_cases:",
    // 0: sizes, segments.
    "suite_real_100:",
    "mov ax, 0x1234",
    "mov bx, 0xa00",
    "mov fs, bx",
    "mov fs:[0], ax",
    "mov word ptr [0xa002], sp",
    "mov word ptr [0xa004], cs",
    "pushf",
    "pop word ptr [0xa006]",
    "jmp suite_real_end",
    // 1: INT and IRET.
    "suite_real_101:",
    ".byte 0xc7, 0x06", // mov word ptr [0x11c], offset
    ".word 0x11c, suite_real_handler - suite_real_page",
    "mov word ptr [0x47 * 4 + 2], 0x900",
    "mov ax, 1",
    "sti",
    "int 0x47",
    "mov [0xa000], ax",
    "pushf",
    "pop word ptr [0xa006]",
    "cli",
    "jmp suite_real_end",
    // 2: a divide error.
    "suite_real_102:",
    ".byte 0xc7, 0x06", // mov word ptr [0x0], offset
    ".word 0x0, suite_real_divide - suite_real_page",
    "mov word ptr [2], 0x900",
    "xor cx, cx",
    "mov ax, 7",
    "suite_real_div: div cl",
    "suite_real_div_next: jmp suite_real_end",
    // 3: an access beyond 64 KiB: #GP by its vector.
    "suite_real_103:",
    ".byte 0xc7, 0x06", // mov word ptr [0x34], offset
    ".word 0x34, suite_real_general - suite_real_page",
    "mov word ptr [13 * 4 + 2], 0x900",
    "mov ebx, 0xffff",
    "mov ax, [bx]",
    "mov word ptr [0xa000], 0xbad",
    "jmp suite_real_end",
    // 4: addresses above 1 MiB by segment 0xffff: A20 is open.
    "suite_real_104:",
    "mov bx, 0xffff",
    "mov es, bx",
    "mov eax, es:[0x10]",
    "mov [0xa000], eax",
    "mov ax, [0]",
    "mov word ptr [0xa004], ax",
    "jmp suite_real_end",
    // 5: unreal mode: a segment's limit from protected mode stays.
    "suite_real_105:",
    "lgdtd [0x9030]",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "mov bx, 0x10",
    "mov gs, bx",
    "and al, 0xfe",
    "mov cr0, eax",
    "xor bx, bx",
    "mov gs, bx",
    "mov ebx, 0x100000",
    "mov eax, gs:[ebx]",
    "mov [0xa000], eax",
    "jmp suite_real_end",
    // 6: 16-bit arithmetic, strings, far calls.
    "suite_real_106:",
    "mov eax, 0x12345678",
    "add ax, 0x9000",
    "mov [0xa000], eax",
    "mov si, 0xfffe",
    "mov cx, 3",
    "xor dx, dx",
    "4: lodsb",
    "inc dx",
    "loop 4b",
    "mov [0xa004], si",
    "push cs",
    ".byte 0xe8", // call, with 16 bits
    ".word 5f - 6f",
    "6: mov [0xa006], sp",
    "jmp suite_real_end",
    "5: .byte 0xcb",
    "suite_real_end:",
    "jmp suite_real_page",
    "suite_real_handler:",
    "add ax, 0x100",
    "pushf",
    "pop word ptr [0xa002]",
    "mov word ptr [0xa004], sp",
    "iret",
    "suite_real_divide:",
    "pop word ptr [0xa000]",
    "push word ptr [0xa000]",
    "mov word ptr [0xa002], sp",
    "add word ptr [0xa000], 2",
    "pop ax",
    "push word ptr [0xa000]",
    "iret",
    "suite_real_general:",
    "mov word ptr [0xa000], 0x600d",
    "mov word ptr [0xa002], sp",
    "jmp suite_real_end",
    "suite_real_page_end:",
    ".code32",
    "suite_real_back:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov eax, 0x390000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    ".byte 0xea",
    ".long 3f",
    ".word 8",
    ".code64",
    "3: mov rsp, [suite_real_stack]",
    "pop rbp",
    "pop rbx",
    "ret",
    ".data",
    ".balign 8",
    "suite_real_stack: .quad 0",
    "suite_real_idt: .word 0x3ff",
    ".quad 0",
    ".text",
);

asm! {
    fn enter(offset) { "jmp suite_real" }
    fn place() { "mov edi, 0x9000" "lea rsi, [rip + suite_real_page]" "lea rcx, [rip + suite_real_page_end]" "sub rcx, rsi" "rep movsb" "ret" }
    fn page() { "lea rax, [rip + suite_real_page]" "ret" }
    fn sizes() { "lea rax, [rip + suite_real_100]" "ret" }
    fn interrupts() { "lea rax, [rip + suite_real_101]" "ret" }
    fn divides() { "lea rax, [rip + suite_real_102]" "ret" }
    fn divide() { "lea rax, [rip + suite_real_div]" "ret" }
    fn limits() { "lea rax, [rip + suite_real_103]" "ret" }
    fn wraps() { "lea rax, [rip + suite_real_104]" "ret" }
    fn unreal() { "lea rax, [rip + suite_real_105]" "ret" }
    fn arithmetic() { "lea rax, [rip + suite_real_106]" "ret" }
}

/// Runs a case in real mode; what it left are four words.
fn case(at: extern "C" fn() -> u64) -> u64 {
    place();
    asm::write(0xa000, 0);
    enter(at() - page());
    trap::load_idt();
    asm::read(0xa000)
}

pub fn run() {
    const SP: u64 = 0x8ff0;
    equal(
        "registers: AX by FS, SP, CS",
        case(sizes) & 0xffff_ffff_ffff,
        0x0000_0900 << 32 | SP << 16 | 0x1234,
    );
    let interrupted = case(interrupts);
    equal("INT: AX", interrupted & 0xffff, 0x101);
    equal("INT: flags there", interrupted >> 16 & 0x300, 0);
    equal("INT: SP there", interrupted >> 32 & 0xffff, SP - 6);
    equal("INT: IF after it", interrupted >> 48 & 0x200, 0x200);
    let divided = case(divides);
    equal(
        "divide error: where",
        divided & 0xffff,
        divide() - page() + 2,
    );
    equal("divide error: SP there", divided >> 16 & 0xffff, SP - 6);
    let limited = case(limits);
    equal("a word at 0xffff", limited & 0xffff, 0x600d);
    equal("its SP", limited >> 16 & 0xffff, SP - 6);
    let wrapped = case(wraps);
    equal("A20 is open", wrapped & 0xffff_ffff, asm::read32(0x10_0000));
    equal(
        "a limit of protected mode",
        case(unreal) & 0xffff_ffff,
        asm::read32(0x10_0000),
    );
    let arithmetic = case(arithmetic);
    equal("16-bit addition", arithmetic & 0xffff_ffff, 0x1234_e678);
    equal("LODSB wraps", arithmetic >> 32 & 0xffff, 1);
    equal("far return", arithmetic >> 48, SP);
    // Paging and long mode are as they were.
    equal("CR0", asm::cr0(), 0x8001_0033);
    equal("EFER", asm::rdmsr(0xc000_0080), 0xd01);
}
