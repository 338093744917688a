//! Each format is started by its protocol, and finds what it was promised.

use crate::memory_map::{ACPI_START, MemoryKind};
use crate::testing::{
    ElfSpec, KERNEL_BASE, Memory, bzimage, layout, lz4_payload, multiboot_header, multiboot_kernel,
    pvh_notes, request,
};
use crate::view::put;
use crate::{BootError, BootRequest, BzImageMode, LoadPlan, Protocol, plan};

/// Plans a start with an initrd on a machine with memory above 4 GiB, and checks what holds for every plan.
fn planned(kernel: &[u8], protocol: Protocol, test: impl FnOnce(&LoadPlan, Memory)) {
    let layout = layout(6 << 10);
    let request = BootRequest {
        initrd: Some(b"initrd here"),
        ..request(kernel, &layout)
    };
    let plan = plan(&request).unwrap();
    assert_eq!(plan.protocol, protocol);
    let memory = Memory(&plan);
    assert_eq!(memory.read(ACPI_START, 8), b"RSD PTR ");
    assert_eq!(
        memory.u64(plan.entry.gdt.base + 8 * 2) >> 40 & 0xff,
        0x9b,
        "the code segment is in the table"
    );
    test(&plan, Memory(&plan));
}

/// What Linux finds through its boot parameters.
fn check_zero_page(plan: &LoadPlan, memory: &Memory) {
    let page = plan.entry.rsi;
    assert_eq!(memory.read(page + 0x202, 4), b"HdrS");
    assert_eq!(memory.byte(page + 0x210), 0xff, "type of loader");
    assert_eq!(
        memory.string(memory.u32(page + 0x228).into()),
        "console=ttyS0 quiet"
    );
    assert_eq!(memory.u64(page + 0x70), ACPI_START, "root pointer");
    assert_eq!(
        memory.read(memory.u32(page + 0x218).into(), 11),
        b"initrd here"
    );
    assert_eq!(memory.u32(page + 0x21c), 11);
    let entries = usize::from(memory.byte(page + 0x1e8));
    let entry = |index: usize| {
        let at = page + 0x2d0 + index as u64 * 20;
        (memory.u64(at), memory.u64(at + 8), memory.u32(at + 16))
    };
    let map: Vec<_> = (0..entries).map(entry).collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x4_0400, 2),
            (0xe_0000, 0x2_0000, 3),
            (0x10_0000, (3 << 30) - 0x10_0000, 1),
            (0xe000_0000, 0x1000_0000, 2),
            (1 << 32, 3 << 30, 1),
        ]
    );
}

#[test]
fn a_bzimage_is_unpacked_and_entered_at_the_kernels_own_entry() {
    let elf = ElfSpec {
        entry: KERNEL_BASE + 0x40,
        ..ElfSpec::linux()
    };
    planned(
        &bzimage(&lz4_payload(&elf.build())),
        Protocol::LinuxUnpacked,
        |plan, memory| {
            assert!(plan.entry.is_long_mode());
            assert_eq!(plan.entry.rip, KERNEL_BASE + 0x40);
            assert_eq!(memory.read(KERNEL_BASE, elf.code.len()), elf.code);
            check_zero_page(plan, &memory);
            // The header's fields that say what the kernel is are there for the kernel to see.
            assert_eq!(memory.u64(plan.entry.rsi + 0x258), KERNEL_BASE);
        },
    );
}

#[test]
fn a_bzimage_that_is_not_unpacked_is_entered_at_its_64_bit_entry() {
    let mut payload = b"BZh9".to_vec();
    payload.resize(0x1000, 7);
    let file = bzimage(&payload);
    planned(&file, Protocol::Linux64, |plan, memory| {
        assert!(plan.entry.is_long_mode());
        assert_eq!(plan.entry.rip, KERNEL_BASE + 0x200);
        assert_eq!(memory.read(KERNEL_BASE + 0x400, 0x1000), payload);
        check_zero_page(plan, &memory);
    });
    let packed = bzimage(&lz4_payload(&ElfSpec::linux().build()));
    let layout = layout(64);
    let request = BootRequest {
        bzimage: BzImageMode::Guest,
        ..request(&packed, &layout)
    };
    assert_eq!(plan(&request).unwrap().protocol, Protocol::Linux64);
}

#[test]
fn a_bzimage_without_64_bit_entry_starts_in_protected_mode() {
    let mut file = bzimage(&lz4_payload(&ElfSpec::bits_32().build()));
    put(&mut file, 0x236, &0u16.to_le_bytes());
    planned(&file, Protocol::Linux32, |plan, memory| {
        assert!(!plan.entry.is_long_mode());
        assert_eq!(plan.entry.rip, KERNEL_BASE);
        check_zero_page(plan, &memory);
    });
}

