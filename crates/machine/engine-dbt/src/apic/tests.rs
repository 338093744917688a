//! Tests of the local APIC: priorities against a model, routing, timers, modes, saved state.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use proptest::prelude::*;
use strata_engine::{InterruptSink, MsiMessage};

use super::*;

const TSC_HZ: u64 = 2_500_000_000;
const X2APIC: u64 = 0xfee0_0c00;

/// Remembers which vectors were broadcast as ended.
#[derive(Default)]
struct Ends(Mutex<Vec<u8>>);

impl IoBus for Ends {
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_in(&self, _: u16, _: &mut [u8]) {}
    fn port_out(&self, _: u16, _: &[u8]) {}
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

fn machine(count: u32) -> (Arc<ApicBus>, Vec<Arc<Apic>>) {
    let bus = ApicBus::new(TSC_HZ);
    let apics = (0..count).map(|id| bus.add(id)).collect();
    (bus, apics)
}

fn write(apic: &Apic, offset: u64, value: u32, now: u64) {
    apic.mmio_write(
        0xfee0_0000 + offset,
        &value.to_le_bytes(),
        now,
        &Ends::default(),
    );
}

fn read(apic: &Apic, offset: u64, now: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(0xfee0_0000 + offset, &mut data, now);
    u32::from_le_bytes(data)
}

fn enabled(count: u32) -> (Arc<ApicBus>, Vec<Arc<Apic>>) {
    let (bus, apics) = machine(count);
    apics.iter().for_each(|apic| write(apic, 0xf0, 0x1ff, 0));
    (bus, apics)
}

fn msi(address: u64, data: u32) -> MsiMessage {
    MsiMessage { address, data }
}

#[test]
fn messages_from_devices_reach_whom_they_name() {
    let (bus, apics) = enabled(3);
    bus.msi(msi(0xfee0_1000, 0x41));
    assert_eq!(apics[1].acknowledge(), Some(0x41));
    assert!(!apics[0].pending() && !apics[2].pending());
    apics[1].end_of_interrupt(&Ends::default());
    // Physical broadcast.
    bus.msi(msi(0xfeef_f000, 0x42));
    assert!(apics.iter().all(|apic| apic.acknowledge() == Some(0x42)));
    // Logical, flat model.
    for (i, apic) in apics.iter().enumerate() {
        write(apic, 0xd0, 1 << (24 + i), 0);
        apic.end_of_interrupt(&Ends::default());
    }
    bus.msi(msi(0xfee0_5004, 0x51));
    assert_eq!(
        apics.iter().map(|a| a.acknowledge()).collect::<Vec<_>>(),
        [Some(0x51), None, Some(0x51)]
    );
    // Lowest priority: 0 and 2 are busy with 0x51, so 1 it is.
    bus.msi(msi(0xfee0_700c, 0x161));
    assert_eq!(apics[1].acknowledge(), Some(0x61));
    // Not an interrupt address, and a reserved delivery mode.
    bus.msi(msi(0x1000, 0x71));
    bus.msi(msi(0xfee0_1000, 0x371));
    assert!(apics.iter().all(|apic| apic.acknowledge().is_none()));
}

#[test]
fn processors_start_each_other_and_send_themselves_interrupts() {
    let (_bus, apics) = enabled(3);
    write(&apics[0], 0x310, 1 << 24, 0);
    write(&apics[0], 0x300, 0x4500, 0);
    assert!(apics[1].waiting().init && apics[1].take_init(false));
    assert_eq!(read(&apics[1], 0xf0, 0), 0xff);
    write(&apics[0], 0x300, 0x4699, 0);
    assert_eq!(apics[1].take_startup(), Some(0x99));
    // All but self: an NMI.
    write(&apics[0], 0x300, 0xc4400, 0);
    assert!(!apics[0].take_nmi() && apics[1].take_nmi() && apics[2].take_nmi());
    // Self.
    write(&apics[2], 0x300, 0x4_4033, 0);
    assert_eq!(apics[2].acknowledge(), Some(0x33));
}

#[test]
fn an_illegal_vector_is_an_error_and_no_interrupt() {
    let (bus, apics) = enabled(1);
    write(&apics[0], 0x370, 0xf0, 0);
    bus.msi(msi(0xfee0_0000, 0x05));
    assert_eq!(apics[0].acknowledge(), Some(0xf0));
    write(&apics[0], 0x280, 0, 0);
    assert_eq!(read(&apics[0], 0x280, 0), 0x40);
    write(&apics[0], 0x280, 0, 0);
    assert_eq!(read(&apics[0], 0x280, 0), 0);
}

#[test]
fn the_end_of_a_level_interrupt_is_broadcast() {
    let (bus, apics) = enabled(1);
    let ends = Ends::default();
    bus.msi(msi(0xfee0_0000, 0xc030));
    bus.msi(msi(0xfee0_0000, 0x40));
    assert_eq!(
        (apics[0].acknowledge(), apics[0].acknowledge()),
        (Some(0x40), None)
    );
    apics[0].end_of_interrupt(&ends);
    assert_eq!(apics[0].acknowledge(), Some(0x30));
    apics[0].end_of_interrupt(&ends);
    assert_eq!(*ends.0.lock().unwrap(), [0x30]);
}

#[test]
fn one_shot_and_periodic_timers_count_divided_nanoseconds() {
    let (_bus, apics) = enabled(1);
    let apic = &apics[0];
    write(apic, 0x3e0, 0xb, 0);
    write(apic, 0x320, 0x20, 0);
    write(apic, 0x380, 1000, 500);
    assert_eq!(apic.next_deadline_ns(), Some(1500));
    assert_eq!(read(apic, 0x390, 600), 900);
    apic.poll(1499);
    assert!(!apic.pending());
    apic.poll(1500);
    assert_eq!(
        (apic.acknowledge(), apic.next_deadline_ns()),
        (Some(0x20), None)
    );
    assert_eq!(read(apic, 0x390, 1600), 0);
    apic.end_of_interrupt(&Ends::default());
    // Divided by 16, periodic; two and a half periods late.
    write(apic, 0x3e0, 0x3, 2000);
    write(apic, 0x320, 0x2_0021, 2000);
    write(apic, 0x380, 10, 2000);
    assert_eq!(apic.next_deadline_ns(), Some(2160));
    apic.poll(2160 + 400);
    assert_eq!(
        (apic.acknowledge(), apic.next_deadline_ns()),
        (Some(0x21), Some(2640))
    );
    // A masked timer goes on without interrupts.
    write(apic, 0x320, 0x3_0021, 2600);
    apic.end_of_interrupt(&Ends::default());
    apic.poll(2640);
    assert!(!apic.pending() && apic.next_deadline_ns() == Some(2800));
    write(apic, 0x380, 0, 2700);
    assert_eq!(apic.next_deadline_ns(), None);
}

#[test]
fn a_periodic_count_goes_on_before_its_interrupt_was_raised() {
    let (_bus, apics) = enabled(1);
    let apic = &apics[0];
    write(apic, 0x320, 0x2_0022, 0);
    write(apic, 0x3e0, 0xb, 0);
    write(apic, 0x380, 1000, 0);
    let period = apic.next_deadline_ns().unwrap();
    let quarter = period / 4;
    assert_eq!(read(apic, 0x390, period + quarter), 750);
    assert_eq!(read(apic, 0x390, 3 * period + quarter), 750);
    apic.poll(3 * period + quarter);
    assert_eq!(read(apic, 0x390, 3 * period + quarter), 750);
}

#[test]
fn reserved_registers_are_errors_on_the_page_only() {
    let (_bus, apics) = enabled(1);
    let apic = &apics[0];
    read(apic, 0x290, 0);
    write(apic, 0x280, 0, 0);
    assert_eq!(read(apic, 0x280, 0), 0x80);
    write(apic, 0x280, 0, 0);
    apic.set_base(X2APIC, true, 40).unwrap();
    assert!(apic.msr_read(0x29, 0).is_err());
    apic.msr_write(0x28, 0, 0, &Ends::default()).unwrap();
    assert_eq!(apic.msr_read(0x28, 0).unwrap(), 0);
}

#[test]
fn the_tsc_deadline_is_never_early_and_follows_the_offset() {
    let (_bus, apics) = enabled(1);
    let apic = &apics[0];
    apic.set_tsc_deadline(100, 0);
    assert_eq!(apic.tsc_deadline(), 0, "not in deadline mode");
    write(apic, 0x320, 0x4_0022, 0);
    apic.set_tsc_deadline(2501, 100);
    assert_eq!(apic.next_deadline_ns(), Some(1001));
    apic.set_tsc_offset(1000, 100);
    assert_eq!(apic.next_deadline_ns(), Some(601));
    apic.poll(601);
    assert_eq!(
        (
            apic.acknowledge(),
            apic.tsc_deadline(),
            apic.next_deadline_ns()
        ),
        (Some(0x22), 0, None)
    );
    // In the past: at once.
    apic.set_tsc_deadline(1, 5000);
    assert_eq!(
        (apic.acknowledge(), apic.next_deadline_ns()),
        (None, None),
        "0x22 is in service"
    );
    write(apic, 0xb0, 0, 5000);
    assert_eq!((apic.acknowledge(), apic.tsc_deadline()), (Some(0x22), 0));
    // Another mode disarms.
    write(apic, 0x320, 0x22, 5000);
    assert_eq!((apic.next_deadline_ns(), apic.tsc_deadline()), (None, 0));
}

#[test]
fn x2apic_has_its_own_way_in_and_its_own_registers() {
    let (bus, apics) = machine(2);
    let apic = &apics[1];
    let ends = Ends::default();
    assert_eq!(apic.msr_read(2, 0), Err(Invalid));
    assert_eq!(
        apic.set_base(X2APIC, false, 46),
        Err(Invalid),
        "not in the model"
    );
    assert_eq!(apic.set_base(X2APIC & !0x800, true, 46), Err(Invalid));
    assert_eq!(apic.set_base(X2APIC, true, 46), Ok(()));
    assert!(!apic.owns(0xfee0_0020));
    assert_eq!(apic.set_base(X2APIC & !0x400, true, 46), Err(Invalid));
    assert_eq!((apic.msr_read(2, 0), apic.msr_read(0xd, 0)), (Ok(1), Ok(2)));
    assert_eq!(apic.msr_write(0xf, 0x1ff, 0, &ends), Ok(()));
    assert_eq!(apic.msr_write(0xf, 0x3ff, 0, &ends), Err(Invalid));
    assert_eq!(apic.msr_write(0xe, 0, 0, &ends), Err(Invalid));
    assert_eq!(apic.msr_write(0xb, 1, 0, &ends), Err(Invalid));
    apic.msr_write(0x3f, 0x44, 0, &ends).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x44));
    apic.msr_write(0xb, 0, 0, &ends).unwrap();
    // Logical destination: cluster 0, bit 1; and a physical one in the high half of the ICR.
    bus.send(&Message {
        destination: Destination::Logical(2),
        mode: DeliveryMode::Nmi,
        vector: 0,
        level: false,
    });
    assert!(apic.take_nmi() && !apics[0].take_nmi());
    apic.msr_write(0x30, 1 << 32 | 0x55, 0, &ends).unwrap();
    assert_eq!(apic.acknowledge(), Some(0x55));
    // Off, then xAPIC again.
    apic.set_base(0xfee0_0000, true, 46).unwrap();
    assert!(!apic.is_enabled());
    apic.set_base(0xfee0_0800, true, 46).unwrap();
    assert!(apic.owns(0xfee0_0fff) && !apic.owns(0xfee0_1000));
}

