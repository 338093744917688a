//! A file's bytes with checked little-endian reads that say what was missing.

use crate::BootError;

/// A named byte string. All reads are bounds-checked and return [`BootError::Truncated`].
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> View<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// `len` bytes from `start`.
    pub(crate) fn slice(
        &self,
        field: &'static str,
        start: u64,
        len: u64,
    ) -> Result<&'a [u8], BootError> {
        let range = self.range(field, start, len)?;
        self.bytes
            .get(range)
            .ok_or_else(|| self.truncated(field, start, len))
    }

    /// The same as a range of indices, for callers that keep the bytes elsewhere.
    pub(crate) fn range(
        &self,
        field: &'static str,
        start: u64,
        len: u64,
    ) -> Result<std::ops::Range<usize>, BootError> {
        match start.checked_add(len) {
            // Both fit a usize because they are at most the slice's length.
            Some(end) if end <= self.len() => Ok(start as usize..end as usize),
            _ => Err(self.truncated(field, start, len)),
        }
    }

    pub(crate) fn array<const N: usize>(
        &self,
        field: &'static str,
        start: u64,
    ) -> Result<[u8; N], BootError> {
        let slice = self.slice(field, start, N as u64)?;
        slice
            .try_into()
            .map_err(|_| self.truncated(field, start, N as u64))
    }

    pub(crate) fn u8(&self, field: &'static str, at: u64) -> Result<u8, BootError> {
        self.array::<1>(field, at).map(|[byte]| byte)
    }

    pub(crate) fn u16(&self, field: &'static str, at: u64) -> Result<u16, BootError> {
        self.array(field, at).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, field: &'static str, at: u64) -> Result<u32, BootError> {
        self.array(field, at).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&self, field: &'static str, at: u64) -> Result<u64, BootError> {
        self.array(field, at).map(u64::from_le_bytes)
    }

    /// An error about the value of a field of this file.
    pub(crate) fn bad(
        &self,
        field: &'static str,
        value: impl Into<u64>,
        reason: &'static str,
    ) -> BootError {
        BootError::BadField {
            what: self.what,
            field,
            value: value.into(),
            reason,
        }
    }

    fn truncated(&self, field: &'static str, start: u64, len: u64) -> BootError {
        BootError::Truncated {
            what: self.what,
            field,
            start,
            end: start.saturating_add(len),
            len: self.len(),
        }
    }
}

/// Writes `value` into `buffer` at `at`. The callers' offsets are constants inside fixed-size tables; a write that
/// does not fit is dropped, which a test of the table would show.
pub(crate) fn put(buffer: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = at
        .checked_add(value.len())
        .and_then(|end| buffer.get_mut(at..end))
    {
        place.copy_from_slice(value);
    } else {
        debug_assert!(false, "a table field at {at:#x} lies outside its table");
    }
}
