//! The packet ring of a port: how frames go between a machine's process and a switch that is a process of its own.
//!
//! One [`SharedMemory`] per port holds two rings of bytes, one per direction, and nothing else: no machine's RAM is ever
//! mapped by another process. Each side believes the other nothing. It keeps its own position to itself, reads the
//! other's once, copies a record before it looks at it, and gives the ring up when what it finds cannot be. What a hostile
//! peer can do is to send frames, good or bad, which it may do anyway, or to stop.
//!
//! Layout, little-endian, version 1: `u32` version, `u32` bytes of one ring (a power of two), then at 64, 128 and 192 the
//! producer's position, the consumer's position and the "wake me" words of the ring to the switch (the consumer's, then the
//! producer's that waits for room), at 256, 320 and 384 those of the ring to the machine. The rings follow at 4096. A record is a header of 16 bytes and the frame, padded
//! to 16; positions count bytes and wrap at 2³².

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use strata_memory::SharedMemory;

use crate::frame::{Frame, MAX_FRAME, NeedsChecksum, Offload, Segmentation, SegmentationKind};
use crate::pool::Pool;
use crate::port::{Capabilities, Port};
use crate::time::Time;

/// The layout's version: the first number in the memory.
pub const VERSION: u32 = 1;
/// Bytes before the rings.
const HEADER: u64 = 4096;
/// Bytes of a record's header, and what records are padded to.
const RECORD: usize = 16;
/// A ring holds at least a few of the longest frames.
const RING_MIN: u32 = 256 << 10;
/// And no more than this.
const RING_MAX: u32 = 64 << 20;

/// Flags of a record.
mod flag {
    pub const NEEDS_CHECKSUM: u8 = 1;
    pub const CHECKSUM_VALID: u8 = 2;
}

/// Why a ring cannot be used (any more).
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A size that is no power of two between 256 KiB and 64 MiB.
    #[error("a ring of {0} bytes is no power of two between 256 KiB and 64 MiB")]
    BadSize(u32),
    /// The peer speaks another version.
    #[error(
        "the peer's ring is of version {0}, this program knows version {VERSION}: update the older side"
    )]
    Version(u32),
    /// The peer wrote what cannot be.
    #[error("the peer broke the ring's rules: {0}")]
    Broken(&'static str),
    /// No memory.
    #[error("the ring has no memory")]
    Memory(#[from] strata_memory::MemoryError),
}

/// Which side of a ring we are.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// The switch: sends to the machine.
    Switch,
    /// The machine: sends to the switch.
    Machine,
}

/// Where one direction lies.
#[derive(Copy, Clone, Debug)]
struct Way {
    produced: u64,
    consumed: u64,
    /// The consumer sleeps.
    wake: u64,
    /// The producer waits for room.
    room: u64,
    data: u64,
}

/// Both directions of a port's ring, from one side.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<SharedMemory>,
    size: u32,
    out: Way,
    /// Bytes that we have put into `out`.
    produced: u32,
    into: Way,
    /// Bytes that we have taken out of `into`.
    consumed: u32,
    capabilities: Capabilities,
    broken: Option<&'static str>,
}

/// Bytes of memory that rings of `size` bytes need.
pub fn memory_size(size: u32) -> u64 {
    HEADER + 2 * u64::from(size)
}

fn check_size(size: u32) -> Result<u32, RingError> {
    if size.is_power_of_two() && (RING_MIN..=RING_MAX).contains(&size) {
        Ok(size)
    } else {
        Err(RingError::BadSize(size))
    }
}

impl Ring {
    /// A new ring with `size` bytes per direction. Its memory's file goes to the peer, which [attaches](Ring::attach).
    ///
    /// # Errors
    /// The size is none, or the host refuses the memory.
    pub fn create(size: u32, side: Side, capabilities: Capabilities) -> Result<Ring, RingError> {
        let memory = SharedMemory::create(c"strata-ring", memory_size(check_size(size)?))?;
        let ring = Ring::new(Arc::new(memory), size, side, capabilities);
        ring.store(4, size);
        ring.store(0, VERSION);
        Ok(ring)
    }

