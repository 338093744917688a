//! The instruction table: what each instruction reads and writes, and how it is treated.
//!
//! iced-x86 knows operands, accesses and CPUID features of every encoding; this module adds the treatment. An
//! instruction is run as itself only if its features are in the CPU model, it is not sensitive in the sense of Popek
//! and Goldberg, and it touches nothing but general, x87/MMX and vector registers, flags and one memory operand.

use std::sync::LazyLock;

use iced_x86::{
    Code, CpuidFeature, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize,
    Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register,
};
use strata_engine::x86::CpuModel;

use crate::mmu::OperandAccess;

/// How an instruction is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Treatment {
    /// No architectural effect here: NOPs, prefetches, ENDBR.
    Nop,
    /// Run as itself with registers renamed and the memory operand, if any, rewritten.
    Plain,
    /// A masked vector move: plain where the whole operand is in one page of RAM, interpreted elsewhere.
    Masked,
    /// BT, BTS, BTR, BTC of memory with a register offset: the address depends on the offset.
    BitString,
    /// LEA: an address computation.
    Lea,
    /// MOV between the accumulator and an absolute offset.
    MovOffset,
    /// PUSH of a register, immediate or memory operand.
    Push,
    /// POP to a register or memory operand.
    Pop,
    /// LEAVE.
    Leave,
    /// Near CALL, direct or indirect.
    Call,
    /// Near RET.
    Ret,
    /// Near JMP, direct or indirect.
    Jump,
    /// Conditional jump on flags.
    JumpIf,
    /// LOOP, LOOPcc, JCXZ, JECXZ, JRCXZ.
    JumpCount,
    /// CLI at CPL 0.
    Cli,
    /// STI at CPL 0.
    Sti,
    /// PUSHF in 64-bit mode.
    PushFlags,
    /// Run by a stub in the usual case, by the interpreter in all others.
    System,
    /// Run by the interpreter.
    Interpret,
    /// Not an instruction of this CPU model: #UD.
    Undefined,
    /// Works on x87 or vector state while that is disabled: #NM.
    NoDevice,
}

/// The memory operand of a plain instruction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OperandUse {
    /// What is done with it.
    pub access: OperandAccess,
    /// Bytes.
    pub size: usize,
}

/// What an instruction does with each of its operands.
#[derive(Clone, Copy, Debug)]
pub struct Accesses([OpAccess; 5]);

impl Accesses {
    /// None.
    pub const NONE: Accesses = Accesses([OpAccess::None; 5]);

    /// Those of `instr`.
    pub fn of(instr: &Instruction, info: &mut InstructionInfoFactory) -> Accesses {
        let options =
            InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = info.info_options(instr, options);
        Accesses([
            info.op0_access(),
            info.op1_access(),
            info.op2_access(),
            info.op3_access(),
            info.op4_access(),
        ])
    }

    fn get(&self, operand: u32) -> OpAccess {
        let access = self.0.get(operand as usize);
        access.copied().unwrap_or(OpAccess::None)
    }
}

/// Where a general register is encoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Slot {
    /// ModRM.reg.
    Reg,
    /// ModRM.rm.
    Rm,
    /// Low bits of the opcode.
    Opcode,
    /// VEX.vvvv.
    Vvvv,
}

/// A general-register operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RegisterUse {
    /// Where it is encoded.
    pub slot: Slot,
    /// Guest register number 0..16.
    pub number: u8,
    /// AH, CH, DH or BH (then `number` is 0..4).
    pub high: bool,
    /// Bytes.
    pub size: usize,
    /// The old value matters.
    pub read: bool,
    /// It is written.
    pub write: bool,
}

/// CPUID features the guest's model offers to unprivileged code, by iced-x86's names.
#[derive(Clone, Debug)]
pub struct FeatureSet {
    present: Vec<bool>,
    /// By code: all its features are present.
    allowed: Vec<bool>,
}

