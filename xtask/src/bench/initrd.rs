//! The smallest RAM disk: an archive in the kernel's "newc" form with one file, `/init`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Writes a RAM disk whose `/init` is `program`; returns its path.
pub fn with_init(program: &Path, to: &Path) -> Result<PathBuf> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let mut archive = Vec::with_capacity(bytes.len() + 1024);
    push(&mut archive, "init", 0o100_755, &bytes)?;
    push(&mut archive, "TRAILER!!!", 0, &[])?;
    fs::write(to, archive).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(to.to_path_buf())
}

/// Appends one entry: a head of hexadecimal numbers, the name, the contents, each padded to 4 bytes.
pub fn push(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
    let size = u32::try_from(contents.len()).context("the file is too large for a RAM disk")?;
    let name_size = u32::try_from(name.len() + 1)?;
    archive.extend(b"070701");
    // inode, mode, owner, group, links, time, size, four device numbers, size of the name, checksum
    for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend(format!("{field:08X}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded() {
        let mut archive = Vec::new();
        push(&mut archive, "init", 0o100_755, b"hello").unwrap();
        assert_eq!(archive.len(), 116 + 8);
        assert!(archive.starts_with(b"07070100000000000081ED"));
        assert_eq!(&archive[110..121], b"init\0\0hello");
    }
}
