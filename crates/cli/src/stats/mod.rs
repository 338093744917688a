//! `strata stats`: what running machines have done so far, and with `--watch` what they do.

mod watch;

use std::time::Duration;

use serde::Serialize;
use strata_engine::VcpuStats;
use strata_vmm::control::{Client, ClientError, Request};
use strata_vmm::{MachineName, MachineStats, NetworkStats, RunDir, RunDirError};

use crate::args::StatsArgs;
use crate::exit::{ExitCode, Failure};
use crate::output;
use crate::run::printable;

#[derive(Serialize)]
struct Named {
    name: MachineName,
    #[serde(flatten)]
    stats: MachineStats,
}

/// Prints the counters of one machine, or of all.
pub fn run(args: &StatsArgs) -> Result<(), Failure> {
    let root = RunDir::root();
    if let Some(name) = &args.name {
        RunDir::find(&root, name).map_err(|error| run_dir_failure(&error))?;
        if let Some(seconds) = args.watch {
            let client = connect(name).map_err(|error| client_failure(&error))?;
            return watch::run(name, client, Duration::from_secs_f64(seconds), args.json);
        }
        let stats = ask(name).map_err(|error| client_failure(&error))?;
        return match args.json {
            true => output::print_json(&stats),
            false => output::print(&text(&stats)),
        };
    }
    // A machine may end while we ask the others.
    let all: Vec<Named> = RunDir::list(&root)
        .iter()
        .filter_map(|name| ask(name).ok())
        .collect();
    if args.json {
        return output::print_json(&all);
    }
    if all.is_empty() {
        return output::print("no machine is running\n");
    }
    let texts: Vec<String> = all.iter().map(text).collect();
    output::print(&texts.join("\n"))
}

/// The way to a machine that runs.
pub fn connect(name: &MachineName) -> Result<Client, ClientError> {
    Client::connect(&RunDir::control_socket(&RunDir::root().join(name.as_str())))
}

fn ask(name: &MachineName) -> Result<Named, ClientError> {
    let stats = ask_on(&mut connect(name)?)?;
    Ok(Named {
        name: name.clone(),
        stats,
    })
}

fn ask_on(client: &mut Client) -> Result<MachineStats, ClientError> {
    let answer = client.ask(&Request::Stats)?;
    let mut stats: MachineStats =
        serde_json::from_value(answer).map_err(|_| ClientError::Protocol)?;
    // The machine's process says it, which its guest may have taken over.
    stats.engine = printable(&stats.engine);
    Ok(stats)
}

/// The status for a run directory that cannot be had.
pub fn run_dir_failure(error: &RunDirError) -> Failure {
    let code = match error {
        RunDirError::NameInUse(_) => ExitCode::Busy,
        RunDirError::NotRunning(_) => ExitCode::NoInput,
        RunDirError::NotPrivate { .. } => ExitCode::Permission,
        RunDirError::Io { .. } => ExitCode::CannotCreate,
    };
    Failure::from_error(code, error)
}

/// The status for a machine that does not answer.
pub fn client_failure(error: &ClientError) -> Failure {
    let code = match error {
        ClientError::Connect { .. } => ExitCode::NoInput,
        ClientError::Broken(_) => ExitCode::Io,
        ClientError::Protocol | ClientError::Refused(_) => ExitCode::Unavailable,
    };
    let failure = Failure::from_error(code, error);
    Failure::new(code, printable(&failure.message))
}

fn text(machine: &Named) -> String {
    let Named { name, stats } = machine;
    let mut text = format!(
        "{name}: {} engine, up {}.{:03} s, {} reboots\n",
        stats.engine,
        stats.uptime_ms / 1000,
        stats.uptime_ms % 1000,
        stats.reboots
    );
    for (cpu, counters) in stats.vcpus.iter().enumerate() {
        text.push_str(&format!("CPU {cpu}\n"));
        text.push_str(&output::table(&rows(counters)));
    }
    if let Some(network) = &stats.network {
        text.push_str("network\n");
        text.push_str(&output::table(&network_rows(network)));
    }
    text
}

