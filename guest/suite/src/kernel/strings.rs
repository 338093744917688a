//! String instructions: across pages, with faults in the middle, overlapping, downwards, on ports.

use super::asm::{self, read, write};
use super::boot::EMPTY;
use super::check::equal;
use super::paging::{self, PRESENT, TABLE, map, pages, unmap};
use super::trap::{self, Action, NONE, attempt, code};

asm! {
    /// Runs an instruction with registers of its own; RDI, RSI, RCX and RAX end in memory.
    fn movsb(to, from, count) { "mov rcx, rdx" "rep movsb" "suite_strings: mov [suite_strings_left], rdi" "mov [suite_strings_left + 8], rsi" "mov [suite_strings_left + 16], rcx" "mov [suite_strings_left + 24], rax" "cld" "ret" }
    fn movsq(to, from, count) { "mov rcx, rdx" "rep movsq" "jmp suite_strings" }
    fn movsw_down(to, from, count) { "mov rcx, rdx" "std" "rep movsw" "jmp suite_strings" }
    fn movsb_down(to, from, count) { "mov rcx, rdx" "std" "rep movsb" "jmp suite_strings" }
    fn stosd(to, value, count) { "mov rcx, rdx" "mov eax, esi" "rep stosd" "jmp suite_strings" }
    fn stosb(to, value, count) { "mov rcx, rdx" "mov eax, esi" "rep stosb" "jmp suite_strings" }
    fn lodsw(to, from, count) { "mov rcx, rdx" "xor eax, eax" "rep lodsw" "jmp suite_strings" }
    fn scasb(to, value, count) { "mov rcx, rdx" "mov eax, esi" "repne scasb" "pushfq" "pop rax" "and eax, 0x8d5" "jmp suite_strings" }
    fn cmpsd(to, from, count) { "mov rcx, rdx" "cmp eax, eax" "repe cmpsd" "pushfq" "pop rax" "and eax, 0x8d5" "jmp suite_strings" }
    fn movsb_32(to, from, count) { "mov rcx, rdx" "bts rcx, 40" "addr32 rep movsb" "jmp suite_strings" }
    fn insb(to, port, count) { "mov rcx, rdx" "mov edx, esi" "rep insb" "jmp suite_strings" }
    fn outsb(unused, from, count) { "mov rcx, rdx" "mov edx, 0x3ff" "rep outsb" "jmp suite_strings" }
    fn left(index) { "mov rax, [suite_strings_left + rdi * 8]" "ret" }
}

core::arch::global_asm!(
    ".data",
    ".balign 8",
    "suite_strings_left: .fill 4, 8, 0",
    ".text"
);

type Code = extern "C" fn(u64, u64, u64) -> u64;

fn runs(name: &str, function: Code, to: u64, from: u64, count: u64) -> u64 {
    let outcome = attempt(function as usize as u64, to, from, count);
    equal(name, outcome.code(), NONE);
    digest()
}

/// What the registers were at the end, relative to where they began.
fn digest() -> u64 {
    left(2)
}

/// A sum that depends on every byte and its place.
fn sum(address: u64, count: u64) -> u64 {
    (0..count).fold(0, |sum: u64, index| {
        sum.rotate_left(3) ^ asm::read8(address + index).wrapping_add(index)
    })
}

const FROM: u64 = EMPTY;
const TO: u64 = EMPTY + 0x10_0000;

