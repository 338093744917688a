//! Paging: who may do what with which page, what the error code and CR2 say, accessed and dirty bits, what a TLB may keep.

use super::asm::{self, read, write};
use super::boot::{EMPTY, TABLES};
use super::check::{equal, holds, kills_emulation};
use super::paging::{
    ACCESSED, DIRTY, GLOBAL, LARGE, NO_EXECUTE, PRESENT, TABLE, USER, WRITABLE, entry, entry_in,
    large_page, map, page, pages, unmap,
};
use super::trap::{self, Outcome, attempt1, attempt2, code};
use super::user;

const EFER: u64 = 0xc000_0080;
const NXE: u64 = 1 << 11;
const WP: u64 = 1 << 16;
const PGE: u64 = 1 << 7;
const SMEP: u64 = 1 << 20;

/// Bits of a page fault's error code.
const E_PRESENT: u64 = 1;
const E_WRITE: u64 = 1 << 1;
const E_USER: u64 = 1 << 2;
const E_RESERVED: u64 = 1 << 3;
const E_FETCH: u64 = 1 << 4;

/// A byte for how an access ended: the page fault's error code, or 0xff if there was none, or 0xee for anything else.
fn ending(outcome: &Outcome, address: u64) -> u64 {
    match outcome.trap {
        None => 0xff,
        Some(trap) if trap.vector == 0x80 => 0xff,
        Some(trap) if trap.vector == 14 && trap.cr2 == address => trap.error,
        Some(_) => 0xee,
    }
}

/// All six accesses, kernel's then user's, each read, write, fetch; one byte for each.
fn accesses(address: u64) -> u64 {
    let outcomes = [
        attempt1(asm::read, address),
        attempt2(asm::write, address, 0xc3),
        attempt1(asm::call, address),
        user::run1(user::reads, address),
        user::run1(user::writes_return, address),
        user::run1(user::calls, address),
    ];
    outcomes
        .iter()
        .fold(0, |sum, outcome| sum << 8 | ending(outcome, address))
}

/// What the manuals say of these accesses to a page with `bits` (SDM volume 3, 4.6 and 4.7).
fn rules(bits: u64, wp: bool, smep: bool) -> u64 {
    let has = |bit| bits & bit != 0;
    let mut sum = 0;
    for (user, kind) in [
        (0, 0),
        (0, E_WRITE),
        (0, E_FETCH),
        (E_USER, 0),
        (E_USER, E_WRITE),
        (E_USER, E_FETCH),
    ] {
        let forbidden = match (user != 0, kind) {
            _ if !has(PRESENT) => true,
            (true, _) if !has(USER) => true,
            (true, E_WRITE) => !has(WRITABLE),
            (false, E_WRITE) => !has(WRITABLE) && wp,
            (true, E_FETCH) => has(NO_EXECUTE),
            (false, E_FETCH) => has(NO_EXECUTE) || smep && has(USER),
            _ => false,
        };
        let present = if has(PRESENT) { E_PRESENT } else { 0 };
        sum = sum << 8
            | if forbidden {
                user | kind | present
            } else {
                0xff
            };
    }
    sum
}

fn set_bit(value: u64, bit: u64, on: bool) -> u64 {
    if on { value | bit } else { value & !bit }
}

pub fn run() {
    // So that user code's page tables may be used up to the last level: its pages say who may.
    for level in 2..=4 {
        let at = entry(EMPTY, level);
        write(at, read(at) | TABLE);
    }
    permissions();
    large_pages();
    reserved_bits();
    addresses();
    accessed_and_dirty();
    translations_kept();
    control_registers();
}

