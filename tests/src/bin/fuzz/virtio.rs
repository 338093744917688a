//! Virtio devices as a driver sees them: registers in BAR 0, rings and descriptors in memory that the driver fills as
//! it likes.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use strata_devices::virtio::{
    Blk, Console, ConsoleSize, Net, NetOptions, Rng, VirtioDevice, VirtioPci, Vsock,
};
use strata_devices::{Device, InterruptSink, MsiMessage, PciFunction};
use strata_disk::{Access, DiskBackend, DiskFormat, Source};
use strata_memory::{Gpa, GuestMemory, SlotKind};
use strata_switch::Pool;

use super::input::{Input, Script, Sum};

/// Memory of the guest.
const RAM: u64 = 4 << 20;
/// Rings are put here by operations that lay them out: a page for descriptors and one for each ring, for each queue.
const RINGS: u64 = 0x1_0000;
/// Buffers.
const BUFFERS: u64 = 0x10_0000;
/// Ring sizes that operations lay out.
const SIZE: u64 = 16;
/// Places in BAR 0 (`strata_devices::virtio::pci` says what is where).
const COMMON: u64 = 0;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const WINDOW: u64 = 0x8000;

#[derive(Default)]
struct Messages(AtomicU64);

impl InterruptSink for Messages {
    fn msi(&self, _: MsiMessage) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    device: VirtioPci,
    memory: GuestMemory,
    messages: Arc<Messages>,
    available: [u16; 8],
    sum: Sum,
}

