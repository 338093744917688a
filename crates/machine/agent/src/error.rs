//! What can go wrong on a connection to an agent.

use std::fmt;
use std::io;

use crate::message::{FailReason, Stream};

/// The peer broke a rule of the protocol, or speaks another.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The first bytes are not a greeting.
    NotAnAgent,
    /// No version in common.
    Version {
        /// The oldest version the peer speaks.
        oldest: u16,
        /// The newest version the peer speaks.
        newest: u16,
    },
    /// A frame's length is zero or above the limit.
    FrameSize(u32),
    /// A message's body does not parse.
    Malformed(u8),
    /// A kind of message nobody knows and that may not be skipped.
    UnknownKind(u8),
    /// A message that may not come at this point.
    OutOfOrder(u8),
    /// More data than there was credit for.
    NoCredit(Stream),
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::NotAnAgent => write!(f, "the other end is not a Strata agent"),
            ProtocolError::Version { oldest, newest } => {
                write!(
                    f,
                    "the other end speaks agent protocol versions {oldest} to {newest}, this end does not"
                )
            }
            ProtocolError::FrameSize(size) => {
                write!(f, "an agent frame of {size} bytes is not allowed")
            }
            ProtocolError::Malformed(kind) => {
                write!(f, "an agent message of kind {kind:#04x} is malformed")
            }
            ProtocolError::UnknownKind(kind) => {
                write!(f, "an agent message of unknown kind {kind:#04x}")
            }
            ProtocolError::OutOfOrder(kind) => {
                write!(f, "an agent message of kind {kind:#04x} came out of order")
            }
            ProtocolError::NoCredit(stream) => write!(f, "more {stream} data than was allowed"),
        }
    }
}

impl std::error::Error for ProtocolError {}

/// Failure of a request to an agent.
#[derive(Debug)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection failed or ended early.
    Io(io::Error),
    /// The agent broke the protocol.
    Protocol(ProtocolError),
    /// The agent could not start the program.
    Failed {
        /// Why, for a program to tell apart.
        reason: FailReason,
        /// Why, for a person.
        text: String,
    },
    /// The agent does not know this request.
    Unsupported,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                write!(f, "the guest's agent closed the connection")
            }
            ClientError::Io(_) => write!(f, "the connection to the guest's agent failed"),
            ClientError::Protocol(_) => write!(f, "the guest's agent does not follow the protocol"),
            ClientError::Failed { text, .. } => f.write_str(text),
            ClientError::Unsupported => write!(f, "the guest's agent does not know this request"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClientError::Io(error) => Some(error),
            ClientError::Protocol(error) => Some(error),
            ClientError::Failed { .. } | ClientError::Unsupported => None,
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> ClientError {
        ClientError::Io(error)
    }
}

impl From<ProtocolError> for ClientError {
    fn from(error: ProtocolError) -> ClientError {
        ClientError::Protocol(error)
    }
}
