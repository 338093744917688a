//! Tests of the block device through the fake driver.

use super::requests::Status;
use super::*;
use crate::virtio::testutil::{Driver, wait_until};
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use strata_disk::DiskError;

const QUEUE: u16 = 0;
const SECTORS: u64 = 64;

/// A disk in memory that counts flushes and can be made to fail.
#[derive(Debug, Default)]
struct TestDisk {
    bytes: Mutex<Vec<u8>>,
    readonly: bool,
    failing: AtomicBool,
    flushes: AtomicU32,
    begun: AtomicU32,
    slow_ms: AtomicU32,
    closed: AtomicBool,
}

impl TestDisk {
    fn new(readonly: bool) -> Arc<TestDisk> {
        let bytes = (0..SECTORS * SECTOR_SIZE)
            .map(|i| (i / SECTOR_SIZE) as u8)
            .collect();
        Arc::new(TestDisk {
            bytes: Mutex::new(bytes),
            readonly,
            ..TestDisk::default()
        })
    }

    fn check(&self, offset: u64, len: usize) -> Result<std::ops::Range<usize>, DiskError> {
        let (size, len) = (self.size(), len as u64);
        self.begun.fetch_add(1, Ordering::SeqCst);
        let slow = self.slow_ms.load(Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(u64::from(slow)));
        if self.failing.load(Ordering::SeqCst) {
            let source = std::io::Error::other("test");
            return Err(DiskError::Io {
                operation: "test",
                offset,
                len,
                source,
            });
        }
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(offset as usize..end as usize),
            _ => Err(DiskError::OutOfRange { offset, len, size }),
        }
    }
}

impl DiskBackend for TestDisk {
    fn size(&self) -> u64 {
        SECTORS * SECTOR_SIZE
    }
    fn readonly(&self) -> bool {
        self.readonly
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let range = self.check(offset, buf.len())?;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[range]);
        Ok(())
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        assert!(!self.readonly);
        let range = self.check(offset, buf.len())?;
        self.bytes.lock().unwrap()[range].copy_from_slice(buf);
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.check(0, 0)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn close(&self) -> Result<(), DiskError> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<(), DiskError> {
        let range = self.check(offset, len as usize)?;
        self.bytes.lock().unwrap()[range].fill(0);
        Ok(())
    }
}

fn blk(disk: &Arc<TestDisk>, features: u64) -> Driver {
    let mut driver = Driver::new(Blk::new(disk.clone(), "strata-disk-0"));
    driver.start(features);
    driver
}

fn header(command: u32, sector: u64) -> Vec<u8> {
    (u128::from(sector) << 64 | u128::from(command))
        .to_le_bytes()
        .to_vec()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let (sectors, flags) = (u128::from(sectors) << 64, u128::from(flags) << 96);
    (flags | sectors | u128::from(sector))
        .to_le_bytes()
        .to_vec()
}

/// The status of a request without data for the guest.
fn status(driver: &mut Driver, readable: &[&[u8]]) -> u8 {
    driver.request(QUEUE, readable, &[1]).bytes[0]
}

