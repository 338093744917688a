//! Kernels of all formats, with an initrd, for machines of several sizes.

use strata_boot::{BootRequest, BzImageMode, Platform, plan};
use strata_memory::Layout;

use super::input::Sum;

/// The last bytes choose the machine; the rest is the kernel.
pub fn run(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new();
    let (kernel, choice) = bytes.split_at(bytes.len().saturating_sub(2));
    let [size, how] = match choice {
        [size, how] => [*size, *how],
        _ => [0, 0],
    };
    let mib = [64, 16, 1, 3072, 8192][usize::from(size) % 5];
    let Ok(layout) = Layout::new(mib << 20, mib << 20) else {
        return 0;
    };
    let request = BootRequest {
        unpacked: None,
        kernel,
        initrd: (how & 1 != 0).then_some(&[0x5a; 5000]),
        cmdline: if how & 2 != 0 {
            "console=ttyS0 quiet"
        } else {
            ""
        },
        layout: &layout,
        cpus: u32::from(how >> 4) + 1,
        platform: Platform::default(),
        bzimage: if how & 4 != 0 {
            BzImageMode::Guest
        } else {
            BzImageMode::Unpack
        },
        rng_seed: (how & 8 != 0).then_some([7; 32]),
    };
    match plan(&request) {
        Ok(plan) => {
            sum.text(&format!("{:?}", plan.protocol));
            sum.add(plan.segments.len() as u64);
        }
        Err(error) => sum.text(&error.to_string()),
    }
    sum.0
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A small kernel of each format.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (class, note) in [(2u8, true), (2, false), (1, false)] {
        let mut elf = vec![0u8; 0x1400];
        put(&mut elf, 0, b"\x7fELF");
        elf[4] = class;
        elf[5] = 1;
        elf[6] = 1;
        put(&mut elf, 16, &2u16.to_le_bytes());
        put(
            &mut elf,
            18,
            &if class == 2 { 62u16 } else { 3 }.to_le_bytes(),
        );
        put(&mut elf, 20, &1u32.to_le_bytes());
        let entry = 0x10_0000u64;
        let segment = |kind: u32, at: u64, size: u64| -> Vec<u8> {
            let mut header = Vec::new();
            if class == 2 {
                header.extend(kind.to_le_bytes());
                header.extend(7u32.to_le_bytes());
                for value in [at, entry, entry, size, size + 0x1000, 0x1000] {
                    header.extend(value.to_le_bytes());
                }
            } else {
                for value in [
                    u64::from(kind),
                    at,
                    entry,
                    entry,
                    size,
                    size + 0x1000,
                    7,
                    0x1000,
                ] {
                    header.extend((value as u32).to_le_bytes());
                }
            }
            header
        };
        let count = if note { 2u16 } else { 1 };
        if class == 2 {
            put(&mut elf, 24, &entry.to_le_bytes());
            put(&mut elf, 32, &64u64.to_le_bytes());
            put(&mut elf, 52, &64u16.to_le_bytes());
            put(&mut elf, 54, &56u16.to_le_bytes());
            put(&mut elf, 56, &count.to_le_bytes());
            put(&mut elf, 64, &segment(1, 0x1000, 0x200));
            put(&mut elf, 120, &segment(4, 0x1200, 20));
            let mut text = Vec::new();
            for value in [4u32, 4, 18] {
                text.extend(value.to_le_bytes());
            }
            text.extend(b"Xen\0");
            text.extend((entry as u32).to_le_bytes());
            put(&mut elf, 0x1200, &text);
        } else {
            put(&mut elf, 24, &(entry as u32).to_le_bytes());
            put(&mut elf, 28, &52u32.to_le_bytes());
            put(&mut elf, 40, &52u16.to_le_bytes());
            put(&mut elf, 42, &32u16.to_le_bytes());
            put(&mut elf, 44, &count.to_le_bytes());
            put(&mut elf, 52, &segment(1, 0x1000, 0x200));
            // Multiboot, too.
            put(&mut elf, 0x100, &multiboot(0)[..12]);
        }
        elf.extend([0, 3]);
        seeds.push(elf);
    }
    let mut flat = vec![0x90u8; 0x400];
    put(&mut flat, 0, &multiboot(1 << 16));
    for (index, value) in [0x10_0000u32, 0x10_0000, 0, 0x10_1000, 0x10_0020]
        .iter()
        .enumerate()
    {
        put(&mut flat, 12 + index * 4, &value.to_le_bytes());
    }
    flat.extend([0, 1]);
    seeds.push(flat);
    for mode in [0u8, 4] {
        // Linux's boot protocol 2.15, one setup sector, a payload that is no archive.
        let mut image = vec![0u8; 0x3000];
        image[0x1f1] = 1;
        put(&mut image, 0x1f4, &0x100u32.to_le_bytes());
        put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
        put(&mut image, 0x202, b"HdrS");
        put(&mut image, 0x206, &0x20fu16.to_le_bytes());
        image[0x211] = 1;
        put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
        put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
        image[0x234] = 1;
        image[0x235] = 21;
        put(&mut image, 0x236, &0x0fu16.to_le_bytes());
        put(&mut image, 0x238, &0x7ffu32.to_le_bytes());
        put(&mut image, 0x248, &0x400u32.to_le_bytes());
        put(&mut image, 0x24c, &0x200u32.to_le_bytes());
        put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
        put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
        for magic in [
            &[0x1f, 0x8b, 8][..],
            &[0x02, 0x21, 0x4c, 0x18],
            &[0xfd, b'7', b'z', b'X', b'Z', 0],
            &[0x28, 0xb5, 0x2f, 0xfd],
            b"BZh9",
            &[0x5d, 0, 0],
        ] {
            let mut packed = image.clone();
            put(&mut packed, 0x400 + 0x400, magic);
            packed.extend([0, mode | 1]);
            seeds.push(packed);
        }
    }
    seeds.push(vec![0; 10]);
    seeds
}

/// Magic, flags and check sum, and room for the addresses.
fn multiboot(flags: u32) -> [u8; 32] {
    let mut header = [0; 32];
    let magic = 0x1bad_b002u32;
    put(&mut header, 0, &magic.to_le_bytes());
    put(&mut header, 4, &flags.to_le_bytes());
    put(
        &mut header,
        8,
        &magic.wrapping_add(flags).wrapping_neg().to_le_bytes(),
    );
    header
}
