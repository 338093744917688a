//! The lifecycle of an instance: its states, and which changes are possible.
//!
//! ```text
//! undefined --define--> defined --start--> running <--pause/resume--> paused
//!
//! running, paused   --save--> saved --restore--> running
//! running, paused   --migrate-begin--> migrating --migrate-finish--> undefined (it lives elsewhere)
//!                                                --migrate-abort---> running
//! running, paused, saved, crashed   --stop--> stopped --start--> running
//! running, paused, migrating        --crash--> crashed
//! defined, stopped, saved, crashed  --undefine--> undefined
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a machine, a container or a WebAssembly instance is in its life.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// There is no such instance.
    #[default]
    Undefined,
    /// Its configuration exists, it has never run.
    Defined,
    /// Its vCPUs run.
    Running,
    /// It is in memory, and its time stands still.
    Paused,
    /// Its whole state is in files.
    Saved,
    /// It ended in order; it can start again from the beginning.
    Stopped,
    /// It runs while its state is sent to another host.
    Migrating,
    /// It ended because the guest or its engine failed.
    Crashed,
}

/// A change of state.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transition {
    /// Give it a configuration.
    Define,
    /// Run it from the beginning.
    Start,
    /// Let its time stand still.
    Pause,
    /// Let its time go on.
    Resume,
    /// Write its state to files and end.
    Save,
    /// Run on from saved state.
    Restore,
    /// End it, by the guest's own power-off or from outside.
    Stop,
    /// Begin to send it to another host.
    MigrateBegin,
    /// It runs on the other host: forget it here.
    MigrateFinish,
    /// Stay here after all.
    MigrateAbort,
    /// The guest or its engine failed.
    Crash,
    /// Forget its configuration.
    Undefine,
}

/// A change that is not possible in this state.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("cannot {transition} a machine that is {state}")]
pub struct TransitionError {
    /// What it is.
    pub state: InstanceState,
    /// What was asked.
    pub transition: Transition,
}

impl InstanceState {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Undefined,
        Self::Defined,
        Self::Running,
        Self::Paused,
        Self::Saved,
        Self::Stopped,
        Self::Migrating,
        Self::Crashed,
    ];

    /// The state after a change.
    ///
    /// # Errors
    /// If the change is not possible from here; the state stays what it is.
    pub fn after(self, transition: Transition) -> Result<Self, TransitionError> {
        use InstanceState as S;
        use Transition as T;
        match (self, transition) {
            (S::Undefined, T::Define) => Ok(S::Defined),
            (S::Defined | S::Stopped, T::Start) => Ok(S::Running),
            (S::Running, T::Pause) => Ok(S::Paused),
            (S::Paused, T::Resume) => Ok(S::Running),
            (S::Running | S::Paused, T::Save) => Ok(S::Saved),
            (S::Saved, T::Restore) => Ok(S::Running),
            (S::Running | S::Paused | S::Saved | S::Crashed, T::Stop) => Ok(S::Stopped),
            (S::Running | S::Paused, T::MigrateBegin) => Ok(S::Migrating),
            (S::Migrating, T::MigrateFinish) => Ok(S::Undefined),
            (S::Migrating, T::MigrateAbort) => Ok(S::Running),
            (S::Running | S::Paused | S::Migrating, T::Crash) => Ok(S::Crashed),
            (S::Defined | S::Stopped | S::Saved | S::Crashed, T::Undefine) => Ok(S::Undefined),
            (state, transition) => Err(TransitionError { state, transition }),
        }
    }
}

impl Transition {
    /// All changes.
    pub const ALL: [Self; 12] = [
        Self::Define,
        Self::Start,
        Self::Pause,
        Self::Resume,
        Self::Save,
        Self::Restore,
        Self::Stop,
        Self::MigrateBegin,
        Self::MigrateFinish,
        Self::MigrateAbort,
        Self::Crash,
        Self::Undefine,
    ];
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undefined => "undefined",
            Self::Defined => "defined",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saved => "saved",
            Self::Stopped => "stopped",
            Self::Migrating => "migrating",
            Self::Crashed => "crashed",
        })
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Define => "define",
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Stop => "stop",
            Self::MigrateBegin => "begin to migrate",
            Self::MigrateFinish => "finish migrating",
            Self::MigrateAbort => "abort migrating",
            Self::Crash => "crash",
            Self::Undefine => "undefine",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every possible change; all others must be refused.
    const TABLE: &str = "
        undefined: define=defined
        defined: start=running undefine=undefined
        running: pause=paused save=saved stop=stopped migrate-begin=migrating crash=crashed
        paused: resume=running save=saved stop=stopped migrate-begin=migrating crash=crashed
        saved: restore=running stop=stopped undefine=undefined
        stopped: start=running undefine=undefined
        migrating: migrate-finish=undefined migrate-abort=running crash=crashed
        crashed: stop=stopped undefine=undefined
    ";

    fn word(value: impl Serialize) -> String {
        serde_json::to_value(value)
            .unwrap()
            .as_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn every_pair_of_state_and_transition() {
        let mut table = String::new();
        for state in InstanceState::ALL {
            let possible = Transition::ALL.iter().filter_map(|transition| {
                let after = state.after(*transition).ok()?;
                Some(format!(" {}={after}", word(transition)))
            });
            table += &format!("{}:{}\n", word(state), possible.collect::<String>());
        }
        let expected: Vec<&str> = TABLE
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        assert_eq!(table.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_impossible_is_said() {
        let error = InstanceState::Stopped.after(Transition::Pause).unwrap_err();
        assert_eq!(error.to_string(), "cannot pause a machine that is stopped");
    }
}
