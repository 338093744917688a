//! The control protocol without its socket: lines in, lines and requests out.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Publish;
use crate::{ByteSize, InstanceState, MachineName};

/// The protocol's name in the greeting.
pub const PROTOCOL: &str = "strata-control";
/// The newest version spoken here.
pub const VERSION: u32 = 1;
/// Longest line in bytes, with its end.
pub const LINE_MAX: usize = 64 << 10;
/// The requests of this version besides `hello`, as the greeting lists them.
pub const CAPABILITIES: [&str; 6] = ["status", "stats", "pause", "resume", "power-off", "resize"];

/// The first line of a connection.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROTOCOL`].
    pub protocol: String,
    /// [`VERSION`].
    pub version: u32,
    /// Requests that are understood.
    pub capabilities: Vec<String>,
    /// Who speaks.
    pub machine: MachineName,
}

impl Greeting {
    /// The greeting of this version.
    pub fn new(machine: MachineName) -> Self {
        Self {
            protocol: PROTOCOL.to_owned(),
            version: VERSION,
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            machine,
        }
    }
}

/// What a client may ask once it has said `hello`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// What the machine is and does; answered by [`Status`].
    Status,
    /// What its vCPUs did so far; answered by the counters of each.
    Stats,
    /// Let its time stand still.
    Pause,
    /// Let its time go on.
    Resume,
    /// End it at once, as if its cord were pulled.
    PowerOff,
    /// The window of its console has another size now.
    Resize {
        /// Width in characters.
        columns: u16,
        /// Height in characters.
        rows: u16,
    },
}

/// The answer to [`Request::Status`].
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// The machine's name.
    pub name: MachineName,
    /// Where it is in its life.
    pub state: InstanceState,
    /// The engine that runs it.
    pub engine: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory: ByteSize,
    /// Milliseconds of machine time, pauses left out.
    pub uptime_ms: u64,
    /// How often the guest restarted the machine.
    pub reboots: u64,
    /// Ports of the host that lead to the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Publish>,
}

/// Why a request was not done.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What a program can tell apart.
    pub kind: ErrorKind,
    /// One sentence for people.
    pub message: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The line is no JSON object with an id and a request.
    Malformed,
    /// There is no such request in this version.
    UnknownRequest,
    /// The first request was not `hello`.
    NoHello,
    /// The client speaks a version that is not spoken here.
    UnknownVersion,
    /// Not possible in the machine's present state.
    WrongState,
    /// The machine could not do it.
    Failed,
}

impl Failure {
    /// A failure of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

/// What a line leads to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Step {
    /// Send this line.
    Answer(String),
    /// Do this, then send what [`Session::answer`] makes of the result.
    Ask {
        /// The client's number for it.
        id: u64,
        /// What to do.
        request: Request,
    },
    /// Send this line and close the connection.
    Close(String),
}

/// One connection's state on the machine's side.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Session {
    greeted: bool,
}

impl Session {
    /// What to do about a line from the client.
    pub fn line(&mut self, line: &[u8]) -> Step {
        let message: Value = match serde_json::from_slice(line) {
            Ok(message) => message,
            Err(_) => return Step::Close(refusal(None, malformed())),
        };
        let id = message.get("id").and_then(Value::as_u64);
        let name = message.get("request").and_then(Value::as_str);
        let (Some(id), Some(name)) = (id, name) else {
            return Step::Close(refusal(id, malformed()));
        };
        if name == "hello" {
            return self.hello(id, message.get("version").and_then(Value::as_u64));
        }
        if !self.greeted {
            let failure = Failure::new(ErrorKind::NoHello, "the first request must be 'hello'");
            return Step::Close(refusal(Some(id), failure));
        }
        if !CAPABILITIES.contains(&name) {
            let message = format!("there is no request '{name}'");
            let failure = Failure::new(ErrorKind::UnknownRequest, message);
            return Step::Answer(refusal(Some(id), failure));
        }
        match serde_json::from_value(message) {
            Ok(request) => Step::Ask { id, request },
            Err(error) => {
                let failure = Failure::new(ErrorKind::Malformed, error.to_string());
                Step::Answer(refusal(Some(id), failure))
            }
        }
    }

    /// The line that answers a request.
    pub fn answer(id: u64, result: Result<Value, Failure>) -> String {
        match result {
            Ok(value) => json!({ "id": id, "ok": value }).to_string(),
            Err(failure) => refusal(Some(id), failure),
        }
    }

    fn hello(&mut self, id: u64, version: Option<u64>) -> Step {
        if version == Some(u64::from(VERSION)) {
            self.greeted = true;
            return Step::Answer(Self::answer(id, Ok(json!({ "version": VERSION }))));
        }
        let message = format!("only version {VERSION} of the protocol is spoken here");
        let failure = Failure::new(ErrorKind::UnknownVersion, message);
        Step::Close(refusal(Some(id), failure))
    }
}

fn malformed() -> Failure {
    Failure::new(
        ErrorKind::Malformed,
        "a request is one line of JSON with a number 'id' and a text 'request'",
    )
}

fn refusal(id: Option<u64>, failure: Failure) -> String {
    json!({ "id": id, "error": failure }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn greeted() -> Session {
        Session { greeted: true }
    }

    #[test]
    fn requests_are_understood() {
        let check = |line: &str, id, request| {
            assert_eq!(
                greeted().line(line.as_bytes()),
                Step::Ask { id, request },
                "{line}"
            );
        };
        check(r#"{"id":1,"request":"status"}"#, 1, Request::Status);
        check(
            r#"{"id":1,"request":"power-off","later":[]}"#,
            1,
            Request::PowerOff,
        );
        let resize = Request::Resize {
            columns: 80,
            rows: 25,
        };
        check(
            r#"{"id":9,"request":"resize","columns":80,"rows":25}"#,
            9,
            resize,
        );
    }

    #[test]
    fn every_capability_is_a_request() {
        for name in CAPABILITIES {
            let line =
                format!(r#"{{"id":1,"request":"{name}","columns":1,"rows":1}}"#).into_bytes();
            assert!(matches!(greeted().line(&line), Step::Ask { .. }), "{name}");
        }
    }

    proptest! {
        /// Whatever bytes come, the session answers with one line of JSON or a request.
        #[test]
        fn no_line_panics(line: Vec<u8>, greeted: bool) {
            check_line(Session { greeted }, &line)?;
        }

        /// The same for lines that look like requests.
        #[test]
        fn no_near_request_panics(
            id in "[0-9]{1,20}|-1|null|\"x\"|1e400",
            name in "[a-z-]{0,9}|status|stats|resize|hello|power-off",
            field in "version|columns|rows|x",
            value in "[0-9]{1,6}|null|\\{\\}|\"a\"",
            cut in 0usize..90,
        ) {
            let line = format!(r#"{{"id":{id},"request":"{name}","{field}":{value}}}"#);
            check_line(Session { greeted: true }, line.as_bytes())?;
            let cut = cut.min(line.len());
            check_line(Session::default(), &line.as_bytes()[..cut])?;
        }
    }

    fn check_line(mut session: Session, line: &[u8]) -> Result<(), TestCaseError> {
        if let Step::Answer(text) | Step::Close(text) = session.line(line) {
            prop_assert!(!text.contains('\n'));
            let value: Value = serde_json::from_str(&text).unwrap();
            prop_assert!(value.get("ok").is_some() != value.get("error").is_some());
        }
        Ok(())
    }
}
