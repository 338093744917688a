//! Images go back and forth between QEMU's tools and us: both read what the other wrote, and the tools find no fault.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use strata_disk::{Access, DiskBackend, DiskError, DiskFormat, Source, open};
use tempfile::TempDir;

const SIZE: u64 = 3 << 20;

/// A directory to work in; none, and a note of that, where QEMU's tools are missing.
fn workshop() -> Option<TempDir> {
    let there = |tool: &str| {
        Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
    };
    if there("qemu-img").is_ok() && there("qemu-io").is_ok() {
        return Some(tempfile::tempdir().unwrap());
    }
    let reason = "qemu-img and qemu-io are missing (Debian package qemu-utils)";
    let thread = thread::current();
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
    None
}

fn tool(directory: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text.into_owned()
}

fn image(directory: &TempDir, name: &str, options: &str) -> PathBuf {
    let size = SIZE.to_string();
    let create = ["create", "-q", "-f", "qcow2", "-o", options, name, &size];
    tool(directory.path(), "qemu-img", &create);
    directory.path().join(name)
}

fn opened(
    path: &Path,
    access: Access,
    backing: &[PathBuf],
) -> Result<Arc<dyn DiskBackend>, DiskError> {
    open(&Source {
        path,
        format: Some(DiskFormat::Qcow2),
        access,
        backing,
        data: None,
    })
}

/// The content as QEMU's tools see it; before, they check the image.
fn as_qemu_sees(directory: &TempDir, name: &str) -> Vec<u8> {
    let checked = tool(
        directory.path(),
        "qemu-img",
        &["check", "-f", "qcow2", name],
    );
    assert!(checked.contains("No errors were found"), "{checked}");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", name, "seen.raw"];
    tool(directory.path(), "qemu-img", &convert);
    fs::read(directory.path().join("seen.raw")).unwrap()
}

fn as_we_see(disk: &dyn DiskBackend) -> Vec<u8> {
    let mut all = vec![1; disk.size() as usize];
    disk.read_at(0, &mut all).unwrap();
    all
}

fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 3
}

/// Random changes to a disk and to the array of bytes that it should equal.
fn change(disk: &dyn DiskBackend, model: &mut [u8], state: &mut u64, count: u32) {
    for _ in 0..count {
        let at = xorshift(state) % SIZE;
        let scale = [700, 20_000, 300_000][(xorshift(state) % 3) as usize];
        let len = (xorshift(state) % scale).min(SIZE - at);
        let old = &mut model[at as usize..(at + len) as usize];
        match xorshift(state) % 8 {
            0 => {
                disk.write_zeroes(at, len, true).unwrap();
                old.fill(0);
            }
            1 => {
                disk.write_zeroes(at, len, false).unwrap();
                old.fill(0);
            }
            2 => {
                disk.discard(at, len).unwrap();
                disk.read_at(at, old).unwrap();
            }
            3 => disk.flush().unwrap(),
            _ => {
                let fill = xorshift(state) as u8;
                old.iter_mut()
                    .enumerate()
                    .for_each(|(i, byte)| *byte = fill ^ (i >> 9) as u8);
                disk.write_at(at, old).unwrap();
            }
        }
    }
}

#[test]
fn images_of_every_kind() {
    let Some(directory) = workshop() else { return };
    let kinds = [
        "compat=1.1",
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=2M,refcount_bits=8",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=8k",
        "compression_type=zstd",
    ];
    let mut state = 42;
    for kind in kinds {
        println!("{kind}");
        let path = image(&directory, "disk", kind);
        let mut model = vec![0; SIZE as usize];
        let disk = opened(&path, Access::ReadWrite, &[]).unwrap();
        assert_eq!(disk.size(), SIZE);
        change(&*disk, &mut model, &mut state, 60);
        drop(disk);
        assert!(as_qemu_sees(&directory, "disk") == model, "{kind}");
        let writes = "write -q -P 7 100k 300k; discard 1M 64k; write -q -z -u 2M 128k; write -q -P 9 2050k 512";
        let commands: Vec<&str> = writes.split("; ").flat_map(|write| ["-c", write]).collect();
        let arguments = [&["-f", "qcow2"], &commands[..], &["disk"]].concat();
        tool(directory.path(), "qemu-io", &arguments);
        let mut model = as_qemu_sees(&directory, "disk");
        let disk = opened(&path, Access::ReadWrite, &[]).unwrap();
        assert!(as_we_see(&*disk) == model, "{kind}");
        change(&*disk, &mut model, &mut state, 30);
        drop(disk);
        assert!(as_qemu_sees(&directory, "disk") == model, "{kind}");
    }
}

