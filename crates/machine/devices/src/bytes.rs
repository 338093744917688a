//! Little-endian access to register-sized byte slices, and locks that outlive a panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The value of up to 8 bytes; further bytes are ignored.
pub(crate) fn load_le(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Stores the low bytes of a value; bytes past the 8th become zero.
pub(crate) fn store_le(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
    for (to, from) in data.iter_mut().zip(bytes) {
        *to = from;
    }
}

/// Locks; a panic elsewhere under the lock does not spread, because devices keep no invariant across calls that
/// memory safety rests on.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
