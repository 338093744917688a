//! Tests of the crate as its users see it.

use super::*;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl WriteObserver for Log {
    fn device_wrote(&self, gpa: Gpa, len: u64) {
        self.0.lock().unwrap().push((gpa.0, len));
    }
}

/// RAM at 0..0x4000 in two touching slots, ROM at 0x4000, a hole, RAM at 0x10000.
fn sample() -> GuestMemory {
    let memory = GuestMemory::new();
    memory.add_slot(Gpa(0x1000), 0x3000, SlotKind::Ram).unwrap();
    memory.add_slot(Gpa(0), 0x1000, SlotKind::Ram).unwrap();
    memory.add_slot(Gpa(0x4000), 0x1000, SlotKind::Rom).unwrap();
    memory
        .add_slot(Gpa(0x1_0000), 0x2000, SlotKind::Ram)
        .unwrap();
    memory
}

#[test]
fn slots_are_sorted_checked_and_found() {
    let memory = sample();
    let table = memory.slots();
    let starts: Vec<u64> = table.iter().map(|slot| slot.gpa().0).collect();
    assert_eq!(starts, [0, 0x1000, 0x4000, 0x1_0000]);
    assert_eq!(table.generation(), 4);
    assert!(table.find(Gpa(0x5000)).is_none());
    assert_eq!(table.find(Gpa(0x11fff)).unwrap().gpa(), Gpa(0x1_0000));
    for (gpa, size) in [
        (0x800, 0x1000),
        (0x8000, 0),
        (0x8000, 0x10),
        (u64::MAX - 0xfff, 0x1000),
        (1 << 52, 0x1000),
    ] {
        assert!(matches!(
            memory.add_slot(Gpa(gpa), size, SlotKind::Ram),
            Err(MemoryError::BadSlot { .. })
        ));
    }
    assert!(matches!(
        memory.add_slot(Gpa(0x3000), 0x1000, SlotKind::Ram),
        Err(MemoryError::Overlap { .. })
    ));
    assert_eq!(memory.generation(), 4);
}

#[test]
fn a_removed_slot_lives_as_long_as_its_table() {
    let memory = sample();
    let old = memory.slots();
    let slot = old.find(Gpa(0x1_0000)).unwrap();
    memory.write_u32(Gpa(0x1_0000), 7).unwrap();
    memory.remove_slot(slot.id()).unwrap();
    assert!(matches!(
        memory.read_u32(Gpa(0x1_0000)),
        Err(MemoryError::Unmapped(Gpa(0x1_0000)))
    ));
    assert!(matches!(
        memory.remove_slot(slot.id()),
        Err(MemoryError::NoSuchSlot(_))
    ));
    let mut byte = [0];
    assert!(slot.region().copy_out(0, &mut byte));
    assert_eq!(byte, [7]);
    let again = memory
        .add_slot(Gpa(0x1_0000), 0x1000, SlotKind::Ram)
        .unwrap();
    assert_ne!(again, slot.id());
    assert_eq!(memory.read_u32(Gpa(0x1_0000)).unwrap(), 0);
}

#[test]
fn accesses_cross_slots_or_fail_whole() {
    let memory = sample();
    memory.write(Gpa(0xffe), &[1, 2, 3, 4]).unwrap();
    assert_eq!(memory.read_u32(Gpa(0xffe)).unwrap(), 0x0403_0201);
    memory.write_u64(Gpa(0xffc), 0x1122_3344_5566_7788).unwrap();
    assert_eq!(memory.read_u64(Gpa(0xffc)).unwrap(), 0x1122_3344_5566_7788);
    assert!(matches!(
        memory.write(Gpa(0x3ffe), &[9; 4]),
        Err(MemoryError::ReadOnly(Gpa(0x4000)))
    ));
    assert_eq!(memory.read_u16(Gpa(0x3ffe)).unwrap(), 0);
    assert!(matches!(
        memory.write_u32(Gpa(0x11ffe), 1),
        Err(MemoryError::Unmapped(Gpa(0x12000)))
    ));
    assert!(matches!(
        memory.read(Gpa(u64::MAX), &mut [0; 2]),
        Err(MemoryError::Unmapped(_))
    ));
    memory.load(Gpa(0x3ffe), &[9; 4]).unwrap();
    assert_eq!(memory.read_u32(Gpa(0x3ffe)).unwrap(), 0x0909_0909);
    memory.read(Gpa(0x7777), &mut []).unwrap();
}

