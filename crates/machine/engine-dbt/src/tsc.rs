//! The guest's time-stamp counter out of the host's: a straight line that all vCPUs of a machine share.
//!
//! Machine time comes from the host's monotonic clock, and asking that takes longer than many a guest's loop. So
//! between two looks at the clock the counter runs with the host's own: guest ticks = a start + host ticks × a rate. A
//! look at the clock, at least every millisecond of reading, starts the next piece where the last one is at that
//! moment or further on, so that the counter never goes back on any vCPU, and with the rate that leads it to the clock. So
//! it follows the clock, as the timers do. After a pause, in which no vCPU runs, the line begins anew.

use std::arch::x86_64::{_mm_lfence, _rdtsc};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use strata_engine::MachineClock;

/// A rate has this many bits behind the point.
const POINT: u32 = 32;
/// Nanoseconds between two looks at the clock at most.
const LOOK_NS: u64 = 1_000_000;
/// Nanoseconds that the host's counter must have been measured for.
const MEASURE_NS: u64 = 5_000_000;
/// Host ticks that reading the clock may take, to believe that it was read then.
const READ_TICKS: u64 = 2_000;

/// One piece of the line. `#[repr(C)]` because stubs read it.
#[derive(Debug, Default)]
#[repr(C)]
pub struct TscLine {
    /// Odd while the rest changes.
    pub version: AtomicU64,
    /// The host's counter where the piece starts.
    pub host: AtomicU64,
    /// The guest's counter there, before any vCPU's offset.
    pub guest: AtomicU64,
    /// Guest ticks per host tick, shifted left by 32.
    pub rate: AtomicU64,
    /// Host ticks that the piece may be used for; 0 for none.
    pub length: AtomicU64,
}

/// What the line is made from.
#[derive(Debug, Default)]
struct Measured {
    /// Host and guest ticks when measuring began, if it has.
    since: Option<(u64, u64)>,
    /// Host and guest ticks at the last look.
    looked: (u64, u64),
    /// How often the clock had been started then.
    starts: u64,
    /// Nobody has seen a later value.
    seen: u64,
}

/// The line of one machine.
#[derive(Debug, Default)]
pub struct Tsc {
    line: TscLine,
    measured: Mutex<Measured>,
}

