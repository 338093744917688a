//! `MachineConfig`: everything about one machine, as values that are written to files and sent over the API.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, MachineName};

/// Most vCPUs that any engine may be asked for: 8-bit APIC ids without 255, the broadcast.
pub const CPUS_MAX: u32 = 254;

/// The guest's vsock address, unless configured otherwise.
pub const GUEST_CID: u32 = 3;

/// The version of the format. Reading refuses every other one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum ConfigVersion {
    /// The first.
    #[default]
    V1,
}

impl TryFrom<u32> for ConfigVersion {
    type Error = String;

    fn try_from(version: u32) -> Result<Self, String> {
        match version {
            1 => Ok(Self::V1),
            other => Err(format!(
                "machine configuration version {other} is not known here (known: 1)"
            )),
        }
    }
}

impl From<ConfigVersion> for u32 {
    fn from(version: ConfigVersion) -> u32 {
        match version {
            ConfigVersion::V1 => 1,
        }
    }
}

/// One machine. What the command line, the API, a template and saved state all hold.
///
/// ```
/// # use strata_vmm::MachineConfig;
/// let text = r#"{ "version": 1, "name": "web-1", "boot": { "files": { "kernel": "vmlinuz" } } }"#;
/// let config: MachineConfig = serde_json::from_str(text)?;
/// assert_eq!(config.memory.to_string(), "512M");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// The format's version: 1.
    pub version: ConfigVersion,
    /// Unique among the machines of a user that run on a host.
    pub name: MachineName,
    /// Which chipset and devices there are besides the ones listed here.
    #[serde(default)]
    pub platform: PlatformProfile,
    /// Which engine runs the vCPUs.
    #[serde(default)]
    pub engine: EngineChoice,
    /// Number of vCPUs, 1 to [`CPUS_MAX`].
    #[serde(default = "one")]
    pub cpus: u32,
    /// The CPU model's name: `baseline`, `host`.
    #[serde(default = "baseline")]
    pub cpu_model: String,
    /// RAM at start; whole mebibytes.
    #[serde(default = "default_memory")]
    pub memory: ByteSize,
    /// RAM that can be reached by plugging in; the same as `memory` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<ByteSize>,
    /// What is started.
    pub boot: BootSource,
    /// Disks, in the order the guest sees them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Which device is the console that a user sees.
    #[serde(default)]
    pub console: ConsoleKind,
    /// The socket between host and guest; without one there is no agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Network cards.
    #[serde(default)]
    pub network: NetworkConfig,
    /// What happens when the guest resets the machine.
    #[serde(default)]
    pub on_reboot: OnReboot,
    /// Whether the test device `isa-debug-exit` is there, by which a guest ends the machine with a status.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub debug_exit: bool,
}

fn one() -> u32 {
    1
}

fn baseline() -> String {
    "baseline".to_owned()
}

fn default_memory() -> ByteSize {
    MachineConfig::MEMORY_DEFAULT
}

impl MachineConfig {
    /// RAM of a machine that does not say.
    pub const MEMORY_DEFAULT: ByteSize = ByteSize::mebibytes(512);

    /// A machine with all defaults.
    pub fn new(name: MachineName, boot: BootSource) -> Self {
        Self {
            version: ConfigVersion::V1,
            name,
            platform: PlatformProfile::default(),
            engine: EngineChoice::default(),
            cpus: one(),
            cpu_model: baseline(),
            memory: default_memory(),
            memory_max: None,
            boot,
            disks: Vec::new(),
            console: ConsoleKind::default(),
            vsock: None,
            network: NetworkConfig::default(),
            on_reboot: OnReboot::default(),
            debug_exit: false,
        }
    }

    /// Whether the guest can change a file of the host, so that it should be told before it ends.
    pub fn has_writable_disk(&self) -> bool {
        let writable = |disk: &DiskConfig| disk.access == DiskAccess::ReadWrite;
        self.disks.iter().any(writable)
    }
}

/// The set of fixed devices around CPUs, memory and PCI.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PlatformProfile {
    /// Serial port, clock, ACPI power control, IOAPIC, PCI Express, virtio. No PIC, PIT or firmware.
    #[default]
    Modern,
}