#[test]
fn external_interrupts_pass_through_lint0_once() {
    let (bus, apics) = enabled(2);
    bus.ext_int(Some(8));
    assert!(!apics[0].pending());
    write(&apics[0], 0x350, 0x700, 0);
    assert!(apics[0].waiting().interrupt && apics[0].pending());
    assert_eq!(
        (apics[0].acknowledge(), apics[0].acknowledge()),
        (Some(8), None)
    );
    bus.ext_int(Some(9));
    bus.ext_int(None);
    assert_eq!(apics[0].acknowledge(), None);
    write(&apics[1], 0x360, 0x400, 0);
    apics[1].nmi_pin();
    assert!(apics[1].take_nmi());
}

#[test]
fn the_vcpu_and_the_timer_thread_are_told() {
    let (bus, apics) = enabled(1);
    let told = Arc::new((AtomicU32::new(0), AtomicU32::new(0)));
    let (a, b) = (Arc::clone(&told), Arc::clone(&told));
    apics[0].set_notify(Arc::new(move || _ = a.0.fetch_add(1, Ordering::Relaxed)));
    apics[0].set_timer_moved(Arc::new(move || _ = b.1.fetch_add(1, Ordering::Relaxed)));
    bus.msi(msi(0xfee0_0000, 0x31));
    assert_eq!(told.0.load(Ordering::Relaxed), 1);
    apics[0].acknowledge();
    write(&apics[0], 0x380, 1000, 0);
    assert_eq!(
        (
            told.0.load(Ordering::Relaxed),
            told.1.load(Ordering::Relaxed)
        ),
        (1, 1)
    );
}

