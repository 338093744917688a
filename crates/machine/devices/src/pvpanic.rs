//! pvpanic: one port through which a guest's kernel says that it panicked.

use crate::{BusDevice, Device, PowerEvent, PowerSink, RestoreError, SavedState};
use std::sync::Arc;

const KIND: &str = "pvpanic";
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The panic port. It has no state.
pub struct PvPanic {
    power: Arc<dyn PowerSink>,
}

impl PvPanic {
    /// Its port.
    pub const BASE: u64 = 0x505;
    /// Number of ports.
    pub const LEN: u64 = 1;

    /// Panics go to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> PvPanic {
        PvPanic { power }
    }
}

impl BusDevice for PvPanic {
    /// Reads the events that it understands.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & PANICKED != 0 {
            self.power.power(PowerEvent::GuestPanic);
        } else if events & CRASH_LOADED != 0 {
            self.power.power(PowerEvent::GuestCrashLoaded);
        }
    }
}

impl Device for PvPanic {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::new(KIND, 1, &())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.open(KIND, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{Events, access, accesses};
    use proptest::prelude::*;

    #[test]
    fn panics_are_reported() {
        let events = Arc::new(Events::default());
        let mut device = PvPanic::new(events.clone());
        let mut supported = [0];
        device.read(0, &mut supported);
        assert_eq!(supported, [3]);
        for byte in [4, 1, 2, 3] {
            device.write(0, &[byte]);
        }
        let expected = [
            PowerEvent::GuestPanic,
            PowerEvent::GuestCrashLoaded,
            PowerEvent::GuestPanic,
        ];
        assert_eq!(events.power(), expected);
        device.restore(&device.save()).unwrap();
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(8)) {
            let mut device = PvPanic::new(Arc::new(Events::default()));
            for each in &accesses {
                access(&mut device, each);
            }
        }
    }
}
