//! Blocks to begin with: what the translator makes of programs that use every form of operand and branch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use strata_engine::x86::{CpuModel, Segment};
use strata_engine::{Engine, Exit, IoBus, Kicker, MachineClock, VcpuId};
use strata_engine_dbt::{Translator, TranslatorConfig};
use strata_memory::{Gpa, GuestMemory, SlotKind};
use strata_verify::{Emitted, Inspect, Layout, Site, verify};

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STACK: u64 = 0x30_0000;
const SITES: u32 = 1 << 14;

/// One block and what the verifier was told of it.
pub struct Block {
    pub layout: Layout,
    pub address: u64,
    pub code: Vec<u8>,
    pub privilege: usize,
    pub links: Vec<(u32, u32)>,
    pub sites: HashMap<u32, Site>,
}

impl Block {
    /// The verifier's judgement of other bytes in this block's place.
    pub fn judge(&self, code: &[u8], links: &[(u32, u32)]) -> Result<(), String> {
        self.with(code, links, |emitted| {
            verify(&self.layout, emitted).map(|_| ())
        })
    }

    /// Shows the block itself.
    pub fn show(&self, to: &dyn Inspect) -> Result<(), String> {
        self.with(&self.code, &self.links, |emitted| {
            to.block(&self.layout, emitted)
        })
    }

    fn with<T>(&self, code: &[u8], links: &[(u32, u32)], act: impl FnOnce(&Emitted<'_>) -> T) -> T {
        act(&Emitted {
            address: self.address,
            code,
            privilege: self.privilege,
            links,
            site: &|number| self.sites.get(&number).copied(),
        })
    }
}

/// Keeps every block.
#[derive(Default)]
struct Collector(Mutex<Vec<Block>>);

impl Inspect for Collector {
    fn block(&self, layout: &Layout, block: &Emitted<'_>) -> Result<(), String> {
        verify(layout, block)?;
        self.0.lock().unwrap().push(Block {
            layout: layout.clone(),
            address: block.address,
            code: block.code.to_vec(),
            privilege: block.privilege,
            links: block.links.to_vec(),
            sites: (0..SITES)
                .map_while(|n| (block.site)(n).map(|site| (n, site)))
                .collect(),
        });
        Ok(())
    }

