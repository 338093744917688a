//! A small assembler for exactly the host instructions that emitted code is glued together with.
//!
//! None of them writes flags unless its name says so: guest flags live in the host's EFLAGS.

/// Host registers by number.
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
}

use reg::RSP;

/// A place in the code being assembled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Here(pub usize);

/// Code under construction, for one final address.
#[derive(Debug)]
pub struct Asm {
    /// The bytes so far.
    pub code: Vec<u8>,
    /// Where the first byte will run.
    pub base: u64,
}

impl Asm {
    /// Starts code that will run at `base`.
    pub fn new(base: u64) -> Self {
        Asm {
            code: Vec::with_capacity(1024),
            base,
        }
    }

    /// The same in memory that was used before.
    pub fn reuse(mut code: Vec<u8>, base: u64) -> Self {
        code.clear();
        Asm { code, base }
    }

    /// Appends a copy of what is there already.
    pub fn copy(&mut self, from: std::ops::Range<usize>) {
        if from.end <= self.code.len() {
            self.code.extend_from_within(from);
        }
    }

    /// The current place.
    pub fn here(&self) -> Here {
        Here(self.code.len())
    }

    /// The address of a place.
    pub fn address(&self, here: Here) -> u64 {
        self.base + here.0 as u64
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn rex_w(&mut self, r: u8, x: u8, b: u8) {
        self.code
            .push(0x48 | (r >> 3) << 2 | (x >> 3) << 1 | b >> 3);
    }

    fn rex_opt(&mut self, w: bool, r: u8, x: u8, b: u8) {
        let rex = 0x40 | u8::from(w) << 3 | (r >> 3) << 2 | (x >> 3) << 1 | b >> 3;
        if rex != 0x40 {
            self.code.push(rex);
        }
    }

    /// ModRM + SIB + disp32 for `[rsp + disp]`.
    fn ctx_operand(&mut self, reg: u8, disp: u32) {
        if disp < 128 {
            self.bytes(&[0x44 | (reg & 7) << 3, 0x24, disp as u8]);
        } else {
            self.bytes(&[0x84 | (reg & 7) << 3, 0x24]);
            self.bytes(&disp.to_le_bytes());
        }
    }

    /// `mov dst, [rsp + disp]`, 64 bits.
    pub fn load_ctx(&mut self, dst: u8, disp: u32) {
        self.rex_w(dst, 0, RSP);
        self.code.push(0x8b);
        self.ctx_operand(dst, disp);
    }

    /// `mov dst32, [rsp + disp]`.
    pub fn load_ctx_32(&mut self, dst: u8, disp: u32) {
        self.rex_opt(false, dst, 0, RSP);
        self.code.push(0x8b);
        self.ctx_operand(dst, disp);
    }

    /// `movzx dst32, word [rsp + disp]`.
    pub fn load_ctx_16(&mut self, dst: u8, disp: u32) {
        self.rex_opt(false, dst, 0, RSP);
        self.bytes(&[0x0f, 0xb7]);
        self.ctx_operand(dst, disp);
    }

    /// `mov [rsp + disp], src`, 64 bits.
    pub fn store_ctx(&mut self, disp: u32, src: u8) {
        self.rex_w(src, 0, RSP);
        self.code.push(0x89);
        self.ctx_operand(src, disp);
    }

    /// `mov qword [rsp + disp], imm` (sign-extended).
    pub fn store_ctx_imm(&mut self, disp: u32, imm: i32) {
        self.rex_w(0, 0, RSP);
        self.code.push(0xc7);
        self.ctx_operand(0, disp);
        self.bytes(&imm.to_le_bytes());
    }

    /// `mov dst, src`, 64 bits.
    pub fn mov(&mut self, dst: u8, src: u8) {
        if dst != src {
            self.rex_w(src, 0, dst);
            self.bytes(&[0x89, 0xc0 | (src & 7) << 3 | dst & 7]);
        }
    }

    /// `mov dst32, src32`.
    pub fn mov_32(&mut self, dst: u8, src: u8) {
        self.rex_opt(false, src, 0, dst);
        self.bytes(&[0x89, 0xc0 | (src & 7) << 3 | dst & 7]);
    }

    /// `mov dst16, src16`.
    pub fn mov_16(&mut self, dst: u8, src: u8) {
        self.code.push(0x66);
        self.mov_32(dst, src);
    }

    /// `mov dst8, src8`, both taken as low bytes.
    pub fn mov_8(&mut self, dst: u8, src: u8) {
        self.code.push(0x40 | (src >> 3) << 2 | dst >> 3);
        self.bytes(&[0x88, 0xc0 | (src & 7) << 3 | dst & 7]);
    }

    /// The shortest `mov dst, imm`.
    pub fn mov_imm(&mut self, dst: u8, imm: u64) {
        if imm <= u64::from(u32::MAX) {
            self.rex_opt(false, 0, 0, dst);
            self.code.push(0xb8 | dst & 7);
            self.bytes(&(imm as u32).to_le_bytes());
        } else if imm as i64 >= i64::from(i32::MIN) && (imm as i64) < 0 {
            self.rex_w(0, 0, dst);
            self.bytes(&[0xc7, 0xc0 | dst & 7]);
            self.bytes(&(imm as u32).to_le_bytes());
        } else {
            self.rex_w(0, 0, dst);
            self.code.push(0xb8 | dst & 7);
            self.bytes(&imm.to_le_bytes());
        }
    }

    /// `lea dst, [base + index*scale + disp]`; 32-bit address arithmetic if `narrow` (upper half cleared).
    pub fn lea(
        &mut self,
        dst: u8,
        base: Option<u8>,
        index: Option<(u8, u8)>,
        disp: i32,
        narrow: bool,
    ) {
        let x = index.map_or(0, |(index, _)| index);
        self.rex_opt(!narrow, dst, x, base.unwrap_or(0));
        self.code.push(0x8d);
        self.mem_operand(dst, base, index, disp);
    }

    /// ModRM, SIB and displacement. The index is never RSP.
    fn mem_operand(&mut self, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let reg = (reg & 7) << 3;
        let scale_index = index.map_or(0x20, |(index, scale)| {
            (scale.trailing_zeros() as u8) << 6 | (index & 7) << 3
        });
        let Some(base) = base else {
            self.bytes(&[reg | 4, scale_index | 5]);
            self.bytes(&disp.to_le_bytes());
            return;
        };
        let (mode, len) = if disp == 0 && base & 7 != 5 {
            (0, 0)
        } else if i8::try_from(disp).is_ok() {
            (0x40, 1)
        } else {
            (0x80, 4)
        };
        if index.is_some() || base & 7 == 4 {
            self.bytes(&[mode | reg | 4, scale_index | base & 7]);
        } else {
            self.code.push(mode | reg | base & 7);
        }
        match len {
            1 => self.code.push(disp as u8),
            4 => self.bytes(&disp.to_le_bytes()),
            _ => {}
        }
    }

    /// `mov dst, [base + index*scale + disp]`, 64 bits.
    pub fn load(&mut self, dst: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        self.rex_w(dst, index.map_or(0, |(i, _)| i), base);
        self.code.push(0x8b);
        self.mem_operand(dst, Some(base), index, disp);
    }

    /// `mov [base + disp], src`, 64 bits.
    pub fn store(&mut self, base: u8, disp: i32, src: u8) {
        self.rex_w(src, 0, base);
        self.code.push(0x89);
        self.mem_operand(src, Some(base), None, disp);
    }

    /// A load or store of `size` bytes (2, 4 or 8) at `[base + index]`; loads of 4 zero-extend, of 2 merge.
    pub fn move_sized(&mut self, store: bool, reg: u8, base: u8, index: u8, size: usize) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.rex_opt(size == 8, reg, index, base);
        self.code.push(if store { 0x89 } else { 0x8b });
        self.mem_operand(reg, Some(base), Some((index, 1)), 0);
    }