#[test]
fn compressed_images() {
    let Some(directory) = workshop() else { return };
    let mut content: Vec<u8> = (0..SIZE).map(|i| (i / 777) as u8 ^ (i % 5) as u8).collect();
    content[1 << 20..2 << 20].fill(0);
    fs::write(directory.path().join("raw"), &content).unwrap();
    let mut state = 5;
    for method in ["zlib", "zstd"] {
        for cluster in ["64k", "4k", "2M"] {
            let options = format!("compression_type={method},cluster_size={cluster}");
            let convert = [
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "raw", "disk",
            ];
            tool(directory.path(), "qemu-img", &convert);
            let path = directory.path().join("disk");
            let disk = opened(&path, Access::ReadWrite, &[]).unwrap();
            assert!(as_we_see(&*disk) == content, "{options}");
            let mut model = content.clone();
            change(&*disk, &mut model, &mut state, 20);
            drop(disk);
            assert!(as_qemu_sees(&directory, "disk") == model, "{options}");
        }
    }
}

#[test]
fn snapshots_inside_an_image_stay() {
    let Some(directory) = workshop() else { return };
    let mut state = 11;
    for kind in ["cluster_size=64k", "cluster_size=4k,refcount_bits=4"] {
        let path = image(&directory, "disk", kind);
        let mut model = vec![0; SIZE as usize];
        let mut kept = Vec::new();
        for name in ["one", "two"] {
            let disk = opened(&path, Access::ReadWrite, &[]).unwrap();
            change(&*disk, &mut model, &mut state, 25);
            drop(disk);
            tool(
                directory.path(),
                "qemu-img",
                &["snapshot", "-q", "-c", name, "disk"],
            );
            kept.push((name, model.clone()));
        }
        let disk = opened(&path, Access::ReadWrite, &[]).unwrap();
        change(&*disk, &mut model, &mut state, 40);
        drop(disk);
        assert!(as_qemu_sees(&directory, "disk") == model, "{kind}");
        for (name, content) in kept {
            tool(
                directory.path(),
                "qemu-img",
                &["snapshot", "-q", "-a", name, "disk"],
            );
            assert!(as_qemu_sees(&directory, "disk") == content, "{kind} {name}");
            tool(
                directory.path(),
                "qemu-img",
                &["snapshot", "-q", "-d", name, "disk"],
            );
        }
        assert!(as_qemu_sees(&directory, "disk").len() as u64 == SIZE);
    }
}

#[test]
fn only_backing_files_that_are_allowed() {
    let Some(directory) = workshop() else { return };
    let file = |name: &str| directory.path().join(name);
    let base: Vec<u8> = (0..SIZE / 2).map(|i| (i >> 8) as u8).collect();
    fs::write(file("base"), &base).unwrap();
    let on = |below: &str, format: &str, name: &str| {
        let size = SIZE.to_string();
        let create = [
            "create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, &size,
        ];
        tool(directory.path(), "qemu-img", &create);
    };
    on("base", "raw", "middle");
    on("middle", "qcow2", "top");
    let refused = |backing: &[&str]| {
        let backing: Vec<PathBuf> = backing.iter().map(|name| file(name)).collect();
        opened(&file("top"), Access::ReadWrite, &backing)
            .unwrap_err()
            .to_string()
    };
    for (backing, message) in [
        (&[][..], "top is built on the file"),
        (&["base"], "top is built on the file"),
        (&["middle"], "middle is built on the file"),
        (&["middle", "top"], "middle is built on the file"),
        (&["middle", "base", "top"], "base is not built on"),
    ] {
        let error = refused(backing);
        assert!(error.contains(message), "{backing:?}: {error}");
    }
    let backing = [file("middle"), file("base")];
    let disk = opened(&file("top"), Access::ReadWrite, &backing).unwrap();
    let mut model = base.clone();
    model.resize(SIZE as usize, 0);
    assert!(as_we_see(&*disk) == model);
    change(&*disk, &mut model, &mut 3, 60);
    assert!(as_we_see(&*disk) == model);
    drop(disk);
    assert!(as_qemu_sees(&directory, "top") == model);
    assert!(fs::read(file("base")).unwrap() == base);
}

