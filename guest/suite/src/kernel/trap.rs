//! Exceptions and interrupts: descriptor tables, one handler for all vectors, and `attempt`, which runs code that may
//! trap and says how it ended.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use super::boot::{CPU_AREA, CPU_AREAS, IDT, STACK, TSS, VARIABLES, gdt, selector};
use super::{apic, asm, check};

/// What the handler does after it has noted a trap.
#[derive(Clone, Copy)]
pub enum Action {
    /// Ends the attempt.
    Escape = 0,
    /// Goes on where it was.
    Resume = 1,
    /// Ends the interrupt at the local APIC and goes on.
    End = 2,
    /// Goes on behind an instruction of [`skip_length`] bytes.
    Skip = 3,
    /// Calls a function with the frame in RDI and goes on.
    Call = 4,
}

/// A trap as the handler found it.
#[derive(Clone, Copy, Default)]
pub struct Trap {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub flags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
    /// Where the CPU left its frame: the address of RIP in it.
    pub frame: u64,
    /// RAX when it came.
    pub rax: u64,
}

/// Offsets of a CPU's variables; the handler below knows them.
const CONTINUATION: u64 = 8;
const COUNT: u64 = 16;
const LAST: u64 = 24;
const ESCAPED: u64 = 96;
const LOGGED: u64 = 104;
const LOG: u64 = 128;
const LOG_SIZE: u64 = 128;

global_asm!(
    ".text",
    ".balign 16",
    "suite_vectors:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21)",
    "push 0",
    ".endif",
    ".byte 0x68",
    ".long vector",
    "jmp suite_trap",
    ".set vector, vector + 1",
    ".endr",
    "suite_trap:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov rax, rsp",
    "and rax, -{stack}",
    "mov rax, [rax]",
    "mov rdx, [rsp + 24]",
    "mov [rax + 24], rdx",
    "mov rcx, [rsp + 32]",
    "mov [rax + 32], rcx",
    "mov rcx, [rsp + 40]",
    "mov [rax + 40], rcx",
    "mov rcx, [rsp + 48]",
    "mov [rax + 48], rcx",
    "mov rcx, [rsp + 56]",
    "mov [rax + 56], rcx",
    "mov rcx, [rsp + 64]",
    "mov [rax + 64], rcx",
    "mov rcx, [rsp + 72]",
    "mov [rax + 72], rcx",
    "mov rcx, cr2",
    "mov [rax + 80], rcx",
    "lea rcx, [rsp + 40]",
    "mov [rax + 88], rcx",
    "mov rcx, [rsp + 16]",
    "mov [rax + 112], rcx",
    "inc qword ptr [rax + 16]",
    "mov rcx, [rax + 104]",
    "and ecx, 127",
    "mov [rax + rcx + 128], dl",
    "inc qword ptr [rax + 104]",
    "movzx ecx, byte ptr [suite_actions + rdx]",
    "test ecx, ecx",
    "jz 5f",
    "cmp ecx, 2",
    "jb 3f",
    "je 2f",
    "cmp ecx, 3",
    "je 4f",
    "push rdi",
    "push rsi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "lea rdi, [rsp + 88]",
    "cld",
    "call qword ptr [suite_call]",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rsi",
    "pop rdi",
    "jmp 3f",
    "4: mov rcx, [suite_skip]",
    "add [rsp + 40], rcx",
    "jmp 3f",
    "2: mov ecx, 0xfee000b0",
    "mov dword ptr [rcx], 0",
    "3: pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "5: mov rsp, [rax + 8]",
    "test rsp, rsp",
    "jz 6f",
    "mov qword ptr [rax + 96], 1",
    // By IRET, which lets non-maskable interrupts in again.
    "mov rcx, rsp",
    "push 0x10",
    "push rcx",
    "push 2",
    "push 8",
    "lea rdx, [rip + suite_attempt_end]",
    "push rdx",
    "iretq",
    "6: lea rsp, [rax + {stack} - {variables} - 16]",
    "and rsp, -16",
    "mov rdi, rax",
    "call {unexpected}",
    "ud2",
    ".globl suite_attempt",
    "suite_attempt:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "pushfq",
    "mov rax, rsp",
    "and rax, -{stack}",
    "mov rax, [rax]",
    "push qword ptr [rax + 8]",
    "mov [rax + 8], rsp",
    "mov qword ptr [rax + 24], -1",
    "mov qword ptr [rax + 96], 0",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "sub rsp, 8",
    "call rax",
    "add rsp, 8",
    "suite_attempt_end:",
    // Compiled code uses the FPU's registers: no attempt may leave TS or EM set.
    "mov rdx, cr0",
    "test dl, 12",
    "jz 2f",
    "and rdx, -13",
    "mov cr0, rdx",
    "2: mov rdx, rsp",
    "and rdx, -{stack}",
    "mov rdx, [rdx]",
    "pop qword ptr [rdx + 8]",
    "popfq",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".data",
    "suite_actions: .fill 256, 1, 0",
    ".balign 8",
    "suite_skip: .quad 0",
    "suite_call: .quad 0",
    "suite_idt_pointer: .word 4095",
    ".quad {idt}",
    ".text",
    stack = const STACK,
    variables = const VARIABLES,
    idt = const IDT,
    unexpected = sym unexpected,
);

