//! What devices tell the machine about its power: off, reset, panic.

/// Something the guest did that the machine as a whole must act on.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum PowerEvent {
    /// The guest entered S5.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest's kernel panicked and goes on to run its crash kernel.
    GuestCrashLoaded,
    /// The guest wrote this value to the debug-exit test device.
    DebugExit(u32),
}

/// Takes power events.
///
/// Called on the vCPU thread, in the middle of the access and with the device's lock held: it notes the event and has
/// the vCPUs leave the guest, nothing more.
pub trait PowerSink: Send + Sync {
    /// The guest did this.
    fn power(&self, event: PowerEvent);
}