#[test]
fn configuration() {
    let driver = blk(&TestDisk::new(false), F_FLUSH);
    let config = driver.config(0, 64);
    assert_eq!(config[0..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!((config[32], &config[34..36]), (1, &[1, 0][..]));
    assert_eq!(config[36..40], RANGE_SECTORS_MAX.to_le_bytes());
    assert_eq!(config[52..56], RANGES_MAX.to_le_bytes());
    assert_eq!(config[56..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let offered = driver.core().device_features();
    assert_eq!(offered & (F_RO | F_DISCARD), F_DISCARD);
    let driver = blk(&TestDisk::new(true), F_FLUSH);
    let offered = driver.core().device_features();
    assert_eq!(offered & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
}

#[test]
fn a_queue_for_each_cpu() {
    let queues = |cpus| {
        let driver = Driver::new(Blk::with_worker(TestDisk::new(false), "", cpus));
        let offered = driver.core().device_features() & F_MQ != 0;
        let stated = driver.config(34, 2)[0];
        assert_eq!(u16::from(stated), driver.core().queue_count());
        (stated, offered)
    };
    let all = [1, 2, 8, 64].map(queues);
    assert_eq!(all, [(1, false), (2, true), (8, true), (8, true)]);
}

#[test]
fn a_worker_does_the_requests_of_all_queues() {
    let disk = TestDisk::new(false);
    let mut driver = Driver::new(Blk::with_worker(disk.clone(), "", 4));
    driver.start(F_FLUSH | F_MQ);
    for queue in 0..4 {
        let sector = u64::from(queue);
        let data = [queue as u8 + 100; 512];
        let used = driver.request_eventually(queue, &[&header(T_OUT, sector), &data], &[1]);
        assert_eq!(used.bytes, [0]);
    }
    let used = driver.request_eventually(3, &[&header(T_IN, 0)], &[2048, 1]);
    let bytes: Vec<u8> = used.bytes.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(bytes, [100, 101, 102, 103, 0]);
    assert_eq!(driver.interrupts(3), 2);
}

/// Requests that are under way when the driver resets the device or the machine is paused.
#[test]
fn a_reset_and_a_pause_wait_for_the_worker() {
    let disk = TestDisk::new(false);
    let slow = || disk.slow_ms.store(50, Ordering::SeqCst);
    let begun = |count| wait_until(|| disk.begun.load(Ordering::SeqCst) == count);
    let mut driver = Driver::new(Blk::with_worker(disk.clone(), "", 1));
    driver.start(F_FLUSH);
    slow();
    let token = driver.submit(QUEUE, &[&header(T_IN, 7)], &[512, 1]);
    assert!(
        driver.used(QUEUE, token).is_none(),
        "the doorbell does not wait"
    );
    driver.shared().pause();
    assert_eq!(driver.used(QUEUE, token).unwrap().bytes[0], 7);
    driver.shared().start();
    let token = driver.submit(QUEUE, &[&header(T_OUT, 7), &[1; 512]], &[1]);
    assert!(driver.used(QUEUE, token).is_none());
    begun(2);
    driver.reset();
    assert_eq!(disk.bytes.lock().unwrap()[7 * 512], 1);
    driver.start(F_FLUSH);
    let used = driver.request_eventually(QUEUE, &[&header(T_IN, 7)], &[512, 1]);
    assert_eq!(used.bytes[0], 1);
    // The end waits too, and closes the disk.
    driver.submit(QUEUE, &[&header(T_OUT, 8), &[2; 512]], &[1]);
    begun(4);
    driver.shared().close();
    assert_eq!(disk.bytes.lock().unwrap()[8 * 512], 2);
    assert!(disk.closed.load(Ordering::SeqCst));
}

#[test]
fn reads_and_writes() {
    for indirect in [false, true] {
        let disk = TestDisk::new(false);
        let mut driver = blk(&disk, F_FLUSH);
        driver.indirect = indirect;
        let used = driver.request(QUEUE, &[&header(T_IN, 3)], &[512, 100, 412, 1]);
        assert_eq!(used.written, 1025);
        assert!(used.bytes[..512].iter().all(|b| *b == 3));
        assert!(used.bytes[512..1024].iter().all(|b| *b == 4));
        assert_eq!(used.bytes[1024], 0);
        // The shape of the buffers does not matter, not even inside the header.
        let head = header(T_OUT, 5);
        let all = [&head[..7], &head[7..], &[0xaa; 511], &[0xbb; 513]];
        assert_eq!(status(&mut driver, &all), 0);
        let bytes = disk.bytes.lock().unwrap();
        assert_eq!(bytes[5 * 512 - 1..5 * 512 + 1], [4, 0xaa]);
        assert_eq!(bytes[6 * 512 - 2..6 * 512], [0xaa, 0xbb]);
        assert_eq!(bytes[7 * 512 - 1..7 * 512 + 1], [0xbb, 7]);
        assert_eq!(driver.interrupts(QUEUE), 2);
    }
}

#[test]
fn large_requests_go_in_pieces() {
    let disk = TestDisk::new(false);
    let mut driver = blk(&disk, F_FLUSH);
    let used = driver.request(QUEUE, &[&header(T_IN, 0)], &[32 << 10, 1]);
    assert_eq!(used.written, (32 << 10) + 1);
    assert_eq!(used.bytes[..32 << 10], disk.bytes.lock().unwrap()[..]);
}

#[test]
fn flush_and_cache_modes() {
    let disk = TestDisk::new(false);
    let flushes = || disk.flushes.load(Ordering::SeqCst);
    let write = |driver: &mut Driver| status(driver, &[&header(T_OUT, 0), &[1; 512]]);
    let mut driver = blk(&disk, F_FLUSH | F_CONFIG_WCE);
    assert_eq!((write(&mut driver), flushes()), (0, 0));
    assert_eq!(
        (status(&mut driver, &[&header(T_FLUSH, 0)]), flushes()),
        (0, 1)
    );
    driver.core().write_config(CONFIG_WRITEBACK, &[0]);
    assert_eq!((write(&mut driver), flushes()), (0, 2));
    driver.core().write_config(CONFIG_WRITEBACK, &[1]);
    assert_eq!((write(&mut driver), flushes()), (0, 2));
    // A driver that cannot flush gets writethrough.
    let mut driver = blk(&disk, 0);
    assert_eq!((write(&mut driver), flushes()), (0, 3));
}

#[test]
fn identity() {
    let mut driver = blk(&TestDisk::new(false), F_FLUSH);
    let used = driver.request(QUEUE, &[&header(T_GET_ID, 0)], &[20, 1]);
    assert_eq!(used.bytes, b"strata-disk-0\0\0\0\0\0\0\0\0");
    let used = driver.request(QUEUE, &[&header(T_GET_ID, 0)], &[10, 1]);
    assert_eq!((used.written, used.all[10]), (0, Status::IoError as u8));
}

#[test]
fn discard_and_write_zeroes() {
    let disk = TestDisk::new(false);
    let mut driver = blk(&disk, F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    let two = [range(1, 1, 0), range(4, 2, 0)].concat();
    assert_eq!(status(&mut driver, &[&header(T_DISCARD, 0), &two]), 0);
    assert_eq!(
        status(
            &mut driver,
            &[&header(T_WRITE_ZEROES, 0), &range(7, 1, RANGE_UNMAP)]
        ),
        0
    );
    {
        let bytes = disk.bytes.lock().unwrap();
        let zero = (0..10)
            .filter(|s| s * 512 > 0 && bytes[s * 512] == 0)
            .collect::<Vec<_>>();
        assert_eq!(zero, [1, 4, 5, 7]);
    }
    for (command, ranges, expected) in [
        (T_DISCARD, range(1, 1, RANGE_UNMAP), 2),
        (T_WRITE_ZEROES, range(1, 1, 2), 2),
        (T_DISCARD, range(SECTORS, 1, 0), 1),
        (T_DISCARD, range(u64::MAX, 1, 0), 1),
        (T_DISCARD, range(0, RANGE_SECTORS_MAX + 1, 0), 1),
        (T_DISCARD, vec![0; 15], 1),
        (T_DISCARD, vec![], 1),
        (T_DISCARD, range(0, 1, 0).repeat(RANGES_MAX as usize + 1), 1),
    ] {
        assert_eq!(
            status(&mut driver, &[&header(command, 0), &ranges]),
            expected,
            "{ranges:?}"
        );
    }
}

#[test]
fn what_cannot_be_done_is_told() {
    let disk = TestDisk::new(false);
    let mut driver = blk(&disk, F_FLUSH);
    let read = |driver: &mut Driver, sector, len| {
        let used = driver.request(QUEUE, &[&header(T_IN, sector)], &[len, 1]);
        (used.written, *used.all.last().unwrap())
    };
    assert_eq!(
        status(&mut driver, &[&header(99, 0)]),
        Status::Unsupported as u8
    );
    assert_eq!(status(&mut driver, &[&[0; 15]]), Status::IoError as u8);
    for sector in [SECTORS - 1, SECTORS, u64::MAX, u64::MAX / 512] {
        assert_eq!(read(&mut driver, sector, 1024), (0, 1));
    }
    assert_eq!(read(&mut driver, SECTORS - 1, 512), (513, 0));
    assert_eq!(
        status(&mut driver, &[&header(T_OUT, SECTORS - 1), &[0; 1024]]),
        1
    );
    assert_eq!(status(&mut driver, &[&header(T_OUT, 0), &[0; 100]]), 1);
    // Nowhere to put a status.
    assert_eq!(
        driver.request(QUEUE, &[&header(T_FLUSH, 0)], &[]).written,
        0
    );
    disk.failing.store(true, Ordering::SeqCst);
    assert_eq!(status(&mut driver, &[&header(T_OUT, 0), &[0; 512]]), 1);
    assert_eq!(status(&mut driver, &[&header(T_FLUSH, 0)]), 1);
    assert!(driver.core().fault().is_none());
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = TestDisk::new(true);
    let mut driver = blk(&disk, F_RO);
    assert_eq!(status(&mut driver, &[&header(T_OUT, 0), &[0; 512]]), 1);
    assert_eq!(
        status(&mut driver, &[&header(T_WRITE_ZEROES, 0), &range(0, 1, 0)]),
        1
    );
    assert_eq!(
        driver.request(QUEUE, &[&header(T_IN, 9)], &[512, 1]).bytes[0],
        9
    );
}

#[test]
fn state_survives() {
    let disk = TestDisk::new(false);
    let mut driver = blk(&disk, F_FLUSH | F_CONFIG_WCE);
    driver.core().write_config(CONFIG_WRITEBACK, &[0]);
    // A request that the driver has not announced yet is found after the move.
    let token = driver.offer(QUEUE, &[&header(T_OUT, 0), &[7; 512]], &[1]);
    let mut other = Driver::new(Blk::new(disk.clone(), ""));
    driver.move_to(&mut other);
    assert_eq!(other.used(QUEUE, token).unwrap().bytes, [0]);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1, "still writethrough");
    assert_eq!(
        other.request(QUEUE, &[&header(T_IN, 0)], &[512, 1]).bytes[0],
        7
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any request is answered by a status or by nothing, and never stops the device.
    #[test]
    fn any_request_is_answered(
        command in prop_oneof![0..16_u32, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        data in prop::collection::vec(any::<u8>(), 0..2000),
        writable in prop::collection::vec(0..3000_u32, 0..4),
    ) {
        let disk = TestDisk::new(false);
        let mut driver = blk(&disk, F_FLUSH);
        let used = driver.request(QUEUE, &[&header(command, sector), &data], &writable);
        prop_assert!(used.written <= writable.iter().sum());
        prop_assert!(driver.core().fault().is_none());
    }
}
