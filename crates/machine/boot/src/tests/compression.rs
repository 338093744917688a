//! Payloads of every compression that is unpacked here, as Linux's build makes them.

use std::io::Write;

use crate::testing::{ElfSpec, bzimage, lz4_payload};
use crate::{BootError, extract_vmlinux};

fn kernel() -> Vec<u8> {
    let code = (0..200_000u32)
        .flat_map(|word| (word / 7).to_le_bytes())
        .collect();
    ElfSpec {
        code,
        mem_size: 1 << 20,
        ..ElfSpec::linux()
    }
    .build()
}

/// Linux's build appends the unpacked size to all formats but gzip.
fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend((size as u32).to_le_bytes());
    packed
}

pub(super) fn gzip(kernel: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(kernel).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn xz(kernel: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(1);
    // As Linux's xz_wrap.sh does for x86.
    options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(kernel).unwrap();
    with_size(encoder.finish().unwrap(), kernel.len())
}

pub(super) fn zstd(kernel: &[u8]) -> Vec<u8> {
    let packed =
        ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest);
    with_size(packed, kernel.len())
}

#[test]
fn every_known_compression_is_unpacked() {
    let kernel = kernel();
    for payload in [
        lz4_payload(&kernel),
        gzip(&kernel),
        xz(&kernel),
        zstd(&kernel),
        kernel.clone(),
    ] {
        let unpacked = extract_vmlinux(&bzimage(&payload)).unwrap();
        assert!(
            unpacked.as_ref() == Some(&kernel),
            "magic {:x?}",
            &payload[..4]
        );
    }
}

#[test]
fn lz4_blocks_are_joined() {
    let kernel: Vec<u8> = (0..20u32 << 20).map(|at| (at >> 12) as u8).collect();
    assert!(extract_vmlinux(&bzimage(&lz4_payload(&kernel))).unwrap() == Some(kernel));
}

#[test]
fn other_compressions_are_left_to_the_guest() {
    assert_eq!(extract_vmlinux(&bzimage(b"BZh91AY&SY....")), Ok(None));
    assert_eq!(extract_vmlinux(&bzimage(&[])), Ok(None));
    assert_eq!(
        extract_vmlinux(b"not one"),
        Err(BootError::UnknownFormat { len: 7 })
    );
}

#[test]
fn damage_is_reported() {
    let kernel = kernel();
    let mut wrong_size = lz4_payload(&kernel);
    let last = wrong_size.len() - 4;
    wrong_size[last] ^= 1;
    let error = extract_vmlinux(&bzimage(&wrong_size))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("the bzImage's compressed payload is damaged: it holds"),
        "{error}"
    );

    for (payload, name) in [
        (gzip(&kernel), "gzip"),
        (xz(&kernel), "xz"),
        (zstd(&kernel), "zstd"),
    ] {
        let mut cut = payload[..payload.len() / 2].to_vec();
        cut.extend([0; 4]);
        let error = extract_vmlinux(&bzimage(&cut)).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("the bzImage's {name} payload is damaged")),
            "{error}"
        );
    }
    let mut cut = lz4_payload(&kernel);
    cut.truncate(cut.len() / 2);
    let error = extract_vmlinux(&bzimage(&cut)).unwrap_err().to_string();
    assert!(
        error.starts_with("the bzImage's LZ4 payload is damaged: a block of"),
        "{error}"
    );
}
