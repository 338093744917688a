//! The command line: what can be typed, and the refusal of what cannot.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use strata_vmm::config::{DiskConfig, EngineChoice, NetworkPort, OnReboot, PortVlans, Publish};
use strata_vmm::{ByteSize, MachineName};

use crate::exit::{ExitCode, Failure, HELP};

/// Runs machines on any x86-64 Linux host, with or without hardware assist.
#[derive(Debug, Parser)]
#[command(name = "strata", version, after_help = HELP, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine: its console, or one command in it
    #[command(after_help = HELP)]
    Run(Box<RunArgs>),
    /// List, build and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Networks that several machines share
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Say what this host offers, and which engine is chosen and why
    Info(InfoArgs),
    /// Say what running machines have done
    Stats(StatsArgs),
    /// Say which ports of this host lead to a machine
    Ports(PortsArgs),
    /// Print a completion script
    Completions {
        /// For this shell
        shell: clap_complete::Shell,
    },
}

/// The default is an image's own or the machine configuration's.
const MEMORY_HELP: &str = "Size of memory, with a unit: 512M, 1G; the image's default, or 512M";

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(override_usage = "strata run [OPTIONS] IMAGE [-- CMD...]\n       \
    strata run [OPTIONS] --kernel FILE [--initrd FILE] [--append TEXT] [-- CMD...]\n       \
    strata run [OPTIONS] --disk FILE [--append TEXT] [-- CMD...]")]
pub struct RunArgs {
    /// The image to run; it is built first if it is missing
    #[arg(value_name = "IMAGE", conflicts_with = "kernel")]
    pub image: Option<String>,
    /// Only there to be refused with good advice.
    #[arg(hide = true)]
    pub stray: Vec<String>,
    /// Run this in the guest; without it, the console is yours
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
    /// Boot this kernel: bzImage, vmlinux, PVH or multiboot; its serial console is our output and input
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Give the kernel this initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// With --kernel, the whole kernel command line; else added to that of the image or inside the disk
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Add a disk; `,ro` write-protects it, `,backing=FILE` allows an image to be built on that file, `,data=FILE` to have its data there. May be given several times
    #[arg(long = "disk", value_name = "FILE[,ro][,format=raw|qcow2]")]
    pub disks: Vec<DiskConfig>,
    /// Number of CPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help = MEMORY_HELP)]
    pub memory: Option<ByteSize>,
    /// How guest code is run
    #[arg(long, value_name = "ENGINE", value_enum, default_value = "auto")]
    pub engine: EngineArg,
    /// What the guest's CPUs can do: baseline or host
    #[arg(long, value_name = "MODEL", default_value = "baseline")]
    pub cpu_model: String,
    /// The machine's name; made up if not given
    #[arg(long, value_name = "NAME")]
    pub name: Option<MachineName>,
    /// The machine's network: one of its own with a way out (`user`, the default), in which the gateway's address leads to
    /// services of this host, with `,host-loopback` also to those on 127.0.0.1; none; or one that it shares with others
    /// (see `strata network`)
    #[arg(
        long,
        value_name = "user[,host-loopback]|none|NETWORK[,mac=MAC][,vlan=N|,trunk[=N+N...]]"
    )]
    pub net: Option<NetArg>,
    /// Lead a port of this host to one of the guest; the address is 127.0.0.1 if not given, so that only this host
    /// reaches it. May be given several times
    #[arg(
        short = 'p',
        long = "publish",
        value_name = "[ADDRESS:]HOST:GUEST[/udp]",
        allow_hyphen_values = true
    )]
    pub publish: Vec<Publish>,
    /// What happens when the guest reboots
    #[arg(long, value_enum, default_value = "restart")]
    pub on_reboot: OnRebootArg,
    /// Give CMD a terminal even if our input or output is none
    #[arg(short = 't', overrides_with = "no_terminal")]
    pub terminal: bool,
    /// Give CMD no terminal even if our input and output are one
    #[arg(short = 'T', overrides_with = "terminal")]
    pub no_terminal: bool,
    /// Put the socket between host and guest here; a guest connecting to port P reaches PATH_P
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Run only if this host grants every layer of the machine's jail; `strata info` names them
    #[arg(long, conflicts_with = "no_jail")]
    pub require_jail: bool,
    /// Run the machine's process without its jail, to look into it with other tools.
    #[arg(long, hide = true)]
    pub no_jail: bool,
    /// Try to get out of the jail in place of running; print what came of it, a line of JSON for each attempt.
    #[arg(long, hide = true, value_enum, value_name = "HOW")]
    pub jail_probe: Option<crate::process::Probe>,
    /// Let gdb look into the machine; it waits for gdb at this Unix socket, or at this TCP port of this host
    #[arg(long, value_name = "SOCKET|tcp:PORT")]
    pub gdb: Option<GdbPlace>,
    /// Let whoever has the key to this public key in as root, in this run
    #[arg(long, value_name = "FILE", requires = "image")]
    pub ssh_key: Option<PathBuf>,
    /// Print how long each phase took, as a line of JSON on standard error
    #[arg(long, hide = true)]
    pub timings: bool,
    /// Print the engine's counters at the end, as a line of JSON on standard error.
    #[arg(long, hide = true)]
    pub print_stats: bool,
    /// Add the test device isa-debug-exit; the status is twice what the guest writes, plus one.
    #[arg(long, hide = true)]
    pub debug_exit: bool,
    /// Translate one instruction per block.
    #[arg(long, hide = true)]
    pub reference: bool,
    /// Count retired instructions.
    #[arg(long, hide = true)]
    pub count: bool,
    /// Run in lock-step with the reference configuration, for that many steps or all; end at the first difference.
    #[arg(long, hide = true, value_name = "STEPS", num_args = 0..=1, require_equals = true, default_missing_value = "18446744073709551615")]
    pub lockstep: Option<u64>,
    /// Prove of each translated block that it stays inside its guest; end at the first that does not.
    #[arg(long, hide = true)]
    pub verify_blocks: bool,
    /// Append what the kernel's console prints to this file while CMD runs.
    #[arg(long, hide = true, value_name = "FILE")]
    pub console_log: Option<PathBuf>,
    /// How long the guest may take until its agent answers, in seconds.
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 300)]
    pub boot_timeout: u64,
}

