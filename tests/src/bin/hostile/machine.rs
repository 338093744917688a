//! One case: a whole machine in this process, with a vCPU that starts in a state of ours and a driver between its runs.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use strata_engine::x86::{CpuState, X86};
use strata_engine::{
    Doorbell, DoorbellAddress, Engine, EngineError, Exit, InterruptSink, IoBus, Kicker, Vcpu,
    VcpuId, VcpuStats,
};
use strata_engine_dbt::{Translator, TranslatorConfig};
use strata_memory::{Gpa, GuestMemory, WriteObserver};
use strata_verify::Verifier;
use strata_vmm::config::{
    BootFiles, BootSource, ConsoleKind, DiskAccess, DiskConfig, OnReboot, VsockConfig,
};
use strata_vmm::{ByteSize, Crash, HostEnds, Machine, MachineConfig, Outcome};

use super::rng::Rng;
use super::{device, world};

/// A turn of the guest between two of the driver.
const TURN: Duration = Duration::from_millis(1);
/// A machine that restarts itself is ended after this.
const LIFE: Duration = Duration::from_millis(150);

/// Files that machines are made with.
pub struct Files {
    pub kernel: PathBuf,
    pub disk: PathBuf,
    pub vsock: PathBuf,
}

impl Files {
    /// Makes them in `directory`.
    pub fn new(directory: &std::path::Path) -> std::io::Result<Files> {
        let files = Files {
            kernel: directory.join("kernel"),
            disk: directory.join("disk"),
            vsock: directory.join("vsock"),
        };
        std::fs::write(&files.kernel, kernel())?;
        std::fs::File::create(&files.disk)?.set_len(4 << 20)?;
        Ok(files)
    }
}

/// A multiboot image of one byte of code.
fn kernel() -> Vec<u8> {
    let (magic, flags, at) = (0x1bad_b002u32, 0x1_0000u32, 0x10_0000u32);
    let mut image = Vec::new();
    for word in [
        magic,
        flags,
        0u32.wrapping_sub(magic).wrapping_sub(flags),
        at,
        at,
        at + 64,
        at + 64,
        at + 32,
    ] {
        image.extend(word.to_le_bytes());
    }
    image.resize(64, 0xf4);
    image
}

/// What a case is made of, besides its random numbers.
#[derive(Clone, Copy)]
struct Shape {
    wild: u64,
    turns: u64,
    /// The driver may end the machine.
    ends: bool,
}

/// The translator, with vCPUs of ours around its own.
struct HostileEngine {
    inner: Translator,
    memory: GuestMemory,
    rng: Mutex<Rng>,
    shape: Shape,
}

struct HostileVcpu {
    inner: Box<dyn Vcpu<X86>>,
    rng: Rng,
    shape: Shape,
    asked: Arc<AtomicBool>,
    started: bool,
}

/// Notes that it was the machine that kicked.
struct Asked {
    inner: Arc<dyn Kicker>,
    asked: Arc<AtomicBool>,
}

impl Kicker for Asked {
    fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.inner.kick();
    }
}

impl Engine for HostileEngine {
    type Arch = X86;

    fn name(&self) -> &'static str {
        "hostile"
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu<X86>>, EngineError> {
        let inner = self.inner.create_vcpu(id)?;
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        if id.0 == 0 {
            world::fill(&mut rng, &self.memory);
        }
        Ok(Box::new(HostileVcpu {
            inner,
            rng: Rng::new(rng.next(), u64::from(id.0)),
            shape: self.shape,
            asked: Arc::default(),
            started: false,
        }))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        self.inner.interrupts()
    }

    fn add_doorbell(
        &self,
        at: DoorbellAddress,
        bell: Arc<dyn Doorbell>,
    ) -> Result<(), EngineError> {
        self.inner.add_doorbell(at, bell)
    }

    fn remove_doorbell(&self, at: DoorbellAddress) {
        self.inner.remove_doorbell(at);
    }
}

impl HostileVcpu {
    /// Puts the CPU into another state. Guests that only fault for ever show nothing new.
    fn place(&mut self) {
        let reset = self.inner.state();
        // A state may be refused; a tamer one is not, or the machine goes on as it is.
        for wild in [self.shape.wild, 0] {
            let state = world::state(&mut self.rng, &reset, wild);
            if self.inner.set_state(&state).is_ok() {
                return;
            }
        }
    }
}

