//! `cargo xtask bench`: the guest benchmark natively, under QEMU TCG and under Strata, in turns, and the table of ratios.
//!
//! Every turn runs every class on each machine, so that a busy moment of the host hits all of them; a class counts with
//! its best turn. Each result's checksum is compared with the native one. A class that fails stands in the table as failed.

pub mod initrd;
mod machine;
mod network;
mod report;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::{guest, setup, shell};
use machine::{Guest, Kind, Outcome};
use report::{Class, Report};

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    what: Option<What>,
    /// How often everything runs; the best turn counts.
    #[arg(long, default_value_t = 3)]
    turns: usize,
    /// Only these classes, separated by commas; `boot` is the boot alone.
    #[arg(long, value_delimiter = ',')]
    class: Vec<String>,
    /// How much work: a factor, and one per group where it differs.
    #[arg(long, default_value = "0.1,scalar=0.3,code=0.05")]
    scale: String,
    /// Which machines, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "native,tcg,strata")]
    machines: Vec<Kind>,
    /// Kernel to boot; by default that of the image `tiny`.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The `strata` to measure; by default it is built in release mode.
    #[arg(long)]
    strata: Option<PathBuf>,
    /// The engine that `strata` uses.
    #[arg(long, default_value = "translate")]
    engine: String,
    /// Further arguments for `strata run`, separated by blanks.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    strata_arguments: String,
    /// Seconds without a result after which a class has failed.
    #[arg(long, default_value_t = 120)]
    patience: u64,
}

/// Other benchmarks.
#[derive(Subcommand)]
enum What {
    /// TCP between guest and host, under Strata and under QEMU TCG with `-netdev user`, in turns
    Network(network::NetworkArguments),
}

/// Runs the benchmark, prints the table and writes `target/bench/results.json`.
pub fn run(arguments: &BenchArguments) -> Result<ExitCode> {
    if let Some(What::Network(arguments)) = &arguments.what {
        return network::run(arguments);
    }
    let uses = |kind: Kind| arguments.machines.contains(&kind);
    if uses(Kind::Tcg) {
        setup::ensure(setup::BENCH_TOOLS)?;
    }
    if arguments.kernel.is_none() {
        setup::ensure(setup::IMAGE_TOOLS)?;
    }
    let program = guest::build("strata-guest-bench")?;
    let strata = match &arguments.strata {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("cannot use {}", path.display()))?,
        None if uses(Kind::Strata) => guest::build_strata()?,
        None => PathBuf::new(),
    };
    let directory = shell::target_dir().join("bench");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let guest = Guest {
        initrd: initrd::with_init(&program, &directory.join("initrd"))?,
        kernel: match &arguments.kernel {
            Some(path) => path
                .canonicalize()
                .with_context(|| format!("cannot use {}", path.display()))?,
            None if uses(Kind::Strata) || uses(Kind::Tcg) => guest::tiny_kernel(&strata)?,
            None => PathBuf::new(),
        },
        program,
        strata,
        engine: arguments.engine.clone(),
        strata_arguments: arguments
            .strata_arguments
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        patience: Duration::from_secs(arguments.patience),
    };
    let classes = select(&guest, &arguments.class)?;
    let boots = arguments.class.is_empty() || arguments.class.iter().any(|name| name == "boot");
    let mut report = Report::new(&arguments.machines, classes);
    for turn in 1..=arguments.turns {
        for &kind in &arguments.machines {
            eprintln!("== turn {turn} of {}: {}", arguments.turns, kind.name());
            if boots && kind != Kind::Native {
                report.add_boot(kind, guest.boot(kind));
            }
            measure(&guest, kind, &arguments.scale, &mut report)?;
        }
    }
    print!("{}", report.table());
    let results = directory.join("results.json");
    fs::write(&results, report.json(&arguments.scale))
        .with_context(|| format!("cannot write {}", results.display()))?;
    println!("all turns: {}", results.display());
    Ok(if report.has_failures() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The classes the benchmark has, or those of them that were asked for.
fn select(guest: &Guest, wanted: &[String]) -> Result<Vec<Class>> {
    let list = shell::output(shell::command(&guest.program).arg("--list"))?;
    let class = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some(Class {
            name: words.next()?,
            group: words.next()?,
        })
    };
    let classes: Vec<Class> = list.lines().filter_map(class).collect();
    let unknown = wanted
        .iter()
        .find(|name| *name != "boot" && !classes.iter().any(|class| class.name == **name));
    if let Some(name) = unknown {
        let names: Vec<&str> = classes.iter().map(|class| class.name.as_str()).collect();
        bail!(
            "there is no class `{name}`; there are boot, {}",
            names.join(", ")
        );
    }
    Ok(classes
        .into_iter()
        .filter(|class| wanted.is_empty() || wanted.contains(&class.name))
        .collect())
}

/// Runs all classes on one machine. When it ends early, the class it was at has failed, and the rest runs anew.
fn measure(guest: &Guest, kind: Kind, scale: &str, report: &mut Report) -> Result<()> {
    let mut names = report.names_to_run(kind);
    while !names.is_empty() {
        let run = guest.run(kind, &names, scale)?;
        for (name, outcome) in &run.outcomes {
            report.add(kind, name, outcome.clone());
        }
        names.retain(|name| !run.outcomes.iter().any(|(done, _)| done == name));
        if let Some(end) = run.early_end
            && !names.is_empty()
        {
            let name = names.remove(0);
            eprintln!("   {name} failed: {end}");
            report.add(kind, &name, Outcome::Failed(end));
        } else if !names.is_empty() {
            bail!(
                "{} says it is done but has no result for {}",
                kind.name(),
                names.join(", ")
            );
        }
    }
    Ok(())
}
