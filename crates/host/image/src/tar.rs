//! Reads and writes tar archives as Debian packages hold them: POSIX ustar with GNU long names (`dpkg-deb` writes these).

use std::io::{self, Read, Write};

const BLOCK: usize = 512;

/// Larger files than this are refused before memory is asked for. The largest kernel is a tenth of it.
const FILE_SIZE_MAX: u64 = 512 << 20;

/// Larger names than this are refused.
const NAME_SIZE_MAX: u64 = 64 << 10;

/// What an entry is, besides its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of this many bytes.
    File(u64),
    /// Another name of an entry that came before.
    HardLink(String),
    /// A symbolic link.
    Symlink(String),
    /// A directory.
    Directory,
    /// A device node or pipe; Debian's packages have none.
    Other,
}

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without `./` in front or `/` behind; empty for the archive's root.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// What it is.
    pub kind: Kind,
}

/// Hands each entry to `take`, along with its contents, which need not be read.
pub fn for_each_entry(
    mut archive: impl Read,
    mut take: impl FnMut(Entry, &mut dyn Read) -> io::Result<()>,
) -> io::Result<()> {
    let (mut long_name, mut long_link) = (None, None);
    let mut header = [0; BLOCK];
    loop {
        archive.read_exact(&mut header)?;
        if header.iter().all(|&byte| byte == 0) {
            // Padding may follow; a writer that is not listened to dies of it.
            io::copy(&mut archive, &mut io::sink())?;
            return Ok(());
        }
        check_sum(&header)?;
        let size = octal(&header[124..136])?;
        match header[156] {
            kind @ (b'L' | b'K') if size <= NAME_SIZE_MAX => {
                let name = text(&contents(&mut archive, size)?)?;
                *(if kind == b'L' {
                    &mut long_name
                } else {
                    &mut long_link
                }) = Some(name);
            }
            kind => {
                let name = match long_name.take() {
                    Some(name) => name,
                    None => short_name(&header)?,
                };
                let link = match long_link.take() {
                    Some(link) => link,
                    None => text(&header[157..257])?,
                };
                let entry = Entry {
                    path: plain(&name).to_owned(),
                    mode: small(&header[100..108])? & 0o7777,
                    uid: small(&header[108..116])?,
                    gid: small(&header[116..124])?,
                    mtime: octal(&header[136..148])?,
                    kind: match kind {
                        b'0' | b'\0' => Kind::File(size),
                        b'1' => Kind::HardLink(plain(&link).to_owned()),
                        b'2' => Kind::Symlink(link),
                        b'5' => Kind::Directory,
                        _ => Kind::Other,
                    },
                };
                let mut data = archive.by_ref().take(size);
                take(entry, &mut data)?;
                let unread = data.limit();
                skip(&mut archive, unread + padded(size) - size)?;
            }
        }
    }
}

/// Hands each regular file whose path is `wanted` to `keep`.
pub fn for_each_file(
    archive: impl Read,
    mut wanted: impl FnMut(&str) -> bool,
    mut keep: impl FnMut(&str, Vec<u8>),
) -> io::Result<()> {
    for_each_entry(archive, |entry, data| match entry.kind {
        Kind::File(size) if wanted(&entry.path) => {
            keep(&entry.path, whole(data, size)?);
            Ok(())
        }
        _ => Ok(()),
    })
}

