//! Control and debug registers, and the instructions on caches and TLBs (Intel SDM vol. 3, chapters 2 and 18).

use iced_x86::{Instruction, OpKind, Register};

use super::Flow;
use super::operand::CS;
use crate::cpu::{control as cr, flags};
use crate::env::{Access, Exec, Fault};

const CR0_WRITABLE: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR6_BD: u64 = 1 << 13;
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_2bff;
const DR7_GD: u64 = 1 << 13;

impl Exec<'_> {
    /// MOV to and from control, debug and segment registers.
    pub(super) fn move_special(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let (to, from) = (instr.op0_register(), instr.op1_register());
        if instr.op0_kind() == OpKind::Register && to.is_segment_register() {
            return self.move_to_segment(instr);
        }
        if instr.op1_kind() == OpKind::Register && from.is_segment_register() {
            return self.move_from_segment(instr);
        }
        self.privileged()?;
        if from.is_cr() {
            let value = self.read_cr(from)?;
            self.set_named(to, value);
        } else if to.is_cr() {
            let value = self.named(from);
            self.write_cr(to, value)?;
        } else if from.is_dr() {
            let index = self.debug_index(from)?;
            let value = match index {
                6 => self.cpu.dr6,
                7 => self.cpu.dr7,
                _ => self.cpu.dr.get(index).copied().unwrap_or(0),
            };
            self.set_named(to, value);
        } else if to.is_dr() {
            let index = self.debug_index(to)?;
            self.write_dr(index, self.named(from))?;
        } else {
            return Err(Fault::UNDEFINED);
        }
        Ok(Flow::Next)
    }

    fn read_cr(&self, register: Register) -> Result<u64, Fault> {
        match register {
            Register::CR0 => Ok(self.cpu.cr0),
            Register::CR2 => Ok(self.cpu.cr2),
            Register::CR3 => Ok(self.cpu.cr3),
            Register::CR4 => Ok(self.cpu.cr4),
            Register::CR8 => Ok(self.env.apic.cr8()),
            _ => Err(Fault::UNDEFINED),
        }
    }

    fn write_cr(&mut self, register: Register, value: u64) -> Result<(), Fault> {
        match register {
            Register::CR0 => self.write_cr0(value),
            Register::CR2 => {
                self.cpu.cr2 = value;
                Ok(())
            }
            Register::CR3 => {
                let reserved = !((1 << self.env.model.address_bits()) - 1);
                if self.cpu.long_mode() && value & reserved != 0 {
                    return Err(Fault::protection(0));
                }
                self.cpu.cr3 = value;
                self.cpu.flush_tlb(false);
                Ok(())
            }
            Register::CR4 => self.write_cr4(value),
            Register::CR8 if value < 16 => {
                self.env.apic.set_cr8(value);
                Ok(())
            }
            Register::CR8 => Err(Fault::protection(0)),
            _ => Err(Fault::UNDEFINED),
        }
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Fault> {
        let old = self.cpu.cr0;
        let paging = value & cr::CR0_PG != 0;
        if value >> 32 != 0
            || (paging && value & cr::CR0_PE == 0)
            || (value & cr::CR0_NW != 0 && value & cr::CR0_CD == 0)
        {
            return Err(Fault::protection(0));
        }
        let value = value & CR0_WRITABLE | cr::CR0_ET;
        let cs_long = self.cpu.segments[CS].long();
        if paging && old & cr::CR0_PG == 0 && self.cpu.efer & cr::EFER_LME != 0 {
            // Into long mode (SDM vol. 3, 10.8.5): PAE, not from a 64-bit segment, not with a 16-bit TSS.
            let tss_16 = self.cpu.tr.attributes & 0x1f < 8;
            if self.cpu.cr4 & cr::CR4_PAE == 0 || cs_long || (tss_16 && !self.cpu.tr.null()) {
                return Err(Fault::protection(0));
            }
            self.cpu.efer |= cr::EFER_LMA;
        } else if !paging && old & cr::CR0_PG != 0 {
            if self.cpu.code_64() {
                return Err(Fault::protection(0));
            }
            self.cpu.efer &= !cr::EFER_LMA;
        }
        self.cpu.cr0 = value;
        if (old ^ value) & (cr::CR0_PG | cr::CR0_PE | cr::CR0_WP) != 0 {
            self.cpu.flush_tlb(true);
        }
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Fault> {
        let old = self.cpu.cr4;
        let leaves_long_mode = self.cpu.long_mode() && value & cr::CR4_PAE == 0;
        if value & !self.env.model.cr4_mask() != 0 || leaves_long_mode {
            return Err(Fault::protection(0));
        }
        self.cpu.cr4 = value;
        if (old ^ value) & (cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE | cr::CR4_SMEP | cr::CR4_SMAP)
            != 0
        {
            self.cpu.flush_tlb(true);
        }
        Ok(())
    }

    /// Which debug register is meant. DR4 and DR5 are DR6 and DR7 unless CR4.DE is set.
    fn debug_index(&mut self, register: Register) -> Result<usize, Fault> {
        let number = register.number();
        if number > 7 || (matches!(number, 4 | 5) && self.cpu.cr4 & cr::CR4_DE != 0) {
            return Err(Fault::UNDEFINED);
        }
        if self.cpu.dr7 & DR7_GD != 0 {
            self.cpu.dr6 |= DR6_BD;
            return Err(Fault::plain(1));
        }
        Ok(if matches!(number, 4 | 5) {
            number + 2
        } else {
            number
        })
    }

    fn write_dr(&mut self, index: usize, value: u64) -> Result<(), Fault> {
        if index >= 6 && value >> 32 != 0 {
            return Err(Fault::protection(0));
        }
        match index {
            6 => self.cpu.dr6 = value & DR6_WRITABLE | DR6_FIXED,
            7 => self.cpu.dr7 = value & DR7_WRITABLE | DR7_FIXED,
            _ => {
                if let Some(slot) = self.cpu.dr.get_mut(index) {
                    *slot = value;
                }
            }
        }
        Ok(())
    }

    pub(super) fn clts(&mut self) -> Result<Flow, Fault> {
        self.privileged()?;
        self.cpu.cr0 &= !cr::CR0_TS;
        Ok(Flow::Next)
    }

    /// LMSW can set PE but not clear it, and reaches MP, EM and TS besides.
    pub(super) fn lmsw(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.privileged()?;
        let value = self.read_operand(instr, 0)?;
        let kept = self.cpu.cr0 & !0xe;
        self.write_cr0(kept | value & 0xf)?;
        Ok(Flow::Next)
    }

    pub(super) fn smsw(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.check_umip()?;
        let value = self.cpu.cr0;
        self.write_operand(instr, 0, value)?;
        Ok(Flow::Next)
    }

    /// CR4.UMIP keeps user code from reading system registers.
    pub(super) fn check_umip(&self) -> Result<(), Fault> {
        if self.cpu.cr4 & cr::CR4_UMIP != 0 && self.cpu.cpl() > 0 {
            Err(Fault::protection(0))
        } else {
            Ok(())
        }
    }

    pub(super) fn invlpg(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        self.privileged()?;
        let offset = self.offset(instr, 0, 0);
        let segment = self.segment_of(instr, 0);
        let base = if self.cpu.code_64() && segment < 4 {
            0
        } else {
            self.cpu.segments.get(segment).map_or(0, |s| s.base)
        };
        let linear = base.wrapping_add(offset)
            & if self.cpu.code_64() {
                u64::MAX
            } else {
                0xffff_ffff
            };
        // An address that is not canonical is a no-op, not a fault.
        self.cpu.flush_page(linear);
        Ok(Flow::Next)
    }

    /// CLFLUSH and its kin: faults like a load of one byte, and nothing else.
    pub(super) fn flush_line(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let linear = self.address(instr, 0, 1, Access::Read)?;
        self.probe(linear, 1, Access::Read)?;
        Ok(Flow::Next)
    }

    pub(super) fn hlt(&mut self) -> Result<Flow, Fault> {
        self.privileged()?;
        Ok(Flow::Halt)
    }

    pub(super) fn direction(&mut self, down: bool) -> Result<Flow, Fault> {
        self.cpu.system_flags =
            self.cpu.system_flags & !flags::DF | if down { flags::DF } else { 0 };
        Ok(Flow::Next)
    }
}
