//! The bytes of one instruction taken apart: prefixes, opcode map, ModRM, immediate; and put together again with
//! other registers and another memory operand. What an instruction *means* is [`crate::table`]'s business.

use iced_x86::{ConstantOffsets, Instruction};

/// A VEX prefix's payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Vex {
    /// W bit.
    pub w: bool,
    /// Vector length bit.
    pub l: bool,
    /// Second source register, not inverted.
    pub vvvv: u8,
    /// Implied prefix: 0 none, 1 66, 2 F3, 3 F2.
    pub pp: u8,
}

/// An instruction's parts.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// Operand-size prefix present.
    pub p66: bool,
    /// Last of F2/F3, or 0.
    pub rep: u8,
    /// LOCK present.
    pub lock: bool,
    /// REX.W, R, X, B as encoded; zero without REX.
    pub rex: u8,
    /// A REX prefix is present (changes 8-bit registers 4..7).
    pub has_rex: bool,
    /// VEX payload.
    pub vex: Option<Vex>,
    /// Opcode map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A.
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// ModRM, if there is one.
    pub modrm: Option<u8>,
    imm: [u8; 8],
    imm_len: u8,
}

const fn has_modrm_map0(op: u8) -> bool {
    match op {
        0x00..=0x3f => op & 7 < 4,
        0x62
        | 0x63
        | 0x69
        | 0x6b
        | 0x80..=0x8f
        | 0xc0
        | 0xc1
        | 0xc4..=0xc7
        | 0xd0..=0xd3
        | 0xd8..=0xdf => true,
        0xf6 | 0xf7 | 0xfe | 0xff => true,
        _ => false,
    }
}

const fn has_modrm_map1(op: u8) -> bool {
    !matches!(op, 0x04..=0x0c | 0x0e | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
}

impl Raw {
    /// Takes the bytes of `instr` apart. `None` for encodings that are never rewritten (EVEX, XOP, 3DNow!).
    pub fn parse(
        bytes: &[u8],
        bits: u32,
        instr: &Instruction,
        offsets: &ConstantOffsets,
    ) -> Option<Raw> {
        let mut raw = Raw {
            p66: false,
            rep: 0,
            lock: false,
            rex: 0,
            has_rex: false,
            vex: None,
            map: 0,
            opcode: 0,
            modrm: None,
            imm: [0; 8],
            imm_len: 0,
        };
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0x66 => raw.p66 = true,
                byte @ (0xf2 | 0xf3) => raw.rep = byte,
                0xf0 => raw.lock = true,
                0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x67 => {}
                byte @ 0x40..=0x4f if bits == 64 => {
                    // Only a REX directly before the opcode counts.
                    raw.rex = byte & 15;
                    raw.has_rex = true;
                    at += 1;
                    match *bytes.get(at)? {
                        0x66
                        | 0xf2
                        | 0xf3
                        | 0xf0
                        | 0x2e
                        | 0x36
                        | 0x3e
                        | 0x26
                        | 0x64
                        | 0x65
                        | 0x67
                        | 0x40..=0x4f => {
                            raw.rex = 0;
                            raw.has_rex = false;
                            continue;
                        }
                        _ => break,
                    }
                }
                _ => break,
            }
            at += 1;
        }
        let first = *bytes.get(at)?;
        let second = bytes.get(at + 1).copied().unwrap_or(0);
        let vex = matches!(first, 0xc4 | 0xc5) && (bits == 64 || second & 0xc0 == 0xc0);
        if vex {
            let (r, x, b, map, payload, len) = if first == 0xc5 {
                (second & 0x80 == 0, false, false, 1, second & 0x7f, 2)
            } else {
                let third = *bytes.get(at + 2)?;
                (
                    second & 0x80 == 0,
                    second & 0x40 == 0,
                    second & 0x20 == 0,
                    second & 31,
                    third,
                    3,
                )
            };
            raw.rex = u8::from(r) << 2 | u8::from(x) << 1 | u8::from(b);
            raw.vex = Some(Vex {
                w: first == 0xc4 && payload & 0x80 != 0,
                l: payload & 4 != 0,
                vvvv: (!(payload >> 3)) & 15,
                pp: payload & 3,
            });
            raw.map = map;
            at += len;
            raw.opcode = *bytes.get(at)?;
        } else if first == 0x0f {
            match second {
                0x38 => raw.map = 2,
                0x3a => raw.map = 3,
                0x0f => return None,
                _ => raw.map = 1,
            }
            at += if raw.map == 1 { 1 } else { 2 };
            raw.opcode = *bytes.get(at)?;
        } else {
            raw.opcode = first;
        }
        at += 1;
        let modrm = match raw.map {
            0 => has_modrm_map0(raw.opcode),
            1 if raw.vex.is_some() => raw.opcode != 0x77,
            1 => has_modrm_map1(raw.opcode),
            _ => true,
        };
        if modrm {
            raw.modrm = Some(*bytes.get(at)?);
        }
        if (raw.map == 0 && raw.opcode == 0x62 && (bits == 64 || second & 0xc0 == 0xc0))
            || (raw.map == 0 && raw.opcode == 0x8f && raw.modrm.is_some_and(|m| m & 0x38 != 0))
        {
            return None;
        }
        // The immediate, and what else follows the addressing bytes (register in imm8[7:4]).
        if offsets.has_immediate() {
            let start = offsets.immediate_offset();
            let len = instr.len() - start;
            raw.imm
                .get_mut(..len)?
                .copy_from_slice(bytes.get(start..start + len)?);
            raw.imm_len = len as u8;
        } else if raw.vex.is_some() && raw.map == 3 && instr.op_count() == 4 {
            // Fourth register operand in imm8[7:4].
            raw.imm[0] = *bytes.get(instr.len().checked_sub(1)?)?;
            raw.imm_len = 1;
        }
        if bits != 64 {
            raw.narrow(instr);
        }
        Some(raw)
    }

    /// Clears what code of 16 and 32 bits ignores in a VEX prefix, and 64-bit code would not: the extension of the
    /// ModRM operand, the top bits of the other register numbers, W where it chooses a general register's size.
    fn narrow(&mut self, instr: &Instruction) {
        let Some(vex) = &mut self.vex else { return };
        self.rex = 0;
        vex.vvvv &= 7;
        vex.w &= !instr.op_code().is_wig32();
        if self.map == 3
            && instr.op_count() >= 4
            && !matches!(instr.op3_kind(), iced_x86::OpKind::Immediate8)
        {
            self.imm[0] &= 0x7f;
        }
    }

    /// The immediate bytes.
    pub fn imm(&self) -> &[u8] {
        self.imm.get(..usize::from(self.imm_len)).unwrap_or(&[])
    }

    /// ModRM.reg with its extension.
    pub fn reg(&self) -> u8 {
        (self.modrm.unwrap_or(0) >> 3) & 7 | (self.rex & 4) << 1
    }

    /// ModRM.rm as a register, with its extension.
    pub fn rm(&self) -> u8 {
        self.modrm.unwrap_or(0) & 7 | (self.rex & 1) << 3
    }

    /// Replaces the opcode byte by one with a ModRM of the given reg field (`/digit`), keeping the rest.
    pub fn with_digit(mut self, opcode: u8, digit: u8) -> Raw {
        self.opcode = opcode;
        self.modrm = Some(0xc0 | digit << 3);
        self.rex &= 8;
        self.imm_len = 0;
        self
    }

    /// Sets the immediate to `imm`.
    pub fn with_imm(mut self, imm: &[u8]) -> Raw {
        self.imm_len = 0;
        for (to, from) in self.imm.iter_mut().zip(imm) {
            *to = *from;
            self.imm_len += 1;
        }
        self
    }
}

