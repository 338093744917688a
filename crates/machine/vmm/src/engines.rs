//! Which engines there are, which one a machine gets, and why.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strata_engine::x86::{CpuModel, X86};
use strata_engine::{Engine, EngineError, MachineClock};
use strata_engine_dbt::{Translator, TranslatorConfig};
use strata_engine_kvm::{Kvm, KvmConfig};
use strata_memory::GuestMemory;
use strata_verify::Verifier;

use crate::config::EngineChoice;

pub use strata_engine_kvm::probe::{Depth as KvmDepth, Verdict as KvmVerdict, probe as probe_kvm};

/// An engine of whatever kind.
pub type AnyEngine = dyn Engine<Arch = X86>;

/// What an engine is made with.
pub struct EngineParts {
    /// The machine's RAM.
    pub memory: GuestMemory,
    /// The machine's time.
    pub clock: Arc<MachineClock>,
    /// What the guest's CPUs can do.
    pub model: CpuModel,
    /// How many vCPUs there will be.
    pub cpus: u32,
    /// How the engine works inside.
    pub options: EngineOptions,
}

/// How an engine works inside: nothing that a guest could tell apart, so no part of a machine's configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct EngineOptions {
    /// One instruction per block and nothing clever: what optimised runs are compared with.
    pub reference: bool,
    /// Count retired instructions by how they were run.
    pub count: bool,
    /// Run this many steps in lock-step with the reference configuration and end at the first difference.
    pub lockstep: u64,
    /// Prove of each translated block that it stays inside its guest, and end at the first that does not.
    pub verify_blocks: bool,
}

/// The engine that a choice leads to on this host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ChosenEngine {
    /// Its name.
    pub name: &'static str,
    /// Why it and no other, as a clause.
    pub reason: String,
}

/// Says which engine a choice leads to on this host.
///
/// # Errors
/// If no engine can run here.
pub fn choose(choice: EngineChoice) -> Result<ChosenEngine, EngineError> {
    match choice {
        EngineChoice::Auto => choose_by(&probe_kvm(KvmDepth::Verdict)),
        EngineChoice::Translate => translate("it was asked for"),
        EngineChoice::Kvm => Ok(ChosenEngine {
            name: "kvm",
            reason: "it was asked for".to_owned(),
        }),
    }
}

/// Says which engine this host gets when nobody asks for one.
///
/// # Errors
/// If no engine can run here.
pub fn choose_by(kvm: &KvmVerdict) -> Result<ChosenEngine, EngineError> {
    if !kvm.usable {
        return translate(&kvm.reason);
    }
    Ok(ChosenEngine {
        name: "kvm",
        reason: kvm.reason.clone(),
    })
}

fn translate(reason: &str) -> Result<ChosenEngine, EngineError> {
    strata_engine_dbt::check_host()?;
    Ok(ChosenEngine {
        name: "translate",
        reason: reason.to_owned(),
    })
}

/// This host's x86-64 level, as compilers name it.
pub fn host_level() -> &'static str {
    let v2 = is_x86_feature_detected!("cmpxchg16b")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("ssse3")
        && is_x86_feature_detected!("sse4.2");
    let v3 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe");
    let v4 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (v2, v3, v4) {
        (false, ..) => "x86-64",
        (true, false, _) => "x86-64-v2",
        (true, true, false) => "x86-64-v3",
        (true, true, true) => "x86-64-v4",
    }
}

/// Makes the engine that a choice leads to.
///
/// # Errors
/// If it cannot run on this host.
pub fn open(choice: EngineChoice, parts: EngineParts) -> Result<Arc<AnyEngine>, EngineError> {
    // What the options ask for, only the translator does.
    if parts.options != EngineOptions::default() || choose(choice)?.name == "translate" {
        return open_translator(parts);
    }
    let kvm = Kvm::new(KvmConfig {
        memory: parts.memory.clone(),
        clock: Arc::clone(&parts.clock),
        model: parts.model.clone(),
        vcpus: parts.cpus,
    });
    match kvm {
        Ok(kvm) => Ok(Arc::new(kvm)),
        // The probe cannot foresee every CPU model.
        Err(_) if choice == EngineChoice::Auto => open_translator(parts),
        Err(error) => Err(error),
    }
}

fn open_translator(parts: EngineParts) -> Result<Arc<AnyEngine>, EngineError> {
    let translator = Translator::new(TranslatorConfig {
        memory: parts.memory,
        clock: parts.clock,
        model: parts.model,
        vcpus: parts.cpus,
        reference: parts.options.reference,
        count: parts.options.count,
        lockstep: parts.options.lockstep,
    })?;
    if parts.options.verify_blocks {
        translator.inspect(Arc::new(Verifier::new()));
    }
    Ok(Arc::new(translator))
}
