//! Disk images as users bring them: qcow2 is read, written and kept valid, and a kernel inside a disk is found.

use std::fs;

use strata_tests::{Need, Strata, given, random_bytes, ready, sha256, shared, tool, workshop};
use tempfile::TempDir;

#[test]
fn what_a_guest_writes_to_a_qcow2_disk_is_what_others_read() {
    let Some(directory) = workshop(&["qemu-img"]) else {
        return;
    };
    let create = ["create", "-q", "-f", "qcow2", "disk", "16M"];
    tool(directory.path(), "qemu-img", &create, "");
    let (path, seen) = given(&directory, "disk");
    let bytes = random_bytes(3 << 20, 31);
    let with_disk = |command: &str| {
        let disk = format!("{seen},format=qcow2");
        Strata::new().args([
            "run", "tiny", "--cpus", "2", "--disk", &disk, "--", "sh", "-c", command,
        ])
    };
    with_disk("until [ -b /dev/vda ]; do sleep 0.1; done; dd of=/dev/vda bs=64k seek=16 2>/dev/null && sync && ls -d /sys/block/vda/mq/1")
        .stdin(bytes.clone())
        .run()
        .expect(0);
    tool(directory.path(), "qemu-img", &["check", "-q", "disk"], "");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "disk", "raw"];
    tool(directory.path(), "qemu-img", &convert, "");
    let raw = fs::read(directory.path().join("raw")).expect("it was converted");
    let mut expected = vec![0; 16 << 20];
    expected[1 << 20..4 << 20].copy_from_slice(&bytes);
    assert_eq!(sha256(&raw), sha256(&expected));
    // Space that a guest gives back leaves the file.
    let full = fs::metadata(&path).expect("it is there");
    with_disk("until [ -b /dev/vda ]; do sleep 0.1; done; blkdiscard /dev/vda")
        .run()
        .expect(0);
    tool(directory.path(), "qemu-img", &["check", "-q", "disk"], "");
    let blocks = |data: &fs::Metadata| std::os::unix::fs::MetadataExt::blocks(data) * 512;
    let empty = fs::metadata(&path).expect("it is there");
    assert!(blocks(&empty) + (2 << 20) < blocks(&full));
    // Without a format it is not taken for what it looks like.
    Strata::new()
        .args(["run", "tiny", "--disk", &seen, "--", "true"])
        .run()
        .expect_error(125, &["say format=qcow2, or format=raw"]);
}

/// A disk with a partition that holds the kernel and RAM disk of `tiny` where Debian has them, raw and as qcow2.
fn bootable(directory: &TempDir) {
    let (kernel, initrd) = shared().tiny_files_here();
    let boot = directory.path().join("root/boot");
    fs::create_dir_all(&boot).expect("a directory can be made");
    fs::copy(kernel, boot.join("vmlinuz-6.1.0-1")).expect("the kernel is readable");
    fs::copy(initrd, boot.join("initrd.img-6.1.0-1")).expect("the RAM disk is readable");
    std::os::unix::fs::symlink("boot/vmlinuz-6.1.0-1", boot.join("../vmlinuz")).expect("it is new");
    let run = |program: &str, arguments: &[&str], input: &str| {
        tool(directory.path(), program, arguments, input);
    };
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", "root", "part", "48M"],
        "",
    );
    run("truncate", &["-s", "64M", "disk"], "");
    run(
        "sfdisk",
        &["-q", "disk"],
        "label: gpt\nstart=2048, size=98304, type=linux\n",
    );
    run(
        "dd",
        &["if=part", "of=disk", "bs=1M", "seek=1", "conv=notrunc"],
        "",
    );
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", "disk", "disk.qcow2"],
        "",
    );
}

#[test]
fn a_kernel_inside_a_disk_is_found_and_boots() {
    let tools = ["qemu-img", "mke2fs", "sfdisk"];
    let Some(directory) = workshop(&tools) else {
        return;
    };
    bootable(&directory);
    for (name, format) in [("disk.qcow2", "qcow2"), ("disk", "raw")] {
        let (path, seen) = given(&directory, name);
        let before = sha256(&fs::read(&path).expect("it is there"));
        let disk = format!("{seen},ro,format={format}");
        // This init is in a RAM disk: it needs no root from the disk.
        let append = "strata.agent=1 root= panic=-1";
        let finished = Strata::new()
            .args([
                "run",
                "--disk",
                &disk,
                "--append",
                append,
                "--",
                "cat",
                "/proc/cmdline",
            ])
            .run();
        let line = String::from_utf8_lossy(&finished.stdout).into_owned();
        finished.expect(0);
        assert!(
            line.starts_with("console=ttyS0") || line.contains(" ro console=ttyS0 "),
            "{line}"
        );
        assert!(line.trim_end().ends_with(append), "{line}");
        assert_eq!(sha256(&fs::read(&path).expect("it is there")), before);
    }
}

#[test]
fn a_disk_without_a_kernel_is_refused_in_a_sentence() {
    if !ready(Need::Program) {
        return;
    }
    let directory = shared().scratch();
    fs::write(directory.path().join("disk"), random_bytes(1 << 20, 5)).expect("there is room");
    let (_, seen) = given(&directory, "disk");
    Strata::new()
        .args(["run", "--disk", &format!("{seen},ro")])
        .run()
        .expect_error(65, &["looked for a kernel inside the disk and found none"]);
}