impl FeatureSet {
    /// Reads the model's CPUID leaves.
    pub fn of(model: &CpuModel) -> Self {
        use CpuidFeature as F;
        let mut set = FeatureSet {
            present: vec![false; 256],
            allowed: Vec::new(),
        };
        let leaf1 = model.leaf(1, 0);
        let leaf7 = model.leaf(7, 0);
        let extended = model.leaf(0x8000_0001, 0);
        let xsave = model.leaf(13, 1);
        for feature in [
            F::INTEL8086,
            F::INTEL186,
            F::INTEL286,
            F::INTEL386,
            F::INTEL486,
            F::X64,
            F::CPUID,
            F::MULTIBYTENOP,
            F::PAUSE,
            F::FPU287,
            F::FPU387,
            F::RDPMC,
        ] {
            set.add(feature, true);
        }
        let [eax_x, ..] = xsave;
        let [_, ebx7, ecx7, edx7] = leaf7;
        let [_, ebx1, ecx1, edx1] = leaf1;
        let [_, _, ecx_e, edx_e] = extended;
        let _ = (ebx1, edx7);
        for (word, features) in [
            (
                edx1,
                &[
                    (0, F::FPU),
                    (4, F::TSC),
                    (5, F::MSR),
                    (8, F::CX8),
                    (11, F::SEP),
                    (15, F::CMOV),
                    (19, F::CLFSH),
                    (23, F::MMX),
                    (24, F::FXSR),
                    (25, F::SSE),
                    (26, F::SSE2),
                ][..],
            ),
            (
                ecx1,
                &[
                    (0, F::SSE3),
                    (1, F::PCLMULQDQ),
                    (3, F::MONITOR),
                    (9, F::SSSE3),
                    (12, F::FMA),
                    (13, F::CMPXCHG16B),
                    (19, F::SSE4_1),
                    (20, F::SSE4_2),
                    (22, F::MOVBE),
                    (23, F::POPCNT),
                    (25, F::AES),
                    (26, F::XSAVE),
                    (28, F::AVX),
                    (29, F::F16C),
                    (30, F::RDRAND),
                ],
            ),
            (
                ebx7,
                &[
                    (0, F::FSGSBASE),
                    (3, F::BMI1),
                    (5, F::AVX2),
                    (8, F::BMI2),
                    (10, F::INVPCID),
                    (18, F::RDSEED),
                    (19, F::ADX),
                    (20, F::SMAP),
                    (23, F::CLFLUSHOPT),
                    (24, F::CLWB),
                    (29, F::SHA),
                ],
            ),
            (
                ecx7,
                &[
                    (9, F::VAES),
                    (10, F::VPCLMULQDQ),
                    (22, F::RDPID),
                    (8, F::GFNI),
                ],
            ),
            (edx_e, &[(11, F::SYSCALL), (27, F::RDTSCP)]),
            (ecx_e, &[(5, F::LZCNT), (8, F::PREFETCHW), (6, F::SSE4A)]),
            (eax_x, &[(0, F::XSAVEOPT), (1, F::XSAVEC)]),
        ] {
            for &(bit, feature) in features {
                set.add(feature, word & (1 << bit) != 0);
            }
        }
        set.allowed = Code::values().map(|code| set.has_all(code)).collect();
        set
    }

    fn add(&mut self, feature: CpuidFeature, present: bool) {
        if let Some(slot) = self.present.get_mut(feature as usize) {
            *slot = present;
        }
    }

    fn has_all(&self, code: Code) -> bool {
        code.cpuid_features()
            .iter()
            .all(|&f| self.present.get(f as usize).copied().unwrap_or(false))
    }

    /// True if the model has all features of `code`.
    pub fn allows(&self, code: Code) -> bool {
        self.allowed.get(code as usize).copied().unwrap_or(false)
    }
}

/// What a mode allows, as far as the treatment depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// 64, 32 or 16.
    pub bits: u32,
    /// CPL is 0.
    pub cpl0: bool,
    /// CR0.EM or CR0.TS is set: x87, MMX and SSE trap.
    pub fpu_trap: bool,
    /// SSE and AVX may not be as CR4 and XCR0 stand.
    pub no_sse: bool,
    /// AVX may not be.
    pub no_avx: bool,
}

