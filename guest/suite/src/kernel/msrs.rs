//! Model-specific registers: what they hold, what they refuse, what they do to segments and system calls.

use super::asm::{self, rdmsr, wrmsr};
use super::check::{absent, equal};
use super::trap::{NONE, attempt0, attempt1, attempt2, code};
use super::{apic, user};

const APIC_BASE: u64 = 0x1b;
const SYSENTER_CS: u64 = 0x174;
const SYSENTER_ESP: u64 = 0x175;
const SYSENTER_EIP: u64 = 0x176;
const PAT: u64 = 0x277;
const EFER: u64 = 0xc000_0080;
const STAR: u64 = 0xc000_0081;
const LSTAR: u64 = 0xc000_0082;
const CSTAR: u64 = 0xc000_0083;
const FMASK: u64 = 0xc000_0084;
const FS_BASE: u64 = 0xc000_0100;
const GS_BASE: u64 = 0xc000_0101;
const KERNEL_GS_BASE: u64 = 0xc000_0102;
const TSC_AUX: u64 = 0xc000_0103;
const GENERAL: u64 = code(13, 0);
/// The first address of the hole.
const HOLE: u64 = 1 << 47;

asm! {
    fn read_fs() { "mov rax, fs:[8]" "ret" }
    fn read_gs() { "mov rax, gs:[8]" "ret" }
    fn swapgs() { "swapgs" "ret" }
    fn rdfsbase() { "rdfsbase rax" "ret" }
    fn wrfsbase(value) { "wrfsbase rdi" "ret" }
    fn wrgsbase(value) { "wrgsbase rdi" "ret" }
    fn load_fs(selector) { "mov fs, edi" "ret" }
    fn load_gs(selector) { "mov gs, edi" "ret" }
    fn rdtscp_aux() { "rdtscp" "mov eax, ecx" "ret" }
    fn user_syscall() { "mov rax, 0x1234" "syscall" "suite_syscall_next: mov rcx, 0" "int 0x80" }
    fn syscall_next() { "lea rax, [rip + suite_syscall_next]" "ret" }
    /// What SYSCALL enters: notes everything and ends the attempt by a trap.
    fn syscall_entry() {
        "mov [suite_syscall], rcx"
        "mov [suite_syscall + 8], r11"
        "pushfq"
        "pop rcx"
        "mov [suite_syscall + 16], rcx"
        "mov [suite_syscall + 24], rsp"
        "mov ecx, cs"
        "mov [suite_syscall + 32], rcx"
        "mov ecx, ss"
        "mov [suite_syscall + 40], rcx"
        "int 0x47"
    }
    fn noted(index) { "mov rax, [suite_syscall + rdi * 8]" "ret" }
    /// SYSRET to user code at RDI with the flags in RSI.
    fn sysret(to, flags) { "mov rcx, rdi" "mov r11, rsi" "mov rsp, [suite_user_stack]" "sysretq" }
    fn user_after_sysret() { "pushfq" "pop rax" "mov ecx, cs" "shl rcx, 32" "or rax, rcx" "mov ecx, ss" "shl rcx, 48" "or rax, rcx" "int 0x80" }
    fn user_fs() { "mov rax, fs:[8]" "int 0x80" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_syscall: .fill 6, 8, 0",
    ".text"
);

pub fn run() {
    values();
    segments();
    system_calls();
}

/// Writes and reads back.
fn holds(name: &str, msr: u64, value: u64) {
    let before = rdmsr(msr);
    let outcome = attempt2(wrmsr, msr, value);
    let after = rdmsr(msr);
    wrmsr(msr, before);
    equal(name, outcome.code(), NONE);
    equal(name, after, value);
}

/// Refuses a value and keeps what it held.
fn refuses(name: &str, msr: u64, value: u64) {
    let before = rdmsr(msr);
    let outcome = attempt2(wrmsr, msr, value);
    equal(name, outcome.code(), GENERAL);
    equal(name, rdmsr(msr), before);
}

fn values() {
    equal("EFER", rdmsr(EFER), 0xd01);
    refuses("EFER: a reserved bit", EFER, 0xd01 | 1 << 16);
    equal("APIC base", rdmsr(APIC_BASE), 0xfee0_0900);
    refuses("APIC base: a reserved bit", APIC_BASE, 0xfee0_0901);
    equal("PAT after reset", rdmsr(PAT), 0x0007_0406_0007_0406);
    holds("PAT", PAT, 0x0007_0106_0007_0406);
    refuses("PAT: type 2", PAT, 0x0007_0406_0007_0402);
    refuses("PAT: type 8", PAT, 0x0807_0406_0007_0406);
    holds("LSTAR", LSTAR, 0xffff_8000_1234_5678);
    refuses("LSTAR in the hole", LSTAR, HOLE);
    holds("STAR", STAR, 0x1122_3344_5566_7788);
    holds("FMASK", FMASK, 0x4_7700);
    holds("SYSENTER's RSP", SYSENTER_ESP, 0xffff_ffff_8000_0000);
    holds("SYSENTER's RIP", SYSENTER_EIP, 0x7fff_ffff_ffff);
    holds("SYSENTER's CS", SYSENTER_CS, 0x08);
    holds("FS base", FS_BASE, 0xffff_ffff_ffff_fff8);
    refuses("FS base in the hole", FS_BASE, HOLE);
    refuses("GS base in the hole", GS_BASE, !HOLE + 1 - (1 << 47) - 1);
    refuses("kernel's GS base in the hole", KERNEL_GS_BASE, HOLE);
    holds("kernel's GS base", KERNEL_GS_BASE, 0x1234_5678_9abc);
    holds("TSC_AUX", TSC_AUX, 0xdead_beef);
    wrmsr(TSC_AUX, 42);
    equal("RDTSCP's number", asm_low(rdtscp_aux()), 42);
    wrmsr(CSTAR, 0x1000);
    for msr in [0x0000_0002, 0x0000_0400 + 0x1000, 0x1234_5678, 0xc000_0200] {
        equal(
            "an MSR that is none is not read",
            attempt1(rdmsr, msr).code(),
            GENERAL,
        );
        equal(
            "an MSR that is none is not written",
            attempt2(wrmsr, msr, 0).code(),
            GENERAL,
        );
    }
    // The time-stamp counter is set by writing it.
    wrmsr(0x10, 1 << 40);
    let now = rdmsr(0x10);
    super::check::holds(
        "the time-stamp counter is set",
        ((1u64 << 40)..(1 << 40) + (1 << 36)).contains(&now),
    );
    wrmsr(APIC_BASE, 0xfee0_0100);
    equal("the APIC is off", asm::cpuid_edx(1, 0) >> 9 & 1, 0);
    wrmsr(APIC_BASE, 0xfee0_0900);
    equal("the APIC is on", asm::cpuid_edx(1, 0) >> 9 & 1, 1);
    equal("its version", apic::get(apic::VERSION) & 0xff, 0x14);
    if asm::cpuid_ecx(1, 0) >> 21 & 1 == 0 {
        return absent("x2APIC");
    }
    wrmsr(APIC_BASE, 0xfee0_0d00);
    equal("x2APIC", rdmsr(APIC_BASE), 0xfee0_0d00);
    equal("x2APIC: number", rdmsr(0x802), 0);
    equal("x2APIC: version", rdmsr(0x803) & 0xff, 0x14);
    equal("x2APIC: no DFR", attempt1(rdmsr, 0x80e).code(), GENERAL);
    equal(
        "x2APIC: EOI takes zero only",
        attempt2(wrmsr, 0x80b, 1).code(),
        GENERAL,
    );
    equal("x2APIC: TPR", attempt2(wrmsr, 0x808, 0x30).code(), NONE);
    equal("x2APIC: CR8", asm::cr8(), 3);
    wrmsr(0x808, 0);
    refuses("x2APIC: not back to xAPIC", APIC_BASE, 0xfee0_0900);
}

fn asm_low(value: u64) -> u64 {
    value & 0xffff_ffff
}

fn segments() {
    let (one, two) = (super::paging::page(), super::paging::page());
    asm::write(one + 8, 111);
    asm::write(two + 8, 222);
    wrmsr(FS_BASE, one);
    wrmsr(GS_BASE, one);
    wrmsr(KERNEL_GS_BASE, two);
    equal("FS", read_fs(), 111);
    equal("GS", read_gs(), 111);
    swapgs();
    equal("GS after SWAPGS", read_gs(), 222);
    equal("GS base after SWAPGS", rdmsr(GS_BASE), two);
    equal("kernel's GS base after SWAPGS", rdmsr(KERNEL_GS_BASE), one);
    swapgs();
    equal("GS after two", read_gs(), 111);
    equal(
        "RDFSBASE without CR4.FSGSBASE",
        attempt0(rdfsbase).code(),
        code(6, 0),
    );
    asm::set_cr4(asm::cr4() | 1 << 16);
    equal("RDFSBASE", attempt0(rdfsbase).value, one);
    wrfsbase(two);
    equal("WRFSBASE", rdmsr(FS_BASE), two);
    wrgsbase(two);
    equal("WRGSBASE", read_gs(), 222);
    equal(
        "WRFSBASE in the hole",
        attempt1(wrfsbase, HOLE).code(),
        GENERAL,
    );
    asm::set_cr4(asm::cr4() & !(1 << 16));
    // Loading a selector replaces the base.
    load_fs(0x10);
    equal("FS base after its selector", rdmsr(FS_BASE), 0);
    wrmsr(FS_BASE, super::user::address(one));
    equal("FS of user code", user::run0(user_fs).trap().rax, 111);
    load_gs(0x10);
    wrmsr(FS_BASE, 0);
    equal("GS base after its selector", rdmsr(GS_BASE), 0);
    // Addresses wrap at 64 bits.
    wrmsr(FS_BASE, one.wrapping_sub(1 << 62) & 0x0000_7fff_ffff_ffff);
    wrmsr(FS_BASE, 0);
}

fn system_calls() {
    wrmsr(STAR, 0x0018 << 48 | 0x0008 << 32);
    wrmsr(LSTAR, super::trap::at(syscall_entry));
    wrmsr(FMASK, 0x600);
    user::set_flags(0x3c06);
    let outcome = user::run0(user_syscall);
    equal("SYSCALL", outcome.code(), code(0x47, 0));
    equal("SYSCALL: RCX", noted(0), user::address(syscall_next()));
    equal("SYSCALL: R11", noted(1), 0x3c06);
    equal("SYSCALL: flags", noted(2), 0x3806);
    equal("SYSCALL: RSP", noted(3), user::stack());
    equal("SYSCALL: CS", noted(4), 8);
    equal("SYSCALL: SS", noted(5), 0x10);
    user::set_flags(2);
    let after = user::address(super::trap::at(user_after_sysret));
    let outcome = attempt2(sysret, after, 0x0804);
    equal("SYSRET", outcome.code(), code(0x80, 0));
    equal(
        "SYSRET: flags, CS, SS",
        outcome.trap().rax,
        0x0023_002b_0000_0806,
    );
    // Without SCE, they are no instructions.
    wrmsr(EFER, rdmsr(EFER) & !1);
    equal(
        "SYSCALL without SCE",
        user::run0(user_syscall).code(),
        code(6, 0),
    );
    wrmsr(EFER, rdmsr(EFER) | 1);
}
