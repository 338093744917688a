//! How hub and machine wake each other: a pair of connected sockets, an end for each.
//!
//! Not an eventfd: that is one open file, and whether it blocks is said of the file. A machine that was taken over could
//! have the hub wait in it. Of a pair each side has a file of its own, and no call here waits, whatever was said of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

/// Strokes taken at once. The other side may add some as fast as they are taken.
const STROKES_MAX: usize = 64;

/// The two ends.
///
/// # Errors
/// The host gives no descriptor.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Makes the other end readable.
pub(crate) fn ring(bell: impl AsFd) {
    // If there is no room, the other end is readable already; if that is closed, nobody listens.
    let _ = rustix::net::send(bell, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Makes this end unreadable, or takes a part of what makes it readable. False: the other end is closed.
pub(crate) fn silence(bell: impl AsFd) -> bool {
    for _ in 0..STROKES_MAX {
        match rustix::net::recv(&bell, &mut [0; 1], RecvFlags::DONTWAIT) {
            Ok((1.., _)) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Ok(_) | Err(_) => return false,
        }
    }
    true
}
