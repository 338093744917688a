//! Buffers that are used again, so that forwarding a frame allocates nothing.

use crate::frame::{Frame, HEADROOM};

/// Capacity of a small buffer: a frame of an ordinary MTU with room for tags and tunnel headers.
const SMALL: usize = 2048;
/// Capacity up to which a buffer is worth keeping.
const LARGE: usize = 70_000;

/// A bounded store of free buffers. Not shared: each thread that makes frames has its own.
#[derive(Debug)]
pub struct Pool {
    small: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    limit: usize,
}

impl Pool {
    /// Keeps at most `limit` small buffers (2 KiB) and an eighth as many large ones (70 KB).
    pub fn new(limit: usize) -> Pool {
        Pool {
            small: Vec::new(),
            large: Vec::new(),
            limit,
        }
    }

    /// A frame of `len` bytes with headroom. The bytes are those of some earlier frame or zeros: fill them all.
    pub fn frame(&mut self, len: usize) -> Frame {
        let whole = len.saturating_add(HEADROOM);
        let (store, capacity) = if whole <= SMALL {
            (&mut self.small, SMALL)
        } else {
            (&mut self.large, LARGE.max(whole))
        };
        let mut buffer = store.pop().unwrap_or_else(|| Vec::with_capacity(capacity));
        buffer.resize(whole, 0);
        Frame::from_buffer(buffer, HEADROOM)
    }

    /// A frame of its own with these bytes.
    pub fn copy(&mut self, bytes: &[u8]) -> Frame {
        let mut frame = self.frame(bytes.len());
        frame.bytes_mut().copy_from_slice(bytes);
        frame
    }

    /// The same frame once more, offload and all.
    pub fn duplicate(&mut self, frame: &Frame) -> Frame {
        let mut copy = self.copy(frame.bytes());
        copy.offload = frame.offload;
        copy
    }

    /// Takes a frame's buffer back.
    pub fn put(&mut self, frame: Frame) {
        let buffer = frame.into_buffer();
        let (store, limit) = match buffer.capacity() {
            SMALL..=4096 => (&mut self.small, self.limit),
            LARGE..=131_072 => (&mut self.large, self.limit / 8),
            _ => return,
        };
        if store.len() < limit {
            store.push(buffer);
        }
    }
}
