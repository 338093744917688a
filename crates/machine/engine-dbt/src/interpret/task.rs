//! Hardware task switches of 32-bit protected mode (Intel SDM vol. 3, chapter 8): far jumps and calls to a TSS or task
//! gate, events through task gates, IRET with NT.
//!
//! Faults before the switch leave the old task as it was; those of loading the new task's segments are raised in it.
//! Limitation: the T bit of a TSS raises no debug exception.

use strata_engine::x86::Segment;

use super::operand::{CS, SS};
use super::segment::{Descriptor, invalid_tss, not_present, null_segment, selector_error, system};
use crate::cpu::{control, flags};
use crate::env::{Access, Exec, Fault};

/// Why the task changes, as far as the busy bits, NT and the link to the old task differ.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Switch {
    /// JMP.
    Jump,
    /// CALL, interrupts and exceptions: the new task is nested.
    Nest,
    /// IRET.
    Return,
}

/// Where a TSS has what.
struct Layout {
    /// Bytes of a field.
    size: usize,
    /// CR3; 16-bit tasks have none.
    cr3: Option<u64>,
    /// Instruction pointer; flags and the eight general registers follow.
    ip: u64,
    /// ES, CS, SS, DS, and FS and GS in 32-bit tasks; then LDTR.
    segments: u64,
    count: usize,
    /// The smallest limit.
    limit: u32,
}

const TSS_32: Layout = Layout {
    size: 4,
    cr3: Some(28),
    ip: 32,
    segments: 72,
    count: 6,
    limit: 0x67,
};
const TSS_16: Layout = Layout {
    size: 2,
    cr3: None,
    ip: 14,
    segments: 34,
    count: 4,
    limit: 0x2b,
};

fn layout(attributes: u16) -> &'static Layout {
    if attributes & 8 != 0 {
        &TSS_32
    } else {
        &TSS_16
    }
}

impl Layout {
    fn field(&self, start: u64, index: usize) -> u64 {
        start + (index * self.size) as u64
    }
}

/// Faults of the new task's segments are #TS where a load would raise #GP.
fn as_task_fault(fault: Fault) -> Fault {
    if fault.vector == 13 {
        Fault {
            vector: 10,
            ..fault
        }
    } else {
        fault
    }
}

