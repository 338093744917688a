//! The block device (virtio 1.2, section 5.2) on a [`DiskBackend`].
//!
//! ```text
//!   Blk       features, configuration, queues     mod.rs
//!   Requests  what a request means                requests.rs
//!   Worker    the thread that does them           worker.rs
//! ```
//!
//! A doorbell takes requests out of its queue on the thread that rings it and hands them to the disk's worker, so that
//! no virtual CPU waits for the host's storage. What is done comes back as a call of the host side. Without a worker
//! ([`Blk::new`]) requests are done at the doorbell itself: nothing then happens that is not caused and finished by an
//! instruction of the guest, which is what a replay needs.
//!
//! Requests of all queues are done in order, one after another. A write is in the backend when it completes; it is
//! durable after a later flush, or at once if the driver chose writethrough or never learned of flush (5.2.6.2).
//!
//! Limitations: no secure erase, lifetime or zoned commands.

mod requests;
mod worker;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strata_disk::{DiskBackend, SECTOR_SIZE};

use self::requests::{Durability, Requests};
use self::worker::{Job, Worker};
use super::core::HostHandle;
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
/// VIRTIO_BLK_F_TOPOLOGY: the fields on good sizes and places of requests are valid.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE: the driver can choose writeback or writethrough.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ: `num_queues` is valid.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD: the discard command exists.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES: the write-zeroes command exists.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
/// More queues than this gain nothing on one worker, and each costs an interrupt vector.
const QUEUES_MAX: u16 = 8;

/// Sectors of 2 to this power are what disks write without reading first: 4 KiB.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// Limits told to the driver. Together they bound the data of one request to just under 64 MiB.
const SEGMENT_BYTES_MAX: u32 = 256 << 10;
const SEGMENTS_MAX: u32 = 254;
/// The limit enforced.
const REQUEST_BYTES_MAX: u32 = SEGMENT_BYTES_MAX * (SEGMENTS_MAX + 2);
/// Ranges per discard or write-zeroes command, and sectors per range.
const RANGES_MAX: u32 = 64;
const RANGE_SECTORS_MAX: u32 = 1 << 18;

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

/// The block device.
pub struct Blk {
    disk: Arc<dyn DiskBackend>,
    queue_sizes: Vec<u16>,
    /// The driver can flush (VIRTIO_BLK_F_FLUSH was accepted).
    can_flush: bool,
    /// The cache mode in the configuration: writeback unless the driver says otherwise.
    writeback: bool,
    hands: Hands,
}

/// Who does the requests.
enum Hands {
    /// Whoever calls the device.
    Caller(Requests),
    /// A thread of its own.
    Worker(Worker),
}

impl Blk {
    /// A device on `disk` with one queue, without a worker. The guest sees the first [`SERIAL_BYTES`] bytes of `serial`
    /// as its identity.
    pub fn new(disk: Arc<dyn DiskBackend>, serial: &str) -> Blk {
        let requests = Requests::new(disk.clone(), serial);
        Blk {
            disk,
            queue_sizes: vec![QUEUE_SIZE],
            can_flush: false,
            writeback: true,
            hands: Hands::Caller(requests),
        }
    }

    /// A device with a worker, and with a queue for each of `cpus` virtual CPUs, up to a limit.
    pub fn with_worker(disk: Arc<dyn DiskBackend>, serial: &str, cpus: u32) -> Blk {
        let requests = Requests::new(disk.clone(), serial);
        let queues = cpus.clamp(1, u32::from(QUEUES_MAX));
        Blk {
            queue_sizes: vec![QUEUE_SIZE; queues as usize],
            hands: Hands::Worker(Worker::new(requests)),
            ..Blk::new(disk, serial)
        }
    }

    fn durability(&self) -> Durability {
        if self.can_flush && self.writeback {
            Durability::ByFlush
        } else {
            Durability::AtOnce
        }
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mq = if self.queue_sizes.len() > 1 { F_MQ } else { 0 };
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | mq;
        if self.disk.readonly() {
            common | F_RO
        } else {
            common | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// struct virtio_blk_config (5.2.4). The geometry is not offered and zero.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend((self.disk.size() / SECTOR_SIZE).to_le_bytes());
        config.extend(SEGMENT_BYTES_MAX.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config.extend([0; 4]);
        config.extend((SECTOR_SIZE as u32).to_le_bytes());
        // Topology: { u8 physical_block_exp; u8 alignment_offset; le16 min_io_size; le32 opt_io_size; }
        let granularity = (self.disk.granularity() / SECTOR_SIZE as u32).max(1);
        config.extend([PHYSICAL_BLOCK_EXPONENT, 0]);
        config.extend((1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        config.extend(0_u32.to_le_bytes());
        config.extend([u8::from(self.writeback), 0]);
        config.extend((self.queue_sizes.len() as u16).to_le_bytes());
        for limit in [
            RANGE_SECTORS_MAX,
            RANGES_MAX,
            granularity,
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

    fn attach(&mut self, host: HostHandle) {
        if let Hands::Worker(worker) = &mut self.hands {
            worker.attach(host);
        }
    }

    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        let durability = self.durability();
        while let Some(chain) = io.pop(queue)? {
            match &mut self.hands {
                Hands::Caller(requests) => {
                    let written = requests.request(&chain, io.memory(), durability)?;
                    io.complete(queue, chain, written)?;
                }
                Hands::Worker(worker) => worker.give(
                    Job {
                        queue,
                        chain,
                        durability,
                    },
                    io.memory(),
                ),
            }
        }
        Ok(())
    }

    fn host_event(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        if let Hands::Worker(worker) = &mut self.hands {
            for done in worker.take_done() {
                io.complete(done.queue, done.chain, done.written?)?;
            }
        }
        Ok(())
    }

    fn settle(&mut self) -> bool {
        match &mut self.hands {
            Hands::Caller(_) => false,
            Hands::Worker(worker) => {
                worker.settle();
                true
            }
        }
    }

    fn reset(&mut self) {
        // A driver that resets the device takes its memory back.
        if let Hands::Worker(worker) = &mut self.hands {
            worker.forget();
        }
        self.can_flush = false;
        self.writeback = true;
    }

    fn close(&mut self) {
        self.settle();
        if let Err(error) = self.disk.close() {
            // Nobody is left to be told but the user.
            eprintln!("strata: a disk could not be closed: {error}");
        }
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
