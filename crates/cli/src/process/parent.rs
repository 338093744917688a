//! The process in front: makes the machine's process, and its streams and ours meet here.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use strata_sandbox::{Layer, Program};
use strata_vmm::Cable;
use strata_vmm::control::Request;

use super::broker::{self, Broker};
use super::{Launch, MachineLaunch, Said, SwitchLaunch, WORD, dial};
use crate::exit::{ExitCode, Failure};
use crate::run::{Happened, spawn};

/// Longest line that is believed to be one.
const LINE_MAX: u64 = 8 << 20;

/// What the machine's process is given besides its configuration.
pub struct Ends {
    /// Listens for the control protocol.
    pub control: UnixListener,
    /// Listens for programs of the host, at this path.
    pub vsock: Option<(UnixListener, PathBuf)>,
    /// Listens for gdb.
    pub gdb: Option<OwnedFd>,
    /// Makes the sockets of the machine's network.
    pub network: Option<Broker>,
    /// A port on a shared network: what the machine gets, and the connection that keeps the port.
    pub cable: Option<(Cable, OwnedFd)>,
    /// Where the console's output goes; nowhere if there is none.
    pub console: Option<Box<dyn Write + Send>>,
    /// The machine's name, for lists of processes.
    pub name: String,
}

/// The machine's process, as the one in front has it. It ends with this value.
pub struct MachineProcess {
    channel: UnixStream,
    pidfd: OwnedFd,
    input: Option<File>,
    /// Keeps the machine's port on a shared network.
    _port: Option<OwnedFd>,
}

impl MachineProcess {
    /// Makes the process. What it says comes as [`Happened::Said`], its end as [`Happened::Gone`], and when its last
    /// output has been passed on, [`Happened::Silent`] comes.
    ///
    /// # Errors
    /// If the system refuses a process, a descriptor or a thread.
    pub fn start(
        mut launch: MachineLaunch,
        ends: Ends,
        happened: &Sender<Happened>,
    ) -> Result<Self, Failure> {
        let (typed, input) = pipe()?;
        let (output, printed) = pipe()?;
        let (words, said) = pipe()?;
        let (channel, theirs) = UnixStream::pair().map_err(refused)?;
        let (line, dials) = UnixStream::pair().map_err(refused)?;
        let mut given: Vec<BorrowedFd<'_>> = vec![
            typed.as_fd(),
            printed.as_fd(),
            said.as_fd(),
            theirs.as_fd(),
            ends.control.as_fd(),
        ];
        if let Some((listener, _)) = &ends.vsock {
            given.extend([listener.as_fd(), dials.as_fd()]);
        }
        given.extend(ends.gdb.as_ref().map(AsFd::as_fd));
        let network = match ends.network {
            Some(broker) => {
                let (theirs, ours) = broker::line().map_err(|error| refused(error.into()))?;
                Some((theirs, ours, broker))
            }
            None => None,
        };
        given.extend(network.as_ref().map(|(theirs, ..)| theirs.as_fd()));
        if let Some((cable, _)) = &ends.cable {
            given.extend([cable.ring.as_fd(), cable.bell.as_fd()]);
        }
        let namespaces = launch.jail != super::Jail::None;
        let (pid, granted) = run(&given, &[WORD, &ends.name], namespaces)?;
        drop((typed, printed, said, theirs, dials));
        let network = network.map(|(_, ours, broker)| (ours, broker));
        launch.namespaces = granted;
        let process = Self {
            pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())
                .map_err(|error| refused(error.into()))?,
            channel: channel.try_clone().map_err(refused)?,
            input: Some(input.into()),
            _port: ends.cable.map(|(_, connection)| connection),
        };
        send(&channel, &Launch::Machine(Box::new(launch)))?;
        if let Some((_, path)) = ends.vsock {
            spawn("dial", move || dial::serve(line, &path))?;
        }
        if let Some((line, broker)) = network {
            spawn("network", move || broker.serve(line))?;
        }
        let words = File::from(words);
        spawn("words", move || relay(words, &mut io::stderr()))?;
        let happened_there = happened.clone();
        let mut console = ends.console;
        let output = File::from(output);
        spawn("console", move || {
            match &mut console {
                Some(sink) => relay(output, sink),
                None => relay(output, &mut io::sink()),
            }
            // The one who waits may have given up.
            let _ = happened_there.send(Happened::Silent);
        })?;
        let (happened, end) = (
            happened.clone(),
            process.pidfd.try_clone().map_err(refused)?,
        );
        spawn("machine", move || {
            listen(&channel, |said| happened.send(Happened::Said(said)).is_ok());
            // One that no longer speaks, or nonsense, is not waited for.
            let _ = rustix::process::pidfd_send_signal(&end, Signal::KILL);
            let _ = happened.send(Happened::Gone(status_of(pid)));
        })?;
        Ok(process)
    }

    /// Asks for something. Whether it was done shows by what follows.
    pub fn ask(&self, request: &Request) {
        // It may have ended by itself meanwhile.
        let _ = send(&self.channel, request);
    }

    /// Where to type on the console; once.
    pub fn take_input(&mut self) -> Option<File> {
        self.input.take()
    }

    /// Ends the process at once, if it is still there.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for MachineProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Says which layers of the jail this host grants, by putting a process into it.
