//! `strata info`: what this host offers, which engine a machine gets and why.

use serde::Serialize;
use strata_engine::x86::CpuModel;
use strata_sandbox::Layer;
use strata_vmm::config::EngineChoice;
use strata_vmm::{RunDir, engines};

use crate::args::InfoArgs;
use crate::exit::{Failure, chain};
use crate::output;
use crate::process;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    version: &'static str,
    host: Host,
    engines: Vec<EngineInfo>,
    /// What `--engine auto` is here; none if nothing can run.
    engine: Option<engines::ChosenEngine>,
    /// What a machine's process is put into, layer by layer.
    jail: Vec<Layer>,
    /// Why guests can ping nothing but their gateway; none if they can.
    ping_refused: Option<String>,
    cpu_models: Vec<ModelInfo>,
    image_cache: Option<String>,
    run_directory: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Host {
    cpu: String,
    level: &'static str,
    cpus: usize,
    memory_bytes: Option<u64>,
    kernel: String,
    kvm: engines::KvmVerdict,
}

#[derive(Serialize)]
struct EngineInfo {
    name: &'static str,
    usable: bool,
    reason: String,
}

#[derive(Serialize)]
struct ModelInfo {
    name: &'static str,
    usable: bool,
    reason: String,
}

/// Prints it.
pub fn run(args: &InfoArgs) -> Result<(), Failure> {
    let info = gather();
    if args.json {
        return output::print_json(&info);
    }
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let host = &info.host;
    let memory = host.memory_bytes.map_or(String::new(), |bytes| {
        format!(", {} MiB of memory", bytes >> 20)
    });
    let engine = match &info.engine {
        Some(chosen) => format!("{}, because {}", chosen.name, chosen.reason),
        None => "none can run here".to_owned(),
    };
    let figures = match host.kvm.figures.to_string() {
        none if none.is_empty() => "not measured".to_owned(),
        figures => figures,
    };
    let mut rows = vec![
        row("version", info.version.to_owned()),
        row(
            "host",
            format!("{} ({}), {} CPUs{memory}", host.cpu, host.level, host.cpus),
        ),
        row("kernel", host.kernel.clone()),
        row("/dev/kvm", figures),
        row("engine", engine),
    ];
    let usable = |usable| if usable { "usable" } else { "not usable" };
    for engine in &info.engines {
        let name = format!("  {}", engine.name);
        rows.push(row(
            &name,
            format!("{}: {}", usable(engine.usable), engine.reason),
        ));
    }
    rows.push(row("jail", String::new()));
    for layer in &info.jail {
        let name = format!("  {}", layer.name);
        let state = layer.shortcoming();
        let state = state.unwrap_or_else(|| "in place".to_owned());
        rows.push(row(&name, state));
    }
    let ping = match &info.ping_refused {
        None => "guests can ping any address".to_owned(),
        Some(reason) => format!("guests can ping their gateway only: {reason}"),
    };
    rows.push(row("ping", ping));
    rows.push(row("CPU models", String::new()));
    for model in &info.cpu_models {
        let name = format!("  {}", model.name);
        rows.push(row(
            &name,
            format!("{}: {}", usable(model.usable), model.reason),
        ));
    }
    let cache = info.image_cache.clone().unwrap_or_default();
    rows.push(row("image cache", cache));
    rows.push(row("run directory", info.run_directory.clone()));
    output::print(&output::table(&rows))
}

fn gather() -> Info {
    let translate = match engines::choose(EngineChoice::Translate) {
        Ok(_) => (true, "this host's CPU has what it needs".to_owned()),
        Err(error) => (false, chain(&error)),
    };
    let host = host();
    Info {
        version: env!("CARGO_PKG_VERSION"),
        engines: vec![
            EngineInfo {
                name: "translate",
                usable: translate.0,
                reason: translate.1,
            },
            EngineInfo {
                name: "kvm",
                usable: host.kvm.usable,
                reason: host.kvm.reason.clone(),
            },
        ],
        engine: engines::choose_by(&host.kvm).ok(),
        jail: process::check_jail()
            .unwrap_or_else(|failure| vec![Layer::new("process", Err(failure.message))]),
        host,
        ping_refused: process::ping_refused(),
        cpu_models: ["baseline", "host"].map(model).into(),
        image_cache: strata_image::Store::default_root()
            .ok()
            .map(|path| path.display().to_string()),
        run_directory: RunDir::root().display().to_string(),
    }
}

fn model(name: &'static str) -> ModelInfo {
    match CpuModel::named(name) {
        Ok(model) => ModelInfo {
            name,
            usable: true,
            reason: format!("{} features", model.features().count()),
        },
        Err(error) => ModelInfo {
            name,
            usable: false,
            reason: chain(&error),
        },
    }
}

fn host() -> Host {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib = memory.and_then(|text| text.strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Host {
        cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned()),
        level: engines::host_level(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: kib.map(|kib| kib << 10),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        kvm: engines::probe_kvm(engines::KvmDepth::Figures),
    }
}
