//! The messages of the protocol and their bytes.
//!
//! A frame is a `u32` length (of what follows), a kind byte and a body. Numbers are little-endian; a string is a `u32`
//! length and bytes, which need not be UTF-8; a list is a `u32` count and its strings. A body that is too short, too long
//! or has a value that is not defined is malformed. Kinds from [`SKIPPABLE`] on may be skipped by who does not know them.

use std::fmt;

use crate::error::ProtocolError;

/// Most bytes a frame may have after its length.
pub const FRAME_SIZE_MAX: usize = 1 << 20;

/// Most bytes of data in one message.
pub const DATA_SIZE_MAX: usize = 32 << 10;

/// The first of the kinds that may be skipped by who does not know them.
pub const SKIPPABLE: u8 = 0x80;

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program, sought in PATH if it holds no slash, and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` settings on top of the agent's own environment.
    pub env: Vec<Vec<u8>>,
    /// Working directory; empty means `/`.
    pub cwd: Vec<u8>,
    /// Name or number of the user to run as; empty means root.
    pub user: Vec<u8>,
    /// Whether standard input, output and error are one terminal instead of three pipes.
    pub tty: bool,
    /// Height of the terminal in characters; 0 leaves it open.
    pub rows: u16,
    /// Width of the terminal in characters; 0 leaves it open.
    pub cols: u16,
}

/// Why a program did not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailReason {
    /// There is no such program: exit status 127 by the shells' convention.
    NotFound = 0,
    /// It is there but cannot be executed: exit status 126.
    NotExecutable = 1,
    /// Anything else.
    Other = 2,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this status.
    Code(u8),
    /// It was killed by this signal.
    Signal(u8),
}

/// A direction data flows in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Host to guest.
    Stdin = 0,
    /// Guest to host.
    Stdout = 1,
    /// Guest to host; unused with a terminal.
    Stderr = 2,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stream::Stdin => "stdin",
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        })
    }
}

/// One message. Which end may send it when is [`crate::endpoint`]'s business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Host: run a program. The rest of the connection belongs to it.
    Exec(Exec),
    /// Host: data for the program's standard input.
    Stdin(Vec<u8>),
    /// Host: no more data comes. With a terminal this is its end-of-file character.
    StdinEof,
    /// Host: send this signal to the program's process group (as a terminal's interrupt key would reach a script and what
    /// it runs); with a terminal, to its foreground process group.
    Signal(u8),
    /// Host: the terminal has a new size.
    Resize {
        /// Height in characters.
        rows: u16,
        /// Width in characters.
        cols: u16,
    },
    /// Either: this many more bytes of a stream may be sent.
    Credit {
        /// The stream, which the other end sends.
        stream: Stream,
        /// Bytes.
        bytes: u32,
    },
    /// Host: are you there?
    Ping,
    /// Host: end the machine in an orderly way.
    PowerOff {
        /// Start again instead of powering off.
        reboot: bool,
    },
    /// Host, reserved: this machine is now another one than it was (a clone, a restored snapshot).
    IdentityChanged {
        /// The new identity.
        id: [u8; 16],
    },
    /// Host, reserved: the clock does not show the time any more.
    TimeStepped {
        /// Nanoseconds that passed unseen; negative if time went back.
        ns: i64,
    },
    /// Guest: the program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Guest: the program did not start. The last message.
    Failed {
        /// Why, for a program to tell apart.
        reason: FailReason,
        /// Why, for a person.
        text: Vec<u8>,
    },
    /// Guest: data from the program's standard output, or its terminal.
    Stdout(Vec<u8>),
    /// Guest: data from the program's standard error.
    Stderr(Vec<u8>),
    /// Guest: the program ended and all its output was sent. The last message.
    Exited(ExitStatus),
    /// Guest: the answer to [`Message::Ping`].
    Pong,
    /// Guest: a request without another answer was understood and is being done.
    Done,
    /// Guest: a request of this kind is not known.
    Unsupported {
        /// The kind of the request.
        kind: u8,
    },
}

impl Message {
    /// The kind byte.
    pub fn kind(&self) -> u8 {
        match self {
            Message::Exec(_) => 0x01,
            Message::Stdin(_) => 0x02,
            Message::StdinEof => 0x03,
            Message::Signal(_) => 0x04,
            Message::Resize { .. } => 0x05,
            Message::Credit { .. } => 0x06,
            Message::Ping => 0x07,
            Message::PowerOff { .. } => 0x08,
            Message::IdentityChanged { .. } => 0x09,
            Message::TimeStepped { .. } => 0x0a,
            Message::Started { .. } => 0x41,
            Message::Failed { .. } => 0x42,
            Message::Stdout(_) => 0x43,
            Message::Stderr(_) => 0x44,
            Message::Exited(_) => 0x45,
            Message::Pong => 0x46,
            Message::Done => 0x47,
            Message::Unsupported { .. } => 0x48,
        }
    }

    /// Appends the frame of this message. A frame above [`FRAME_SIZE_MAX`] is refused and nothing is appended.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let mut frame = vec![self.kind()];
        self.encode_body(&mut frame);
        let size = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        if frame.len() > FRAME_SIZE_MAX {
            return Err(ProtocolError::FrameSize(size));
        }
        out.extend_from_slice(&size.to_le_bytes());
        out.append(&mut frame);
        Ok(())
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Message::Exec(exec) => exec.encode(out),
            Message::Stdin(data) | Message::Stdout(data) | Message::Stderr(data) => {
                out.extend_from_slice(data)
            }
            Message::StdinEof | Message::Ping | Message::Pong | Message::Done => {}
            Message::Signal(number) => out.push(*number),
            Message::Resize { rows, cols } => {
                out.extend(rows.to_le_bytes());
                out.extend(cols.to_le_bytes());
            }
            Message::Credit { stream, bytes } => {
                out.push(*stream as u8);
                out.extend(bytes.to_le_bytes());
            }
            Message::PowerOff { reboot } => out.push(u8::from(*reboot)),
            Message::IdentityChanged { id } => out.extend(id),
            Message::TimeStepped { ns } => out.extend(ns.to_le_bytes()),
            Message::Started { pid } => out.extend(pid.to_le_bytes()),
            Message::Failed { reason, text } => {
                out.push(*reason as u8);
                string(text, out);
            }
            Message::Exited(ExitStatus::Code(code)) => out.extend([0, *code]),
            Message::Exited(ExitStatus::Signal(signal)) => out.extend([1, *signal]),
            Message::Unsupported { kind } => out.push(*kind),
        }
    }

    /// Reads a message from what follows a frame's length.
    pub fn decode(frame: &[u8]) -> Result<Message, ProtocolError> {
        let (&kind, body) = frame.split_first().ok_or(ProtocolError::FrameSize(0))?;
        let mut body = Body(body);
        match body.message(kind) {
            Some(Some(message)) if body.0.is_empty() => Ok(message),
            Some(_) => Err(ProtocolError::Malformed(kind)),
            None => Err(ProtocolError::UnknownKind(kind)),
        }
    }
}

impl Exec {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.tty));
        out.extend(self.rows.to_le_bytes());
        out.extend(self.cols.to_le_bytes());
        string(&self.user, out);
        string(&self.cwd, out);
        for strings in [&self.argv, &self.env] {
            out.extend(
                u32::try_from(strings.len())
                    .unwrap_or(u32::MAX)
                    .to_le_bytes(),
            );
            strings.iter().for_each(|text| string(text, out));
        }
    }
}

/// A length that does not fit makes a frame that does not fit either, which [`Message::encode`] refuses.
fn string(text: &[u8], out: &mut Vec<u8>) {
    out.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(text);
}

/// What is left of a message's body.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    /// None: no such kind. Some(None): malformed.
    fn message(&mut self, kind: u8) -> Option<Option<Message>> {
        Some(match kind {
            0x01 => self.exec().map(Message::Exec),
            0x02 => self.data().map(Message::Stdin),
            0x03 => Some(Message::StdinEof),
            0x04 => self.byte().map(Message::Signal),
            0x05 => self.resize(),
            0x06 => self.credit(),
            0x07 => Some(Message::Ping),
            0x08 => self.flag().map(|reboot| Message::PowerOff { reboot }),
            0x09 => self.array().map(|id| Message::IdentityChanged { id }),
            0x0a => self.array().map(|ns| Message::TimeStepped {
                ns: i64::from_le_bytes(ns),
            }),
            0x41 => self.long().map(|pid| Message::Started { pid }),
            0x42 => self.failed(),
            0x43 => self.data().map(Message::Stdout),
            0x44 => self.data().map(Message::Stderr),
            0x45 => self.exited(),
            0x46 => Some(Message::Pong),
            0x47 => Some(Message::Done),
            0x48 => self.byte().map(|kind| Message::Unsupported { kind }),
            _ => return None,
        })
    }

    fn exec(&mut self) -> Option<Exec> {
        let (tty, rows, cols) = (self.flag()?, self.short()?, self.short()?);
        let (user, cwd) = (self.string()?, self.string()?);
        let (argv, env) = (self.list()?, self.list()?);
        if argv.is_empty() {
            None
        } else {
            Some(Exec {
                argv,
                env,
                cwd,
                user,
                tty,
                rows,
                cols,
            })
        }
    }

    fn resize(&mut self) -> Option<Message> {
        Some(Message::Resize {
            rows: self.short()?,
            cols: self.short()?,
        })
    }

    fn credit(&mut self) -> Option<Message> {
        let stream = match self.byte()? {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            _ => return None,
        };
        Some(Message::Credit {
            stream,
            bytes: self.long()?,
        })
    }

    fn failed(&mut self) -> Option<Message> {
        let reason = match self.byte()? {
            0 => FailReason::NotFound,
            1 => FailReason::NotExecutable,
            2 => FailReason::Other,
            _ => return None,
        };
        Some(Message::Failed {
            reason,
            text: self.string()?,
        })
    }

    fn exited(&mut self) -> Option<Message> {
        let [kind, value] = self.array()?;
        match kind {
            0 => Some(Message::Exited(ExitStatus::Code(value))),
            1 => Some(Message::Exited(ExitStatus::Signal(value))),
            _ => None,
        }
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn short(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn long(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// All that is left; never nothing, which would be a message without a meaning.
    fn data(&mut self) -> Option<Vec<u8>> {
        let data = std::mem::take(&mut self.0);
        (!data.is_empty() && data.len() <= DATA_SIZE_MAX).then(|| data.to_vec())
    }

    fn string(&mut self) -> Option<Vec<u8>> {
        let length = usize::try_from(self.long()?).ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head.to_vec())
    }

    /// Grows with the strings that are there, whatever the count says.
    fn list(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = self.long()?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.string()?);
        }
        Some(list)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..most)
    }

    fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 1..200)
    }

    fn exec() -> impl Strategy<Value = Exec> {
        let lists = (
            proptest::collection::vec(bytes(20), 1..5),
            proptest::collection::vec(bytes(20), 0..5),
        );
        (lists, bytes(20), bytes(20), any::<(bool, u16, u16)>()).prop_map(
            |((argv, env), cwd, user, (tty, rows, cols))| Exec {
                argv,
                env,
                cwd,
                user,
                tty,
                rows,
                cols,
            },
        )
    }

    /// Any message there is.
    pub(crate) fn message() -> impl Strategy<Value = Message> {
        let stream = prop_oneof![
            Just(Stream::Stdin),
            Just(Stream::Stdout),
            Just(Stream::Stderr)
        ];
        let reason = prop_oneof![
            Just(FailReason::NotFound),
            Just(FailReason::NotExecutable),
            Just(FailReason::Other)
        ];
        prop_oneof![
            exec().prop_map(Message::Exec),
            some_bytes().prop_map(Message::Stdin),
            Just(Message::StdinEof),
            any::<u8>().prop_map(Message::Signal),
            any::<(u16, u16)>().prop_map(|(rows, cols)| Message::Resize { rows, cols }),
            (stream, any::<u32>()).prop_map(|(stream, bytes)| Message::Credit { stream, bytes }),
            Just(Message::Ping),
            any::<bool>().prop_map(|reboot| Message::PowerOff { reboot }),
            any::<[u8; 16]>().prop_map(|id| Message::IdentityChanged { id }),
            any::<i64>().prop_map(|ns| Message::TimeStepped { ns }),
            any::<u32>().prop_map(|pid| Message::Started { pid }),
            (reason, bytes(50)).prop_map(|(reason, text)| Message::Failed { reason, text }),
            some_bytes().prop_map(Message::Stdout),
            some_bytes().prop_map(Message::Stderr),
            any::<u8>().prop_map(|code| Message::Exited(ExitStatus::Code(code))),
            any::<u8>().prop_map(|signal| Message::Exited(ExitStatus::Signal(signal))),
            Just(Message::Pong),
            Just(Message::Done),
            any::<u8>().prop_map(|kind| Message::Unsupported { kind }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in message()) {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            prop_assert_eq!(frame[..4].to_vec(), (frame.len() as u32 - 4).to_le_bytes());
            prop_assert_eq!(Message::decode(&frame[4..]), Ok(message));
        }

        /// What decodes at all is the one encoding of what it decodes to.
        #[test]
        fn any_bytes_do_no_harm(frame in bytes(100)) {
            if let Ok(message) = Message::decode(&frame) {
                let mut again = Vec::new();
                message.encode(&mut again).unwrap();
                prop_assert_eq!(&again[4..], frame);
            }
        }

        #[test]
        fn damaged_messages_do_no_harm(message in message(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            let at = 4 + at.index(frame.len() - 4);
            frame[at] = byte;
            let _ = Message::decode(&frame[4..]);
            let _ = Message::decode(&frame[4..4 + cut.index(frame.len() - 4)]);
        }
    }

    #[test]
    fn too_much_is_refused() {
        let exec = Exec {
            argv: vec![vec![b'x'; FRAME_SIZE_MAX]],
            ..Exec::default()
        };
        let mut out = Vec::new();
        assert!(matches!(
            Message::Exec(exec).encode(&mut out),
            Err(ProtocolError::FrameSize(_))
        ));
        assert!(out.is_empty());
        let many = [&[0x43][..], &vec![0; DATA_SIZE_MAX + 1]].concat();
        assert_eq!(Message::decode(&many), Err(ProtocolError::Malformed(0x43)));
    }

    #[test]
    fn a_count_asks_for_no_memory() {
        let body = [&[0x01, 0, 0, 0, 0, 0][..], &[0; 8], &u32::MAX.to_le_bytes()].concat();
        assert_eq!(Message::decode(&body), Err(ProtocolError::Malformed(0x01)));
        // Empty strings take four bytes each, so a frame bounds their number.
        assert_eq!(
            Message::decode(&[0x7f]),
            Err(ProtocolError::UnknownKind(0x7f))
        );
        assert_eq!(Message::decode(&[]), Err(ProtocolError::FrameSize(0)));
    }
}
