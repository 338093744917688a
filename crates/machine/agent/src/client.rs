//! The host's end of a connection, over a pair of blocking streams.
//!
//! Three parties, so that none waits for another: the caller of [`Process::next_output`] reads, any number of holders of
//! an [`Input`] put messages into the endpoint, and one thread of ours writes. Input waits for credit, which the reader
//! brings; the reader never waits for a write.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::endpoint::{Endpoint, Event, Role};
use crate::error::ClientError;
use crate::message::{DATA_SIZE_MAX, Exec, ExitStatus, Message, Stream};

/// Pause between attempts to reach an agent that does not listen yet.
const RETRY: Duration = Duration::from_millis(3);

/// Longest line a machine answers `CONNECT` with.
const ANSWER_SIZE_MAX: u64 = 64;

/// Connects to a vsock port of a guest through the Unix socket of its machine: `CONNECT port`, answered `OK number`
/// (the convention of Firecracker and Cloud Hypervisor). Tries again until something listens, at most for `patience`.
pub fn connect(socket: &Path, port: u32, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match connect_once(socket, port, left.max(RETRY)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() + RETRY >= deadline => return Err(error),
            Err(_) => thread::sleep(RETRY),
        }
    }
}

fn connect_once(socket: &Path, port: u32, patience: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // One byte at a time: what follows the line belongs to somebody else.
    let mut answer = Vec::new();
    BufReader::with_capacity(1, &stream)
        .take(ANSWER_SIZE_MAX)
        .read_until(b'\n', &mut answer)?;
    if !answer.starts_with(b"OK ") || !answer.ends_with(b"\n") {
        return Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            "nothing listens on that port of the guest",
        ));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// A greeted connection, good for questions or for one program.
#[derive(Debug)]
pub struct Client<R> {
    reader: R,
    /// Where bytes land on their way to the endpoint.
    buffer: Vec<u8>,
    shared: Arc<Shared>,
}

/// A running program: its output and its end.
#[derive(Debug)]
pub struct Process<R> {
    client: Client<R>,
    pid: u32,
    /// Handed out last time and so dealt with by now.
    handed_out: Option<(Stream, usize)>,
}

/// Where input, signals and sizes for a running program go in. Clones are the same.
#[derive(Debug, Clone)]
pub struct Input {
    shared: Arc<Shared>,
}

/// What a program did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// It wrote to standard output, or to its terminal.
    Stdout(Vec<u8>),
    /// It wrote to standard error.
    Stderr(Vec<u8>),
    /// It ended. Nothing follows.
    Exited(ExitStatus),
}

#[derive(Debug)]
struct Shared {
    state: Mutex<Shareable>,
    /// Credit came, there is something to write, or the connection is over.
    changed: Condvar,
}

#[derive(Debug)]
struct Shareable {
    endpoint: Endpoint,
    /// Nobody reads any more, or writing failed.
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Shareable> {
        // A panicking holder cannot leave the endpoint half changed in a way that matters more than its panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The writer's thread: sends what the endpoint has to say until the connection is over.
    fn write_all_to(&self, mut writer: impl Write) {
        let mut state = self.lock();
        loop {
            let bytes = state.endpoint.outgoing().to_vec();
            state.endpoint.sent(bytes.len());
            match (bytes.is_empty(), state.closed) {
                (true, true) => return,
                (true, false) => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner)
                }
                (false, _) => {
                    drop(state);
                    let written = writer.write_all(&bytes).and_then(|()| writer.flush());
                    state = self.lock();
                    if written.is_err() {
                        state.closed = true;
                        self.changed.notify_all();
                        return;
                    }
                }
            }
        }
    }

    fn send(&self, message: &Message) -> Result<(), ClientError> {
        let mut state = self.lock();
        if state.closed {
            return Err(closed());
        }
        state.endpoint.send(message)?;
        self.changed.notify_all();
        Ok(())
    }
}

impl<R: Read> Client<R> {
    /// Greets the agent. `reader` and `writer` are the two directions of one stream, such as a socket and its clone.
    pub fn greet(reader: R, writer: impl Write + Send + 'static) -> Result<Client<R>, ClientError> {
        let state = Mutex::new(Shareable {
            endpoint: Endpoint::new(Role::Host),
            closed: false,
        });
        let shared = Arc::new(Shared {
            state,
            changed: Condvar::new(),
        });
        let of_writer = Arc::clone(&shared);
        thread::Builder::new()
            .name("agent-writer".to_owned())
            .spawn(move || of_writer.write_all_to(writer))?;
        let buffer = vec![0; 64 << 10];
        let mut client = Client {
            reader,
            buffer,
            shared,
        };
        match client.next_event()? {
            Event::Greeted { .. } => Ok(client),
            // The endpoint lets nothing else come first.
            _ => Err(ClientError::Unsupported),
        }
    }

