//! qcow2 images (QEMU, docs/interop/qcow2.txt), versions 2 and 3: read and written.
//!
//! ```text
//!   DiskBackend   what devices call; one lock          mod.rs
//!   data          parts of clusters, copy on write     data.rs, compressed.rs
//!   map           L1 and L2 tables: disk → file        map.rs
//!   refcount      which clusters of the file are free  refcount.rs
//!   header        what the image says of itself        header.rs
//!   TableCache, ImageFile                              table.rs, file.rs
//! ```
//!
//! Data goes to the file at once; tables stay in memory until a commit, which a flush of the guest causes, or a cache
//! that is full. A commit writes in an order in which the file is a valid image after every step, even if the host
//! stops and has carried out what lies between two barriers (`sync`) in any order:
//!
//! 1. refcounts of new clusters (before it: the data in them); barrier
//! 2. L2 tables; barrier; then L1 entries of new L2 tables; barrier
//! 3. only then the clusters that nothing refers to any more are counted down, and may be used again
//!
//! Whoever breaks off in the middle leaves clusters that are counted and not used, and nothing worse. What a guest has
//! not flushed may be lost. After an error within a commit the image takes no more changes.
//!
//! An image is not trusted. What is held in memory is bounded by the format's limits; tables must not overlap and must
//! lie in the file; a cluster is written in place only if its refcount confirms that it is used once and no table of
//! ours is in it. A file named inside an image (a backing file, or one with the image's data) is opened only if the user
//! named it too.
//!
//! Why not a library: of the crates that can write qcow2 (checked 2026-11) only `imago` is kept up. It is five times
//! this size with some hundred uses of `unsafe`, knows no zstd, and leaves its own order of commits to us.
//!
//! With an external data file, clusters of the disk are there at their own places, as QEMU has them; refcounts are for the
//! tables alone then, and no space is given back. That the file is one to read by itself (`data_file_raw`) is no longer
//! promised after a write.
//!
//! Limitations: no encryption, no subclusters. Refcounts are always kept up to date (lazy ones
//! are an option of the format); an image whose refcounts somebody left stale is only read. Internal snapshots are
//! kept, but neither made nor shown. Persistent bitmaps lose their validity by a write, as the format asks.

mod compressed;
mod data;
mod file;
mod header;
mod map;
mod refcount;
mod table;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::file::ImageFile;
use self::header::{AUTOCLEAR_FIELD, Header, Refusal};
use self::table::TableCache;
use crate::backend::{DiskBackend, check_range, len_of};
use crate::error::DiskError;
use crate::raw::{Access, OpenFile};

pub(crate) use self::header::MAGIC;

/// Bytes of L2 tables and of refcount blocks that are kept in memory, each.
const CACHE_BYTES: u64 = 8 << 20;
/// Clusters that may wait to be counted down.
const RELEASED_MAX: usize = 4096;

/// A qcow2 image. Dropping it writes what is not in the file yet.
#[derive(Debug)]
pub struct Qcow2 {
    size: u64,
    cluster: u32,
    readonly: bool,
    state: Mutex<State>,
}

/// What is below an image, as it was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Below {
    /// The path, relative to the working directory.
    pub(crate) path: PathBuf,
    /// The format that the image says it has.
    pub(crate) format: Option<String>,
}

#[derive(Debug)]
struct State {
    file: ImageFile,
    /// What has the data, if not `file`.
    data: Option<ImageFile>,
    header: Header,
    backing: Option<Arc<dyn DiskBackend>>,
    l1: Vec<u64>,
    /// Entries of the L1 table that differ from the file.
    l1_changed: BTreeSet<usize>,
    l2: TableCache,
    refcount_table: Vec<u64>,
    /// Entries of the refcount table that differ from the file.
    new_blocks: BTreeSet<usize>,
    blocks: TableCache,
    /// Clusters of the file that hold what this holds in memory: the header and all tables.
    metadata: HashSet<u64>,
    /// No cluster before this one is free.
    search_from: u64,
    /// Clusters, perhaps several times, that fewer refer to once everything is durable.
    released: Vec<u64>,
    /// The compressed cluster that was unpacked last, by its offset.
    unpacked: Option<(u64, Vec<u8>)>,
    /// The image was changed since it was opened.
    changed: bool,
    /// A commit failed.
    broken: bool,
}

/// Why something inside an image could not be done.
#[derive(Debug)]
enum Failed {
    Io(io::Error),
    /// The image contradicts itself.
    Damaged(String),
    /// From a disk below.
    Below(DiskError),
    Broken,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Io(error)
    }
}

