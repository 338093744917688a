//! The host's end of a network card: a thread exchanges frames through it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use strata_switch::{Capabilities, Frame, Pool, Port, Time};

use crate::virtio::core::HostHandle;

/// What a network card has done since the machine was built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct NetCounters {
    /// Frames that the guest sent.
    pub frames_from_guest: u64,
    /// Bytes in them.
    pub bytes_from_guest: u64,
    /// Frames of the guest that were dropped, because they or their headers are malformed.
    pub malformed_from_guest: u64,
    /// Frames that the guest got.
    pub frames_to_guest: u64,
    /// Bytes in them.
    pub bytes_to_guest: u64,
    /// Frames that its filters refused.
    pub filtered_to_guest: u64,
    /// Frames that need an offload that the guest has not, or fit into no buffer.
    pub misfit_to_guest: u64,
}

/// Frames that wait for the guest at a port at most; the rest waits in the switch.
const WAITING_MAX: usize = 64;

/// What device and host share.
pub(super) struct Shared {
    doorbell: OwnedFd,
    lanes: Mutex<Lanes>,
    host: OnceLock<HostHandle>,
}

/// Frames under way and what each side says to the other. The device takes this lock while it has its own.
pub(super) struct Lanes {
    pub(super) to_host: VecDeque<Frame>,
    pub(super) to_guest: VecDeque<Frame>,
    /// The host thread's own, while it waits.
    pub(super) pool: Pool,
    /// What the guest takes without help.
    pub(super) capabilities: Capabilities,
    pub(super) link_up: bool,
    /// The guest is to make itself known.
    pub(super) announce: bool,
    /// The host's thread waits for the frames that the device moves now.
    pub(super) attended: bool,
    /// The last round ended before the queues did.
    pub(super) more: bool,
    pub(super) closed: bool,
    pub(super) counters: NetCounters,
}

impl Shared {
    pub(super) fn new() -> io::Result<Shared> {
        let lanes = Lanes {
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            pool: Pool::new(0),
            capabilities: Capabilities::default(),
            link_up: true,
            announce: false,
            attended: false,
            more: false,
            closed: false,
            counters: NetCounters::default(),
        };
        Ok(Shared {
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            lanes: Mutex::new(lanes),
            host: OnceLock::new(),
        })
    }

    pub(super) fn attach(&self, host: HostHandle) {
        // A device is attached once; a second handle would be to the same device.
        let _ = self.host.set(host);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the host's thread.
    pub(super) fn ring(&self) {
        // A counter at its limit has woken it already.
        let _ = rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes());
    }
}

/// The host's end of a network card. Clones share it.
#[derive(Clone)]
pub struct NetHost(Arc<Shared>);

impl NetHost {
    pub(super) fn new(shared: Arc<Shared>) -> NetHost {
        NetHost(shared)
    }

    /// Readable when the guest has frames, or buffers for frames.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.0.doorbell.as_fd()
    }

    /// Makes the doorbell silent; to be called before [`exchange`](Self::exchange), not after it.
    pub fn hush(&self) {
        let mut count = [0; 8];
        // It may be silent already.
        let _ = rustix::io::read(&self.0.doorbell, &mut count);
    }

    /// Moves frames both ways, once. What the guest has no buffers for stays in `to_guest`; when `to_host` has 256 frames
    /// nothing more comes to it, and this is to be called again when some have been taken out. After [`Exchange::More`]
    /// there is work left although nobody will ring.
    pub fn exchange(
        &self,
        to_guest: &mut VecDeque<Frame>,
        to_host: &mut VecDeque<Frame>,
        pool: &mut Pool,
    ) -> Exchange {
        let Some(host) = self.0.host.get() else {
            return Exchange::Done;
        };
        let mut swap = |lanes: &mut Lanes| {
            std::mem::swap(&mut lanes.to_guest, to_guest);
            std::mem::swap(&mut lanes.to_host, to_host);
            std::mem::swap(&mut lanes.pool, pool);
        };
        let mut lanes = self.0.lock();
        swap(&mut lanes);
        (lanes.attended, lanes.more) = (true, false);
        drop(lanes);
        // The device's lock comes before that of the lanes.
        let alive = host.notify();
        let mut lanes = self.0.lock();
        lanes.attended = false;
        swap(&mut lanes);
        match (alive && !lanes.closed, lanes.more) {
            (false, _) => Exchange::Closed,
            (true, true) => Exchange::More,
            (true, false) => Exchange::Done,
        }
    }

    /// What the guest takes without help.
    pub fn capabilities(&self) -> Capabilities {
        self.0.lock().capabilities
    }

    /// What the card has done.
    pub fn counters(&self) -> NetCounters {
        self.0.lock().counters
    }

    /// Plugs the cable in or out, as the guest sees it.
    pub fn set_link(&self, up: bool) {
        self.0.lock().link_up = up;
        self.tell();
    }

    /// Has the guest make its addresses known to its neighbours.
    pub fn announce(&self) {
        self.0.lock().announce = true;
        self.tell();
    }

    fn tell(&self) {
        if let Some(host) = self.0.host.get() {
            host.notify();
        }
    }
}

/// How an exchange of frames ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// All was moved that can be.
    Done,
    /// It is to be called again soon.
    More,
    /// The machine is at its end.
    Closed,
}

/// A network card as a port of a switch on the host's thread.
pub struct NetPort {
    host: NetHost,
    to_guest: VecDeque<Frame>,
    to_host: VecDeque<Frame>,
}

impl NetPort {
    /// The port of the card with this end.
    pub fn new(host: NetHost) -> NetPort {
        NetPort {
            host,
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
        }
    }

    /// The card's end.
    pub fn host(&self) -> &NetHost {
        &self.host
    }

    /// Exchanges frames with the card, once.
    pub fn exchange(&mut self, pool: &mut Pool) -> Exchange {
        self.host
            .exchange(&mut self.to_guest, &mut self.to_host, pool)
    }

    /// Whether frames wait for the guest.
    pub fn has_frames_for_guest(&self) -> bool {
        !self.to_guest.is_empty()
    }
}

impl Port for NetPort {
    fn deliver(&mut self, frame: Frame, _: Time, _: &mut Pool) -> Result<(), Frame> {
        if self.to_guest.len() >= WAITING_MAX {
            return Err(frame);
        }
        self.to_guest.push_back(frame);
        Ok(())
    }

    fn poll(&mut self, _: Time, _: &mut Pool) -> Option<Frame> {
        self.to_host.pop_front()
    }

    fn capabilities(&self) -> Capabilities {
        self.host.capabilities()
    }
}
