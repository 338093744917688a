//! Disks made with mke2fs, with all that is looked for; and damaged ones.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use strata_disk::{Access, DiskBackend, RawFile};
use tempfile::NamedTempFile;

use super::*;

const MIB: usize = 1 << 20;
const CASES: u32 = 64;

fn mke2fs() -> Command {
    let mut command = Command::new("mke2fs");
    let path = env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Whether file systems can be made here; if not, that is noted.
fn ready() -> bool {
    let version = mke2fs().arg("-V").stderr(Stdio::null()).status();
    if version.is_ok() {
        return true;
    }
    let reason = "mke2fs is missing (Debian package e2fsprogs)";
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("?");
    println!("SKIPPED {name}: {reason}");
    if let Some(path) = env::var_os("STRATA_TEST_SKIPS") {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(format!("{name}\t{reason}\n").as_bytes())
            .unwrap();
    }
    false
}

/// A file system with these files; a content that begins with `->` makes a link.
fn file_system(files: &[(&str, &str)]) -> Vec<u8> {
    file_system_with("metadata_csum", files)
}

fn file_system_with(features: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("->") {
            Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
            None => fs::write(path, content).unwrap(),
        }
    }
    let image = directory.path().join("image");
    let made = mke2fs()
        .args([
            "-q",
            "-t",
            "ext4",
            "-U",
            "01234567-89ab-cdef-0123-456789abcdef",
            "-d",
        ])
        .args([&root, &image])
        .args(["-O", features])
        .arg("4M")
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    fs::read(image).unwrap()
}

/// A disk whose bytes are these.
fn disk(bytes: &[u8]) -> Arc<dyn DiskBackend> {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    Arc::new(RawFile::open(file.path(), Access::ReadOnly).unwrap())
}

/// A disk with an MBR and partitions of 4 MiB.
fn mbr(parts: &[&[u8]]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    disk[440..444].copy_from_slice(&0x1234_abcd_u32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (index, part) in parts.iter().enumerate() {
        let (first, sectors) = (disk.len() as u32 / 512, part.len() as u32 / 512);
        let entry = &mut disk[446 + index * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        disk.extend_from_slice(part);
    }
    disk
}

/// A disk with a GPT, primary and backup, and partitions of 4 MiB.
fn gpt(parts: &[&[u8]]) -> Vec<u8> {
    let mut entries = vec![0; 128 * 128];
    let mut disk = vec![0; MIB];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[446 + 4] = 0xee;
    disk[446 + 8] = 1;
    for (index, part) in parts.iter().enumerate() {
        let entry = &mut entries[index * 128..][..128];
        entry[..16].fill(7);
        entry[16..32].copy_from_slice(&[
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            10,
            11,
            12,
            13,
            14,
            15,
            16 + index as u8,
        ]);
        let (first, sectors) = (disk.len() as u64 / 512, part.len() as u64 / 512);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&(first + sectors - 1).to_le_bytes());
        disk.extend_from_slice(part);
    }
    disk.resize(disk.len() + MIB, 0);
    let sum = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum().to_le_bytes()
    };
    let last = disk.len() / 512 - 1;
    for (header, table) in [(1, 2), (last, last - 32)] {
        disk[table * 512..][..entries.len()].copy_from_slice(&entries);
        let header = &mut disk[header * 512..][..92];
        header[..8].copy_from_slice(b"EFI PART");
        header[12] = 92;
        header[72..80].copy_from_slice(&(table as u64).to_le_bytes());
        header[80] = 128;
        header[84] = 128;
        header[88..92].copy_from_slice(&sum(&entries));
        let crc = sum(header);
        header[16..20].copy_from_slice(&crc);
    }
    disk
}

fn found(disk_bytes: &[u8]) -> FoundKernel {
    find_kernel(&disk(disk_bytes), None).unwrap()
}

const UUID: &str = "root=UUID=01234567-89ab-cdef-0123-456789abcdef ro console=ttyS0";

#[test]
fn a_distribution_with_links() {
    if !ready() {
        return;
    }
    let root = file_system(&[
        ("vmlinuz", "->boot/vmlinuz-6.1.0-9-amd64"),
        ("boot/vmlinuz-6.1.0-9-amd64", "linked"),
        ("boot/initrd.img-6.1.0-9-amd64", "its own"),
        ("boot/vmlinuz-6.1.0-10-amd64", "newer"),
        ("etc/os-release", ""),
    ]);
    for bytes in [mbr(&[&root]), gpt(&[&root]), root.clone()] {
        let found = found(&bytes);
        assert_eq!(found.kernel, b"linked");
        assert_eq!(found.initrd.as_deref(), Some(&b"its own"[..]));
        assert_eq!(found.cmdline, UUID);
    }
    let appended = find_kernel(&disk(&root), Some("quiet rw")).unwrap();
    assert_eq!(appended.cmdline, format!("{UUID} quiet rw"));
}

