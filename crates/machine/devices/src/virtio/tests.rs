//! Tests of negotiation, queues and locking with a device that only echoes, and of hostile rings.

use super::Rng;
use super::core::*;
use super::device::*;
use super::queue::*;
use super::testutil::{Driver, MEMORY_BYTES, wait_until};
use super::*;
use crate::{RestoreError, SavedState};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use strata_memory::Gpa;

/// Copies what is readable to what is writable and counts calls.
#[derive(Default)]
struct Echo {
    events: Arc<AtomicU32>,
    host: Arc<Mutex<Option<HostHandle>>>,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3]
    }
    fn attach(&mut self, host: HostHandle) {
        *self.host.lock().unwrap() = Some(host);
    }
    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        while let Some(chain) = io.pop(queue)? {
            let mut reader = chain.reader(io.memory());
            let mut writer = chain.writer(io.memory());
            let len = reader.remaining().min(writer.remaining()).min(4096);
            let mut bytes = vec![0; len as usize];
            reader.read_exact(&mut bytes)?;
            writer.write_all(&bytes)?;
            let written = writer.written();
            io.complete(queue, chain, written)?;
        }
        Ok(())
    }
    fn host_event(&mut self, _io: &mut Io<'_>) -> Result<(), QueueError> {
        self.events.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn reset(&mut self) {}
    fn save(&self) -> SavedState {
        SavedState::new("echo", 1, &())
    }
    fn restore(&mut self, _features: u64, state: &SavedState) -> Result<(), RestoreError> {
        state.open("echo", 1)
    }
}

