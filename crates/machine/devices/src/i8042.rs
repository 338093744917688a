//! The keyboard controller (8042), without keyboard or mouse: old software resets the machine through it, and drivers
//! that probe it get quick answers instead of time-outs.

use crate::{BusDevice, Device, PowerEvent, PowerSink, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const KIND: &str = "i8042";

const DATA: u64 = 0;
const COMMAND: u64 = 4;
/// Port 0x61, which has nothing to do with the keyboard but lies between.
const SYSTEM_CONTROL: u64 = 1;
/// No parity or bus error, speaker off, and timer 2 always done, so that nobody waits for a timer that is not there.
const SYSTEM_CONTROL_IDLE: u8 = 1 << 5;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// The self-test passed and the keyboard is not locked.
const STATUS_IDLE: u8 = 1 << 2 | 1 << 4;

const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
/// Commands that take a byte through the data port.
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const LOOP_KEYBOARD: u8 = 0xd2;
const LOOP_AUX: u8 = 0xd3;
/// The last of the commands that pulse output lines; line 0, active low, is the reset.
const PULSE_RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
/// "Clock line stuck": nothing is connected.
const NO_DEVICE: u8 = 0x01;
/// Output port: A20 open, no reset.
const OUTPUT_PORT: u8 = 0x03;
/// Control byte: both ports' clocks off, no interrupts, system flag.
const CONTROL_RESET: u8 = 0x34;

/// The controller: ports 0x60 and 0x64, inserted as [`I8042::LEN`] ports at [`I8042::BASE`].
pub struct I8042 {
    power: Arc<dyn PowerSink>,
    state: State,
}

/// The runtime state is what is saved.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct State {
    control: u8,
    output: Option<u8>,
    /// The command whose data byte comes next.
    expecting: Option<u8>,
}

impl State {
    const fn new() -> State {
        State {
            control: CONTROL_RESET,
            output: None,
            expecting: None,
        }
    }
}

impl I8042 {
    /// First port.
    pub const BASE: u64 = 0x60;
    /// Number of ports.
    pub const LEN: u64 = 5;

    /// Resets go to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> I8042 {
        I8042 {
            power,
            state: State::new(),
        }
    }

    fn command(&mut self, command: u8) {
        let state = &mut self.state;
        state.expecting = None;
        match command {
            READ_CONTROL => state.output = Some(state.control),
            SELF_TEST => state.output = Some(SELF_TEST_PASSED),
            TEST_AUX | TEST_KEYBOARD => state.output = Some(NO_DEVICE),
            READ_OUTPUT_PORT => state.output = Some(OUTPUT_PORT),
            WRITE_CONTROL | WRITE_OUTPUT_PORT | LOOP_KEYBOARD | LOOP_AUX => {
                state.expecting = Some(command);
            }
            PULSE_RESET => self.power.power(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.state.expecting.take() {
            Some(WRITE_CONTROL) => self.state.control = value,
            Some(LOOP_KEYBOARD | LOOP_AUX) => self.state.output = Some(value),
            // Bit 0 is the reset line, active low.
            Some(WRITE_OUTPUT_PORT) if value & 1 == 0 => self.power.power(PowerEvent::Reset),
            // A byte for a keyboard that is not there.
            _ => {}
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(offset..) {
            *byte = match port {
                DATA => self.state.output.take().unwrap_or(0),
                COMMAND if self.state.output.is_some() => STATUS_IDLE | STATUS_OUTPUT_FULL,
                COMMAND => STATUS_IDLE,
                SYSTEM_CONTROL => SYSTEM_CONTROL_IDLE,
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (&byte, port) in data.iter().zip(offset..) {
            match port {
                DATA => self.data(byte),
                COMMAND => self.command(byte),
                _ => {}
            }
        }
    }
}

impl Device for I8042 {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&mut self) {
        self.state = State::new();
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

    fn rig() -> (Arc<Events>, I8042) {
        let events = Arc::new(Events::default());
        (events.clone(), I8042::new(events))
    }

    fn get(controller: &mut I8042, port: u64) -> u8 {
        let mut data = [0];
        controller.read(port, &mut data);
        data[0]
    }

    #[test]
    fn it_resets_the_machine() {
        let (events, mut controller) = rig();
        controller.write(COMMAND, &[0xfe]);
        controller.write(COMMAND, &[0xd1]);
        controller.write(DATA, &[0xfe]);
        controller.write(DATA, &[0xfe]);
        assert_eq!(events.power(), [PowerEvent::Reset, PowerEvent::Reset]);
    }

    #[test]
    fn probes_are_answered_at_once() {
        let (_, mut controller) = rig();
        assert_eq!(get(&mut controller, COMMAND) & 3, 0);
        assert_eq!(get(&mut controller, SYSTEM_CONTROL), 0x20);
        for (command, answer) in [
            (SELF_TEST, 0x55),
            (READ_CONTROL, CONTROL_RESET),
            (TEST_AUX, NO_DEVICE),
        ] {
            controller.write(COMMAND, &[command]);
            assert_eq!(get(&mut controller, COMMAND) & 3, 1);
            assert_eq!(get(&mut controller, DATA), answer);
            assert_eq!(get(&mut controller, COMMAND) & 3, 0);
        }
        controller.write(COMMAND, &[WRITE_CONTROL]);
        controller.write(DATA, &[0x47]);
        controller.write(COMMAND, &[READ_CONTROL]);
        assert_eq!(get(&mut controller, DATA), 0x47);
        controller.write(COMMAND, &[LOOP_AUX]);
        controller.write(DATA, &[0x5a]);
        assert_eq!(get(&mut controller, DATA), 0x5a);
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(I8042::LEN)) {
            let (_, mut controller) = rig();
            for each in &accesses {
                access(&mut controller, each);
            }
            let (_, mut copy) = rig();
            copy.restore(&controller.save()).unwrap();
            prop_assert_eq!(copy.state, controller.state);
        }
    }
}
