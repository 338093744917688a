//! Serves one connection of the host: its questions, or one program from start to end.
//!
//! One loop waits for everything at once. The connection is always read, and what is held for the program or for the host
//! is bounded by the protocol's credit, so neither can block the other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use strata_agent::endpoint::{Endpoint, Event, Role};
use strata_agent::message::{DATA_SIZE_MAX, ExitStatus, Message, Stream};
use strata_agent::{Exec, ProtocolError};

use crate::network;
use crate::program::{self, Program};
use crate::system::{self, Ending};

/// Output is not read from the program while this much waits for the connection, in bytes.
const OUTGOING_MAX: usize = 64 << 10;

/// How long a program whose host is gone may take to end after SIGHUP, in milliseconds.
const HANGUP_GRACE_MS: i32 = 1_000;

/// The control character that ends input on a terminal.
const END_OF_INPUT: u8 = 4;

/// Serves a connection until it ends. Some: the host asked for the end of the machine, and has been answered.
pub fn serve(connection: OwnedFd) -> io::Result<Option<Ending>> {
    system::set_nonblocking(connection.as_fd())?;
    let mut session = Session {
        connection: File::from(connection),
        endpoint: Endpoint::new(Role::Guest),
        running: None,
        ending: None,
        hung_up: false,
    };
    let result = session.run();
    if let Some(running) = &mut session.running {
        running.hang_up();
    }
    result.map(|()| session.ending)
}

struct Session {
    connection: File,
    endpoint: Endpoint,
    running: Option<Running>,
    ending: Option<Ending>,
    hung_up: bool,
}

/// A program and what is on its way to it.
struct Running {
    program: Program,
    /// Readable when the program has ended.
    handle: OwnedFd,
    status: Option<ExitStatus>,
    input: Vec<u8>,
    input_ended: bool,
    /// The last byte written to a terminal; its end-of-input character counts at the start of a line only.
    last_input: u8,
}

