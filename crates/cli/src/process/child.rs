//! The machine's process: builds the machine, goes into its jail, runs the guest.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use rustix::process::Resource;
use strata_sandbox::{Confinement, Filter, Layer};
use strata_vmm::control::Request;
use strata_vmm::{
    BuildError, Cable, ConsoleInput, ConsoleRing, Crash, HostEnds, Machine, MachineHandle, Outcome,
    VsockHost,
};

use super::broker::Line;
use super::{Attempt, End, Ending, Jail, Launch, MachineLaunch, Probe, Said, dial};
use crate::exit::{ExitCode, Failure, chain, code_of_io};
use crate::run::spawn;

/// The first descriptor beyond the standard ones, and how many there may be.
const DESCRIPTORS: (i32, usize) = (3, 8);
/// Longest line that is read.
const LINE_MAX: u64 = 1 << 20;
/// Lines of the console that are told in the end.
const CONSOLE_LINES: usize = 200;
/// What the hardware engine opens.
const KVM: &str = "/dev/kvm";

/// Does what the process in front wants; gives the exit status.
pub fn main() -> Result<u8, Failure> {
    let mut given = strata_sandbox::inherited(DESCRIPTORS.0, DESCRIPTORS.1).into_iter();
    let Some(channel) = given.next().map(UnixStream::from) else {
        let message = format!("'{}' is not for people: see 'strata --help'", super::WORD);
        return Err(Failure::new(ExitCode::Usage, message));
    };
    let unheard = |error: io::Error| Failure::new(ExitCode::Internal, error.to_string());
    let mut lines = BufReader::new(channel.try_clone().map_err(unheard)?);
    let launch = read_line(&mut lines).map_err(unheard)?;
    let launch: Launch = serde_json::from_slice(&launch)
        .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
    let speaker = Speaker(Arc::new(channel));
    match launch {
        Launch::Check { namespaces } => {
            let mut layers = confine(&namespaces);
            layers.push(seal(false, &speaker, false));
            speaker.say(&Said::Built(layers));
        }
        Launch::Switch(launch) => {
            let failed = |error: io::Error| Said::Failed {
                code: ExitCode::System,
                message: error.to_string(),
            };
            match given
                .next()
                .map(|listener| super::switch::open(&launch, listener))
            {
                Some(Ok(mut hub)) => {
                    let layers = confine(&launch.namespaces);
                    // It stays for the other machines when the one that started it goes.
                    let stays = rustix::process::set_parent_process_death_signal(None);
                    let _ = rustix::process::setsid();
                    if let Err(error) = stays {
                        speaker.say(&failed(error.into()));
                        return Ok(0);
                    }
                    speaker.say(&Said::Built(layers));
                    drop((speaker, lines));
                    hub.run().map_err(unheard)?;
                }
                Some(Err(error)) => speaker.say(&failed(error)),
                None => {}
            }
        }
        Launch::Machine(launch) => {
            if let Err(failure) = machine(*launch, lines, given, &speaker) {
                let Failure { code, message, .. } = failure;
                speaker.say(&Said::Failed { code, message });
            }
        }
    }
    Ok(0)
}

/// Speaks to the process in front.
#[derive(Clone)]
struct Speaker(Arc<UnixStream>);

impl Speaker {
    fn say(&self, said: &Said) {
        if let Ok(mut line) = serde_json::to_vec(said) {
            line.push(b'\n');
            // When nobody listens this process is about to be ended.
            let _ = (&*self.0).write_all(&line);
        }
    }
}

fn machine(
    launch: MachineLaunch,
    requests: BufReader<UnixStream>,
    mut given: impl Iterator<Item = OwnedFd>,
    speaker: &Speaker,
) -> Result<(), Failure> {
    let control = given.next().map(UnixListener::from);
    let vsock = match launch.vsock {
        true => given.next().zip(given.next()),
        false => None,
    };
    let vsock = vsock.map(|(listener, line)| VsockHost::on(listener.into(), dialler(line.into())));
    let gdb = if launch.gdb { given.next() } else { None };
    let line = if launch.network { given.next() } else { None };
    let line = line.map(Line::new).transpose().map_err(|error| {
        let message = format!("no descriptor for the machine's network: {error}");
        Failure::new(ExitCode::System, message)
    })?;
    let cable = match launch.cable {
        true => given.next().zip(given.next()),
        false => None,
    };
    let cable = cable.map(|(ring, bell)| Cable { ring, bell });
    if line.is_some() {
        raise_descriptors();
    }
    let layers = Arc::new(Mutex::new(Vec::new()));
    let ends = HostEnds {
        console: launch.console.then(|| Box::new(Console) as _),
        run_dir: None,
        vsock,
        sockets: line.map(|line| Box::new(line) as _),
        cable,
        temporary: Some(launch.temporary),
        engine_options: launch.engine_options,
        opened: (launch.jail != Jail::None).then(|| {
            let (layers, namespaces) = (layers.clone(), launch.namespaces.clone());
            Box::new(move || *lock(&layers) = confine(&namespaces)) as _
        }),
    };
    let mut machine = Machine::build(launch.config, ends).map_err(|error| build_failure(&error))?;
    if let Some(gdb) = gdb {
        machine
            .serve_gdb(gdb)
            .map_err(|error| build_failure(&error))?;
    }
    if let Some(control) = control {
        machine
            .serve_control(control)
            .map_err(|error| build_failure(&error))?;
    }
    take_input(machine.console_input())?;
    take_requests(requests, machine.handle())?;
    let mut layers = std::mem::take(&mut *lock(&layers));
    let (ring, first_run) = (machine.console_ring(), machine.first_run());
    // A thread that was there before the filter: it is for all of them.
    let elsewhere = launch.probe.map(|_| probe_elsewhere()).transpose()?;
    if launch.jail != Jail::None && launch.probe != Some(Probe::Unfiltered) {
        let survive = launch.probe == Some(Probe::Filtered);
        layers.push(seal(machine.engine_name() == "kvm", speaker, survive));
    }
    if launch.jail == Jail::Required {
        require(&layers)?;
    }
    speaker.say(&Said::Built(layers));
    if let Some(elsewhere) = elsewhere {
        let mut attempts = strata_sandbox::probe();
        attempts.extend(elsewhere());
        speaker.say(&Said::Probed(attempts));
        return Ok(());
    }
    let (outcome, stats) = machine.run();
    let first_run_ago_ns = first_run
        .get()
        .map(|first| u64::try_from(first.elapsed().as_nanos()).unwrap_or(u64::MAX));
    speaker.say(&Said::Ended(Box::new(End {
        how: ending(outcome, &ring),
        stats,
        console: ring.tail(CONSOLE_LINES),
        first_run_ago_ns,
    })));
    Ok(())
}

