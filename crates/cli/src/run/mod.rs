//! `strata run`: a machine from a command line, and this program's input, output and signals tied to it.
//!
//! ```text
//! prepare   arguments → configuration            terminal  raw mode and its end
//! wire      console or CMD ↔ our streams         signals   waited for, never handled
//! ```
//!
//! The machine has a process of its own ([`crate::process`]). Here one thread waits for what happens ([`Happened`]);
//! that process, each of our streams and the signals have theirs.

mod command;
mod escape;
mod gdb;
mod prepare;
mod signals;
pub mod terminal;
mod timings;
mod wire;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use strata_agent::{ExitStatus, Input};
use strata_vmm::config::NetworkConfig;
use strata_vmm::control::Request;
use strata_vmm::engines::EngineOptions;
use strata_vmm::{MachineName, RunDir, RunDirError};

use self::prepare::{Mode, Plan};
use self::timings::Timings;
use crate::args::RunArgs;
use crate::exit::{ExitCode, Failure, SIGNAL_BASE};
use crate::output;
use crate::process::{self, Broker, End, Ending, Ends, Jail, MachineLaunch, MachineProcess, Said};
use crate::stats::run_dir_failure;

/// How long a machine that must end may take before its process is ended.
const PARTING: Duration = Duration::from_secs(1);
/// How long a guest with disks that it writes may take to power off after CMD: a whole system stops its services first.
const ORDERLY_POWER_OFF: Duration = Duration::from_secs(30);
/// How long a guest under gdb may take to boot: nobody knows.
const DEBUGGED_BOOT: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long after a broken connection to the guest it may take to hear that the machine has died.
const OBITUARY: Duration = Duration::from_millis(250);
/// How long what the console still had to say may take when the user wants to be gone.
const LAST_OUTPUT: Duration = Duration::from_millis(200);
/// Lines of the console in the report of a crash.
const CONSOLE_LINES: usize = 20;
/// How often the same signal must come until a CMD that ignores it is given up.
const PATIENCE_SIGNALS: u32 = 3;

/// What the run waits for.
pub enum Happened {
    /// The machine's process said something.
    Said(Said),
    /// The machine's process is gone; this is how, as the end of a sentence.
    Gone(String),
    /// All that the console printed has been passed on.
    Silent,
    /// This process got a signal.
    Signal(Signal),
    /// The user typed the escape sequence.
    Quit,
    /// The guest's agent answers.
    AgentReady,
    /// CMD runs, and here its input goes in.
    Started(Input),
    /// CMD ended, or could not be run.
    Done(Result<ExitStatus, Failure>),
}

/// Runs a machine; gives the exit status.
pub fn run(args: RunArgs, started: Instant) -> Result<u8, Failure> {
    let around_command = !args.command.is_empty();
    try_run(args, started).map_err(|mut failure| {
        let own = [ExitCode::Usage, ExitCode::NotFound, ExitCode::NotExecutable];
        if around_command && !own.contains(&failure.code) {
            failure.code = ExitCode::AroundCommand;
        }
        failure
    })
}