/// Which engine runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum EngineChoice {
    /// The best one that this host offers.
    #[default]
    Auto,
    /// Binary translation: any host whose CPU has AVX2 and BMI2.
    Translate,
    /// Hardware assist: hosts with a `/dev/kvm`.
    Kvm,
}

/// What is started.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootSource {
    /// Files of the host.
    Files(BootFiles),
    /// An image by its name; whoever owns the image store replaces it by [`BootSource::Files`] before the machine is
    /// built.
    Image(String),
    /// The kernel that is found inside the first disk.
    Disk(DiskBoot),
}

/// A kernel inside a disk, and what it is given.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskBoot {
    /// Added to the command line that the disk says.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// A kernel and what it is given.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BootFiles {
    /// bzImage, vmlinux, PVH or multiboot 1.
    pub kernel: PathBuf,
    /// The vmlinux that is packed in a bzImage, if it was kept: a machine then starts without unpacking it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked: Option<PathBuf>,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line; nothing is added to it.
    #[serde(default)]
    pub append: String,
}

/// One disk.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// How its bytes are laid out. Never guessed: raw if not given, and refused if the file could be something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// What becomes of the guest's writes.
    #[serde(default)]
    pub access: DiskAccess,
    /// The files that an image may be built on, from the uppermost down. An image that names another one is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
    /// The file that may have an image's data. An image that names another one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
}

/// How the bytes of a disk are laid out in its file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DiskFormat {
    /// The bytes of the file are the bytes of the disk.
    #[default]
    Raw,
    /// QEMU's format, which grows with its content.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// What becomes of a guest's writes to a disk.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskAccess {
    /// They go to the file.
    #[default]
    ReadWrite,
    /// The guest sees a write-protected disk.
    ReadOnly,
    /// They are kept while the machine runs and forgotten then; the file is never written.
    Temporary,
}

/// Which device is the console that a user sees.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ConsoleKind {
    /// The first serial port, `ttyS0`: works from the kernel's first line on.
    #[default]
    Serial,
    /// virtio-console, `hvc0`: faster, and knows the window's size.
    Virtio,
}

/// The socket between host and guest.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockConfig {
    /// The guest's address, 3 or more.
    #[serde(default = "guest_cid")]
    pub cid: u32,
    /// Where the host's Unix socket is made; in the machine's run directory if not given. A guest that connects to
    /// port P of the host reaches the Unix socket with `_P` appended to this path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

fn guest_cid() -> u32 {
    GUEST_CID
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self {
            cid: GUEST_CID,
            socket: None,
        }
    }
}

/// What the machine's network is.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NetworkConfig {
    /// No network card.
    #[default]
    None,
    /// A network of its own, with the host's programs as its way out: no privileges are needed.
    User(UserNetwork),
    /// A port of a network that several machines share: a switch in a process of its own.
    Port(NetworkPort),
}

/// A port of a shared network. Its ring and what wakes either side are handed over beside the configuration.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkPort {
    /// The network's name.
    pub network: String,
    /// The card's Ethernet address; made from the machine's name if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<[u8; 6]>,
    /// The port's VLANs.
    #[serde(default)]
    pub vlans: PortVlans,
    /// Longest IP packet of the network; said by the network when the machine joins it.
    #[serde(default)]
    pub mtu: u16,
    /// Bytes of each direction of its ring; said by the network when the machine joins it.
    #[serde(default)]
    pub ring: u32,
}

/// Which VLANs a port has.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortVlans {
    /// One, whose frames have no tag.
    Access(u16),
    /// Several, whose frames have tags; all, if none are named.
    Trunk(Vec<u16>),
}

impl Default for PortVlans {
    fn default() -> Self {
        Self::Access(1)
    }
}

/// A network of one machine and a gateway.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct UserNetwork {
    /// Ports of the host that lead to the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// Whether the gateway's address leads to the host's loopback addresses too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_loopback: bool,
    /// The gateway's address, in a /24 that collides with nothing that the host reaches; a fixed one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Publish {
    /// Where the host listens; port 0 is any that is free.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: PortProtocol,
}

