//! `strata network`: networks that several machines of this user share, and how a machine joins one.
//!
//! A network is a file with its name and subnet, in the user's data. Its switch is a process of its own, which starts with
//! the first machine and ends with the last.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use strata_network::{Joined, PortRequest, ProtocolError, Vlans};
use strata_vmm::config::{NetworkPort, PortVlans};
use strata_vmm::{Cable, MachineName, RunDir, mac_of, subnet};

use crate::args::NetworkCommand;
use crate::exit::{ExitCode, Failure, code_of_io};
use crate::output;
use crate::process::{SwitchLaunch, start_switch};
use crate::routes::routes;
use crate::stats::run_dir_failure;

/// How often a machine that meets a switch on its way out tries again.
const ATTEMPTS_MAX: u32 = 5;
/// Longest IP packet that a card is made for here; the network says what it takes.
const MTU_MAX: u16 = u16::MAX;

/// A network, as it is kept.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Network {
    /// Of the format.
    version: u32,
    name: MachineName,
    /// The gateway's address and the network's size.
    subnet: Ipv4Net,
}

/// The format's version.
const VERSION: u32 = 1;

/// Does what `strata network` says.
pub fn run(command: &NetworkCommand) -> Result<(), Failure> {
    match command {
        NetworkCommand::Create { name, subnet } => create(name, *subnet),
        NetworkCommand::Ls { json } => list(*json),
        NetworkCommand::Rm { name } => remove(name),
    }
}

/// Where networks are kept.
fn directory() -> Result<PathBuf, Failure> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    match data {
        Some(data) => Ok(data.join("strata/networks")),
        None => Err(Failure::new(
            ExitCode::CannotCreate,
            "there is no place to keep networks: set HOME or XDG_DATA_HOME",
        )),
    }
}

fn io_failure(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        code_of_io(error),
        format!("cannot {what} {}: {error}", path.display()),
    )
}

fn file_of(name: &MachineName) -> Result<PathBuf, Failure> {
    Ok(directory()?.join(format!("{name}.json")))
}

fn read(path: &Path) -> Result<Network, Failure> {
    let text = fs::read(path).map_err(|error| io_failure("read", path, &error))?;
    let network: Result<Network, _> = serde_json::from_slice(&text);
    network
        .ok()
        .filter(|network| network.version == VERSION)
        .ok_or_else(|| {
            let message = format!("{} is no network of this version of Strata", path.display());
            Failure::new(ExitCode::Data, message)
        })
}

/// Every network, by name. What cannot be read is left out: it is told when it is used.
fn all() -> Result<Vec<Network>, Failure> {
    let entries = fs::read_dir(directory()?).into_iter().flatten().flatten();
    let mut networks: Vec<Network> = entries
        .filter_map(|entry| read(&entry.path()).ok())
        .collect();
    networks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(networks)
}

fn create(name: &MachineName, wanted: Option<Ipv4Net>) -> Result<(), Failure> {
    if ["user", "none"].contains(&name.as_str()) {
        let message =
            format!("'{name}' has a meaning of its own for --net: give the network another name");
        return Err(Failure::new(ExitCode::Usage, message));
    }
    let taken: Vec<Ipv4Net> = all()?
        .into_iter()
        .map(|network| network.subnet)
        .chain(routes())
        .collect();
    let overlaps = |subnet: &Ipv4Net| {
        let meets = |other: &&Ipv4Net| {
            other.contains(&subnet.network()) || subnet.contains(&other.network())
        };
        taken.iter().find(meets).copied()
    };
    let subnet = match wanted {
        Some(subnet) if !(8..=29).contains(&subnet.prefix_len()) => {
            let message = format!("{subnet} is no size for a network: give /8 to /29");
            return Err(Failure::new(ExitCode::Usage, message));
        }
        Some(subnet)
            if subnet.addr() == subnet.network() || subnet.addr() == subnet.broadcast() =>
        {
            let message = format!(
                "{subnet} has no gateway: give the gateway's address and the size, like 10.7.0.1/24"
            );
            return Err(Failure::new(ExitCode::Usage, message));
        }
        Some(subnet) => match overlaps(&subnet) {
            Some(other) => {
                let message =
                    format!("{subnet} overlaps {other}, which is in use: give another --subnet");
                return Err(Failure::new(ExitCode::Usage, message));
            }
            None => subnet,
        },
        None => subnet::choose(name.as_str(), &taken).ok_or_else(|| {
            Failure::new(
                ExitCode::Unavailable,
                "every private subnet is in use: give one with --subnet",
            )
        })?,
    };
    let directory = directory()?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .map_err(|error| io_failure("make", &directory, &error))?;
    let path = file_of(name)?;
    let network = Network {
        version: VERSION,
        name: name.clone(),
        subnet,
    };
    let text = serde_json::to_vec(&network)
        .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
    let mut file = File::create_new(&path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let message = format!(
                "there is a network '{name}' already: remove it with 'strata network rm {name}'"
            );
            Failure::new(ExitCode::CannotCreate, message)
        }
        _ => io_failure("make", &path, &error),
    })?;
    file.write_all(&text)
        .map_err(|error| io_failure("write", &path, &error))
}

