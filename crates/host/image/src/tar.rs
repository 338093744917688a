//! Reads tar archives as Debian packages hold them: POSIX ustar with GNU long names (`dpkg-deb` writes these).

use std::io::{self, Read};

const BLOCK: usize = 512;

/// Larger files than this are refused before memory is asked for. The largest kernel is a tenth of it.
const FILE_SIZE_MAX: u64 = 512 << 20;

/// Larger names than this are refused.
const NAME_SIZE_MAX: u64 = 64 << 10;

/// Hands each regular file whose path (without `./`) is `wanted` to `keep`.
pub fn for_each_file(
    mut archive: impl Read,
    mut wanted: impl FnMut(&str) -> bool,
    mut keep: impl FnMut(&str, Vec<u8>),
) -> io::Result<()> {
    let mut long_name = None;
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
            b'L' if size <= NAME_SIZE_MAX => {
                let name = contents(&mut archive, size)?;
                long_name = Some(text(&name));
            }
            b'0' | b'\0' => {
                let name = long_name.take().unwrap_or_else(|| short_name(&header));
                let name = name.strip_prefix("./").unwrap_or(&name);
                if !wanted(name) {
                    skip(&mut archive, padded(size))?;
                } else if size > FILE_SIZE_MAX {
                    return Err(invalid("a file is too large"));
                } else {
                    keep(name, contents(&mut archive, size)?);
                }
            }
            _ => {
                long_name = None;
                skip(&mut archive, padded(size))?;
            }
        }
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
    let field = text(field);
    let digits = field.trim();
    if digits.is_empty() {
        Ok(0)
    } else {
        u64::from_str_radix(digits, 8).map_err(|_| invalid("a number is damaged"))
    }
}

fn short_name(header: &[u8; BLOCK]) -> String {
    let (name, prefix) = (text(&header[..100]), text(&header[345..500]));
    if &header[257..262] == b"ustar" && header[262] == 0 && !prefix.is_empty() {
        format!("{prefix}/{name}")
    } else {
        name
    }
}

/// The characters up to the first NUL.
fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
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
