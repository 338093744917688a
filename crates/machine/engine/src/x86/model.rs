//! CPU models as data: which features a guest sees, and the CPUID leaves and MSRs that follow from them.
//!
//! Both models call themselves `GenuineIntel`, family 6, model 0x6a (Ice Lake server). Reasons, from Linux 6.1's
//! `arch/x86/kernel/cpu`: on Intel one MSR, IA32_ARCH_CAPABILITIES, says "not affected" for Meltdown, MDS, TAA, SSB, MMIO
//! stale data, GDS, RFDS, BHI and ITS at once, and its IBRS_ALL bit selects enhanced IBRS (one WRMSR at boot) in place of
//! retpolines, so that a guest's indirect branches stay indirect branches; on AMD the same needs several leaves, and
//! the kernel adds work-arounds per context switch (SYSRET's SS, null segments' bases, FXSAVE's pointers) and reads
//! more model-specific MSRs. Ice Lake server is on none of the lists that no bit can take it off again (Retbleed,
//! SRBDS, TSX), and its kernel drivers (uncore, RAPL, P-states, split lock) stay away below a hypervisor.

use super::feature::{FEATURES, FeatureInfo, FeatureSet, Output, Provider};
use super::{Feature, MsrIndex};

/// One CPUID answer that does not depend on features or on the vCPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry, for leaves that look at it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX.
    pub value: [u32; 4],
}

/// What CPUID answers depend on besides the model.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CpuidContext {
    /// (x2)APIC ID of this vCPU.
    pub apic_id: u32,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
    /// The local APIC's enable bit in IA32_APIC_BASE.
    pub apic_enabled: bool,
    /// Ticks of the time-stamp counter per second.
    pub tsc_hz: u64,
}

/// A CPU model cannot be had.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// No model has this name.
    #[error("there is no CPU model \"{0}\"; the models are baseline and host")]
    Unknown(String),
    /// The host lacks features that the model promises.
    #[error("this host's CPU lacks what CPU model {model} needs: {}", missing.join(", "))]
    Missing {
        /// The model asked for.
        model: &'static str,
        /// Names of the missing features.
        missing: Vec<&'static str>,
    },
}

/// A CPU model: name, features, constant leaves.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CpuModel {
    name: &'static str,
    features: FeatureSet,
}

/// Bits of a guest-physical address.
pub const PHYSICAL_BITS: u32 = 46;
const LINEAR_BITS: u32 = 48;

/// Features of x86-64-v3 and of every engine.
const BASELINE: &[Feature] = {
    use Feature::*;
    &[
        Fpu, De, Pse, Tsc, Msr, Pae, Mce, Cx8, Apic, Sep, Mtrr, Pge, Mca, Cmov, Pat, Pse36,
        Clflush, Mmx, Fxsr, Sse, Sse2, SelfSnoop, Sse3, Pclmul, Ssse3, Fma, Cx16, Sse41, Sse42,
        Movbe, Popcnt, Aes, Xsave, Avx, F16c, Rdrand, Hypervisor, Arat, Fsgsbase, Bmi1, Avx2, Smep,
        Bmi2, Erms, Xsaveopt, LahfLm, Lzcnt, Syscall, Nx, Page1g, Rdtscp, LongMode,
    ]
};

/// What the translator adds to every model, because it emulates these itself whatever the host is: its own APIC and
/// time, string instructions at memory speed, and freedom from the speculation bugs that a guest would work around.
const TRANSLATOR: &[Feature] = {
    use Feature::*;
    &[
        X2apic,
        TscDeadline,
        TscAdjust,
        InvariantTsc,
        Fsrm,
        SpecCtrl,
        ArchCapabilities,
        BhiCtrl,
        Xgetbv1,
        FpuNoCsDs,
        Umip,
        Rdpid,
        PrefetchW,
    ]
};

/// What `host` may have beyond the two lists above, where the host has it. Left out on purpose: AVX-512 and AMX (state
/// to save at each helper call), SMAP and PCID (not modelled), XSAVES, PKU, CET, MPX, RTM.
const HOST: &[Feature] = {
    use Feature::*;
    &[Adx, Sha, Gfni, Vaes, Vpclmul, Rdseed, Clflushopt, Clwb]
};

