//! For tests: images made from nothing, and a check of what is in an image that shares no code with its use.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::header::{Header, be};
use super::refcount::read_count;
use super::{Access, Below, DiskBackend, DiskError, OpenFile, Qcow2};

/// What an image is made like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) size: u64,
}

/// An empty image: header, refcount table, one refcount block, L1 table.
pub(super) fn empty(shape: Shape) -> Vec<u8> {
    let cluster = 1_usize << shape.cluster_bits;
    let l1_entries = shape.size.div_ceil((cluster * cluster / 8) as u64) as usize;
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let mut image = vec![0; (3 + l1_clusters) * cluster];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &shape.version.to_be_bytes());
    put(20, &shape.cluster_bits.to_be_bytes());
    put(24, &shape.size.to_be_bytes());
    put(36, &(l1_entries as u32).to_be_bytes());
    put(40, &(3 * cluster as u64).to_be_bytes());
    put(48, &(cluster as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    if shape.version == 3 {
        put(96, &shape.refcount_order.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
    }
    put(cluster, &(2 * cluster as u64).to_be_bytes());
    for used in 0..3 + l1_clusters {
        let block = 2 * cluster;
        match shape.refcount_order {
            order @ 0..3 => {
                let per_byte = 8 >> order;
                image[block + used / per_byte] |= 1 << ((used % per_byte) << order);
            }
            order => {
                let width = 1 << (order - 3);
                image[block + (used + 1) * width - 1] = 1;
            }
        }
    }
    image
}

/// Opens an image that is built on nothing.
pub(super) fn open(path: &Path, access: Access) -> Result<Qcow2, DiskError> {
    open_on(path, access, None)
}

/// Opens an image on what it is built on.
pub(super) fn open_on(
    path: &Path,
    access: Access,
    below: Option<Arc<dyn DiskBackend>>,
) -> Result<Qcow2, DiskError> {
    let open = OpenFile::open(path, access)?;
    let below = |named: &Below| {
        below.ok_or_else(|| DiskError::BackingNotAllowed {
            path: path.to_owned(),
            backing: named.path.clone(),
        })
    };
    let outside = |data: &Path| {
        Err(DiskError::DataNotAllowed {
            path: path.to_owned(),
            data: data.to_owned(),
        })
    };
    Qcow2::open(open, path, access, below, outside)
}

/// Counts who refers to which cluster and compares with the refcounts. Gives the number of clusters that are counted
/// more often than used, which is waste; everything else that is wrong is damage.
pub(super) fn check(image: &[u8]) -> Result<usize, String> {
    let header = Header::parse(&image[..image.len().min(Header::BYTES)], image.len() as u64)
        .map_err(|refusal| format!("{refusal:?}"))?;
    let bits = header.cluster_bits;
    let cluster = 1_usize << bits;
    let at = |offset: u64| be(image, offset as usize, 8);
    let mut used: HashMap<u64, u64> = HashMap::new();
    // (cluster, whether it is said to be referred to once)
    let mut said_single = Vec::new();
    let mut refer = |offset: u64, bytes: u64| {
        for number in offset >> bits..(offset + bytes).div_ceil(cluster as u64) {
            *used.entry(number).or_default() += 1;
        }
    };
    refer(0, 1);
    refer(header.l1_offset, u64::from(header.l1_entries) * 8);
    let table_bytes = u64::from(header.refcount_table_clusters) << bits;
    refer(header.refcount_table_offset, table_bytes);
    let blocks: Vec<u64> = (0..table_bytes / 8)
        .map(|index| at(header.refcount_table_offset + index * 8))
        .collect();
    blocks
        .iter()
        .filter(|block| **block != 0)
        .for_each(|block| refer(*block, 1));
    for l1 in 0..u64::from(header.l1_entries) {
        let entry = at(header.l1_offset + l1 * 8);
        let table = entry & 0x00ff_ffff_ffff_fe00;
        if table == 0 {
            continue;
        }
        if table as usize + cluster > image.len().next_multiple_of(cluster) {
            return Err(format!("an L2 table is at {table:#x}, outside the file"));
        }
        refer(table, 1);
        said_single.push((table >> bits, entry >> 63 != 0));
        for l2 in 0..cluster as u64 / 8 {
            let entry = at(table + l2 * 8);
            if entry >> 62 & 1 != 0 {
                let low = 62 - (bits - 8);
                let offset = entry & ((1 << low) - 1);
                let sectors = ((entry & ((1 << 62) - 1)) >> low) + 1;
                let end = (offset & !511) + sectors * 512;
                refer(offset, end - offset);
                continue;
            }
            let data = entry & 0x00ff_ffff_ffff_fe00;
            if data != 0 {
                refer(data, 1);
                said_single.push((data >> bits, entry >> 63 != 0));
            }
        }
    }
    let per_block = 1_u64 << (bits + 3 - header.refcount_order);
    let count = |number: u64| match blocks.get((number / per_block) as usize) {
        None | Some(0) => 0,
        Some(block) => read_count(
            image.get(*block as usize..).unwrap_or_default(),
            (number % per_block) as usize,
            header.refcount_order,
        ),
    };
    for (number, references) in &used {
        if count(*number) < *references {
            return Err(format!(
                "cluster {number} is used {references} times and counted {} times",
                count(*number)
            ));
        }
    }
    for (number, single) in said_single {
        if single && used[&number] != 1 {
            return Err(format!("cluster {number} is said to be used once"));
        }
    }
    let all = (image.len() as u64).div_ceil(cluster as u64);
    let waste = (0..all).filter(|number| count(*number) > used.get(number).copied().unwrap_or(0));
    Ok(waste.count())
}
