//! Delivery of exceptions and interrupts through the IDT or the real-mode vector table, double and triple faults
//! (Intel SDM vol. 3, chapter 6).

use iced_x86::{Instruction, Mnemonic};

use super::far::NewStack;
use super::operand::{CS, SS, Stack};
use super::segment::{Descriptor, not_present, selector_error, system};
use super::task::Switch;
use super::{Flow, Next};
use crate::cpu::{control, flags};
use crate::env::{Exec, Fault};

/// Where an event comes from, as far as its delivery differs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The interrupt controller, or an NMI.
    External,
    /// A fault or abort: RF is set in the saved flags, RIP names the instruction.
    Fault,
    /// A trap after the instruction, such as single-stepping.
    Trap,
    /// INT n: the gate's privilege counts.
    Software,
    /// INT3, INTO: like [`Origin::Software`], but errors on the way are the exception's own.
    SoftwareException,
    /// INT1: privilege does not count.
    PrivilegedSoftware,
}

/// An interrupt or exception to be delivered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// The vector.
    pub vector: u8,
    /// The error code to push.
    pub error: Option<u32>,
    /// Where it comes from.
    pub origin: Origin,
    /// The RIP to push.
    pub rip: u64,
}

impl Event {
    fn checks_privilege(&self) -> bool {
        matches!(self.origin, Origin::Software | Origin::SoftwareException)
    }

    /// Bit 0 of error codes that arise on the way: the cause lies outside of the program.
    fn ext(&self) -> u32 {
        u32::from(!matches!(self.origin, Origin::Software))
    }
}

const NMI: u8 = 2;
const DOUBLE_FAULT: u8 = 8;
const PAGE_FAULT: u8 = 14;
const DR7_GD: u64 = 1 << 13;

fn is_contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}

/// True if `second`, raised while `first` was delivered, makes a double fault (SDM vol. 3, table 6-5).
fn doubles(first: u8, second: u8) -> bool {
    match first {
        PAGE_FAULT => is_contributory(second) || second == PAGE_FAULT,
        _ => is_contributory(first) && is_contributory(second),
    }
}

