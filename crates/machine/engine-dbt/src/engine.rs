//! The engine itself: what the vCPUs of one machine share.

use std::arch::is_x86_feature_detected;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use strata_engine::x86::{CpuModel, X86};
use strata_engine::{
    Doorbell, DoorbellAddress, Engine, EngineError, Inputs, InterruptSink, MachineClock, Vcpu,
    VcpuId, VcpuStats,
};
use strata_memory::GuestMemory;
use strata_verify::Inspect;

use crate::apic::{Apic, ApicBus};
use crate::cpu::request;
use crate::dispatch::Translated;
use crate::env::{Doorbells, Env};
use crate::kick::Timers;
use crate::peers::{Peers, VCPUS_MAX};
use crate::translate::Options;
use crate::tsc::Tsc;

/// What a translator is made from.
pub struct TranslatorConfig {
    /// Guest-physical memory.
    pub memory: GuestMemory,
    /// Machine time.
    pub clock: Arc<MachineClock>,
    /// The CPU model.
    pub model: CpuModel,
    /// vCPUs the machine will have.
    pub vcpus: u32,
    /// The reference configuration: one instruction per block, every access through the slow path.
    pub reference: bool,
    /// Count retired instructions.
    pub count: bool,
    /// Run every vCPU in lock-step with one in the reference configuration for this many steps and end at the first
    /// difference; 0 for not at all.
    pub lockstep: u64,
}

/// Says whether this host's CPU has what emitted code uses.
///
/// # Errors
/// If it has not, naming what it lacks.
pub fn check_host() -> Result<(), EngineError> {
    let lacks: Vec<_> = [
        ("CMPXCHG16B", is_x86_feature_detected!("cmpxchg16b")),
        ("POPCNT", is_x86_feature_detected!("popcnt")),
        ("SSE4.2", is_x86_feature_detected!("sse4.2")),
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("BMI2", is_x86_feature_detected!("bmi2")),
    ]
    .into_iter()
    .filter_map(|(name, present)| (!present).then_some(name))
    .collect();
    if lacks.is_empty() {
        return Ok(());
    }
    Err(EngineError::Unsupported {
        engine: "translate",
        reason: format!("its CPU has no {}", lacks.join(", no ")),
    })
}

/// The software engine of one machine.
pub struct Translator {
    memory: GuestMemory,
    clock: Arc<MachineClock>,
    tsc: Arc<Tsc>,
    model: Arc<CpuModel>,
    options: Options,
    lockstep: u64,
    doorbells: Arc<Doorbells>,
    bus: Arc<ApicBus>,
    apics: Mutex<Vec<Option<Arc<Apic>>>>,
    peers: Arc<Peers>,
    timers: Timers,
    inspector: OnceLock<Arc<dyn Inspect>>,
}

impl Translator {
    /// Prepares the engine. Fails on hosts whose CPU lacks what emitted code uses.
    pub fn new(config: TranslatorConfig) -> Result<Translator, EngineError> {
        check_host()?;
        let refused = match config.vcpus {
            0 => Some("a machine needs one CPU"),
            1 => None,
            2..=VCPUS_MAX if config.lockstep > 0 => Some("lock-step is for machines with one CPU"),
            2..=VCPUS_MAX => None,
            _ => Some("it runs 64 CPUs at most"),
        };
        if let Some(reason) = refused {
            return Err(EngineError::Unsupported {
                engine: "translate",
                reason: reason.to_owned(),
            });
        }
        let timers =
            Timers::start(Arc::clone(&config.clock)).map_err(|source| EngineError::Host {
                what: "starting the timer thread",
                source,
            })?;
        let peers = Peers::new(config.memory.clone(), config.vcpus);
        config.memory.set_observer(peers.clone());
        let bus = ApicBus::new(config.clock.tsc_hz());
        let apics = (0..config.vcpus).map(|id| Some(bus.add(id))).collect();
        Ok(Translator {
            memory: config.memory,
            model: Arc::new(config.model.translated()),
            clock: config.clock,
            tsc: Arc::default(),
            options: Options {
                reference: config.reference,
                count: config.count || config.lockstep > 0,
                trace: config.lockstep > 0,
                yields: config.vcpus > 1,
            },
            lockstep: config.lockstep,
            doorbells: Arc::default(),
            bus,
            apics: Mutex::new(apics),
            peers,
            timers,
            inspector: OnceLock::new(),
        })
    }

    /// Shows every block of vCPUs created from here on to `inspector` before it runs; what that refuses ends the run.
    pub fn inspect(&self, inspector: Arc<dyn Inspect>) {
        // The first one stays.
        let _ = self.inspector.set(inspector);
    }

    /// Creates a vCPU whose inputs are recorded or replayed.
    pub fn create_with_inputs(
        &self,
        id: VcpuId,
        inputs: Inputs,
    ) -> Result<Translated, EngineError> {
        let taken = {
            let mut apics = self.apics.lock().unwrap_or_else(PoisonError::into_inner);
            apics.get_mut(id.0 as usize).and_then(Option::take)
        };
        let Some(apic) = taken else {
            return Err(EngineError::Internal(format!(
                "vCPU {} was created before or is one too many",
                id.0
            )));
        };
        let shared = self.peers.join(id.0)?;
        let weak = Arc::downgrade(&shared);
        apic.set_notify(Arc::new(move || {
            if let Some(shared) = weak.upgrade() {
                shared.raise(request::INTERRUPT);
            }
        }));
        self.timers.add(&apic);
        let env = Env {
            slots: self.memory.slots(),
            memory: self.memory.clone(),
            model: Arc::clone(&self.model),
            clock: Arc::clone(&self.clock),
            tsc: Arc::clone(&self.tsc),
            apic,
            peers: Arc::clone(&self.peers),
            me: shared,
            inputs,
            stats: VcpuStats::default(),
            exit_counts: Default::default(),
            doorbells: Arc::clone(&self.doorbells),
            divergence: None,
        };
        let mut vcpu = Translated::new(env, self.options)?;
        vcpu.set_inspector(self.inspector.get().cloned());
        Ok(vcpu)
    }
}

impl Engine for Translator {
    type Arch = X86;

    fn name(&self) -> &'static str {
        "translate"
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu<X86>>, EngineError> {
        let mut vcpu = self.create_with_inputs(id, Inputs::Live)?;
        vcpu.start_lockstep(self.lockstep);
        Ok(Box::new(vcpu))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::clone(&self.bus) as Arc<dyn InterruptSink>
    }

    fn add_doorbell(
        &self,
        at: DoorbellAddress,
        bell: Arc<dyn Doorbell>,
    ) -> Result<(), EngineError> {
        self.doorbells
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(at, bell);
        Ok(())
    }

    fn memory_changed(&self) {
        self.peers.memory_changed();
    }

    fn remove_doorbell(&self, at: DoorbellAddress) {
        self.doorbells
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&at);
    }
}