/// Decides how `instr` is run.
pub fn treatment(instr: &Instruction, features: &FeatureSet, context: Context) -> Treatment {
    use Mnemonic as M;
    let code = instr.code();
    if instr.is_invalid() {
        return Treatment::Undefined;
    }
    match instr.mnemonic() {
        M::Nop | M::Endbr32 | M::Endbr64 | M::Reservednop => return Treatment::Nop,
        M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Cldemote => return Treatment::Nop,
        M::Ud0 | M::Ud1 | M::Ud2 => return Treatment::Undefined,
        _ => {}
    }
    if matches!(instr.mnemonic(), M::Vmcall | M::Vmmcall) {
        return Treatment::Interpret;
    }
    if !features.allows(code) {
        // LOCK may not precede a hint either.
        let hint = is_hint(code) && !instr.has_lock_prefix();
        return if hint {
            Treatment::Nop
        } else {
            Treatment::Undefined
        };
    }
    if instr.has_lock_prefix() && !lockable(instr) {
        return Treatment::Undefined;
    }
    match instr.mnemonic() {
        M::Lea => return Treatment::Lea,
        M::Leave => return Treatment::Leave,
        M::Pause => return Treatment::Plain,
        M::Cli if context.cpl0 => return Treatment::Cli,
        M::Sti if context.cpl0 => return Treatment::Sti,
        M::Pushfq if context.bits == 64 => return Treatment::PushFlags,
        M::Push | M::Pop => return stack_treatment(instr),
        M::Call | M::Jmp | M::Ret => return near_treatment(instr),
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            return Treatment::JumpCount;
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if instr.op0_kind() == OpKind::Memory && instr.op1_kind() == OpKind::Register =>
        {
            return Treatment::BitString;
        }
        _ => {}
    }
    if code.is_jcc_short_or_near() {
        return Treatment::JumpIf;
    }
    // Outside of 64-bit code they leave the upper eight registers alone.
    let lower_half = context.bits != 64 && matches!(instr.mnemonic(), M::Vzeroall | M::Vzeroupper);
    if interpreted(instr) || lower_half {
        if context.bits == 64 && has_stub(instr, context.cpl0) {
            return Treatment::System;
        }
        return Treatment::Interpret;
    }
    let vector = uses_vector(instr);
    if vector
        && if is_vex(instr) {
            context.no_avx
        } else {
            context.no_sse && !uses_x87(instr)
        }
    {
        return Treatment::Undefined;
    }
    if instr.mnemonic() == M::Wait && context.fpu_trap {
        // CR0.MP decides.
        return Treatment::Interpret;
    }
    if (vector || uses_x87(instr)) && context.fpu_trap {
        if code.cpuid_features().contains(&CpuidFeature::MMX) {
            // CR0.EM and CR0.TS differ for MMX.
            return Treatment::Interpret;
        }
        return Treatment::NoDevice;
    }
    if matches!(
        instr.mnemonic(),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
    ) {
        // The check that nothing is stored to a code segment is not made there.
        let code_segment = context.bits != 64 && instr.memory_segment() == Register::CS;
        return if code_segment {
            Treatment::Interpret
        } else {
            Treatment::Masked
        };
    }
    if (0..instr.op_count()).any(|i| instr.op_code().op_kind(i) == OpCodeOperandKind::mem_offs) {
        return Treatment::MovOffset;
    }
    Treatment::Plain
}

/// True for 0F 18 to 0F 1F: no operation on a processor without the instruction that was put there later (RDSSP, which
/// unwinders run unasked; MPX).
pub fn is_hint(code: Code) -> bool {
    let op = code.op_code();
    op.encoding() == iced_x86::EncodingKind::Legacy
        && op.table() == iced_x86::OpCodeTableKind::T0F
        && op.op_code_len() == 1
        && (0x18..=0x1f).contains(&op.op_code())
}

/// Near branches are plain; far ones belong to the interpreter.
fn near_treatment(instr: &Instruction) -> Treatment {
    if instr.code().is_jmp_far()
        || instr.code().is_call_far()
        || instr.code().is_jmp_far_indirect()
        || instr.code().is_call_far_indirect()
    {
        return Treatment::Interpret;
    }
    match instr.mnemonic() {
        Mnemonic::Call => Treatment::Call,
        Mnemonic::Jmp => Treatment::Jump,
        _ => Treatment::Ret,
    }
}

fn stack_treatment(instr: &Instruction) -> Treatment {
    let segment =
        instr.op0_kind() == OpKind::Register && instr.op0_register().is_segment_register();
    match instr.mnemonic() {
        _ if segment => Treatment::Interpret,
        Mnemonic::Push => Treatment::Push,
        _ => Treatment::Pop,
    }
}

/// LOCK is allowed only with a memory destination of certain instructions (SDM vol. 2, LOCK). iced-x86 already
/// refuses most others; register destinations are caught here.
fn lockable(instr: &Instruction) -> bool {
    instr.op0_kind() == OpKind::Memory
        || (instr.mnemonic() == Mnemonic::Xchg && instr.op1_kind() == OpKind::Memory)
}