/// Commands on networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network; machines join it with `strata run --net NAME`
    Create {
        /// Its name
        name: MachineName,
        /// Its gateway's address and size, like 10.7.0.1/24; one that collides with nothing if not given
        #[arg(long, value_name = "ADDRESS/BITS")]
        subnet: Option<ipnet::Ipv4Net>,
    },
    /// List networks
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a network; machines that are on it stay so
    Rm {
        /// Its name
        name: MachineName,
    },
}

/// Commands on images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List images that are here, and those that can be built
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Build an image, in place of an older one
    Build(BuildArgs),
    /// Remove an image
    Rm {
        /// Its name
        name: String,
    },
}

/// Arguments of `image build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Its name: a recipe's, or with --from one of your own, which can then be built anew by its name alone
    pub name: String,
    /// Make an image of your own from this recipe
    #[arg(long, value_name = "RECIPE")]
    pub from: Option<String>,
    /// Add packages and what they need; may be given several times
    #[arg(
        long = "package",
        value_name = "NAME,...",
        value_delimiter = ',',
        requires = "from"
    )]
    pub packages: Vec<String>,
    /// Size of the root disk, with a unit: 8G
    #[arg(
        long,
        value_name = "SIZE",
        requires = "from",
        allow_hyphen_values = true
    )]
    pub size: Option<ByteSize>,
    /// Fetch packages from this mirror of Debian
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Let whoever has the key to this public key in as root
    #[arg(long, value_name = "FILE", requires = "from")]
    pub ssh_key: Option<PathBuf>,
}

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The machine; all that run if not given
    pub name: Option<MachineName>,
    /// Go on until the machine ends, and say how much it does per second, every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", requires = "name", value_parser = seconds)]
    pub watch: Option<f64>,
    /// As JSON; with --watch an object in each line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `ports`.
#[derive(Debug, Args)]
pub struct PortsArgs {
    /// The machine
    pub name: MachineName,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// A time that a person would wait.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds, 0.1 to 86400, behind the machine's name".to_owned()),
    }
}

/// `--gdb`: where gdb connects.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GdbPlace {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this host.
    Tcp(u16),
}

impl std::str::FromStr for GdbPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("tcp:") {
            None if text.is_empty() => Err("give the path of a socket, or tcp:PORT".to_owned()),
            None => Ok(Self::Unix(text.into())),
            Some(port) => match port.parse() {
                Ok(port @ 1..) => Ok(Self::Tcp(port)),
                _ => Err(format!("'{port}' is not a port: give tcp:1234")),
            },
        }
    }
}

/// `--engine`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum EngineArg {
    /// The best one here
    Auto,
    /// Binary translation
    Translate,
    /// Hardware assist
    Kvm,
}

impl From<EngineArg> for EngineChoice {
    fn from(engine: EngineArg) -> Self {
        match engine {
            EngineArg::Auto => Self::Auto,
            EngineArg::Translate => Self::Translate,
            EngineArg::Kvm => Self::Kvm,
        }
    }
}