impl Exec<'_> {
    /// Raises an exception of the instruction at RIP.
    pub fn raise(&mut self, fault: Fault) -> Next {
        self.raise_as(fault, Origin::Fault)
    }

    /// Raises a trap: RIP is already that of the next instruction.
    pub fn raise_trap(&mut self, vector: u8) -> Next {
        self.raise_as(Fault::plain(vector), Origin::Trap)
    }

    /// Delivers an interrupt or NMI that was accepted before the instruction at RIP.
    pub fn inject(&mut self, vector: u8, nmi: bool) -> Next {
        self.cpu.halted = false;
        let rip = self.cpu.rip;
        if nmi {
            self.cpu.nmi_blocked = true;
        }
        let vector = if nmi { NMI } else { vector };
        match self.deliver(Event {
            vector,
            error: None,
            origin: Origin::External,
            rip,
        }) {
            Ok(()) => Next::Continue,
            Err(fault) => self.raise(fault),
        }
    }

    fn raise_as(&mut self, fault: Fault, origin: Origin) -> Next {
        let (mut current, mut origin) = (fault, origin);
        loop {
            if current.vector == PAGE_FAULT {
                self.cpu.cr2 = current.cr2;
            }
            if current.vector == 1 {
                self.cpu.dr7 &= !DR7_GD;
            }
            let event = Event {
                vector: current.vector,
                error: current.error,
                origin,
                rip: self.cpu.rip,
            };
            let Err(second) = self.deliver(event) else {
                return Next::Continue;
            };
            if current.vector == DOUBLE_FAULT {
                return Next::Shutdown;
            }
            if second.vector == PAGE_FAULT {
                // Also of a page fault that becomes a double fault.
                self.cpu.cr2 = second.cr2;
            }
            origin = Origin::Fault;
            current = if doubles(current.vector, second.vector) {
                Fault {
                    vector: DOUBLE_FAULT,
                    error: Some(0),
                    cr2: 0,
                }
            } else {
                second
            };
        }
    }

    /// INT n, INT1, INT3, INTO.
    pub(super) fn software_interrupt(
        &mut self,
        instr: &Instruction,
        next_rip: u64,
    ) -> Result<Flow, Fault> {
        let (vector, origin) = match instr.mnemonic() {
            Mnemonic::Int3 => (3, Origin::SoftwareException),
            Mnemonic::Int1 => (1, Origin::PrivilegedSoftware),
            Mnemonic::Into if self.cpu.arith & flags::OF == 0 => return Ok(Flow::Next),
            Mnemonic::Into => (4, Origin::SoftwareException),
            _ => (instr.immediate8(), Origin::Software),
        };
        if self.is_virtual_8086() && origin == Origin::Software && self.iopl() < 3 {
            return Err(Fault::protection(0));
        }
        self.deliver(Event {
            vector,
            error: None,
            origin,
            rip: next_rip,
        })?;
        if origin == Origin::PrivilegedSoftware {
            // A debug exception itself, together with what MOV SS held back.
            self.cpu.dr6 |= std::mem::take(&mut self.cpu.debug.carried);
        }
        Ok(Flow::Jumped)
    }

    /// Enters the handler of an event. On a fault nothing has changed.
    pub fn deliver(&mut self, event: Event) -> Result<(), Fault> {
        if self.cpu.cr0 & control::CR0_PE == 0 {
            self.deliver_real(event)
        } else if self.cpu.long_mode() {
            self.deliver_long(event)
        } else {
            self.deliver_protected(event)
        }?;
        self.cpu.interrupt_shadow = false;
        self.cpu.debug.entered = true;
        Ok(())
    }

    fn deliver_real(&mut self, event: Event) -> Result<(), Fault> {
        let entry = u64::from(event.vector) * 4;
        if entry + 3 > u64::from(self.cpu.idtr.limit) {
            return Err(Fault::protection(u32::from(event.vector) * 8 + 2));
        }
        let mut bytes = [0; 4];
        self.load_system(self.table_address(self.cpu.idtr.base, entry), &mut bytes)?;
        let [ip_low, ip_high, cs_low, cs_high] = bytes;
        let mut stack = self.stack();
        let cs = self.cpu.segments[CS].selector;
        let image = self.cpu.rflags() & 0xffff;
        self.push_all_or_none(&mut stack, &[image, cs.into(), event.rip], 2)?;
        self.set_stack(stack);
        let target = self.real_segment(CS, u16::from_le_bytes([cs_low, cs_high]));
        self.cpu.set_segment(CS, target);
        self.cpu.rip = u16::from_le_bytes([ip_low, ip_high]).into();
        self.cpu.interrupts_on = 0;
        self.cpu.system_flags &= !(flags::TF | flags::AC | flags::RF);
        Ok(())
    }

    /// RFLAGS as an event saves them.
    fn saved_flags(&self, event: &Event) -> u64 {
        self.cpu.rflags()
            | if event.origin == Origin::Fault {
                flags::RF
            } else {
                0
            }
    }

    /// Reads a gate and checks what all modes check. The second half is there in long mode only.
    fn gate(&mut self, event: &Event) -> Result<Descriptor, Fault> {
        let size = if self.cpu.long_mode() { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        let error = u32::from(event.vector) * 8 + 2 + event.ext();
        if offset + size - 1 > u64::from(self.cpu.idtr.limit) {
            return Err(Fault::protection(error));
        }
        let address = self.table_address(self.cpu.idtr.base, offset);
        let mut bytes = [0; 16];
        self.load_system(address, bytes.get_mut(..size as usize).unwrap_or(&mut []))?;
        let both = u128::from_le_bytes(bytes);
        let gate = Descriptor {
            raw: both as u64,
            high: (both >> 64) as u64,
            address,
        };
        // Interrupt and trap gates: 14 and 15, with 16-bit frames 6 and 7. Task gates: 5.
        let is_gate = match gate.kind() {
            14 | 15 => true,
            5..=7 => !self.cpu.long_mode(),
            _ => false,
        };
        if !gate.is_system() || !is_gate {
            return Err(Fault::protection(error));
        }
        if event.checks_privilege() && gate.dpl() < self.cpu.cpl() {
            return Err(Fault::protection(u32::from(event.vector) * 8 + 2));
        }
        if !gate.present() {
            return Err(not_present(error));
        }
        Ok(gate)
    }

    /// The code segment of a gate.
    fn handler(&mut self, selector: u16, ext: u32) -> Result<Descriptor, Fault> {
        let error = selector_error(selector) | ext;
        if selector_error(selector) == 0 {
            return Err(Fault::protection(ext));
        }
        let external = |fault: Fault| match fault.vector {
            PAGE_FAULT => fault,
            _ => Fault {
                error: fault.error.map(|e| e | ext),
                ..fault
            },
        };
        let code = self
            .descriptor(selector, Fault::protection)
            .map_err(external)?;
        let wrong_size = self.cpu.long_mode() && (!code.is_long_code() || code.default_32());
        if !code.is_code() || code.dpl() > self.cpu.cpl() || wrong_size {
            return Err(Fault::protection(error));
        }
        if !code.present() {
            return Err(not_present(error));
        }
        Ok(code)
    }

    fn deliver_long(&mut self, event: Event) -> Result<(), Fault> {
        let ext = event.ext();
        let gate = self.gate(&event)?;
        let (selector, rip) = gate.gate_target();
        let mut code = self.handler(selector, ext)?;
        let cpl = self.cpu.cpl();
        let new_cpl = if code.is_conforming() {
            cpl
        } else {
            code.dpl()
        };
        if !crate::mmu::canonical(rip) {
            return Err(Fault::protection(ext));
        }
        let stack_table = gate.raw >> 32 & 7;
        let error = selector_error(self.cpu.tr.selector) | ext;
        let (old_rsp, old_ss) = (self.cpu.gpr[super::operand::RSP], self.cpu.segments[SS]);
        let segment = if new_cpl == cpl {
            old_ss
        } else {
            super::segment::null_segment(new_cpl.into())
        };
        let pointer = if stack_table != 0 {
            self.tss_word(28 + stack_table * 8, 8, error)?
        } else if new_cpl != cpl {
            self.inner_stack(new_cpl, ext)?.pointer
        } else {
            old_rsp
        };
        let stack = NewStack {
            segment,
            pointer: pointer & !15,
        };
        self.mark_accessed(&mut code)?;
        let cs = self.cpu.segments[CS].selector;
        let frame = [
            old_ss.selector.into(),
            old_rsp,
            self.saved_flags(&event),
            cs.into(),
            event.rip,
            event.error.unwrap_or(0).into(),
        ];
        let values = frame
            .get(..if event.error.is_some() { 6 } else { 5 })
            .unwrap_or(&frame);
        let rsp = self.push_on(stack, values, 8, new_cpl, ext)?;
        self.cpu.set_segment(SS, segment);
        self.set_code_segment(&code, selector, new_cpl);
        self.cpu.gpr[super::operand::RSP] = rsp;
        self.enter_handler(&gate, rip);
        Ok(())
    }

    fn enter_handler(&mut self, gate: &Descriptor, rip: u64) {
        self.cpu.rip = rip;
        self.clear_on_entry();
        // Interrupt gates have even types.
        if gate.kind() & 1 == 0 {
            self.cpu.interrupts_on = 0;
        }
    }

    /// Through a task gate: the handler is a task of its own.
    fn deliver_to_task(&mut self, gate: &Descriptor, event: Event) -> Result<(), Fault> {
        let image = self.saved_flags(&event);
        self.switch_task(
            gate.gate_target().0,
            Switch::Nest,
            event.rip,
            image,
            event.ext(),
        )?;
        if let Some(error) = event.error {
            let size = if self.cpu.tr.attributes & 8 != 0 {
                4
            } else {
                2
            };
            let mut stack = self.stack();
            self.push(&mut stack, error.into(), size)?;
            self.set_stack(stack);
        }
        Ok(())
    }

    /// Protected mode without long mode, from protected or virtual-8086 code.
    fn deliver_protected(&mut self, event: Event) -> Result<(), Fault> {
        let ext = event.ext();
        let gate = self.gate(&event)?;
        if gate.kind() == system::TASK_GATE {
            return self.deliver_to_task(&gate, event);
        }
        let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let (selector, rip) = gate.gate_target();
        let rip = rip & super::operand::size_mask(size);
        let mut code = self.handler(selector, ext)?;
        let v8086 = self.is_virtual_8086();
        let cpl = self.cpu.cpl();
        let new_cpl = if code.is_conforming() {
            cpl
        } else {
            code.dpl()
        };
        if v8086 && new_cpl != 0 {
            return Err(Fault::protection(selector_error(selector) | ext));
        }
        if rip > u64::from(code.limit()) {
            return Err(Fault::protection(ext));
        }
        let [es, cs, ss, ds, fs, gs] = self.cpu.segments.map(|s| u64::from(s.selector));
        let old = self.stack();
        let esp = self.cpu.gpr[super::operand::RSP] & 0xffff_ffff;
        let mut values = Vec::with_capacity(10);
        let inner = v8086 || new_cpl < cpl;
        if v8086 {
            values.extend([gs, fs, ds, es]);
        }
        if inner {
            values.extend([ss, esp]);
        }
        values.extend([self.saved_flags(&event), cs, event.rip]);
        values.extend(event.error.map(u64::from));
        self.mark_accessed(&mut code)?;
        if inner {
            let stack = self.inner_stack(new_cpl, ext)?;
            let pointer = self.push_on(stack, &values, size, new_cpl, ext)?;
            self.cpu.system_flags &= !flags::VM;
            self.cpu.set_segment(SS, stack.segment);
            self.set_code_segment(&code, selector, new_cpl);
            let mask = self.stack().mask;
            self.set_stack(Stack { pointer, mask });
            if v8086 {
                for index in [0, 3, 4, 5] {
                    self.cpu.set_segment(index, super::segment::null_segment(0));
                }
            }
        } else {
            let mut stack = old;
            self.push_all_or_none(&mut stack, &values, size)?;
            self.set_stack(stack);
            self.set_code_segment(&code, selector, new_cpl);
        }
        self.enter_handler(&gate, rip);
        Ok(())
    }
}