fn try_run(args: RunArgs, started: Instant) -> Result<u8, Failure> {
    let mut timings = args.timings.then(|| Timings::new(started));
    let engine_options = EngineOptions {
        reference: args.reference,
        count: args.count,
        lockstep: args.lockstep.unwrap_or(0),
        verify_blocks: args.verify_blocks,
    };
    let print_stats = args.print_stats;
    let jail = match (args.no_jail, args.require_jail) {
        (true, _) => Jail::None,
        (false, true) => Jail::Required,
        // Lock-step makes a second engine when the first one runs: a tool for its makers.
        (false, false) if args.lockstep.is_some() => Jail::None,
        (false, false) => Jail::Granted,
    };
    let probe = args.jail_probe;
    let gdb = args.gdb.as_ref().map(gdb::listen).transpose()?;
    let Plan {
        mut config,
        mut mode,
        name_stem,
        temporary: _temporary,
    } = prepare::plan(args)?;
    if let (Some(_), Mode::Command(command)) = (&gdb, &mut mode) {
        command.boot_timeout = DEBUGGED_BOOT;
    }
    if let Some(timings) = &mut timings {
        timings.mark("prepared", Instant::now());
    }
    // After this no thread of ours is interrupted, so it comes before the first one.
    let signals = signals::block()?;
    let run_dir = take_name(&mut config, name_stem.as_deref())?;
    let console = wire::console_output(&mode)?;
    let (mut network, mut cable) = (None, None);
    match &mut config.network {
        NetworkConfig::User(user) => network = Some(Broker::open(user)?),
        NetworkConfig::Port(port) => cable = Some(crate::network::join(port, &config.name)?),
        _ => {}
    }
    let control = process::listen_at(&RunDir::control_socket(run_dir.path()))?;
    let socket = strata_vmm::vsock_socket(&config, Some(run_dir.path()));
    let vsock = match &socket {
        Some(path) => Some((process::listen_at(path)?, path.clone())),
        None => None,
    };
    let socket = socket.map(Removed);
    let has_writable_disk = config.has_writable_disk();
    let (happened, inbox) = channel();
    let ends = Ends {
        control,
        vsock,
        name: config.name.to_string(),
        gdb: gdb.as_ref().map(gdb::Place::listener).transpose()?,
        network,
        cable,
        console,
    };
    let launch = MachineLaunch {
        namespaces: Ok(()),
        config,
        engine_options,
        temporary: std::env::temp_dir(),
        vsock: ends.vsock.is_some(),
        gdb: ends.gdb.is_some(),
        network: ends.network.is_some(),
        cable: ends.cable.is_some(),
        console: ends.console.is_some(),
        jail,
        probe,
    };
    let machine = MachineProcess::start(launch, ends, &happened)?;
    signals::forward(signals, &happened)?;
    let mut run = Run {
        machine,
        mode,
        socket,
        has_writable_disk,
        timings,
        print_stats,
        command: None,
        signals_got: Vec::new(),
        console: Vec::new(),
        stopped_by: None,
        gone: None,
        silent: false,
        happened,
        inbox,
        gdb,
        _run_dir: run_dir,
    };
    let status = run.wait();
    run.part(status.is_ok());
    run.report();
    status
}

/// A socket's path, where there is nothing more in the end.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // If it is gone already, all the better.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A machine that runs, as seen by this program.
struct Run {
    machine: MachineProcess,
    mode: Mode,
    /// Where the guest's agent is reached.
    socket: Option<Removed>,
    has_writable_disk: bool,
    timings: Option<Timings>,
    print_stats: bool,
    /// The way in to CMD once it runs.
    command: Option<Input>,
    signals_got: Vec<Signal>,
    /// The last lines of the console, once the machine has ended.
    console: Vec<String>,
    /// The system call for which the machine's process was stopped.
    stopped_by: Option<u32>,
    /// How the machine's process ended.
    gone: Option<String>,
    /// All that the console printed has been passed on.
    silent: bool,
    happened: Sender<Happened>,
    inbox: Receiver<Happened>,
    /// Where gdb may connect.
    gdb: Option<gdb::Place>,
    /// Removed when the run is over.
    _run_dir: RunDir,
}

impl Run {
    /// The guest runs: ties our streams to it.
    fn connect(&mut self) -> Result<(), Failure> {
        // It is said once, and to say it again changes nothing.
        let Some(input) = self.machine.take_input() else {
            return Ok(());
        };
        self.mark("built");
        if let Some(gdb) = &self.gdb {
            // Nobody hears us if standard error is closed.
            let _ = output::error_line(&gdb.hint());
        }
        match &self.mode {
            Mode::Console { .. } => {
                wire::connect_console(input, &self.happened)?;
                self.pass_size();
                Ok(())
            }
            Mode::Command(command) => {
                let socket = self.socket.as_ref().map(|socket| socket.0.clone());
                let socket = socket.unwrap_or_default();
                command::start(command.clone(), socket, self.happened.clone())
            }
        }
    }

    /// Tells the console the size of our terminal, if there is one.
    fn pass_size(&self) {
        if let Some((columns, rows)) = terminal::size() {
            self.machine.ask(&Request::Resize { columns, rows });
        }
    }

