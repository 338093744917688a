//! Sessions of the agent, served in this process over a socket pair, asked by the host's client.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use strata_agent::{Client, ClientError, Exec, ExitStatus, FailReason, Output, Process};
use strata_init::session;
use strata_init::system::Ending;

type Served = JoinHandle<std::io::Result<Option<Ending>>>;

fn connect() -> (Client<UnixStream>, Served) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let served = thread::spawn(move || session::serve(OwnedFd::from(theirs)));
    let writer = ours.try_clone().unwrap();
    (Client::greet(ours, writer).unwrap(), served)
}

fn command(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
        ..Exec::default()
    }
}

fn shell(script: &str) -> Exec {
    command(&["/bin/sh", "-c", script])
}

fn start(exec: Exec) -> Process<UnixStream> {
    connect().0.exec(exec).unwrap()
}

/// All output and the end of a program.
fn finish(mut process: Process<UnixStream>) -> (String, String, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match process.next_output().unwrap() {
            Output::Stdout(data) => stdout.extend(data),
            Output::Stderr(data) => stderr.extend(data),
            Output::Exited(status) => {
                return (
                    String::from_utf8(stdout).unwrap(),
                    String::from_utf8(stderr).unwrap(),
                    status,
                );
            }
        }
    }
}

fn run(exec: Exec) -> (String, String, ExitStatus) {
    let process = start(exec);
    process.input().end().unwrap();
    finish(process)
}

fn text(stdout: &str) -> (String, String, ExitStatus) {
    (stdout.to_owned(), String::new(), ExitStatus::Code(0))
}

#[test]
fn streams_are_separate_and_the_status_comes_back() {
    let expected = ("out\n".to_owned(), "err\n".to_owned(), ExitStatus::Code(7));
    assert_eq!(run(shell("echo out; echo err >&2; exit 7")), expected);
    assert_eq!(run(shell("kill -9 $$")).2, ExitStatus::Signal(9));
}

#[test]
fn environment_and_directory() {
    let exec = Exec {
        env: vec![b"GREETING=a b".to_vec(), b"HOME=/elsewhere".to_vec()],
        ..shell("echo $GREETING $HOME $USER; pwd")
    };
    assert_eq!(run(exec), text("a b /elsewhere root\n/\n"));
    let exec = Exec {
        cwd: b"/usr".to_vec(),
        ..command(&["pwd"])
    };
    assert_eq!(run(exec), text("/usr\n"));
}

#[test]
fn what_cannot_start() {
    let fails = |exec: Exec| match connect().0.exec(exec) {
        Err(ClientError::Failed { reason, text }) => (reason, text),
        _ => panic!("it started"),
    };
    assert_eq!(
        fails(command(&["no-such-program"])),
        (FailReason::NotFound, "no-such-program: not found".into())
    );
    assert_eq!(
        fails(command(&["/etc/passwd"])),
        (
            FailReason::NotExecutable,
            "/etc/passwd: not executable".into()
        )
    );
    assert_eq!(fails(command(&["/"])).0, FailReason::NotExecutable);
    assert_eq!(fails(command(&[""])).0, FailReason::NotFound);
    let exec = Exec {
        cwd: b"/no/such".to_vec(),
        ..command(&["true"])
    };
    assert_eq!(
        fails(exec),
        (FailReason::Other, "/no/such: no such directory".into())
    );
    let exec = Exec {
        user: b"nobody-at-all".to_vec(),
        ..command(&["true"])
    };
    assert_eq!(
        fails(exec),
        (FailReason::Other, "there is no user 'nobody-at-all'".into())
    );
}

#[test]
fn much_data_both_ways() {
    const SIZE: usize = 8 << 20;
    let mut process = start(command(&["cat"]));
    let input = process.input();
    let sent: Vec<u8> = (0..SIZE).map(|n| (n * n / 128) as u8).collect();
    let source = sent.clone();
    let writer = thread::spawn(move || input.pump(source.as_slice()).unwrap());
    let mut received = Vec::new();
    while let Output::Stdout(data) = process.next_output().unwrap() {
        received.extend(data);
    }
    writer.join().unwrap();
    assert!(received == sent);
}

