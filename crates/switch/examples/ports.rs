//! 64 machine ports on one switch, without guests: forwarding rate, latency and fairness, on one thread.
//!
//! Rates are per second of processor time, so that a busy host does not lower them; each frame is copied once, as out of
//! a machine's memory.
//!
//! `cargo run --release -p strata-switch --example ports [SECONDS]`

use std::net::IpAddr;
use std::time::{Duration, Instant};

use strata_switch::gateway::reply::{self, Addresses};
use strata_switch::packet::Mac;
use strata_switch::policy::{Direction, Group, GroupId, Remote, Rule, Service};
use strata_switch::ring::{Ring, Side};
use strata_switch::{
    Capabilities, Frame, Guard, Limit, NeedsChecksum, Pool, Port, PortConfig, PortId, Rate,
    Segmentation, SegmentationKind, Switch, SwitchConfig, Time,
};

const PORTS: usize = 64;
const BATCH: usize = 32;

type Error = Box<dyn std::error::Error>;

fn mac(port: usize) -> Mac {
    Mac::from_bytes(&[2, 0, 0, 0, 1, port as u8])
}

fn address(port: usize) -> IpAddr {
    IpAddr::from([10, 0, 1, port as u8])
}

fn config(port: usize, filtered: bool, capabilities: Capabilities) -> PortConfig {
    PortConfig {
        capabilities,
        addresses: vec![address(port).into()],
        guard: filtered.then(|| Guard {
            macs: vec![mac(port)],
            ..Guard::default()
        }),
        groups: filtered.then(|| vec![GroupId(1)]),
        ..PortConfig::default()
    }
}

/// A UDP frame of `len` bytes from one port's machine to another's.
fn frame(from: usize, to: usize, len: usize) -> Frame {
    let way = Addresses {
        source_mac: mac(from),
        destination_mac: mac(to),
        source: address(from),
        destination: address(to),
    };
    let payload = vec![7; len.saturating_sub(42)];
    reply::udp(&mut Pool::new(1), way, (1000, 2000), &payload).unwrap_or_default()
}

fn network(filtered: bool, capabilities: Capabilities) -> Result<(Switch, Vec<PortId>), Error> {
    let mut switch = Switch::new(SwitchConfig::default(), Time::ZERO);
    let mut ports = Vec::new();
    for port in 0..PORTS {
        ports.push(switch.add_port(config(port, filtered, capabilities), Time::ZERO)?);
    }
    let rule = Rule {
        direction: Direction::In,
        service: Service::Udp(2000..=2000),
        remote: Remote::Group(GroupId(1)),
    };
    switch.set_group(
        GroupId(1),
        Group {
            rules: vec![rule],
            members: vec![],
        },
    );
    for (port, id) in ports.iter().enumerate() {
        switch.receive(*id, frame(port, (port + 1) % PORTS, 64), Time::ZERO);
    }
    for id in &ports {
        while switch.take(*id, Time::ZERO).is_some() {}
    }
    Ok((switch, ports))
}

/// Seconds that this thread has had a CPU.
fn worked() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text
        .split(' ')
        .next()
        .and_then(|word| word.parse::<f64>().ok());
    nanos.unwrap_or(0.0) / 1e9
}

struct Rates {
    frames: f64,
    bytes: f64,
    latency: Vec<Duration>,
}

