//! Tests of the state machine: order, credit, and what a bad peer can do.

use super::*;
use crate::message::{DATA_SIZE_MAX, Exec, ExitStatus};
use proptest::prelude::*;

/// Moves all bytes there are, in both directions, and returns what each end saw.
fn exchange(
    host: &mut Endpoint,
    guest: &mut Endpoint,
) -> Result<(Vec<Event>, Vec<Event>), ProtocolError> {
    let (mut at_host, mut at_guest) = (Vec::new(), Vec::new());
    while !host.outgoing().is_empty() || !guest.outgoing().is_empty() {
        deliver(host, guest, &mut at_guest)?;
        deliver(guest, host, &mut at_host)?;
    }
    Ok((at_host, at_guest))
}

fn deliver(
    from: &mut Endpoint,
    to: &mut Endpoint,
    seen: &mut Vec<Event>,
) -> Result<(), ProtocolError> {
    to.receive(from.outgoing());
    from.sent(usize::MAX);
    while let Some(event) = to.next_event()? {
        seen.push(event);
    }
    Ok(())
}

fn pair() -> (Endpoint, Endpoint) {
    let (mut host, mut guest) = (Endpoint::new(Role::Host), Endpoint::new(Role::Guest));
    let greeted = vec![Event::Greeted {
        version: 1,
        capabilities: 0,
    }];
    assert_eq!(
        exchange(&mut host, &mut guest),
        Ok((greeted.clone(), greeted))
    );
    (host, guest)
}

fn running() -> (Endpoint, Endpoint) {
    let (mut host, mut guest) = pair();
    host.send(&exec()).unwrap();
    exchange(&mut host, &mut guest).unwrap();
    guest.send(&Message::Started { pid: 7 }).unwrap();
    exchange(&mut host, &mut guest).unwrap();
    (host, guest)
}

fn exec() -> Message {
    Message::Exec(Exec {
        argv: vec![b"true".to_vec()],
        ..Exec::default()
    })
}

#[test]
fn a_whole_session() {
    let (mut host, mut guest) = running();
    host.send(&Message::Stdin(b"in".to_vec())).unwrap();
    host.send(&Message::StdinEof).unwrap();
    guest.send(&Message::Stdout(b"out".to_vec())).unwrap();
    guest.send(&Message::Exited(ExitStatus::Code(3))).unwrap();
    let (at_host, at_guest) = exchange(&mut host, &mut guest).unwrap();
    let message = Event::Message;
    assert_eq!(
        at_host,
        [
            message(Message::Stdout(b"out".to_vec())),
            message(Message::Exited(ExitStatus::Code(3)))
        ]
    );
    // The guest had sent the end before the input came.
    assert_eq!(at_guest, []);
    assert!(host.is_over() && guest.is_over());
}

#[test]
fn questions_have_one_answer_each() {
    let (mut host, mut guest) = pair();
    for (question, answer) in [
        (Message::Ping, Message::Pong),
        (
            Message::TimeStepped { ns: -5 },
            Message::Unsupported { kind: 0x0a },
        ),
        (Message::PowerOff { reboot: false }, Message::Done),
    ] {
        host.send(&question).unwrap();
        assert_eq!(
            host.send(&Message::Ping),
            Err(ProtocolError::OutOfOrder(0x07))
        );
        exchange(&mut host, &mut guest).unwrap();
        guest.send(&answer).unwrap();
        assert_eq!(
            exchange(&mut host, &mut guest).unwrap().0,
            [Event::Message(answer)]
        );
    }
}

#[test]
fn unknown_kinds() {
    let (_, mut guest) = pair();
    guest.receive(&[2, 0, 0, 0, 0x85, 9, 1, 0, 0, 0, 0x30]);
    assert_eq!(guest.next_event(), Ok(None));
    assert_eq!(guest.outgoing(), [2, 0, 0, 0, 0x48, 0x30]);
    let (mut host, _) = pair();
    host.receive(&[1, 0, 0, 0, 0x30]);
    assert_eq!(host.next_event(), Err(ProtocolError::UnknownKind(0x30)));
}

