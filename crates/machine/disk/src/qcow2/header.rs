//! The header of an image (QEMU, docs/interop/qcow2.txt), read and checked.

use std::fmt;

/// The first bytes of every qcow2 image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of the header of version 2, and the least of version 3.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Tables held in memory as a whole may be this big: QEMU's limits.
const L1_BYTES_MAX: u64 = 32 << 20;
pub(super) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
const BACKING_NAME_MAX: usize = 1023;
const EXTENSIONS_MAX: usize = 256;

/// Where fields are that change while an image is in use.
pub(super) const REFCOUNT_TABLE_FIELDS: u64 = 48;
pub(super) const AUTOCLEAR_FIELD: u64 = 88;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// What is below an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    /// The width of a refcount is 2 to this power, in bits.
    pub(super) refcount_order: u32,
    pub(super) autoclear: u64,
    pub(super) compression: Compression,
    pub(super) backing: Option<Backing>,
    /// The name of the file that has the data, if they are not in this one.
    pub(super) data_file: Option<String>,
    /// Refcounts may be wrong: the image was not closed.
    pub(super) dirty: bool,
    /// Somebody found the image damaged.
    pub(super) corrupt: bool,
}

/// Why a header is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is no qcow2 image.
    NotOne,
    /// It needs something that is not supported: what.
    Unsupported(String),
    /// It contradicts itself or the file: how.
    Damaged(String),
}

fn damaged(reason: impl fmt::Display) -> Refusal {
    Refusal::Damaged(reason.to_string())
}