#[test]
fn negotiation_follows_the_rules() {
    let driver = Driver::new(Echo::default());
    let mut core = driver.core();
    core.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    // Not a modern driver.
    core.set_driver_features(1 << 3);
    core.set_status(STATUS_FEATURES_OK);
    assert_eq!(core.status(), STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    // Something that is not offered.
    core.set_driver_features(F_VERSION_1 | 1 << 4);
    core.set_status(STATUS_FEATURES_OK);
    assert_eq!(core.status() & STATUS_FEATURES_OK, 0);
    // DRIVER_OK without agreement.
    core.set_status(STATUS_DRIVER_OK);
    assert_eq!(core.status() & STATUS_DRIVER_OK, 0);
    core.set_driver_features(F_VERSION_1);
    core.set_status(STATUS_FEATURES_OK);
    assert_ne!(core.status() & STATUS_FEATURES_OK, 0);
    core.set_driver_features(F_VERSION_1 | 1 << 3);
    assert_eq!(core.driver_features(), F_VERSION_1, "agreed features stay");
    core.set_status(0);
    assert_eq!((core.status(), core.driver_features()), (0, 0));
}

#[test]
fn requests_are_done_with_every_ring_feature() {
    for features in [
        0,
        F_EVENT_IDX,
        F_INDIRECT_DESC,
        F_EVENT_IDX | F_INDIRECT_DESC,
    ] {
        let mut driver = Driver::new(Echo::default());
        driver.start_with(features);
        driver.indirect = features & F_INDIRECT_DESC != 0;
        // More requests than the ring has entries, and more than its indices count.
        for i in 0..70_000_u32 {
            let used = driver.request(1, &[&i.to_le_bytes()], &[1, 2, 5]);
            assert_eq!(used.bytes, i.to_le_bytes());
        }
        assert_eq!(driver.interrupts(1), 70_000);
        assert_eq!(driver.interrupts(0), 0);
    }
}

#[test]
fn interrupts_are_held_back_as_asked() {
    let mut driver = Driver::new(Echo::default());
    driver.start_with(0);
    let available = driver.layout(0).available;
    driver.memory.write_u16(Gpa(available), 1).unwrap();
    driver.request(0, &[b"a"], &[1]);
    assert_eq!(driver.interrupts(0), 0);
    driver.memory.write_u16(Gpa(available), 0).unwrap();
    driver.request(0, &[b"a"], &[1]);
    assert_eq!(driver.interrupts(0), 1);

    let mut driver = Driver::new(Echo::default());
    driver.start(0);
    // An interrupt only once the third buffer is used.
    driver
        .memory
        .write_u16(Gpa(driver.layout(0).available + 4 + 16), 2)
        .unwrap();
    for expected in [0, 0, 1] {
        driver.offer(0, &[b"a"], &[1]);
        driver.notify(0);
        assert_eq!(driver.interrupts(0), expected);
    }
}

#[test]
fn queues_that_are_not_enabled_stay_silent() {
    let driver = Driver::new(Echo::default());
    let mut core = driver.core();
    core.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    core.notify(0);
    core.set_driver_features(F_VERSION_1);
    core.set_status(STATUS_FEATURES_OK);
    core.set_status(STATUS_DRIVER_OK);
    core.notify(0);
    core.notify(63);
    core.notify(u16::MAX);
    assert_eq!(core.status() & STATUS_NEEDS_RESET, 0);
    core.enable_queue(0);
    assert!(!core.queue(0).unwrap().enabled(), "too late");
}

#[test]
fn impossible_queues_need_a_reset() {
    let good = QueueLayout {
        size: 8,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
    };
    for bad in [
        QueueLayout { size: 0, ..good },
        QueueLayout { size: 7, ..good },
        QueueLayout { size: 16, ..good },
        QueueLayout {
            descriptors: 0x1008,
            ..good
        },
        QueueLayout {
            available: 0x2001,
            ..good
        },
        QueueLayout {
            used: 0x3002,
            ..good
        },
        QueueLayout {
            used: u64::MAX - 3,
            ..good
        },
        QueueLayout {
            descriptors: MEMORY_BYTES,
            ..good
        },
        QueueLayout {
            available: MEMORY_BYTES,
            ..good
        },
        QueueLayout {
            used: MEMORY_BYTES,
            ..good
        },
    ] {
        let mut driver = Driver::new(Echo::default());
        let mut core = driver.core();
        core.set_driver_features(F_VERSION_1);
        core.set_config_vector(100);
        core.set_status(STATUS_FEATURES_OK);
        core.set_queue_layout(0, |layout| *layout = bad);
        core.enable_queue(0);
        core.set_queue_layout(0, |layout| *layout = good);
        assert_eq!(core.queue(0).unwrap().layout, bad, "enabled queues stay");
        core.set_status(STATUS_DRIVER_OK);
        drop(core);
        // Rings outside memory are noticed when they are used.
        driver.memory.write_u16(Gpa(0x2002), 1).unwrap();
        driver.notify(0);
        assert_ne!(driver.core().status() & STATUS_NEEDS_RESET, 0, "{bad:?}");
        assert!(driver.core().fault().is_some());
        assert!(driver.config_interrupts() >= 1);
        driver.reset();
        assert_eq!(driver.core().status(), 0);
        assert!(driver.core().fault().is_none());
        driver.start(0);
        assert_eq!(driver.request(0, &[b"again"], &[5]).bytes, b"again");
    }
}

/// Puts descriptors into queue 0 and says what became of the first chain.
fn fault_of(features: u64, descriptors: &[(u64, u32, u16, u16)], head: u16) -> Option<String> {
    let mut driver = Driver::new(Echo::default());
    driver.start_with(features);
    for (i, (at, len, flags, next)) in descriptors.iter().enumerate() {
        driver.descriptor(
            driver.layout(0).descriptors + i as u64 * 16,
            *at,
            *len,
            *flags,
            *next,
        );
    }
    driver.make_available(0, head);
    driver.notify(0);
    let core = driver.core();
    assert_eq!(
        core.fault().is_some(),
        core.status() & STATUS_NEEDS_RESET != 0
    );
    core.fault().map(|fault| fault.to_string())
}

#[test]
fn bad_chains_need_a_reset() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let check = |descriptors: &[_], expected: &str| {
        let fault = fault_of(F_INDIRECT_DESC, descriptors, 0).expect("no fault");
        assert!(fault.contains(expected), "{fault}");
    };
    let at = 0x200000;
    check(&[(at, 1, NEXT, 0)], "more than 8 descriptors");
    check(
        &[(at, 1, NEXT, 1), (at, 1, NEXT, 0)],
        "more than 8 descriptors",
    );
    check(&[(at, 1, NEXT, 8)], "descriptor 8 does not exist");
    check(
        &[(at, 1, NEXT | WRITE, 1), (at, 1, 0, 0)],
        "readable buffer follows",
    );
    check(&[(at, u32::MAX, NEXT, 1), (at, 1, 0, 0)], "too large");
    check(&[(u64::MAX, 2, 0, 0)], "too large");
    check(&[(at, 0, INDIRECT, 0)], "indirect");
    check(&[(at, 17, INDIRECT, 0)], "indirect");
    check(&[(at, 16, INDIRECT | NEXT, 1)], "indirect");
    // The descriptor table itself as an indirect table: it holds an indirect descriptor.
    check(&[(0, 16, INDIRECT, 0)], "indirect");
    check(
        &[(MEMORY_BYTES, 1, NEXT, 1), (at, 1, WRITE, 0)],
        "not in guest memory",
    );
    check(
        &[(at, 1, NEXT, 1), (MEMORY_BYTES, 1, WRITE, 0)],
        "not in guest memory",
    );
    assert!(
        fault_of(0, &[], 8)
            .unwrap()
            .contains("descriptor 8 does not exist")
    );
    assert!(
        fault_of(0, &[(at, 16, INDIRECT, 0)], 0)
            .unwrap()
            .contains("indirect")
    );
    assert_eq!(
        fault_of(F_INDIRECT_DESC, &[(at, 1, NEXT, 1), (at, 1, WRITE, 0)], 0),
        None
    );
    // A chain of direct descriptors may end in an indirect table.
    assert_eq!(
        fault_of(
            F_INDIRECT_DESC,
            &[(at, 1, NEXT, 1), (at, 16, INDIRECT, 0)],
            0
        ),
        None
    );
}

