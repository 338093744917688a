//! What this host's KVM is worth: a few milliseconds of measuring instead of a question about features.
//!
//! Some hosts offer a `/dev/kvm` that is itself emulated, runs guests hundreds of times slower than a CPU does, and
//! lacks instructions that every kernel uses. The probe runs loops of a tiny guest in ring 0 and ring 3, counts exits,
//! tries two telling instructions, and compares with what hardware always reaches.
//!
//! It runs in a thread of its own that the caller kicks again and again: whatever `/dev/kvm` does, the caller goes on.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use strata_engine::x86::CpuModel;
use strata_engine::{EngineError, Kicker};

use crate::cpuid;
use crate::engine::open;
use guest::Guest;

/// Interval of kicks, which end the measured loops.
const KICKS: Duration = Duration::from_millis(1);
/// How long each is measured at least, of its thread's time.
const MEASURED: Duration = Duration::from_millis(2);
/// After this the probe is given up. It takes some 10 ms where KVM is worth using; a loaded host gets more time.
const LIMIT: Duration = Duration::from_millis(100);
/// The slowest CPU made is well above, the fastest emulation below, instructions per second.
const SLOWEST: u64 = 200_000_000;
/// Nested virtualisation stays below, nanoseconds per exit.
const LONGEST_EXIT_NS: u64 = 200_000;

/// What was measured; nothing where it could not be.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Figures {
    /// Instructions per second of a short loop in ring 0.
    pub ring0_per_s: Option<u64>,
    /// The same in ring 3.
    pub ring3_per_s: Option<u64>,
    /// Nanoseconds from a guest's port access to the next.
    pub exit_ns: Option<u64>,
    /// CMPXCHG16B works.
    pub cmpxchg16b: Option<bool>,
    /// XRSTOR works.
    pub xrstor: Option<bool>,
}

/// The verdict on this host's KVM.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Whether it is better than translating.
    pub usable: bool,
    /// Why, as a clause.
    pub reason: String,
    /// What was measured.
    pub figures: Figures,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        let rate = |rate: u64| format!("{} million instructions/s", rate / 1_000_000);
        parts.extend(
            self.ring0_per_s
                .map(|value| format!("ring 0 {}", rate(value))),
        );
        parts.extend(
            self.ring3_per_s
                .map(|value| format!("ring 3 {}", rate(value))),
        );
        parts.extend(
            self.exit_ns
                .map(|ns| format!("{}.{} µs per exit", ns / 1000, ns % 1000 / 100)),
        );
        for (name, works) in [("cmpxchg16b", self.cmpxchg16b), ("xrstor", self.xrstor)] {
            parts.extend(
                works.map(|works| format!("{name} {}", if works { "works" } else { "fails" })),
            );
        }
        f.write_str(&parts.join(", "))
    }
}

/// What the caller and the probing thread share.
#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    /// The caller has gone on: nobody kicks any more.
    abandoned: AtomicBool,
}

#[derive(Default)]
struct Progress {
    figures: Figures,
    /// Set before the guest first runs.
    kicker: Option<Arc<dyn Kicker>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        if let Some(kicker) = &self.lock().kicker {
            kicker.kick();
        }
    }
}

/// How much to measure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Depth {
    /// Until the verdict is clear.
    Verdict,
    /// Everything, for whoever wants the figures.
    Figures,
}

/// Judges this host's KVM. Never fails and never takes long.
pub fn probe(depth: Depth) -> Verdict {
    let shared = Arc::new(Shared::default());
    let (sender, receiver) = channel();
    let theirs = Arc::clone(&shared);
    let spawned = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            // The caller waits for this or has given up.
            let _ = sender.send(measure(&theirs, depth));
        });
    let unusable = |reason: String| Verdict {
        usable: false,
        reason,
        figures: shared.lock().figures,
    };
    if let Err(error) = spawned {
        return unusable(format!("/dev/kvm cannot be probed: {error}"));
    }
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        match receiver.recv_timeout(KICKS) {
            Ok(Ok(guest)) => {
                drop_elsewhere(guest);
                return judge(shared.lock().figures, true);
            }
            Ok(Err(Stopped::Fault)) => return judge(shared.lock().figures, false),
            Ok(Err(Stopped::Error(error))) => return unusable(explain(&error)),
            Err(RecvTimeoutError::Timeout) => shared.kick(),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // One last kick, after which the thread sees that it is alone.
    shared.abandoned.store(true, Ordering::SeqCst);
    shared.kick();
    unusable(format!(
        "/dev/kvm did not finish the probe within {} ms",
        LIMIT.as_millis()
    ))
}

/// Taking a VM apart is the slowest part of its life; nobody needs to wait for it.
fn drop_elsewhere(guest: Guest) {
    // Without a thread it happens here.
    let _ = std::thread::Builder::new().spawn(move || drop(guest));
}

fn explain(error: &EngineError) -> String {
    match error {
        EngineError::Unsupported { reason, .. } => reason.clone(),
        other => {
            let cause = std::error::Error::source(other)
                .map_or(String::new(), |cause| format!(": {cause}"));
            format!("/dev/kvm cannot be used: {other}{cause}")
        }
    }
}

