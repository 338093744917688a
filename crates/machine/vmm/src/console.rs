//! The machine's end of its consoles: output to the host and to the crash report, input from the host.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use strata_devices::Serial;
use strata_devices::virtio::{ConsoleInput as VirtioInput, ConsoleSize};

use crate::ConsoleRing;

/// How long a writer of input sleeps at most before it looks whether the machine is still there.
const INPUT_PATIENCE: Duration = Duration::from_millis(100);

/// What a guest's console writes to: always the ring, and the host's end if it has one.
pub(crate) struct ConsoleOutput {
    pub(crate) ring: ConsoleRing,
    pub(crate) host: Option<Box<dyn Write + Send>>,
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ring.push(bytes);
        if let Some(host) = &mut self.host
            && host.write_all(bytes).is_err()
        {
            // The reader is gone; the guest prints on, as to an unplugged terminal.
            self.host = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(host) = &mut self.host
            && host.flush().is_err()
        {
            self.host = None;
        }
        Ok(())
    }
}

/// Types on a machine's console.
#[derive(Clone)]
pub struct ConsoleInput(Line);

#[derive(Clone)]
enum Line {
    Serial {
        port: Weak<Mutex<Serial>>,
        space: Arc<Space>,
    },
    Virtio(VirtioInput),
}

/// Signalled when a serial port can take input again.
#[derive(Default)]
struct Space {
    lock: Mutex<()>,
    freed: Condvar,
}

impl ConsoleInput {
    pub(crate) fn serial(port: &Arc<Mutex<Serial>>) -> Self {
        let space = Arc::new(Space::default());
        let notice = Arc::clone(&space);
        let mut serial = port.lock().unwrap_or_else(PoisonError::into_inner);
        serial.on_input_space(Box::new(move || notice.freed.notify_all()));
        Self(Line::Serial {
            port: Arc::downgrade(port),
            space,
        })
    }

    pub(crate) fn virtio(input: VirtioInput) -> Self {
        Self(Line::Virtio(input))
    }

    /// Types all of `bytes`, waiting for the guest where it is slow. False if the machine is gone.
    pub fn push_all(&self, bytes: &[u8]) -> bool {
        match &self.0 {
            Line::Serial { port, space } => push_serial(port, space, bytes),
            Line::Virtio(input) => input.push_all(bytes),
        }
    }

    /// Tells the guest the size of the terminal; false if this console cannot.
    pub fn resize(&self, columns: u16, rows: u16) -> bool {
        match &self.0 {
            Line::Serial { .. } => false,
            Line::Virtio(input) => {
                input.resize(ConsoleSize { columns, rows });
                true
            }
        }
    }
}

fn push_serial(port: &Weak<Mutex<Serial>>, space: &Space, mut bytes: &[u8]) -> bool {
    loop {
        let Some(port) = port.upgrade() else {
            return false;
        };
        let taken = port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_input(bytes);
        drop(port);
        bytes = bytes.get(taken..).unwrap_or_default();
        if bytes.is_empty() {
            return true;
        }
        // The notice comes under the port's lock, not this one, so it can be missed: hence the limit.
        let guard = space.lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(space.freed.wait_timeout(guard, INPUT_PATIENCE));
    }
}