#[test]
fn a_slow_reader_holds_the_program_up_and_loses_nothing() {
    let mut process = start(shell("head -c 3000000 /dev/zero; echo end >&2"));
    thread::sleep(Duration::from_millis(100));
    let (mut stdout, mut stderr) = (0, 0);
    loop {
        match process.next_output().unwrap() {
            Output::Stdout(data) => stdout += data.len(),
            Output::Stderr(data) => stderr += data.len(),
            Output::Exited(status) => {
                assert_eq!(
                    (stdout, stderr, status),
                    (3_000_000, 4, ExitStatus::Code(0))
                );
                break;
            }
        }
    }
}

#[test]
fn input_nobody_reads_is_no_obstacle() {
    let process = start(shell("exec <&-; sleep 0.1; echo done"));
    let input = process.input();
    let writer = thread::spawn(move || input.pump(std::io::repeat(1).take(4 << 20)));
    assert_eq!(finish(process), text("done\n"));
    // Either all of it was swallowed or the program ended first.
    let _ = writer.join().unwrap();
}

#[test]
fn signals_arrive() {
    let mut process = start(shell(
        "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.01; done",
    ));
    assert_eq!(
        process.next_output().unwrap(),
        Output::Stdout(b"ready\n".to_vec())
    );
    process.input().signal(15).unwrap();
    // On the error stream the shell may say that its child was terminated, too.
    let (stdout, _, status) = finish(process);
    assert_eq!((stdout.as_str(), status), ("caught\n", ExitStatus::Code(3)));
    let process = start(command(&["sleep", "100"]));
    process.input().signal(2).unwrap();
    assert_eq!(finish(process).2, ExitStatus::Signal(2));
}

#[test]
fn a_child_that_keeps_the_streams_does_not_hold_up_the_end() {
    let begin = Instant::now();
    assert_eq!(run(shell("sleep 5 & echo done")), text("done\n"));
    assert!(begin.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_terminal() {
    let tty = |script: &str| Exec {
        tty: true,
        rows: 33,
        cols: 99,
        ..shell(script)
    };
    let (out, err, status) = run(tty("tty >/dev/null && echo yes >&2; stty size; cat"));
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("yes\r\n33 99\r\n", "", ExitStatus::Code(0))
    );

    let mut process = start(tty(
        "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done",
    ));
    assert_eq!(
        process.next_output().unwrap(),
        Output::Stdout(b"ready\r\n".to_vec())
    );
    process.input().resize(10, 20).unwrap();
    assert_eq!(finish(process).0, "10 20\r\n");
}

#[test]
fn a_terminals_interrupt_key_and_end_of_input() {
    let tty = |script: &str| Exec {
        tty: true,
        ..shell(script)
    };
    let mut process = start(tty(
        "stty -echo; trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.01; done",
    ));
    assert_eq!(
        process.next_output().unwrap(),
        Output::Stdout(b"ready\r\n".to_vec())
    );
    process.input().write(b"\x03").unwrap();
    let (out, _, status) = finish(process);
    assert_eq!(
        (out.as_str(), status),
        ("interrupted\r\n", ExitStatus::Code(9))
    );

    let mut process = start(tty("stty -echo; echo ready; wc -c"));
    assert_eq!(
        process.next_output().unwrap(),
        Output::Stdout(b"ready\r\n".to_vec())
    );
    process.input().write(b"half a line").unwrap();
    process.input().end().unwrap();
    assert_eq!(finish(process).0.trim(), "11");
}

#[test]
fn a_program_dies_with_its_host() {
    let (client, served) = connect();
    let mut process = client.exec(shell("echo $$; exec sleep 100")).unwrap();
    let Output::Stdout(pid) = process.next_output().unwrap() else {
        panic!("no output")
    };
    let pid: i32 = String::from_utf8(pid).unwrap().trim().parse().unwrap();
    // Both descriptors of our end have to go for the agent to see it.
    drop(process);
    assert_eq!(served.join().unwrap().unwrap(), None);
    assert!(strata_init::system::kill(pid, 0).is_err());
}

#[test]
fn questions() {
    let (mut client, served) = connect();
    client.ping().unwrap();
    client.ping().unwrap();
    client.power_off(true).unwrap();
    assert_eq!(served.join().unwrap().unwrap(), Some(Ending::Reboot));
}

#[test]
fn a_peer_that_is_no_host_is_turned_away() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let served = thread::spawn(move || session::serve(OwnedFd::from(theirs)));
    std::io::Write::write_all(&mut ours, b"GET / HTTP/1.1\r\n").unwrap();
    assert!(served.join().unwrap().is_err());
    let mut rest = Vec::new();
    let _ = ours.read_to_end(&mut rest);
    assert!(rest.len() <= 16);
}
