//! The half of a virtio device that no transport and no device type changes: status, features,
//! queues, and who may call the device when.
//!
//! One lock per device guards all of it. The order of locks is: transport, then this, then whatever
//! the device and the interrupts have inside. A device's host side reaches it by a [`HostHandle`],
//! which does not keep it alive.
//!
//! States, as the driver sees them in the status field (virtio 1.2, 2.1 and 3.1):
//!
//! ```text
//!   0 ──ACKNOWLEDGE, DRIVER──▶ ──FEATURES_OK──▶ ──DRIVER_OK──▶ live ──bad ring──▶ NEEDS_RESET
//!   ▲                          (refused: bit                    │                     │
//!   └──────────────────────────  stays clear) ◀──── write of 0 ─┴─────────────────────┘
//! ```
//!
//! Apart from that a device is running or paused. A paused device remembers that it was called and
//! catches up when it runs again.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use strata_memory::GuestMemory;

use super::device::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Io, VirtioDevice};
use super::queue::{Queue, QueueError, QueueFeatures, QueueLayout, QueueStateV1};
use crate::{RestoreError, SavedState};

/// The driver knows the device.
pub const STATUS_ACKNOWLEDGE: u8 = 1;
/// The driver can drive the device.
pub const STATUS_DRIVER: u8 = 2;
/// The driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;
/// Features are agreed on.
pub const STATUS_FEATURES_OK: u8 = 8;
/// The device has stopped because of a bad ring.
pub const STATUS_NEEDS_RESET: u8 = 64;
/// The driver gave up.
pub const STATUS_FAILED: u8 = 128;

/// The bits that a driver may set.
const STATUS_BY_DRIVER: u8 =
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED;

/// "No interrupt" where an interrupt vector stands (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Chains that one call of a device may take. A driver on another virtual CPU can refill a queue as
/// fast as it is emptied; the rest is left to a thread of the host.
const CHAINS_PER_CALL: u32 = 1024;

/// How a device's interrupts leave its transport. Called with the device's lock held.
pub trait VirtioInterrupt: Send + Sync {
    /// A queue whose interrupts go to `vector` has used buffers.
    fn used(&self, vector: u16);
    /// The configuration or the status changed; such interrupts go to `vector`.
    fn config(&self, vector: u16);
}

/// A queue as the driver configures it.
#[derive(Debug)]
pub struct QueueSlot {
    size_max: u16,
    /// What the driver has set so far, or the reset values.
    pub layout: QueueLayout,
    /// Where the queue's interrupts go.
    pub vector: u16,
    enabled: bool,
    queue: Option<Queue>,
}

impl QueueSlot {
    fn new(size_max: u16) -> QueueSlot {
        let layout = QueueLayout {
            size: size_max,
            ..QueueLayout::default()
        };
        QueueSlot {
            size_max,
            layout,
            vector: NO_VECTOR,
            enabled: false,
            queue: None,
        }
    }

    /// Whether the driver has enabled it.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    pub(super) fn ring(&mut self) -> Option<&mut Queue> {
        self.queue.as_mut()
    }
}

/// A device with its queues and negotiation state.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Arc<dyn VirtioInterrupt>,
    me: Weak<Shared>,
    slots: Vec<QueueSlot>,
    status: u8,
    driver_features: u64,
    config_vector: u16,
    config_generation: u8,
    fault: Option<QueueError>,
    paused: bool,
    /// The machine is at its end.
    closed: bool,
    /// Queues, by bit, that the device has yet to look at.
    pending: u64,
    /// Whether `host_event` has yet to be called.
    pending_host: bool,
    /// Whether a thread is at work on what is pending.
    draining: bool,
}

