//! A driver that does everything wrong: ports, PCI configuration, virtio queues, notifications.

use strata_engine::IoBus;

use super::code::PORTS;
use super::rng::Rng;
use super::world::{RAM, RINGS};

const ECAM: u64 = 0xe000_0000;
/// Slots with a device, and one without.
const SLOTS: [u64; 6] = [1, 2, 3, 8, 9, 4];

/// Some accesses, in an order that often leads somewhere.
pub fn drive(rng: &mut Rng, bus: &dyn IoBus, ends: bool) {
    for _ in 0..rng.below(6) {
        match rng.below(8) {
            0 => ports(rng, bus, ends),
            1 => config(rng, bus),
            2 => anywhere(rng, bus),
            _ => virtio(rng, bus),
        }
    }
}

fn read(bus: &dyn IoBus, at: u64, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bus.mmio_read(at, &mut bytes[..size]);
    u64::from_le_bytes(bytes)
}

fn write(bus: &dyn IoBus, at: u64, value: u64, size: usize) {
    bus.mmio_write(at, &value.to_le_bytes()[..size]);
}

fn ports(rng: &mut Rng, bus: &dyn IoBus, ends: bool) {
    for _ in 0..rng.below(20) {
        let (base, len) = rng.pick(&PORTS);
        let mut port = base + rng.below(u64::from(len)) as u16;
        if rng.chance(5) {
            port = rng.next() as u16;
        }
        // Some ports end the machine.
        let ending = matches!(port, 0x64 | 0x600..=0x605 | 0xcf9 | 0x505 | 0xf4);
        let size = rng.pick(&[1, 2, 4]);
        if rng.chance(50) || (ending && !ends) {
            bus.port_in(port, &mut [0; 4][..size]);
        } else {
            bus.port_out(port, &(rng.interesting() as u32).to_le_bytes()[..size]);
        }
    }
}

fn config(rng: &mut Rng, bus: &dyn IoBus) {
    let function =
        ECAM + (rng.pick(&SLOTS) << 15) + if rng.chance(5) { rng.below(1 << 20) } else { 0 };
    for _ in 0..rng.below(12) {
        let size = rng.pick(&[1, 2, 4, 4, 8]);
        let any = u64::from(rng.byte());
        let at = function + rng.pick(&[any, 4, 0x10, 0x14, 0x18, 0x40, 0x98]);
        if rng.chance(30) {
            read(bus, at, size);
        } else {
            write(bus, at, rng.interesting(), size);
        }
    }
}

fn anywhere(rng: &mut Rng, bus: &dyn IoBus) {
    for _ in 0..rng.below(20) {
        let at = if rng.chance(80) {
            rng.device()
        } else {
            rng.next()
        };
        let size = rng.pick(&[1, 2, 4, 8]);
        if rng.chance(40) {
            read(bus, at, size);
        } else {
            write(bus, at, rng.interesting(), size);
        }
        if rng.chance(10) {
            bus.end_of_interrupt(rng.byte());
        }
    }
}

/// Where a function's virtio structures are, as its capabilities say.
struct Structures {
    common: u64,
    notify: u64,
    device: u64,
    table: u64,
}

fn find(rng: &mut Rng, bus: &dyn IoBus, slot: u64) -> Option<Structures> {
    let function = ECAM + (slot << 15);
    if read(bus, function, 2) != 0x1af4 {
        return None;
    }
    let bar = match rng.below(20) {
        0 => rng.below(RAM) & !0xfff,
        1 => rng.device() & !0xfff,
        _ => 0xd000_0000 + (slot << 20),
    };
    write(bus, function + 4, 0, 2);
    write(bus, function + 0x10, bar, 4);
    write(bus, function + 0x14, 0, 4);
    write(bus, function + 4, 6, 2);
    let base = read(bus, function + 0x10, 4) & !0xf;
    let mut found = Structures {
        common: base,
        notify: base,
        device: base,
        table: base,
    };
    let mut at = read(bus, function + 0x34, 1);
    for _ in 0..16 {
        if at < 0x40 {
            break;
        }
        let offset = base + read(bus, function + at + 8, 4);
        match (read(bus, function + at, 1), read(bus, function + at + 3, 1)) {
            (9, 1) => found.common = offset,
            (9, 2) => found.notify = offset,
            (9, 4) => found.device = offset,
            (0x11, _) => {
                found.table = base + (read(bus, function + at + 4, 4) & !7);
                write(bus, function + at + 2, 0x8000, 2);
            }
            _ => {}
        }
        at = read(bus, function + at + 1, 1);
    }
    Some(found)
}

fn ring(rng: &mut Rng) -> u64 {
    match rng.below(12) {
        0 => rng.interesting(),
        1 => RAM - rng.below(64),
        _ => RINGS + rng.below(16) * 4096 + if rng.chance(20) { rng.below(4096) } else { 0 },
    }
}

fn virtio(rng: &mut Rng, bus: &dyn IoBus) {
    let slot = rng.pick(&SLOTS);
    let Some(at) = find(rng, bus, slot) else {
        return;
    };
    if rng.chance(70) {
        // The order that a driver keeps.
        write(bus, at.common + 0x14, 0, 1);
        for status in [1, 3] {
            write(bus, at.common + 0x14, status, 1);
        }
        for half in [0, 1] {
            write(bus, at.common, half, 4);
            let offered = read(bus, at.common + 4, 4);
            write(bus, at.common + 8, half, 4);
            let taken = if rng.chance(80) { offered } else { rng.next() };
            write(bus, at.common + 0xc, taken, 4);
        }
        write(bus, at.common + 0x14, 0xb, 1);
        for vector in 0..4 {
            let entry = at.table + vector * 16;
            let address = 0xfee0_0000 | rng.below(4) << 12;
            write(
                bus,
                entry,
                if rng.chance(90) {
                    address
                } else {
                    rng.interesting()
                },
                4,
            );
            write(bus, entry + 8, rng.below(0x100) | rng.below(2) << 8, 4);
            write(bus, entry + 12, rng.below(8) / 7, 4);
        }
        for queue in 0..rng.below(5) {
            write(bus, at.common + 0x16, queue, 2);
            if rng.chance(40) {
                let size = 1u64 << rng.below(10);
                write(bus, at.common + 0x18, size + rng.below(20) / 19, 2);
            }
            write(bus, at.common + 0x1a, rng.below(5), 2);
            for (offset, half) in [(0x20, 4), (0x28, 4), (0x30, 4)] {
                let to = ring(rng) & if rng.chance(90) { !15 } else { !0 };
                write(bus, at.common + offset, to & 0xffff_ffff, half);
                write(bus, at.common + offset + 4, to >> 32, half);
            }
            write(bus, at.common + 0x1c, 1, 2);
        }
        write(bus, at.common + 0x14, 0xf, 1);
    }
    for _ in 0..rng.below(16) {
        match rng.below(10) {
            0 => write(
                bus,
                at.common + rng.below(0x40),
                rng.interesting(),
                rng.pick(&[1, 2, 4, 8]),
            ),
            1 => write(
                bus,
                at.device + rng.below(0x80),
                rng.interesting(),
                rng.pick(&[1, 2, 4, 8]),
            ),
            2 => {
                read(bus, at.common + rng.below(0x1000), rng.pick(&[1, 2, 4, 8]));
            }
            3 => write(bus, at.table + rng.below(0x80), rng.interesting(), 4),
            _ => {
                let queue = rng.below(4);
                write(
                    bus,
                    at.notify + queue * rng.pick(&[0, 2, 4]),
                    queue,
                    rng.pick(&[2, 2, 4]),
                );
            }
        }
    }
}