fn host_ticks() -> u64 {
    // SAFETY: RDTSC reads a counter, after everything before it.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// Guest ticks for host ticks.
fn ticks(host: u64, rate: u64) -> u64 {
    ((u128::from(host) * u128::from(rate)) >> POINT) as u64
}

/// True if the host's counter went back, or ran on while the clock stood (the host slept), between the last two looks:
/// what was measured means nothing any more. Each pair is host and guest ticks.
fn strayed(all: (u64, u64), recent: (u64, u64)) -> bool {
    let (host, guest) = (u128::from(all.0), u128::from(all.1));
    if (recent.0 as i64) < 0 || (all.0 as i64) < 0 {
        return true;
    }
    // So many guest ticks there should have been since the last look; a slow look itself is no reason.
    let expected = u128::from(recent.0) * guest / host.max(1);
    let off = expected.abs_diff(u128::from(recent.1));
    let slack = guest * u128::from(100 * READ_TICKS) / host.max(1);
    off > expected / 50 + slack
}

impl TscLine {
    /// The counter at the host's ticks `host`, if the piece reaches so far.
    fn at(&self, host: u64) -> Option<u64> {
        let since = host.wrapping_sub(self.host.load(Ordering::Relaxed));
        (since <= self.length.load(Ordering::Relaxed)).then(|| {
            let rate = self.rate.load(Ordering::Relaxed);
            let guest = self.guest.load(Ordering::Relaxed);
            guest.wrapping_add(ticks(since, rate))
        })
    }
}

impl Tsc {
    /// Where stubs read it.
    pub fn line(&self) -> *const TscLine {
        &raw const self.line
    }

    /// The counter before any vCPU's offset.
    pub fn read(&self, clock: &MachineClock) -> u64 {
        loop {
            let version = self.line.version.load(Ordering::Acquire);
            let value = self.line.at(host_ticks());
            fence(Ordering::Acquire);
            let same = version & 1 == 0 && version == self.line.version.load(Ordering::Relaxed);
            match value {
                Some(value) if same => return value,
                None if same => return self.look(clock),
                _ => std::hint::spin_loop(),
            }
        }
    }

    /// Begins anew if machine time stood meanwhile. Called before a vCPU runs.
    pub fn resume(&self, clock: &MachineClock) {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if measured.starts != clock.starts() {
            measured.starts = clock.starts();
            self.begin_anew(&mut measured);
        }
    }

    /// Ends the line, and the measuring with it.
    fn begin_anew(&self, measured: &mut Measured) {
        measured.since = None;
        measured.seen = measured.seen.max(self.end());
        self.set(0, 0, 0, 0);
    }

    /// The last value of the current piece.
    fn end(&self) -> u64 {
        let (length, rate) = (&self.line.length, &self.line.rate);
        let guest = self.line.guest.load(Ordering::Relaxed);
        let all = ticks(length.load(Ordering::Relaxed), rate.load(Ordering::Relaxed));
        guest.saturating_add(all)
    }

    fn set(&self, host: u64, guest: u64, rate: u64, length: u64) {
        let line = &self.line;
        let version = line.version.load(Ordering::Relaxed);
        line.version.store(version | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        line.host.store(host, Ordering::Relaxed);
        line.guest.store(guest, Ordering::Relaxed);
        line.rate.store(rate, Ordering::Relaxed);
        line.length.store(length, Ordering::Relaxed);
        line.version.store((version | 1) + 1, Ordering::Release);
    }

    /// Looks at the clock and lays the next piece.
    fn look(&self, clock: &MachineClock) -> u64 {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if self.line.length.load(Ordering::Relaxed) != 0
            && let Some(value) = self.line.at(host_ticks())
        {
            // Another vCPU was faster.
            return value;
        }
        let (mut host, mut now) = (0, 0);
        for _ in 0..8 {
            let before = host_ticks();
            now = clock.tsc();
            host = host_ticks();
            if host.wrapping_sub(before) < READ_TICKS {
                break;
            }
        }
        let Some((host_since, guest_since)) = measured.since else {
            measured.since = Some((host, now));
            measured.looked = (host, now);
            measured.seen = measured.seen.max(now);
            return measured.seen;
        };
        let (host_before, before) = std::mem::replace(&mut measured.looked, (host, now));
        let all = (host.wrapping_sub(host_since), now.wrapping_sub(guest_since));
        let recent = (host.wrapping_sub(host_before), now.wrapping_sub(before));
        if strayed(all, recent) {
            self.begin_anew(&mut measured);
            measured.seen = measured.seen.max(now);
            return measured.seen;
        }
        let passed = now.wrapping_sub(guest_since);
        let host_passed = host.wrapping_sub(host_since);
        let measure = clock.ns_to_tsc(MEASURE_NS).max(1);
        if passed < measure || host_passed < MEASURE_NS / 10 {
            measured.seen = measured.seen.max(now);
            return measured.seen;
        }
        let rate = (u128::from(passed) << POINT) / u128::from(host_passed);
        let look = u128::from(clock.ns_to_tsc(LOOK_NS).max(1));
        let length = u128::from(host_passed) * look / u128::from(passed);
        // Where the last piece is by now, though it is too short.
        let line = &self.line;
        let since = host.wrapping_sub(line.host.load(Ordering::Relaxed));
        let guest = line.guest.load(Ordering::Relaxed);
        let last = guest.saturating_add(ticks(since, line.rate.load(Ordering::Relaxed)));
        let start = now.max(last).max(measured.seen);
        let ahead = u128::from(start - now).min(look / 2);
        let slower = rate - rate * ahead / look;
        let rate = u64::try_from(slower).unwrap_or(u64::MAX);
        self.set(host, start, rate, u64::try_from(length).unwrap_or(0));
        measured.seen = self.end();
        start
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn follows_the_clock_and_never_goes_back() {
        let clock = Arc::new(MachineClock::new(2_595_123_456));
        clock.start();
        let tsc = Arc::new(Tsc::default());
        tsc.resume(&clock);
        let last = Arc::new(AtomicU64::new(0));
        let until = Instant::now() + Duration::from_millis(60);
        let mut threads = Vec::new();
        for _ in 0..3 {
            let (clock, tsc, last) = (Arc::clone(&clock), Arc::clone(&tsc), Arc::clone(&last));
            threads.push(thread::spawn(move || {
                let mut on_line = 0;
                while Instant::now() < until {
                    let before = clock.tsc();
                    let seen = last.load(Ordering::SeqCst);
                    let value = tsc.read(&clock);
                    let after = clock.tsc();
                    assert!(value >= seen, "{value} after {seen}");
                    last.fetch_max(value, Ordering::SeqCst);
                    on_line += u32::from(tsc.line.length.load(Ordering::Relaxed) != 0);
                    // A tenth of a millisecond: threads stand while others run.
                    let slack = clock.ns_to_tsc(100_000);
                    assert!(value + slack >= before, "{value} is behind {before}");
                    assert!(value <= after + slack, "{value} is ahead of {after}");
                }
                on_line
            }));
        }
        let on_line: u32 = threads.into_iter().map(|t| t.join().unwrap()).sum();
        assert!(on_line > 1000, "only {on_line} on the line");
    }

    #[test]
    fn a_host_that_slept_or_went_back_is_noticed() {
        let hour = 3_600_000_000_000;
        assert!(!strayed((1_000_000, 2_000_000), (10_000, 20_000)));
        assert!(!strayed((hour, 2 * hour), (3_000_000, 6_010_000)));
        assert!(strayed((2 * hour, hour / 2), (hour, 2_000_000)));
        assert!(strayed((hour, hour), (1u64.wrapping_neg(), 100)));
        assert!(strayed((0, 0), (hour, 1)));
    }

    #[test]
    fn a_pause_is_left_out() {
        let clock = MachineClock::new(1_000_000_000);
        clock.start();
        let tsc = Tsc::default();
        tsc.resume(&clock);
        let read_for = |ms| {
            let until = Instant::now() + Duration::from_millis(ms);
            let mut value = 0;
            while Instant::now() < until {
                value = tsc.read(&clock);
            }
            value
        };
        read_for(20);
        clock.stop();
        let stopped = clock.now_ns();
        thread::sleep(Duration::from_millis(50));
        clock.start();
        tsc.resume(&clock);
        let after = tsc.read(&clock);
        // A tick is a nanosecond here; how long this thread itself was kept waiting does not matter.
        let slack = 1_000_000;
        let line = stopped.saturating_sub(slack)..=clock.now_ns() + slack;
        assert!(line.contains(&after), "{after} is not in {line:?}");
        assert!(read_for(20) > after);
    }
}