///
/// # Errors
/// If no process can be made.
pub fn check_jail() -> Result<Vec<Layer>, Failure> {
    let (channel, pid, namespaces) = run_silent(&[], &[WORD])?;
    send(&channel, &Launch::Check { namespaces })?;
    let mut layers = None;
    listen(&channel, |said| match said {
        Said::Built(granted) => {
            layers = Some(granted);
            true
        }
        _ => false,
    });
    let gone = status_of(pid);
    layers.ok_or_else(|| Failure::new(ExitCode::Internal, gone))
}

/// Makes the process of a shared network's switch, whose machines come to `listener`. It stays when this one ends.
///
/// # Errors
/// If no process can be made, or it cannot be a switch.
pub fn start_switch(listener: &UnixListener, mut launch: SwitchLaunch) -> Result<(), Failure> {
    let (channel, _, namespaces) = run_silent(&[listener.as_fd()], &[WORD, &launch.name])?;
    launch.namespaces = namespaces;
    send(&channel, &Launch::Switch(launch))?;
    let mut failure = Some("its process is gone".to_owned());
    listen(&channel, |said| {
        failure = match said {
            Said::Built(_) => None,
            Said::Failed { message, .. } => Some(message),
            _ => Some("its process says nonsense".to_owned()),
        };
        false
    });
    match failure {
        None => Ok(()),
        Some(why) => Err(Failure::new(
            ExitCode::System,
            format!("cannot start the network's switch: {why}"),
        )),
    }
}

/// Runs this program again in namespaces of its own, without input or output, with a channel and further descriptors.
/// Returns our end of the channel, the process, and whether it has the namespaces.
fn run_silent(
    more: &[BorrowedFd<'_>],
    words: &[&str],
) -> Result<(UnixStream, Pid, Result<(), String>), Failure> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(refused)?;
    let (channel, theirs) = UnixStream::pair().map_err(refused)?;
    let mut descriptors = vec![null.as_fd(), null.as_fd(), null.as_fd(), theirs.as_fd()];
    descriptors.extend(more);
    let (pid, namespaces) = run(&descriptors, words, true)?;
    Ok((channel, pid, namespaces))
}

/// Runs this program again with these descriptors and arguments.
fn run(
    descriptors: &[BorrowedFd<'_>],
    words: &[&str],
    namespaces: bool,
) -> Result<(Pid, Result<(), String>), Failure> {
    let arguments: Result<Vec<CString>, _> = std::iter::once("strata")
        .chain(words.iter().copied())
        .map(CString::new)
        .collect();
    // Of the environment, only where the libraries of this program are found, if that was said.
    let libraries: Option<CString> = std::env::var_os("LD_LIBRARY_PATH").and_then(|at| {
        let mut setting = b"LD_LIBRARY_PATH=".to_vec();
        setting.extend_from_slice(at.as_encoded_bytes());
        CString::new(setting).ok()
    });
    let program = Program {
        path: c"/proc/self/exe",
        arguments: &arguments.map_err(|error| refused(error.into()))?,
        environment: libraries.as_slice(),
        descriptors,
        namespaces,
    };
    let spawned = strata_sandbox::spawn(&program).map_err(refused)?;
    match Pid::from_raw(spawned.pid) {
        Some(pid) => Ok((pid, spawned.namespaces)),
        None => Err(refused(io::ErrorKind::Other.into())),
    }
}

fn refused(error: io::Error) -> Failure {
    Failure::new(
        ExitCode::System,
        format!("cannot make the machine's process: {error}"),
    )
}

/// The end to read from, and the one to write to.
fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| refused(error.into()))
}

fn send(mut channel: &UnixStream, what: &impl serde::Serialize) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(what)
        .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
    line.push(b'\n');
    channel.write_all(&line).map_err(refused)
}

/// Hands on what the process says, until it ends, says nonsense, or nobody wants more.
fn listen(channel: &UnixStream, mut hear: impl FnMut(Said) -> bool) {
    let mut lines = BufReader::new(channel);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(1) if line == *b"\n" => continue,
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => return,
        }
        let heard = serde_json::from_slice(&line).is_ok_and(&mut hear);
        if !heard {
            return;
        }
    }
}

/// Moves bytes as they come, until either side ends.
fn relay(mut from: File, to: &mut dyn Write) {
    let mut buffer = [0; 16 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if to.write_all(bytes).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

/// Waits for the process; says how it ended, as the end of a sentence.
fn status_of(pid: Pid) -> String {
    let status = match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
        Ok(Some((_, status))) => status,
        _ => return "its process is gone".to_owned(),
    };
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => format!("its process ended with status {status}"),
        (None, Some(signal)) if signal == Signal::SYS.as_raw() => {
            "it was stopped by its jail".to_owned()
        }
        (None, Some(signal)) => format!("its process was ended by signal {signal}"),
        (None, None) => "its process is gone".to_owned(),
    }
}

/// Makes a socket in the user's name, in a place where none may be yet.
pub fn listen_at(path: &Path) -> Result<UnixListener, Failure> {
    UnixListener::bind(path).map_err(|error| {
        Failure::new(
            ExitCode::CannotCreate,
            format!("cannot listen at {}: {error}", path.display()),
        )
    })
}
