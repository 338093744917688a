//! The image `debian`: a whole system with systemd and sshd, its console, and its root disk in a run that keeps it.

use std::time::Duration;

use strata_tests::{Need, RootDisk, Session, Strata, ready};

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
    ip route | grep -c ^default
    resolvectl dns | grep -c " $(ip route show default | cut -d ' ' -f 3)"
    tail /dev/zero 2>/dev/null; echo "out of memory: $?"
    cat
    exit 7
"#;

const ANSWERS: &str = "running\next4\ninstall ok installed\n42\ndebian 12\nhashed\nroot L\nby ssh as root\n1\n1\nout of memory: 137\ntyped\n";

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

#[test]
fn a_root_disk_outlives_its_machines() {
    if !ready(Need::Debian) {
        return;
    }
    let disk = RootDisk::copy("debian");
    let run = |script: &str| disk.machine(1, script).timeout(PATIENCE).run().expect(0);
    // A machine that ends in order, right after the write.
    run("echo kept > /root/kept");
    assert_eq!(disk.problem(), None);

    // One that is killed while it writes; the next one replays the journal.
    disk.kill(1);
    let finished = run(&format!("cat /root/kept; {}", RootDisk::LOOK));
    let expected = format!("kept\n{}", RootDisk::FOUND);
    assert_eq!(finished.text(), expected, "{}", finished.stderr);
    assert_eq!(disk.problem(), None);
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
    build("mine --from tiny --size 2G").expect_error(64, &["has no root disk", "--size"]);
    build("tiny --from debian").expect_error(64, &["'tiny' is the name of an image of its own"]);
    build("Mine --from debian").expect_error(64, &["'Mine' is not an image name"]);
    build("mine --from debian --ssh-key /dev/null").expect_error(65, &["is not a public key"]);
    build("debian --size 9G").expect_error(64, &["--from"]);
}
