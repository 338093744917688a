//! The lifecycle that every device has, and its state as a value.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a machine does to each of its devices.
///
/// A device is built in its power-on state and does nothing until `start`. `pause` and `start` alternate; `save` and
/// `restore` happen only while not running; `stop` is the end. All calls come from one thread at a time, under the
/// device's lock.
pub trait Device: Send {
    /// Names this device among all of its machine, the same in every run (`serial0`, `pci-00:03.0`).
    fn id(&self) -> &str;

    /// Back to the power-on state, as at a machine reset. Connections to the host (files, sockets) stay.
    fn reset(&mut self);

    /// The machine begins or goes on to run.
    fn start(&mut self) {}

    /// The machine stands still: finish or hold back work in flight, so that `save` is complete.
    fn pause(&mut self) {}

    /// The machine ends: let go of host resources.
    fn stop(&mut self) {}

    /// Everything the guest could tell apart later, as a value.
    fn save(&self) -> SavedState;

    /// Takes on a saved state. On error the device is as after `reset` or before the call, never half-way.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
}

/// The state of one device: which kind and version it is of, and its content.
///
/// Each device has its own serde type for the content, apart from its runtime type. A change of that type that old
/// readers could not take raises the version.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// The kind of device (`serial-16550`), not the instance.
    pub name: String,
    /// The version of the content, from 1.
    pub version: u32,
    /// The content, as JSON.
    pub bytes: Vec<u8>,
}

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is of another kind of device.
    #[error("the saved state is of a {found}, not of a {wanted}")]
    WrongDevice {
        /// This device's kind.
        wanted: String,
        /// The state's kind.
        found: String,
    },
    /// The state was written by a later version.
    #[error("version {found} of the saved {name} is not known here; the latest known is {known}")]
    UnknownVersion {
        /// The device's kind.
        name: String,
        /// The state's version.
        found: u32,
        /// The latest one that can be read.
        known: u32,
    },
    /// The content cannot be read.
    #[error("the saved state of a {name} is malformed")]
    Malformed {
        /// The device's kind.
        name: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The content can be read but does not fit this device.
    #[error("the saved state of a {name} does not fit: {reason}")]
    Mismatch {
        /// The device's kind.
        name: String,
        /// What does not fit.
        reason: &'static str,
    },
}

impl SavedState {
    /// Wraps a device's content.
    pub fn new<T: Serialize>(name: &str, version: u32, content: &T) -> SavedState {
        // Content types are plain structs, which JSON always takes; anything else would be refused by `open`.
        let bytes = serde_json::to_vec(content).unwrap_or_default();
        SavedState {
            name: name.to_owned(),
            version,
            bytes,
        }
    }

    /// Unwraps the content, if it is of this kind and of a version up to `known`.
    pub fn open<T: DeserializeOwned>(&self, name: &str, known: u32) -> Result<T, RestoreError> {
        if self.name != name {
            return Err(RestoreError::WrongDevice {
                wanted: name.to_owned(),
                found: self.name.clone(),
            });
        }
        if self.version == 0 || self.version > known {
            let name = name.to_owned();
            return Err(RestoreError::UnknownVersion {
                name,
                found: self.version,
                known,
            });
        }
        serde_json::from_slice(&self.bytes).map_err(|source| RestoreError::Malformed {
            name: name.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_open_only_as_what_they_are() {
        let state = SavedState::new("lamp", 2, &7u32);
        assert_eq!(state.open::<u32>("lamp", 2).unwrap(), 7);
        assert_eq!(state.open::<u32>("lamp", 3).unwrap(), 7);
        assert!(matches!(
            state.open::<u32>("door", 2),
            Err(RestoreError::WrongDevice { .. })
        ));
        assert!(matches!(
            state.open::<u32>("lamp", 1),
            Err(RestoreError::UnknownVersion { .. })
        ));
        assert!(matches!(
            state.open::<String>("lamp", 2),
            Err(RestoreError::Malformed { .. })
        ));
    }
}
