//! The differentiated table: devices that no bus can list, and what they use, in ACPI's own language.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Method, Name, NotEqual, ONE, Or, Package, Path, ResourceTemplate,
    Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use strata_memory::{GpaRange, Layout};

use super::{LAST_BUS, OEM, OEM_REVISION, OEM_TABLE};
use crate::request::{Platform, ports};

/// PCI's `_OSC` (PCI Firmware Specification 3.3, 4.5.1).
const PCI_HOST_OSC: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// Control granted when it is asked for: native hot-plug, SHPC hot-plug, PME, AER, the capability structures.
const OSC_GRANTED: u32 = 0x1f;
/// A device that is there, decodes its resources, is to be shown and works.
const STA_PRESENT: u8 = 0x0f;

/// The whole table.
pub(super) fn dsdt(layout: &Layout, platform: Platform) -> Sdt {
    let mut body = Vec::new();
    Scope::new("\\_SB_".into(), vec![&PciRoot(layout)]).to_aml_bytes(&mut body);
    Scope::new("\\_SB_".into(), vec![&Rtc]).to_aml_bytes(&mut body);
    if platform.com1 {
        Scope::new("\\_SB_".into(), vec![&Com1]).to_aml_bytes(&mut body);
    }
    if platform.pvpanic {
        Scope::new("\\_SB_".into(), vec![&PvPanic]).to_aml_bytes(&mut body);
    }
    let s5 = ports::S5_SLEEP_TYPE;
    Name::new("\\_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO])).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// `Name (path, value)`.
fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

/// The PCI Express host bridge.
struct PciRoot<'a>(&'a Layout);

impl Aml for PciRoot<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = name("_HID", &EISAName::new("PNP0A08"));
        let cid = name("_CID", &EISAName::new("PNP0A03"));
        let seg = name("_SEG", &ZERO);
        let uid = name("_UID", &ZERO);
        let bbn = name("_BBN", &ZERO);
        let crs = name("_CRS", &Windows(self.0));
        let children: Vec<&dyn Aml> = vec![&hid, &cid, &seg, &uid, &bbn, &crs, &Osc];
        Device::new("PCI0".into(), children).to_aml_bytes(sink);
    }
}

/// What the host bridge passes on to its bus.
struct Windows<'a>(&'a Layout);

impl Aml for Windows<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (mmio32, mmio64) = (Layout::MMIO32, self.0.mmio64());
        let buses = AddressSpace::new_bus_number(0u16, u16::from(LAST_BUS));
        let low_ports = AddressSpace::new_io(0u16, 0x0cf7, None);
        let high_ports = AddressSpace::new_io(0x0d00u16, 0xffff, None);
        let memory32 = last(&mmio32).map(|last| {
            // Both lie below 4 GiB.
            let (first, last) = (mmio32.start().0 as u32, last as u32);
            AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
        });
        let memory64 = last(&mmio64).map(|last| {
            AddressSpace::new_memory(
                AddressSpaceCacheable::Cacheable,
                true,
                mmio64.start().0,
                last,
                None,
            )
        });
        let mut children: Vec<&dyn Aml> = vec![&buses, &low_ports, &high_ports];
        children.extend(memory32.iter().map(|window| window as &dyn Aml));
        children.extend(memory64.iter().map(|window| window as &dyn Aml));
        ResourceTemplate::new(children).to_aml_bytes(sink);
    }
}

/// The last address of a window, if there is one.
fn last(range: &GpaRange) -> Option<u64> {
    (!range.is_empty()).then(|| range.end().0 - 1)
}

/// The host bridge's `_OSC`: the guest asks in Arg3 for control of PCIe features and gets what is granted.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const UNSUPPORTED_REVISION: u8 = 1 << 3;
        const CAPABILITIES_MASKED: u8 = 1 << 4;
        const UNRECOGNIZED_UUID: u8 = 1 << 2;
        let field = |name: &str| Path::new(name);
        let (status, control) = (field("CDW1"), field("CDW3"));
        let set_status = |bit: &'static u8| OrStatus(bit);

        let asked = Store::new(&Local(0), &control);
        let granted = And::new(&Local(0), &Local(0), &OSC_GRANTED);
        let is_other_revision = NotEqual::new(&Arg(1), &ONE);
        let other_revision = set_status(&UNSUPPORTED_REVISION);
        let check_revision = If::new(&is_other_revision, vec![&other_revision]);
        let is_masked = NotEqual::new(&control, &Local(0));
        let masked = set_status(&CAPABILITIES_MASKED);
        let check_masked = If::new(&is_masked, vec![&masked]);
        let answer = Store::new(&control, &Local(0));
        let create_status = CreateDWordField::new(&status, &Arg(3), &ZERO);
        let create_control = CreateDWordField::new(&control, &Arg(3), &8u8);
        let uuid = Uuid::new(PCI_HOST_OSC);
        let is_pci = Equal::new(&Arg(0), &uuid);
        let pci = If::new(
            &is_pci,
            vec![
                &create_control,
                &asked,
                &granted,
                &check_revision,
                &check_masked,
                &answer,
            ],
        );
        let unrecognized = set_status(&UNRECOGNIZED_UUID);
        let other = Else::new(vec![&unrecognized]);
        let result = Return::new(&Arg(3));
        let children: Vec<&dyn Aml> = vec![&create_status, &pci, &other, &result];
        Method::new("_OSC".into(), 4, true, children).to_aml_bytes(sink);
    }
}

/// `CDW1 |= bit`.
struct OrStatus(&'static u8);

impl Aml for OrStatus {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let status = Path::new("CDW1");
        Or::new(&status, &status, self.0).to_aml_bytes(sink);
    }
}

/// The CMOS clock. It has no interrupt.
struct Rtc;

impl Aml for Rtc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = name("_HID", &EISAName::new("PNP0B00"));
        let crs = name(
            "_CRS",
            &ResourceTemplate::new(vec![&IO::new(ports::RTC, ports::RTC, 1, 2)]),
        );
        Device::new("RTC_".into(), vec![&hid, &crs]).to_aml_bytes(sink);
    }
}

/// The first serial port.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = name("_HID", &EISAName::new("PNP0501"));
        let uid = name("_UID", &ONE);
        let sta = name("_STA", &STA_PRESENT);
        let io = IO::new(ports::COM1, ports::COM1, 1, 8);
        let interrupt = Interrupt::new(true, true, false, false, ports::COM1_GSI);
        let crs = name("_CRS", &ResourceTemplate::new(vec![&io, &interrupt]));
        Device::new("COM1".into(), vec![&hid, &uid, &sta, &crs]).to_aml_bytes(sink);
    }
}

/// The port by which a guest tells that it has panicked.
struct PvPanic;

impl Aml for PvPanic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = name("_HID", &"QEMU0001");
        let sta = name("_STA", &STA_PRESENT);
        let crs = name(
            "_CRS",
            &ResourceTemplate::new(vec![&IO::new(ports::PVPANIC, ports::PVPANIC, 1, 1)]),
        );
        Device::new("PEVT".into(), vec![&hid, &sta, &crs]).to_aml_bytes(sink);
    }
}
