//! Stubs for what a kernel does all the time: system calls and returns, segment bases, flags, the time-stamp counter,
//! repeated string moves. They work on general registers and the context alone, so that none of it leaves translated
//! code.
//!
//! They are written as assembly of this program, which is copied into each code cache, where blocks reach it; it names
//! the context, what that points at, and nothing else. A stub does the usual case only. For all else it puts back what it found and goes to the
//! interpreter, which does all of the instruction: a stub changes nothing before it is sure.
//!
//! The context is at RSP, or, in stubs that are called, at RSP + 8. In all of them RCX = the interpreter's site for the
//! instruction; R10 and R11 are as said, and scratch; guest RSP is in R8, guest RCX in R9, and the guest's flags are the
//! host's.

use std::arch::global_asm;
use std::mem::offset_of;

use strata_engine::EngineError;
use strata_engine::x86::{DescriptorTable, Segment};

use crate::code::CodeMap;
use crate::cpu::{Cpu, flags, off};
use crate::tsc::TscLine;

/// Where the stubs are: addresses in the code cache.
#[derive(Clone, Copy, Debug)]
pub struct SystemStubs {
    /// Jumped to with R10 = the next RIP, R11 = what to add to the count of retired instructions.
    pub syscall: u64,
    /// Jumped to with R11 as for `syscall`.
    pub sysret: u64,
    /// Jumped to with R11 as for `syscall`.
    pub iret: u64,
    /// Called.
    pub swapgs: u64,
    /// Called with R10 = the base.
    pub wrfsbase: u64,
    /// Called with R10 = the base.
    pub wrgsbase: u64,
    /// Called. Writes RAX and RDX.
    pub rdtsc: u64,
    /// Called. Writes RAX, RDX and RCX.
    pub rdtscp: u64,
    /// Called.
    pub cld: u64,
    /// Called with R10 = the flags. An interrupt may wait for IF afterwards.
    pub popf: u64,
    /// Called. By privilege and log2 of the element's size.
    pub rep_movs: [[u64; 4]; 2],
    /// Called. By privilege and log2 of the element's size.
    pub rep_stos: [[u64; 4]; 2],
}

impl SystemStubs {
    /// The stubs that blocks of `privilege` may call.
    pub fn called(&self, privilege: usize) -> Vec<u64> {
        let mut stubs = vec![self.rdtsc, self.rdtscp, self.cld];
        for kind in [&self.rep_movs, &self.rep_stos] {
            stubs.extend(kind.get(privilege).into_iter().flatten());
        }
        if privilege == 0 {
            stubs.push(self.swapgs);
        }
        stubs
    }

    /// The stubs that blocks of `privilege` may call with a value in R10.
    pub fn given(&self, privilege: usize) -> Vec<u64> {
        let mut stubs = vec![self.wrfsbase, self.wrgsbase];
        if privilege == 0 {
            stubs.push(self.popf);
        }
        stubs
    }

    /// The stubs that blocks of `privilege` may jump to.
    pub fn jumped_to(&self, privilege: usize) -> Vec<u64> {
        if privilege == 0 {
            vec![self.syscall, self.sysret, self.iret]
        } else {
            vec![self.syscall]
        }
    }
}

/// Offset of a field of segment register `index`.
const fn segment(index: usize, field: usize) -> u32 {
    (offset_of!(Cpu, segments) + index * size_of::<Segment>() + field) as u32
}

const SELECTOR: usize = offset_of!(Segment, selector);
const BASE: usize = offset_of!(Segment, base);
const LIMIT: usize = offset_of!(Segment, limit);
const ATTRIBUTES: usize = offset_of!(Segment, attributes);

/// System flags that POPF could change at CPL 0.
const POPF: u64 = flags::TF | flags::DF | flags::IOPL | flags::NT | flags::AC | flags::ID;
/// System flags that SYSCALL saves and SYSRET and IRET load.
const LOADED: u64 = flags::SYSTEM & !(flags::RF | flags::VM);

