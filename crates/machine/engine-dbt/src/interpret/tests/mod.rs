//! Tests of the interpreter: a vCPU on a flat, identity-mapped guest, without translation.

mod events;
mod hostile;
mod mask;
mod string;
mod system;
mod x87;

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, IcedError};
use strata_engine::x86::{CpuModel, DescriptorTable, Segment};
use strata_engine::{Inputs, IoBus, MachineClock, VcpuStats};
use strata_memory::{Gpa, GuestMemory, SlotKind};

use super::Next;
use crate::apic::ApicBus;
use crate::code::CodeMap;
use crate::cpu::{Context, Cpu, control, flags};
use crate::env::{Env, Exec, Fault};
use crate::peers::Peers;

/// Where code, the GDT, the IDT and the TSS are.
pub const CODE: u64 = 0x1_0000;
pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const TSS: u64 = 0x7000;
/// Scratch memory for operands; the page after it is mapped, the one at [`HOLE`] is not.
pub const DATA: u64 = 0x2_0000;
pub const STACK: u64 = 0x8_0000;
/// The stack for entries from user mode, and that of IST 1.
pub const KERNEL_STACK: u64 = 0x9_0000;
pub const IST_STACK: u64 = 0xa_0000;
/// Not present in the page tables.
pub const HOLE: u64 = 0x40_0000;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_DS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_DS: u16 = 0x23;
pub const USER_CS: u16 = 0x2b;
/// 32-bit kernel code.
pub const KERNEL_CS32: u16 = 0x30;
pub const TSS_SELECTOR: u16 = 0x40;

/// Ports as memory: what was written, and reads that count.
#[derive(Default)]
pub struct Ports(pub Mutex<Vec<(u16, Vec<u8>)>>);

impl IoBus for Ports {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        self.0.lock().unwrap().push((port, data.to_vec()));
    }
    fn end_of_interrupt(&self, _: u8) {}
}

pub struct Machine {
    pub cpu: Box<Context>,
    pub env: Env,
    pub bus: Ports,
    code: CodeMap,
    _apics: Arc<ApicBus>,
}

pub fn flat(selector: u16, attributes: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    }
}