/// Every combination of permission bits in the last level, and each restriction in the levels above.
fn permissions() {
    let target = page();
    write(target, 0xc3);
    for wp in [true, false] {
        asm::set_cr0(set_bit(asm::cr0(), WP, wp));
        for smep in [false, true] {
            asm::set_cr4(set_bit(asm::cr4(), SMEP, smep));
            for choice in 0..16u64 {
                let mut bits = choice & 7;
                bits = set_bit(bits, NO_EXECUTE, choice & 8 != 0);
                map(EMPTY, target, bits);
                let name = match (wp, smep) {
                    (true, false) => "rights",
                    (true, true) => "rights smep",
                    (false, false) => "rights wp=0",
                    (false, true) => "rights wp=0 smep",
                };
                equal(name, accesses(EMPTY), rules(bits, wp, smep));
            }
        }
    }
    asm::set_cr0(asm::cr0() | WP);
    asm::set_cr4(asm::cr4() & !SMEP);
    map(EMPTY, target, TABLE);
    for level in 2..=4 {
        // In tables of its own, far from everything else.
        let linear = 0x60_0000_0000 + (level << 39);
        map(linear, target, TABLE);
        let at = entry(linear, level);
        let whole = read(at);
        for bits in [
            PRESENT | USER,
            PRESENT | WRITABLE,
            TABLE | NO_EXECUTE,
            WRITABLE | USER,
        ] {
            write(at, whole & !TABLE | bits);
            asm::invlpg(linear);
            equal(
                "rights of a table",
                accesses(linear),
                rules(bits, true, false),
            );
        }
        write(at, whole);
        asm::invlpg(linear);
    }
}

fn large_pages() {
    let target = large_page();
    write(target, 0xc3);
    write(target + 0x1f_fff8, 0x1234);
    let linear = EMPTY + (1 << 21);
    for bits in [
        TABLE,
        TABLE | NO_EXECUTE,
        PRESENT | USER,
        PRESENT | WRITABLE,
        WRITABLE,
    ] {
        write(entry(linear, 2), target | bits | LARGE);
        asm::invlpg(linear);
        equal(
            "rights of 2 MiB",
            accesses(linear),
            rules(bits, true, false),
        );
    }
    write(entry(linear, 2), target | TABLE | LARGE);
    asm::invlpg(linear);
    equal("end of 2 MiB", read(linear + 0x1f_fff8), 0x1234);
    holds(
        "2 MiB are dirty only when written",
        read(entry(linear, 2)) & DIRTY == 0,
    );
    write(linear + 0x1000, 1);
    holds("2 MiB are dirty", read(entry(linear, 2)) & DIRTY != 0);

    let linear = 0x20_0000_0000;
    for bits in [
        TABLE,
        TABLE | NO_EXECUTE,
        PRESENT | USER,
        PRESENT | WRITABLE,
        WRITABLE,
    ] {
        write(entry(linear, 3), bits | LARGE);
        asm::invlpg(linear + target);
        equal(
            "rights of 1 GiB",
            accesses(linear + target),
            rules(bits, true, false),
        );
    }
    write(entry(linear, 3), TABLE | LARGE);
    asm::invlpg(linear + target);
    equal("inside of 1 GiB", read(linear + target + 0x1f_fff8), 0x1234);
}

