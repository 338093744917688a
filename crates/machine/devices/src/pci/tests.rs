//! Tests of PCI as a guest sees it: through ECAM, ports and BARs.

use super::*;
use crate::interrupt::InterruptSink;
use crate::testutil::{Events, access, accesses};
use crate::{Bus, BusDevice, BusTarget, Device, PowerEvent, RestoreError, SavedState};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use strata_memory::{Gpa, GpaRange};

/// The data of the messages delivered since the last time.
fn taken(events: &Events) -> Vec<u32> {
    events
        .messages()
        .iter()
        .map(|message| message.data)
        .collect()
}

/// A 64-bit BAR 0 of 64 KiB with MSI-X at 0x8000, and a 32-bit BAR 2.
struct Gadget {
    config: PciConfig,
    last: Vec<(u8, u64, Vec<u8>)>,
}

const VECTORS: u16 = 70;

impl Gadget {
    fn new(sink: Arc<dyn InterruptSink>) -> Gadget {
        let mut config = PciConfig::new(PciIds {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(0, 0x10000, BarKind::Memory64).unwrap();
        config.add_bar(2, 0x100, BarKind::Memory32).unwrap();
        assert_eq!(
            config.add_capability(9, &[4, 1, 2], &[0, 0xf0]).unwrap(),
            0x40
        );
        config.add_msix(0, 0x8000, VECTORS, sink).unwrap();
        Gadget {
            config,
            last: Vec::new(),
        }
    }
}

impl Device for Gadget {
    fn id(&self) -> &str {
        "gadget"
    }
    fn reset(&mut self) {
        self.config.reset();
    }
    fn save(&self) -> SavedState {
        SavedState::new("gadget", 1, &self.config.save())
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.config.restore(&state.open("gadget", 1)?)
    }
}

impl PciFunction for Gadget {
    fn config(&self) -> &PciConfig {
        &self.config
    }
    fn config_mut(&mut self) -> &mut PciConfig {
        &mut self.config
    }
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(bar | offset as u8);
    }
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.last.push((bar, offset, data.to_vec()));
    }
}

const ECAM: u64 = 0xe000_0000;
const WINDOW32: u64 = 0xc000_0000;
const WINDOW64: u64 = 0x10_0000_0000;

struct Rig {
    mmio: Arc<Bus>,
    root: Arc<PciRoot>,
    gadget: Arc<Mutex<Gadget>>,
    sink: Arc<Events>,
}

impl Rig {
    fn new() -> Rig {
        let range = |base, size| GpaRange::new(Gpa(base), size).unwrap();
        let sink = Arc::new(Events::default());
        let mmio = Arc::new(Bus::new());
        let root = PciRoot::new(
            mmio.clone(),
            range(WINDOW32, 0x10_0000),
            range(WINDOW64, 0x10_0000),
        );
        mmio.insert(ECAM, 0x1000_0000, root.clone()).unwrap();
        let gadget = Arc::new(Mutex::new(Gadget::new(sink.clone())));
        root.add(Bdf::new(0, 3, 0), gadget.clone()).unwrap();
        Rig {
            mmio,
            root,
            gadget,
            sink,
        }
    }

    fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, address: u64, value: u32) {
        self.mmio.write(address, &value.to_le_bytes());
    }
}

const GADGET: u64 = ECAM + (3 << 15);

#[test]
fn functions_are_found_by_ecam_and_ports() {
    let rig = Rig::new();
    assert_eq!(rig.read(ECAM), 0x0008_1b36);
    assert_eq!(rig.read(GADGET), 0x1042_1af4);
    assert_eq!(rig.read(GADGET + 8), 0x0180_0001);
    assert_eq!(rig.read(ECAM + (4 << 15)), 0xffff_ffff);
    assert_eq!(rig.read(GADGET + (1 << 20)), 0xffff_ffff);
    assert_eq!(rig.read(GADGET + 0x100), 0);

    let mut ports = PciPorts::new(rig.root.clone(), rig.sink.clone());
    let mut data = [0; 4];
    ports.write(0, &0x8000_1800u32.to_le_bytes());
    ports.write(3, &[1]);
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_1800);
    ports.read(4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x1042_1af4);
    ports.read(6, &mut data[..2]);
    assert_eq!(data[..2], [0x42, 0x10]);
    ports.write(0, &0x0000_1800u32.to_le_bytes());
    ports.read(4, &mut data);
    assert_eq!(data, [0xff; 4]);
    ports.write(1, &[2]);
    ports.write(1, &[6]);
    ports.write(1, &[6]);
    assert_eq!(rig.sink.power(), [PowerEvent::Reset]);
}

