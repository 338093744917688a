//! Bytes of one instruction, from iced-x86's description of its encoding and random choices for everything else.

use iced_x86::{
    Code, ConstantOffsets, EncodingKind, Instruction, MandatoryPrefix, OpCodeOperandKind as K,
    OpCodeTableKind, OpKind,
};

use super::values::hot_address;
use crate::coverage::Kind;
use crate::rng::Rng;

/// What is fixed in an instruction's encoding.
pub struct Shape {
    /// The instruction.
    pub code: Code,
    bits: u32,
    /// It has vector, MMX or x87 operands.
    pub vector: bool,
    vex: bool,
    map: u8,
    mandatory: u8,
    operand_66: bool,
    address_67: bool,
    /// REX.W or VEX.W; `None` if ignored.
    w: Option<bool>,
    l: Option<bool>,
    opcode: Vec<u8>,
    modrm: bool,
    group: Option<u8>,
    rm_group: Option<u8>,
    /// It may have a memory operand in ModRM.
    memory: bool,
    /// It may have a register instead.
    register: bool,
    /// Its memory operand has vectors of indices.
    gather: bool,
    vvvv: bool,
}

impl Shape {
    /// The shape of `code`, unless its encoding is none of legacy and VEX.
    pub fn of(code: Code, bits: u32) -> Option<Shape> {
        let op = code.op_code();
        let vex = match op.encoding() {
            EncodingKind::Legacy => false,
            EncodingKind::VEX => true,
            _ => return None,
        };
        let map = match op.table() {
            OpCodeTableKind::Normal => 0,
            OpCodeTableKind::T0F => 1,
            OpCodeTableKind::T0F38 => 2,
            OpCodeTableKind::T0F3A => 3,
            _ => return None,
        };
        let kinds = op.op_kinds();
        let memory = kinds.iter().any(|k| {
            matches!(
                k,
                K::mem
                    | K::mem_mpx
                    | K::mem_mib
                    | K::mem_vsib32x
                    | K::mem_vsib64x
                    | K::mem_vsib32y
                    | K::mem_vsib64y
                    | K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r32_or_mem_mpx
                    | K::r64_or_mem
                    | K::r64_or_mem_mpx
                    | K::mm_or_mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
                    | K::bnd_or_mem_mpx
            )
        });
        let register = kinds.iter().any(|k| {
            matches!(
                k,
                K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r32_or_mem_mpx
                    | K::r64_or_mem
                    | K::r64_or_mem_mpx
                    | K::mm_or_mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
                    | K::r16_rm
                    | K::r32_rm
                    | K::r64_rm
                    | K::mm_rm
                    | K::xmm_rm
                    | K::ymm_rm
            )
        });
        let in_reg = kinds.iter().any(|k| {
            matches!(
                k,
                K::r8_reg
                    | K::r16_reg
                    | K::r32_reg
                    | K::r64_reg
                    | K::r16_reg_mem
                    | K::r32_reg_mem
                    | K::r64_reg_mem
                    | K::seg_reg
                    | K::mm_reg
                    | K::xmm_reg
                    | K::ymm_reg
                    | K::cr_reg
                    | K::dr_reg
            )
        });
        let group = u8::try_from(op.group_index()).ok();
        let rm_group = u8::try_from(op.rm_group_index()).ok();
        let full = op.op_code().to_be_bytes();
        let w = if op.is_wig() {
            None
        } else if vex {
            Some(op.w() == 1)
        } else if op.operand_size() == 64 && !op.default_op_size64() && !op.force_op_size64() {
            Some(true)
        } else if op.operand_size() == 0 || op.force_op_size64() || op.default_op_size64() {
            (op.w() == 1).then_some(true)
        } else {
            Some(op.w() == 1)
        };
        Some(Shape {
            code,
            bits,
            vector: vex && !kinds.iter().any(|k| matches!(k, K::r32_vvvv | K::r64_vvvv))
                || kinds.iter().any(|k| {
                    matches!(
                        k,
                        K::mm_reg
                            | K::mm_rm
                            | K::mm_or_mem
                            | K::xmm_reg
                            | K::xmm_rm
                            | K::xmm_or_mem
                            | K::ymm_reg
                            | K::ymm_rm
                            | K::ymm_or_mem
                            | K::st0
                            | K::sti_opcode
                    )
                })
                || (map == 0
                    && (0xd8..=0xdf).contains(&(op.op_code() >> (8 * (op.op_code_len() - 1))))),
            vex,
            map,
            mandatory: match op.mandatory_prefix() {
                MandatoryPrefix::P66 => 0x66,
                MandatoryPrefix::PF3 => 0xf3,
                MandatoryPrefix::PF2 => 0xf2,
                _ => 0,
            },
            operand_66: !vex && op.operand_size() == 16,
            address_67: op.address_size() == bits / 2,
            w,
            l: (!op.is_lig()).then_some(op.l() == 1),
            opcode: full[4 - op.op_code_len() as usize..].to_vec(),
            modrm: memory || register || in_reg || group.is_some() || rm_group.is_some(),
            group,
            rm_group,
            memory,
            register: register || !memory,
            gather: kinds.iter().any(|k| {
                matches!(
                    k,
                    K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y
                )
            }),
            vvvv: kinds
                .iter()
                .any(|k| matches!(k, K::r32_vvvv | K::r64_vvvv | K::xmm_vvvv | K::ymm_vvvv)),
        })
    }

