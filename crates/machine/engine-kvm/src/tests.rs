//! Guests of a few instructions on this host's KVM. Where there is none that runs the model, each test says so.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strata_engine::x86::{CpuModel, CpuState, MpState, PendingEvent, X86};
use strata_engine::{
    Doorbell, DoorbellAddress, DoorbellSpace, Engine, Exit, IoBus, MachineClock, MsiMessage, Vcpu,
    VcpuId,
};
use strata_engine_dbt::{Translator, TranslatorConfig};
use strata_memory::{Gpa, GuestMemory, SlotKind};

use crate::{Kvm, KvmConfig};

/// Where the code is: segment 0x100, offset 0.
const CODE: u64 = 0x1000;

struct Rig {
    memory: GuestMemory,
    engine: Kvm,
    clock: Arc<MachineClock>,
}

impl Rig {
    /// `None`, having said why, where these tests cannot run.
    fn new(vcpus: u32) -> Option<Rig> {
        let model = match CpuModel::named("baseline") {
            Ok(model) => model,
            Err(error) => return skip(&error.to_string()),
        };
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), 1 << 20, SlotKind::Ram).unwrap();
        let clock = Arc::new(MachineClock::new(1_000_000_000));
        let config = KvmConfig {
            memory: memory.clone(),
            clock: clock.clone(),
            model,
            vcpus,
        };
        match Kvm::new(config) {
            Ok(engine) => {
                clock.start();
                Some(Rig {
                    memory,
                    engine,
                    clock,
                })
            }
            Err(error) => skip(&error.to_string()),
        }
    }

    /// A vCPU that begins in real mode at [`CODE`].
    fn vcpu(&self, id: u32, code: &[u8]) -> Box<dyn Vcpu<X86>> {
        let mut vcpu = self.engine.create_vcpu(VcpuId(id)).unwrap();
        self.memory.write(Gpa(CODE), code).unwrap();
        let state = real_mode(vcpu.state());
        vcpu.set_state(&state).unwrap();
        vcpu
    }
}

/// Says, and notes for `cargo xtask test`, that a test is not run; in the lab there is no reason not to.
fn skip(reason: &str) -> Option<Rig> {
    assert!(
        std::env::var_os("STRATA_KVM_REQUIRED").is_none(),
        "{reason}"
    );
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    println!("SKIPPED {name}: {reason}");
    if let Some(path) = std::env::var_os("STRATA_TEST_SKIPS") {
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        writeln!(file, "{name}\t{reason}").unwrap();
    }
    None
}

fn real_mode(mut state: CpuState) -> CpuState {
    state.segments[1].selector = 0x100;
    state.segments[1].base = CODE;
    state.rip = 0;
    state.gpr[4] = 0x8000;
    state.mp_state = MpState::Runnable;
    state
}

/// Notes what the guest does; port 0x10 ends the run through a kick.
#[derive(Default)]
struct Notes {
    log: Mutex<Vec<(char, u64, Vec<u8>)>>,
    kicker: Mutex<Option<Arc<dyn strata_engine::Kicker>>>,
    answer: u8,
}

impl Notes {
    fn note(&self, kind: char, at: u64, data: &[u8]) {
        self.log.lock().unwrap().push((kind, at, data.to_vec()));
    }
    fn log(&self) -> Vec<(char, u64, Vec<u8>)> {
        self.log.lock().unwrap().clone()
    }
}

impl IoBus for Notes {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(self.answer);
        self.note('r', gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note('w', gpa, data);
    }
    fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(self.answer);
        self.note('i', port.into(), data);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        self.note('o', port.into(), data);
        if port == 0x10
            && let Some(kicker) = &*self.kicker.lock().unwrap()
        {
            kicker.kick();
        }
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.note('e', vector.into(), &[]);
    }
}

fn run(vcpu: &mut Box<dyn Vcpu<X86>>, notes: &Notes) -> Exit {
    *notes.kicker.lock().unwrap() = Some(vcpu.kicker());
    // Something that never ends must not hold up the tests: a kick from outside comes in the end.
    let (done, waits) = channel::<()>();
    let kicker = vcpu.kicker();
    let guard = std::thread::spawn(move || {
        if waits.recv_timeout(Duration::from_secs(60)).is_err() {
            kicker.kick();
        }
    });
    let exit = vcpu.run(notes).unwrap();
    let _ = done.send(());
    guard.join().unwrap();
    exit
}