/// Constant leaves. Cache sizes are those of a common server core; leaf 2 points to leaf 4.
const CONSTANT: &[CpuidEntry] = &[
    entry(0, None, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    entry(1, None, [SIGNATURE, 0x0800, 0, 0]),
    entry(2, None, [0x00fe_ff01, 0, 0, 0]),
    // L1D 48 KiB 12-way, L1I 32 KiB 8-way, L2 1.25 MiB 20-way, L3 24 MiB 12-way.
    entry(4, Some(0), [0x121, 0x02c0_003f, 63, 0]),
    entry(4, Some(1), [0x122, 0x01c0_003f, 63, 0]),
    entry(4, Some(2), [0x143, 0x04c0_003f, 1023, 0]),
    entry(4, Some(3), [0x163, 0x02c0_003f, 32767, 4]),
    entry(
        HYPERVISOR,
        None,
        [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d],
    ),
    entry(HYPERVISOR + 1, None, [KVM_FEATURES, 0, 0, 0]),
    entry(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
    entry(0x8000_0002, None, brand(0)),
    entry(0x8000_0003, None, brand(16)),
    entry(0x8000_0004, None, brand(32)),
    // L2 1280 KiB, 64-byte lines.
    entry(0x8000_0006, None, [0, 0, 0x0500_7040, 0]),
    entry(
        0x8000_0008,
        None,
        [LINEAR_BITS << 8 | PHYSICAL_BITS, 0, 0, 0],
    ),
];

/// Family 6, model 0x6a, stepping 6.
const SIGNATURE: u32 = 0x0006_06a6;
const HYPERVISOR: u32 = 0x4000_0000;

/// KVM's paravirtual features: port 0x80 delays not needed, kvmclock at the new MSRs, PV EOI, stable clock.
const KVM_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO,
/// PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO. Linux since 2025 does not believe BHI_NO, but is content with the
/// bit in IA32_SPEC_CTRL that [`Feature::BhiCtrl`] announces, in place of a loop at every system call.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

const BRAND: &[u8; 48] = b"Strata virtual x86-64-v3 processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const fn entry(leaf: u32, subleaf: Option<u32>, value: [u32; 4]) -> CpuidEntry {
    CpuidEntry {
        leaf,
        subleaf,
        value,
    }
}

#[allow(clippy::indexing_slicing, reason = "evaluated at compile time")]
const fn brand(at: usize) -> [u32; 4] {
    let mut words = [0; 4];
    let mut i = 0;
    while i < 4 {
        let b = at + i * 4;
        words[i] = u32::from_le_bytes([BRAND[b], BRAND[b + 1], BRAND[b + 2], BRAND[b + 3]]);
        i += 1;
    }
    words
}

impl CpuModel {
    /// The model of that name, checked against this host's CPU.
    pub fn named(name: &str) -> Result<CpuModel, ModelError> {
        Self::on_host(name, host_features())
    }

    fn on_host(name: &str, host: FeatureSet) -> Result<CpuModel, ModelError> {
        let baseline = FeatureSet::of(BASELINE);
        let (name, features) = match name {
            "baseline" => ("baseline", baseline),
            "host" => {
                let more = HOST
                    .iter()
                    .filter(|f| is_available(**f, host))
                    .fold(baseline, |set, &f| set.with(f));
                ("host", more.union(FeatureSet::of(TRANSLATOR)))
            }
            other => return Err(ModelError::Unknown(other.to_owned())),
        };
        let missing: Vec<_> = features
            .iter()
            .filter(|info| !is_available(info.feature, host))
            .map(|info| info.name)
            .collect();
        if missing.is_empty() {
            Ok(CpuModel { name, features })
        } else {
            Err(ModelError::Missing {
                model: name,
                missing,
            })
        }
    }

    /// The model as the translator offers it: with x2APIC, TSC deadline and whatever else it emulates itself.
    pub fn translated(self) -> CpuModel {
        CpuModel {
            features: self.features.union(FeatureSet::of(TRANSLATOR)),
            ..self
        }
    }

    /// The model's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// True if the model has the feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// All features, in CPUID order.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        self.features.iter().map(|info| info.feature)
    }

    /// XCR0 bits that may be set: x87, SSE, AVX.
    pub fn xcr0_mask(&self) -> u64 {
        match (self.has(Feature::Xsave), self.has(Feature::Avx)) {
            (false, _) => 0,
            (true, false) => 3,
            (true, true) => 7,
        }
    }

    /// CR4 bits that may be set.
    pub fn cr4_mask(&self) -> u64 {
        let by_feature = [
            (Feature::Tsc, 1 << 2),
            (Feature::De, 1 << 3),
            (Feature::Pse, 1 << 4),
            (Feature::Pae, 1 << 5),
            (Feature::Mce, 1 << 6),
            (Feature::Pge, 1 << 7),
            (Feature::Fpu, 1 << 8),
            (Feature::Fxsr, 1 << 9),
            (Feature::Sse, 1 << 10),
            (Feature::Umip, 1 << 11),
            (Feature::Fsgsbase, 1 << 16),
            (Feature::Pcid, 1 << 17),
            (Feature::Xsave, 1 << 18),
            (Feature::Smep, 1 << 20),
            (Feature::Smap, 1 << 21),
        ];
        by_feature
            .iter()
            .filter(|(feature, _)| self.has(*feature))
            .map(|(_, bit)| bit)
            .sum()
    }

    /// Bits of a guest-physical address; those above are reserved in page tables.
    pub fn address_bits(&self) -> u32 {
        PHYSICAL_BITS
    }

    /// Value of IA32_ARCH_CAPABILITIES; 0 if the model has no such register.
    pub fn arch_capabilities(&self) -> u64 {
        if self.has(Feature::ArchCapabilities) {
            ARCH_CAPABILITIES
        } else {
            0
        }
    }

    /// MSRs of the model that belong to a vCPU's state, ascending. Those with a field of their own in
    /// [`super::CpuState`] (EFER, segment bases) and the APIC's are not among them.
    pub fn msrs(&self) -> impl Iterator<Item = u32> {
        MsrIndex::SAVED
            .iter()
            .filter(|(_, needs)| needs.is_none_or(|f| self.has(f)))
            .map(|&(index, _)| index)
    }

    /// What CPUID answers on a machine of one vCPU whose registers are as after reset: the model's features.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.cpuid(
            leaf,
            subleaf,
            &CpuidContext {
                apic_enabled: true,
                ..CpuidContext::default()
            },
        )
    }

    /// What CPUID answers in EAX, EBX, ECX, EDX. Leaves that do not exist are all zero.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, vcpu: &CpuidContext) -> [u32; 4] {
        let mut out = CONSTANT
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |e| e.value);
        for info in self.features.iter().filter(|info| info.leaf == leaf) {
            if info.subleaf == subleaf || !has_subleaves(leaf) {
                *output(&mut out, info.output) |= 1 << info.bit;
            }
        }
        self.patch(leaf, subleaf, vcpu, &mut out);
        out
    }

    /// The parts that depend on the vCPU.
    fn patch(&self, leaf: u32, subleaf: u32, vcpu: &CpuidContext, out: &mut [u32; 4]) {
        let vcpus = vcpu.vcpus.max(1);
        let [eax, ebx, ecx, edx] = out;
        match leaf {
            1 => {
                *ebx |= vcpu.apic_id << 24 | vcpus.min(255) << 16;
                *ecx |= u32::from(vcpu.osxsave) << 27;
                *edx |= u32::from(vcpus > 1) << 28;
                if !vcpu.apic_enabled {
                    *edx &= !(1 << 9);
                    *ecx &= !(1 << 21);
                }
            }
            // Threads that share the cache and cores in the package, both less one and rounded up to a power of two.
            4 if *eax != 0 => {
                let cores = vcpus.next_power_of_two() - 1;
                let sharing = if subleaf == 3 { cores } else { 0 };
                *eax |= cores.min(63) << 26 | sharing.min(4095) << 14;
            }
            7 if subleaf == 0 && self.has(Feature::BhiCtrl) => *eax = 2,
            // One thread per core, all cores in one package.
            0xb => {
                match subleaf {
                    0 => (*eax, *ebx, *ecx) = (0, 1, 1 << 8),
                    1 => {
                        (*eax, *ebx, *ecx) = (vcpus.next_power_of_two().ilog2(), vcpus, 2 << 8 | 1)
                    }
                    _ => *ecx = subleaf & 0xff,
                }
                *edx = vcpu.apic_id;
            }
            0xd if self.has(Feature::Xsave) => match subleaf {
                0 => {
                    *eax = self.xcr0_mask() as u32;
                    *ebx = xsave_size(vcpu.xcr0);
                    *ecx = xsave_size(self.xcr0_mask());
                }
                2 if self.has(Feature::Avx) => (*eax, *ebx) = (256, 576),
                _ => {}
            },
            // TSC over a 25 MHz crystal: frequency = crystal × EBX / EAX.
            0x15 => {
                (*eax, *ebx, *ecx) = (CRYSTAL_HZ / 1000, (vcpu.tsc_hz / 1000) as u32, CRYSTAL_HZ);
            }
            0x16 => {
                let mhz = (vcpu.tsc_hz / 1_000_000) as u32;
                (*eax, *ebx, *ecx) = (mhz, mhz, 100);
            }
            // TSC and APIC bus frequency in kHz.
            0x4000_0010 => {
                (*eax, *ebx) = ((vcpu.tsc_hz / 1000) as u32, (APIC_BUS_HZ / 1000) as u32)
            }
            _ => {}
        }
    }
}