struct Shared {
    core: Mutex<Core>,
    /// Signalled when the device may have become callable, and when it never will again.
    resumed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner of a device. Dropping it ends the device's host threads.
pub struct SharedCore(Arc<Shared>);

impl SharedCore {
    /// Puts a device behind its lock.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> SharedCore {
        let slots = device
            .queue_sizes()
            .iter()
            .map(|size| QueueSlot::new(*size))
            .collect();
        let shared = Arc::new_cyclic(|me| Shared {
            core: Mutex::new(Core {
                device,
                memory,
                interrupt,
                me: me.clone(),
                slots,
                status: 0,
                driver_features: 0,
                config_vector: NO_VECTOR,
                config_generation: 0,
                fault: None,
                paused: false,
                closed: false,
                pending: 0,
                pending_host: false,
                draining: false,
            }),
            resumed: Condvar::new(),
        });
        let handle = HostHandle(Arc::downgrade(&shared));
        shared.lock().device.attach(handle);
        SharedCore(shared)
    }

    /// Takes the device's lock.
    pub fn lock(&self) -> MutexGuard<'_, Core> {
        self.0.lock()
    }

    /// From now on the device is not called, whatever the driver and the host do.
    pub fn pause(&self) {
        let mut core = self.lock();
        if !core.paused {
            if core.device.settle() {
                core.call(Call::HostEvent);
            }
            core.paused = true;
        }
    }

    /// Ends a pause; what was missed is made up for.
    pub fn start(&self) {
        let mut core = self.lock();
        core.paused = false;
        core.run_pending();
        drop(core);
        self.0.resumed.notify_all();
    }

    /// The end: the device is not called any more, and threads that wait for a pause to end go on.
    pub fn close(&self) {
        let mut core = self.lock();
        core.closed = true;
        core.reset();
        core.device.close();
        drop(core);
        self.0.resumed.notify_all();
    }
}

impl Drop for SharedCore {
    fn drop(&mut self) {
        self.close();
    }
}

/// How the host side of a device calls it. Does not keep the device alive.
#[derive(Clone)]
pub struct HostHandle(Weak<Shared>);

impl HostHandle {
    /// Has [`VirtioDevice::host_event`] called: now, or when the device is ready. False if the device
    /// is gone.
    pub fn notify(&self) -> bool {
        let Some(shared) = self.0.upgrade() else {
            return false;
        };
        let mut core = shared.lock();
        core.host_event();
        !core.closed
    }

    /// Like [`notify`](Self::notify), but waits until there is a driver and no pause. For threads
    /// whose cause for the call persists until it is made.
    pub fn notify_when_ready(&self) -> bool {
        let Some(shared) = self.0.upgrade() else {
            return false;
        };
        let mut core = shared.lock();
        while !core.closed && (core.paused || !core.live()) {
            core = shared
                .resumed
                .wait(core)
                .unwrap_or_else(PoisonError::into_inner);
        }
        core.host_event();
        !core.closed
    }
}

/// Work for a device.
#[derive(Clone, Copy)]
enum Call {
    Activate,
    Notified(u16),
    HostEvent,
}