impl Rig {
    fn new(device: impl VirtioDevice + 'static) -> Option<Rig> {
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), RAM, SlotKind::Ram).ok()?;
        let messages = Arc::new(Messages::default());
        let device = VirtioPci::new("fuzzed", device, memory.clone(), messages.clone()).ok()?;
        Some(Rig {
            device,
            memory,
            messages,
            available: [0; 8],
            sum: Sum::new(),
        })
    }

    fn write(&mut self, offset: u64, value: u64, size: usize) {
        self.device
            .bar_write(0, offset, &value.to_le_bytes()[..size]);
    }

    fn read(&mut self, offset: u64, size: usize) -> u64 {
        let mut data = [0; 8];
        self.device.bar_read(0, offset, &mut data[..size]);
        u64::from_le_bytes(data)
    }

    fn store(&self, address: u64, bytes: &[u8]) {
        // Outside of memory is nothing to store to.
        let _ = self.memory.write(Gpa(address), bytes);
    }

    /// Reset, negotiation of the features in `refused` left out, and the first `queues` queues; then the driver is ready.
    fn start(&mut self, refused: u64, queues: u64) {
        self.write(COMMON + 20, 0, 1);
        self.write(COMMON + 20, 1, 1);
        self.write(COMMON + 20, 3, 1);
        for half in 0..2 {
            self.write(COMMON, half, 4);
            let offered = self.read(COMMON + 4, 4);
            self.write(COMMON + 8, half, 4);
            self.write(COMMON + 12, offered & !(refused >> (half * 32)), 4);
        }
        self.write(COMMON + 20, 11, 1);
        for queue in 0..queues {
            self.queue(queue, SIZE, 0);
        }
        self.write(COMMON + 20, 15, 1);
        self.available = [0; 8];
    }

    fn queue(&mut self, queue: u64, size: u64, shift: u64) {
        let base = RINGS + queue * 0x3000;
        self.write(COMMON + 22, queue, 2);
        self.write(COMMON + 24, size, 2);
        self.write(COMMON + 26, queue, 2);
        for (register, address) in [(32, base), (40, base + 0x1000), (48, base + 0x2000)] {
            let address = address.wrapping_add(shift);
            self.write(COMMON + register, address & 0xffff_ffff, 4);
            self.write(COMMON + register + 4, address >> 32, 4);
        }
        self.write(COMMON + 28, 1, 2);
    }

    fn descriptor(&self, queue: u64, index: u64, address: u64, length: u64, flags: u64, next: u64) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
        bytes[14..].copy_from_slice(&(next as u16).to_le_bytes());
        self.store(RINGS + queue * 0x3000 + index * 16, &bytes);
    }

    /// Makes a chain available.
    fn offer(&mut self, queue: u64, head: u64) {
        let Some(next) = self.available.get_mut(queue as usize) else {
            return;
        };
        let at = RINGS + queue * 0x3000 + 0x1000;
        let slot = u64::from(*next) % SIZE;
        *next = next.wrapping_add(1);
        let next = *next;
        self.store(at + 4 + slot * 2, &(head as u16).to_le_bytes());
        self.store(at + 2, &next.to_le_bytes());
    }

    /// A whole request: a header to read, data to read or write, a byte to write.
    fn request(&mut self, queue: u64, input: &mut Input) {
        let size = input_size(input);
        let header = input.take(usize::from(size));
        self.store(BUFFERS, header);
        let data = input.below(0x3000);
        let to_device = input.byte() & 1;
        self.descriptor(queue, 0, BUFFERS, header.len() as u64, 1, 1);
        self.descriptor(
            queue,
            1,
            BUFFERS + 0x1000,
            data,
            if to_device != 0 { 1 } else { 3 },
            2,
        );
        self.descriptor(queue, 2, BUFFERS + 0x8000, 1, 2, 0);
        self.offer(queue, 0);
        self.write(DOORBELLS + queue * 4, queue, 2);
    }

    fn run(mut self, bytes: &[u8], mut host: impl FnMut() -> u64) -> u64 {
        let mut input = Input::new(bytes);
        let mut steps = 0;
        while !input.is_empty() && steps < 2000 {
            steps += 1;
            self.step(&mut input);
            let seen = host();
            self.sum.add(seen.min(3));
        }
        let status = self.read(COMMON + 20, 1);
        self.sum.add(status);
        self.sum.add(self.messages.0.load(Ordering::Relaxed).min(3));
        if let Some(fault) = self.device.fault() {
            self.sum.text(&fault);
        }
        self.sum.0
    }

    fn step(&mut self, input: &mut Input) {
        let kind = input.byte();
        match kind % 16 {
            0 => {
                let (refused, queues) = (input.any(), u64::from(input.byte() % 8));
                self.start(if kind & 0x80 == 0 { 0 } else { refused }, queues);
            }
            1 => {
                let (queue, index) = (input.below(4), input.below(SIZE + 1));
                let (address, length) = (BUFFERS + input.below(0x8000), input.below(0x2000));
                let (flags, next) = (u64::from(input.byte() & 7), input.below(SIZE + 2));
                self.descriptor(queue, index, address, length, flags, next);
            }
            2 => {
                let (queue, index) = (input.below(4), input.below(SIZE));
                let (address, length, flags, next) =
                    (input.any(), input.any(), input.any(), input.any());
                self.descriptor(queue, index, address, length, flags, next);
            }
            3 => {
                let (queue, head) = (input.below(4), input.below(SIZE + 1));
                self.offer(queue, head);
                self.write(DOORBELLS + queue * 4, queue, 2);
            }
            4 | 5 => {
                let queue = input.below(4);
                self.request(queue, input);
            }
            6 => {
                let (offset, value, size) = (input.below(64), input.any(), 1 << (input.byte() & 3));
                self.write(COMMON + offset, value, size);
            }
            7 => {
                let (offset, value, size) =
                    (input.below(256), input.any(), 1 << (input.byte() & 3));
                self.write(DEVICE + offset, value, size);
                self.read(DEVICE + offset, size);
            }
            8 => {
                let (offset, value, size) =
                    (input.below(WINDOW), input.any(), 1 << (input.byte() & 3));
                self.write(offset, value, size);
            }
            9 => {
                let (offset, size) = (input.below(WINDOW), 1 << (input.byte() & 3));
                self.read(offset, size);
            }
            10 => {
                let (address, count) = (input.any() % (RAM + 16), usize::from(input.byte()));
                let bytes = input.take(count);
                self.store(address, bytes);
            }
            11 => {
                let (queue, size, shift) = (input.below(10), input.any(), input.any());
                self.queue(queue, size, shift);
            }
            12 => {
                let (offset, value, size) =
                    (input.number(1) as u16, input.any(), 1 << (input.byte() % 3));
                self.device
                    .config_write(offset & !(size as u16 - 1), &value.to_le_bytes()[..size]);
                let mut data = [0; 4];
                self.device
                    .config_read(offset & !(size as u16 - 1), &mut data[..size]);
            }
            13 => match input.byte() & 3 {
                0 => self.device.reset(),
                1 => {
                    self.device.pause();
                    let state = self.device.save();
                    self.device.start();
                    self.sum.add(u64::from(self.device.restore(&state).is_ok()));
                    self.device.start();
                }
                2 => {
                    self.device.pause();
                    self.device.start();
                }
                _ => {}
            },
            14 => {
                // A ring's own index and flags.
                let (queue, place, value) = (input.below(4), input.below(0x40), input.any());
                self.store(
                    RINGS + queue * 0x3000 + 0x1000 + place,
                    &value.to_le_bytes()[..2],
                );
                self.write(DOORBELLS + queue * 4, queue, 2);
            }
            _ => {
                // An indirect table.
                let (queue, entries) = (input.below(4), input.below(SIZE));
                let table = BUFFERS + 0x2_0000;
                for index in 0..entries {
                    let bytes = input.take(16);
                    self.store(table + index * 16, bytes);
                }
                self.descriptor(queue, 0, table, entries * 16, 4, 0);
                self.offer(queue, 0);
                self.write(DOORBELLS + queue * 4, queue, 2);
            }
        }
    }
}

