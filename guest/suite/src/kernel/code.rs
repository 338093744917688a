//! Code that changes: in its own page and block, under another address, in a page that was data, behind CR3's back.

use super::asm::{self, read8, write, write8};
use super::boot::EMPTY;
use super::check::equal;
use super::paging::{self, TABLE, map, page, pages};

/// mov eax, imm32; ret
const MOV_RET: [u8; 6] = [0xb8, 0, 0, 0, 0, 0xc3];

fn put(address: u64, bytes: &[u8]) {
    for (index, &byte) in bytes.iter().enumerate() {
        write8(address + index as u64, byte.into());
    }
}

pub fn run() {
    changed();
    aliases();
    across_pages();
    itself();
    loops();
    many();
    moved();
}

/// A function is written anew and called.
fn changed() {
    let code = page();
    put(code, &MOV_RET);
    let mut sum = 0;
    for value in 1..=100 {
        asm::write32(code + 1, value);
        sum = sum * 3 + asm::call(code);
    }
    let mut want: u64 = 0;
    for value in 1..=100 {
        want = want * 3 + value;
    }
    equal("100 versions of one instruction", sum, want);
    // One byte only: the opcode. `inc eax`, `dec eax` in turns.
    put(code, &[0x31, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xc3]);
    let mut digest = 0;
    for turn in 0..32u64 {
        write8(code + 3, if turn & 1 == 0 { 0xc8 } else { 0xc0 });
        digest = digest << 1 | (asm::call(code) & 0xffff_ffff == 2) as u64;
    }
    equal("one byte of an instruction", digest, 0x5555_5555);
    // By a string instruction, by a locked one, by a vector store.
    put(code, &MOV_RET);
    asm::call(code);
    let source = page();
    asm::write32(source, 0x1234_5678);
    asm::copy(code + 1, source, 4);
    equal("changed by MOVSB", asm::call(code), 0x1234_5678);
    exchange(code + 1, 77);
    equal("changed by XCHG", asm::call(code), 77);
    asm::fill(source, 0x90, 16);
    put(source + 6, &[0xb8, 5, 0, 0, 0, 0xc3]);
    vector_copy(code, source);
    equal("changed by MOVUPS", asm::call(code), 5);
    // Data and code in the same page do not disturb each other.
    for value in 0..1000 {
        write(code + 2048, value);
        asm::call(code);
    }
    equal("data beside code", asm::call(code), 5);
}

asm! {
    fn exchange(address, value) { "xchg [rdi], esi" "ret" }
    fn vector_copy(to, from) { "movups xmm0, [rsi]" "movups [rdi], xmm0" "ret" }
}

/// Written through one address, run at another.
fn aliases() {
    let code = page();
    map(EMPTY, code, TABLE);
    map(EMPTY + 0x5000, code, TABLE);
    put(code, &MOV_RET);
    let mut sum = 0;
    for value in 0..50u64 {
        asm::write32(
            if value & 1 == 0 {
                EMPTY
            } else {
                EMPTY + 0x5000
            } + 1,
            value,
        );
        sum += asm::call(EMPTY) + asm::call(EMPTY + 0x5000) + asm::call(code);
    }
    equal("one page at three addresses", sum, 3 * 49 * 50 / 2);
    // lea rax, [rip]; ret: the same bytes mean something else elsewhere.
    put(code, &[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xc3]);
    equal("RIP at the first address", asm::call(EMPTY), EMPTY + 7);
    equal(
        "RIP at the second address",
        asm::call(EMPTY + 0x5000),
        EMPTY + 0x5007,
    );
    equal("RIP at its own address", asm::call(code), code + 7);
    // The page at an address becomes another, which INVLPG tells.
    let other = page();
    put(other, &[0xb8, 9, 0, 0, 0, 0xc3]);
    map(EMPTY, other, TABLE);
    equal("another page at the first address", asm::call(EMPTY), 9);
    equal(
        "the second address is as it was",
        asm::call(EMPTY + 0x5000),
        EMPTY + 0x5007,
    );
    map(EMPTY, code, TABLE);
    equal("the first page again", asm::call(EMPTY), EMPTY + 7);
}

