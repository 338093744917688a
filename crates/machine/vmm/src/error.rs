//! Why a machine cannot be built, and what ends one that runs.

use std::io;
use std::path::PathBuf;

use strata_engine::EngineError;

use crate::InstanceState;

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration still names an image.
    #[error("the image '{0}' must be looked up before a machine is built from it")]
    UnresolvedImage(String),
    /// More or fewer vCPUs than possible.
    #[error("{asked} CPUs are not possible: {reason}")]
    Cpus {
        /// How many were asked for.
        asked: u32,
        /// What is possible.
        reason: &'static str,
    },
    /// A kernel or initrd cannot be read.
    #[error("cannot read the {what} {}", path.display())]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A kernel or initrd is a directory, a device or absurdly big.
    #[error("the {what} {} is no regular file of less than 2 GiB", path.display())]
    NotABootFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The kernel cannot be started.
    #[error("cannot boot {}", kernel.display())]
    Boot {
        /// The kernel's file.
        kernel: PathBuf,
        /// Why.
        #[source]
        source: strata_boot::BootError,
    },
    /// No kernel is found inside the disk.
    #[error("cannot boot from disk {}", disk.display())]
    Inside {
        /// The disk's file.
        disk: PathBuf,
        /// Why.
        #[source]
        source: strata_boot::FindError,
    },
    /// The kernel is to be inside a disk, and there is none.
    #[error("there is no disk to boot from")]
    NoBootDisk,
    /// The memory's size is not possible.
    #[error("the machine's memory is not possible")]
    Layout(#[from] strata_memory::LayoutError),
    /// The host gives no memory.
    #[error("cannot set up the machine's memory")]
    Memory(#[from] strata_memory::MemoryError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] strata_disk::DiskError),
    /// More disks than PCI slots.
    #[error("a machine has {max} disks at most")]
    TooManyDisks {
        /// How many fit.
        max: u8,
    },
    /// The CPU model is unknown, or this host lacks a part of it.
    #[error(transparent)]
    CpuModel(#[from] strata_engine::x86::ModelError),
    /// The engine cannot run here.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A device does not fit into the machine.
    #[error("cannot place the device {device}")]
    Device {
        /// Which one.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A thread or socket of the machine cannot be made.
    #[error("cannot make {what}")]
    Host {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How a machine ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest reset the machine, which was configured to end then.
    Rebooted,
    /// Somebody outside ended it.
    Stopped,
    /// The guest wrote this value to the test device.
    DebugExit(u32),
    /// It could not go on.
    Crashed(Crash),
}

/// Why a machine could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Crash {
    /// The guest's kernel said so.
    #[error("the guest's kernel panicked")]
    GuestPanic,
    /// An exception while an exception was delivered while an exception was delivered.
    #[error("the guest's CPU {cpu} shut down after a triple fault")]
    TripleFault {
        /// Which vCPU.
        cpu: u32,
    },
    /// The engine failed.
    #[error("CPU {cpu} cannot go on")]
    Engine {
        /// Which vCPU.
        cpu: u32,
        /// Why.
        #[source]
        source: EngineError,
    },
    /// The guest reset the machine, and it cannot be started again.
    #[error("the machine cannot be restarted")]
    Restart(#[source] Box<BuildError>),
    /// A thread of the machine ended by itself.
    #[error("the thread of CPU {cpu} is gone")]
    ThreadGone {
        /// Which vCPU.
        cpu: u32,
    },
}

impl Outcome {
    /// The state the machine is in then.
    pub fn state(&self) -> InstanceState {
        match self {
            Outcome::Crashed(_) => InstanceState::Crashed,
            _ => InstanceState::Stopped,
        }
    }
}