/// A big-endian number of up to eight bytes; zero where there are no bytes.
pub(super) fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes
        .get(at..at.saturating_add(len))
        .unwrap_or_default()
        .iter();
    field.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Header {
    /// How much of the file [`Header::parse`] wants to see, if there is as much.
    pub(super) const BYTES: usize = 2 << 20;

    /// Reads the header from the beginning of a file that has `file_len` bytes.
    pub(super) fn parse(start: &[u8], file_len: u64) -> Result<Header, Refusal> {
        if !start.starts_with(&MAGIC) {
            return Err(Refusal::NotOne);
        }
        if start.len() < V2_BYTES {
            return Err(damaged("its header is cut off"));
        }
        let u32_at = |at| be(start, at, 4) as u32;
        let u64_at = |at| be(start, at, 8);
        let version = u32_at(4);
        if !matches!(version, 2 | 3) {
            return Err(Refusal::Unsupported(format!("qcow2 version {version}")));
        }
        let cluster_bits = u32_at(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(damaged(format!(
                "clusters of 2^{cluster_bits} bytes do not exist"
            )));
        }
        if u32_at(32) != 0 {
            return Err(Refusal::Unsupported("encryption".to_owned()));
        }
        let cluster = 1_u64 << cluster_bits;
        let header_bytes = if version == 2 {
            V2_BYTES
        } else {
            u32_at(100) as usize
        };
        let has_v3 = version == 3;
        if has_v3 && (header_bytes < V3_BYTES || start.len() < header_bytes) {
            return Err(damaged(format!("its header has {header_bytes} bytes")));
        }
        let first_cluster = start
            .get(..start.len().min(cluster as usize))
            .unwrap_or_default();
        let extensions = extensions(first_cluster, header_bytes, u64_at(8))?;
        let incompatible = if has_v3 { u64_at(72) } else { 0 };
        check_features(incompatible, &extensions)?;
        let refcount_order = if has_v3 { u32_at(96) } else { 4 };
        if refcount_order > 6 {
            return Err(damaged(format!(
                "refcounts of 2^{refcount_order} bits do not exist"
            )));
        }
        let header = Header {
            version,
            cluster_bits,
            size: u64_at(24),
            l1_offset: u64_at(40),
            l1_entries: u32_at(36),
            refcount_table_offset: u64_at(REFCOUNT_TABLE_FIELDS as usize),
            refcount_table_clusters: u32_at(56),
            refcount_order,
            autoclear: if has_v3 {
                u64_at(AUTOCLEAR_FIELD as usize)
            } else {
                0
            },
            compression: compression(incompatible, header_bytes, start)?,
            backing: backing(first_cluster, u64_at(8), u32_at(16), &extensions)?,
            data_file: data_file(incompatible, &extensions)?,
            dirty: incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
        };
        if u32_at(60) > SNAPSHOTS_MAX {
            return Err(damaged(format!("it has {} snapshots", u32_at(60))));
        }
        // They would share the one place that a cluster has there.
        if header.data_file.is_some() && u32_at(60) > 0 {
            return Err(damaged("it has snapshots and its data elsewhere"));
        }
        header.check_tables(file_len)?;
        Ok(header)
    }

    /// The tables that are held in memory: of bearable size, aligned, and inside the file.
    fn check_tables(&self, file_len: u64) -> Result<(), Refusal> {
        let cluster = self.cluster();
        if !self.size.is_multiple_of(crate::SECTOR_SIZE) {
            return Err(damaged(format!(
                "its disk has {} bytes, which is not a multiple of 512",
                self.size
            )));
        }
        let l1_needed = self.size.div_ceil(cluster << (self.cluster_bits - 3));
        if l1_needed > u64::from(self.l1_entries) {
            return Err(damaged(format!(
                "its L1 table has {} entries and needs {l1_needed}",
                self.l1_entries
            )));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let refcount_bytes = u64::from(self.refcount_table_clusters) * cluster;
        let tables = [
            ("L1", self.l1_offset, l1_bytes, L1_BYTES_MAX),
            (
                "refcount",
                self.refcount_table_offset,
                refcount_bytes,
                REFCOUNT_TABLE_BYTES_MAX,
            ),
        ];
        for (name, offset, bytes, max) in tables {
            if bytes > max {
                return Err(damaged(format!(
                    "its {name} table has {bytes} bytes, and {max} is the most"
                )));
            }
            let inside = offset
                .checked_add(bytes)
                .is_some_and(|end| end <= file_len.next_multiple_of(cluster));
            if bytes > 0 && (offset == 0 || !offset.is_multiple_of(cluster) || !inside) {
                return Err(damaged(format!(
                    "its {name} table is at {offset:#x} in a file of {file_len} bytes"
                )));
            }
        }
        if self.refcount_table_clusters == 0 {
            return Err(damaged("it has no refcount table"));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

fn compression(
    incompatible: u64,
    header_bytes: usize,
    start: &[u8],
) -> Result<Compression, Refusal> {
    let stated = if header_bytes > V3_BYTES {
        be(start, V3_BYTES, 1)
    } else {
        0
    };
    match (incompatible & INCOMPATIBLE_COMPRESSION != 0, stated) {
        (false, 0) => Ok(Compression::Deflate),
        (true, 1) => Ok(Compression::Zstd),
        (true, other) if other != 0 => {
            Err(Refusal::Unsupported(format!("compression method {other}")))
        }
        (_, other) => Err(damaged(format!(
            "its compression method {other} contradicts its features"
        ))),
    }
}

fn check_features(incompatible: u64, extensions: &[(u32, &[u8])]) -> Result<(), Refusal> {
    let known = INCOMPATIBLE_DIRTY
        | INCOMPATIBLE_CORRUPT
        | INCOMPATIBLE_DATA_FILE
        | INCOMPATIBLE_COMPRESSION;
    let unknown = incompatible & !known;
    if unknown == 0 {
        return Ok(());
    }
    let bit = unknown.trailing_zeros();
    let what = match 1_u64 << bit {
        INCOMPATIBLE_EXTENDED_L2 => "extended L2 entries (subclusters)".to_owned(),
        _ => match feature_name(extensions, bit) {
            Some(name) => format!("the feature '{name}' (incompatible bit {bit})"),
            None => format!("incompatible feature bit {bit}"),
        },
    };
    Err(Refusal::Unsupported(what))
}

fn data_file(incompatible: u64, extensions: &[(u32, &[u8])]) -> Result<Option<String>, Refusal> {
    if incompatible & INCOMPATIBLE_DATA_FILE == 0 {
        return Ok(None);
    }
    let name = extensions
        .iter()
        .find(|(kind, name)| *kind == EXTENSION_DATA_FILE && !name.is_empty())
        .map(|(_, name)| *name)
        .ok_or_else(|| damaged("it does not name the file with its data"))?;
    String::from_utf8(name.to_vec())
        .map(Some)
        .map_err(|_| damaged("the name of the file with its data is not text"))
}

/// What the image itself calls an incompatible feature, made fit to print.
fn feature_name(extensions: &[(u32, &[u8])], bit: u32) -> Option<String> {
    let (_, table) = extensions
        .iter()
        .find(|(kind, _)| *kind == EXTENSION_FEATURE_NAMES)?;
    let entry = table
        .chunks_exact(48)
        .find(|entry| entry.starts_with(&[0, bit as u8]))?;
    Some(printable(entry.get(2..).unwrap_or_default()))
}

fn printable(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let plain = |byte: &u8| match byte {
        b' '..=b'~' => char::from(*byte),
        _ => '?',
    };
    text.iter().map(plain).collect()
}

/// The header's extensions: { be32 type; be32 length; data, padded to 8 bytes }.
fn extensions(
    first_cluster: &[u8],
    header_bytes: usize,
    backing_offset: u64,
) -> Result<Vec<(u32, &[u8])>, Refusal> {
    let mut found = Vec::new();
    // The area ends where the backing file's name begins.
    let end = match usize::try_from(backing_offset) {
        Ok(offset) if offset > header_bytes => offset.min(first_cluster.len()),
        _ => first_cluster.len(),
    };
    let area = first_cluster.get(..end).unwrap_or_default();
    let mut at = header_bytes;
    while at.saturating_add(8) <= area.len() {
        let (kind, len) = (be(area, at, 4) as u32, be(area, at + 4, 4) as usize);
        if kind == EXTENSION_END {
            break;
        }
        let Some(data) = area.get(at + 8..(at + 8).saturating_add(len)) else {
            return Err(damaged(format!(
                "a header extension of {len} bytes begins at byte {at}"
            )));
        };
        found.push((kind, data));
        if found.len() > EXTENSIONS_MAX {
            return Err(damaged("it has too many header extensions"));
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

fn backing(
    first_cluster: &[u8],
    offset: u64,
    len: u32,
    extensions: &[(u32, &[u8])],
) -> Result<Option<Backing>, Refusal> {
    if offset == 0 {
        return Ok(None);
    }
    let (start, len) = (usize::try_from(offset).unwrap_or(usize::MAX), len as usize);
    let name = first_cluster
        .get(start..start.saturating_add(len))
        .filter(|name| !name.is_empty() && name.len() <= BACKING_NAME_MAX)
        .ok_or_else(|| {
            damaged(format!(
                "the name of its backing file has {len} bytes at {offset:#x}"
            ))
        })?;
    let name = String::from_utf8(name.to_vec())
        .map_err(|_| damaged("the name of its backing file is not text"))?;
    let format = extensions
        .iter()
        .find(|(kind, _)| *kind == EXTENSION_BACKING_FORMAT)
        .map(|(_, name)| printable(name));
    Ok(Some(Backing { name, format }))
}
