//! Bulk memory: string instructions, copying loops, the library's `memcpy`.

use std::arch::asm;
use std::hint::black_box;

use crate::sys::{Random, mix};

fn random_bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.next() as u8).collect()
}

fn digest(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0, |sum, chunk| {
        chunk
            .try_into()
            .map_or(sum, |word| mix(sum, u64::from_le_bytes(word)))
    })
}

/// `rep movsb`, `rep movsq` and `rep stosq` over 32 KiB per unit.
pub fn rep_movs(units: u64) -> u64 {
    const BYTES: usize = 32 << 10;
    let source = random_bytes(BYTES + 8, 43);
    let mut target = vec![0_u8; BYTES + 8];
    for unit in 0..units {
        let shift = (unit & 7) as usize;
        // SAFETY: source and target have 8 bytes more than is copied, the shift is below 8, and the direction flag is clear by the ABI.
        unsafe {
            let (from, to) = (source.as_ptr(), target.as_mut_ptr());
            asm!("rep movsb", inout("rcx") BYTES / 2 => _, inout("rsi") from.add(shift) => _, inout("rdi") to => _, options(nostack, preserves_flags));
            asm!("rep movsq", inout("rcx") BYTES / 32 => _, inout("rsi") from.add(BYTES / 2) => _, inout("rdi") to.add(BYTES / 2) => _, options(nostack, preserves_flags));
            asm!("rep stosq", inout("rcx") BYTES / 32 => _, in("rax") unit, inout("rdi") to.add(BYTES * 3 / 4) => _, options(nostack, preserves_flags));
        }
    }
    digest(&target)
}

/// `repne scasb` and `repe cmpsb` over 16 KiB per unit.
pub fn rep_scan(units: u64) -> u64 {
    const BYTES: usize = 16 << 10;
    let mut left = vec![1_u8; BYTES];
    let right = left.clone();
    let mut sum = 0;
    for unit in 0..units {
        let stop = BYTES - 1 - (unit as usize * 37) % 4096;
        left[stop] = 2;
        let (scanned, compared): (usize, usize);
        // SAFETY: both reads stay inside the `BYTES` bytes that each buffer has; the direction flag is clear by the ABI.
        unsafe {
            asm!("repne scasb", inout("rcx") BYTES => scanned, inout("rdi") left.as_ptr() => _, in("al") 2_u8, options(nostack, readonly));
            asm!("repe cmpsb", inout("rcx") BYTES => compared, inout("rsi") left.as_ptr() => _, inout("rdi") right.as_ptr() => _, options(nostack, readonly));
        }
        left[stop] = 1;
        sum = mix(sum, (scanned ^ (compared << 20)) as u64);
    }
    sum
}

/// A loop that moves 32 KiB per unit, a word at a time.
pub fn copy_loop(units: u64) -> u64 {
    const WORDS: usize = 4096;
    let source: Vec<u64> = random_bytes(WORDS, 47).into_iter().map(u64::from).collect();
    let mut target = vec![0_u64; WORDS];
    for unit in 0..units {
        for (to, from) in target.iter_mut().zip(&source) {
            // Opaque, or the compiler would make it a call of memcpy.
            *to = black_box(*from).wrapping_add(unit);
        }
    }
    target.iter().fold(0, |sum, word| mix(sum, *word))
}

/// The library's copy in sizes from 1 byte to 4 KiB.
pub fn memcpy(units: u64) -> u64 {
    const BYTES: usize = 8 << 10;
    let source = random_bytes(BYTES, 53);
    let mut target = vec![0_u8; BYTES];
    let mut random = Random::new(59);
    for _ in 0..units {
        let value = random.next() as usize;
        let length = (1 << (value % 13)) - (value >> 8) % (1 << (value % 13));
        let (from, to) = ((value >> 24) % 4096, (value >> 40) % 4096);
        black_box(&mut target)[to..to + length]
            .copy_from_slice(black_box(&source[from..from + length]));
    }
    digest(&target)
}
