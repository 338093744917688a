//! The I/O APIC (82093AA): turns 24 wires into interrupt messages.

use crate::bytes::{load_le, lock, store_le};
use crate::interrupt::{InterruptSink, IrqLine, MsiMessage};
use crate::{BusDevice, Device, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

const KIND: &str = "ioapic";
/// Number of input pins.
const PINS: usize = 24;
/// Version 0x11 has no EOI register: ends of interrupt come from the local APICs.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const REGISTER_REDIRECTION: u8 = 0x10;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Vector to mask bit, and the destination.
const DEFINED: u64 = 0xff00_0000_0001_ffff;

/// The I/O APIC, a MMIO device of [`IoApic::LEN`] bytes.
pub struct IoApic {
    sink: Arc<dyn InterruptSink>,
    state: State,
}

/// The runtime state is what is saved.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct State {
    id: u8,
    select: u8,
    redirection: [u64; PINS],
    /// One bit per pin: the level of its wire.
    levels: u32,
}

impl State {
    const fn new() -> State {
        State {
            id: 0,
            select: 0,
            redirection: [MASKED; PINS],
            levels: 0,
        }
    }
}

/// The message by which a redirection entry interrupts.
fn message(entry: u64) -> MsiMessage {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let address = 0xfee0_0000 | destination << 12 | logical << 2;
    // Vector and delivery mode are in the same place; a message has the level (always asserted) in bit 14.
    let trigger = if entry & LEVEL != 0 {
        1 << 15 | 1 << 14
    } else {
        0
    };
    MsiMessage {
        address,
        data: (entry & 0x7ff) as u32 | trigger,
    }
}

impl IoApic {
    /// Bytes of MMIO.
    pub const LEN: u64 = 0x1000;

    /// An I/O APIC that sends its messages to `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>) -> IoApic {
        IoApic {
            sink,
            state: State::new(),
        }
    }

    /// The wire to a pin of a shared I/O APIC; pins past the last lead nowhere.
    pub fn line(shared: &Arc<Mutex<IoApic>>, pin: u8) -> Arc<dyn IrqLine> {
        Arc::new(Pin {
            ioapic: shared.clone(),
            pin,
        })
    }

    /// A local APIC saw the end of an interrupt with this vector. A level-triggered pin whose wire is still active
    /// interrupts again.
    pub fn eoi(&mut self, vector: u8) {
        for pin in 0..PINS {
            if let Some(entry) = self.state.redirection.get_mut(pin)
                && *entry as u8 == vector
                && *entry & LEVEL != 0
                && *entry & REMOTE_IRR != 0
            {
                *entry &= !REMOTE_IRR;
                self.service_level(pin);
            }
        }
    }

    fn set_level(&mut self, pin: u8, active: bool) {
        let pin = usize::from(pin);
        let Some(&entry) = self.state.redirection.get(pin) else {
            return;
        };
        let bit = 1 << pin;
        let was_active = self.state.levels & bit != 0;
        if active {
            self.state.levels |= bit;
        } else {
            self.state.levels &= !bit;
        }
        if entry & LEVEL != 0 {
            self.service_level(pin);
        } else if active && !was_active && entry & MASKED == 0 {
            // An edge on a masked pin is lost, as on the chip.
            self.sink.msi(message(entry));
        }
    }

    /// Interrupts by a level-triggered pin if its wire is active and the last interrupt has ended.
    fn service_level(&mut self, pin: usize) {
        let active = self.state.levels >> pin & 1 != 0;
        if let Some(entry) = self.state.redirection.get_mut(pin)
            && active
            && *entry & LEVEL != 0
            && *entry & (MASKED | REMOTE_IRR) == 0
        {
            *entry |= REMOTE_IRR;
            self.sink.msi(message(*entry));
        }
    }

    fn read_register(&self) -> u32 {
        match self.state.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.state.id) << 24,
            REGISTER_VERSION => VERSION,
            select => match redirection_half(select) {
                Some((pin, high)) => {
                    let entry = self.state.redirection.get(pin).copied().unwrap_or(0);
                    (entry >> if high { 32 } else { 0 }) as u32
                }
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.state.select == REGISTER_ID {
            self.state.id = (value >> 24) as u8 & 0xf;
        }
        let Some((pin, high)) = redirection_half(self.state.select) else {
            return;
        };
        let Some(entry) = self.state.redirection.get_mut(pin) else {
            return;
        };
        let value = u64::from(value);
        let whole = match high {
            true => *entry & 0xffff_ffff | value << 32,
            false => *entry & !0xffff_ffff | value,
        };
        *entry = whole & DEFINED & !READ_ONLY | *entry & READ_ONLY;
        if *entry & LEVEL == 0 {
            // Software ends a level interrupt by hand by going through edge mode.
            *entry &= !REMOTE_IRR;
        }
        self.service_level(pin);
    }
}

/// Which entry a register number means, and whether its upper half.
fn redirection_half(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(REGISTER_REDIRECTION)?;
    let pin = usize::from(index / 2);
    (pin < PINS).then_some((pin, index % 2 != 0))
}