/// Every port sends a batch to another one, in turns; then every port takes what it has.
fn forward(
    what: &Frame,
    filtered: bool,
    capabilities: Capabilities,
    time: Duration,
) -> Result<Rates, Error> {
    let (mut switch, ports) = network(filtered, capabilities)?;
    let patterns: Vec<Frame> = (0..PORTS)
        .map(|port| {
            let mut one = what.clone();
            let len = one.len();
            let template = frame(port, (port + 7) % PORTS, len);
            one.bytes_mut().copy_from_slice(template.bytes());
            one
        })
        .collect();
    let (start, before) = (Instant::now(), worked());
    let (mut frames, mut bytes) = (0u64, 0u64);
    let mut latency = Vec::with_capacity(1 << 20);
    while start.elapsed() < time {
        let now = Time::from_nanos(start.elapsed().as_nanos() as u64);
        let mut sent = [Duration::ZERO; PORTS];
        for ((id, pattern), sent) in ports.iter().zip(&patterns).zip(&mut sent) {
            *sent = start.elapsed();
            for _ in 0..BATCH {
                let copy = switch.pool().duplicate(pattern);
                switch.receive(*id, copy, now);
            }
        }
        for (index, id) in ports.iter().enumerate() {
            while let Some(out) = switch.take(*id, now) {
                frames += 1;
                bytes += out.len() as u64;
                switch.pool().put(out);
            }
            let from = (index + PORTS - 7) % PORTS;
            latency.extend(
                sent.get(from)
                    .map(|sent| start.elapsed().saturating_sub(*sent)),
            );
        }
    }
    let seconds = worked() - before;
    latency.sort();
    Ok(Rates {
        frames: frames as f64 / seconds,
        bytes: bytes as f64 / seconds,
        latency,
    })
}

/// One port after the other sends a single frame, which is taken at once: what the switch itself costs a frame.
fn single(filtered: bool, count: usize) -> Result<Vec<Duration>, Error> {
    let (mut switch, ports) = network(filtered, Capabilities::ALL)?;
    let mut latency = Vec::with_capacity(count);
    let patterns: Vec<Frame> = (0..PORTS)
        .map(|port| frame(port, (port + 7) % PORTS, 64))
        .collect();
    for round in 0..count {
        let port = round % PORTS;
        let (Some(from), Some(to), Some(pattern)) = (
            ports.get(port),
            ports.get((port + 7) % PORTS),
            patterns.get(port),
        ) else {
            break;
        };
        let copy = switch.pool().duplicate(pattern);
        let start = Instant::now();
        switch.receive(*from, copy, Time::ZERO);
        let out = switch.take(*to, Time::ZERO);
        latency.push(start.elapsed());
        switch.pool().put(out.ok_or("a frame was lost")?);
    }
    latency.sort();
    Ok(latency)
}

fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let at = (sorted.len().saturating_sub(1)) as f64 * part;
    sorted
        .get(at as usize)
        .map_or(0.0, |one| one.as_secs_f64() * 1e6)
}

/// 62 ports send their fair share to one slow port, one port a hundred times that; the least and the mean share that
/// the others get, and the flooder's.
fn fairness() -> Result<(f64, f64, f64), Error> {
    let (mut switch, ports) = network(false, Capabilities::ALL)?;
    let (Some(target), Some(senders)) = (ports.last(), ports.get(..PORTS - 1)) else {
        return Err("no ports".into());
    };
    // 1 Gbit/s.
    let rate = 125_000_000u64;
    let limit = Limit {
        bytes: Some(Rate {
            per_second: rate,
            burst: 15_000,
        }),
        packets: None,
    };
    let slow = PortConfig {
        egress: limit,
        ..config(PORTS - 1, false, Capabilities::ALL)
    };
    switch.configure_port(*target, slow, Time::ZERO)?;
    let share = rate as f64 / senders.len() as f64;
    let mut received = vec![0u64; PORTS];
    let step = 1_000_000u64;
    let mut owed = 0.0;
    let steps = 2000u64;
    for tick in 0..steps {
        let now = Time::from_nanos(tick * step);
        owed += share * step as f64 / 1e9;
        let frames = (owed / 1514.0) as usize;
        owed -= frames as f64 * 1514.0;
        for (port, id) in senders.iter().enumerate() {
            let times = if port == 0 {
                (frames * 100).max(100)
            } else {
                frames
            };
            for _ in 0..times {
                let template = frame(port, PORTS - 1, 1514);
                switch.receive(*id, template, now);
            }
        }
        // The owner's thread wakes when the switch says so.
        let mut moment = now;
        while moment.nanos() < (tick + 1) * step {
            switch.tick(moment);
            while let Some(out) = switch.take(*target, moment) {
                let from = strata_switch::packet::source(out.bytes())
                    .map_or(0, |mac| usize::from(mac.0[5]));
                if let Some(sum) = received.get_mut(from) {
                    *sum += out.len() as u64;
                }
                switch.pool().put(out);
            }
            moment = switch.next_deadline();
        }
    }
    let seconds = steps as f64 * step as f64 / 1e9;
    let parts: Vec<f64> = received
        .iter()
        .map(|bytes| *bytes as f64 / seconds / share)
        .collect();
    let others = parts.get(1..PORTS - 1).unwrap_or_default();
    let least = others.iter().copied().fold(f64::INFINITY, f64::min);
    let mean = others.iter().sum::<f64>() / others.len() as f64;
    Ok((least, mean, parts.first().copied().unwrap_or(0.0)))
}

