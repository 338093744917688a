//! A CPU model as KVM takes it: the table of CPUID answers, and whether the host can keep its promises.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Kvm, VcpuFd};
use strata_engine::EngineError;
use strata_engine::x86::{CpuModel, CpuidContext};

use crate::engine::{failed, unsupported};

/// Leaf and subleaf of every answer that holds feature bits, and the bits of EAX, EBX, ECX, EDX that promise something
/// the host must have. Not among them: self-snoop, multi-threading and fast strings (hints), OSXSAVE and the hypervisor
/// bit (states).
const FEATURE_LEAVES: &[(u32, u32, [u32; 4])] = &[
    (1, 0, [0, 0, !(1 << 27 | 1 << 31), !(1 << 27 | 1 << 28)]),
    (7, 0, [0, !(1 << 9), !0, !(1 << 4)]),
    (0xd, 0, [!0, 0, 0, 0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
];

/// Leaves that look at ECX, and how many subleaves the models use.
const SUBLEAVES: &[(u32, u32)] = &[(4, 5), (7, 1), (0xb, 3), (0xd, 3)];

/// How many missing features an error names.
const NAMED: usize = 4;

/// Fails, naming what is missing, if KVM here cannot give guests what the model promises.
pub fn check(kvm: &Kvm, model: &CpuModel) -> Result<(), EngineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("asking KVM for its CPUID"))?;
    let find = |leaf, subleaf| {
        let entry = supported
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && e.index == subleaf);
        entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    };
    let mut missing = Vec::new();
    for &(leaf, subleaf, needed) in FEATURE_LEAVES {
        let (asked, there) = (model.leaf(leaf, subleaf), find(leaf, subleaf));
        let registers = ["EAX", "EBX", "ECX", "EDX"];
        for (((register, asked), there), needed) in
            registers.iter().zip(asked).zip(there).zip(needed)
        {
            // Leaf 1 has the signature in EAX and counts in EBX; the masks leave them out.
            let lacks = asked & needed & !there;
            let bits = (0..32).filter(|bit| lacks >> bit & 1 != 0);
            missing.extend(bits.map(|bit| format!("CPUID.{leaf:X}.{subleaf}:{register}[{bit}]")));
        }
    }
    let more = match missing.len().checked_sub(NAMED) {
        None | Some(0) => String::new(),
        Some(more) => format!(" and {more} more"),
    };
    missing.truncate(NAMED);
    match missing.is_empty() {
        true => Ok(()),
        false => Err(unsupported(format!(
            "its KVM lacks what CPU model {} needs: {}{more}",
            model.name(),
            missing.join(", ")
        ))),
    }
}

/// Gives a vCPU its CPUID answers. The kernel keeps OSXSAVE, the APIC bit and the XSAVE size current by itself.
pub fn set(fd: &VcpuFd, model: &CpuModel, context: &CpuidContext) -> Result<(), EngineError> {
    let table = CpuId::from_entries(&entries(model, context))
        .map_err(|_| EngineError::Internal("too many CPUID leaves".into()))?;
    fd.set_cpuid2(&table).map_err(failed("setting CPUID"))
}

/// Every leaf up to the last one of each range.
fn entries(model: &CpuModel, context: &CpuidContext) -> Vec<kvm_cpuid_entry2> {
    let mut entries = Vec::new();
    for first in [0, 0x4000_0000, 0x8000_0000] {
        let [last, ..] = model.cpuid(first, 0, context);
        for leaf in first..=last.min(first | 0xff) {
            let subleaves = SUBLEAVES
                .iter()
                .find(|(with, _)| *with == leaf)
                .map(|(_, count)| *count);
            for index in 0..subleaves.unwrap_or(1) {
                let [eax, ebx, ecx, edx] = model.cpuid(leaf, index, context);
                let flags = if subleaves.is_some() {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                };
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_answers_as_the_model_does() {
        let Ok(model) = CpuModel::named("baseline") else {
            eprintln!("skipped: this host's CPU is below x86-64-v3");
            return;
        };
        let context = CpuidContext {
            apic_id: 3,
            vcpus: 4,
            tsc_hz: 2_000_000_000,
            apic_enabled: true,
            ..Default::default()
        };
        let entries = entries(&model, &context);
        assert!(entries.len() <= KVM_MAX_CPUID_ENTRIES);
        for entry in &entries {
            let answer = model.cpuid(entry.function, entry.index, &context);
            assert_eq!(
                [entry.eax, entry.ebx, entry.ecx, entry.edx],
                answer,
                "{entry:x?}"
            );
        }
        let has = |leaf, index| {
            entries
                .iter()
                .any(|e| (e.function, e.index) == (leaf, index))
        };
        assert!(has(7, 0) && has(0xd, 2) && has(0x4000_0001, 0) && has(0x8000_0008, 0));
    }
}
