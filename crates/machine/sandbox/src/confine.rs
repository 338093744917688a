//! The first step into the jail: all that can be laid down for good while there is one thread.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Layer;
use crate::root;
use crate::spawn::text;

/// What the process has and may keep.
#[derive(Clone, Copy, Debug)]
pub struct Confinement<'a> {
    /// What came of its namespaces when it was made.
    pub namespaces: &'a Result<(), String>,
    /// Devices that it opens after this.
    pub devices: &'a [&'a Path],
}

/// Lays down what holds for good: for this thread and all that it makes from now on. Says what the host grants.
pub fn confine(wish: &Confinement<'_>) -> Vec<Layer> {
    let devices: Vec<&Path> = wish
        .devices
        .iter()
        .copied()
        .filter(|at| at.exists())
        .collect();
    let system = |result: io::Result<()>| result.map_err(|error| text(&error));
    let no_new_privileges = system(rustix::thread::set_no_new_privs(true).map_err(Into::into));
    let namespaces = wish.namespaces.clone();
    let empty_root = match &namespaces {
        Ok(()) => system(root::empty(&devices)),
        Err(_) => Err("it needs namespaces".to_owned()),
    };
    let (landlock, lacks) = match restrict(&devices) {
        Ok(lacks) => (Ok(()), lacks),
        Err(refused) => (Err(refused), None),
    };
    let landlock = Layer {
        lacks,
        ..Layer::new("landlock", landlock)
    };
    let capabilities = system(drop_capabilities());
    let limits = system(limit());
    vec![
        Layer::new("no-new-privileges", no_new_privileges),
        Layer::new("namespaces", namespaces),
        Layer::new("empty-root", empty_root),
        landlock,
        Layer::new("no-capabilities", capabilities),
        Layer::new("limits", limits),
    ]
}

/// Landlock: no file but the devices, no TCP port, no socket or process outside. What the kernel's version does not
/// know is left out, and said.
fn restrict(devices: &[&Path]) -> Result<Option<String>, String> {
    let said = |error: &dyn std::error::Error| error.to_string();
    let restrict = || -> Result<RulesetStatus, landlock::RulesetError> {
        let device: BitFlags<AccessFs> =
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V6))?
            .handle_access(AccessNet::from_all(ABI::V6))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?;
        for at in devices {
            if let Ok(fd) = PathFd::new(at) {
                rules = rules.add_rule(PathBeneath::new(fd, device))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset)
    };
    match restrict() {
        Ok(RulesetStatus::NotEnforced) => Err("the kernel does not have it".to_owned()),
        Ok(RulesetStatus::PartiallyEnforced) => Ok(Some(
            "the kernel is older than Linux 6.12 and knows less of it".to_owned(),
        )),
        Ok(RulesetStatus::FullyEnforced) => Ok(None),
        Err(error) => Err(said(&error)),
    }
}

/// No capability is left, none can be had again by running a program.
fn drop_capabilities() -> io::Result<()> {
    // The bounding set can be lowered only by those who have capabilities; others have none to lose.
    for bit in 0..u64::BITS {
        if let Some(capability) = CapabilitySet::from_bits(1 << bit) {
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none)?;
    Ok(())
}

/// No core file, nobody who traces us, no life without our parent.
fn limit() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // Changed credentials reset it, so it comes last.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}
