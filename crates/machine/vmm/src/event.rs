//! Everything that the thread that owns a machine's lifecycle hears of.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use strata_devices::{PowerEvent, PowerSink};

use crate::control::ControlRequest;
use crate::gdb::DebugRequest;
use crate::vcpu::{Kickers, VcpuReport};

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A device noticed that the guest did something that concerns the machine as a whole.
    Power(PowerEvent),
    /// A vCPU stopped running.
    Vcpu(VcpuReport),
    /// Somebody outside asks for something.
    Control(ControlRequest),
    /// gdb asks for something.
    Debug(DebugRequest),
    /// A vCPU had come back for the debugger when all were parked for something else.
    DebugExit(u32),
}

/// Takes power events from devices to the event loop, and makes the vCPUs leave the guest.
pub(crate) struct PowerRelay {
    pub(crate) events: Sender<Event>,
    pub(crate) kickers: Arc<Kickers>,
}

impl PowerSink for PowerRelay {
    fn power(&self, event: PowerEvent) {
        // Nobody hears of it when the machine has ended.
        let _ = self.events.send(Event::Power(event));
        self.kickers.kick_all();
    }
}