/// Eight ports send twice what a port of 1 Gbit/s takes, one of them also a frame per millisecond with a priority: how
/// long these wait, in the switch's own time.
fn priority(pcp: u8) -> Result<Vec<Duration>, Error> {
    let (mut switch, ports) = network(false, Capabilities::ALL)?;
    let (Some(target), Some(probe), Some(senders)) = (ports.last(), ports.get(1), ports.get(1..9))
    else {
        return Err("no ports".into());
    };
    let limit = Limit {
        bytes: Some(Rate {
            per_second: 125_000_000,
            burst: 1514,
        }),
        packets: None,
    };
    let slow = PortConfig {
        egress: limit,
        ..config(PORTS - 1, false, Capabilities::ALL)
    };
    switch.configure_port(*target, slow, Time::ZERO)?;
    let mut waits = Vec::new();
    let mut sent = std::collections::VecDeque::new();
    let step = 1_000_000u64;
    for tick in 0..1000u64 {
        let now = Time::from_nanos(tick * step);
        for (port, id) in senders.iter().enumerate() {
            for _ in 0..21 {
                switch.receive(*id, frame(port + 1, PORTS - 1, 1514), now);
            }
        }
        let mut marked = frame(1, PORTS - 1, 200);
        marked.push_tag(0x8100, u16::from(pcp) << 13);
        switch.receive(*probe, marked, now);
        sent.push_back(now);
        let mut moment = now;
        while moment.nanos() < (tick + 1) * step {
            switch.tick(moment);
            while let Some(out) = switch.take(*target, moment) {
                if out.len() == 200 {
                    waits.extend(sent.pop_front().map(|sent| moment.since(sent)));
                }
                switch.pool().put(out);
            }
            moment = switch.next_deadline();
        }
    }
    waits.sort();
    Ok(waits)
}

/// Machine to machine over packet rings: each frame is copied into a ring, out of it, and the same on the other side.
fn rings(what: &Frame, time: Duration) -> Result<(f64, f64), Error> {
    let (mut switch, ports) = network(false, Capabilities::ALL)?;
    let mut machines = Vec::new();
    let mut sides = Vec::new();
    for _ in 0..2 {
        let machine = Ring::create(1 << 20, Side::Machine, Capabilities::ALL)?;
        let file = machine.memory().file().try_clone_to_owned()?;
        sides.push(Ring::attach(
            file,
            1 << 20,
            Side::Switch,
            Capabilities::ALL,
        )?);
        machines.push(machine);
    }
    let mut one = what.clone();
    let template = frame(0, 1, what.len());
    one.bytes_mut().copy_from_slice(template.bytes());
    let mut pool = Pool::new(256);
    let (start, before) = (Instant::now(), worked());
    let (mut frames, mut bytes) = (0u64, 0u64);
    let ([from, to], [first, second], [port, other, ..]) =
        (&mut machines[..], &mut sides[..], &ports[..])
    else {
        return Err("no ports".into());
    };
    while start.elapsed() < time {
        for _ in 0..BATCH {
            from.push(&one)?;
        }
        while let Some(frame) = first.pop(switch.pool())? {
            switch.receive(*port, frame, Time::ZERO);
        }
        while let Some(frame) = switch.take(*other, Time::ZERO) {
            second
                .deliver(frame, Time::ZERO, switch.pool())
                .map_err(|_| "the ring is full")?;
        }
        while let Some(frame) = to.pop(&mut pool)? {
            frames += 1;
            bytes += frame.len() as u64;
            pool.put(frame);
        }
    }
    let seconds = worked() - before;
    Ok((frames as f64 / seconds, bytes as f64 / seconds))
}

