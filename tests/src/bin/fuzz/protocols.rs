//! The agent's protocol, from both ends, and the control protocol.

use strata_agent::{Endpoint, Event, Exec, ExitStatus, Greeting, Message, Role, Stream};
use strata_vmm::control::{Session, Step};

use super::input::{Input, Sum};

/// Bytes arrive in pieces; what is told is taken, credit is given back, answers are sent.
pub fn agent(bytes: &[u8]) -> u64 {
    let mut input = Input::new(bytes);
    let mut sum = Sum::new();
    let role = if input.byte() & 1 == 0 {
        Role::Host
    } else {
        Role::Guest
    };
    let mut endpoint = Endpoint::new(role);
    if input.byte() & 3 != 0 {
        // Past the greeting, which most random bytes are not.
        endpoint.receive(&Greeting::OURS.to_bytes());
    }
    while !input.is_empty() {
        let count = usize::from(input.byte()) * if input.byte() & 7 == 0 { 64 } else { 1 };
        endpoint.receive(input.take(count));
        for _ in 0..1000 {
            match endpoint.next_event() {
                Ok(Some(event)) => {
                    sum.text(&format!("{:.12}", format!("{event:?}")));
                    match &event {
                        Event::Message(Message::Stdin(bytes)) => {
                            endpoint.consumed(Stream::Stdin, bytes.len())
                        }
                        Event::Message(Message::Stdout(bytes)) => {
                            endpoint.consumed(Stream::Stdout, bytes.len())
                        }
                        Event::Message(Message::Stderr(bytes)) => {
                            endpoint.consumed(Stream::Stderr, bytes.len())
                        }
                        // A guest that is asked starts what it is asked for.
                        Event::Message(Message::Exec(_))
                            if endpoint.send(&Message::Started { pid: 1 }).is_ok() =>
                        {
                            sum.add(4)
                        }
                        _ => {}
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    sum.text(&error.to_string());
                    return sum.0;
                }
            }
        }
        for message in [
            Message::Stdin(vec![1; 64]),
            Message::Stdout(vec![1; 64]),
            Message::Ping,
        ] {
            sum.add(u64::from(endpoint.send(&message).is_err()));
        }
        let waiting = endpoint.outgoing().len();
        endpoint.sent(waiting);
    }
    sum.add(u64::from(endpoint.is_over()));
    sum.0
}

pub fn agent_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![Vec::new()];
    let exec = Exec {
        argv: vec![b"ls".to_vec(), b"-l".to_vec()],
        env: vec![b"A=b".to_vec()],
        cwd: b"/".to_vec(),
        user: b"root".to_vec(),
        tty: true,
        rows: 24,
        cols: 80,
    };
    let to_guest = vec![
        Message::Exec(exec),
        Message::Stdin(b"hello".to_vec()),
        Message::Signal(2),
        Message::Resize { rows: 25, cols: 80 },
        Message::Credit {
            stream: Stream::Stdout,
            bytes: 1000,
        },
        Message::Ping,
        Message::StdinEof,
        Message::PowerOff { reboot: false },
    ];
    let to_host = vec![
        Message::Started { pid: 17 },
        Message::Stdout(b"hello".to_vec()),
        Message::Stderr(Vec::new()),
        Message::Credit {
            stream: Stream::Stdin,
            bytes: 1000,
        },
        Message::Exited(ExitStatus::Code(3)),
        Message::Unsupported { kind: 200 },
    ];
    for (role, messages) in [(0, to_host), (1, to_guest)] {
        let mut seed = vec![role, 1];
        for message in &messages {
            let mut frame = Vec::new();
            if message.encode(&mut frame).is_ok() {
                seed.extend([frame.len() as u8, 1]);
                seed.extend(&frame);
            }
        }
        seeds.push(seed);
    }
    seeds
}

/// Lines from a client.
pub fn control(bytes: &[u8]) -> u64 {
    let mut session = Session::default();
    let mut sum = Sum::new();
    for line in bytes.split(|&byte| byte == b'\n') {
        match session.line(line) {
            Step::Close(answer) => {
                sum.text(&answer);
                break;
            }
            Step::Answer(answer) => sum.text(&answer),
            Step::Ask { request, .. } => sum.text(&format!("{request:?}")),
            #[allow(unreachable_patterns)]
            _ => sum.add(3),
        }
    }
    sum.0
}

pub fn control_seeds() -> Vec<Vec<u8>> {
    let hello = r#"{"id":1,"request":"hello","version":1}"#;
    let more = [
        r#"{"id":2,"request":"status"}"#,
        r#"{"id":3,"request":"resize","columns":80,"rows":24}"#,
        r#"{"id":4,"request":"pause"}"#,
        r#"{"id":18446744073709551615,"request":"stats"}"#,
        r#"{"id":5,"request":"power-off","force":true}"#,
    ];
    let mut seeds: Vec<Vec<u8>> = more
        .iter()
        .map(|line| format!("{hello}\n{line}\n").into_bytes())
        .collect();
    seeds.push(more.join("\n").into_bytes());
    seeds.push(format!("{hello}\n{}", "[".repeat(200)).into_bytes());
    seeds
}
