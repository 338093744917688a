//! A machine's port on a shared network: one thread that carries frames between its card and the packet ring, at the other
//! end of which a switch is a process of its own.
//!
//! The thread sleeps until the guest rings or the switch does. What the guest has no buffers for stays in the ring, and
//! what the ring has no room for stays with the card: both sides wait, and nothing is dropped here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use strata_devices::virtio::{Exchange, NetHost, NetPort};
use strata_switch::ring::{Ring, Side};
use strata_switch::{Capabilities, Frame, Pool, Port, Time};

use crate::network::{NetworkError, NetworkHandle};

/// Frames of each direction in a round.
const BATCH: usize = 64;
/// Small buffers that are kept to be used again.
const POOL: usize = 256;
/// Tokens of what the thread waits for.
const DOORBELL: u64 = 0;
const BELL: u64 = 1;
/// Strokes of the bell that are taken at once.
const STROKES_MAX: usize = 64;

/// The descriptors of a port on a shared network.
#[derive(Debug)]
pub struct Cable {
    /// The ring's memory.
    pub ring: OwnedFd,
    /// A socket that keeps message boundaries: a byte wakes the switch, and the switch sends one to wake us.
    pub bell: OwnedFd,
}

struct Work {
    epoll: OwnedFd,
    card: NetPort,
    ring: Ring,
    bell: OwnedFd,
    pool: Pool,
    /// From the guest, not in the ring yet.
    out: VecDeque<Frame>,
    /// From the ring, not with the card yet.
    into: VecDeque<Frame>,
    handle: NetworkHandle,
}

/// Begins to carry frames. The thread ends with the card.
pub(crate) fn start(card: NetHost, size: u32, cable: Cable) -> Result<NetworkHandle, NetworkError> {
    let handle = NetworkHandle::default();
    let ring = Ring::attach(cable.ring, size, Side::Machine, Capabilities::ALL)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
    let wait = |token, fd| {
        let token = epoll::EventData::new_u64(token);
        epoll::add(&epoll, fd, token, epoll::EventFlags::IN).map_err(io::Error::from)
    };
    wait(DOORBELL, card.doorbell())?;
    wait(BELL, cable.bell.as_fd())?;
    let mut work = Work {
        epoll,
        card: NetPort::new(card),
        ring,
        bell: cable.bell,
        pool: Pool::new(POOL),
        out: VecDeque::new(),
        into: VecDeque::new(),
        handle: handle.clone(),
    };
    std::thread::Builder::new()
        .name("network".to_owned())
        .spawn(move || work.run())?;
    Ok(handle)
}

impl Work {
    fn run(&mut self) {
        let mut at_once = false;
        loop {
            self.wait(at_once);
            let exchanged = self.card.exchange(&mut self.pool);
            if exchanged == Exchange::Closed {
                return;
            }
            let open = !self.card.has_frames_for_guest();
            let sent = self.send();
            let got = open && self.receive();
            if self.ring.must_wake() {
                // A socket without room has woken the switch already.
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let _ = rustix::net::send(&self.bell, &[1], flags);
            }
            at_once = sent || got || exchanged == Exchange::More;
            self.tell();
        }
    }

    fn wait(&mut self, at_once: bool) {
        // A guest without buffers rings when it has some: until then the ring need not wake us.
        let asleep = !at_once && (self.card.has_frames_for_guest() || self.ring.sleep());
        let timeout = (!asleep).then_some(Duration::ZERO);
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events = Vec::with_capacity(4);
        // An interruption is like a time-out.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref());
        for event in events {
            match event.data.u64() {
                DOORBELL => self.card.host().hush(),
                _ => self.silence(),
            }
        }
    }

    fn silence(&self) {
        for _ in 0..STROKES_MAX {
            match rustix::net::recv(&self.bell, &mut [0; 1], RecvFlags::DONTWAIT) {
                Ok((1.., _)) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The switch is gone: its end would wake us for ever.
                Ok(_) | Err(_) => {
                    let _ = epoll::delete(&self.epoll, &self.bell);
                    return;
                }
            }
        }
    }

    /// From the card into the ring. True if the batch was over before the frames were.
    fn send(&mut self) -> bool {
        for _ in 0..BATCH {
            let next = self.out.pop_front();
            let next = next.or_else(|| self.card.poll(Time::ZERO, &mut self.pool));
            let Some(frame) = next else {
                return false;
            };
            match self.ring.push(&frame) {
                // The switch rings when there is room.
                Ok(false) => {
                    self.out.push_front(frame);
                    return false;
                }
                // A ring whose other side broke the rules leads nowhere.
                Ok(true) | Err(_) => self.pool.put(frame),
            }
        }
        true
    }

    /// From the ring to the card. True if there is something for the guest now.
    fn receive(&mut self) -> bool {
        let capabilities = self.card.capabilities();
        let mut some = false;
        for _ in 0..BATCH {
            if self.into.is_empty() {
                let Ok(Some(frame)) = self.ring.pop(&mut self.pool) else {
                    break;
                };
                let into = &mut self.into;
                // What the driver does not take is done here: it may say so after the port was made.
                frame.lower(capabilities, &mut self.pool, |frame| into.push_back(frame));
            }
            while let Some(frame) = self.into.pop_front() {
                if let Err(frame) = self.card.deliver(frame, Time::ZERO, &mut self.pool) {
                    self.into.push_front(frame);
                    return true;
                }
                some = true;
            }
        }
        some
    }

    fn tell(&self) {
        let mut stats = self.handle.0.lock().unwrap_or_else(PoisonError::into_inner);
        stats.card = self.card.host().counters();
    }
}