#[test]
fn ports_and_device_memory() {
    let Some(rig) = Rig::new(1) else { return };
    #[rustfmt::skip]
    let code = [
        0xe4, 0x21,                   // in al, 0x21
        0xe6, 0x22,                   // out 0x22, al
        0xb8, 0x00, 0xf0,             // mov ax, 0xf000 (above the RAM: device memory)
        0x05, 0xff, 0x0f,             // add ax, 0x0fff
        0x8e, 0xd8,                   // mov ds, ax
        0xa1, 0x20, 0x00,             // mov ax, [0x20]
        0xa2, 0x21, 0x00,             // mov [0x21], al
        0xb9, 0x03, 0x00,             // mov cx, 3
        0xba, 0x33, 0x00,             // mov dx, 0x33
        0x31, 0xff,                   // xor di, di
        0xbf, 0x00, 0x20,             // mov di, 0x2000
        0xf3, 0x6d,                   // rep insw
        0xe6, 0x10,                   // out 0x10, al
        0xf4,
    ];
    let mut vcpu = rig.vcpu(0, &code);
    let notes = Notes {
        answer: 0x5a,
        ..Notes::default()
    };
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    let two = vec![0x5a, 0x5a];
    let expected = vec![
        ('i', 0x21, vec![0x5a]),
        ('o', 0x22, vec![0x5a]),
        ('r', 0x10_0010, two.clone()),
        ('w', 0x10_0011, vec![0x5a]),
        ('i', 0x33, two.clone()),
        ('i', 0x33, two.clone()),
        ('i', 0x33, two),
        ('o', 0x10, vec![0x5a]),
    ];
    assert_eq!(notes.log(), expected);
    assert_eq!(rig.memory.read_u32(Gpa(0x2002)).unwrap(), 0x5a5a_5a5a);
    // The access before the kick is complete: the instruction pointer is behind it.
    assert_eq!(vcpu.state().rip, code.len() as u64 - 1);
    assert!(vcpu.stats().exits.values().sum::<u64>() >= 6);
}

#[test]
fn a_kick_ends_an_endless_loop_and_a_halt() {
    let Some(rig) = Rig::new(1) else { return };
    for code in [[0xeb, 0xfe], [0xfa, 0xf4]] {
        let rig = Rig::new(1).unwrap();
        let mut vcpu = rig.vcpu(0, &code);
        let kicker = vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            kicker.kick();
        });
        assert_eq!(
            vcpu.run(&Notes::default()).unwrap(),
            Exit::Kicked,
            "{code:x?}"
        );
        thread.join().unwrap();
        // One that comes before the run counts too.
        vcpu.kicker().kick();
        let start = Instant::now();
        assert_eq!(vcpu.run(&Notes::default()).unwrap(), Exit::Kicked);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    drop(rig);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(rig) = Rig::new(1) else { return };
    // lidt [empty]; int3
    let mut vcpu = rig.vcpu(0, &[0x2e, 0x0f, 0x01, 0x1e, 0x10, 0x00, 0xcc]);
    assert_eq!(run(&mut vcpu, &Notes::default()), Exit::Shutdown);
}

#[test]
fn state_goes_around() {
    let Some(rig) = Rig::new(2) else { return };
    let mut first = rig.vcpu(0, &[0xf4]);
    let mut state = first.state();
    assert_eq!(state.mp_state, MpState::Runnable);
    for (i, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x0123_4567_89ab_0000 + i as u64;
    }
    state.rflags = 0x202;
    state.cr2 = 0xdead_0000;
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.xcr0 = 7;
    state.interrupt_shadow = true;
    state.nmi_blocked = true;
    state.nmi_pending = true;
    state.pending = Some(PendingEvent {
        vector: 13,
        error: Some(0x50),
        exception: true,
    });
    for (i, byte) in state.xsave.bytes.iter_mut().enumerate() {
        // XMM registers and the upper halves of YMM.
        if (160..416).contains(&i) || i >= 576 {
            *byte = i as u8 | 1;
        }
    }
    for entry in &mut state.msrs {
        match entry.index {
            0xc000_0081 | 0xc000_0103 => entry.value = 0x1234_5678,
            0xc000_0082 | 0xc000_0102 => entry.value = 0xffff_8000_0012_3000,
            0x277 => entry.value = 0x0007_0406_0007_0401,
            _ => {}
        }
    }
    state.tsc_offset = 0x1_0000_0000;
    let apic = state.apic.as_mut().unwrap();
    apic.registers[0x0f] = 0x1ff;
    // The task priority, and the processor's that follows from it.
    apic.registers[0x08] = 0x20;
    apic.registers[0x0a] = 0x20;
    apic.registers[0x20 + 3] = 1 << 7;
    state.cr8 = 2;
    first.set_state(&state).unwrap();
    let again = first.state();
    assert_eq!(again.msrs, state.msrs);
    assert_eq!(again.apic, state.apic);
    assert_eq!(again.xsave, state.xsave);
    assert_eq!(
        CpuState {
            msrs: vec![],
            apic: None,
            xsave: Default::default(),
            ..again
        },
        {
            CpuState {
                msrs: vec![],
                apic: None,
                xsave: Default::default(),
                ..state.clone()
            }
        }
    );
    // And into another vCPU, whose ID is its own.
    let mut second = rig.engine.create_vcpu(VcpuId(1)).unwrap();
    assert_eq!(second.state().mp_state, MpState::WaitForSipi);
    let own = second.state();
    second.set_state(&own).unwrap();
    assert_eq!(second.state(), own);
    state.tsc_hz *= 2;
    assert!(second.set_state(&state).is_err());
}

