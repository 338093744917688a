//! `oracle`: runs a campaign of random instructions against the host's CPU.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::Parser;
use strata_oracle::campaign::{Campaign, describe};
use strata_oracle::coverage::{Coverage, gaps};
use strata_oracle::generate::Generator;
use strata_oracle::guest::model;

/// Runs random instructions natively and in the software engine and compares.
#[derive(Parser)]
struct Args {
    /// Stop after this many seconds.
    #[arg(long, default_value_t = u64::MAX)]
    seconds: u64,
    /// Stop after this many sequences (rounded up to a batch).
    #[arg(long, default_value_t = u64::MAX)]
    sequences: u64,
    /// Seed of the random choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Batch to begin with.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Stop after this many differences.
    #[arg(long, default_value_t = 20)]
    stop: u64,
    /// Print what was exercised fewer than 1,000 times.
    #[arg(long)]
    coverage: bool,
    /// Print what no case has, and why, and do nothing else: the contents of coverage-gaps.txt.
    #[arg(long)]
    gaps: bool,
}

/// What the jobs share.
struct Total {
    started: Instant,
    cases: AtomicU64,
    differences: AtomicU64,
    timeouts: AtomicU64,
    faults: AtomicU64,
    tolerated: AtomicU64,
    coverage: Mutex<Coverage>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.gaps {
        for (code, reason) in gaps(Generator::new(&model()?).features()) {
            println!("{code:?}: {reason}");
        }
        return Ok(());
    }
    let total = Total {
        started: Instant::now(),
        cases: AtomicU64::new(0),
        differences: AtomicU64::new(0),
        timeouts: AtomicU64::new(0),
        faults: AtomicU64::new(0),
        tolerated: AtomicU64::new(0),
        coverage: Mutex::default(),
    };
    std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..args.jobs)
            .map(|job| {
                let (args, total) = (&args, &total);
                scope.spawn(move || work(args, total, job))
            })
            .collect();
        jobs.into_iter()
            .try_for_each(|job| job.join().map_err(|_| anyhow!("a job panicked"))?)
    })?;
    let (cases, differences) = (total.cases.into_inner(), total.differences.into_inner());
    if args.coverage {
        let coverage = total
            .coverage
            .into_inner()
            .map_err(|_| anyhow!("a job panicked"))?;
        let generator = Generator::new(&model()?);
        for (code, kind, count) in coverage.missing(&generator) {
            println!("{code:?} {kind:?}: {count}");
        }
    }
    // Each case runs in two configurations.
    println!(
        "{} ended in a fault, {} are left to the processor and not compared, {} did not end natively",
        total.faults.into_inner() / 2,
        total.tolerated.into_inner() / 2,
        total.timeouts.into_inner() / 2,
    );
    println!(
        "campaign: {cases} cases, {differences} differences, seed {}",
        args.seed
    );
    std::process::exit(i32::from(differences != 0));
}

/// One job: every `jobs`-th batch.
fn work(args: &Args, total: &Total, job: u64) -> Result<()> {
    let mut campaign = Campaign::new(args.seed)?;
    let mut batch = args.first + job;
    let mut said = Instant::now();
    while total.started.elapsed() < Duration::from_secs(args.seconds)
        && total.cases.load(Ordering::Relaxed) < args.sequences
        && total.differences.load(Ordering::Relaxed) < args.stop
    {
        let before = campaign.cases;
        for found in campaign.batch(batch)? {
            total.differences.fetch_add(1, Ordering::Relaxed);
            println!(
                "difference: batch {} case {}{}{}",
                found.batch,
                found.case,
                found.text,
                describe(&found.program)
            );
        }
        total
            .cases
            .fetch_add(campaign.cases - before, Ordering::Relaxed);
        batch += args.jobs;
        if job == 0 && said.elapsed() > Duration::from_secs(30) {
            said = Instant::now();
            let cases = total.cases.load(Ordering::Relaxed);
            eprintln!(
                "{cases} cases, {:.0}/s",
                cases as f64 / total.started.elapsed().as_secs_f64()
            );
        }
    }
    for (sum, part) in [
        (&total.timeouts, campaign.timeouts),
        (&total.faults, campaign.faults),
        (&total.tolerated, campaign.tolerated),
    ] {
        sum.fetch_add(part, Ordering::Relaxed);
    }
    total
        .coverage
        .lock()
        .map_err(|_| anyhow!("a job panicked"))?
        .merge(&campaign.coverage);
    Ok(())
}
