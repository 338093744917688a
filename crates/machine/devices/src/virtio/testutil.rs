//! A fake driver for device tests: it lays rings out in real guest memory and plays the guest.
//!
//! It keeps to the rules for notifications and interrupts (VIRTIO_F_EVENT_IDX), so that a device
//! that forgets to ask for a notification, or an interrupt that is not raised, fails a test.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use strata_memory::{Gpa, GuestMemory, SlotKind};

use super::core::{
    Core, STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK, SharedCore,
    VirtioInterrupt,
};
use super::device::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice};
use super::queue::QueueLayout;

pub const MEMORY_BYTES: u64 = 16 << 20;
/// Each queue's rings lie in their own piece of memory; buffers lie behind all of them.
const RINGS_BYTES: u64 = 0x10000;
const BUFFERS: u64 = 0x100000;
const CONFIG_VECTOR: u16 = 100;
const PATIENCE: Duration = Duration::from_secs(10);

/// A request that the device has completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// What the device says it wrote.
    pub written: u32,
    /// The first `written` bytes of the writable buffers.
    pub bytes: Vec<u8>,
    /// All their bytes; zero where the device wrote nothing.
    pub all: Vec<u8>,
}

/// A request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    queue: u16,
    head: u16,
    serial: u64,
}

#[derive(Default)]
pub struct Interrupts {
    used: Mutex<HashMap<u16, u32>>,
    config: Mutex<u32>,
}

impl VirtioInterrupt for Interrupts {
    fn used(&self, vector: u16) {
        *self.used.lock().unwrap().entry(vector).or_default() += 1;
    }

    fn config(&self, vector: u16) {
        assert_eq!(vector, CONFIG_VECTOR);
        *self.config.lock().unwrap() += 1;
    }
}

struct Ring {
    layout: QueueLayout,
    free: Vec<u16>,
    available: u16,
    used: u16,
    in_flight: HashMap<u16, InFlight>,
}

struct InFlight {
    token: Token,
    /// Its descriptors.
    taken: Vec<u16>,
    /// Addresses and lengths of its writable buffers.
    writable: Vec<(u64, u32)>,
}

/// The driver, and the device it drives.
pub struct Driver {
    shared: SharedCore,
    pub memory: GuestMemory,
    interrupts: Arc<Interrupts>,
    rings: Vec<Ring>,
    done: HashMap<Token, Used>,
    next_buffer: u64,
    next_serial: u64,
    features: u64,
    /// Whether chains go through indirect tables.
    pub indirect: bool,
}

impl Driver {
    pub fn new(device: impl VirtioDevice + 'static) -> Driver {
        let memory = GuestMemory::new();
        memory
            .add_slot(Gpa(0), MEMORY_BYTES, SlotKind::Ram)
            .unwrap();
        let interrupts = Arc::new(Interrupts::default());
        let shared = SharedCore::new(Box::new(device), memory.clone(), interrupts.clone());
        Driver {
            shared,
            memory,
            interrupts,
            rings: Vec::new(),
            done: HashMap::new(),
            next_buffer: BUFFERS,
            next_serial: 0,
            features: 0,
            indirect: false,
        }
    }

