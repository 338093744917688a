//! The assembly between Rust and translated code: enter, leave, and the slow path's calls.
//!
//! While translated code runs, host RSP is the context; below the context lies room for one return address. The
//! stubs save guest registers, flags and vectors in the context before any Rust runs and switch to the Rust stack.

use strata_engine::EngineError;

use crate::asm::Asm;
use crate::asm::reg::{R8, R9, R10, R11, RAX, RBX, RCX, RDI, RSI, RSP};
use crate::code::CodeMap;
use crate::cpu::{Cpu, off};

pub mod system;

use system::SystemStubs;

/// Why translated code came back: values of `Cpu::exit_reason`.
pub mod reason {
    /// The block at `Cpu::rip` must be found.
    pub const LOOKUP: u64 = 1;
    /// A direct jump, `exit_info` its link.
    pub const LINK: u64 = 2;
    /// The interpreter's turn, `exit_info` the site.
    pub const INTERPRET: u64 = 3;
    /// A request is pending; the guest goes on at `Cpu::rip`.
    pub const REQUEST: u64 = 4;
    /// The slow path raised a fault, which waits in the run loop's state.
    pub const FAULT: u64 = 5;
    /// The slow path changed code; the guest goes on at `Cpu::rip`.
    pub const STALE: u64 = 6;
    /// A host instruction faulted, see the signal module.
    pub const HOST_FAULT: u64 = 7;
    /// A group of accesses at `Cpu::rip` did not pass its check, `exit_info` the link to a block without groups.
    pub const UNGROUP: u64 = 8;
}

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug)]
pub struct Stubs {
    /// `extern "sysv64" fn(cpu, target)`: runs translated code until it leaves.
    pub enter: u64,
    /// Leaves with R10 = RIP to look up.
    pub lookup: u64,
    /// Leaves with RCX = link.
    pub link: u64,
    /// Leaves with RCX = site.
    pub interpret: u64,
    /// Leaves with R10 = RIP to go on at.
    pub request: u64,
    /// Leaves after a host fault.
    pub host_fault: u64,
    /// Called with RCX = site, R10 = linear address; returns R10 = host address, R11 = 0.
    pub slow: u64,
    /// Called with RCX = site after a bounced store.
    pub commit: u64,
    /// Called with RCX = site after every store of a traced block.
    pub stored: u64,
    /// Called with R10 = target RIP at every exit of a traced block. Keeps R10.
    pub block_exit: u64,
    /// What kernels do all the time.
    pub system: SystemStubs,
}

/// The Rust functions that the stubs call.
#[derive(Clone, Copy)]
pub struct Callbacks {
    /// Slow path of a memory operand: `(cpu, site, linear)`, returns the host address or 0 to leave.
    pub slow: Callback,
    /// Write-back of a bounced operand: `(cpu, site, _)`, returns 0 to leave.
    pub commit: Callback,
    /// A traced store: `(cpu, site, _)`.
    pub stored: Callback,
    /// A traced block exit: `(cpu, _, rip)`, returns 0 to leave.
    pub block_exit: Callback,
}

/// A Rust function called from translated code.
pub type Callback = unsafe extern "sysv64" fn(*mut Cpu, u64, u64) -> u64;

/// Guest registers that live in host registers of the same number.
const IDENTITY: [u8; 10] = [0, 2, 3, 5, 6, 7, 12, 13, 14, 15];

fn save_guest(asm: &mut Asm) {
    asm.store_ctx(off::gpr(0), RAX);
    asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    asm.bytes(&[0x88, 0xa4, 0x24]); // mov [rsp+ARITH], ah
    asm.bytes(&off::ARITH.to_le_bytes());
    asm.bytes(&[0xc0, 0xe0, 0x03]); // shl al, 3
    asm.bytes(&[0x88, 0x84, 0x24]); // mov [rsp+ARITH+1], al
    asm.bytes(&(off::ARITH + 1).to_le_bytes());
    for number in IDENTITY.into_iter().skip(1) {
        asm.store_ctx(off::gpr(number), number);
    }
    asm.store_ctx(off::gpr(1), R9);
    asm.store_ctx(off::gpr(4), R8);
    for number in 0..16u8 {
        vmovdqa(asm, number, true);
    }
    asm.bytes(&[0x0f, 0xae, 0x9c, 0x24]); // stmxcsr [rsp+MXCSR]
    asm.bytes(&off::MXCSR.to_le_bytes());
    asm.bytes(&[0x0f, 0xae, 0x94, 0x24]); // ldmxcsr [rsp+HOST_MXCSR]
    asm.bytes(&off::HOST_MXCSR.to_le_bytes());
    asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
}