#[test]
fn ring_indices_need_alignment() {
    let memory = sample();
    memory.store_release_u16(Gpa(0x1002), 0xabcd).unwrap();
    assert_eq!(memory.load_acquire_u16(Gpa(0x1002)).unwrap(), 0xabcd);
    assert!(matches!(
        memory.load_acquire_u16(Gpa(0x1001)),
        Err(MemoryError::Misaligned(_))
    ));
    assert!(matches!(
        memory.store_release_u16(Gpa(0x1001), 1),
        Err(MemoryError::Misaligned(_))
    ));
    assert!(matches!(
        memory.store_release_u16(Gpa(0x4000), 1),
        Err(MemoryError::ReadOnly(_))
    ));
}

#[test]
fn writes_to_watched_pages_are_observed_once() {
    let memory = sample();
    let (observer, recorder) = (Arc::new(Log::default()), Arc::new(Log::default()));
    memory.set_observer(observer.clone());
    memory.watch_page(2);
    memory.watch_page(999);
    assert!(memory.is_watched(2) && !memory.is_watched(1) && !memory.is_watched(999));
    memory.write_u64(Gpa(0x1000), 1).unwrap();
    memory.write_u64(Gpa(0x1ffc), 1).unwrap();
    memory.set_recorder(Some(recorder.clone()));
    memory.fill(Gpa(0x800), 0x3000, 3).unwrap();
    memory.store_release_u16(Gpa(0x2ffe), 3).unwrap();
    memory.set_recorder(None);
    memory.unwatch_page(2);
    memory.write_u64(Gpa(0x2000), 1).unwrap();
    assert_eq!(
        *observer.0.lock().unwrap(),
        [(0x1ffc, 8), (0x800, 0x3000), (0x2ffe, 2)]
    );
    assert_eq!(*recorder.0.lock().unwrap(), [(0x800, 0x3000), (0x2ffe, 2)]);
}

#[test]
fn the_dirty_log_holds_what_was_written() {
    let memory = sample();
    let slot = memory.slots().find(Gpa(0x1000)).unwrap().id();
    memory.write_u8(Gpa(0x1000), 1).unwrap();
    memory.start_dirty_log();
    memory.write_u32(Gpa(0x2ffe), 1).unwrap();
    assert_eq!(memory.take_dirty(slot).unwrap(), [0b110]);
    assert_eq!(memory.take_dirty(slot).unwrap(), [0]);
    memory.mark_dirty(Gpa(0x1000), 1);
    memory.mark_dirty(Gpa(0x9000), 1);
    memory.stop_dirty_log();
    memory.write_u32(Gpa(0x2000), 1).unwrap();
    assert_eq!(memory.take_dirty(slot).unwrap(), [0b001]);
}

#[test]
fn dropped_pages_read_as_zeros_and_count_as_written() {
    let memory = sample();
    let observer = Arc::new(Log::default());
    memory.set_observer(observer.clone());
    memory.fill(Gpa(0x1000), 0x2000, 0xee).unwrap();
    memory.watch_page(1);
    memory
        .drop_pages(GpaRange::new(Gpa(0x1000), 0x1000).unwrap())
        .unwrap();
    assert_eq!(memory.read_u64(Gpa(0x1000)).unwrap(), 0);
    assert_eq!(memory.read_u8(Gpa(0x2000)).unwrap(), 0xee);
    assert_eq!(*observer.0.lock().unwrap(), [(0x1000, 0x1000)]);
    let odd = GpaRange::new(Gpa(0x1800), 0x1000).unwrap();
    assert!(matches!(
        memory.drop_pages(odd),
        Err(MemoryError::Misaligned(_))
    ));
}

