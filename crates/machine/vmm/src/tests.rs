//! Machines on an engine whose CPUs are scripts: what the machine does around its vCPUs.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use serde_json::Value;
use strata_engine::x86::{CpuState, X86};
use strata_engine::{
    Doorbell, DoorbellAddress, Engine, EngineError, Exit, InterruptSink, IoBus, Kicker, MsiMessage,
    Vcpu, VcpuId, VcpuStats,
};
use strata_memory::{Gpa, GuestMemory};

use crate::config::{BootFiles, BootSource, ConsoleKind, OnReboot};
use crate::control::Request;
use crate::{BuildError, ByteSize, Crash, HostEnds, Machine, MachineConfig, MachineStats, Outcome};

/// What a scripted CPU does when it runs; the number counts the lives of the machine from 0.
type Script = dyn Fn(&dyn IoBus, &Fake, u64) -> Exit + Send + Sync;

/// The engine and its one CPU.
struct Fake {
    memory: GuestMemory,
    script: Box<Script>,
    state: Mutex<CpuState>,
    kicked: AtomicBool,
    woken: Condvar,
    lock: Mutex<()>,
    lives: Mutex<u64>,
}

impl Fake {
    /// As HLT without interrupts: until somebody kicks.
    fn halt(&self) -> Exit {
        let mut guard = self.lock.lock().unwrap();
        while !self.kicked.swap(false, Ordering::SeqCst) {
            guard = self.woken.wait(guard).unwrap();
        }
        Exit::Kicked
    }
}

struct FakeEngine(Arc<Fake>);
struct FakeVcpu(Arc<Fake>);
struct FakeKicker(Arc<Fake>);
struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn msi(&self, _: MsiMessage) {}
    fn ext_int(&self, _: Option<u8>) {}
}

impl Engine for FakeEngine {
    type Arch = X86;
    fn name(&self) -> &'static str {
        "fake"
    }
    fn create_vcpu(&self, _: VcpuId) -> Result<Box<dyn Vcpu<X86>>, EngineError> {
        Ok(Box::new(FakeVcpu(self.0.clone())))
    }
    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::new(NoInterrupts)
    }
    fn add_doorbell(&self, _: DoorbellAddress, _: Arc<dyn Doorbell>) -> Result<(), EngineError> {
        Ok(())
    }
    fn remove_doorbell(&self, _: DoorbellAddress) {}
}

impl Kicker for FakeKicker {
    fn kick(&self) {
        let _guard = self.0.lock.lock().unwrap();
        self.0.kicked.store(true, Ordering::SeqCst);
        self.0.woken.notify_all();
    }
}

impl Vcpu<X86> for FakeVcpu {
    fn run(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        let life = *self.0.lives.lock().unwrap();
        Ok((self.0.script)(bus, &self.0, life))
    }
    fn state(&mut self) -> CpuState {
        self.0.state.lock().unwrap().clone()
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        *self.0.state.lock().unwrap() = state.clone();
        *self.0.lives.lock().unwrap() += 1;
        Ok(())
    }
    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(FakeKicker(self.0.clone()))
    }
    fn stats(&self) -> VcpuStats {
        VcpuStats {
            page_faults: 42,
            ..VcpuStats::default()
        }
    }
}

/// A 64-bit ELF file that loads 16 bytes at 1 MiB.
fn kernel() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |elf: &mut Vec<u8>, v: u16| elf.extend(v.to_le_bytes());
    let word = |elf: &mut Vec<u8>, v: u32| elf.extend(v.to_le_bytes());
    let long = |elf: &mut Vec<u8>, v: u64| elf.extend(v.to_le_bytes());
    half(&mut elf, 2);
    half(&mut elf, 62);
    word(&mut elf, 1);
    long(&mut elf, 0x10_0000);
    long(&mut elf, 64);
    long(&mut elf, 0);
    word(&mut elf, 0);
    for v in [64, 56, 1, 64, 0, 0] {
        half(&mut elf, v);
    }
    word(&mut elf, 1);
    word(&mut elf, 7);
    for v in [120, 0x10_0000, 0x10_0000, 16, 16, 0x1000] {
        long(&mut elf, v);
    }
    elf.extend(*b"guest code here!");
    elf
}

struct Setup {
    _dir: tempfile::TempDir,
    config: MachineConfig,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("kernel");
    std::fs::write(&path, kernel()).unwrap();
    let files = BootFiles {
        unpacked: None,
        kernel: path,
        initrd: None,
        append: "console=ttyS0".to_owned(),
    };
    let mut config = MachineConfig::new("test".parse().unwrap(), BootSource::Files(files));
    config.memory = ByteSize::mebibytes(64);
    Setup { _dir: dir, config }
}