/// `--net`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NetArg {
    /// A network of the machine's own.
    User {
        /// Whether the gateway's address leads to the host's loopback.
        host_loopback: bool,
    },
    /// No network card
    None,
    /// A port of a network that machines share.
    Port(NetworkPort),
}

impl std::str::FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "user" => Ok(Self::User {
                host_loopback: false,
            }),
            "user,host-loopback" => Ok(Self::User {
                host_loopback: true,
            }),
            other => match other.split_once(',') {
                Some(("user", option)) => Err(format!(
                    "network option '{option}' is not known (known: host-loopback)"
                )),
                Some(("none", option)) => Err(format!("no network has no option '{option}'")),
                _ => shared(other).map(Self::Port),
            },
        }
    }
}

/// A port of a shared network: its name and options.
fn shared(text: &str) -> Result<NetworkPort, String> {
    let mut words = text.split(',');
    let network: MachineName = words
        .next()
        .unwrap_or_default()
        .parse()
        .map_err(|error| format!("no network has such a name: {error}"))?;
    let mut port = NetworkPort {
        network: network.to_string(),
        mac: None,
        vlans: PortVlans::default(),
        mtu: 0,
        ring: 0,
    };
    let vlan = |text: &str| match text.parse() {
        Ok(vlan @ 1..=4094) => Ok(vlan),
        _ => Err(format!("'{text}' is no VLAN: give a number from 1 to 4094")),
    };
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("mac", text) => port.mac = Some(mac(text)?),
            ("vlan", text) => port.vlans = PortVlans::Access(vlan(text)?),
            ("trunk", "") => port.vlans = PortVlans::Trunk(Vec::new()),
            ("trunk", list) => {
                let list: Result<Vec<u16>, String> = list.split('+').map(vlan).collect();
                port.vlans = PortVlans::Trunk(list?);
            }
            _ => {
                return Err(format!(
                    "network option '{word}' is not known (known: mac=MAC, vlan=N, trunk, trunk=N+N)"
                ));
            }
        }
    }
    Ok(port)
}

/// An Ethernet address that one card can have.
fn mac(text: &str) -> Result<[u8; 6], String> {
    let parts: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| part.len() == 2)
        })
        .collect();
    let mac = parts.and_then(|parts| <[u8; 6]>::try_from(parts).ok());
    match mac {
        Some(mac @ [first, ..]) if first & 1 == 0 && mac != [0; 6] => Ok(mac),
        _ => Err(format!(
            "'{text}' is no Ethernet address of a card: write it like 02:00:00:00:00:01"
        )),
    }
}

/// `--on-reboot`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OnRebootArg {
    /// The machine begins again
    Restart,
    /// The machine ends
    Exit,
}

impl From<OnRebootArg> for OnReboot {
    fn from(on_reboot: OnRebootArg) -> Self {
        match on_reboot {
            OnRebootArg::Restart => Self::Restart,
            OnRebootArg::Exit => Self::Exit,
        }
    }
}

/// What a command line asks for: a command, or text to print.
#[derive(Debug)]
pub enum Parsed {
    /// Do this.
    Command(Command),
    /// Help or the version.
    Text(String),
}

/// Reads a command line, the program's name first.
///
/// # Errors
/// If it is wrong: one sentence.
pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Parsed, Failure> {
    let cli = match Cli::try_parse_from(line) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => return Ok(Parsed::Text(error.to_string())),
        Err(error) => return Err(refusal(&error)),
    };
    if let Command::Run(run) = &cli.command {
        check_run(run)?;
    }
    Ok(Parsed::Command(cli.command))
}

fn check_run(run: &RunArgs) -> Result<(), Failure> {
    let usage = |message: String| Err(Failure::new(ExitCode::Usage, message));
    let Some(image) = &run.image else {
        if run.kernel.is_none() && run.disks.is_empty() {
            return usage(
                "say what to run: an image, like 'strata run tiny', or --kernel FILE, or --disk FILE with a kernel inside"
                    .to_owned(),
            );
        }
        return Ok(());
    };
    if !run.stray.is_empty() {
        let words = run.stray.join(" ");
        return usage(format!(
            "'{words}' is no option of run: did you mean 'strata run {image} -- {words}'?"
        ));
    }
    Ok(())
}

