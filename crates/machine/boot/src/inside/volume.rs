//! Files in a partition: what file system it is, and reading from ext4, ext3 and ext2 (by `ext4-view`, which has no
//! unsafe code and only reads).

use std::error::Error;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};
use strata_disk::{DiskBackend, DiskError};

use super::FindError;
use super::partition::{Partition, le};

/// Names in a directory that are looked at.
const NAMES_MAX: usize = 4096;

/// The library reserves memory by what a superblock says: what no file system has is refused before. Blocks of 64 KiB are
/// the greatest; a million groups of the usual size are 128 TiB.
const BLOCK_BITS_MAX: u64 = 16;
const GROUPS_MAX: u64 = 1 << 20;
/// mke2fs makes no smaller groups.
const GROUP_BLOCKS_MIN: u64 = 256;

/// What begins where, and what it is then called.
const KINDS: [(u64, &[u8], &str); 9] = [
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "an encrypted volume"),
    (0x218, b"LVM2 001", "a volume of LVM"),
    (0, b"hsqs", "squashfs"),
    (82, b"FAT32", "FAT"),
    (54, b"FAT1", "FAT"),
    (4086, b"SWAPSPACE2", "swap space"),
];

/// What a partition holds, as far as it is known here.
pub(super) fn kind(
    disk: &dyn DiskBackend,
    partition: &Partition,
) -> Result<Option<&'static str>, DiskError> {
    for (at, magic, name) in KINDS {
        let mut bytes = vec![0; magic.len()];
        if at + magic.len() as u64 <= partition.len {
            disk.read_at(partition.start + at, &mut bytes)?;
            if bytes == magic {
                return Ok(Some(name));
            }
        }
    }
    Ok(None)
}

/// A partition as `ext4-view` reads it.
struct Window {
    disk: Arc<dyn DiskBackend>,
    partition: Partition,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start: u64,
        buf: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let end = start.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.partition.len) {
            return Err("it lies outside the partition".into());
        }
        Ok(self.disk.read_at(self.partition.start + start, buf)?)
    }
}

fn superblock(disk: &dyn DiskBackend, partition: &Partition) -> Result<[u8; 1024], DiskError> {
    let mut bytes = [0; 1024];
    if partition.len >= 2048 {
        disk.read_at(partition.start + 1024, &mut bytes)?;
    }
    Ok(bytes)
}

/// Whether a superblock's sizes are those of a file system that fits into its partition.
fn is_bearable(superblock: &[u8; 1024], partition_len: u64) -> bool {
    let field = |at| le(superblock, at, 4);
    let block_bits = field(0x18) + 10;
    let is_64_bit = field(0x60) & 0x80 != 0;
    let high = if is_64_bit { field(0x150) << 32 } else { 0 };
    let blocks = high | field(0x4);
    let per_group = field(0x20);
    if block_bits > BLOCK_BITS_MAX
        || blocks > partition_len >> block_bits
        || per_group < GROUP_BLOCKS_MIN
    {
        return false;
    }
    blocks / per_group < GROUPS_MAX
}

/// A file system that can be read.
pub(super) struct Volume {
    pub(super) partition: Partition,
    files: Ext4,
}

impl Volume {
    /// The file system in a partition that holds one of the ext family.
    pub(super) fn open(
        disk: &Arc<dyn DiskBackend>,
        partition: &Partition,
    ) -> Result<Volume, String> {
        let window = Window {
            disk: disk.clone(),
            partition: partition.clone(),
        };
        let superblock = superblock(&**disk, partition).map_err(|error| error.to_string())?;
        if !is_bearable(&superblock, partition.len) {
            return Err("its sizes are impossible".to_owned());
        }
        let files = Ext4::load(Box::new(window)).map_err(|error| error.to_string())?;
        Ok(Volume {
            partition: partition.clone(),
            files,
        })
    }

    /// The file system's UUID.
    pub(super) fn uuid(&self) -> String {
        self.files.uuid().to_string()
    }

    /// Whether something is there; what cannot be read is not.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.files.exists(path).unwrap_or(false)
    }

    /// Where a path leads after all links.
    pub(super) fn resolve(&self, path: &str) -> Option<String> {
        let real = self.files.canonicalize(path).ok()?;
        let is_file = self.files.metadata(&real).ok()?.file_type();
        let real = real.to_str().ok()?.to_owned();
        is_file.is_regular_file().then_some(real)
    }

    /// The names in a directory; none if it cannot be read.
    pub(super) fn names(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = self.files.read_dir(directory) else {
            return Vec::new();
        };
        let names = entries
            .take(NAMES_MAX)
            .map_while(Result::ok)
            .filter_map(|entry| Some(entry.file_name().as_str().ok()?.to_owned()));
        names.collect()
    }

    /// The content of a file of at most `max` bytes.
    pub(super) fn read(&self, path: &str, max: u64) -> Result<Vec<u8>, FindError> {
        let failed = |reason: String| FindError::File {
            path: path.to_owned(),
            place: super::place(&self.partition),
            reason,
        };
        let not_read = |error: Ext4Error| failed(error.to_string());
        let mut file = self.files.open(path).map_err(not_read)?;
        let len = file.metadata().len();
        if len > max {
            return Err(failed(format!("it has {len} bytes, and {max} is the most")));
        }
        // Grown as it is read: what a damaged file system says of a size is not worth memory.
        let mut content = Vec::new();
        let mut piece = vec![0; 64 << 10];
        while (content.len() as u64) < len {
            let count = file.read_bytes(&mut piece).map_err(not_read)?;
            let Some(bytes) = piece.get(..count).filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            content.extend_from_slice(bytes);
        }
        Ok(content)
    }

    /// A short text; none if it is not there.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let bytes = self.read(path, 64 << 10).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}