    pub fn core(&self) -> MutexGuard<'_, Core> {
        self.shared.lock()
    }

    pub fn shared(&self) -> &SharedCore {
        &self.shared
    }

    pub fn set_status(&mut self, status: u8) {
        self.core().set_status(status);
    }

    /// Brings the device up with these features of its own and the usual ones.
    pub fn start(&mut self, features: u64) {
        self.start_with(features | F_EVENT_IDX | F_INDIRECT_DESC);
    }

    /// Brings the device up with exactly these features and VIRTIO_F_VERSION_1.
    pub fn start_with(&mut self, features: u64) {
        self.features = features;
        let mut rings = Vec::new();
        let mut core = self.shared.lock();
        core.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        core.set_driver_features(features | F_VERSION_1);
        core.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
        assert_ne!(core.status() & STATUS_FEATURES_OK, 0, "features refused");
        core.set_config_vector(CONFIG_VECTOR);
        for index in 0..core.queue_count() {
            let size = core.queue(index).unwrap().layout.size;
            let base = u64::from(index) * RINGS_BYTES;
            self.memory.fill(Gpa(base), RINGS_BYTES, 0).unwrap();
            let layout = QueueLayout {
                size,
                descriptors: base,
                available: base + 0x8000,
                used: base + 0xc000,
            };
            core.set_queue_layout(index, |it| *it = layout);
            core.set_queue_vector(index, index);
            core.enable_queue(index);
            rings.push(Ring {
                layout,
                free: (0..size).rev().collect(),
                available: 0,
                used: 0,
                in_flight: HashMap::new(),
            });
        }
        core.set_status(STATUS_DRIVER_OK);
        drop(core);
        self.rings = rings;
    }

    /// Resets the device and forgets all requests.
    pub fn reset(&mut self) {
        self.set_status(0);
        self.rings.clear();
        self.done.clear();
        self.next_buffer = BUFFERS;
    }

    /// Moves the device's state and the guest to another device of the same kind.
    pub fn move_to(&mut self, other: &mut Driver) {
        self.shared.pause();
        let state = serde_json::to_vec(&self.core().save()).unwrap();
        let mut bytes = vec![0; MEMORY_BYTES as usize];
        self.memory.read(Gpa(0), &mut bytes).unwrap();
        other.memory.write(Gpa(0), &bytes).unwrap();
        other.shared.pause();
        other
            .core()
            .restore(&serde_json::from_slice(&state).unwrap())
            .unwrap();
        other.rings = std::mem::take(&mut self.rings);
        other.done = std::mem::take(&mut self.done);
        other.features = self.features;
        other.next_buffer = self.next_buffer;
        other.next_serial = self.next_serial;
        other.shared.start();
    }

    pub fn layout(&self, queue: u16) -> QueueLayout {
        self.rings[usize::from(queue)].layout
    }

    fn place(&mut self, len: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(16);
        assert!(
            self.next_buffer <= MEMORY_BYTES,
            "test uses too much guest memory"
        );
        at
    }

    /// Makes a request available without telling the device.
    pub fn offer(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Token {
        if self.rings.iter().all(|ring| ring.in_flight.is_empty()) {
            self.next_buffer = BUFFERS;
        }
        let mut buffers = Vec::new();
        let mut filled = Vec::new();
        for bytes in readable {
            let at = self.place(bytes.len() as u32);
            self.memory.write(Gpa(at), bytes).unwrap();
            buffers.push((at, bytes.len() as u32, 0));
        }
        for len in writable {
            let at = self.place(*len);
            self.memory.fill(Gpa(at), u64::from(*len), 0).unwrap();
            buffers.push((at, *len, 2));
            filled.push((at, *len));
        }
        let (table, indices) = if self.indirect {
            let table = self.place(buffers.len() as u32 * 16);
            (table, (0..buffers.len() as u16).collect::<Vec<_>>())
        } else {
            let ring = &mut self.rings[usize::from(queue)];
            let at = ring
                .free
                .len()
                .checked_sub(buffers.len())
                .expect("ring is full");
            (ring.layout.descriptors, ring.free.split_off(at))
        };
        for (i, (at, len, flags)) in buffers.iter().enumerate() {
            let next = indices.get(i + 1);
            let flags = flags | u16::from(next.is_some());
            let place = table + u64::from(indices[i]) * 16;
            self.descriptor(place, *at, *len, flags, next.copied().unwrap_or(0));
        }
        let ring = &mut self.rings[usize::from(queue)];
        let (head, taken) = if self.indirect {
            let head = ring.free.pop().expect("ring is full");
            let place = ring.layout.descriptors + u64::from(head) * 16;
            self.descriptor(place, table, buffers.len() as u32 * 16, 4, 0);
            (head, vec![head])
        } else {
            (indices[0], indices)
        };
        self.next_serial += 1;
        let token = Token {
            queue,
            head,
            serial: self.next_serial,
        };
        let ring = &mut self.rings[usize::from(queue)];
        ring.in_flight.insert(
            head,
            InFlight {
                token,
                taken,
                writable: filled,
            },
        );
        self.make_available(queue, head);
        token
    }

    pub fn descriptor(&self, place: u64, at: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_u64(Gpa(place), at).unwrap();
        self.memory.write_u32(Gpa(place + 8), len).unwrap();
        self.memory.write_u16(Gpa(place + 12), flags).unwrap();
        self.memory.write_u16(Gpa(place + 14), next).unwrap();
    }

    pub fn make_available(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let entry = ring.layout.available + 4 + u64::from(ring.available % ring.layout.size) * 2;
        self.memory.write_u16(Gpa(entry), head).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory
            .store_release_u16(Gpa(ring.layout.available + 2), ring.available)
            .unwrap();
    }

    /// Tells the device, whether it asked for that or not.
    pub fn notify(&mut self, queue: u16) {
        self.core().notify(queue);
    }

    /// Tells the device of what was made available since `old`, if it asked for that.
    fn kick(&mut self, queue: u16, old: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let ring = &self.rings[usize::from(queue)];
        let event = ring.layout.used + 4 + u64::from(ring.layout.size) * 8;
        let event = self.memory.read_u16(Gpa(event)).unwrap();
        let wanted =
            ring.available.wrapping_sub(event).wrapping_sub(1) < ring.available.wrapping_sub(old);
        if wanted || self.features & F_EVENT_IDX == 0 {
            self.notify(queue);
        }
    }

    /// Makes a request and tells the device if it wants to know.
    pub fn submit(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Token {
        let old = self.rings[usize::from(queue)].available;
        let token = self.offer(queue, readable, writable);
        self.kick(queue, old);
        token
    }

    /// Makes a request that the device completes at once.
    pub fn request(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Used {
        let token = self.submit(queue, readable, writable);
        let used = self.used(queue, token);
        used.unwrap_or_else(|| panic!("not completed; fault: {:?}", self.core().fault()))
    }

    /// Makes a request that the device completes in the end.
    pub fn request_eventually(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Used {
        let token = self.submit(queue, readable, writable);
        let mut used = None;
        wait_until(|| {
            used = self.used(queue, token);
            used.is_some()
        });
        used.unwrap()
    }

    /// Whether this request is completed.
    pub fn used(&mut self, queue: u16, token: Token) -> Option<Used> {
        self.reap(queue);
        self.done.remove(&token)
    }

    /// Takes everything off the used ring and asks for an interrupt for what comes next.
    fn reap(&mut self, queue: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let layout = ring.layout;
        let index = self.memory.load_acquire_u16(Gpa(layout.used + 2)).unwrap();
        while ring.used != index {
            let entry = Gpa(layout.used + 4 + u64::from(ring.used % layout.size) * 8);
            let head = self.memory.read_u32(entry).unwrap() as u16;
            let written = self.memory.read_u32(Gpa(entry.0 + 4)).unwrap();
            let InFlight {
                token,
                taken,
                writable,
            } = ring
                .in_flight
                .remove(&head)
                .expect("device completes what is not in flight");
            ring.free.extend(taken);
            let mut all = Vec::new();
            for (at, len) in writable {
                let mut part = vec![0; len as usize];
                self.memory.read(Gpa(at), &mut part).unwrap();
                all.extend(part);
            }
            let bytes = all[..written as usize].to_vec();
            self.done.insert(
                token,
                Used {
                    written,
                    bytes,
                    all,
                },
            );
            ring.used = ring.used.wrapping_add(1);
        }
        let used_event = layout.available + 4 + u64::from(layout.size) * 2;
        self.memory.write_u16(Gpa(used_event), ring.used).unwrap();
    }

    pub fn interrupts(&self, queue: u16) -> u32 {
        self.interrupts
            .used
            .lock()
            .unwrap()
            .get(&queue)
            .copied()
            .unwrap_or(0)
    }

    pub fn config_interrupts(&self) -> u32 {
        *self.interrupts.config.lock().unwrap()
    }

    pub fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.core().read_config(offset, &mut bytes);
        bytes
    }
}

/// Waits for a condition that another thread brings about.
#[track_caller]
pub fn wait_until(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A writer whose bytes can be looked at. Clones share them.
#[derive(Clone, Default)]
pub struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
