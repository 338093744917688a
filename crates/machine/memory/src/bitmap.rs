//! One atomic bit per page: for watched pages and for the dirty log.

use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed number of bits, all clear at first; any thread may change any of them.
pub(crate) struct AtomicBitmap {
    words: Box<[AtomicU64]>,
}

impl AtomicBitmap {
    pub(crate) fn new(bits: u64) -> AtomicBitmap {
        let words = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
        AtomicBitmap {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn word(&self, bit: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(bit / 64).ok()?)?;
        Some((word, 1 << (bit % 64)))
    }

    /// Sets a bit; one past the end is ignored.
    pub(crate) fn set(&self, bit: u64) {
        if let Some((word, mask)) = self.word(bit) {
            // The read first keeps the cache line shared when the bit is already set, which is the usual case.
            if word.load(Ordering::SeqCst) & mask == 0 {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        }
    }

    /// Clears a bit; one past the end is ignored.
    pub(crate) fn clear(&self, bit: u64) {
        if let Some((word, mask)) = self.word(bit) {
            word.fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// Whether a bit is set; one past the end is not.
    pub(crate) fn get(&self, bit: u64) -> bool {
        self.word(bit)
            .is_some_and(|(word, mask)| word.load(Ordering::SeqCst) & mask != 0)
    }

    /// All bits, lowest first, leaving every one clear.
    pub(crate) fn take(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.swap(0, Ordering::SeqCst))
            .collect()
    }
}