#[test]
fn an_available_index_too_far_ahead_needs_a_reset() {
    let mut driver = Driver::new(Echo::default());
    driver.start(0);
    driver
        .memory
        .write_u16(Gpa(driver.layout(0).available + 2), 9)
        .unwrap();
    driver.notify(0);
    assert!(
        driver
            .core()
            .fault()
            .unwrap()
            .to_string()
            .contains("9 chains")
    );
    // A device in that state is not called: nothing more happens.
    driver.notify(1);
    assert_eq!(driver.config_interrupts(), 1);
}

#[test]
fn no_more_chains_are_taken_than_there_are_descriptors() {
    let driver = Driver::new(Echo::default());
    let layout = QueueLayout {
        size: 8,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
    };
    let features = QueueFeatures {
        event_index: false,
        indirect: false,
    };
    let mut queue = Queue::new(layout, features, 8).unwrap();
    let offer = |count| driver.memory.write_u16(Gpa(0x2002), count).unwrap();
    // One empty chain, again and again.
    offer(8);
    let mut taken: Vec<_> = (0..8)
        .map(|_| queue.pop(&driver.memory).unwrap().unwrap())
        .collect();
    assert!(queue.pop(&driver.memory).unwrap().is_none());
    offer(9);
    let more = queue.pop(&driver.memory);
    assert!(matches!(more, Err(QueueError::TooManyChains)));
    queue.push(&driver.memory, taken.pop().unwrap(), 0).unwrap();
    assert!(queue.pop(&driver.memory).unwrap().is_some());
}

