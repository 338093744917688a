//! How a build tells what it is doing.

use std::fmt;

/// A step of a build that a user may want to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Another process is building; this one waits for it.
    Waiting,
    /// Fetching and verifying the package lists.
    Lists,
    /// Fetching and verifying packages.
    Download,
    /// Reading packages.
    Unpack,
    /// A machine makes the file system.
    Format,
    /// The machine puts packages there.
    Fill,
    /// The machine configures packages.
    Configure,
    /// The machine adds what was asked for besides.
    Add,
    /// The machine cleans up and checks the disk.
    Finish,
    /// Writing the image.
    Write,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Waiting => "waiting for another build",
            Phase::Lists => "fetching package lists",
            Phase::Download => "fetching packages",
            Phase::Unpack => "reading packages",
            Phase::Format => "making the file system in a machine",
            Phase::Fill => "unpacking in the machine",
            Phase::Configure => "configuring packages in the machine",
            Phase::Add => "adding packages in the machine",
            Phase::Finish => "checking the disk",
            Phase::Write => "writing the image",
        })
    }
}

/// Hears of a build's progress. Called from the thread that builds.
pub trait Progress {
    /// A phase begins; the one before it is over.
    fn phase(&self, phase: Phase);

    /// `done` of `total` of the current phase. The unit is the phase's own; phases may never call this.
    fn advance(&self, done: u64, total: u64) {
        let _ = (done, total);
    }
}

/// Says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Quiet;

impl Progress for Quiet {
    fn phase(&self, _: Phase) {}
}