fn damaged(reason: impl fmt::Display) -> Failed {
    Failed::Damaged(reason.to_string())
}

impl Failed {
    fn during(self, operation: &'static str, offset: u64, len: u64) -> DiskError {
        match self {
            Failed::Io(source) => DiskError::io(operation, offset, len)(source),
            Failed::Damaged(reason) => DiskError::Damaged { reason },
            Failed::Below(error) => error,
            Failed::Broken => DiskError::Broken,
        }
    }
}

impl Qcow2 {
    /// Opens the image in `open`. `below` opens the disk under it, if the image names one; `outside` the file with its data,
    /// if the image names one, by its path relative to the working directory.
    pub(crate) fn open(
        open: OpenFile,
        path: &Path,
        access: Access,
        below: impl FnOnce(&Below) -> Result<Arc<dyn DiskBackend>, DiskError>,
        outside: impl FnOnce(&Path) -> Result<OpenFile, DiskError>,
    ) -> Result<Qcow2, DiskError> {
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let refused = |refusal| match refusal {
            Refusal::NotOne => DiskError::NotOfFormat {
                path: path.to_owned(),
                format: "qcow2",
            },
            Refusal::Unsupported(what) => DiskError::Unsupported {
                path: path.to_owned(),
                what,
            },
            Refusal::Damaged(reason) => DiskError::DamagedImage {
                path: path.to_owned(),
                reason,
            },
        };
        let file = ImageFile::new(open.file, open.len, open.regular);
        let mut start = vec![0; open.len.min(Header::BYTES as u64) as usize];
        file.read_at(0, &mut start).map_err(failed)?;
        let header = Header::parse(&start, open.len).map_err(refused)?;
        let stale = match (header.corrupt, header.dirty) {
            (true, _) => Some("it is marked as damaged"),
            (_, true) => Some("it was not closed"),
            _ => None,
        };
        if let (Access::ReadWrite, Some(reason)) = (access, stale) {
            return Err(DiskError::NeedsRepair {
                path: path.to_owned(),
                reason,
            });
        }
        if header.size == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
            });
        }
        let directory = path.parent().unwrap_or(Path::new(""));
        let data = match &header.data_file {
            None => None,
            Some(name) => {
                let open = outside(&directory.join(name))?;
                Some(ImageFile::new(open.file, open.len, open.regular))
            }
        };
        let backing = match &header.backing {
            None => None,
            Some(backing) => Some(below(&Below {
                path: directory.join(&backing.name),
                format: backing.format.clone(),
            })?),
        };
        let (size, cluster) = (header.size, header.cluster() as u32);
        let state = State::new(file, data, header, backing).map_err(|error| match error {
            Failed::Io(source) => failed(source),
            Failed::Damaged(reason) => refused(Refusal::Damaged(reason)),
            error => error.during("open", 0, size),
        })?;
        Ok(Qcow2 {
            size,
            cluster,
            readonly: access == Access::ReadOnly,
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change of `len` bytes at `offset`.
    fn change(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
        change: impl FnOnce(&mut State) -> Result<(), Failed>,
    ) -> Result<(), DiskError> {
        if self.readonly {
            return Err(DiskError::ReadOnly);
        }
        check_range(offset, len, self.size)?;
        if len == 0 {
            return Ok(());
        }
        let mut state = self.state();
        state
            .begin_change()
            .and_then(|()| change(&mut state))
            .and_then(|()| state.end_change())
            .map_err(|error| error.during(operation, offset, len))
    }
}

impl DiskBackend for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn readonly(&self) -> bool {
        self.readonly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let len = len_of(buf);
        check_range(offset, len, self.size)?;
        self.state()
            .read(offset, buf)
            .map_err(|error| error.during("read", offset, len))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.change("write", offset, len_of(buf), |state| {
            state.write(offset, buf)
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.readonly {
            return Ok(());
        }
        self.state()
            .commit()
            .map_err(|error| error.during("flush", 0, self.size))
    }

    fn granularity(&self) -> u32 {
        self.cluster
    }

    fn close(&self) -> Result<(), DiskError> {
        self.state()
            .close()
            .map_err(|error| error.during("close", 0, self.size))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.change("discard", offset, len, |state| state.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.change("zero", offset, len, |state| {
            state.write_zeroes(offset, len, may_unmap)
        })
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Nobody is left to hear of an error. Without this the image is valid, but lacks what was not flushed.
        let _ = state.close();
    }
}

impl State {
    fn new(
        file: ImageFile,
        data: Option<ImageFile>,
        header: Header,
        backing: Option<Arc<dyn DiskBackend>>,
    ) -> Result<State, Failed> {
        let tables = (CACHE_BYTES >> header.cluster_bits).clamp(8, 256) as usize;
        let l1 = read_table(&file, header.l1_offset, u64::from(header.l1_entries) * 8)?;
        let refcount_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let refcount_table = read_table(&file, header.refcount_table_offset, refcount_bytes)?;
        let mut state = State {
            file,
            data,
            header,
            backing,
            l1,
            l1_changed: BTreeSet::new(),
            l2: TableCache::new(tables),
            refcount_table,
            new_blocks: BTreeSet::new(),
            blocks: TableCache::new(tables),
            metadata: HashSet::new(),
            search_from: 0,
            released: Vec::new(),
            unpacked: None,
            changed: false,
            broken: false,
        };
        state.note_metadata()?;
        Ok(state)
    }

    /// Collects the clusters of all tables, none of which may lie in another.
    fn note_metadata(&mut self) -> Result<(), Failed> {
        let (bits, cluster, len) = (
            self.header.cluster_bits,
            self.header.cluster(),
            self.file.len(),
        );
        let header = &self.header;
        let tables = [
            (0, cluster),
            (header.l1_offset, u64::from(header.l1_entries) * 8),
            (
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) * cluster,
            ),
        ];
        let whole = tables.into_iter().flat_map(|(offset, bytes)| {
            let first = offset >> bits;
            first..first + bytes.div_ceil(cluster)
        });
        for number in whole {
            if !self.metadata.insert(number) {
                return Err(overlap(number << bits));
            }
        }
        let blocks = self.refcount_table.iter().copied();
        let maps = self.l1.iter().map(|entry| map::l2_offset(*entry));
        for offset in blocks.chain(maps).filter(|offset| *offset != 0) {
            if !offset.is_multiple_of(cluster) || offset >= len {
                return Err(damaged(format!(
                    "a table is said to be at {offset:#x} in a file of {len} bytes"
                )));
            }
            if !self.metadata.insert(offset >> bits) {
                return Err(overlap(offset));
            }
        }
        Ok(())
    }

    /// Where the data are.
    fn data(&self) -> &ImageFile {
        self.data.as_ref().unwrap_or(&self.file)
    }

    fn data_mut(&mut self) -> &mut ImageFile {
        self.data.as_mut().unwrap_or(&mut self.file)
    }

    /// A cluster of tables as it is in the file.
    fn read_metadata(&self, offset: u64) -> Result<Vec<u8>, Failed> {
        let mut bytes = vec![0; self.header.cluster() as usize];
        self.file.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Before the first change the image loses what would no longer be true of it.
    fn begin_change(&mut self) -> Result<(), Failed> {
        if self.broken {
            return Err(Failed::Broken);
        }
        if !self.changed && self.header.autoclear != 0 {
            self.file.write_at(AUTOCLEAR_FIELD, &[0; 8])?;
            self.file.sync()?;
            self.header.autoclear = 0;
        }
        self.changed = true;
        Ok(())
    }

    fn end_change(&mut self) -> Result<(), Failed> {
        if self.released.len() > RELEASED_MAX {
            self.commit()?;
        }
        Ok(())
    }

    /// Brings everything into the file, in the order of this module's description.
    fn commit(&mut self) -> Result<(), Failed> {
        if self.broken {
            return Err(Failed::Broken);
        }
        let result = self.try_commit();
        self.broken = result.is_err();
        result
    }

    /// A commit, and then also the refcounts that it counted down: without them clusters would be counted in vain.
    fn close(&mut self) -> Result<(), Failed> {
        if !self.changed {
            return Ok(());
        }
        self.commit()?;
        self.write_refcounts()
    }

    fn try_commit(&mut self) -> Result<(), Failed> {
        if !self.changed {
            return Ok(());
        }
        self.write_refcounts()?;
        if let Some(data) = &mut self.data {
            data.sync()?;
        }
        self.file.sync()?;
        if self.l2.dirty().is_empty() && self.l1_changed.is_empty() {
            return self.count_down();
        }
        self.write_maps()?;
        self.file.sync()?;
        self.count_down()
    }
}

fn overlap(offset: u64) -> Failed {
    damaged(format!("two tables are at {offset:#x}"))
}

/// A table of big-endian 64-bit entries.
fn read_table(file: &ImageFile, offset: u64, bytes: u64) -> Result<Vec<u64>, Failed> {
    let mut buf = vec![0; bytes as usize];
    file.read_at(offset, &mut buf)?;
    let entries = buf.chunks_exact(8).map(|entry| header::be(entry, 0, 8));
    Ok(entries.collect())
}