/// What transports do.
impl Core {
    /// Features offered.
    pub fn device_features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
    }

    /// Features the driver has written.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The driver writes its features; ignored once they are agreed on.
    pub fn set_driver_features(&mut self, features: u64) {
        if self.status & STATUS_FEATURES_OK == 0 {
            self.driver_features = features;
        }
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes the status field: zero resets, otherwise bits are added.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut added = value & STATUS_BY_DRIVER & !self.status;
        if added & STATUS_FEATURES_OK != 0 && !self.features_are_possible() {
            added &= !STATUS_FEATURES_OK;
        }
        // A driver that skips the agreement has not read the status back (3.1.1).
        if (self.status | added) & STATUS_FEATURES_OK == 0 {
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added;
        if added & STATUS_DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn features_are_possible(&self) -> bool {
        self.driver_features & F_VERSION_1 != 0
            && self.driver_features & !self.device_features() == 0
    }

    /// Back to the state before any driver.
    pub fn reset(&mut self) {
        self.device.reset();
        for slot in &mut self.slots {
            *slot = QueueSlot::new(slot.size_max);
        }
        self.status = 0;
        self.driver_features = 0;
        self.config_vector = NO_VECTOR;
        self.fault = None;
        self.pending = 0;
        self.pending_host = false;
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.slots.len() as u16
    }

    /// A queue's configuration.
    pub fn queue(&self, index: u16) -> Option<&QueueSlot> {
        self.slots.get(usize::from(index))
    }

    /// Changes the rings of a queue; ignored while it is enabled.
    pub fn set_queue_layout(&mut self, index: u16, change: impl FnOnce(&mut QueueLayout)) {
        if let Some(slot) = self.slots.get_mut(usize::from(index))
            && !slot.enabled
        {
            change(&mut slot.layout);
        }
    }

    /// Sets where a queue's interrupts go.
    pub fn set_queue_vector(&mut self, index: u16, vector: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.vector = vector;
        }
    }

    /// The driver enables a queue; its rings are looked at from DRIVER_OK on. Only a reset undoes it.
    pub fn enable_queue(&mut self, index: u16) {
        if self.status & STATUS_DRIVER_OK == 0
            && let Some(slot) = self.slots.get_mut(usize::from(index))
        {
            slot.enabled = true;
        }
    }

    /// Where configuration interrupts go.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Sets where configuration interrupts go.
    pub fn set_config_vector(&mut self, vector: u16) {
        self.config_vector = vector;
    }

    /// Changes whenever the device changed its configuration (2.5.1).
    pub fn config_generation(&self) -> u8 {
        self.config_generation
    }

    /// Reads the device configuration; bytes outside it are zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..));
        let mut bytes = rest.unwrap_or_default().iter().copied();
        data.fill_with(|| bytes.next().unwrap_or(0));
    }

    /// Writes to the device configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The driver notifies the device of a queue.
    pub fn notify(&mut self, index: u16) {
        if index < self.queue_count() {
            self.pending |= 1 << (index & 63);
            self.run_pending();
        }
    }

    /// Why the device needs a reset, if it does.
    pub fn fault(&self) -> Option<&QueueError> {
        self.fault.as_ref()
    }
}

/// Calling the device.
impl Core {
    fn host_event(&mut self) {
        self.pending_host = true;
        self.run_pending();
    }

    fn live(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0 && self.status & STATUS_NEEDS_RESET == 0
    }

    fn queue_features(&self) -> QueueFeatures {
        QueueFeatures {
            event_index: self.driver_features & F_EVENT_IDX != 0,
            indirect: self.driver_features & F_INDIRECT_DESC != 0,
        }
    }

    fn activate(&mut self) {
        let features = self.queue_features();
        for slot in self.slots.iter_mut().filter(|slot| slot.enabled) {
            match Queue::new(slot.layout, features, slot.size_max) {
                Ok(queue) => slot.queue = Some(queue),
                Err(error) => return self.fail(error),
            }
        }
        self.call(Call::Activate);
        // The host may have had something to say before there was a driver, and a driver may have
        // filled a queue before it was ready.
        self.pending_host = true;
        for (index, _) in self.slots.iter().enumerate() {
            self.pending |= 1 << (index & 63);
        }
        self.run_pending();
        if let Some(shared) = self.me.upgrade() {
            shared.resumed.notify_all();
        }
    }

    /// Calls the device for everything that is pending, each cause once.
    fn run_pending(&mut self) {
        if self.paused {
            return;
        }
        let (queues, host) = (self.pending, self.pending_host);
        (self.pending, self.pending_host) = (0, false);
        for index in (0..64).filter(|index| queues >> index & 1 != 0) {
            self.call(Call::Notified(index));
        }
        if host {
            self.call(Call::HostEvent);
        }
        if self.pending != 0 || self.pending_host {
            self.drain();
        }
    }

    fn call(&mut self, call: Call) {
        if !self.live() {
            return;
        }
        let mut io = Io {
            memory: &self.memory,
            slots: &mut self.slots,
            budget: CHAINS_PER_CALL,
            exhausted: false,
            config_changed: false,
        };
        let result = match call {
            Call::Activate => self.device.activate(self.driver_features, &mut io),
            Call::Notified(queue) => self.device.notified(queue, &mut io),
            Call::HostEvent => self.device.host_event(&mut io),
        };
        let Io {
            exhausted,
            config_changed,
            ..
        } = io;
        if exhausted {
            match call {
                Call::Notified(queue) => self.pending |= 1 << (queue & 63),
                Call::Activate | Call::HostEvent => self.pending_host = true,
            }
        }
        if config_changed {
            self.config_generation = self.config_generation.wrapping_add(1);
            self.interrupt.config(self.config_vector);
        }
        if let Err(error) = result.and_then(|()| self.signal()) {
            self.fail(error);
        }
    }