struct Pin {
    ioapic: Arc<Mutex<IoApic>>,
    pin: u8,
}

impl IrqLine for Pin {
    fn set_level(&self, active: bool) {
        lock(&self.ioapic).set_level(self.pin, active);
    }
}

impl BusDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers answer to 32-bit accesses; a narrower one sees the low bytes.
        let value = match offset {
            SELECT => u32::from(self.state.select),
            WINDOW => self.read_register(),
            _ => 0,
        };
        store_le(data, u64::from(value));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = load_le(data) as u32;
        match offset {
            SELECT => self.state.select = value as u8,
            WINDOW => self.write_register(value),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&mut self) {
        // The wires belong to the devices at their ends, which bring them down by their own resets.
        let levels = self.state.levels;
        self.state = State {
            levels,
            ..State::new()
        };
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND, 1, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.state = state.open(KIND, 1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{Events, access, accesses};
    use proptest::prelude::*;

    struct Rig {
        ioapic: Arc<Mutex<IoApic>>,
        events: Arc<Events>,
    }

    impl Rig {
        fn new() -> Rig {
            let events = Arc::new(Events::default());
            Rig {
                ioapic: Arc::new(Mutex::new(IoApic::new(events.clone()))),
                events,
            }
        }

        fn get(&self, register: u8) -> u32 {
            let mut ioapic = self.ioapic.lock().unwrap();
            let mut data = [0; 4];
            ioapic.write(SELECT, &[register, 0, 0, 0]);
            ioapic.read(WINDOW, &mut data);
            u32::from_le_bytes(data)
        }

        fn put(&self, register: u8, value: u32) {
            let mut ioapic = self.ioapic.lock().unwrap();
            ioapic.write(SELECT, &[register, 0, 0, 0]);
            ioapic.write(WINDOW, &value.to_le_bytes());
        }

        fn route(&self, pin: u8, low: u32, high: u32) {
            self.put(0x11 + pin * 2, high);
            self.put(0x10 + pin * 2, low);
        }
    }

    #[test]
    fn registers() {
        let rig = Rig::new();
        assert_eq!(rig.get(1), 0x0017_0011);
        rig.put(0, 0xff00_0000);
        assert_eq!(rig.get(0), 0x0f00_0000);
        assert_eq!(rig.get(0x10), 0x1_0000);
        rig.route(23, 0xffff_ffff, 0xffff_ffff);
        assert_eq!((rig.get(0x3e), rig.get(0x3f)), (0x1_afff, 0xff00_0000));
        rig.put(0x40, 5);
        assert_eq!(rig.get(0x40), 0);
    }

    #[test]
    fn edges_interrupt_once_each() {
        let rig = Rig::new();
        let line = IoApic::line(&rig.ioapic, 4);
        line.pulse();
        rig.route(4, 0x834, 0x0300_0000);
        assert!(
            rig.events.messages().is_empty(),
            "an edge while masked is lost"
        );
        line.set_level(true);
        line.set_level(true);
        assert_eq!(
            rig.events.messages(),
            [MsiMessage {
                address: 0xfee0_3004,
                data: 0x34
            }]
        );
        line.set_level(false);
        line.pulse();
        assert_eq!(rig.events.messages().len(), 1);
        IoApic::line(&rig.ioapic, 24).pulse();
    }

    #[test]
    fn levels_interrupt_until_they_end() {
        let rig = Rig::new();
        let line = IoApic::line(&rig.ioapic, 9);
        rig.route(9, 0x1_8051, 0);
        line.set_level(true);
        assert!(rig.events.messages().is_empty());
        rig.put(0x22, 0x8051);
        assert_eq!(
            rig.events.messages(),
            [MsiMessage {
                address: 0xfee0_0000,
                data: 0xc051
            }]
        );
        assert_eq!(rig.get(0x22), 0xc051, "remote IRR");
        line.set_level(false);
        line.set_level(true);
        rig.ioapic.lock().unwrap().eoi(0x50);
        assert!(rig.events.messages().is_empty());
        rig.ioapic.lock().unwrap().eoi(0x51);
        assert_eq!(rig.events.messages().len(), 1, "still active");
        line.set_level(false);
        rig.ioapic.lock().unwrap().eoi(0x51);
        assert!(rig.events.messages().is_empty());
        assert_eq!(rig.get(0x22), 0x8051);
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(0x20), wires in proptest::collection::vec((0u8..26, any::<bool>()), 0..40)) {
            let rig = Rig::new();
            let mut wires = wires.into_iter();
            for each in &accesses {
                access(&mut *rig.ioapic.lock().unwrap(), each);
                if let Some((pin, active)) = wires.next() {
                    IoApic::line(&rig.ioapic, pin).set_level(active);
                    rig.ioapic.lock().unwrap().eoi(pin);
                }
            }
            let copy = Rig::new();
            copy.ioapic.lock().unwrap().restore(&rig.ioapic.lock().unwrap().save()).unwrap();
            prop_assert_eq!(&copy.ioapic.lock().unwrap().state, &rig.ioapic.lock().unwrap().state);
        }
    }
}