    /// Waits for the end; gives the exit status.
    fn wait(&mut self) -> Result<u8, Failure> {
        loop {
            // A sender is ours.
            let Ok(event) = self.inbox.recv() else {
                return Ok(ExitCode::Internal as u8);
            };
            match event {
                Happened::Said(Said::Built(_)) => self.connect()?,
                Happened::Said(Said::Failed { code, message }) => {
                    return Err(Failure::new(code, printable(&message)));
                }
                Happened::Said(Said::Probed(attempts)) => {
                    for attempt in attempts {
                        let line = serde_json::to_string(&attempt).unwrap_or_default();
                        output::print(&format!("{line}\n"))?;
                    }
                    return Ok(0);
                }
                Happened::Said(Said::StoppedByJail(call)) => self.stopped_by = Some(call),
                Happened::Said(Said::Ended(end)) => {
                    let how = self.ended(*end);
                    return self.status_of(how);
                }
                Happened::Gone(how) => return Err(self.died(how)),
                Happened::Silent => self.silent = true,
                Happened::Quit => {
                    self.stop(PARTING);
                    return Ok(0);
                }
                Happened::Signal(signal) => {
                    if let Some(status) = self.signal(signal) {
                        self.stop(PARTING);
                        return Ok(status);
                    }
                }
                Happened::AgentReady => self.mark("agent_ready"),
                Happened::Started(input) => {
                    self.mark("command_started");
                    self.resize(&input);
                    self.command = Some(input);
                }
                Happened::Done(result) => {
                    self.mark("command_done");
                    return self.finish(result);
                }
            }
        }
    }

    /// The machine's process ended without saying how the machine did.
    fn died(&mut self, how: String) -> Failure {
        let message = match self.stopped_by {
            Some(call) => format!("the machine was stopped by its jail: system call {call}"),
            None => format!("the machine is gone: {how}"),
        };
        self.gone = Some(how);
        Failure::new(ExitCode::Internal, message)
    }

