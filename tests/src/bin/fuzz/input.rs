//! Inputs: numbers read from bytes, changes of bytes, and sums that tell endings apart.

/// Reads an input. What is not there any more is zero.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A number of `count` bytes.
    pub fn number(&mut self, count: usize) -> u64 {
        self.take(count)
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// A number whose size the input chooses: small ones are as likely as great ones.
    pub fn any(&mut self) -> u64 {
        let kind = self.byte();
        let value = self.number(usize::from(kind & 7) + 1);
        match kind >> 5 {
            0 => value,
            1 => value.wrapping_neg(),
            2 => 1u64 << (value & 63),
            3 => (1u64 << (value & 63)) - 1,
            4 => u64::from(u32::MAX).wrapping_sub(value & 0xff),
            _ => value & 0xffff,
        }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number(2) % end.max(1)
    }
}

/// Puts inputs together.
#[derive(Default)]
pub struct Script(pub Vec<u8>);

impl Script {
    pub fn byte(mut self, value: u8) -> Script {
        self.0.push(value);
        self
    }

    pub fn number(mut self, value: u64, count: usize) -> Script {
        self.0.extend(value.to_le_bytes().iter().take(count));
        self
    }

    /// As [`Input::any`] reads it.
    pub fn any(self, value: u64) -> Script {
        self.byte(7).number(value, 8)
    }
}

/// A sum of how an input went.
#[derive(Clone, Copy)]
pub struct Sum(pub u64);

impl Sum {
    pub fn new() -> Sum {
        Sum(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(&mut self, value: u64) {
        self.0 = (self.0 ^ value)
            .wrapping_mul(0x100_0000_01b3)
            .rotate_left(5);
    }

    /// A text without its numbers: errors of one kind are alike.
    pub fn text(&mut self, text: &str) {
        for byte in text.bytes().filter(|byte| !byte.is_ascii_digit()) {
            self.add(u64::from(byte));
        }
    }
}

/// Random numbers from a seed, the same on every host (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }

    /// Changes an input in one to eight places.
    pub fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(8) {
            let length = input.len() as u64;
            let at = self.below(length + 1) as usize;
            match self.below(10) {
                0 => {
                    let count = self.below(16) as usize + 1;
                    let bytes: Vec<u8> = (0..count).map(|_| self.next() as u8).collect();
                    input.splice(at..at, bytes);
                }
                1 => {
                    let end = (at + self.below(32) as usize).min(input.len());
                    input.drain(at..end);
                }
                2 => {
                    let from = self.below(other.len() as u64 + 1) as usize;
                    let to = (from + self.below(256) as usize).min(other.len());
                    input.splice(
                        at..at,
                        other.get(from..to).unwrap_or_default().iter().copied(),
                    );
                }
                3 => {
                    let end = (at + self.below(128) as usize).min(input.len());
                    let again: Vec<u8> = input.get(at..end).unwrap_or_default().to_vec();
                    input.splice(at..at, again);
                }
                4 | 5 => self.put(input, at),
                6 => input.truncate(input.len() - (self.below(8) as usize).min(input.len())),
                _ => {
                    let bit = 1 << self.below(8);
                    if let Some(byte) = input.get_mut(at) {
                        *byte ^= bit;
                    }
                }
            }
        }
    }

    /// Puts a number that is near something over what is there.
    fn put(&mut self, input: &mut [u8], at: usize) {
        let near = self.below(17).wrapping_sub(8);
        let value = match self.below(6) {
            0 => near,
            1 => (1u64 << self.below(64)).wrapping_add(near),
            2 => u64::from(u32::MAX).wrapping_add(near),
            3 => 1u64 << 63,
            4 => self.below(0x100) << 12,
            _ => self.next(),
        };
        let size = 1 << self.below(4);
        let mut bytes = value.to_le_bytes();
        if self.below(4) == 0 {
            bytes[..size].reverse();
        }
        for (byte, new) in input.iter_mut().skip(at).zip(&bytes[..size]) {
            *byte = *new;
        }
    }
}
