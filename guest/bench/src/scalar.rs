//! Integer code as programs have it: arithmetic, branches, calls, data structures, memory access.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::{Mapping, Random, mix};

/// Multiplications, rotations and additions in one chain.
pub fn integer(units: u64) -> u64 {
    let (mut a, mut b) = (0x1234_5678_9abc_def0_u64, 0x0fed_cba9_8765_4321_u64);
    for unit in 0..units {
        a = a.wrapping_mul(5).wrapping_add(b ^ unit);
        b = b.rotate_left(7).wrapping_sub(a >> 3);
        a ^= b << 1;
    }
    mix(a, b)
}

/// Divisions of different widths.
pub fn divide(units: u64) -> u64 {
    let mut random = Random::new(3);
    let mut sum = 0_u64;
    for _ in 0..units {
        let value = random.next();
        let small = (value as u32) / ((value >> 50) as u32 + 1);
        sum = sum
            .wrapping_add(value / ((value & 0xffff) + 3))
            .wrapping_add(u64::from(small))
            ^ (value % 1_000_003);
    }
    sum
}

/// Branches that depend on data.
pub fn branches(units: u64) -> u64 {
    let mut random = Random::new(7);
    let mut counts = [0_u64; 6];
    for _ in 0..units {
        let value = black_box(random.next());
        if value & 1 == 0 {
            counts[0] += 1;
        } else if value & 6 == 6 {
            counts[1] += value & 0xff;
        } else if value % 5 == 1 {
            counts[2] ^= value;
        } else if value > u64::MAX / 3 {
            counts[3] += 3;
        } else if value & 0x80 != 0 {
            counts[4] = counts[4].wrapping_sub(value);
        } else {
            counts[5] += 1;
        }
    }
    counts.iter().fold(0, |sum, count| mix(sum, *count))
}

/// Sorting of 64 Ki numbers per unit, half by the library and half by a heap.
pub fn sort(units: u64) -> u64 {
    const COUNT: usize = 1 << 16;
    let mut random = Random::new(11);
    let mut sum = 0;
    for _ in 0..units {
        let mut numbers: Vec<u64> = (0..COUNT).map(|_| random.next()).collect();
        numbers[..COUNT / 2].sort_unstable();
        heap_sort(&mut numbers[COUNT / 2..]);
        sum = mix(sum, numbers[COUNT / 4] ^ numbers[COUNT * 3 / 4]);
    }
    sum
}

fn heap_sort(numbers: &mut [u64]) {
    let sift = |numbers: &mut [u64], mut root: usize| {
        loop {
            let mut child = 2 * root + 1;
            if child >= numbers.len() {
                return;
            }
            if child + 1 < numbers.len() && numbers[child] < numbers[child + 1] {
                child += 1;
            }
            if numbers[root] >= numbers[child] {
                return;
            }
            numbers.swap(root, child);
            root = child;
        }
    };
    for root in (0..numbers.len() / 2).rev() {
        sift(numbers, root);
    }
    for end in (1..numbers.len()).rev() {
        numbers.swap(0, end);
        sift(&mut numbers[..end], 0);
    }
}

/// Steps along a random cycle through 1 MiB.
pub fn pointer_chase(units: u64) -> u64 {
    const COUNT: usize = 1 << 18;
    let cycle = random_cycle(COUNT, 13);
    let mut at = 0_u32;
    for _ in 0..units {
        at = cycle[at as usize];
    }
    u64::from(at)
}

/// A permutation with one cycle (Sattolo's shuffle).
fn random_cycle(count: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let mut cycle: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        cycle.swap(last, random.below(last));
    }
    cycle
}

/// Look-ups and insertions in a hash table with open addressing.
pub fn hash(units: u64) -> u64 {
    const SLOTS: usize = 1 << 16;
    let mut table = vec![(0_u64, 0_u64); SLOTS];
    let mut random = Random::new(17);
    let mut sum = 0_u64;
    for _ in 0..units {
        let key = random.next() % (SLOTS as u64 / 2) + 1;
        let mut slot = (mix(0, key) >> 40) as usize % SLOTS;
        while table[slot].0 != key && table[slot].0 != 0 {
            slot = (slot + 1) % SLOTS;
        }
        table[slot].0 = key;
        table[slot].1 += key;
        sum = sum.wrapping_add(table[slot].1);
    }
    sum
}

/// The compression function of SHA-256 (FIPS 180-4, 6.2.2), one block per unit.
pub fn sha256(units: u64) -> u64 {
    let mut constants = [0_u32; 64];
    let mut random = Random::new(19);
    // Any constants do the same work; these spare a table.
    constants
        .iter_mut()
        .for_each(|constant| *constant = random.next() as u32);
    let mut state: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    for unit in 0..units {
        let mut words = [0_u32; 64];
        for (index, word) in words.iter_mut().take(16).enumerate() {
            *word = (unit as u32).wrapping_mul(index as u32 + 1);
        }
        for index in 16..64 {
            let (x, y) = (words[index - 15], words[index - 2]);
            let s0 = x.rotate_right(7) ^ x.rotate_right(18) ^ (x >> 3);
            let s1 = y.rotate_right(17) ^ y.rotate_right(19) ^ (y >> 10);
            words[index] = words[index - 16]
                .wrapping_add(s0)
                .wrapping_add(words[index - 7])
                .wrapping_add(s1);
        }
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
        for (word, constant) in words.iter().zip(&constants) {
            let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let choice = (e & f) ^ (!e & g);
            let t1 = h
                .wrapping_add(s1)
                .wrapping_add(choice)
                .wrapping_add(*constant)
                .wrapping_add(*word);
            let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let majority = (a & b) ^ (a & c) ^ (b & c);
            (h, g, f, e, d, c, b, a) = (
                g,
                f,
                e,
                d.wrapping_add(t1),
                c,
                b,
                a,
                t1.wrapping_add(s0.wrapping_add(majority)),
            );
        }
        for (sum, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *sum = sum.wrapping_add(value);
        }
    }
    state.iter().fold(0, |sum, word| mix(sum, u64::from(*word)))
}

