//! The way between interrupt senders and local APICs: destinations, shorthands, messages from devices.

use std::sync::{Arc, PoisonError, RwLock};

use strata_engine::{InterruptSink, MsiMessage};

use super::Apic;

/// What a message does at its destination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeliveryMode {
    /// An interrupt with the message's vector.
    Fixed,
    /// The same, at one of the addressed processors.
    LowestPriority,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up at the page that the vector names.
    Startup,
    /// An interrupt of an 8259-like controller.
    ExtInt,
}

impl DeliveryMode {
    /// From bits 10:8 of an ICR, LVT entry or message; `None` for SMI and what is reserved.
    pub(super) fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(DeliveryMode::Fixed),
            1 => Some(DeliveryMode::LowestPriority),
            4 => Some(DeliveryMode::Nmi),
            5 => Some(DeliveryMode::Init),
            6 => Some(DeliveryMode::Startup),
            7 => Some(DeliveryMode::ExtInt),
            _ => None,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Destination {
    /// The APIC with this ID; all ones (of 8 or 32 bits) is everybody.
    Physical(u32),
    /// Every APIC whose logical ID matches.
    Logical(u32),
    /// The sender.
    Myself,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does there.
    pub mode: DeliveryMode,
    /// The vector.
    pub vector: u8,
    /// Level-triggered: its end is broadcast.
    pub level: bool,
}

/// All local APICs of a machine.
pub struct ApicBus {
    apics: RwLock<Vec<Arc<Apic>>>,
    tsc_hz: u64,
}

impl ApicBus {
    /// A bus without APICs, in a machine whose TSC ticks `tsc_hz` times a second.
    pub fn new(tsc_hz: u64) -> Arc<ApicBus> {
        Arc::new(ApicBus {
            apics: RwLock::new(Vec::new()),
            tsc_hz,
        })
    }

    /// Adds an APIC with this ID, in its state after power-up. Each ID once.
    pub fn add(self: &Arc<Self>, id: u32) -> Arc<Apic> {
        let apic = Arc::new(Apic::new(id, self.tsc_hz, Arc::downgrade(self)));
        self.apics
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&apic));
        apic
    }

    /// How many APICs there are.
    pub fn count(&self) -> u32 {
        self.apics
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u32
    }

    /// Delivers a message that does not come from an APIC.
    pub fn send(&self, message: &Message) {
        self.send_from(u32::MAX, message);
    }

    /// Delivers a message of the APIC with ID `sender`.
    pub(super) fn send_from(&self, sender: u32, message: &Message) {
        let apics = self.apics.read().unwrap_or_else(PoisonError::into_inner);
        let targets = apics.iter().filter(|apic| match message.destination {
            Destination::All => true,
            Destination::Myself => apic.id() == sender,
            Destination::Others => apic.id() != sender,
            addressed => apic.is_addressed(addressed),
        });
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(target) = targets.min_by_key(|apic| apic.processor_priority()) {
                target.accept(message);
            }
        } else {
            targets.for_each(|target| target.accept(message));
        }
    }
}

impl InterruptSink for ApicBus {
    fn msi(&self, message: MsiMessage) {
        // Addresses outside of 0xfeexxxxx are plain memory writes, not interrupts.
        if message.address >> 20 != 0xfee {
            return;
        }
        let id = (message.address >> 12 & 0xff) as u32;
        let logical = message.address & 4 != 0;
        let hint = message.address & 8 != 0;
        let Some(mut mode) = DeliveryMode::from_bits(message.data >> 8) else {
            return;
        };
        if hint && logical && mode == DeliveryMode::Fixed {
            mode = DeliveryMode::LowestPriority;
        }
        self.send(&Message {
            destination: if logical {
                Destination::Logical(id)
            } else {
                Destination::Physical(id)
            },
            mode,
            vector: message.data as u8,
            level: message.data & 0x8000 != 0,
        });
    }

    fn ext_int(&self, vector: Option<u8>) {
        let apics = self.apics.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = apics.first() {
            first.ext_int(vector);
        }
    }
}