fn build(
    config: &MachineConfig,
    ends: HostEnds,
    script: impl Fn(&dyn IoBus, &Fake, u64) -> Exit + Send + Sync + 'static,
) -> Machine {
    try_build(config, ends, script).unwrap()
}

fn try_build(
    config: &MachineConfig,
    ends: HostEnds,
    script: impl Fn(&dyn IoBus, &Fake, u64) -> Exit + Send + Sync + 'static,
) -> Result<Machine, BuildError> {
    Machine::build_on(config.clone(), ends, |parts| {
        Ok(Arc::new(FakeEngine(Arc::new(Fake {
            memory: parts.memory,
            script: Box::new(script),
            state: Mutex::default(),
            kicked: AtomicBool::new(false),
            woken: Condvar::new(),
            lock: Mutex::new(()),
            lives: Mutex::new(0),
        }))) as _)
    })
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn print(bus: &dyn IoBus, text: &str) {
    for byte in text.bytes() {
        bus.port_out(0x3f8, &[byte]);
    }
}

fn power_off(bus: &dyn IoBus) {
    // SLP_TYP 5, SLP_EN.
    bus.port_out(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
}

#[test]
fn prints_and_powers_off() {
    let setup = setup();
    let sink = Sink::default();
    let ends = HostEnds {
        console: Some(Box::new(sink.clone())),
        ..HostEnds::default()
    };
    let machine = build(&setup.config, ends, |bus, fake, _| {
        let state = fake.state.lock().unwrap().clone();
        assert_eq!((state.rip, state.cr3 != 0), (0x10_0000, true));
        let mut code = [0; 16];
        fake.memory.read(Gpa(0x10_0000), &mut code).unwrap();
        assert_eq!(&code, b"guest code here!");
        print(bus, "hello\r\n");
        power_off(bus);
        fake.halt()
    });
    let (first_run, ring) = (machine.first_run(), machine.console_ring());
    assert!(matches!(machine.run().0, Outcome::PoweredOff));
    assert_eq!(sink.0.lock().unwrap().as_slice(), b"hello\r\n");
    assert_eq!(ring.tail(5), ["hello"]);
    assert!(first_run.get().is_some());
}

#[test]
fn restarts_with_empty_memory() {
    let setup = setup();
    let script = |bus: &dyn IoBus, fake: &Fake, life: u64| {
        let memory = &fake.memory;
        assert_eq!(memory.read_u32(Gpa(0x200_0000)).unwrap(), 0, "life {life}");
        assert_eq!(memory.read_u8(Gpa(0x10_0000)).unwrap(), b'g');
        if life < 3 {
            memory.write_u32(Gpa(0x200_0000), 7).unwrap();
            memory.write_u8(Gpa(0x10_0000), 0).unwrap();
            bus.port_out(0xcf9, &[6]);
        } else {
            power_off(bus);
        }
        fake.halt()
    };
    let machine = build(&setup.config, HostEnds::default(), script);
    let (outcome, stats) = machine.run();
    assert!(matches!(outcome, Outcome::PoweredOff));
    assert_eq!(stats.reboots, 2);

    let mut config = setup.config.clone();
    config.on_reboot = OnReboot::Exit;
    let machine = build(&config, HostEnds::default(), script);
    assert!(matches!(machine.run().0, Outcome::Rebooted));
}

#[test]
fn crashes_are_told_apart() {
    let mut setup = setup();
    setup.config.debug_exit = true;
    let config = &setup.config;
    let machine = build(config, HostEnds::default(), |bus, fake, _| {
        bus.port_out(0x505, &[1]);
        fake.halt()
    });
    let (outcome, _) = machine.run();
    assert!(matches!(outcome, Outcome::Crashed(Crash::GuestPanic)));

    let machine = build(config, HostEnds::default(), |_, _, _| Exit::Shutdown);
    let (outcome, _) = machine.run();
    assert!(matches!(
        outcome,
        Outcome::Crashed(Crash::TripleFault { cpu: 0 })
    ));

    let machine = build(config, HostEnds::default(), |_, _, _| panic!("on purpose"));
    let (outcome, _) = machine.run();
    assert!(matches!(
        outcome,
        Outcome::Crashed(Crash::Engine { cpu: 0, .. })
    ));

    let machine = build(config, HostEnds::default(), |bus, fake, _| {
        bus.port_out(0xf4, &3u32.to_le_bytes());
        fake.halt()
    });
    assert!(matches!(machine.run().0, Outcome::DebugExit(3)));
}

#[test]
fn answers_while_it_runs() {
    let setup = setup();
    let machine = build(&setup.config, HostEnds::default(), |_, fake, _| fake.halt());
    let handle = machine.handle();
    let asker = std::thread::spawn(move || {
        let state = || {
            let status = handle.ask(Request::Status).unwrap();
            status["state"].as_str().unwrap().to_owned()
        };
        assert_eq!(state(), "running");
        let stats = handle.ask(Request::Stats).unwrap();
        let stats: MachineStats = serde_json::from_value(stats).unwrap();
        assert_eq!(stats.vcpus[0].page_faults, 42);
        assert_eq!(handle.ask(Request::Pause), Ok(Value::Null));
        assert_eq!(state(), "paused");
        assert!(handle.ask(Request::Pause).is_err());
        assert!(handle.ask(Request::Stats).is_ok());
        assert_eq!(handle.ask(Request::Resume), Ok(Value::Null));
        assert_eq!(state(), "running");
        assert_eq!(handle.ask(Request::PowerOff), Ok(Value::Null));
        while handle.ask(Request::Status).is_ok() {}
    });
    assert!(matches!(machine.run().0, Outcome::Stopped));
    asker.join().unwrap();
}

#[test]
fn the_console_takes_more_input_than_fits() {
    let setup = setup();
    let machine = build(&setup.config, HostEnds::default(), |bus, fake, _| {
        let mut sum = 0u64;
        let mut count = 0;
        while count < 20_000 {
            let mut status = [0];
            bus.port_in(0x3fd, &mut status);
            if status[0] & 1 != 0 {
                let mut byte = [0];
                bus.port_in(0x3f8, &mut byte);
                sum += u64::from(byte[0]);
                count += 1;
            }
        }
        assert_eq!(sum, 20_000 * 7);
        power_off(bus);
        fake.halt()
    });
    let input = machine.console_input();
    let typist = std::thread::spawn(move || assert!(input.push_all(&[7; 20_000])));
    assert!(matches!(machine.run().0, Outcome::PoweredOff));
    typist.join().unwrap();
}

#[test]
fn what_cannot_be_built_is_said() {
    let setup = setup();
    let error = |change: fn(&mut MachineConfig)| {
        let mut config = setup.config.clone();
        change(&mut config);
        let result = Machine::build_on(config, HostEnds::default(), |parts| {
            Err(EngineError::Internal(format!("{} CPUs", parts.cpus)))
        });
        result.err().unwrap().to_string()
    };
    assert_eq!(
        error(|c| c.cpus = 0),
        "0 CPUs are not possible: a machine needs one"
    );
    assert_eq!(
        error(|c| c.cpus = 255),
        "255 CPUs are not possible: 254 are the most"
    );
    assert_eq!(error(|_| {}), "internal error of the engine: 1 CPUs");
    assert_eq!(
        error(|c| c.memory = ByteSize::bytes(4096)),
        "the machine's memory is not possible"
    );
    assert_eq!(
        error(|c| c.boot = BootSource::Image("tiny".into())),
        "the image 'tiny' must be looked up before a machine is built from it"
    );
    let kernel = |c: &mut MachineConfig| {
        c.boot = BootSource::Files(BootFiles {
            kernel: "/nonexistent".into(),
            ..BootFiles::default()
        });
    };
    assert_eq!(error(kernel), "cannot read the kernel /nonexistent");
}

#[test]
fn every_device_of_the_platform_fits() {
    let mut setup = setup();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    setup.config.console = ConsoleKind::Virtio;
    setup.config.vsock = Some(Default::default());
    setup.config.disks = vec![format!("{},ro", disk.display()).parse().unwrap(); 24];
    let ends = HostEnds {
        run_dir: Some(dir.path().to_owned()),
        ..HostEnds::default()
    };
    let config = setup.config.clone();
    let machine = build(&config, ends, |bus, fake, _| {
        let mut devices = Vec::new();
        for slot in 0..32u64 {
            let mut ids = [0; 4];
            bus.mmio_read(0xe000_0000 + (slot << 15), &mut ids);
            if ids != [0xff; 4] {
                devices.push((slot, u16::from_le_bytes([ids[2], ids[3]])));
            }
        }
        // Where a guest finds its devices must not change from version to version.
        let fixed = [(0, 0x0008), (1, 0x1044), (2, 0x1043), (3, 0x1053)];
        assert_eq!(devices[..4], fixed);
        assert_eq!(
            devices[4..],
            (8..32).map(|slot| (slot, 0x1042)).collect::<Vec<_>>()
        );
        power_off(bus);
        fake.halt()
    });
    assert!(dir.path().join("vsock.sock").exists());
    assert!(machine.console_input().resize(100, 50));
    assert!(matches!(machine.run().0, Outcome::PoweredOff));
    let mut config = setup.config.clone();
    config.disks.push(config.disks[0].clone());
    let error = try_build(&config, HostEnds::default(), |_, fake, _| fake.halt()).err();
    assert!(matches!(error, Some(BuildError::TooManyDisks { max: 24 })));
}
