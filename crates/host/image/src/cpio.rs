//! Writes initial RAM disks: cpio archives in the "newc" format the kernel reads
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Reproducible: entries are sorted by path, owned by root, without times.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// Links on the way to a file that are followed, as many as Linux follows.
const LINKS_MAX: usize = 40;

/// One entry that is not a directory on the way to another (those come by themselves).
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Directory { mode: u32 },
    File { mode: u32, data: Vec<u8> },
    Symlink { target: String },
    CharacterDevice { mode: u32, major: u32, minor: u32 },
}

/// An archive being put together. Paths are relative, without `.` or `..`.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a directory. Parents appear with mode 0755 unless they are added too.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.insert(path, Entry::Directory { mode });
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, data: impl Into<Vec<u8>>) {
        self.insert(
            path,
            Entry::File {
                mode,
                data: data.into(),
            },
        );
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.insert(
            path,
            Entry::Symlink {
                target: target.to_owned(),
            },
        );
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.insert(path, Entry::CharacterDevice { mode, major, minor });
    }

    /// Adds another name of a file that is there. False if it is not.
    pub fn hard_link(&mut self, path: &str, target: &str) -> bool {
        let entry = self.entries.get(&self.real(target)).cloned();
        let is_file = matches!(entry, Some(Entry::File { .. }));
        if let (true, Some(entry)) = (is_file, entry) {
            self.insert(path, entry);
        }
        is_file
    }

    /// Whether there is a directory.
    pub fn is_directory(&self, path: &str) -> bool {
        matches!(self.entries.get(path), Some(Entry::Directory { .. }))
    }

    /// Whether there is a directory, or a link that may lead to one.
    pub fn is_directory_or_link(&self, path: &str) -> bool {
        self.is_directory(path) || matches!(self.entries.get(path), Some(Entry::Symlink { .. }))
    }

    /// Where a path leads when the directories above it are links: the path behind them.
    pub fn real(&self, path: &str) -> String {
        let mut real: Vec<String> = Vec::new();
        let mut left: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut links = 0;
        while let Some(name) = left.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    real.pop();
                    continue;
                }
                _ => real.push(name),
            }
            if let Some(Entry::Symlink { target }) = self.entries.get(&real.join("/"))
                && !left.is_empty()
                && links < LINKS_MAX
            {
                links += 1;
                real.pop();
                if target.starts_with('/') {
                    real.clear();
                }
                left.extend(target.split('/').rev().map(str::to_owned));
            }
        }
        real.join("/")
    }

    /// Whether the path is there already.
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        for (at, _) in path.match_indices('/') {
            self.entries
                .entry(path[..at].to_owned())
                .or_insert(Entry::Directory { mode: 0o755 });
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes the archive. A parent's path is a prefix of its children's, so sorting puts it first.
    pub fn write(&self, out: impl Write) -> io::Result<()> {
        let mut out = Padded { out, written: 0 };
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            let inode = u32::try_from(number + 1).map_err(io::Error::other)?;
            match entry {
                Entry::Directory { mode } => {
                    out.entry(inode, path, 0o040000 | mode, 2, (0, 0), &[])?
                }
                Entry::File { mode, data } => {
                    out.entry(inode, path, 0o100000 | mode, 1, (0, 0), data)?
                }
                Entry::Symlink { target } => {
                    out.entry(inode, path, 0o120777, 1, (0, 0), target.as_bytes())?
                }
                Entry::CharacterDevice { mode, major, minor } => {
                    out.entry(inode, path, 0o020000 | mode, 1, (*major, *minor), &[])?;
                }
            }
        }
        out.entry(0, "TRAILER!!!", 0, 1, (0, 0), &[])?;
        out.out.flush()
    }
}

/// A RAM disk's bytes and after them a small archive with one more file: the kernel unpacks both. The init of a machine
/// with a root disk leaves the file in `/run/strata` for the system on that disk.
pub fn keep_in_run(initrd: &Path, name: &str, data: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = std::fs::read(initrd)?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::default();
    archive.file(&format!("etc/strata/keep/{name}"), 0o600, data);
    archive.write(&mut bytes)?;
    Ok(bytes)
}

/// Keeps headers and data on multiples of four bytes.
struct Padded<W> {
    out: W,
    written: usize,
}

impl<W: Write> Padded<W> {
    fn entry(
        &mut self,
        inode: u32,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let (uid, gid, time, on_major, on_minor, checksum) = (0, 0, 0, 0, 0, 0);
        let fields = [
            inode, mode, uid, gid, links, time, size, on_major, on_minor, device.0, device.1,
            name_size, checksum,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.bytes(header.as_bytes())?;
        self.bytes(path.as_bytes())?;
        self.bytes(&[0])?;
        self.pad()?;
        self.bytes(data)?;
        self.pad()
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.bytes(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(reverse: bool) -> Vec<u8> {
        let mut archive = Archive::default();
        let mut steps: Vec<fn(&mut Archive)> = vec![
            |a| a.file("bin/tool", 0o755, *b"hello"),
            |a| a.symlink("bin/sh", "tool"),
            |a| a.directory("tmp", 0o1777),
            |a| a.character_device("dev/console", 0o600, 5, 1),
        ];
        if reverse {
            steps.reverse();
        }
        steps.iter().for_each(|step| step(&mut archive));
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn order_of_insertion_does_not_matter() {
        assert_eq!(sample(false), sample(true));
    }

    #[test]
    fn paths_lead_through_links() {
        let mut archive = Archive::default();
        archive.symlink("usr/bin", "../bin");
        archive.symlink("sbin", "/usr/bin");
        archive.symlink("loop", "loop");
        archive.symlink("bin/sh", "busybox");
        archive.file("bin/busybox", 0o755, *b"b");
        for (path, real) in [
            ("usr/bin/x", "bin/x"),
            ("sbin/x", "bin/x"),
            ("usr/lib/x", "usr/lib/x"),
            // The last link is not followed: what is put there takes its place.
            ("usr/bin/sh", "bin/sh"),
            ("./../x", "x"),
        ] {
            assert_eq!(archive.real(path), real, "{path}");
        }
        assert!(archive.real("loop/x").ends_with('x'));
        assert!(archive.hard_link("bin/other", "sbin/busybox"));
        assert!(!archive.hard_link("bin/another", "bin/none"));
        assert!(archive.contains("bin/other"));
    }

    #[test]
    fn layout() {
        let bytes = sample(false);
        let names = [
            "bin",
            "bin/sh",
            "bin/tool",
            "dev",
            "dev/console",
            "tmp",
            "TRAILER!!!",
        ];
        let mut at = 0;
        for name in names {
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * n..at + 14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            assert_eq!(&bytes[at + 110..at + 110 + name.len()], name.as_bytes());
            if name == "dev/console" {
                assert_eq!((field(1), field(9), field(10)), (0o020600, 5, 1));
            }
            let (name_size, size) = (field(11), field(6));
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        assert_eq!(at, bytes.len());
    }
}