pub fn run() {
    let (from, to) = (pages(4), pages(4));
    for index in 0..4 {
        map(FROM + index * 4096, from + index * 4096, TABLE);
        // The target's pages lie in another order.
        map(TO + index * 4096, to + (3 - index) * 4096, TABLE);
    }
    for index in 0..4096 * 4 / 8 {
        write(FROM + index * 8, index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    whole();
    faults(from, to);
    ports();
}

fn whole() {
    equal("MOVSB", runs("no fault", movsb, TO + 3, FROM + 5, 9000), 0);
    equal(
        "MOVSB: what it moved",
        sum(TO + 3, 9000),
        sum(FROM + 5, 9000),
    );
    equal("MOVSB: RDI", left(0), TO + 9003);
    equal("MOVSB: RSI", left(1), FROM + 9005);
    runs("no fault", movsq, TO + 4093, FROM + 4091, 1100);
    equal(
        "MOVSQ across pages",
        sum(TO + 4093, 8800),
        sum(FROM + 4091, 8800),
    );
    runs("no fault", movsw_down, TO + 9001, FROM + 9003, 4000);
    equal(
        "MOVSW downwards",
        sum(TO + 9001 - 7998, 8000),
        sum(FROM + 9003 - 7998, 8000),
    );
    equal("MOVSW downwards: RDI", left(0), TO + 9001 - 8000);
    // Overlapping upwards: a pattern of three bytes spreads.
    asm::write32(TO, 0x0003_0201);
    runs("no fault", movsb, TO + 3, TO, 6000);
    let spread = (0..6003).all(|index| asm::read8(TO + index) == index % 3 + 1);
    equal("MOVSB onto itself", spread.into(), 1);
    runs("no fault", movsb, TO, FROM, 6000);
    runs("no fault", movsb_down, TO + 6010, TO + 5999, 6000);
    equal(
        "MOVSB downwards onto itself",
        sum(TO + 11, 6000),
        sum(FROM, 6000),
    );
    runs("no fault", stosd, TO + 4094, 0x8899_aabb, 1000);
    equal("STOSD", sum(TO + 4094, 4000), {
        let bytes = [0xbbu64, 0xaa, 0x99, 0x88];
        (0..4000u64).fold(0, |sum: u64, index| {
            sum.rotate_left(3) ^ bytes[(index % 4) as usize].wrapping_add(index)
        })
    });
    runs("no fault", lodsw, 0, FROM + 1, 3000);
    equal("LODSW", left(3), read(FROM + 1 + 5998) & 0xffff);
    runs("no fault", movsb, TO, FROM, 0);
    equal("nothing to move: RDI", left(0), TO);
    runs("no fault", stosb, TO, 0x11, 8192);
    asm::write8(TO + 5000, 0x22);
    runs("no fault", scasb, TO, 0x22, 8192);
    equal("SCASB", left(0), TO + 5001);
    equal("SCASB: RCX", left(2), 8192 - 5001);
    equal("SCASB: flags", left(3), 0x44);
    runs("no fault", scasb, TO, 0x33, 8192);
    equal("SCASB without success: RCX", left(2), 0);
    // 0x11 - 0x33 borrows.
    equal(
        "SCASB without success: flags",
        left(3),
        flags_of_difference(0x33, 0x11),
    );
    runs("no fault", movsb, TO, FROM, 12000);
    asm::write8(TO + 8003, asm::read8(TO + 8003) ^ 0x80);
    runs("no fault", cmpsd, TO, FROM, 3000);
    equal("CMPSD", left(0), TO + 8004);
    equal("CMPSD: RCX", left(2), 3000 - 2001);
    runs("no fault", movsb_32, TO, FROM, 100);
    equal("32-bit addresses: RCX", left(2), 0);
}

/// CF, PF, AF and SF of a difference of bytes that does not overflow.
fn flags_of_difference(one: u64, other: u64) -> u64 {
    let value = one.wrapping_sub(other) & 0xff;
    let parity = u64::from(value.count_ones().is_multiple_of(2)) << 2;
    let carry = u64::from(one < other);
    let adjust = u64::from(one & 15 < other & 15) << 4;
    let sign = value & 0x80;
    parity | carry | adjust | sign
}

fn faults(from: u64, to: u64) {
    // The third page of the target is missing: registers say what is done.
    unmap(TO + 8192);
    let outcome = attempt(movsb as Code as usize as u64, TO + 100, FROM + 7, 12000);
    equal("MOVSB into a missing page", outcome.code(), code(14, 2));
    equal("its address", outcome.trap().cr2, TO + 8192);
    equal("what came before", sum(TO + 100, 8092), sum(FROM + 7, 8092));
    let outcome = attempt(movsq as Code as usize as u64, TO + 8188, FROM, 3);
    equal(
        "MOVSQ half into a missing page",
        outcome.trap().cr2,
        TO + 8192,
    );
    map(TO + 8192, to + 4096, PRESENT);
    let outcome = attempt(stosd as Code as usize as u64, TO + 4096, 7, 3000);
    equal("STOSD into a read-only page", outcome.code(), code(14, 3));
    equal("its address", outcome.trap().cr2, TO + 8192);
    unmap(FROM + 4096);
    let outcome = attempt(
        movsb_down as Code as usize as u64,
        TO + 5000,
        FROM + 9000,
        9000,
    );
    equal(
        "MOVSB downwards out of a missing page",
        outcome.trap().cr2,
        FROM + 8191,
    );
    let outcome = attempt(lodsw as Code as usize as u64, 0, FROM + 4095, 1);
    equal(
        "LODSW half out of a missing page",
        outcome.trap().cr2,
        FROM + 4096,
    );
    let outcome = attempt(cmpsd as Code as usize as u64, TO, TO, 1000);
    equal("CMPSD within one page", outcome.code(), NONE);
    map(FROM + 4096, from + 4096, TABLE);

    // The page comes while the instruction is under way, and it goes on by itself.
    unmap(TO + 8192);
    trap::calls(comes);
    trap::on(14, Action::Call);
    let outcome = attempt(movsb as Code as usize as u64, TO + 10, FROM, 12000);
    trap::on(14, Action::Escape);
    equal("one fault on the way", outcome.trap().cr2, TO + 8192);
    equal("the rest follows", left(2), 0);
    equal("all of it", sum(TO + 10, 12000), sum(FROM, 12000));
    asm::write(TO + 8192, 0);
    paging::unmap(TO + 8192);
}

/// Maps the page that is missing, as a system does.
extern "C" fn comes(_frame: u64) -> u64 {
    let linear = asm::cr2() & !0xfff;
    map(linear, paging::page(), TABLE);
    0
}

fn ports() {
    // The serial port's scratch register holds a byte.
    asm::write(TO, 0x1122_3344_5566_7788);
    let outcome = attempt(outsb as Code as usize as u64, 0, TO, 8);
    equal("OUTSB", outcome.code(), NONE);
    equal("the last byte stays", asm::in8(0x3ff), 0x11);
    let outcome = attempt(insb as Code as usize as u64, TO + 100, 0x3ff, 5);
    equal("INSB", outcome.code(), NONE);
    equal(
        "INSB: what it read",
        read(TO + 100) & 0xff_ffff_ffff,
        0x11_1111_1111,
    );
    unmap(TO + 4096);
    let outcome = attempt(insb as Code as usize as u64, TO + 4090, 0x3ff, 20);
    equal("INSB into a missing page", outcome.code(), code(14, 2));
    equal("its address", outcome.trap().cr2, TO + 4096);
}
