//! Model-specific registers: RDMSR, WRMSR, XGETBV, XSETBV and the same registers for saved state.

use std::sync::{MutexGuard, PoisonError};

use strata_engine::x86::{Feature, MsrEntry, MsrIndex as M};

use super::Flow;
use crate::cpu::control as cr;
use crate::env::{Exec, Fault};
use crate::mmu::canonical;

/// Variable MTRR pairs.
const VARIABLE_RANGES: u32 = 8;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRR_CAP: u64 = 0x508;
/// Fast strings on, no branch-trace store, no event sampling.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22;
/// Locked, nothing enabled.
const FEATURE_CONTROL: u64 = 1;
/// IBRS, STIBP, SSBD, BHI_DIS_S: stored and without effect.
const SPEC_CTRL_WRITABLE: u64 = 7 | 1 << 10;
/// The registers of the fixed MTRRs, in the order of [`Msrs::mtrr_fixed`].
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// Registers that nothing but RDMSR and WRMSR looks at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Msrs {
    tsc_adjust: u64,
    spec_ctrl: u64,
    misc_enable: u64,
    mtrr_default: u64,
    mtrr_variable: [u64; 2 * VARIABLE_RANGES as usize],
    mtrr_fixed: [u64; MTRR_FIXED.len()],
    pub(super) kvm_system_time: u64,
    pub(super) kvm_wall_clock: u64,
    kvm_pv_eoi: u64,
}

impl Default for Msrs {
    /// Values after power-up, MTRRs as firmware would leave them: everything write-back.
    fn default() -> Self {
        Msrs {
            tsc_adjust: 0,
            spec_ctrl: 0,
            misc_enable: MISC_ENABLE,
            mtrr_default: 1 << 11 | 6,
            mtrr_variable: [0; 2 * VARIABLE_RANGES as usize],
            mtrr_fixed: [0; MTRR_FIXED.len()],
            kvm_system_time: 0,
            kvm_wall_clock: 0,
            kvm_pv_eoi: 0,
        }
    }
}

const REFUSED: Fault = Fault::protection(0);

fn need_canonical(value: u64) -> Result<u64, Fault> {
    if canonical(value) {
        Ok(value)
    } else {
        Err(REFUSED)
    }
}

/// `value` if it has no bits but these.
fn only(value: u64, allowed: u64) -> Result<u64, Fault> {
    if value & !allowed == 0 {
        Ok(value)
    } else {
        Err(REFUSED)
    }
}

fn is_memory_type(value: u64) -> bool {
    matches!(value & 0xff, 0 | 1 | 4 | 5 | 6)
}

