//! Partition tables: GPT (UEFI specification, section 5.3) and MBR with logical partitions, as they are found on disks.
//!
//! Read here and not by a library: they are two fixed tables, and what there is (`gptman`, checked 2026-11) reads as
//! many entries as the table claims to have.

use flate2::Crc;
use strata_disk::{DiskBackend, DiskError, SECTOR_SIZE};

/// No table has more: what claims to is damaged or hostile.
const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES: std::ops::RangeInclusive<u32> = 128..=1024;
const LOGICAL_MAX: usize = 60;

/// A part of a disk that may hold a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its number in the table, from 1 on; 0 is the whole disk.
    pub(super) number: u32,
    /// First byte.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
    /// What the kernel calls its PARTUUID.
    pub(super) uuid: Option<String>,
}

/// The partitions of a disk. A disk without a table is one itself.
pub(super) fn partitions(disk: &dyn DiskBackend) -> Result<Vec<Partition>, DiskError> {
    let whole = Partition {
        number: 0,
        start: 0,
        len: disk.size(),
        uuid: None,
    };
    let last = disk.size() / SECTOR_SIZE - 1;
    for header in [1, last] {
        if let Some(found) = gpt(disk, header)? {
            return Ok(found);
        }
    }
    // A file system on the whole disk may have a boot sector in front of it, which looks like a table.
    if super::volume::kind(disk, &whole)?.is_some() {
        return Ok(vec![whole]);
    }
    let found = mbr(disk)?;
    Ok(if found.is_empty() { vec![whole] } else { found })
}

fn sector(disk: &dyn DiskBackend, number: u64) -> Result<Option<[u8; 512]>, DiskError> {
    let mut bytes = [0; 512];
    match number.checked_mul(SECTOR_SIZE) {
        Some(offset) if offset < disk.size() => {
            disk.read_at(offset, &mut bytes)?;
            Ok(Some(bytes))
        }
        _ => Ok(None),
    }
}

/// A little-endian number of up to eight bytes; zero where there are no bytes.
pub(super) fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or_default().iter().rev();
    field.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The partitions of the GPT whose header is in this sector, if a valid one is there.
fn gpt(disk: &dyn DiskBackend, header: u64) -> Result<Option<Vec<Partition>>, DiskError> {
    let Some(mut header) = sector(disk, header)? else {
        return Ok(None);
    };
    if !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let stated = le(&header, 16, 4) as u32;
    let size = le(&header, 12, 4) as usize;
    if let Some(field) = header.get_mut(16..20) {
        field.fill(0);
    }
    let valid = header
        .get(..size)
        .is_some_and(|header| header.len() >= 92 && crc(header) == stated);
    let (table, count) = (le(&header, 72, 8), le(&header, 80, 4) as u32);
    let entry = le(&header, 84, 4) as u32;
    let bounded = count <= GPT_ENTRIES_MAX && GPT_ENTRY_BYTES.contains(&entry);
    let start = table.checked_mul(SECTOR_SIZE);
    let bytes = u64::from(count) * u64::from(entry);
    let inside = start
        .and_then(|start| start.checked_add(bytes))
        .is_some_and(|end| end <= disk.size());
    let (true, true, true, Some(start)) = (valid, bounded, inside, start) else {
        return Ok(None);
    };
    let mut entries = vec![0; bytes as usize];
    disk.read_at(start, &mut entries)?;
    if crc(&entries) != le(&header, 88, 4) as u32 {
        return Ok(None);
    }
    let entries = entries.chunks_exact(entry as usize).zip(1..);
    let found = entries.filter_map(|(entry, number)| {
        let (first, last) = (le(entry, 32, 8), le(entry, 40, 8));
        let used = entry.get(..16)?.iter().any(|byte| *byte != 0);
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let uuid = guid(entry.get(16..32)?);
        partition(disk, number, first, sectors, uuid).filter(|_| used)
    });
    Ok(Some(found.collect()))
}

/// A partition that lies in the disk.
fn partition(
    disk: &dyn DiskBackend,
    number: u32,
    first: u64,
    sectors: u64,
    uuid: String,
) -> Option<Partition> {
    let start = first.checked_mul(SECTOR_SIZE)?;
    let len = sectors.checked_mul(SECTOR_SIZE)?;
    let inside = start.checked_add(len)? <= disk.size();
    (inside && start > 0 && len > 0).then_some(Partition {
        number,
        start,
        len,
        uuid: Some(uuid),
    })
}

/// The text form of a GUID: its first three fields are little-endian.
fn guid(bytes: &[u8]) -> String {
    let rest: String = bytes
        .iter()
        .skip(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let (four, twelve) = rest.split_at_checked(4).unwrap_or_default();
    let (a, b, c) = (le(bytes, 0, 4), le(bytes, 4, 2), le(bytes, 6, 2));
    format!("{a:08x}-{b:04x}-{c:04x}-{four}-{twelve}")
}

fn mbr(disk: &dyn DiskBackend) -> Result<Vec<Partition>, DiskError> {
    let Some(table) = table(disk, 0)? else {
        return Ok(Vec::new());
    };
    let signature = le(&table, 440, 4);
    let add = |found: &mut Vec<Partition>, number: u32, first, sectors| {
        let uuid = format!("{signature:08x}-{number:02x}");
        found.extend(partition(disk, number, first, sectors, uuid));
    };
    let mut found = Vec::new();
    for (index, number) in (0..4).zip(1..) {
        let (kind, first, sectors) = entry(&table, index);
        if is_extended(kind) {
            let mut logical = 5;
            // Each record has a partition relative to itself and a link relative to the extended partition.
            let mut record = first;
            for _ in 0..LOGICAL_MAX {
                let Some(table) = self::table(disk, record)? else {
                    break;
                };
                let (kind, start, sectors) = entry(&table, 0);
                if kind != 0 {
                    add(&mut found, logical, record.saturating_add(start), sectors);
                    logical += 1;
                }
                let (kind, next, _) = entry(&table, 1);
                if !is_extended(kind) || next == 0 {
                    break;
                }
                record = first.saturating_add(next);
            }
        } else if kind != 0 {
            add(&mut found, number, first, sectors);
        }
    }
    Ok(found)
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

fn table(disk: &dyn DiskBackend, number: u64) -> Result<Option<[u8; 512]>, DiskError> {
    Ok(sector(disk, number)?.filter(|sector| sector.ends_with(&[0x55, 0xaa])))
}

/// An entry of a table: type, first sector, sectors.
fn entry(table: &[u8; 512], index: usize) -> (u8, u64, u64) {
    let at = 446 + index * 16;
    let kind = le(table, at + 4, 1) as u8;
    (kind, le(table, at + 8, 4), le(table, at + 12, 4))
}
