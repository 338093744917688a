//! Tests of the network device through the fake driver.

use std::collections::VecDeque;

use proptest::prelude::*;
use strata_switch::{NeedsChecksum, Segmentation};

use super::*;
use crate::virtio::testutil::{Driver, Used};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX: u16 = 0;
const TX: u16 = 1;
const NO_HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const BASE: u64 = feature::MAC | feature::STATUS | feature::MTU;

fn card(pairs: u16) -> (Driver, NetHost) {
    let options = NetOptions {
        mac: MAC,
        mtu: 65_000,
        pairs,
    };
    let (net, host) = Net::new(options).unwrap();
    (Driver::new(net), host)
}

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    bytes[..6].copy_from_slice(&to);
    bytes[12..14].copy_from_slice(&[0x08, 0x00]);
    bytes
}

fn plain(bytes: Vec<u8>) -> Frame {
    Frame::new(&bytes)
}

/// Gives frames to the guest; returns what stays.
fn send(host: &NetHost, frames: Vec<Frame>) -> usize {
    let mut waiting = VecDeque::from(frames);
    let mut pool = Pool::new(8);
    let end = host.exchange(&mut waiting, &mut VecDeque::new(), &mut pool);
    assert_ne!(end, Exchange::Closed);
    waiting.len()
}

fn received(host: &NetHost) -> Vec<Frame> {
    let mut frames = VecDeque::new();
    let mut pool = Pool::new(8);
    while host.exchange(&mut VecDeque::new(), &mut frames, &mut pool) == Exchange::More {}
    frames.into()
}

fn same(frames: &[Frame], bytes: &[u8]) -> bool {
    matches!(frames, [frame] if frame.bytes() == bytes && frame.offload == Offload::default())
}

fn rings(host: &NetHost) -> bool {
    let mut count = [0; 8];
    rustix::io::read(host.doorbell(), &mut count).is_ok()
}

fn control(driver: &mut Driver, queue: u16, command: &[u8]) -> u8 {
    driver.request(queue, &[command], &[1]).bytes[0]
}

#[test]
fn the_configuration_says_what_the_card_is() {
    let (driver, host) = card(2);
    assert_eq!(driver.config(0, 6), MAC);
    let rest = [1, 0, 2, 0, 0xe8, 0xfd, 0xff, 0xff, 0xff, 0xff, 1];
    assert_eq!(driver.config(6, 11), rest);
    host.set_link(false);
    assert_eq!(driver.config(6, 2), [1, 0], "no driver, no change yet");
}

#[test]
fn frames_go_out_when_the_host_comes_for_them() {
    let (mut driver, host) = card(1);
    driver.start(BASE);
    rings(&host);
    let bytes = frame([0xff; 6], 100);
    let token = driver.submit(TX, &[&NO_HEADER, &bytes[..60], &bytes[60..]], &[]);
    assert!(rings(&host), "the doorbell wakes the host");
    assert!(driver.used(TX, token).is_none(), "nobody else moves frames");
    assert!(same(&received(&host), &bytes));
    assert!(driver.used(TX, token).is_some());
    assert_eq!(host.counters().frames_from_guest, 1);
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let (mut driver, host) = card(1);
    driver.start(BASE | feature::CSUM | feature::HOST_TSO4);
    let bytes = frame(MAC, 200);
    let needs = |start: u16, offset: u16, gso: u8, size: u16| {
        let mut header = NO_HEADER;
        header[0] = 1;
        header[1] = gso;
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
        header
    };
    let mut no_checksum = needs(34, 16, 1, 1000);
    no_checksum[0] = 0;
    let bad: [(&[u8], &[u8]); 9] = [
        (&NO_HEADER[..5], &[]),
        (&NO_HEADER, &bytes[..13]),
        (&needs(199, 0, 0, 0), &bytes),
        (&needs(0xffff, 0xffff, 0, 0), &bytes),
        (&needs(34, 16, 1, 0), &bytes),
        (&no_checksum, &bytes),
        (&needs(34, 16, 3, 1000), &bytes),
        // Not agreed on.
        (&needs(34, 16, 4, 1000), &bytes),
        (&needs(34, 16, 0x81, 1000), &bytes),
    ];
    for (at, (header, bytes)) in bad.into_iter().enumerate() {
        driver.submit(TX, &[header, bytes], &[]);
        assert_eq!(received(&host), [], "{at}");
        assert_eq!(host.counters().malformed_from_guest, at as u64 + 1);
    }
    let big = vec![0; MAX_FRAME + 1];
    driver.submit(TX, &[&NO_HEADER, &big], &[]);
    assert_eq!(received(&host), []);
    driver.submit(TX, &[&needs(34, 16, 1, 1000), &bytes], &[]);
    let [one] = &received(&host)[..] else {
        panic!("it is well-formed");
    };
    let segmentation = Segmentation {
        kind: SegmentationKind::Tcp4,
        size: 1000,
        header_len: 0,
    };
    assert_eq!(one.offload.segmentation, Some(segmentation));
    let missing = NeedsChecksum {
        start: 34,
        offset: 16,
    };
    assert_eq!(one.offload.needs_checksum, Some(missing));
    assert!(driver.core().fault().is_none());
}

