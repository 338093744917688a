//! Signals to this process: blocked in every thread and waited for by one, so that nothing is ever interrupted by a
//! handler.

use std::sync::mpsc::Sender;

use nix::sys::signal::{SigSet, Signal};

use super::{Happened, spawn};
use crate::exit::{ExitCode, Failure};

/// Those that end a machine or are passed on to CMD, and the change of a window's size.
const WAITED_FOR: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Blocks the signals in this thread and those it makes from now on.
pub fn block() -> Result<SigSet, Failure> {
    let set: SigSet = WAITED_FOR.into_iter().collect();
    set.thread_block().map_err(|error| {
        Failure::new(ExitCode::System, format!("cannot block signals: {error}"))
    })?;
    Ok(set)
}

/// Reports the signals from a thread of their own.
pub fn forward(set: SigSet, happened: &Sender<Happened>) -> Result<(), Failure> {
    let happened = happened.clone();
    spawn("signals", move || {
        while let Ok(signal) = set.wait() {
            if happened.send(Happened::Signal(signal)).is_err() {
                return;
            }
        }
    })
}

/// A signal's number, which is the same in the guest.
pub fn number(signal: Signal) -> u8 {
    u8::try_from(signal as i32).unwrap_or(0)
}