const CRYSTAL_HZ: u32 = 25_000_000;

/// Ticks per second of the local APIC's timer before its divider.
pub const APIC_BUS_HZ: u64 = 1_000_000_000;

fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd)
}

/// Size of a standard XSAVE area for these components, in bytes.
pub fn xsave_size(components: u64) -> u32 {
    if components & 4 != 0 { 832 } else { 576 }
}

fn output(values: &mut [u32; 4], which: Output) -> &mut u32 {
    let [eax, ebx, ecx, edx] = values;
    match which {
        Output::Eax => eax,
        Output::Ebx => ebx,
        Output::Ecx => ecx,
        Output::Edx => edx,
    }
}

fn is_available(feature: Feature, host: FeatureSet) -> bool {
    feature
        .info()
        .is_some_and(|info| info.provider == Provider::Engine)
        || host.has(feature)
}

/// What the host's CPU has and its operating system has switched on.
fn host_features() -> FeatureSet {
    // AVX counts only if the host's system saves its state; the standard library looks at XCR0.
    let avx = std::arch::is_x86_feature_detected!("avx");
    let needs_avx = |info: &FeatureInfo| {
        use Feature::*;
        matches!(info.feature, Avx | Avx2 | Fma | F16c | Vaes | Vpclmul)
    };
    let cpuid = |leaf: u32, subleaf| {
        let highest = raw_cpuid::native_cpuid::cpuid_count(leaf & 0x8000_0000, 0).eax;
        if leaf > highest {
            return [0; 4];
        }
        let answer = raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    };
    FEATURES
        .iter()
        .filter(|info| {
            *output(&mut cpuid(info.leaf, info.subleaf), info.output) >> info.bit & 1 != 0
        })
        .filter(|info| avx || !needs_avx(info))
        .fold(FeatureSet::default(), |set, info| set.with(info.feature))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VCPU: CpuidContext = CpuidContext {
        apic_id: 2,
        vcpus: 3,
        osxsave: true,
        xcr0: 7,
        apic_enabled: true,
        tsc_hz: 2_500_000_000,
    };

    fn everything() -> FeatureSet {
        FEATURES
            .iter()
            .fold(FeatureSet::default(), |set, info| set.with(info.feature))
    }

    fn baseline() -> CpuModel {
        CpuModel::on_host("baseline", everything()).unwrap()
    }

    #[test]
    fn features_and_leaves_agree() {
        for model in [
            baseline(),
            baseline().translated(),
            CpuModel::on_host("host", everything()).unwrap(),
        ] {
            for info in FEATURES {
                let mut answer = model.cpuid(info.leaf, info.subleaf, &VCPU);
                let bit = *output(&mut answer, info.output) >> info.bit & 1;
                assert_eq!(
                    bit == 1,
                    model.has(info.feature),
                    "{} of {}",
                    info.name,
                    model.name()
                );
            }
        }
    }

    #[test]
    fn what_no_engine_models_is_in_no_model() {
        let host = CpuModel::on_host("host", everything()).unwrap();
        for feature in [Feature::Smap, Feature::Pcid, Feature::Invpcid] {
            assert!(!host.has(feature));
        }
        for feature in [Feature::X2apic, Feature::TscDeadline, Feature::Rdseed] {
            assert!(!baseline().has(feature), "{feature:?}");
        }
        assert!(baseline().translated().has(Feature::TscDeadline));
    }

    #[test]
    fn a_host_without_a_needed_feature_is_told_which() {
        let host = FEATURES
            .iter()
            .filter(|info| info.feature != Feature::Avx2)
            .fold(FeatureSet::default(), |set, info| set.with(info.feature));
        assert_eq!(
            CpuModel::on_host("baseline", host),
            Err(ModelError::Missing {
                model: "baseline",
                missing: vec!["avx2"]
            })
        );
        assert_eq!(
            CpuModel::on_host("z80", host),
            Err(ModelError::Unknown("z80".into()))
        );
    }

    #[test]
    fn vendor_hypervisor_and_brand_read_as_text() {
        let text = |leaf, order: [usize; 3]| {
            let answer = baseline().cpuid(leaf, 0, &VCPU);
            String::from_utf8(
                order
                    .iter()
                    .flat_map(|&i| answer[i].to_le_bytes())
                    .collect(),
            )
            .unwrap()
        };
        assert_eq!(text(0, [1, 3, 2]), "GenuineIntel");
        assert_eq!(text(HYPERVISOR, [1, 2, 3]), "KVMKVMKVM\0\0\0");
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| baseline().cpuid(leaf, 0, &VCPU))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(brand, BRAND);
    }

    #[test]
    fn leaves_that_depend_on_the_vcpu() {
        let model = baseline();
        let one = model.cpuid(1, 0, &VCPU);
        assert_eq!(one[1] >> 24, 2);
        assert_eq!(one[2] >> 27 & 1, 1);
        assert_eq!(one[3] >> 28 & 1, 1);
        assert_eq!(model.cpuid(0xb, 1, &VCPU), [2, 3, 0x201, 2]);
        assert_eq!(model.cpuid(0xb, 2, &VCPU), [0, 0, 2, 2]);
        assert_eq!(model.cpuid(0xd, 0, &VCPU), [7, 832, 832, 0]);
        assert_eq!(
            model.cpuid(0xd, 0, &CpuidContext { xcr0: 3, ..VCPU })[1],
            576
        );
        let [denominator, numerator, crystal, _] = model.cpuid(0x15, 0, &VCPU);
        assert_eq!(
            u64::from(crystal) * u64::from(numerator) / u64::from(denominator),
            VCPU.tsc_hz
        );
        assert_eq!(model.cpuid(4, 4, &VCPU), [0; 4]);
        assert_eq!(model.cpuid(7, 1, &VCPU), [0; 4]);
        assert_eq!(model.cpuid(0x8000_001e, 0, &VCPU), [0; 4]);
    }

    #[test]
    fn this_host_is_read_without_trouble() {
        let host = host_features();
        assert!(host.has(Feature::Sse2) && host.has(Feature::LongMode));
    }

    #[test]
    fn the_saved_msrs_ascend() {
        let msrs: Vec<_> = baseline().translated().msrs().collect();
        assert!(msrs.windows(2).all(|w| w[0] < w[1]));
        assert!(msrs.contains(&MsrIndex::SPEC_CTRL.0));
    }
}