/// Each flow of a network needs a descriptor: as many as this process may have.
fn raise_descriptors() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With fewer there are fewer flows.
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn confine(namespaces: &Result<(), String>) -> Vec<Layer> {
    strata_sandbox::confine(&Confinement {
        namespaces,
        devices: &[Path::new(KVM)],
    })
}

fn seal(kvm: bool, speaker: &Speaker, survive: bool) -> Layer {
    let report = speaker.0.as_raw_fd();
    let sealed = strata_sandbox::seal(Filter {
        kvm,
        report,
        survive,
    });
    Layer::new("system-call-filter", sealed.map_err(|error| chain(&error)))
}

fn require(layers: &[Layer]) -> Result<(), Failure> {
    let missing: Vec<String> = layers
        .iter()
        .filter_map(|layer| Some(format!("{} ({})", layer.name, layer.shortcoming()?)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        ExitCode::Unavailable,
        format!(
            "this host refuses a part of the machine's jail: {}",
            missing.join(", ")
        ),
    ))
}

/// Makes a thread that tries everything when it is told to.
fn probe_elsewhere() -> Result<impl FnOnce() -> Vec<Attempt>, Failure> {
    let (go, told) = mpsc::channel::<()>();
    let (say, heard) = mpsc::channel();
    spawn("probe", move || {
        if told.recv().is_ok() {
            // Whoever asked waits for it.
            let _ = say.send(strata_sandbox::probe());
        }
    })?;
    Ok(move || {
        let _ = go.send(());
        heard.recv().unwrap_or_default()
    })
}

fn dialler(line: UnixStream) -> impl FnMut(u32) -> io::Result<UnixStream> + Send + 'static {
    move |port| dial::ask(&line, port)
}

/// Standard output without the standard library's buffer: a console's bytes are seen as they come.
struct Console;

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Types on the console what comes on standard input.
fn take_input(console: ConsoleInput) -> Result<(), Failure> {
    spawn("input", move || {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(count @ 1..) if console.push_all(buffer.get(..count).unwrap_or_default()) => {}
                _ => return,
            }
        }
    })
}

/// Passes requests on to the machine. Without the process in front there is nobody to run for.
fn take_requests(mut lines: BufReader<UnixStream>, machine: MachineHandle) -> Result<(), Failure> {
    spawn("requests", move || {
        while let Ok(line) = read_line(&mut lines) {
            match serde_json::from_slice::<Request>(&line) {
                // It is answered by what follows from it.
                Ok(Request::PowerOff) => machine.power_off(),
                Ok(request) => drop(machine.ask(request)),
                Err(_) => break,
            }
        }
        std::process::exit(i32::from(ExitCode::Internal as u8));
    })
}

fn read_line(lines: &mut BufReader<UnixStream>) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
    match line.pop() {
        Some(b'\n') => Ok(line),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// How Linux begins to say why it panics.
const PANIC: &str = "Kernel panic - not syncing: ";

fn ending(outcome: Outcome, ring: &ConsoleRing) -> Ending {
    let panic = || {
        let lines = ring.tail(usize::MAX);
        let message = |line: &String| Some(line.split_once(PANIC)?.1.trim().to_owned());
        lines.iter().rev().find_map(message)
    };
    match outcome {
        Outcome::PoweredOff => Ending::PoweredOff,
        // Without its panic driver a guest resets the machine.
        Outcome::Rebooted => panic().map_or(Ending::Rebooted, Ending::GuestPanic),
        Outcome::Stopped => Ending::Stopped,
        Outcome::DebugExit(value) => Ending::DebugExit(value),
        Outcome::Crashed(Crash::GuestPanic) => Ending::GuestPanic(panic().unwrap_or_default()),
        Outcome::Crashed(crash) => {
            let code = match &crash {
                Crash::GuestPanic | Crash::TripleFault { .. } => ExitCode::Guest,
                Crash::Engine { .. } | Crash::ThreadGone { .. } => ExitCode::Internal,
                Crash::Restart(error) => build_failure(error).code,
            };
            let message = chain(&crash);
            Ending::Crashed { code, message }
        }
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
        BuildError::Disk(_) | BuildError::Inside { .. } => disk_code(error),
        BuildError::NoBootDisk => ExitCode::Usage,
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
