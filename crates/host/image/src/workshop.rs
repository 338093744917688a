//! The machine that finishes a disk: a guest can make file systems and run packages' scripts as root; we cannot.

use std::fs::File;
use std::path::PathBuf;

/// A machine to run until it powers itself off.
#[derive(Debug)]
pub struct Job {
    /// A bzImage.
    pub kernel: PathBuf,
    /// Its RAM disk.
    pub initrd: PathBuf,
    /// The whole kernel command line; the console is the first serial port.
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The first disk: raw, to be written.
    pub target: PathBuf,
    /// The second disk: raw, only to be read.
    pub source: PathBuf,
    /// The cache's lock. A process that runs the machine holds it as its standard input: one that outlives a killed
    /// build keeps the next build waiting instead of getting in its way.
    pub lock: File,
}

/// Whoever can run machines. This crate cannot.
pub trait Workshop {
    /// Runs the machine to its end. Each line that its console prints goes to `heard`. The error is one sentence.
    fn run(&self, job: &Job, heard: &mut dyn FnMut(&str)) -> Result<(), String>;
}

/// For those who make images without a disk only.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoWorkshop;

impl Workshop for NoWorkshop {
    fn run(&self, _: &Job, _: &mut dyn FnMut(&str)) -> Result<(), String> {
        Err("nobody here runs machines".to_owned())
    }
}
