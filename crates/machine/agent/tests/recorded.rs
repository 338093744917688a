//! Replays recorded sessions: what an earlier version said on the wire must still be understood, and still be said so.
//!
//! A recording is a list of steps, `host BYTES` or `guest BYTES` (non-printing bytes escaped as in Rust), each followed by
//! indented lines that name the events the other end must see. Recordings are never changed; a new version adds its own.

use std::fmt::Write;
use std::path::Path;

use strata_agent::endpoint::{Endpoint, Event, Role};

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next().unwrap() {
            b'x' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            other => other,
        });
    }
    bytes
}

fn replay(path: &Path) {
    let recording = std::fs::read_to_string(path).unwrap();
    let (mut host, mut guest) = (Endpoint::new(Role::Host), Endpoint::new(Role::Guest));
    // The greeting is that of the version that was recorded.
    host.sent(usize::MAX);
    guest.sent(usize::MAX);
    let mut lines = recording
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .peekable();
    while let Some(line) = lines.next() {
        let (sender, bytes) = line.split_once(' ').unwrap();
        let bytes = unescape(bytes);
        let (from, to) = if sender == "host" {
            (&mut host, &mut guest)
        } else {
            (&mut guest, &mut host)
        };
        to.receive(&bytes);
        let mut seen = String::new();
        let mut is_message = false;
        while let Some(event) = to.next_event().unwrap() {
            writeln!(seen, "    {event:?}").unwrap();
            if let Event::Message(message) = event {
                from.send(&message).unwrap();
                is_message = true;
            }
        }
        let mut expected = String::new();
        while let Some(event) = lines.next_if(|line| line.starts_with(' ')) {
            writeln!(expected, "{event}").unwrap();
        }
        assert_eq!(seen, expected, "{}: after {line}", path.display());
        if is_message {
            assert_eq!(
                from.outgoing().escape_ascii().to_string(),
                bytes.escape_ascii().to_string(),
                "{}",
                path.display()
            );
        }
        from.sent(usize::MAX);
    }
}

#[test]
fn all_recordings() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sessions");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        replay(&entry.unwrap().path());
        count += 1;
    }
    assert!(count >= 3);
}
