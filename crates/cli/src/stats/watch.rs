//! `strata stats NAME --watch`: how much a machine does per second, until it ends.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde::Serialize;
use strata_engine::ExitCause;
use strata_vmm::control::Client;
use strata_vmm::{MachineName, MachineStats};

use super::{ask_on, cause_name};
use crate::exit::Failure;
use crate::output;

/// Lines between two headings.
const PAGE: u32 = 20;
/// To the terminal's upper left corner, and all below it empty.
const FROM_ABOVE: &str = "\x1b[H\x1b[J";

/// Counters of all vCPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sum {
    instructions: u64,
    exits: [u64; CAUSES.len()],
    interrupts: u64,
    exceptions: u64,
    tlb_fills: u64,
    translated: u64,
    invalidated: u64,
}

const CAUSES: [ExitCause; 7] = [
    ExitCause::Lookup,
    ExitCause::Interpret,
    ExitCause::Exception,
    ExitCause::Request,
    ExitCause::Mmio,
    ExitCause::Port,
    ExitCause::Halt,
];

impl Sum {
    fn of(stats: &MachineStats) -> Self {
        let mut sum = Self::default();
        for vcpu in &stats.vcpus {
            sum.instructions += vcpu.instructions;
            for (total, cause) in sum.exits.iter_mut().zip(CAUSES) {
                *total += vcpu.exits.get(&cause).copied().unwrap_or(0);
            }
            sum.interrupts += vcpu.interrupts;
            sum.exceptions += vcpu.exceptions;
            sum.tlb_fills += vcpu.tlb_fills;
            sum.translated += vcpu.blocks_translated;
            sum.invalidated += vcpu.blocks_invalidated;
        }
        sum
    }

    /// Every counter with its name.
    fn named(&self) -> Vec<(String, u64)> {
        let mut named = vec![("instructions".to_owned(), self.instructions)];
        for (cause, count) in CAUSES.iter().zip(self.exits) {
            named.push((cause_name(*cause), count));
        }
        let rest = [
            ("interrupts", self.interrupts),
            ("exceptions", self.exceptions),
            ("tlb-fills", self.tlb_fills),
            ("translated", self.translated),
            ("invalidated", self.invalidated),
        ];
        named.extend(rest.map(|(name, count)| (name.to_owned(), count)));
        // Counted in instrumented runs only.
        named.retain(|(name, count)| name != "instructions" || *count > 0);
        named
    }
}

/// What happened between two looks, per second.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Rates<'a> {
    name: &'a MachineName,
    uptime_ms: u64,
    seconds: f64,
    per_second: serde_json::Map<String, serde_json::Value>,
}

/// Prints rates every so often until the machine ends, which is a success.
pub fn run(
    name: &MachineName,
    mut client: Client,
    every: Duration,
    json: bool,
) -> Result<(), Failure> {
    let mut before: Option<(Instant, Sum)> = None;
    let in_place = !json && std::io::stdout().is_terminal();
    let mut lines = 0;
    // An answer that does not come: the machine is gone.
    while let Ok(stats) = ask_on(&mut client) {
        let (now, sum) = (Instant::now(), Sum::of(&stats));
        if let Some((then, old)) = before {
            let seconds = (now - then).as_secs_f64();
            let rates = rates(&old, &sum, seconds);
            if json {
                print_json(name, &stats, seconds, &rates)?;
            } else if in_place {
                output::print(&screen(name, &stats, &sum, &rates))?;
            } else {
                output::print(&line(&rates, lines % PAGE == 0))?;
                lines += 1;
            }
        }
        before = Some((now, sum));
        std::thread::sleep(every);
    }
    Ok(())
}

fn rates(old: &Sum, new: &Sum, seconds: f64) -> Vec<(String, f64)> {
    let old = old.named();
    let before = |name: &str| {
        let found = old.iter().find(|(found, _)| found == name);
        found.map_or(0, |(_, count)| *count)
    };
    new.named()
        .into_iter()
        .map(|(name, count)| {
            let more = count.saturating_sub(before(&name));
            (name, more as f64 / seconds)
        })
        .collect()
}

fn print_json(
    name: &MachineName,
    stats: &MachineStats,
    seconds: f64,
    rates: &[(String, f64)],
) -> Result<(), Failure> {
    let tenth = |value: f64| serde_json::Value::from((value * 10.0).round() / 10.0);
    let rates = Rates {
        name,
        uptime_ms: stats.uptime_ms,
        seconds: (seconds * 1000.0).round() / 1000.0,
        per_second: rates
            .iter()
            .map(|(name, rate)| (name.clone(), tenth(*rate)))
            .collect(),
    };
    let line = serde_json::to_string(&rates).unwrap_or_default();
    output::print(&format!("{line}\n"))
}

fn line(rates: &[(String, f64)], heading: bool) -> String {
    let width = |name: &str| name.len().max(9);
    let mut text = String::new();
    if heading {
        for (name, _) in rates {
            text.push_str(&format!("{name:>width$} ", width = width(name)));
        }
        text.push('\n');
    }
    for (name, rate) in rates {
        text.push_str(&format!("{rate:>width$.0} ", width = width(name)));
    }
    text.push('\n');
    text
}

fn screen(name: &MachineName, stats: &MachineStats, sum: &Sum, rates: &[(String, f64)]) -> String {
    let mut rows = vec![["", "per second", "in all"].map(str::to_owned).to_vec()];
    for ((name, total), (_, rate)) in sum.named().iter().zip(rates) {
        rows.push(vec![
            name.clone(),
            format!("{rate:>12.0}"),
            format!("{total:>14}"),
        ]);
    }
    let uptime = stats.uptime_ms / 1000;
    let cpus = stats.vcpus.len();
    let heading = format!(
        "{name}: {} engine, {cpus} CPUs, up {uptime} s",
        stats.engine
    );
    format!("{FROM_ABOVE}{heading}\n{}", output::table(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_engine::VcpuStats;

    fn stats(halts: u64, fills: u64) -> MachineStats {
        let mut vcpu = VcpuStats {
            tlb_fills: fills,
            ..VcpuStats::default()
        };
        vcpu.exits.insert(ExitCause::Halt, halts);
        MachineStats {
            engine: "translate".into(),
            uptime_ms: 2000,
            reboots: 0,
            vcpus: vec![vcpu.clone(), vcpu],
            network: None,
        }
    }

    #[test]
    fn rates_are_of_all_cpus_and_per_second() {
        let (old, new) = (Sum::of(&stats(1, 10)), Sum::of(&stats(5, 110)));
        let rates = rates(&old, &new, 2.0);
        let rate = |name: &str| rates.iter().find(|(found, _)| found == name).unwrap().1;
        assert_eq!(rate("halt"), 4.0);
        assert_eq!(rate("tlb-fills"), 100.0);
        // Nothing counts them in this run.
        assert!(!rates.iter().any(|(name, _)| name == "instructions"));
        let text = line(&rates, true);
        let columns = |line: &str| line.split_whitespace().count();
        let counts: Vec<usize> = text.lines().map(columns).collect();
        assert_eq!(counts, [rates.len(), rates.len()]);
    }
}
