//! Our streams tied to the machine's console.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::mpsc::Sender;

use super::escape::{Escape, HINT};
use super::prepare::Mode;
use super::{Happened, spawn, terminal};
use crate::exit::{ExitCode, Failure};
use crate::output;

/// Where the console's output goes: standard output, unless CMD has that.
pub fn console_output(mode: &Mode) -> Result<Option<Box<dyn Write + Send>>, Failure> {
    let path = match mode {
        Mode::Console { .. } => return Ok(Some(Box::new(Unbuffered))),
        Mode::Command(command) => match &command.console_log {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    match File::options().create(true).append(true).open(path) {
        Ok(file) => Ok(Some(Box::new(file))),
        Err(error) => Err(Failure::new(
            ExitCode::CannotCreate,
            format!("cannot write to {}: {error}", path.display()),
        )),
    }
}

/// Standard output without the standard library's buffer: a console's bytes are seen as they come.
struct Unbuffered;

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives our input to the console; tells how to get out again if a terminal is taken.
pub fn connect_console(mut console: File, happened: &Sender<Happened>) -> Result<(), Failure> {
    let is_terminal = terminal::make_raw();
    if is_terminal {
        // In raw mode the terminal does not return the carriage by itself.
        let _ = output::error_line(&format!("strata: {HINT}\r"));
    }
    let happened = happened.clone();
    spawn("input", move || {
        let leave = pump(is_terminal, io::stdin().lock(), |bytes| {
            console.write_all(bytes).is_ok()
        });
        if leave {
            // The one who waits may be gone.
            let _ = happened.send(Happened::Quit);
        }
    })
}

/// Moves what is typed to `sink` until either ends. True if the user typed the escape sequence.
pub fn pump(is_terminal: bool, mut source: impl Read, mut sink: impl FnMut(&[u8]) -> bool) -> bool {
    let mut escape = Escape::default();
    let mut buffer = [0; 4096];
    let mut typed = Vec::new();
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return false,
        };
        typed.clear();
        let bytes = buffer.get(..count).unwrap_or_default();
        let leave = if is_terminal {
            escape.feed(bytes, &mut typed)
        } else {
            typed.extend_from_slice(bytes);
            false
        };
        if !sink(&typed) {
            return false;
        }
        if leave {
            return true;
        }
    }
}
