//! FPU, SSE and AVX: state in memory, exceptions that are not masked, what control registers and XCR0 allow.

use super::asm::{self, read, read32, write, write32};
use super::check::{equal, kills_emulation};
use super::paging::page;
use super::trap::{NONE, attempt, attempt0, attempt1, attempt2, code};

asm! {
    fn init() { "fninit" "mov dword ptr [rsp - 8], 0x1f80" "ldmxcsr [rsp - 8]" "ret" }
    fn fill_x87() { "fninit" "fld1" "fldpi" "fldl2e" "fldz" "fchs" "fld1" "fadd st, st(2)" "ret" }
    fn fill_sse() {
        "mov rax, 0x0123456789abcdef" "movq xmm0, rax" "punpcklqdq xmm0, xmm0"
        "movdqa xmm1, xmm0" "paddb xmm1, xmm0" "movdqa xmm7, xmm1" "paddd xmm7, xmm0" "movdqa xmm15, xmm7" "pshufd xmm15, xmm15, 0x1b"
        "ret"
    }
    fn fill_avx() {
        "vbroadcastsd ymm0, [rip + suite_pattern]" "vpaddb ymm1, ymm0, ymm0" "vpaddd ymm7, ymm1, ymm0" "vpermq ymm15, ymm7, 0x1b" "vpxor ymm14, ymm14, ymm14"
        "ret"
    }
    fn fxsave(area) { "fxsave64 [rdi]" "ret" }
    fn fxrstor(area) { "fxrstor64 [rdi]" "ret" }
    /// With nothing between them that could use a register.
    fn fxrstor_fxsave(from, to) { "fxrstor64 [rdi]" "fxsave64 [rsi]" "ret" }
    fn xrstor_xsave(from, to) { "mov eax, 7" "xor edx, edx" "xrstor64 [rdi]" "xsave64 [rsi]" "ret" }
    fn xsave(area, mask) { "mov eax, esi" "mov rdx, rsi" "shr rdx, 32" "xsave64 [rdi]" "ret" }
    fn xsaveopt(area, mask) { "mov eax, esi" "xor edx, edx" "xsaveopt64 [rdi]" "ret" }
    fn xrstor(area, mask) { "mov eax, esi" "mov rdx, rsi" "shr rdx, 32" "xrstor64 [rdi]" "ret" }
    fn vadd() { "vaddps ymm0, ymm1, ymm2" "ret" }
    fn vadd_128() { "vaddps xmm0, xmm1, xmm2" "ret" }
    fn fnstenv(area) { "fnstenv [rdi]" "ret" }
    fn fnsave(area) { "fnsave [rdi]" "ret" }
    fn status() { "fnstsw ax" "movzx eax, ax" "ret" }
    fn control() { "fnstcw [rsp - 8]" "movzx eax, word ptr [rsp - 8]" "ret" }
    fn set_control(word) { "mov [rsp - 8], edi" "fldcw [rsp - 8]" "ret" }
    fn mxcsr() { "stmxcsr [rsp - 8]" "mov eax, [rsp - 8]" "ret" }
    fn set_mxcsr(value) { "mov [rsp - 8], edi" "ldmxcsr [rsp - 8]" "ret" }
    fn divide_x87() { "fld1" "fldz" "fdivp" "suite_divided: nop" "fwait" "suite_waited: fninit" "ret" }
    fn after_divide() { "lea rax, [rip + suite_divided]" "ret" }
    fn root_x87() { "fld1" "fchs" "fsqrt" "fld1" "fninit" "ret" }
    fn empty_x87() { "fninit" "fxch st(3)" "fnstsw ax" "movzx eax, ax" "fninit" "ret" }
    fn overflow_x87() { "fninit" "fld1" "fld1" "fld1" "fld1" "fld1" "fld1" "fld1" "fld1" "fld1" "fnstsw ax" "movzx eax, ax" "fninit" "ret" }
    fn divide_sse() { "xorps xmm1, xmm1" "mov eax, 0x3f800000" "movd xmm0, eax" "suite_divide_sse: divss xmm0, xmm1" "movd eax, xmm0" "ret" }
    fn divide_sse_at() { "lea rax, [rip + suite_divide_sse]" "ret" }
    fn invalid_sse() { "mov eax, 0xbf800000" "movd xmm0, eax" "sqrtss xmm0, xmm0" "movd eax, xmm0" "ret" }
    fn denormal_sse() { "mov eax, 1" "movd xmm0, eax" "addss xmm0, xmm0" "movd eax, xmm0" "ret" }
    fn inexact_sse() { "mov eax, 0x3f800000" "movd xmm0, eax" "mov eax, 0x40400000" "movd xmm1, eax" "divss xmm0, xmm1" "movd eax, xmm0" "ret" }
    fn rounded_x87() { "fninit" "fld1" "fldpi" "fdivp" "sub rsp, 16" "fstp tbyte ptr [rsp]" "mov rax, [rsp]" "add rsp, 16" "ret" }
    fn mmx() { "mov rax, 0x0102030405060708" "movq mm0, rax" "paddb mm0, mm0" "movq rax, mm0" "emms" "ret" }
    fn mmx_tags(area) { "fninit" "movq mm3, [rdi]" "fxsave64 [rdi]" "emms" "ret" }
    fn read_xmm15() { "movq rax, xmm15" "ret" }
    fn read_ymm15_high() { "vextracti128 xmm0, ymm15, 1" "movq rax, xmm0" "ret" }
    fn sse_zeroes_nothing() { "vpcmpeqd ymm3, ymm3, ymm3" "movaps xmm3, xmm0" "vextracti128 xmm4, ymm3, 1" "movq rax, xmm4" "ret" }
    fn vex_zeroes() { "vpcmpeqd ymm3, ymm3, ymm3" "vmovaps xmm3, xmm0" "vextracti128 xmm4, ymm3, 1" "movq rax, xmm4" "ret" }
    fn cvt(value) { "movq xmm0, rdi" "cvtsd2si rax, xmm0" "ret" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_pattern: .quad 0x0123456789abcdef",
    ".text"
);

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const GENERAL: u64 = code(13, 0);
const UNDEFINED: u64 = code(6, 0);

/// A sum that depends on every byte and its place.
fn sum(address: u64, count: u64) -> u64 {
    (0..count).fold(0, |sum: u64, index| {
        sum.rotate_left(3) ^ asm::read8(address + index).wrapping_add(index)
    })
}

pub fn run() {
    legacy_area();
    x87_exceptions();
    sse_exceptions();
    extended();
    init();
}

fn legacy_area() {
    let area = page();
    init();
    equal("control word", control(), 0x37f);
    equal("status word", status(), 0);
    equal("MXCSR", mxcsr(), 0x1f80);
    fill_x87();
    fill_sse();
    asm::fill(area, 0xcc, 4096);
    fxsave(area);
    equal("FXSAVE: control and status", read32(area), 0x1800_037f);
    equal("FXSAVE: tags", asm::read8(area + 4), 0xf8);
    equal("FXSAVE: MXCSR", read32(area + 24), 0x1f80);
    // The mask of the processor, whose bits 0 to 15 all models have.
    equal(
        "FXSAVE: MXCSR's mask",
        read32(area + 28) & 0xffff_ffbf,
        0xffbf,
    );
    for register in 0..8 {
        let at = area + 32 + register * 16;
        equal("FXSAVE: an x87 register", read(at), x87(register));
        equal(
            "FXSAVE: its exponent and padding",
            read(at + 8),
            x87_exponent(register),
        );
    }
    equal("FXSAVE: XMM", sum(area + 160, 256), {
        let a = 0x0123_4567_89ab_cdefu64;
        let bytes = |f: &dyn Fn(u64) -> u64, width: u32| {
            (0..64 / width).fold(0u64, |all, lane| {
                let mask = !0u64 >> (64 - width);
                all | (f(a >> (lane * width) & mask) & mask) << (lane * width)
            })
        };
        let one = bytes(&|x| x + x, 8);
        let seven = (0..2).fold(0u64, |all, lane| {
            let part = |v: u64| v >> (lane * 32) & 0xffff_ffff;
            all | ((part(one) + part(a)) & 0xffff_ffff) << (lane * 32)
        });
        let turned = seven.rotate_left(32);
        let mut image = [0u64; 32];
        let known = [(0, a), (1, one), (7, seven), (15, turned)];
        for (register, value) in known {
            image[register * 2] = value;
            image[register * 2 + 1] = value;
        }
        for register in [2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14] {
            image[register * 2] = read(area + 160 + register as u64 * 16);
            image[register * 2 + 1] = read(area + 168 + register as u64 * 16);
        }
        (0..256u64).fold(0, |all: u64, index| {
            let byte = image[index as usize / 8] >> (index % 8 * 8) & 0xff;
            all.rotate_left(3) ^ byte.wrapping_add(index)
        })
    });
    equal(
        "FXSAVE: what software may use stays",
        read(area + 504),
        0xcccc_cccc_cccc_cccc,
    );
    let second = page();
    init();
    fxrstor_fxsave(area, second);
    equal("FXRSTOR: status", status(), 0x1800);
    // Pointers are left out: AMD's processors keep them only for exceptions.
    equal("FXSAVE again", sum(second, 5), sum(area, 5));
    equal(
        "FXSAVE again: registers",
        sum(second + 24, 392),
        sum(area + 24, 392),
    );
    write32(area + 24, 0x8000_0000);
    equal(
        "FXRSTOR: a reserved bit of MXCSR",
        attempt1(fxrstor, area).code(),
        GENERAL,
    );
    equal(
        "FXSAVE: misaligned",
        attempt1(fxsave, area + 8).code(),
        GENERAL,
    );
    equal(
        "LDMXCSR: a reserved bit",
        attempt1(set_mxcsr, 1 << 16).code(),
        GENERAL,
    );

    fill_x87();
    asm::fill(area, 0, 256);
    fnstenv(area);
    equal("FNSTENV: control word", read32(area) & 0xffff, 0x37f);
    equal("FNSTENV: status word", read32(area + 4) & 0xffff, 0x1800);
    // The second one is zero, three are empty.
    equal("FNSTENV: tag word", read32(area + 8) & 0xffff, 0x13f);
    equal("FNSTENV masks", control(), 0x37f);
    fnsave(area);
    equal("FNSAVE: ST(0)", read(area + 28), x87(0));
    equal("FNSAVE initialises", status(), 0);
    equal("MMX", mmx(), 0x0204_0608_0a0c_0e10);
    write(area, 0x1234);
    mmx_tags(area);
    equal("MMX: tags", asm::read8(area + 4), 0xff);
    equal("MMX: exponent", read(area + 32 + 48 + 8) & 0xffff, 0xffff);
    init();
}

/// The mantissas after `fill_x87`: 1 + log2(e), -0, log2(e), pi, 1, and nothing.
fn x87(register: u64) -> u64 {
    const LOG: u64 = 0xb8aa_3b29_5c17_f0bc;
    match register {
        // (1 + 1.4427…) with an exponent one higher, rounded.
        0 => ((1u64 << 63) >> 1) + (LOG >> 1),
        2 => LOG,
        3 => 0xc90f_daa2_2168_c235,
        4 => 1 << 63,
        _ => 0,
    }
}

fn x87_exponent(register: u64) -> u64 {
    match register {
        0 => 0x4000,
        1 => 0x8000,
        2 => 0x3fff,
        3 => 0x4000,
        4 => 0x3fff,
        _ => 0,
    }
}

fn x87_exceptions() {
    // With CR0.NE, an exception that is not masked comes at the next waiting instruction.
    asm::set_cr0(asm::cr0() | 1 << 5);
    set_control(0x37b);
    let outcome = attempt0(divide_x87);
    equal("#MF", outcome.code(), code(16, 0));
    equal("#MF comes at FWAIT", outcome.trap().rip, after_divide() + 1);
    equal("status: division by zero", status() & 0x80ff, 0x8084);
    init();
    set_control(0x37e);
    equal(
        "#MF at the next instruction",
        attempt0(root_x87).code(),
        code(16, 0),
    );
    equal("status: invalid", status() & 0x80ff, 0x8081);
    init();
    equal("masked", attempt0(divide_x87).code(), NONE);
    equal("an exchange with nothing", empty_x87() & 0x7f, 0x41);
    equal("too many", overflow_x87() & 0x27f, 0x241);
    // Precision and rounding of 1 / pi.
    init();
    equal("1 / pi", rounded_x87(), 0xa2f9_836e_4e44_152a);
    init();
}

fn sse_exceptions() {
    let with = |mxcsr: u64, function: extern "C" fn() -> u64| {
        set_mxcsr(mxcsr);
        let outcome = attempt0(function);
        let after = self::mxcsr();
        set_mxcsr(0x1f80);
        (outcome, after)
    };
    let (outcome, after) = with(0x1f80, divide_sse);
    equal("1 / 0", outcome.value, 0x7f80_0000);
    equal("MXCSR", after, 0x1f84);
    let (outcome, after) = with(0x1d80, divide_sse);
    equal("#XM", outcome.code(), code(19, 0));
    equal("#XM: RIP", outcome.trap().rip, divide_sse_at());
    equal("#XM: MXCSR", after, 0x1d84);
    let (outcome, after) = with(0x1f00, invalid_sse);
    equal("#XM: invalid", outcome.code(), code(19, 0));
    equal("#XM: invalid: MXCSR", after, 0x1f01);
    let (outcome, _) = with(0x1f80, invalid_sse);
    equal("the root of -1", outcome.value, 0xffc0_0000);
    let (outcome, after) = with(0x1f80, denormal_sse);
    equal("denormal", outcome.value, 2);
    equal("denormal: MXCSR", after, 0x1f82);
    let (outcome, _) = with(0x1fc0, denormal_sse);
    equal("denormals are zeroes", outcome.value, 0);
    let (outcome, after) = with(0x9f80, denormal_sse);
    equal(
        "flush to zero: an exact sum",
        outcome.value | after << 32,
        0x9fb2 << 32,
    );
    for (mode, want) in [
        (0, 0x3eaa_aaab),
        (1, 0x3eaa_aaaa),
        (2, 0x3eaa_aaab),
        (3, 0x3eaa_aaaa),
    ] {
        let (outcome, after) = with(0x1f80 | mode << 13, inexact_sse);
        equal("1 / 3, rounded", outcome.value, want);
        equal("inexact", after & 0x3f, 0x20);
    }
    let (outcome, _) = with(0x0f80, inexact_sse);
    equal("#XM: inexact", outcome.code(), code(19, 0));
    equal(
        "a conversion that does not fit",
        cvt(0x47f0_0000_0000_0000),
        1 << 63,
    );
    // Without OSXMMEXCPT it is an undefined instruction.
    asm::set_cr4(asm::cr4() & !CR4_OSXMMEXCPT);
    set_mxcsr(0x1d80);
    let outcome = attempt0(divide_sse);
    set_mxcsr(0x1f80);
    asm::set_cr4(asm::cr4() | CR4_OSXMMEXCPT);
    equal("without CR4.OSXMMEXCPT", outcome.code(), UNDEFINED);
}

asm! {
    /// SSE while CR4.OSFXSR is clear, which is set again.
    fn without_osfxsr() { "mov rax, cr4" "and eax, -513" "mov cr4, rax" "xorps xmm0, xmm0" "ret" }
    fn xgetbv_here() { "xor ecx, ecx" "xgetbv" "ret" }
}

fn extended() {
    let outcome = attempt0(without_osfxsr);
    asm::set_cr4(asm::cr4() | CR4_OSFXSR);
    equal("XORPS without CR4.OSFXSR", outcome.code(), UNDEFINED);
    let area = page();
    equal(
        "XGETBV without CR4.OSXSAVE",
        attempt0(xgetbv_here).code(),
        UNDEFINED,
    );
    equal(
        "XSAVE without CR4.OSXSAVE",
        attempt2(xsave, area, 3).code(),
        UNDEFINED,
    );
    equal("AVX without CR4.OSXSAVE", attempt0(vadd).code(), UNDEFINED);
    equal(
        "CPUID without CR4.OSXSAVE",
        asm::cpuid_ecx(1, 0) >> 27 & 1,
        0,
    );
    asm::set_cr4(asm::cr4() | CR4_OSXSAVE);
    equal("CPUID with CR4.OSXSAVE", asm::cpuid_ecx(1, 0) >> 27 & 1, 1);
    equal("XCR0 after reset", asm::xgetbv(0), 1);
    equal("AVX without XCR0", attempt0(vadd_128).code(), UNDEFINED);
    for value in [0, 2, 4, 5, 6, 1 << 62] {
        equal(
            "XSETBV refuses",
            attempt2(asm::xsetbv, 0, value).code(),
            GENERAL,
        );
    }
    equal(
        "XSETBV of no register",
        attempt2(asm::xsetbv, 5, 3).code(),
        GENERAL,
    );
    asm::xsetbv(0, 3);
    equal("AVX with SSE only", attempt0(vadd).code(), UNDEFINED);
    equal("XSAVE's size of SSE", asm::cpuid_ebx(0xd, 0), 576);
    asm::xsetbv(0, 7);
    equal("XCR0", asm::xgetbv(0), 7);
    if kills_emulation("AVX") {
        return;
    }
    equal("XSAVE's size of AVX", asm::cpuid_ebx(0xd, 0), 832);
    equal("AVX", attempt0(vadd).code(), NONE);

    init();
    fill_x87();
    fill_avx();
    asm::fill(area, 0, 4096);
    xsave(area, 7);
    equal("XSAVE: components", read(area + 512), 7);
    equal("XSAVE: the rest of its header", read(area + 520), 0);
    equal(
        "XSAVE: YMM0's upper half",
        read(area + 576),
        0x0123_4567_89ab_cdef,
    );
    equal(
        "XSAVE: YMM15's upper half",
        read(area + 576 + 240),
        read(area + 160 + 248),
    );
    let before = sum(area, 832);
    let second = page();
    xrstor_xsave(area, second);
    equal("XSAVE after XRSTOR", sum(second, 832), before);
    // What is left out is initialised or stays.
    write(area + 512, 3);
    xrstor(area, 7);
    equal("AVX is initialised: the upper half", read_ymm15_high(), 0);
    equal("SSE is not", read_xmm15(), read(area + 160 + 240));
    fill_avx();
    write(area + 512, 7);
    write(area + 576 + 240, 0x55);
    xrstor(area, 3);
    equal(
        "AVX stays when not asked for",
        u64::from(read_ymm15_high() != 0x55),
        1,
    );
    write(area + 512, 0);
    xrstor(area, 7);
    equal("SSE is initialised", read_xmm15(), 0);
    equal("x87 is initialised", control(), 0x37f);
    asm::fill(second, 0xff, 1024);
    write(second + 512, 0);
    xsave(second, 2);
    equal("XSAVE of SSE only: components", read(second + 512) & !2, 0);
    equal("XSAVE of SSE only: x87 stays", read(second), u64::MAX);
    fill_sse();
    asm::fill(second, 0, 1024);
    xsaveopt(second, 7);
    equal("XSAVEOPT: SSE", read(second + 512) & 2, 2);
    equal("XSAVEOPT: XMM0", read(second + 160), 0x0123_4567_89ab_cdef);
    write(area + 512, 8);
    equal(
        "XRSTOR of what is not enabled",
        attempt2(xrstor, area, 7).code(),
        GENERAL,
    );
    write(area + 512, 1);
    write(area + 520, 1 << 63);
    equal(
        "XRSTOR: compacted by XRSTOR",
        attempt2(xrstor, area, 7).code(),
        GENERAL,
    );
    write(area + 520, 0);
    write(area + 528, 1);
    equal(
        "XRSTOR: a reserved byte",
        attempt2(xrstor, area, 7).code(),
        GENERAL,
    );
    write(area + 528, 0);
    equal(
        "XSAVE: misaligned",
        attempt2(xsave, area + 16, 7).code(),
        GENERAL,
    );
    let missing = super::boot::EMPTY;
    equal(
        "XSAVE: missing",
        attempt2(xsave, missing, 7).code(),
        code(14, 2),
    );
    equal("SSE leaves the upper half", sse_zeroes_nothing(), u64::MAX);
    equal("VEX clears the upper half", vex_zeroes(), 0);
    // XSAVE across two pages of which one is missing.
    super::paging::map(missing, page(), super::paging::TABLE);
    let function = xsave as extern "C" fn(u64, u64) -> u64;
    let outcome = attempt(function as usize as u64, missing + 4096 - 576, 7, 0);
    equal("XSAVE into a missing page", outcome.code(), code(14, 2));
    equal("its address", outcome.trap().cr2, missing + 4096);
}
