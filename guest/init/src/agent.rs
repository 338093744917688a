//! The agent: listens for the host and gives each connection a process of its own, so that no session can harm another.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process;

use crate::session;
use crate::system::{self, Ending, Signals};

/// Starts the agent as a child and returns its process id. The error is that of listening: no vsock device, say.
pub fn start(signals: &Signals) -> io::Result<u32> {
    let listener = system::listen_vsock(strata_agent::PORT)?;
    match system::fork()? {
        Some(pid) => Ok(pid),
        None => {
            signals.unblock();
            let error = listen(&listener);
            eprintln!("strata-agent: {error}");
            process::exit(1);
        }
    }
}

fn listen(listener: &OwnedFd) -> io::Error {
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
            Ok(None) => process::exit(converse(connection)),
            // The host sees its connection closed and may try again when there is memory.
            Err(error) => eprintln!("strata-agent: {error}"),
        }
    }
}

/// One connection, in its own process.
fn converse(connection: OwnedFd) -> i32 {
    system::reap_automatically(false);
    match session::serve(connection) {
        Ok(None) => 0,
        Ok(Some(ending)) => {
            let signal = match ending {
                Ending::PowerOff => libc::SIGUSR2,
                Ending::Reboot => libc::SIGTERM,
            };
            // Process 1 takes it from here.
            i32::from(system::kill(1, signal).is_err())
        }
        Err(_) => 1,
    }
}
