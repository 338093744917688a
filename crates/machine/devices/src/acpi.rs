//! The fixed ACPI hardware (ACPI 6.5, chapter 4.8): power-management events and control, the PM timer, sleep states,
//! and the power button.
//!
//! Limitations: the timer never sets its carry status, so no system control interrupt comes from it; only S5 is a
//! sleep state.

use crate::interrupt::IrqLine;
use crate::{BusDevice, Device, PowerEvent, PowerSink, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const KIND: &str = "acpi-pm";

const EVENT_STATUS: u64 = 0;
const EVENT_ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const TIMER: u64 = 8;

const STATUS_POWER_BUTTON: u16 = 1 << 8;
/// Timer, bus master, global lock, power button, sleep button, RTC, wake.
const STATUS_DEFINED: u16 = 1 << 15 | 0x0731;
const ENABLE_DEFINED: u16 = 0x0721;
/// Interrupts come as SCI, not SMI: there is no other mode.
const CONTROL_SCI_ENABLED: u16 = 1 << 0;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
/// Bus-master reload and the sleep type keep what is written.
const CONTROL_WRITABLE: u16 = 1 << 1 | 0b111 << 10;

/// PM timer ticks per second.
const TIMER_HZ: u128 = 3_579_545;

/// Nanoseconds of the machine's clock: they stand still while the machine does.
pub type MachineNanos = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The power-management register block: [`AcpiPm::LEN`] ports with the events first, control and the timer behind.
pub struct AcpiPm {
    now: MachineNanos,
    sci: Arc<dyn IrqLine>,
    power: Arc<dyn PowerSink>,
    state: State,
}

/// The runtime state is what is saved. The timer is a function of the machine's clock.
#[derive(Copy, Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
}

impl AcpiPm {
    /// First port of the block.
    pub const BASE: u64 = 0x600;
    /// Number of ports.
    pub const LEN: u64 = 12;
    /// PM1a event block: status and enable, 2 bytes each.
    pub const EVENT_PORT: u64 = Self::BASE;
    /// PM1a control block, 2 bytes.
    pub const CONTROL_PORT: u64 = Self::BASE + CONTROL;
    /// PM timer, 4 bytes, 32 bits wide.
    pub const TIMER_PORT: u64 = Self::BASE + TIMER;
    /// The sleep type that means S5.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// The interrupt that the tables announce for the SCI.
    pub const SCI_GSI: u8 = 9;

    /// `sci` is a level-triggered wire.
    pub fn new(now: MachineNanos, sci: Arc<dyn IrqLine>, power: Arc<dyn PowerSink>) -> AcpiPm {
        AcpiPm {
            now,
            sci,
            power,
            state: State::default(),
        }
    }

    /// Someone pressed the power button: the guest is asked to shut down, if it listens.
    pub fn press_power_button(&mut self) {
        self.state.status |= STATUS_POWER_BUTTON;
        self.update_sci();
    }

    fn update_sci(&self) {
        self.sci
            .set_level(self.state.status & self.state.enable != 0);
    }

    fn ticks(&self) -> u32 {
        (u128::from((self.now)()) * TIMER_HZ / 1_000_000_000) as u32
    }

    /// The 12 bytes as one number.
    fn block(&self) -> u128 {
        let State {
            status,
            enable,
            control,
        } = self.state;
        let control = control | CONTROL_SCI_ENABLED;
        u128::from(status)
            | u128::from(enable) << (EVENT_ENABLE * 8)
            | u128::from(control) << (CONTROL * 8)
            | u128::from(self.ticks()) << (TIMER * 8)
    }

