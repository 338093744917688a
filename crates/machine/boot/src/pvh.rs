//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use crate::builder::{Builder, low};
use crate::elf::Elf;
use crate::entry::Registers;
use crate::memory_map::MemoryRange;
use crate::plan::{Bytes, Context, Protocol};
use crate::view::put;
use crate::{BootError, Entry, Gpa};

const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;
const MODULE_SIZE: usize = 32;
/// The protocol sets no limit; this is what the area below 1 MiB has room for.
const CMDLINE_MAX: u64 = low::CMDLINE_MAX;

/// Starts an ELF kernel at the address its note tells.
pub(crate) fn start<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
    elf: &Elf,
    source: &Bytes<'a>,
    address: u64,
) -> Result<(Protocol, Entry), BootError> {
    builder.place_elf(elf, source)?;
    let in_code = |start: u64, size: u64| address.checked_sub(start).is_some_and(|at| at < size);
    if !elf
        .loads
        .iter()
        .any(|load| in_code(load.address, load.file.len() as u64))
        || u32::try_from(address).is_err()
    {
        let reason = "no loaded segment has code there";
        return Err(BootError::BadField {
            what: "ELF kernel",
            field: "PVH entry",
            value: address,
            reason,
        });
    }
    let cmdline = builder.place_cmdline(context.request.cmdline, CMDLINE_MAX)?;
    let module = match context.request.initrd {
        Some(initrd) => Some((
            builder.place_high("the initrd", initrd, 1 << 32)?,
            initrd.len() as u64,
        )),
        None => None,
    };
    let info = start_info(context.memory_map, context.rsdp, cmdline, module);
    builder.place("the start info", low::BOOT_INFO, info)?;
    let registers = Registers {
        rip: address,
        rbx: low::BOOT_INFO.0,
        ..Registers::default()
    };
    Ok((Protocol::Pvh, Entry::protected32(builder, registers)?))
}

/// `hvm_start_info`, followed by the module list and the memory map it points to.
fn start_info(map: &[MemoryRange], rsdp: Gpa, cmdline: Gpa, module: Option<(Gpa, u64)>) -> Vec<u8> {
    let modules_at = low::BOOT_INFO.0 + START_INFO_SIZE as u64;
    let map_at = modules_at + MODULE_SIZE as u64;
    let mut info = vec![0u8; START_INFO_SIZE + MODULE_SIZE];
    put(&mut info, 0, &MAGIC.to_le_bytes());
    put(&mut info, 4, &VERSION.to_le_bytes());
    put(&mut info, 24, &cmdline.0.to_le_bytes());
    put(&mut info, 32, &rsdp.0.to_le_bytes());
    put(&mut info, 40, &map_at.to_le_bytes());
    put(&mut info, 48, &(map.len() as u32).to_le_bytes());
    if let Some((gpa, size)) = module {
        put(&mut info, 12, &1u32.to_le_bytes());
        put(&mut info, 16, &modules_at.to_le_bytes());
        put(&mut info, START_INFO_SIZE, &gpa.0.to_le_bytes());
        put(&mut info, START_INFO_SIZE + 8, &size.to_le_bytes());
    }
    for range in map {
        info.extend(range.start.to_le_bytes());
        info.extend(range.size.to_le_bytes());
        info.extend((range.kind as u32).to_le_bytes());
        info.extend([0; 4]);
    }
    info
}
