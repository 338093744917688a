//! A bounded cache of tables: clusters full of entries, L2 tables or refcount blocks.

use std::collections::HashMap;
use std::ops::Range;

use super::header::be;

/// One cluster of metadata in memory.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) bytes: Vec<u8>,
    /// Bytes that differ from the file.
    dirty: Option<Range<usize>>,
    used: u64,
}

impl Table {
    pub(super) fn new(bytes: Vec<u8>) -> Table {
        Table {
            bytes,
            dirty: None,
            used: 0,
        }
    }

    /// A table that is not in the file at all.
    pub(super) fn fresh(bytes: Vec<u8>) -> Table {
        let dirty = Some(0..bytes.len());
        Table {
            bytes,
            dirty,
            used: 0,
        }
    }

    /// The 64-bit entry at an index; zero behind the end.
    pub(super) fn entry(&self, index: usize) -> u64 {
        be(&self.bytes, index.saturating_mul(8), 8)
    }

    pub(super) fn set_entry(&mut self, index: usize, value: u64) {
        self.set_bytes(index.saturating_mul(8), &value.to_be_bytes());
    }

    pub(super) fn set_bytes(&mut self, at: usize, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len());
        if let Some(place) = self.bytes.get_mut(at..end) {
            place.copy_from_slice(bytes);
            self.dirty = Some(match self.dirty.take() {
                Some(dirty) => dirty.start.min(at)..dirty.end.max(end),
                None => at..end,
            });
        }
    }

    /// What is to be written, and where in the table; none if it is as in the file.
    pub(super) fn dirty(&self) -> Option<(usize, &[u8])> {
        let range = self.dirty.clone()?;
        Some((range.start, self.bytes.get(range)?))
    }

    pub(super) fn written(&mut self) {
        self.dirty = None;
    }
}

/// Tables by their offset in the file.
#[derive(Debug)]
pub(super) struct TableCache {
    tables: HashMap<u64, Table>,
    capacity: usize,
    time: u64,
}

impl TableCache {
    pub(super) fn new(capacity: usize) -> TableCache {
        TableCache {
            tables: HashMap::new(),
            capacity,
            time: 0,
        }
    }

    pub(super) fn get(&mut self, offset: u64) -> Option<&mut Table> {
        self.time += 1;
        let table = self.tables.get_mut(&offset)?;
        table.used = self.time;
        Some(table)
    }

    pub(super) fn contains(&self, offset: u64) -> bool {
        self.tables.contains_key(&offset)
    }

    pub(super) fn insert(&mut self, offset: u64, mut table: Table) {
        self.time += 1;
        table.used = self.time;
        self.tables.insert(offset, table);
    }

    pub(super) fn remove(&mut self, offset: u64) {
        self.tables.remove(&offset);
    }

    pub(super) fn is_full(&self) -> bool {
        self.tables.len() >= self.capacity
    }

    /// The table that was not used for longest, of the clean ones or of all.
    pub(super) fn oldest(&self, clean: bool) -> Option<u64> {
        let fits = |table: &Table| !clean || table.dirty.is_none();
        let tables = self.tables.iter().filter(|(_, table)| fits(table));
        tables
            .min_by_key(|(_, table)| table.used)
            .map(|(at, _)| *at)
    }

    /// Offsets of the tables that differ from the file, ascending.
    pub(super) fn dirty(&self) -> Vec<u64> {
        let dirty = self
            .tables
            .iter()
            .filter(|(_, table)| table.dirty.is_some());
        let mut offsets: Vec<u64> = dirty.map(|(offset, _)| *offset).collect();
        offsets.sort_unstable();
        offsets
    }
}
