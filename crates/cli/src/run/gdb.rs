//! `--gdb`: a socket at which gdb connects, and how to tell it so.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::args::GdbPlace;
use crate::exit::{ExitCode, Failure};
use crate::process;

/// A socket that listens for gdb; a Unix socket goes with this value.
pub struct Place {
    listener: OwnedFd,
    address: String,
    path: Option<PathBuf>,
}

/// Listens where the user wants gdb to connect.
pub fn listen(place: &GdbPlace) -> Result<Place, Failure> {
    match place {
        GdbPlace::Unix(path) => Ok(Place {
            listener: process::listen_at(path)?.into(),
            address: path.display().to_string(),
            path: Some(path.clone()),
        }),
        GdbPlace::Tcp(port) => match TcpListener::bind((Ipv4Addr::LOCALHOST, *port)) {
            Ok(listener) => Ok(Place {
                listener: listener.into(),
                address: format!("localhost:{port}"),
                path: None,
            }),
            Err(error) => Err(Failure::new(
                ExitCode::CannotCreate,
                format!("cannot listen at port {port}: {error}"),
            )),
        },
    }
}

impl Place {
    /// The socket, for the machine's process.
    pub fn listener(&self) -> Result<OwnedFd, Failure> {
        self.listener.try_clone().map_err(|error| {
            Failure::new(
                ExitCode::System,
                format!("cannot make a descriptor: {error}"),
            )
        })
    }

    /// What to type.
    pub fn hint(&self) -> String {
        let address = &self.address;
        format!("strata: waiting for gdb: type 'target remote {address}' in it")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // If it is gone already, all the better.
            let _ = std::fs::remove_file(path);
        }
    }
}
