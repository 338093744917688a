//! The jail of a machine's process: what it is put into before the guest's first instruction, layer by layer.
//!
//! A machine has a process of its own, made by [`spawn`] with nothing of our environment but LD_LIBRARY_PATH, in namespaces of its own and with
//! no descriptors but those it is given. It goes into its jail in two steps:
//!
//! 1. [`confine`], while it has one thread and has opened its files: no new privileges, limits, a root directory with
//!    nothing in it, Landlock, no capabilities, not to be traced, to die with its parent.
//! 2. [`seal`], when all is built and before the guest runs: a system call filter for all threads, which knows the
//!    calls that a running machine makes and stops the process at any other.
//!
//! Each step says which layers the host grants ([`Layer`]); a layer that it refuses leaves the others in place.
//! [`probe`] tries from inside to do what must not be possible.
//!
//! This crate knows no machine and no configuration, and decides nothing: whether a missing layer is fatal, its caller
//! says.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

mod confine;
mod filter;
mod probe;
mod root;
mod spawn;

use serde::{Deserialize, Serialize};

pub use confine::{Confinement, confine};
pub use filter::{Filter, SealError, last_word, seal};
pub use probe::{Attempt, probe};
pub use spawn::{Program, Spawned, inherited, spawn};

/// One layer of the jail on this host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// Why the host refuses it; none if it is in place.
    #[serde(default)]
    pub refused: Option<String>,
    /// What it lacks of it where it is in place in part only.
    #[serde(default)]
    pub lacks: Option<String>,
}

impl Layer {
    /// A layer by what came of setting it up.
    pub fn new(name: &str, result: Result<(), String>) -> Self {
        Self {
            name: name.to_owned(),
            refused: result.err(),
            lacks: None,
        }
    }

    /// What a person is told where it is not whole.
    pub fn shortcoming(&self) -> Option<String> {
        let refused = self.refused.as_ref().map(|why| format!("refused: {why}"));
        refused.or_else(|| self.lacks.as_ref().map(|what| format!("in part: {what}")))
    }
}