    fn write_control(&mut self, value: u16) {
        self.state.control = value & CONTROL_WRITABLE;
        let sleep_type = (value >> 10 & 0b111) as u8;
        if value & CONTROL_SLEEP_ENABLE != 0 && sleep_type == Self::SLEEP_TYPE_S5 {
            self.power.power(PowerEvent::PowerOff);
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let block = self.block().to_le_bytes();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| block.get(at).copied())
                .unwrap_or(0);
        }
    }

    /// Each register takes the bytes that fall into it; the others keep what they are.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut written = [None; Self::LEN as usize];
        for (&byte, at) in data.iter().zip(offset..) {
            if let Some(slot) = usize::try_from(at).ok().and_then(|at| written.get_mut(at)) {
                *slot = Some(byte);
            }
        }
        let word = |register: u64, kept: u16| {
            let mut pair = written.iter().skip(register as usize).copied();
            let (low, high) = (pair.next().flatten(), pair.next().flatten());
            let [kept_low, kept_high] = kept.to_le_bytes();
            let value = u16::from_le_bytes([low.unwrap_or(kept_low), high.unwrap_or(kept_high)]);
            (low.is_some() || high.is_some()).then_some(value)
        };
        // Status bits clear by writing ones.
        let clear = word(EVENT_STATUS, 0);
        let enable = word(EVENT_ENABLE, self.state.enable);
        let control = word(CONTROL, self.state.control);
        self.state.status &= !(clear.unwrap_or(0) & STATUS_DEFINED);
        if let Some(enable) = enable {
            self.state.enable = enable & ENABLE_DEFINED;
        }
        if let Some(control) = control {
            self.write_control(control);
        }
        self.update_sci();
    }
}

impl Device for AcpiPm {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State::default();
        self.update_sci();
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND, 1, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.state = state.open(KIND, 1)?;
        self.update_sci();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{Events, Wire, access, accesses};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Rig {
        pm: AcpiPm,
        nanos: Arc<AtomicU64>,
        sci: Arc<Wire>,
        events: Arc<Events>,
    }

    impl Rig {
        fn new() -> Rig {
            let nanos = Arc::new(AtomicU64::new(0));
            let source = nanos.clone();
            let (sci, events) = (Arc::new(Wire::default()), Arc::new(Events::default()));
            let now = Arc::new(move || source.load(Ordering::Relaxed));
            Rig {
                pm: AcpiPm::new(now, sci.clone(), events.clone()),
                nanos,
                sci,
                events,
            }
        }

        fn get(&mut self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.pm.read(offset, &mut data);
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn the_timer_counts_the_machine_s_time() {
        let mut rig = Rig::new();
        assert_eq!(rig.get(TIMER), 0);
        rig.nanos.store(1_000_000_000, Ordering::Relaxed);
        assert_eq!(rig.get(TIMER), 3_579_545);
        rig.nanos.store(u64::MAX, Ordering::Relaxed);
        rig.get(TIMER);
    }

    #[test]
    fn the_power_button_raises_the_sci_until_acknowledged() {
        let mut rig = Rig::new();
        rig.pm.press_power_button();
        assert!(!rig.sci.level());
        rig.pm.write(EVENT_ENABLE, &0x0100u16.to_le_bytes());
        assert!(rig.sci.level());
        assert_eq!(rig.get(EVENT_STATUS), 0x0100_0100);
        rig.pm.write(EVENT_STATUS, &[0xff]);
        assert!(rig.sci.level());
        rig.pm.write(EVENT_STATUS, &0x0100u16.to_le_bytes());
        assert!(!rig.sci.level());
        assert_eq!(rig.get(EVENT_STATUS), 0x0100_0000);
    }

    #[test]
    fn s5_is_power_off() {
        let mut rig = Rig::new();
        assert_eq!(rig.get(CONTROL) & 0xffff, 1);
        rig.pm.write(CONTROL, &(5u16 << 10).to_le_bytes());
        rig.pm.write(CONTROL, &(3u16 << 10 | 1 << 13).to_le_bytes());
        assert!(rig.events.power().is_empty());
        rig.pm.write(CONTROL, &(5u16 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(rig.events.power(), [PowerEvent::PowerOff]);
        assert_eq!(rig.get(CONTROL) & 0xffff, 5 << 10 | 1);
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(AcpiPm::LEN)) {
            let mut rig = Rig::new();
            for each in &accesses {
                access(&mut rig.pm, each);
                prop_assert_eq!(rig.sci.level(), rig.pm.state.status & rig.pm.state.enable != 0);
                if each.width == 2 {
                    rig.pm.press_power_button();
                }
            }
            let mut copy = Rig::new();
            copy.pm.restore(&rig.pm.save()).unwrap();
            prop_assert_eq!(copy.pm.state, rig.pm.state);
            prop_assert_eq!(copy.sci.level(), rig.sci.level());
        }
    }
}