#[test]
fn data_in_a_file_that_is_allowed() {
    let Some(directory) = workshop() else { return };
    for (options, seed) in [
        ("data_file=data", 11),
        ("data_file=data,cluster_size=4k", 12),
        ("data_file=data,data_file_raw=on", 13),
    ] {
        let path = image(&directory, "disk", options);
        let data = directory.path().join("data");
        let other = directory.path().join("other");
        fs::write(&other, vec![0; SIZE as usize]).unwrap();
        let open_with = |data: Option<&Path>| {
            open(&Source {
                path: &path,
                format: Some(DiskFormat::Qcow2),
                access: Access::ReadWrite,
                backing: &[],
                data,
            })
        };
        for wrong in [None, Some(other.as_path())] {
            let error = open_with(wrong).unwrap_err().to_string();
            assert!(error.contains("unless it is allowed by `data="), "{error}");
        }
        let mut state = seed;
        let mut model = vec![0; SIZE as usize];
        for _ in 0..3 {
            let disk = open_with(Some(&data)).unwrap();
            assert!(as_we_see(&*disk) == model, "{options}");
            change(&*disk, &mut model, &mut state, 60);
            drop(disk);
            assert!(as_qemu_sees(&directory, "disk") == model, "{options}");
        }
        // The first cluster, which is at offset zero there.
        let io = ["-f", "qcow2", "-c", "write -q -P 7 0 65536", "disk"];
        tool(directory.path(), "qemu-io", &io);
        model[..65536].fill(7);
        let disk = open_with(Some(&data)).unwrap();
        assert!(as_we_see(&*disk) == model, "{options}");
        drop(disk);
        fs::remove_file(data).unwrap();
    }
    let path = image(&directory, "plain", "compat=1.1");
    let error = open(&Source {
        path: &path,
        format: Some(DiskFormat::Qcow2),
        access: Access::ReadOnly,
        backing: &[],
        data: Some(&path),
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not have its data in"), "{error}");
}

#[test]
fn what_we_do_not_have_is_refused() {
    let Some(directory) = workshop() else { return };
    let path = image(&directory, "disk", "extended_l2=on");
    let error = opened(&path, Access::ReadOnly, &[])
        .unwrap_err()
        .to_string();
    let what = "needs extended L2 entries (subclusters), which is not supported";
    assert!(error.ends_with(what), "{error}");
    let path = image(&directory, "disk", "compat=1.1");
    let stated = |format| Source {
        path: &path,
        format,
        access: Access::ReadWrite,
        backing: &[],
        data: None,
    };
    let error = open(&stated(None)).unwrap_err().to_string();
    assert!(error.contains("say format=qcow2, or format=raw"), "{error}");
    // A raw disk has whole sectors.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    assert!(open(&stated(Some(DiskFormat::Raw))).is_ok());
}

#[test]
fn nobody_else_writes_meanwhile() {
    let Some(directory) = workshop() else { return };
    let path = image(&directory, "disk", "compat=1.1");
    let write = || {
        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -q 0 512", "disk"])
            .current_dir(directory.path())
            .output()
            .unwrap();
        output.status.success()
    };
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let disk = opened(&path, access, &[]).unwrap();
        assert!(!write(), "{access:?}");
        drop(disk);
        assert!(write());
    }
    // The other way round: qemu-io holds the image while it waits for a command.
    let mut other = Command::new("qemu-io")
        .args(["-f", "qcow2", "disk"])
        .current_dir(directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = other.stdin.take().unwrap();
    let refused = || {
        let result = opened(&path, Access::ReadWrite, &[]);
        matches!(result, Err(DiskError::Locked { .. }))
    };
    let held = (0..500).any(|_| {
        thread::sleep(std::time::Duration::from_millis(10));
        refused()
    });
    stdin.write_all(b"quit\n").unwrap();
    drop(stdin);
    other.wait().unwrap();
    assert!(held && !refused());
}