#[test]
fn interrupts_arrive_and_their_ends_come_back() {
    let Some(rig) = Rig::new(1) else { return };
    #[rustfmt::skip]
    let code = [
        0xfb,                         // sti
        0xf4,                         // hlt
        0xe6, 0x10,                   // out 0x10, al
        0xeb, 0xfa,                   // jmp to sti
    ];
    #[rustfmt::skip]
    let handler = [
        0xe6, 0x40,                   // out 0x40, al
        0x66, 0xa3, 0xb0, 0x00,       // mov [0xb0], eax: end of interrupt
        0xcf,                         // iret
    ];
    let mut vcpu = rig.vcpu(0, &code);
    rig.memory.write(Gpa(0x3000), &handler).unwrap();
    rig.memory.write_u32(Gpa(0x51 * 4), 0x0300_0000).unwrap();
    let mut state = vcpu.state();
    // Real mode does not reach so high by itself.
    state.segments[3].base = 0xfee0_0000;
    state.apic.as_mut().unwrap().registers[0x0f] = 0x1ff;
    vcpu.set_state(&state).unwrap();
    let notes = Notes::default();
    rig.engine.interrupts().msi(MsiMessage {
        address: 0xfee0_0000,
        data: 0xc051,
    });
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    let kinds: Vec<_> = notes
        .log()
        .iter()
        .map(|(kind, at, _)| (*kind, *at))
        .collect();
    assert_eq!(kinds, [('o', 0x40), ('e', 0x51), ('o', 0x10)]);
}

struct Ring(AtomicU32);

impl Doorbell for Ring {
    fn ring(&self, value: u32) {
        self.0.fetch_add(1 + value, Ordering::SeqCst);
    }
}

