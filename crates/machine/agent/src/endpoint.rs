//! One end of a connection as a state machine without I/O: bytes and messages in, events and bytes out.
//!
//! ```text
//!          greeting          Exec             Started
//! Greeting ───────→ Idle ───────→ Starting ───────→ Running
//!                    │ ↑ answer       │ Failed          │ Exited
//!          a request ↓ │              └───→ Over ←──────┘
//!                   Asked
//! ```
//!
//! Both ends walk the same states. A host may send input, signals and sizes as soon as it has sent `Exec`; what arrives
//! after the end of the process is dropped, because the two cross on the wire.
//!
//! Credit: each stream starts with [`WINDOW`] bytes. Who receives data says with [`Endpoint::consumed`] how much of it
//! has gone where it belongs, and the endpoint grants that much again.

use crate::error::ProtocolError;
use crate::greeting::{GREETING_SIZE, Greeting};
use crate::message::{FRAME_SIZE_MAX, Message, SKIPPABLE, Stream};

/// Bytes of each stream that may be under way without a new grant.
pub const WINDOW: usize = 256 << 10;

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Asks.
    Host,
    /// Answers.
    Guest,
}

/// What the peer did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It greeted: the version to speak and the capabilities both have.
    Greeted {
        /// Version of the protocol.
        version: u16,
        /// Bits of [`Greeting::capabilities`].
        capabilities: u32,
    },
    /// It sent this message, which is in order. Credit is not among them, it is dealt with inside.
    Message(Message),
    /// It granted credit for this stream.
    Credit(Stream),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Idle,
    Asked,
    Starting,
    Running,
    Over,
}

/// Credit of one stream. Only one of the two sides is in use at each end.
#[derive(Debug)]
struct Flow {
    /// What this end may send, or the peer may still send to it.
    credit: usize,
    /// Consumed here and not granted again yet.
    owed: usize,
    /// Nothing may follow.
    ended: bool,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Endpoint {
    role: Role,
    state: State,
    incoming: Vec<u8>,
    /// How much of `incoming` has been dealt with.
    taken: usize,
    outgoing: Vec<u8>,
    stdin: Flow,
    stdout: Flow,
    stderr: Flow,
}

impl Endpoint {
    /// A new connection. Its greeting is waiting to be sent.
    pub fn new(role: Role) -> Endpoint {
        let flow = || Flow {
            credit: WINDOW,
            owed: 0,
            ended: false,
        };
        Endpoint {
            role,
            state: State::Greeting,
            incoming: Vec::new(),
            taken: 0,
            outgoing: Greeting::OURS.to_bytes().to_vec(),
            stdin: flow(),
            stdout: flow(),
            stderr: flow(),
        }
    }

    /// Takes bytes from the peer. Call [`Endpoint::next_event`] until it has none before giving more: what is kept is
    /// then never more than one frame and these bytes.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.incoming.drain(..self.taken);
        self.taken = 0;
        self.incoming.extend_from_slice(bytes);
    }

