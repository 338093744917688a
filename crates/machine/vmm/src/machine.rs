//! A machine: built from its configuration, run until it ends.
//!
//! [`Machine::run`] is the only place where its state changes. It takes one [`Event`] after another; what needs the
//! vCPUs to stand still (reset, pause, statistics) kicks them, waits until all are parked, and lets them run again.

use std::collections::VecDeque;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use strata_devices::PowerEvent;
use strata_devices::virtio::VsockHost;
use strata_engine::x86::CpuModel;
use strata_engine::{Exit, MachineClock, VcpuId, VcpuStats};
use strata_engine_dbt::peers::VCPUS_MAX as TRANSLATED_CPUS_MAX;
use strata_memory::{GuestMemory, Layout};

use crate::bus::EngineInterrupts;
use crate::cable::Cable;
use crate::chassis::Chassis;
use crate::config::{CPUS_MAX, NetworkConfig};
use crate::console::ConsoleInput;
use crate::control::{self, ControlRequest, ErrorKind, Failure, Greeting, Request, Status};
use crate::engines::{AnyEngine, EngineOptions, EngineParts};
use crate::error::{BuildError, Crash, Outcome};
use crate::event::{Event, PowerRelay};
use crate::gdb::Debugging;
use crate::load::{BootImage, first_state};
use crate::network::{NetworkHandle, NetworkStats};
use crate::vcpu::{Kickers, VcpuReport, VcpuThread};
use crate::{ConsoleRing, InstanceState, MachineConfig, Transition, config, platform};

/// Ticks of the guest's time-stamp counter per second: one per nanosecond, so that no conversion rounds.
const TSC_HZ: u64 = 1_000_000_000;
/// How long a machine that ends waits for its vCPUs.
const PARTING: Duration = Duration::from_millis(500);

/// The host's ends of a machine: what its configuration, being values, cannot hold.
#[derive(Default)]
pub struct HostEnds {
    /// Where the configured console writes to. Its output is kept for the report of a crash in any case.
    pub console: Option<Box<dyn Write + Send>>,
    /// The run directory, for sockets that the configuration does not place. Without one there are none.
    pub run_dir: Option<std::path::PathBuf>,
    /// The host's side of the vsock, if its socket is not to be made from the configuration.
    pub vsock: Option<VsockHost>,
    /// Who makes the sockets of a network that needs them.
    pub sockets: Option<Box<dyn strata_switch::nat::Host>>,
    /// The ring of its port on a shared network.
    pub cable: Option<Cable>,
    /// Where what is written to temporary disks goes; the system's place for such files if not given.
    pub temporary: Option<std::path::PathBuf>,
    /// How the engine works inside.
    pub engine_options: EngineOptions,
    /// Called when every file that the configuration names is open, and no thread is there yet.
    pub opened: Option<Box<dyn FnOnce()>>,
}

/// A machine that is ready to run or runs.
pub struct Machine {
    config: MachineConfig,
    state: InstanceState,
    image: BootImage,
    layout: Layout,
    memory: GuestMemory,
    clock: Arc<MachineClock>,
    chassis: Chassis,
    network: Option<NetworkHandle>,
    engine: Arc<AnyEngine>,
    vcpus: Vec<VcpuThread>,
    kickers: Arc<Kickers>,
    console: ConsoleInput,
    ring: ConsoleRing,
    first_run: Arc<OnceLock<Instant>>,
    reboots: u64,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    /// Events that came while the vCPUs were being parked.
    backlog: VecDeque<Event>,
    pub(crate) debugging: Option<Debugging>,
}

/// The counters of a machine, for `strata stats`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineStats {
    /// The engine that runs it.
    pub engine: String,
    /// Milliseconds of machine time, pauses left out.
    pub uptime_ms: u64,
    /// How often the guest restarted the machine.
    pub reboots: u64,
    /// Each vCPU's counters since the machine was built.
    pub vcpus: Vec<VcpuStats>,
    /// Its network's counters, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStats>,
}

/// Reaches a machine that runs from other threads. Clones reach the same one.
#[derive(Clone)]
pub struct MachineHandle {
    events: Sender<Event>,
}

impl MachineHandle {
    /// Asks and waits for the answer.
    pub fn ask(&self, request: Request) -> Result<Value, Failure> {
        let (answer, answered) = sync_channel(1);
        let ended = || Failure::new(ErrorKind::WrongState, "the machine has ended");
        let asked = Event::Control(ControlRequest { request, answer });
        self.events.send(asked).map_err(|_| ended())?;
        answered.recv().map_err(|_| ended())?
    }

    /// Ends the machine; returns at once.
    pub fn power_off(&self) {
        let (answer, _) = sync_channel(1);
        let request = Request::PowerOff;
        // It may have ended by itself meanwhile.
        let _ = self
            .events
            .send(Event::Control(ControlRequest { request, answer }));
    }
}

