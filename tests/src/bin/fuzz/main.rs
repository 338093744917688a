//! Campaign: fuzz targets for everything that reads what a guest, a file or a client made. Each turns bytes into a
//! sequence of operations (`input`), so that inputs reach deep states; inputs that end as none before are kept and
//! changed further.
//!
//! Takes `--seconds N --seed S`, or `--replay TARGET FILE`. The committed corpus (`tests/corpus/TARGET`) runs first. A
//! panic, a case that takes longer than [`SLOW`], and memory that keeps growing are differences; the input is left in
//! the directory for temporary files, to be replayed and to become a corpus file.

mod disks;
mod input;
mod kernels;
mod network;
mod platform;
mod protocols;
mod virtio;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use input::Random;

/// A case that takes more of the CPU is a finding; how long a busy host lets us wait is not.
const SLOW: Duration = Duration::from_secs(5);
/// A case that takes this long is taken for endless: the campaign ends.
const ENDLESS: Duration = Duration::from_secs(120);
/// MiB that the process may have.
const MEMORY: u64 = 1024;
/// Inputs of each target that are kept for changing.
const KEPT: usize = 300;
/// Bytes of an input.
const LONGEST: usize = 64 << 10;

/// One thing to be fuzzed: runs an input and gives a number that tells apart how inputs end.
struct Target {
    name: &'static str,
    run: fn(&[u8]) -> u64,
    /// Inputs to begin with, besides the corpus.
    seeds: fn() -> Vec<Vec<u8>>,
}

const TARGETS: &[Target] = &[
    Target {
        name: "virtio-blk",
        run: virtio::blk,
        seeds: virtio::seeds,
    },
    Target {
        name: "virtio-console",
        run: virtio::console,
        seeds: virtio::seeds,
    },
    Target {
        name: "virtio-net",
        run: virtio::net,
        seeds: virtio::seeds,
    },
    Target {
        name: "virtio-rng",
        run: virtio::rng,
        seeds: virtio::seeds,
    },
    Target {
        name: "virtio-vsock",
        run: virtio::vsock,
        seeds: virtio::seeds,
    },
    Target {
        name: "platform",
        run: platform::run,
        seeds: platform::seeds,
    },
    Target {
        name: "agent",
        run: protocols::agent,
        seeds: protocols::agent_seeds,
    },
    Target {
        name: "control",
        run: protocols::control,
        seeds: protocols::control_seeds,
    },
    Target {
        name: "kernel",
        run: kernels::run,
        seeds: kernels::seeds,
    },
    Target {
        name: "disk",
        run: disks::find,
        seeds: disks::find_seeds,
    },
    Target {
        name: "qcow2",
        run: disks::qcow2,
        seeds: disks::qcow2_seeds,
    },
    Target {
        name: "switch",
        run: network::switch,
        seeds: network::seeds,
    },
    Target {
        name: "gateway",
        run: network::gateway,
        seeds: network::seeds,
    },
    Target {
        name: "nat",
        run: network::nat,
        seeds: network::nat_seeds,
    },
    Target {
        name: "vxlan",
        run: network::vxlan,
        seeds: network::vxlan_seeds,
    },
    Target {
        name: "ring",
        run: network::ring,
        seeds: network::seeds,
    },
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (mut seconds, mut seed, mut only) = (60, 1, None);
    let mut rest = words.as_slice();
    loop {
        rest = match rest {
            [] => break,
            ["--replay", target, file] => return replay(target, Path::new(file)),
            ["--seconds", value, more @ ..] => {
                seconds = value.parse().unwrap_or(60);
                more
            }
            ["--seed", value, more @ ..] => {
                seed = value.parse().unwrap_or(1);
                more
            }
            ["--target", value, more @ ..] => {
                only = Some(*value);
                more
            }
            _ => {
                eprintln!(
                    "fuzz: usage: fuzz --seconds N --seed S [--target NAME] | --replay TARGET FILE"
                );
                return ExitCode::from(64);
            }
        };
    }
    let mut campaign = Campaign::new(seed, only);
    campaign.run(Duration::from_secs(seconds));
    println!(
        "campaign: {} cases, {} differences, seed {seed}",
        campaign.cases, campaign.differences
    );
    ExitCode::from(u8::from(campaign.differences > 0 || campaign.cases == 0))
}

fn replay(name: &str, file: &Path) -> ExitCode {
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        eprintln!("fuzz: there is no target '{name}'");
        return ExitCode::from(64);
    };
    match std::fs::read(file) {
        Ok(input) => {
            println!("ended as {:#x}", (target.run)(&unpacked(input)));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("fuzz: {}: {error}", file.display());
            ExitCode::from(66)
        }
    }
}