/// Bytes of a request's header: those of block requests and of vsock packets most often.
fn input_size(input: &mut Input) -> u8 {
    match input.byte() {
        0..=99 => 16,
        100..=199 => 44,
        other => other & 63,
    }
}

fn run(device: impl VirtioDevice + 'static, bytes: &[u8]) -> u64 {
    Rig::new(device).map_or(0, |rig| rig.run(bytes, || 0))
}

/// A directory for what devices need of the host.
fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let path = directory.path().to_owned();
        (directory, path)
    });
    path
}

pub fn blk(bytes: &[u8]) -> u64 {
    let path = directory().join("disk");
    if std::fs::write(&path, vec![0; 1 << 16]).is_err() {
        return 0;
    }
    let access = match bytes.last() {
        Some(last) if last & 7 == 7 => Access::ReadOnly,
        _ => Access::ReadWrite,
    };
    let source = Source {
        path: &path,
        format: Some(DiskFormat::Raw),
        access,
        backing: &[],
        data: None,
    };
    let Ok(disk) = strata_disk::open(&source) else {
        return 0;
    };
    let disk: Arc<dyn DiskBackend> = disk;
    run(Blk::new(disk, "fuzzed"), bytes)
}

pub fn console(bytes: &[u8]) -> u64 {
    let (device, input) = Console::new(
        io::sink(),
        ConsoleSize {
            columns: 80,
            rows: 24,
        },
    );
    // Something waits for the guest.
    input.push(b"some input\n");
    run(device, bytes)
}

pub fn rng(bytes: &[u8]) -> u64 {
    run(Rng::host(), bytes)
}

pub fn vsock(bytes: &[u8]) -> u64 {
    let path = directory().join("vsock");
    match Vsock::new(3, &path) {
        Ok(device) => run(device, bytes),
        Err(_) => 0,
    }
}

/// What the guest sends comes back to it.
pub fn net(bytes: &[u8]) -> u64 {
    let options = NetOptions {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 65_520,
        pairs: 2,
    };
    let Ok((device, host)) = Net::new(options) else {
        return 0;
    };
    let (mut to_guest, mut to_host) = (VecDeque::new(), VecDeque::new());
    let mut pool = Pool::new(64);
    let exchange = move || {
        host.exchange(&mut to_guest, &mut to_host, &mut pool);
        let seen = to_host.len() as u64;
        to_guest.extend(to_host.drain(..));
        to_guest.truncate(64);
        seen
    };
    Rig::new(device).map_or(0, |rig| rig.run(bytes, exchange))
}

pub fn seeds() -> Vec<Vec<u8>> {
    let start = || Script::default().byte(0).any(0).byte(4);
    let mut seeds = vec![start().0];
    // Block requests of each type.
    for kind in [0u64, 1, 4, 8, 11, 13, 99] {
        let mut script = start();
        for direction in 0..2 {
            script = script.byte(4).number(0, 2).byte(0);
            script = script.number(kind, 4).number(0, 4).number(1, 8);
            script = script.number(512, 2).byte(direction);
        }
        seeds.push(script.0);
    }
    // Packets of vsock: request, response, reset, shutdown, data, credit.
    for operation in 1..=7 {
        let mut script = start();
        for operation in [1, operation] {
            script = script.byte(4).number(1, 2).byte(100);
            script = script
                .number(3, 8)
                .number(2, 8)
                .number(1000, 4)
                .number(1024, 4);
            script = script
                .number(10, 4)
                .number(1, 2)
                .number(operation, 2)
                .number(3, 4)
                .number(4096, 4)
                .number(0, 4);
            script = script.number(10, 2).byte(1);
        }
        seeds.push(script.0);
    }
    // Frames with a card's header: a plain one, one without its checksum, one to be cut; and a control command.
    for (queue, header) in [
        (1, [0; 12]),
        (1, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]),
        (1, [1, 1, 54, 0, 0, 5, 34, 0, 16, 0, 0, 0]),
        (4, [4, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        let mut script = start().byte(4).number(queue, 2).byte(204);
        for byte in header {
            script = script.byte(byte);
        }
        seeds.push(script.number(60, 2).byte(1).0);
    }
    // Buffers for input on every queue, then an indirect table.
    let mut script = start();
    for queue in 0..4 {
        script = script
            .byte(1)
            .number(queue, 2)
            .number(0, 2)
            .number(0, 2)
            .number(0x1000, 2)
            .byte(2)
            .number(0, 2);
        script = script.byte(3).number(queue, 2).number(0, 2);
    }
    script = script.byte(15).number(0, 2).number(2, 2);
    script = script
        .number(BUFFERS, 8)
        .number(16, 4)
        .number(1, 2)
        .number(1, 2);
    script = script
        .number(BUFFERS + 0x1000, 8)
        .number(512, 4)
        .number(2, 2)
        .number(0, 2);
    seeds.push(script.0);
    seeds
}
