//! The devices of the `modern` platform, each put into the chassis by a small function of its own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use strata_devices::virtio::{Blk, Console, ConsoleSize, MTU_MAX, Net, NetOptions, Rng, Vsock};
use strata_devices::{AcpiPm, Cmos, DebugExit, I8042, PvPanic, Serial};
use strata_disk::{Access, DiskBackend, Overlay};

use crate::cable;
use crate::chassis::Chassis;
use crate::config::{
    ConsoleKind, DiskAccess, DiskConfig, DiskFormat, MachineConfig, NetworkConfig,
};
use crate::console::{ConsoleInput, ConsoleOutput};
use crate::error::BuildError;
use crate::machine::HostEnds;
use crate::network::{self, NetworkHandle};
use crate::{ConsoleRing, RunDir};

/// PCI slots. A guest finds its devices by them: they stay what they are.
mod slot {
    /// Entropy.
    pub(super) const RNG: u8 = 1;
    /// The paravirtual console.
    pub(super) const CONSOLE: u8 = 2;
    /// The socket between host and guest.
    pub(super) const VSOCK: u8 = 3;
    /// The network card.
    pub(super) const NET: u8 = 4;
    /// The first disk; the others follow.
    pub(super) const DISKS: u8 = 8;
    /// Slots on a bus.
    pub(super) const END: u8 = 32;
}

/// A terminal's size until its owner says another.
const CONSOLE_SIZE: ConsoleSize = ConsoleSize {
    columns: 80,
    rows: 24,
};

/// The ways to what was put in.
pub(crate) struct Added {
    /// The way in to the console.
    pub(crate) console: ConsoleInput,
    /// The network's thread, if there is one.
    pub(crate) network: Option<NetworkHandle>,
}

/// Puts in everything that the configuration names.
pub(crate) fn add_devices(
    chassis: &mut Chassis,
    config: &MachineConfig,
    mut ends: HostEnds,
    disks: Vec<Arc<dyn DiskBackend>>,
    ring: &ConsoleRing,
) -> Result<Added, BuildError> {
    let mut host = ends.console.take();
    let mut output = |kind| ConsoleOutput {
        ring: ring.clone(),
        host: if kind == config.console {
            host.take()
        } else {
            None
        },
    };
    let serial = add_serial(chassis, output(ConsoleKind::Serial))?;
    add_clock(chassis)?;
    add_power(chassis)?;
    add_panic(chassis)?;
    if config.debug_exit {
        add_debug_exit(chassis)?;
    }
    chassis.add_virtio(slot::RNG, "rng0", Rng::host())?;
    let console = match config.console {
        ConsoleKind::Serial => ConsoleInput::serial(&serial),
        ConsoleKind::Virtio => add_console(chassis, output(ConsoleKind::Virtio))?,
    };
    // A replay can only follow devices that act at the instruction that makes them act.
    let at_once = ends.engine_options.lockstep != 0;
    for (index, disk) in disks.into_iter().enumerate() {
        let id = format!("disk{index}");
        let device = if at_once {
            Blk::new(disk, &id)
        } else {
            Blk::with_worker(disk, &id, config.cpus)
        };
        add_disk(chassis, index, &id, device)?;
    }
    let network = add_network(chassis, config, &mut ends)?;
    add_vsock(chassis, config, ends)?;
    Ok(Added { console, network })
}

/// A card and its network. In lock-step there is none: a replay cannot follow what peers do.
fn add_network(
    chassis: &mut Chassis,
    config: &MachineConfig,
    ends: &mut HostEnds,
) -> Result<Option<NetworkHandle>, BuildError> {
    if config.network == NetworkConfig::None {
        return Ok(None);
    }
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| BuildError::Device {
        device: "net0".to_owned(),
        source,
    };
    if ends.engine_options.lockstep != 0 {
        return Err(failed("a machine in lock-step has no network".into()));
    }
    let (mac, mtu) = match &config.network {
        NetworkConfig::Port(port) => (port.mac, port.mtu),
        _ => (None, MTU_MAX),
    };
    let mac = mac.unwrap_or_else(|| network::mac_of(config.name.as_str()));
    let pairs = u16::try_from(config.cpus).unwrap_or(u16::MAX);
    let options = NetOptions { mac, mtu, pairs };
    let (card, host) = Net::new(options).map_err(|error| failed(error.into()))?;
    chassis.add_virtio(slot::NET, "net0", card)?;
    let name = config.name.as_str();
    let handle = match &config.network {
        NetworkConfig::None => return Ok(None),
        NetworkConfig::User(user) => {
            let Some(sockets) = ends.sockets.take() else {
                return Err(failed("nobody makes sockets for its network".into()));
            };
            network::start(host, mac, name, user, sockets)
        }
        NetworkConfig::Port(port) => {
            let Some(cable) = ends.cable.take() else {
                return Err(failed("nobody joined its network".into()));
            };
            cable::start(host, port.ring, cable)
        }
    };
    handle.map(Some).map_err(|error| failed(error.into()))
}