    /// `movsx dst, src16` / `movsxd dst, src32` / `mov`.
    pub fn sign_extend(&mut self, dst: u8, src: u8, size: usize) {
        match size {
            2 => {
                self.rex_w(dst, 0, src);
                self.bytes(&[0x0f, 0xbf, 0xc0 | (dst & 7) << 3 | src & 7]);
            }
            4 => {
                self.rex_w(dst, 0, src);
                self.bytes(&[0x63, 0xc0 | (dst & 7) << 3 | src & 7]);
            }
            _ => self.mov(dst, src),
        }
    }

    /// `movzx dst32, src8` where `src8` 4..7 means AH..BH (no REX) if `high`.
    pub fn movzx_8_high(&mut self, dst: u8, high: u8) {
        debug_assert!(dst < 8);
        self.bytes(&[0x0f, 0xb6, 0xc0 | dst << 3 | high]);
    }

    /// `mov high8, low8` without REX: AH..BH (4..7) from AL, CL, DL or BL.
    pub fn mov_high(&mut self, high: u8, low: u8) {
        debug_assert!(low < 4);
        self.bytes(&[0x88, 0xc0 | low << 3 | high]);
    }

    /// `xchg a, b`, 64 bits.
    pub fn xchg(&mut self, a: u8, b: u8) {
        self.rex_w(b, 0, a);
        self.bytes(&[0x87, 0xc0 | (b & 7) << 3 | a & 7]);
    }