#[test]
fn the_newest_kernel_without_a_ram_disk() {
    if !ready() {
        return;
    }
    let root = file_system(&[
        ("boot/vmlinuz-6.1.0-9", "old"),
        ("boot/vmlinuz-6.1.0-10", "new"),
        ("boot/vmlinuz-6.2.0-rescue", "rescue"),
        ("boot/vmlinuz-7.old", "old"),
        ("boot/vmlinuz-9", "->nowhere"),
        ("boot/initrd.img-6.1.0-9", "of another"),
        ("sbin/init", ""),
    ]);
    let on_mbr = found(&mbr(&[&vec![0; MIB], &root]));
    assert_eq!((on_mbr.kernel, on_mbr.initrd), (b"new".to_vec(), None));
    assert_eq!(on_mbr.path, "/boot/vmlinuz-6.1.0-10 on partition 2");
    assert_eq!(on_mbr.cmdline, "root=PARTUUID=1234abcd-02 ro console=ttyS0");
    let on_gpt = found(&gpt(&[&root])).cmdline;
    let uuid = "04030201-0605-0807-090a-0b0c0d0e0f10";
    assert_eq!(on_gpt, format!("root=PARTUUID={uuid} ro console=ttyS0"));
    assert_eq!(found(&root).cmdline, "root=/dev/vda ro console=ttyS0");
}

#[test]
fn boot_loader_entries_on_a_partition_of_their_own() {
    if !ready() {
        return;
    }
    let boot = file_system(&[
        (
            "loader/entries/f1-6.8.5-301.conf",
            "title Old\nversion 6.8.5-301\nlinux /vmlinuz-6.8.5\ninitrd /i\noptions root=UUID=1\n",
        ),
        (
            "loader/entries/f1-6.8.11-300.conf",
            "title New\nversion 6.8.11-300\nlinux /vmlinuz-6.8.11\ninitrd /early /i $tuned_initrd\noptions root=UUID=2 ro $kernelopts\noptions console=ttyS0,115200\n",
        ),
        (
            "loader/entries/f1-0-rescue.conf",
            "version 9\nlinux /vmlinuz-6.8.5\n",
        ),
        (
            "loader/entries/gone.conf",
            "version 8\nlinux /vmlinuz-gone\n",
        ),
        ("vmlinuz-6.8.5", "old"),
        ("vmlinuz-6.8.11", "new"),
        ("early", "first"),
        ("i", "second"),
    ]);
    let found = found(&gpt(&[&vec![0; MIB], &boot]));
    assert_eq!(found.kernel, b"new");
    assert_eq!(found.initrd.as_deref(), Some(&b"first\0\0\0second"[..]));
    assert_eq!(found.cmdline, "root=UUID=2 ro console=ttyS0,115200");
}

#[test]
fn extlinux_and_a_root_that_cannot_be_read() {
    if !ready() {
        return;
    }
    let conf = "DEFAULT lts\nPROMPT 0\nLABEL virt\n LINUX vmlinuz-virt\nLABEL lts\n  MENU LABEL Linux\n  LINUX vmlinuz-lts\n  INITRD initramfs-lts\n  APPEND modules=ext4 quiet\n";
    let boot = file_system(&[
        ("extlinux.conf", conf),
        ("vmlinuz-lts", "kernel"),
        ("initramfs-lts", "ram disk"),
    ]);
    let mut root = vec![0; MIB];
    root[..4].copy_from_slice(b"XFSB");
    let found = found(&mbr(&[&boot, &root]));
    assert_eq!(found.kernel, b"kernel");
    assert_eq!(
        found.cmdline,
        "modules=ext4 quiet root=PARTUUID=1234abcd-02 ro console=ttyS0"
    );
}

