//! The features a CPU model may have: where CPUID reports each, and whether the host's CPU must have it too.

/// One of the four registers CPUID answers in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who makes a feature work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Provider {
    /// Guest instructions run as themselves: the host's CPU needs the feature.
    Host,
    /// The engine provides it, whatever the host is.
    Engine,
}

/// What CPUID knows about a feature.
#[derive(Clone, Copy, Debug)]
pub(super) struct FeatureInfo {
    pub feature: Feature,
    pub name: &'static str,
    pub leaf: u32,
    pub subleaf: u32,
    pub output: Output,
    pub bit: u32,
    pub provider: Provider,
}

macro_rules! features {
    ($($feature:ident $name:literal $leaf:literal.$subleaf:literal $output:ident $bit:literal $provider:ident;)*) => {
        /// A CPU feature that a model can have (Intel SDM vol. 2, CPUID).
        #[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
        #[repr(u8)]
        pub enum Feature {
            $(#[doc = concat!("`", $name, "`.")] $feature,)*
        }

        /// All features, in the order of the enum.
        pub(super) const FEATURES: &[FeatureInfo] = &[$(FeatureInfo {
            feature: Feature::$feature,
            name: $name,
            leaf: $leaf,
            subleaf: $subleaf,
            output: Output::$output,
            bit: $bit,
            provider: Provider::$provider,
        }),*];
    };
}

features! {
    Fpu "fpu" 1 . 0 Edx 0 Host;
    De "de" 1 . 0 Edx 2 Engine;
    Pse "pse" 1 . 0 Edx 3 Engine;
    Tsc "tsc" 1 . 0 Edx 4 Engine;
    Msr "msr" 1 . 0 Edx 5 Engine;
    Pae "pae" 1 . 0 Edx 6 Engine;
    Mce "mce" 1 . 0 Edx 7 Engine;
    Cx8 "cx8" 1 . 0 Edx 8 Host;
    Apic "apic" 1 . 0 Edx 9 Engine;
    Sep "sep" 1 . 0 Edx 11 Engine;
    Mtrr "mtrr" 1 . 0 Edx 12 Engine;
    Pge "pge" 1 . 0 Edx 13 Engine;
    Mca "mca" 1 . 0 Edx 14 Engine;
    Cmov "cmov" 1 . 0 Edx 15 Host;
    Pat "pat" 1 . 0 Edx 16 Engine;
    Pse36 "pse36" 1 . 0 Edx 17 Engine;
    Clflush "clflush" 1 . 0 Edx 19 Engine;
    Mmx "mmx" 1 . 0 Edx 23 Host;
    Fxsr "fxsr" 1 . 0 Edx 24 Host;
    Sse "sse" 1 . 0 Edx 25 Host;
    Sse2 "sse2" 1 . 0 Edx 26 Host;
    SelfSnoop "ss" 1 . 0 Edx 27 Engine;
    Sse3 "sse3" 1 . 0 Ecx 0 Host;
    Pclmul "pclmulqdq" 1 . 0 Ecx 1 Host;
    Ssse3 "ssse3" 1 . 0 Ecx 9 Host;
    Fma "fma" 1 . 0 Ecx 12 Host;
    Cx16 "cx16" 1 . 0 Ecx 13 Host;
    Pcid "pcid" 1 . 0 Ecx 17 Engine;
    Sse41 "sse4.1" 1 . 0 Ecx 19 Host;
    Sse42 "sse4.2" 1 . 0 Ecx 20 Host;
    X2apic "x2apic" 1 . 0 Ecx 21 Engine;
    Movbe "movbe" 1 . 0 Ecx 22 Host;
    Popcnt "popcnt" 1 . 0 Ecx 23 Host;
    TscDeadline "tsc-deadline" 1 . 0 Ecx 24 Engine;
    Aes "aes" 1 . 0 Ecx 25 Host;
    Xsave "xsave" 1 . 0 Ecx 26 Host;
    Avx "avx" 1 . 0 Ecx 28 Host;
    F16c "f16c" 1 . 0 Ecx 29 Host;
    Rdrand "rdrand" 1 . 0 Ecx 30 Host;
    Hypervisor "hypervisor" 1 . 0 Ecx 31 Engine;
    Arat "arat" 6 . 0 Eax 2 Engine;
    Fsgsbase "fsgsbase" 7 . 0 Ebx 0 Engine;
    TscAdjust "tsc-adjust" 7 . 0 Ebx 1 Engine;
    Bmi1 "bmi1" 7 . 0 Ebx 3 Host;
    Avx2 "avx2" 7 . 0 Ebx 5 Host;
    Smep "smep" 7 . 0 Ebx 7 Engine;
    Bmi2 "bmi2" 7 . 0 Ebx 8 Host;
    Erms "erms" 7 . 0 Ebx 9 Engine;
    Invpcid "invpcid" 7 . 0 Ebx 10 Engine;
    FpuNoCsDs "fpu-no-cs-ds" 7 . 0 Ebx 13 Engine;
    Rdseed "rdseed" 7 . 0 Ebx 18 Host;
    Adx "adx" 7 . 0 Ebx 19 Host;
    Smap "smap" 7 . 0 Ebx 20 Engine;
    Clflushopt "clflushopt" 7 . 0 Ebx 23 Engine;
    Clwb "clwb" 7 . 0 Ebx 24 Engine;
    Sha "sha" 7 . 0 Ebx 29 Host;
    Umip "umip" 7 . 0 Ecx 2 Engine;
    Gfni "gfni" 7 . 0 Ecx 8 Host;
    Vaes "vaes" 7 . 0 Ecx 9 Host;
    Vpclmul "vpclmulqdq" 7 . 0 Ecx 10 Host;
    Rdpid "rdpid" 7 . 0 Ecx 22 Engine;
    Fsrm "fsrm" 7 . 0 Edx 4 Engine;
    SpecCtrl "spec-ctrl" 7 . 0 Edx 26 Engine;
    ArchCapabilities "arch-capabilities" 7 . 0 Edx 29 Engine;
    BhiCtrl "bhi-ctrl" 7 . 2 Edx 4 Engine;
    Xsaveopt "xsaveopt" 0xd . 1 Eax 0 Engine;
    Xgetbv1 "xgetbv1" 0xd . 1 Eax 2 Engine;
    LahfLm "lahf-lm" 0x8000_0001 . 0 Ecx 0 Host;
    Lzcnt "lzcnt" 0x8000_0001 . 0 Ecx 5 Host;
    PrefetchW "3dnowprefetch" 0x8000_0001 . 0 Ecx 8 Engine;
    Syscall "syscall" 0x8000_0001 . 0 Edx 11 Engine;
    Nx "nx" 0x8000_0001 . 0 Edx 20 Engine;
    Page1g "pdpe1gb" 0x8000_0001 . 0 Edx 26 Engine;
    Rdtscp "rdtscp" 0x8000_0001 . 0 Edx 27 Engine;
    LongMode "lm" 0x8000_0001 . 0 Edx 29 Engine;
    InvariantTsc "invtsc" 0x8000_0007 . 0 Edx 8 Engine;
}

impl Feature {
    /// The feature's name, as Linux and QEMU write it where they agree.
    pub fn name(self) -> &'static str {
        self.info().map_or("", |info| info.name)
    }

    pub(super) fn info(self) -> Option<&'static FeatureInfo> {
        FEATURES.get(self as usize)
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct FeatureSet(u128);

impl FeatureSet {
    pub fn of(features: &[Feature]) -> Self {
        features
            .iter()
            .fold(FeatureSet::default(), |set, &feature| set.with(feature))
    }
    pub fn with(self, feature: Feature) -> Self {
        FeatureSet(self.0 | 1 << feature as u32)
    }
    pub fn has(self, feature: Feature) -> bool {
        self.0 >> (feature as u32) & 1 != 0
    }
    pub fn union(self, other: Self) -> Self {
        FeatureSet(self.0 | other.0)
    }
    pub fn iter(self) -> impl Iterator<Item = &'static FeatureInfo> {
        FEATURES.iter().filter(move |info| self.has(info.feature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_no_bit_is_used_twice() {
        assert!(FEATURES.len() <= 128);
        for (i, info) in FEATURES.iter().enumerate() {
            assert_eq!(info.feature as usize, i);
            let twin = FEATURES.iter().find(|o| {
                o.feature != info.feature
                    && (o.leaf, o.subleaf, o.output, o.bit)
                        == (info.leaf, info.subleaf, info.output, info.bit)
            });
            assert!(twin.is_none(), "{} and {twin:?}", info.name);
        }
    }
}
