//! Numbers of the model-specific registers that a guest may meet (Intel SDM vol. 4; Linux `kvm_para.h`).

use super::Feature;

/// A model-specific register's number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct MsrIndex(pub u32);

#[allow(missing_docs, reason = "the names are the manual's")]
impl MsrIndex {
    pub const TSC: Self = Self(0x10);
    pub const PLATFORM_ID: Self = Self(0x17);
    pub const APIC_BASE: Self = Self(0x1b);
    pub const FEATURE_CONTROL: Self = Self(0x3a);
    pub const TSC_ADJUST: Self = Self(0x3b);
    pub const SPEC_CTRL: Self = Self(0x48);
    pub const PRED_CMD: Self = Self(0x49);
    pub const MICROCODE: Self = Self(0x8b);
    pub const PLATFORM_INFO: Self = Self(0xce);
    pub const MTRR_CAP: Self = Self(0xfe);
    pub const ARCH_CAPABILITIES: Self = Self(0x10a);
    pub const MISC_FEATURES: Self = Self(0x140);
    pub const SYSENTER_CS: Self = Self(0x174);
    pub const SYSENTER_ESP: Self = Self(0x175);
    pub const SYSENTER_EIP: Self = Self(0x176);
    pub const MCG_CAP: Self = Self(0x179);
    pub const MCG_STATUS: Self = Self(0x17a);
    pub const MISC_ENABLE: Self = Self(0x1a0);
    pub const DEBUG_CTL: Self = Self(0x1d9);
    /// First base/mask pair; eight pairs follow each other.
    pub const MTRR_VARIABLE: Self = Self(0x200);
    pub const MTRR_FIX_64K: Self = Self(0x250);
    pub const MTRR_FIX_16K_80000: Self = Self(0x258);
    pub const MTRR_FIX_16K_A0000: Self = Self(0x259);
    /// First of eight.
    pub const MTRR_FIX_4K: Self = Self(0x268);
    pub const PAT: Self = Self(0x277);
    pub const MTRR_DEFAULT_TYPE: Self = Self(0x2ff);
    pub const TSC_DEADLINE: Self = Self(0x6e0);
    /// First of the x2APIC's 256.
    pub const X2APIC: Self = Self(0x800);
    pub const KVM_WALL_CLOCK: Self = Self(0x4b56_4d00);
    pub const KVM_SYSTEM_TIME: Self = Self(0x4b56_4d01);
    pub const KVM_PV_EOI: Self = Self(0x4b56_4d04);
    pub const EFER: Self = Self(0xc000_0080);
    pub const STAR: Self = Self(0xc000_0081);
    pub const LSTAR: Self = Self(0xc000_0082);
    pub const CSTAR: Self = Self(0xc000_0083);
    pub const SFMASK: Self = Self(0xc000_0084);
    pub const FS_BASE: Self = Self(0xc000_0100);
    pub const GS_BASE: Self = Self(0xc000_0101);
    pub const KERNEL_GS_BASE: Self = Self(0xc000_0102);
    pub const TSC_AUX: Self = Self(0xc000_0103);
}

const fn pair(index: u32) -> (u32, Option<Feature>) {
    (index, Some(Feature::Mtrr))
}

impl MsrIndex {
    /// Registers that are part of a vCPU's state, ascending, with the feature each needs.
    pub(super) const SAVED: &[(u32, Option<Feature>)] = &[
        (Self::TSC_ADJUST.0, Some(Feature::TscAdjust)),
        (Self::SPEC_CTRL.0, Some(Feature::SpecCtrl)),
        (Self::SYSENTER_CS.0, Some(Feature::Sep)),
        (Self::SYSENTER_ESP.0, Some(Feature::Sep)),
        (Self::SYSENTER_EIP.0, Some(Feature::Sep)),
        (Self::MISC_ENABLE.0, None),
        (Self::DEBUG_CTL.0, None),
        pair(0x200),
        pair(0x201),
        pair(0x202),
        pair(0x203),
        pair(0x204),
        pair(0x205),
        pair(0x206),
        pair(0x207),
        pair(0x208),
        pair(0x209),
        pair(0x20a),
        pair(0x20b),
        pair(0x20c),
        pair(0x20d),
        pair(0x20e),
        pair(0x20f),
        pair(0x250),
        pair(0x258),
        pair(0x259),
        pair(0x268),
        pair(0x269),
        pair(0x26a),
        pair(0x26b),
        pair(0x26c),
        pair(0x26d),
        pair(0x26e),
        pair(0x26f),
        (Self::PAT.0, Some(Feature::Pat)),
        pair(0x2ff),
        (Self::KVM_WALL_CLOCK.0, Some(Feature::Hypervisor)),
        (Self::KVM_SYSTEM_TIME.0, Some(Feature::Hypervisor)),
        (Self::KVM_PV_EOI.0, Some(Feature::Hypervisor)),
        (Self::STAR.0, Some(Feature::Syscall)),
        (Self::LSTAR.0, Some(Feature::Syscall)),
        (Self::CSTAR.0, Some(Feature::Syscall)),
        (Self::SFMASK.0, Some(Feature::Syscall)),
        (Self::KERNEL_GS_BASE.0, None),
        (Self::TSC_AUX.0, Some(Feature::Rdtscp)),
    ];
}
