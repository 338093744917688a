//! Disks laid out as other distributions lay theirs boot from inside, down to their own first program: a boot partition
//! of its own, and what tells the kernel in the manner of Fedora, Alpine and Ubuntu. Kernel and RAM disk are `tiny`'s.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use strata_tests::{Strata, given, shared, tool, workshop};
use tempfile::TempDir;

/// The UUID of the root file system.
const ROOT: &str = "6f1c0f36-2c5c-4d3a-9a57-3d0c1e7b5a10";
/// The first program of the system.
const INIT: &str = "#!/bin/busybox sh\n. /etc/os-release\n\
    echo \"the userland of $ID on $(/bin/busybox grep -c ' / ext4 ro' /proc/mounts) disk\"\n\
    echo \"told: $(/bin/busybox cat /proc/cmdline)\"\n/bin/busybox poweroff -f\n";
/// A file where a kernel could be, which does not boot.
const NOT_A_KERNEL: &str = "not a kernel";
/// Sizes of the partitions in MiB.
const BOOT_MIB: u32 = 40;
const ROOT_MIB: u32 = 16;

/// Which partition begins at which MiB.
struct Plan {
    /// What `sfdisk` is told.
    table: String,
    boot_at: u32,
    root_at: u32,
}

/// A system in the making: the files of its boot partition and of its root.
struct System {
    directory: TempDir,
}