    /// Runs a program. Its end is the end of the connection.
    pub fn exec(mut self, exec: Exec) -> Result<Process<R>, ClientError> {
        self.shared.send(&Message::Exec(exec))?;
        loop {
            match self.next_event()? {
                Event::Message(Message::Started { pid }) => {
                    return Ok(Process {
                        client: self,
                        pid,
                        handed_out: None,
                    });
                }
                Event::Message(Message::Failed { reason, text }) => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    return Err(ClientError::Failed { reason, text });
                }
                _ => {}
            }
        }
    }

    /// Asks whether the agent is there.
    pub fn ping(&mut self) -> Result<(), ClientError> {
        self.ask(&Message::Ping)
    }

    /// Asks the guest to end in an orderly way, or to start again. The answer means it has begun to.
    pub fn power_off(&mut self, reboot: bool) -> Result<(), ClientError> {
        self.ask(&Message::PowerOff { reboot })
    }

    fn ask(&mut self, question: &Message) -> Result<(), ClientError> {
        self.shared.send(question)?;
        match self.next_event()? {
            Event::Message(Message::Pong | Message::Done) => Ok(()),
            _ => Err(ClientError::Unsupported),
        }
    }

    fn next_event(&mut self) -> Result<Event, ClientError> {
        loop {
            let mut state = self.shared.lock();
            if let Some(event) = state.endpoint.next_event()? {
                return Ok(event);
            }
            drop(state);
            let length = match self.reader.read(&mut self.buffer) {
                Ok(0) => return Err(closed()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            self.shared
                .lock()
                .endpoint
                .receive(self.buffer.get(..length).unwrap_or_default());
        }
    }
}

impl<R> Drop for Client<R> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl<R: Read> Process<R> {
    /// Its process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A way in to the program.
    pub fn input(&self) -> Input {
        Input {
            shared: Arc::clone(&self.client.shared),
        }
    }

    /// Waits for what the program does next. Asking for the next output says that the last one has gone where it belongs:
    /// a program is held up when the one who asks is slow.
    pub fn next_output(&mut self) -> Result<Output, ClientError> {
        if let Some((stream, length)) = self.handed_out.take() {
            let mut state = self.client.shared.lock();
            state.endpoint.consumed(stream, length);
            if !state.endpoint.outgoing().is_empty() {
                self.client.shared.changed.notify_all();
            }
        }
        loop {
            let output = match self.client.next_event()? {
                Event::Message(Message::Stdout(data)) => {
                    self.handed_out = Some((Stream::Stdout, data.len()));
                    Output::Stdout(data)
                }
                Event::Message(Message::Stderr(data)) => {
                    self.handed_out = Some((Stream::Stderr, data.len()));
                    Output::Stderr(data)
                }
                Event::Message(Message::Exited(status)) => {
                    self.client.shared.close();
                    Output::Exited(status)
                }
                Event::Credit(_) => {
                    self.client.shared.changed.notify_all();
                    continue;
                }
                _ => continue,
            };
            return Ok(output);
        }
    }
}

impl Input {
    /// Sends data to the program's standard input, waiting until the program has taken enough of what came before.
    pub fn write(&self, mut data: &[u8]) -> Result<(), ClientError> {
        while !data.is_empty() {
            let mut state = self.shared.lock();
            while state.endpoint.credit(Stream::Stdin) == 0 && !state.closed {
                state = self
                    .shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return Err(closed());
            }
            let length = data
                .len()
                .min(DATA_SIZE_MAX)
                .min(state.endpoint.credit(Stream::Stdin));
            let (piece, rest) = data.split_at_checked(length).unwrap_or((data, &[]));
            state.endpoint.send(&Message::Stdin(piece.to_vec()))?;
            self.shared.changed.notify_all();
            data = rest;
        }
        Ok(())
    }

    /// Says that no more data comes.
    pub fn end(&self) -> Result<(), ClientError> {
        self.shared.send(&Message::StdinEof)
    }

    /// Sends a signal to the program and what it runs: see [`Message::Signal`].
    pub fn signal(&self, number: u8) -> Result<(), ClientError> {
        self.shared.send(&Message::Signal(number))
    }

    /// Gives the program's terminal a new size.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), ClientError> {
        self.shared.send(&Message::Resize { rows, cols })
    }

    /// Sends all of `source` and then its end. Meant for a thread: it may wait for ever in `source`.
    pub fn pump(&self, mut source: impl Read) -> Result<(), ClientError> {
        let mut buffer = vec![0; DATA_SIZE_MAX];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return self.end(),
                Ok(length) => self.write(buffer.get(..length).unwrap_or_default())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The program sees the end of its input; the caller learns why.
                    let _ = self.end();
                    return Err(error.into());
                }
            }
        }
    }
}

fn closed() -> ClientError {
    ClientError::Io(io::ErrorKind::UnexpectedEof.into())
}
