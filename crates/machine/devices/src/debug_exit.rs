//! A test device: a port that ends the machine with a value of the guest's choice. Off by default.

use crate::bytes::load_le;
use crate::{BusDevice, Device, PowerEvent, PowerSink, RestoreError, SavedState};
use std::sync::Arc;

const KIND: &str = "debug-exit";

/// The exit port. It has no state.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// First port.
    pub const BASE: u64 = 0xf4;
    /// Number of ports.
    pub const LEN: u64 = 4;

    /// Values go to `power`, as written: what exit status they make is the machine's business.
    pub fn new(power: Arc<dyn PowerSink>) -> DebugExit {
        DebugExit { power }
    }
}

impl BusDevice for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.power
            .power(PowerEvent::DebugExit(load_le(data) as u32));
    }
}

impl Device for DebugExit {
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
    fn values_are_passed_on() {
        let events = Arc::new(Events::default());
        let mut device = DebugExit::new(events.clone());
        device.write(0, &[7]);
        device.write(0, &0x1234_5678u32.to_le_bytes());
        let expected = [PowerEvent::DebugExit(7), PowerEvent::DebugExit(0x1234_5678)];
        assert_eq!(events.power(), expected);
        device.restore(&device.save()).unwrap();
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(DebugExit::LEN)) {
            let mut device = DebugExit::new(Arc::new(Events::default()));
            for each in &accesses {
                access(&mut device, each);
            }
        }
    }
}
