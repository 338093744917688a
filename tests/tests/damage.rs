//! Damaged kernels, RAM disks and disks: a clear error or a guest that fails by itself, never a panic of ours, and no file changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use strata_tests::{Need, Strata, random_bytes, ready, sha256, shared};

/// How long a guest with a damaged kernel may run before it is stopped: that it runs at all is no fault of ours.
const GLANCE: Duration = Duration::from_secs(4);

/// Starts `kernel`; checks that no panic of ours and no change of the file comes from it. Returns the exit status, if it ended by itself.
fn start(kernel: &Path, initrd: Option<&Path>) -> Option<(i32, String)> {
    let place = shared();
    let before = sha256(&fs::read(kernel).expect("the kernel is ours"));
    let mut arguments: Vec<PathBuf> = [
        "run",
        "--memory",
        "128M",
        "--on-reboot",
        "exit",
        "--append",
        "console=ttyS0 panic=-1",
        "--kernel",
    ]
    .map(PathBuf::from)
    .into();
    arguments.push(place.seen(kernel));
    if let Some(initrd) = initrd {
        arguments.extend([PathBuf::from("--initrd"), place.seen(initrd)]);
    }
    let run = Strata::new().args(arguments).timeout(GLANCE).run_to_end();
    assert_eq!(
        sha256(&fs::read(kernel).expect("the kernel is still there")),
        before,
        "the kernel's file was changed"
    );
    match run {
        Ok(run) => {
            run.expect_no_panic();
            Some((run.code()?, run.stderr))
        }
        Err(stopped) => {
            assert!(!stopped.contains("panicked at"), "{stopped}");
            None
        }
    }
}

struct Files {
    directory: tempfile::TempDir,
    kernel: Vec<u8>,
}

impl Files {
    fn new() -> Files {
        let (kernel, _) = shared().tiny_files_here();
        Files {
            directory: shared().scratch(),
            kernel: fs::read(kernel).expect("the kernel is in the cache"),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes).expect("the scratch directory is ours");
        shared().give(&path);
        path
    }
}

#[test]
fn truncated_kernels_are_refused() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    for length in [
        0,
        1,
        511,
        0x1f1,
        0x202,
        0x260,
        1024,
        4096,
        64 << 10,
        files.kernel.len() / 2,
        files.kernel.len() - (64 << 10),
    ] {
        let kernel = files.write("kernel", &files.kernel[..length]);
        let ended = start(&kernel, None);
        assert!(
            ended
                .as_ref()
                .is_some_and(|(code, error)| *code != 0 && !error.trim().is_empty()),
            "{length} bytes: {ended:?}"
        );
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    let with = |start: &[u8]| [start, &random_bytes(1 << 20, 11)].concat();
    for bytes in [
        random_bytes(1 << 20, 13),
        vec![0; 1 << 20],
        with(b"\x7fELF\x02\x01\x01"),
        with(b"\x7fELF"),
        with(&[0x02, 0xb0, 0xad, 0x1b]),
    ] {
        let ended = start(&files.write("kernel", &bytes), None);
        assert!(
            ended
                .as_ref()
                .is_some_and(|(code, error)| *code != 0 && !error.trim().is_empty()),
            "{ended:?}"
        );
    }
}

#[test]
fn kernels_with_flipped_bits_never_make_us_panic() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    // The fields of the boot protocol's header that a loader acts on, one bit each.
    for (at, bit) in [
        (0x1f1, 3),
        (0x1f4, 7),
        (0x1f7, 6),
        (0x1fe, 0),
        (0x202, 2),
        (0x207, 5),
        (0x211, 0),
        (0x230, 4),
        (0x234, 0),
        (0x236, 0),
        (0x25b, 7),
        (0x263, 7),
    ] {
        let mut bytes = files.kernel.clone();
        bytes[at] ^= 1 << bit;
        start(&files.write("kernel", &bytes), None);
    }
}

#[test]
fn damaged_ram_disks_are_the_guests_affair() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    let kernel = files.write("kernel", &files.kernel);
    for bytes in [Vec::new(), vec![0x07], random_bytes(100_000, 17)] {
        let initrd = files.write("initrd", &bytes);
        start(&kernel, Some(&initrd));
        assert_eq!(fs::read(&initrd).expect("it is still there"), bytes);
    }
}

#[test]
fn a_read_only_disk_is_read_and_not_changed() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    let bytes = random_bytes(4 << 20, 19);
    let disk = files.write("disk", &bytes);
    let seen = shared().seen(&disk);
    let script = "dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null; sha256sum < /dev/vda";
    let disk_argument = format!("{},ro,format=raw", seen.display());
    let run = Strata::new()
        .args([
            "run",
            "tiny",
            "--disk",
            &disk_argument,
            "--",
            "sh",
            "-c",
            script,
        ])
        .run()
        .expect(0);
    assert_eq!(
        run.text().split_whitespace().next(),
        Some(sha256(&bytes).as_str())
    );
    assert_eq!(
        sha256(&fs::read(&disk).expect("it is still there")),
        sha256(&bytes)
    );
}

#[test]
fn what_a_guest_writes_to_a_disk_is_in_its_file() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    let disk = files.write("disk", &vec![0; 4 << 20]);
    let bytes = random_bytes(4 << 20, 29);
    let argument = shared().seen(&disk).display().to_string();
    Strata::new()
        .args([
            "run",
            "tiny",
            "--disk",
            &argument,
            "--",
            "sh",
            "-c",
            "cat > /dev/vda && sync",
        ])
        .stdin(bytes.clone())
        .run()
        .expect(0);
    assert_eq!(
        sha256(&fs::read(&disk).expect("it is still there")),
        sha256(&bytes)
    );
}

#[test]
fn no_run_writes_to_an_image() {
    if !ready(Need::Machine) {
        return;
    }
    let (kernel, initrd) = shared().tiny_files_here();
    let digests =
        || [&kernel, &initrd].map(|path| sha256(&fs::read(path).expect("it is in the cache")));
    let before = digests();
    Strata::tiny([
        "sh",
        "-c",
        "echo changed > /etc/changed; rm -rf /bin/* /lib/*; sync",
    ])
    .run()
    .expect(0);
    assert_eq!(digests(), before);
    Strata::tiny(["test", "!", "-e", "/etc/changed"])
        .run()
        .expect(0);
}

#[test]
fn disks_of_odd_sizes_are_taken_or_refused() {
    if !ready(Need::Machine) {
        return;
    }
    let files = Files::new();
    for length in [0, 1, 511, 513, 4096 + 7] {
        let disk = files.write("disk", &random_bytes(length, 23));
        let disk_argument = format!("{},ro", shared().seen(&disk).display());
        let run = Strata::new()
            .args(["run", "tiny", "--disk", &disk_argument, "--", "true"])
            .run();
        run.expect_no_panic();
        assert!(
            run.code() == Some(0) || !run.stderr.trim().is_empty(),
            "{length} bytes: {}",
            run.stderr
        );
    }
}
