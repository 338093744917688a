//! A temporary layer of changes above a disk that is only read.
//!
//! Changes go to a sparse file without a name, which the host deletes when the overlay is dropped
//! or the process dies. The disk is divided into clusters of 4 KiB; a bitmap says which clusters
//! are in the file. A write that covers part of a cluster first copies the rest from below.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::backend::{DiskBackend, check_range, len_of};
use crate::error::DiskError;
use crate::raw::zero_range;

/// Bytes per cluster: the page size of guests, so that nearly all their writes cover whole clusters.
const CLUSTER_BYTES: u64 = 4096;

/// A writable disk whose changes are lost when it is dropped.
///
/// [`flush`](DiskBackend::flush) does nothing: nothing here outlives the process.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<dyn DiskBackend>,
    file: File,
    /// Readers of the disk hold it for reading, so that a cluster does not change sides meanwhile.
    changed: RwLock<ClusterSet>,
}

impl Overlay {
    /// Lays an empty overlay above `base`; its file is made in `dir` and has no name there.
    pub fn new(base: Arc<dyn DiskBackend>, dir: &Path) -> Result<Overlay, DiskError> {
        let temporary = |source| DiskError::Temporary {
            dir: dir.to_owned(),
            source,
        };
        let file = tempfile::tempfile_in(dir).map_err(temporary)?;
        // Reads of clusters at the end of the disk must not meet the end of the file.
        file.set_len(base.size()).map_err(temporary)?;
        Ok(Overlay {
            base,
            file,
            changed: RwLock::default(),
        })
    }

    /// Bytes of the disk that differ in origin from the base, in whole clusters.
    pub fn changed_bytes(&self) -> u64 {
        self.read_set().len() * CLUSTER_BYTES
    }

    fn read_set(&self) -> RwLockReadGuard<'_, ClusterSet> {
        self.changed.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_set(&self) -> RwLockWriteGuard<'_, ClusterSet> {
        self.changed.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the cluster that holds `offset` into the file, unless it is there or the change that
    /// follows (`start..end`) covers it completely.
    fn copy_up(
        &self,
        set: &mut ClusterSet,
        offset: u64,
        change: &Range<u64>,
    ) -> Result<(), DiskError> {
        let cluster = offset / CLUSTER_BYTES;
        let start = cluster * CLUSTER_BYTES;
        let end = (start + CLUSTER_BYTES).min(self.base.size());
        if set.contains(cluster) || (change.start <= start && end <= change.end) {
            return Ok(());
        }
        let mut buf = [0; CLUSTER_BYTES as usize];
        let part = buf.get_mut(..(end - start) as usize).unwrap_or_default();
        self.base.read_at(start, part)?;
        self.file
            .write_all_at(part, start)
            .map_err(DiskError::io("copy", start, end - start))?;
        set.insert(cluster..cluster + 1);
        Ok(())
    }

    /// Runs `change` on the file with every cluster it touches brought into the file.
    fn change(
        &self,
        offset: u64,
        len: u64,
        operation: &'static str,
        change: impl FnOnce(&File) -> std::io::Result<()>,
    ) -> Result<(), DiskError> {
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(());
        }
        let bytes = offset..offset + len;
        let mut set = self.write_set();
        self.copy_up(&mut set, bytes.start, &bytes)?;
        self.copy_up(&mut set, bytes.end - 1, &bytes)?;
        change(&self.file).map_err(DiskError::io(operation, offset, len))?;
        set.insert(clusters_of(&bytes));
        Ok(())
    }
}