    /// The kinds of operands that ModRM can give it; `None` if its operands are fixed.
    pub fn kinds(&self) -> Vec<Option<Kind>> {
        if !self.memory {
            return vec![None];
        }
        let mut kinds = vec![Some(Kind::Memory), Some(Kind::Segment)];
        kinds.extend(self.register.then_some(Some(Kind::Register)));
        // Vector indices need a SIB byte, and are registers.
        kinds.extend((!self.gather).then_some(Some(Kind::Absolute)));
        kinds
    }

    /// Random bytes of this shape, likely with operands of this kind, and with more behind them than any instruction
    /// needs.
    pub fn bytes(&self, rng: &mut Rng, kind: Option<Kind>) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        if kind.map_or_else(|| rng.chance(8), |kind| kind == Kind::Segment) {
            out.push(rng.pick(&[0x64, 0x65]));
        }
        if rng.chance(6) {
            for _ in 0..1 + rng.below(2) {
                out.push(rng.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0xf0]));
            }
        }
        if self.address_67 {
            out.push(0x67);
        }
        if self.operand_66 {
            out.push(0x66);
        }
        if self.mandatory != 0 && !self.vex {
            out.push(self.mandatory);
        }
        // LOCK and REP where they mean something.
        let op = self.code.op_code();
        if op.can_use_lock_prefix() && rng.chance(25) {
            out.push(0xf0);
        }
        if op.can_use_rep_prefix() && rng.chance(60) {
            out.push(rng.pick(&[0xf3, 0xf3, 0xf2]));
        }
        let w = self.w.unwrap_or_else(|| rng.chance(30));
        let (r, x, b) = (rng.chance(35), rng.chance(35), rng.chance(35));
        let wide = self.bits == 64;
        let (r, x) = (r && wide, x && wide);
        if self.vex {
            let l = self.l.unwrap_or_else(|| rng.chance(50));
            let vvvv = if self.vvvv || rng.chance(1) {
                rng.byte() & 15
            } else {
                0
            };
            let pp = match self.mandatory {
                0x66 => 1,
                0xf3 => 2,
                0xf2 => 3,
                _ => 0,
            };
            let vvvv = if wide { vvvv } else { vvvv & 7 };
            let tail = (!vvvv & 15) << 3 | u8::from(l) << 2 | pp;
            if self.map == 1 && self.w != Some(true) && rng.chance(50) {
                out.extend([0xc5, u8::from(!r) << 7 | tail]);
            } else {
                out.extend([
                    0xc4,
                    u8::from(!r) << 7 | u8::from(!x) << 6 | u8::from(!b) << 5 | self.map,
                    u8::from(w) << 7 | tail,
                ]);
            }
        } else {
            if self.bits == 64 && (w || rng.chance(45)) {
                out.push(
                    0x40 | u8::from(w) << 3 | u8::from(r) << 2 | u8::from(x) << 1 | u8::from(b),
                );
            }
            match self.map {
                1 => out.push(0x0f),
                2 => out.extend([0x0f, 0x38]),
                3 => out.extend([0x0f, 0x3a]),
                _ => {}
            }
        }
        out.extend_from_slice(&self.opcode);
        if self.modrm {
            let register = match (self.memory, self.register, kind) {
                (true, true, None) => rng.chance(40),
                (true, true, Some(kind)) => kind == Kind::Register,
                (_, register, _) => register,
            };
            let absolute = kind == Some(Kind::Absolute);
            let mut modrm = rng.byte() & 0x3f;
            modrm |= if register {
                0xc0
            } else if absolute {
                0
            } else {
                rng.pick(&[0, 0x40, 0x80])
            };
            if absolute {
                modrm = modrm & !7 | 5;
            }
            if let Some(group) = self.group {
                modrm = modrm & !0x38 | group << 3;
            }
            if let Some(rm) = self.rm_group {
                modrm = modrm & !7 | rm;
            }
            out.push(modrm);
        } else if let Some(last) = out.last_mut()
            && self.code.op_code().op_kinds().iter().any(|k| {
                matches!(
                    k,
                    K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode
                )
            })
        {
            *last |= rng.byte() & 7;
        }
        let (a, b) = (rng.bits(), rng.bits());
        out.extend_from_slice(&a.to_le_bytes());
        out.extend_from_slice(&b.to_le_bytes());
        out
    }
}