impl Exec<'_> {
    /// True if a descriptor leads to another task: an available TSS or a task gate.
    pub fn names_task(&self, descriptor: &Descriptor) -> bool {
        descriptor.is_system()
            && !self.cpu.long_mode()
            && matches!(
                descriptor.kind(),
                system::TASK_GATE | system::TSS | system::TSS_16
            )
    }

    /// A far jump or call to a TSS or through a task gate.
    pub fn branch_to_task(
        &mut self,
        descriptor: &Descriptor,
        selector: u16,
        call: bool,
        next_rip: u64,
    ) -> Result<(), Fault> {
        let error = selector_error(selector);
        if descriptor.dpl() < self.cpu.cpl().max((selector & 3) as u8) {
            return Err(Fault::protection(error));
        }
        if !descriptor.present() {
            return Err(not_present(error));
        }
        let gate = descriptor.kind() == system::TASK_GATE;
        let target = if gate {
            descriptor.gate_target().0
        } else {
            selector
        };
        let flags = self.cpu.rflags();
        self.switch_task(
            target,
            if call { Switch::Nest } else { Switch::Jump },
            next_rip,
            flags,
            0,
        )
    }

    /// IRET from a nested task.
    pub fn return_to_task(&mut self, next_rip: u64) -> Result<(), Fault> {
        let error = selector_error(self.cpu.tr.selector);
        let link = self.tss_word(0, 2, error)? as u16;
        let flags = self.cpu.rflags() & !flags::NT;
        self.switch_task(link, Switch::Return, next_rip, flags, 0)
    }

    /// Leaves the current task at `rip` with `image` as its flags and goes on in the one that `selector` names. `ext`
    /// is bit 0 of error codes.
    pub fn switch_task(
        &mut self,
        selector: u16,
        why: Switch,
        rip: u64,
        image: u64,
        ext: u32,
    ) -> Result<(), Fault> {
        let error = selector_error(selector) | ext;
        let refuse: fn(u32) -> Fault = if why == Switch::Return {
            invalid_tss
        } else {
            Fault::protection
        };
        if selector & 4 != 0 || selector_error(selector) == 0 {
            return Err(refuse(error));
        }
        let mut tss = self.descriptor(selector, refuse)?;
        let busy = if why == Switch::Return {
            system::BUSY
        } else {
            0
        };
        if !tss.is_system() || !matches!(tss.kind() ^ busy, system::TSS | system::TSS_16) {
            return Err(refuse(error));
        }
        if !tss.present() {
            return Err(not_present(error));
        }
        let new = layout(tss.attributes());
        if tss.limit() < new.limit {
            return Err(invalid_tss(error));
        }

        // All that is read of the new task, and whether the old one can be written: nothing has changed so far.
        let base = tss.base();
        let cr3 = new.cr3.map(|at| self.task_field(base, at, 4)).transpose()?;
        let mut registers = [0; 10];
        for (i, register) in registers.iter_mut().enumerate() {
            *register = self.task_field(base, new.field(new.ip, i), new.size)?;
        }
        let mut selectors = [0u16; 6];
        for (i, selector) in selectors.iter_mut().enumerate().take(new.count) {
            *selector = self.task_field(base, new.field(new.segments, i), new.size)? as u16;
        }
        let ldt = self.task_field(base, new.field(new.segments, new.count), 2)? as u16;
        let old_task = self.cpu.tr;
        let old = layout(old_task.attributes);
        for at in [old.ip, old.field(old.segments, old.count) - 1] {
            let linear = self.table_address(old_task.base, at);
            self.translate(linear, Access::Write, false)?;
        }

        let [ip, new_flags, general @ ..] = registers;
        self.save_task(old, rip, image)?;
        if why != Switch::Nest {
            let mut descriptor = self.descriptor(old_task.selector, refuse)?;
            self.clear_busy(&mut descriptor)?;
        }
        if why == Switch::Nest {
            let linear = self.table_address(base, 0);
            self.store_system(linear, &old_task.selector.to_le_bytes())?;
        }
        self.mark_type(&mut tss, system::BUSY as u8)?;
        self.cpu.tr = tss.segment(selector);
        self.cpu.cr0 |= control::CR0_TS;
        if let Some(cr3) = cr3.filter(|_| self.cpu.cr0 & control::CR0_PG != 0) {
            self.cpu.cr3 = cr3;
            self.cpu.flush_tlb(false);
        }
        self.cpu.rip = ip;
        let nested = if why == Switch::Nest { flags::NT } else { 0 };
        self.cpu
            .set_rflags(new_flags & (flags::ARITH | flags::SYSTEM | flags::IF) | nested);
        for (register, value) in self.cpu.gpr.iter_mut().zip(general) {
            *register = value;
        }
        // The old task's local breakpoints are not the new one's.
        self.cpu.dr7 &= !0x55;
        self.cpu.debug.entered = true;
        self.load_task_segments(selectors, ldt)
            .map_err(as_task_fault)
    }

    fn task_field(&mut self, base: u64, at: u64, size: usize) -> Result<u64, Fault> {
        let linear = self.table_address(base, at);
        let mut bytes = [0; 8];
        self.load_system(linear, bytes.get_mut(..size).unwrap_or(&mut []))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set_task_field(&mut self, at: u64, value: u64, size: usize) -> Result<(), Fault> {
        let linear = self.table_address(self.cpu.tr.base, at);
        self.store_system(linear, value.to_le_bytes().get(..size).unwrap_or(&[]))
    }

    /// Writes the registers to the current task's TSS.
    fn save_task(&mut self, old: &Layout, rip: u64, image: u64) -> Result<(), Fault> {
        let [ax, cx, dx, bx, sp, bp, si, di, ..] = self.cpu.gpr;
        for (i, value) in [rip, image, ax, cx, dx, bx, sp, bp, si, di]
            .into_iter()
            .enumerate()
        {
            self.set_task_field(old.field(old.ip, i), value, old.size)?;
        }
        for (i, segment) in self.cpu.segments.into_iter().enumerate().take(old.count) {
            self.set_task_field(old.field(old.segments, i), segment.selector.into(), 2)?;
        }
        Ok(())
    }

    fn clear_busy(&mut self, descriptor: &mut Descriptor) -> Result<(), Fault> {
        descriptor.raw &= !(u64::from(system::BUSY) << 40);
        self.store_system(
            descriptor.address.wrapping_add(5),
            &[(descriptor.raw >> 40) as u8],
        )
    }

    /// Loads LDTR and the segment registers of a task that has begun.
    fn load_task_segments(&mut self, selectors: [u16; 6], ldt: u16) -> Result<(), Fault> {
        let v8086 = self.cpu.system_flags & flags::VM != 0;
        for (index, selector) in selectors.into_iter().enumerate() {
            let base = u64::from(selector) << 4;
            let segment = match v8086 {
                true => Segment {
                    selector,
                    base,
                    limit: 0xffff,
                    attributes: 0xf3,
                },
                // Not usable until it is loaded, but CS says which privilege decides about the others.
                false => null_segment(selector),
            };
            self.cpu.set_segment(index, segment);
        }
        self.cpu.ldtr = null_segment(ldt);
        let error = selector_error(ldt);
        if error != 0 {
            if ldt & 4 != 0 {
                return Err(invalid_tss(error));
            }
            let table = self.descriptor(ldt, invalid_tss)?;
            if !table.is_system() || table.kind() != system::LDT || !table.present() {
                return Err(invalid_tss(error));
            }
            self.cpu.ldtr = table.segment(ldt);
        }
        if v8086 {
            return Ok(());
        }
        let [_, cs, ss, ..] = selectors;
        let (error, cpl) = (selector_error(cs), (cs & 3) as u8);
        if error == 0 {
            return Err(invalid_tss(0));
        }
        let mut code = self.descriptor(cs, invalid_tss)?;
        let privilege = if code.is_conforming() {
            code.dpl() <= cpl
        } else {
            code.dpl() == cpl
        };
        if !code.is_code() || !privilege {
            return Err(invalid_tss(error));
        }
        if !code.present() {
            return Err(not_present(error));
        }
        self.mark_accessed(&mut code)?;
        self.set_code_segment(&code, cs, cpl);
        let stack = self.fetch_stack_segment(ss, cpl, false, invalid_tss)?;
        self.cpu.set_segment(SS, stack);
        for (index, selector) in selectors.into_iter().enumerate() {
            if index != CS && index != SS {
                self.load_segment(index, selector)?;
            }
        }
        Ok(())
    }
}