/// True for VEX-encoded vector instructions.
fn is_vex(instr: &Instruction) -> bool {
    instr.code().encoding() == iced_x86::EncodingKind::VEX
}

/// What is true of all instructions of a code, worked out once.
struct Traits {
    vector: bool,
    x87: bool,
    plain: bool,
}

static TRAITS: LazyLock<Vec<Traits>> = LazyLock::new(|| Code::values().map(Traits::of).collect());

impl Traits {
    fn of(code: Code) -> Traits {
        use CpuidFeature as F;
        let features = code.cpuid_features();
        let state = |f: &CpuidFeature| {
            matches!(
                f,
                F::FPU
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
        };
        let general = |f: &CpuidFeature| {
            matches!(
                f,
                F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::CMOV
                    | F::CX8
                    | F::CMPXCHG16B
                    | F::BMI1
                    | F::BMI2
                    | F::MOVBE
                    | F::POPCNT
                    | F::LZCNT
                    | F::ADX
                    | F::SSE
                    | F::SSE2
                    | F::SSE4_2
            )
        };
        let exempt = matches!(
            code.mnemonic(),
            Mnemonic::Sfence
                | Mnemonic::Lfence
                | Mnemonic::Mfence
                | Mnemonic::Movnti
                | Mnemonic::Crc32
        );
        let vector = features.iter().any(state) && !exempt;
        Traits {
            vector,
            x87: features
                .iter()
                .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX)),
            plain: vector || features.iter().all(general),
        }
    }
}

fn traits(instr: &Instruction) -> Option<&'static Traits> {
    TRAITS.get(instr.code() as usize)
}

/// True if the instruction works on x87, MMX or vector state.
pub fn uses_vector(instr: &Instruction) -> bool {
    traits(instr).is_some_and(|traits| traits.vector)
}

/// True for x87 and MMX, which need no CR4.OSFXSR.
fn uses_x87(instr: &Instruction) -> bool {
    traits(instr).is_some_and(|traits| traits.x87)
}

/// True for instructions that `translate::system` knows, in 64-bit code.
fn has_stub(instr: &Instruction, cpl0: bool) -> bool {
    use Mnemonic as M;
    match instr.mnemonic() {
        M::Syscall | M::Rdtsc | M::Rdtscp | M::Cld => true,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => true,
        M::Swapgs | M::Sysretq | M::Iretq | M::Popfq => cpl0,
        M::Mov if instr.op0_kind() == OpKind::Register && instr.op1_kind() == OpKind::Register => {
            let from = instr.op1_register();
            from.is_segment_register() || (cpl0 && from.is_cr() && from != Register::CR8)
        }
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => instr.is_string_instruction(),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => true,
        _ => false,
    }
}

/// Sensitive or unusual instructions that the interpreter runs, among those whose features are present.
fn interpreted(instr: &Instruction) -> bool {
    use Mnemonic as M;
    let code = instr.code();
    if code.is_privileged()
        || code.is_save_restore_instruction()
        || instr.is_vsib()
        || instr.is_string_instruction()
    {
        return true;
    }
    let segment_or_system = (0..instr.op_count()).any(|i| {
        instr.op_kind(i) == OpKind::Register && {
            let r = instr.op_register(i);
            r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()
        }
    });
    if segment_or_system {
        return true;
    }
    let plain_features = traits(instr).is_some_and(|traits| traits.plain);
    if !plain_features {
        return true;
    }
    matches!(
        instr.mnemonic(),
        M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Hlt
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Cli
            | M::Sti
            | M::Pushf
            | M::Pushfd
            | M::Pushfq
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
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
            // Some CPUs take bits of MXCSR that others refuse.
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Enter
            | M::Pusha
            | M::Pushad
            | M::Popa
            | M::Popad
            | M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Salc
            | M::Xlatb
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Fldenv
            | M::Frstor
            | M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysret
            | M::Std
            | M::Cld
            | M::Monitor
            | M::Mwait
            | M::Cpuid
            | M::Rdtsc
            | M::Rdpmc
            | M::Clts
            | M::Wbinvd
            | M::Invd
            | M::Umov
    ) || code.is_jmp_far()
}