#[test]
fn what_is_not_found_is_said() {
    let nothing = |bytes: &[u8]| find_kernel(&disk(bytes), None).unwrap_err().to_string();
    let mut xfs = vec![0; MIB];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut btrfs = vec![0; MIB];
    btrfs[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
    assert_eq!(
        nothing(&mbr(&[&xfs, &btrfs, &vec![0; MIB]])),
        "looked for a kernel inside the disk and found none (partition 1 has xfs, which cannot be read here; \
         partition 2 has btrfs, which cannot be read here; partition 3 has nothing that is known); give one by --kernel"
    );
    assert!(nothing(&vec![0; 512]).contains("(the disk has nothing that is known)"));
    if ready() {
        let empty = file_system(&[("etc/os-release", "")]);
        assert!(nothing(&empty).contains("(the disk has ext4)"));
    }
}

#[test]
fn logical_partitions_and_loops() {
    let mut bytes = mbr(&[&vec![0; MIB]]);
    bytes.resize(8 * MIB, 0);
    let entry =
        |bytes: &mut [u8], sector: usize, index: usize, kind: u8, first: u32, count: u32| {
            let entry = &mut bytes[sector * 512 + 446 + index * 16..][..16];
            entry[4] = kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..16].copy_from_slice(&count.to_le_bytes());
            bytes[sector * 512 + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
        };
    entry(&mut bytes, 0, 1, 5, 4096, 8192);
    entry(&mut bytes, 4096, 0, 0x83, 1, 7);
    entry(&mut bytes, 4096, 1, 5, 100, 50);
    entry(&mut bytes, 4196, 0, 0x83, 1, 9);
    // Back to itself.
    entry(&mut bytes, 4196, 1, 5, 100, 50);
    let all = partitions(&*disk(&bytes)).unwrap();
    let numbers: Vec<u32> = all
        .iter()
        .map(|partition| partition.number)
        .take(4)
        .collect();
    assert_eq!(numbers, [1, 5, 6, 7]);
    assert!(all.len() < 70);
    assert_eq!((all[2].start, all[2].len), (4197 * 512, 9 * 512));
    assert_eq!(all[2].uuid.as_deref(), Some("1234abcd-06"));
}

#[test]
fn a_damaged_gpt_has_a_backup() {
    let mut bytes = gpt(&[&vec![0; MIB]]);
    let whole = partitions(&*disk(&bytes)).unwrap();
    assert_eq!((whole.len(), whole[0].number), (1, 1));
    bytes[512 + 80] = 1;
    assert_eq!(partitions(&*disk(&bytes)).unwrap(), whole);
}

#[test]
fn versions_in_order() {
    let ordered = [
        "",
        "5.10",
        "6.1.0-9",
        "6.1.0-10-amd64",
        "6.1.0-10-cloud",
        "6.2",
        "6.10",
        "6.20000000000000000000000",
    ];
    for pair in ordered.windows(2) {
        assert_eq!(
            compare_versions(pair[0], pair[1]),
            std::cmp::Ordering::Less,
            "{pair:?}"
        );
    }
}

/// Disks with everything on them, to be damaged. Without checksums damage gets further.
fn rich() -> &'static [Vec<u8>; 2] {
    static DISKS: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    DISKS.get_or_init(|| {
        ["metadata_csum", "^metadata_csum"].map(|features| {
            let long = "k".repeat(300_000);
            let root = file_system_with(
                features,
                &[
                    ("vmlinuz", "->boot/vmlinuz-1"),
                    ("boot/vmlinuz-1", &long),
                    ("boot/initrd.img-1", "ram disk"),
                    (
                        "boot/extlinux/extlinux.conf",
                        "label a\nlinux /boot/vmlinuz-1\nappend root=1",
                    ),
                    (
                        "boot/loader/entries/a.conf",
                        "linux /boot/vmlinuz-1\ninitrd /boot/initrd.img-1",
                    ),
                ],
            );
            gpt(&[&root])
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    /// Whatever is damaged on a disk, the search ends with a kernel or a sentence.
    #[test]
    fn damaged_disks_are_searched(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..200),
        cut in prop::option::of(any::<prop::sample::Index>()),
        summed: bool,
    ) {
        if !ready() {
            return Ok(());
        }
        let mut bytes = rich()[usize::from(!summed)].clone();
        for (at, value, where_) in flips {
            // The superblock, the descriptors and the first inodes and directories are what decides.
            let range = match where_ {
                0 => 0..34 * 512,
                1 => MIB + 1024..MIB + 8192,
                2 => MIB..MIB + 300_000,
                _ => 0..bytes.len(),
            };
            let at = range.start + at.index(range.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate((cut.index(bytes.len()) / 512 + 1) * 512);
        }
        if let Err(error) = find_kernel(&disk(&bytes), None) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