impl Machine {
    /// 64-bit mode at CPL 0, 16 MiB of RAM in 2 MiB pages of user and supervisor, a GDT, an IDT and a TSS.
    pub fn new() -> Machine {
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), 16 << 20, SlotKind::Ram).unwrap();
        let clock = Arc::new(MachineClock::new(2_500_000_000));
        let apics = ApicBus::new(2_500_000_000);
        let peers = Peers::new(memory.clone(), 1);
        let me = peers.join(0).unwrap();
        let env = Env {
            slots: memory.slots(),
            memory,
            model: Arc::new(CpuModel::named("baseline").unwrap().translated()),
            clock,
            tsc: Arc::default(),
            apic: apics.add(0),
            peers: Arc::clone(&peers),
            me,
            inputs: Inputs::Live,
            stats: VcpuStats::default(),
            exit_counts: Default::default(),
            doorbells: Arc::default(),
            divergence: None,
        };
        let code = CodeMap::new(peers, 0).unwrap();
        let mut machine = Machine {
            cpu: Cpu::boxed(),
            env,
            bus: Ports::default(),
            code,
            _apics: apics,
        };
        machine.lay_out();
        machine
    }

    fn lay_out(&mut self) {
        self.put_u64(0x1000, 0x2007);
        self.put_u64(0x2000, 0x3007);
        for i in (0..8).filter(|i| i << 21 != HOLE) {
            self.put_u64(0x3000 + i * 8, (i << 21) | 0x87);
        }
        let user = 3 << 45;
        let descriptors = [
            0,
            0x00af_9a00_0000_ffff,
            0x00cf_9200_0000_ffff,
            0x00cf_9a00_0000_ffff | user,
            0x00cf_9200_0000_ffff | user,
            0x00af_9a00_0000_ffff | user,
            0x00cf_9a00_0000_ffff,
            0,
            // 64-bit TSS of 0x68 + map bytes.
            0x0000_8900_0000_00ff | TSS << 16,
            0,
        ];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            self.put_u64(GDT + i as u64 * 8, descriptor);
        }
        self.put_u64(TSS + 4, KERNEL_STACK);
        self.put_u64(TSS + 36, IST_STACK);
        let cpu = &mut self.cpu;
        cpu.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x4f,
        };
        cpu.idtr = DescriptorTable {
            base: IDT,
            limit: 0xfff,
        };
        cpu.tr = Segment {
            selector: TSS_SELECTOR,
            base: TSS,
            limit: 0xff,
            attributes: 0x8b,
        };
        cpu.set_segment(1, flat(KERNEL_CS, 0xa09b));
        for index in [0, 2, 3, 4, 5] {
            cpu.set_segment(index, flat(KERNEL_DS, 0xc093));
        }
        cpu.cr0 =
            control::CR0_PE | control::CR0_PG | control::CR0_ET | control::CR0_WP | control::CR0_NE;
        cpu.cr3 = 0x1000;
        cpu.cr4 = control::CR4_PAE
            | control::CR4_OSFXSR
            | control::CR4_OSXMMEXCPT
            | control::CR4_OSXSAVE
            | control::CR4_FSGSBASE;
        cpu.efer = control::EFER_SCE | control::EFER_LME | control::EFER_LMA | control::EFER_NXE;
        cpu.xcr0 = 7;
        cpu.rip = CODE;
        cpu.gpr[4] = STACK;
    }

    /// To CPL 3, 64-bit or 32-bit code.
    pub fn user(&mut self, selector: u16) {
        let attributes = if selector == USER_CS { 0xa0fb } else { 0xc0fb };
        self.cpu.set_segment(1, flat(selector, attributes));
        for index in [0, 2, 3, 4, 5] {
            self.cpu.set_segment(index, flat(USER_DS, 0xc0f3));
        }
    }

    /// Protected mode without paging, 32-bit code at CPL 0.
    pub fn protected(&mut self) {
        self.cpu.cr0 &= !control::CR0_PG;
        self.cpu.efer = 0;
        self.cpu.set_segment(1, flat(KERNEL_CS32, 0xc09b));
    }

    /// Real mode, code segment at [`CODE`].
    pub fn real(&mut self) {
        self.cpu.cr0 = control::CR0_ET;
        self.cpu.cr4 = 0;
        self.cpu.efer = 0;
        for index in 0..6 {
            let segment = Segment {
                selector: 0,
                base: 0,
                limit: 0xffff,
                attributes: 0x93,
            };
            self.cpu.set_segment(index, segment);
        }
        let selector = (CODE >> 4) as u16;
        self.cpu.set_segment(
            1,
            Segment {
                selector,
                base: CODE,
                limit: 0xffff,
                attributes: 0x9b,
            },
        );
        self.cpu.rip = 0;
        self.cpu.gpr[4] = 0x8000;
        self.cpu.idtr = DescriptorTable {
            base: 0,
            limit: 0x3ff,
        };
    }

    /// A 64-bit gate.
    pub fn gate(&mut self, vector: u8, handler: u64, attributes: u64, ist: u64) {
        let at = IDT + u64::from(vector) * 16;
        let low = handler & 0xffff
            | u64::from(KERNEL_CS) << 16
            | ist << 32
            | attributes << 40
            | (handler >> 16 & 0xffff) << 48;
        self.put_u64(at, low);
        self.put_u64(at + 8, handler >> 32);
    }

    pub fn put_u64(&mut self, at: u64, value: u64) {
        self.env.memory.write_u64(Gpa(at), value).unwrap();
    }

    pub fn u64(&self, at: u64) -> u64 {
        self.env.memory.read_u64(Gpa(at)).unwrap()
    }

    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.env.memory.read(Gpa(at), &mut out).unwrap();
        out
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.env.memory.write(Gpa(at), bytes).unwrap();
    }

    pub fn exec(&mut self) -> Exec<'_> {
        Exec {
            cpu: &mut self.cpu,
            env: &mut self.env,
            bus: &self.bus,
            code: &mut self.code,
        }
    }

    /// Runs one instruction at RIP.
    pub fn run(&mut self, bytes: &[u8]) -> Result<Next, Fault> {
        let bits = self.cpu.code_bits();
        let mut decoder = Decoder::with_ip(bits, bytes, self.cpu.rip, DecoderOptions::NONE);
        let instr = decoder.decode();
        assert!(!instr.is_invalid(), "{bytes:02x?}");
        assert_eq!(instr.len(), bytes.len(), "{bytes:02x?}");
        self.exec().interpret(&instr)
    }

    /// Runs one instruction until it is done, which repeated string instructions need.
    pub fn finish(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        while self.run(bytes)? == Next::RepeatLater {}
        Ok(())
    }

    /// Assembles 64-bit code at RIP and runs it.
    pub fn asm(
        &mut self,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), Fault> {
        let mut assembler = CodeAssembler::new(64).unwrap();
        build(&mut assembler).unwrap();
        let code = assembler.assemble(self.cpu.rip).unwrap();
        let mut decoder = Decoder::with_ip(64, &code, self.cpu.rip, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instr = decoder.decode();
            while self.exec().interpret(&instr)? == Next::RepeatLater {}
        }
        Ok(())
    }

    pub fn flag(&self, bit: u64) -> bool {
        self.cpu.rflags() & bit != 0
    }
}

pub const REFUSED: Fault = Fault::protection(0);

#[test]
fn what_is_not_an_instruction_here_is_undefined() {
    let mut machine = Machine::new();
    let before = machine.cpu.rflags();
    for bytes in [
        &[0x0f, 0x0b][..],   // ud2
        &[0x0f, 0x01, 0xd8], // vmrun
        &[0x0f, 0x01, 0xc2], // vmlaunch
        &[0x0f, 0x01, 0xcb], // stac
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0xc7, 0x30], // vmptrld
    ] {
        assert_eq!(machine.run(bytes), Err(Fault::UNDEFINED), "{bytes:02x?}");
    }
    assert_eq!((machine.cpu.rip, machine.cpu.rflags()), (CODE, before));
}

#[test]
fn a_shadow_lasts_for_one_instruction_and_resume_too() {
    let mut machine = Machine::new();
    machine.run(&[0xfb]).unwrap();
    assert!(machine.cpu.interrupt_shadow && machine.flag(flags::IF));
    machine.run(&[0xfb]).unwrap();
    assert!(!machine.cpu.interrupt_shadow, "interrupts were on already");
    machine.cpu.system_flags |= flags::RF;
    assert_eq!(machine.run(&[0x0f, 0x0b]), Err(Fault::UNDEFINED));
    assert!(machine.flag(flags::RF), "a fault leaves it");
    machine.run(&[0xfa]).unwrap();
    assert!(!machine.flag(flags::RF | flags::IF));
}