#[test]
fn saved_registers_come_back() {
    let (bus, apics) = enabled(2);
    write(&apics[1], 0x320, 0x4_0020, 0);
    apics[1].set_tsc_deadline(5_000, 10);
    apics[1].set_cr8(5);
    bus.msi(msi(0xfee0_1000, 0x31));
    bus.msi(msi(0xfee0_1000, 0xc091));
    apics[1].acknowledge();
    let saved = apics[1].save(10);
    let (_bus, others) = machine(2);
    others[1].restore(&saved, 0, 10);
    assert_eq!(others[1].save(10), saved);
    assert_eq!(others[1].next_deadline_ns(), apics[1].next_deadline_ns());
    assert!(others[1].is_level(0x91) && others[1].cr8() == 5);
}

/// What may happen to an APIC, as far as priorities go.
#[derive(Clone, Debug)]
enum Step {
    Arrive(u8, bool),
    Priority(u8),
    Acknowledge,
    End,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (any::<u8>(), any::<bool>()).prop_map(|(v, l)| Step::Arrive(v, l)),
        1 => any::<u8>().prop_map(|v| Step::Priority(v & 0x7f)),
        4 => Just(Step::Acknowledge),
        3 => Just(Step::End),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn priorities_are_those_of_sets_of_vectors(steps in steps()) {
        let (bus, apics) = enabled(1);
        let apic = &apics[0];
        let (mut requested, mut service, mut level) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut priority = 0u8;
        for step in steps {
            match step {
                Step::Arrive(vector, is_level) => {
                    bus.msi(msi(0xfee0_0000, u32::from(vector) | if is_level { 0xc000 } else { 0 }));
                    if vector >= 16 {
                        requested.insert(vector);
                        if is_level { level.insert(vector); } else { level.remove(&vector); }
                    }
                }
                Step::Priority(value) => {
                    priority = value;
                    write(apic, 0x80, u32::from(value), 0);
                }
                Step::Acknowledge => {
                    let floor = (priority >> 4).max(service.last().map_or(0, |v| v >> 4));
                    let expected = requested.last().copied().filter(|v| v >> 4 > floor);
                    prop_assert_eq!(apic.waiting().interrupt, expected.is_some());
                    prop_assert_eq!(apic.pending(), expected.is_some());
                    prop_assert_eq!(apic.acknowledge(), expected);
                    if let Some(vector) = expected {
                        requested.remove(&vector);
                        service.insert(vector);
                    }
                }
                Step::End => {
                    let ends = Ends::default();
                    apic.end_of_interrupt(&ends);
                    let expected: Vec<u8> = service.pop_last().filter(|v| level.contains(v)).into_iter().collect();
                    prop_assert_eq!(&*ends.0.lock().unwrap(), &expected);
                }
            }
            let busy = service.last().map_or(0, |v| v & 0xf0);
            let expected = if priority >> 4 >= busy >> 4 { priority } else { busy };
            prop_assert_eq!(read(apic, 0xa0, 0), u32::from(expected));
        }
    }
}
