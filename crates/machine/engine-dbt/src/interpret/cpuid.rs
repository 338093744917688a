//! CPUID, time-stamp counter and random numbers: instructions that must not show the host.

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic, Register};
use strata_engine::Input;
use strata_engine::x86::CpuidContext;

use super::Flow;
use crate::cpu::{control, flags};
use crate::env::{Exec, Fault};

impl Exec<'_> {
    pub(super) fn cpuid(&mut self) -> Result<Flow, Fault> {
        let context = CpuidContext {
            apic_id: self.env.apic.id(),
            vcpus: self.env.apic.vcpus(),
            osxsave: self.cpu.cr4 & control::CR4_OSXSAVE != 0,
            xcr0: self.cpu.xcr0,
            apic_enabled: self.env.apic.is_enabled(),
            tsc_hz: self.env.clock.tsc_hz(),
        };
        let [rax, rcx, rdx, rbx, ..] = &mut self.cpu.gpr;
        let [a, b, c, d] = self.env.model.cpuid(*rax as u32, *rcx as u32, &context);
        (*rax, *rbx, *rcx, *rdx) = (a.into(), b.into(), c.into(), d.into());
        Ok(Flow::Next)
    }

    /// The guest's time-stamp counter, as an input.
    pub fn read_tsc(&mut self) -> u64 {
        let (tsc, clock) = (&self.env.tsc, &self.env.clock);
        let offset = self.cpu.tsc_offset;
        let taken = self.env.inputs.take(
            "the time-stamp counter",
            || tsc.read(clock).wrapping_add(offset),
            Input::Tsc,
            |i| {
                if let Input::Tsc(value) = i {
                    Some(*value)
                } else {
                    None
                }
            },
        );
        taken.unwrap_or_else(|error| {
            self.env.diverged(error);
            0
        })
    }

    /// Machine nanoseconds, as an input.
    pub(super) fn read_clock(&mut self) -> u64 {
        let clock = std::sync::Arc::clone(&self.env.clock);
        self.clock_input(|| clock.now_ns())
    }

    /// Something that runs with time, as an input.
    pub(super) fn clock_input(&mut self, live: impl FnOnce() -> u64) -> u64 {
        let taken = self.env.inputs.take("a clock", live, Input::Clock, |i| {
            if let Input::Clock(value) = i {
                Some(*value)
            } else {
                None
            }
        });
        taken.unwrap_or_else(|error| {
            self.env.diverged(error);
            0
        })
    }

    pub(super) fn rdtsc(&mut self, with_aux: bool) -> Result<Flow, Fault> {
        if self.cpu.cr4 & control::CR4_TSD != 0 && self.cpu.cpl() > 0 {
            return Err(Fault::protection(0));
        }
        let tsc = self.read_tsc();
        let aux = self.cpu.tsc_aux & 0xffff_ffff;
        let [rax, rcx, rdx, ..] = &mut self.cpu.gpr;
        (*rax, *rdx) = (tsc & 0xffff_ffff, tsc >> 32);
        if with_aux {
            *rcx = aux;
        }
        Ok(Flow::Next)
    }

    pub(super) fn rdpid(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let register = instr.op0_register();
        self.set_named(register, self.cpu.tsc_aux & 0xffff_ffff);
        Ok(Flow::Next)
    }

    /// RDRAND and RDSEED: the host's, as inputs.
    pub(super) fn random(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let seed = instr.mnemonic() == Mnemonic::Rdseed;
        let register: Register = instr.op0_register();
        let taken = self.env.inputs.take(
            "a random number",
            || host_random(seed),
            |(value, ok)| Input::Random(value, ok),
            |i| {
                if let Input::Random(value, ok) = i {
                    Some((*value, *ok))
                } else {
                    None
                }
            },
        );
        let (value, ok) = taken.unwrap_or_else(|error| {
            self.env.diverged(error);
            (0, false)
        });
        self.set_named(register, if ok { value } else { 0 });
        self.cpu.arith = if ok { flags::CF } else { 0 };
        Ok(Flow::Next)
    }
}

/// Asks the host's CPU, which has the instruction because the model's features were checked against it.
fn host_random(seed: bool) -> (u64, bool) {
    let (value, ok): (u64, u8);
    if seed {
        // SAFETY: RDSEED touches no memory; the CPU model offers it only if the host has it.
        unsafe {
            asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
    } else {
        // SAFETY: as above for RDRAND.
        unsafe {
            asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack))
        };
    }
    (value, ok != 0)
}