    fn connected(&self, _: &Layout, _: u64, _: u64) -> Result<(), String> {
        Ok(())
    }
}

/// Kicks when the program writes to a port.
struct Bus(Arc<dyn Kicker>);

impl IoBus for Bus {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_in(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn port_out(&self, _: u16, _: &[u8]) {
        self.0.kick();
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// All of it, straight on and in a loop.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut again, mut out, mut function, mut table) = (
        a.create_label(),
        a.create_label(),
        a.create_label(),
        a.create_label(),
    );
    a.mov(rbx, DATA)?;
    a.mov(rsi, DATA + 0x100)?;
    a.mov(rcx, 3u64)?;
    a.mov(r9, 5u64)?;
    a.set_label(&mut again)?;
    // Loads.
    a.mov(al, byte_ptr(rbx))?;
    a.movzx(edx, word_ptr(rbx + 2))?;
    a.mov(eax, dword_ptr(rbx + r9 * 4))?;
    a.mov(r8, qword_ptr(rbx + 8))?;
    a.mov(r10, qword_ptr(DATA))?;
    a.movups(xmm1, xmmword_ptr(rsi))?;
    a.vmovdqu(ymm2, ymmword_ptr(rsi + 3))?;
    a.add(rdx, qword_ptr(rsi + rcx * 8))?;
    a.vpaddd(ymm3, ymm2, ymmword_ptr(rbx + 64))?;
    a.fld(tbyte_ptr(rbx + 32))?;
    a.fstp(tbyte_ptr(rbx + 48))?;
    // Stores.
    a.mov(byte_ptr(rbx + 1), al)?;
    a.mov(word_ptr(rbx + 6), dx)?;
    a.mov(dword_ptr(rsi + r9 * 8), edx)?;
    a.mov(qword_ptr(rsi + 24), r11)?;
    a.mov(qword_ptr(rbx + 40), 7)?;
    a.movaps(xmmword_ptr(rsi), xmm1)?;
    a.vmovups(ymmword_ptr(rsi + 0x43), ymm3)?;
    // Both.
    a.add(dword_ptr(rbx), 1)?;
    a.lock().xadd(qword_ptr(rbx + 16), rdx)?;
    a.xchg(qword_ptr(rbx + 24), r9)?;
    a.mov(r9, 5u64)?;
    a.bts(qword_ptr(rbx), rdx)?;
    a.bt(dword_ptr(rbx), r9d)?;
    a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
    a.shl(qword_ptr(rbx), cl)?;
    a.mov(byte_ptr(rbx + 3), ah)?;
    // A page's end, where operands bounce.
    a.mov(dword_ptr(rbx + 0xffe), eax)?;
    a.mov(rax, qword_ptr(rbx + 0xffb))?;
    // The stack.
    a.push(rbx)?;
    a.push(qword_ptr(rbx + 8))?;
    a.push(0x1234)?;
    a.pop(rdx)?;
    a.pop(qword_ptr(rsi + 8))?;
    a.pop(r12)?;
    a.pushfq()?;
    a.pop(rdi)?;
    a.enter(16, 0)?;
    a.leave()?;
    a.call(function)?;
    a.lea(rax, qword_ptr(function))?;
    a.call(rax)?;
    a.mov(qword_ptr(table), rax)?;
    a.call(qword_ptr(table))?;
    // What system stubs do.
    let (mut kernel, mut past) = (a.create_label(), a.create_label());
    a.cld()?;
    a.rdtsc()?;
    a.rdtscp()?;
    a.mov(eax, ss)?;
    a.rdfsbase(r12)?;
    a.wrfsbase(rbx)?;
    a.wrgsbase(rbx)?;
    a.mov(rdi, DATA + 0x800)?;
    a.mov(ecx, 4)?;
    a.rep().stosq()?;
    a.mov(ecx, 3)?;
    a.rep().movsb()?;
    a.pushfq()?;
    a.popfq()?;
    a.mov(eax, cs)?;
    a.test(al, 3)?;
    a.jz(kernel)?;
    a.test(al, 3)?;
    a.jnz(past)?;
    a.syscall()?;
    a.set_label(&mut kernel)?;
    a.mov(rax, cr3)?;
    a.swapgs()?;
    a.swapgs()?;
    a.test(eax, eax)?;
    a.jnz(past)?;
    a.sysretq()?;
    a.set_label(&mut past)?;
    a.mov(rsi, DATA + 0x100)?;
    a.mov(ecx, 1)?;
    a.mov(r9, 5u64)?;
    a.test(edx, 1)?;
    a.jz(out)?;
    a.inc(edx)?;
    a.set_label(&mut out)?;
    a.cmp(edx, dword_ptr(rbx))?;
    a.dec(rcx)?;
    a.jnz(again)?;
    let mut on = a.create_label();
    a.cmp(eax, eax)?;
    a.je(on)?;
    a.iretq()?;
    a.set_label(&mut on)?;
    a.mov(ecx, 2)?;
    let mut short = a.create_label();
    a.set_label(&mut short)?;
    a.mov(dword_ptr(rbx + rcx * 4), ecx)?;
    a.loop_(short)?;
    a.out(0xf4, al)?;
    a.set_label(&mut function)?;
    a.mov(r14, qword_ptr(rbx + 0x80))?;
    a.mov(dword_ptr(rsp - 16), r14d)?;
    a.ret()?;
    a.set_label(&mut table)?;
    a.dq(&[0])?;
    a.assemble(CODE)
}

/// Blocks of supervisor and user code, in the optimised configuration, with counters, with the tracer, and in the
/// reference configuration.
pub fn blocks() -> Vec<Block> {
    let program = program().unwrap();
    let collector = Arc::new(Collector::default());
    for (user, reference, count, lockstep) in [
        (false, false, false, 0),
        (true, false, false, 0),
        (false, false, true, 0),
        (false, false, true, u64::MAX),
        (false, true, false, 0),
    ] {
        let memory = GuestMemory::new();
        memory.add_slot(Gpa(0), 16 << 20, SlotKind::Ram).unwrap();
        memory.write_u64(Gpa(0x1000), 0x2007).unwrap();
        memory.write_u64(Gpa(0x2000), 0x3007).unwrap();
        for i in 0..512u64 {
            let entry = (i << 21) | 0x87;
            memory.write_u64(Gpa(0x3000 + i * 8), entry).unwrap();
        }
        memory.write(Gpa(CODE), &program).unwrap();
        let engine = Translator::new(TranslatorConfig {
            memory,
            clock: Arc::new(MachineClock::new(1_000_000_000)),
            model: CpuModel::named("baseline").unwrap(),
            vcpus: 1,
            reference,
            count,
            lockstep,
        })
        .unwrap();
        engine.inspect(collector.clone());
        let mut vcpu = engine.create_vcpu(VcpuId(0)).unwrap();
        let mut state = vcpu.state();
        let flat = |selector, attributes| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes,
        };
        let (rpl, dpl) = if user { (3, 0x60) } else { (0, 0) };
        state.segments = [flat(0x10 | rpl, 0xc093 | dpl); 6];
        state.segments[1] = flat(8 | rpl, 0xa09b | dpl);
        state.rip = CODE;
        state.gpr[4] = STACK;
        // User code may use ports.
        state.rflags = 0x3002;
        (state.cr0, state.cr3, state.cr4) = (0x8000_0033, 0x1000, 0x5_06a0);
        (state.efer, state.xcr0) = (0xd01, 7);
        vcpu.set_state(&state).unwrap();
        let bus = Bus(vcpu.kicker());
        assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
        let state = vcpu.state();
        assert!(
            state.rip > CODE && state.rip < CODE + 0x1000,
            "{:#x}",
            state.rip
        );
    }
    let blocks = std::mem::take(&mut *collector.0.lock().unwrap());
    assert!(blocks.len() > 80, "{}", blocks.len());
    blocks
}
