//! The kernel inside a disk: found, with its initial RAM disk and command line, as a boot loader would find them.
//!
//! Partitions come from GPT or MBR; a disk without a table is looked at as a whole. In every file system of the ext
//! family (others cannot be read here) these are looked for, both below `/boot` and, for a boot partition of its own,
//! at the top:
//!
//! 1. `loader/entries/*.conf` (Boot Loader Specification): the newest entry that is no rescue system
//! 2. `extlinux.conf`: its default
//! 3. `/vmlinuz`, if it is a link
//! 4. the newest `vmlinuz-VERSION` with the RAM disk of that version
//!
//! The first partition that has one wins. A command line that names no root gets one: the file system with the kernel,
//! or another that looks like a system. The serial console is added, so that the user sees something.
//!
//! Everything on the disk is untrusted: what is read is bounded, and what is damaged is an error or not found.

mod entry;
mod partition;
mod volume;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use strata_disk::{DiskBackend, DiskError};

use self::entry::{
    BootEntry, compare_versions, extlinux, initrd_names, kernel_version, loader_entry,
};
use self::partition::{Partition, partitions};
use self::volume::Volume;

const KERNEL_BYTES_MAX: u64 = 512 << 20;
const INITRD_BYTES_MAX: u64 = 1 << 30;
/// File systems that are looked into; each costs memory and time by its size.
const VOLUMES_MAX: usize = 8;
/// Entries of boot loaders that are read.
const ENTRIES_MAX: usize = 64;
/// Partitions that are looked into.
const PARTITIONS_MAX: usize = 64;

/// What a disk has to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundKernel {
    /// The kernel's path inside the disk, and where it is.
    pub path: String,
    /// The kernel's file.
    pub kernel: Vec<u8>,
    /// The initial RAM disk, of several parts perhaps.
    pub initrd: Option<Vec<u8>>,
    /// The whole command line.
    pub cmdline: String,
}

/// Why no kernel was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The disk cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There is none that can be found.
    #[error("looked for a kernel inside the disk and found none ({looked}); give one by --kernel")]
    None {
        /// What is on the disk.
        looked: String,
    },
    /// There is one, but a file cannot be read.
    #[error("cannot read {path} on {place}: {reason}")]
    File {
        /// The file inside the disk.
        path: String,
        /// The partition.
        place: String,
        /// Why.
        reason: String,
    },
}

fn place(partition: &Partition) -> String {
    match partition.number {
        0 => "the disk".to_owned(),
        number => format!("partition {number}"),
    }
}

/// Finds what `disk` has to start. `append` is put at the end of the command line.
///
/// # Errors
/// If there is nothing that is found, or if it cannot be read.
pub fn find_kernel(
    disk: &Arc<dyn DiskBackend>,
    append: Option<&str>,
) -> Result<FoundKernel, FindError> {
    let all = partitions(&**disk)?;
    let (mut volumes, mut others, mut looked) = (Vec::new(), Vec::new(), Vec::new());
    for partition in all.iter().take(PARTITIONS_MAX) {
        let place = place(partition);
        match volume::kind(&**disk, partition)? {
            Some("ext4") if volumes.len() == VOLUMES_MAX => {
                looked.push(format!("{place} is one ext4 too many"))
            }
            Some("ext4") => match Volume::open(disk, partition) {
                Ok(volume) => {
                    looked.push(format!("{place} has ext4"));
                    volumes.push(volume);
                }
                Err(reason) => {
                    looked.push(format!("{place} has ext4 that cannot be read: {reason}"))
                }
            },
            Some(kind) => {
                looked.push(format!("{place} has {kind}, which cannot be read here"));
                others.push((partition, kind));
            }
            None => looked.push(format!("{place} has nothing that is known")),
        }
    }
    for volume in &volumes {
        if let Some(entry) = find_entry(volume) {
            let root = find_root(volume, &volumes, &others, !entry.initrds.is_empty());
            return load(volume, &entry, root, append);
        }
    }
    Err(FindError::None {
        looked: looked.join("; "),
    })
}

fn load(
    volume: &Volume,
    entry: &BootEntry,
    root: Option<String>,
    append: Option<&str>,
) -> Result<FoundKernel, FindError> {
    let kernel = volume.read(&entry.kernel, KERNEL_BYTES_MAX)?;
    let mut initrd: Option<Vec<u8>> = None;
    for path in &entry.initrds {
        // All together are no larger than one may be.
        let used = initrd.as_ref().map_or(0, |whole| whole.len() as u64 + 3);
        let left = INITRD_BYTES_MAX.saturating_sub(used);
        let mut part = volume.read(path, left)?;
        match &mut initrd {
            // Archives behind one another begin at multiples of four.
            Some(whole) => {
                whole.resize(whole.len().next_multiple_of(4), 0);
                whole.append(&mut part);
            }
            None => initrd = Some(part),
        }
    }
    Ok(FoundKernel {
        path: format!("{} on {}", entry.kernel, place(&volume.partition)),
        kernel,
        initrd,
        cmdline: cmdline(&entry.options, root, append),
    })
}

