//! The state of the first CPU at the moment the guest begins, and the tables in memory it refers to.

use crate::Gpa;
use crate::builder::{Builder, low};
use crate::error::BootError;

/// A segment register: selector and the hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (already scaled by the granularity).
    pub limit: u32,
    /// Access rights as VMX lays them out: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G.
    pub rights: u16,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Table {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The complete initial state of the first CPU; every register that is not named here is as after a reset.
/// The mode follows from it: long mode if `efer` has LMA, else 32-bit protected mode without paging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Multiboot's magic number.
    pub rax: u64,
    /// PVH's and multiboot's boot information.
    pub rbx: u64,
    /// Linux's boot parameters.
    pub rsi: u64,
    /// Flags: interrupts off.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// Page table root, 0 without paging.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table; it lies in memory and holds the segments above.
    pub gdt: Table,
    /// Interrupt descriptor table: empty, so that any exception before the guest sets its own ends in a shutdown.
    pub idt: Table,
}

/// What a boot protocol puts into general registers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Registers {
    pub(crate) rip: u64,
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rsi: u64,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set.
const RFLAGS_FIXED: u64 = 2;

/// Selectors of Linux's 64-bit and 32-bit boot protocols; PVH and multiboot do not care.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT_SIZE: u16 = 0x30;

const CODE_64: Segment = flat(CODE_SELECTOR, 0xa09b);
const CODE_32: Segment = flat(CODE_SELECTOR, 0xc09b);
const DATA: Segment = flat(DATA_SELECTOR, 0xc093);
const TASK: Segment = Segment {
    selector: TASK_SELECTOR,
    base: 0,
    limit: 0x67,
    rights: 0x008b,
};

const fn flat(selector: u16, rights: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    }
}

/// The identity mapping covers this much memory in 2 MiB pages: all of low RAM and the devices below 4 GiB.
const MAPPED_GIB: u64 = 4;
const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

impl Entry {
    /// Long mode with all of the first 4 GiB mapped one to one (Linux's 64-bit protocol, boot.rst).
    pub(crate) fn long64(builder: &mut Builder, registers: Registers) -> Result<Self, BootError> {
        builder.place(
            "the page tables",
            low::PAGE_TABLES,
            page_tables(low::PAGE_TABLES.0),
        )?;
        builder.reserve("the boot stack", low::STACK, low::STACK_SIZE)?;
        Ok(Self {
            rsp: low::STACK.0 + low::STACK_SIZE,
            cr0: CR0_PG | CR0_ET | CR0_PE,
            cr3: low::PAGE_TABLES.0,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Self::flat(builder, registers, CODE_64)?
        })
    }

    /// 32-bit protected mode with flat segments, without paging (PVH, multiboot, Linux's 32-bit protocol) and without
    /// a stack: none of them promises one, and kernels may lie where it would be.
    pub(crate) fn protected32(
        builder: &mut Builder,
        registers: Registers,
    ) -> Result<Self, BootError> {
        Self::flat(builder, registers, CODE_32)
    }

    fn flat(builder: &mut Builder, registers: Registers, cs: Segment) -> Result<Self, BootError> {
        builder.place("the descriptor table", low::GDT, gdt(cs))?;
        let Registers { rip, rax, rbx, rsi } = registers;
        Ok(Self {
            rip,
            rsp: 0,
            rax,
            rbx,
            rsi,
            rflags: RFLAGS_FIXED,
            cr0: CR0_ET | CR0_PE,
            cr3: 0,
            cr4: 0,
            efer: 0,
            cs,
            data: DATA,
            tr: TASK,
            gdt: Table {
                base: low::GDT.0,
                limit: GDT_SIZE - 1,
            },
            idt: Table::default(),
        })
    }

    /// Whether the CPU begins in long mode.
    pub fn is_long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// The address of the first instruction.
    pub fn first_instruction(&self) -> Gpa {
        Gpa(self.rip)
    }
}

/// A segment descriptor (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: Segment) -> u64 {
    let rights = u64::from(segment.rights);
    let granular = rights & 0x8000 != 0;
    let limit = u64::from(if granular {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | (rights & 0xff) << 40
        | (limit & 0xf_0000) << 32
        | (rights & 0xf000) << 40
        | (segment.base & 0xff00_0000) << 32
}

fn gdt(cs: Segment) -> Vec<u8> {
    // Null, unused, code, data, and the task segment, whose second half in long mode is the base's upper part: zero.
    [0, 0, descriptor(cs), descriptor(DATA), descriptor(TASK), 0]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Page tables for a table area at `base`: a root, one page of 1 GiB entries, one page of 2 MiB entries per GiB.
fn page_tables(base: u64) -> Vec<u8> {
    let page = |entries: Vec<u64>| {
        let mut bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        bytes.resize(PAGE as usize, 0);
        bytes
    };
    let directories = base + 2 * PAGE;
    let mut tables = page(vec![(base + PAGE) | PRESENT_WRITABLE]);
    tables.extend(page(
        (0..MAPPED_GIB)
            .map(|gib| (directories + gib * PAGE) | PRESENT_WRITABLE)
            .collect(),
    ));
    for gib in 0..MAPPED_GIB {
        let large = |index: u64| (gib << 30 | index << 21) | LARGE_PAGE | PRESENT_WRITABLE;
        tables.extend(page((0..512).map(large).collect()));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(CODE_64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(CODE_32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(TASK), 0x0000_8b00_0000_0067);
        assert_eq!(gdt(CODE_64).len(), usize::from(GDT_SIZE));
    }

    #[test]
    fn page_tables_map_each_address_to_itself() {
        let base = 0x4000;
        let tables = page_tables(base);
        assert_eq!(tables.len() as u64, (2 + MAPPED_GIB) * PAGE);
        let entry = |table: u64, index: u64| {
            let at = (table - base + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [
            0u64,
            0x1000,
            0x1f_ffff,
            0x20_0000,
            0x1234_5678,
            0xbfff_ffff,
            0xfee0_0000,
            0xffff_ffff,
        ] {
            let l4 = entry(base, address >> 39 & 511);
            let l3 = entry(l4 & !0xfff, address >> 30 & 511);
            let l2 = entry(l3 & !0xfff, address >> 21 & 511);
            assert_eq!(
                l2 & (LARGE_PAGE | PRESENT_WRITABLE),
                LARGE_PAGE | PRESENT_WRITABLE
            );
            assert_eq!((l2 & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(base, 1), 0);
    }
}