    /// What the peer did next, if its bytes are complete. After an error the connection is of no more use.
    pub fn next_event(&mut self) -> Result<Option<Event>, ProtocolError> {
        if self.state == State::Greeting {
            return self.take_greeting();
        }
        while let Some(frame) = self.take_frame()? {
            match Message::decode(&frame) {
                Ok(message) => {
                    if let Some(event) = self.accept(message)? {
                        return Ok(Some(event));
                    }
                }
                Err(ProtocolError::UnknownKind(kind)) if kind >= SKIPPABLE => {}
                Err(ProtocolError::UnknownKind(kind))
                    if self.role == Role::Guest && self.state == State::Idle =>
                {
                    Message::Unsupported { kind }.encode(&mut self.outgoing)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Sends a message. The error means the caller broke the protocol: the message is not sent.
    pub fn send(&mut self, message: &Message) -> Result<(), ProtocolError> {
        self.check_order(message, self.role)?;
        if let Some((stream, length)) = data_of(message) {
            let flow = self.flow(stream);
            if flow.ended || length > flow.credit {
                return Err(ProtocolError::NoCredit(stream));
            }
        }
        message.encode(&mut self.outgoing)?;
        self.advance(message);
        Ok(())
    }

    /// How many bytes of a stream may be sent now.
    pub fn credit(&self, stream: Stream) -> usize {
        match stream {
            Stream::Stdin => self.stdin.credit,
            Stream::Stdout => self.stdout.credit,
            Stream::Stderr => self.stderr.credit,
        }
    }

    /// Says that received bytes of a stream have gone where they belong. Grants are sent in lumps of half a window.
    pub fn consumed(&mut self, stream: Stream, bytes: usize) {
        let over = self.is_over();
        let flow = self.flow(stream);
        flow.owed = flow.owed.saturating_add(bytes);
        if flow.owed < WINDOW / 2 || flow.ended || over {
            return;
        }
        let granted = std::mem::take(&mut flow.owed);
        flow.credit = flow.credit.saturating_add(granted);
        let bytes = u32::try_from(granted).unwrap_or(u32::MAX);
        // The frame is small, so it cannot be refused.
        let _ = Message::Credit { stream, bytes }.encode(&mut self.outgoing);
    }

    /// Bytes waiting to go to the peer.
    pub fn outgoing(&self) -> &[u8] {
        &self.outgoing
    }

    /// Says how many of the outgoing bytes are on their way.
    pub fn sent(&mut self, count: usize) {
        self.outgoing.drain(..count.min(self.outgoing.len()));
    }

    /// Whether the process, if there was one, is over: no more messages come that matter.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    fn take_greeting(&mut self) -> Result<Option<Event>, ProtocolError> {
        let Some(greeting) = self.incoming.first_chunk::<GREETING_SIZE>() else {
            // A peer that is something else may never send enough to fill a greeting.
            let known = Greeting::OURS.to_bytes();
            let magic = self
                .incoming
                .iter()
                .zip(known.iter().take(8))
                .all(|(got, wanted)| got == wanted);
            return if magic {
                Ok(None)
            } else {
                Err(ProtocolError::NotAnAgent)
            };
        };
        let (version, capabilities) = Greeting::OURS.agree(Greeting::from_bytes(greeting)?)?;
        self.taken = GREETING_SIZE;
        self.state = State::Idle;
        Ok(Some(Event::Greeted {
            version,
            capabilities,
        }))
    }

    fn take_frame(&mut self) -> Result<Option<Vec<u8>>, ProtocolError> {
        let waiting = self.incoming.get(self.taken..).unwrap_or_default();
        let Some((size, rest)) = waiting.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let size = u32::from_le_bytes(*size);
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if length == 0 || length > FRAME_SIZE_MAX {
            return Err(ProtocolError::FrameSize(size));
        }
        let Some(frame) = rest.get(..length).map(<[u8]>::to_vec) else {
            return Ok(None);
        };
        self.taken += 4 + length;
        Ok(Some(frame))
    }

    /// Checks and applies a message of the peer.
    fn accept(&mut self, message: Message) -> Result<Option<Event>, ProtocolError> {
        let peer = match self.role {
            Role::Host => Role::Guest,
            Role::Guest => Role::Host,
        };
        self.check_order(&message, peer)?;
        if self.state == State::Over {
            return Ok(None);
        }
        if let Message::Credit { stream, bytes } = message {
            let flow = self.flow(stream);
            flow.credit = flow
                .credit
                .saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
            return Ok(Some(Event::Credit(stream)));
        }
        if let Some((stream, length)) = data_of(&message) {
            let flow = self.flow(stream);
            if flow.ended || length > flow.credit {
                return Err(ProtocolError::NoCredit(stream));
            }
        }
        self.advance(&message);
        Ok(Some(Event::Message(message)))
    }

    /// Whether `sender` may send this now.
    fn check_order(&self, message: &Message, sender: Role) -> Result<(), ProtocolError> {
        use State::{Asked, Idle, Over, Running, Starting};
        let states: &[State] = match (sender, message) {
            (Role::Host, Message::Exec(_)) => &[Idle],
            (Role::Host, Message::Ping | Message::PowerOff { .. }) => &[Idle],
            (Role::Host, Message::IdentityChanged { .. } | Message::TimeStepped { .. }) => &[Idle],
            (Role::Host, Message::Stdin(_) | Message::StdinEof) => &[Starting, Running, Over],
            (Role::Host, Message::Signal(_) | Message::Resize { .. }) => &[Starting, Running, Over],
            (
                Role::Host,
                Message::Credit {
                    stream: Stream::Stdout | Stream::Stderr,
                    ..
                },
            ) => &[Starting, Running, Over],
            (Role::Guest, Message::Started { .. } | Message::Failed { .. }) => &[Starting],
            (Role::Guest, Message::Stdout(_) | Message::Stderr(_) | Message::Exited(_)) => {
                &[Running]
            }
            (
                Role::Guest,
                Message::Credit {
                    stream: Stream::Stdin,
                    ..
                },
            ) => &[Starting, Running],
            (Role::Guest, Message::Pong | Message::Done | Message::Unsupported { .. }) => &[Asked],
            _ => &[],
        };
        if states.contains(&self.state) {
            Ok(())
        } else {
            Err(ProtocolError::OutOfOrder(message.kind()))
        }
    }

    /// Applies a message that was sent or received in order.
    fn advance(&mut self, message: &Message) {
        if let Some((stream, length)) = data_of(message) {
            let flow = self.flow(stream);
            flow.credit = flow.credit.saturating_sub(length);
        }
        match message {
            Message::Exec(_) => self.state = State::Starting,
            Message::Ping | Message::PowerOff { .. } => self.state = State::Asked,
            Message::IdentityChanged { .. } | Message::TimeStepped { .. } => {
                self.state = State::Asked
            }
            Message::StdinEof => self.stdin.ended = true,
            Message::Started { .. } => self.state = State::Running,
            Message::Pong | Message::Done | Message::Unsupported { .. } => self.state = State::Idle,
            Message::Failed { .. } | Message::Exited(_) => self.state = State::Over,
            _ => {}
        }
    }

    fn flow(&mut self, stream: Stream) -> &mut Flow {
        match stream {
            Stream::Stdin => &mut self.stdin,
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

/// The stream and length of a message that carries data.
fn data_of(message: &Message) -> Option<(Stream, usize)> {
    match message {
        Message::Stdin(data) => Some((Stream::Stdin, data.len())),
        Message::Stdout(data) => Some((Stream::Stdout, data.len())),
        Message::Stderr(data) => Some((Stream::Stderr, data.len())),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
