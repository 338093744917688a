//! The last bytes a console printed, for the report of a crash.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes kept.
const CAPACITY: usize = 64 << 10;

/// Keeps the end of what was written to it. Clones share the content.
#[derive(Clone, Debug, Default)]
pub struct ConsoleRing {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl ConsoleRing {
    /// Appends what the guest printed.
    pub fn push(&self, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let data = data
            .get(data.len().saturating_sub(CAPACITY)..)
            .unwrap_or_default();
        let excess = (bytes.len() + data.len()).saturating_sub(CAPACITY);
        bytes.drain(..excess);
        bytes.extend(data);
    }

    /// The last `count` lines kept that are not empty, without control characters: safe to print to a terminal.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = {
            let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            bytes.iter().copied().collect()
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines.drain(..lines.len().saturating_sub(count));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end() {
        let ring = ConsoleRing::default();
        ring.push(b"one\r\ntwo\r\n\r\n\x1b[1mthree\r\nfour");
        assert_eq!(ring.tail(2), ["[1mthree", "four"]);
        ring.push(&[b'x'; CAPACITY + 5]);
        assert_eq!(ring.tail(9), ["x".repeat(CAPACITY)]);
        ring.push(b"\nend");
        assert_eq!(ring.tail(1), ["end"]);
    }
}
