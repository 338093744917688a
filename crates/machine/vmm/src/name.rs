//! Names of machines: what users type, and what becomes a directory's name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, bytes: with the run directory before it, the control socket's path must fit a socket address.
const LENGTH_MAX: usize = 48;

/// A machine's name: letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);

/// A name that no machine can have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "'{0}' is not a machine name: use up to {LENGTH_MAX} letters, digits, '-', '_' and '.', beginning with a letter or digit"
)]
pub struct NameError(String);

impl MachineName {
    /// A name like `tiny-1a2b`: the stem, cut to a valid name, and four random hexadecimal digits.
    pub fn generate(stem: &str) -> Self {
        let stem: String = stem
            .chars()
            .filter(|c| c.is_ascii_alphanumeric())
            .take(24)
            .collect();
        let stem = if stem.is_empty() { "machine" } else { &stem };
        Self(format!("{stem}-{:04x}", random_u16()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// From the system's generator; without one, from the clock: names are made unique by their directory anyway.
fn random_u16() -> u16 {
    let mut bytes = [0; 2];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK) {
        Ok(2) => u16::from_le_bytes(bytes),
        _ => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |now| now.subsec_nanos() as u16),
    }
}

impl FromStr for MachineName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let first = name
            .chars()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric());
        if first && name.len() <= LENGTH_MAX && name.chars().all(inner) {
            Ok(Self(name.to_owned()))
        } else {
            Err(NameError(name.to_owned()))
        }
    }
}

impl TryFrom<String> for MachineName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl From<MachineName> for String {
    fn from(name: MachineName) -> String {
        name.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_cannot_leave_their_directory() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(49),
        ] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad:?}");
        }
        for good in ["a", "web-1", "9front", "a.b_c", &"x".repeat(48)] {
            assert!(good.parse::<MachineName>().is_ok(), "{good:?}");
        }
    }

    proptest! {
        #[test]
        fn generated_names_are_valid(stem in "\\PC{0,80}") {
            let name = MachineName::generate(&stem);
            prop_assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
    }
}