/// Counts, scans and shuffles of bits.
pub fn bits(units: u64) -> u64 {
    let mut random = Random::new(23);
    let mut sum = 0_u64;
    for _ in 0..units {
        let value = random.next();
        sum = sum.wrapping_add(u64::from(
            value.count_ones() + value.leading_zeros() * 3 + value.trailing_zeros() * 5,
        ));
        sum ^= value.swap_bytes() >> 7;
        sum = sum.rotate_right(value as u32 & 63);
    }
    sum
}

/// Words, numbers and searches in 16 KiB of text per unit.
pub fn strings(units: u64) -> u64 {
    let mut random = Random::new(29);
    let text: String = (0..2_000)
        .map(|_| format!("{:x} ", random.next() % 0xff_ffff))
        .collect();
    let mut sum = 0;
    for unit in 0..units {
        let text = black_box(text.as_str());
        let mut letters = 0_u64;
        for (index, word) in text.split(' ').enumerate() {
            match u64::from_str_radix(word, 16) {
                Ok(number) if number % 64 == unit % 64 => sum = mix(sum, number),
                _ => {
                    letters += word.bytes().filter(u8::is_ascii_alphabetic).count() as u64
                        + index as u64 % 3
                }
            }
        }
        let found = text.rfind("beef").unwrap_or_default() + text.find("cafe").unwrap_or_default();
        sum = mix(
            sum,
            letters
                + found as u64
                + text
                    .to_ascii_uppercase()
                    .bytes()
                    .map(u64::from)
                    .sum::<u64>(),
        );
    }
    sum
}

/// Calls through a table of functions.
pub fn indirect_calls(units: u64) -> u64 {
    type Step = fn(u64) -> u64;
    const STEPS: [Step; 8] = [
        |x| x.wrapping_add(1),
        |x| x ^ 0x55,
        |x| x.rotate_left(3),
        |x| x.wrapping_mul(9),
        |x| !x,
        |x| x.wrapping_sub(x >> 5),
        |x| x.swap_bytes(),
        |x| x ^ (x << 2),
    ];
    let steps = black_box(STEPS);
    let mut random = Random::new(33);
    let order: [u8; 256] = std::array::from_fn(|_| random.next() as u8 & 7);
    let mut value = 1_u64;
    for unit in 0..units {
        value = steps[usize::from(order[unit as usize & 255])](value);
    }
    value
}

/// A small byte-code interpreter: one dispatch per unit.
pub fn interpreter(units: u64) -> u64 {
    let mut random = Random::new(31);
    let program: Vec<u8> = (0..1024).map(|_| random.next() as u8 % 12).collect();
    let program = black_box(program);
    let mut stack = [1_u64; 16];
    let (mut at, mut top, mut sum) = (0_usize, 0_usize, 0_u64);
    for _ in 0..units {
        let (a, b) = (stack[top], stack[(top + 1) % 16]);
        match program[at] {
            0 => stack[top] = a.wrapping_add(b),
            1 => stack[top] = a.wrapping_sub(b),
            2 => stack[top] = a ^ b,
            3 => stack[top] = a.wrapping_mul(b | 1),
            4 => top = (top + 1) % 16,
            5 => top = (top + 15) % 16,
            6 => stack[top] = a >> (b & 31),
            7 => at = (at + (a as usize & 3)) % 1024,
            8 => stack[top] = u64::from(a < b),
            9 => stack.swap(top, (top + 5) % 16),
            10 => sum = sum.wrapping_add(a),
            _ => stack[top] = a.wrapping_add(at as u64),
        }
        at = (at + 1) % 1024;
    }
    mix(sum, stack[top])
}

/// Calls and returns: a Fibonacci number per unit, without memory of the ones before.
pub fn recursion(units: u64) -> u64 {
    fn fibonacci(n: u64) -> u64 {
        if black_box(n) < 2 {
            n
        } else {
            fibonacci(n - 1) + fibonacci(n - 2)
        }
    }
    (0..units).fold(0, |sum, unit| mix(sum, fibonacci(24 + (unit & 1))))
}

/// One access per page, in random order over 64 MiB.
pub fn tlb_misses(units: u64) -> u64 {
    const PAGES: usize = 1 << 14;
    let memory = Mapping::new(PAGES * 4096);
    let cycle = random_cycle(PAGES, 37);
    for page in 0..PAGES {
        memory.write(page * 4096, page as u8);
    }
    let (mut at, mut sum) = (0_usize, 0_u64);
    for _ in 0..units {
        // Different lines of the pages, so that it is the TLB that misses and not one set of the cache.
        sum = sum.wrapping_add(u64::from(memory.read(at * 4096 + (at & 63) * 64)));
        at = cycle[at] as usize;
    }
    mix(sum, at as u64)
}

/// Locked operations: exchange-and-add, compare-and-exchange, exchange.
pub fn locked(units: u64) -> u64 {
    let (counter, cell) = (AtomicU64::new(0), AtomicU64::new(1));
    for unit in 0..units {
        let before = counter.fetch_add(unit | 1, Ordering::SeqCst);
        let seen = cell.load(Ordering::Relaxed);
        if cell
            .compare_exchange(seen, seen ^ before, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            return 0;
        }
        counter.fetch_xor(
            cell.swap(before.rotate_left(9), Ordering::SeqCst) & 0xff,
            Ordering::SeqCst,
        );
    }
    mix(counter.into_inner(), cell.into_inner())
}
