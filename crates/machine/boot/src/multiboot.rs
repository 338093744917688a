//! Multiboot 1 (Multiboot Specification 0.6.96): ELF kernels and those that say by address what to load.

use crate::builder::{Builder, low};
use crate::elf::Elf;
use crate::entry::Registers;
use crate::memory_map::{HIGH_MEMORY_START, LOW_USABLE_END, MemoryRange};
use crate::plan::{Bytes, Context, Protocol};
use crate::view::{View, put};
use crate::{BootError, Entry, Gpa};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What a kernel finds in EAX.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies within this much of the file's beginning, on a multiple of 4.
const SEARCH_SIZE: usize = 8192;
const HAS_ADDRESSES: u32 = 1 << 16;
/// Requirements known here: modules on page boundaries, memory information, video mode (a wish that is not met).
const KNOWN_REQUIREMENTS: u32 = 0b111;
const WHAT: &str = "multiboot kernel";

/// Sizes of the information structure and of the entries of its lists.
const INFO_SIZE: usize = 116;
const MODULE_SIZE: usize = 16;
const MAP_ENTRY_SIZE: usize = 24;
/// Bits that say which fields of the information are valid: memory, command line, modules, memory map, loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const LOADER_NAME: &[u8; 8] = b"Strata\0\0";

/// The header, where it lies and what it says.
pub(crate) struct Header {
    offset: u64,
    flags: u32,
}

impl Header {
    /// Looks for the header; its checksum must be right.
    pub(crate) fn find(file: &[u8]) -> Option<Self> {
        let start = file.get(..SEARCH_SIZE.min(file.len()))?;
        let view = View::new(WHAT, start);
        (0..start.len() as u64).step_by(4).find_map(|offset| {
            let word = |index: u64| view.u32("header", offset + index * 4).ok();
            if word(0)? != HEADER_MAGIC {
                return None;
            }
            let flags = word(1)?;
            let sum = HEADER_MAGIC.wrapping_add(flags).wrapping_add(word(2)?);
            (sum == 0).then_some(Self { offset, flags })
        })
    }
}

/// Starts a multiboot kernel.
pub(crate) fn start<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
    header: &Header,
    elf: Option<&Elf>,
    source: &Bytes<'a>,
) -> Result<(Protocol, Entry), BootError> {
    let unknown = header.flags & 0xffff & !KNOWN_REQUIREMENTS;
    if unknown != 0 {
        let reason = "it requires something that is not known here";
        return Err(BootError::BadField {
            what: WHAT,
            field: "flags",
            value: header.flags.into(),
            reason,
        });
    }
    let rip = if header.flags & HAS_ADDRESSES != 0 {
        load_by_addresses(builder, header, source)?
    } else if let Some(elf) = elf {
        builder.place_elf(elf, source)?;
        elf.physical_entry()?
    } else {
        let reason = "the file is not ELF and says no load addresses";
        return Err(BootError::BadField {
            what: WHAT,
            field: "flags",
            value: header.flags.into(),
            reason,
        });
    };
    builder.place("the BIOS data area", low::BIOS_DATA, bios_data())?;
    let info = place_info(builder, context)?;
    let registers = Registers {
        rip,
        rax: LOADER_MAGIC,
        rbx: info.0,
        ..Registers::default()
    };
    Ok((Protocol::Multiboot, Entry::protected32(builder, registers)?))
}

/// Loads what the header's five addresses say (the specification's "a.out kludge"); gives the entry address.
fn load_by_addresses<'a>(
    builder: &mut Builder<'a>,
    header: &Header,
    source: &Bytes<'a>,
) -> Result<u64, BootError> {
    let view = View::new(WHAT, source);
    let address = |field, index: u64| {
        view.u32(field, header.offset + 12 + index * 4)
            .map(u64::from)
    };
    let header_address = address("header_addr", 0)?;
    let load_address = address("load_addr", 1)?;
    let load_end = address("load_end_addr", 2)?;
    let bss_end = address("bss_end_addr", 3)?;
    let entry = address("entry_addr", 4)?;

    // The header's place in the file and in memory give the place in the file of the first byte to load.
    let before_header = header_address.checked_sub(load_address);
    let offset = before_header
        .and_then(|before| header.offset.checked_sub(before))
        .ok_or_else(|| {
            view.bad(
                "load_addr",
                load_address,
                "together with header_addr it points before the beginning of the file",
            )
        })?;
    let size = match load_end {
        0 => view.len() - offset,
        end => end
            .checked_sub(load_address)
            .ok_or_else(|| view.bad("load_end_addr", end, "it lies before load_addr"))?,
    };
    let range = view.range("image", offset, size)?;
    let mem_size = match bss_end {
        0 => size,
        end => end
            .checked_sub(load_address)
            .filter(|whole| *whole >= size)
            .ok_or_else(|| {
                view.bad(
                    "bss_end_addr",
                    end,
                    "it lies before the end of what is loaded",
                )
            })?,
    };
    if entry.checked_sub(load_address).is_none_or(|at| at >= size) {
        return Err(view.bad("entry_addr", entry, "it lies outside of what is loaded"));
    }
    builder.place_sized(
        "the kernel",
        Gpa(load_address),
        source.part(range),
        mem_size,
    )?;
    Ok(entry)
}

