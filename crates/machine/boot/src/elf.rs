//! ELF executables for x86, 32 and 64 bits: what to load where, where to enter, and the PVH note.

use std::ops::Range;

use crate::BootError;
use crate::view::View;

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const TYPE_LOAD: u32 = 1;
const TYPE_NOTE: u32 = 4;
/// Kernels have a handful of loadable segments; more than this is a damaged file.
const LOADS_MAX: usize = 64;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, public/elfnote.h).
const XEN_PHYS32_ENTRY: u32 = 18;

/// A loadable segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Load {
    /// Physical address.
    pub(crate) address: u64,
    /// Virtual address.
    pub(crate) virtual_address: u64,
    /// Where its bytes lie in the file.
    pub(crate) file: Range<usize>,
    /// Its size in memory; zeroes follow the file's bytes.
    pub(crate) mem_size: u64,
}

/// A checked ELF file.
pub(crate) struct Elf<'a> {
    view: View<'a>,
    machine: u16,
    is_64: bool,
    entry: u64,
    /// What to load, in the file's order; never empty.
    pub(crate) loads: Vec<Load>,
    notes: Vec<(Range<usize>, u64)>,
}

impl<'a> Elf<'a> {
    /// Whether a file carries the signature of an ELF file.
    pub(crate) fn is_one(file: &[u8]) -> bool {
        file.starts_with(b"\x7fELF")
    }

    /// Reads and checks the headers.
    pub(crate) fn parse(what: &'static str, file: &'a [u8]) -> Result<Self, BootError> {
        let view = View::new(what, file);
        if !Self::is_one(file) {
            return Err(view.bad("e_ident", view.u32("e_ident", 0)?, "it is not an ELF file"));
        }
        let is_64 = match view.u8("EI_CLASS", 4)? {
            CLASS_32 => false,
            CLASS_64 => true,
            class => {
                return Err(view.bad("EI_CLASS", class, "it must be 1 (32-bit) or 2 (64-bit)"));
            }
        };
        let data = view.u8("EI_DATA", 5)?;
        if data != LITTLE_ENDIAN {
            return Err(view.bad("EI_DATA", data, "only little-endian files run on x86"));
        }
        let machine = view.u16("e_machine", 18)?;
        if machine != MACHINE_X86_64 && (is_64 || machine != MACHINE_386) {
            return Err(view.bad("e_machine", machine, "it is not built for x86"));
        }
        let mut elf = Self {
            view,
            machine,
            is_64,
            entry: 0,
            loads: Vec::new(),
            notes: Vec::new(),
        };
        elf.entry = elf.word("e_entry", 24, 24)?;
        elf.read_segments()?;
        if elf.loads.is_empty() {
            return Err(view.bad("e_phnum", 0u64, "there is no segment to load"));
        }
        Ok(elf)
    }

    /// A field that is 4 bytes at `at_32` in a 32-bit file and 8 bytes at `at_64` in a 64-bit file.
    fn word(&self, field: &'static str, at_32: u64, at_64: u64) -> Result<u64, BootError> {
        if self.is_64 {
            self.view.u64(field, at_64)
        } else {
            self.view.u32(field, at_32).map(u64::from)
        }
    }

    fn read_segments(&mut self) -> Result<(), BootError> {
        let table = self.word("e_phoff", 28, 32)?;
        let (size_at, count_at, size) = if self.is_64 {
            (54, 56, 56)
        } else {
            (42, 44, 32)
        };
        let entry_size = u64::from(self.view.u16("e_phentsize", size_at)?);
        let count = u64::from(self.view.u16("e_phnum", count_at)?);
        if count > 0 && entry_size < size {
            return Err(self.view.bad(
                "e_phentsize",
                entry_size,
                "program headers are larger than that",
            ));
        }
        for index in 0..count {
            let at = table.saturating_add(index * entry_size);
            self.view.slice("program header", at, size)?;
            self.read_segment(at)?;
        }
        Ok(())
    }