#[test]
fn a_pause_holds_everything_back() {
    let echo = Echo::default();
    let (events, host) = (echo.events.clone(), echo.host.clone());
    let mut driver = Driver::new(echo);
    driver.start(0);
    let host = host.lock().unwrap().clone().unwrap();
    let before = events.load(Ordering::SeqCst);
    driver.shared().pause();
    let token = driver.submit(0, &[b"x"], &[1]);
    assert!(host.notify());
    let waiting = std::thread::spawn({
        let host = host.clone();
        move || host.notify_when_ready()
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.used(0, token).is_none());
    assert_eq!(events.load(Ordering::SeqCst), before);
    driver.shared().start();
    assert_eq!(driver.used(0, token).unwrap().bytes, b"x");
    assert!(waiting.join().unwrap());
    assert_eq!(events.load(Ordering::SeqCst), before + 2);
    driver.shared().pause();
    let waiting = std::thread::spawn({
        let host = host.clone();
        move || host.notify_when_ready()
    });
    std::thread::sleep(Duration::from_millis(20));
    drop(driver);
    assert!(!waiting.join().unwrap());
    assert!(!host.notify());
}

/// A device that finds new work as long as it is told to, as if another processor made it.
struct Busy {
    left: u32,
}

impl VirtioDevice for Busy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }
    fn config(&self) -> Vec<u8> {
        vec![self.left.min(1) as u8]
    }
    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        while self.left > 0 {
            let Some(chain) = io.pop(queue)? else { break };
            io.undo_pop(queue, chain);
            self.left -= 1;
        }
        Ok(())
    }
    fn reset(&mut self) {}
    fn save(&self) -> SavedState {
        SavedState::new("busy", 1, &())
    }
    fn restore(&mut self, _features: u64, _state: &SavedState) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[test]
fn endless_work_does_not_hold_the_caller() {
    let mut driver = Driver::new(Busy { left: 5000 });
    driver.start(0);
    driver.offer(0, &[b"x"], &[]);
    driver.notify(0);
    // Whatever the caller did not do, a thread of the host does.
    wait_until(|| driver.config(0, 1) == [0]);
}

#[test]
fn configuration_reads_are_bounded() {
    let driver = Driver::new(Echo::default());
    assert_eq!(driver.config(1, 4), [2, 3, 0, 0]);
    assert_eq!(driver.config(u64::MAX, 2), [0, 0]);
}

#[test]
fn unfit_states_are_refused() {
    let mut driver = Driver::new(Echo::default());
    driver.start(0);
    let state = serde_json::to_value(driver.core().save()).unwrap();
    let restore = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut state = state.clone();
        change(&mut state);
        let other = Driver::new(Echo::default());
        let result = other
            .core()
            .restore(&serde_json::from_value(state).unwrap());
        assert_eq!(result.is_ok(), other.core().status() != 0);
        result
    };
    restore(&|_| {}).unwrap();
    restore(&|state| state["queues"] = serde_json::json!([])).unwrap_err();
    restore(&|state| state["driver_features"] = serde_json::json!(1)).unwrap_err();
    restore(&|state| state["queues"][0]["ring"]["layout"]["size"] = serde_json::json!(0))
        .unwrap_err();
    restore(&|state| state["device"]["name"] = serde_json::json!("lamp")).unwrap_err();
}

/// A descriptor that a hostile driver may write: address, length, flags, next.
type HostileDescriptor = (u64, u32, u16, u16);

/// What a hostile driver does between two notifications.
#[derive(Debug, Clone)]
struct HostileRound {
    /// Written to the descriptor table and, shifted by one, to where indirect descriptors point.
    descriptors: Vec<HostileDescriptor>,
    heads: Vec<u16>,
    /// Added to the available index.
    ahead: u16,
}

/// Where indirect descriptors mostly point.
const INDIRECT_TABLE: u64 = 0x80000;