#[test]
fn an_old_bzimage_loads_at_one_mebibyte() {
    let mut file = bzimage(&[0; 0x1000]);
    put(&mut file, 0x206, &0x0206u16.to_le_bytes());
    planned(&file, Protocol::Linux32, |plan, _| {
        assert_eq!(plan.entry.rip, 0x10_0000)
    });
}

#[test]
fn a_vmlinux_gets_a_header_of_its_own() {
    planned(
        &ElfSpec::linux().build(),
        Protocol::LinuxUnpacked,
        |plan, memory| {
            assert_eq!(plan.entry.rip, KERNEL_BASE);
            check_zero_page(plan, &memory);
        },
    );
}

#[test]
fn a_virtual_entry_address_is_translated() {
    let mut elf = ElfSpec::linux();
    elf.entry = KERNEL_BASE + elf.offset + 0x123;
    planned(&elf.build(), Protocol::LinuxUnpacked, |plan, _| {
        assert_eq!(plan.entry.rip, KERNEL_BASE + 0x123)
    });
}

#[test]
fn the_random_seed_is_handed_over() {
    let kernel = ElfSpec::linux().build();
    let layout = layout(64);
    let plan = plan(&BootRequest {
        rng_seed: Some([0x5a; 32]),
        ..request(&kernel, &layout)
    })
    .unwrap();
    let memory = Memory(&plan);
    let data = memory.u64(plan.entry.rsi + 0x250);
    assert_eq!(
        (
            memory.u64(data),
            memory.u32(data + 8),
            memory.u32(data + 12)
        ),
        (0, 9, 32)
    );
    assert_eq!(memory.read(data + 16, 32), [0x5a; 32]);
}

#[test]
fn an_elf_with_the_note_starts_by_pvh() {
    let elf = ElfSpec {
        notes: pvh_notes(KERNEL_BASE as u32 + 0x30),
        ..ElfSpec::linux()
    };
    planned(&elf.build(), Protocol::Pvh, |plan, memory| {
        assert!(!plan.entry.is_long_mode());
        assert_eq!(plan.entry.rip, KERNEL_BASE + 0x30);
        assert_eq!(plan.entry.cr0 & !(1 << 4), 1, "protection and nothing else");
        let info = plan.entry.rbx;
        assert_eq!((memory.u32(info), memory.u32(info + 4)), (0x336e_c578, 1));
        assert_eq!(memory.string(memory.u64(info + 24)), "console=ttyS0 quiet");
        assert_eq!(memory.u64(info + 32), ACPI_START);
        assert_eq!(memory.u32(info + 12), 1, "modules");
        let module = memory.u64(info + 16);
        assert_eq!(memory.read(memory.u64(module), 11), b"initrd here");
        assert_eq!(memory.u64(module + 8), 11);
        let map = memory.u64(info + 40);
        assert_eq!(memory.u32(info + 48) as usize, plan.memory_map.len());
        for (index, range) in plan.memory_map.iter().enumerate() {
            let at = map + index as u64 * 24;
            assert_eq!(
                (memory.u64(at), memory.u64(at + 8)),
                (range.start, range.size)
            );
            assert_eq!(memory.u32(at + 16), range.kind as u32);
        }
    });
}

/// What a multiboot kernel finds.
fn check_multiboot_info(plan: &LoadPlan, memory: &Memory) {
    assert_eq!(plan.entry.rax, 0x2bad_b002);
    let info = plan.entry.rbx;
    let field = |at: u64| u64::from(memory.u32(info + at));
    assert_eq!(field(0), 0x24d);
    assert_eq!((field(4), field(8)), (639, (3 << 20) - 1024));
    assert_eq!(memory.string(field(16)), "console=ttyS0 quiet");
    assert_eq!(field(20), 1, "modules");
    let [start, end, string] = [0, 4, 8].map(|at| memory.u32(field(24) + at));
    assert_eq!(
        memory.read(start.into(), (end - start) as usize),
        b"initrd here"
    );
    assert_eq!(memory.string(string.into()), "");
    assert_eq!(memory.string(field(64)), "Strata");
    let (length, map) = (field(44), field(48));
    assert_eq!(length, plan.memory_map.len() as u64 * 24);
    for (index, range) in plan.memory_map.iter().enumerate() {
        let at = map + index as u64 * 24;
        assert_eq!(memory.u32(at), 20);
        assert_eq!(
            (memory.u64(at + 4), memory.u64(at + 12)),
            (range.start, range.size)
        );
    }
}

#[test]
fn a_multiboot_elf_starts_by_multiboot() {
    for spec in [
        ElfSpec::bits_32(),
        ElfSpec {
            offset: 0,
            ..ElfSpec::linux()
        },
    ] {
        let mut elf = spec;
        put(&mut elf.code, 0x100, &multiboot_header(3, &[]));
        planned(&elf.build(), Protocol::Multiboot, |plan, memory| {
            assert_eq!(plan.entry.rip, KERNEL_BASE);
            assert_eq!(memory.read(KERNEL_BASE, elf.code.len()), elf.code);
            check_multiboot_info(plan, &memory);
        });
    }
}