    /// The other side of a ring that a peer has made, `size` bytes per direction as the peer said.
    ///
    /// # Errors
    /// The size is none, the file is not as long, or the version is another.
    pub fn attach(
        file: std::os::fd::OwnedFd,
        size: u32,
        side: Side,
        capabilities: Capabilities,
    ) -> Result<Ring, RingError> {
        let memory = SharedMemory::open(file, memory_size(check_size(size)?))?;
        let ring = Ring::new(Arc::new(memory), size, side, capabilities);
        match ring.load(0) {
            VERSION => {}
            other => return Err(RingError::Version(other)),
        }
        if ring.load(4) != size {
            return Err(RingError::Broken("its size is not what the peer said"));
        }
        Ok(ring)
    }

    fn new(memory: Arc<SharedMemory>, size: u32, side: Side, capabilities: Capabilities) -> Ring {
        let way = |base: u64, data: u64| Way {
            produced: base,
            consumed: base + 64,
            wake: base + 128,
            room: base + 132,
            data,
        };
        let to_switch = way(64, HEADER);
        let to_machine = way(256, HEADER + u64::from(size));
        let (out, into) = match side {
            Side::Switch => (to_machine, to_switch),
            Side::Machine => (to_switch, to_machine),
        };
        Ring {
            memory,
            size,
            out,
            produced: 0,
            into,
            consumed: 0,
            capabilities,
            broken: None,
        }
    }