fn parts(driver: &mut Driver, tokens: &[crate::virtio::testutil::Token]) -> Vec<Used> {
    tokens
        .iter()
        .map_while(|token| driver.used(RX, *token))
        .collect()
}

#[test]
fn a_large_frame_takes_as_many_buffers_as_it_needs() {
    let (mut driver, host) = card(1);
    driver.start(BASE | feature::MRG_RXBUF);
    let bytes = frame(MAC, 5000);
    let two: Vec<_> = (0..2).map(|_| driver.offer(RX, &[], &[1500])).collect();
    assert_eq!(send(&host, vec![plain(bytes.clone())]), 1, "it waits");
    assert!(parts(&mut driver, &two).is_empty());
    let mut tokens = two;
    tokens.extend((0..3).map(|_| driver.offer(RX, &[], &[1500])));
    assert_eq!(send(&host, vec![plain(bytes.clone())]), 0);
    let used = parts(&mut driver, &tokens);
    assert_eq!(used.len(), 4, "the fifth is not needed");
    let all: Vec<u8> = used.iter().flat_map(|used| used.bytes.clone()).collect();
    assert_eq!(all[..HEADER_BYTES], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
    assert_eq!(all[HEADER_BYTES..], bytes);
}

#[test]
fn without_merging_a_frame_needs_one_buffer() {
    let (mut driver, host) = card(1);
    driver.start(BASE);
    let small = driver.offer(RX, &[], &[100]);
    let large = driver.offer(RX, &[], &[600, 600]);
    let bytes = frame(MAC, 1000);
    assert_eq!(send(&host, vec![plain(bytes.clone())]), 0);
    assert_eq!(driver.used(RX, small).unwrap().written, 0);
    assert_eq!(host.counters().misfit_to_guest, 1);
    assert_eq!(send(&host, vec![plain(bytes.clone())]), 0);
    assert_eq!(
        driver.used(RX, large).unwrap().bytes[HEADER_BYTES..],
        bytes[..]
    );
}

#[test]
fn what_the_driver_does_not_offload_is_done_for_it() {
    let offload = Offload {
        needs_checksum: Some(NeedsChecksum {
            start: 34,
            offset: 16,
        }),
        ..Offload::default()
    };
    let mut bytes = frame(MAC, 55);
    bytes[34..].fill(1);
    bytes[50..52].fill(0);
    let with = |features| {
        let (mut driver, host) = card(1);
        driver.start(BASE | features);
        let token = driver.offer(RX, &[], &[2000]);
        let mut frame = plain(bytes.clone());
        frame.offload = offload;
        assert_eq!(send(&host, vec![frame]), 0);
        driver.used(RX, token).map(|used| used.bytes)
    };
    let left = with(feature::GUEST_CSUM).unwrap();
    assert_eq!((left[0], &left[12 + 50..12 + 52]), (1, &[0, 0][..]));
    let done = with(0).unwrap();
    assert_eq!(done[0], 0);
    let sum: u32 = done[12 + 34..]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);

    let (mut driver, host) = card(1);
    driver.start(BASE | feature::GUEST_CSUM);
    assert!(host.capabilities().checksum && !host.capabilities().tcp4);
    driver.offer(RX, &[], &[2000]);
    let mut large = plain(bytes);
    large.offload = Offload {
        segmentation: Some(Segmentation {
            kind: SegmentationKind::Tcp4,
            size: 5,
            header_len: 0,
        }),
        ..offload
    };
    assert_eq!(send(&host, vec![large]), 0);
    assert_eq!(host.counters().misfit_to_guest, 1);
}

