//! Digests by which the cache names what it keeps.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Disks are read in blocks of this size.
const BLOCK: usize = 64 << 10;

/// SHA-256 of bytes, in lower-case hexadecimal.
pub fn of_bytes(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

/// SHA-256 of a file's contents.
pub fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// SHA-256 of a disk: of its size, and of each block of 64 KiB that is not all zeros with its place. The same for disks
/// that read the same, wherever the file has holes; and holes cost nothing.
pub fn of_disk(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(size.to_le_bytes());
    let mut buffer = vec![0; BLOCK];
    let mut at = 0;
    while at < size {
        // A file system that knows no holes says that all is data.
        at = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data / BLOCK as u64 * BLOCK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => at,
        };
        let length = (size - at).min(BLOCK as u64) as usize;
        let block = &mut buffer[..length];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(block)?;
        if block.iter().any(|&byte| byte != 0) {
            hash.update(at.to_le_bytes());
            hash.update(&*block);
        }
        at += length as u64;
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_and_zeros_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let disk = |name: &str, size: u64, writes: &[(u64, &[u8])]| {
            let path = directory.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_len(size).unwrap();
            for (at, data) in writes {
                file.write_all_at(data, *at).unwrap();
            }
            of_disk(&path).unwrap()
        };
        let size = 5 * BLOCK as u64 + 512;
        let zeros = vec![0; size as usize];
        let empty = disk("empty", size, &[]);
        assert_eq!(disk("zeros", size, &[(0, &zeros)]), empty);
        assert_ne!(disk("longer", size + 512, &[]), empty);
        let written = disk("written", size, &[(70_000, b"x"), (size - 1, b"y")]);
        assert_eq!(
            disk(
                "full",
                size,
                &[(0, &zeros), (70_000, b"x"), (size - 1, b"y")]
            ),
            written
        );
        assert_ne!(
            disk("other", size, &[(70_001, b"x"), (size - 1, b"y")]),
            written
        );
        assert_ne!(
            disk("moved", size, &[(140_000, b"x"), (size - 1, b"y")]),
            written
        );
    }
}
