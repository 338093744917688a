//! The machine's one clock: it can stop, be saved as values and restart; every timer, the TSC and kvmclock derive from it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
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

/// Machine time. Starts stopped, at zero.
///
/// Reading it takes no lock: all vCPUs of a machine do so all the time.
#[derive(Debug)]
pub struct MachineClock {
    origin: Instant,
    /// Machine time while it stands, or [`RUNS`].
    stands_at: AtomicU64,
    /// Machine time minus the time since `origin`, modulo 2^64, while it runs.
    offset: AtomicU64,
    /// How often it was started.
    starts: AtomicU64,
    /// Held by whoever starts or stops it.
    changing: Mutex<()>,
    tsc_hz: u64,
}

const RUNS: u64 = u64::MAX;

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
            origin: Instant::now(),
            stands_at: AtomicU64::new(state.elapsed_ns.min(RUNS - 1)),
            offset: AtomicU64::new(0),
            starts: AtomicU64::new(0),
            changing: Mutex::new(()),
            tsc_hz: state.tsc_hz.max(1),
        }
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds of the host since the clock was made.
    fn host_ns(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Lets time run. No effect if it runs.
    pub fn start(&self) {
        let _changing = self.change();
        let at = self.stands_at.load(Ordering::SeqCst);
        if at != RUNS {
            let offset = at.wrapping_sub(self.host_ns());
            self.offset.store(offset, Ordering::SeqCst);
            self.stands_at.store(RUNS, Ordering::SeqCst);
            self.starts.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How often it was started: what was worked out of its values before the last time may be wrong since.
    pub fn starts(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    /// Stops time. No effect if it stands.
    pub fn stop(&self) {
        let _changing = self.change();
        let now = self.now_ns();
        self.stands_at.store(now.min(RUNS - 1), Ordering::SeqCst);
    }

    /// Nanoseconds of machine time.
    pub fn now_ns(&self) -> u64 {
        match self.stands_at.load(Ordering::SeqCst) {
            RUNS => {
                let offset = self.offset.load(Ordering::SeqCst);
                self.host_ns().wrapping_add(offset)
            }
            at => at,
        }
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