/// What a file system says to start, with paths that exist.
fn find_entry(volume: &Volume) -> Option<BootEntry> {
    let loader = ["/boot/loader/entries", "/loader/entries"]
        .into_iter()
        .find_map(|directory| newest_loader_entry(volume, directory));
    let configured = || {
        let directories = [
            "/boot",
            "/boot/extlinux",
            "/boot/syslinux",
            "",
            "/extlinux",
            "/syslinux",
        ];
        directories.into_iter().find_map(|directory| {
            let text = volume.text(&format!("{directory}/extlinux.conf"))?;
            existing(volume, directory, extlinux(&text)?)
        })
    };
    let link = || {
        let real = volume.resolve("/vmlinuz")?;
        let (directory, name) = real.rsplit_once('/')?;
        let version = kernel_version(name)?;
        Some(named(volume, directory, name, version))
    };
    loader
        .or_else(configured)
        .or_else(link)
        .or_else(|| newest_kernel(volume))
}

fn newest_loader_entry(volume: &Volume, directory: &str) -> Option<BootEntry> {
    let names = volume.names(directory);
    let confs = names
        .iter()
        .filter(|name| name.ends_with(".conf") && !name.contains("rescue"));
    let mut entries: Vec<BootEntry> = confs
        .take(ENTRIES_MAX)
        .filter_map(|name| {
            let text = volume.text(&format!("{directory}/{name}"))?;
            existing(volume, "/boot", loader_entry(name, &text)?)
        })
        .collect();
    entries.sort_by(|one, other| compare_versions(&one.version, &other.version));
    entries.pop()
}

/// An entry whose paths were found: they are relative to its directory, or to the top of its own partition, which may be
/// `/boot` of ours. None if the kernel is not there.
fn existing(volume: &Volume, directory: &str, entry: BootEntry) -> Option<BootEntry> {
    let find = |path: &str| {
        let path = path.trim_start_matches('/');
        let places = [String::new(), "/boot".to_owned(), directory.to_owned()];
        places
            .into_iter()
            .find_map(|place| volume.resolve(&format!("{place}/{path}")))
    };
    let kernel = find(&entry.kernel)?;
    let initrds = entry
        .initrds
        .iter()
        .map(|path| find(path))
        .collect::<Option<Vec<_>>>()?;
    Some(BootEntry {
        kernel,
        initrds,
        ..entry
    })
}

fn newest_kernel(volume: &Volume) -> Option<BootEntry> {
    let newest = |directory: &str| {
        let names = volume.names(if directory.is_empty() { "/" } else { directory });
        let kernels = names.iter().filter_map(|name| {
            let version = kernel_version(name)?;
            volume.resolve(&format!("{directory}/{name}"))?;
            Some((name.as_str(), version))
        });
        let (name, version) = kernels.max_by(|one, other| compare_versions(one.1, other.1))?;
        Some(named(volume, directory, name, version))
    };
    ["/boot", ""].into_iter().find_map(newest)
}

/// A kernel with the RAM disk that belongs to it, if there is one.
fn named(volume: &Volume, directory: &str, name: &str, version: &str) -> BootEntry {
    let mut names = initrd_names(version).into_iter();
    let initrd = names.find_map(|name| volume.resolve(&format!("{directory}/{name}")));
    BootEntry {
        kernel: format!("{directory}/{name}"),
        initrds: initrd.into_iter().collect(),
        ..BootEntry::default()
    }
}

/// What to say of where the root file system is. With a RAM disk by the file system, which its tools find; without one
/// by the partition, which the kernel itself finds.
fn find_root(
    with_kernel: &Volume,
    volumes: &[Volume],
    others: &[(&Partition, &str)],
    has_initrd: bool,
) -> Option<String> {
    let is_system = |volume: &&Volume| {
        let signs = ["/sbin/init", "/etc/os-release", "/etc/fstab", "/init"];
        signs.into_iter().any(|path| volume.exists(path))
    };
    let system = Some(with_kernel)
        .filter(is_system)
        .or_else(|| volumes.iter().find(is_system));
    match system {
        Some(volume) if has_initrd => Some(format!("root=UUID={}", volume.uuid())),
        Some(volume) => Some(match &volume.partition.uuid {
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None => "root=/dev/vda".to_owned(),
        }),
        None => {
            let mut roots = others
                .iter()
                .filter(|(_, kind)| matches!(*kind, "xfs" | "btrfs"));
            let (root, _) = roots.next().filter(|_| roots.next().is_none())?;
            Some(format!("root=PARTUUID={}", root.uuid.as_ref()?))
        }
    }
}

/// The command line: what an entry has, what it lacks, and what the user adds.
fn cmdline(options: &str, root: Option<String>, append: Option<&str>) -> String {
    let mut words: Vec<&str> = options
        .split_whitespace()
        .filter(|word| !word.starts_with('$') && !word.starts_with("initrd="))
        .collect();
    let root = root.unwrap_or_default();
    if !words.iter().any(|word| word.starts_with("root=")) && !root.is_empty() {
        words.extend([root.as_str(), "ro"]);
    }
    if !words.iter().any(|word| word.starts_with("console=ttyS0")) {
        words.push("console=ttyS0");
    }
    words.extend(append);
    words.join(" ")
}
