//! Fakes and generators that the devices' tests share.

use crate::interrupt::{InterruptSink, IrqLine, MsiMessage};
use crate::{BusDevice, PowerEvent, PowerSink};
use proptest::prelude::*;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A wire whose level can be looked at.
#[derive(Default)]
pub(crate) struct Wire(AtomicBool);

impl Wire {
    pub(crate) fn level(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl IrqLine for Wire {
    fn set_level(&self, active: bool) {
        self.0.store(active, Ordering::Relaxed);
    }
}

/// Collects interrupts and power events.
#[derive(Default)]
pub(crate) struct Events {
    messages: Mutex<Vec<MsiMessage>>,
    power: Mutex<Vec<PowerEvent>>,
}

impl Events {
    pub(crate) fn messages(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }

    pub(crate) fn power(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.power.lock().unwrap())
    }
}

impl InterruptSink for Events {
    fn msi(&self, message: MsiMessage) {
        self.messages.lock().unwrap().push(message);
    }
}

impl PowerSink for Events {
    fn power(&self, event: PowerEvent) {
        self.power.lock().unwrap().push(event);
    }
}

/// A writer whose bytes can be taken.
#[derive(Clone, Default)]
pub(crate) struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    pub(crate) fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One access by a guest; a read if there is no value.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) offset: u64,
    pub(crate) width: usize,
    pub(crate) value: Option<u64>,
}

/// Sequences of accesses inside `len` addresses.
pub(crate) fn accesses(len: u64) -> impl Strategy<Value = Vec<Access>> {
    let value = prop_oneof![any::<u64>(), 0u64..256, Just(0), Just(!0)];
    let one =
        (0..len, 0u32..4, proptest::option::of(value)).prop_map(move |(offset, log, value)| {
            let fits = |log: &u32| offset + (1 << log) <= len;
            let log = (0..=log).rev().find(fits).unwrap_or(0);
            Access {
                offset,
                width: 1 << log,
                value,
            }
        });
    proptest::collection::vec(one, 1..100)
}

/// Makes an access; what was read.
pub(crate) fn access<D: BusDevice>(device: &mut D, access: &Access) -> u64 {
    let mut data = access.value.unwrap_or(0x5555_5555_5555_5555).to_le_bytes();
    match access.value {
        Some(_) => device.write(access.offset, &data[..access.width]),
        None => device.read(access.offset, &mut data[..access.width]),
    }
    u64::from_le_bytes(data)
}
