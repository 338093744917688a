//! Which clusters of the file are in use, and by how many: refcounts, and the allocation of clusters.
//!
//! A refcount block may be written at any time: increments come before the use of a cluster, and decrements are only
//! made here after nothing in the file refers to the cluster any more.

use super::header::{REFCOUNT_TABLE_BYTES_MAX, REFCOUNT_TABLE_FIELDS};
use super::table::Table;
use super::{Failed, State, damaged};

/// Offsets in a file stay below this: the format has 56 bits for them.
const OFFSET_MAX: u64 = 1 << 55;

/// A cluster that was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allocated {
    pub(super) offset: u64,
    /// It reads as zeroes: the file has just grown by it.
    pub(super) zeroed: bool,
}

impl State {
    /// Clusters that one refcount block tells about, as a power of two.
    fn block_bits(&self) -> u32 {
        self.header.cluster_bits + 3 - self.header.refcount_order
    }

    /// The block for a cluster, if there is one, and the cluster's index in it.
    fn block_of(&self, cluster: u64) -> (Option<u64>, usize) {
        let region = usize::try_from(cluster >> self.block_bits()).unwrap_or(usize::MAX);
        let block = self.refcount_table.get(region).copied();
        let index = cluster & ((1 << self.block_bits()) - 1);
        (block.filter(|block| *block != 0), index as usize)
    }

    fn load_block(&mut self, offset: u64) -> Result<&mut Table, Failed> {
        if !self.blocks.contains(offset) {
            if self.blocks.is_full()
                && let Some(oldest) = self.blocks.oldest(false)
            {
                self.write_block(oldest)?;
                self.blocks.remove(oldest);
            }
            let table = Table::new(self.read_metadata(offset)?);
            self.blocks.insert(offset, table);
        }
        self.blocks
            .get(offset)
            .ok_or_else(|| damaged("a refcount block is lost"))
    }

    fn write_block(&mut self, offset: u64) -> Result<(), Failed> {
        if let Some(table) = self.blocks.get(offset) {
            if let Some((at, bytes)) = table.dirty() {
                self.file.write_at(offset + at as u64, bytes)?;
            }
            table.written();
        }
        Ok(())
    }

    /// Writes every refcount that is not in the file yet; durable after the next sync.
    pub(super) fn write_refcounts(&mut self) -> Result<(), Failed> {
        for offset in self.blocks.dirty() {
            self.write_block(offset)?;
        }
        if self.new_blocks.is_empty() {
            return Ok(());
        }
        // A block is whole before the table leads to it.
        self.file.sync()?;
        for region in std::mem::take(&mut self.new_blocks) {
            let block = self.refcount_table.get(region).copied().unwrap_or(0);
            let at = self.header.refcount_table_offset + region as u64 * 8;
            self.file.write_at(at, &block.to_be_bytes())?;
        }
        Ok(())
    }

    /// How many refer to a cluster.
    pub(super) fn refcount(&mut self, cluster: u64) -> Result<u64, Failed> {
        let order = self.header.refcount_order;
        match self.block_of(cluster) {
            (None, _) => Ok(0),
            (Some(block), index) => Ok(read_count(&self.load_block(block)?.bytes, index, order)),
        }
    }

    fn set_refcount(&mut self, cluster: u64, count: u64) -> Result<(), Failed> {
        let order = self.header.refcount_order;
        let (Some(block), index) = self.block_of(cluster) else {
            return Err(damaged("a cluster in use has no refcount block"));
        };
        write_count(self.load_block(block)?, index, order, count);
        Ok(())
    }

