//! The console device (virtio 1.2, section 5.3) with one port.
//!
//! Output goes to a writer on the thread that notifies. Input is pushed by the host through a
//! [`ConsoleInput`] into a bounded buffer that the guest empties at its own pace; who pushes learns
//! how much fits, or waits.
//!
//! Limitations: no multiport, no emergency write.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use super::core::HostHandle;
use super::device::{DeviceKind, Io, VirtioDevice};
use super::queue::QueueError;
use crate::{RestoreError, SavedState};

/// VIRTIO_CONSOLE_F_SIZE: columns and rows in the configuration are valid.
pub const F_SIZE: u64 = 1 << 0;

/// Queues of port 0.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Bytes of input that wait for the guest at most.
pub const INPUT_BYTES_MAX: usize = 64 << 10;

/// Bytes moved at a time.
const PIECE_BYTES: usize = 4096;

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSize {
    /// Characters per line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The console device.
pub struct Console {
    output: Box<dyn Write + Send>,
    input: Arc<Input>,
    /// The size in the configuration.
    size: ConsoleSize,
}

/// The host's end of the input of a [`Console`], and of its size. Clones share it.
#[derive(Clone)]
pub struct ConsoleInput(Arc<Input>);

struct Input {
    state: Mutex<InputState>,
    /// Signalled when the guest has taken input and when the device is gone.
    taken: Condvar,
    host: OnceLock<HostHandle>,
}

struct InputState {
    bytes: VecDeque<u8>,
    size: ConsoleSize,
    /// The device is gone: nothing will be taken any more.
    closed: bool,
}

impl Input {
    fn lock(&self) -> MutexGuard<'_, InputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the device. Must be called without the lock: the device takes it while it has its own.
    fn notify(&self) {
        if let Some(host) = self.host.get() {
            host.notify();
        }
    }
}

impl ConsoleInput {
    /// Queues as much of `bytes` as fits and returns how much that is.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.lock();
        if state.closed {
            return 0;
        }
        let fits = bytes
            .len()
            .min(INPUT_BYTES_MAX.saturating_sub(state.bytes.len()));
        state.bytes.extend(bytes.iter().take(fits));
        drop(state);
        self.0.notify();
        fits
    }

    /// Queues all of `bytes`, waiting for the guest where they do not fit. False if the device went
    /// away before they were queued.
    pub fn push_all(&self, mut bytes: &[u8]) -> bool {
        loop {
            let pushed = self.push(bytes);
            bytes = bytes.get(pushed..).unwrap_or_default();
            let mut state = self.0.lock();
            if bytes.is_empty() || state.closed {
                return bytes.is_empty();
            }
            while state.bytes.len() >= INPUT_BYTES_MAX && !state.closed {
                state = self
                    .0
                    .taken
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Tells the guest the size of the terminal.
    pub fn resize(&self, size: ConsoleSize) {
        self.0.lock().size = size;
        self.0.notify();
    }
}

impl Console {
    /// A console that writes to `output`, and the other end of its input. The device ignores errors
    /// of `output`: what cannot be written is lost, as on a terminal that was unplugged.
    pub fn new(output: impl Write + Send + 'static, size: ConsoleSize) -> (Console, ConsoleInput) {
        let state = InputState {
            bytes: VecDeque::new(),
            size,
            closed: false,
        };
        let input = Arc::new(Input {
            state: Mutex::new(state),
            taken: Condvar::new(),
            host: OnceLock::new(),
        });
        (
            Console {
                output: Box::new(output),
                input: input.clone(),
                size,
            },
            ConsoleInput(input),
        )
    }

    /// Gives queued input to the guest as far as it has buffers for it.
    fn receive(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut piece = [0; PIECE_BYTES];
        let mut taken = 0;
        let input = self.input.clone();
        let mut state = input.lock();
        // An empty queue of input leaves the guest's buffers alone: a chain taken and given back
        // would be a notification for nothing.
        while !state.bytes.is_empty() {
            let Some(chain) = io.pop(RECEIVE)? else { break };
            let mut writer = chain.writer(io.memory());
            let fits = (writer.remaining() as usize).min(PIECE_BYTES);
            let mut len = 0;
            for (to, from) in piece.iter_mut().take(fits).zip(&state.bytes) {
                *to = *from;
                len += 1;
            }
            writer.write_all(piece.get(..len).unwrap_or_default())?;
            state.bytes.drain(..len);
            taken += len;
            let written = writer.written();
            io.complete(RECEIVE, chain, written)?;
        }
        if taken > 0 {
            input.taken.notify_all();
        }
        Ok(())
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut piece = [0; PIECE_BYTES];
        while let Some(chain) = io.pop(TRANSMIT)? {
            let mut reader = chain.reader(io.memory());
            while reader.remaining() > 0 {
                let len = (reader.remaining() as usize).min(PIECE_BYTES);
                let part = piece.get_mut(..len).unwrap_or_default();
                reader.read_exact(part)?;
                // See `new`.
                let _ = self.output.write_all(part);
            }
            io.complete(TRANSMIT, chain, 0)?;
        }
        let _ = self.output.flush();
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// { le16 cols; le16 rows; le32 max_nr_ports; le32 emerg_wr; } (5.3.4).
    fn config(&self) -> Vec<u8> {
        let [c0, c1] = self.size.columns.to_le_bytes();
        let [r0, r1] = self.size.rows.to_le_bytes();
        vec![c0, c1, r0, r1, 1, 0, 0, 0, 0, 0, 0, 0]
    }

    fn attach(&mut self, host: HostHandle) {
        // A device is attached once; a second handle would be to the same device.
        let _ = self.input.host.set(host);
    }

    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        if queue == TRANSMIT {
            self.transmit(io)
        } else {
            self.receive(io)
        }
    }

    fn host_event(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let size = self.input.lock().size;
        if size != self.size {
            self.size = size;
            io.config_changed();
        }
        self.receive(io)
    }

    fn reset(&mut self) {}

    fn close(&mut self) {
        self.input.lock().closed = true;
        self.input.taken.notify_all();
    }

    fn save(&self) -> SavedState {
        let input = self.input.lock().bytes.iter().copied().collect();
        SavedState::new(
            "virtio-console",
            1,
            &ConsoleStateV1 {
                size: self.size,
                input,
            },
        )
    }

    fn restore(&mut self, _features: u64, state: &SavedState) -> Result<(), RestoreError> {
        let saved: ConsoleStateV1 = state.open("virtio-console", 1)?;
        if saved.input.len() > INPUT_BYTES_MAX {
            return Err(RestoreError::Mismatch {
                name: "virtio-console".to_owned(),
                reason: "there is more input than room for it",
            });
        }
        // The terminal's own size is kept where it is: if it differs, the guest is told.
        self.size = saved.size;
        self.input.lock().bytes = saved.input.into();
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.close();
    }
}

/// Saved state beyond the queues.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConsoleStateV1 {
    size: ConsoleSize,
    /// Input that the guest had not taken.
    input: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::core::{STATUS_ACKNOWLEDGE, STATUS_DRIVER};
    use crate::virtio::testutil::{Driver, Sink};
    use std::time::Duration;

    const SIZE: ConsoleSize = ConsoleSize {
        columns: 80,
        rows: 25,
    };

    fn console() -> (Driver, ConsoleInput, Sink) {
        let sink = Sink::default();
        let (console, input) = Console::new(sink.clone(), SIZE);
        (Driver::new(console), input, sink)
    }

    #[test]
    fn output_is_written() {
        let (mut driver, _input, sink) = console();
        driver.start(F_SIZE);
        driver.request(TRANSMIT, &[b"hello, ", b"world"], &[]);
        driver.request(TRANSMIT, &[&[b'x'; 10_000]], &[]);
        let bytes = sink.bytes();
        assert!(bytes.starts_with(b"hello, worldxxx") && bytes.len() == 10_012);
    }

    #[test]
    fn input_waits_for_buffers() {
        let (mut driver, input, _) = console();
        assert_eq!(input.push(b"early"), 5);
        driver.start(F_SIZE);
        let first = driver.offer(RECEIVE, &[], &[3]);
        let second = driver.offer(RECEIVE, &[], &[100]);
        driver.notify(RECEIVE);
        assert_eq!(driver.used(RECEIVE, first).unwrap().bytes, b"ear");
        assert_eq!(driver.used(RECEIVE, second).unwrap().bytes, b"ly");
        let third = driver.offer(RECEIVE, &[], &[100]);
        driver.notify(RECEIVE);
        assert!(driver.used(RECEIVE, third).is_none());
        assert_eq!(input.push(b"late"), 4);
        assert_eq!(driver.used(RECEIVE, third).unwrap().bytes, b"late");
    }

    #[test]
    fn input_is_bounded() {
        let (mut driver, input, _) = console();
        driver.start(F_SIZE);
        let much = vec![7; INPUT_BYTES_MAX + 10];
        assert_eq!(input.push(&much), INPUT_BYTES_MAX);
        assert_eq!(input.push(b"x"), 0);
        let pusher = std::thread::spawn({
            let input = input.clone();
            move || input.push_all(&[8; 5000])
        });
        let mut received = Vec::new();
        while received.len() < INPUT_BYTES_MAX + 5000 {
            received.extend(driver.request_eventually(RECEIVE, &[], &[4096]).bytes);
        }
        assert!(pusher.join().unwrap());
        assert_eq!(received.iter().filter(|b| **b == 8).count(), 5000);
    }

    #[test]
    fn pushing_to_a_device_that_is_gone_fails() {
        let (driver, input, _) = console();
        input.push(&vec![7; INPUT_BYTES_MAX]);
        let pusher = std::thread::spawn({
            let input = input.clone();
            move || input.push_all(b"more")
        });
        std::thread::sleep(Duration::from_millis(20));
        driver.shared().close();
        assert!(!pusher.join().unwrap());
        drop(driver);
        assert_eq!(input.push(b"x"), 0);
    }

    #[test]
    fn size_changes_are_told() {
        let (mut driver, input, _) = console();
        assert_eq!(driver.config(0, 4), [80, 0, 25, 0]);
        driver.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        driver.start(F_SIZE);
        let generation = driver.core().config_generation();
        input.resize(ConsoleSize {
            columns: 300,
            rows: 50,
        });
        assert_eq!(driver.config(0, 4), [44, 1, 50, 0]);
        assert_eq!(driver.config_interrupts(), 1);
        assert_ne!(driver.core().config_generation(), generation);
        input.resize(ConsoleSize {
            columns: 300,
            rows: 50,
        });
        assert_eq!(driver.config_interrupts(), 1);
    }

    #[test]
    fn state_survives() {
        let (mut driver, input, _) = console();
        driver.start(F_SIZE);
        input.push(b"pending");
        let (mut other, _input, _) = console();
        driver.move_to(&mut other);
        assert_eq!(other.request(RECEIVE, &[], &[100]).bytes, b"pending");
    }
}
