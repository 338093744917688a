//! A 16550A serial port whose line has no speed: bytes leave at once and arrive as fast as the guest takes them.

use crate::interrupt::IrqLine;
use crate::{BusDevice, Device, RestoreError, SavedState};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

const KIND: &str = "serial-16550";
const FIFO_BYTES: usize = 16;
/// Bytes from the host that may wait for room in the FIFO.
const INPUT_MAX: usize = 4096;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;

const LCR_DIVISOR: u8 = 1 << 7;

const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_RTS: u8 = 1 << 1;
const MCR_DTR: u8 = 1 << 0;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMIT_EMPTY: u8 = 1 << 5 | 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RING: u8 = 1 << 6;
const MSR_CARRIER: u8 = 1 << 7;

/// The serial port: 8 ports, one interrupt wire, a writer for output and a bounded queue for input.
pub struct Serial {
    id: String,
    irq: Arc<dyn IrqLine>,
    output: Box<dyn Write + Send>,
    on_space: Option<Box<dyn Fn() + Send>>,
    state: State,
}

/// The runtime state is what is saved: registers and bytes on their way.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct State {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    /// Low four bits of the modem status: which inputs changed since it was read.
    modem_deltas: u8,
    overrun: bool,
    /// The transmitter has become empty and the guest was not told yet.
    transmit_pending: bool,
    /// What the guest can read now.
    fifo: VecDeque<u8>,
    /// What the host sent and does not fit the FIFO yet.
    input: VecDeque<u8>,
}

impl State {
    const fn new() -> State {
        State {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: MCR_OUT2,
            scratch: 0,
            divisor: 12,
            modem_deltas: 0,
            overrun: false,
            transmit_pending: false,
            fifo: VecDeque::new(),
            input: VecDeque::new(),
        }
    }

    fn fifo_max(&self) -> usize {
        if self.fifo_control & FCR_ENABLE != 0 {
            FIFO_BYTES
        } else {
            1
        }
    }

    /// How many received bytes raise the interrupt without waiting for the time-out.
    fn trigger(&self) -> usize {
        match (self.fifo_control & FCR_ENABLE, self.fifo_control >> 6) {
            (0, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        }
    }

    /// The modem inputs: as if a ready peer were connected, or our own outputs in loopback.
    fn modem_inputs(&self) -> u8 {
        if self.modem_control & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_CARRIER;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RING),
            (MCR_OUT2, MSR_CARRIER),
        ]
        .into_iter()
        .filter(|(output, _)| self.modem_control & output != 0)
        .fold(0, |inputs, (_, input)| inputs | input)
    }

    /// The highest-priority cause of an interrupt, as the identification register shows it.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE) && self.overrun {
            IIR_LINE
        } else if enabled(IER_RECEIVED) && self.fifo.len() >= self.trigger() {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.fifo.is_empty() {
            // On a line without speed the time-out of four characters is over at once.
            IIR_TIMEOUT
        } else if enabled(IER_TRANSMIT_EMPTY) && self.transmit_pending {
            IIR_TRANSMIT_EMPTY
        } else if enabled(IER_MODEM) && self.modem_deltas != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }
}

impl Serial {
    /// Where a PC has its first serial port, on interrupt 4.
    pub const COM1: u64 = 0x3f8;
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// A port named `id` (`serial0`) that interrupts by `irq` and writes what the guest sends to `output`, flushing
    /// after each byte; errors of `output` lose the byte, as an unplugged cable does.
    pub fn new(id: &str, irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> Serial {
        Serial {
            id: id.to_owned(),
            irq,
            output,
            on_space: None,
            state: State::new(),
        }
    }

    /// Sends bytes to the guest. Returns how many were taken; try the rest when there is space again.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.input_space());
        self.state.input.extend(bytes.iter().take(count));
        self.fill_fifo();
        self.update_irq();
        count
    }

    /// How many bytes [`Serial::push_input`] would take now.
    pub fn input_space(&self) -> usize {
        INPUT_MAX.saturating_sub(self.state.input.len())
    }

    /// `notice` is called, under this device's lock, each time a full input queue has become half empty.
    pub fn on_input_space(&mut self, notice: Box<dyn Fn() + Send>) {
        self.on_space = Some(notice);
    }

    /// In loopback the receiver hears the transmitter, not the line.
    fn fill_fifo(&mut self) {
        let state = &mut self.state;
        if state.modem_control & MCR_LOOP != 0 {
            return;
        }
        let was_over_half = state.input.len() > INPUT_MAX / 2;
        while state.fifo.len() < state.fifo_max() {
            let Some(byte) = state.input.pop_front() else {
                break;
            };
            state.fifo.push_back(byte);
        }
        if was_over_half
            && state.input.len() <= INPUT_MAX / 2
            && let Some(notice) = &self.on_space
        {
            notice();
        }
    }

