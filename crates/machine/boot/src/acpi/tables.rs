//! The static tables: fixed hardware (FADT) and interrupt controllers (MADT).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use strata_memory::Layout;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::request::ports;

/// IA-PC boot architecture flags: there are devices on the ISA ports, but no keyboard controller with a keyboard and
/// no VGA; PCIe power states are not for the guest to manage. A CMOS clock and MSIs are there (bits 5 and 3 clear).
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;

const PM1_EVENT_LEN: u8 = 4;
const PM1_CONTROL_LEN: u8 = 2;
const PM_TIMER_LEN: u8 = 4;
/// Latencies that mean "this power state is not there" (ACPI 6.5, table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The byte of CMOS memory with the century.
const CMOS_CENTURY: u8 = 0x32;

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}

/// The fixed hardware: power management registers, reset register, system control interrupt.
pub(super) fn fadt(facs: u64, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is a fixed one (its flag is clear); there is no sleep button and no wake-up by the clock.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        // The PM timer counts 32 bits.
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .dsdt_64(dsdt);
    // Both tables lie below 4 GiB. The specification wants the FACS in one field only.
    fadt = fadt.firmware_ctrl_32(facs as u32);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(ports::SCI_GSI).into();
    fadt.pm1a_evt_blk = u32::from(ports::PM1A_EVENT).into();
    fadt.pm1a_cnt_blk = u32::from(ports::PM1A_CONTROL).into();
    fadt.pm_tmr_blk = u32::from(ports::PM_TIMER).into();
    fadt.pm1_evt_len = PM1_EVENT_LEN;
    fadt.pm1_cnt_len = PM1_CONTROL_LEN;
    fadt.pm_tmr_len = PM_TIMER_LEN;
    fadt.x_pm1a_evt_blk = port(ports::PM1A_EVENT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(ports::PM1A_CONTROL, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(ports::PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_ASPM).into();
    fadt.reset_reg = port(ports::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = ports::RESET_VALUE;
    fadt.finalize()
}

/// Local APICs, the I/O APIC, and how the system control interrupt arrives. Without the flag PCAT_COMPAT the guest
/// knows that there is no 8259.
pub(super) fn madt(cpus: u32) -> Sdt {
    const ENABLED: u32 = 1;
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&(Layout::LAPIC.start().0 as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    for cpu in 0..cpus {
        // Type 0, processor local APIC: processor's id, APIC id, flags.
        let mut entry = vec![0, 8, cpu as u8, cpu as u8];
        entry.extend(ENABLED.to_le_bytes());
        madt.append_slice(&entry);
    }
    // Type 1, I/O APIC: its id, which must differ from those of the local APICs only on ancient buses; address; first interrupt.
    let mut entry = vec![1, 12, 0, 0];
    entry.extend((Layout::IOAPIC.start().0 as u32).to_le_bytes());
    entry.extend(0u32.to_le_bytes());
    madt.append_slice(&entry);
    // Type 2, interrupt source override: ISA bus, source, global interrupt, flags: active high, level-triggered.
    let mut entry = vec![2, 10, 0, ports::SCI_GSI];
    entry.extend(u32::from(ports::SCI_GSI).to_le_bytes());
    entry.extend(0x000d_u16.to_le_bytes());
    madt.append_slice(&entry);
    // Type 4, local APIC NMI: all processors, flags as the bus has them, LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}
