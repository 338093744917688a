//! The translated side: one vCPU of the software engine at CPL 3, with the native child's addresses in its page tables.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use strata_engine::x86::{CpuModel, Segment};
use strata_engine::{Exit, Inputs, IoBus, MachineClock, Vcpu, VcpuId};
use strata_engine_dbt::cpu::Cpu;
use strata_engine_dbt::dispatch::Translated;
use strata_engine_dbt::env::Fault;
use strata_engine_dbt::{Translator, TranslatorConfig};
use strata_memory::{Gpa, GuestMemory, SlotKind};

use crate::layout::{
    CODE, CODE_SIZE, LINE, PAGE, READ_ONLY, RW_PAGES, TRAMPOLINE, TRAMPOLINE_32, Template, USER_CS,
    USER_DS,
};
use crate::state::{BROKEN, DONE, Lines, State};

/// Guest-physical addresses: page tables from the second page on, then code, then data, no two pages adjacent.
const TABLES: u64 = 0x1000;
const CODE_GPA: u64 = 16 << 20;
const DATA_GPA: u64 = 24 << 20;
const RAM: u64 = 32 << 20;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NX: u64 = 1 << 63;

/// Nobody is on this bus.
struct NoBus;

impl IoBus for NoBus {
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn port_in(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_out(&self, _port: u16, _data: &[u8]) {}
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A machine whose one vCPU runs cases.
pub struct Guest {
    memory: GuestMemory,
    vcpu: Translated,
    pages: [*mut u8; RW_PAGES.len()],
    _engine: Translator,
}

/// The model that cases run on: what the host has of what the engine knows.
pub fn model() -> Result<CpuModel> {
    Ok(CpuModel::named("host")
        .context("the host's CPU")?
        .translated())
}

struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, linear: u64, gpa: u64, bits: u64) -> Result<()> {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let entry = Gpa(table + ((linear >> level) & 511) * 8);
            let old = self.memory.read_u64(entry)?;
            table = if old & PRESENT != 0 {
                old & !0xfff
            } else {
                let new = self.next;
                self.next += PAGE;
                self.memory.write_u64(entry, new | PRESENT | WRITE | USER)?;
                new
            };
        }
        self.memory.write_u64(
            Gpa(table + ((linear >> 12) & 511) * 8),
            gpa | bits | PRESENT | USER,
        )?;
        Ok(())
    }
}

