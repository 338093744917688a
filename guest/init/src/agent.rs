//! The agent: listens for the host and gives each connection a process of its own, so that no session can harm another.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process;

use crate::session;
use crate::system::{self, Ending, Signals};

/// Who process 1 is, and with that how it is asked to end the machine.
#[derive(Debug, Clone, Copy)]
enum Master {
    /// Our init, which takes busybox's signals.
    Init,
    /// systemd, which has signals for its targets (systemd(1), "Signals").
    Systemd,
}

impl Master {
    fn signal(self, ending: Ending) -> libc::c_int {
        match (self, ending) {
            (Master::Init, Ending::PowerOff) => libc::SIGUSR2,
            (Master::Init, Ending::Reboot) => libc::SIGTERM,
            (Master::Systemd, Ending::PowerOff) => libc::SIGRTMIN() + 4,
            (Master::Systemd, Ending::Reboot) => libc::SIGRTMIN() + 5,
        }
    }
}

/// Is the agent, as a service of a whole system. Returns only on failure.
pub fn run() -> io::Error {
    match system::listen_vsock(strata_agent::PORT) {
        Ok(listener) => listen(&listener, Master::Systemd),
        Err(error) => error,
    }
}

/// Starts the agent as a child and returns its process id. The error is that of listening: no vsock device, say.
pub fn start(signals: &Signals) -> io::Result<u32> {
    let listener = system::listen_vsock(strata_agent::PORT)?;
    match system::fork()? {
        Some(pid) => Ok(pid),
        None => {
            signals.unblock();
            let error = listen(&listener, Master::Init);
            eprintln!("strata-agent: {error}");
            process::exit(1);
        }
    }
}

fn listen(listener: &OwnedFd, master: Master) -> io::Error {
    system::set_name(c"strata-agent");
    system::reap_automatically(true);
    loop {
        let connection = match system::accept(listener.as_fd()) {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return error,
        };
        match system::fork() {
            Ok(Some(_)) => {}
            Ok(None) => process::exit(converse(connection, master)),
            // The host sees its connection closed and may try again when there is memory.
            Err(error) => eprintln!("strata-agent: {error}"),
        }
    }
}

/// One connection, in its own process.
fn converse(connection: OwnedFd, master: Master) -> i32 {
    system::reap_automatically(false);
    match session::serve(connection) {
        Ok(None) => 0,
        Ok(Some(ending)) => {
            // Process 1 takes it from here.
            i32::from(system::kill(1, master.signal(ending)).is_err())
        }
        Err(_) => 1,
    }
}