/// Keeps RCX, RAX and the flags where `strata_stub_interpret` and `put_back!` find them.
macro_rules! keep {
    ($context:literal) => {
        concat!(
            "mov [",
            $context,
            " + {site}], rcx
             mov [",
            $context,
            " + {rax}], rax
             lahf
             seto al
             mov [",
            $context,
            " + {flags}], rax\n"
        )
    };
}

/// Flags and RAX as they were.
macro_rules! put_back {
    ($context:literal) => {
        concat!(
            "mov rax, [",
            $context,
            " + {flags}]
             add al, 0x7f
             sahf
             mov rax, [",
            $context,
            " + {rax}]\n"
        )
    };
}

/// The host's flags become the arithmetic ones of the image in ECX. Uses RAX and R11.
macro_rules! load_flags {
    () => {
        "mov eax, ecx
         mov r11d, ecx
         shr r11d, 4
         and r11d, 0x80
         mov ah, al
         add r11b, r11b
         sahf\n"
    };
}

/// System flags and IF from the image in ECX. Uses RAX.
macro_rules! load_system_flags {
    () => {
        "mov eax, ecx
         and eax, {loaded}
         mov [rsp + {system_flags}], rax
         mov eax, ecx
         shr eax, 9
         and eax, 1
         mov [rsp + {interrupts_on}], rax\n"
    };
}

/// CS and SS become flat with the selectors AX and R10W and these attributes. Uses RAX.
macro_rules! load_segments {
    ($cs:literal, $ss:literal) => {
        concat!(
            "mov word ptr [rsp + {cs_selector}], ax
             mov word ptr [rsp + {ss_selector}], r10w
             xor eax, eax
             mov [rsp + {cs_base}], rax
             mov [rsp + {ss_base}], rax
             mov [rsp + {cs_seg_base}], rax
             mov [rsp + {ss_seg_base}], rax
             dec rax
             mov dword ptr [rsp + {cs_limit}], eax
             mov dword ptr [rsp + {ss_limit}], eax
             mov eax, ",
            $cs,
            "
             mov word ptr [rsp + {cs_attributes}], ax
             mov eax, ",
            $ss,
            "
             mov word ptr [rsp + {ss_attributes}], ax\n"
        )
    };
}

/// Goes on at R10 as the dispatcher would: tells a tracer, looks at requests (and at an interrupt that waits for IF),
/// asks the jump cache.
macro_rules! go {
    ($privilege:literal) => {
        concat!(
            "   mov rcx, [rsp + {traced}]
                jrcxz 90f
                call [rsp + {to_block_exit}]
            90: mov rcx, [rsp + {interrupts_on}]
                jrcxz 91f
                mov rcx, [rsp + {request}]
                jmp 92f
            91: mov ecx, dword ptr [rsp + {request}]
            92: jrcxz 93f
                jmp [rsp + {to_request}]
            93: rorx r11, r10, 12
                lea r11, [r11 + r10]
                pext r11, r11, [rsp + {jump_mask}]
                mov rcx, [rsp + r11*8 + {jump_tag",
            $privilege,
            "}]
                lea rcx, [rcx + r10]
                jrcxz 94f
                mov ecx, 0xffffffff
                jmp [rsp + {to_lookup}]
            94: jmp [rsp + r11*8 + {jump_target",
            $privilege,
            "}]\n"
        )
    };
}

/// RDX = the descriptor that the selector EAX names in the GDT, if it can be read at once. Uses RCX and R11.
macro_rules! descriptor {
    () => {
        "test al, 4
         jnz 83b
         mov ecx, eax
         or ecx, 7
         cmp cx, word ptr [rsp + {gdt_limit}]
         ja 83b
         and ecx, 0xfff8
         add rcx, [rsp + {gdt_base}]
         pext r11, rcx, [rsp + {tlb_mask}]
         mov rdx, [rsp + r11*8 + {read0}]
         lea rdx, [rdx + rcx + 7]
         cmp rdx, 4095
         ja 83b
         mov rdx, [rsp + r11*8 + {delta0}]
         mov rdx, [rdx + rcx]\n"
    };
}

/// R10 = host address of the guest's address in a register, from which on RAX + 1 bytes lie in one page of a hit.
macro_rules! window {
    ($register:literal, $tags:literal, $tlb:literal) => {
        concat!(
            "   pext r10, ",
            $register,
            ", [rsp + 8 + {tlb_mask}]
                mov r11, [rsp + 8 + r10*8 + {",
            $tags,
            $tlb,
            "}]
                add r11, ",
            $register,
            "
                cmp r11, 4095
                ja 82f
                add r11, rax
                cmp r11, 4095
                ja 82f
                mov r10, [rsp + 8 + r10*8 + {delta",
            $tlb,
            "}]
                add r10, ",
            $register,
            "\n"
        )
    };
}

/// A repeated string instruction whose operands lie in one page each that the soft TLB has. Guest addresses are
/// in RSI and RDI, the count in R9; RAX = bytes - 1.
macro_rules! rep {
    ($name:literal, $size:literal, $most:literal, $instruction:literal, $tlb:literal, $source:expr, $exchange:literal,
     $advance:literal) => {
        concat!(
            $name,
            ":\n",
            keep!("rsp + 8"),
            "   test r9, r9
                jz 81f
                test dword ptr [rsp + 8 + {system_flags}], {df}
                jnz 82f
                cmp r9, ",
            $most,
            "
                ja 82f
                lea rax, [r9*",
            $size,
            " - 1]\n",
            $source,
            window!("rdi", "write", $tlb),
            "   mov r11, [rsp + 8 + {other}]
                mov [rsp + 8 + {length}], rax
                mov rcx, r9
                xchg rdi, r10\n",
            $exchange,
            "   mov rax, [rsp + 8 + {rax}]
                rep ",
            $instruction,
            "
                mov rax, [rsp + 8 + {length}]
                lea rdi, [r10 + rax + 1]\n",
            $advance,
            "   xor r9d, r9d
            81:\n",
            put_back!("rsp + 8"),
            "   ret
            82:\n",
            put_back!("rsp + 8"),
            "   jmp strata_stub_interpret\n"
        )
    };
}

macro_rules! movs {
    ($name:literal, $size:literal, $most:literal, $instruction:literal, $tlb:literal) => {
        rep!(
            $name,
            $size,
            $most,
            $instruction,
            $tlb,
            concat!(
                window!("rsi", "read", $tlb),
                "mov [rsp + 8 + {other}], r10\n"
            ),
            "xchg rsi, r11\n",
            "lea rsi, [r11 + rax + 1]\n"
        )
    };
}

macro_rules! stos {
    ($name:literal, $size:literal, $most:literal, $instruction:literal, $tlb:literal) => {
        rep!($name, $size, $most, $instruction, $tlb, "", "", "")
    };
}

/// Writes a segment's base, R10, which must be canonical.
macro_rules! write_base {
    ($segment:literal) => {
        concat!(
            "   mov [rsp + 8 + {site}], rcx
                mov ecx, 16
                shlx r11, r10, rcx
                sarx r11, r11, rcx
                not r11
                lea rcx, [r11 + r10 + 1]
                jrcxz 84f
                jmp strata_stub_interpret
            84: mov [rsp + 8 + {",
            $segment,
            "_base}], r10
                mov [rsp + 8 + {",
            $segment,
            "_seg_base}], r10
                ret\n"
        )
    };
}

/// Ticks of the guest's counter to RDX:RAX, as [`TscLine`] has them. The flags are then in R10 as LAHF and SETO leave
/// them. `order` comes before it is read.
macro_rules! ticks {
    ($order:literal) => {
        concat!(
            "   mov [rsp + 8 + {site}], rcx
            mov rcx, [rsp + 8 + {tsc_line}]
            jrcxz 85f
            jmp 84f
        85: jmp strata_stub_interpret
        84: mov [rsp + 8 + {rax}], rax
            mov [rsp + 8 + {rdx}], rdx
            lahf
            seto al
            mov r10, rax
        86: mov r11, [rcx + {line_version}]\n",
            $order,
            "
            rdtsc
            shl rdx, 32
            or rax, rdx
            sub rax, [rcx + {line_host}]
            cmp rax, [rcx + {line_length}]
            ja 87f
            mul qword ptr [rcx + {line_rate}]
            shrd rax, rdx, 32
            add rax, [rcx + {line_guest}]
            cmp r11, [rcx + {line_version}]
            jne 86b
            test r11b, 1
            jnz 86b
            add rax, [rsp + 8 + {tsc_offset}]
            mov r11, rax
            mov rax, r10
            add al, 0x7f
            sahf
            rorx rdx, r11, 32
            mov edx, edx
            mov eax, r11d\n"
        )
    };
}

/// What `ticks!` jumps to when the line is not of use.
macro_rules! no_ticks {
    () => {
        "87: mov rax, r10
            add al, 0x7f
            sahf
            mov rdx, [rsp + 8 + {rdx}]
            mov rax, [rsp + 8 + {rax}]
            jmp strata_stub_interpret\n"
    };
}

global_asm!(
    ".pushsection .text.strata_stubs, \"ax\", @progbits",
    ".globl strata_stubs_start, strata_stubs_end, strata_stub_syscall, strata_stub_sysret",
    ".globl strata_stub_iret, strata_stub_swapgs, strata_stub_wrfsbase, strata_stub_wrgsbase",
    ".globl strata_stub_rdtsc, strata_stub_rdtscp, strata_stub_cld, strata_stub_popf",
    ".globl strata_stub_movs_0_0, strata_stub_movs_0_1, strata_stub_movs_0_2, strata_stub_movs_0_3",
    ".globl strata_stub_movs_1_0, strata_stub_movs_1_1, strata_stub_movs_1_2, strata_stub_movs_1_3",
    ".globl strata_stub_stos_0_0, strata_stub_stos_0_1, strata_stub_stos_0_2, strata_stub_stos_0_3",
    ".globl strata_stub_stos_1_0, strata_stub_stos_1_1, strata_stub_stos_1_2, strata_stub_stos_1_3",
    "strata_stubs_start:",
    // A call that was not the usual case.
    "strata_stub_interpret:
        lea rsp, [rsp + 8]
        mov rcx, [rsp + {site}]
        jmp [rsp + {to_interpret}]",
    // A jump that was not, before anything was done.
    "2:  mov rcx, [rsp + {site}]
        jmp [rsp + {to_interpret}]",
    // And after `keep!`.
    "3:",
    put_back!("rsp"),
    "   jmp 2b",
    "strata_stub_syscall:
        mov [rsp + {site}], rcx
        mov rcx, [rsp + {fast_kernel}]
        jrcxz 2b
        mov [rsp + {rax}], rax
        lahf
        seto al
        movzx ecx, ah
        movzx eax, al
        shl eax, 11
        or ecx, eax
        mov rax, [rsp + {interrupts_on}]
        shl eax, 9
        or ecx, eax
        mov rax, [rsp + {system_flags}]
        and eax, {loaded}
        or ecx, eax
        mov [rsp + {gpr11}], rcx
        add [rsp + {retired}], r11
        mov r9, r10
        mov rax, [rsp + {sfmask}]
        not eax
        and ecx, eax",
    load_system_flags!(),
    "   mov eax, dword ptr [rsp + {star} + 4]
        and eax, 0xfffc
        lea r10d, [rax + 8]",
    load_segments!("0xa09b", "0xc093"),
    load_flags!(),
    "   mov rax, [rsp + {rax}]
        mov r10, [rsp + {lstar}]",
    "strata_go_kernel:",
    go!("0"),
    "strata_stub_sysret:",
    keep!("rsp"),
    "   mov rcx, [rsp + {fast_user}]
        test rcx, rcx
        jz 3b
        mov rcx, r9
        shl rcx, 16
        sar rcx, 16
        cmp rcx, r9
        jne 3b
        mov rcx, [rsp + {gpr11}]
        test ecx, {tf} | {ac}
        jnz 3b
        add [rsp + {retired}], r11",
    load_system_flags!(),
    "   mov eax, dword ptr [rsp + {star} + 4]
        shr eax, 16
        lea r10d, [rax + 8]
        add eax, 16
        or eax, 3
        or r10d, 3",
    load_segments!("0xa0fb", "0xc0f3"),
    load_flags!(),
    "   mov rax, [rsp + {rax}]
        mov r10, r9",
    "strata_go_user:",
    go!("1"),
    "83: mov rdx, [rsp + {rdx}]
        jmp 3b",
    "strata_stub_iret:",
    keep!("rsp"),
    "   mov [rsp + {rdx}], rdx
        mov [rsp + {other}], r11
        mov rcx, [rsp + {fast_iret}]
        test rcx, rcx
        jz 83b
        cmp dword ptr [rcx], 0
        jne 83b
        test dword ptr [rsp + {system_flags}], {nt}
        jnz 83b
        cmp byte ptr [rsp + {nmi_blocked}], 0
        jne 83b
        pext r10, r8, [rsp + {tlb_mask}]
        mov r11, [rsp + r10*8 + {read0}]
        lea r11, [r11 + r8 + 39]
        cmp r11, 4095
        ja 83b
        mov r10, [rsp + r10*8 + {delta0}]
        add r10, r8
        mov rax, [r10]
        mov rcx, rax
        shl rcx, 16
        sar rcx, 16
        cmp rcx, rax
        jne 83b
        mov [rsp + {rip}], rax
        mov rcx, [r10 + 16]
        test ecx, {tf} | {vm}
        jnz 83b
        mov [rsp + {image}], rcx
        mov rax, [r10 + 24]
        mov [rsp + {length}], rax
        movzx eax, word ptr [r10 + 8]
        movzx r10d, word ptr [r10 + 32]",
    descriptor!(),
    "   movabs rcx, 0x00affb000000ffff
        cmp rdx, rcx
        je 89f
        movabs rcx, 0x00af9b000000ffff
        cmp rdx, rcx
        jne 83b
        test eax, 3
        jnz 83b
        cmp qword ptr [rsp + {fast_kernel}], 0
        je 83b
        xchg eax, r10d
        test eax, 3
        jnz 83b",
    descriptor!(),
    "   movabs rcx, 0x00cf93000000ffff
        cmp rdx, rcx
        jne 83b
        xchg eax, r10d",
    load_segments!("0xa09b", "0xc093"),
    "   mov rcx, [rsp + {image}]",
    load_system_flags!(),
    "   mov r11, [rsp + {other}]
        add [rsp + {retired}], r11
        mov r8, [rsp + {length}]",
    load_flags!(),
    "   mov rdx, [rsp + {rdx}]
        mov rax, [rsp + {rax}]
        mov r10, [rsp + {rip}]
        jmp strata_go_kernel
    89: cmp qword ptr [rsp + {fast_user}], 0
        je 83b
        mov ecx, dword ptr [rsp + {image}]
        test ecx, {ac}
        jnz 83b
        movzx ecx, word ptr [rsp + {es_selector}]
        or cx, word ptr [rsp + {ds_selector}]
        or cx, word ptr [rsp + {fs_selector}]
        or cx, word ptr [rsp + {gs_selector}]
        jnz 83b
        mov ecx, eax
        and ecx, r10d
        not ecx
        test ecx, 3
        jnz 83b
        xchg eax, r10d",
    descriptor!(),
    "   movabs rcx, 0x00cff3000000ffff
        cmp rdx, rcx
        jne 83b
        xchg eax, r10d",
    load_segments!("0xa0fb", "0xc0f3"),
    "   mov rcx, [rsp + {image}]",
    load_system_flags!(),
    "   mov r11, [rsp + {other}]
        add [rsp + {retired}], r11
        mov r8, [rsp + {length}]",
    load_flags!(),
    "   mov rdx, [rsp + {rdx}]
        mov rax, [rsp + {rax}]
        mov r10, [rsp + {rip}]
        jmp strata_go_user",
    "strata_stub_swapgs:
        mov r10, [rsp + 8 + {gs_seg_base}]
        mov r11, [rsp + 8 + {kernel_gs}]
        mov [rsp + 8 + {kernel_gs}], r10
        mov [rsp + 8 + {gs_base}], r11
        mov [rsp + 8 + {gs_seg_base}], r11
        ret",
    "strata_stub_wrfsbase:",
    write_base!("fs"),
    "strata_stub_wrgsbase:",
    write_base!("gs"),
    "strata_stub_rdtsc:",
    ticks!(""),
    "   ret",
    no_ticks!(),
    "strata_stub_rdtscp:",
    ticks!("lfence"),
    "   mov r9d, dword ptr [rsp + 8 + {tsc_aux}]
        ret",
    no_ticks!(),
    "strata_stub_cld:",
    keep!("rsp + 8"),
    "   and dword ptr [rsp + 8 + {system_flags}], {not_df}",
    put_back!("rsp + 8"),
    "   ret",
    "strata_stub_popf:",
    keep!("rsp + 8"),
    "   mov rcx, r10
        mov rax, [rsp + 8 + {system_flags}]
        xor eax, ecx
        test eax, {popf}
        jnz 82f
        mov eax, ecx
        shr eax, 9
        and eax, 1
        mov [rsp + 8 + {interrupts_on}], rax",
    load_flags!(),
    "   mov rax, [rsp + 8 + {rax}]
        ret
     82:",
    put_back!("rsp + 8"),
    "   jmp strata_stub_interpret",
    movs!("strata_stub_movs_0_0", "1", "4096", "movsb", "0"),
    movs!("strata_stub_movs_0_1", "2", "2048", "movsw", "0"),
    movs!("strata_stub_movs_0_2", "4", "1024", "movsd", "0"),
    movs!("strata_stub_movs_0_3", "8", "512", "movsq", "0"),
    movs!("strata_stub_movs_1_0", "1", "4096", "movsb", "1"),
    movs!("strata_stub_movs_1_1", "2", "2048", "movsw", "1"),
    movs!("strata_stub_movs_1_2", "4", "1024", "movsd", "1"),
    movs!("strata_stub_movs_1_3", "8", "512", "movsq", "1"),
    stos!("strata_stub_stos_0_0", "1", "4096", "stosb", "0"),
    stos!("strata_stub_stos_0_1", "2", "2048", "stosw", "0"),
    stos!("strata_stub_stos_0_2", "4", "1024", "stosd", "0"),
    stos!("strata_stub_stos_0_3", "8", "512", "stosq", "0"),
    stos!("strata_stub_stos_1_0", "1", "4096", "stosb", "1"),
    stos!("strata_stub_stos_1_1", "2", "2048", "stosw", "1"),
    stos!("strata_stub_stos_1_2", "4", "1024", "stosd", "1"),
    stos!("strata_stub_stos_1_3", "8", "512", "stosq", "1"),
    "strata_stubs_end:",
    ".popsection",
    site = const off::system(0),
    rax = const off::system(1),
    flags = const off::system(2),
    other = const off::system(3),
    length = const off::system(4),
    rdx = const off::system(5),
    image = const off::system(6),
    to_interpret = const off::to_stub(0),
    to_lookup = const off::to_stub(1),
    to_request = const off::to_stub(2),
    to_block_exit = const off::to_stub(3),
    traced = const off::TRACED,
    fast_kernel = const off::fast(0),
    fast_user = const off::fast(1),
    fast_iret = const off::FAST_IRET,
    tsc_line = const off::TSC_LINE,
    line_version = const offset_of!(TscLine, version),
    line_host = const offset_of!(TscLine, host),
    line_guest = const offset_of!(TscLine, guest),
    line_rate = const offset_of!(TscLine, rate),
    line_length = const offset_of!(TscLine, length),
    tsc_offset = const offset_of!(Cpu, tsc_offset),
    tsc_aux = const offset_of!(Cpu, tsc_aux),
    interrupts_on = const off::INTERRUPTS_ON,
    system_flags = const off::SYSTEM_FLAGS,
    request = const off::REQUEST,
    retired = const off::RETIRED,
    rip = const off::RIP,
    gpr11 = const off::gpr(11),
    star = const offset_of!(Cpu, star),
    lstar = const offset_of!(Cpu, lstar),
    sfmask = const offset_of!(Cpu, sfmask),
    kernel_gs = const offset_of!(Cpu, kernel_gs_base),
    nmi_blocked = const offset_of!(Cpu, nmi_blocked),
    gdt_base = const offset_of!(Cpu, gdtr) + offset_of!(DescriptorTable, base),
    gdt_limit = const offset_of!(Cpu, gdtr) + offset_of!(DescriptorTable, limit),
    tlb_mask = const off::TLB_MASK,
    jump_mask = const off::JUMP_MASK,
    read0 = const off::tlb_read(0),
    write0 = const off::tlb_write(0),
    delta0 = const off::tlb_delta(0),
    read1 = const off::tlb_read(1),
    write1 = const off::tlb_write(1),
    delta1 = const off::tlb_delta(1),
    jump_tag0 = const off::jump_tag(0),
    jump_target0 = const off::jump_target(0),
    jump_tag1 = const off::jump_tag(1),
    jump_target1 = const off::jump_target(1),
    es_selector = const segment(0, SELECTOR),
    cs_selector = const segment(1, SELECTOR),
    cs_base = const segment(1, BASE),
    cs_limit = const segment(1, LIMIT),
    cs_attributes = const segment(1, ATTRIBUTES),
    ss_selector = const segment(2, SELECTOR),
    ss_base = const segment(2, BASE),
    ss_limit = const segment(2, LIMIT),
    ss_attributes = const segment(2, ATTRIBUTES),
    ds_selector = const segment(3, SELECTOR),
    fs_selector = const segment(4, SELECTOR),
    fs_base = const segment(4, BASE),
    gs_selector = const segment(5, SELECTOR),
    gs_base = const segment(5, BASE),
    cs_seg_base = const off::seg_base(1),
    ss_seg_base = const off::seg_base(2),
    fs_seg_base = const off::seg_base(4),
    gs_seg_base = const off::seg_base(5),
    loaded = const LOADED,
    popf = const POPF,
    df = const flags::DF,
    not_df = const !(flags::DF as i32),
    nt = const flags::NT,
    tf = const flags::TF,
    ac = const flags::AC,
    vm = const flags::VM,
);

macro_rules! symbols {
    ($($name:ident),*) => { unsafe extern "C" { $(static $name: u8;)* } };
}

symbols!(
    strata_stubs_start,
    strata_stubs_end,
    strata_stub_syscall,
    strata_stub_sysret,
    strata_stub_iret,
    strata_stub_swapgs,
    strata_stub_wrfsbase,
    strata_stub_wrgsbase,
    strata_stub_rdtsc,
    strata_stub_rdtscp,
    strata_stub_cld,
    strata_stub_popf,
    strata_stub_movs_0_0,
    strata_stub_movs_0_1,
    strata_stub_movs_0_2,
    strata_stub_movs_0_3,
    strata_stub_movs_1_0,
    strata_stub_movs_1_1,
    strata_stub_movs_1_2,
    strata_stub_movs_1_3,
    strata_stub_stos_0_0,
    strata_stub_stos_0_1,
    strata_stub_stos_0_2,
    strata_stub_stos_0_3,
    strata_stub_stos_1_0,
    strata_stub_stos_1_1,
    strata_stub_stos_1_2,
    strata_stub_stos_1_3
);

/// Copies the stubs to the code cache.
pub fn append(code: &mut CodeMap) -> Result<SystemStubs, EngineError> {
    let start = &raw const strata_stubs_start;
    let len = (&raw const strata_stubs_end).addr() - start.addr();
    // SAFETY: the bytes between the two labels are the code above, part of this program and never written.
    let bytes = unsafe { std::slice::from_raw_parts(start, len) };
    let offset = code.append(bytes)?;
    let base = code.address(offset);
    let at = |symbol: *const u8| base + (symbol.addr() - start.addr()) as u64;
    Ok(SystemStubs {
        syscall: at(&raw const strata_stub_syscall),
        sysret: at(&raw const strata_stub_sysret),
        iret: at(&raw const strata_stub_iret),
        swapgs: at(&raw const strata_stub_swapgs),
        wrfsbase: at(&raw const strata_stub_wrfsbase),
        wrgsbase: at(&raw const strata_stub_wrgsbase),
        rdtsc: at(&raw const strata_stub_rdtsc),
        rdtscp: at(&raw const strata_stub_rdtscp),
        cld: at(&raw const strata_stub_cld),
        popf: at(&raw const strata_stub_popf),
        rep_movs: [
            [
                at(&raw const strata_stub_movs_0_0),
                at(&raw const strata_stub_movs_0_1),
                at(&raw const strata_stub_movs_0_2),
                at(&raw const strata_stub_movs_0_3),
            ],
            [
                at(&raw const strata_stub_movs_1_0),
                at(&raw const strata_stub_movs_1_1),
                at(&raw const strata_stub_movs_1_2),
                at(&raw const strata_stub_movs_1_3),
            ],
        ],
        rep_stos: [
            [
                at(&raw const strata_stub_stos_0_0),
                at(&raw const strata_stub_stos_0_1),
                at(&raw const strata_stub_stos_0_2),
                at(&raw const strata_stub_stos_0_3),
            ],
            [
                at(&raw const strata_stub_stos_1_0),
                at(&raw const strata_stub_stos_1_1),
                at(&raw const strata_stub_stos_1_2),
                at(&raw const strata_stub_stos_1_3),
            ],
        ],
    })
}