impl Machine {
    /// Builds a machine on the engine that its configuration asks for. Nothing runs yet.
    ///
    /// # Errors
    /// If the configuration is not possible, on this host or at all.
    pub fn build(config: MachineConfig, ends: HostEnds) -> Result<Self, BuildError> {
        let choice = config.engine;
        Self::build_on(config, ends, |parts| crate::engines::open(choice, parts))
    }

    /// Builds a machine on an engine that the caller makes.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn build_on(
        config: MachineConfig,
        mut ends: HostEnds,
        engine: impl FnOnce(EngineParts) -> Result<Arc<AnyEngine>, strata_engine::EngineError>,
    ) -> Result<Self, BuildError> {
        check_cpus(config.cpus, config.engine, ends.engine_options)?;
        let disks = platform::open_disks(&config, ends.temporary.take())?;
        let image = BootImage::open(&config, &disks)?;
        if let Some(opened) = ends.opened.take() {
            opened();
        }
        let model = CpuModel::named(&config.cpu_model)?;
        let (layout, memory) = build_memory(&config)?;
        let clock = Arc::new(MachineClock::new(TSC_HZ));
        let engine = engine(EngineParts {
            memory: memory.clone(),
            clock: Arc::clone(&clock),
            model,
            cpus: config.cpus,
            options: ends.engine_options,
        })?;
        let (events, inbox) = channel();
        let kickers = Arc::new(Kickers::default());
        let ring = ConsoleRing::default();
        let power = Arc::new(PowerRelay {
            events: events.clone(),
            kickers: Arc::clone(&kickers),
        });
        let interrupts = Arc::new(EngineInterrupts(engine.interrupts()));
        let mut chassis = Chassis::new(memory.clone(), &layout, clock.clone(), interrupts, power)?;
        let platform::Added { console, network } =
            platform::add_devices(&mut chassis, &config, ends, disks, &ring)?;
        let mut machine = Self {
            config,
            state: InstanceState::Defined,
            image,
            layout,
            memory,
            clock,
            chassis,
            network,
            engine,
            vcpus: Vec::new(),
            kickers,
            console,
            ring,
            first_run: Arc::default(),
            reboots: 0,
            events,
            inbox,
            backlog: VecDeque::new(),
            debugging: None,
        };
        machine.add_vcpus()?;
        machine.load()?;
        Ok(machine)
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The name of the engine that runs it.
    pub fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// Reaches the machine while it runs.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            events: self.events.clone(),
        }
    }

    /// Sends events to it.
    pub(crate) fn events(&self) -> Sender<Event> {
        self.events.clone()
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// A vCPU's thread.
    pub(crate) fn vcpu_thread(&self, id: VcpuId) -> Option<&VcpuThread> {
        self.vcpus.iter().find(|vcpu| vcpu.id == id)
    }

    /// Lets machine time stand still.
    pub(crate) fn stop_clock(&self) {
        self.clock.stop();
    }

    /// Types on its console.
    pub fn console_input(&self) -> ConsoleInput {
        self.console.clone()
    }

    /// What its consoles printed last.
    pub fn console_ring(&self) -> ConsoleRing {
        self.ring.clone()
    }

    /// Set when the guest's first instruction runs.
    pub fn first_run(&self) -> Arc<OnceLock<Instant>> {
        Arc::clone(&self.first_run)
    }

    /// Answers on a control socket from now on.
    ///
    /// # Errors
    /// If the system makes no thread for it.
    pub fn serve_control(&self, listener: UnixListener) -> Result<(), BuildError> {
        let events = self.events.clone();
        let greeting = Greeting::new(self.config.name.clone());
        control::Server::start(listener, &greeting, move |asked| {
            events.send(Event::Control(asked)).is_ok()
        })
        .map_err(|source| BuildError::Host {
            what: "the control socket",
            source,
        })
    }

    /// Runs the machine until it ends; says how it ended and what it did.
    pub fn run(mut self) -> (Outcome, MachineStats) {
        // It was built, so it is defined, and that can start.
        self.state = self
            .state
            .after(Transition::Start)
            .unwrap_or(InstanceState::Running);
        self.chassis.start();
        self.go();
        let outcome = self.serve();
        self.end(&outcome);
        let stats = self.stats();
        (outcome, stats)
    }

    fn serve(&mut self) -> Outcome {
        loop {
            let event = match self.backlog.pop_front() {
                Some(event) => Some(event),
                None => self.inbox.recv().ok(),
            };
            let outcome = match event {
                Some(Event::Power(event)) => self.power(event),
                Some(Event::Vcpu(report)) => self.vcpu(report),
                Some(Event::Control(asked)) => self.control(asked),
                Some(Event::Debug(asked)) => {
                    self.debug(asked);
                    None
                }
                Some(Event::DebugExit(cpu)) => {
                    self.debug_exit(cpu);
                    None
                }
                // Cannot happen while we hold a sender.
                None => Some(Outcome::Stopped),
            };
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    fn power(&mut self, event: PowerEvent) -> Option<Outcome> {
        match event {
            PowerEvent::PowerOff => Some(Outcome::PoweredOff),
            PowerEvent::GuestPanic => Some(Outcome::Crashed(Crash::GuestPanic)),
            PowerEvent::DebugExit(value) => Some(Outcome::DebugExit(value)),
            // The guest looks after itself.
            PowerEvent::GuestCrashLoaded => None,
            PowerEvent::Reset => match self.config.on_reboot {
                config::OnReboot::Exit => Some(Outcome::Rebooted),
                config::OnReboot::Restart => self.restart(),
            },
        }
    }

    fn vcpu(&mut self, report: VcpuReport) -> Option<Outcome> {
        let cpu = report.id.0;
        let vcpu = self.vcpus.iter_mut().find(|vcpu| vcpu.id == report.id)?;
        vcpu.has_parked(report.stats);
        match report.exit {
            // Somebody waited for this, or a kick came late: then it goes on.
            Ok(Exit::Kicked)
                if self.state == InstanceState::Running
                    && self.debugging.as_ref().is_none_or(|d| d.lets_run(cpu)) =>
            {
                (!vcpu.run()).then_some(Outcome::Crashed(Crash::ThreadGone { cpu }))
            }
            Ok(Exit::Kicked | Exit::WaitingForStartup) => None,
            Ok(Exit::Debug) => {
                self.debug_exit(cpu);
                None
            }
            Ok(Exit::Shutdown) => Some(Outcome::Crashed(Crash::TripleFault { cpu })),
            Err(source) => Some(Outcome::Crashed(Crash::Engine { cpu, source })),
        }
    }

    fn control(&mut self, asked: ControlRequest) -> Option<Outcome> {
        let outcome = (asked.request == Request::PowerOff).then_some(Outcome::Stopped);
        let result = self.answer(&asked.request);
        // Who asked may be gone.
        let _ = asked.answer.send(result);
        outcome
    }

    fn answer(&mut self, request: &Request) -> Result<Value, Failure> {
        let failed = |error: serde_json::Error| Failure::new(ErrorKind::Failed, error.to_string());
        match request {
            Request::Status => serde_json::to_value(self.status()).map_err(failed),
            Request::Stats => serde_json::to_value(self.stats()).map_err(failed),
            Request::Pause => self.pause().map(|()| Value::Null),
            Request::Resume => self.resume().map(|()| Value::Null),
            Request::PowerOff => Ok(Value::Null),
            Request::Resize { columns, rows } => {
                Ok(json!({ "resized": self.console.resize(*columns, *rows) }))
            }
        }
    }

    fn status(&self) -> Status {
        Status {
            name: self.config.name.clone(),
            state: self.state,
            engine: self.engine.name().to_owned(),
            cpus: self.config.cpus,
            memory: self.config.memory,
            uptime_ms: self.clock.now_ns() / 1_000_000,
            reboots: self.reboots,
            ports: match &self.config.network {
                NetworkConfig::User(user) => user.publish.clone(),
                NetworkConfig::None | NetworkConfig::Port(_) => Vec::new(),
            },
        }
    }

    /// Counters are read only while a vCPU stands, so a running machine stops for a moment.
    fn stats(&mut self) -> MachineStats {
        let running = self.state == InstanceState::Running;
        if running {
            self.park_all();
        }
        let stats = MachineStats {
            engine: self.engine.name().to_owned(),
            uptime_ms: self.clock.now_ns() / 1_000_000,
            reboots: self.reboots,
            vcpus: self.vcpus.iter().map(|v| v.stats().clone()).collect(),
            network: self.network.as_ref().map(NetworkHandle::stats),
        };
        if running {
            self.go();
        }
        stats
    }

    fn pause(&mut self) -> Result<(), Failure> {
        self.change(Transition::Pause)?;
        self.park_all();
        self.clock.stop();
        self.chassis.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        self.change(Transition::Resume)?;
        self.chassis.start();
        self.go();
        Ok(())
    }

    /// Begins again with empty memory, devices as new and the kernel loaded anew.
    fn restart(&mut self) -> Option<Outcome> {
        self.park_all();
        // What the old life of the guest still wanted is void.
        self.backlog
            .retain(|event| matches!(event, Event::Control(_)));
        self.reboots += 1;
        self.chassis.reset();
        if let Err(error) = self.clear_memory().and_then(|()| self.load()) {
            return Some(Outcome::Crashed(Crash::Restart(Box::new(error))));
        }
        self.go();
        None
    }

    fn clear_memory(&self) -> Result<(), BuildError> {
        for range in self.layout.ram() {
            self.memory.drop_pages(range)?;
        }
        Ok(())
    }

    /// Loads kernel and tables into empty memory and gives every vCPU its first state.
    fn load(&mut self) -> Result<(), BuildError> {
        let entry = self
            .image
            .load(&self.memory, &self.layout, self.config.cpus)?;
        for vcpu in &self.vcpus {
            let reset = &vcpu.reset_state;
            let state = if vcpu.id == VcpuId(0) {
                first_state(reset, &entry)
            } else {
                reset.clone()
            };
            // If its thread is gone, running it will say so.
            vcpu.load(state);
        }
        Ok(())
    }

    fn add_vcpus(&mut self) -> Result<(), BuildError> {
        for id in (0..self.config.cpus).map(VcpuId) {
            let vcpu = self.engine.create_vcpu(id)?;
            let (bus, events) = (self.chassis.bus(), self.events.clone());
            let thread = VcpuThread::start(id, vcpu, bus, events, self.first_run.clone())?;
            self.kickers.add(thread.kicker());
            self.vcpus.push(thread);
        }
        Ok(())
    }

    /// Lets time and all vCPUs run.
    pub(crate) fn go(&mut self) {
        let held = self.debugging.as_ref().is_some_and(Debugging::holds);
        if held || self.state != InstanceState::Running {
            return;
        }
        self.clock.start();
        for vcpu in &mut self.vcpus {
            let cpu = vcpu.id.0;
            let waits = self.debugging.as_ref().is_some_and(|d| !d.lets_run(cpu));
            if !waits && !vcpu.run() {
                let cpu = vcpu.id.0;
                let exit = Err(strata_engine::EngineError::Internal(format!(
                    "the thread of CPU {cpu} is gone"
                )));
                let stats = VcpuStats::default();
                let id = vcpu.id;
                self.backlog
                    .push_back(Event::Vcpu(VcpuReport { id, exit, stats }));
            }
        }
    }

    /// Returns when no vCPU runs. What else happens meanwhile goes to the backlog.
    pub(crate) fn park_all(&mut self) {
        self.kickers.kick_all();
        while self.vcpus.iter().any(|vcpu| !vcpu.is_parked()) {
            match self.inbox.recv() {
                Ok(event) => self.note(event),
                Err(_) => return,
            }
        }
    }

    /// Takes an event while parking: a vCPU that was only kicked is parked, all else waits for its turn.
    fn note(&mut self, event: Event) {
        if let Event::Vcpu(report) = &event
            && let Some(vcpu) = self.vcpus.iter_mut().find(|vcpu| vcpu.id == report.id)
        {
            vcpu.has_parked(report.stats.clone());
            match (&report.exit, &mut self.debugging) {
                (Ok(Exit::Kicked), _) => return,
                (Ok(Exit::Debug), Some(debugging)) => {
                    // Nothing runs until it is told, so that it stays true.
                    debugging.note(report.id.0);
                    self.backlog.push_back(Event::DebugExit(report.id.0));
                    return;
                }
                _ => {}
            }
        }
        self.backlog.push_back(event);
    }

    /// Lets go of everything. A vCPU that cannot be parked in time is left to the end of the process.
    fn end(&mut self, outcome: &Outcome) {
        self.state = outcome.state();
        self.end_debugging();
        self.kickers.kick_all();
        let deadline = Instant::now() + PARTING;
        while self.vcpus.iter().any(|vcpu| !vcpu.is_parked()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(event) => self.note(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
        self.clock.stop();
        self.chassis.stop();
    }

    fn change(&mut self, transition: Transition) -> Result<(), Failure> {
        let refused =
            |error: crate::TransitionError| Failure::new(ErrorKind::WrongState, error.to_string());
        self.state = self.state.after(transition).map_err(refused)?;
        Ok(())
    }
}

fn check_cpus(
    asked: u32,
    engine: config::EngineChoice,
    options: EngineOptions,
) -> Result<(), BuildError> {
    let reason = match asked {
        0 => "a machine needs one",
        2.. if options.lockstep > 0 => "lock-step runs one",
        _ if asked <= TRANSLATED_CPUS_MAX => return Ok(()),
        _ if asked > CPUS_MAX => "254 are the most",
        _ if engine == config::EngineChoice::Translate => "the translate engine runs 64 at most",
        _ => return Ok(()),
    };
    Err(BuildError::Cpus { asked, reason })
}

fn build_memory(config: &MachineConfig) -> Result<(Layout, GuestMemory), BuildError> {
    let max = config.memory_max.unwrap_or(config.memory);
    let layout = Layout::new(config.memory.get(), max.get())?;
    let memory = GuestMemory::with_layout(&layout)?;
    Ok((layout, memory))
}