fn large() -> Frame {
    let mut large = frame(0, 1, 65_000);
    large.offload.needs_checksum = Some(NeedsChecksum {
        start: 34,
        offset: 6,
    });
    large.offload.segmentation = Some(Segmentation {
        kind: SegmentationKind::Udp,
        size: 1448,
        header_len: 42,
    });
    large
}

fn main() -> Result<(), Error> {
    let seconds = std::env::args()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(1.0);
    let time = Duration::from_secs_f64(seconds);
    println!("{PORTS} ports on one switch, one thread");
    let none = Capabilities::default();
    for (name, what, filtered, capabilities) in [
        ("64 bytes", frame(0, 1, 64), false, Capabilities::ALL),
        (
            "64 bytes, guards and groups",
            frame(0, 1, 64),
            true,
            Capabilities::ALL,
        ),
        ("1514 bytes", frame(0, 1, 1514), false, Capabilities::ALL),
        (
            "1514 bytes, guards and groups",
            frame(0, 1, 1514),
            true,
            Capabilities::ALL,
        ),
        (
            "65 000 bytes, not segmented",
            large(),
            false,
            Capabilities::ALL,
        ),
        ("65 000 bytes, segmented", large(), false, none),
    ] {
        let rates = forward(&what, filtered, capabilities, time)?;
        println!(
            "{name:32} {:6.2} M frames/s {:7.1} Gbit/s   a round's wait: p50 {:.0} µs, p90 {:.0} µs",
            rates.frames / 1e6,
            rates.bytes * 8.0 / 1e9,
            percentile(&rates.latency, 0.5),
            percentile(&rates.latency, 0.9),
        );
    }
    for (name, filtered) in [
        ("one frame alone", false),
        ("one frame alone, guards and groups", true),
    ] {
        let latency = single(filtered, 1_000_000)?;
        println!(
            "{name:32} p50 {:.2} µs, p99 {:.2} µs, p99.9 {:.2} µs",
            percentile(&latency, 0.5),
            percentile(&latency, 0.99),
            percentile(&latency, 0.999)
        );
    }
    for (name, what) in [
        ("64 bytes", frame(0, 1, 64)),
        ("1514 bytes", frame(0, 1, 1514)),
        ("65 000 bytes", large()),
    ] {
        let (frames, bytes) = rings(&what, time)?;
        println!(
            "ring to ring, {name:18} {:6.2} M frames/s {:7.1} Gbit/s",
            frames / 1e6,
            bytes * 8.0 / 1e9
        );
    }
    for pcp in [0, 1, 5, 6] {
        let waits = priority(pcp)?;
        println!(
            "a frame of priority {pcp} at a port with twice its load: p50 {:.0} µs, p99 {:.0} µs ({} of 1000 passed)",
            percentile(&waits, 0.5),
            percentile(&waits, 0.99),
            waits.len()
        );
    }
    let (least, mean, flooder) = fairness()?;
    println!(
        "62 ports send their share of 1 Gbit/s, one floods: the others get {:.1} % (least {:.1} %), it gets {:.1} %",
        mean * 100.0,
        least * 100.0,
        flooder * 100.0
    );
    Ok(())
}
