//! Compressed clusters: one cluster of the disk, deflated or in a zstd frame.

use std::io::Read;

use flate2::{Decompress, FlushDecompress};

use super::header::Compression;

/// Unpacks `packed` into the whole of `cluster`; false if it is damaged. What follows the compressed data is ignored:
/// only whole sectors of it are counted in an image.
pub(super) fn unpack(method: Compression, packed: &[u8], cluster: &mut [u8]) -> bool {
    match method {
        Compression::Deflate => {
            let mut inflater = Decompress::new(false);
            let whole = cluster.len() as u64;
            inflater
                .decompress(packed, cluster, FlushDecompress::Finish)
                .is_ok()
                && inflater.total_out() == whole
        }
        Compression::Zstd => {
            // No frame needs a greater window than what it unpacks to, but encoders round it up.
            let window_max = (cluster.len() as u64).max(1 << 20) * 2;
            let decoder =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, window_max);
            decoder.is_ok_and(|mut decoder| decoder.read_exact(cluster).is_ok())
        }
    }
}