fn hostile_descriptor() -> impl Strategy<Value = HostileDescriptor> {
    let address = prop_oneof![
        8 => 0x90000..MEMORY_BYTES - 0x10000,
        4 => Just(INDIRECT_TABLE),
        // The rings themselves, the end of memory, and anywhere.
        1 => 0..0x20000_u64,
        1 => MEMORY_BYTES - 64..MEMORY_BYTES + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..8_u32, 4 => 0..5000_u32, 4 => (0..20_u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0..4_u16, 2 => Just(4_u16), 1 => any::<u16>()];
    let next = prop_oneof![20 => 0..8_u16, 1 => any::<u16>()];
    (address, len, flags, next)
}

fn hostile_round() -> impl Strategy<Value = HostileRound> {
    let descriptors = prop::collection::vec(hostile_descriptor(), 0..8);
    let heads = prop::collection::vec(prop_oneof![20 => 0..8_u16, 1 => any::<u16>()], 8);
    let ahead = prop_oneof![20 => 0..4_u16, 1 => any::<u16>()];
    (descriptors, heads, ahead).prop_map(|(descriptors, heads, ahead)| HostileRound {
        descriptors,
        heads,
        ahead,
    })
}

/// Plays the rounds against a device; returns how many chains it completed.
fn hostile(device: impl VirtioDevice + 'static, queue: u16, rounds: &[HostileRound]) -> u32 {
    let mut driver = Driver::new(device);
    driver.start(0);
    let layout = driver.layout(queue);
    let mut completed = 0;
    for round in rounds {
        for (i, (address, len, flags, next)) in round.descriptors.iter().enumerate() {
            let i = i as u64;
            driver.descriptor(layout.descriptors + i * 16, *address, *len, *flags, *next);
            driver.descriptor(
                INDIRECT_TABLE + (i + 1) % 8 * 16,
                *address,
                *len,
                *flags,
                *next,
            );
        }
        for (i, head) in round.heads.iter().enumerate() {
            driver
                .memory
                .write_u16(Gpa(layout.available + 4 + i as u64 * 2), *head)
                .unwrap();
        }
        let available = Gpa(layout.available + 2);
        let index = driver.memory.read_u16(available).unwrap();
        driver
            .memory
            .write_u16(available, index.wrapping_add(round.ahead))
            .unwrap();
        let before = driver.memory.read_u16(Gpa(layout.used + 2)).unwrap();
        driver.notify(queue);
        driver.notify(queue);
        let after = driver.memory.read_u16(Gpa(layout.used + 2)).unwrap();
        completed += u32::from(after.wrapping_sub(before).min(layout.size));
        if driver.core().status() & STATUS_NEEDS_RESET != 0 {
            driver.reset();
            driver.start(0);
        }
    }
    driver.reset();
    driver.start(0);
    driver.core().notify(queue);
    assert!(driver.core().fault().is_none());
    completed
}

#[derive(Debug)]
struct NoDisk;

impl strata_disk::DiskBackend for NoDisk {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn readonly(&self) -> bool {
        false
    }
    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), strata_disk::DiskError> {
        buf.fill(1);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), strata_disk::DiskError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), strata_disk::DiskError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), strata_disk::DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), strata_disk::DiskError> {
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever is in the rings: no panic, an end within bounds, and a working device after a reset.
    #[test]
    fn hostile_rings_are_survived(
        rounds in prop::collection::vec(hostile_round(), 1..30),
        device in 0..6_u32,
        queue in 0..2_u16,
    ) {
        let begun = Instant::now();
        hostile_run(device, queue, &rounds);
        prop_assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

fn hostile_run(device: u32, queue: u16, rounds: &[HostileRound]) -> u32 {
    match device {
        0 => hostile(Echo::default(), queue, rounds),
        1 => hostile(Rng::with_source(std::io::repeat(1)), 0, rounds),
        2 => hostile(Blk::new(Arc::new(NoDisk), ""), 0, rounds),
        4 => hostile(Blk::with_worker(Arc::new(NoDisk), "", 2), queue, rounds),
        3 => {
            let size = ConsoleSize {
                columns: 80,
                rows: 25,
            };
            let (console, input) = Console::new(std::io::sink(), size);
            input.push(&[1; 5000]);
            hostile(console, queue, rounds)
        }
        _ => {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("v");
            let device = Vsock::new(3, &path).unwrap();
            let mut socket = std::os::unix::net::UnixStream::connect(path).unwrap();
            std::io::Write::write_all(&mut socket, b"CONNECT 1\n").unwrap();
            hostile(device, queue, rounds)
        }
    }
}

/// The generator of hostile rings is worth nothing if the devices refuse all it makes at sight.
#[test]
fn hostile_rings_reach_the_devices() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = prop::collection::vec(hostile_round(), 30);
    for device in 0..4 {
        let completed: u32 = (0..10)
            .map(|_| {
                hostile_run(
                    device,
                    0,
                    &strategy.new_tree(&mut runner).unwrap().current(),
                )
            })
            .sum();
        assert!(
            completed > 20,
            "device {device} completed {completed} chains"
        );
    }
}