#[test]
fn a_multiboot_kernel_may_say_its_addresses() {
    let file = multiboot_kernel();
    planned(&file, Protocol::Multiboot, |plan, memory| {
        assert_eq!(plan.entry.rip, 0x40_0020);
        assert_eq!(memory.read(0x40_0000, 0x1000), file[256..]);
        let kernel = plan
            .segments
            .iter()
            .find(|segment| segment.gpa.0 == 0x40_0000)
            .unwrap();
        assert_eq!(kernel.mem_size, 0x3000);
        check_multiboot_info(plan, &memory);
    });
}

#[test]
fn a_multiboot_requirement_that_is_not_known_is_refused() {
    let mut elf = ElfSpec::bits_32();
    put(&mut elf.code, 0x100, &multiboot_header(1 << 4, &[]));
    let layout = layout(64);
    let error = plan(&request(&elf.build(), &layout)).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::BadField {
                field: "flags",
                value: 0x10,
                ..
            }
        ),
        "{error}"
    );
}

fn error(request: &BootRequest) -> String {
    plan(request).unwrap_err().to_string()
}

#[test]
fn errors_about_files_say_what_is_wrong_and_where() {
    let layout = layout(64);
    let error = |kernel: &[u8]| error(&request(kernel, &layout));
    let kernel = bzimage(&lz4_payload(&ElfSpec::linux().build()));
    let size = kernel.len();
    assert_eq!(
        error(b"#!/bin/sh\n"),
        "the kernel is not a bzImage, an x86 ELF file or a multiboot image (10 bytes read)"
    );
    assert_eq!(
        error(&ElfSpec::bits_32().build()),
        BootError::NoEntryProtocol.to_string()
    );
    assert_eq!(
        error(&kernel[..size - 16]),
        format!(
            "the bzImage is cut short: protected-mode code takes bytes 0x400..{size:#x} of a file of {:#x} bytes",
            size - 16
        )
    );
    assert_eq!(
        error(
            &ElfSpec {
                mem_size: 1 << 40,
                ..ElfSpec::linux()
            }
            .build()
        ),
        "the kernel needs guest memory 0x1000000..0x10001000000, which is not usable RAM of this machine \
         (low RAM ends at 0x4000000)"
    );
}

#[test]
fn errors_about_parameters_say_what_is_possible() {
    let layout = layout(64);
    let kernel = bzimage(&lz4_payload(&ElfSpec::linux().build()));
    let good = request(&kernel, &layout);
    assert_eq!(
        error(&BootRequest {
            initrd: Some(&[]),
            ..good
        }),
        "the initrd is empty"
    );
    assert_eq!(
        error(&BootRequest {
            cmdline: "a\0b",
            ..good
        }),
        "the kernel command line has a zero byte at position 1"
    );
    assert_eq!(
        error(&BootRequest { cpus: 0, ..good }),
        "a machine has 1 to 254 CPUs, not 0"
    );
    assert_eq!(
        error(&BootRequest {
            cmdline: &"x".repeat(2048),
            ..good
        }),
        "the kernel command line has 2048 bytes, this kernel takes at most 2047"
    );
    assert_eq!(
        error(&BootRequest {
            initrd: Some(&vec![1; 48 << 20]),
            ..good
        }),
        "the initrd of 50331648 bytes does not fit into guest memory below 0x4000000; give the machine more memory"
    );
}

#[test]
fn a_machine_without_memory_above_4_gib_is_told_of_none() {
    let kernel = ElfSpec::linux().build();
    let layout = layout(64);
    let plan = plan(&request(&kernel, &layout)).unwrap();
    let usable: u64 = plan
        .memory_map
        .iter()
        .filter(|range| range.kind == MemoryKind::Usable)
        .map(|range| range.size)
        .sum();
    assert_eq!(usable, (64 << 20) - 0x10_0000 + 0x9_fc00);
}

#[test]
fn the_initrd_lies_as_high_as_the_kernel_can_reach() {
    let mut file = bzimage(&lz4_payload(&ElfSpec::linux().build()));
    put(&mut file, 0x22c, &0x37ff_ffffu32.to_le_bytes());
    let layout = layout(3 << 10);
    let initrd = vec![9; 0x1801];
    let plan = plan(&BootRequest {
        initrd: Some(&initrd),
        ..request(&file, &layout)
    })
    .unwrap();
    let segment = plan
        .segments
        .iter()
        .find(|segment| segment.what == "the initrd")
        .unwrap();
    assert_eq!(segment.gpa.0, 0x3800_0000 - 0x2000);
}
