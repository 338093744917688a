//! `strata run`: a machine from a command line, and this program's input, output and signals tied to it.
//!
//! ```text
//! prepare   arguments → configuration            terminal  raw mode and its end
//! wire      console or CMD ↔ our streams         signals   waited for, never handled
//! ```
//!
//! One thread waits for what happens ([`Happened`]); the machine, each of our streams and the signals have theirs.

mod command;
mod escape;
mod prepare;
mod signals;
pub mod terminal;
mod timings;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use strata_agent::{ExitStatus, Input};
use strata_vmm::engines::EngineOptions;
use strata_vmm::{
    BuildError, ConsoleInput, ConsoleRing, Crash, HostEnds, Machine, MachineHandle, MachineName,
    MachineStats, Outcome, RunDir, RunDirError,
};

use self::prepare::{Mode, Plan};
use self::timings::Timings;
use crate::args::RunArgs;
use crate::exit::{ExitCode, Failure, SIGNAL_BASE, chain, code_of_io};
use crate::output;
use crate::stats::run_dir_failure;

/// How long a machine that must end may take before it is left to the end of this process.
const PARTING: Duration = Duration::from_secs(1);
/// How long a guest with disks that it writes may take to power off after CMD.
const ORDERLY_POWER_OFF: Duration = Duration::from_secs(10);
/// Lines of the console in the report of a crash.
const CONSOLE_LINES: usize = 12;
/// How Linux begins to say why it panics.
const PANIC: &str = "Kernel panic - not syncing: ";
/// How often the same signal must come until a CMD that ignores it is given up.
const PATIENCE_SIGNALS: u32 = 3;

/// What the run waits for.
enum Happened {
    /// The machine ended.
    Ended(Outcome, MachineStats),
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
    };
    let print_stats = args.print_stats;
    let Plan {
        mut config,
        mode,
        name_stem,
    } = prepare::plan(args)?;
    if let Some(timings) = &mut timings {
        timings.mark("prepared", Instant::now());
    }
    // After this no thread of ours is interrupted, so it comes before the first one.
    let signals = signals::block()?;
    let run_dir = take_name(&mut config, name_stem.as_deref())?;
    let console = wire::console_output(&mode)?;
    let ends = HostEnds {
        console,
        run_dir: Some(run_dir.path().to_owned()),
        engine_options,
    };
    let socket = strata_vmm::vsock_socket(&config, Some(run_dir.path()));
    let has_writable_disk = config.has_writable_disk();
    let machine = Machine::build(config, ends).map_err(|error| build_failure(&error))?;
    machine
        .serve_control(run_dir.path())
        .map_err(|error| build_failure(&error))?;
    let (happened, inbox) = channel();
    signals::forward(signals, &happened)?;
    let mut run = Run {
        handle: machine.handle(),
        console: machine.console_input(),
        ring: machine.console_ring(),
        first_run: machine.first_run(),
        mode,
        socket,
        has_writable_disk,
        timings,
        print_stats,
        command: None,
        signals_got: Vec::new(),
        inbox,
        _run_dir: run_dir,
    };
    run.start(machine, &happened)?;
    let status = run.wait();
    run.report();
    status
}

/// A machine that runs, as seen by this program.
struct Run {
    handle: MachineHandle,
    console: ConsoleInput,
    ring: ConsoleRing,
    first_run: Arc<std::sync::OnceLock<Instant>>,
    mode: Mode,
    /// Where the guest's agent is reached.
    socket: Option<PathBuf>,
    has_writable_disk: bool,
    timings: Option<Timings>,
    print_stats: bool,
    /// The way in to CMD once it runs.
    command: Option<Input>,
    signals_got: Vec<Signal>,
    inbox: Receiver<Happened>,
    /// Removed when the run is over.
    _run_dir: RunDir,
}

impl Run {
    fn start(&mut self, machine: Machine, happened: &Sender<Happened>) -> Result<(), Failure> {
        self.mark("built");
        match &self.mode {
            Mode::Console { .. } => wire::connect_console(&self.console, happened)?,
            Mode::Command(command) => {
                let socket = self.socket.clone().unwrap_or_default();
                command::start(command.clone(), socket, happened.clone())?;
            }
        }
        let happened = happened.clone();
        spawn("machine", move || {
            let (outcome, stats) = machine.run();
            // The one who waits may have given up.
            let _ = happened.send(Happened::Ended(outcome, stats));
        })
    }