    fn update_irq(&self) {
        let gate = self.state.modem_control & MCR_OUT2 != 0;
        self.irq.set_level(gate && self.state.cause() != IIR_NONE);
    }

    fn transmit(&mut self, byte: u8) {
        if self.state.modem_control & MCR_LOOP != 0 {
            if self.state.fifo.len() < self.state.fifo_max() {
                self.state.fifo.push_back(byte);
            } else {
                self.state.overrun = true;
            }
        } else {
            // There is nobody to tell: a lost byte on a serial line is not the guest's error.
            let _ = self
                .output
                .write_all(&[byte])
                .and_then(|()| self.output.flush());
        }
        self.state.transmit_pending = true;
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let state = &mut self.state;
        let divisor = state.line_control & LCR_DIVISOR != 0;
        match register {
            0 if divisor => state.divisor as u8,
            1 if divisor => (state.divisor >> 8) as u8,
            0 => {
                let byte = state.fifo.pop_front().unwrap_or(0);
                self.fill_fifo();
                byte
            }
            1 => state.interrupt_enable,
            2 => {
                let cause = state.cause();
                if cause == IIR_TRANSMIT_EMPTY {
                    state.transmit_pending = false;
                }
                cause
                    | if state.fifo_control & FCR_ENABLE != 0 {
                        IIR_FIFOS
                    } else {
                        0
                    }
            }
            3 => state.line_control,
            4 => state.modem_control,
            5 => {
                let data = if state.fifo.is_empty() { 0 } else { LSR_DATA };
                let overrun = if std::mem::take(&mut state.overrun) {
                    LSR_OVERRUN
                } else {
                    0
                };
                LSR_TRANSMIT_EMPTY | data | overrun
            }
            6 => state.modem_inputs() | std::mem::take(&mut state.modem_deltas),
            7 => state.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let state = &mut self.state;
        let divisor = state.line_control & LCR_DIVISOR != 0;
        match register {
            0 if divisor => state.divisor = state.divisor & 0xff00 | u16::from(value),
            1 if divisor => state.divisor = state.divisor & 0xff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                // The transmitter is always empty, so allowing its interrupt raises it.
                if value & !state.interrupt_enable & IER_TRANSMIT_EMPTY != 0 {
                    state.transmit_pending = true;
                }
                state.interrupt_enable = value & 0xf;
            }
            2 => {
                let enable_changes = (value ^ state.fifo_control) & FCR_ENABLE != 0;
                if enable_changes || value & FCR_CLEAR_RECEIVE != 0 {
                    state.fifo.clear();
                }
                // The trigger level can only be set together with the enable bit.
                state.fifo_control = if value & FCR_ENABLE != 0 {
                    value & 0xc9
                } else {
                    0
                };
                self.fill_fifo();
            }
            3 => state.line_control = value,
            4 => {
                let before = state.modem_inputs();
                state.modem_control = value & 0x1f;
                let after = state.modem_inputs();
                // Ring counts only when it ends.
                let counted = (before ^ after) & !MSR_RING | before & !after & MSR_RING;
                state.modem_deltas |= counted >> 4;
                self.fill_fifo();
            }
            7 => state.scratch = value,
            _ => {}
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(offset..) {
            *byte = self.read_register(register);
        }
        self.update_irq();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (&byte, register) in data.iter().zip(offset..) {
            self.write_register(register, byte);
        }
        self.update_irq();
    }
}

impl Device for Serial {
    fn id(&self) -> &str {
        &self.id
    }