/// What a port is of.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// A `--publish` argument that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PublishError {
    /// Not of the form.
    #[error("write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], like 8080:80 or [::1]:8080:80")]
    Form,
    /// A port that is none.
    #[error("'{0}' is not a port: give a number up to 65535")]
    Port(String),
    /// An address that is none.
    #[error("'{0}' is not an address: give one of this host's, like 127.0.0.1 or [::1]")]
    Address(String),
    /// Neither TCP nor UDP.
    #[error("'{0}' cannot be published (known: tcp, udp)")]
    Protocol(String),
}

impl FromStr for Publish {
    type Err = PublishError;

    /// `[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]`; the address is 127.0.0.1 if not given.
    fn from_str(text: &str) -> Result<Self, PublishError> {
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.split('/').next().unwrap_or(text), PortProtocol::Tcp),
            Some((ports, "udp")) => (ports, PortProtocol::Udp),
            Some((_, other)) => return Err(PublishError::Protocol(other.to_owned())),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or(PublishError::Form)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
            Some((address, host)) => {
                let plain = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let wrong = || PublishError::Address(address.to_owned());
                let parsed = match plain {
                    Some(plain) => IpAddr::V6(plain.parse().map_err(|_| wrong())?),
                    None => IpAddr::V4(address.parse().map_err(|_| wrong())?),
                };
                (parsed, host)
            }
        };
        let port = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| PublishError::Port(text.to_owned()))
        };
        let guest = port(guest)
            .ok()
            .filter(|guest| *guest > 0)
            .ok_or_else(|| PublishError::Port(guest.to_owned()))?;
        Ok(Self {
            host: SocketAddr::new(address, port(host)?),
            guest,
            protocol,
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol)
    }
}

impl fmt::Display for PortProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// What happens when the guest resets the machine.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// It begins again, with its memory empty and its devices as new.
    #[default]
    Restart,
    /// It ends.
    Exit,
}

/// A `--disk` argument that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DiskSpecError {
    /// No path.
    #[error("a disk needs a file: write FILE[,ro][,format=raw|qcow2]")]
    NoPath,
    /// Neither `ro` nor `format=`, `backing=` or `data=`.
    #[error(
        "disk option '{0}' is not known (known: ro, format=raw|qcow2, backing=FILE, data=FILE)"
    )]
    UnknownOption(String),
    /// A format we do not have.
    #[error("disk format '{0}' is not known (known: raw, qcow2)")]
    UnknownFormat(String),
    /// The same option twice.
    #[error("disk option '{0}' is given twice")]
    Twice(&'static str),
}

impl FromStr for DiskConfig {
    type Err = DiskSpecError;

    /// `FILE[,ro][,format=raw|qcow2][,backing=FILE]…[,data=FILE]`. A comma in a file's name is written twice.
    fn from_str(text: &str) -> Result<Self, DiskSpecError> {
        let mut words = split(text).into_iter();
        let path = words.next().filter(|path| !path.is_empty());
        let mut disk = Self {
            path: path.ok_or(DiskSpecError::NoPath)?.into(),
            format: None,
            access: DiskAccess::default(),
            backing: Vec::new(),
            data: None,
        };
        for option in words {
            let once = match option.split_once('=') {
                None if option == "ro" => {
                    let before = std::mem::replace(&mut disk.access, DiskAccess::ReadOnly);
                    (before == DiskAccess::ReadOnly).then_some("ro")
                }
                Some(("format", name)) => {
                    let format = match name {
                        "raw" => DiskFormat::Raw,
                        "qcow2" => DiskFormat::Qcow2,
                        other => return Err(DiskSpecError::UnknownFormat(other.to_owned())),
                    };
                    disk.format.replace(format).map(|_| "format")
                }
                Some(("backing", path)) if !path.is_empty() => {
                    disk.backing.push(path.into());
                    None
                }
                Some(("data", path)) if !path.is_empty() => {
                    disk.data.replace(path.into()).map(|_| "data")
                }
                _ => return Err(DiskSpecError::UnknownOption(option)),
            };
            if let Some(option) = once {
                return Err(DiskSpecError::Twice(option));
            }
        }
        Ok(disk)
    }
}

