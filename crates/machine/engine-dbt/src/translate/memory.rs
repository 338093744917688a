//! Memory operands: the address, the inlined soft-TLB check, the slow path.

use iced_x86::{Instruction, Mnemonic, Register};

use super::block::{Builder, Cold, Copied};
use super::operand::host_register;
use crate::asm::Here;
use crate::asm::reg::{R10, R11, RCX, RSP};
use crate::code::{FaultPoint, MemSite};
use crate::cpu::off;
use crate::mmu::OperandAccess;
use crate::table::{alignment, waits_for_x87};

/// Number of a segment register as in `Cpu::segments`.
pub(super) fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

impl Builder<'_> {
    /// True if a bad address of the memory operand raises #SS instead of #GP. In 64-bit code overrides of anything but
    /// FS and GS mean nothing, and the base register alone decides.
    pub fn stack_segment(&self, instr: &Instruction) -> bool {
        let segment = instr.memory_segment();
        if self.mode.bits() != 64 {
            return segment == Register::SS;
        }
        !matches!(segment, Register::FS | Register::GS)
            && matches!(
                instr.memory_base().full_register(),
                Register::RSP | Register::RBP
            )
    }

    /// Computes the effective address of the memory operand into R10, without segment base. Clobbers R11.
    /// `adjust` is added to RSP-based addresses (POP computes its address after the increment).
    pub fn effective_address(&mut self, instr: &Instruction, adjust: i32) {
        self.address_into(instr, adjust, R10, R11);
        let wide = instr.memory_base().size().max(instr.memory_index().size());
        if wide == 2 {
            self.truncate_address();
        }
    }

    /// The same into `to`, with another scratch register; addresses of 16 bits are not cut off yet.
    pub fn address_into(&mut self, instr: &Instruction, adjust: i32, to: u8, scratch: u8) {
        let base = instr.memory_base();
        let index = instr.memory_index();
        if instr.is_ip_rel_memory_operand() {
            let address = instr.ip_rel_memory_address();
            self.asm.mov_imm(to, address);
            return;
        }
        let displacement = instr.memory_displacement64();
        if base == Register::None && index == Register::None {
            self.asm.mov_imm(to, displacement);
            return;
        }
        let size = if base == Register::None {
            index.size()
        } else {
            base.size()
        };
        let rsp_based = base.full_register() == Register::RSP;
        let disp = (displacement as i32).wrapping_add(if rsp_based { adjust } else { 0 });
        let base = (base != Register::None).then(|| self.address_register(base, to));
        let index = (index != Register::None).then(|| {
            (
                self.address_register(index, scratch),
                instr.memory_index_scale() as u8,
            )
        });
        self.asm.lea(to, base, index, disp, size < 8);
    }

    /// Makes the address in R10 one of 16 bits.
    pub fn truncate_address(&mut self) {
        // movzx r10d, r10w
        self.asm.bytes(&[0x45, 0x0f, 0xb7, 0xd2]);
    }

    /// Host register that holds an address register, loaded into `scratch` if it lives in the context.
    pub(super) fn address_register(&mut self, register: Register, scratch: u8) -> u8 {
        let number = register.full_register().number() as u8;
        host_register(number).unwrap_or_else(|| {
            self.asm.load_ctx(scratch, off::gpr(number));
            scratch
        })
    }

    /// Adds the base of segment `seg` to R10 where it is not zero by definition. Clobbers R11.
    pub fn add_segment(&mut self, seg: usize) {
        let wide = self.mode.bits() == 64;
        let needed = if wide {
            seg >= 4
        } else {
            seg >= 4 || self.mode.segmented() || seg == 1
        };
        if needed {
            self.asm.load_ctx(R11, off::seg_base(seg));
            self.asm.lea(R10, Some(R10), Some((R11, 1)), 0, !wide);
        }
    }

    /// Computes the linear address of the memory operand into R10.
    pub fn linear_address(&mut self, instr: &Instruction, adjust: i32) {
        self.effective_address(instr, adjust);
        self.add_segment(segment_number(instr.memory_segment()));
    }

    /// Emits an access at linear address R10 of `size` bytes: the check, then `op`, which finds its operand at
    /// `[R10 + R11]` and may use RCX. `op` must not depend on where it is placed; a store runs a second copy of it
    /// in the slow path. It returns the offset, from its start, of a host instruction that may fault by itself.
    pub fn access(
        &mut self,
        instr: &Instruction,
        access: OperandAccess,
        size: usize,
        stack: bool,
        op: impl FnOnce(&mut Self) -> Option<FaultPoint>,
    ) {
        let segment = if stack {
            2
        } else {
            segment_number(instr.memory_segment())
        };
        let site = self.code.add_mem_site(MemSite {
            rip: instr.ip(),
            size: size as u16,
            access,
            segment: segment as u8,
            stack,
            align: alignment(instr),
            x87: waits_for_x87(instr),
            masked: self.masked.take(),
            group: None,
            locked: instr.has_lock_prefix() || instr.mnemonic() == Mnemonic::Xchg,
            index: self.index,
            next: self.after_store,
        });
        let store = access != OperandAccess::Read;
        let traced = store && self.options.trace;
        if traced {
            self.asm.store_ctx(off::temp(7), R10);
        }
        if self.options.reference || self.mode.slow(segment) {
            self.asm.mov_imm(RCX, u64::from(site));
            self.asm.call_to(self.stubs.slow);
            op(self);
            if store {
                self.commit(site);
            }
            if traced {
                self.trace_store(site);
            }
            return;
        }
        let from = self.check(size, store);
        let start = self.asm.here();
        let point = op(self);
        let end = self.asm.here();
        let copy = store.then(|| {
            (
                start.0..end.0,
                point.map(|point| (point.offset as usize - start.0, point)),
            )
        });
        let back = if store { end } else { start };
        self.cold.push(Cold::Slow {
            from,
            site,
            back,
            op: copy,
        });
        if traced {
            self.trace_store(site);
        }
    }

    /// Looks `size` bytes at linear address R10 up in the soft TLB: R11 is the delta to their host address after it.
    /// Returns the rel32 of the jump that is taken where they are not in it. Clobbers RCX.
    pub(super) fn check(&mut self, size: usize, store: bool) -> Here {
        let privilege = self.privilege();
        let tag = if store {
            off::tlb_write(privilege)
        } else {
            off::tlb_read(privilege)
        };
        self.asm.pext_ctx(R11, R10, off::TLB_MASK);
        self.asm.load(RCX, RSP, Some((R11, 8)), tag as i32);
        self.asm
            .lea(RCX, Some(RCX), Some((R10, 1)), size as i32 - 1, false);
        self.asm.pext_ctx(RCX, RCX, off::PAGE_MASK);
        let mut from = self.asm.here();
        self.asm.unless_rcx_zero(|asm| from = asm.jmp_later());
        self.asm
            .load(R11, RSP, Some((R11, 8)), off::tlb_delta(privilege) as i32);
        from
    }

    /// Tells the tracer of the store just made; its linear address is in scratch word 7.
    fn trace_store(&mut self, site: u32) {
        self.asm.mov_imm(RCX, u64::from(site));
        self.asm.call_to(self.stubs.stored);
    }

    /// After a store that may have gone to the bounce buffer: writes it back.
    fn commit(&mut self, site: u32) {
        let commit = self.stubs.commit;
        self.asm.load_ctx(RCX, off::temp(2));
        self.asm.unless_rcx_zero(|asm| {
            asm.mov_imm(RCX, u64::from(site));
            asm.call_to(commit);
        });
    }

    /// The slow path of one operand.
    pub(super) fn emit_slow(&mut self, from: Here, site: u32, back: Here, op: Option<Copied>) {
        self.asm.patch_here(from);
        self.asm.mov_imm(RCX, u64::from(site));
        self.asm.call_to(self.stubs.slow);
        if let Some((bytes, point)) = op {
            if let Some((offset, point)) = point {
                let at = self.asm.here().0 + offset;
                self.points.push(FaultPoint {
                    offset: at as u32,
                    ..point
                });
            }
            self.asm.copy(bytes);
            self.commit(site);
        }
        self.asm.jmp(back);
    }
}