    /// The memory, whose file goes to the peer.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    fn atomic(&self, offset: u64) -> Option<&AtomicU32> {
        self.memory.atomic_u32(offset)
    }

    fn load(&self, offset: u64) -> u32 {
        self.atomic(offset)
            .map_or(0, |atomic| u32::from_le(atomic.load(Ordering::Acquire)))
    }

    fn store(&self, offset: u64, value: u32) {
        if let Some(atomic) = self.atomic(offset) {
            atomic.store(value.to_le(), Ordering::Release);
        }
    }

    /// What the peer did wrong, if it did: nothing passes any more, and the owner takes the port down.
    pub fn broken(&self) -> Option<RingError> {
        self.broken.map(RingError::Broken)
    }

    /// Copies between the ring's bytes at `position` and a slice, around the end.
    fn pieces(&self, way: Way, position: u32, len: usize) -> [(u64, std::ops::Range<usize>); 2] {
        let at = position & (self.size - 1);
        let first = len.min((self.size - at) as usize);
        [(way.data + u64::from(at), 0..first), (way.data, first..len)]
    }

    fn copy_in(&self, position: u32, bytes: &[u8]) {
        for (offset, range) in self.pieces(self.out, position, bytes.len()) {
            // In bounds: a ring's memory is as long as `memory_size` says.
            let _ = self
                .memory
                .write(offset, bytes.get(range).unwrap_or_default());
        }
    }

    fn copy_out(&self, position: u32, bytes: &mut [u8]) {
        for (offset, range) in self.pieces(self.into, position, bytes.len()) {
            let _ = self
                .memory
                .read(offset, bytes.get_mut(range).unwrap_or_default());
        }
    }

    /// Puts a frame in; false if there is no room now: the peer will say when there is (it finds that it
    /// [must wake](Ring::must_wake) us).
    ///
    /// # Errors
    /// The peer broke the rules.
    pub fn push(&mut self, frame: &Frame) -> Result<bool, RingError> {
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        let len = frame.len();
        let whole = (RECORD + len).next_multiple_of(RECORD);
        let used = self.produced.wrapping_sub(self.load(self.out.consumed));
        if used > self.size {
            return Err(self.give_up("it consumed what was never produced"));
        }
        if len > MAX_FRAME {
            return Ok(false);
        }
        if whole > (self.size - used) as usize {
            self.store(self.out.room, 1);
            fence(Ordering::SeqCst);
            let used = self.produced.wrapping_sub(self.load(self.out.consumed));
            if used > self.size || whole > (self.size - used) as usize {
                return Ok(false);
            }
            self.store(self.out.room, 0);
        }
        self.copy_in(self.produced, &header(frame));
        self.copy_in(self.produced.wrapping_add(RECORD as u32), frame.bytes());
        self.produced = self.produced.wrapping_add(whole as u32);
        self.store(self.out.produced, self.produced);
        Ok(true)
    }

    /// Takes a frame out.
    ///
    /// # Errors
    /// The peer broke the rules.
    pub fn pop(&mut self, pool: &mut Pool) -> Result<Option<Frame>, RingError> {
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        let available = self.load(self.into.produced).wrapping_sub(self.consumed);
        if available == 0 {
            return Ok(None);
        }
        if available > self.size || (available as usize) < RECORD {
            return Err(self.give_up("it produced more than the ring holds"));
        }
        let mut record = [0; RECORD];
        self.copy_out(self.consumed, &mut record);
        // From here on only the copy counts: the peer may have changed the ring already.
        let Some((len, offload)) = parse(&record) else {
            return Err(self.give_up("a record's header makes no sense"));
        };
        let whole = (RECORD + len).next_multiple_of(RECORD);
        if whole > available as usize {
            return Err(self.give_up("a record is longer than what it produced"));
        }
        let mut frame = pool.frame(len);
        self.copy_out(self.consumed.wrapping_add(RECORD as u32), frame.bytes_mut());
        frame.offload = offload;
        self.consumed = self.consumed.wrapping_add(whole as u32);
        self.store(self.into.consumed, self.consumed);
        Ok(Some(frame))
    }

    fn give_up(&mut self, why: &'static str) -> RingError {
        self.broken = Some(why);
        RingError::Broken(why)
    }

    /// After pushing and popping: whether the peer sleeps, or waits for room, and has to be woken. Asked once per batch.
    pub fn must_wake(&self) -> bool {
        // The positions must be seen before the peer's wish is read, as the peer writes its wish before it looks again.
        fence(Ordering::SeqCst);
        let asked = |offset| {
            let word = self
                .atomic(offset)
                .filter(|word| word.load(Ordering::Relaxed) != 0);
            word.is_some_and(|word| word.swap(0, Ordering::AcqRel) != 0)
        };
        let (sleeps, waits) = (asked(self.out.wake), asked(self.into.room));
        sleeps || waits
    }

    /// Before sleeping: asks to be woken. False if frames have come in between: do not sleep.
    pub fn sleep(&self) -> bool {
        self.store(self.into.wake, 1);
        fence(Ordering::SeqCst);
        let empty = self.load(self.into.produced) == self.consumed;
        if !empty {
            self.store(self.into.wake, 0);
        }
        empty
    }
}

fn header(frame: &Frame) -> [u8; RECORD] {
    let offload = frame.offload;
    let mut flags = 0;
    let (mut start, mut offset) = (0, 0);
    if let Some(missing) = offload.needs_checksum {
        flags |= flag::NEEDS_CHECKSUM;
        (start, offset) = (missing.start, missing.offset);
    }
    if offload.checksum_valid {
        flags |= flag::CHECKSUM_VALID;
    }
    let (kind, size, header_len) = match offload.segmentation {
        None => (0, 0, 0),
        Some(how) => {
            let kind = match how.kind {
                SegmentationKind::Tcp4 => 1,
                SegmentationKind::Tcp6 => 2,
                SegmentationKind::Udp => 3,
            };
            (kind, how.size, how.header_len)
        }
    };
    let [l0, l1, l2, l3] = (frame.len() as u32).to_le_bytes();
    let ([s0, s1], [o0, o1]) = (start.to_le_bytes(), offset.to_le_bytes());
    let ([g0, g1], [h0, h1]) = (size.to_le_bytes(), header_len.to_le_bytes());
    [
        l0, l1, l2, l3, flags, kind, s0, s1, o0, o1, g0, g1, h0, h1, 0, 0,
    ]
}

