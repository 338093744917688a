//! Image formats and the one way to open an image of a stated format.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::backend::DiskBackend;
use crate::error::DiskError;
use crate::qcow2::{self, Below, Qcow2};
use crate::raw::{Access, OpenFile, RawFile};

/// How the bytes of a disk are laid out in its file. Stated by the user, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DiskFormat {
    /// The bytes of the file are the bytes of the disk.
    #[default]
    Raw,
    /// QEMU's format: grows with its content, can be built on another file.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskFormat::Raw => f.write_str("raw"),
            DiskFormat::Qcow2 => f.write_str("qcow2"),
        }
    }
}

impl FromStr for DiskFormat {
    type Err = DiskError;

    fn from_str(name: &str) -> Result<Self, DiskError> {
        match name {
            "raw" => Ok(DiskFormat::Raw),
            "qcow2" => Ok(DiskFormat::Qcow2),
            _ => Err(DiskError::UnknownFormat(name.to_owned())),
        }
    }
}

/// What is opened, and how.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The file or block device.
    pub path: &'a Path,
    /// Its format. If none is stated it is raw, and refused if it could be something else.
    pub format: Option<DiskFormat>,
    /// Whether it is written.
    pub access: Access,
    /// The files that it may be built on, from the uppermost down. They are only read, and all must be used.
    pub backing: &'a [PathBuf],
    /// The file that may have the data of an image that has them elsewhere. It must be used.
    pub data: Option<&'a Path>,
}

/// Opens an image and what it is built on, taking the locks that this needs.
pub fn open(source: &Source<'_>) -> Result<Arc<dyn DiskBackend>, DiskError> {
    let Source { path, access, .. } = *source;
    let open = OpenFile::open(path, access)?;
    let format = match source.format {
        Some(format) => format,
        None if open.starts_with(&qcow2::MAGIC) => {
            return Err(DiskError::FormatNotStated {
                path: path.to_owned(),
            });
        }
        None => DiskFormat::Raw,
    };
    let mut unused = source.backing.first();
    let mut unused_data = source.data;
    let disk: Arc<dyn DiskBackend> = match format {
        DiskFormat::Raw => Arc::new(RawFile::new(open, path, access)?),
        DiskFormat::Qcow2 => {
            let below = |below: &Below| {
                unused = None;
                open_below(path, below, source.backing)
            };
            let outside = |named: &Path| {
                let allowed = unused_data.take().filter(|data| is_same_file(data, named));
                let data = allowed.ok_or_else(|| DiskError::DataNotAllowed {
                    path: path.to_owned(),
                    data: named.to_owned(),
                })?;
                OpenFile::open(data, access)
            };
            Arc::new(Qcow2::open(open, path, access, below, outside)?)
        }
    };
    if let Some(data) = unused_data {
        return Err(DiskError::DataNotUsed {
            path: path.to_owned(),
            data: data.to_owned(),
        });
    }
    match unused {
        Some(backing) => Err(DiskError::BackingNotUsed {
            path: path.to_owned(),
            backing: backing.clone(),
        }),
        None => Ok(disk),
    }
}

/// Opens what the image at `path` says it is built on, if that is the first of the files `allowed`.
fn open_below(
    path: &Path,
    below: &Below,
    allowed: &[PathBuf],
) -> Result<Arc<dyn DiskBackend>, DiskError> {
    let not_allowed = || DiskError::BackingNotAllowed {
        path: path.to_owned(),
        backing: below.path.clone(),
    };
    let (first, rest) = allowed.split_first().ok_or_else(not_allowed)?;
    if !is_same_file(first, &below.path) {
        return Err(not_allowed());
    }
    let format = below.format.as_deref().and_then(|name| name.parse().ok());
    let format = format.ok_or_else(|| DiskError::BackingFormat {
        path: path.to_owned(),
    })?;
    open(&Source {
        path: first,
        format: Some(format),
        access: Access::ReadOnly,
        backing: rest,
        data: None,
    })
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).map(|data| (data.dev(), data.ino()));
    match (identity(one), identity(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_named() {
        assert_eq!("raw".parse::<DiskFormat>().unwrap(), DiskFormat::Raw);
        assert_eq!(DiskFormat::Raw.to_string(), "raw");
        assert_eq!("qcow2".parse::<DiskFormat>().unwrap(), DiskFormat::Qcow2);
        assert_eq!(DiskFormat::Qcow2.to_string(), "qcow2");
        let error = "vmdk".parse::<DiskFormat>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown disk format 'vmdk' (known: raw, qcow2)"
        );
    }
}