#[test]
fn filters_are_the_drivers() {
    let (mut driver, host) = card(1);
    driver.start(BASE | feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_RX_EXTRA);
    let other = [2, 0, 0, 0, 0, 9];
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let seen = |host: &NetHost, driver: &mut Driver, to| {
        let token = driver.offer(RX, &[], &[200]);
        send(host, vec![plain(frame(to, 60))]);
        let seen = driver.used(RX, token).is_some();
        if !seen {
            // Makes room for the next one.
            send(host, vec![plain(frame([0xff; 6], 60))]);
        }
        seen
    };
    assert!(seen(&host, &mut driver, other), "everything at first");
    assert_eq!(control(&mut driver, 2, &[0, 0, 0]), 0);
    assert!(!seen(&host, &mut driver, other));
    assert!(seen(&host, &mut driver, MAC));
    assert!(!seen(&host, &mut driver, group));
    assert_eq!(control(&mut driver, 2, &[0, 1, 1]), 0);
    assert!(seen(&host, &mut driver, group));
    assert_eq!(control(&mut driver, 2, &[0, 1, 0]), 0);
    let mut table = vec![1, 0, 1, 0, 0, 0];
    table.extend(other);
    table.extend([1, 0, 0, 0]);
    table.extend(group);
    assert_eq!(control(&mut driver, 2, &table), 0);
    assert!(seen(&host, &mut driver, other) && seen(&host, &mut driver, group));
    assert!(host.counters().filtered_to_guest >= 2);
    // Malformed, unknown, and not agreed on.
    for bad in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 9, 1],
        &[1, 0, 255, 255, 255, 255],
        &[1, 0, 2, 0, 0, 0, 1],
        &[2, 0, 1, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[99, 0],
    ] {
        assert_eq!(control(&mut driver, 2, bad), 1, "{bad:?}");
    }
}

#[test]
fn vlans_are_filtered_when_that_was_agreed_on() {
    let (mut driver, host) = card(1);
    driver.start(BASE | feature::CTRL_VQ | feature::CTRL_VLAN);
    let mut tagged = frame(MAC, 60);
    tagged[12..16].copy_from_slice(&[0x81, 0x00, 0xa0, 0x07]);
    let token = driver.offer(RX, &[], &[200]);
    send(&host, vec![plain(tagged.clone())]);
    assert!(driver.used(RX, token).is_none());
    assert_eq!(control(&mut driver, 2, &[2, 0, 7, 0]), 0);
    send(&host, vec![plain(tagged.clone())]);
    assert!(driver.used(RX, token).is_some());
    assert_eq!(control(&mut driver, 2, &[2, 1, 7, 0]), 0);
    assert_eq!(control(&mut driver, 2, &[2, 0, 0, 0x10]), 1);
}

#[test]
fn a_flow_comes_in_where_it_goes_out() {
    let (mut driver, host) = card(2);
    driver.start(BASE | feature::CTRL_VQ | feature::MQ);
    assert_eq!(control(&mut driver, 4, &[4, 0, 3, 0]), 1);
    assert_eq!(control(&mut driver, 4, &[4, 0, 2, 0]), 0);
    let mut out = frame([2; 6], 60);
    out[14] = 0x45;
    out[23] = 6;
    out[26..38].copy_from_slice(&[10, 0, 0, 1, 9, 9, 9, 9, 0x10, 0, 0, 80]);
    driver.submit(3, &[&NO_HEADER, &out], &[]);
    assert_eq!(received(&host).len(), 1);
    let mut back = out.clone();
    back[..6].copy_from_slice(&MAC);
    back[26..38].copy_from_slice(&[9, 9, 9, 9, 10, 0, 0, 1, 0, 80, 0x10, 0]);
    let token = driver.offer(2, &[], &[200]);
    assert_eq!(send(&host, vec![plain(back)]), 0);
    assert!(driver.used(2, token).is_some());
}

#[test]
fn one_round_does_bounded_work() {
    let (mut driver, host) = card(1);
    driver.start(BASE);
    let bytes = frame(MAC, 32_000);
    for _ in 0..64 {
        driver.offer(TX, &[&NO_HEADER, &bytes], &[]);
    }
    let mut frames = VecDeque::new();
    let mut pool = Pool::new(8);
    let end = host.exchange(&mut VecDeque::new(), &mut frames, &mut pool);
    assert_eq!(end, Exchange::More);
    assert!(frames.len() < 64);
    frames.extend(received(&host));
    assert_eq!(frames.len(), 64);
}