impl fmt::Display for DiskConfig {
    /// As [`DiskConfig::from_str`] reads it; a temporary disk, which has no such form, looks like a writable one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |path: &PathBuf| path.to_string_lossy().replace(',', ",,");
        f.write_str(&escaped(&self.path))?;
        if self.access == DiskAccess::ReadOnly {
            f.write_str(",ro")?;
        }
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        for path in &self.backing {
            write!(f, ",backing={}", escaped(path))?;
        }
        if let Some(path) = &self.data {
            write!(f, ",data={}", escaped(path))?;
        }
        Ok(())
    }
}

/// The words between single commas; doubled commas are made single.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn disk(path: &str, access: DiskAccess) -> DiskConfig {
        DiskConfig {
            path: path.into(),
            format: None,
            access,
            backing: Vec::new(),
            data: None,
        }
    }

    #[test]
    fn disks_as_typed() {
        let check = |text: &str, path: &str, access| {
            assert_eq!(text.parse(), Ok(disk(path, access)), "{text}");
        };
        check("a.img", "a.img", DiskAccess::ReadWrite);
        check("/x/a.img,ro", "/x/a.img", DiskAccess::ReadOnly);
        check("a,,b,ro", "a,b", DiskAccess::ReadOnly);
        check("a=b", "a=b", DiskAccess::ReadWrite);
        let with_options = DiskConfig {
            format: Some(DiskFormat::Qcow2),
            backing: vec!["b".into(), "c,d".into()],
            data: Some("e".into()),
            ..disk("a", DiskAccess::ReadOnly)
        };
        let text = "a,format=qcow2,backing=b,ro,data=e,backing=c,,d";
        assert_eq!(text.parse(), Ok(with_options));
    }

    #[test]
    fn published_ports_as_typed() {
        let check = |text: &str, host: &str, guest, protocol| {
            let expected = Publish {
                host: host.parse().unwrap(),
                guest,
                protocol,
            };
            assert_eq!(text.parse(), Ok(expected), "{text}");
            let shown = expected.to_string();
            assert_eq!(shown.parse(), Ok(expected), "{shown}");
        };
        check("8080:80", "127.0.0.1:8080", 80, PortProtocol::Tcp);
        check("0:80/tcp", "127.0.0.1:0", 80, PortProtocol::Tcp);
        check("0.0.0.0:53:5353/udp", "0.0.0.0:53", 5353, PortProtocol::Udp);
        check("[::1]:1:65535", "[::1]:1", 65535, PortProtocol::Tcp);
    }

    #[test]
    fn published_ports_mistyped() {
        let wrong = |text: &str| text.parse::<Publish>().unwrap_err().to_string();
        assert!(wrong("80").contains("[ADDRESS:]HOSTPORT:GUESTPORT"));
        assert!(wrong("8080:0").contains("'0' is not a port"));
        assert!(wrong("70000:80").contains("'70000' is not a port"));
        assert!(wrong("x:80").contains("'x' is not a port"));
        assert!(wrong("localhost:8080:80").contains("'localhost' is not an address"));
        assert!(wrong("::1:8080:80").contains("'::1' is not an address"));
        assert!(wrong("8080:80/sctp").contains("'sctp' cannot be published"));
        assert!(wrong("").contains("write ["));
    }

    #[test]
    fn disks_mistyped() {
        let check = |text: &str, message: &str| {
            assert_eq!(
                text.parse::<DiskConfig>().unwrap_err().to_string(),
                message,
                "{text}"
            );
        };
        let no_file = "a disk needs a file: write FILE[,ro][,format=raw|qcow2]";
        check("", no_file);
        check(",ro", no_file);
        let known = "is not known (known: ro, format=raw|qcow2, backing=FILE, data=FILE)";
        check("a,rw", &format!("disk option 'rw' {known}"));
        check("a,", &format!("disk option '' {known}"));
        check("a,backing=", &format!("disk option 'backing=' {known}"));
        check(
            "a,format=vmdk",
            "disk format 'vmdk' is not known (known: raw, qcow2)",
        );
        check(
            "a,format=raw,format=qcow2",
            "disk option 'format' is given twice",
        );
        check("a,ro,ro", "disk option 'ro' is given twice");
    }

    proptest! {
        #[test]
        fn disks_survive_printing(
            path in "\\PC{1,20}",
            ro: bool,
            format in prop::option::of(prop_oneof![Just(DiskFormat::Raw), Just(DiskFormat::Qcow2)]),
            backing in prop::collection::vec("\\PC{1,20}", 0..3),
        ) {
            let access = if ro { DiskAccess::ReadOnly } else { DiskAccess::ReadWrite };
            let backing = backing.into_iter().map(PathBuf::from).collect();
            let disk = DiskConfig { format, backing, ..disk(&path, access) };
            prop_assert_eq!(disk.to_string().parse(), Ok(disk));
        }

        #[test]
        fn no_disk_text_panics(text in "[a,=ro]{0,12}|format=.{0,4}|\\PC{0,20}") {
            let _ = text.parse::<DiskConfig>();
        }
    }

    /// A configuration of version 1 with every field. It must be read for ever.
    const EVERY_FIELD: &str = r#"{
        "version": 1, "name": "web-1", "platform": "modern", "engine": "translate", "cpus": 2, "cpu-model": "host",
        "memory": "1G", "memory-max": "2G",
        "boot": { "files": { "kernel": "/k", "unpacked": "/u", "initrd": "/i", "append": "console=ttyS0" } },
        "disks": [ { "path": "/d", "format": "raw", "access": "temporary" }, { "path": "/e" } ],
        "console": "virtio", "vsock": { "cid": 5, "socket": "/s" }, "network": "none", "on-reboot": "exit",
        "debug-exit": true
    }"#;

    #[test]
    fn a_config_is_read_and_written() {
        let config: MachineConfig = serde_json::from_str(EVERY_FIELD).unwrap();
        let mut expected = MachineConfig::new(
            "web-1".parse().unwrap(),
            BootSource::Files(BootFiles {
                kernel: "/k".into(),
                unpacked: Some("/u".into()),
                initrd: Some("/i".into()),
                append: "console=ttyS0".into(),
            }),
        );
        expected.engine = EngineChoice::Translate;
        expected.cpus = 2;
        expected.cpu_model = "host".into();
        expected.memory = ByteSize::mebibytes(1024);
        expected.memory_max = Some(ByteSize::mebibytes(2048));
        expected.disks = vec![
            DiskConfig {
                format: Some(DiskFormat::Raw),
                ..disk("/d", DiskAccess::Temporary)
            },
            disk("/e", DiskAccess::ReadWrite),
        ];
        expected.console = ConsoleKind::Virtio;
        expected.vsock = Some(VsockConfig {
            cid: 5,
            socket: Some("/s".into()),
        });
        expected.on_reboot = OnReboot::Exit;
        expected.debug_exit = true;
        assert_eq!(config, expected);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<MachineConfig>(&text).unwrap(),
            config
        );
    }

    #[test]
    fn a_config_can_say_that_the_kernel_is_inside_the_disk() {
        let text = r#"{ "version": 1, "name": "x", "boot": { "disk": { "append": "quiet" } }, "disks": [ { "path": "/d" } ] }"#;
        let config: MachineConfig = serde_json::from_str(text).unwrap();
        let append = "quiet".to_owned();
        assert_eq!(config.boot, BootSource::Disk(DiskBoot { append }));
    }

    #[test]
    fn a_config_of_another_version_or_with_unknown_fields_is_refused() {
        let error = |text: &str| {
            serde_json::from_str::<MachineConfig>(text)
                .unwrap_err()
                .to_string()
        };
        assert!(
            error(&EVERY_FIELD.replace("\"version\": 1", "\"version\": 2"))
                .contains("version 2 is not known here")
        );
        assert!(error(&EVERY_FIELD.replace("\"cpus\"", "\"cpu-count\"")).contains("cpu-count"));
        assert!(error(&EVERY_FIELD.replace("\"version\": 1,", "")).contains("version"));
    }
}
