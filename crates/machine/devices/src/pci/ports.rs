//! Ports 0xcf8 to 0xcff: configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), and the chipset's reset control register
//! that lies between at 0xcf9.

use super::{Bdf, PciRoot};
use crate::bytes::{load_le, store_le};
use crate::{BusDevice, Device, PowerEvent, PowerSink, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const NAME: &str = "pci-ports";
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Reset happens when software raises this bit of the reset control register.
const RESET_CPU: u8 = 1 << 2;
/// The bits of the reset control register that keep what is written.
const RESET_WRITABLE: u8 = 0b1110;

/// The port device; insert it at [`PciPorts::BASE`].
pub struct PciPorts {
    root: Arc<PciRoot>,
    power: Arc<dyn PowerSink>,
    state: State,
}

#[derive(Copy, Clone, Default, Serialize, Deserialize)]
struct State {
    address: u32,
    reset_control: u8,
}

impl PciPorts {
    /// First port.
    pub const BASE: u64 = 0xcf8;
    /// Number of ports.
    pub const LEN: u64 = 8;
    /// The reset control register, for the ACPI tables; the value that resets is 6.
    pub const RESET_PORT: u64 = 0xcf9;

    /// Configuration goes to `root`, resets to `power`.
    pub fn new(root: Arc<PciRoot>, power: Arc<dyn PowerSink>) -> PciPorts {
        PciPorts {
            root,
            power,
            state: State::default(),
        }
    }

    /// The function and register that an access to the data port at `offset` means.
    fn target(&self, offset: u64) -> Option<(Bdf, u16)> {
        let address = self.state.address;
        let byte = offset
            .checked_sub(4)
            .filter(|_| address & ADDRESS_ENABLE != 0)?;
        let register = (address & 0xfc) as u16 + byte as u16;
        Some((Bdf::from_bits((address >> 8) as u16), register))
    }
}

impl BusDevice for PciPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => store_le(data, u64::from(self.state.address)),
            (1, 1) => store_le(data, u64::from(self.state.reset_control)),
            _ => match self.target(offset) {
                Some((at, register)) => self.root.config_read(at, register, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[_, _, _, _]) => self.state.address = load_le(data) as u32 & !0x7f00_0003,
            (1, &[value]) => {
                let before =
                    std::mem::replace(&mut self.state.reset_control, value & RESET_WRITABLE);
                if value & !before & RESET_CPU != 0 {
                    self.power.power(PowerEvent::Reset);
                }
            }
            _ => {
                if let Some((at, register)) = self.target(offset) {
                    self.root.config_write(at, register, data);
                }
            }
        }
    }
}

impl Device for PciPorts {
    fn id(&self) -> &str {
        NAME
    }

    fn reset(&mut self) {
        self.state = State::default();
    }

    fn save(&self) -> SavedState {
        SavedState::new(NAME, 1, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.state = state.open(NAME, 1)?;
        Ok(())
    }
}