/// Corpus files may be compressed.
fn unpacked(file: Vec<u8>) -> Vec<u8> {
    if !file.starts_with(&[0x1f, 0x8b]) {
        return file;
    }
    let mut whole = Vec::new();
    let mut reader = flate2::read::GzDecoder::new(file.as_slice());
    match std::io::Read::read_to_end(&mut reader, &mut whole) {
        Ok(_) => whole,
        Err(_) => file,
    }
}

/// What is under way, for the thread that watches.
type Current = Arc<Mutex<Option<(&'static str, Vec<u8>, Instant)>>>;

/// A target with what is kept of it.
struct Ground {
    target: &'static Target,
    kept: Vec<Vec<u8>>,
    endings: HashSet<u64>,
    cases: u64,
}

struct Campaign {
    random: Random,
    grounds: Vec<Ground>,
    current: Current,
    cases: u64,
    differences: u64,
}

impl Campaign {
    fn new(seed: u64, only: Option<&str>) -> Campaign {
        let current = Current::default();
        let watched = Arc::clone(&current);
        std::thread::spawn(move || watch(&watched));
        let chosen = TARGETS
            .iter()
            .filter(|target| only.is_none_or(|name| name == target.name));
        let ground = |target| Ground {
            target,
            kept: Vec::new(),
            endings: HashSet::new(),
            cases: 0,
        };
        Campaign {
            random: Random::new(seed),
            grounds: chosen.map(ground).collect(),
            current,
            cases: 0,
            differences: 0,
        }
    }

    /// First what is known, then changes of it, each target in turn.
    fn run(&mut self, time: Duration) {
        let end = Instant::now() + time;
        for index in 0..self.grounds.len() {
            let target = self.grounds[index].target;
            let mut known = (target.seeds)();
            known.extend(corpus(target.name));
            for input in known {
                self.case(index, input);
            }
        }
        while Instant::now() < end && self.differences < 20 {
            for index in 0..self.grounds.len() {
                // A few at once: what a target uses stays warm.
                for _ in 0..16 {
                    let kept = &self.grounds[index].kept;
                    let mut input = self.random.pick(kept).cloned().unwrap_or_default();
                    let other = self.random.pick(kept).cloned().unwrap_or_default();
                    self.random.change(&mut input, &other);
                    input.truncate(LONGEST.max(other.len()));
                    self.case(index, input);
                }
            }
            if let Some(memory) = resident().filter(|&memory| memory > MEMORY) {
                println!("difference: the process has {memory} MiB");
                self.differences += 1;
                break;
            }
        }
        for ground in &self.grounds {
            println!(
                "{}: {} cases, {} endings",
                ground.target.name,
                ground.cases,
                ground.endings.len()
            );
        }
    }

    fn case(&mut self, index: usize, input: Vec<u8>) {
        let ground = &mut self.grounds[index];
        let name = ground.target.name;
        let (start, worked) = (Instant::now(), worked());
        *lock(&self.current) = Some((name, input.clone(), start));
        let result = catch_unwind(AssertUnwindSafe(|| (ground.target.run)(&input)));
        *lock(&self.current) = None;
        ground.cases += 1;
        self.cases += 1;
        let slow = start.elapsed() > SLOW && self::worked().saturating_sub(worked) > SLOW;
        match result {
            Ok(_) if slow => self.difference(name, &input, "is slow"),
            Err(_) => self.difference(name, &input, "panics"),
            Ok(ending) => {
                if ground.endings.insert(ending) || ground.kept.is_empty() {
                    if ground.kept.len() >= KEPT {
                        let at = self.random.below(KEPT as u64) as usize;
                        ground.kept.swap_remove(at);
                    }
                    ground.kept.push(input);
                }
            }
        }
    }

    fn difference(&mut self, name: &str, input: &[u8], what: &str) {
        self.differences += 1;
        println!(
            "difference: {name} {what}: {}",
            leave(name, input).display()
        );
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves an input where it can be found.
fn leave(name: &str, input: &[u8]) -> PathBuf {
    let sum = input.iter().fold(0u64, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let path = std::env::temp_dir().join(format!("fuzz-{name}-{sum:016x}"));
    if let Err(error) = std::fs::write(&path, input) {
        println!("{}: {error}", path.display());
    }
    path
}

/// Ends the process if a case does not end.
fn watch(current: &Current) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let guard = lock(current);
        if let Some((name, input, start)) = guard.as_ref()
            && start.elapsed() > ENDLESS
        {
            println!(
                "difference: {name} does not end: {}",
                leave(name, input).display()
            );
            std::process::exit(1);
        }
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
        .iter()
        .filter_map(|path| std::fs::read(path).ok())
        .map(unpacked)
        .collect()
}

/// How long this thread has had a CPU.
fn worked() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = text
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    Duration::from_nanos(first.unwrap_or(0))
}

/// MiB of this process that are in memory.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * 4 / 1024)
}
