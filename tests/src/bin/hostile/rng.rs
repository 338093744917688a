//! Random numbers from a seed, the same on every host.

/// A generator (splitmix64).
pub struct Rng(u64);

impl Rng {
    /// The generator of one case.
    pub fn new(seed: u64, case: u64) -> Rng {
        let mut rng = Rng(seed ^ case.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// True in `percent` of all cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    /// A number that is near something.
    pub fn interesting(&mut self) -> u64 {
        let near = self.below(0x40).wrapping_sub(0x20);
        match self.below(12) {
            0 => self.next(),
            1 => near,
            2 => self.below(super::world::RAM),
            3 => super::world::RAM.wrapping_add(near),
            4 => 0x1_0000_0000u64.wrapping_add(near),
            5 => (1u64 << 47).wrapping_add(near),
            6 => (u64::MAX << 47).wrapping_add(near),
            7 => 1 << self.below(64),
            8 => self.device(),
            9 => self.next() >> self.below(64),
            _ => self.below(0x100) << 12,
        }
    }

    /// An address of device memory, or near it.
    pub fn device(&mut self) -> u64 {
        let base = self.pick(&[
            0xfec0_0000,
            0xfee0_0000,
            0xe000_0000,
            0xe000_8000,
            0xe001_0000,
            0xe004_0000,
            0xc000_0000,
            0xc000_4000,
            0xc001_0000,
            0xa_0000,
            0xf_0000,
            0xffff_f000,
            0x40_0000_0000,
        ]);
        base + self.below(0x1000) / 4 * 4
    }
}