#[test]
fn doorbells_ring_without_the_bus() {
    let Some(rig) = Rig::new(1) else { return };
    let ring = Arc::new(Ring(AtomicU32::new(0)));
    let at = |space, address, value| DoorbellAddress {
        space,
        address,
        value,
    };
    rig.engine
        .add_doorbell(at(DoorbellSpace::Port, 0x50, None), ring.clone())
        .unwrap();
    rig.engine
        .add_doorbell(at(DoorbellSpace::Port, 0x52, Some(7)), ring.clone())
        .unwrap();
    rig.engine
        .remove_doorbell(at(DoorbellSpace::Mmio, 0x99, None));
    // mov ax, 7; out 0x50, al; out 0x52, ax; mov al, 8; out 0x52, ax; out 0x10, al
    let code = [
        0xb8, 7, 0, 0xe6, 0x50, 0xe7, 0x52, 0xb0, 8, 0xe7, 0x52, 0xe6, 0x10, 0xf4,
    ];
    let mut vcpu = rig.vcpu(0, &code);
    let notes = Notes::default();
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    let ports: Vec<_> = notes
        .log()
        .iter()
        .map(|(_, at, data)| (*at, data.clone()))
        .collect();
    assert_eq!(ports, [(0x52, vec![8, 0]), (0x10, vec![8])]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while ring.0.load(Ordering::SeqCst) != 9 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(ring.0.load(Ordering::SeqCst), 9);
    rig.engine
        .remove_doorbell(at(DoorbellSpace::Port, 0x50, None));
}

#[test]
fn memory_comes_and_goes_and_rom_stays() {
    let Some(rig) = Rig::new(1) else { return };
    let rom = rig
        .memory
        .add_slot(Gpa(0x10_0000), 0x1000, SlotKind::Rom)
        .unwrap();
    rig.memory.load(Gpa(0x10_0010), &[0x11, 0x22]).unwrap();
    // mov ax, 0xffff; mov ds, ax; mov al, [0x20]; inc al; mov [0x20], al; out 0x10, al; jmp to the start
    let code = [
        0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa0, 0x20, 0, 0xfe, 0xc0, 0xa2, 0x20, 0, 0xe6, 0x10, 0xeb,
        0xef,
    ];
    let mut vcpu = rig.vcpu(0, &code);
    let notes = Notes {
        answer: 0x77,
        ..Notes::default()
    };
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    assert_eq!(notes.log(), [('o', 0x10, vec![0x12])]);
    assert_eq!(rig.memory.read_u8(Gpa(0x10_0010)).unwrap(), 0x11);
    rig.memory.remove_slot(rom).unwrap();
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    assert_eq!(notes.log().get(1), Some(&('r', 0x10_0010, vec![0x77])));
}

#[test]
fn the_dirty_log_has_what_the_guest_wrote() {
    let Some(rig) = Rig::new(1) else { return };
    // mov [0x2345], al; out 0x10, al
    let mut vcpu = rig.vcpu(
        0,
        &[0x31, 0xc0, 0x8e, 0xd8, 0xa2, 0x45, 0x23, 0xe6, 0x10, 0xf4],
    );
    rig.memory.start_dirty_log();
    assert_eq!(run(&mut vcpu, &Notes::default()), Exit::Kicked);
    rig.engine.collect_dirty().unwrap();
    let id = rig.memory.slots().iter().next().unwrap().id();
    assert_eq!(rig.memory.take_dirty(id).unwrap()[0] & 0b1100, 0b0100);
}

#[test]
fn time_stands_while_the_machine_does() {
    let Some(rig) = Rig::new(1) else { return };
    // rdtsc; out 0x10, eax; mov eax, edx; out 0x10, eax; jmp
    let code = [
        0x0f, 0x31, 0x66, 0xe7, 0x20, 0x66, 0x89, 0xd0, 0x66, 0xe7, 0x10, 0xeb, 0xf3,
    ];
    let mut vcpu = rig.vcpu(0, &code);
    let hz = vcpu.state().tsc_hz;
    let mut read = || {
        let notes = Notes::default();
        assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
        let words: Vec<u64> = notes
            .log()
            .iter()
            .map(|(_, _, d)| u32::from_le_bytes(d[..4].try_into().unwrap()).into())
            .collect();
        words[0] | words[1] << 32
    };
    let near = |tsc: u64, clock: &MachineClock| {
        let expected = crate::time::ticks(clock.now_ns(), hz);
        assert!(
            tsc.abs_diff(expected) < hz / 4,
            "{tsc} and {expected} at {hz} Hz"
        );
    };
    near(read(), &rig.clock);
    rig.clock.stop();
    std::thread::sleep(Duration::from_millis(1000));
    rig.clock.start();
    near(read(), &rig.clock);
}

#[test]
fn a_timer_keeps_its_deadline_while_the_machine_stands() {
    let Some(rig) = Rig::new(1) else { return };
    // sti; hlt; jmp to hlt
    let mut vcpu = rig.vcpu(0, &[0xfb, 0xf4, 0xeb, 0xfd]);
    // out 0x10, al; iret
    rig.memory.write(Gpa(0x3000), &[0xe6, 0x10, 0xcf]).unwrap();
    rig.memory.write_u32(Gpa(0x41 * 4), 0x0300_0000).unwrap();
    let mut state = vcpu.state();
    let deadline = rig.clock.now_ns() + 1_000_000_000;
    let apic = state.apic.as_mut().unwrap();
    apic.registers[0x0f] = 0x1ff;
    apic.registers[0x32] = 0x41;
    apic.registers[0x3e] = 0b1011;
    apic.registers[0x38] = 2_000_000_000;
    apic.timer_deadline_ns = Some(deadline);
    vcpu.set_state(&state).unwrap();
    let kicker = vcpu.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        kicker.kick();
    });
    let notes = Notes::default();
    assert_eq!(vcpu.run(&notes).unwrap(), Exit::Kicked);
    thread.join().unwrap();
    rig.clock.stop();
    assert_eq!(notes.log(), []);
    let noted = vcpu.state().apic.unwrap().timer_deadline_ns.unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let later = vcpu.state().apic.unwrap().timer_deadline_ns.unwrap();
    assert_eq!(noted, later);
    assert!(noted.abs_diff(deadline) < 100_000_000, "{noted} {deadline}");
    rig.clock.start();
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    assert_eq!(notes.log().len(), 1);
}

