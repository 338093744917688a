//! The bzImage container: its setup header (Linux, Documentation/arch/x86/boot.rst) and the pieces it names.

use crate::BootError;
use crate::view::View;

/// The header begins here in the file and in the boot parameters.
pub(crate) const HEADER_START: u64 = 0x1f1;
const BOOT_FLAG: u64 = 0x1fe;
const MAGIC: u64 = 0x202;
const SECTOR: u64 = 512;
/// The oldest protocol taken: the first whose header says how long a command line may be.
const OLDEST_PROTOCOL: u16 = 0x206;
/// The header may be at most this long: what follows it in the boot parameters is not part of it.
const HEADER_END_MAX: u64 = 0x290;

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;

/// A checked bzImage.
pub(crate) struct BzImage<'a> {
    /// The setup header as it is in the file, from [`HEADER_START`].
    pub(crate) header: &'a [u8],
    /// The protected-mode part, decompressor and payload, as it is to be loaded.
    pub(crate) body: &'a [u8],
    /// Where the body is to be loaded.
    pub(crate) load_address: u64,
    /// How much memory from there it needs while it starts.
    pub(crate) init_size: u64,
    /// Whether the body can be entered in long mode at +0x200.
    pub(crate) has_64_bit_entry: bool,
    /// The longest command line, without its zero.
    pub(crate) cmdline_max: u64,
    /// One past the last address the initrd may take.
    pub(crate) initrd_limit: u64,
    /// The compressed kernel, if the header says where it is.
    pub(crate) payload: Option<&'a [u8]>,
}

impl<'a> BzImage<'a> {
    /// Whether a file carries the signatures of a bzImage.
    pub(crate) fn is_one(kernel: &[u8]) -> bool {
        let view = View::new("bzImage", kernel);
        view.u16("boot_flag", BOOT_FLAG) == Ok(0xaa55)
            && view.array("header", MAGIC) == Ok(*b"HdrS")
    }

    /// Reads and checks the header.
    pub(crate) fn parse(kernel: &'a [u8]) -> Result<Self, BootError> {
        let view = View::new("bzImage", kernel);
        let version = view.u16("version", 0x206)?;
        if version < OLDEST_PROTOCOL {
            return Err(view.bad("version", version, "boot protocol 2.06 or newer is needed"));
        }
        let load_flags = view.u8("loadflags", 0x211)?;
        if load_flags & LOADED_HIGH == 0 {
            return Err(view.bad(
                "loadflags",
                load_flags,
                "a zImage, which loads below 1 MiB, is not supported",
            ));
        }
        let header_end = 0x202 + u64::from(view.u8("jump", 0x201)?);
        if !(0x23c..=HEADER_END_MAX).contains(&header_end) {
            return Err(view.bad(
                "jump",
                header_end,
                "the setup header would have an impossible size",
            ));
        }
        let header = view.slice("setup header", HEADER_START, header_end - HEADER_START)?;

        // Fields that came after 2.06 count only if the version says they are there.
        let since = |needed: u16, value: Result<u64, BootError>, otherwise: u64| {
            if version >= needed {
                value
            } else {
                Ok(otherwise)
            }
        };
        let sectors = match view.u8("setup_sects", HEADER_START)? {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let body_start = (sectors + 1) * SECTOR;
        let mut body_size = u64::from(view.u32("syssize", 0x1f4)?) * 16;
        // The size is counted in units of 16 bytes, and not every build fills up the last one.
        let there = view.len().saturating_sub(body_start);
        if body_size.saturating_sub(there) < 16 {
            body_size = body_size.min(there);
        }
        let body = view.slice("protected-mode code", body_start, body_size)?;
        if body.len() < 0x400 {
            return Err(view.bad("syssize", body_size / 16, "there is no protected-mode code"));
        }
        let load_address = since(0x20a, view.u64("pref_address", 0x258), 0x10_0000)?;
        if load_address < 0x10_0000 || load_address > u64::from(u32::MAX) {
            return Err(view.bad(
                "pref_address",
                load_address,
                "it must lie between 1 MiB and 4 GiB",
            ));
        }
        let init_size = since(
            0x20a,
            view.u32("init_size", 0x260).map(u64::from),
            body_size.saturating_mul(3),
        )?;
        let xload_flags = since(0x20c, view.u16("xloadflags", 0x236).map(u64::from), 0)?;
        let initrd_limit = u64::from(view.u32("initrd_addr_max", 0x22c)?) + 1;
        let cmdline_max = u64::from(view.u32("cmdline_size", 0x238)?);
        let payload_offset = since(0x208, view.u32("payload_offset", 0x248).map(u64::from), 0)?;
        let payload_length = since(0x208, view.u32("payload_length", 0x24c).map(u64::from), 0)?;
        let payload = if payload_length == 0 {
            None
        } else {
            Some(View::new("bzImage's protected-mode code", body).slice(
                "payload",
                payload_offset,
                payload_length,
            )?)
        };
        Ok(Self {
            header,
            body,
            load_address,
            init_size: init_size.max(body_size),
            has_64_bit_entry: xload_flags as u16 & XLF_KERNEL_64 != 0,
            cmdline_max,
            initrd_limit,
            payload,
        })
    }
}
