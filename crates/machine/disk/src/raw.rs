//! Raw images: a regular file or a block device whose bytes are the disk's bytes.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;

use crate::backend::{DiskBackend, SECTOR_SIZE, check_range, len_of};
use crate::error::DiskError;
use crate::lock::lock;

/// Zeroes are written in pieces of this many bytes where the host has no call for it.
const ZERO_PIECE_BYTES: usize = 64 << 10;

/// What a disk is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reading, shared with other readers; excludes writers.
    ReadOnly,
    /// Reading and writing; excludes everyone else.
    ReadWrite,
}

/// A raw disk on a file or block device of the host.
///
/// While it is open it holds an advisory lock, which QEMU's tools respect too: shared for reading, exclusive for writing.
/// A file that shrinks behind our back gives [`DiskError::Io`] for the bytes that are gone.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
    access: Access,
}

/// An image file or block device of the host, open and locked.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: File,
    /// Its size in bytes.
    pub(crate) len: u64,
    /// Whether it is a regular file, not a block device.
    pub(crate) regular: bool,
}

impl OpenFile {
    /// Opens what is at `path` and locks it. Never changes it.
    pub(crate) fn open(path: &Path, access: Access) -> Result<OpenFile, DiskError> {
        let open_error = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            // A FIFO must be refused, not waited for.
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(path)
            .map_err(open_error)?;
        let file_type = file.metadata().map_err(open_error)?.file_type();
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(DiskError::NotADisk {
                path: path.to_owned(),
            });
        }
        if !lock(&file, access).map_err(open_error)? {
            return Err(DiskError::Locked {
                path: path.to_owned(),
            });
        }
        // The end is sought because the metadata of a block device gives no size.
        let len = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        Ok(OpenFile {
            file,
            len,
            regular: file_type.is_file(),
        })
    }

    /// Whether it begins with these bytes.
    pub(crate) fn starts_with(&self, magic: &[u8; 4]) -> bool {
        let mut start = [0; 4];
        self.file.read_exact_at(&mut start, 0).is_ok() && start == *magic
    }
}

impl RawFile {
    /// Opens the disk at `path` and locks it. Never changes the file, whatever it holds.
    pub fn open(path: &Path, access: Access) -> Result<RawFile, DiskError> {
        RawFile::new(OpenFile::open(path, access)?, path, access)
    }

    pub(crate) fn new(open: OpenFile, path: &Path, access: Access) -> Result<RawFile, DiskError> {
        let OpenFile {
            file, len: size, ..
        } = open;
        if size == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
            });
        }
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::UnalignedSize {
                path: path.to_owned(),
                size,
            });
        }
        Ok(RawFile { file, size, access })
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.readonly() {
            return Err(DiskError::ReadOnly);
        }
        check_range(offset, len, self.size)
    }
}

impl DiskBackend for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn readonly(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_range(offset, len_of(buf), self.size)?;
        let len = len_of(buf);
        self.file
            .read_exact_at(buf, offset)
            .map_err(DiskError::io("read", offset, len))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.check_change(offset, len_of(buf))?;
        self.file
            .write_all_at(buf, offset)
            .map_err(DiskError::io("write", offset, len_of(buf)))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.readonly() {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(DiskError::io("flush", 0, self.size))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change(offset, len)?;
        // Only a hint: a host that cannot punch holes simply keeps the bytes.
        punch_hole(&self.file, offset, len)
            .map(|_| ())
            .map_err(DiskError::io("discard", offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.check_change(offset, len)?;
        zero_range(&self.file, offset, len, may_unmap).map_err(DiskError::io("zero", offset, len))
    }
}

/// Gives the space of a range back to the host; the range then reads as zeroes.
/// False if the host cannot do that for this file.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    try_fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        offset,
        len,
    )
}

/// Makes a range of a file read as zeroes, by the cheapest means the host has.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
    if may_unmap && punch_hole(file, offset, len)? {
        return Ok(());
    }
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    if try_fallocate(file, flags, offset, len)? {
        return Ok(());
    }
    let zeroes = [0; ZERO_PIECE_BYTES];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(ZERO_PIECE_BYTES as u64);
        file.write_all_at(
            zeroes.get(..piece as usize).unwrap_or(&zeroes),
            offset + done,
        )?;
        done += piece;
    }
    Ok(())
}