impl HostileVcpu {
    /// The driver and the guest in turns, until the guest has had all of its own or the machine wants us.
    fn turns(&mut self, bus: &dyn IoBus, clock: &TurnClock) -> Result<Exit, EngineError> {
        while self.shape.turns > 0 {
            self.shape.turns -= 1;
            device::drive(&mut self.rng, bus, self.shape.ends);
            clock.set(Phase::Guest);
            let exit = self.inner.run(bus);
            clock.set(Phase::Driver);
            if exit? == Exit::Kicked && self.asked.swap(false, Ordering::SeqCst) {
                return Ok(Exit::Kicked);
            }
            match self.rng.below(10) {
                0 => {
                    // The state as values, there and back.
                    let state = self.inner.state();
                    self.inner.set_state(&state)?;
                }
                1..=6 => self.place(),
                _ => {}
            }
        }
        Ok(Exit::Shutdown)
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Phase {
    #[default]
    Driver,
    Guest,
    Over,
}

/// Ends the guest's turns.
#[derive(Default)]
struct TurnClock {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl TurnClock {
    fn set(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        self.changed.notify_all();
    }

    fn serve(&self, kicker: &dyn Kicker) {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        while *phase != Phase::Over {
            let before = *phase;
            let waited = self.changed.wait_timeout(phase, TURN);
            let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            phase = now;
            if timeout.timed_out() && before == Phase::Guest && *phase == Phase::Guest {
                kicker.kick();
            }
        }
    }
}

impl Vcpu<X86> for HostileVcpu {
    fn run(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        if !self.started {
            self.started = true;
            self.place();
        }
        let clock = TurnClock::default();
        let kicker = self.inner.kicker();
        std::thread::scope(|scope| {
            scope.spawn(|| clock.serve(&*kicker));
            let result = self.turns(bus, &clock);
            clock.set(Phase::Over);
            result
        })
    }

    fn state(&mut self) -> CpuState {
        self.inner.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.inner.set_state(state)
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(Asked {
            inner: self.inner.kicker(),
            asked: Arc::clone(&self.asked),
        })
    }

    fn stats(&self) -> VcpuStats {
        self.inner.stats()
    }
}

/// Hears of no write.
struct Nobody;

impl WriteObserver for Nobody {
    fn device_wrote(&self, _: Gpa, _: u64) {}
}

/// What all cases of this process did.
#[derive(Default)]
pub struct Totals {
    pub blocks: AtomicU64,
    pub exceptions: AtomicU64,
    pub accesses: AtomicU64,
}

/// Runs case `case` of `seed`. Says what the host did wrong, if it did.
pub fn run(seed: u64, case: u64, files: &Files, totals: &Totals) -> Result<(), String> {
    let mut rng = Rng::new(seed, case);
    let shape = Shape {
        wild: rng.pick(&[0, 0, 1, 2, 5, 20]),
        turns: 4 + rng.below(12),
        ends: rng.chance(20),
    };
    let name = format!("hostile-{case}").parse();
    let name = name.map_err(|e| format!("a name: {e}"))?;
    let mut config = MachineConfig::new(
        name,
        BootSource::Files(BootFiles {
            kernel: files.kernel.clone(),
            ..BootFiles::default()
        }),
    );
    config.memory = ByteSize::mebibytes((world::RAM >> 20) as u32);
    config.cpus = rng.pick(&[1, 1, 2]);
    config.cpu_model = rng.pick(&["baseline", "host"]).to_owned();
    config.console = rng.pick(&[ConsoleKind::Serial, ConsoleKind::Virtio]);
    config.debug_exit = rng.chance(20);
    if rng.chance(30) {
        config.on_reboot = OnReboot::Restart;
    }
    for access in [DiskAccess::Temporary, DiskAccess::ReadOnly] {
        config.disks.push(DiskConfig {
            path: files.disk.clone(),
            format: Some(strata_vmm::config::DiskFormat::Raw),
            access,
            backing: Vec::new(),
            data: None,
        });
    }
    let _ = std::fs::remove_file(&files.vsock);
    config.vsock = Some(VsockConfig {
        cid: 3,
        socket: Some(files.vsock.clone()),
    });
    let reference = rng.chance(10);
    let verifier = Arc::new(Verifier::new());
    let ends = HostEnds {
        console: Some(Box::new(std::io::sink()) as Box<dyn Write + Send>),
        ..HostEnds::default()
    };
    let mut memory = None;
    let machine = Machine::build_on(config, ends, |parts| {
        memory = Some(parts.memory.clone());
        let inner = Translator::new(TranslatorConfig {
            memory: parts.memory.clone(),
            clock: parts.clock,
            model: parts.model,
            vcpus: parts.cpus,
            reference,
            count: reference,
            lockstep: 0,
        })?;
        inner.inspect(verifier.clone());
        Ok(Arc::new(HostileEngine {
            inner,
            memory: parts.memory,
            rng: Mutex::new(rng),
            shape,
        }))
    })
    .map_err(|e| format!("it was not built: {e}"))?;
    let handle = machine.handle();
    let console = machine.console_input();
    let started = Instant::now();
    let ended = Arc::new(AtomicBool::new(false));
    let watch = Arc::clone(&ended);
    let watcher = std::thread::spawn(move || {
        while !watch.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
            let _ = console.resize(started.elapsed().as_millis() as u16, 24);
            if started.elapsed() > LIFE {
                handle.power_off();
            }
        }
    });
    let (outcome, stats) = machine.run();
    ended.store(true, Ordering::SeqCst);
    let _ = watcher.join();
    if let Some(memory) = memory {
        // The observer that is there knows the memory, too: each would keep the other.
        memory.set_observer(Arc::new(Nobody));
    }
    totals
        .blocks
        .fetch_add(verifier.blocks(), Ordering::Relaxed);
    totals
        .accesses
        .fetch_add(verifier.proof().checked, Ordering::Relaxed);
    for vcpu in &stats.vcpus {
        totals
            .exceptions
            .fetch_add(vcpu.exceptions, Ordering::Relaxed);
    }
    match outcome {
        Outcome::Crashed(Crash::TripleFault { .. } | Crash::GuestPanic) => Ok(()),
        Outcome::Crashed(crash) => {
            let mut text = crash.to_string();
            let mut source = std::error::Error::source(&crash);
            while let Some(next) = source {
                text += &format!(": {next}");
                source = next.source();
            }
            Err(text)
        }
        _ => Ok(()),
    }
}