/// Length and offload of a record, if they make sense.
fn parse(record: &[u8; RECORD]) -> Option<(usize, Offload)> {
    let [
        l0,
        l1,
        l2,
        l3,
        flags,
        kind,
        s0,
        s1,
        o0,
        o1,
        g0,
        g1,
        h0,
        h1,
        _,
        _,
    ] = *record;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let kind = match kind {
        0 => None,
        1 => Some(SegmentationKind::Tcp4),
        2 => Some(SegmentationKind::Tcp6),
        3 => Some(SegmentationKind::Udp),
        _ => return None,
    };
    let offload = Offload {
        needs_checksum: (flags & flag::NEEDS_CHECKSUM != 0).then(|| NeedsChecksum {
            start: u16::from_le_bytes([s0, s1]),
            offset: u16::from_le_bytes([o0, o1]),
        }),
        segmentation: kind.map(|kind| Segmentation {
            kind,
            size: u16::from_le_bytes([g0, g1]),
            header_len: u16::from_le_bytes([h0, h1]),
        }),
        checksum_valid: flags & flag::CHECKSUM_VALID != 0,
    };
    (len > 0 && len <= MAX_FRAME).then_some((len, offload))
}

impl Port for Ring {
    fn deliver(&mut self, frame: Frame, _now: Time, pool: &mut Pool) -> Result<(), Frame> {
        match self.push(&frame) {
            Ok(false) => return Err(frame),
            // A broken ring swallows what it gets until its port is taken down.
            Ok(true) | Err(_) => pool.put(frame),
        }
        Ok(())
    }

    fn poll(&mut self, _now: Time, pool: &mut Pool) -> Option<Frame> {
        self.pop(pool).ok().flatten()
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn pair() -> (Ring, Ring) {
        let switch = Ring::create(RING_MIN, Side::Switch, Capabilities::ALL).unwrap();
        let file = switch.memory().file().try_clone_to_owned().unwrap();
        let machine = Ring::attach(file, RING_MIN, Side::Machine, Capabilities::ALL).unwrap();
        (switch, machine)
    }

    fn offload() -> impl Strategy<Value = Offload> {
        let missing = prop::option::of((any::<u16>(), any::<u16>()));
        let kinds = prop_oneof![
            Just(SegmentationKind::Tcp4),
            Just(SegmentationKind::Tcp6),
            Just(SegmentationKind::Udp)
        ];
        let segmentation = prop::option::of((kinds, any::<u16>(), any::<u16>()));
        (missing, segmentation, any::<bool>()).prop_map(
            |(missing, segmentation, checksum_valid)| Offload {
                needs_checksum: missing.map(|(start, offset)| NeedsChecksum { start, offset }),
                segmentation: segmentation.map(|(kind, size, header_len)| Segmentation {
                    kind,
                    size,
                    header_len,
                }),
                checksum_valid,
            },
        )
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            steps in prop::collection::vec((1usize..MAX_FRAME, offload(), 0usize..3), 1..60)
        ) {
            let (mut switch, mut machine) = pair();
            let mut pool = Pool::new(16);
            let mut expected = VecDeque::new();
            for (index, (len, offload, pops)) in steps.into_iter().enumerate() {
                let mut frame = pool.frame(len);
                frame.bytes_mut().iter_mut().enumerate().for_each(|(at, byte)| *byte = (at + index) as u8);
                frame.offload = offload;
                if switch.push(&frame).unwrap() {
                    expected.push_back(frame);
                } else {
                    prop_assert!(expected.len() >= 3);
                }
                for _ in 0..pops {
                    prop_assert_eq!(machine.pop(&mut pool).unwrap(), expected.pop_front());
                }
            }
            for frame in expected {
                prop_assert_eq!(machine.pop(&mut pool).unwrap(), Some(frame));
            }
            prop_assert_eq!(machine.pop(&mut pool).unwrap(), None);
        }

        /// Whatever the peer writes, wherever: no panic, and every frame is in bounds.
        #[test]
        fn a_hostile_peer_only_harms_itself(
            writes in prop::collection::vec((0u64..6000, prop::collection::vec(any::<u8>(), 1..64)), 1..50),
        ) {
            let (mut switch, machine) = pair();
            let mut pool = Pool::new(16);
            for (offset, bytes) in writes {
                let _ = machine.memory().write(offset, &bytes);
                while let Ok(Some(frame)) = switch.pop(&mut pool) {
                    prop_assert!(frame.len() <= MAX_FRAME);
                    pool.put(frame);
                }
                let _ = switch.push(&Frame::new(&[1; 100]));
            }
        }
    }

