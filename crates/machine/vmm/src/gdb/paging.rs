//! Where a linear address is in guest memory: a walk of the guest's page tables that leaves no trace in them
//! (Intel SDM vol. 3, chapter 4).

use strata_engine::x86::CpuState;
use strata_memory::{Gpa, GuestMemory};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
/// The entry maps a page above the lowest level.
const LARGE: u64 = 1 << 7;
/// Address bits of an entry of 8 bytes.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address; none if nothing is mapped there. Rights are not looked at: this is for a debugger.
pub(crate) fn translate(memory: &GuestMemory, state: &CpuState, linear: u64) -> Option<u64> {
    let long = state.efer & EFER_LMA != 0;
    if state.cr0 & CR0_PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    if long {
        let levels = if state.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        let used = 12 + 9 * levels;
        // The bits above are copies of the highest that is used.
        let unused = (linear as i64) >> (used - 1);
        if unused != 0 && unused != -1 {
            return None;
        }
        return walk(memory, state.cr3 & ADDRESS, levels, linear);
    }
    let linear = linear & 0xffff_ffff;
    if state.cr4 & CR4_PAE != 0 {
        let table = state.cr3 & 0xffff_ffe0;
        let entry = memory.read_u64(Gpa(table + (linear >> 30) * 8)).ok()?;
        let present = entry & PRESENT != 0;
        return present.then(|| walk(memory, entry & ADDRESS, 2, linear))?;
    }
    walk_32(memory, state, linear)
}

/// Tables of 512 entries, from level `levels` down.
fn walk(memory: &GuestMemory, mut table: u64, levels: u32, linear: u64) -> Option<u64> {
    for level in (1..=levels).rev() {
        let shift = 3 + 9 * level;
        let index = linear >> shift & 511;
        let entry = memory.read_u64(Gpa(table + index * 8)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 1 || (level <= 3 && entry & LARGE != 0) {
            let within = (1 << shift) - 1;
            return Some(entry & ADDRESS & !within | linear & within);
        }
        table = entry & ADDRESS;
    }
    None
}

/// The two levels of 1024 entries that the 386 began with.
fn walk_32(memory: &GuestMemory, state: &CpuState, linear: u64) -> Option<u64> {
    let table = state.cr3 & 0xffff_f000;
    let entry = u64::from(memory.read_u32(Gpa(table + (linear >> 22) * 4)).ok()?);
    if entry & PRESENT == 0 {
        return None;
    }
    if entry & LARGE != 0 && state.cr4 & CR4_PSE != 0 {
        // PSE-36: address bits 39 to 32 lie in bits 20 to 13.
        let high = (entry >> 13 & 0xff) << 32;
        return Some(high | entry & 0xffc0_0000 | linear & 0x003f_ffff);
    }
    let index = linear >> 12 & 1023;
    let entry = u64::from(
        memory
            .read_u32(Gpa((entry & 0xffff_f000) + index * 4))
            .ok()?,
    );
    (entry & PRESENT != 0).then_some(entry & 0xffff_f000 | linear & 0xfff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_memory::SlotKind;

    fn memory() -> GuestMemory {
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), 1 << 20, SlotKind::Ram).unwrap();
        memory
    }

    fn state(cr4: u64, efer: u64) -> CpuState {
        CpuState {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4,
            efer,
            ..CpuState::default()
        }
    }

    #[test]
    fn four_and_five_levels_and_large_pages() {
        let memory = memory();
        // The topmost slot maps the first: 0xffff_8000_0000_0000 on with four levels.
        memory.write_u64(Gpa(0x1000 + 256 * 8), 0x2003).unwrap();
        memory.write_u64(Gpa(0x2000), 0x3003).unwrap();
        memory.write_u64(Gpa(0x2008), 0x4000_0083).unwrap();
        memory.write_u64(Gpa(0x3000), 0x4003).unwrap();
        memory.write_u64(Gpa(0x3008), 0x0060_0083).unwrap();
        memory
            .write_u64(Gpa(0x4008), 0x8000_0000_0000_5003)
            .unwrap();
        let four = state(CR4_PAE, EFER_LMA);
        let at = |linear| translate(&memory, &four, linear);
        assert_eq!(at(0xffff_8000_0000_1234), Some(0x5234));
        assert_eq!(at(0xffff_8000_0020_1234), Some(0x0060_1234));
        assert_eq!(at(0xffff_8000_4123_4567), Some(0x4123_4567));
        assert_eq!(at(0xffff_8000_0000_0000), None);
        assert_eq!(at(0x0000_8000_0000_1234), None, "not canonical");
        memory.write_u64(Gpa(0x6000), 0x1003).unwrap();
        let mut five = state(CR4_PAE | CR4_LA57, EFER_LMA);
        five.cr3 = 0x6000;
        let linear = 0x0000_8000_0000_1234;
        assert_eq!(translate(&memory, &five, linear), Some(0x5234));
    }

    #[test]
    fn older_tables() {
        let memory = memory();
        memory.write_u64(Gpa(0x1008), 0x2001).unwrap();
        memory.write_u64(Gpa(0x2000), 0x3001).unwrap();
        memory.write_u64(Gpa(0x3010), 0x7001).unwrap();
        let pae = state(CR4_PAE, 0);
        assert_eq!(translate(&memory, &pae, 0x4000_2345), Some(0x7345));
        assert_eq!(translate(&memory, &pae, 0x2345), None);
        memory.write_u32(Gpa(0x1004), 0x4001).unwrap();
        memory.write_u32(Gpa(0x4008), 0x8001).unwrap();
        memory.write_u32(Gpa(0x1000), 0x0080_0081).unwrap();
        let old = state(CR4_PSE, 0);
        assert_eq!(translate(&memory, &old, 0x0040_2345), Some(0x8345));
        assert_eq!(translate(&memory, &old, 0x0012_3456), Some(0x0092_3456));
        let off = CpuState::default();
        assert_eq!(translate(&memory, &off, 0x1_0000_0123), Some(0x123));
    }
}