impl Session {
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            self.read_connection()?;
            self.move_data()?;
            self.write_connection()?;
            let flushed = self.endpoint.outgoing().is_empty();
            if self.hung_up || flushed && (self.endpoint.is_over() || self.ending.is_some()) {
                return Ok(());
            }
        }
    }

    /// Waits until something can be done.
    fn wait(&self) -> io::Result<()> {
        let mut entries = Vec::with_capacity(5);
        let mut add = |file: &dyn AsRawFd, events: libc::c_short| {
            entries.push(libc::pollfd {
                fd: file.as_raw_fd(),
                events,
                revents: 0,
            });
        };
        let to_send = if self.endpoint.outgoing().is_empty() {
            0
        } else {
            libc::POLLOUT
        };
        add(&self.connection, libc::POLLIN | to_send);
        if let Some(running) = &self.running {
            if running.status.is_none() {
                add(&running.handle, libc::POLLIN);
            }
            if let Some(stdin) = running
                .program
                .stdin
                .as_ref()
                .filter(|_| !running.input.is_empty())
            {
                add(stdin, libc::POLLOUT);
            }
            for (stream, output) in [
                (Stream::Stdout, &running.program.stdout),
                (Stream::Stderr, &running.program.stderr),
            ] {
                if let Some(output) = output.as_ref().filter(|_| self.has_room(stream)) {
                    add(output, libc::POLLIN);
                }
            }
        }
        system::poll(&mut entries, -1)
    }

    fn has_room(&self, stream: Stream) -> bool {
        self.endpoint.outgoing().len() < OUTGOING_MAX && self.endpoint.credit(stream) > 0
    }

    fn read_connection(&mut self) -> io::Result<()> {
        let mut buffer = [0; 64 << 10];
        match attempt(|| self.connection.read(&mut buffer))? {
            Some(0) => self.hung_up = true,
            Some(length) => {
                self.endpoint.receive(&buffer[..length]);
                while let Some(event) = self.endpoint.next_event().map_err(protocol)? {
                    if let Event::Message(message) = event {
                        self.obey(message)?;
                    }
                }
            }
            None => {}
        }
        Ok(())
    }

    fn obey(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Exec(exec) => return self.start(&exec),
            Message::Ping => self.endpoint.send(&Message::Pong).map_err(protocol)?,
            Message::PowerOff { reboot } => {
                self.ending = Some(if reboot {
                    Ending::Reboot
                } else {
                    Ending::PowerOff
                });
                self.endpoint.send(&Message::Done).map_err(protocol)?;
            }
            Message::IdentityChanged { .. } | Message::TimeStepped { .. } => {
                self.endpoint
                    .send(&Message::Unsupported {
                        kind: message.kind(),
                    })
                    .map_err(protocol)?;
            }
            message => {
                if let Some(running) = &mut self.running {
                    running.obey(message);
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, exec: &Exec) -> io::Result<()> {
        network::wait();
        let answer = match program::start(exec) {
            Ok(program) => {
                let pid = program.child.id();
                let handle = system::process_handle(pid)?;
                let (status, input, input_ended) = (None, Vec::new(), false);
                self.running = Some(Running {
                    program,
                    handle,
                    status,
                    input,
                    input_ended,
                    last_input: b'\n',
                });
                Message::Started { pid }
            }
            Err((reason, text)) => Message::Failed {
                reason,
                text: text.into_bytes(),
            },
        };
        self.endpoint.send(&answer).map_err(protocol)
    }

    /// Moves what can be moved to and from the program, and reports its end once all its output is on its way.
    fn move_data(&mut self) -> io::Result<()> {
        let Some(mut running) = self.running.take() else {
            return Ok(());
        };
        if running.status.is_none() {
            running.status = running.program.child.try_wait()?.map(exit_status);
        }
        let consumed = running.feed();
        self.endpoint.consumed(Stream::Stdin, consumed);
        // Read after the status: what the program wrote before it ended is there by now.
        let stdout_dry = self.relay(Stream::Stdout, &mut running.program.stdout)?;
        let stderr_dry = self.relay(Stream::Stderr, &mut running.program.stderr)?;
        match running.status {
            // A process that lives on with the program's streams does not hold up the end.
            Some(status) if stdout_dry && stderr_dry => self
                .endpoint
                .send(&Message::Exited(status))
                .map_err(protocol),
            _ => {
                self.running = Some(running);
                Ok(())
            }
        }
    }

    /// Sends what a stream of the program has, as far as there is room. True if there is no more now.
    fn relay(&mut self, stream: Stream, output: &mut Option<OwnedFd>) -> io::Result<bool> {
        let mut buffer = [0; DATA_SIZE_MAX];
        while let Some(source) = output {
            if !self.has_room(stream) {
                return Ok(false);
            }
            let most = self.endpoint.credit(stream).min(DATA_SIZE_MAX);
            match attempt(|| read(source, &mut buffer[..most])) {
                Ok(Some(length)) if length > 0 => {
                    let data = buffer[..length].to_vec();
                    let message = if stream == Stream::Stdout {
                        Message::Stdout(data)
                    } else {
                        Message::Stderr(data)
                    };
                    self.endpoint.send(&message).map_err(protocol)?;
                }
                Ok(None) => return Ok(true),
                // The end. A terminal nobody has open any more reports an error instead.
                Ok(_) | Err(_) => *output = None,
            }
        }
        Ok(true)
    }

    fn write_connection(&mut self) -> io::Result<()> {
        while !self.endpoint.outgoing().is_empty() {
            let Some(length) = attempt(|| self.connection.write(self.endpoint.outgoing()))? else {
                break;
            };
            self.endpoint.sent(length);
        }
        Ok(())
    }
}

impl Running {
    fn obey(&mut self, message: Message) {
        let group = self.program.child.id() as i32;
        match message {
            Message::Stdin(data) => self.input.extend(data),
            Message::StdinEof => self.input_ended = true,
            Message::Signal(number) if self.status.is_none() => {
                let foreground = self
                    .program
                    .terminal
                    .as_ref()
                    .map(|master| system::foreground_group(master.as_fd()));
                let group = foreground.and_then(Result::ok).unwrap_or(group);
                // It may be gone already, or the number be no signal: then there is nobody to tell.
                let _ = system::kill(-group, i32::from(number));
            }
            Message::Resize { rows, cols } => {
                if let Some(master) = &self.program.terminal {
                    let _ = system::set_window_size(master.as_fd(), rows, cols);
                }
            }
            _ => {}
        }
    }

    /// Writes waiting input to the program. Returns how much of it is gone, written or not wanted.
    fn feed(&mut self) -> usize {
        let mut gone = 0;
        while let (Some(stdin), false) = (&self.program.stdin, self.input.is_empty()) {
            match attempt(|| write(stdin, &self.input)) {
                Ok(Some(length)) => {
                    self.last_input = self.input[..length]
                        .last()
                        .copied()
                        .unwrap_or(self.last_input);
                    self.input.drain(..length);
                    gone += length;
                }
                Ok(None) => break,
                Err(_) => self.program.stdin = None,
            }
        }
        if self.program.stdin.is_none() {
            gone += self.input.len();
            self.input.clear();
        } else if self.input_ended && self.input.is_empty() {
            self.end_input();
        }
        gone
    }

    fn end_input(&mut self) {
        if let (Some(master), true) = (&self.program.stdin, self.program.terminal.is_some()) {
            // In the middle of a line the first one only ends the line.
            let ends: &[u8] = if self.last_input == b'\n' {
                &[END_OF_INPUT]
            } else {
                &[END_OF_INPUT; 2]
            };
            let _ = write(master, ends);
        }
        self.program.stdin = None;
    }

    /// Ends a program whose host is gone.
    fn hang_up(&mut self) {
        let group = -(self.program.child.id() as i32);
        let _ = system::kill(group, libc::SIGHUP);
        let _ = system::kill(group, libc::SIGCONT);
        let mut entry = [libc::pollfd {
            fd: self.handle.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        let _ = system::poll(&mut entry, HANGUP_GRACE_MS);
        let _ = system::kill(group, libc::SIGKILL);
        let _ = self.program.child.wait();
    }
}

/// None where it would have to wait.
fn attempt(mut action: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match action() {
            Ok(length) => return Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read(file: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe the buffer.
    let length = unsafe { libc::read(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

fn write(file: &OwnedFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe the data.
    let length = unsafe { libc::write(file.as_raw_fd(), data.as_ptr().cast(), data.len()) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

fn exit_status(status: std::process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(code as u8),
        (None, signal) => ExitStatus::Signal(signal.unwrap_or(libc::SIGKILL) as u8),
    }
}

fn protocol(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