    /// Takes a cluster that nobody uses.
    pub(super) fn allocate(&mut self) -> Result<Allocated, Failed> {
        let cluster_bytes = self.header.cluster();
        let bits = self.block_bits();
        loop {
            let region = usize::try_from(self.search_from >> bits).unwrap_or(usize::MAX);
            match self.refcount_table.get(region).copied() {
                None => self.grow_refcount_table()?,
                Some(0) => self.add_block(region)?,
                Some(block) => {
                    let first = (self.search_from & ((1 << bits) - 1)) as usize;
                    let order = self.header.refcount_order;
                    let bytes = &self.load_block(block)?.bytes;
                    let free =
                        (first..1 << bits).find(|index| read_count(bytes, *index, order) == 0);
                    let Some(free) = free else {
                        self.search_from = (region as u64 + 1) << bits;
                        continue;
                    };
                    let cluster = ((region as u64) << bits) + free as u64;
                    self.search_from = cluster + 1;
                    // What holds metadata is in use whatever its refcount says.
                    if self.metadata.contains(&cluster) {
                        continue;
                    }
                    let offset = self.offset_of(cluster)?;
                    let zeroed = self.file.grows_by_zeroes() && offset >= self.file.len();
                    self.file.grow(offset + cluster_bytes)?;
                    self.set_refcount(cluster, 1)?;
                    return Ok(Allocated { offset, zeroed });
                }
            }
        }
    }

    fn offset_of(&self, cluster: u64) -> Result<u64, Failed> {
        cluster
            .checked_mul(self.header.cluster())
            .filter(|offset| *offset < OFFSET_MAX)
            .ok_or_else(|| damaged("every cluster that the format allows is in use"))
    }

    /// Gives back a cluster that was allocated and that nothing in the file refers to.
    pub(super) fn deallocate(&mut self, offset: u64) -> Result<(), Failed> {
        let cluster = offset >> self.header.cluster_bits;
        self.set_refcount(cluster, 0)?;
        self.search_from = self.search_from.min(cluster);
        Ok(())
    }

    /// Makes a refcount block for a region that has none: in the region's first cluster, which it counts itself.
    fn add_block(&mut self, region: usize) -> Result<(), Failed> {
        let first = (region as u64) << self.block_bits();
        let block = (first..first + (1 << self.block_bits()))
            .find(|cluster| !self.metadata.contains(cluster))
            .ok_or_else(|| damaged("metadata has no refcounts"))?;
        let offset = self.offset_of(block)?;
        self.file.grow(offset + self.header.cluster())?;
        self.put_block(region, offset)?;
        self.set_refcount(block, 1)?;
        self.new_blocks.insert(region);
        Ok(())
    }

    fn put_block(&mut self, region: usize, offset: u64) -> Result<(), Failed> {
        if self.blocks.is_full()
            && let Some(oldest) = self.blocks.oldest(false)
        {
            self.write_block(oldest)?;
            self.blocks.remove(oldest);
        }
        let empty = vec![0; self.header.cluster() as usize];
        self.blocks.insert(offset, Table::fresh(empty));
        self.metadata.insert(offset >> self.header.cluster_bits);
        match self.refcount_table.get_mut(region) {
            Some(entry) => *entry = offset,
            None => return Err(damaged("a refcount block has no place in its table")),
        }
        Ok(())
    }

