//! The block device (virtio 1.2, section 5.2) on a [`DiskBackend`].
//!
//! Requests are done in order, one after another, on the thread that notifies. A write is in the
//! backend when it completes; it is durable after a later flush, or at once if the driver chose
//! writethrough or never learned of flush (5.2.6.2).
//!
//! Limitations: one queue; no secure erase, lifetime or zoned commands.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strata_disk::{DiskBackend, DiskError, SECTOR_SIZE};

use super::chain::{Chain, Reader, Writer};
use super::device::{DeviceKind, Io, VirtioDevice};
use super::queue::QueueError;
use crate::{RestoreError, SavedState};

/// VIRTIO_BLK_F_SIZE_MAX: `size_max` bounds the segments of a request.
pub const F_SIZE_MAX: u64 = 1 << 1;
/// VIRTIO_BLK_F_SEG_MAX: `seg_max` bounds their number.
pub const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO: the disk cannot be written.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE: `blk_size` is valid.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH: the flush command exists.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE: the driver can choose writeback or writethrough.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_DISCARD: the discard command exists.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES: the write-zeroes command exists.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE: u16 = 0;
const QUEUE_SIZES: [u16; 1] = [256];

/// Limits told to the driver. Together they bound the data of one request to just under 64 MiB.
const SEGMENT_BYTES_MAX: u32 = 256 << 10;
const SEGMENTS_MAX: u32 = 254;
/// The limit enforced.
const REQUEST_BYTES_MAX: u32 = SEGMENT_BYTES_MAX * (SEGMENTS_MAX + 2);
/// Ranges per discard or write-zeroes command, and sectors per range.
const RANGES_MAX: u32 = 64;
const RANGE_SECTORS_MAX: u32 = 1 << 18;

/// Data moves between guest and backend in pieces of this many bytes.
const PIECE_BYTES: usize = 128 << 10;

/// Bytes of the device's identity (5.2.6).
pub const SERIAL_BYTES: usize = 20;

/// Offset of `writeback` in the configuration.
const CONFIG_WRITEBACK: u64 = 32;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Flag of a discard or write-zeroes range.
const RANGE_UNMAP: u32 = 1;

/// What a request came to, and its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<DiskError> for Status {
    fn from(_: DiskError) -> Status {
        Status::IoError
    }
}

/// Why a request stopped: something to tell the driver, or a ring that cannot be used.
enum Stop {
    Status(Status),
    Queue(QueueError),
}

impl From<DiskError> for Stop {
    fn from(error: DiskError) -> Stop {
        Stop::Status(error.into())
    }
}

impl From<QueueError> for Stop {
    fn from(error: QueueError) -> Stop {
        match error {
            // A request of the wrong shape is an error of that request alone.
            QueueError::ChainTooShort => Stop::Status(Status::IoError),
            error => Stop::Queue(error),
        }
    }
}

/// The block device.
pub struct Blk {
    disk: Arc<dyn DiskBackend>,
    serial: [u8; SERIAL_BYTES],
    /// The driver can flush (VIRTIO_BLK_F_FLUSH was accepted).
    can_flush: bool,
    /// The cache mode in the configuration: writeback unless the driver says otherwise.
    writeback: bool,
    piece: Vec<u8>,
}

impl Blk {
    /// A device on `disk`. The guest sees the first [`SERIAL_BYTES`] bytes of `serial` as its identity.
    pub fn new(disk: Arc<dyn DiskBackend>, serial: &str) -> Blk {
        let mut id = [0; SERIAL_BYTES];
        id.iter_mut()
            .zip(serial.bytes())
            .for_each(|(to, from)| *to = from);
        Blk {
            disk,
            serial: id,
            can_flush: false,
            writeback: true,
            piece: vec![0; PIECE_BYTES],
        }
    }

    /// Does one request and returns the bytes written to its buffers.
    fn request(&mut self, chain: &Chain, io: &Io<'_>) -> Result<u32, QueueError> {
        let mut reader = chain.reader(io.memory());
        let mut data = chain.writer(io.memory());
        // The status is the last byte; where there is none, nothing can be said.
        let Some(mut status) = data.split_last(1) else {
            return Ok(0);
        };
        let outcome = match self.command(&mut reader, &mut data) {
            Ok(()) => Status::Ok,
            Err(Stop::Status(status)) => status,
            Err(Stop::Queue(error)) => return Err(error),
        };
        status.write_all(&[outcome as u8])?;
        // Only bytes that have no gap before them may be counted (2.7.8.2).
        let gap = data.remaining() > 0;
        Ok(data.written() + if gap { 0 } else { status.written() })
    }

    fn command(&mut self, reader: &mut Reader<'_>, data: &mut Writer<'_>) -> Result<(), Stop> {
        // { le32 type; le32 reserved; le64 sector; }
        let header = u128::from_le_bytes(reader.read_array()?);
        let (command, sector) = (header as u32, (header >> 64) as u64);
        match command {
            T_IN => self.read(sector, data),
            T_OUT => self.write(sector, reader),
            T_FLUSH => Ok(self.disk.flush()?),
            T_GET_ID => Ok(data.write_all(&self.serial)?),
            T_DISCARD | T_WRITE_ZEROES => self.ranges(command, reader),
            _ => Err(Stop::Status(Status::Unsupported)),
        }
    }