impl System {
    /// A root file system with nothing but a first program; `None`, and a note, if tools are missing.
    fn new(id: &str) -> Option<System> {
        let directory = workshop(&["mke2fs", "sfdisk", "truncate", "dd"])?;
        let system = System { directory };
        let busybox = Strata::tiny(["cat", "/bin/busybox"]).run().expect(0);
        for empty in ["boot", "dev", "proc", "run", "sys"] {
            fs::create_dir_all(system.path("root").join(empty)).expect("it is ours");
        }
        system.put("root/bin/busybox", busybox.stdout);
        system.put("root/sbin/init", INIT);
        system.put("root/etc/os-release", format!("ID={id}\n"));
        for program in ["root/bin/busybox", "root/sbin/init"] {
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(system.path(program), mode).expect("it is ours");
        }
        Some(system)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn put(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it has one")).expect("it is ours");
        fs::write(path, contents).expect("it is ours");
    }

    /// Puts a kernel that boots, and its RAM disk, onto the boot partition.
    fn put_kernel(&self, kernel: &str, initrd: &str) {
        let (from_kernel, from_initrd) = shared().tiny_files_here();
        for (from, name) in [(from_kernel, kernel), (from_initrd, initrd)] {
            self.put(name, fs::read(from).expect("the image is readable"));
        }
    }

    /// Makes the disk, boots it, and returns the kernel's command line as the system saw it.
    fn boot(&self, id: &str, plan: &Plan) -> String {
        let run = |program: &str, arguments: &[&str], input: &str| {
            tool(self.directory.path(), program, arguments, input);
        };
        run("truncate", &["-s", "80M", "disk"], "");
        run("sfdisk", &["-q", "disk"], &plan.table);
        for (name, uuid, size, at) in [
            ("boot", "random", BOOT_MIB, plan.boot_at),
            ("root", ROOT, ROOT_MIB, plan.root_at),
        ] {
            let part = format!("{name}.part");
            let size = format!("{size}M");
            let make = ["-q", "-t", "ext4", "-U", uuid, "-d", name, &part, &size];
            run("mke2fs", &make, "");
            let (part, at) = (format!("if={part}"), format!("seek={at}"));
            let copy = [
                &part,
                "of=disk",
                "bs=1M",
                &at,
                "conv=notrunc",
                "status=none",
            ];
            run("dd", &copy, "");
        }
        let (_, seen) = given(&self.directory, "disk");
        let finished = Strata::new()
            .args(["run", "--disk", &format!("{seen},ro,format=raw")])
            .run()
            .expect(0);
        let text = finished.text();
        let expected = format!("the userland of {id} on 1 disk");
        assert!(text.contains(&expected), "{text}{}", finished.stderr);
        let told = text.lines().find_map(|line| line.strip_prefix("told: "));
        told.expect("it says what it was told").trim().to_owned()
    }
}

fn link(target: &str, path: &Path) {
    symlink(target, path).expect("it is new");
}

/// GPT with an EFI partition, ext4 for `/boot`, entries of the Boot Loader Specification with GRUB's variables in them.
#[test]
fn a_disk_laid_out_like_fedoras_boots() {
    let Some(system) = System::new("fedora") else {
        return;
    };
    let (old, new) = ("6.9.7-200.fc40.x86_64", "6.10.11-200.fc40.x86_64");
    let machine = "0f4c8d6f2a0e4e0b8f6f4f3f5f0e2a61";
    for version in [old, new] {
        let entry = format!(
            "title Fedora Linux ({version}) 40 (Cloud Edition)\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img $tuned_initrd\noptions root=UUID={ROOT} ro no_timer_check $tuned_params\n\
             grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n"
        );
        system.put(
            &format!("boot/loader/entries/{machine}-{version}.conf"),
            entry,
        );
    }
    let rescue = format!(
        "title Fedora Linux (0-rescue)\nversion 9-rescue\nlinux /vmlinuz-0-rescue-{machine}\n"
    );
    system.put(
        &format!("boot/loader/entries/{machine}-0-rescue.conf"),
        rescue,
    );
    system.put(&format!("boot/vmlinuz-0-rescue-{machine}"), NOT_A_KERNEL);
    system.put(&format!("boot/vmlinuz-{old}"), NOT_A_KERNEL);
    system.put(&format!("boot/initramfs-{old}.img"), NOT_A_KERNEL);
    system.put_kernel(
        &format!("boot/vmlinuz-{new}"),
        &format!("boot/initramfs-{new}.img"),
    );
    let told = system.boot(
        "fedora",
        &Plan {
            table:
                "label: gpt\nstart=1MiB, size=2MiB, type=uefi\nstart=3MiB, size=40MiB, type=linux\n\
                    start=43MiB, size=16MiB, type=linux\n"
                    .to_owned(),
            boot_at: 3,
            root_at: 43,
        },
    );
    assert_eq!(
        told,
        format!("root=UUID={ROOT} ro no_timer_check console=ttyS0")
    );
}

/// MBR, ext4 for `/boot` with an `extlinux.conf` at its top, swap space, root.
#[test]
fn a_disk_laid_out_like_alpines_boots() {
    let Some(system) = System::new("alpine") else {
        return;
    };
    let label = |name: &str, mark: &str| {
        format!(
            "LABEL {name}\n{mark}  MENU LABEL Linux {name}\n  LINUX vmlinuz-{name}\n  INITRD initramfs-{name}\n  \
             FDTDIR dtbs-{name}\n  APPEND root=UUID={ROOT} modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext4\n"
        )
    };
    let menu = format!(
        "# Generated by update-extlinux 6.04_pre1-r15\nDEFAULT menu.c32\nPROMPT 0\nMENU TITLE Alpine/Linux Boot Menu\n\
         MENU HIDDEN\nMENU AUTOBOOT Alpine will be booted automatically in # seconds.\nTIMEOUT 10\n{}{}MENU SEPARATOR\n",
        label("edge", ""),
        label("lts", "  MENU DEFAULT\n"),
    );
    system.put("boot/extlinux.conf", menu);
    system.put("boot/vmlinuz-edge", NOT_A_KERNEL);
    system.put("boot/initramfs-edge", NOT_A_KERNEL);
    system.put_kernel("boot/vmlinuz-lts", "boot/initramfs-lts");
    link(".", &system.path("boot/boot"));
    let told = system.boot(
        "alpine",
        &Plan {
            table: "label: dos\nstart=1MiB, size=40MiB, type=83, bootable\nstart=41MiB, size=4MiB, type=82\n\
                    start=45MiB, size=16MiB, type=83\n"
                .to_owned(),
            boot_at: 1,
            root_at: 45,
        },
    );
    let options = "modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext4";
    assert_eq!(told, format!("root=UUID={ROOT} {options} console=ttyS0"));
}

/// GPT with the root first and `/boot` as partition 16, as on a cloud image; nothing but a `grub.cfg`.
#[test]
fn a_disk_laid_out_like_ubuntus_boots() {
    let Some(system) = System::new("ubuntu") else {
        return;
    };
    let (old, new) = ("6.8.0-9-generic", "6.8.0-31-generic");
    system.put(
        "boot/grub/grub.cfg",
        "menuentry 'Ubuntu' { linux /vmlinuz }\n",
    );
    system.put(&format!("boot/vmlinuz-{old}"), NOT_A_KERNEL);
    system.put_kernel(
        &format!("boot/vmlinuz-{new}"),
        &format!("boot/initrd.img-{new}"),
    );
    let links = [
        ("vmlinuz", format!("vmlinuz-{new}")),
        ("vmlinuz.old", format!("vmlinuz-{old}")),
        ("initrd.img", format!("initrd.img-{new}")),
    ];
    for (name, target) in links {
        link(&target, &system.path("boot").join(name));
    }
    let told = system.boot(
        "ubuntu",
        &Plan {
            table: "label: gpt\n1 : start=43MiB, size=16MiB, type=linux\n14 : start=1MiB, size=1MiB, \
                    type=21686148-6449-6E6F-744E-656564454649\n15 : start=2MiB, size=1MiB, type=uefi\n\
                    16 : start=3MiB, size=40MiB, type=linux\n"
                .to_owned(),
            boot_at: 3,
            root_at: 43,
        },
    );
    assert_eq!(told, format!("root=UUID={ROOT} ro console=ttyS0"));
}
