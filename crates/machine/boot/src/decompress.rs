//! Unpacks the kernel inside a bzImage on the host, which costs milliseconds instead of the guest's seconds.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use crate::BootError;
use crate::bzimage::BzImage;

/// No kernel is larger unpacked; what claims to be is damaged or hostile.
const UNPACKED_MAX: usize = 512 << 20;
/// The most that a decoder may set aside for its window or dictionary (zstd's highest level uses 128 MiB).
const WINDOW_MAX: u64 = 256 << 20;
/// Blocks of the LZ4 legacy format hold this much unpacked, except the last.
const LZ4_BLOCK: usize = 8 << 20;
/// After the compressed data Linux's build writes the unpacked size as 32 bits.
const SIZE_TRAILER: usize = 4;

/// The kernel (an ELF file) inside a bzImage, unpacked. `Ok(None)` if there is none or if its compression is one that
/// is left to the guest (bzip2, LZMA, LZO).
///
/// # Errors
/// If the file is not a valid bzImage or its payload is damaged.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Option<Vec<u8>>, BootError> {
    if !BzImage::is_one(bzimage) {
        return Err(BootError::UnknownFormat {
            len: bzimage.len() as u64,
        });
    }
    unpack(&BzImage::parse(bzimage)?)
}

/// The same for a bzImage that was parsed already.
pub(crate) fn unpack(image: &BzImage) -> Result<Option<Vec<u8>>, BootError> {
    let Some(payload) = image.payload else {
        return Ok(None);
    };
    let Some((data, trailer)) = payload.split_last_chunk::<SIZE_TRAILER>() else {
        return Ok(None);
    };
    let unpacked = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4(data)?,
        // gzip's own last field is the size, so nothing is appended to it.
        [0x1f, 0x8b, ..] => read_all("gzip", flate2::bufread::GzDecoder::new(payload))?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => read_all(
            "xz",
            lzma_rust2::XzReader::new_mem_limit(data, false, (WINDOW_MAX >> 10) as u32),
        )?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => read_all("zstd", zstd(data)?)?,
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        _ => return Ok(None),
    };
    // An uncompressed payload has no size to compare with.
    let size = if payload.starts_with(b"\x7fELF") {
        unpacked.len()
    } else {
        u32::from_le_bytes(*trailer) as usize
    };
    if unpacked.len() != size {
        let reason = format!("it holds {} bytes and says it holds {size}", unpacked.len());
        return Err(BootError::Payload {
            format: "compressed",
            reason,
        });
    }
    Ok(Some(unpacked))
}

/// The LZ4 legacy format: a magic number, then blocks, each after its compressed size. Every block but the last unpacks
/// to the same size, so that each can be unpacked by itself, on as many threads as the host has CPUs.
fn lz4(data: &[u8]) -> Result<Vec<u8>, BootError> {
    let damaged = |reason: String| BootError::Payload {
        format: "LZ4",
        reason,
    };
    let mut blocks = Vec::new();
    let mut rest = data.get(4..).unwrap_or_default();
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let Some((block, after)) = after.split_at_checked(size) else {
            return Err(damaged(format!(
                "a block of {size} bytes begins {} bytes before the end",
                after.len()
            )));
        };
        blocks.push(block);
        rest = after;
        if (blocks.len() - 1) * LZ4_BLOCK > UNPACKED_MAX {
            return Err(damaged(format!(
                "it unpacks to more than {UNPACKED_MAX} bytes"
            )));
        }
    }
    // Fresh memory is zeroes already: each byte is written once.
    let mut unpacked = vec![0; blocks.len() * LZ4_BLOCK];
    let pairs = blocks.iter().zip(unpacked.chunks_mut(LZ4_BLOCK));
    let work = Mutex::new(pairs.enumerate());
    let next = || work.lock().unwrap_or_else(PoisonError::into_inner).next();
    // The blocks that were not full: where they are, and their lengths.
    let unpack = || -> Result<Vec<(usize, usize)>, BootError> {
        let mut short = Vec::new();
        while let Some((index, (block, place))) = next() {
            let len = lz4_flex::block::decompress_into(block, place)
                .map_err(|error| damaged(error.to_string()))?;
            if len < LZ4_BLOCK {
                short.push((index, len));
            }
        }
        Ok(short)
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let helpers = cpus.min(blocks.len()).saturating_sub(1);
    let short = std::thread::scope(|scope| {
        // A host without threads to spare leaves it all to us.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, unpack).ok();
        let helpers: Vec<_> = (0..helpers).filter_map(spawn).collect();
        let mut short = unpack()?;
        for helper in helpers {
            let helped = helper
                .join()
                .map_err(|_| damaged("a decoder gave up".to_owned()))?;
            short.extend(helped?);
        }
        Ok(short)
    })?;
    match short.as_slice() {
        [] => {}
        [(index, len)] if index + 1 == blocks.len() => unpacked.truncate(index * LZ4_BLOCK + len),
        _ => return Err(damaged("a block before the last is too short".to_owned())),
    }
    Ok(unpacked)
}

fn zstd(data: &[u8]) -> Result<impl Read, BootError> {
    ruzstd::decoding::StreamingDecoder::new_with_max_window_size(data, WINDOW_MAX).map_err(
        |error| BootError::Payload {
            format: "zstd",
            reason: error.to_string(),
        },
    )
}

/// Everything a decoder gives, up to the largest size taken.
fn read_all(format: &'static str, decoder: impl Read) -> Result<Vec<u8>, BootError> {
    let mut unpacked = Vec::new();
    let damaged = |reason: String| BootError::Payload { format, reason };
    decoder
        .take(UNPACKED_MAX as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|error| damaged(error.to_string()))?;
    if unpacked.len() > UNPACKED_MAX {
        return Err(damaged(format!(
            "it unpacks to more than {UNPACKED_MAX} bytes"
        )));
    }
    Ok(unpacked)
}