/// `fallocate`, with "the host cannot" told apart from failure.
fn try_fallocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
    if len == 0 {
        return Ok(true);
    }
    loop {
        match fallocate(file, flags, offset, len) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => return Ok(false),
            // Block devices refuse ranges that are not aligned to their blocks.
            Err(Errno::INVAL) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::NamedTempFile;

    fn image(size: usize) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&(0..size).map(|i| i as u8).collect::<Vec<_>>())
            .unwrap();
        file
    }

    #[test]
    fn reads_and_writes() {
        let file = image(4096);
        let disk = RawFile::open(file.path(), Access::ReadWrite).unwrap();
        assert_eq!((disk.size(), disk.readonly()), (4096, false));
        disk.write_at(1000, b"hello").unwrap();
        disk.flush().unwrap();
        let mut buf = [0; 7];
        disk.read_at(999, &mut buf).unwrap();
        assert_eq!(&buf, &[231, b'h', b'e', b'l', b'l', b'o', 237]);
        disk.write_zeroes(512, 1024, true).unwrap();
        disk.write_zeroes(2048, 3, false).unwrap();
        let content = std::fs::read(file.path()).unwrap();
        assert_eq!(content.len(), 4096);
        assert!(content[512..1536].iter().all(|b| *b == 0));
        assert_eq!(content[511], 255);
        assert_eq!(content[1536..1538], [0, 1]);
        assert_eq!(content[2047..2052], [255, 0, 0, 0, 3]);
        disk.discard(0, 4096).unwrap();
    }

    #[test]
    fn refuses_what_lies_outside() {
        let file = image(1024);
        let disk = RawFile::open(file.path(), Access::ReadWrite).unwrap();
        let mut buf = [0; 2];
        for offset in [1023, 1024, u64::MAX] {
            assert!(matches!(
                disk.read_at(offset, &mut buf),
                Err(DiskError::OutOfRange { .. })
            ));
            assert!(matches!(
                disk.write_at(offset, &buf),
                Err(DiskError::OutOfRange { .. })
            ));
            assert!(matches!(
                disk.discard(offset, 2),
                Err(DiskError::OutOfRange { .. })
            ));
            assert!(matches!(
                disk.write_zeroes(offset, 2, true),
                Err(DiskError::OutOfRange { .. })
            ));
        }
        assert!(disk.read_at(1024, &mut []).is_ok());
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 1024);
    }

    #[test]
    fn read_only_refuses_changes() {
        let file = image(1024);
        let disk = RawFile::open(file.path(), Access::ReadOnly).unwrap();
        assert!(matches!(disk.write_at(0, b"x"), Err(DiskError::ReadOnly)));
        assert!(matches!(disk.discard(0, 512), Err(DiskError::ReadOnly)));
        assert!(matches!(
            disk.write_zeroes(0, 512, true),
            Err(DiskError::ReadOnly)
        ));
        disk.flush().unwrap();
    }

    #[test]
    fn locks() {
        let file = image(1024);
        let reader = RawFile::open(file.path(), Access::ReadOnly).unwrap();
        let second = RawFile::open(file.path(), Access::ReadOnly).unwrap();
        let refused = RawFile::open(file.path(), Access::ReadWrite).unwrap_err();
        assert!(
            refused
                .to_string()
                .ends_with("is in use by another machine"),
            "{refused}"
        );
        drop((reader, second));
        let writer = RawFile::open(file.path(), Access::ReadWrite).unwrap();
        assert!(matches!(
            RawFile::open(file.path(), Access::ReadOnly),
            Err(DiskError::Locked { .. })
        ));
        drop(writer);
        RawFile::open(file.path(), Access::ReadOnly).unwrap();
    }

    #[test]
    fn refuses_what_is_no_disk() {
        for (size, expect) in [
            (0, "is empty"),
            (1, "not a multiple of 512"),
            (1000, "truncated"),
        ] {
            let file = image(size);
            let error = RawFile::open(file.path(), Access::ReadOnly).unwrap_err();
            assert!(error.to_string().contains(expect), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            RawFile::open(dir.path(), Access::ReadOnly),
            Err(DiskError::NotADisk { .. })
        ));
        assert!(matches!(
            RawFile::open(Path::new("/dev/null"), Access::ReadOnly),
            Err(DiskError::NotADisk { .. })
        ));
        assert!(matches!(
            RawFile::open(&dir.path().join("absent"), Access::ReadOnly),
            Err(DiskError::Open { .. })
        ));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let file = image(8192);
        let disk = RawFile::open(file.path(), Access::ReadOnly).unwrap();
        file.as_file().set_len(4096).unwrap();
        let mut buf = [0; 4096];
        disk.read_at(0, &mut buf).unwrap();
        assert!(matches!(
            disk.read_at(4096, &mut buf),
            Err(DiskError::Io { .. })
        ));
    }
}