fn reserved_bits() {
    let target = page();
    let faults = |name: &str, linear: u64, level: u64, value: u64| {
        let at = entry(linear, level);
        let before = read(at);
        write(at, value);
        asm::invlpg(linear);
        let outcome = attempt1(asm::read, linear);
        equal(name, outcome.code(), code(14, E_PRESENT | E_RESERVED));
        let outcome = user::run1(user::writes, linear);
        let error = E_PRESENT | E_RESERVED | E_WRITE | E_USER;
        equal(name, outcome.code(), code(14, error));
        write(at, before);
        asm::invlpg(linear);
    };
    map(EMPTY, target, TABLE);
    faults("bit 51 of a page", EMPTY, 1, target | TABLE | 1 << 51);
    faults(
        "bit 13 of 2 MiB",
        EMPTY + (2 << 21),
        2,
        TABLE | LARGE | 1 << 13,
    );
    faults(
        "bit 20 of 2 MiB",
        EMPTY + (2 << 21),
        2,
        TABLE | LARGE | 1 << 20,
    );
    let linear = 0x28_0000_0000;
    faults("bit 13 of 1 GiB", linear, 3, TABLE | LARGE | 1 << 13);
    faults("bit 29 of 1 GiB", linear, 3, TABLE | LARGE | 1 << 29);
    let linear = 0x0300_0000_0000;
    map(linear, target, TABLE);
    faults(
        "size bit of the last table",
        linear,
        4,
        read(entry(linear, 4)) | LARGE,
    );

    // Without NXE, bit 63 is reserved.
    map(EMPTY, target, TABLE | NO_EXECUTE);
    asm::wrmsr(EFER, asm::rdmsr(EFER) & !NXE);
    asm::set_cr3(asm::cr3());
    let outcome = attempt1(asm::read, EMPTY);
    equal(
        "bit 63 without NXE",
        outcome.code(),
        code(14, E_PRESENT | E_RESERVED),
    );
    unmap(EMPTY);
    let outcome = attempt1(asm::call, EMPTY);
    equal("a fetch without NXE", outcome.code(), code(14, 0));
    asm::wrmsr(EFER, asm::rdmsr(EFER) | NXE);
    let outcome = attempt1(asm::call, EMPTY);
    equal("a fetch with NXE", outcome.code(), code(14, E_FETCH));
    // A missing page does not look at the other bits.
    write(entry(EMPTY, 1), !PRESENT);
    equal(
        "nothing but bit 0 missing",
        attempt1(asm::read, EMPTY).code(),
        code(14, 0),
    );
    unmap(EMPTY);
}

asm! {
    fn read_stack(address) { "mov rcx, rsp" "mov rsp, rdi" "pop rax" "mov rsp, rcx" "ret" }
    fn push_stack(address) { "mov rcx, rsp" "mov rsp, rdi" "push rax" "mov rsp, rcx" "ret" }
    fn read_rbp(address) { "push rbp" "mov rbp, rdi" "mov rax, [rbp]" "pop rbp" "ret" }
    fn read_16(address) { "movups xmm0, [rdi]" "ret" }
    fn jump(address) { "jmp rdi" }
    fn exchange(address) { "mov eax, 1" "lock xadd [rdi], rax" "ret" }
    fn compare(address) { "xor eax, eax" "mov ecx, 1" "lock cmpxchg [rdi], rcx" "ret" }
    fn twice(address) { "push qword ptr [rdi]" "pop qword ptr [rdi + 8]" "ret" }
}

/// What CR2 says, and addresses that no page can have.
fn addresses() {
    let two = pages(2);
    map(EMPTY, two, TABLE);
    unmap(EMPTY + 4096);
    let last = EMPTY + 4096;
    for distance in [1, 4, 7] {
        let outcome = attempt1(asm::read, last - distance);
        equal("a read into a missing page", outcome.trap().cr2, last);
        let outcome = attempt2(asm::write, last - distance, 0x1122_3344_5566_7788);
        equal(
            "a write into a missing page",
            outcome.code(),
            code(14, E_WRITE),
        );
        equal("its address", outcome.trap().cr2, last);
    }
    equal("nothing was written", read(last - 8), 0);
    let outcome = attempt1(read_16, last - 9);
    equal("16 bytes into a missing page", outcome.trap().cr2, last);
    map(EMPTY + 4096, two + 4096, TABLE);
    unmap(EMPTY);
    equal(
        "a read out of a missing page",
        attempt1(asm::read, last - 3).trap().cr2,
        last - 3,
    );
    map(EMPTY, two, PRESENT | USER);
    equal(
        "a locked addition to a read-only page",
        attempt1(exchange, EMPTY + 8).code(),
        code(14, 3),
    );
    // It writes whether or not it exchanges.
    equal(
        "a failed comparison with a read-only page",
        attempt1(compare, two).code(),
        trap::NONE,
    );
    write(two + 16, 77);
    equal(
        "a comparison with a read-only page",
        attempt1(compare, EMPTY + 16).code(),
        code(14, 3),
    );
    map(EMPTY, two, TABLE);
    unmap(EMPTY + 4096);
    let outcome = attempt1(twice, last - 8);
    equal(
        "a pop into a missing page",
        outcome.code(),
        code(14, E_WRITE),
    );

    // A fetch that begins in one page and ends in the next: mov eax, imm32.
    asm::write8(two + 4095, 0xb8);
    let outcome = attempt1(jump, last - 1);
    equal(
        "a fetch into a missing page",
        outcome.code(),
        code(14, E_FETCH),
    );
    equal("its address", outcome.trap().cr2, last);
    equal("its instruction", outcome.trap().rip, last - 1);

    let hole = 0x8000_0000_0000;
    equal(
        "a read in the hole",
        attempt1(asm::read, hole).code(),
        code(13, 0),
    );
    equal(
        "a read into the hole",
        attempt1(asm::read, hole - 4).code(),
        code(13, 0),
    );
    equal(
        "a pop in the hole",
        attempt1(read_stack, hole).code(),
        code(12, 0),
    );
    equal(
        "a push in the hole",
        attempt1(push_stack, hole + 8).code(),
        code(12, 0),
    );
    equal(
        "RBP in the hole",
        attempt1(read_rbp, hole).code(),
        code(12, 0),
    );
    let outcome = attempt1(jump, hole);
    equal("a jump into the hole", outcome.code(), code(13, 0));
    equal(
        "a read at the end of the hole",
        attempt1(asm::read, !0 << 47).code(),
        code(14, 0),
    );
    equal(
        "a write at the very end",
        attempt2(asm::write, !7, 0).code(),
        code(14, E_WRITE),
    );
}