fn list(json: bool) -> Result<(), Failure> {
    let networks = all()?;
    if json {
        let text = serde_json::to_string(&networks)
            .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        return output::print(&format!("{text}\n"));
    }
    let lines: Vec<String> = networks
        .iter()
        .map(|one| format!("{:24} {}\n", one.name, one.subnet))
        .collect();
    output::print(&lines.concat())
}

fn remove(name: &MachineName) -> Result<(), Failure> {
    let path = file_of(name)?;
    fs::remove_file(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => unknown(name.as_str()),
        _ => io_failure("remove", &path, &error),
    })
}

fn unknown(name: &str) -> Failure {
    let message =
        format!("there is no network '{name}': make it with 'strata network create {name}'");
    Failure::new(ExitCode::NoInput, message)
}

/// Joins a machine to its network, whose switch is started if it does not run. Completes what the configuration says of
/// the port. The descriptor keeps the port.
pub fn join(port: &mut NetworkPort, machine: &MachineName) -> Result<(Cable, OwnedFd), Failure> {
    let name = port.network.clone();
    let file = directory()?.join(format!("{name}.json"));
    if !file.exists() {
        return Err(unknown(&name));
    }
    let network = read(&file)?;
    let sockets = RunDir::networks(&RunDir::root()).map_err(|error| run_dir_failure(&error))?;
    let path = sockets.join(&name);
    // No network has such a name.
    let lock_path = sockets.join(format!(".{name}.lock"));
    let lock = File::create(&lock_path).map_err(|error| io_failure("make", &lock_path, &error))?;
    // One at a time starts a switch.
    lock.lock()
        .map_err(|error| io_failure("lock", &lock_path, &error))?;
    let mac = port.mac.unwrap_or_else(|| mac_of(machine.as_str()));
    let request = PortRequest {
        name: machine.to_string(),
        mac,
        vlans: match &port.vlans {
            PortVlans::Access(vlan) => Vlans::Access(*vlan),
            PortVlans::Trunk(vlans) => Vlans::Trunk(vlans.clone()),
        },
        mtu: MTU_MAX,
        // The machine's process does what its guest's driver does not take.
        offloads: [true; 4],
    };
    for _ in 0..ATTEMPTS_MAX {
        match strata_network::join(&path, request.clone()) {
            Ok(joined) => return Ok(joined_port(port, joined)),
            // Nobody listens, or the switch is about to end.
            Err(ProtocolError::Connection(_) | ProtocolError::Message(_)) => {}
            Err(ProtocolError::Refused(why)) => {
                return Err(Failure::new(
                    ExitCode::Busy,
                    format!("network '{name}' refuses the machine: {why}"),
                ));
            }
            Err(error) => {
                return Err(Failure::new(
                    ExitCode::Unavailable,
                    format!("network '{name}': {error}"),
                ));
            }
        }
        let listener = listen(&path).map_err(|error| io_failure("listen at", &path, &error))?;
        let launch = SwitchLaunch {
            namespaces: Ok(()),
            name: name.clone(),
            subnet: network.subnet,
        };
        start_switch(&listener, launch)?;
    }
    let message = format!("the switch of network '{name}' does not answer");
    Err(Failure::new(ExitCode::Unavailable, message))
}

fn joined_port(port: &mut NetworkPort, joined: Joined) -> (Cable, OwnedFd) {
    port.mtu = joined.mtu;
    port.ring = joined.size;
    let cable = Cable {
        ring: joined.ring,
        bell: joined.bell,
    };
    (cable, joined.connection)
}

/// Listens in the place of a switch that is gone. Whoever connects to the old one's socket meets nobody.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 64)?;
    Ok(socket.into())
}