/// Why measuring ended early.
enum Stopped {
    /// It cannot be done.
    Error(EngineError),
    /// The verdict is clear.
    Fault,
}

impl From<EngineError> for Stopped {
    fn from(error: EngineError) -> Self {
        Self::Error(error)
    }
}

fn measure(shared: &Shared, depth: Depth) -> Result<Guest, Stopped> {
    let kvm = open()?;
    let mut guest = Guest::new(&kvm)?;
    shared.lock().kicker = Some(guest.kicker());
    let running = guest.enter()?;
    let given_up = || shared.abandoned.load(Ordering::SeqCst);
    let note = |set: &dyn Fn(&mut Figures)| {
        let figures = &mut shared.lock().figures;
        set(figures);
        match depth == Depth::Verdict && !faults(*figures, false).is_empty() {
            true => Err(Stopped::Fault),
            false => Ok(()),
        }
    };
    let works = guest.cmpxchg16b(given_up)?;
    note(&|figures| figures.cmpxchg16b = Some(works))?;
    let works = guest.xrstor(given_up)?;
    note(&|figures| figures.xrstor = Some(works))?;
    let rate = guest.loop_per_s(0, MEASURED, given_up)?;
    note(&|figures| figures.ring0_per_s = rate)?;
    let rate = guest.loop_per_s(3, MEASURED, given_up)?;
    note(&|figures| figures.ring3_per_s = rate)?;
    let cost = guest.exit_ns(MEASURED, given_up)?;
    note(&|figures| figures.exit_ns = cost)?;
    drop(running);
    if let Ok(baseline) = CpuModel::named("baseline")
        && faults(shared.lock().figures, true).is_empty()
    {
        cpuid::check(&kvm, &baseline)?;
    }
    Ok(guest)
}

/// Compares the figures with what hardware reaches. `complete`: what is missing could not be measured.
fn judge(figures: Figures, complete: bool) -> Verdict {
    let faults = faults(figures, complete);
    let usable = faults.is_empty();
    let reason = match usable {
        true => "/dev/kvm runs guests at the speed of hardware".to_owned(),
        false => format!("/dev/kvm {}", faults.join(", ")),
    };
    Verdict {
        usable,
        reason,
        figures,
    }
}

/// What is wrong with it, as verbs.
fn faults(figures: Figures, complete: bool) -> Vec<String> {
    let mut faults = Vec::new();
    for (ring, rate) in [(0, figures.ring0_per_s), (3, figures.ring3_per_s)] {
        match rate {
            Some(rate) if rate < SLOWEST => {
                let millions = rate / 1_000_000;
                faults.push(format!(
                    "runs ring {ring} at {millions} million instructions/s"
                ));
            }
            None if complete => faults.push(format!("does not run a loop in ring {ring}")),
            _ => {}
        }
    }
    match figures.exit_ns {
        Some(ns) if ns > LONGEST_EXIT_NS => faults.push(format!("takes {} µs per exit", ns / 1000)),
        None if complete => faults.push("does not run port accesses".to_owned()),
        _ => {}
    }
    let instructions = [
        ("cmpxchg16b", figures.cmpxchg16b),
        ("xrstor", figures.xrstor),
    ];
    let broken = instructions.iter().filter(|(_, works)| match works {
        Some(works) => !works,
        None => complete,
    });
    let broken: Vec<_> = broken.map(|(name, _)| *name).collect();
    if !broken.is_empty() {
        faults.push(format!("fails at {}", broken.join(" and ")));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Figures = Figures {
        ring0_per_s: Some(3_000_000_000),
        ring3_per_s: Some(3_000_000_000),
        exit_ns: Some(1_500),
        cmpxchg16b: Some(true),
        xrstor: Some(true),
    };

    #[test]
    fn hardware_is_usable_and_emulation_is_not() {
        assert!(judge(GOOD, true).usable);
        let emulated = Figures {
            ring0_per_s: Some(3_000_000),
            cmpxchg16b: Some(false),
            ..GOOD
        };
        let verdict = judge(emulated, true);
        assert!(!verdict.usable);
        assert_eq!(
            verdict.reason,
            "/dev/kvm runs ring 0 at 3 million instructions/s, fails at cmpxchg16b"
        );
        let slow_exits = Figures {
            exit_ns: Some(280_000),
            ..GOOD
        };
        assert!(!judge(slow_exits, true).usable);
        assert!(!judge(Figures::default(), true).usable);
        assert_eq!(
            GOOD.to_string(),
            "ring 0 3000 million instructions/s, ring 3 3000 million instructions/s, 1.5 µs per exit, \
             cmpxchg16b works, xrstor works"
        );
    }

    #[test]
    fn the_probe_comes_back_in_time_and_says_why() {
        for depth in [Depth::Verdict, Depth::Figures] {
            let start = Instant::now();
            let verdict = probe(depth);
            let took = start.elapsed();
            // Far above the limit: other tests have the CPUs at the same time.
            assert!(took < Duration::from_secs(5), "{took:?}");
            assert!(!verdict.reason.is_empty());
            eprintln!("{took:?}: {} ({})", verdict.reason, verdict.figures);
        }
    }
}
