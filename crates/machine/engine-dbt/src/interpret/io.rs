//! IN and OUT, and the permission to use ports (Intel SDM vol. 1, chapter 19).

use iced_x86::Instruction;
use strata_engine::{DoorbellSpace, ExitCause, Input};

use super::Flow;
use super::operand::size_mask;
use crate::debug::Watched;
use crate::env::{Exec, Fault};

/// Where the TSS says how far away its I/O permission map begins.
const MAP_BASE: u64 = 102;

impl Exec<'_> {
    pub(super) fn port_in(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let register = instr.op0_register();
        let port = self.read_operand(instr, 1)? as u16;
        self.check_port(port, register.size())?;
        let value = self.read_port(port, register.size());
        self.set_named(register, value);
        Ok(Flow::Next)
    }

    pub(super) fn port_out(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let register = instr.op1_register();
        let port = self.read_operand(instr, 0)? as u16;
        self.check_port(port, register.size())?;
        let value = self.named(register);
        self.write_port(port, value, register.size());
        Ok(Flow::Next)
    }

    /// #GP(0) unless IOPL or the TSS's permission map lets the program use these ports.
    pub(super) fn check_port(&mut self, port: u16, size: usize) -> Result<(), Fault> {
        let restricted =
            self.is_virtual_8086() || (self.is_protected() && self.cpu.cpl() > self.iopl());
        if !restricted {
            return Ok(());
        }
        const REFUSED: Fault = Fault::protection(0);
        // Only 32-bit and 64-bit TSSs, busy or not, have a map. Two bytes are read, whatever the port.
        if self.cpu.tr.attributes & 13 != 9 {
            return Err(REFUSED);
        }
        let refuse = |fault: Fault| if fault.vector == 10 { REFUSED } else { fault };
        let base = self.tss_word(MAP_BASE, 2, 0).map_err(refuse)?;
        let bits = self
            .tss_word(base + u64::from(port / 8), 2, 0)
            .map_err(refuse)?;
        let wanted = ((1 << size) - 1) << (port % 8);
        if bits & wanted == 0 {
            Ok(())
        } else {
            Err(REFUSED)
        }
    }

    pub(super) fn read_port(&mut self, port: u16, size: usize) -> u64 {
        self.env.count_exit(ExitCause::Port);
        self.cpu.note_access(port.into(), size, Watched::Port);
        let bus = self.bus;
        let live = || {
            let mut bytes = [0; 4];
            bus.port_in(port, bytes.get_mut(..size).unwrap_or(&mut []));
            u32::from_le_bytes(bytes)
        };
        let make = |value| Input::PortIn { port, value };
        let open = |input: &Input| match input {
            Input::PortIn { port: from, value } if *from == port => Some(*value),
            _ => None,
        };
        let taken = self.env.inputs.take("a port", live, make, open);
        let value = taken.unwrap_or_else(|error| {
            self.env.diverged(error);
            u32::MAX
        });
        u64::from(value) & size_mask(size)
    }

    pub(super) fn write_port(&mut self, port: u16, value: u64, size: usize) {
        self.env.count_exit(ExitCause::Port);
        self.cpu.note_access(port.into(), size, Watched::Port);
        let bytes = value.to_le_bytes();
        let data = bytes.get(..size).unwrap_or(&[]);
        if !self.env.inputs.is_replay()
            && !self
                .env
                .ring_doorbell(DoorbellSpace::Port, port.into(), data)
        {
            self.bus.port_out(port, data);
        }
    }
}
