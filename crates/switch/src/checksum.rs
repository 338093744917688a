//! The Internet checksum (RFC 1071).

/// Sum of `bytes` as big-endian 16-bit words in one's complement, not yet folded. An odd byte counts as a word's first.
pub fn sum(bytes: &[u8]) -> u64 {
    // Sums of native words have the same bytes as the sum of big-endian ones (RFC 1071 section 2), so the order is
    // restored once at the end.
    let (words, rest) = bytes.as_chunks::<8>();
    let mut sum = 0u64;
    let mut carries = 0u64;
    for word in words {
        let (next, carry) = sum.overflowing_add(u64::from_ne_bytes(*word));
        sum = next;
        carries += u64::from(carry);
    }
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    let (next, carry) = sum.overflowing_add(u64::from_ne_bytes(last));
    carries += u64::from(carry);
    let wide = u128::from(next) + u128::from(carries);
    let folded = (wide >> 64) as u64;
    let low = wide as u64;
    let half = (low >> 32) + (low & 0xffff_ffff) + folded;
    u64::from(u16::from_be(fold(half)))
}

/// Folds a sum to 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The checksum of `bytes`: complement of the folded sum.
pub fn of(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// Sum of the pseudo-header of a transport packet of `len` bytes between these addresses (4 or 16 bytes each).
pub fn pseudo_header(source: &[u8], destination: &[u8], protocol: u8, len: usize) -> u64 {
    sum(source) + sum(destination) + u64::from(protocol) + len as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        fold(sum)
    }

    proptest! {
        #[test]
        fn the_wide_sum_is_the_plain_one(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (wide, plain) = (fold(sum(&bytes)), plain(&bytes));
            // Zero has two forms in one's complement.
            prop_assert!(wide == plain || (wide % 0xffff == 0 && plain % 0xffff == 0));
        }
    }

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(
            fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])),
            0xddf2
        );
    }
}
