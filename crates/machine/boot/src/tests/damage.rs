//! Files that are cut, flipped and overwritten give an error or a plan that keeps the rules, and never a panic.

use proptest::prelude::*;

use super::compression::{gzip, xz, zstd};
use crate::memory_map::{ACPI_START, HIGH_MEMORY_START, LOW_USABLE_END};
use crate::testing::{
    ElfSpec, KERNEL_BASE, bzimage, layout, lz4_payload, multiboot_header, multiboot_kernel,
    pvh_notes, request,
};
use crate::view::put;
use crate::{BootRequest, LoadPlan, plan};

/// RAM of the machine, in MiB.
const RAM_MIB: u64 = 64;

/// One kernel of each kind.
fn kernels() -> Vec<Vec<u8>> {
    let linux = ElfSpec::linux().build();
    let mut multiboot = ElfSpec::bits_32();
    put(&mut multiboot.code, 0x40, &multiboot_header(3, &[]));
    vec![
        bzimage(&lz4_payload(&linux)),
        bzimage(&gzip(&linux)),
        bzimage(&xz(&linux)),
        bzimage(&zstd(&linux)),
        bzimage(&linux),
        bzimage(b"BZh9 unknown here"),
        ElfSpec {
            notes: pvh_notes(KERNEL_BASE as u32),
            ..ElfSpec::linux()
        }
        .build(),
        multiboot.build(),
        multiboot_kernel(),
        linux,
    ]
}

/// What holds for every plan, whatever the file.
fn check(plan: &LoadPlan) {
    let usable = [
        (0, LOW_USABLE_END),
        (ACPI_START, HIGH_MEMORY_START),
        (HIGH_MEMORY_START, RAM_MIB << 20),
    ];
    let mut end_before = 0;
    for segment in &plan.segments {
        let (start, end) = (segment.gpa.0, segment.gpa.0 + segment.mem_size);
        assert!(
            usable.iter().any(|(from, to)| *from <= start && end <= *to),
            "{segment:?}"
        );
        assert!(start >= end_before, "{segment:?} overlaps");
        assert!(
            segment.bytes.len() as u64 <= segment.mem_size && segment.mem_size > 0,
            "{segment:?}"
        );
        end_before = end;
    }
    let entry = plan.entry.rip;
    assert!(
        plan.segments
            .iter()
            .any(|segment| (segment.gpa.0..segment.gpa.0 + segment.mem_size).contains(&entry))
    );
}

fn try_kernel(kernel: &[u8]) {
    let layout = layout(RAM_MIB);
    match plan(&BootRequest {
        initrd: Some(b"initrd"),
        ..request(kernel, &layout)
    }) {
        Ok(plan) => check(&plan),
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("the ") && !text.contains('\n'), "{text}");
        }
    }
}

/// A number in a header that a file's author would choose to do harm.
fn nasty_number() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX - 0xfff),
        Just(u32::MAX.into()),
        Just(0x8000_0000),
        Just(1 << 63),
        (0u64..0x4000),
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn cut_kernels(which in 0usize..10, part in 0.0..1.0f64) {
        let kernel = &kernels()[which];
        try_kernel(&kernel[..(kernel.len() as f64 * part) as usize]);
    }

    #[test]
    fn flipped_bits(which in 0usize..10, flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6)) {
        let mut kernel = kernels().swap_remove(which);
        for (at, bit) in flips {
            let at = at.index(kernel.len());
            kernel[at] ^= 1 << bit;
        }
        try_kernel(&kernel);
    }

    #[test]
    fn flipped_header_bits(which in 0usize..10, flips in prop::collection::vec((0usize..0x2a0, 0u8..8), 1..4)) {
        let mut kernel = kernels().swap_remove(which);
        for (at, bit) in flips {
            kernel[at] ^= 1 << bit;
        }
        try_kernel(&kernel);
    }

    #[test]
    fn nasty_numbers_in_headers(
        which in 0usize..10,
        numbers in prop::collection::vec((0usize..0x2a0, nasty_number(), prop::sample::select(vec![1usize, 2, 4, 8])), 1..4),
    ) {
        let mut kernel = kernels().swap_remove(which);
        for (at, value, size) in numbers {
            put(&mut kernel, at, &value.to_le_bytes()[..size]);
        }
        try_kernel(&kernel);
    }

    #[test]
    fn nasty_program_headers(which in 6usize..10, word in 0usize..28, value in nasty_number(), wide: bool) {
        let mut kernel = kernels().swap_remove(which);
        put(&mut kernel, 64 + word * 4, &value.to_le_bytes()[..if wide { 8 } else { 4 }]);
        try_kernel(&kernel);
    }

    #[test]
    fn any_bytes_behind_a_signature(which in 0usize..10, bytes in prop::collection::vec(any::<u8>(), 0..0x600)) {
        let mut kernel = kernels().swap_remove(which);
        let keep = [0x20, 0x208, 0x1f0, 0x110][which % 4];
        kernel.truncate(keep);
        kernel.extend(bytes);
        try_kernel(&kernel);
    }
}
