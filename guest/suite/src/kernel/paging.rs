//! Page tables by hand.

use core::sync::atomic::{AtomicU64, Ordering};

use super::asm;
use super::boot::{HEAP, TABLES};

pub const PRESENT: u64 = 1;
pub const WRITABLE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
/// A page, where a table could be.
pub const LARGE: u64 = 1 << 7;
pub const GLOBAL: u64 = 1 << 8;
pub const NO_EXECUTE: u64 = 1 << 63;
/// What tables have: what they lead to decides.
pub const TABLE: u64 = PRESENT | WRITABLE | USER;

static NEXT: AtomicU64 = AtomicU64::new(HEAP);

/// `count` pages of memory, all zero, that nobody else has.
pub fn pages(count: u64) -> u64 {
    let page = NEXT.fetch_add(count * 4096, Ordering::Relaxed);
    asm::fill(page, 0, count * 4096);
    page
}

/// A page of memory, all zero, that nobody else has.
pub fn page() -> u64 {
    pages(1)
}

/// Memory aligned to 2 MiB.
pub fn large_page() -> u64 {
    let next = NEXT.load(Ordering::Relaxed).next_multiple_of(1 << 21);
    NEXT.store(next + (1 << 21), Ordering::Relaxed);
    next
}

/// The address of the entry for `linear` in the tables at `root`, `level` 1 being that of pages of 4 KiB. Tables on
/// the way are made.
pub fn entry_in(root: u64, linear: u64, level: u64) -> u64 {
    let mut table = root;
    let mut at = 4;
    loop {
        let entry = table + (linear >> (12 + 9 * (at - 1)) & 511) * 8;
        if at == level {
            return entry;
        }
        if asm::read(entry) & PRESENT == 0 {
            asm::write(entry, page() | TABLE);
        }
        table = asm::read(entry) & 0x000f_ffff_ffff_f000;
        at -= 1;
    }
}

/// As [`entry_in`], in the tables that everything starts with.
pub fn entry(linear: u64, level: u64) -> u64 {
    entry_in(TABLES, linear, level)
}

/// Maps a page of 4 KiB.
pub fn map(linear: u64, physical: u64, bits: u64) {
    asm::write(entry(linear, 1), physical | bits);
    asm::invlpg(linear);
}

/// Takes a page of 4 KiB away.
pub fn unmap(linear: u64) {
    asm::write(entry(linear, 1), 0);
    asm::invlpg(linear);
}
