//! What can go wrong with a disk.

use std::io;
use std::path::PathBuf;

use crate::backend::SECTOR_SIZE;

/// An error of opening or using a disk. The first variants can only come from opening.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file cannot be opened or examined.
    #[error("cannot open disk {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path names something that is neither a regular file nor a block device.
    #[error("disk {} is neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// Another machine has the disk open in a way that excludes this one.
    #[error("disk {} is in use by another machine", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file has no bytes.
    #[error("disk {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file's size is not a whole number of sectors. Rounding would hide a truncated image.
    #[error(
        "disk {} has {size} bytes, which is not a multiple of {SECTOR_SIZE}: it is truncated or not a raw disk",
        path.display()
    )]
    UnalignedSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The name of a format is not one of ours.
    #[error("unknown disk format '{0}' (known: raw)")]
    UnknownFormat(String),
    /// The temporary file of an overlay cannot be made.
    #[error("cannot create a temporary disk file in {}", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bytes asked for do not all lie inside the disk.
    #[error("{len} bytes at offset {offset} are outside the disk of {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A change was asked of a disk that is open for reading only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host could not do it.
    #[error("cannot {operation} {len} bytes at offset {offset} of the disk")]
    Io {
        /// What was being done, as a verb.
        operation: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    /// For `map_err`: an I/O error with what was being done.
    pub(crate) fn io(
        operation: &'static str,
        offset: u64,
        len: u64,
    ) -> impl FnOnce(io::Error) -> DiskError {
        move |source| DiskError::Io {
            operation,
            offset,
            len,
            source,
        }
    }
}
