//! The first bytes each end sends: who it is, which versions it speaks, what it can do.
//!
//! ```text
//! 0        8         10       12             16
//! │ magic  │ newest  │ oldest │ capabilities │      all numbers little-endian
//! ```
//!
//! This layout never changes. The version both ends then speak is the lower of the two newest; a capability counts if
//! both ends have it.

use crate::error::ProtocolError;

/// Length in bytes.
pub const GREETING_SIZE: usize = 16;

/// The newest version of the protocol this code speaks.
pub const VERSION: u16 = 1;

/// The oldest version of the protocol this code speaks.
pub const OLDEST_VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"StrataAg";

/// What one end says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The newest version it speaks.
    pub newest: u16,
    /// The oldest version it speaks.
    pub oldest: u16,
    /// One bit per capability; none is defined in version 1.
    pub capabilities: u32,
}

impl Greeting {
    /// What this code says.
    pub const OURS: Greeting = Greeting {
        newest: VERSION,
        oldest: OLDEST_VERSION,
        capabilities: 0,
    };

    /// The bytes on the wire.
    pub fn to_bytes(self) -> [u8; GREETING_SIZE] {
        let mut bytes = [0; GREETING_SIZE];
        let fields = MAGIC
            .into_iter()
            .chain(self.newest.to_le_bytes())
            .chain(self.oldest.to_le_bytes());
        for (to, from) in bytes
            .iter_mut()
            .zip(fields.chain(self.capabilities.to_le_bytes()))
        {
            *to = from;
        }
        bytes
    }

    /// Reads the bytes on the wire.
    pub fn from_bytes(bytes: &[u8; GREETING_SIZE]) -> Result<Greeting, ProtocolError> {
        let [magic @ .., n0, n1, o0, o1, c0, c1, c2, c3] = *bytes;
        if magic != MAGIC {
            return Err(ProtocolError::NotAnAgent);
        }
        Ok(Greeting {
            newest: u16::from_le_bytes([n0, n1]),
            oldest: u16::from_le_bytes([o0, o1]),
            capabilities: u32::from_le_bytes([c0, c1, c2, c3]),
        })
    }

    /// What both ends have in common: the version to speak and the capabilities to use.
    pub fn agree(self, peer: Greeting) -> Result<(u16, u32), ProtocolError> {
        let version = self.newest.min(peer.newest);
        if version < self.oldest || version < peer.oldest {
            return Err(ProtocolError::Version {
                oldest: peer.oldest,
                newest: peer.newest,
            });
        }
        Ok((version, self.capabilities & peer.capabilities))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_version_1() {
        let bytes = *b"StrataAg\x01\0\x01\0\0\0\0\0";
        assert_eq!(Greeting::OURS.to_bytes(), bytes);
        assert_eq!(Greeting::from_bytes(&bytes), Ok(Greeting::OURS));
        assert_eq!(
            Greeting::from_bytes(b"SSH-2.0-OpenSSH_"),
            Err(ProtocolError::NotAnAgent)
        );
    }

    #[test]
    fn agreement() {
        let greeting = |oldest, newest, capabilities| Greeting {
            newest,
            oldest,
            capabilities,
        };
        assert_eq!(
            greeting(1, 3, 0b110).agree(greeting(1, 2, 0b011)),
            Ok((2, 0b010))
        );
        assert_eq!(greeting(1, 1, 0).agree(greeting(1, 9, 1)), Ok((1, 0)));
        let error = ProtocolError::Version {
            oldest: 2,
            newest: 3,
        };
        assert_eq!(greeting(1, 1, 0).agree(greeting(2, 3, 0)), Err(error));
        let error = ProtocolError::Version {
            oldest: 1,
            newest: 1,
        };
        assert_eq!(greeting(2, 3, 0).agree(greeting(1, 1, 0)), Err(error));
    }
}
