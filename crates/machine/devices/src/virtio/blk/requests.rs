//! What the requests of a driver mean: taken apart, done on the disk, and answered by a status.

use std::sync::Arc;

use strata_disk::{DiskBackend, DiskError, SECTOR_SIZE};
use strata_memory::GuestMemory;

use super::{
    RANGE_SECTORS_MAX, RANGE_UNMAP, RANGES_MAX, REQUEST_BYTES_MAX, SERIAL_BYTES, T_DISCARD,
    T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
};
use crate::virtio::QueueError;
use crate::virtio::chain::{Chain, Reader, Writer};

/// Data moves between guest and backend in pieces of this many bytes.
const PIECE_BYTES: usize = 128 << 10;

/// What a request came to, and its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
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

/// When what a driver writes has to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// After the next flush.
    ByFlush,
    /// When its request completes.
    AtOnce,
}

/// Does requests, one after another.
pub(super) struct Requests {
    pub(super) disk: Arc<dyn DiskBackend>,
    serial: [u8; SERIAL_BYTES],
    piece: Vec<u8>,
}

impl Requests {
    /// On `disk`. The driver reads the beginning of `serial` as the disk's identity.
    pub(super) fn new(disk: Arc<dyn DiskBackend>, serial: &str) -> Requests {
        let mut id = [0; SERIAL_BYTES];
        id.iter_mut()
            .zip(serial.bytes())
            .for_each(|(to, from)| *to = from);
        Requests {
            disk,
            serial: id,
            piece: vec![0; PIECE_BYTES],
        }
    }

    /// Does one request and returns the bytes written to its buffers.
    pub(super) fn request(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        durability: Durability,
    ) -> Result<u32, QueueError> {
        let mut reader = chain.reader(memory);
        let mut data = chain.writer(memory);
        // The status is the last byte; where there is none, nothing can be said.
        let Some(mut status) = data.split_last(1) else {
            return Ok(0);
        };
        let outcome = match self.command(&mut reader, &mut data, durability) {
            Ok(()) => Status::Ok,
            Err(Stop::Status(status)) => status,
            Err(Stop::Queue(error)) => return Err(error),
        };
        status.write_all(&[outcome as u8])?;
        // Only bytes that have no gap before them may be counted (2.7.8.2).
        let gap = data.remaining() > 0;
        Ok(data.written() + if gap { 0 } else { status.written() })
    }

    fn command(
        &mut self,
        reader: &mut Reader<'_>,
        data: &mut Writer<'_>,
        durability: Durability,
    ) -> Result<(), Stop> {
        // { le32 type; le32 reserved; le64 sector; }
        let header = u128::from_le_bytes(reader.read_array()?);
        let (command, sector) = (header as u32, (header >> 64) as u64);
        match command {
            T_IN => self.read(sector, data),
            T_OUT => {
                self.write(sector, reader)?;
                self.settle(durability)
            }
            T_FLUSH => Ok(self.disk.flush()?),
            T_GET_ID => Ok(data.write_all(&self.serial)?),
            T_DISCARD | T_WRITE_ZEROES => {
                self.ranges(command, reader)?;
                self.settle(durability)
            }
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
        Ok(())
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
        Ok(())
    }

    /// Makes a change durable before it completes, if the driver relies on that.
    fn settle(&self, durability: Durability) -> Result<(), Stop> {
        match durability {
            Durability::ByFlush => Ok(()),
            Durability::AtOnce => Ok(self.disk.flush()?),
        }
    }
}