/// Instructions across the end of a page.
fn across_pages() {
    let two = pages(2);
    let base = EMPTY + 0x10_0000;
    map(base, two, TABLE);
    map(base + 4096, two + 4096, TABLE);
    let mut sum = 0;
    for distance in 1..6u64 {
        let start = base + 4096 - distance;
        put(start, &MOV_RET);
        for value in 0..20 {
            asm::write32(start + 1, value);
            sum += asm::call(start);
        }
    }
    equal("an instruction across pages", sum, 5 * 190);
    let start = base + 4096 - 3;
    put(start, &[0xb8, 1, 0, 0, 0, 0xc3]);
    asm::call(start);
    // The second page becomes another.
    let other = page();
    put(other, &[2, 0, 0xc3]);
    map(base + 4096, other, TABLE);
    equal(
        "its second half from another page",
        asm::call(start),
        0x0002_0001,
    );
}

asm! {
    /// Changes the instruction right behind the store, and one behind a jump.
    fn changes_next(unused, to) {
        "mov eax, 0"
        "lea rcx, [rip + 2f]"
        "mov dword ptr [rcx + 1], esi"
        "2: mov eax, 0x11111111"
        "ret"
    }
    /// Changes an instruction it has run before in a loop.
    fn changes_loop(rounds) {
        "xor eax, eax"
        "mov edx, edi"
        "lea rcx, [rip + 2f]"
        "mov dword ptr [rcx + 1], 1"
        "2: add eax, 0x01010101"
        "inc dword ptr [rcx + 1]"
        "dec edx"
        "jnz 2b"
        "ret"
    }
}

fn itself() {
    for value in [1, 2, 0xdead_beef, 3] {
        equal(
            "the next instruction is changed",
            changes_next(0, value),
            value,
        );
    }
    // 1 + 2 + … + 100
    equal("an instruction of its own loop", changes_loop(100), 5050);
}

/// Loops that are hot before they change.
fn loops() {
    let code = page();
    // mov ecx, 1000; 1: add eax, imm8; dec ecx; jnz 1b; ret, with eax cleared first.
    put(
        code,
        &[
            0x31, 0xc0, 0xb9, 0xe8, 3, 0, 0, 0x83, 0xc0, 1, 0xff, 0xc9, 0x75, 0xf9, 0xc3,
        ],
    );
    let mut sum = 0;
    for step in 1..=20 {
        write8(code + 9, step);
        sum += asm::call(code);
    }
    equal("a hot loop with another constant", sum, 210 * 1000);
    equal("its bytes", read8(code + 9), 20);
}

/// Many functions, some of which change.
fn many() {
    let code = pages(16);
    for index in 0..1024u64 {
        put(code + index * 64, &MOV_RET);
        asm::write32(code + index * 64 + 1, index);
    }
    let all = || {
        (0..1024u64).fold(0u64, |sum, index| {
            sum.rotate_left(5) ^ asm::call(code + index * 64)
        })
    };
    let want = |changed: &dyn Fn(u64) -> u64| {
        (0..1024u64).fold(0u64, |sum, index| sum.rotate_left(5) ^ changed(index))
    };
    equal("1024 functions", all(), want(&|index| index));
    for index in (0..1024).step_by(7) {
        asm::write32(code + index * 64 + 1, index + 100_000);
    }
    let now = |index| {
        if index % 7 == 0 {
            index + 100_000
        } else {
            index
        }
    };
    equal("a seventh of them changed", all(), want(&now));
    equal("once more", all(), want(&now));
}

/// A page that was data becomes code without anybody being told, and back.
fn moved() {
    let area = page();
    for turn in 0..10u64 {
        asm::fill(area, turn, 4096);
        put(area + turn * 128, &[0xb8, turn as u8, 0, 0, 0, 0xc3]);
        equal("data becomes code", asm::call(area + turn * 128), turn);
    }
    // Through a mapping that may not be written, from one that may.
    let linear = EMPTY + 0x20_0000;
    map(linear, area, paging::PRESENT);
    put(area, &MOV_RET);
    asm::write32(area + 1, 3);
    equal("a read-only mapping", asm::call(linear), 3);
    asm::write32(area + 1, 4);
    equal("a read-only mapping after a change", asm::call(linear), 4);
}
