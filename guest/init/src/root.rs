//! From the RAM disk to a system on a disk: finds the root file system, mounts it, and hands the machine over.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::options::Options;
use crate::system;

/// Where the root file system is mounted until it is the root.
const TARGET: &str = "/sysroot";

/// What moves along, in an order in which it can be moved.
const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// How long a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first programs that systems have.
const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// Files that the host put into the RAM disk for the system, kept in `/run/strata`.
const KEPT: &str = "/etc/strata/keep";

/// Hands over to the system on `root`. Returns only if that is impossible.
pub fn hand_over(options: &Options, root: &str) -> io::Error {
    match prepare(options, root) {
        Ok(init) => {
            // The host has said who gets a console: systemd does not have to guess.
            let said = options.console.is_some() || options.agent;
            system::execute(&init, said.then_some(c"SYSTEMD_GETTY_AUTO=0"))
        }
        Err(error) => error,
    }
}

fn prepare(options: &Options, root: &str) -> io::Result<CString> {
    let device = find(root)?;
    fs::create_dir_all(TARGET)?;
    let flags = if options.root_writable {
        0
    } else {
        libc::MS_RDONLY
    };
    let kind = options.root_type.as_deref().unwrap_or("ext4");
    let text = |text: &OsStr| system::c_string(text.as_bytes());
    system::mount_device(
        &text(device.as_os_str()),
        &text(OsStr::new(TARGET)),
        &text(OsStr::new(kind)),
        flags,
    )
    .map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot mount {}: {error}", device.display()),
        )
    })?;
    if let Some(name) = &options.hostname {
        // A name that the system has for itself counts more, and is set by it.
        let _ = system::set_hostname(name);
    }
    if let Err(error) = leave_word(options) {
        eprintln!("strata-init: /run: {error}");
    }
    let named = options.init.as_deref();
    let candidates: Vec<&str> = match named {
        Some(init) => vec![init],
        None => INITS.to_vec(),
    };
    let init = candidates
        .into_iter()
        .find(|init| is_there(init))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "there is no {} on {}",
                    named.unwrap_or("init"),
                    device.display()
                ),
            )
        })?;
    for mounted in MOVED {
        let to = format!("{TARGET}{mounted}");
        system::move_mount(
            &system::c_string(mounted.as_bytes()),
            &system::c_string(to.as_bytes()),
        )
        .map_err(|error| io::Error::new(error.kind(), format!("cannot move {mounted}: {error}")))?;
    }
    let init = system::c_string(init.as_bytes());
    forget_ram_disk();
    system::switch_root(&system::c_string(TARGET.as_bytes()))?;
    Ok(init)
}

/// Whether there is a program, or a link that leads somewhere else than this root, from which nothing can be told.
fn is_there(init: &str) -> bool {
    fs::symlink_metadata(Path::new(TARGET).join(init.trim_start_matches('/'))).is_ok()
        || ["/sbin", "/bin"].iter().any(|merged| {
            init.starts_with(merged) && fs::symlink_metadata(format!("{TARGET}/usr{init}")).is_ok()
        })
}

/// Tells the system what the host asked for: in `/run`, which it keeps.
fn leave_word(options: &Options) -> io::Result<()> {
    if let Some(console) = options
        .console
        .as_deref()
        .filter(|name| !name.contains('/'))
    {
        let directory = format!("/run/systemd/system/serial-getty@{console}.service.d");
        fs::create_dir_all(&directory)?;
        let term = options.term.as_deref().unwrap_or("linux");
        fs::write(
            format!("{directory}/term.conf"),
            format!("[Service]\nEnvironment=TERM={term}\n"),
        )?;
        let wants = "/run/systemd/system/getty.target.wants";
        fs::create_dir_all(wants)?;
        let unit = "/lib/systemd/system/serial-getty@.service";
        std::os::unix::fs::symlink(unit, format!("{wants}/serial-getty@{console}.service"))?;
    }
    if let Ok(files) = fs::read_dir(KEPT) {
        fs::create_dir_all("/run/strata")?;
        for file in files.flatten() {
            fs::copy(file.path(), Path::new("/run/strata").join(file.file_name()))?;
        }
    }
    Ok(())
}