#[test]
fn what_the_host_does_not_take_stays_with_the_driver() {
    let (mut driver, host) = card(1);
    driver.start(BASE);
    let bytes = frame(MAC, 60);
    let mut frames = VecDeque::new();
    let mut pool = Pool::new(8);
    let mut exchange = |frames: &mut VecDeque<Frame>| {
        while host.exchange(&mut VecDeque::new(), frames, &mut pool) == Exchange::More {}
    };
    let mut with_driver = Vec::new();
    for _ in 0..10 {
        with_driver.extend((0..32).map(|_| driver.offer(TX, &[&NO_HEADER, &bytes], &[])));
        exchange(&mut frames);
        with_driver.retain(|token| driver.used(TX, *token).is_none());
    }
    assert_eq!((frames.len(), with_driver.len()), (256, 64));
    // There is room again.
    frames.truncate(16);
    exchange(&mut frames);
    assert_eq!(frames.len(), 16 + 64);
}

#[test]
fn the_link_and_announcements_are_told() {
    let (mut driver, host) = card(1);
    driver.start(BASE | feature::CTRL_VQ | feature::GUEST_ANNOUNCE);
    host.set_link(false);
    assert_eq!(driver.config(6, 2), [0, 0]);
    driver.offer(RX, &[], &[200]);
    assert_eq!(send(&host, vec![plain(frame(MAC, 60))]), 0);
    assert_eq!(host.counters().filtered_to_guest, 1);
    host.set_link(true);
    host.announce();
    assert_eq!(driver.config(6, 2), [3, 0]);
    assert_eq!(driver.config_interrupts(), 3);
    assert_eq!(control(&mut driver, 2, &[3, 0]), 0);
    assert_eq!(driver.config(6, 2), [1, 0]);
}

#[test]
fn state_survives_and_the_neighbours_hear_of_it() {
    let features = BASE | feature::CTRL_VQ | feature::CTRL_MAC_ADDR | feature::GUEST_ANNOUNCE;
    let (mut driver, _host) = card(1);
    driver.start(features);
    assert_eq!(control(&mut driver, 2, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    let token = driver.offer(RX, &[], &[200]);
    let (mut other, host) = card(1);
    driver.move_to(&mut other);
    assert_eq!(other.config(0, 8), [2, 9, 9, 9, 9, 9, 3, 0]);
    assert_eq!(send(&host, vec![plain(frame([2, 9, 9, 9, 9, 9], 60))]), 0);
    assert!(other.used(RX, token).is_some());
}

#[test]
fn a_device_that_is_gone_says_so() {
    let (driver, host) = card(1);
    drop(driver);
    assert!(rings(&host));
    let end = host.exchange(
        &mut VecDeque::new(),
        &mut VecDeque::new(),
        &mut Pool::new(1),
    );
    assert_eq!(end, Exchange::Closed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn hostile_drivers_do_no_harm(
        features in any::<u64>(),
        chains in prop::collection::vec(
            (0..5_u16, prop::collection::vec(any::<u8>(), 0..80), prop::collection::vec(0..90_u32, 0..4)),
            1..40,
        ),
        inbound in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
    ) {
        let (mut driver, host) = card(2);
        let offered = driver.core().device_features();
        driver.start(features & offered);
        for (queue, readable, writable) in chains {
            if readable.is_empty() && writable.is_empty() {
                continue;
            }
            let readable: Vec<&[u8]> = if readable.is_empty() { vec![] } else { vec![&readable] };
            driver.submit(queue, &readable, &writable);
            let frames = inbound.iter().cloned().map(plain).collect();
            send(&host, frames);
        }
        for frame in received(&host) {
            prop_assert!((ETHERNET_BYTES..=MAX_FRAME).contains(&frame.len()));
            let offload = frame.offload;
            if let Some(NeedsChecksum { start, offset }) = offload.needs_checksum {
                prop_assert!(usize::from(start) + usize::from(offset) + 2 <= frame.len());
            }
            prop_assert!(offload.segmentation.is_none() || offload.needs_checksum.is_some());
        }
        prop_assert!(driver.core().fault().is_none());
    }

    #[test]
    fn headers_are_read_as_they_are_written(
        missing in prop::option::of((0..100_u16, 0..100_u16)),
        kind in prop::option::of(prop::sample::select(vec![
            SegmentationKind::Tcp4,
            SegmentationKind::Tcp6,
            SegmentationKind::Udp,
        ])),
        size in 1..u16::MAX,
    ) {
        let segmentation = kind.filter(|_| missing.is_some()).map(|kind| Segmentation {
            kind,
            size,
            header_len: 54,
        });
        let offload = Offload {
            needs_checksum: missing.map(|(start, offset)| NeedsChecksum { start, offset }),
            segmentation,
            checksum_valid: false,
        };
        prop_assert_eq!(offload::parse(&offload::encode(&offload, 1), 300), Some(offload));
    }
}