    /// Moves the refcount table to where it can be bigger: behind everything that the old one tells about.
    fn grow_refcount_table(&mut self) -> Result<(), Failed> {
        let cluster = self.header.cluster();
        let old_len = self.refcount_table.len();
        let old_clusters = u64::from(self.header.refcount_table_clusters);
        let clusters = (old_clusters * 2).min(REFCOUNT_TABLE_BYTES_MAX >> self.header.cluster_bits);
        if clusters <= old_clusters {
            return Err(damaged("its refcount table cannot grow any more"));
        }
        // The new place: blocks that tell about themselves and about the table, then the table.
        let bits = self.block_bits();
        let mut blocks = 1;
        while blocks << bits < blocks + clusters {
            blocks += 1;
        }
        let first = (old_len as u64) << bits;
        let table_offset = self.offset_of(first + blocks)?;
        self.offset_of(first + blocks + clusters)?;
        self.file.grow(table_offset + clusters * cluster)?;
        // Until the header says so, the file and what is held here have different tables.
        self.broken = true;
        // Blocks that the old table does not lead to yet will be led to by the new one.
        self.new_blocks.clear();
        self.refcount_table
            .resize((clusters * cluster / 8) as usize, 0);
        for block in 0..blocks {
            let region = old_len + block as usize;
            self.put_block(region, (first + block) << self.header.cluster_bits)?;
        }
        for used in first..first + blocks + clusters {
            self.set_refcount(used, 1)?;
        }
        let table: Vec<u8> = self
            .refcount_table
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.write_refcounts()?;
        self.file.write_at(table_offset, &table)?;
        self.file.sync()?;
        let mut fields = [0; 12];
        let (offset, count) = fields.split_at_mut(8);
        offset.copy_from_slice(&table_offset.to_be_bytes());
        count.copy_from_slice(&(clusters as u32).to_be_bytes());
        self.file.write_at(REFCOUNT_TABLE_FIELDS, &fields)?;
        self.file.sync()?;
        let old = self.header.refcount_table_offset >> self.header.cluster_bits;
        for cluster in old..old + old_clusters {
            self.metadata.remove(&cluster);
            self.released.push(cluster);
        }
        let new = first + blocks;
        self.metadata.extend(new..new + clusters);
        self.header.refcount_table_offset = table_offset;
        self.header.refcount_table_clusters = clusters as u32;
        self.broken = false;
        Ok(())
    }

    /// Counts down what was released. Only to be called when nothing durable refers to it.
    pub(super) fn count_down(&mut self) -> Result<(), Failed> {
        let mut released = std::mem::take(&mut self.released);
        released.sort_unstable();
        let mut free: Option<(u64, u64)> = None;
        for cluster in released {
            let count = self.refcount(cluster)?;
            // A count of zero is a lie of the image: there is nothing to take off.
            let Some(less) = count.checked_sub(1) else {
                continue;
            };
            self.set_refcount(cluster, less)?;
            if less != 0 || self.metadata.contains(&cluster) {
                continue;
            }
            self.search_from = self.search_from.min(cluster);
            free = match free {
                Some((start, end)) if end == cluster => Some((start, end + 1)),
                other => {
                    self.punch(other)?;
                    Some((cluster, cluster + 1))
                }
            };
        }
        self.punch(free)
    }

    /// Gives the space of free clusters back to the host.
    fn punch(&mut self, clusters: Option<(u64, u64)>) -> Result<(), Failed> {
        if let Some((start, end)) = clusters {
            let bits = self.header.cluster_bits;
            self.file.punch(start << bits, (end - start) << bits)?;
        }
        Ok(())
    }
}

/// The refcount at an index of a block. Widths below a byte fill it from its lowest bit up.
pub(super) fn read_count(block: &[u8], index: usize, order: u32) -> u64 {
    if order >= 3 {
        let width = 1 << (order - 3);
        return super::header::be(block, index.saturating_mul(width), width);
    }
    let per_byte = 8 >> order;
    let byte = block.get(index / per_byte).copied().unwrap_or(0);
    let shift = (index % per_byte) << order;
    u64::from(byte >> shift) & ((1 << (1 << order)) - 1)
}

fn write_count(block: &mut Table, index: usize, order: u32, count: u64) {
    if order >= 3 {
        let width: usize = 1 << (order - 3);
        let bytes = count.to_be_bytes();
        block.set_bytes(
            index.saturating_mul(width),
            bytes.get(8 - width..).unwrap_or_default(),
        );
        return;
    }
    let per_byte = 8 >> order;
    let at = index / per_byte;
    let shift = (index % per_byte) << order;
    let mask = ((1_u16 << (1 << order)) - 1) as u8;
    let byte = block.bytes.get(at).copied().unwrap_or(0);
    let changed = byte & !(mask << shift) | (count as u8 & mask) << shift;
    block.set_bytes(at, &[changed]);
}