#[test]
fn capabilities_are_linked_and_masked() {
    let rig = Rig::new();
    assert_eq!(rig.read(GADGET + 0x34) & 0xff, 0x40);
    assert_eq!(rig.read(GADGET + 0x04) >> 16, 0x10);
    rig.write(GADGET + 0x40, 0xffff_ffff);
    assert_eq!(rig.read(GADGET + 0x40), 0x01_04_48_09 | 0xf0 << 24);
    assert_eq!(rig.read(GADGET + 0x48), u32::from(VECTORS - 1) << 16 | 0x11);
    assert_eq!(rig.read(GADGET + 0x4c), 0x8000);
    assert_eq!(rig.read(GADGET + 0x50), 0x8000 + u32::from(VECTORS) * 16);
}

#[test]
fn bars_are_placed_sized_and_moved() {
    let rig = Rig::new();
    assert_eq!(rig.read(GADGET + 0x10), 0x4);
    assert_eq!(rig.read(GADGET + 0x14), 0x10);
    assert_eq!(rig.read(GADGET + 0x18), WINDOW32 as u32);
    assert_eq!(rig.read(WINDOW64 + 0x30), 0x3030_3030);
    rig.write(WINDOW32 + 4, 7);
    assert_eq!(rig.gadget.lock().unwrap().last, [(2, 4, vec![7, 0, 0, 0])]);

    // Size as Linux does: decoding off, all ones, read back.
    rig.write(GADGET + 4, 0);
    assert!(!rig.mmio.claims(WINDOW64));
    rig.write(GADGET + 0x10, !0);
    rig.write(GADGET + 0x14, !0);
    rig.write(GADGET + 0x18, !0);
    assert_eq!(rig.read(GADGET + 0x10), 0xffff_0004);
    assert_eq!(rig.read(GADGET + 0x14), !0);
    assert_eq!(rig.read(GADGET + 0x18), 0xffff_ff00);

    rig.write(GADGET + 0x10, 0x0fff_0000);
    rig.write(GADGET + 0x14, 0x10);
    rig.write(GADGET + 0x18, ECAM as u32);
    rig.write(GADGET + 4, 2);
    assert_eq!(rig.read(WINDOW64 + 0x0fff_0000), 0);
    assert_eq!(
        rig.read(ECAM),
        0x0008_1b36,
        "a BAR on top of ECAM stays off"
    );
    rig.write(GADGET + 0x18, 0xc000_1000);
    assert_eq!(rig.read(0xc000_1000), 0x0202_0202);

    rig.gadget.lock().unwrap().reset();
    rig.root.remap();
    assert!(rig.mmio.claims(WINDOW64) && !rig.mmio.claims(0xc000_1000));
}

#[test]
fn msix_masks_and_delivers() {
    let rig = Rig::new();
    let msix = rig.gadget.lock().unwrap().config.msix().unwrap().clone();
    let table = WINDOW64 + 0x8000;
    let pending = table + u64::from(VECTORS) * 16;
    let entry = table + 66 * 16;
    assert_eq!(rig.read(entry + 12), 1, "masked at reset");
    rig.write(entry, 0xfee0_0000);
    rig.write(entry + 4, 0);
    rig.write(entry + 8, 0x55);
    msix.signal(66);
    assert_eq!(rig.read(pending + 8), 0, "off");
    rig.write(GADGET + 0x48, 0x8000_0000);
    assert!(msix.enabled());
    msix.signal(66);
    msix.signal(VECTORS);
    assert!(taken(&rig.sink).is_empty());
    assert_eq!(rig.read(pending + 8), 1 << 2);
    rig.write(entry + 12, 0);
    assert_eq!(taken(&rig.sink), [0x55]);
    assert_eq!(rig.read(pending + 8), 0);
    rig.write(GADGET + 0x48, 0xc000_0000);
    msix.signal(66);
    assert!(taken(&rig.sink).is_empty());

    let state = rig.gadget.lock().unwrap().save();
    let other = Rig::new();
    other.gadget.lock().unwrap().restore(&state).unwrap();
    other.root.remap();
    assert_eq!(other.read(pending + 8), 1 << 2);
    other.write(GADGET + 0x48, 0x8000_0000);
    assert_eq!(taken(&other.sink), [0x55]);
}

#[test]
fn bad_functions_are_refused() {
    let rig = Rig::new();
    let gadget = || Arc::new(Mutex::new(Gadget::new(rig.sink.clone())));
    let at = Bdf::new(0, 3, 0);
    assert_eq!(rig.root.add(at, gadget()), Err(PciError::BadAddress(at)));
    for at in [Bdf::new(1, 3, 0), Bdf::new(0, 4, 1)] {
        assert_eq!(rig.root.add(at, gadget()), Err(PciError::BadAddress(at)));
    }
    let mut other = Gadget::new(rig.sink.clone());
    for (index, size) in [
        (1, 0x1000),
        (2, 0x1000),
        (4, 8),
        (4, 0x1001),
        (5, 0x1000),
        (6, 0x1000),
    ] {
        assert!(
            other
                .config
                .add_bar(index, size, BarKind::Memory64)
                .is_err(),
            "{index}"
        );
    }
    assert!(matches!(
        other.config.add_msix(0, 0, 1, rig.sink.clone()),
        Err(PciError::BadMsix { .. })
    ));
    assert_eq!(
        other.config.add_capability(5, &[0; 250], &[]),
        Err(PciError::CapabilitySpace(5))
    );
    let host_bridge = &rig.root.functions()[0].1;
    let state = host_bridge.lock().unwrap().save();
    assert!(other.restore(&state).is_err());
}

