//! What is not compared with the CPU, and why. These lists may only shrink.

use iced_x86::{Code, CodeSize, Instruction, Mnemonic as M, OpCodeOperandKind};

/// Why no case has an instruction of this code, if so.
pub fn code(code: Code) -> Option<&'static str> {
    Some(match code.mnemonic() {
        M::Syscall | M::Sysenter | M::Int | M::Int1 | M::Int3 | M::Into => {
            "enters the host's kernel"
        }
        M::Sysexit | M::Sysexitq => "vendors differ on whether it exists in long mode",
        M::Iret | M::Iretd | M::Iretq | M::Retf => "depends on the host's descriptor tables",
        M::Call | M::Jmp if is_far(code) => "depends on the host's descriptor tables",
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "depends on the host's descriptor tables"
        }
        M::Mov
            if matches!(
                code,
                Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
            ) =>
        {
            "depends on the host's descriptor tables"
        }
        M::Pop
            if code.op_code().op_kinds().iter().any(|kind| {
                use OpCodeOperandKind as K;
                matches!(kind, K::es | K::ss | K::ds | K::fs | K::gs)
            }) =>
        {
            "depends on the host's descriptor tables"
        }
        M::Push
            if matches!(
                code,
                Code::Pushd_ES
                    | Code::Pushd_CS
                    | Code::Pushd_SS
                    | Code::Pushd_DS
                    | Code::Pushd_FS
                    | Code::Pushd_GS
            ) =>
        {
            "processors differ on the upper half of the stack slot"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            "emulated by the host's kernel where it faults"
        }
        M::Cpuid | M::Xgetbv | M::Rdpid => "shows the host, which is not the model",
        M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Rdrand | M::Rdseed => "differs from run to run",
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64 => "the host's XCR0 and its tracking of state in use are not the model's",
        _ if matches!(
            code,
            Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        ) =>
        {
            "vendors differ on 0F 0D with a register"
        }
        _ => return None,
    })
}

fn is_far(code: Code) -> bool {
    code.is_jmp_far()
        || code.is_call_far()
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
}

/// Why a particular form is not run.
pub fn instruction(instr: &Instruction, bytes: &[u8]) -> Option<&'static str> {
    if let Some(reason) = code(instr.code()) {
        return Some(reason);
    }
    let near = instr.code().is_jcc_short_or_near()
        || matches!(
            instr.mnemonic(),
            M::Call | M::Jmp | M::Ret | M::Loop | M::Loope | M::Loopne
        )
        || matches!(instr.mnemonic(), M::Jcxz | M::Jecxz | M::Jrcxz);
    let wide = instr.code_size() == CodeSize::Code64;
    if near && wide && prefixes(bytes).contains(&0x66) {
        return Some("vendors differ on near branches with an operand-size prefix in 64-bit mode");
    }
    if !wide && instr.mnemonic() == M::Sysret {
        return Some("vendors differ on whether it exists in compatibility mode");
    }
    let repeat = prefixes(bytes).iter().any(|b| matches!(b, 0xf2 | 0xf3));
    if matches!(instr.mnemonic(), M::Loope | M::Loopne) && repeat {
        return Some("reserved use of a REP prefix, with effects that vendors do not document");
    }
    if wide && instr.mnemonic() == M::Pause && bytes.iter().any(|b| b & 0xf1 == 0x41) {
        return Some("XCHG for the CPU, but iced-x86 takes it for PAUSE");
    }
    None
}

/// Why bytes that do not decode are not run.
pub fn invalid(bytes: &[u8]) -> Option<&'static str> {
    let len = prefixes(bytes).len();
    let rest = &bytes[len..];
    let rest = if matches!(rest.first(), Some(0x40..=0x4f)) {
        &rest[1..]
    } else {
        rest
    };
    match rest {
        [0x62, ..] => Some("EVEX, which the host may have"),
        [0x8f, ..] => Some("XOP, which the host may have"),
        [0xc5, _, 0x41..=0x4b | 0x90..=0x93 | 0x98 | 0x99, ..]
        | [
            0xc4,
            _,
            _,
            0x30..=0x33 | 0x41..=0x4b | 0x90..=0x93 | 0x98 | 0x99,
            ..,
        ] => Some("masks of AVX-512, which the host may have"),
        [0x0f, 0x01 | 0x0d | 0x18..=0x1f, ..] => Some("instructions of one vendor alone"),
        [0x0f, 0x20 | 0x22, ..] => Some("MOV with CR8 in AMD's way, by LOCK"),
        [0x0f, 0x0f, ..] => Some("3DNow!, which the host may have"),
        _ => None,
    }
}

/// Prefixes at the start: legacy ones, and REX where it is not the last.
fn prefixes(bytes: &[u8]) -> &[u8] {
    let legacy = |b: &u8| {
        matches!(
            b,
            0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65
        )
    };
    let all = bytes
        .iter()
        .take_while(|b| legacy(b) || matches!(b, 0x40..=0x4f))
        .count();
    let len = bytes[..all]
        .iter()
        .rposition(legacy)
        .map_or(0, |last| last + 1);
    &bytes[..len]
}