fn accessed_and_dirty() {
    let linear = 0x0480_0000_0000;
    let target = page();
    map(linear, target, TABLE);
    let clear = || {
        for level in 1..=4 {
            let at = entry(linear, level);
            write(at, read(at) & !(ACCESSED | DIRTY));
        }
        asm::set_cr3(asm::cr3());
    };
    // Four bits for accessed, from the root down, and one for dirty.
    let bits = || {
        let accessed = (1..=4).rev().fold(0, |sum, level| {
            sum << 1 | u64::from(read(entry(linear, level)) & ACCESSED != 0)
        });
        accessed << 1 | u64::from(read(entry(linear, 1)) & DIRTY != 0)
    };
    clear();
    equal("untouched", bits(), 0);
    read(linear);
    equal("read", bits(), 0b11110);
    write(linear, 1);
    equal("written after it was read", bits(), 0b11111);
    clear();
    write(linear, 1);
    equal("written", bits(), 0b11111);
    clear();
    user::run1(user::reads, linear);
    equal("read by user code", bits(), 0b11110);
    user::run1(user::writes, linear);
    equal("written by user code", bits(), 0b11111);
    clear();
    write(target, 0xc3);
    asm::call(linear);
    equal("fetched", bits(), 0b11110);
    clear();
    exchange(linear);
    equal("added to", bits(), 0b11111);
    clear();
    write(target, 5);
    compare(linear);
    let mostly = bits() | 1;
    equal("compared", mostly, 0b11111);
    clear();
    let at = entry(linear, 1);
    write(at, read(at) & !WRITABLE);
    asm::invlpg(linear);
    attempt2(asm::write, linear, 1);
    equal("not written: not dirty", bits() & 1, 0);
    // With the dirty bit set by software, no walk has anything to set.
    write(at, read(at) | WRITABLE | ACCESSED | DIRTY);
    asm::invlpg(linear);
    write(linear, 3);
    equal("already dirty", bits() & 3, 3);
    equal("what was written", read(target), 3);
}