fn network_rows(network: &NetworkStats) -> Vec<Vec<String>> {
    let card = &network.card;
    let rows = [
        ("frames from the guest", card.frames_from_guest),
        ("bytes from the guest", card.bytes_from_guest),
        ("frames to the guest", card.frames_to_guest),
        ("bytes to the guest", card.bytes_to_guest),
        ("flows now", network.flows),
        ("connections begun by the guest", network.tcp_out),
        ("connections to published ports", network.tcp_in),
        ("connections reset", network.tcp_reset),
        ("UDP flows and pings", network.datagram_flows),
        ("flows refused: too many", network.refused_full),
        ("sockets refused by the host", network.refused_host),
        ("malformed frames of the guest", card.malformed_from_guest),
        ("packets not routed", network.dropped_out),
        ("frames the guest did not want", card.filtered_to_guest),
        (
            "frames dropped otherwise",
            card.misfit_to_guest + network.dropped_switch,
        ),
    ];
    rows.map(|(name, value)| vec![format!("  {name}"), value.to_string()])
        .into()
}

/// The counters under the names of the modules whose work they are: dispatcher, allocator (all that a guest gets:
/// memory and time), interpreter, and the translator they serve.
fn rows(stats: &VcpuStats) -> Vec<Vec<String>> {
    let row = |name: &str, value: String| vec![format!("  {name}"), value];
    let heading = |name: &str| vec![name.to_owned()];
    let mut rows = vec![heading(" dispatcher")];
    let exits: u64 = stats.exits.values().sum();
    rows.push(row("exits from translated code", exits.to_string()));
    for (cause, count) in &stats.exits {
        rows.push(row(&format!("  {}", cause_name(*cause)), count.to_string()));
    }
    rows.push(row("exceptions delivered", stats.exceptions.to_string()));
    rows.push(row("interrupts delivered", stats.interrupts.to_string()));
    rows.push(heading(" allocator"));
    rows.push(row("page faults", stats.page_faults.to_string()));
    rows.push(row("TLB fills", stats.tlb_fills.to_string()));
    rows.push(row("TLB flushes", stats.tlb_flushes.to_string()));
    rows.push(row(
        "operands over the bounce buffer",
        stats.bounced.to_string(),
    ));
    rows.push(heading(" interpreter"));
    rows.push(row(
        "instructions",
        share(stats.interpreted, stats.instructions),
    ));
    rows.push(heading(" translator"));
    if stats.instructions > 0 {
        rows.push(row("instructions retired", stats.instructions.to_string()));
        rows.push(row(
            "of them by stubs",
            share(stats.stubs, stats.instructions),
        ));
        let elsewhere = stats.interpreted + stats.stubs + stats.bounced;
        let native = stats.instructions.saturating_sub(elsewhere);
        rows.push(row(
            "of them as themselves",
            share(native, stats.instructions),
        ));
    }
    rows.push(row(
        "blocks translated",
        stats.blocks_translated.to_string(),
    ));
    rows.push(row(
        "blocks invalidated",
        stats.blocks_invalidated.to_string(),
    ));
    rows.push(row("code cache flushes", stats.cache_flushes.to_string()));
    let per_instruction = stats
        .translation_ns
        .checked_div(stats.instructions_translated);
    rows.push(row(
        "instructions translated",
        match per_instruction {
            Some(ns) => format!("{} at {ns} ns each", stats.instructions_translated),
            None => "0".to_owned(),
        },
    ));
    rows
}

fn cause_name(cause: strata_engine::ExitCause) -> String {
    serde_json::to_value(cause)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// A count, with its share of a whole if that was counted.
fn share(part: u64, whole: u64) -> String {
    match whole {
        0 => part.to_string(),
        _ => format!("{part} ({:.3} %)", part as f64 * 100.0 / whole as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_as_text() {
        let mut vcpu = VcpuStats {
            instructions: 1000,
            interpreted: 10,
            stubs: 5,
            instructions_translated: 4,
            translation_ns: 2000,
            ..VcpuStats::default()
        };
        vcpu.exits.insert(strata_engine::ExitCause::Halt, 3);
        let machine = Named {
            name: "web-1".parse().unwrap(),
            stats: MachineStats {
                engine: "translate".into(),
                uptime_ms: 61_007,
                reboots: 0,
                vcpus: vec![vcpu],
                network: None,
            },
        };
        let text = text(&machine);
        assert!(text.starts_with("web-1: translate engine, up 61.007 s, 0 reboots\nCPU 0\n"));
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines: Vec<String> = text.lines().map(words).collect();
        for line in [
            "halt 3",
            "instructions 10 (1.000 %)",
            "of them as themselves 985 (98.500 %)",
            "instructions translated 4 at 500 ns each",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} is not in {text}");
        }
        let json = serde_json::to_value(&machine).unwrap();
        assert_eq!(json["name"], "web-1");
        assert_eq!(json["vcpus"][0]["exits"]["halt"], 3);
    }
}