    #[test]
    fn rules_that_are_broken_end_the_ring() {
        let (mut switch, machine) = pair();
        let mut pool = Pool::new(1);
        machine.store(machine.out.produced, RING_MIN + 16);
        assert!(matches!(switch.pop(&mut pool), Err(RingError::Broken(_))));
        machine.store(machine.out.produced, 0);
        assert!(matches!(
            switch.push(&Frame::new(&[1; 60])),
            Err(RingError::Broken(_))
        ));
        assert!(switch.broken().is_some());
        let (mut switch, machine) = pair();
        machine.store(machine.into.consumed, 16);
        assert!(matches!(
            switch.push(&Frame::new(&[1; 60])),
            Err(RingError::Broken(_))
        ));
    }

    #[test]
    fn a_record_is_not_longer_than_what_was_produced() {
        let (mut switch, machine) = pair();
        let mut record = header(&Frame::new(&[1; 64]));
        record[..4].copy_from_slice(&1000u32.to_le_bytes());
        assert!(machine.memory().write(machine.out.data, &record));
        machine.store(machine.out.produced, 80);
        let popped = switch.pop(&mut Pool::new(1));
        assert!(matches!(popped, Err(RingError::Broken(_))), "{popped:?}");
    }

    #[test]
    fn another_version_is_named() {
        let (switch, _) = pair();
        switch.store(0, 2);
        let file = switch.memory().file().try_clone_to_owned().unwrap();
        let refused = Ring::attach(file, RING_MIN, Side::Machine, Capabilities::ALL);
        assert!(matches!(refused, Err(RingError::Version(2))));
        assert!(matches!(
            Ring::create(12345, Side::Switch, Capabilities::ALL),
            Err(RingError::BadSize(12345))
        ));
    }

    #[test]
    fn nobody_sleeps_over_a_frame() {
        let (mut switch, mut machine) = pair();
        let mut pool = Pool::new(1);
        assert!(!switch.must_wake());
        assert!(machine.sleep());
        assert!(switch.push(&Frame::new(&[1; 60])).unwrap());
        assert!(switch.must_wake() && !switch.must_wake());
        assert!(!machine.sleep());
        assert!(machine.pop(&mut pool).unwrap().is_some());
        assert!(machine.sleep());
    }

    #[test]
    fn who_waits_for_room_is_woken() {
        let (mut switch, mut machine) = pair();
        let mut pool = Pool::new(1);
        assert!(!machine.must_wake());
        while switch.push(&Frame::new(&[1; 9000])).unwrap() {}
        assert!(machine.pop(&mut pool).unwrap().is_some());
        assert!(machine.must_wake() && !machine.must_wake());
        assert!(switch.push(&Frame::new(&[1; 9000])).unwrap());
    }

    #[test]
    fn two_threads_lose_nothing() {
        let (mut switch, mut machine) = pair();
        const COUNT: u32 = 50_000;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..COUNT {
                    let mut frame = Frame::new(&[0; 64]);
                    frame.bytes_mut()[..4].copy_from_slice(&number.to_le_bytes());
                    frame.pad(64 + (number as usize * 37) % 1400);
                    while !machine.push(&frame).unwrap() {
                        std::thread::yield_now();
                    }
                }
            });
            let mut pool = Pool::new(16);
            for number in 0..COUNT {
                let frame = loop {
                    match switch.pop(&mut pool).unwrap() {
                        Some(frame) => break frame,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(frame.bytes()[..4], number.to_le_bytes());
                assert_eq!(frame.len(), 64 + (number as usize * 37) % 1400);
                pool.put(frame);
            }
        });
    }
}
