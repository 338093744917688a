//! Sizes in bytes as people write them: a number with a unit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. Written with a unit: `512M`, `1G`, `1536MiB`; units are powers of 1024.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct ByteSize(u64);

/// A size that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SizeError {
    /// A number without a unit, which would mean bytes to some and megabytes to others.
    #[error("'{0}' needs a unit: say {0}M or {0}G")]
    NoUnit(String),
    /// Not a number with a unit.
    #[error("'{0}' is not a size: write a whole number and a unit, like 512M or 1G")]
    NotASize(String),
    /// More than 64 bits of bytes.
    #[error("'{0}' is too big")]
    TooBig(String),
}

/// Units from the biggest to the smallest: letter and power of two.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteSize {
    /// A size from a number of bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size from a number of mebibytes, at most 2^44 of them.
    pub const fn mebibytes(mebibytes: u32) -> Self {
        Self((mebibytes as u64) << 20)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::NotASize(text.to_owned()));
        }
        if unit.is_empty() {
            return Err(SizeError::NoUnit(text.to_owned()));
        }
        let shift = shift_of(unit).ok_or_else(|| SizeError::NotASize(text.to_owned()))?;
        let too_big = || SizeError::TooBig(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_big())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(too_big)?;
        Ok(Self(bytes))
    }
}

/// The power of two that a unit stands for: `M`, `MB` and `MiB` in any case are the same, `B` is 0.
fn shift_of(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_uppercase();
    if unit == "B" {
        return Some(0);
    }
    let (letter, shift) = UNITS.iter().find(|(letter, _)| unit.starts_with(*letter))?;
    matches!(unit.strip_prefix(*letter)?, "" | "B" | "IB").then_some(*shift)
}

impl fmt::Display for ByteSize {
    /// With the biggest unit that divides it, so that it parses to the same value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, shift): &&(char, u32)| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match UNITS.iter().find(fits) {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, bytes: u64) {
        assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
    }

    #[test]
    fn units_in_every_spelling() {
        check("512M", 512 << 20);
        check("1G", 1 << 30);
        check("1g", 1 << 30);
        check("3GiB", 3 << 30);
        check("3gb", 3 << 30);
        check("4096B", 4096);
        check("0K", 0);
    }

    #[test]
    fn a_number_alone_is_refused_with_advice() {
        let error = "512".parse::<ByteSize>().unwrap_err();
        assert_eq!(error.to_string(), "'512' needs a unit: say 512M or 512G");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1M", "1.5G", "1 G", "1X", "1MBB", "１M", "M1"] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(SizeError::NotASize(text.to_owned()))
            );
        }
        for text in ["99999999999999999999M", "16777216T"] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(SizeError::TooBig(text.to_owned()))
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,12}") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