    /// The offset of `bytes` of data at `sector`, if a request may have them.
    fn start(&self, sector: u64, bytes: u32) -> Result<u64, Stop> {
        let whole = u64::from(bytes).is_multiple_of(SECTOR_SIZE);
        let start = sector.checked_mul(SECTOR_SIZE);
        let end = start.and_then(|start| start.checked_add(u64::from(bytes)));
        match (start, end) {
            (Some(start), Some(end))
                if whole && end <= self.disk.size() && bytes <= REQUEST_BYTES_MAX =>
            {
                Ok(start)
            }
            _ => Err(Stop::Status(Status::IoError)),
        }
    }

    fn read(&mut self, sector: u64, data: &mut Writer<'_>) -> Result<(), Stop> {
        let mut offset = self.start(sector, data.remaining())?;
        while data.remaining() > 0 {
            let len = (data.remaining() as usize).min(self.piece.len());
            let piece = self.piece.get_mut(..len).unwrap_or_default();
            self.disk.read_at(offset, piece)?;
            data.write_all(piece)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn write(&mut self, sector: u64, reader: &mut Reader<'_>) -> Result<(), Stop> {
        let mut offset = self.start(sector, reader.remaining())?;
        if self.disk.readonly() {
            return Err(Stop::Status(Status::IoError));
        }
        while reader.remaining() > 0 {
            let len = (reader.remaining() as usize).min(self.piece.len());
            let piece = self.piece.get_mut(..len).unwrap_or_default();
            reader.read_exact(piece)?;
            self.disk.write_at(offset, piece)?;
            offset += len as u64;
        }
        self.write_through()
    }

    /// Discard or write zeroes (5.2.6.1): ranges of { le64 sector; le32 num_sectors; le32 flags; }.
    fn ranges(&mut self, command: u32, reader: &mut Reader<'_>) -> Result<(), Stop> {
        let bytes = reader.remaining();
        if bytes == 0
            || !bytes.is_multiple_of(16)
            || bytes / 16 > RANGES_MAX
            || self.disk.readonly()
        {
            return Err(Stop::Status(Status::IoError));
        }
        while reader.remaining() > 0 {
            let range = u128::from_le_bytes(reader.read_array()?);
            let (sector, sectors) = (range as u64, (range >> 64) as u32);
            let flags = (range >> 96) as u32;
            let allowed = if command == T_WRITE_ZEROES {
                RANGE_UNMAP
            } else {
                0
            };
            if flags & !allowed != 0 {
                return Err(Stop::Status(Status::Unsupported));
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let offset = sector.checked_mul(SECTOR_SIZE);
            let (Some(offset), true) = (offset, sectors <= RANGE_SECTORS_MAX) else {
                return Err(Stop::Status(Status::IoError));
            };
            if command == T_DISCARD {
                self.disk.discard(offset, len)?;
            } else {
                self.disk
                    .write_zeroes(offset, len, flags & RANGE_UNMAP != 0)?;
            }
        }
        self.write_through()
    }

    /// Makes a change durable before it completes, if the driver relies on that.
    fn write_through(&self) -> Result<(), Stop> {
        if self.can_flush && self.writeback {
            return Ok(());
        }
        Ok(self.disk.flush()?)
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        if self.disk.readonly() {
            common | F_RO
        } else {
            common | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// struct virtio_blk_config (5.2.4). Geometry and topology are not offered and zero.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend((self.disk.size() / SECTOR_SIZE).to_le_bytes());
        config.extend(SEGMENT_BYTES_MAX.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config.extend([0; 4]);
        config.extend((SECTOR_SIZE as u32).to_le_bytes());
        config.extend([0; 8]);
        config.extend([u8::from(self.writeback), 0]);
        config.extend(1_u16.to_le_bytes());
        for limit in [
            RANGE_SECTORS_MAX,
            RANGES_MAX,
            1,
            RANGE_SECTORS_MAX,
            RANGES_MAX,
        ] {
            config.extend(limit.to_le_bytes());
        }
        config.extend([1, 0, 0, 0]);
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_WRITEBACK, [mode]) = (offset, data) {
            self.writeback = *mode != 0;
        }
    }

    fn activate(&mut self, features: u64, _io: &mut Io<'_>) -> Result<(), QueueError> {
        self.can_flush = features & F_FLUSH != 0;
        Ok(())
    }

    fn notified(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        while let Some(chain) = io.pop(QUEUE)? {
            let written = self.request(&chain, io)?;
            io.complete(QUEUE, chain, written)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.can_flush = false;
        self.writeback = true;
    }

    fn save(&self) -> SavedState {
        SavedState::new(
            "virtio-blk",
            1,
            &BlkStateV1 {
                writeback: self.writeback,
            },
        )
    }

    fn restore(&mut self, features: u64, state: &SavedState) -> Result<(), RestoreError> {
        let state: BlkStateV1 = state.open("virtio-blk", 1)?;
        self.can_flush = features & F_FLUSH != 0;
        self.writeback = state.writeback;
        Ok(())
    }
}

/// Saved state beyond the queue. The disk's content is not part of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct BlkStateV1 {
    writeback: bool,
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