/// The memory operand of `instr`, if it has one that is accessed.
pub fn memory_use(instr: &Instruction, accesses: &Accesses) -> Option<OperandUse> {
    let index = (0..instr.op_count()).find(|&i| instr.op_kind(i) == OpKind::Memory)?;
    let access = match accesses.get(index) {
        OpAccess::Read | OpAccess::CondRead => OperandAccess::Read,
        OpAccess::Write => OperandAccess::Write,
        OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => {
            OperandAccess::ReadWrite
        }
        OpAccess::None | OpAccess::NoMemAccess => return None,
    };
    let size = match instr.memory_size() {
        // Only two of them matter, but AMD's processors load four bytes.
        _ if instr.code() == Code::Movsxd_r16_rm16 => 4,
        MemorySize::FpuEnv14 => 14,
        MemorySize::FpuEnv28 => 28,
        size => size.size(),
    };
    Some(OperandUse { access, size })
}

/// What the address of the memory operand must be a multiple of, else #GP (Intel SDM vol. 1, 11.6.10.1; vol. 2,
/// 2.4): legacy SSE operands of 16 bytes but for the unaligned moves and string comparisons, and the aligned VEX moves.
pub fn alignment(instr: &Instruction) -> u8 {
    use Mnemonic as M;
    let size = instr.memory_size().size() as u8;
    match instr.mnemonic() {
        M::Cmpxchg16b => 16,
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Pcmpistri
        | M::Pcmpistrm
        | M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpestri64
        | M::Pcmpestrm64 => 1,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => size,
        // Vendors differ on the SHA instructions: the host decides when they run.
        _ if instr.code().cpuid_features().contains(&CpuidFeature::SHA) => 1,
        _ if size == 16
            && instr.code().encoding() == iced_x86::EncodingKind::Legacy
            && uses_vector(instr)
            && !uses_x87(instr) =>
        {
            16
        }
        _ => 1,
    }
}

/// True if a pending x87 exception is raised before `instr` does anything.
pub fn waits_for_x87(instr: &Instruction) -> bool {
    let mmx = (0..instr.op_count())
        .any(|i| instr.op_kind(i) == OpKind::Register && instr.op_register(i).is_mm());
    mmx || (uses_x87(instr) && !instr.op_code().is_fpu_no_wait())
}

/// The general-register operands of `instr`.
pub fn register_uses(instr: &Instruction, accesses: &Accesses, out: &mut Vec<RegisterUse>) {
    use OpCodeOperandKind as K;
    out.clear();
    for i in 0..instr.op_count() {
        if instr.op_kind(i) != OpKind::Register {
            continue;
        }
        let register = instr.op_register(i);
        if !register.is_gpr() {
            continue;
        }
        let slot = match instr.op_code().op_kind(i) {
            K::r8_reg
            | K::r16_reg
            | K::r32_reg
            | K::r64_reg
            | K::r16_reg_mem
            | K::r32_reg_mem
            | K::r64_reg_mem => Slot::Reg,
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::r16_rm
            | K::r32_rm
            | K::r64_rm
            | K::r32_or_mem_mpx
            | K::r64_or_mem_mpx => Slot::Rm,
            K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => Slot::Opcode,
            K::r32_vvvv | K::r64_vvvv => Slot::Vvvv,
            _ => continue,
        };
        let size = register.size();
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        let number = if high {
            register as u8 - Register::AH as u8
        } else {
            register.full_register().number() as u8
        };
        let access = accesses.get(i);
        let write = matches!(
            access,
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
        );
        // Writes of 8 and 16 bits leave the rest of the register as it was.
        let read = !matches!(access, OpAccess::Write | OpAccess::None) || size < 4;
        out.push(RegisterUse {
            slot,
            number,
            high,
            size,
            read,
            write,
        });
    }
}

/// How an instruction uses RCX without encoding it: (reads, writes).
pub fn implicit_rcx(instr: &Instruction) -> (bool, bool) {
    use Mnemonic as M;
    if (0..instr.op_count()).any(|i| instr.op_code().op_kind(i) == OpCodeOperandKind::cl) {
        return (true, false);
    }
    match instr.mnemonic() {
        M::Cmpxchg8b | M::Cmpxchg16b => (true, false),
        M::Pcmpistri
        | M::Pcmpestri
        | M::Vpcmpistri
        | M::Vpcmpestri
        | M::Pcmpestri64
        | M::Vpcmpestri64 => (false, true),
        _ => (false, false),
    }
}
