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
    #[error("unknown disk format '{0}' (known: raw, qcow2)")]
    UnknownFormat(String),
    /// No format was stated, and the file could be of more than one.
    #[error(
        "disk {} begins like a qcow2 image: say format=qcow2, or format=raw if these bytes are the disk's own",
        path.display()
    )]
    FormatNotStated {
        /// The file.
        path: PathBuf,
    },
    /// The file is not of the format that was stated.
    #[error("disk {} is not a {format} image", path.display())]
    NotOfFormat {
        /// The file.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// The image needs something that we do not have.
    #[error("disk {} needs {what}, which is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it needs.
        what: String,
    },
    /// The image contradicts itself or its file.
    #[error("disk {} is damaged: {reason}", path.display())]
    DamagedImage {
        /// The file.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// The image can be read, but must not be written as it is.
    #[error(
        "disk {} cannot be written: {reason}; repair it by `qemu-img check -r all`, or open it with `,ro`",
        path.display()
    )]
    NeedsRepair {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// An image names another file that it is built on, and the user did not.
    #[error(
        "disk {} is built on the file {}, which is not opened unless it is allowed by `backing={}`",
        path.display(), backing.display(), backing.display()
    )]
    BackingNotAllowed {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: PathBuf,
    },
    /// An image is built on another file and does not say how that is laid out.
    #[error(
        "disk {} does not say in which format its backing file is (set it by `qemu-img rebase -u -F FORMAT -b FILE`)",
        path.display()
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
    },
    /// The user allowed a file that no image is built on.
    #[error("disk {} is not built on {}", path.display(), backing.display())]
    BackingNotUsed {
        /// The image.
        path: PathBuf,
        /// The file allowed.
        backing: PathBuf,
    },
    /// An image names a file with its data that the user did not allow.
    #[error(
        "disk {} has its data in the file {}, which is not opened unless it is allowed by `data={}`",
        path.display(), data.display(), data.display()
    )]
    DataNotAllowed {
        /// The image.
        path: PathBuf,
        /// What it names.
        data: PathBuf,
    },
    /// The user allowed a file with the data of an image that has them itself.
    #[error("disk {} does not have its data in {}", path.display(), data.display())]
    DataNotUsed {
        /// The image.
        path: PathBuf,
        /// The file allowed.
        data: PathBuf,
    },
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
    /// The image contradicts itself where it is used.
    #[error("the disk's image is damaged: {reason}")]
    Damaged {
        /// How.
        reason: String,
    },
    /// An earlier change could not be carried out, and what the file holds is not known.
    #[error("the disk takes no more changes because of an earlier error")]
    Broken,
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
