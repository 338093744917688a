//! What this host's KVM is worth: a few milliseconds of measuring instead of a question about features.
//!
//! Some hosts offer a `/dev/kvm` that is itself emulated, runs guests hundreds of times slower than a CPU does, and
//! lacks instructions that every kernel uses. The probe runs loops of a tiny guest in ring 0 and ring 3, counts exits,
//! tries two telling instructions, and compares with what hardware always reaches.
//!
//! It runs in a thread of its own that the caller kicks again and again: whatever `/dev/kvm` does, the caller goes on.

mod guest;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use strata_engine::x86::CpuModel;
use strata_engine::{EngineError, Kicker};

use crate::cpuid;
use crate::engine::open;
use guest::Guest;

/// Interval of kicks: how long a loop is measured at least.
const STEP: Duration = Duration::from_millis(2);
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

/// Judges this host's KVM. Never fails and never takes long.
pub fn probe() -> Verdict {
    let shared = Arc::new(Mutex::new(Figures::default()));
    let (sender, receiver) = channel();
    let (figures, kickers) = (Arc::clone(&shared), sender.clone());
    let spawned = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            let result = measure(&figures, |kicker| {
                // The caller waits for this thread or has given up.
                let _ = kickers.send(Message::Kicker(kicker));
            });
            let _ = sender.send(Message::Done(result.map(Box::new)));
        });
    let unusable = |reason: String| Verdict {
        usable: false,
        reason,
        figures: *lock(&shared),
    };
    if let Err(error) = spawned {
        return unusable(format!("/dev/kvm cannot be probed: {error}"));
    }
    let start = Instant::now();
    let mut kicker: Option<Arc<dyn Kicker>> = None;
    while start.elapsed() < LIMIT {
        match receiver.recv_timeout(STEP) {
            Ok(Message::Kicker(its)) => kicker = Some(its),
            Ok(Message::Done(Ok(guest))) => {
                let verdict = judge(*lock(&shared));
                drop_elsewhere(guest);
                return verdict;
            }
            Ok(Message::Done(Err(error))) => return unusable(explain(&error)),
            Err(RecvTimeoutError::Timeout) => {
                if let Some(kicker) = &kicker {
                    kicker.kick();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    unusable(format!(
        "/dev/kvm did not finish the probe within {} ms",
        LIMIT.as_millis()
    ))
}

enum Message {
    Kicker(Arc<dyn Kicker>),
    Done(Result<Box<Guest>, EngineError>),
}

fn lock(figures: &Mutex<Figures>) -> std::sync::MutexGuard<'_, Figures> {
    figures.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Taking a VM apart is the slowest part of its life; nobody needs to wait for it.
fn drop_elsewhere(guest: Box<Guest>) {
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

fn measure(
    figures: &Mutex<Figures>,
    ready: impl FnOnce(Arc<dyn Kicker>),
) -> Result<Guest, EngineError> {
    let kvm = open()?;
    let mut guest = Guest::new(&kvm)?;
    ready(guest.kicker());
    let running = guest.enter()?;
    let works = guest.cmpxchg16b()?;
    lock(figures).cmpxchg16b = Some(works);
    let works = guest.xrstor()?;
    lock(figures).xrstor = Some(works);
    let cost = guest.exit_ns(STEP)?;
    lock(figures).exit_ns = cost;
    let rate = guest.loop_per_s(0, STEP)?;
    lock(figures).ring0_per_s = rate;
    let rate = guest.loop_per_s(3, STEP)?;
    lock(figures).ring3_per_s = rate;
    drop(running);
    if judge(*lock(figures)).usable
        && let Ok(baseline) = CpuModel::named("baseline")
    {
        cpuid::check(&kvm, &baseline)?;
    }
    Ok(guest)
}

/// Compares the figures with what hardware reaches.
fn judge(figures: Figures) -> Verdict {
    let slow = |rate: Option<u64>| rate.is_none_or(|rate| rate < SLOWEST);
    let mut faults = Vec::new();
    for (ring, rate) in [(0, figures.ring0_per_s), (3, figures.ring3_per_s)] {
        match rate {
            Some(rate) if slow(Some(rate)) => {
                let millions = rate / 1_000_000;
                faults.push(format!(
                    "runs ring {ring} at {millions} million instructions/s"
                ));
            }
            None => faults.push(format!("does not run a loop in ring {ring}")),
            Some(_) => {}
        }
    }
    match figures.exit_ns {
        Some(ns) if ns > LONGEST_EXIT_NS => faults.push(format!("takes {} µs per exit", ns / 1000)),
        None => faults.push("does not run port accesses".to_owned()),
        Some(_) => {}
    }
    let broken: Vec<_> = [
        ("cmpxchg16b", figures.cmpxchg16b),
        ("xrstor", figures.xrstor),
    ]
    .into_iter()
    .filter(|(_, works)| *works != Some(true))
    .map(|(name, _)| name)
    .collect();
    if !broken.is_empty() {
        faults.push(format!("fails at {}", broken.join(" and ")));
    }
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
        assert!(judge(GOOD).usable);
        let emulated = Figures {
            ring0_per_s: Some(3_000_000),
            cmpxchg16b: Some(false),
            ..GOOD
        };
        let verdict = judge(emulated);
        assert!(!verdict.usable);
        assert_eq!(
            verdict.reason,
            "/dev/kvm runs ring 0 at 3 million instructions/s, fails at cmpxchg16b"
        );
        assert!(
            !judge(Figures {
                exit_ns: Some(280_000),
                ..GOOD
            })
            .usable
        );
        assert!(!judge(Figures::default()).usable);
        assert_eq!(
            GOOD.to_string(),
            "ring 0 3000 million instructions/s, ring 3 3000 million instructions/s, 1.5 µs per exit, \
             cmpxchg16b works, xrstor works"
        );
    }

    #[test]
    fn the_probe_comes_back_in_time_and_says_why() {
        let start = Instant::now();
        let verdict = probe();
        // Far above the limit: other tests have the CPUs at the same time.
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        assert!(!verdict.reason.is_empty());
        eprintln!(
            "{:?}: {} ({})",
            start.elapsed(),
            verdict.reason,
            verdict.figures
        );
    }
}
