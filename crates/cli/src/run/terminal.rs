//! The host's terminal: raw mode while a guest has it. Every end of this program, panics too, calls [`restore`].

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The settings to go back to; there while they are changed.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the terminal on standard input pass every key as it is typed. False if standard input is no terminal.
pub fn make_raw() -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    let Ok(original) = tcgetattr(rustix::stdio::stdin()) else {
        return false;
    };
    let mut raw = original.clone();
    raw.make_raw();
    saved().get_or_insert(original);
    // Now rather than when output has drained: nothing that was typed is to be lost.
    tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).is_ok()
}

/// Gives the terminal back as it was. Nothing happens if it is.
pub fn restore() {
    if let Some(original) = saved().take() {
        // Nobody could do anything about a terminal that went away.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &original);
    }
}

/// Columns and rows of the terminal we write to, or read from.
pub fn size() -> Option<(u16, u16)> {
    let of_stdout = tcgetwinsize(rustix::stdio::stdout());
    let size = of_stdout
        .or_else(|_| tcgetwinsize(rustix::stdio::stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
