//! The local APIC (Intel SDM vol. 3, chapter 11): xAPIC page and x2APIC registers, priorities, timer.
//!
//! One [`Apic`] is shared by its vCPU's thread, the timer thread and every sender of interrupts. The register file is
//! behind one short lock, in which nothing is called; two words beside it can be read without: whether the vCPU has
//! something to take, and when the timer is due. Times are machine nanoseconds, given by the caller, so that whoever
//! records a run decides where they come from.

mod bus;
mod registers;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use strata_engine::IoBus;
use strata_engine::x86::ApicState;

use crate::interpret::Msrs;
pub use bus::{ApicBus, DeliveryMode, Destination, Message};
use registers::{Effect, Registers};

/// An access that the register set or the mode does not allow: #GP for MSRs, ignored on the page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Invalid;

/// What waits for the vCPU.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Waiting {
    /// INIT.
    pub init: bool,
    /// Start-up IPI with its vector; counts only while the vCPU waits for it.
    pub startup: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// A maskable interrupt of sufficient priority.
    pub interrupt: bool,
}

type Hook = OnceLock<Arc<dyn Fn() + Send + Sync>>;

/// No timer is armed.
const NEVER: u64 = u64::MAX;

/// One local APIC.
pub struct Apic {
    id: u32,
    registers: Mutex<Registers>,
    pending: AtomicBool,
    /// Machine nanoseconds at which the timer is due, [`NEVER`] if it is not armed.
    deadline_ns: AtomicU64,
    notify: Hook,
    timer_moved: Hook,
    bus: Weak<ApicBus>,
    /// Model-specific registers of the same vCPU that have no field in its context.
    pub(crate) msrs: Mutex<Msrs>,
}

impl Apic {
    fn new(id: u32, tsc_hz: u64, bus: Weak<ApicBus>) -> Self {
        Apic {
            id,
            registers: Mutex::new(Registers::new(id, tsc_hz)),
            pending: AtomicBool::new(false),
            deadline_ns: AtomicU64::new(NEVER),
            notify: OnceLock::new(),
            timer_moved: OnceLock::new(),
            bus,
            msrs: Mutex::new(Msrs::default()),
        }
    }

    /// Sets what is called, on any thread, when something waits for the vCPU. It must not block. Once.
    pub fn set_notify(&self, notify: Arc<dyn Fn() + Send + Sync>) {
        let _ = self.notify.set(notify);
    }

    /// Sets what is called when [`Apic::next_deadline_ns`] has another value. Once.
    pub fn set_timer_moved(&self, moved: Arc<dyn Fn() + Send + Sync>) {
        let _ = self.timer_moved.set(moved);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the registers, then tells the vCPU and the timer what follows.
    fn update<R>(&self, change: impl FnOnce(&mut Registers) -> R) -> R {
        let mut registers = self.lock();
        let result = change(&mut registers);
        let pending = registers.waiting() != Waiting::default();
        let deadline = registers.deadline_ns().unwrap_or(NEVER);
        self.pending.store(pending, Ordering::Release);
        let moved = self.deadline_ns.swap(deadline, Ordering::AcqRel) != deadline;
        drop(registers);
        if pending && let Some(notify) = self.notify.get() {
            notify();
        }
        if moved && let Some(timer_moved) = self.timer_moved.get() {
            timer_moved();
        }
        result
    }

    /// The initial APIC ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How many vCPUs the machine has.
    pub fn vcpus(&self) -> u32 {
        self.bus.upgrade().map_or(1, |bus| bus.count())
    }

    /// True if something may wait for the vCPU. Without a lock.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// What waits for the vCPU.
    pub fn waiting(&self) -> Waiting {
        self.lock().waiting()
    }

    /// Takes the maskable interrupt of highest priority: it is in service from here on. `None` if none may be taken.
    pub fn acknowledge(&self) -> Option<u8> {
        self.update(Registers::acknowledge)
    }

    /// Takes a waiting NMI.
    pub fn take_nmi(&self) -> bool {
        self.update(|r| {
            let waits = r.nmis > 0;
            r.nmis = r.nmis.saturating_sub(1);
            waits
        })
    }

    /// While one NMI is handled, only one more is kept.
    pub fn keep_one_nmi(&self) {
        self.lock().nmis = 1;
    }

    /// Takes a waiting INIT; the caller resets the vCPU. The APIC is reset here. A start-up message that no INIT came
    /// before is lost unless the processor `waits` for it.
    pub fn take_init(&self, waits: bool) -> bool {
        let now = self.waiting();
        if !now.init && (waits || now.startup.is_none()) {
            return false;
        }
        self.update(|r| {
            let init = std::mem::take(&mut r.init);
            if init {
                r.reset_registers();
            } else if !waits {
                r.startup = None;
            }
            init
        })
    }

    /// Takes a waiting start-up IPI.
    pub fn take_startup(&self) -> Option<u8> {
        self.update(|r| r.startup.take())
    }

    /// True if an interrupt with this vector is in service and was level-triggered.
    pub fn is_level(&self, vector: u8) -> bool {
        self.lock().is_level(vector)
    }

    /// Machine nanoseconds at which the timer must be polled. Without a lock.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        Some(self.deadline_ns.load(Ordering::Acquire)).filter(|&at| at != NEVER)
    }

    /// Raises the timer's interrupt if it is due.
    pub fn poll(&self, now_ns: u64) {
        if self.next_deadline_ns().is_some_and(|at| at <= now_ns) {
            self.update(|r| r.poll(now_ns));
        }
    }

