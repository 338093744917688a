//! Which instructions may stand in a block at all, whatever their operands.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Says why `instr` may not stand in a block. Control flow and memory operands are judged elsewhere.
pub fn refusal(instr: &Instruction) -> Option<&'static str> {
    if instr.is_invalid() {
        return Some("no instruction");
    }
    if instr.is_privileged() {
        return Some("a privileged instruction");
    }
    if !matches!(
        instr.code().encoding(),
        EncodingKind::Legacy | EncodingKind::VEX
    ) {
        return Some("an encoding that is never emitted");
    }
    if instr.segment_prefix() != Register::None {
        return Some("a segment prefix");
    }
    if instr.is_string_instruction() || instr.is_vsib() || instr.is_save_restore_instruction() {
        return Some("memory operands that no check covers");
    }
    if !instr.cpuid_features().iter().all(known) {
        return Some("an instruction outside of the CPU models");
    }
    let special = (0..instr.op_count()).any(|i| {
        instr.op_kind(i) == OpKind::Register && {
            let register = instr.op_register(i);
            register.is_segment_register()
                || register.is_cr()
                || register.is_dr()
                || register.is_tr()
        }
    });
    if special {
        return Some("a system register");
    }
    sensitive(instr.mnemonic()).then_some("an instruction that shows or changes the host's state")
}

/// Features whose instructions work on registers, flags and their written memory operands alone, those in
/// [`sensitive`] aside.
fn known(feature: &CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::BMI1
            | F::BMI2
            | F::MOVBE
            | F::POPCNT
            | F::LZCNT
            | F::ADX
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::VAES
            | F::VPCLMULQDQ
            | F::GFNI
    )
}

/// Unprivileged instructions of these features that must not run as themselves: they read or write descriptor tables,
/// ports, control words that the host relies on, or memory at addresses that are not written in them.
fn sensitive(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::In
            | M::Out
            | M::Cli
            | M::Sti
            | M::Cld
            | M::Std
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lmsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Arpl
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Bound
            | M::Xlatb
            | M::Enter
            | M::Leave
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fldenv
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Umov
            | M::Ud0
            | M::Ud1
            | M::Ud2
    )
}