/// All of a file's contents.
pub fn whole(data: &mut dyn Read, size: u64) -> io::Result<Vec<u8>> {
    if size > FILE_SIZE_MAX {
        return Err(invalid("a file is too large"));
    }
    let mut contents = Vec::new();
    data.take(size).read_to_end(&mut contents)?;
    if contents.len() as u64 == size {
        Ok(contents)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// A path without `./` in front or `/` behind.
fn plain(path: &str) -> &str {
    let path = path
        .strip_prefix('.')
        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
        .unwrap_or(path);
    path.trim_matches('/')
}

/// Writes an archive, in the form that is read above.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// An archive that goes to `out`.
    pub fn new(out: W) -> Writer<W> {
        Writer { out }
    }

    /// Adds an entry. Of a file, `data` has exactly the contents; of others it is not read.
    pub fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        let (kind, size, link) = match &entry.kind {
            Kind::File(size) => (b'0', *size, ""),
            Kind::HardLink(target) => (b'1', 0, target.as_str()),
            Kind::Symlink(target) => (b'2', 0, target.as_str()),
            Kind::Directory => (b'5', 0, ""),
            Kind::Other => return Err(invalid("an entry is neither file nor directory nor link")),
        };
        for (long, text) in [(b'L', entry.path.as_str()), (b'K', link)] {
            if text.len() > 100 {
                let length = text.len() as u64 + 1;
                self.header(
                    "././@LongLink",
                    long,
                    length,
                    "",
                    &Entry {
                        mode: 0o644,
                        ..entry.clone()
                    },
                )?;
                self.out.write_all(text.as_bytes())?;
                self.pad(length - 1)?;
            }
        }
        self.header(&entry.path, kind, size, link, entry)?;
        if io::copy(&mut data.take(size), &mut self.out)? != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.out
            .write_all(&[0; BLOCK][..(padded(size) - size) as usize])
    }

    /// Adds a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, mut contents: &[u8]) -> io::Result<()> {
        let kind = Kind::File(contents.len() as u64);
        self.entry(
            &Entry {
                path: path.to_owned(),
                mode,
                uid: 0,
                gid: 0,
                mtime: 0,
                kind,
            },
            &mut contents,
        )
    }

    /// Adds a directory of root's.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        let kind = Kind::Directory;
        self.entry(
            &Entry {
                path: path.to_owned(),
                mode,
                uid: 0,
                gid: 0,
                mtime: 0,
                kind,
            },
            &mut io::empty(),
        )
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let kind = Kind::Symlink(target.to_owned());
        self.entry(
            &Entry {
                path: path.to_owned(),
                mode: 0o777,
                uid: 0,
                gid: 0,
                mtime: 0,
                kind,
            },
            &mut io::empty(),
        )
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// The NUL that ends a text of `length` bytes, and what is missing to the next block.
    fn pad(&mut self, length: u64) -> io::Result<()> {
        self.out
            .write_all(&[0; BLOCK][..(padded(length + 1) - length) as usize])
    }

    fn header(
        &mut self,
        path: &str,
        kind: u8,
        size: u64,
        link: &str,
        entry: &Entry,
    ) -> io::Result<()> {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, &path.as_bytes()[..path.len().min(100)]);
        for (at, number) in [(100, entry.mode), (108, entry.uid), (116, entry.gid)] {
            put(at, format!("{number:07o}").as_bytes());
        }
        if size >> 33 != 0 || entry.mtime >> 33 != 0 || (entry.uid | entry.gid) >> 21 != 0 {
            return Err(invalid("a number is too large"));
        }
        put(124, format!("{size:011o}").as_bytes());
        put(136, format!("{:011o}", entry.mtime).as_bytes());
        put(148, &[b' '; 8]);
        put(156, &[kind]);
        put(157, &link.as_bytes()[..link.len().min(100)]);
        put(257, b"ustar  ");
        let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.out.write_all(&header)
    }
}

/// Reads a file's contents and the padding after them.
fn contents(archive: &mut impl Read, size: u64) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    archive.by_ref().take(size).read_to_end(&mut data)?;
    if data.len() as u64 != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    skip(archive, padded(size) - size)?;
    Ok(data)
}

fn skip(archive: &mut impl Read, size: u64) -> io::Result<()> {
    let skipped = io::copy(&mut archive.by_ref().take(size), &mut io::sink())?;
    if skipped == size {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn padded(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64)
}

fn check_sum(header: &[u8; BLOCK]) -> io::Result<()> {
    let blank = |at: usize, byte: u8| {
        if (148..156).contains(&at) {
            u64::from(b' ')
        } else {
            u64::from(byte)
        }
    };
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, &byte)| blank(at, byte))
        .sum();
    if octal(&header[148..156])? == sum {
        Ok(())
    } else {
        Err(invalid("a header is damaged"))
    }
}

/// A number as tar writes it: octal digits, ended by a space or NUL.
fn octal(field: &[u8]) -> io::Result<u64> {
    let field = text(field)?;
    let digits = field.trim();
    if digits.is_empty() {
        Ok(0)
    } else {
        u64::from_str_radix(digits, 8).map_err(|_| invalid("a number is damaged"))
    }
}

