//! Where the disk's clusters are in the file: the L1 table and the L2 tables.

use super::table::Table;
use super::{Failed, State, damaged};

/// Bits of an entry that hold an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Nobody else refers to what this entry refers to.
const COPIED: u64 = 1 << 63;
/// The entry describes compressed data.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes, whatever is at its offset.
const ZERO: u64 = 1 << 0;

/// Where the content of a cluster of the disk comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// From below the image, or it is zero.
    Below,
    /// It is zero. A cluster of the file may be kept for it.
    Zero(Option<Place>),
    /// From a cluster of the file.
    Data(Place),
    /// From compressed data.
    Compressed(Packed),
}

/// A cluster of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: u64,
    /// The image says that nobody else refers to it.
    pub(super) copied: bool,
}

/// Compressed data in the file; shares its clusters with other such data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What an entry of an L2 table is to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Below,
    Zero,
    /// Zero, with a cluster kept for later.
    ZeroAt(u64),
    Data(u64),
}

impl Target {
    fn entry(self) -> u64 {
        match self {
            Target::Below => 0,
            Target::Zero => ZERO,
            Target::ZeroAt(offset) => offset | COPIED | ZERO,
            Target::Data(offset) => offset | COPIED,
        }
    }
}

/// The offset in an L1 entry.
pub(super) fn l2_offset(l1_entry: u64) -> u64 {
    l1_entry & OFFSET
}

impl State {
    fn indices(&self, cluster: u64) -> (usize, usize) {
        let bits = self.header.cluster_bits - 3;
        let index = cluster & ((1 << bits) - 1);
        (
            usize::try_from(cluster >> bits).unwrap_or(usize::MAX),
            index as usize,
        )
    }

    /// Where a cluster of the disk is.
    pub(super) fn lookup(&mut self, cluster: u64) -> Result<Mapping, Failed> {
        let (l1, l2) = self.indices(cluster);
        match l2_offset(self.l1.get(l1).copied().unwrap_or(0)) {
            0 => Ok(Mapping::Below),
            table => {
                let entry = self.load_l2(table)?.entry(l2);
                self.decode(entry, cluster)
            }
        }
    }

    fn decode(&self, entry: u64, cluster: u64) -> Result<Mapping, Failed> {
        if entry & COMPRESSED != 0 {
            return match self.data {
                Some(_) => Err(damaged("a cluster in a file of data is compressed")),
                None => self.decode_compressed(entry),
            };
        }
        let zero = entry & ZERO != 0;
        if zero && self.header.version == 2 {
            return Err(damaged("an image of version 2 has a zero cluster"));
        }
        let (offset, copied) = (entry & OFFSET, entry & COPIED != 0);
        // In a file with nothing but data, the first cluster is one as others are.
        if offset == 0 && !(copied && self.data.is_some()) {
            return Ok(if zero {
                Mapping::Zero(None)
            } else {
                Mapping::Below
            });
        }
        let possible = match self.data {
            Some(_) => offset == cluster << self.header.cluster_bits,
            None => offset.is_multiple_of(self.header.cluster()) && offset < self.file.len(),
        };
        if !possible {
            return Err(damaged(format!("a cluster is said to be at {offset:#x}")));
        }
        let place = Place { offset, copied };
        Ok(if zero {
            Mapping::Zero(Some(place))
        } else {
            Mapping::Data(place)
        })
    }

    /// A compressed entry: the offset in bytes, above it the number of further sectors.
    fn decode_compressed(&self, entry: u64) -> Result<Mapping, Failed> {
        let bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        let len = sectors * 512 - (offset & 511);
        if offset == 0 || offset >= self.file.len() {
            return Err(damaged(format!(
                "compressed data is said to be at {offset:#x}"
            )));
        }
        Ok(Mapping::Compressed(Packed { offset, len }))
    }

    fn load_l2(&mut self, offset: u64) -> Result<&mut Table, Failed> {
        if !self.l2.contains(offset) {
            let table = Table::new(self.read_metadata(offset)?);
            self.put_l2(offset, table)?;
        }
        self.l2
            .get(offset)
            .ok_or_else(|| damaged("an L2 table is lost"))
    }

    fn put_l2(&mut self, offset: u64, table: Table) -> Result<(), Failed> {
        if self.l2.is_full() {
            // L2 tables go to the file only in the order of a commit.
            if self.l2.oldest(true).is_none() {
                self.commit()?;
            }
            if let Some(oldest) = self.l2.oldest(true) {
                self.l2.remove(oldest);
            }
        }
        self.l2.insert(offset, table);
        Ok(())
    }

    /// The L2 table for a cluster of the disk, made our own so that it can be changed.
    fn own_l2(&mut self, l1: usize) -> Result<u64, Failed> {
        let entry = self.l1.get(l1).copied().unwrap_or(0);
        let old = l2_offset(entry);
        if old != 0 && entry & COPIED != 0 && self.refcount(old >> self.header.cluster_bits)? == 1 {
            return Ok(old);
        }
        let bytes = match old {
            0 => vec![0; self.header.cluster() as usize],
            _ => self.load_l2(old)?.bytes.clone(),
        };
        let new = self.allocate()?.offset;
        self.put_l2(new, Table::fresh(bytes))?;
        let bits = self.header.cluster_bits;
        self.metadata.insert(new >> bits);
        if old != 0 {
            self.l2.remove(old);
            self.metadata.remove(&(old >> bits));
            self.released.push(old >> bits);
        }
        if let Some(entry) = self.l1.get_mut(l1) {
            *entry = new | COPIED;
            self.l1_changed.insert(l1);
        }
        Ok(new)
    }

    /// Makes a cluster of the disk come from somewhere else, and releases what it came from unless that stays.
    pub(super) fn remap(&mut self, cluster: u64, target: Target) -> Result<(), Failed> {
        let old = self.lookup(cluster)?;
        let (l1, l2) = self.indices(cluster);
        let already = [
            (Mapping::Below, Target::Below),
            (Mapping::Zero(None), Target::Zero),
        ];
        if already.contains(&(old, target)) {
            return Ok(());
        }
        let table = self.own_l2(l1)?;
        self.load_l2(table)?.set_entry(l2, target.entry());
        let bits = self.header.cluster_bits;
        match old {
            Mapping::Data(place) | Mapping::Zero(Some(place)) => {
                let kept = [Target::Data(place.offset), Target::ZeroAt(place.offset)];
                if self.data.is_none() && !kept.contains(&target) {
                    self.released.push(place.offset >> bits);
                }
            }
            Mapping::Compressed(packed) => {
                self.unpacked = None;
                let last = packed.offset + packed.len - 1;
                self.released.extend(packed.offset >> bits..=last >> bits);
            }
            Mapping::Below | Mapping::Zero(None) => {}
        }
        Ok(())
    }

    /// Writes the tables that differ from the file: L2 tables first, then what leads to them.
    pub(super) fn write_maps(&mut self) -> Result<(), Failed> {
        for offset in self.l2.dirty() {
            if let Some(table) = self.l2.get(offset) {
                if let Some((at, bytes)) = table.dirty() {
                    self.file.write_at(offset + at as u64, bytes)?;
                }
                table.written();
            }
        }
        if self.l1_changed.is_empty() {
            return Ok(());
        }
        self.file.sync()?;
        for index in std::mem::take(&mut self.l1_changed) {
            let entry = self.l1.get(index).copied().unwrap_or(0);
            let at = self.header.l1_offset + index as u64 * 8;
            self.file.write_at(at, &entry.to_be_bytes())?;
        }
        Ok(())
    }
}