fn restore_guest(asm: &mut Asm) {
    asm.bytes(&[0x0f, 0xae, 0x94, 0x24]); // ldmxcsr [rsp+MXCSR]
    asm.bytes(&off::MXCSR.to_le_bytes());
    for number in 0..16u8 {
        vmovdqa(asm, number, false);
    }
    // OF: bit 3 of the second byte + 0x78 overflows exactly when it is set.
    asm.bytes(&[0x8a, 0x8c, 0x24]); // mov cl, [rsp+ARITH+1]
    asm.bytes(&(off::ARITH + 1).to_le_bytes());
    asm.bytes(&[0x80, 0xe1, 0x08]); // and cl, 8
    asm.bytes(&[0x8a, 0xa4, 0x24]); // mov ah, [rsp+ARITH]
    asm.bytes(&off::ARITH.to_le_bytes());
    asm.bytes(&[0x80, 0xc1, 0x78]); // add cl, 0x78
    asm.bytes(&[0x9e]); // sahf
    asm.load_ctx(R8, off::gpr(4));
    asm.load_ctx(R9, off::gpr(1));
    for number in IDENTITY {
        asm.load_ctx(number, off::gpr(number));
    }
}

/// `vmovdqa [rsp + ymm(n)], ymm(n)` or back.
fn vmovdqa(asm: &mut Asm, number: u8, store: bool) {
    let r = if number < 8 { 0x80 } else { 0 };
    asm.bytes(&[
        0xc5,
        r | 0x7d,
        if store { 0x7f } else { 0x6f },
        0x84 | (number & 7) << 3,
        0x24,
    ]);
    asm.bytes(&off::ymm(number).to_le_bytes());
}

fn pop_host_registers(asm: &mut Asm) {
    asm.bytes(&[0x48, 0x83, 0xc4, 0x08]); // add rsp, 8
    asm.bytes(&[
        0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
    ]); // pop r15..r12, rbp, rbx; ret
}

/// Assembles the stubs at the start of the cache.
pub fn build(code: &mut CodeMap, callbacks: &Callbacks) -> Result<Stubs, EngineError> {
    let mut asm = Asm::new(code.next_address());

    let enter = asm.here();
    asm.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]); // push rbx, rbp, r12..r15
    asm.bytes(&[0x48, 0x83, 0xec, 0x08]); // sub rsp, 8
    asm.bytes(&[0x49, 0x89, 0xe2]); // mov r10, rsp
    asm.mov(RSP, RDI);
    asm.store_ctx(off::HOST_RSP, R10);
    asm.bytes(&[0x0f, 0xae, 0x9c, 0x24]); // stmxcsr [rsp+HOST_MXCSR]
    asm.bytes(&off::HOST_MXCSR.to_le_bytes());
    asm.store_ctx(off::temp(6), RSI);
    restore_guest(&mut asm);
    asm.jmp_ctx(off::temp(6));

    let exit = asm.here();
    save_guest(&mut asm);
    asm.load_ctx(RSP, off::HOST_RSP);
    pop_host_registers(&mut asm);

    // The branch that comes here is named in RCX, in case its target is not canonical.
    let lookup = asm.here();
    asm.store_ctx(off::EXIT_INFO, RCX);
    let mut leave = |field: Option<(u32, u8)>, reason: u64| {
        let at = asm.here();
        if let Some((field, register)) = field {
            asm.store_ctx(field, register);
        }
        asm.store_ctx_imm(off::EXIT_REASON, reason as i32);
        asm.jmp(exit);
        at
    };
    leave(Some((off::RIP, R10)), reason::LOOKUP);
    let link = leave(Some((off::EXIT_INFO, RCX)), reason::LINK);
    let interpret = leave(Some((off::EXIT_INFO, RCX)), reason::INTERPRET);
    let request = leave(Some((off::RIP, R10)), reason::REQUEST);
    let host_fault = leave(None, reason::HOST_FAULT);

    let mut call = |function: Callback, keep_r10: bool| {
        let at = asm.here();
        asm.pop_ctx(off::temp(4));
        if keep_r10 {
            asm.store_ctx(off::temp(5), R10);
        }
        save_guest(&mut asm);
        asm.mov(RBX, RSP);
        asm.mov(RDI, RSP);
        asm.mov(RSI, RCX);
        asm.mov(2, R10);
        asm.load_ctx(RSP, off::HOST_RSP);
        asm.mov_imm(RAX, function as usize as u64);
        asm.bytes(&[0xff, 0xd0]); // call rax
        asm.mov(RSP, RBX);
        asm.bytes(&[0x48, 0x85, 0xc0]); // test rax, rax
        let stay = asm.jcc_later(5);
        asm.load_ctx(RSP, off::HOST_RSP);
        pop_host_registers(&mut asm);
        asm.patch_here(stay);
        if !keep_r10 {
            asm.store_ctx(off::temp(5), RAX);
        }
        restore_guest(&mut asm);
        asm.load_ctx(R10, off::temp(5));
        asm.mov_imm(R11, 0);
        asm.push_ctx(off::temp(4));
        asm.bytes(&[0xc3]); // ret
        at
    };
    let slow = call(callbacks.slow, false);
    let commit = call(callbacks.commit, false);
    let stored = call(callbacks.stored, true);
    let block_exit = call(callbacks.block_exit, true);

    let address = |here| asm.address(here);
    code.append(&asm.code)?;
    let system = system::append(code)?;
    let stubs = Stubs {
        enter: address(enter),
        lookup: address(lookup),
        link: address(link),
        interpret: address(interpret),
        request: address(request),
        host_fault: address(host_fault),
        slow: address(slow),
        commit: address(commit),
        stored: address(stored),
        block_exit: address(block_exit),
        system,
    };
    code.reserve();
    Ok(stubs)
}
