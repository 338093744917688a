//! Result lines: what was found, what was expected, and the end.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use super::asm;

const SERIAL: u64 = 0x3f8;
const EXIT: u64 = 0xf4;

static CHECKS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// A line of text of limited length.
pub struct Line {
    bytes: [u8; 200],
    length: usize,
}

impl Line {
    pub const fn new() -> Line {
        Line {
            bytes: [0; 200],
            length: 0,
        }
    }

    /// Appends a byte, unless the line is full.
    pub fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }

    pub fn text(&self) -> &str {
        core::str::from_utf8(self.bytes.get(..self.length).unwrap_or_default()).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.push(byte));
        Ok(())
    }
}

/// Prints a line.
pub fn print(arguments: fmt::Arguments) {
    let mut line = Line::new();
    // A line that is too long is cut.
    let _ = line.write_fmt(arguments);
    line.push(b'\n');
    asm::outs8(SERIAL, line.bytes.as_ptr() as u64, line.length as u64);
}

/// Prints a line of text.
macro_rules! say {
    ($($argument:tt)*) => { $crate::kernel::check::print(format_args!($($argument)*)) };
}

/// A value that has to be `want`.
pub fn equal(name: &str, got: u64, want: u64) {
    CHECKS.fetch_add(1, Ordering::Relaxed);
    if got == want {
        say!("{name} {got:#x}");
    } else {
        WRONG.fetch_add(1, Ordering::Relaxed);
        say!("{name} {got:#x} WRONG, not {want:#x}");
    }
}

/// Something that has to hold.
pub fn holds(name: &str, holds: bool) {
    equal(name, holds.into(), 1);
}

static EMULATED: AtomicU64 = AtomicU64::new(0);

/// The host's CPU is an emulation that some checks would kill.
pub fn set_emulated(emulated: bool) {
    EMULATED.store(emulated.into(), Ordering::Relaxed);
}

/// Whether the check of this name is left out because it would kill the emulation below.
pub fn kills_emulation(name: &str) -> bool {
    let kills = EMULATED.load(Ordering::Relaxed) != 0;
    if kills {
        absent(name);
    }
    kills
}

/// Something this CPU model lacks, which other engines may offer.
pub fn absent(name: &str) {
    say!("{name} absent");
}

/// Prints the sum and ends the machine.
pub fn finish(name: &str) -> ! {
    let (checks, wrong) = (
        CHECKS.load(Ordering::Relaxed),
        WRONG.load(Ordering::Relaxed),
    );
    say!("{name}: {checks} checks, {wrong} wrong");
    exit(u64::from(wrong != 0 || checks == 0))
}

/// Ends the machine with this value.
pub fn exit(value: u64) -> ! {
    loop {
        asm::out32(EXIT, value);
    }
}
