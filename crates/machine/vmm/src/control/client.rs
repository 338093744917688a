//! The other side of the control socket: what `strata stats` and friends use.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::protocol::{Failure, Greeting, PROTOCOL, Request, VERSION};

/// Longest answer in bytes.
const ANSWER_MAX: u64 = 4 << 20;
/// How long a machine may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a machine's control socket.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    greeting: Greeting,
    next_id: u64,
}

/// Why a request had no success.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach the machine at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke or the machine took too long.
    #[error("the machine does not answer")]
    Broken(#[source] io::Error),
    /// It is something else, or speaks another version.
    #[error("the machine does not speak version {VERSION} of the control protocol")]
    Protocol,
    /// The machine refused.
    #[error(transparent)]
    Refused(#[from] Failure),
}

impl Client {
    /// Connects and exchanges greetings.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let timeouts = stream
            .set_read_timeout(Some(TIMEOUT))
            .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)));
        timeouts.map_err(ClientError::Broken)?;
        let mut stream = BufReader::new(stream);
        let greeting = read_line(&mut stream)?;
        let greeting: Greeting =
            serde_json::from_value(greeting).map_err(|_| ClientError::Protocol)?;
        if greeting.protocol != PROTOCOL || greeting.version < VERSION {
            return Err(ClientError::Protocol);
        }
        let mut client = Self {
            stream,
            greeting,
            next_id: 1,
        };
        client.exchange(json!({ "request": "hello", "version": VERSION }))?;
        Ok(client)
    }

    /// What the machine said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Value, ClientError> {
        self.exchange(json!(request))
    }

    fn exchange(&mut self, mut message: Value) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        if let Some(fields) = message.as_object_mut() {
            fields.insert("id".to_owned(), json!(id));
        }
        let line = format!("{message}\n");
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        sent.map_err(ClientError::Broken)?;
        let mut answer = read_line(&mut self.stream)?;
        if let Some(error) = answer.get_mut("error") {
            let failure: Result<Failure, _> = serde_json::from_value(error.take());
            return Err(failure.map_or(ClientError::Protocol, ClientError::Refused));
        }
        match answer.get_mut("ok") {
            Some(value) => Ok(value.take()),
            None => Err(ClientError::Protocol),
        }
    }
}

fn read_line(stream: &mut BufReader<UnixStream>) -> Result<Value, ClientError> {
    let mut line = Vec::new();
    let read = stream.take(ANSWER_MAX).read_until(b'\n', &mut line);
    read.map_err(ClientError::Broken)?;
    if line.is_empty() {
        return Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&line).map_err(|_| ClientError::Protocol)
}
