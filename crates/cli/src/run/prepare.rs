//! From arguments to a machine's configuration, and to what its console and CMD are tied to.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use strata_image::Image;
use strata_vmm::config::{
    BootFiles, BootSource, ConsoleKind, DiskAccess, DiskBoot, DiskConfig, NetworkConfig, OnReboot,
    Publish, UserNetwork, VsockConfig,
};
use strata_vmm::{ByteSize, MachineConfig, MachineName};
use tempfile::TempPath;

use super::terminal;
use crate::args::{NetArg, RunArgs};
use crate::exit::{ExitCode, Failure, code_of_io};
use crate::image;

/// What a run is.
pub struct Plan {
    /// The machine.
    pub config: MachineConfig,
    /// What our streams are tied to.
    pub mode: Mode,
    /// What another name is made from if this one is taken; none if the user chose the name.
    pub name_stem: Option<String>,
    /// Files made for this run, which go with this value; the machine needs them until it has started.
    pub temporary: Option<TempPath>,
}

/// What our streams are tied to.
pub enum Mode {
    /// The machine's console.
    Console {
        /// Whether the kernel's messages come over it.
        kernel_log: bool,
    },
    /// A command in the guest.
    Command(CommandPlan),
}

/// A command to run in the guest.
#[derive(Clone)]
pub struct CommandPlan {
    /// The program and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Where the kernel's console goes meanwhile.
    pub console_log: Option<PathBuf>,
    /// How long the guest may take until its agent answers.
    pub boot_timeout: Duration,
}

/// Works it out. Builds the image if it is missing.
pub fn plan(args: RunArgs) -> Result<Plan, Failure> {
    let stem = stem(&args);
    let name = args.name.clone();
    let name_stem = if name.is_some() {
        None
    } else {
        Some(stem.clone())
    };
    let name = name.unwrap_or_else(|| MachineName::generate(&stem));
    let mode = mode(&args);
    let mut memory = MachineConfig::MEMORY_DEFAULT;
    let mut disks = Vec::new();
    let mut temporary = None;
    let boot = match (&args.image, args.kernel.clone()) {
        (Some(image), _) => {
            let mut image = image::find_or_build(image)?;
            if let Some(mebibytes) = image.manifest.memory_mib {
                memory = ByteSize::mebibytes(mebibytes);
            }
            if let Some(path) = &args.ssh_key {
                temporary = Some(with_keys(&mut image, &image::ssh_keys(path)?)?);
            }
            disks.extend(image.disk.clone().map(root_disk).transpose()?);
            BootSource::Files(image_files(image, &args, &name, &mode))
        }
        (None, Some(kernel)) => BootSource::Files(BootFiles {
            kernel,
            unpacked: None,
            initrd: args.initrd,
            append: args.append.unwrap_or_default(),
        }),
        (None, None) => BootSource::Disk(DiskBoot {
            append: args.append.unwrap_or_default(),
        }),
    };
    disks.extend(args.disks);
    let mut config = MachineConfig::new(name, boot);
    config.engine = args.engine.into();
    config.cpus = args.cpus;
    config.cpu_model = args.cpu_model;
    config.memory = args.memory.unwrap_or(memory);
    config.disks = disks;
    config.network = network(args.net, args.publish, args.lockstep.is_some())?;
    config.on_reboot = match mode {
        Mode::Console { .. } => args.on_reboot.into(),
        // CMD does not survive it.
        Mode::Command(_) => OnReboot::Exit,
    };
    config.debug_exit = args.debug_exit;
    if matches!(mode, Mode::Console { kernel_log: false }) {
        config.console = ConsoleKind::Virtio;
    }
    if args.vsock.is_some() || matches!(mode, Mode::Command(_)) {
        config.vsock = Some(VsockConfig {
            socket: args.vsock,
            ..VsockConfig::default()
        });
    }
    Ok(Plan {
        config,
        mode,
        name_stem,
        temporary,
    })
}

/// The machine's network. In lock-step there is none unless it is asked for, and then it is refused.
fn network(
    asked: Option<NetArg>,
    publish: Vec<Publish>,
    lockstep: bool,
) -> Result<NetworkConfig, Failure> {
    let usage = |message: &str| Err(Failure::new(ExitCode::Usage, message));
    let host_loopback = match asked {
        Some(NetArg::Port(_)) if !publish.is_empty() => {
            return usage(
                "ports are published of a network of the machine's own: leave out '-p', or say '--net user'",
            );
        }
        Some(NetArg::User { .. } | NetArg::Port(_)) if lockstep => {
            return usage("a machine in lock-step has no network: its replay could not follow it");
        }
        Some(NetArg::Port(port)) => return Ok(NetworkConfig::Port(port)),
        Some(NetArg::User { host_loopback }) => host_loopback,
        None if !lockstep => false,
        Some(NetArg::None) | None if publish.is_empty() => return Ok(NetworkConfig::None),
        Some(NetArg::None) | None => {
            return usage(
                "a machine without a network has no ports to publish: leave out '-p', or say '--net user'",
            );
        }
    };
    let ports: HashSet<_> = publish
        .iter()
        .filter(|publish| publish.host.port() != 0)
        .map(|publish| (publish.host, publish.protocol))
        .collect();
    if ports.len() < publish.iter().filter(|p| p.host.port() != 0).count() {
        return usage("a port of the host is published twice: each leads to one port of the guest");
    }
    Ok(NetworkConfig::User(UserNetwork {
        publish,
        host_loopback,
        gateway: None,
    }))
}