fn add_serial(
    chassis: &mut Chassis,
    output: ConsoleOutput,
) -> Result<Arc<Mutex<Serial>>, BuildError> {
    let line = chassis.line(strata_boot::ports::COM1_GSI as u8);
    let serial = Arc::new(Mutex::new(Serial::new("serial0", line, Box::new(output))));
    let base = u64::from(strata_boot::ports::COM1);
    chassis.add_ports(base, Serial::LEN, &serial)?;
    Ok(serial)
}

fn add_clock(chassis: &mut Chassis) -> Result<(), BuildError> {
    let clock = Arc::clone(&chassis.clock);
    let now = Arc::new(move || Duration::from_nanos(clock.wall_ns()));
    let cmos = Arc::new(Mutex::new(Cmos::new(now)));
    chassis.add_ports(Cmos::BASE, Cmos::LEN, &cmos)
}

fn add_power(chassis: &mut Chassis) -> Result<(), BuildError> {
    let (clock, power) = (Arc::clone(&chassis.clock), Arc::clone(&chassis.power));
    let sci = chassis.line(AcpiPm::SCI_GSI);
    let pm = AcpiPm::new(Arc::new(move || clock.now_ns()), sci, power.clone());
    chassis.add_ports(AcpiPm::BASE, AcpiPm::LEN, &Arc::new(Mutex::new(pm)))?;
    let keyboard = Arc::new(Mutex::new(I8042::new(power)));
    chassis.add_ports(I8042::BASE, I8042::LEN, &keyboard)
}

fn add_panic(chassis: &mut Chassis) -> Result<(), BuildError> {
    let panic = Arc::new(Mutex::new(PvPanic::new(chassis.power.clone())));
    chassis.add_ports(PvPanic::BASE, PvPanic::LEN, &panic)
}

fn add_debug_exit(chassis: &mut Chassis) -> Result<(), BuildError> {
    let exit = Arc::new(Mutex::new(DebugExit::new(chassis.power.clone())));
    chassis.add_ports(DebugExit::BASE, DebugExit::LEN, &exit)
}

fn add_console(chassis: &mut Chassis, output: ConsoleOutput) -> Result<ConsoleInput, BuildError> {
    let (console, input) = Console::new(output, CONSOLE_SIZE);
    chassis.add_virtio(slot::CONSOLE, "console0", console)?;
    Ok(ConsoleInput::virtio(input))
}

fn add_disk(chassis: &mut Chassis, index: usize, id: &str, device: Blk) -> Result<(), BuildError> {
    let slot = u8::try_from(index)
        .ok()
        .and_then(|index| slot::DISKS.checked_add(index))
        .filter(|slot| *slot < slot::END);
    let slot = slot.ok_or_else(|| BuildError::TooManyDisks {
        max: slot::END - slot::DISKS,
    })?;
    chassis.add_virtio(slot, id, device)
}

/// Opens the configuration's disks, in their order.
pub(crate) fn open_disks(
    config: &MachineConfig,
    temporary: Option<PathBuf>,
) -> Result<Vec<Arc<dyn DiskBackend>>, BuildError> {
    let temporary = temporary.unwrap_or_else(std::env::temp_dir);
    let open = |disk| open_disk(disk, &temporary);
    config.disks.iter().map(open).collect()
}

fn open_disk(disk: &DiskConfig, temporary: &Path) -> Result<Arc<dyn DiskBackend>, BuildError> {
    let access = match disk.access {
        DiskAccess::ReadWrite => Access::ReadWrite,
        DiskAccess::ReadOnly | DiskAccess::Temporary => Access::ReadOnly,
    };
    let format = disk.format.map(|format| match format {
        DiskFormat::Raw => strata_disk::DiskFormat::Raw,
        DiskFormat::Qcow2 => strata_disk::DiskFormat::Qcow2,
    });
    let backend = strata_disk::open(&strata_disk::Source {
        path: &disk.path,
        format,
        access,
        backing: &disk.backing,
        data: disk.data.as_deref(),
    })?;
    Ok(match disk.access {
        DiskAccess::ReadWrite | DiskAccess::ReadOnly => backend,
        DiskAccess::Temporary => Arc::new(Overlay::new(backend, temporary)?),
    })
}

fn add_vsock(
    chassis: &mut Chassis,
    config: &MachineConfig,
    ends: HostEnds,
) -> Result<(), BuildError> {
    let Some(vsock) = &config.vsock else {
        return Ok(());
    };
    let cid = u64::from(vsock.cid);
    let made = match (ends.vsock, vsock_socket(config, ends.run_dir.as_deref())) {
        (Some(host), _) => Vsock::on(cid, host),
        (None, Some(socket)) => Vsock::new(cid, &socket),
        (None, None) => return Ok(()),
    };
    let device = made.map_err(|source| BuildError::Device {
        device: "vsock0".to_owned(),
        source: Box::new(source),
    })?;
    chassis.add_virtio(slot::VSOCK, "vsock0", device)
}

/// Where the Unix socket of a configuration's vsock is, for a machine with this run directory.
pub fn vsock_socket(config: &MachineConfig, run_dir: Option<&Path>) -> Option<PathBuf> {
    let vsock = config.vsock.as_ref()?;
    let in_run_dir = || run_dir.map(RunDir::vsock_socket);
    vsock.socket.clone().or_else(in_run_dir)
}