    /// Interrupts the driver for what was completed, as far as it wants that.
    fn signal(&mut self) -> Result<(), QueueError> {
        for slot in &mut self.slots {
            if let Some(queue) = &mut slot.queue
                && queue.needs_interrupt(&self.memory)?
            {
                self.interrupt.used(slot.vector);
            }
        }
        Ok(())
    }

    /// Stops the device until the driver resets it (2.1.2).
    fn fail(&mut self, error: QueueError) {
        self.fault = Some(error);
        self.status |= STATUS_NEEDS_RESET;
        self.interrupt.config(self.config_vector);
    }

    /// Has a thread of the host go on with what is pending, so that the caller gets away. It takes
    /// the lock anew for each round. If no thread can be had, the next call goes on.
    fn drain(&mut self) {
        if self.draining {
            return;
        }
        let me = self.me.clone();
        let drain = move || {
            while let Some(shared) = me.upgrade() {
                let mut core = shared.lock();
                core.run_pending();
                if core.paused || (core.pending == 0 && !core.pending_host) {
                    core.draining = false;
                    return;
                }
            }
        };
        self.draining = std::thread::Builder::new()
            .name("virtio-drain".into())
            .spawn(drain)
            .is_ok();
    }
}

/// Saved state of a device: negotiation, queues, and the device's own part.
#[derive(Debug, Serialize, Deserialize)]
pub struct CoreStateV1 {
    status: u8,
    driver_features: u64,
    config_vector: u16,
    config_generation: u8,
    queues: Vec<QueueSlotStateV1>,
    pending: u64,
    device: SavedState,
}

#[derive(Debug, Serialize, Deserialize)]
struct QueueSlotStateV1 {
    layout: QueueLayout,
    vector: u16,
    enabled: bool,
    ring: Option<QueueStateV1>,
}

fn mismatch(reason: &'static str) -> RestoreError {
    RestoreError::Mismatch {
        name: "virtio".to_owned(),
        reason,
    }
}

impl Core {
    /// Everything that [`Core::restore`] needs. The device should be paused.
    pub fn save(&self) -> CoreStateV1 {
        let queue = |slot: &QueueSlot| QueueSlotStateV1 {
            layout: slot.layout,
            vector: slot.vector,
            enabled: slot.enabled,
            ring: slot.queue.as_ref().map(Queue::save),
        };
        CoreStateV1 {
            status: self.status,
            driver_features: self.driver_features,
            config_vector: self.config_vector,
            config_generation: self.config_generation,
            queues: self.slots.iter().map(queue).collect(),
            pending: self.pending,
            device: self.device.save(),
        }
    }

    /// Takes over a saved state. After an error the device is as after a reset.
    pub fn restore(&mut self, state: &CoreStateV1) -> Result<(), RestoreError> {
        self.reset();
        let result = self.try_restore(state);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn try_restore(&mut self, state: &CoreStateV1) -> Result<(), RestoreError> {
        if state.queues.len() != self.slots.len() {
            return Err(mismatch("the number of queues differs"));
        }
        if state.driver_features & !self.device_features() != 0 {
            return Err(mismatch("the driver uses features that are not offered"));
        }
        self.driver_features = state.driver_features;
        let features = self.queue_features();
        for (slot, saved) in self.slots.iter_mut().zip(&state.queues) {
            slot.layout = saved.layout;
            slot.vector = saved.vector;
            slot.enabled = saved.enabled;
            slot.queue = saved
                .ring
                .map(|ring| Queue::restore(ring, features, slot.size_max))
                .transpose()
                .map_err(|_| mismatch("a queue is not possible"))?;
        }
        self.status = state.status;
        self.config_vector = state.config_vector;
        self.config_generation = state.config_generation;
        self.device.restore(state.driver_features, &state.device)?;
        // What the host did meanwhile is unknown, so everything is looked at once.
        self.pending = state.pending;
        for (index, _) in self.slots.iter().enumerate() {
            self.pending |= 1 << (index & 63);
        }
        self.pending_host = true;
        Ok(())
    }
}