fn translations_kept() {
    let (one, two) = (page(), page());
    write(one, 1);
    write(two, 2);
    map(EMPTY, one, TABLE);
    equal("before", read(EMPTY), 1);
    write(entry(EMPTY, 1), two | TABLE);
    asm::invlpg(EMPTY + 0x123);
    equal("after INVLPG", read(EMPTY), 2);
    write(entry(EMPTY, 1), one | TABLE);
    asm::set_cr3(asm::cr3());
    equal("after writing CR3", read(EMPTY), 1);
    write(entry(EMPTY, 1), one | PRESENT);
    asm::invlpg(EMPTY);
    equal(
        "without the right to write",
        attempt2(asm::write, EMPTY, 1).code(),
        code(14, 3),
    );
    // More rights need no invalidation.
    write(entry(EMPTY, 1), one | TABLE);
    equal(
        "with more rights again",
        attempt2(asm::write, EMPTY, 9).code(),
        trap::NONE,
    );
    equal(
        "with another's rights",
        user::run1(user::reads, EMPTY).code(),
        code(0x80, 0),
    );

    asm::set_cr4(asm::cr4() | PGE);
    map(EMPTY, two, TABLE | GLOBAL);
    equal("global", read(EMPTY), 2);
    write(entry(EMPTY, 1), one | TABLE | GLOBAL);
    asm::set_cr4(asm::cr4() & !PGE);
    equal("global, after PGE", read(EMPTY), 9);
    asm::set_cr4(asm::cr4() | PGE);
    write(entry(EMPTY, 1), two | TABLE | GLOBAL);
    asm::invlpg(EMPTY);
    equal("global, after INVLPG", read(EMPTY), 2);
    unmap(EMPTY);

    // Another root, in which one page is another.
    let root = page();
    asm::copy(root, TABLES, 4096);
    let linear = 0x0500_0000_0000;
    map(linear, one, TABLE);
    asm::write(entry_in(root, linear, 1), two | TABLE);
    equal("in the first tables", read(linear), 9);
    asm::set_cr3(root);
    equal("in the second tables", read(linear), 2);
    write(linear, 22);
    asm::set_cr3(TABLES);
    equal("in the first tables again", read(linear), 9);
    equal("written through the second", read(two), 22);

    // The table itself, seen through the mapping that it makes.
    let table = page();
    let window = 0x0580_0000_0000;
    map(window, one, TABLE);
    let at = entry(window, 2);
    asm::write(table, one | TABLE);
    asm::write(table + 8, table | TABLE);
    write(at, table | TABLE);
    asm::invlpg(window);
    equal("through a table", read(window), 9);
    asm::write(window + 4096, two | TABLE);
    asm::invlpg(window);
    equal("through a table that it maps", read(window), 22);
}

/// Values that control registers refuse.
fn control_registers() {
    let refused = |name: &str, function: extern "C" fn(u64) -> u64, value: u64| {
        if value >> 32 == 0 || !kills_emulation(name) {
            equal(name, attempt1(function, value).code(), code(13, 0));
        }
    };
    refused("CR4.LA57", asm::set_cr4, asm::cr4() | 1 << 12);
    refused("CR4 bit 31", asm::set_cr4, asm::cr4() | 1 << 31);
    refused("CR4 bit 63", asm::set_cr4, asm::cr4() | 1 << 63);
    refused("CR4 without PAE", asm::set_cr4, asm::cr4() & !(1 << 5));
    refused("CR0 without PE", asm::set_cr0, asm::cr0() & !1);
    refused("CR0 without PG", asm::set_cr0, asm::cr0() & !(1 << 31));
    refused("CR0.NW without CD", asm::set_cr0, asm::cr0() | 1 << 29);
    refused("CR0 bit 32", asm::set_cr0, asm::cr0() | 1 << 32);
    refused("CR3 bit 52", asm::set_cr3, TABLES | 1 << 52);
    refused("CR8 bit 4", asm::set_cr8, 16);
    let efer = asm::rdmsr(EFER);
    let outcome = attempt2(asm::wrmsr, EFER, efer & !(1 << 8));
    equal("EFER without LME", outcome.code(), code(13, 0));
    let outcome = attempt2(asm::wrmsr, EFER, efer | 1 << 1);
    equal("EFER bit 1", outcome.code(), code(13, 0));
    equal("EFER", asm::rdmsr(EFER), efer);
    asm::set_cr2(0x1234_5678_9abc_def0);
    equal("CR2 holds anything", asm::cr2(), 0x1234_5678_9abc_def0);
}