/// clap's message as one sentence: its first paragraph without decoration.
fn refusal(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let mut paragraphs = text.split("\n\n");
    let first = paragraphs.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let sentence = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let tip = paragraphs.find_map(|text| text.trim().strip_prefix("tip: "));
    let message = match tip.and_then(|tip| tip.lines().next()) {
        Some(tip) => format!("{sentence}; {tip}"),
        None if text.starts_with("error: ") => format!("{sentence}; see --help"),
        None => "say what to do: see 'strata --help'".to_owned(),
    };
    Failure::new(ExitCode::Usage, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use strata_vmm::config::DiskAccess;

    fn parsed(line: &str) -> Result<Parsed, Failure> {
        let words = std::iter::once("strata").chain(line.split_whitespace());
        parse(words.map(OsString::from))
    }

    fn run(line: &str) -> RunArgs {
        match parsed(line) {
            Ok(Parsed::Command(Command::Run(run))) => *run,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refused(line: &str, message: &str) {
        let failure = parsed(line).unwrap_err();
        assert_eq!(failure.message, message, "{line}");
        assert_eq!(failure.code, ExitCode::Usage, "{line}");
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_with_everything() {
        let run = run(
            "run tiny --disk a,ro --disk b --cpus 2 --memory 1G --engine translate --cpu-model host \
             --name x --net none --on-reboot exit -T -- ls -l --kernel",
        );
        assert_eq!(run.image.as_deref(), Some("tiny"));
        assert_eq!(run.command, ["ls", "-l", "--kernel"]);
        assert_eq!(run.disks.len(), 2);
        assert_eq!(run.disks[0].access, DiskAccess::ReadOnly);
        assert_eq!(run.memory, Some(ByteSize::mebibytes(1024)));
        assert!(run.no_terminal && !run.terminal);
    }

    #[test]
    fn the_last_of_two_terminal_options_counts() {
        let run = run("run -T -t tiny -- sh");
        assert!(run.terminal && !run.no_terminal);
    }

    #[test]
    fn run_with_a_kernel() {
        let run = run("run --kernel k --initrd i --append console=ttyS0");
        assert_eq!(run.kernel, Some("k".into()));
        assert_eq!(run.append.as_deref(), Some("console=ttyS0"));
        assert_eq!(run.memory, None);
    }

    #[test]
    fn what_is_wrong_is_said_in_a_sentence() {
        refused(
            "run tiny nproc",
            "'nproc' is no option of run: did you mean 'strata run tiny -- nproc'?",
        );
        refused(
            "run tiny echo a b",
            "'echo a b' is no option of run: did you mean 'strata run tiny -- echo a b'?",
        );
        refused(
            "run",
            "say what to run: an image, like 'strata run tiny', or --kernel FILE, or --disk FILE with a kernel inside",
        );
        refused(
            "run tiny --memory 512",
            "invalid value '512' for '--memory <SIZE>': '512' needs a unit: say 512M or 512G; see --help",
        );
        refused(
            "run tiny --memory=-1G",
            "invalid value '-1G' for '--memory <SIZE>': '-1G' is not a size: write a whole number and a unit, like 512M or 1G; see --help",
        );
        refused(
            "run tiny --disk a,format=vmdk",
            "invalid value 'a,format=vmdk' for '--disk <FILE[,ro][,format=raw|qcow2]>': disk format 'vmdk' is not known (known: raw, qcow2); see --help",
        );
        refused(
            "run tiny --engine tcg",
            "invalid value 'tcg' for '--engine <ENGINE>' [possible values: auto, translate, kvm]; see --help",
        );
        refused(
            "run tiny --memry 1G",
            "unexpected argument '--memry' found; a similar argument exists: '--memory'",
        );
        refused(
            "run --kernel k tiny",
            "the argument '--kernel <FILE>' cannot be used with '[IMAGE]'; see --help",
        );
        refused(
            "run tiny -p 80",
            "invalid value '80' for '--publish <[ADDRESS:]HOST:GUEST[/udp]>': write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], like 8080:80 or [::1]:8080:80; see --help",
        );
        refused(
            "run tiny --net lab,vlan=4095",
            "invalid value 'lab,vlan=4095' for '--net <user[,host-loopback]|none|NETWORK[,mac=MAC][,vlan=N|,trunk[=N+N...]]>': '4095' is no VLAN: give a number from 1 to 4094; see --help",
        );
        refused(
            "imag ls",
            "unrecognized subcommand 'imag'; a similar subcommand exists: 'image'",
        );
        refused("", "say what to do: see 'strata --help'");
        refused(
            "image build",
            "the following required arguments were not provided: <NAME>; see --help",
        );
    }

    #[test]
    fn help_documents_exit_statuses() {
        for line in ["--help", "run --help"] {
            match parsed(line) {
                Ok(Parsed::Text(text)) => assert!(text.contains("128+N"), "{text}"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }
}
