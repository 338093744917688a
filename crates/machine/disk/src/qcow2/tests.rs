//! Images against an array of bytes, broken off at every step, and damaged.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::file::Change;
use super::testing::{Shape, check, empty, open, open_on};
use super::{Access, Qcow2};
use crate::backend::DiskBackend;
use crate::error::DiskError;
use crate::{Overlay, RawFile};

fn shape(cluster_bits: u32, size: u64) -> Shape {
    Shape {
        version: 3,
        cluster_bits,
        refcount_order: 4,
        size,
    }
}

fn image(shape: Shape) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), empty(shape)).unwrap();
    file
}

fn checked(path: &Path) -> usize {
    check(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn what_is_written_is_read_later() {
    let file = image(shape(16, 10 << 20));
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    assert_eq!((disk.size(), disk.readonly()), (10 << 20, false));
    disk.write_at(100_000, b"hello").unwrap();
    drop(disk);
    assert_eq!(checked(file.path()), 0);
    let disk = open(file.path(), Access::ReadOnly).unwrap();
    let mut buf = [1; 7];
    disk.read_at(99_999, &mut buf).unwrap();
    assert_eq!(&buf, b"\0hello\0");
    assert!(matches!(disk.write_at(0, b"x"), Err(DiskError::ReadOnly)));
}

#[test]
fn opening_and_reading_changes_nothing() {
    let mut bytes = empty(shape(16, 1 << 20));
    // Bitmaps, which a write makes stale.
    bytes[95] = 1;
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), &bytes).unwrap();
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    disk.read_at(0, &mut [0; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert_eq!(fs::read(file.path()).unwrap(), bytes);
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    disk.write_at(0, &[1]).unwrap();
    assert_eq!(fs::read(file.path()).unwrap()[88..96], [0; 8]);
}

#[test]
fn space_is_given_back_and_used_again() {
    let file = image(shape(12, 1 << 20));
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    disk.write_at(0, &vec![7; 1 << 20]).unwrap();
    disk.flush().unwrap();
    let full = fs::metadata(file.path()).unwrap().len();
    for _ in 0..10 {
        disk.discard(0, 1 << 20).unwrap();
        disk.flush().unwrap();
        disk.write_at(0, &vec![8; 1 << 20]).unwrap();
        disk.flush().unwrap();
    }
    disk.discard(4096, (1 << 20) - 4096).unwrap();
    drop(disk);
    assert_eq!(fs::metadata(file.path()).unwrap().len(), full);
    assert_eq!(checked(file.path()), 0);
    let disk = open(file.path(), Access::ReadOnly).unwrap();
    let mut buf = [1; 8192];
    disk.read_at(0, &mut buf).unwrap();
    assert!(buf[..4096] == [8; 4096] && buf[4096..] == [0; 4096]);
}

#[test]
fn the_refcount_table_grows() {
    // One refcount block tells about 64 clusters of 512 bytes, a cluster of the table about 2 MiB.
    let file = image(Shape {
        refcount_order: 6,
        ..shape(9, 512 * 64 * 64)
    });
    let disk = open(file.path(), Access::ReadWrite).unwrap();
    let content: Vec<u8> = (0..512 * 64 * 64)
        .map(|i: u32| (i / 511) as u8 | 1)
        .collect();
    for (index, part) in content.chunks(100_000).enumerate() {
        disk.write_at(index as u64 * 100_000, part).unwrap();
    }
    drop(disk);
    assert_eq!(checked(file.path()), 0);
    let disk = open(file.path(), Access::ReadOnly).unwrap();
    assert!(disk.state().header.refcount_table_clusters > 1);
    let mut buf = vec![0; content.len()];
    disk.read_at(0, &mut buf).unwrap();
    assert!(buf == content);
}

#[test]
fn an_image_on_another_one() {
    let base = NamedTempFile::new().unwrap();
    fs::write(base.path(), [5; 10 * 512]).unwrap();
    let mut bytes = empty(shape(12, 4 * 4096));
    // No extension says the format: that is for those who open the base.
    bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 4]);
    bytes[256..260].copy_from_slice(b"base");
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let error = open(file.path(), Access::ReadWrite).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is not opened unless it is allowed by `backing="),
        "{error}"
    );
    let below = || -> Option<Arc<dyn DiskBackend>> {
        Some(Arc::new(
            RawFile::open(base.path(), Access::ReadOnly).unwrap(),
        ))
    };
    let disk = open_on(file.path(), Access::ReadWrite, below()).unwrap();
    disk.write_at(4096 + 10, &[9]).unwrap();
    disk.discard(0, 4096).unwrap();
    disk.write_zeroes(3 * 4096 + 1, 3, true).unwrap();
    let mut buf = vec![1; 4 * 4096];
    disk.read_at(0, &mut buf).unwrap();
    let mut expected = vec![0; 4 * 4096];
    expected[4096..10 * 512].fill(5);
    expected[4096 + 10] = 9;
    assert!(buf == expected);
    drop(disk);
    assert_eq!(checked(file.path()), 0);
    assert_eq!(fs::read(base.path()).unwrap(), [5; 10 * 512]);
}

#[test]
fn an_overlay_above_an_image_leaves_it() {
    let file = image(shape(12, 1 << 16));
    open(file.path(), Access::ReadWrite)
        .unwrap()
        .write_at(0, b"image")
        .unwrap();
    let before = fs::read(file.path()).unwrap();
    let base = Arc::new(open(file.path(), Access::ReadOnly).unwrap());
    let overlay = Overlay::new(base, &std::env::temp_dir()).unwrap();
    overlay.write_at(2, b"XY").unwrap();
    let mut buf = [0; 5];
    overlay.read_at(0, &mut buf).unwrap();
    assert_eq!(&buf, b"imXYe");
    assert_eq!(fs::read(file.path()).unwrap(), before);
}

#[test]
fn what_cannot_be_used_is_refused_in_a_sentence() {
    let refused = |what: &str, access, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = empty(shape(16, 1 << 20));
        change(&mut bytes);
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        match open(file.path(), access) {
            Ok(_) => assert_eq!(what, "", "it was opened"),
            Err(error) => assert!(
                !what.is_empty() && error.to_string().contains(what),
                "{what}: {error}"
            ),
        }
    };
    let rw = Access::ReadWrite;
    refused("", rw, &|_| {});
    refused("is not a qcow2 image", rw, &|b| b[3] = 0);
    refused("its header is cut off", rw, &|b| b.truncate(50));
    refused("needs qcow2 version 4, which is not supported", rw, &|b| {
        b[7] = 4
    });
    refused("clusters of 2^30 bytes do not exist", rw, &|b| b[23] = 30);
    refused("clusters of 2^8 bytes do not exist", rw, &|b| b[23] = 8);
    refused("needs encryption", rw, &|b| b[35] = 2);
    refused("does not name the file with its data", rw, &|b| b[79] = 4);
    refused("needs extended L2 entries", rw, &|b| b[79] = 16);
    refused("needs incompatible feature bit 40", rw, &|b| b[74] = 1);
    refused(
        "needs the feature 'later? things' (incompatible bit 40)",
        rw,
        &|b| {
            b[74] = 1;
            b[104..112].copy_from_slice(&[0x68, 3, 0xf8, 0x57, 0, 0, 0, 48]);
            b[112..114].copy_from_slice(&[0, 40]);
            b[114..127].copy_from_slice(b"later\x1b things");
        },
    );
    refused("cannot be written: it was not closed", rw, &|b| b[79] = 1);
    refused("cannot be written: it is marked as damaged", rw, &|b| {
        b[79] = 2
    });
    refused("", Access::ReadOnly, &|b| b[79] = 3);
    refused("refcounts of 2^7 bits do not exist", rw, &|b| b[99] = 7);
    refused("its header has 103 bytes", rw, &|b| b[103] = 103);
    refused("not a multiple of 512", rw, &|b| b[31] = 1);
    refused("is empty", rw, &|b| b[24..32].fill(0));
    refused("its L1 table has 1 entries and needs 2", rw, &|b| {
        b[28] = 0x30
    });
    refused(
        "its L1 table has 34359738360 bytes, and 33554432 is the most",
        rw,
        &|b| b[36..40].fill(255),
    );
    refused("its L1 table is at 0x30100", rw, &|b| b[46] = 1);
    refused("its L1 table is at 0xff00000000030000", rw, &|b| {
        b[40] = 255
    });
    refused("its refcount table has", rw, &|b| b[57] = 1);
    refused("it has no refcount table", rw, &|b| b[59] = 0);
    refused("it has 16777216 snapshots", rw, &|b| b[60] = 1);
    refused("two tables are at 0x10000", rw, &|b| b[45] = 1);
    refused("a table is said to be at 0x900000", rw, &|b| {
        b[0x30005] = 0x90
    });
    refused("two tables are at 0x20000", rw, &|b| b[0x30005] = 2);
    refused("its refcount table is at 0x0", rw, &|b| b[53] = 0);
    refused("a header extension of 65536 bytes", rw, &|b| {
        b[104..112].copy_from_slice(&[1, 0, 0, 0, 0, 1, 0, 0])
    });
    refused(
        "the name of its backing file has 0 bytes at 0x100",
        rw,
        &|b| b[14] = 1,
    );
    refused("its compression method 1 contradicts", rw, &|b| {
        b[103] = 112;
        b[104] = 1;
    });
}

#[test]
fn lies_about_clusters_are_errors() {
    let at = |cluster: u64| cluster * 4096;
    let lie = |what: &str, l2_entry: u64, refcount: Option<(usize, u8)>| {
        let mut bytes = empty(shape(12, 1 << 20));
        // An L2 table in cluster 4, data in cluster 5.
        bytes.resize(6 * 4096, 0);
        bytes[3 * 4096..][..8].copy_from_slice(&(1 << 63 | at(4)).to_be_bytes());
        bytes[4 * 4096..][..8].copy_from_slice(&l2_entry.to_be_bytes());
        (bytes[2 * 4096 + 9], bytes[2 * 4096 + 11]) = (1, 1);
        if let Some((cluster, count)) = refcount {
            bytes[2 * 4096 + cluster * 2 + 1] = count;
        }
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        let disk = open(file.path(), Access::ReadWrite).unwrap();
        match disk.write_at(10, b"x") {
            Ok(()) => assert_eq!(what, "", "{l2_entry:#x}"),
            Err(error) => {
                assert!(
                    !what.is_empty() && error.to_string().contains(what),
                    "{what}: {error}"
                );
                drop(disk);
                // A cluster that was taken and given back may have made the file longer.
                let now = fs::read(file.path()).unwrap();
                assert!(now.starts_with(&bytes), "{what}");
            }
        }
    };
    let (copied, zero, packed) = (1 << 63, 1, 1 << 62);
    lie("", copied | at(5), None);
    lie("", copied | zero | at(5), None);
    lie("", zero, None);
    lie("", at(5), None);
    lie("", copied | at(5), Some((5, 2)));
    lie("is used and counted as free", copied | at(5), Some((5, 0)));
    lie("data and a table are both at 0x2000", copied | at(2), None);
    lie("", copied, None);
    lie(
        "a cluster is said to be at 0x900000",
        copied | 0x90_0000,
        None,
    );
    lie("a cluster is said to be at 0x5200", copied | 0x5200, None);
    lie(
        "compressed data is said to be at 0x900000",
        packed | 0x90_0000,
        None,
    );
    lie(
        "compressed data at 0x5001 cannot be unpacked",
        packed | 0x5001,
        None,
    );
}

#[derive(Debug, Clone)]
enum Action {
    Write(u64, Vec<u8>),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Read(u64, usize),
    Flush,
    Reopen,
}

const SIZE: u64 = 200 * 1024 + 512;

fn action() -> impl Strategy<Value = Action> {
    let offset = 0..SIZE;
    prop_oneof![
        4 => (offset.clone(), 0..9000_usize, any::<u8>()).prop_map(|(at, len, fill)| {
            let bytes = (0..len).map(|i| (i / 300) as u8 ^ fill).collect();
            Action::Write(at, bytes)
        }),
        1 => (offset.clone(), 0..40000_u64, any::<bool>()).prop_map(|(a, l, u)| Action::Zero(a, l, u)),
        1 => (offset.clone(), 0..40000_u64).prop_map(|(a, l)| Action::Discard(a, l)),
        1 => (offset, 0..20000_usize).prop_map(|(a, l)| Action::Read(a, l)),
        1 => Just(Action::Flush),
        1 => Just(Action::Reopen),
    ]
}

fn shapes() -> impl Strategy<Value = Shape> {
    let three = (prop_oneof![Just(9_u32), Just(12), Just(16)], 0..7_u32).prop_map(
        |(cluster_bits, refcount_order)| Shape {
            refcount_order,
            ..shape(cluster_bits, SIZE)
        },
    );
    let two = (9..17_u32).prop_map(|cluster_bits| Shape {
        version: 2,
        ..shape(cluster_bits, SIZE)
    });
    prop_oneof![three, two]
}

/// Does to `disk` and to `model` what an action says. Discarded bytes are taken over from the disk.
fn act(disk: &Qcow2, model: &mut [u8], action: &Action) -> Result<(), TestCaseError> {
    let inside = |at: u64, len: u64| at + len <= SIZE;
    match action {
        Action::Write(at, bytes) => {
            let inside = inside(*at, bytes.len() as u64);
            prop_assert_eq!(disk.write_at(*at, bytes).is_ok(), inside);
            if inside {
                model[*at as usize..][..bytes.len()].copy_from_slice(bytes);
            }
        }
        Action::Zero(at, len, unmap) => {
            prop_assert_eq!(
                disk.write_zeroes(*at, *len, *unmap).is_ok(),
                inside(*at, *len)
            );
            if inside(*at, *len) {
                model[*at as usize..][..*len as usize].fill(0);
            }
        }
        Action::Discard(at, len) => {
            prop_assert_eq!(disk.discard(*at, *len).is_ok(), inside(*at, *len));
            if inside(*at, *len) {
                let mut now = vec![1; *len as usize];
                disk.read_at(*at, &mut now).unwrap();
                let old = &mut model[*at as usize..][..*len as usize];
                prop_assert!(
                    now.iter()
                        .zip(&*old)
                        .all(|(now, old)| *now == 0 || now == old)
                );
                old.copy_from_slice(&now);
            }
        }
        Action::Read(at, len) => {
            let mut buf = vec![1; *len];
            prop_assert_eq!(
                disk.read_at(*at, &mut buf).is_ok(),
                inside(*at, *len as u64)
            );
            if inside(*at, *len as u64) {
                prop_assert!(buf == model[*at as usize..][..*len]);
            }
        }
        Action::Flush | Action::Reopen => disk.flush().unwrap(),
    }
    Ok(())
}

fn content(disk: &Qcow2) -> Vec<u8> {
    let mut all = vec![1; disk.size() as usize];
    disk.read_at(0, &mut all).unwrap();
    all
}

/// What a file holds after `changes`, of which those behind the last barrier may be missing.
fn after(start: &[u8], changes: &[Change], random: &mut impl FnMut() -> bool) -> Vec<u8> {
    let mut file = start.to_vec();
    let barrier = changes
        .iter()
        .rposition(|change| *change == Change::Sync)
        .unwrap_or(0);
    for (index, change) in changes.iter().enumerate() {
        let mut done = || index < barrier || random();
        match change {
            Change::Sync => {}
            Change::Grow(len) => {
                if done() {
                    file.resize(file.len().max(*len as usize), 0);
                }
            }
            Change::Punch(at, len) => {
                let end = ((at + len) as usize).min(file.len());
                if done() && (*at as usize) < end {
                    file[*at as usize..end].fill(0);
                }
            }
            Change::Write(at, bytes) => {
                // Sectors are written whole, and in any order.
                let mut at = *at as usize;
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (sector, after) = rest.split_at(rest.len().min(512 - at % 512));
                    if done() {
                        file.resize(file.len().max(at + sector.len()), 0);
                        file[at..at + sector.len()].copy_from_slice(sector);
                    }
                    (at, rest) = (at + sector.len(), after);
                }
            }
        }
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// An image behaves as an array of bytes, and is valid and without waste whenever it is closed.
    #[test]
    fn equals_an_array(shape in shapes(), actions in prop::collection::vec(action(), 1..60)) {
        let file = image(shape);
        let mut model = vec![0; SIZE as usize];
        let mut disk = open(file.path(), Access::ReadWrite).unwrap();
        for action in &actions {
            act(&disk, &mut model, action)?;
            if matches!(action, Action::Reopen) {
                drop(disk);
                prop_assert_eq!(check(&fs::read(file.path()).unwrap()), Ok(0));
                disk = open(file.path(), Access::ReadWrite).unwrap();
            }
        }
        prop_assert!(content(&disk) == model);
        drop(disk);
        prop_assert_eq!(check(&fs::read(file.path()).unwrap()), Ok(0));
        prop_assert!(content(&open(file.path(), Access::ReadOnly).unwrap()) == model);
    }

    /// Wherever the process or the host stops, the image is valid, and every byte is one that was flushed or written
    /// since.
    #[test]
    fn may_break_off_anywhere(
        shape in shapes(),
        actions in prop::collection::vec(action(), 1..40),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 8),
    ) {
        let start = empty(shape);
        let file = image(shape);
        let disk = open(file.path(), Access::ReadWrite).unwrap();
        disk.state().file.log = Some(Vec::new());
        let log_len = || disk.state().file.log.as_ref().map_or(0, Vec::len);
        let mut model = vec![0; SIZE as usize];
        // What was there after each action: (steps in the log, content, whether it was flushed).
        let mut history = vec![(0, model.clone(), true)];
        for action in &actions {
            act(&disk, &mut model, action)?;
            let flushed = matches!(action, Action::Flush | Action::Reopen);
            history.push((log_len(), model.clone(), flushed));
        }
        let log = disk.state().file.log.take().unwrap();
        drop(disk);
        for (cut, seed) in cuts {
            let cut = cut.index(log.len() + 1);
            let mut state = seed | 1;
            let mut random = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Sometimes everything was done: the process was killed and the host went on.
                seed % 4 == 0 || state >> 33 & 1 != 0
            };
            let bytes = after(&start, &log[..cut], &mut random);
            if let Err(error) = check(&bytes) {
                return Err(TestCaseError::fail(format!("after step {cut} of {}: {error}", log.len())));
            }
            fs::write(file.path(), &bytes).unwrap();
            let found = content(&open(file.path(), Access::ReadOnly).unwrap());
            let last = history.iter().rposition(|(steps, _, flushed)| *flushed && *steps <= cut).unwrap_or(0);
            // Everything up to the first state that the cut did not reach is possible.
            let until = history.iter().position(|(steps, _, _)| *steps > cut).unwrap_or(history.len() - 1);
            for (at, byte) in found.iter().enumerate() {
                let possible = history[last..=until].iter().any(|(_, content, _)| content[at] == *byte);
                prop_assert!(possible, "byte {at} is {byte} after step {cut} of {}", log.len());
            }
        }
    }

    /// Whatever is in an image, it is an error or a disk; nothing panics, and only a write changes the file.
    #[test]
    fn damaged_images_are_errors(
        shape in shapes(),
        actions in prop::collection::vec(action(), 0..12),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
        later in prop::collection::vec(action(), 1..12),
    ) {
        let file = image(shape);
        let disk = open(file.path(), Access::ReadWrite).unwrap();
        let mut model = vec![0; SIZE as usize];
        for action in &actions {
            act(&disk, &mut model, action)?;
        }
        drop(disk);
        let mut bytes = fs::read(file.path()).unwrap();
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
        for (at, value, early) in flips {
            let within = if early { bytes.len().min(112) } else { bytes.len() };
            bytes[at.index(within)] = value;
        }
        fs::write(file.path(), &bytes).unwrap();
        if let Ok(disk) = open(file.path(), Access::ReadOnly) {
            let mut buf = vec![0; disk.size().min(1 << 20) as usize];
            let _ = disk.read_at(0, &mut buf);
            let _ = disk.read_at(disk.size() - buf.len() as u64, &mut buf);
        }
        let disk = open(file.path(), Access::ReadWrite);
        prop_assert!(fs::read(file.path()).unwrap() == bytes);
        let Ok(disk) = disk else { return Ok(()) };
        for action in later {
            let _ = match action {
                Action::Write(at, bytes) => disk.write_at(at, &bytes),
                Action::Zero(at, len, unmap) => disk.write_zeroes(at, len, unmap),
                Action::Discard(at, len) => disk.discard(at, len),
                Action::Read(at, len) => disk.read_at(at, &mut vec![0; len]),
                Action::Flush | Action::Reopen => disk.flush(),
            };
        }
    }
}
