//! The machine's one clock: it can stop, be saved as values and restart; every timer, the TSC and kvmclock derive from it.

use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The clock as values, for saved state.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds of machine time since the machine was created, pauses left out.
    pub elapsed_ns: u64,
    /// Ticks of the guest's time-stamp counter per second.
    pub tsc_hz: u64,
}

#[derive(Debug)]
struct Inner {
    /// Machine time at `since`, or now if stopped.
    base_ns: u64,
    since: Option<Instant>,
}

/// Machine time. Starts stopped, at zero.
#[derive(Debug)]
pub struct MachineClock {
    inner: Mutex<Inner>,
    tsc_hz: u64,
}

impl MachineClock {
    /// A stopped clock at zero whose TSC ticks `tsc_hz` times a second.
    pub fn new(tsc_hz: u64) -> Self {
        Self::from_state(ClockState {
            elapsed_ns: 0,
            tsc_hz,
        })
    }

    /// A stopped clock with saved values.
    pub fn from_state(state: ClockState) -> Self {
        Self {
            inner: Mutex::new(Inner {
                base_ns: state.elapsed_ns,
                since: None,
            }),
            tsc_hz: state.tsc_hz.max(1),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets time run. No effect if it runs.
    pub fn start(&self) {
        let mut inner = self.lock();
        inner.since.get_or_insert_with(Instant::now);
    }

    /// Stops time. No effect if it stands.
    pub fn stop(&self) {
        let now = self.now_ns();
        let mut inner = self.lock();
        inner.base_ns = now;
        inner.since = None;
    }

    /// Nanoseconds of machine time.
    pub fn now_ns(&self) -> u64 {
        let inner = self.lock();
        let run = inner.since.map_or(0, |since| {
            u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
        });
        inner.base_ns.saturating_add(run)
    }

    /// The time-stamp counter before any vCPU's offset.
    pub fn tsc(&self) -> u64 {
        self.ns_to_tsc(self.now_ns())
    }

    /// Ticks of the time-stamp counter per second.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Converts nanoseconds to ticks, rounding down; wraps as the counter does.
    pub fn ns_to_tsc(&self, ns: u64) -> u64 {
        if self.tsc_hz == 1_000_000_000 {
            return ns;
        }
        (u128::from(ns) * u128::from(self.tsc_hz) / 1_000_000_000) as u64
    }

    /// Converts ticks to nanoseconds, rounding up so that a timer never fires early.
    pub fn tsc_to_ns(&self, ticks: u64) -> u64 {
        let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(self.tsc_hz));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Wall-clock nanoseconds since 1970.
    pub fn wall_ns(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The clock as values.
    pub fn state(&self) -> ClockState {
        ClockState {
            elapsed_ns: self.now_ns(),
            tsc_hz: self.tsc_hz,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stands_until_started_and_keeps_its_value_when_stopped() {
        let clock = MachineClock::from_state(ClockState {
            elapsed_ns: 5_000,
            tsc_hz: 1_000_000_000,
        });
        assert_eq!(clock.now_ns(), 5_000);
        clock.start();
        while clock.now_ns() == 5_000 {}
        clock.stop();
        let state = clock.state();
        assert!(state.elapsed_ns > 5_000);
        assert_eq!(MachineClock::from_state(state).now_ns(), state.elapsed_ns);
    }

    #[test]
    fn a_deadline_in_ticks_is_never_early_in_nanoseconds() {
        let clock = MachineClock::new(2_595_123_456);
        for ticks in [1, 2, 3, 1_000_003, u64::MAX / 16] {
            assert!(clock.ns_to_tsc(clock.tsc_to_ns(ticks)) >= ticks);
        }
    }
}