    /// Puts an interrupt into service without asking, as a replayed run must.
    pub fn force(&self, vector: u8) {
        self.update(|r| r.force(vector));
    }

    /// A message arrived for this APIC.
    pub(crate) fn accept(&self, message: &Message) {
        self.update(|r| r.accept(message.mode, message.vector, message.level));
    }

    /// Drives the LINT0 pin, to which an 8259-like controller's INTR is wired. A vector is taken once.
    pub fn ext_int(&self, vector: Option<u8>) {
        self.update(|r| r.lint0(vector));
    }

    /// An edge on the LINT1 pin, the platform's NMI.
    pub fn nmi_pin(&self) {
        self.update(Registers::lint1);
    }

    /// An NMI by any other way.
    pub fn raise_nmi(&self) {
        self.update(Registers::raise_nmi);
    }

    /// True if a message to `destination` is for this APIC.
    pub(crate) fn is_addressed(&self, destination: Destination) -> bool {
        self.lock().is_addressed(destination)
    }

    /// Task priority as lowest-priority delivery compares it.
    pub(crate) fn processor_priority(&self) -> u8 {
        self.lock().processor_priority()
    }

    /// CR8: the task priority class.
    pub fn cr8(&self) -> u64 {
        u64::from(self.lock().task_priority() >> 4)
    }

    /// Writes CR8; `class` below 16.
    pub fn set_cr8(&self, class: u64) {
        self.update(|r| r.set_task_priority((class as u8 & 15) << 4));
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.lock().base()
    }

    /// Writes IA32_APIC_BASE (SDM vol. 3, 11.12.5 for what may follow what).
    pub fn set_base(&self, value: u64, x2apic: bool, address_bits: u32) -> Result<(), Invalid> {
        self.update(|r| r.set_base(value, x2apic, address_bits))
    }

    /// True if the APIC is switched on in IA32_APIC_BASE.
    pub fn is_enabled(&self) -> bool {
        self.lock().is_enabled()
    }

    /// True if `gpa` lies in the register page and the page is there (xAPIC mode).
    pub fn owns(&self, gpa: u64) -> bool {
        self.lock().page() == Some(gpa & !0xfff)
    }

    /// Reads the register page.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8], now_ns: u64) {
        let value = self
            .lock()
            .read(gpa as usize >> 4 & 0xff, now_ns)
            .unwrap_or(0);
        let bytes = value.to_le_bytes();
        let skip = gpa as usize & 15;
        for (i, to) in data.iter_mut().enumerate() {
            *to = bytes.get(skip + i).copied().unwrap_or(0);
        }
    }

    /// Writes the register page. Only aligned 32-bit writes do something, as on the real one.
    pub fn mmio_write(&self, gpa: u64, data: &[u8], now_ns: u64, bus: &dyn IoBus) {
        let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), gpa & 15) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        if let Ok(effect) = self.update(|r| r.write(gpa as usize >> 4 & 0xff, value, now_ns)) {
            self.follow(effect, bus);
        }
    }

    /// Reads x2APIC register `index` (MSR number less 0x800).
    pub fn msr_read(&self, index: usize, now_ns: u64) -> Result<u64, Invalid> {
        self.lock().msr_read(index, now_ns)
    }

    /// Writes x2APIC register `index` (MSR number less 0x800).
    pub fn msr_write(
        &self,
        index: usize,
        value: u64,
        now_ns: u64,
        bus: &dyn IoBus,
    ) -> Result<(), Invalid> {
        let effect = self.update(|r| r.msr_write(index, value, now_ns))?;
        self.follow(effect, bus);
        Ok(())
    }

    /// Ends the interrupt in service of highest priority.
    pub fn end_of_interrupt(&self, bus: &dyn IoBus) {
        let effect = self.update(Registers::end_of_interrupt);
        self.follow(effect, bus);
    }

    /// What a write caused outside this APIC, with its lock released.
    fn follow(&self, effect: Effect, bus: &dyn IoBus) {
        match effect {
            Effect::None => {}
            Effect::Broadcast(vector) => bus.end_of_interrupt(vector),
            Effect::Send(message) => {
                if let Some(router) = self.bus.upgrade() {
                    router.send_from(self.id, &message);
                }
            }
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.lock().tsc_deadline()
    }

    /// Writes IA32_TSC_DEADLINE, in the guest's ticks. Ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&self, value: u64, now_ns: u64) {
        self.update(|r| r.set_tsc_deadline(value, now_ns));
    }

    /// Tells the difference between the guest's and the machine's time-stamp counter, which the deadline needs.
    pub fn set_tsc_offset(&self, offset: u64, now_ns: u64) {
        self.update(|r| r.set_tsc_offset(offset, now_ns));
    }

    /// Back to the state after power-up.
    pub fn reset(&self) {
        let bootstrap = self.id == 0;
        self.update(|r| r.power_up(bootstrap));
        *self.msrs.lock().unwrap_or_else(PoisonError::into_inner) = Msrs::default();
    }

    /// The registers as values.
    pub fn save(&self, now_ns: u64) -> ApicState {
        self.lock().save(now_ns)
    }

    /// Takes over saved registers. `tsc_offset` is the vCPU's.
    pub fn restore(&self, state: &ApicState, tsc_offset: u64, now_ns: u64) {
        self.update(|r| r.restore(state, tsc_offset, now_ns));
    }
}
