//! Image formats and the one way to open an image of a stated format.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::backend::DiskBackend;
use crate::error::DiskError;
use crate::raw::{Access, RawFile};

/// How the bytes of a disk are laid out in its file. Stated by the user, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DiskFormat {
    /// The bytes of the file are the bytes of the disk.
    #[default]
    Raw,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskFormat::Raw => f.write_str("raw"),
        }
    }
}

impl FromStr for DiskFormat {
    type Err = DiskError;

    fn from_str(name: &str) -> Result<Self, DiskError> {
        match name {
            "raw" => Ok(DiskFormat::Raw),
            _ => Err(DiskError::UnknownFormat(name.to_owned())),
        }
    }
}

/// Opens the image at `path`, taking the lock that `access` needs.
pub fn open(
    path: &Path,
    format: DiskFormat,
    access: Access,
) -> Result<Arc<dyn DiskBackend>, DiskError> {
    match format {
        DiskFormat::Raw => Ok(Arc::new(RawFile::open(path, access)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_named() {
        assert_eq!("raw".parse::<DiskFormat>().unwrap(), DiskFormat::Raw);
        assert_eq!(DiskFormat::Raw.to_string(), "raw");
        let error = "vmdk".parse::<DiskFormat>().unwrap_err();
        assert_eq!(error.to_string(), "unknown disk format 'vmdk' (known: raw)");
    }
}
