//! The root disk of an image as a disk of one's own: what machines write to it stays, and a file system check sees it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use strata_disk::{Access, RawFile};

use crate::{Session, Strata, shared};

/// How long the process of a killed machine may take to see that it is alone.
const LINGERS: Duration = Duration::from_secs(60);

/// A copy of an image's root disk, and what boots it.
pub struct RootDisk {
    _directory: tempfile::TempDir,
    disk: PathBuf,
    kernel: String,
    initrd: String,
    command_line: String,
}

impl RootDisk {
    /// A script that writes and says `round` again and again.
    pub const WRITING: &str = "cd /root; while :; do for i in 1 2 3 4 5 6 7 8; do mkdir -p d$i; cp -r /etc d$i/$$; \
        cat /usr/bin/perl > d$i/file; done; sync -d d8/file; rm -r d1 d2 d3; echo round; done";
    /// A script for the machine after the one that was killed in [`RootDisk::WRITING`], which prints [`RootDisk::FOUND`].
    pub const LOOK: &str = "dmesg | grep -c 'EXT4-fs.*recovery complete'; dmesg | grep -i 'ext4.*error'; \
        cmp /usr/bin/perl /root/d8/file && echo whole";
    /// The journal was replayed, nothing was wrong, and what had been flushed is there.
    pub const FOUND: &str = "1\nwhole\n";

    /// A fresh copy of the disk of `image`, which has to be built.
    pub fn copy(image: &str) -> RootDisk {
        let place = shared();
        let manifest = place.manifest(image);
        let directory = place.scratch();
        let disk = directory.path().join("root.raw");
        let copied = Command::new("cp")
            .arg("--sparse=always")
            .args([&place.blob(&manifest, "disk"), &disk])
            .status();
        assert!(copied.is_ok_and(|status| status.success()));
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).expect("it is ours");
        place.give(&disk);
        let seen = |path: &Path| place.seen(path).display().to_string();
        RootDisk {
            kernel: seen(&place.blob(&manifest, "kernel")),
            initrd: seen(&place.blob(&manifest, "initrd")),
            command_line: manifest["command_line"]
                .as_str()
                .expect("it has one")
                .to_owned(),
            _directory: directory,
            disk,
        }
    }

    /// A machine with this disk and `cpus` CPUs that runs `script`, then powers off.
    pub fn machine(&self, cpus: u32, script: &str) -> Strata {
        let disk = shared().seen(&self.disk).display().to_string();
        Strata::new().args([
            "run",
            "--memory",
            "2G",
            "--cpus",
            &cpus.to_string(),
            "--kernel",
            &self.kernel,
            "--initrd",
            &self.initrd,
            "--append",
            &format!("{} strata.agent=1 panic=-1", self.command_line),
            "--disk",
            &format!("{disk},format=raw"),
            "--",
            "sh",
            "-c",
            script,
        ])
    }

    /// Runs [`RootDisk::WRITING`] and kills the machine in it.
    #[track_caller]
    pub fn kill(&self, cpus: u32) {
        self.wait();
        let mut session = Session::start(&self.machine(cpus, RootDisk::WRITING));
        session.expect("round").expect("round").signal("KILL");
        drop(session);
        self.wait();
    }

    /// Waits until no machine has it: each has a process of its own, which ends when it sees the one in front gone.
    fn wait(&self) {
        let free = || RawFile::open(&self.disk, Access::ReadOnly).is_ok();
        let step = Duration::from_millis(100);
        let mut waited = Duration::ZERO;
        while !free() && waited < LINGERS {
            thread::sleep(step);
            waited += step;
        }
    }

    /// What is wrong with the file system, `None` if it is clean and whole.
    pub fn problem(&self) -> Option<String> {
        self.wait();
        let output = Command::new("e2fsck")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(["-f", "-n"])
            .arg(&self.disk)
            .output()
            .expect("e2fsck runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // It exits with 0 also where it would replay a journal, had it not been told to change nothing.
        let clean = output.status.success() && !text.contains("journal");
        (!clean).then_some(text)
    }
}
