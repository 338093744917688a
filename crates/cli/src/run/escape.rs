//! The escape sequence, by which a user leaves a console whose every other key goes to the guest.

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// What is said when a console opens.
pub const HINT: &str = "escape with Ctrl-] q";

/// Watches what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last byte was the escape character.
    pending: bool,
}

impl Escape {
    /// Appends to `out` what of `typed` goes to the guest. True if the user wants to leave: what follows is dropped.
    ///
    /// Ctrl-] q leaves, Ctrl-] Ctrl-] is one Ctrl-], and Ctrl-] before anything else is typed as it is.
    pub fn feed(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => self.pending = true,
                (true, b'q' | b'Q') => return true,
                (true, ESCAPE) => out.push(ESCAPE),
                (true, byte) => out.extend([ESCAPE, byte]),
                (false, byte) => out.push(byte),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(pieces: &[&[u8]], expected: &[u8], leaves: bool) {
        let (mut escape, mut out) = (Escape::default(), Vec::new());
        let left = pieces.iter().any(|piece| escape.feed(piece, &mut out));
        assert_eq!((out.as_slice(), left), (expected, leaves), "{pieces:?}");
    }

    #[test]
    fn sequences() {
        check(&[b"ls\r\x03"], b"ls\r\x03", false);
        check(&[b"a\x1dqb"], b"a", true);
        check(&[b"a\x1d", b"q"], b"a", true);
        check(&[b"\x1d\x1dq"], b"\x1dq", false);
        check(&[b"\x1d", b"x"], b"\x1dx", false);
        check(&[b"\x1d"], b"", false);
    }

    proptest! {
        #[test]
        fn what_has_no_escape_passes(pieces: Vec<Vec<u8>>) {
            let (mut escape, mut out) = (Escape::default(), Vec::new());
            let pieces: Vec<Vec<u8>> = pieces
                .into_iter()
                .map(|piece| piece.into_iter().filter(|byte| *byte != ESCAPE).collect())
                .collect();
            for piece in &pieces {
                prop_assert!(!escape.feed(piece, &mut out));
            }
            prop_assert_eq!(out, pieces.concat());
        }
    }
}