#[test]
fn protection_covers_all_mappings_and_is_undone() {
    let memory = sample();
    assert_eq!(memory.mappings().len(), 4);
    for mapping in memory.mappings() {
        memory.protect(mapping.range, Protection::Read).unwrap();
    }
    assert_eq!(memory.read_u8(Gpa(0)).unwrap(), 0);
    for mapping in memory.mappings() {
        memory
            .protect(mapping.range, Protection::ReadWrite)
            .unwrap();
    }
    memory.write_u8(Gpa(0), 1).unwrap();
}

#[test]
fn files_go_in_and_out() {
    let memory = GuestMemory::new();
    memory.add_slot(Gpa(0), 1 << 20, SlotKind::Ram).unwrap();
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    memory.write(Gpa(5), &bytes).unwrap();
    memory
        .write_to_file(Gpa(5), &file, 11, bytes.len() as u64)
        .unwrap();
    memory.fill(Gpa(0), 1 << 20, 0).unwrap();
    memory
        .read_from_file(Gpa(77), &file, 11, bytes.len() as u64)
        .unwrap();
    let mut back = vec![0; bytes.len()];
    memory.read(Gpa(77), &mut back).unwrap();
    assert!(back == bytes);
    let short = memory.read_from_file(Gpa(0), &file, 11, bytes.len() as u64 + 1);
    assert!(matches!(short, Err(MemoryError::FileTooShort(_))));
    let outside = memory.read_from_file(Gpa(0), &file, 0, 2 << 20);
    assert!(matches!(outside, Err(MemoryError::Unmapped(_))));
}

#[test]
fn layouts() {
    let layout = |ram, max| Layout::new(ram, max).unwrap();
    let small = layout(512 << 20, 512 << 20);
    assert_eq!(
        small.ram().collect::<Vec<_>>(),
        [GpaRange::new(Gpa(0), 512 << 20).unwrap()]
    );
    assert!(small.hotplug().is_empty());
    assert_eq!(small.address_bits(), 37);
    let big = layout(5 << 30, 200 << 30);
    assert_eq!(big.low_ram().size() + big.high_ram().size(), 5 << 30);
    assert_eq!(big.high_ram().start(), Gpa(4 << 30));
    assert!(big.hotplug().size() >= 195 << 30 && big.mmio64().start() >= big.hotplug().end());
    assert_eq!(Layout::new(0, 0), Err(LayoutError::BadSize(0)));
    assert_eq!(Layout::new(1, 1 << 20), Err(LayoutError::BadSize(1)));
    assert!(matches!(
        Layout::new(2 << 20, 1 << 20),
        Err(LayoutError::MaxBelowSize { .. })
    ));
    assert!(matches!(
        Layout::new(1 << 20, 1 << 46),
        Err(LayoutError::TooBig(_))
    ));
    assert!(matches!(
        Layout::new(1 << 20, 0xffff_ffff_fff0_0000),
        Err(LayoutError::TooBig(_))
    ));
}

#[test]
fn guest_ram_lies_between_inaccessible_pages() {
    let memory = GuestMemory::new();
    memory.add_slot(Gpa(0), 0x5000, SlotKind::Ram).unwrap();
    let host = memory.mappings()[0].host.as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let permissions_at = |address: usize| {
        let line = maps.lines().find(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(rest.split(' ').next().unwrap())).contains(&address)
        });
        line.map(|line| line.split(' ').nth(1).unwrap().to_owned())
    };
    assert_eq!(permissions_at(host).unwrap(), "rw-s");
    assert_eq!(permissions_at(host + 0x4fff).unwrap(), "rw-s");
    assert_eq!(permissions_at(host - 1).unwrap(), "---p");
    assert_eq!(permissions_at(host + 0x5000).unwrap(), "---p");
}

