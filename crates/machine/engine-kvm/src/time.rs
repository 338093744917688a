//! Machine time and the kernel's: guests' time-stamp counters and paravirtual clocks stand while the machine does.
//!
//! The kernel's counters run on while a machine is paused. Whoever first runs a vCPU afterwards works out by how much
//! all of them must go back; every vCPU then takes the same step, so that their counters stay equal to the tick.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use strata_engine::MachineClock;

/// Shorter pauses (a stop for statistics is none at all) are left alone, nanoseconds.
const NOTICED: u64 = 1_000_000;

/// The relation between the two.
pub struct Time {
    clock: Arc<MachineClock>,
    origin: Instant,
    inner: Mutex<Option<Relation>>,
}

#[derive(Clone, Copy)]
struct Relation {
    /// Host nanoseconds since `origin` less machine nanoseconds: grows with each pause and with nothing else.
    skew_ns: u64,
    /// Ticks to add to the counters that the kernel started, wrapping.
    correction: u64,
}

impl Time {
    /// For a VM without vCPUs.
    pub fn new(clock: Arc<MachineClock>) -> Self {
        Self {
            clock,
            origin: Instant::now(),
            inner: Mutex::default(),
        }
    }

    /// The machine's clock.
    pub fn clock(&self) -> &MachineClock {
        &self.clock
    }

    /// What the time-stamp counter of a vCPU without an offset of its own reads now, at `hz`.
    pub fn tsc(&self, hz: u64) -> u64 {
        ticks(self.clock.now_ns(), hz)
    }

    /// A vCPU is about to run: the correction that its counter must have. `current` reads its counter, without its
    /// own offset, and is asked only before the first run.
    pub fn correction(&self, vm: &VmFd, hz: u64, current: impl FnOnce() -> u64) -> u64 {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let skew_ns = self.skew_ns();
        let relation = match *inner {
            None => {
                // Without a paravirtual clock nobody looks.
                let _ = vm.set_clock(&clock_data(self.clock.now_ns()));
                Relation {
                    skew_ns,
                    correction: self.tsc(hz).wrapping_sub(current()),
                }
            }
            Some(old) if skew_ns > old.skew_ns + NOTICED => {
                let pause = skew_ns - old.skew_ns;
                if let Ok(now) = vm.get_clock() {
                    let _ = vm.set_clock(&clock_data(now.clock.saturating_sub(pause)));
                }
                Relation {
                    skew_ns,
                    correction: old.correction.wrapping_sub(ticks(pause, hz)),
                }
            }
            Some(old) => old,
        };
        *inner = Some(relation);
        relation.correction
    }

    /// The best of a few readings: the two clocks cannot be read at once.
    fn skew_ns(&self) -> u64 {
        let reading = |_| {
            let machine = self.clock.now_ns();
            let host = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
            host.saturating_sub(machine)
        };
        (0..4).map(reading).min().unwrap_or(0)
    }
}

fn clock_data(clock: u64) -> kvm_clock_data {
    kvm_clock_data {
        clock,
        ..Default::default()
    }
}

/// Nanoseconds in ticks, wrapping as the counter does.
pub fn ticks(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / 1_000_000_000) as u64
}