/// Bytes of a direct near branch's displacement.
pub fn branch_width(instr: &Instruction) -> Option<usize> {
    let direct = matches!(
        instr.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    if !direct || instr.op_count() == 0 {
        return None;
    }
    let wide = instr
        .op_code()
        .op_kinds()
        .iter()
        .any(|k| matches!(k, K::br64_4 | K::br32_4));
    let word = instr.op_code().op_kinds().contains(&K::br16_2);
    Some(if wide {
        4
    } else if word {
        2
    } else {
        1
    })
}

/// Makes displacements lead to data and immediates interesting.
pub fn tame(
    rng: &mut Rng,
    bits: u32,
    bytes: &mut [u8],
    instr: &Instruction,
    offsets: &ConstantOffsets,
) {
    if offsets.has_displacement() {
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        let value = if instr.is_ip_rel_memory_operand() {
            Some(hot_address(rng, bits).wrapping_sub(instr.next_ip()))
        } else if size == 8
            || (size == 4 && instr.memory_base().number() == 0 && instr.memory_base().size() == 0)
        {
            Some(hot_address(rng, bits))
        } else if size == 4 && rng.chance(90) {
            Some(rng.below(256).wrapping_sub(128))
        } else {
            None
        };
        if let Some(value) = value {
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
    if offsets.has_immediate() && branch_width(instr).is_none() {
        for (at, size) in [
            (offsets.immediate_offset(), offsets.immediate_size()),
            (offsets.immediate_offset2(), offsets.immediate_size2()),
        ] {
            if size > 0 && rng.chance(40) {
                let value = rng.pick(&[
                    0u64,
                    1,
                    2,
                    7,
                    8,
                    15,
                    16,
                    31,
                    32,
                    63,
                    64,
                    127,
                    128,
                    u64::MAX,
                    1 << 31,
                    0x7fff_ffff,
                    0x8000,
                ]);
                bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
        }
    }
}
