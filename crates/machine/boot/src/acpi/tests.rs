//! The tables are linked, their sums are right, and ACPI's own tools understand them.

use std::process::Command;

use super::build;
use crate::memory_map::ACPI_START;
use crate::testing::{layout, request};
use crate::{BootRequest, Platform};

fn with_request<T>(test: impl FnOnce(BootRequest) -> T) -> T {
    let layout = layout(8 << 10);
    test(BootRequest {
        cpus: 4,
        ..request(&[], &layout)
    })
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The table at a guest address.
fn table(area: &[u8], address: u64) -> &[u8] {
    let start = (address - ACPI_START) as usize;
    &area[start..start + number(area, start + 4, 4) as usize]
}

/// All tables named by the root, by signature, with the two that the FADT names.
fn tables(area: &[u8]) -> Vec<(String, Vec<u8>)> {
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
    let xsdt = table(area, number(area, 24, 8));
    let mut addresses: Vec<u64> = (36..xsdt.len())
        .step_by(8)
        .map(|at| number(xsdt, at, 8))
        .collect();
    let fadt = table(area, addresses[0]);
    addresses.push(number(fadt, 140, 8));
    addresses.push(number(fadt, 36, 4));
    let mut tables = vec![xsdt.to_vec()];
    tables.extend(
        addresses
            .into_iter()
            .map(|address| table(area, address).to_vec()),
    );
    tables
        .into_iter()
        .map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table))
        .collect()
}

#[test]
fn every_table_is_found_and_its_sum_is_right() {
    let tables = with_request(|request| tables(&build(&request)));
    let names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["XSDT", "FACP", "APIC", "MCFG", "DSDT", "FACS"]);
    for (name, table) in &tables {
        // The FACS has no sum.
        assert!(name == "FACS" || sum(table) == 0, "{name}");
    }
    let fadt = &tables[1].1;
    assert_eq!(number(fadt, 46, 2), 9, "SCI");
    assert_eq!(
        number(fadt, 48, 4),
        0,
        "no SMI command port: ACPI mode is always on"
    );
    assert_eq!(number(fadt, 56, 4), 0x600);
    assert_eq!(number(fadt, 64, 4), 0x604);
    assert_eq!(number(fadt, 76, 4), 0x608);
    assert_eq!(
        number(fadt, 109, 2) & (1 << 5 | 1 << 3 | 1 << 1),
        0,
        "clock and MSI are there, no 8042"
    );
    assert_eq!(number(fadt, 120, 8), 0xcf9, "reset register");
    let madt = &tables[2].1;
    let cpus: Vec<u8> = (0..4).map(|cpu| madt[44 + cpu * 8 + 3]).collect();
    assert_eq!(cpus, [0, 1, 2, 3]);
    assert_eq!(number(&tables[3].1, 44, 8), 0xe000_0000);
}

#[test]
fn tables_of_the_largest_machine_fit() {
    let size = with_request(|request| {
        build(&BootRequest {
            cpus: 254,
            ..request
        })
        .len()
    });
    assert!(size < 0x2_0000, "{size:#x}");
}

#[test]
fn absent_devices_are_not_listed() {
    let has = |area: &[u8], name: &[u8]| area.windows(name.len()).any(|window| window == name);
    with_request(|request| {
        let all = build(&request);
        assert!(has(&all, b"COM1") && has(&all, b"PEVT"));
        let none = build(&BootRequest {
            platform: Platform {
                com1: false,
                pvpanic: false,
            },
            ..request
        });
        assert!(!has(&none, b"COM1") && !has(&none, b"PEVT"));
    });
}

/// Runs one of ACPI's tools in `directory`; `None` if it is not installed.
fn tool(directory: &std::path::Path, name: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(name)
        .args(arguments)
        .current_dir(directory)
        .output()
    {
        Ok(output) => Some(
            String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr),
        ),
        Err(_) => {
            println!("skipped: {name} is not installed (package acpica-tools)");
            None
        }
    }
}

fn directory_with_tables() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, table) in with_request(|request| tables(&build(&request))) {
        std::fs::write(directory.path().join(format!("{name}.aml")), table).unwrap();
    }
    directory
}

#[test]
fn iasl_disassembles_the_tables_and_compiles_them_again() {
    let directory = directory_with_tables();
    for name in ["XSDT", "FACP", "APIC", "MCFG", "DSDT", "FACS"] {
        let Some(output) = tool(directory.path(), "iasl", &["-d", &format!("{name}.aml")]) else {
            return;
        };
        assert!(
            !output.contains("Error") && !output.contains("Warning"),
            "{name}: {output}"
        );
        let source = std::fs::read_to_string(directory.path().join(format!("{name}.dsl"))).unwrap();
        for complaint in ["Invalid", "Unknown", "Incorrect", "Error"] {
            assert!(
                !source.contains(complaint),
                "{name}: {complaint} in {source}"
            );
        }
    }
    let output = tool(directory.path(), "iasl", &["DSDT.dsl"]).unwrap();
    assert!(output.contains(" 0 Errors"), "{output}");
    assert!(output.contains(" 0 Warnings"), "{output}");
}

#[test]
fn acpiexec_finds_the_devices_and_osc_answers() {
    let directory = directory_with_tables();
    // Asked for is more than is granted, with the right and with a wrong UUID.
    let osc = |uuid: &str| {
        format!("evaluate \\_SB.PCI0._OSC ({uuid}) 1 3 (00 00 00 00 00 00 00 00 FF 00 00 00)")
    };
    let pci = osc("5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66");
    let other = osc("00 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66");
    let commands = [
        "evaluate \\_S5_",
        "resources \\_SB.PCI0",
        "resources \\_SB.COM1",
        &pci,
        &other,
    ]
    .join(";");
    let Some(output) = tool(directory.path(), "acpiexec", &["-b", &commands, "DSDT.aml"]) else {
        return;
    };
    assert!(!output.contains("AE_AML"), "{output}");
    assert!(
        output.contains("10 00 00 00 00 00 00 00 1F 00 00 00"),
        "some masked, the rest granted: {output}"
    );
    assert!(
        output.contains("04 00 00 00 00 00 00 00 FF 00 00 00"),
        "unknown UUID: {output}"
    );
    assert!(output.contains(": C0000000"), "32-bit window: {output}");
}