impl Guest {
    /// A machine in the optimised or the reference configuration.
    pub fn new(reference: bool, read_only: &[u8; 4096]) -> Result<Guest> {
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), RAM, SlotKind::Ram)?;
        let mut tables = Tables {
            memory: &memory,
            next: TABLES + PAGE,
        };
        for offset in (0..CODE_SIZE).step_by(PAGE as usize) {
            tables.map(CODE + offset, CODE_GPA + offset, 0)?;
        }
        let mut gpa = DATA_GPA;
        let mut pages = [std::ptr::null_mut(); RW_PAGES.len()];
        for (page, host) in RW_PAGES.iter().zip(&mut pages) {
            tables.map(*page, gpa, WRITE | NX)?;
            let slots = memory.slots();
            let slot = slots.find(Gpa(gpa)).ok_or_else(|| anyhow!("no RAM"))?;
            // SAFETY: inside the slot, which lives as long as `memory`.
            *host = unsafe { slot.host().as_ptr().add((gpa - slot.gpa().0) as usize) };
            gpa += 3 * PAGE;
        }
        tables.map(READ_ONLY, gpa, NX)?;
        tables.map(TRAMPOLINE, gpa + 3 * PAGE, 0)?;
        for at in [0, TRAMPOLINE_32 - TRAMPOLINE] {
            memory.write(Gpa(gpa + 3 * PAGE + at), &[0x0f, 0x0b])?;
        }
        memory.write(Gpa(gpa), read_only)?;
        let engine = Translator::new(TranslatorConfig {
            memory: memory.clone(),
            clock: Arc::new(MachineClock::new(1_000_000_000)),
            model: model()?,
            vcpus: 1,
            reference,
            count: reference,
            lockstep: 0,
        })?;
        if !reference {
            // What it translates is proven, too; the reference's blocks are proven in other tests.
            engine.inspect(Arc::new(strata_verify::Verifier::new()));
        }
        let mut vcpu = engine.create_with_inputs(VcpuId(0), Inputs::Live)?;
        vcpu.stop_on_exception(true);
        user_mode(vcpu.cpu_mut());
        Ok(Guest {
            memory,
            vcpu,
            pages,
            _engine: engine,
        })
    }

    /// Writes code at a linear address of the code region.
    pub fn write_code(&mut self, linear: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.memory.write(Gpa(linear - CODE + CODE_GPA), bytes)?)
    }

    /// Fills the data pages.
    pub fn load(&mut self, template: &Template) {
        for (page, bytes) in self.pages.iter().zip(&template.0) {
            // SAFETY: each is a page of RAM that only this machine uses.
            unsafe { page.copy_from_nonoverlapping(bytes.as_ptr(), 4096) };
        }
    }

    /// Runs one case. `lines` gets the memory it changed.
    pub fn run(&mut self, init: &State, template: &Template, lines: &mut Lines) -> State {
        let cpu = self.vcpu.cpu_mut();
        cpu.gpr = init.gpr;
        cpu.rip = init.rip;
        cpu.set_rflags(init.rflags);
        for (index, base) in [(4, init.fs), (5, init.gs)] {
            cpu.set_segment(
                index,
                Segment {
                    base,
                    ..DATA_SEGMENT
                },
            );
        }
        let attributes = if init.cs == u64::from(USER_CS) {
            0xa0fb
        } else {
            0xc0fb
        };
        let code = Segment {
            selector: init.cs as u16,
            base: 0,
            limit: u32::MAX,
            attributes,
        };
        cpu.set_segment(1, code);
        cpu.ymm.0 = init.ymm;
        cpu.fx.0 = init.fx.0;
        cpu.mxcsr = init.mxcsr();
        cpu.cr2 = 0;
        cpu.dr6 = 0xffff_0ff0;
        cpu.interrupt_shadow = false;
        cpu.halted = false;
        let exit = self.vcpu.run(&NoBus);
        let stopped = self.vcpu.take_stopped();
        let cpu = self.vcpu.cpu();
        let mut out = State {
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags(),
            ..State::ZERO
        };
        (out.fs, out.gs) = (cpu.segments[4].base, cpu.segments[5].base);
        out.ymm = cpu.ymm.0;
        out.fx.0 = cpu.fx.0;
        out.set_mxcsr(cpu.mxcsr);
        match (exit, stopped) {
            (Ok(Exit::Kicked), Some(Fault { vector: 1 | 6, .. }))
                if cpu.rip == TRAMPOLINE || cpu.rip == TRAMPOLINE_32 =>
            {
                out.vector = DONE
            }
            (Ok(Exit::Kicked), Some(fault)) => {
                out.vector = u64::from(fault.vector);
                out.error = fault.error.map_or(0, u64::from);
                out.cr2 = fault.cr2;
            }
            (other, _) => {
                eprintln!("the engine came back with {other:?}");
                out.vector = BROKEN;
                user_mode(self.vcpu.cpu_mut());
            }
        }
        lines.count = 0;
        let mut first = 0;
        for (page, bytes) in self.pages.iter().zip(&template.0) {
            // SAFETY: as in `load`; the vCPU is not running.
            unsafe { lines.collect(first, *page, bytes.as_ptr()) };
            first += (4096 / LINE) as u16;
        }
        out
    }
}

const DATA_SEGMENT: Segment = Segment {
    selector: USER_DS,
    base: 0,
    limit: u32::MAX,
    attributes: 0xc0f3,
};

/// User code in a long mode as Linux sets it up.
fn user_mode(cpu: &mut Cpu) {
    for index in [0, 2, 3, 4, 5] {
        cpu.set_segment(index, DATA_SEGMENT);
    }
    // Too small for an I/O bitmap: no port is allowed.
    cpu.tr = Segment {
        selector: 0x40,
        base: 0,
        limit: 0x40,
        attributes: 0x8b,
    };
    cpu.cr0 = 0x8005_0033;
    cpu.cr3 = TABLES;
    // PAE, PGE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE, SMEP.
    cpu.cr4 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18 | 1 << 20;
    cpu.efer = 0xd01;
    cpu.xcr0 = 7;
    cpu.halted = false;
}
