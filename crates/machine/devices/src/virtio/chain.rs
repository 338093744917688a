//! Descriptor chains: the buffers of one request, and cursors over their bytes.
//!
//! A chain's buffers are copied out of the ring when it is taken, so that a driver that changes the
//! descriptors afterwards changes nothing. The bytes themselves stay guest memory and are copied at
//! most once: a device must not read a field twice and expect the same answer.

use strata_memory::{Gpa, GuestMemory};

use super::QueueError;

/// One contiguous piece of guest memory in a chain. Its end does not overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub gpa: Gpa,
    /// Bytes; not zero.
    pub len: u32,
}

/// A request of the driver: what the device may read, then what it may write (virtio 1.2, 2.6.4).
/// Together at most `u32::MAX` bytes.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain that is neither completed nor given back is lost to the driver"]
pub struct Chain {
    pub(super) head: u16,
    pub(super) readable: Vec<Buffer>,
    pub(super) writable: Vec<Buffer>,
}

impl Chain {
    /// A cursor over what the driver wrote for the device.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> Reader<'a> {
        Reader(Cursor::new(memory, &self.readable))
    }

    /// A cursor over what the device may fill in.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> Writer<'a> {
        Writer {
            cursor: Cursor::new(memory, &self.writable),
            written: 0,
        }
    }

    /// Bytes that the device may fill in.
    pub fn writable_bytes(&self) -> u32 {
        total(&self.writable)
    }
}

fn total(buffers: &[Buffer]) -> u32 {
    buffers
        .iter()
        .fold(0, |sum, buffer| sum.saturating_add(buffer.len))
}

#[derive(Clone, Copy)]
struct Cursor<'a> {
    memory: &'a GuestMemory,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are behind the cursor.
    offset: u32,
    /// Bytes ahead of the cursor; may end before the buffers do.
    remaining: u32,
}

impl<'a> Cursor<'a> {
    fn new(memory: &'a GuestMemory, buffers: &'a [Buffer]) -> Self {
        Cursor {
            memory,
            buffers,
            offset: 0,
            remaining: total(buffers),
        }
    }

    /// Steps over at most `max` bytes of one buffer and returns where they are; `None` at the end.
    fn step(&mut self, max: usize) -> Option<(Gpa, u32)> {
        let (first, rest) = self.buffers.split_first()?;
        let max = u32::try_from(max).unwrap_or(u32::MAX);
        let len = (first.len - self.offset).min(self.remaining).min(max);
        let gpa = first
            .gpa
            .checked_add(u64::from(self.offset))
            .filter(|_| len > 0)?;
        self.offset += len;
        self.remaining -= len;
        if self.offset == first.len {
            (self.buffers, self.offset) = (rest, 0);
        }
        Some((gpa, len))
    }

    /// Steps over exactly `len` bytes, piece by piece, or does nothing if there are fewer.
    fn steps(
        &mut self,
        len: usize,
        mut each: impl FnMut(&GuestMemory, Gpa, std::ops::Range<usize>) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        if len > self.remaining as usize {
            return Err(QueueError::ChainTooShort);
        }
        let mut done = 0;
        while done < len {
            let (gpa, piece) = self.step(len - done).ok_or(QueueError::ChainTooShort)?;
            each(self.memory, gpa, done..done + piece as usize)?;
            done += piece as usize;
        }
        Ok(())
    }
}

/// Reads the device-readable bytes of a chain in order, whatever buffers they are spread over.
#[derive(Clone, Copy)]
pub struct Reader<'a>(Cursor<'a>);

impl Reader<'_> {
    /// Bytes not read yet.
    pub fn remaining(&self) -> u32 {
        self.0.remaining
    }

    /// Fills `buf`. [`QueueError::ChainTooShort`] without moving if there are fewer bytes.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), QueueError> {
        self.0
            .steps(buf.len(), |memory, gpa, range| match buf.get_mut(range) {
                Some(part) => Ok(memory.read(gpa, part)?),
                None => Err(QueueError::ChainTooShort),
            })
    }

    /// Reads an array; for fixed headers.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], QueueError> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Writes the device-writable bytes of a chain in order.
pub struct Writer<'a> {
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> Writer<'a> {
    /// Bytes not written yet.
    pub fn remaining(&self) -> u32 {
        self.cursor.remaining
    }

    /// Bytes written through this cursor: what the used ring wants to know.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Writes all of `bytes`. [`QueueError::ChainTooShort`] without writing if there is less room.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), QueueError> {
        self.cursor
            .steps(bytes.len(), |memory, gpa, range| match bytes.get(range) {
                Some(part) => Ok(memory.write(gpa, part)?),
                None => Err(QueueError::ChainTooShort),
            })?;
        self.written += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Cuts the last `len` bytes off into a cursor of their own; `None` if there are fewer.
    pub fn split_last(&mut self, len: u32) -> Option<Writer<'a>> {
        let kept = self.cursor.remaining.checked_sub(len)?;
        let mut last = Writer {
            cursor: self.cursor,
            written: 0,
        };
        let mut skip = kept;
        while skip > 0 {
            skip -= last.cursor.step(skip as usize)?.1;
        }
        self.cursor.remaining = kept;
        Some(last)
    }
}