#[test]
fn what_is_out_of_order_is_refused() {
    let (mut host, _) = pair();
    assert_eq!(
        host.send(&Message::Stdin(vec![1])),
        Err(ProtocolError::OutOfOrder(0x02))
    );
    assert_eq!(
        host.send(&Message::Pong),
        Err(ProtocolError::OutOfOrder(0x46))
    );
    let (mut host, mut guest) = running();
    assert_eq!(host.send(&exec()), Err(ProtocolError::OutOfOrder(0x01)));
    guest.send(&Message::Exited(ExitStatus::Signal(9))).unwrap();
    assert_eq!(
        guest.send(&Message::Stdout(vec![1])),
        Err(ProtocolError::OutOfOrder(0x43))
    );
    let mut frame = Vec::new();
    Message::Ping.encode(&mut frame).unwrap();
    host.receive(&frame);
    assert_eq!(host.next_event(), Err(ProtocolError::OutOfOrder(0x07)));
}

#[test]
fn data_needs_credit() {
    let (mut host, mut guest) = running();
    let piece = Message::Stdout(vec![0; DATA_SIZE_MAX]);
    for _ in 0..WINDOW / DATA_SIZE_MAX {
        guest.send(&piece).unwrap();
    }
    assert_eq!(
        guest.send(&Message::Stdout(vec![0])),
        Err(ProtocolError::NoCredit(Stream::Stdout))
    );
    // Another stream has its own.
    guest.send(&Message::Stderr(vec![0])).unwrap();
    exchange(&mut host, &mut guest).unwrap();
    host.consumed(Stream::Stdout, WINDOW / 2 - 1);
    assert_eq!(host.outgoing(), []);
    host.consumed(Stream::Stdout, 1);
    let (_, at_guest) = exchange(&mut host, &mut guest).unwrap();
    assert_eq!(at_guest, [Event::Credit(Stream::Stdout)]);
    assert_eq!(guest.credit(Stream::Stdout), WINDOW / 2);
}

#[test]
fn a_peer_without_credit_is_cut_off() {
    let (mut host, mut guest) = running();
    let piece = Message::Stdin(vec![0; DATA_SIZE_MAX]);
    let mut frame = Vec::new();
    for _ in 0..=WINDOW / DATA_SIZE_MAX {
        piece.encode(&mut frame).unwrap();
    }
    guest.receive(&frame);
    let result =
        std::iter::repeat_with(|| guest.next_event()).find(|result| !matches!(result, Ok(Some(_))));
    assert_eq!(result, Some(Err(ProtocolError::NoCredit(Stream::Stdin))));
    host.send(&Message::StdinEof).unwrap();
    assert_eq!(
        host.send(&Message::Stdin(vec![1])),
        Err(ProtocolError::NoCredit(Stream::Stdin))
    );
}

#[test]
fn what_is_no_agent_is_noticed_early() {
    let mut host = Endpoint::new(Role::Host);
    host.receive(b"Str");
    assert_eq!(host.next_event(), Ok(None));
    host.receive(b"ing");
    assert_eq!(host.next_event(), Err(ProtocolError::NotAnAgent));
}

proptest! {
    /// However the bytes are cut, the same events come out.
    #[test]
    fn pieces_do_not_matter(pieces in proptest::collection::vec(1usize..40, 1..60)) {
        let (mut host, _) = pair();
        host.send(&Message::Exec(Exec { argv: vec![b"cat".to_vec(), vec![b'x'; 300]], ..Exec::default() })).unwrap();
        host.send(&Message::Stdin(vec![5; 100])).unwrap();
        host.send(&Message::Signal(15)).unwrap();
        let bytes = host.outgoing().to_vec();
        let (_, mut guest) = pair();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        for size in pieces.iter().cycle() {
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            rest = after;
            guest.receive(piece);
            while let Some(event) = guest.next_event().unwrap() {
                events.push(event);
            }
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(events.len(), 3);
    }

    /// Any bytes at all end in an error or in waiting, with bounded memory.
    #[test]
    fn noise_does_no_harm(role: bool, greeted: bool, noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut end = Endpoint::new(if role { Role::Host } else { Role::Guest });
        if greeted {
            end.receive(&Greeting::OURS.to_bytes());
        }
        end.receive(&noise);
        while let Ok(Some(_)) = end.next_event() {}
        prop_assert!(end.outgoing().len() < 2000);
    }

    /// Messages in any order, from a peer that knows no rules.
    #[test]
    fn lawless_peers_do_no_harm(role: bool, messages in proptest::collection::vec(crate::message::tests::message(), 0..20)) {
        let mut end = Endpoint::new(if role { Role::Host } else { Role::Guest });
        end.receive(&Greeting::OURS.to_bytes());
        for message in messages {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            end.receive(&frame);
            while let Ok(Some(_)) = end.next_event() {}
        }
    }
}
