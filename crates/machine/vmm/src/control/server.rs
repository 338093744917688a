//! The machine's side of the control socket: threads that turn lines into requests to the machine.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use serde_json::Value;

use super::protocol::{ErrorKind, Failure, Greeting, LINE_MAX, Request, Session, Step};

/// Connections at the same time; more are closed at once.
const CONNECTIONS_MAX: usize = 16;
/// How long a client may take to read an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// A request with the place for its answer.
#[derive(Debug)]
pub struct ControlRequest {
    /// What is asked.
    pub request: Request,
    /// Takes one answer.
    pub answer: SyncSender<Result<Value, Failure>>,
}

/// Hands requests to the machine's event loop; false when it has ended.
type Deliver = dyn Fn(ControlRequest) -> bool + Send + Sync;

/// Listens on a control socket until the process ends.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Begins to listen; `deliver` hands a request to the machine and is false when it has ended.
    pub fn start(
        listener: UnixListener,
        greeting: &Greeting,
        deliver: impl Fn(ControlRequest) -> bool + Send + Sync + 'static,
    ) -> io::Result<()> {
        let greeting = serde_json::to_string(greeting)?;
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || listen(&listener, &greeting.into(), &(Arc::new(deliver) as _)))?;
        Ok(())
    }
}

fn listen(listener: &UnixListener, greeting: &Arc<str>, deliver: &Arc<Deliver>) {
    let open = Arc::new(AtomicUsize::new(0));
    while let Ok((stream, _)) = listener.accept() {
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (greeting, deliver, open) = (greeting.clone(), deliver.clone(), open.clone());
        let count = open.clone();
        let spawned = std::thread::Builder::new()
            .name("control-client".to_owned())
            .spawn(move || {
                // A connection that breaks is the client's loss.
                let _ = serve(stream, &greeting, &*deliver);
                open.fetch_sub(1, Ordering::Relaxed);
            });
        if spawned.is_err() {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn serve(stream: UnixStream, greeting: &str, deliver: &Deliver) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    let mut session = Session::default();
    send(&mut out, greeting)?;
    loop {
        let mut line = Vec::new();
        let limit = LINE_MAX as u64;
        let length = lines.by_ref().take(limit).read_until(b'\n', &mut line)?;
        // The end of the stream, or a line without end: a longer one is not read on.
        if line.pop() != Some(b'\n') {
            if length == LINE_MAX {
                let failure = Failure::new(ErrorKind::Malformed, "the line is too long");
                send(&mut out, &Session::answer(0, Err(failure)))?;
            }
            return Ok(());
        }
        match session.line(&line) {
            Step::Answer(text) => send(&mut out, &text)?,
            Step::Close(text) => return send(&mut out, &text),
            Step::Ask { id, request } => {
                let result = ask(deliver, request);
                send(&mut out, &Session::answer(id, result))?;
            }
        }
    }
}

fn ask(deliver: &Deliver, request: Request) -> Result<Value, Failure> {
    let (answer, answered) = sync_channel(1);
    let ended = || Failure::new(ErrorKind::WrongState, "the machine has ended");
    if !deliver(ControlRequest { request, answer }) {
        return Err(ended());
    }
    answered.recv().map_err(|_| ended())?
}

fn send(out: &mut UnixStream, line: &str) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(b'\n');
    out.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Client, Status};
    use crate::{ByteSize, InstanceState};

    fn status() -> Status {
        Status {
            name: "web-1".parse().unwrap(),
            state: InstanceState::Running,
            engine: "translate".to_owned(),
            cpus: 1,
            memory: ByteSize::mebibytes(512),
            uptime_ms: 1500,
            reboots: 0,
            ports: Vec::new(),
        }
    }

    /// A machine whose answers are always the same.
    fn fixed(request: &Request) -> Result<Value, Failure> {
        match request {
            Request::Status => Ok(serde_json::to_value(status()).unwrap()),
            Request::Resume => Err(Failure::new(
                ErrorKind::WrongState,
                "cannot resume a machine that is running",
            )),
            _ => Ok(Value::Null),
        }
    }

    fn machine() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let greeting = Greeting::new("web-1".parse().unwrap());
        let listener = UnixListener::bind(&path).unwrap();
        Server::start(listener, &greeting, |asked| {
            asked.answer.send(fixed(&asked.request)).is_ok()
        })
        .unwrap();
        (dir, path)
    }

    /// What version 1 said, byte for byte, must be answered like this for ever.
    fn replay(session: &str) {
        let (_dir, path) = machine();
        let mut stream = UnixStream::connect(&path).unwrap();
        let mut answers = BufReader::new(stream.try_clone().unwrap());
        for (number, line) in session.lines().enumerate() {
            let number = number + 1;
            if let Some(sent) = line.strip_prefix("> ") {
                stream.write_all(format!("{sent}\n").as_bytes()).unwrap();
            } else if let Some(expected) = line.strip_prefix("< ") {
                let mut answer = String::new();
                answers.read_line(&mut answer).unwrap();
                let answer: Value = serde_json::from_str(&answer).unwrap();
                let expected: Value = serde_json::from_str(expected).unwrap();
                assert_eq!(answer, expected, "line {number}");
            } else if line == "closed" {
                assert_eq!(answers.read(&mut [0]).unwrap(), 0, "line {number}");
            } else {
                assert!(line.is_empty() || line.starts_with('#'), "line {number}");
            }
        }
    }

    #[test]
    fn recorded_sessions_of_version_1() {
        replay(include_str!("../../tests/control/v1-session.txt"));
        replay(include_str!("../../tests/control/v1-no-hello.txt"));
        replay(include_str!("../../tests/control/v1-other-version.txt"));
        replay(include_str!("../../tests/control/v1-malformed.txt"));
    }

    #[test]
    fn the_client_of_this_version() {
        let (_dir, path) = machine();
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.greeting().machine.as_str(), "web-1");
        let answer = client.ask(&Request::Status).unwrap();
        assert_eq!(serde_json::from_value::<Status>(answer).unwrap(), status());
        let error = client.ask(&Request::Resume).unwrap_err();
        assert_eq!(error.to_string(), "cannot resume a machine that is running");
        assert_eq!(client.ask(&Request::Pause).unwrap(), Value::Null);
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let (_dir, path) = machine();
        let mut stream = UnixStream::connect(&path).unwrap();
        let mut answers = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        // The server closes its end before all is sent.
        let _ = stream.write_all(&vec![b' '; LINE_MAX]);
        line.clear();
        answers.read_line(&mut line).unwrap();
        assert!(line.contains("too long"), "{line}");
    }
}