    /// `pext dst, src, [rsp + mask]` (BMI2).
    pub fn pext_ctx(&mut self, dst: u8, src: u8, mask: u32) {
        let r = if dst < 8 { 0x80 } else { 0 };
        self.bytes(&[0xc4, r | 0x62, 0x80 | (!src & 15) << 3 | 2, 0xf5]);
        self.ctx_operand(dst, mask);
    }

    /// `rorx dst, src, count` (BMI2), 64 bits.
    pub fn rotate_right(&mut self, dst: u8, src: u8, count: u8) {
        let first = (u8::from(dst < 8) << 7) | 0x40 | (u8::from(src < 8) << 5) | 3;
        self.bytes(&[
            0xc4,
            first,
            0xfb,
            0xf0,
            0xc0 | (dst & 7) << 3 | src & 7,
            count,
        ]);
    }

    /// `sarx`/`shlx`/`shrx dst, src, count` (BMI2), 64 bits; `pp` 1 shlx, 2 sarx, 3 shrx.
    pub fn shift_x(&mut self, pp: u8, dst: u8, src: u8, count: u8) {
        let first = (u8::from(dst < 8) << 7) | 0x40 | (u8::from(src < 8) << 5) | 2;
        self.bytes(&[
            0xc4,
            first,
            0x80 | (!count & 15) << 3 | pp,
            0xf7,
            0xc0 | (dst & 7) << 3 | src & 7,
        ]);
    }

    /// `jrcxz` over what `body` emits, which must be short.
    pub fn unless_rcx_zero(&mut self, body: impl FnOnce(&mut Asm)) {
        self.bytes(&[0xe3, 0]);
        let start = self.code.len();
        body(self);
        let len = self.code.len() - start;
        debug_assert!(len < 128);
        if let Some(byte) = self.code.get_mut(start - 1) {
            *byte = len as u8;
        }
    }

    /// `jmp` to a place not known yet; returns the place of its rel32.
    pub fn jmp_later(&mut self) -> Here {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        Here(self.code.len() - 4)
    }

    /// `jcc` (condition 0..15) to a place not known yet.
    pub fn jcc_later(&mut self, condition: u8) -> Here {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Here(self.code.len() - 4)
    }

    /// Points the rel32 at `at` to the current place.
    pub fn patch_here(&mut self, at: Here) {
        let target = self.here();
        self.patch(at, target);
    }

    /// Points the rel32 at `at` to `target`.
    pub fn patch(&mut self, at: Here, target: Here) {
        let rel = target.0 as i64 - (at.0 as i64 + 4);
        if let Some(bytes) = self.code.get_mut(at.0..at.0 + 4) {
            bytes.copy_from_slice(&(rel as i32).to_le_bytes());
        }
    }

    /// `jmp` back to a known place.
    pub fn jmp(&mut self, target: Here) {
        let at = self.jmp_later();
        self.patch(at, target);
    }

    /// `jmp` to an absolute address within ±2 GiB.
    pub fn jmp_to(&mut self, address: u64) {
        self.code.push(0xe9);
        self.rel32(address);
    }

    /// `call` of an absolute address within ±2 GiB.
    pub fn call_to(&mut self, address: u64) {
        self.code.push(0xe8);
        self.rel32(address);
    }

    fn rel32(&mut self, address: u64) {
        let next = self.base + self.code.len() as u64 + 4;
        let rel = address.wrapping_sub(next) as i64 as i32;
        self.bytes(&rel.to_le_bytes());
    }

    /// `jmp [rsp + disp]`.
    pub fn jmp_ctx(&mut self, disp: u32) {
        self.code.push(0xff);
        self.ctx_operand(4, disp);
    }

    /// `jmp [rsp + index*8 + disp]`.
    pub fn jmp_ctx_indexed(&mut self, index: u8, disp: u32) {
        self.rex_opt(false, 0, index, RSP);
        self.code.push(0xff);
        self.mem_operand(4, Some(RSP), Some((index, 8)), disp as i32);
    }

    /// `push qword [rsp + disp]` (the address is computed before the push).
    pub fn push_ctx(&mut self, disp: u32) {
        self.code.push(0xff);
        self.ctx_operand(6, disp);
    }

    /// `pop qword [rsp + disp]` (the address is computed after the pop).
    pub fn pop_ctx(&mut self, disp: u32) {
        self.code.push(0x8f);
        self.ctx_operand(0, disp);
    }
}