fn mode(args: &RunArgs) -> Mode {
    if args.command.is_empty() {
        return Mode::Console {
            kernel_log: args.image.is_none(),
        };
    }
    let both = || std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    Mode::Command(CommandPlan {
        argv: args
            .command
            .iter()
            .cloned()
            .map(OsString::into_vec)
            .collect(),
        tty: args.terminal || (!args.no_terminal && both()),
        console_log: args.console_log.clone(),
        boot_timeout: Duration::from_secs(args.boot_timeout),
    })
}

/// Puts keys into an image's RAM disk, which becomes a file of this run's own.
fn with_keys(image: &mut Image, keys: &str) -> Result<TempPath, Failure> {
    if image.disk.is_none() {
        let name = &image.manifest.name;
        let message =
            format!("the image '{name}' has no sshd, so '--ssh-key' means nothing for it");
        return Err(Failure::new(ExitCode::Usage, message));
    }
    let failed = |error: std::io::Error| {
        let message = format!("cannot make a RAM disk with the key: {error}");
        Failure::new(code_of_io(&error), message)
    };
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    let contents = strata_image::keep_in_run(&image.initrd, "authorized_keys", keys.as_bytes());
    file.write_all(&contents.map_err(failed)?).map_err(failed)?;
    let path = file.into_temp_path();
    image.initrd = path.to_path_buf();
    Ok(path)
}

/// An image's root disk: what a run writes there is gone with it.
fn root_disk(path: PathBuf) -> Result<DiskConfig, Failure> {
    let raw: Result<DiskConfig, _> = "disk,format=raw".parse();
    let mut disk = raw.map_err(|error| Failure::from_error(ExitCode::Internal, &error))?;
    disk.path = path;
    disk.access = DiskAccess::Temporary;
    Ok(disk)
}

/// An image's files, and its command line with what this run wants of the guest's init.
fn image_files(image: Image, args: &RunArgs, name: &MachineName, mode: &Mode) -> BootFiles {
    let mut append = image.manifest.command_line;
    append.push_str(&format!(" strata.hostname={name}"));
    match mode {
        Mode::Console { .. } => append.push_str(&console_options()),
        // A panic before the guest's panic driver is there would otherwise be silence.
        Mode::Command(_) => append.push_str(" strata.agent=1 panic=-1"),
    }
    if let Some(more) = &args.append {
        append.push(' ');
        append.push_str(more);
    }
    BootFiles {
        kernel: image.kernel,
        unpacked: image.unpacked,
        initrd: Some(image.initrd),
        append,
    }
}

/// A shell on the virtio console, with the size and kind of our terminal.
fn console_options() -> String {
    let mut options = " strata.console=hvc0".to_owned();
    if let Some((columns, rows)) = terminal::size() {
        options.push_str(&format!(" strata.rows={rows} strata.cols={columns}"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    if std::io::stdout().is_terminal()
        && let Ok(term) = std::env::var("TERM")
        && !term.is_empty()
        && term.chars().all(plain)
    {
        options.push_str(&format!(" strata.term={term}"));
    }
    options
}

/// What a made-up name begins with.
fn stem(args: &RunArgs) -> String {
    let of_file = |path: &PathBuf| {
        Path::new(path)
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
    };
    args.image
        .clone()
        .or_else(|| args.kernel.as_ref().and_then(of_file))
        .or_else(|| args.disks.first().and_then(|disk| of_file(&disk.path)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{self, Command, Parsed};
    use strata_vmm::config::GUEST_CID;

    fn plan_of(line: &[&str]) -> Plan {
        let words = ["strata", "run"].iter().chain(line);
        match args::parse(words.map(OsString::from)) {
            Ok(Parsed::Command(Command::Run(args))) => plan(*args).unwrap(),
            other => panic!("{line:?}: {other:?}"),
        }
    }

    #[test]
    fn nothing_is_added_to_a_kernel_of_ones_own() {
        let append = "console=ttyS0  a=\"b c\" ";
        let line = [
            "--kernel",
            "/x/vmlinuz-6.1",
            "--initrd",
            "i",
            "--append",
            append,
        ];
        let Plan {
            config,
            mode,
            name_stem,
            ..
        } = plan_of(&line);
        let files = BootFiles {
            kernel: "/x/vmlinuz-6.1".into(),
            unpacked: None,
            initrd: Some("i".into()),
            append: append.to_owned(),
        };
        assert!(
            config.name.as_str().starts_with("vmlinuz6-"),
            "{}",
            config.name
        );
        assert_eq!(name_stem.as_deref(), Some("vmlinuz-6"));
        let mut expected = MachineConfig::new(config.name.clone(), BootSource::Files(files));
        expected.network = NetworkConfig::User(UserNetwork::default());
        assert_eq!(config, expected);
        assert!(matches!(mode, Mode::Console { kernel_log: true }));
    }

    #[test]
    fn a_disk_alone_has_its_kernel_inside() {
        let plan = plan_of(&["--disk", "/x/web.qcow2,format=qcow2", "--append", "quiet"]);
        let append = "quiet".to_owned();
        assert_eq!(plan.config.boot, BootSource::Disk(DiskBoot { append }));
        assert_eq!(plan.config.disks.len(), 1);
        assert_eq!(plan.name_stem.as_deref(), Some("web"));
    }

    #[test]
    fn a_command_gets_a_socket_and_no_second_life() {
        let line = ["--kernel", "k", "--name", "x", "-t", "--", "ls", "-l"];
        let Plan {
            config,
            mode,
            name_stem,
            ..
        } = plan_of(&line);
        assert_eq!((config.name.as_str(), name_stem), ("x", None));
        assert_eq!(config.vsock.map(|vsock| vsock.cid), Some(GUEST_CID));
        assert_eq!(config.on_reboot, OnReboot::Exit);
        let Mode::Command(command) = mode else {
            panic!("there is a command");
        };
        assert_eq!(command.argv, [b"ls".to_vec(), b"-l".to_vec()]);
        assert!(command.tty);
    }
}