/// What kernels made for PCs read of the BIOS's variables: the segment of the extended data area at 0x40e and the size
/// of conventional memory in KiB at 0x413.
fn bios_data() -> Vec<u8> {
    let mut data = vec![0; 0x100];
    put(
        &mut data,
        0x0e,
        &((LOW_USABLE_END >> 4) as u16).to_le_bytes(),
    );
    put(
        &mut data,
        0x13,
        &((LOW_USABLE_END >> 10) as u16).to_le_bytes(),
    );
    data
}

/// The information structure with the lists it points to, in its place.
fn place_info<'a>(builder: &mut Builder<'a>, context: &Context<'a, '_>) -> Result<Gpa, BootError> {
    let request = context.request;
    let cmdline = builder.place_cmdline(request.cmdline, low::CMDLINE_MAX)?;
    let module = match request.initrd {
        Some(initrd) => {
            let gpa = builder.place_high("the module", initrd, 1 << 32)?;
            Some((gpa.0 as u32, (gpa.0 + initrd.len() as u64) as u32))
        }
        None => None,
    };
    let base = low::BOOT_INFO;
    let [name_at, modules_at, map_at] = [
        INFO_SIZE,
        INFO_SIZE + LOADER_NAME.len(),
        INFO_SIZE + LOADER_NAME.len() + MODULE_SIZE,
    ];
    let pointer = |offset: usize| (base.0 as u32 + offset as u32).to_le_bytes();
    let mut info = vec![0u8; map_at];
    put(&mut info, 0, &INFO_FLAGS.to_le_bytes());
    put(&mut info, 4, &((LOW_USABLE_END >> 10) as u32).to_le_bytes());
    put(
        &mut info,
        8,
        &((request
            .layout
            .low_ram()
            .end()
            .0
            .saturating_sub(HIGH_MEMORY_START)
            >> 10) as u32)
            .to_le_bytes(),
    );
    put(&mut info, 16, &(cmdline.0 as u32).to_le_bytes());
    put(&mut info, 20, &u32::from(module.is_some()).to_le_bytes());
    put(&mut info, 24, &pointer(modules_at));
    put(
        &mut info,
        44,
        &((context.memory_map.len() * MAP_ENTRY_SIZE) as u32).to_le_bytes(),
    );
    put(&mut info, 48, &pointer(map_at));
    put(&mut info, 64, &pointer(name_at));
    put(&mut info, name_at, LOADER_NAME);
    if let Some((start, end)) = module {
        put(&mut info, modules_at, &start.to_le_bytes());
        put(&mut info, modules_at + 4, &end.to_le_bytes());
        // The module has no command line of its own: its string is empty, the last byte of the loader's name.
        put(&mut info, modules_at + 8, &pointer(modules_at - 1));
    }
    info.extend(context.memory_map.iter().flat_map(map_entry));
    builder.place("the boot information", base, info)?;
    Ok(base)
}

/// An entry of the memory map; its first field is the size of the rest.
fn map_entry(range: &MemoryRange) -> [u8; MAP_ENTRY_SIZE] {
    let mut entry = [0; MAP_ENTRY_SIZE];
    put(&mut entry, 0, &(MAP_ENTRY_SIZE as u32 - 4).to_le_bytes());
    put(&mut entry, 4, &range.start.to_le_bytes());
    put(&mut entry, 12, &range.size.to_le_bytes());
    put(&mut entry, 20, &(range.kind as u32).to_le_bytes());
    entry
}