impl Exec<'_> {
    pub(super) fn rdmsr(&mut self) -> Result<Flow, Fault> {
        self.privileged()?;
        let value = self.read_msr(self.cpu.gpr[1] as u32)?;
        (self.cpu.gpr[0], self.cpu.gpr[2]) = (value & 0xffff_ffff, value >> 32);
        Ok(Flow::Next)
    }

    pub(super) fn wrmsr(&mut self) -> Result<Flow, Fault> {
        self.privileged()?;
        let value = self.cpu.gpr[2] << 32 | self.cpu.gpr[0] & 0xffff_ffff;
        self.write_msr(self.cpu.gpr[1] as u32, value)?;
        Ok(Flow::Next)
    }

    pub(super) fn msrs(&self) -> MutexGuard<'_, Msrs> {
        self.env
            .apic
            .msrs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, feature: Feature) -> Result<(), Fault> {
        if self.env.model.has(feature) {
            Ok(())
        } else {
            Err(REFUSED)
        }
    }

    /// Value of an MSR; #GP(0) if the model has none of this number or it cannot be read.
    pub fn read_msr(&mut self, index: u32) -> Result<u64, Fault> {
        Ok(match M(index) {
            M::EFER => self.cpu.efer,
            M::STAR => self.cpu.star,
            M::LSTAR => self.cpu.lstar,
            M::CSTAR => self.cpu.cstar,
            M::SFMASK => self.cpu.sfmask,
            M::FS_BASE => self.cpu.segments[4].base,
            M::GS_BASE => self.cpu.segments[5].base,
            M::KERNEL_GS_BASE => self.cpu.kernel_gs_base,
            M::TSC_AUX => self.cpu.tsc_aux,
            M::SYSENTER_CS => self.cpu.sysenter_cs,
            M::SYSENTER_ESP => self.cpu.sysenter_esp,
            M::SYSENTER_EIP => self.cpu.sysenter_eip,
            M::PAT => self.cpu.pat,
            M::TSC => self.read_tsc(),
            M::TSC_ADJUST => self
                .has(Feature::TscAdjust)
                .map(|()| self.msrs().tsc_adjust)?,
            M::APIC_BASE => self.env.apic.base(),
            M::TSC_DEADLINE => {
                self.has(Feature::TscDeadline)?;
                // Disarmed by the timer, so it runs with time.
                let apic = std::sync::Arc::clone(&self.env.apic);
                self.clock_input(|| apic.tsc_deadline())
            }
            M(0x800..=0x8ff) => self.read_x2apic(index)?,
            M::SPEC_CTRL => self
                .has(Feature::SpecCtrl)
                .map(|()| self.msrs().spec_ctrl)?,
            M::ARCH_CAPABILITIES => self
                .has(Feature::ArchCapabilities)
                .map(|()| self.env.model.arch_capabilities())?,
            M::MISC_ENABLE => self.msrs().misc_enable,
            M::FEATURE_CONTROL => FEATURE_CONTROL,
            // The revision is in the upper half.
            M::MICROCODE => 1 << 32,
            M::PLATFORM_ID
            | M::PLATFORM_INFO
            | M::MISC_FEATURES
            | M::DEBUG_CTL
            | M::MCG_CAP
            | M::MCG_STATUS => 0,
            M::MTRR_CAP => MTRR_CAP,
            M::MTRR_DEFAULT_TYPE => self.msrs().mtrr_default,
            M(0x200..=0x20f) => self
                .msrs()
                .mtrr_variable
                .get(index as usize - 0x200)
                .copied()
                .ok_or(REFUSED)?,
            M(0x250..=0x26f) => {
                let fixed = MTRR_FIXED.iter().position(|&m| m == index).ok_or(REFUSED)?;
                self.msrs().mtrr_fixed.get(fixed).copied().ok_or(REFUSED)?
            }
            M::KVM_SYSTEM_TIME => self.msrs().kvm_system_time,
            M::KVM_WALL_CLOCK => self.msrs().kvm_wall_clock,
            M::KVM_PV_EOI => self.msrs().kvm_pv_eoi,
            _ => return Err(REFUSED),
        })
    }

    /// Writes an MSR as WRMSR does; #GP(0) if the model has none of this number, or not this value.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        match M(index) {
            M::EFER => self.write_efer(value)?,
            M::STAR => self.cpu.star = value,
            M::LSTAR => self.cpu.lstar = need_canonical(value)?,
            M::CSTAR => self.cpu.cstar = need_canonical(value)?,
            M::SFMASK => self.cpu.sfmask = only(value, 0xffff_ffff)?,
            M::FS_BASE => self.write_segment_base(4, value)?,
            M::GS_BASE => self.write_segment_base(5, value)?,
            M::KERNEL_GS_BASE => self.cpu.kernel_gs_base = need_canonical(value)?,
            M::TSC_AUX => self.cpu.tsc_aux = only(value, 0xffff_ffff)?,
            M::SYSENTER_CS => self.cpu.sysenter_cs = value & 0xffff_ffff,
            M::SYSENTER_ESP => self.cpu.sysenter_esp = need_canonical(value)?,
            M::SYSENTER_EIP => self.cpu.sysenter_eip = need_canonical(value)?,
            M::PAT => {
                let valid = value
                    .to_le_bytes()
                    .iter()
                    .all(|&t| matches!(t, 0 | 1 | 4 | 5 | 6 | 7));
                self.cpu.pat = if valid { value } else { return Err(REFUSED) };
            }
            M::TSC => {
                let step = value.wrapping_sub(self.read_tsc());
                self.move_tsc(step);
            }
            M::TSC_ADJUST => {
                self.has(Feature::TscAdjust)?;
                let step = value.wrapping_sub(self.msrs().tsc_adjust);
                self.move_tsc(step);
            }
            M::APIC_BASE => {
                let x2apic = self.env.model.has(Feature::X2apic);
                let bits = self.env.model.address_bits();
                self.env
                    .apic
                    .set_base(value, x2apic, bits)
                    .map_err(|_| REFUSED)?;
                self.cpu.flush_tlb(true);
            }
            M::TSC_DEADLINE => {
                self.has(Feature::TscDeadline)?;
                let now = self.env.clock.now_ns();
                self.env.apic.set_tsc_deadline(value, now);
            }
            M(0x800..=0x8ff) => self.write_x2apic(index, value)?,
            M::SPEC_CTRL => {
                self.has(Feature::SpecCtrl)?;
                let value = only(value, SPEC_CTRL_WRITABLE)?;
                self.msrs().spec_ctrl = value;
            }
            M::PRED_CMD => {
                self.has(Feature::SpecCtrl)?;
                only(value, 1)?;
            }
            M::MISC_ENABLE => {
                let value = value & MISC_ENABLE_WRITABLE | MISC_ENABLE & !MISC_ENABLE_WRITABLE;
                self.msrs().misc_enable = value;
            }
            // Loading microcode is a no-op; writing the revision's register is part of reading it.
            M::MICROCODE | M::MCG_STATUS => {}
            M(0x79) => {}
            // Branch recording and stepping are not modelled; the bits read back as 0.
            M::DEBUG_CTL => {
                only(value, 3)?;
            }
            M::MISC_FEATURES => {
                only(value, 0)?;
            }
            M::MTRR_DEFAULT_TYPE => {
                let value = only(value, 0xcff)
                    .ok()
                    .filter(|&v| is_memory_type(v))
                    .ok_or(REFUSED)?;
                self.msrs().mtrr_default = value;
            }
            M(0x200..=0x20f) => self.write_variable_mtrr(index, value)?,
            M(0x250..=0x26f) => {
                let fixed = MTRR_FIXED.iter().position(|&m| m == index).ok_or(REFUSED)?;
                let valid = value
                    .to_le_bytes()
                    .iter()
                    .all(|&t| is_memory_type(t.into()));
                *self
                    .msrs()
                    .mtrr_fixed
                    .get_mut(fixed)
                    .filter(|_| valid)
                    .ok_or(REFUSED)? = value;
            }
            M::KVM_SYSTEM_TIME => {
                self.msrs().kvm_system_time = value;
                self.publish_clock();
            }
            M::KVM_WALL_CLOCK => {
                self.msrs().kvm_wall_clock = value;
                self.publish_wall_clock(value);
            }
            // Bit 1 is reserved. The word it names is left alone: the guest then ends each interrupt itself.
            M::KVM_PV_EOI if value & 2 == 0 => self.msrs().kvm_pv_eoi = value,
            _ => return Err(REFUSED),
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Fault> {
        let writable = cr::EFER_SCE | cr::EFER_LME | cr::EFER_NXE;
        only(value, writable | cr::EFER_LMA)?;
        let old = self.cpu.efer;
        if (old ^ value) & cr::EFER_LME != 0 && self.cpu.cr0 & cr::CR0_PG != 0 {
            return Err(REFUSED);
        }
        self.cpu.efer = value & writable | old & cr::EFER_LMA;
        if (old ^ value) & cr::EFER_NXE != 0 {
            self.cpu.flush_tlb(true);
        }
        Ok(())
    }

    /// Sets a segment's base and leaves the rest of it.
    pub(super) fn write_segment_base(&mut self, index: usize, base: u64) -> Result<(), Fault> {
        let base = need_canonical(base)?;
        if let Some(&segment) = self.cpu.segments.get(index) {
            self.cpu
                .set_segment(index, strata_engine::x86::Segment { base, ..segment });
        }
        Ok(())
    }

    /// Moves the time-stamp counter by `step` ticks; what derives from it follows.
    fn move_tsc(&mut self, step: u64) {
        self.cpu.tsc_offset = self.cpu.tsc_offset.wrapping_add(step);
        let mut msrs = self.msrs();
        msrs.tsc_adjust = msrs.tsc_adjust.wrapping_add(step);
        drop(msrs);
        self.env
            .apic
            .set_tsc_offset(self.cpu.tsc_offset, self.env.clock.now_ns());
        self.publish_clock();
    }

    fn write_variable_mtrr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        let address = ((1u64 << self.env.model.address_bits()) - 1) & !0xfff;
        let is_mask = index & 1 != 0;
        only(value, address | if is_mask { 0x800 } else { 0xff })?;
        if !is_mask && !is_memory_type(value) {
            return Err(REFUSED);
        }
        *self
            .msrs()
            .mtrr_variable
            .get_mut(index as usize - 0x200)
            .ok_or(REFUSED)? = value;
        Ok(())
    }

    /// Every x2APIC register is an input: requests arrive and the timer counts without the guest's doing.
    fn read_x2apic(&mut self, index: u32) -> Result<u64, Fault> {
        self.has(Feature::X2apic)?;
        let apic = std::sync::Arc::clone(&self.env.apic);
        let clock = std::sync::Arc::clone(&self.env.clock);
        let register = index as usize - 0x800;
        apic.msr_read(register, 0).map_err(|_| REFUSED)?;
        Ok(self.clock_input(|| apic.msr_read(register, clock.now_ns()).unwrap_or(0)))
    }

    fn write_x2apic(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        self.has(Feature::X2apic)?;
        let now = self.env.clock.now_ns();
        self.env
            .apic
            .msr_write(index as usize - 0x800, value, now, self.bus)
            .map_err(|_| REFUSED)
    }

    pub(super) fn xgetbv(&mut self) -> Result<Flow, Fault> {
        if self.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(Fault::UNDEFINED);
        }
        let value = match self.cpu.gpr[1] as u32 {
            0 => self.cpu.xcr0,
            1 if self.env.model.has(Feature::Xgetbv1) => self.components_in_use() & self.cpu.xcr0,
            _ => return Err(REFUSED),
        };
        (self.cpu.gpr[0], self.cpu.gpr[2]) = (value & 0xffff_ffff, value >> 32);
        Ok(Flow::Next)
    }

    /// XSETBV: x87 always, AVX only with SSE.
    pub(super) fn xsetbv(&mut self) -> Result<Flow, Fault> {
        if self.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
            return Err(Fault::UNDEFINED);
        }
        self.privileged()?;
        let value = self.cpu.gpr[2] << 32 | self.cpu.gpr[0] & 0xffff_ffff;
        let allowed = self.env.model.xcr0_mask();
        if self.cpu.gpr[1] as u32 != 0 || value & !allowed != 0 || value & 1 == 0 || value & 6 == 4
        {
            return Err(REFUSED);
        }
        self.cpu.xcr0 = value;
        Ok(Flow::Next)
    }

    /// The model's MSRs that have no field of their own in a saved state, ascending.
    pub fn save_msrs(&mut self) -> Vec<MsrEntry> {
        let indices: Vec<u32> = self.env.model.msrs().collect();
        indices
            .into_iter()
            .filter_map(|index| {
                Some(MsrEntry {
                    index,
                    value: self.read_msr(index).ok()?,
                })
            })
            .collect()
    }

    /// Writes saved MSRs back. The first one that the model refuses is returned.
    pub fn restore_msrs(&mut self, entries: &[MsrEntry]) -> Result<(), MsrEntry> {
        for entry in entries {
            let done = match M(entry.index) {
                // As a value: the counter itself does not move.
                M::TSC_ADJUST => {
                    self.msrs().tsc_adjust = entry.value;
                    Ok(())
                }
                _ => self.write_msr(entry.index, entry.value),
            };
            done.map_err(|_| *entry)?;
        }
        Ok(())
    }
}