    /// Waits for the end of the machine's process and of its output; not for long if the user wants to be gone.
    fn part(&mut self, patient: bool) {
        let deadline = Instant::now() + PARTING;
        while self.gone.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(event) => self.note(event),
                Err(_) => {
                    self.machine.kill();
                    break;
                }
            }
        }
        let impatient = Instant::now() + LAST_OUTPUT;
        while !self.silent || self.gone.is_none() {
            let event = if patient {
                self.inbox.recv().map_err(|_| ())
            } else {
                let left = impatient.saturating_duration_since(Instant::now());
                self.inbox.recv_timeout(left).map_err(|_| ())
            };
            match event {
                // Whoever reads our output may never do so.
                Ok(Happened::Signal(signal)) if signal != Signal::SIGWINCH => return,
                Ok(event) => self.note(event),
                Err(()) => return,
            }
        }
    }

    /// Takes what still happens when the outcome is decided.
    fn note(&mut self, event: Happened) {
        match event {
            Happened::Said(Said::Ended(end)) => drop(self.ended(*end)),
            Happened::Gone(how) => self.gone = Some(how),
            Happened::Silent => self.silent = true,
            _ => {}
        }
    }

    /// CMD is over: the machine has done its duty.
    fn finish(&mut self, result: Result<ExitStatus, Failure>) -> Result<u8, Failure> {
        // A machine that died is the reason, and the broken connection only its sign.
        let deadline = Instant::now() + OBITUARY;
        while result.is_err() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Happened::Said(Said::Ended(end))) => {
                    let how = self.ended(*end);
                    return self.status_of(how);
                }
                Ok(Happened::Said(Said::StoppedByJail(call))) => self.stopped_by = Some(call),
                Ok(Happened::Gone(how)) => return Err(self.died(how)),
                Ok(event) => self.note(event),
                Err(_) => break,
            }
        }
        let orderly = self.has_writable_disk
            && self
                .socket
                .as_ref()
                .is_some_and(|socket| command::ask_to_power_off(&socket.0));
        if orderly {
            self.await_end(ORDERLY_POWER_OFF);
        } else {
            self.stop(PARTING);
        }
        match result {
            Ok(ExitStatus::Code(code)) => Ok(code),
            Ok(ExitStatus::Signal(signal)) => Ok(SIGNAL_BASE.saturating_add(signal)),
            Err(failure) => Err(self.with_console(failure)),
        }
    }

    /// What a signal means; an exit status if it ends us.
    fn signal(&mut self, signal: Signal) -> Option<u8> {
        if signal == Signal::SIGWINCH {
            match &self.command {
                Some(input) => self.resize(input),
                None => self.pass_size(),
            }
            return None;
        }
        let number = signals::number(signal);
        let status = Some(SIGNAL_BASE.saturating_add(number));
        let Some(input) = &self.command else {
            return status;
        };
        self.signals_got.push(signal);
        let times = self
            .signals_got
            .iter()
            .filter(|got| **got == signal)
            .count();
        let given_up =
            times as u32 >= PATIENCE_SIGNALS && matches!(signal, Signal::SIGINT | Signal::SIGTERM);
        if given_up || input.signal(number).is_err() {
            return status;
        }
        None
    }

    fn resize(&self, input: &Input) {
        if let Mode::Command(command) = &self.mode
            && command.tty
            && let Some((columns, rows)) = terminal::size()
        {
            // It is only a size.
            let _ = input.resize(rows, columns);
        }
    }

    fn stop(&mut self, patience: Duration) {
        self.machine.ask(&Request::PowerOff);
        self.await_end(patience);
    }

    fn await_end(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(event @ (Happened::Said(Said::Ended(_)) | Happened::Gone(_))) => {
                    return self.note(event);
                }
                Ok(event) => self.note(event),
                Err(_) => return,
            }
        }
    }

    fn ended(&mut self, end: End) -> Ending {
        self.mark("ended");
        let age = end.first_run_ago_ns.map(Duration::from_nanos);
        if let Some(timings) = &mut self.timings
            && let Some(first) = age.and_then(|age| Instant::now().checked_sub(age))
        {
            timings.mark("first_instruction", first);
        }
        self.console = end.console;
        if self.print_stats
            && let Ok(line) = serde_json::to_string(&end.stats)
        {
            terminal::restore();
            let _ = output::error_line(&line);
        }
        end.how
    }

    /// The exit status of a machine that ended by itself.
    fn status_of(&self, how: Ending) -> Result<u8, Failure> {
        let in_command = matches!(self.mode, Mode::Command(_));
        match how {
            Ending::DebugExit(value) => Ok((value << 1 | 1) as u8),
            Ending::GuestPanic(message) => {
                let mut said = "the guest's kernel panicked".to_owned();
                if !message.is_empty() {
                    said = format!("{said}: {}", printable(&message));
                }
                Err(self.with_console(Failure::new(ExitCode::Guest, said)))
            }
            Ending::Crashed { code, message } => {
                Err(self.with_console(Failure::new(code, printable(&message))))
            }
            Ending::PoweredOff | Ending::Rebooted | Ending::Stopped if !in_command => Ok(0),
            Ending::PoweredOff | Ending::Rebooted | Ending::Stopped => {
                let message = "the machine ended before the command did";
                Err(self.with_console(Failure::new(ExitCode::Guest, message)))
            }
        }
    }

    /// Adds the console's last lines, unless they were seen as they came.
    fn with_console(&self, failure: Failure) -> Failure {
        let told_apart = [ExitCode::NotFound, ExitCode::NotExecutable];
        let seen = matches!(
            self.mode,
            Mode::Console {
                kernel_log: true,
                ..
            }
        );
        if seen || told_apart.contains(&failure.code) || !failure.more.is_empty() {
            return failure;
        }
        let from = self.console.len().saturating_sub(CONSOLE_LINES);
        let lines = self.console.get(from..).unwrap_or_default();
        if lines.is_empty() {
            return failure;
        }
        let mut more = vec!["The console's last lines:".to_owned()];
        more.extend(lines.iter().map(|line| format!("  {}", printable(line))));
        failure.with(more)
    }

    fn mark(&mut self, phase: &'static str) {
        if let Some(timings) = &mut self.timings {
            timings.mark(phase, Instant::now());
        }
    }

    fn report(&mut self) {
        if let Some(timings) = &mut self.timings {
            terminal::restore();
            let _ = output::error_line(&timings.line());
        }
    }
}

/// Takes the machine's name; another one if it was made up and is taken.
fn take_name(
    config: &mut strata_vmm::MachineConfig,
    stem: Option<&str>,
) -> Result<RunDir, Failure> {
    let root = RunDir::root();
    loop {
        match (RunDir::create(&root, &config.name), stem) {
            (Err(RunDirError::NameInUse(_)), Some(stem)) => {
                config.name = MachineName::generate(stem);
            }
            (result, _) => return result.map_err(|error| run_dir_failure(&error)),
        }
    }
}

/// Makes a thread.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    match thread.spawn(work) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(
            ExitCode::System,
            format!("cannot make a thread: {error}"),
        )),
    }
}

/// A line from the machine's process, safe to print on a terminal.
pub fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).collect()
}
