//! The image `debian`: a whole system with systemd and sshd, its console, and its root disk in a run that keeps it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use strata_tests::{Need, Session, Strata, ready, shared};

/// How long one run may take: a boot is ten seconds on a machine that has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(240);

/// Asks everything that tells a healthy system from another one. What it prints has to be what stands beside it.
const QUESTIONS: &str = r#"
    systemctl is-system-running --wait
    systemctl --failed --no-legend --plain
    findmnt --noheadings --output FSTYPE /
    dpkg --audit
    dpkg --verify
    dpkg-query --show --showformat '${Status}\n' | sort -u
    perl -e 'print 6 * 7, "\n"'
    . /etc/os-release && echo "$ID $VERSION_ID"
    test -s /etc/ssl/certs/ca-certificates.crt && ls /etc/ssl/certs | grep -c '\.0$' | sed 's/..*/hashed/'
    passwd --status root | cut -d ' ' -f 1-2
    ls /etc/ssh/ssh_host_* 2>/dev/null
    ssh-keygen -q -t ed25519 -N '' -f /root/key && mkdir -p -m 700 /root/.ssh && cp /root/key.pub /root/.ssh/authorized_keys
    ssh -n -q -i /root/key -o StrictHostKeyChecking=no -o BatchMode=yes root@127.0.0.1 'echo by ssh as $(id -un)'
    cat
    exit 7
"#;

const ANSWERS: &str =
    "running\next4\ninstall ok installed\n42\ndebian 12\nhashed\nroot L\nby ssh as root\ntyped\n";

#[test]
fn debian_is_a_whole_system() {
    if !ready(Need::Debian) {
        return;
    }
    let finished = Strata::new()
        .args(["run", "debian", "--", "sh", "-c", QUESTIONS])
        .stdin("typed\n")
        .timeout(PATIENCE)
        .run()
        .expect(7);
    assert_eq!(finished.text(), ANSWERS, "{}", finished.stderr);
}

#[test]
fn the_console_of_debian_is_a_shell_of_root() {
    if !ready(Need::Debian) {
        return;
    }
    let line = "stty rows 33 cols 111; exec strata run debian --name console";
    let mut session = Session::start(&Strata::shell(&format!("script -qec '{line}' /dev/null")));
    session
        .expect("escape")
        .expect("root@console:~# ")
        .send("echo I am $(id -u) on $(tty), $(stty size)\n")
        .expect("I am 0 on /dev/hvc0, 33 111")
        .expect("# ")
        .send("poweroff\n");
    let (status, output) = session.finish();
    assert_eq!(status.code(), Some(0), "{output}");
}

/// A copy of the root disk and what boots it.
struct Own {
    _directory: tempfile::TempDir,
    disk: PathBuf,
    arguments: Vec<String>,
}

impl Own {
    fn copy() -> Own {
        let place = shared();
        let manifest = place.manifest("debian");
        let directory = place.scratch();
        let disk = directory.path().join("root.raw");
        let copied = Command::new("cp")
            .arg("--sparse=always")
            .args([&place.blob(&manifest, "disk"), &disk])
            .status();
        assert!(copied.is_ok_and(|status| status.success()));
        let mut permissions = fs::metadata(&disk).expect("it is there").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        fs::set_permissions(&disk, permissions).expect("it is ours");
        place.give(&disk);
        let seen = |path: &Path| place.seen(path).display().to_string();
        let command_line = manifest["command_line"].as_str().expect("it has one");
        let arguments = [
            "run",
            "--memory",
            "1G",
            "--kernel",
            &seen(&place.blob(&manifest, "kernel")),
            "--initrd",
            &seen(&place.blob(&manifest, "initrd")),
            "--append",
            &format!("{command_line} strata.agent=1 panic=-1"),
            "--disk",
            &format!("{},format=raw", seen(&disk)),
            "--",
        ];
        Own {
            _directory: directory,
            disk,
            arguments: arguments.map(str::to_owned).into(),
        }
    }

    fn run(&self, script: &str) -> Strata {
        Strata::new()
            .args(self.arguments.clone())
            .args(["sh", "-c", script])
            .timeout(PATIENCE)
    }

    /// Fails the test unless the file system is clean and whole.
    #[track_caller]
    fn check(&self) {
        let output = Command::new("/sbin/e2fsck")
            .args(["-f", "-n"])
            .arg(&self.disk)
            .output()
            .expect("e2fsck runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(!text.contains("journal"), "it was not unmounted: {text}");
    }
}

#[test]
fn a_root_disk_outlives_its_machines() {
    if !ready(Need::Debian) {
        return;
    }
    let own = Own::copy();
    // A machine that ends in order, right after the write.
    own.run("echo kept > /root/kept").run().expect(0);
    own.check();

    // One that is killed while it writes.
    let writing = "cd /root; while :; do for i in 1 2 3 4 5 6 7 8; do mkdir -p d$i; cp -r /etc d$i/$$; \
        cat /usr/bin/perl > d$i/file; done; sync -d d8/file; rm -r d1 d2 d3; echo round; done";
    let mut session = Session::start(&own.run(writing));
    session.expect("round").expect("round").signal("KILL");
    drop(session);

    // The next one replays the journal.
    let look = "cat /root/kept; dmesg | grep -c 'EXT4-fs.*recovery complete'; dmesg | grep -i 'ext4.*error'; \
        cmp /usr/bin/perl /root/d8/file && echo whole";
    let mut finished = own.run(look).run();
    // The machine has a process of its own, which ends when it sees the other one gone.
    for _ in 0..20 {
        if !finished.stderr.contains("in use by another machine") {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
        finished = own.run(look).run();
    }
    let finished = finished.expect(0);
    assert_eq!(finished.text(), "kept\n1\nwhole\n", "{}", finished.stderr);
    own.check();
}

#[test]
fn orders_that_cannot_be_filled_are_refused_in_a_sentence() {
    if !ready(Need::Program) {
        return;
    }
    let build = |words: &str| {
        let arguments = words.split(' ');
        Strata::new().args(["image", "build"]).args(arguments).run()
    };
    build("mine --from debian --package no.Such")
        .expect_error(64, &["'no.Such' is not a package name"]);
    build("mine --from debian --package=-y").expect_error(64, &["'-y' is not a package name"]);
    build("mine --from debian --size 100M").expect_error(64, &["at least 1024 MiB"]);
    build("mine --from debian --mirror ftp://x")
        .expect_error(64, &["'ftp://x' is not the address of a mirror"]);
    build("mine --from debain").expect_error(66, &["did you mean 'debian'?"]);
    build("mine --from tiny --package gcc").expect_error(64, &["has no root disk", "--package"]);
    build("tiny --from debian").expect_error(64, &["'tiny' is the name of an image of its own"]);
    build("Mine --from debian").expect_error(64, &["'Mine' is not an image name"]);
    build("mine --from debian --ssh-key /dev/null").expect_error(65, &["is not a public key"]);
    build("debian --size 9G").expect_error(64, &["--from"]);
}