#[derive(Clone, Debug)]
enum Action {
    Write(u64, usize, u64),
    Read(u64, usize),
    Signal(u16),
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    let config = (0u64..0x60).prop_map(|offset| GADGET + offset);
    let far = (0u64..0x1000).prop_map(|offset| GADGET + offset);
    let bar = (0u64..0x1_0000).prop_map(|offset| WINDOW64 + offset);
    let table = (0u64..0x500).prop_map(|offset| WINDOW64 + 0x8000 + offset);
    let address = prop_oneof![4 => config, 1 => far, 1 => bar, 2 => table].boxed();
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)].boxed();
    let value = prop_oneof![
        any::<u64>(),
        Just(0),
        Just(!0),
        Just(2),
        Just(WINDOW64),
        Just(ECAM)
    ];
    prop_oneof![
        6 => (address.clone(), width.clone(), value).prop_map(|(a, w, v)| Action::Write(a, w, v)),
        3 => (address, width).prop_map(|(a, w)| Action::Read(a, w)),
        1 => (0..VECTORS + 2).prop_map(Action::Signal),
        1 => Just(Action::Reset),
    ]
}

proptest! {
    /// Whatever a guest does, identity stays, ECAM answers, each BAR that decodes is where its register says, and a
    /// copy made by save and restore cannot be told apart.
    #[test]
    fn any_accesses(actions in proptest::collection::vec(action(), 1..80)) {
        let rig = Rig::new();
        let msix = rig.gadget.lock().unwrap().config.msix().unwrap().clone();
        for action in actions {
            match action {
                Action::Write(address, width, value) => {
                    rig.mmio.write(address, &value.to_le_bytes()[..width]);
                }
                Action::Read(address, width) => rig.mmio.read(address, &mut [0; 8][..width]),
                Action::Signal(vector) => msix.signal(vector),
                Action::Reset => {
                    rig.gadget.lock().unwrap().reset();
                    rig.root.remap();
                }
            }
            prop_assert_eq!(rig.read(GADGET), 0x1042_1af4);
            let bar0 = u64::from(rig.read(GADGET + 0x10)) | u64::from(rig.read(GADGET + 0x14)) << 32;
            prop_assert_eq!(bar0 & 0xffff, 4);
            let decodes = rig.read(GADGET + 4) & 2 != 0;
            let base = bar0 & !0xf;
            let free = base > 0xf000_0000 && base < u64::MAX - 0x1_0000;
            if decodes && free {
                prop_assert_eq!(rig.read(base + 0x77f0), 0xf0f0_f0f0);
            }
        }
        let state = rig.gadget.lock().unwrap().save();
        let copy = Rig::new();
        copy.gadget.lock().unwrap().restore(&state).unwrap();
        copy.root.remap();
        prop_assert_eq!(copy.gadget.lock().unwrap().save(), state);
        for offset in (0..0x1000).step_by(4) {
            prop_assert_eq!(copy.read(GADGET + offset), rig.read(GADGET + offset));
        }
    }
}

proptest! {
    #[test]
    fn any_port_accesses(accesses in accesses(PciPorts::LEN)) {
        let rig = Rig::new();
        let mut ports = PciPorts::new(rig.root.clone(), rig.sink.clone());
        ports.write(0, &0x8000_1800u32.to_le_bytes());
        for each in &accesses {
            access(&mut ports, each);
        }
        let mut copy = PciPorts::new(rig.root.clone(), rig.sink.clone());
        copy.restore(&ports.save()).unwrap();
        prop_assert_eq!(copy.save(), ports.save());
    }
}

#[test]
fn an_access_across_the_command_register_moves_bars() {
    let rig = Rig::new();
    rig.mmio.write(GADGET + 2, &[0, 0, 0, 0]);
    assert!(!rig.mmio.claims(WINDOW64));
    rig.mmio.write(GADGET, &[0, 0, 0, 0, 2, 0, 0, 0]);
    assert!(rig.mmio.claims(WINDOW64));
}

#[test]
fn the_root_is_a_bus_target() {
    let rig = Rig::new();
    let mut byte = [0];
    BusTarget::read(&*rig.root, 3 << 15, &mut byte);
    assert_eq!(byte, [0xf4]);
}