    /// Waits for the end; gives the exit status.
    fn wait(&mut self) -> Result<u8, Failure> {
        loop {
            // A sender is held by the signals' thread for ever.
            let Ok(event) = self.inbox.recv() else {
                return Ok(ExitCode::Internal as u8);
            };
            match event {
                Happened::Ended(outcome, stats) => {
                    self.ended(&stats);
                    return self.status_of(&outcome);
                }
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

    /// CMD is over: the machine has done its duty.
    fn finish(&mut self, result: Result<ExitStatus, Failure>) -> Result<u8, Failure> {
        // A machine that died is the reason, and the broken connection only its sign.
        if result.is_err()
            && let Ok(Happened::Ended(outcome, stats)) =
                self.inbox.recv_timeout(Duration::from_millis(50))
        {
            self.ended(&stats);
            return self.status_of(&outcome);
        }
        let orderly = self.has_writable_disk
            && self
                .socket
                .as_deref()
                .is_some_and(command::ask_to_power_off);
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
                None => wire::pass_size(&self.console),
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
        self.handle.power_off();
        self.await_end(patience);
    }

    fn await_end(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Happened::Ended(_, stats)) => return self.ended(&stats),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn ended(&mut self, stats: &MachineStats) {
        self.mark("ended");
        if self.print_stats
            && let Ok(line) = serde_json::to_string(stats)
        {
            terminal::restore();
            let _ = output::error_line(&line);
        }
    }

    /// The exit status of a machine that ended by itself.
    fn status_of(&self, outcome: &Outcome) -> Result<u8, Failure> {
        let in_command = matches!(self.mode, Mode::Command(_));
        match outcome {
            Outcome::DebugExit(value) => Ok((value << 1 | 1) as u8),
            Outcome::Crashed(crash) => Err(self.crashed(crash)),
            Outcome::PoweredOff | Outcome::Rebooted | Outcome::Stopped if !in_command => Ok(0),
            // Without its panic driver a guest resets the machine.
            Outcome::Rebooted if self.panic_message().is_some() => {
                Err(self.crashed(&Crash::GuestPanic))
            }
            _ => {
                let message = "the machine ended before the command did";
                Err(self.with_console(Failure::new(ExitCode::Guest, message)))
            }
        }
    }

    fn crashed(&self, crash: &Crash) -> Failure {
        let mut failure = crash_failure(crash);
        if matches!(crash, Crash::GuestPanic)
            && let Some(message) = self.panic_message()
        {
            failure.message = format!("{}: {message}", failure.message);
        }
        self.with_console(failure)
    }

    /// What the guest's kernel said when it panicked last, if it did.
    fn panic_message(&self) -> Option<String> {
        let lines = self.ring.tail(usize::MAX);
        let message = |line: &String| Some(line.split_once(PANIC)?.1.trim().to_owned());
        lines.iter().rev().find_map(message)
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
        let lines = self.ring.tail(CONSOLE_LINES);
        if lines.is_empty() {
            return failure;
        }
        let mut more = vec!["The console's last lines:".to_owned()];
        more.extend(lines.into_iter().map(|line| format!("  {line}")));
        failure.with(more)
    }

    fn mark(&mut self, phase: &'static str) {
        if let Some(timings) = &mut self.timings {
            timings.mark(phase, Instant::now());
        }
    }

    fn report(&mut self) {
        if let Some(timings) = &mut self.timings {
            if let Some(first) = self.first_run.get() {
                timings.mark("first_instruction", *first);
            }
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

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    match thread.spawn(work) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(
            ExitCode::System,
            format!("cannot make a thread: {error}"),
        )),
    }
}

fn build_failure(error: &BuildError) -> Failure {
    let code = match error {
        BuildError::Cpus { .. } | BuildError::TooManyDisks { .. } | BuildError::Layout(_) => {
            ExitCode::Usage
        }
        BuildError::CpuModel(strata_engine::x86::ModelError::Unknown(_)) => ExitCode::Usage,
        BuildError::File { source, .. } => code_of_io(source),
        BuildError::NotABootFile { .. } | BuildError::Boot { .. } => ExitCode::Data,
        BuildError::Disk(_) => disk_code(error),
        BuildError::CpuModel(_) => ExitCode::Unavailable,
        BuildError::Engine(strata_engine::EngineError::Unsupported { .. }) => ExitCode::Unavailable,
        BuildError::Memory(_) | BuildError::Host { .. } => ExitCode::System,
        BuildError::Device { .. } => ExitCode::CannotCreate,
        BuildError::UnresolvedImage(_) | BuildError::Engine(_) => ExitCode::Internal,
    };
    Failure::from_error(code, error)
}

/// A disk's status is that of the system's error behind it, if there is one.
fn disk_code(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return code_of_io(io);
        }
        cause = error.source();
    }
    ExitCode::Data
}

fn crash_failure(crash: &Crash) -> Failure {
    let code = match crash {
        Crash::GuestPanic | Crash::TripleFault { .. } => ExitCode::Guest,
        Crash::Engine { .. } | Crash::ThreadGone { .. } => ExitCode::Internal,
        Crash::Restart(error) => build_failure(error).code,
    };
    Failure::new(code, chain(crash))
}