    fn read_segment(&mut self, at: u64) -> Result<(), BootError> {
        let field = |name, at_32, at_64| self.word(name, at + at_32, at + at_64);
        let kind = self.view.u32("p_type", at)?;
        if kind != TYPE_LOAD && kind != TYPE_NOTE {
            return Ok(());
        }
        let offset = field("p_offset", 4, 8)?;
        let file_size = field("p_filesz", 16, 32)?;
        let file = self.view.range("segment", offset, file_size)?;
        if kind == TYPE_NOTE {
            let align = field("p_align", 28, 48)?;
            self.notes.push((file, if align == 8 { 8 } else { 4 }));
            return Ok(());
        }
        let mem_size = field("p_memsz", 20, 40)?;
        if mem_size < file_size {
            return Err(self
                .view
                .bad("p_memsz", mem_size, "it is smaller than p_filesz"));
        }
        if self.loads.len() == LOADS_MAX {
            return Err(self.view.bad(
                "e_phnum",
                LOADS_MAX as u64 + 1,
                "there are too many segments to load",
            ));
        }
        if mem_size > 0 {
            let load = Load {
                address: field("p_paddr", 12, 24)?,
                virtual_address: field("p_vaddr", 8, 16)?,
                file,
                mem_size,
            };
            self.loads.push(load);
        }
        Ok(())
    }

    /// Whether this is code for long mode.
    pub(crate) fn is_x86_64(&self) -> bool {
        self.is_64 && self.machine == MACHINE_X86_64
    }

    /// The physical address of the entry point. Linux gives it so; other kernels give a virtual address, which is
    /// translated by the segment that contains it.
    pub(crate) fn physical_entry(&self) -> Result<u64, BootError> {
        let inside = |start: u64, load: &Load| {
            self.entry
                .checked_sub(start)
                .filter(|at| *at < load.file.len() as u64)
        };
        if self
            .loads
            .iter()
            .any(|load| inside(load.address, load).is_some())
        {
            return Ok(self.entry);
        }
        self.loads
            .iter()
            .find_map(|load| {
                load.address
                    .checked_add(inside(load.virtual_address, load)?)
            })
            .ok_or_else(|| {
                self.view
                    .bad("e_entry", self.entry, "no loaded segment has code there")
            })
    }

    /// The 32-bit entry point of the PVH protocol, if the file has a note that tells one.
    pub(crate) fn pvh_entry(&self) -> Result<Option<u64>, BootError> {
        for (range, align) in &self.notes {
            let notes = View::new(
                "ELF kernel's notes",
                self.view.bytes().get(range.clone()).unwrap_or_default(),
            );
            if let Some(entry) = pvh_note(notes, *align)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }
}

/// Walks one note segment: sizes of name and descriptor, type, name, descriptor, the latter two padded.
fn pvh_note(notes: View, align: u64) -> Result<Option<u64>, BootError> {
    let mut at = 0u64;
    // Fewer than 12 bytes at the end are padding.
    while at.saturating_add(12) <= notes.len() {
        let name_size = u64::from(notes.u32("n_namesz", at)?);
        let desc_size = u64::from(notes.u32("n_descsz", at + 4)?);
        let kind = notes.u32("n_type", at + 8)?;
        let name_at = at + 12;
        let desc_at = (name_at + name_size).next_multiple_of(align);
        let name = notes.slice("note name", name_at, name_size)?;
        if kind == XEN_PHYS32_ENTRY && name == b"Xen\0" {
            return match desc_size {
                4 => notes
                    .u32("PVH entry", desc_at)
                    .map(|entry| Some(entry.into())),
                8 => notes.u64("PVH entry", desc_at).map(Some),
                size => Err(notes.bad("n_descsz", size, "a PVH entry has 4 or 8 bytes")),
            };
        }
        at = (desc_at + desc_size).next_multiple_of(align);
    }
    Ok(None)
}
