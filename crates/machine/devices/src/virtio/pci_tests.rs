//! Tests of the PCI transport through its registers.

use super::*;
use crate::pci::{Bdf, PciRoot};
use crate::virtio::Rng;
use crate::{Bus, MsiMessage};
use std::sync::Mutex;
use strata_memory::{Gpa, Layout, SlotKind};

#[derive(Default)]
struct Messages(Mutex<Vec<MsiMessage>>);

impl InterruptSink for Messages {
    fn msi(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

struct Guest {
    pci: VirtioPci,
    memory: GuestMemory,
    messages: Arc<Messages>,
}

fn guest() -> Guest {
    let memory = GuestMemory::new();
    memory.add_slot(Gpa(0), 1 << 20, SlotKind::Ram).unwrap();
    let messages = Arc::new(Messages::default());
    let rng = Rng::with_source(std::io::repeat(9));
    let pci = VirtioPci::new("rng0", rng, memory.clone(), messages.clone()).unwrap();
    Guest {
        pci,
        memory,
        messages,
    }
}

impl Guest {
    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.pci.bar_read(BAR, offset, &mut data);
        data
    }

    fn write<const N: usize>(&mut self, offset: u64, data: [u8; N]) {
        self.pci.bar_write(BAR, offset, &data);
    }

    fn config<const N: usize>(&mut self, offset: u16) -> [u8; N] {
        let mut data = [0xff; N];
        self.pci.config_read(offset, &mut data);
        data
    }

    /// Turns MSI-X on. The table itself is reached on the bus, which these tests do without.
    fn enable_msix(&mut self) {
        let at = self.find_capability(0x11, None);
        self.pci.config_write(at + 2, &0x8000_u16.to_le_bytes());
    }

    fn find_capability(&mut self, id: u8, kind: Option<u8>) -> u16 {
        let mut at = u16::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [found, next, _, found_kind] = self.config::<4>(at);
            if found == id && kind.is_none_or(|kind| kind == found_kind) {
                return at;
            }
            at = u16::from(next);
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    /// Does what a driver does to bring up queue 0, with a layout of its choice.
    fn bring_up(&mut self) {
        self.write(20, [0]);
        self.write(20, [1]);
        self.write(20, [3]);
        self.write(8, 1_u32.to_le_bytes());
        self.write(12, 1_u32.to_le_bytes());
        self.write(20, [11]);
        assert_eq!(self.read::<1>(20), [11]);
        self.write(22, 0_u16.to_le_bytes());
        assert_eq!(self.read::<2>(24), 64_u16.to_le_bytes());
        self.write(24, 8_u16.to_le_bytes());
        self.write(16, 1_u16.to_le_bytes());
        self.write(26, 0_u16.to_le_bytes());
        self.write(32, 0x1000_u64.to_le_bytes());
        self.write(40, 0x2000_u32.to_le_bytes());
        self.write(44, 0_u32.to_le_bytes());
        self.write(48, 0x3000_u64.to_le_bytes());
        self.write(28, 1_u16.to_le_bytes());
        assert_eq!(self.read::<2>(28), [1, 0]);
        self.write(20, [15]);
        assert_eq!(self.read::<1>(20), [15]);
    }

    /// One request for four random bytes.
    fn ask(&mut self) -> [u8; 4] {
        let index = self.memory.read_u16(Gpa(0x2002)).unwrap();
        self.memory.write(Gpa(0x4000), &[0; 4]).unwrap();
        self.memory.write_u64(Gpa(0x1000), 0x4000).unwrap();
        self.memory.write_u64(Gpa(0x1008), 2 << 32 | 4).unwrap();
        self.memory
            .write_u16(Gpa(0x2004 + u64::from(index % 8) * 2), 0)
            .unwrap();
        self.memory
            .write_u16(Gpa(0x2002), index.wrapping_add(1))
            .unwrap();
        self.write(VirtioPci::doorbell(0), 0_u16.to_le_bytes());
        let mut answer = [0; 4];
        self.memory.read(Gpa(0x4000), &mut answer).unwrap();
        answer
    }
}

#[test]
fn it_is_found() {
    let mut guest = guest();
    assert_eq!(guest.config::<4>(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(guest.config::<1>(8), [1]);
    for (kind, offset) in [
        (CFG_COMMON, COMMON),
        (CFG_ISR, ISR),
        (CFG_DEVICE, DEVICE_CONFIG),
        (CFG_NOTIFY, DOORBELLS),
    ] {
        let at = guest.find_capability(CAPABILITY_VENDOR, Some(kind));
        assert_eq!(guest.config::<1>(at + 4), [BAR]);
        assert_eq!(guest.config::<4>(at + 8), (offset as u32).to_le_bytes());
        let [len] = guest.config(at + 2);
        assert_eq!(len, if kind == CFG_NOTIFY { 20 } else { 16 });
    }
    let at = guest.find_capability(CAPABILITY_VENDOR, Some(CFG_NOTIFY));
    assert_eq!(guest.config::<4>(at + 16), [4, 0, 0, 0]);
    assert_eq!(guest.read::<2>(18), [1, 0], "number of queues");
}

#[test]
fn features_are_selected_by_halves() {
    let mut guest = guest();
    assert_eq!(guest.read::<4>(4), (3_u32 << 28).to_le_bytes());
    guest.write(0, 1_u32.to_le_bytes());
    assert_eq!(guest.read::<4>(4), 1_u32.to_le_bytes());
    guest.write(0, 2_u32.to_le_bytes());
    assert_eq!(guest.read::<4>(4), [0; 4]);
    guest.write(8, 1_u32.to_le_bytes());
    guest.write(12, 1_u32.to_le_bytes());
    guest.write(8, 2_u32.to_le_bytes());
    guest.write(12, 1_u32.to_le_bytes());
    guest.write(20, [11]);
    assert_eq!(
        guest.read::<1>(20),
        [3],
        "features beyond 64 are not offered"
    );
}

#[test]
fn requests_and_interrupts() {
    let mut guest = guest();
    guest.bring_up();
    assert_eq!(guest.ask(), [9; 4]);
    assert_eq!(guest.read::<1>(ISR), [ISR_USED]);
    assert_eq!(guest.read::<1>(ISR), [0], "reading clears it");
    guest.enable_msix();
    assert_eq!(guest.ask(), [9; 4]);
    assert_eq!(guest.read::<1>(ISR), [0]);
    assert!(
        guest.messages.0.lock().unwrap().is_empty(),
        "vectors are masked after reset"
    );
}

#[test]
fn interrupts_are_messages_on_the_bus() {
    let Guest {
        pci,
        memory,
        messages,
    } = guest();
    let layout = Layout::new(64 << 20, 64 << 20).unwrap();
    let mmio = Arc::new(Bus::new());
    let root = PciRoot::new(mmio.clone(), Layout::MMIO32, layout.mmio64());
    let at = Bdf::new(0, 1, 0);
    let function = Arc::new(Mutex::new(pci));
    root.add(at, function.clone()).unwrap();
    let mut bar = [0; 8];
    root.config_read(at, 0x10, &mut bar);
    let bar = u64::from_le_bytes(bar) & !0xf;
    // Vector 0, of the queue: address, data, unmasked.
    mmio.write(bar + MSIX, &0xfee0_0000_u64.to_le_bytes());
    mmio.write(bar + MSIX + 8, &0x41_u64.to_le_bytes());
    // From here on the function itself is spoken to, which the bus does no differently.
    let mut guest = Guest {
        pci: self::guest().pci,
        memory,
        messages,
    };
    std::mem::swap(&mut guest.pci, &mut function.lock().unwrap());
    guest.enable_msix();
    guest.bring_up();
    assert_eq!(guest.ask(), [9; 4]);
    let expected = [MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    }];
    assert_eq!(*guest.messages.0.lock().unwrap(), expected);
    // A bad ring interrupts by the configuration's vector, which is masked.
    guest.memory.write_u16(Gpa(0x2002), 100).unwrap();
    guest.write(VirtioPci::doorbell(0), [0, 0]);
    assert_eq!(guest.messages.0.lock().unwrap().len(), 1);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let mut guest = guest();
    for offset in [16, 26] {
        guest.write(offset, 1_u16.to_le_bytes());
        assert_eq!(guest.read::<2>(offset), [1, 0]);
        guest.write(offset, 2_u16.to_le_bytes());
        assert_eq!(guest.read::<2>(offset), [0xff, 0xff]);
    }
}

#[test]
fn queues_that_do_not_exist_have_no_size() {
    let mut guest = guest();
    guest.write(22, 1_u16.to_le_bytes());
    assert_eq!(guest.read::<2>(24), [0, 0]);
    guest.write(28, 1_u16.to_le_bytes());
    assert_eq!(guest.read::<2>(28), [0, 0]);
    guest.write(32, 0x1000_u64.to_le_bytes());
    assert_eq!(guest.read::<8>(32), [0; 8]);
}

#[test]
fn a_bad_ring_shows_in_the_status() {
    let mut guest = guest();
    guest.bring_up();
    guest.memory.write_u16(Gpa(0x2002), 100).unwrap();
    guest.write(VirtioPci::doorbell(0), [0, 0]);
    assert_eq!(guest.read::<1>(20), [15 | 64]);
    assert_eq!(guest.read::<1>(ISR), [ISR_CONFIG]);
    assert!(guest.pci.fault().unwrap().contains("100 chains"));
    guest.memory.write_u16(Gpa(0x2002), 0).unwrap();
    guest.bring_up();
    assert_eq!(guest.ask(), [9; 4]);
}

#[test]
fn configuration_access_reaches_the_bar() {
    let mut guest = guest();
    let at = guest.find_capability(CAPABILITY_VENDOR, Some(CFG_PCI));
    let window = |guest: &mut Guest, offset: u32, length: u32| {
        guest
            .pci
            .config_write(at + ACCESS_OFFSET, &offset.to_le_bytes());
        guest
            .pci
            .config_write(at + ACCESS_LENGTH, &length.to_le_bytes());
    };
    window(&mut guest, 20, 1);
    guest.pci.config_write(at + ACCESS_DATA, &[3, 0, 0, 0]);
    assert_eq!(guest.read::<1>(20), [3]);
    assert_eq!(guest.config::<4>(at + ACCESS_DATA), [3, 0, 0, 0]);
    window(&mut guest, 18, 2);
    assert_eq!(guest.config::<4>(at + ACCESS_DATA), [1, 0, 0, 0]);
    // Nonsense reaches nothing.
    for (offset, length) in [
        (0, 0),
        (0, 3),
        (1, 4),
        (u32::MAX, 1),
        (0x7ffc, 4),
        (u32::MAX - 3, 4),
    ] {
        window(&mut guest, offset, length);
        guest.config::<4>(at + ACCESS_DATA);
        guest.pci.config_write(at + ACCESS_DATA, &[0xff; 4]);
    }
    window(&mut guest, 20, 1);
    guest.pci.config_write(at + ACCESS_BAR, &[1]);
    guest.pci.config_write(at + ACCESS_DATA, &[0, 0, 0, 0]);
    assert_eq!(guest.read::<1>(20), [3]);
}

#[test]
fn any_access_is_survived() {
    let mut guest = guest();
    for offset in (0..BAR_BYTES)
        .step_by(1)
        .filter(|o| o % 0x1000 < 0x80 || *o >= BAR_BYTES - 8)
    {
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xa5; len];
            guest.pci.bar_write(BAR, offset, &data);
            guest.pci.bar_read(BAR, offset, &mut data);
        }
    }
    guest.pci.reset();
    guest.bring_up();
    assert_eq!(guest.ask(), [9; 4]);
}

#[test]
fn state_survives() {
    let mut one = guest();
    one.bring_up();
    one.ask();
    one.pci.pause();
    let state = one.pci.save();
    let mut other = guest();
    let mut bytes = vec![0; 1 << 20];
    one.memory.read(Gpa(0), &mut bytes).unwrap();
    other.memory.write(Gpa(0), &bytes).unwrap();
    other.pci.restore(&state).unwrap();
    other.pci.start();
    assert_eq!(other.read::<1>(ISR), [ISR_USED]);
    assert_eq!(other.read::<1>(20), [15]);
    assert_eq!(other.ask(), [9; 4]);
    let mut wrong = state.clone();
    wrong.bytes.truncate(20);
    other.pci.restore(&wrong).unwrap_err();
    other.pci.reset();
    assert_eq!(other.read::<1>(20), [0]);
    assert_eq!(other.read::<2>(16), [0xff, 0xff]);
}
