//! Linux's own boot protocols (Documentation/arch/x86/boot.rst and zero-page.rst): 64-bit and 32-bit entry.

use crate::builder::{Builder, low};
use crate::bzimage::{BzImage, HEADER_START};
use crate::elf::Elf;
use crate::entry::Registers;
use crate::plan::{Bytes, Context, Protocol};
use crate::view::put;
use crate::{BootError, Entry, Gpa};

const ZERO_PAGE_SIZE: usize = 0x1000;
const E820_ENTRY_SIZE: usize = 20;
/// The boot loader has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// What a header made here says: protocol 2.15.
const PROTOCOL_VERSION: u16 = 0x020f;
const SETUP_RNG_SEED: u32 = 9;
/// `SETUP_DATA` is understood from this protocol on.
const SETUP_DATA_SINCE: u16 = 0x209;
/// A vmlinux does not say how long a command line may be, or how high an initrd may lie: what every x86-64 kernel takes.
const VMLINUX_CMDLINE_MAX: u64 = 2047;
const VMLINUX_INITRD_LIMIT: u64 = 0x8000_0000;

/// Starts an unpacked 64-bit kernel at its link address. What the decompressor would have done besides unpacking is
/// to choose a random address and to find the ACPI tables: the latter are named in the boot parameters.
pub(crate) fn start_unpacked<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
    elf: &Elf,
    source: &Bytes<'a>,
    image: Option<&BzImage<'a>>,
) -> Result<(Protocol, Entry), BootError> {
    builder.place_elf(elf, source)?;
    let header = match image {
        Some(image) => image.header.to_vec(),
        None => vmlinux_header(),
    };
    let cmdline_max = image.map_or(VMLINUX_CMDLINE_MAX, |image| image.cmdline_max);
    let initrd_limit = image.map_or(VMLINUX_INITRD_LIMIT, |image| image.initrd_limit);
    place_boot_params(builder, context, &header, cmdline_max, initrd_limit)?;
    let registers = Registers {
        rip: elf.physical_entry()?,
        rsi: low::BOOT_INFO.0,
        ..Registers::default()
    };
    Ok((Protocol::LinuxUnpacked, Entry::long64(builder, registers)?))
}

/// Starts a bzImage through its decompressor.
pub(crate) fn start_bzimage<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
    image: &BzImage<'a>,
) -> Result<(Protocol, Entry), BootError> {
    // The decompressor works within `init_size`, which is scratch memory beyond the body: reserved, not cleared.
    let body_size = image.body.len() as u64;
    builder.place("the kernel", Gpa(image.load_address), image.body)?;
    let body_end = Gpa(image.load_address + body_size);
    builder.reserve(
        "the kernel's decompressor",
        body_end,
        image.init_size.saturating_sub(body_size),
    )?;
    place_boot_params(
        builder,
        context,
        image.header,
        image.cmdline_max,
        image.initrd_limit,
    )?;
    let registers = Registers {
        rsi: low::BOOT_INFO.0,
        ..Registers::default()
    };
    if image.has_64_bit_entry {
        let entry = Entry::long64(
            builder,
            Registers {
                rip: image.load_address + 0x200,
                ..registers
            },
        )?;
        Ok((Protocol::Linux64, entry))
    } else {
        let entry = Entry::protected32(
            builder,
            Registers {
                rip: image.load_address,
                ..registers
            },
        )?;
        Ok((Protocol::Linux32, entry))
    }
}

/// A setup header for a kernel that came without one.
fn vmlinux_header() -> Vec<u8> {
    let mut header = vec![0; 0x7b];
    let at = |offset: usize| offset - HEADER_START as usize;
    put(&mut header, at(0x1fe), &0xaa55u16.to_le_bytes());
    put(&mut header, at(0x202), b"HdrS");
    put(&mut header, at(0x206), &PROTOCOL_VERSION.to_le_bytes());
    put(&mut header, at(0x211), &[1]);
    put(&mut header, at(0x230), &0x0100_0000u32.to_le_bytes());
    header
}

/// The zero page, and what it points to: command line, initrd, random seed.
fn place_boot_params<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
    header: &[u8],
    cmdline_max: u64,
    initrd_limit: u64,
) -> Result<(), BootError> {
    let request = context.request;
    let mut page = vec![0u8; ZERO_PAGE_SIZE];
    put(&mut page, HEADER_START as usize, header);
    put(&mut page, 0x210, &[LOADER_UNDEFINED]);
    put(&mut page, 0x070, &context.rsdp.0.to_le_bytes());

    let cmdline = builder.place_cmdline(request.cmdline, cmdline_max)?;
    put(&mut page, 0x228, &(cmdline.0 as u32).to_le_bytes());

    if let Some(seed) = request.rng_seed
        && setup_version(header) >= SETUP_DATA_SINCE
    {
        builder.place("the random seed", low::SETUP_DATA, seed_setup_data(seed))?;
        put(&mut page, 0x250, &low::SETUP_DATA.0.to_le_bytes());
    }
    let entries = context.memory_map.len();
    put(&mut page, 0x1e8, &[entries as u8]);
    for (index, range) in context.memory_map.iter().enumerate() {
        let at = 0x2d0 + index * E820_ENTRY_SIZE;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &range.size.to_le_bytes());
        put(&mut page, at + 16, &(range.kind as u32).to_le_bytes());
    }
    if let Some(initrd) = request.initrd {
        // Both numbers fit: the initrd lies below `initrd_limit`, at most 4 GiB.
        let gpa = builder.place_high("the initrd", initrd, initrd_limit)?;
        put(&mut page, 0x218, &(gpa.0 as u32).to_le_bytes());
        put(&mut page, 0x21c, &(initrd.len() as u32).to_le_bytes());
    }
    builder.place("the boot parameters", low::BOOT_INFO, page)
}

fn setup_version(header: &[u8]) -> u16 {
    let at = 0x206 - HEADER_START as usize;
    header
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .map_or(0, u16::from_le_bytes)
}

/// A `struct setup_data` at the end of its list: next, type, length, data.
fn seed_setup_data(seed: [u8; 32]) -> Vec<u8> {
    let mut data = 0u64.to_le_bytes().to_vec();
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend((seed.len() as u32).to_le_bytes());
    data.extend(seed);
    data
}