#[test]
fn slots_may_go_while_others_access_them() {
    let memory = sample();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // Each either succeeds or says that there is nothing.
                let _ = memory.write_u64(Gpa(0x1_0008), 1);
                let _ = memory.fill(Gpa(0x1_0ff0), 0x20, 2);
            }
        });
        for _ in 0..300 {
            let id = memory.slots().find(Gpa(0x1_0000)).unwrap().id();
            memory.remove_slot(id).unwrap();
            memory
                .add_slot(Gpa(0x1_0000), 0x2000, SlotKind::Ram)
                .unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

proptest! {
    /// Guest memory behaves like one flat array with holes.
    #[test]
    fn memory_is_a_flat_array(
        actions in proptest::collection::vec((0u64..0x1_3000, 1usize..0x1800, any::<u8>(), 0..4u8), 1..60),
    ) {
        let memory = sample();
        let mut model: Vec<Option<u8>> = vec![None; 0x1_3000 + 0x1800];
        for range in [0..0x4000usize, 0x4000..0x5000, 0x1_0000..0x1_2000] {
            model[range].fill(Some(0));
        }
        for (gpa, len, value, action) in actions {
            let span = gpa as usize..gpa as usize + len;
            let readable = model[span.clone()].iter().all(Option::is_some);
            let writable = readable && !(span.start < 0x5000 && span.end > 0x4000);
            match action {
                0 => {
                    let mut bytes = vec![0; len];
                    let result = memory.read(Gpa(gpa), &mut bytes);
                    prop_assert_eq!(result.is_ok(), readable);
                    if readable {
                        let expected: Vec<u8> = model[span].iter().map(|byte| byte.unwrap()).collect();
                        prop_assert!(bytes == expected);
                    }
                }
                1 => {
                    let bytes: Vec<u8> = (0..len).map(|i| value.wrapping_add(i as u8)).collect();
                    prop_assert_eq!(memory.write(Gpa(gpa), &bytes).is_ok(), writable);
                    if writable {
                        for (cell, byte) in model[span].iter_mut().zip(bytes) {
                            *cell = Some(byte);
                        }
                    }
                }
                2 => {
                    prop_assert_eq!(memory.fill(Gpa(gpa), len as u64, value).is_ok(), writable);
                    if writable {
                        model[span].fill(Some(value));
                    }
                }
                _ => {
                    let readable = model[span.start..span.start + 8].iter().all(Option::is_some);
                    let result = memory.read_u64(Gpa(gpa));
                    prop_assert_eq!(result.is_ok(), readable);
                    if let Ok(word) = result {
                        let expected: Vec<u8> =
                            model[span.start..span.start + 8].iter().map(|byte| byte.unwrap()).collect();
                        prop_assert_eq!(word.to_le_bytes().to_vec(), expected);
                    }
                }
            }
        }
    }

    /// Whatever layout is asked for, its parts do not overlap and hold the RAM asked for.
    #[test]
    fn layouts_do_not_overlap(ram in 1u64..1 << 20, more in 0u64..1 << 20) {
        let (ram, max) = (ram << 20, (ram + more) << 20);
        let layout = Layout::new(ram, max).unwrap();
        let parts = [
            layout.low_ram(), layout.high_ram(), layout.hotplug(), layout.mmio64(),
            Layout::MMIO32, Layout::ECAM, Layout::IOAPIC, Layout::LAPIC,
        ];
        for (i, a) in parts.iter().enumerate() {
            for b in &parts[i + 1..] {
                prop_assert!(!a.overlaps(b), "{a} overlaps {b}");
            }
        }
        prop_assert_eq!(layout.ram().map(|range| range.size()).sum::<u64>(), ram);
        prop_assert!(layout.hotplug().size() >= max - ram);
    }
}