    fn reset(&mut self) {
        // What the host sent and nobody read yet stays in the queue: a reset does not unsend it.
        let input = std::mem::take(&mut self.state.input);
        self.state = State {
            input,
            ..State::new()
        };
        self.update_irq();
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND, 1, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.open(KIND, 1)?;
        if state.fifo.len() > FIFO_BYTES || state.input.len() > INPUT_MAX {
            let reason = "more bytes on their way than fit";
            return Err(RestoreError::Mismatch {
                name: KIND.to_owned(),
                reason,
            });
        }
        self.state = state;
        self.update_irq();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{Output, Wire, access, accesses};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Rig {
        port: Serial,
        wire: Arc<Wire>,
        output: Output,
    }

    impl Rig {
        fn new() -> Rig {
            let (wire, output) = (Arc::new(Wire::default()), Output::default());
            let port = Serial::new("serial0", wire.clone(), Box::new(output.clone()));
            Rig { port, wire, output }
        }

        fn get(&mut self, register: u64) -> u8 {
            let mut data = [0];
            self.port.read(register, &mut data);
            data[0]
        }

        fn put(&mut self, register: u64, value: u8) {
            self.port.write(register, &[value]);
        }
    }

    #[test]
    fn bytes_go_out_with_an_interrupt_each_time_it_is_empty() {
        let mut rig = Rig::new();
        rig.put(0, b'h');
        assert!(!rig.wire.level());
        rig.put(1, IER_TRANSMIT_EMPTY);
        assert!(rig.wire.level());
        assert_eq!(rig.get(2), IIR_TRANSMIT_EMPTY);
        assert!(!rig.wire.level());
        assert_eq!(rig.get(2), IIR_NONE);
        rig.put(0, b'i');
        assert!(rig.wire.level());
        assert_eq!(rig.output.taken(), b"hi");
        assert_eq!(rig.get(5), 0x60);
    }

    #[test]
    fn input_waits_for_the_guest() {
        let mut rig = Rig::new();
        let notices = Arc::new(AtomicU32::new(0));
        let count = notices.clone();
        rig.port.on_input_space(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        rig.put(2, 0xc1);
        rig.put(1, IER_RECEIVED);
        assert_eq!(rig.port.push_input(b"ab"), 2);
        assert!(rig.wire.level());
        assert_eq!(rig.get(2), IIR_TIMEOUT | IIR_FIFOS);
        let taken = rig.port.push_input(&[7; 5000]);
        assert_eq!((taken, rig.port.input_space()), (INPUT_MAX, 14));
        assert_eq!(rig.get(2), IIR_RECEIVED | IIR_FIFOS);
        assert_eq!(rig.get(5) & LSR_DATA, 1);
        assert_eq!([rig.get(0), rig.get(0), rig.get(0)], [b'a', b'b', 7]);
        let mut read = 1;
        while rig.get(5) & LSR_DATA != 0 {
            rig.get(0);
            read += 1;
        }
        assert_eq!(read, taken);
        assert!(!rig.wire.level());
        assert_eq!(notices.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn loopback_is_what_drivers_probe_for() {
        let mut rig = Rig::new();
        // Linux 8250: RTS and OUT2 in loopback must show as CTS and DCD.
        rig.put(4, MCR_LOOP | 0x0a);
        assert_eq!(rig.get(6) & 0xf0, 0x90);
        rig.put(0, 0x5a);
        assert_eq!(rig.output.taken(), b"");
        assert_eq!(rig.get(0), 0x5a);
        rig.put(0, 1);
        rig.put(0, 2);
        assert_eq!(rig.get(5), 0x60 | LSR_DATA | LSR_OVERRUN);
        assert_eq!(rig.get(5), 0x60 | LSR_DATA);
        rig.put(4, 0x0b);
        assert_eq!(rig.get(6), 0xb0 | 0x2);
        assert_eq!(rig.get(6), 0xb0);
    }

    #[test]
    fn registers_as_a_driver_probes_them() {
        let mut rig = Rig::new();
        rig.put(1, 0xff);
        assert_eq!(rig.get(1), 0x0f);
        rig.put(1, 0);
        rig.put(7, 0xa5);
        assert_eq!(rig.get(7), 0xa5);
        rig.put(3, 0x83);
        rig.put(0, 1);
        rig.put(1, 2);
        assert_eq!((rig.get(0), rig.get(1), rig.get(3)), (1, 2, 0x83));
        rig.put(3, 0x03);
        assert_eq!(rig.get(1), 0);
        rig.put(2, FCR_ENABLE);
        assert_eq!(rig.get(2) & 0xc0, 0xc0);
        rig.put(2, 0);
        assert_eq!(rig.get(2) & 0xc0, 0);
    }

    #[test]
    fn the_interrupt_needs_out2() {
        let mut rig = Rig::new();
        rig.put(4, 0);
        rig.put(1, IER_TRANSMIT_EMPTY);
        assert!(!rig.wire.level());
        rig.put(4, MCR_OUT2);
        assert!(rig.wire.level());
    }

    proptest! {
        #[test]
        fn any_accesses(accesses in accesses(Serial::LEN), input in any::<Vec<u8>>()) {
            let mut rig = Rig::new();
            for each in &accesses {
                access(&mut rig.port, each);
                if each.offset == 3 {
                    rig.port.push_input(&input);
                }
                prop_assert!(rig.port.state.fifo.len() <= FIFO_BYTES);
            }
            let mut copy = Rig::new();
            copy.port.restore(&rig.port.save()).unwrap();
            prop_assert_eq!(&copy.port.state, &rig.port.state);
            prop_assert_eq!(copy.wire.level(), rig.wire.level());
        }
    }
}
