//! The ACPI tables of the `modern` platform (ACPI 6.5): how the guest learns of its CPUs, interrupts and devices.
//!
//! The root pointer lies at [`ACPI_START`], where a guest that is told nothing searches for it; the tables follow.
//! ACPI mode is always on (there is no SMI command port), and there is no 8259, no PIT and no keyboard.

mod dsdt;
mod tables;

#[cfg(test)]
mod tests;

use acpi_tables::{Aml, facs::FACS, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};

use strata_memory::Layout;

use crate::builder::Builder;
use crate::memory_map::ACPI_START;
use crate::request::BootRequest;
use crate::{BootError, Gpa};

const OEM: [u8; 6] = *b"STRATA";
const OEM_TABLE: [u8; 8] = *b"STRATAVM";
const OEM_REVISION: u32 = 1;

/// The FACS must be aligned to 64 bytes; the other tables are for tidiness.
const ALIGNMENT: usize = 64;

/// The configuration space has room for buses up to this one.
const LAST_BUS: u8 = 255;

/// Tables packed one after the other, each at a known guest address.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table; gives its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Makes the tables and puts them in their place; gives the address of the root pointer.
pub(crate) fn place_tables(builder: &mut Builder, request: &BootRequest) -> Result<Gpa, BootError> {
    builder.place_acpi(build(request))?;
    Ok(Gpa(ACPI_START))
}

/// All tables as they lie in memory from [`ACPI_START`].
fn build(request: &BootRequest) -> Vec<u8> {
    // The root pointer comes first but knows the table that comes last: room is kept for it.
    let mut area = Area {
        bytes: vec![0; Rsdp::len()],
    };
    let facs = area.add(&FACS::new());
    let dsdt = area.add(&dsdt::dsdt(request.layout, request.platform));
    let fadt = area.add(&tables::fadt(facs, dsdt));
    let madt = area.add(&tables::madt(request.cpus));
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(Layout::ECAM.start().0, 0, 0, LAST_BUS);
    let mcfg = area.add(&mcfg);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.add(&xsdt);

    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    crate::view::put(&mut area.bytes, 0, &root);
    area.bytes
}
