//! Locks on image files, so that two machines do not change one disk.
//!
//! They are advisory locks of the open file (`F_OFD_SETLK`), taken on the bytes that QEMU uses for the same purpose: a
//! machine of ours and a tool of QEMU's keep each other away too. Byte 100 + n says "I do n", byte 200 + n says "nobody
//! else may do n". All locks are shared ones, so that a file open for reading can hold them; a conflict shows when
//! somebody else holds the opposite byte.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock};

use crate::raw::Access;

const DOES: i64 = 100;
const ALLOWS_NOT: i64 = 200;

const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks `file` for as long as it is open. False if somebody else has it open in a way that excludes this.
pub(crate) fn lock(file: &File, access: Access) -> io::Result<bool> {
    let mine: &[i64] = match access {
        Access::ReadOnly => &[READ],
        Access::ReadWrite => &[READ, WRITE, RESIZE],
    };
    let others_not = [WRITE, RESIZE];
    // First everything is taken, then conflicts are looked for: of two that come at once, at least one sees the other.
    for byte in bytes(mine, DOES).chain(bytes(&others_not, ALLOWS_NOT)) {
        if !set(file, byte)? {
            return Ok(false);
        }
    }
    for byte in bytes(mine, ALLOWS_NOT).chain(bytes(&others_not, DOES)) {
        if held_by_others(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn bytes(what: &[i64], base: i64) -> impl Iterator<Item = i64> + '_ {
    what.iter().map(move |what| base + what)
}

fn request(kind: i32, byte: i64) -> flock {
    flock {
        l_type: kind as i16,
        l_whence: SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: &File, byte: i64) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&request(F_RDLCK, byte))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn held_by_others(file: &File, byte: i64) -> io::Result<bool> {
    let mut found = request(F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != F_UNLCK)
}
