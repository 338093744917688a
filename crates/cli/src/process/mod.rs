//! The machine's own process: what this program and it say to each other.
//!
//! ```text
//!   strata run ──spawns──▶ strata machine NAME      (an empty environment but for LD_LIBRARY_PATH, namespaces of its own, then its jail)
//!     0 what is typed on the console ──▶            4 control socket, listening
//!     1 ◀── what the console prints                 5 vsock's socket, listening
//!     2 ◀── last words of a fault of ours           6 ◀──▶ dialling for the guest: a port goes out, a socket comes back
//!     3 ◀──▶ lines of JSON: Launch and requests     7 gdb's socket, listening
//!       go in, Said comes out                       8 ◀──▶ wishes for sockets go out, sockets come back
//!                                                   (5 and 6, 7, and 8 only if the launch says so; in the place of
//!                                                    8 the ring of a port on a shared network, and what wakes both)
//! ```
//!
//! The process in front keeps the terminal, the signals, the run directory and all that is done in the user's name. It
//! believes nothing of what the machine's process says: that is run by a guest which may be hostile, and may be its.

mod broker;
mod child;
mod dial;
mod parent;
mod switch;

use serde::{Deserialize, Serialize};
use strata_sandbox::{Attempt, Layer};
use strata_vmm::engines::EngineOptions;
use strata_vmm::{MachineConfig, MachineStats};

pub use broker::{Broker, ping_refused};
pub use child::main;
pub use parent::{Ends, MachineProcess, check_jail, listen_at, start_switch};

use crate::exit::ExitCode;

/// The first argument of the machine's process, which no user types: it does nothing without its descriptors.
pub const WORD: &str = "machine";

/// What the process is for: the first line it gets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launch {
    /// To run a machine.
    Machine(Box<MachineLaunch>),
    /// To be the switch of a shared network.
    Switch(SwitchLaunch),
    /// To say which layers of the jail this host grants.
    Check {
        /// What came of its namespaces.
        namespaces: Result<(), String>,
    },
}

/// A shared network's switch. Its socket, listening, is in the place of the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct SwitchLaunch {
    /// What came of its namespaces.
    pub namespaces: Result<(), String>,
    /// The network's name.
    pub name: String,
    /// Its gateway's address and size.
    pub subnet: ipnet::Ipv4Net,
}

/// A machine to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineLaunch {
    /// What came of its namespaces.
    pub namespaces: Result<(), String>,
    /// The machine.
    pub config: MachineConfig,
    /// How its engine works inside.
    pub engine_options: EngineOptions,
    /// Where what is written to temporary disks goes.
    pub temporary: std::path::PathBuf,
    /// Whether there is vsock's socket.
    pub vsock: bool,
    /// Whether there is gdb's socket.
    pub gdb: bool,
    /// Whether there is the line for sockets of its network.
    pub network: bool,
    /// Whether there are the descriptors of a port on a shared network.
    pub cable: bool,
    /// Whether somebody reads what the console prints.
    pub console: bool,
    /// What it is put into.
    pub jail: Jail,
    /// Try to get out, in place of running.
    pub probe: Option<Probe>,
}

/// How much of a jail there must be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Jail {
    /// What the host grants.
    Granted,
    /// All of it, or the machine does not run.
    Required,
    /// None: to look into the process with other tools.
    None,
}

/// Attempts to get out of the jail, for tests of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// All attempts; those that would stop the process fail instead.
    Filtered,
    /// All attempts without the system call filter: what the other layers refuse.
    Unfiltered,
    /// One attempt that stops the process.
    Stopped,
}

/// What the machine's process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// The machine is built, and this is its jail; the guest runs now.
    Built(Vec<Layer>),
    /// It cannot be.
    Failed {
        /// Our exit status.
        code: ExitCode,
        /// One sentence.
        message: String,
    },
    /// The machine ended.
    Ended(Box<End>),
    /// A system call was not one of a machine's.
    StoppedByJail(u32),
    /// What came of the attempts.
    Probed(Vec<Attempt>),
}

/// How a machine ended and what it did.
#[derive(Debug, Serialize, Deserialize)]
pub struct End {
    /// How.
    pub how: Ending,
    /// Its counters.
    pub stats: MachineStats,
    /// The last lines of its consoles.
    pub console: Vec<String>,
    /// How long ago the guest's first instruction ran, in nanoseconds.
    pub first_run_ago_ns: Option<u64>,
}

/// How a machine ended.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The guest switched it off.
    PoweredOff,
    /// The guest reset it.
    Rebooted,
    /// Somebody outside ended it.
    Stopped,
    /// The guest wrote this to the test device.
    DebugExit(u32),
    /// The guest's kernel said that it panicked.
    GuestPanic(String),
    /// It could not go on.
    Crashed {
        /// Our exit status.
        code: ExitCode,
        /// One sentence.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_a_stopped_process_is_read() {
        let line = strata_sandbox::last_word(257);
        let line = std::str::from_utf8(&line).unwrap().trim();
        let said: Said = serde_json::from_str(line).unwrap();
        assert!(matches!(said, Said::StoppedByJail(257)), "{said:?}");
    }
}
