//! A network that needs no root: published ports, the way out, names, and what stays closed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use strata_tests::{Need, Session, Strata, random_bytes, ready, sha256};

/// The gateway's address, for a shell in the guest.
const GATEWAY: &str = "gw=$(ip route | awk '/^default/ {print $3}')";

/// A port of this host that nobody uses now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// Connects as soon as somebody answers.
#[track_caller]
fn connect(port: u16) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(100);
    loop {
        if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            return stream;
        }
        assert!(Instant::now() < end, "nobody listens at {port}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// A server of this host's loopback: gives `bytes` to whoever connects, then takes all and gives its digest.
fn serve(bytes: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let at = listener.local_addr().expect("it has an address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let bytes = bytes.clone();
            thread::spawn(move || {
                // A guest that gives up is the test's to notice.
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            });
        }
    });
    at
}

fn run(net: &str, script: &str) -> Strata {
    let script = format!("{GATEWAY}; {script}");
    Strata::new().args(["run", "tiny", "--net", net, "--", "sh", "-c", &script])
}

#[test]
fn a_published_port_leads_to_the_guest() {
    if !ready(Need::Machine) {
        return;
    }
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    let name = format!("published-{port}");
    let script = "mkdir /w; echo from the guest > /w/index.html; \
        dd if=/dev/urandom of=/w/blob bs=1M count=4 2>/dev/null; sha256sum < /w/blob; httpd -f -p 80 -h /w";
    let options = ["run", "tiny", "--name", &name, "-p", &publish];
    let command = options.into_iter().chain(["--", "sh", "-c", script]);
    let mut session = Session::start(&Strata::new().args(command));
    session.expect("  -\n");
    let digest = session
        .last_line()
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned();
    let get = |path: &str| {
        let mut stream = connect(port);
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("it takes a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("it answers");
        let body = answer.windows(4).position(|four| four == b"\r\n\r\n");
        answer.split_off(body.expect("a header") + 4)
    };
    let end = Instant::now() + Duration::from_secs(60);
    // The port is open before the guest's server is: until then connections are reset.
    let page = loop {
        let got = std::panic::catch_unwind(|| get("/"));
        match got {
            Ok(page) => break page,
            Err(_) => assert!(Instant::now() < end, "the guest's server does not answer"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(page, b"from the guest\n");
    assert_eq!(sha256(&get("/blob")), digest);
    let ports = Strata::new().args(["ports", &name]).run().expect(0).text();
    assert!(ports.starts_with(&format!("127.0.0.1:{port}")), "{ports}");
    assert!(ports.ends_with("80/tcp\n"), "{ports}");
    // Several at once.
    let threads: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                let mut stream = connect(port);
                let mut answer = Vec::new();
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                stream.read_to_end(&mut answer)?;
                std::io::Result::Ok(answer)
            })
        })
        .collect();
    for thread in threads {
        let answer = thread.join().expect("it ends").expect("it answers");
        assert!(answer.ends_with(b"\r\n\r\nfrom the guest\n"));
    }
    session.signal("TERM");
}

#[test]
fn what_leaves_the_guest_arrives_whole_and_comes_back() {
    if !ready(Need::Machine) {
        return;
    }
    let bytes = random_bytes(16 << 20, 11);
    let digest = sha256(&bytes);
    let port = serve(bytes).port();
    let script = format!(
        "nc $gw {port} < /dev/null | sha256sum; ping -c 2 -s 40000 $gw | grep -c 'bytes from'; \
         nslookup gateway | grep -c $gw"
    );
    let finished = run("user,host-loopback", &script).run().expect(0);
    let text = finished.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines.first().map(|line| &line[..64]),
        Some(digest.as_str()),
        "{text}"
    );
    assert_eq!(lines.get(1), Some(&"2"), "pings: {text}");
    assert!(
        lines.get(2).is_some_and(|count| *count != "0"),
        "names: {text}"
    );
}

#[test]
fn udp_goes_both_ways() {
    if !ready(Need::Machine) {
        return;
    }
    // As much of TFTP (RFC 1350) as one small file needs.
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let port = server.local_addr().expect("it has an address").port();
    thread::spawn(move || {
        let mut request = [0; 600];
        while let Ok((count, from)) = server.recv_from(&mut request) {
            if request[..count].starts_with(&[0, 1]) {
                // Who asked may be gone.
                let _ = server.send_to(b"\0\x03\0\x01over udp\n", from);
            }
        }
    });
    let script = format!("tftp -g -r file -l /tmp/file $gw {port} && cat /tmp/file");
    let finished = run("user,host-loopback", &script).run();
    assert_eq!(finished.text(), "over udp\n", "{}", finished.stderr);
}

#[test]
fn the_hosts_loopback_is_closed_unless_asked_for() {
    if !ready(Need::Machine) {
        return;
    }
    let port = serve(b"secret".to_vec()).port();
    // The gateway stands for the host: where its loopback is open, this gives what is served there. Other addresses of
    // the host's own are for a guest that asks the broker itself, which is tested beside it.
    let script = format!("nc -w 3 $gw {port} < /dev/null; echo $?");
    let text = run("user", &script).run().expect(0).text();
    assert_eq!(text, "1\n");
}

#[test]
fn without_a_network_there_is_no_card() {
    if !ready(Need::Machine) {
        return;
    }
    let command = ["run", "tiny", "--net", "none", "--", "ls", "/sys/class/net"];
    assert_eq!(Strata::new().args(command).run().expect(0).text(), "lo\n");
}

#[test]
fn ports_that_cannot_be_published_are_refused_in_a_sentence() {
    if !ready(Need::Program) {
        return;
    }
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let port = taken.local_addr().expect("it has an address").port();
    let refused = |words: &[&str]| {
        let kernel = ["run", "--kernel", "/dev/null"];
        Strata::new().args(kernel).args(words.iter().copied()).run()
    };
    refused(&["-p", &format!("{port}:80")]).expect_error(
        75,
        &["it is in use by another program; choose another port"],
    );
    refused(&["-p", "198.51.100.7:8080:80"])
        .expect_error(64, &["198.51.100.7:8080", "this host has no such address"]);
    refused(&["-p", "80"]).expect_error(64, &["[ADDRESS:]HOSTPORT:GUESTPORT"]);
    refused(&["-p", "1:2", "-p", "1:3"]).expect_error(64, &["published twice"]);
    refused(&["--net", "none", "-p", "1:2"]).expect_error(64, &["has no ports to publish"]);
    refused(&["--net", "tap"]).expect_error(66, &["there is no network 'tap'"]);
    refused(&["--net", "user", "--lockstep"])
        .expect_error(64, &["a machine in lock-step has no network"]);
}
