//! Disks: partitions and file systems in which a kernel is looked for, and qcow2 images.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use strata_disk::{Access, DiskBackend, DiskError, DiskFormat, Source};

use super::input::{Input, Sum};
use super::lock;

/// A disk in memory, of 1 MiB at least; what is behind the input is zero.
#[derive(Debug)]
struct Memory(Vec<u8>);

impl DiskBackend for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn readonly(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let end = usize::try_from(offset)
            .ok()
            .and_then(|at| at.checked_add(buf.len()));
        match end.and_then(|end| self.0.get(offset as usize..end)) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(DiskError::OutOfRange {
                offset,
                len: buf.len() as u64,
                size: self.size(),
            }),
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        Err(DiskError::OutOfRange {
            offset,
            len: buf.len() as u64,
            size: 0,
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<(), DiskError> {
        Err(DiskError::OutOfRange {
            offset,
            len,
            size: 0,
        })
    }
}

/// Looks for a kernel. The input is a list of changes of a good disk, or a disk of its own.
pub fn find(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let good = good_disks();
    let disk = match good.get(usize::from(input.byte()) % (good.len() + 1)) {
        Some(good) => {
            let mut disk = good.clone();
            changes(&mut input, &mut disk);
            disk
        }
        None => {
            let mut disk = bytes.to_vec();
            disk.resize(disk.len().max(1 << 20).next_multiple_of(512), 0);
            disk
        }
    };
    let mut sum = Sum::new();
    let disk: Arc<dyn DiskBackend> = Arc::new(Memory(disk));
    match strata_boot::find_kernel(&disk, Some("quiet")) {
        Ok(found) => sum.text(&format!("{:.200}", format!("{found:?}"))),
        Err(error) => sum.text(&error.to_string()),
    }
    sum.0
}

/// Puts numbers over what is there: near the beginnings of structures more often than elsewhere.
fn changes(input: &mut Input, disk: &mut [u8]) {
    while !input.is_empty() {
        let kind = input.byte();
        let at = match kind & 3 {
            0 => input.number(2) as usize,
            1 => input.number(2) as usize * 512 + input.byte() as usize,
            2 => 1024 + input.number(1) as usize * 2,
            _ => input.number(3) as usize,
        };
        let size = 1 << (kind >> 2 & 3);
        let value = input.any().to_le_bytes();
        for (byte, new) in disk.iter_mut().skip(at).zip(&value[..size.min(8)]) {
            *byte = *new;
        }
    }
}

/// The whole disks in the corpus.
fn good_disks() -> &'static [Vec<u8>] {
    static DISKS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    DISKS.get_or_init(|| super::corpus("disk-images"))
}

pub fn find_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = (0..=good_disks().len() as u8)
        .map(|index| vec![index])
        .collect();
    seeds.push(vec![0, 2, 0x10, 0, 1]);
    seeds.push(vec![1, 1, 1, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8]);
    seeds
}

/// Opens an image, reads and writes it. The input is the image, as changes of a good one.
pub fn qcow2(bytes: &[u8]) -> u64 {
    static FILE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    static ONE: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE);
    let (_, path) = FILE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let path = directory.path().join("image.qcow2");
        (directory, path)
    });
    static GOOD: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let good = GOOD.get_or_init(|| super::corpus("qcow2-images"));
    let mut sum = Sum::new();
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let mut image = match good.get(usize::from(choice & 15) % good.len().max(1)) {
        Some(good) => good.clone(),
        None => return 0,
    };
    let accesses = input.byte() & 15;
    let mut plan = Vec::new();
    for _ in 0..accesses {
        plan.push((input.byte(), input.any(), input.number(2)));
    }
    // Headers of qcow2 are big-endian.
    while !input.is_empty() {
        let kind = input.byte();
        let at = match kind & 3 {
            0 | 1 => usize::from(input.byte()),
            2 => input.number(2) as usize * 8,
            _ => input.number(3) as usize,
        };
        let size = 1usize << (kind >> 2 & 3);
        let value = input.any().to_be_bytes();
        for (byte, new) in image.iter_mut().skip(at).zip(&value[8 - size.min(8)..]) {
            *byte = *new;
        }
    }
    if fs::write(path, &image).is_err() {
        return 0;
    }
    let access = if choice & 0x80 != 0 {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let source = Source {
        path,
        format: Some(DiskFormat::Qcow2),
        access,
        backing: &[],
        data: None,
    };
    match strata_disk::open(&source) {
        Ok(disk) => {
            let mut buffer = vec![0x11; 1 << 16];
            for (kind, offset, len) in plan {
                let len = len as usize;
                let offset = if kind & 0x10 != 0 {
                    offset
                } else {
                    offset % disk.size().max(1)
                };
                let result = match kind & 7 {
                    0 | 1 => disk.read_at(offset, &mut buffer[..len]),
                    2 | 3 => disk.write_at(offset, &buffer[..len]),
                    4 => disk.flush(),
                    5 => disk.discard(offset, len as u64),
                    6 => disk.write_zeroes(offset, len as u64 * 16, kind & 8 != 0),
                    _ => disk.read_at(offset & !511, &mut buffer[..512]),
                };
                match result {
                    Ok(()) => sum.add(u64::from(kind)),
                    Err(error) => sum.text(&error.to_string()),
                }
            }
            if let Err(error) = disk.close() {
                sum.text(&error.to_string());
            }
        }
        Err(error) => sum.text(&error.to_string()),
    }
    sum.0
}

pub fn qcow2_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for image in 0..4 {
        seeds.push(vec![image, 0]);
        // A read, a write, a flush, a discard, zeroes.
        let mut seed = vec![image, 6];
        for kind in [0, 2, 4, 5, 6, 0] {
            seed.extend([kind, 1, 0x00, 0x10, 0x00, 0x02]);
        }
        seeds.push(seed);
    }
    seeds
}