asm! {
    fn vectors() { "lea rax, [rip + suite_vectors]" "ret" }
    fn actions() { "lea rax, [rip + suite_actions]" "ret" }
    fn set_skip(length) { "mov [suite_skip], rdi" "ret" }
    fn set_call(function) { "mov [suite_call], rdi" "ret" }
    fn start_attempt(code, a, b, c) { "jmp suite_attempt" }
    fn variables() { "mov rax, rsp" "and rax, -0x4000" "mov rax, [rax]" "ret" }
    /// Loads the interrupt descriptor table of 64-bit code.
    pub fn load_idt() { "lidt [suite_idt_pointer]" "ret" }
    fn load_tr(selector) { "ltr di" "ret" }
}

/// Stacks by number in the interrupt stack table; each is a quarter of the CPU's area.
pub fn stack_top(cpu: u64, ist: u64) -> u64 {
    CPU_AREAS + cpu * CPU_AREA + (ist + 1) * STACK
}

/// Fills the interrupt descriptor table: every vector on the first stack of the table, but the non-maskable interrupt
/// and the double fault on others.
pub fn initialise() {
    for vector in 0..256 {
        let ist = match vector {
            2 => 2,
            8 => 3,
            _ => 1,
        };
        gate(vector, ist, 0);
    }
    // For user code.
    gate(0x80, 1, 3);
    gate(3, 1, 3);
    gate(4, 1, 3);
}

/// Sets one gate: an interrupt gate, present.
pub fn gate(vector: u64, ist: u64, privilege: u64) {
    gate_to(vector, vectors() + vector * 16, ist, 0x8e | privilege << 5);
}

/// Sets one gate with this handler and this type byte.
pub fn gate_to(vector: u64, handler: u64, ist: u64, kind: u64) {
    let low = handler & 0xffff
        | selector::CODE << 16
        | ist << 32
        | kind << 40
        | (handler >> 16 & 0xffff) << 48;
    asm::write(IDT + vector * 16, low);
    asm::write(IDT + vector * 16 + 8, handler >> 32);
}

/// Gives a CPU its task-state segment and the interrupt descriptor table.
pub fn initialise_cpu(cpu: u64) {
    let tss = TSS + cpu * 0x1000;
    asm::fill(tss, 0, 0x1000);
    asm::write(tss + 4, stack_top(cpu, 0) - 0x2000);
    for ist in 1..=3 {
        asm::write(tss + 0x1c + ist * 8, stack_top(cpu, ist));
    }
    // An I/O permission map for ports below 0x400, all of them forbidden.
    const MAP: u64 = 0x68;
    asm::write(tss + 0x60, MAP << 48);
    asm::fill(tss + MAP, 0xff, 0x81);
    let limit = MAP + 0x80;
    let entry = gdt() + selector::FIRST_TSS + cpu * 16;
    let low = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24) << 56;
    asm::write(entry, low);
    asm::write(entry + 8, tss >> 32);
    load_tr(selector::FIRST_TSS + cpu * 16);
    load_idt();
}

/// Allows or forbids user code a port.
pub fn allow_port(cpu: u64, port: u64, allow: bool) {
    let byte = TSS + cpu * 0x1000 + 0x68 + port / 8;
    let bit = 1 << (port % 8);
    let old = asm::read8(byte);
    asm::write8(byte, if allow { old & !bit } else { old | bit });
}

