//! Process 1 after the mounts: starts what the command line asks for, reaps, and ends the machine.
//!
//! ```text
//! load modules ─┬─ vsock is there ──→ agent (restarted if it dies)
//!               └─ all loaded ──────→ console shell or one program ──ended──→ power off
//! SIGUSR1, SIGUSR2 → power off        SIGTERM, SIGINT → reboot            (busybox's poweroff, halt, reboot)
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::agent;
use crate::modules::{self, Loader};
use crate::network;
use crate::options::Options;
use crate::program::{self, User};
use crate::root;
use crate::system::{self, Ended, Ending, Signals};

/// How long processes may take to end when told to, in milliseconds.
const GRACE_MS: i64 = 2_000;

/// Does all that is left of booting, then lives until the machine ends. Returns only on failure.
pub fn run(options: &Options) -> io::Error {
    let signals = Signals::block(&[
        libc::SIGCHLD,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGTERM,
        libc::SIGINT,
    ]);
    match Machine::start(options, &signals).and_then(|machine| machine.live()) {
        Ok(ending) => end(ending, &signals),
        Err(error) => error,
    }
}

/// The processes that matter.
struct Machine<'a> {
    options: &'a Options,
    signals: &'a Signals,
    /// The console shell or the one program; the machine ends with it.
    main: Option<u32>,
    agent: Option<u32>,
}

impl<'a> Machine<'a> {
    fn start(options: &'a Options, signals: &'a Signals) -> io::Result<Machine<'a>> {
        let mut agent = None;
        let mut no_agent = None;
        let list = fs::read_to_string(modules::LIST).unwrap_or_default();
        let mut loader = Loader::new(&list);
        while loader.step() {
            // The host waits for the agent, not for the other drivers. On a root disk it is the system's to start.
            if options.agent && agent.is_none() && options.root.is_none() {
                match agent::start(signals) {
                    Ok(pid) => agent = Some(pid),
                    Err(error) => no_agent = Some(error),
                }
            }
        }
        if let Some(root) = &options.root {
            signals.unblock();
            return Err(root::hand_over(options, root));
        }
        complain(
            "host name",
            system::set_hostname(options.hostname.as_deref().unwrap_or("strata")),
        );
        complain("loopback interface", system::interface_up("lo"));
        complain("network", network::start());

        let mut machine = Machine {
            options,
            signals,
            main: None,
            agent,
        };
        if !options.run.is_empty() {
            machine.main = Some(start_program(options)?);
        } else if options.console.is_some() || !options.agent {
            machine.main = Some(start_shell(options)?);
        }
        match no_agent.filter(|_| agent.is_none()) {
            Some(error) if machine.main.is_none() => Err(named(Path::new("vsock"), error)),
            Some(error) => {
                complain("vsock", Err(error));
                Ok(machine)
            }
            None => Ok(machine),
        }
    }

    /// Reaps and obeys signals until something asks for the end.
    fn live(mut self) -> io::Result<Ending> {
        loop {
            match self.signals.next(None) {
                Some(libc::SIGUSR1 | libc::SIGUSR2) => return Ok(Ending::PowerOff),
                Some(libc::SIGTERM | libc::SIGINT) => return Ok(Ending::Reboot),
                _ => {}
            }
            while let Ok(Some((pid, ended))) = system::reap() {
                if Some(pid) == self.main {
                    match ended {
                        Ended::Killed(_) if self.options.run.is_empty() => {
                            self.main = Some(start_shell(self.options)?)
                        }
                        _ => {
                            report(self.options, ended);
                            return Ok(Ending::PowerOff);
                        }
                    }
                } else if Some(pid) == self.agent {
                    self.agent = Some(agent::start(self.signals)?);
                }
            }
        }
    }
}

/// Says how the one program ended, unless it went well.
fn report(options: &Options, ended: Ended) {
    let Some(program) = options.run.first() else {
        return;
    };
    match ended {
        Ended::Exited(0) => {}
        Ended::Exited(status) => {
            eprintln!("strata-init: {}: exit status {status}", program.display())
        }
        Ended::Killed(signal) => eprintln!(
            "strata-init: {}: killed by signal {signal}",
            program.display()
        ),
    }
}

/// A command with the environment of a root login on the console.
fn command(program: &OsStr, options: &Options) -> Command {
    let mut command = Command::new(program);
    program::environment(&mut command, &User::root());
    if let Some(term) = &options.term {
        command.env("TERM", term);
    }
    command
}

/// Starts a root shell on the console, which becomes its controlling terminal.
fn start_shell(options: &Options) -> io::Result<u32> {
    let name = options.console.clone().unwrap_or_else(active_console);
    let path = Path::new("/dev").join(&name);
    let terminal = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| named(&path, error))?;
    if options.rows > 0 && options.cols > 0 {
        complain(
            "window size",
            system::set_window_size(terminal.as_fd(), options.rows, options.cols),
        );
    }
    let mut shell = command(OsStr::new("/bin/sh"), options);
    shell.arg0("-sh").current_dir("/root");
    shell
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    // SAFETY: the closure only makes system calls; descriptor 0 is the terminal by then.
    unsafe { shell.pre_exec(|| system::lead_session(Some(BorrowedFd::borrow_raw(0)))) };
    shell
        .spawn()
        .map(|child| child.id())
        .map_err(|error| named(Path::new("/bin/sh"), error))
}

/// Starts the one program, with the kernel's console for input and output.
fn start_program(options: &Options) -> io::Result<u32> {
    let (program, arguments) = options.run.split_first().ok_or(io::ErrorKind::NotFound)?;
    let mut program = command(program, options);
    program
        .args(arguments)
        .current_dir("/root")
        .stdin(Stdio::inherit());
    // SAFETY: the closure only makes system calls.
    unsafe { program.pre_exec(|| system::lead_session(None)) };
    program
        .spawn()
        .map(|child| child.id())
        .map_err(|error| named(Path::new(program.get_program()), error))
}

/// The terminal behind `/dev/console`, which itself cannot be a controlling terminal.
fn active_console() -> String {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    active
        .split_ascii_whitespace()
        .next_back()
        .unwrap_or("console")
        .to_owned()
}

/// Ends every other process, writes back and unmounts disks, and ends the machine.
fn end(ending: Ending, signals: &Signals) -> io::Error {
    // Interactive shells ignore SIGTERM; they end when their terminal does.
    let told = [libc::SIGTERM, libc::SIGHUP].map(|signal| system::kill(-1, signal).is_ok());
    if told.contains(&true) {
        let mut left_ms = GRACE_MS;
        // No children is an error of `reap`, and the end of the wait.
        while left_ms > 0 {
            match system::reap() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    signals.next(Some(50));
                    left_ms -= 50;
                }
                Err(_) => break,
            }
        }
        let _ = system::kill(-1, libc::SIGKILL);
    }
    system::drain(io::stdout().as_fd());
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    for line in mounts
        .lines()
        .rev()
        .filter(|line| line.starts_with("/dev/"))
    {
        let target = line.split(' ').nth(1).unwrap_or_default();
        system::unmount(&system::c_string(target.as_bytes()));
    }
    system::end_machine(ending)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// For what a guest can live without.
fn complain(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("strata-init: {what}: {error}");
    }
}
