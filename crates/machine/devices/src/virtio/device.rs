//! What a virtio device is, whatever bus it hangs on.

use crate::{RestoreError, SavedState};

use super::chain::Chain;
use super::core::{HostHandle, QueueSlot};
use super::queue::QueueError;
use strata_memory::GuestMemory;

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2, 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: not a legacy device. Without it a driver is refused.
pub const F_VERSION_1: u64 = 1 << 32;

/// Kinds of devices and their numbers (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Network card (5.1).
    Network = 1,
    /// Block device (5.2).
    Block = 2,
    /// Console (5.3).
    Console = 3,
    /// Entropy (5.4).
    Entropy = 4,
    /// Socket (5.10).
    Socket = 19,
}

/// The part of a virtio device that is its own: what the queues mean.
///
/// Negotiation, rings, interrupts and saving of these are done by whoever holds it. All methods are
/// called with the device's lock held, one at a time, from the thread of a virtual CPU or from a
/// thread of the host. None may block on the guest. A [`QueueError`] stops the device until the
/// driver resets it.
///
/// Order of calls: `attach` once; then any number of rounds of `activate`, then `notified` and
/// `host_event` in any order, then `reset`. `restore` may stand for `activate`, if the device was
/// saved between `activate` and `reset`. `close` may come at any time after `attach`.
pub trait VirtioDevice: Send {
    /// What kind of device this is.
    fn kind(&self) -> DeviceKind;

    /// The feature bits this device offers besides those of the rings. Constant.
    fn features(&self) -> u64;

    /// The greatest size of each queue: powers of two. Constant; at most 64 queues.
    fn queue_sizes(&self) -> &[u16];

    /// The device configuration as the driver reads it now.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the device configuration. Devices ignore what is not writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Tells the device how its host side reaches [`host_event`](Self::host_event).
    fn attach(&mut self, _host: HostHandle) {}

    /// The driver is ready (DRIVER_OK) and has accepted `features`. Queues it did not enable stay
    /// empty for ever.
    fn activate(&mut self, _features: u64, _io: &mut Io<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    /// The driver made buffers of `queue` available. Also called without cause; takes what it can.
    fn notified(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError>;

    /// The host side called through its [`HostHandle`].
    fn host_event(&mut self, _io: &mut Io<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    /// Waits until no thread of the device's own is at work for the driver. True if `host_event` is to be called for
    /// what was done. Called before the device is paused.
    fn settle(&mut self) -> bool {
        false
    }

    /// Back to how it was before `activate`; nothing of the driver's memory is touched any more. Input from the host that the guest has not taken stays.
    fn reset(&mut self);

    /// The machine ends: whoever on the host waits for the guest is to give up. Nothing follows.
    fn close(&mut self) {}

    /// The state that is the device's own: named and versioned.
    fn save(&self) -> SavedState;

    /// Takes over what [`save`](Self::save) gave. `features` are those the driver had accepted.
    fn restore(&mut self, features: u64, state: &SavedState) -> Result<(), RestoreError>;
}

/// What a device works with while it is called: guest memory and its queues.
///
/// One call takes a bounded number of chains; when they are used up every queue looks empty, and
/// the device is called again later for the rest.
pub struct Io<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) slots: &'a mut [QueueSlot],
    pub(super) budget: u32,
    pub(super) exhausted: bool,
    pub(super) config_changed: bool,
}

impl<'a> Io<'a> {
    /// Guest memory.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Takes the next chain of a queue. After `None` the device is notified when there is one.
    pub fn pop(&mut self, queue: u16) -> Result<Option<Chain>, QueueError> {
        let Some(ring) = self
            .slots
            .get_mut(usize::from(queue))
            .and_then(QueueSlot::ring)
        else {
            return Ok(None);
        };
        if self.budget == 0 {
            self.exhausted = true;
            return Ok(None);
        }
        self.budget -= 1;
        ring.pop(self.memory)
    }

    /// Gives back the chain that was taken last from this queue.
    pub fn undo_pop(&mut self, queue: u16, chain: Chain) {
        if let Some(ring) = self
            .slots
            .get_mut(usize::from(queue))
            .and_then(QueueSlot::ring)
        {
            ring.undo_pop(chain);
        }
    }

    /// Hands a chain back to the driver with `written` bytes filled in. Interrupts follow when the
    /// device returns.
    pub fn complete(&mut self, queue: u16, chain: Chain, written: u32) -> Result<(), QueueError> {
        match self
            .slots
            .get_mut(usize::from(queue))
            .and_then(QueueSlot::ring)
        {
            Some(ring) => ring.push(self.memory, chain, written),
            None => Ok(()),
        }
    }

    /// Hands several chains of one queue back at once, each with the bytes filled in: the driver sees all or none.
    pub fn complete_all(
        &mut self,
        queue: u16,
        chains: Vec<(Chain, u32)>,
    ) -> Result<(), QueueError> {
        match self
            .slots
            .get_mut(usize::from(queue))
            .and_then(QueueSlot::ring)
        {
            Some(ring) => ring.push_all(self.memory, chains),
            None => Ok(()),
        }
    }

    /// Says that the device configuration differs from before this call.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }
}