impl DiskBackend for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn readonly(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_range(offset, len_of(buf), self.size())?;
        let set = self.read_set();
        let end = offset + len_of(buf);
        let mut at = offset;
        let mut rest = buf;
        while at < end {
            let (above, run_end) = set.run(at / CLUSTER_BYTES, end.div_ceil(CLUSTER_BYTES));
            let run = (run_end * CLUSTER_BYTES).min(end) - at;
            let Some((part, after)) = rest.split_at_mut_checked(run as usize) else {
                break;
            };
            if above {
                self.file
                    .read_exact_at(part, at)
                    .map_err(DiskError::io("read", at, run))?;
            } else {
                self.base.read_at(at, part)?;
            }
            at += run;
            rest = after;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.change(offset, len_of(buf), "write", |file| {
            file.write_all_at(buf, offset)
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.change(offset, len, "zero", |file| {
            zero_range(file, offset, len, may_unmap)
        })
    }
}

/// The clusters that hold any of `bytes`.
fn clusters_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / CLUSTER_BYTES..bytes.end.div_ceil(CLUSTER_BYTES)
}

/// Bits per word and words per leaf of a [`ClusterSet`]: one leaf covers 128 MiB of disk.
const WORD_BITS: u64 = 64;
const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = WORD_BITS * LEAF_WORDS as u64;

/// A set of cluster numbers as a bitmap with leaves made on first use, so that memory follows what
/// was written and not the size of the disk.
#[derive(Debug, Default)]
struct ClusterSet {
    leaves: BTreeMap<u64, Box<[u64; LEAF_WORDS]>>,
}

impl ClusterSet {
    fn contains(&self, cluster: u64) -> bool {
        let word = self
            .leaves
            .get(&(cluster / LEAF_BITS))
            .and_then(|leaf| leaf.get((cluster % LEAF_BITS / WORD_BITS) as usize));
        word.is_some_and(|word| word >> (cluster % WORD_BITS) & 1 != 0)
    }

    fn insert(&mut self, clusters: Range<u64>) {
        let mut at = clusters.start;
        while at < clusters.end {
            let leaf = self
                .leaves
                .entry(at / LEAF_BITS)
                .or_insert_with(|| Box::new([0; LEAF_WORDS]));
            let first = at % WORD_BITS;
            let count = (WORD_BITS - first).min(clusters.end - at);
            if let Some(word) = leaf.get_mut((at % LEAF_BITS / WORD_BITS) as usize) {
                *word |= (u64::MAX >> (WORD_BITS - count)) << first;
            }
            at += count;
        }
    }

    /// Whether `first` is in the set, and the end of the run from there on of which the same holds
    /// (not after `end`).
    fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let inside = self.contains(first);
        let mut at = first + 1;
        while at < end && self.contains(at) == inside {
            at += 1;
        }
        (inside, at)
    }

    fn len(&self) -> u64 {
        self.leaves
            .values()
            .flat_map(|leaf| leaf.iter())
            .map(|w| u64::from(w.count_ones()))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::{Access, RawFile};
    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    fn overlay(content: &[u8]) -> (NamedTempFile, Overlay) {
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let base = RawFile::open(file.path(), Access::ReadOnly).unwrap();
        let overlay = Overlay::new(Arc::new(base), &std::env::temp_dir()).unwrap();
        (file, overlay)
    }

    #[test]
    fn changes_stay_above() {
        let content = vec![7; 3 * 4096 + 512];
        let (file, disk) = overlay(&content);
        assert!(!disk.readonly());
        disk.write_at(4000, &[1; 200]).unwrap();
        disk.write_zeroes(3 * 4096, 512, true).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.changed_bytes(), 3 * 4096);
        let mut all = vec![0; content.len()];
        disk.read_at(0, &mut all).unwrap();
        let mut expected = content.clone();
        expected[4000..4200].fill(1);
        expected[3 * 4096..].fill(0);
        assert_eq!(all, expected);
        assert!(matches!(
            disk.write_at(3 * 4096 + 500, &[0; 13]),
            Err(DiskError::OutOfRange { .. })
        ));
        assert_eq!(std::fs::read(file.path()).unwrap(), content);
    }

    #[test]
    fn leaves_are_made_on_demand() {
        let mut set = ClusterSet::default();
        let far = 1 << 50;
        set.insert(LEAF_BITS - 3..LEAF_BITS + 5);
        set.insert(far..far + 1);
        assert_eq!((set.len(), set.leaves.len()), (9, 3));
        assert_eq!(
            set.run(LEAF_BITS - 4, 2 * LEAF_BITS),
            (false, LEAF_BITS - 3)
        );
        assert_eq!(set.run(LEAF_BITS - 3, 2 * LEAF_BITS), (true, LEAF_BITS + 5));
        assert!(set.contains(far) && !set.contains(far + 1));
    }

    #[derive(Debug, Clone)]
    enum Action {
        Write(u64, Vec<u8>),
        Zero(u64, u64, bool),
        Discard(u64, u64),
        Read(u64, usize),
    }

    const SIZE: u64 = 40 * 512 + 8 * 4096;

    fn action() -> impl Strategy<Value = Action> {
        let offset = 0..SIZE;
        prop_oneof![
            (offset.clone(), prop::collection::vec(any::<u8>(), 0..9000))
                .prop_map(|(at, bytes)| Action::Write(at, bytes)),
            (offset.clone(), 0..20000_u64, any::<bool>())
                .prop_map(|(a, l, u)| Action::Zero(a, l, u)),
            (offset.clone(), 0..20000_u64).prop_map(|(a, l)| Action::Discard(a, l)),
            (offset, 0..20000_usize).prop_map(|(a, l)| Action::Read(a, l)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// An overlay behaves as an array of bytes, and the base never changes.
        #[test]
        fn equals_an_array(actions in prop::collection::vec(action(), 1..40)) {
            let content: Vec<u8> = (0..SIZE).map(|i| (i / 7) as u8).collect();
            let mut model = content.clone();
            let (file, disk) = overlay(&content);
            for action in actions {
                match action {
                    Action::Write(at, bytes) => {
                        let end = at as usize + bytes.len();
                        let inside = end <= model.len();
                        prop_assert_eq!(disk.write_at(at, &bytes).is_ok(), inside);
                        if inside {
                            model[at as usize..end].copy_from_slice(&bytes);
                        }
                    }
                    Action::Zero(at, len, unmap) => {
                        let inside = at + len <= SIZE;
                        prop_assert_eq!(disk.write_zeroes(at, len, unmap).is_ok(), inside);
                        if inside {
                            model[at as usize..(at + len) as usize].fill(0);
                        }
                    }
                    Action::Discard(at, len) => {
                        let inside = at + len <= SIZE;
                        prop_assert_eq!(disk.discard(at, len).is_ok(), inside);
                        if inside {
                            model[at as usize..(at + len) as usize].fill(0);
                        }
                    }
                    Action::Read(at, len) => {
                        let mut buf = vec![0; len];
                        let inside = at as usize + len <= model.len();
                        prop_assert_eq!(disk.read_at(at, &mut buf).is_ok(), inside);
                        if inside {
                            prop_assert_eq!(&buf, &model[at as usize..at as usize + len]);
                        }
                    }
                }
            }
            let mut all = vec![0; model.len()];
            disk.read_at(0, &mut all).unwrap();
            prop_assert_eq!(all, model);
            prop_assert_eq!(std::fs::read(file.path()).unwrap(), content);
        }
    }
}
