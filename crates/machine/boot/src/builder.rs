//! The plan in the making: what lies where in guest memory, with nothing outside RAM and nothing twice.

use strata_memory::{GpaRange, Layout};

use crate::elf::Elf;
use crate::memory_map::{ACPI_START, HIGH_MEMORY_START, LOW_USABLE_END};
use crate::plan::{Bytes, Segment};
use crate::{BootError, Gpa};

/// Where small things go in conventional memory. The first bytes stay empty: null pointers lead there.
pub(crate) mod low {
    use crate::Gpa;

    /// The variables of a PC's BIOS, where a boot protocol's kernels may look for them.
    pub(crate) const BIOS_DATA: Gpa = Gpa(0x400);
    /// Descriptor table.
    pub(crate) const GDT: Gpa = Gpa(0x1000);
    /// Linux's boot parameters ("zero page"), PVH's start info or multiboot's boot information, with their lists.
    pub(crate) const BOOT_INFO: Gpa = Gpa(0x2000);
    /// Linux's `setup_data`.
    pub(crate) const SETUP_DATA: Gpa = Gpa(0x3000);
    /// Page tables: six pages.
    pub(crate) const PAGE_TABLES: Gpa = Gpa(0x4000);
    /// Stack, for kernels that use one before they set their own.
    pub(crate) const STACK: Gpa = Gpa(0xb000);
    /// Bytes of stack.
    pub(crate) const STACK_SIZE: u64 = 0x4000;
    /// Command line with its terminating zero.
    pub(crate) const CMDLINE: Gpa = Gpa(0x2_0000);
    /// The longest command line that has room, without its zero; kernels take less.
    pub(crate) const CMDLINE_MAX: u64 = 0xffff;
}

struct Taken {
    what: &'static str,
    start: u64,
    end: u64,
}

/// Collects segments and reservations.
pub(crate) struct Builder<'a> {
    low_end: u64,
    high_ram: GpaRange,
    segments: Vec<Segment<'a>>,
    taken: Vec<Taken>,
}

impl<'a> Builder<'a> {
    /// An empty plan for the machine's RAM.
    pub(crate) fn new(layout: &Layout) -> Self {
        let low_end = layout.low_ram().end().0;
        Self {
            low_end,
            high_ram: layout.high_ram(),
            segments: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Puts `bytes` at `gpa`.
    pub(crate) fn place(
        &mut self,
        what: &'static str,
        gpa: Gpa,
        bytes: impl Into<Bytes<'a>>,
    ) -> Result<(), BootError> {
        let bytes = bytes.into();
        let mem_size = bytes.len() as u64;
        self.place_sized(what, gpa, bytes, mem_size)
    }

    /// Puts `bytes` at `gpa`, followed by zeroes up to `mem_size` bytes.
    pub(crate) fn place_sized(
        &mut self,
        what: &'static str,
        gpa: Gpa,
        bytes: Bytes<'a>,
        mem_size: u64,
    ) -> Result<(), BootError> {
        let mem_size = mem_size.max(bytes.len() as u64);
        self.reserve(what, gpa, mem_size)?;
        if mem_size > 0 {
            self.segments.push(Segment {
                what,
                gpa,
                bytes,
                mem_size,
            });
        }
        Ok(())
    }

    /// Puts the loadable segments of an ELF kernel at their physical addresses.
    pub(crate) fn place_elf(&mut self, elf: &Elf, source: &Bytes<'a>) -> Result<(), BootError> {
        for load in &elf.loads {
            // Linux's last segment has much of its zeroed data in the file: fresh RAM need not be touched for that.
            let file = source.get(load.file.clone()).unwrap_or_default();
            let used = file
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |last| last + 1);
            let bytes = source.part(load.file.start..load.file.start + used);
            self.place_sized("the kernel", Gpa(load.address), bytes, load.mem_size)?;
        }
        Ok(())
    }

    /// Keeps everything else out of a range of RAM.
    pub(crate) fn reserve(
        &mut self,
        what: &'static str,
        gpa: Gpa,
        size: u64,
    ) -> Result<(), BootError> {
        let start = gpa.0;
        let end = self.in_ram(what, start, size)?;
        if size == 0 {
            return Ok(());
        }
        match self
            .taken
            .iter()
            .find(|other| start < other.end && other.start < end)
        {
            Some(other) => Err(BootError::Overlap {
                what,
                other: other.what,
                at: start.max(other.start),
            }),
            None => {
                self.taken.push(Taken { what, start, end });
                Ok(())
            }
        }
    }

    /// Puts `bytes` at the highest page of low RAM above 1 MiB at which they fit and end at or below `limit`.
    pub(crate) fn place_high(
        &mut self,
        what: &'static str,
        bytes: impl Into<Bytes<'a>>,
        limit: u64,
    ) -> Result<Gpa, BootError> {
        let bytes = bytes.into();
        let size = bytes.len() as u64;
        let limit = limit.min(self.low_end);
        let no_room = BootError::NoRoom { what, size, limit };
        let mut end = limit;
        loop {
            let start = end.checked_sub(size).map(|start| start & !0xfff);
            let Some(start) = start.filter(|start| *start >= HIGH_MEMORY_START) else {
                return Err(no_room);
            };
            let clash = self
                .taken
                .iter()
                .filter(|other| start < other.end && other.start < start + size);
            match clash.map(|other| other.start).min() {
                Some(below) => end = below,
                None => {
                    self.place(what, Gpa(start), bytes)?;
                    return Ok(Gpa(start));
                }
            }
        }
    }

    /// Puts the ACPI tables into the area kept for them, which nothing else may use.
    pub(crate) fn place_acpi(&mut self, bytes: Vec<u8>) -> Result<(), BootError> {
        let (what, size) = ("the ACPI tables", bytes.len() as u64);
        if size > HIGH_MEMORY_START - ACPI_START {
            return Err(BootError::NoRoom {
                what,
                size,
                limit: HIGH_MEMORY_START,
            });
        }
        self.segments.push(Segment {
            what,
            gpa: Gpa(ACPI_START),
            bytes: bytes.into(),
            mem_size: size,
        });
        Ok(())
    }

    /// The command line with its zero, in its place.
    pub(crate) fn place_cmdline(&mut self, cmdline: &str, max: u64) -> Result<Gpa, BootError> {
        let max = max.min(low::CMDLINE_MAX);
        let len = cmdline.len() as u64;
        if len > max {
            return Err(BootError::CmdlineTooLong { len, max });
        }
        let mut bytes = cmdline.as_bytes().to_vec();
        bytes.push(0);
        self.place("the command line", low::CMDLINE, bytes)?;
        Ok(low::CMDLINE)
    }

    /// The segments, in ascending order.
    pub(crate) fn finish(mut self) -> Vec<Segment<'a>> {
        self.segments.sort_by_key(|segment| segment.gpa);
        self.segments
    }

    /// The end of a range, if all of it is RAM that may be used.
    fn in_ram(&self, what: &'static str, start: u64, size: u64) -> Result<u64, BootError> {
        let outside = BootError::OutsideRam {
            what,
            start,
            end: start.saturating_add(size),
            low_end: self.low_end,
        };
        let end = start.checked_add(size).ok_or(outside.clone())?;
        let usable = [
            (0, LOW_USABLE_END),
            (HIGH_MEMORY_START, self.low_end),
            (self.high_ram.start().0, self.high_ram.end().0),
        ];
        if usable.iter().any(|(from, to)| *from <= start && end <= *to) {
            Ok(end)
        } else {
            Err(outside)
        }
    }
}