/// Where the ModRM operand of a rewritten instruction points.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RmOperand {
    /// A register (host number, or vector register number).
    Register(u8),
    /// `[base]`.
    Base(u8),
    /// `[base + displacement]`.
    BaseDisplacement(u8, i32),
    /// `[base + index]`.
    BaseIndex(u8, u8),
}

/// An instruction to be put together.
#[derive(Clone, Copy, Debug)]
pub struct Encode {
    /// The parts that stay.
    pub raw: Raw,
    /// Emit 66.
    pub p66: bool,
    /// ModRM.reg or the opcode register (host numbers; vector numbers where it is one).
    pub reg: u8,
    /// The ModRM operand; `None` if there is no ModRM.
    pub rm: Option<RmOperand>,
    /// The register in the opcode's low bits.
    pub opcode_reg: Option<u8>,
    /// VEX.vvvv.
    pub vvvv: u8,
    /// An 8-bit register 4..7 is used: REX must be present.
    pub force_rex: bool,
}

impl Encode {
    /// Appends the bytes.
    pub fn emit(&self, out: &mut Vec<u8>) {
        let (mut r, mut x, mut b) = (self.reg >> 3 & 1, 0, 0);
        let mut modrm = None;
        let mut sib = None;
        let mut disp8 = false;
        let mut disp = None;
        match self.rm {
            None => {}
            Some(RmOperand::Register(reg)) => {
                modrm = Some(0xc0 | (self.reg & 7) << 3 | reg & 7);
                b = reg >> 3;
            }
            Some(RmOperand::Base(base)) => {
                disp8 = base & 7 == 5;
                modrm = Some(u8::from(disp8) << 6 | (self.reg & 7) << 3 | base & 7);
                if base & 7 == 4 {
                    sib = Some(0x24);
                }
                b = base >> 3;
            }
            Some(RmOperand::BaseDisplacement(base, displacement)) => {
                let mode = match i8::try_from(displacement) {
                    Ok(_) => 0x40,
                    Err(_) => 0x80,
                };
                disp = Some(displacement);
                modrm = Some(mode | (self.reg & 7) << 3 | base & 7);
                if base & 7 == 4 {
                    sib = Some(0x24);
                }
                b = base >> 3;
            }
            Some(RmOperand::BaseIndex(base, index)) => {
                disp8 = base & 7 == 5;
                modrm = Some(u8::from(disp8) << 6 | (self.reg & 7) << 3 | 4);
                sib = Some((index & 7) << 3 | base & 7);
                b = base >> 3;
                x = index >> 3;
            }
        }
        let mut opcode = self.raw.opcode;
        if let Some(reg) = self.opcode_reg {
            opcode = opcode & 0xf8 | reg & 7;
            b = reg >> 3;
        }
        if self.rm.is_none() {
            r = 0;
        }
        if let Some(vex) = self.raw.vex {
            let short = self.raw.map == 1 && !vex.w && x == 0 && b == 0;
            let tail = (!self.vvvv & 15) << 3 | u8::from(vex.l) << 2 | vex.pp;
            if short {
                out.extend_from_slice(&[0xc5, (r ^ 1) << 7 | tail]);
            } else {
                let first = (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | self.raw.map;
                out.extend_from_slice(&[0xc4, first, u8::from(vex.w) << 7 | tail]);
            }
        } else {
            if self.p66 {
                out.push(0x66);
            }
            if self.raw.rep != 0 {
                out.push(self.raw.rep);
            }
            if self.raw.lock {
                out.push(0xf0);
            }
            let rex = 0x40 | self.raw.rex & 8 | r << 2 | x << 1 | b;
            if rex != 0x40 || self.force_rex {
                out.push(rex);
            }
            match self.raw.map {
                1 => out.push(0x0f),
                2 => out.extend_from_slice(&[0x0f, 0x38]),
                3 => out.extend_from_slice(&[0x0f, 0x3a]),
                _ => {}
            }
        }
        out.push(opcode);
        out.extend(modrm);
        out.extend(sib);
        if disp8 {
            out.push(0);
        }
        match disp.map(|disp| (i8::try_from(disp), disp)) {
            Some((Ok(short), _)) => out.push(short as u8),
            Some((Err(_), long)) => out.extend_from_slice(&long.to_le_bytes()),
            None => {}
        }
        out.extend_from_slice(self.raw.imm());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn round_trip(bytes: &[u8]) {
        let mut decoder = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE);
        let instr = decoder.decode();
        assert!(!instr.is_invalid(), "{bytes:02x?}");
        let offsets = decoder.get_constant_offsets(&instr);
        let raw = Raw::parse(&bytes[..instr.len()], 64, &instr, &offsets).unwrap();
        let rm = raw.modrm.map(|_| RmOperand::Register(raw.rm()));
        let encode = Encode {
            raw,
            p66: raw.p66,
            reg: raw.reg(),
            rm,
            opcode_reg: None,
            vvvv: raw.vex.map_or(0, |v| v.vvvv),
            force_rex: raw.has_rex,
        };
        let mut out = Vec::new();
        encode.emit(&mut out);
        let again = Decoder::with_ip(64, &out, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(
            instr.to_string(),
            again.to_string(),
            "{bytes:02x?} {out:02x?}"
        );
    }

    #[test]
    fn registers_forms_survive() {
        for bytes in [
            &[0x48, 0x01, 0xd8][..],                     // add rax,rbx
            &[0x44, 0x0f, 0xb6, 0xcf],                   // movzx r9d,dil
            &[0x66, 0x0f, 0x6f, 0xc1],                   // movdqa xmm0,xmm1
            &[0xf2, 0x48, 0x0f, 0x2a, 0xc0],             // cvtsi2sd xmm0,rax
            &[0xc4, 0xe2, 0xf1, 0xb8, 0xc2],             // vfmadd231pd xmm0,xmm1,xmm2
            &[0xc5, 0xfd, 0x6f, 0xc1],                   // vmovdqa ymm0,ymm1
            &[0xc4, 0xe3, 0x75, 0x4a, 0xc2, 0x30],       // vblendvps ymm0,ymm1,ymm2,ymm3
            &[0x49, 0x81, 0xc4, 0x10, 0x20, 0x30, 0x40], // add r12,0x40302010
            &[0x66, 0x0f, 0x3a, 0x0f, 0xc1, 0x08],       // palignr
            &[0xc4, 0xe2, 0xfb, 0xf5, 0xc2],             // pdep rax,rax,rdx
            &[0x40, 0x88, 0xfe],                         // mov sil,dil
            &[0x0f, 0xa4, 0xd8, 0x05],                   // shld eax,ebx,5
        ] {
            round_trip(bytes);
        }
    }
}