/// What happens after a trap with this vector.
pub fn on(vector: u64, action: Action) {
    asm::write8(actions() + vector, action as u64);
}

/// What [`Action::Skip`] skips.
pub fn skip_length(bytes: u64) {
    set_skip(bytes);
}

/// What [`Action::Call`] calls.
pub fn calls(function: extern "C" fn(u64) -> u64) {
    set_call(function as usize as u64);
}

/// How an attempt ended.
#[derive(Clone, Copy)]
pub struct Outcome {
    /// What the code returned, or something.
    pub value: u64,
    /// The last trap, if there was one.
    pub trap: Option<Trap>,
    /// Whether it ended the attempt.
    pub escaped: bool,
}

impl Outcome {
    /// Vector and error code in one number, as `vector << 32 | error`; all ones without a trap.
    pub fn code(&self) -> u64 {
        self.trap
            .map_or(u64::MAX, |trap| trap.vector << 32 | trap.error)
    }

    /// The trap, or one that no vector has.
    pub fn trap(&self) -> Trap {
        self.trap.unwrap_or(Trap {
            vector: u64::MAX,
            ..Trap::default()
        })
    }
}

/// The number of a trap without or with an error code, as [`Outcome::code`] gives it.
pub const fn code(vector: u64, error: u64) -> u64 {
    vector << 32 | error
}

/// No trap at all, as [`Outcome::code`] gives it.
pub const NONE: u64 = u64::MAX;

/// Runs code, which may trap.
pub fn attempt(address: u64, a: u64, b: u64, c: u64) -> Outcome {
    let value = start_attempt(address, a, b, c);
    let here = variables();
    let field = |index: u64| asm::read(here + LAST + index * 8);
    let trap = (field(0) != u64::MAX).then(|| Trap {
        vector: field(0),
        error: field(1),
        rip: field(2),
        cs: field(3),
        flags: field(4),
        rsp: field(5),
        ss: field(6),
        cr2: field(7),
        frame: field(8),
        rax: field(11),
    });
    Outcome {
        value,
        trap,
        escaped: asm::read(here + ESCAPED) != 0,
    }
}

/// Runs a function without arguments.
pub fn attempt0(function: extern "C" fn() -> u64) -> Outcome {
    attempt(function as usize as u64, 0, 0, 0)
}

/// Runs a function with one argument.
pub fn attempt1(function: extern "C" fn(u64) -> u64, a: u64) -> Outcome {
    attempt(function as usize as u64, a, 0, 0)
}

/// Runs a function with two arguments.
pub fn attempt2(function: extern "C" fn(u64, u64) -> u64, a: u64, b: u64) -> Outcome {
    attempt(function as usize as u64, a, b, 0)
}

/// Where a function is.
pub fn at(function: extern "C" fn() -> u64) -> u64 {
    function as usize as u64
}

/// How many traps this CPU has seen.
pub fn count() -> u64 {
    asm::read(variables() + COUNT)
}

/// Forgets the list of vectors.
pub fn clear_log() {
    asm::write(variables() + LOGGED, 0);
}

/// The vectors seen since the list was forgotten, the latest (at most 8) in one number, last one lowest.
pub fn log() -> u64 {
    let here = variables();
    let logged = asm::read(here + LOGGED);
    (0..logged).fold(0, |sum, index| {
        sum << 8 | asm::read8(here + LOG + index % LOG_SIZE)
    })
}

/// How many vectors have been seen since the list was forgotten.
pub fn logged() -> u64 {
    asm::read(variables() + LOGGED)
}

extern "C" fn unexpected(variables: u64) -> ! {
    let field = |index: u64| asm::read(variables + LAST + index * 8);
    check::print(format_args!(
        "unexpected trap {} error {:#x} at {:#x}, cr2 {:#x}, rsp {:#x}",
        field(0),
        field(1),
        field(2),
        field(7),
        field(5)
    ));
    check::exit(3)
}

/// The address of the continuation, for code that ends an attempt by itself.
pub fn continuation() -> u64 {
    asm::read(variables() + CONTINUATION)
}

static ENDED: AtomicU64 = AtomicU64::new(0);

/// Ends an interrupt at the local APIC from a function of [`Action::Call`], and counts.
pub extern "C" fn end_and_count(_frame: u64) -> u64 {
    ENDED.fetch_add(1, Ordering::Relaxed);
    apic::end();
    0
}