#[test]
fn an_8259_interrupts_through_lint0() {
    let Some(rig) = Rig::new(1) else { return };
    // sti; hlt; jmp to hlt
    let mut vcpu = rig.vcpu(0, &[0xfb, 0xf4, 0xeb, 0xfd]);
    // out 0x10, al; iret
    rig.memory.write(Gpa(0x3000), &[0xe6, 0x10, 0xcf]).unwrap();
    rig.memory.write_u32(Gpa(0x21 * 4), 0x0300_0000).unwrap();
    let mut state = vcpu.state();
    let apic = state.apic.as_mut().unwrap();
    assert_eq!(apic.registers[0x35], 1 << 16, "masked after reset");
    apic.registers[0x0f] = 0x1ff;
    apic.registers[0x35] = 0x700;
    vcpu.set_state(&state).unwrap();
    rig.engine.interrupts().ext_int(Some(0x21));
    let notes = Notes::default();
    assert_eq!(run(&mut vcpu, &notes), Exit::Kicked);
    assert_eq!(notes.log().len(), 1);
    assert_eq!(vcpu.stats().interrupts, 1);
}

#[test]
fn one_cpu_starts_another() {
    let Some(rig) = Rig::new(2) else { return };
    #[rustfmt::skip]
    let code = [
        0x66, 0xb8, 0, 0, 0, 1,       // mov eax, 1 << 24
        0x66, 0xa3, 0x10, 0x03,       // mov [0x310], eax: to CPU 1
        0x66, 0xb8, 0, 0x45, 0, 0,    // mov eax, 0x4500
        0x66, 0xa3, 0x00, 0x03,       // mov [0x300], eax: INIT
        0x66, 0xb8, 7, 0x46, 0, 0,    // mov eax, 0x4607
        0x66, 0xa3, 0x00, 0x03,       // mov [0x300], eax: start at 0x7000
        0xeb, 0xfe,                   // jmp to itself
    ];
    let mut first = rig.vcpu(0, &code);
    // mov al, 0x42; out 0x10, al; hlt
    rig.memory
        .write(Gpa(0x7000), &[0xb0, 0x42, 0xe6, 0x10, 0xf4])
        .unwrap();
    let mut state = first.state();
    state.segments[3].base = 0xfee0_0000;
    state.apic.as_mut().unwrap().registers[0x0f] = 0x1ff;
    first.set_state(&state).unwrap();
    let mut second = rig.engine.create_vcpu(VcpuId(1)).unwrap();
    // As a machine does when it restarts.
    let reset = second.state();
    second.set_state(&reset).unwrap();
    let kicker = first.kicker();
    let thread = std::thread::spawn(move || first.run(&Notes::default()).unwrap());
    let notes = Notes::default();
    assert_eq!(run(&mut second, &notes), Exit::Kicked);
    assert_eq!(notes.log(), [('o', 0x10, vec![0x42])]);
    let state = second.state();
    assert_eq!(
        (state.segments[1].selector, state.rip),
        (0x700, 4),
        "started at page 7"
    );
    kicker.kick();
    assert_eq!(thread.join().unwrap(), Exit::Kicked);
}

#[test]
fn a_new_cpu_is_as_the_translators() {
    let Some(rig) = Rig::new(1) else { return };
    let translator = Translator::new(TranslatorConfig {
        memory: rig.memory.clone(),
        clock: rig.clock.clone(),
        model: CpuModel::named("baseline").unwrap(),
        vcpus: 1,
        reference: false,
        count: false,
        lockstep: 0,
    })
    .unwrap();
    let mut ours = rig.engine.create_vcpu(VcpuId(0)).unwrap().state();
    let mut theirs = translator.create_vcpu(VcpuId(0)).unwrap().state();
    // The translator has registers that it adds to every model, and a counter of the machine clock's frequency.
    theirs
        .msrs
        .retain(|entry| ours.msrs.iter().any(|other| other.index == entry.index));
    ours.tsc_hz = theirs.tsc_hz;
    let (mine, other) = (ours.apic.take().unwrap(), theirs.apic.take().unwrap());
    assert_eq!(
        std::mem::take(&mut ours.msrs),
        std::mem::take(&mut theirs.msrs)
    );
    assert_eq!(
        std::mem::take(&mut ours.xsave),
        std::mem::take(&mut theirs.xsave)
    );
    assert_eq!(ours, theirs);
    assert_eq!(mine.base, other.base);
    let version = 3;
    for (index, (mine, other)) in mine.registers.iter().zip(&other.registers).enumerate() {
        assert!(
            index == version || mine == other,
            "register {index:#x}: {mine:#x} and {other:#x}"
        );
    }
}