/// A number that has to fit 32 bits.
fn small(field: &[u8]) -> io::Result<u32> {
    u32::try_from(octal(field)?).map_err(|_| invalid("a number is too large"))
}

fn short_name(header: &[u8; BLOCK]) -> io::Result<String> {
    let (name, prefix) = (text(&header[..100])?, text(&header[345..500])?);
    if &header[257..262] == b"ustar" && header[262] == 0 && !prefix.is_empty() {
        Ok(format!("{prefix}/{name}"))
    } else {
        Ok(name)
    }
}

/// The characters up to the first NUL.
fn text(field: &[u8]) -> io::Result<String> {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    String::from_utf8(field[..end].to_vec()).map_err(|_| invalid("a name is not UTF-8"))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
        let mut header = vec![0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[148..156].fill(b' ');
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar  \0");
        let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend_from_slice(data);
        header.resize(padded(header.len() as u64) as usize, 0);
        header
    }

    fn sample() -> Vec<u8> {
        let long = format!("./{}", "d/".repeat(80));
        let mut archive = entry("./", b'5', b"");
        archive.extend(entry("./a", b'0', &[1; 513]));
        archive.extend(entry(
            "././@LongLink",
            b'L',
            format!("{long}name\0").as_bytes(),
        ));
        archive.extend(entry("shortened", b'0', b"long"));
        archive.extend(entry("./link", b'2', b""));
        archive.extend(entry("./skipped", b'0', &[3; 512]));
        archive.extend(entry("./b", b'0', b""));
        archive.resize(archive.len() + 2 * BLOCK, 0);
        archive
    }

    fn read(archive: &[u8]) -> io::Result<Vec<(String, usize)>> {
        let mut files = Vec::new();
        for_each_file(
            archive,
            |name| name != "skipped",
            |name, data| files.push((name.to_owned(), data.len())),
        )?;
        Ok(files)
    }

    #[test]
    fn names_and_sizes() {
        let long = format!("{}name", "d/".repeat(80));
        let expected = [("a".to_owned(), 513), (long, 4), ("b".to_owned(), 0)];
        assert_eq!(read(&sample()).unwrap(), expected);
    }

    fn copy(archive: &[u8]) -> (Vec<Entry>, Vec<u8>) {
        let mut entries = Vec::new();
        let mut writer = Writer::new(Vec::new());
        for_each_entry(archive, |entry, data| {
            writer.entry(&entry, data)?;
            entries.push(entry);
            Ok(())
        })
        .unwrap();
        (entries, writer.finish().unwrap())
    }

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::new(Vec::new());
        writer.directory("", 0o755).unwrap();
        writer.file(&"n".repeat(300), 0o4755, &[7; 1000]).unwrap();
        writer.file(&"m".repeat(100), 0o600, &[]).unwrap();
        writer.symlink("s", &"t/".repeat(200)).unwrap();
        writer.symlink(&"l/".repeat(60), "x").unwrap();
        let first = writer.finish().unwrap();
        let (entries, second) = copy(&first);
        assert_eq!(second.len(), first.len());
        assert_eq!(copy(&second).0, entries);
        let kinds: Vec<&Kind> = entries.iter().map(|entry| &entry.kind).collect();
        let (long, short) = (
            Kind::Symlink("t/".repeat(200)),
            Kind::Symlink("x".to_owned()),
        );
        assert_eq!(
            kinds,
            [
                &Kind::Directory,
                &Kind::File(1000),
                &Kind::File(0),
                &long,
                &short
            ]
        );
        assert_eq!((entries[1].path.len(), entries[1].mode), (300, 0o4755));
        let kinds = |archive| copy(archive).0.into_iter().map(|entry| entry.kind);
        assert!(kinds(&sample()).any(|kind| kind == Kind::Symlink(String::new())));
    }

    #[test]
    fn a_cut_archive_is_an_error() {
        let archive = sample();
        for length in 0..archive.len() - 2 * BLOCK {
            assert!(read(&archive[..length]).is_err());
        }
    }

    proptest! {
        #[test]
        fn damage_does_no_harm(at: proptest::sample::Index, byte: u8) {
            let mut archive = sample();
            let at = at.index(archive.len());
            archive[at] = byte;
            let _ = read(&archive);
        }
    }
}