/// Frees the memory of the RAM disk. Other file systems are mounted elsewhere by now, and are not entered.
fn forget_ram_disk() {
    for entry in fs::read_dir("/").into_iter().flatten().flatten() {
        let path = entry.path();
        if path == Path::new(TARGET) {
            continue;
        }
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // What cannot be removed stays and is out of reach.
        let _ = if is_directory {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
    }
}

/// Waits for the device that has the file system.
fn find(root: &str) -> io::Result<PathBuf> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(device) = look_for(root) {
            return Ok(device);
        }
        if Instant::now() > deadline {
            let disks = block_devices().join(" ");
            let message = format!("there is no root file system {root}; there are: {disks}");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn look_for(root: &str) -> Option<PathBuf> {
    let wanted = match root.split_once('=') {
        Some(("UUID", uuid)) => Wanted::Uuid(uuid.to_ascii_lowercase()),
        Some(("LABEL", label)) => Wanted::Label(label.to_owned()),
        _ => return Some(PathBuf::from(root)).filter(|path| path.exists()),
    };
    block_devices()
        .into_iter()
        .map(|name| Path::new("/dev").join(name))
        .find(|path| {
            Identity::read(path)
                .is_ok_and(|identity| identity.is_some_and(|identity| identity.is(&wanted)))
        })
}

/// Names of disks and partitions, in an order that does not change.
fn block_devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/block")
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// How a root file system is named.
enum Wanted {
    Uuid(String),
    Label(String),
}

/// What an ext2, ext3 or ext4 file system calls itself.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    uuid: String,
    label: String,
}

impl Identity {
    /// None if it is another kind of file system, or none.
    fn read(device: &Path) -> io::Result<Option<Identity>> {
        let mut superblock = [0; 0x88];
        let mut file = File::open(device)?;
        file.seek(SeekFrom::Start(0x400))?;
        file.read_exact(&mut superblock)?;
        Ok(Identity::parse(&superblock))
    }

    /// Reads an ext4 superblock (Documentation/filesystems/ext4/super.rst).
    fn parse(superblock: &[u8; 0x88]) -> Option<Identity> {
        if superblock[0x38..0x3a] != [0x53, 0xef] {
            return None;
        }
        let mut uuid = String::new();
        for (at, byte) in superblock[0x68..0x78].iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                uuid.push('-');
            }
            uuid.push_str(&format!("{byte:02x}"));
        }
        let label = superblock[0x78..0x88]
            .split(|&byte| byte == 0)
            .next()
            .unwrap_or_default();
        Some(Identity {
            uuid,
            label: String::from_utf8_lossy(label).into_owned(),
        })
    }

    fn is(&self, wanted: &Wanted) -> bool {
        match wanted {
            Wanted::Uuid(uuid) => *uuid == self.uuid,
            Wanted::Label(label) => *label == self.label,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_file_systems() {
        let mut superblock = [0; 0x88];
        assert_eq!(Identity::parse(&superblock), None);
        superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        for (at, byte) in superblock[0x68..0x78].iter_mut().enumerate() {
            *byte = 0x11 * at as u8;
        }
        superblock[0x78..0x7c].copy_from_slice(b"root");
        let identity = Identity::parse(&superblock).unwrap();
        assert_eq!(identity.uuid, "00112233-4455-6677-8899-aabbccddeeff");
        assert!(identity.is(&Wanted::Label("root".into())));
        assert!(!identity.is(&Wanted::Label("roo".into())));
        assert!(identity.is(&Wanted::Uuid(identity.uuid.clone())));
    }
}
