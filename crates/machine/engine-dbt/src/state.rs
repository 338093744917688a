//! A vCPU's context to and from the architectural state as values.

use strata_engine::EngineError;
use strata_engine::x86::{CpuState, MpState, XsaveState};

use crate::cpu::{Cpu, control};
use crate::env::Exec;

/// Bytes of the standard XSAVE area with x87, SSE and AVX.
const XSAVE_SIZE: usize = 832;

/// Copies the state out. The x87 unit must not be live.
pub fn save(exec: &mut Exec<'_>) -> CpuState {
    let msrs = exec.save_msrs();
    let (cpu, env) = (&*exec.cpu, &*exec.env);
    CpuState {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags(),
        segments: cpu.segments,
        tr: cpu.tr,
        ldtr: cpu.ldtr,
        gdtr: cpu.gdtr,
        idtr: cpu.idtr,
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8: env.apic.cr8(),
        efer: cpu.efer,
        xcr0: cpu.xcr0,
        dr: cpu.dr,
        dr6: cpu.dr6,
        dr7: cpu.dr7,
        msrs,
        xsave: save_vectors(cpu),
        apic: Some(env.apic.save(env.clock.now_ns())),
        mp_state: if cpu.wait_for_sipi {
            MpState::WaitForSipi
        } else if cpu.halted {
            MpState::Halted
        } else {
            MpState::Runnable
        },
        interrupt_shadow: cpu.interrupt_shadow,
        nmi_blocked: cpu.nmi_blocked,
        nmi_pending: env.apic.waiting().nmi,
        pending: None,
        tsc_offset: cpu.tsc_offset,
        tsc_hz: env.clock.tsc_hz(),
    }
}

fn save_vectors(cpu: &Cpu) -> XsaveState {
    let mut bytes = vec![0u8; XSAVE_SIZE];
    put(&mut bytes, 0, cpu.fx.0.get(..160).unwrap_or(&[]));
    put(&mut bytes, 24, &cpu.mxcsr.to_le_bytes());
    put(&mut bytes, 28, &0xffffu32.to_le_bytes());
    for (i, [a, b, c, d]) in cpu.ymm.0.iter().enumerate() {
        put(&mut bytes, 160 + i * 16, &a.to_le_bytes());
        put(&mut bytes, 168 + i * 16, &b.to_le_bytes());
        put(&mut bytes, 576 + i * 16, &c.to_le_bytes());
        put(&mut bytes, 584 + i * 16, &d.to_le_bytes());
    }
    put(&mut bytes, 512, &7u64.to_le_bytes());
    XsaveState { bytes }
}

fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + from.len()) {
        to.copy_from_slice(from);
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(from) = bytes.get(at..at + 8) {
        value.copy_from_slice(from);
    }
    u64::from_le_bytes(value)
}

/// Takes a state over.
pub fn restore(exec: &mut Exec<'_>, state: &CpuState) -> Result<(), EngineError> {
    if state.cr0 & control::CR0_PG != 0 && state.cr0 & control::CR0_PE == 0 {
        return Err(EngineError::InvalidState(
            "paging without protected mode".into(),
        ));
    }
    exec.restore_msrs(&state.msrs).map_err(|entry| {
        EngineError::InvalidState(format!(
            "MSR {:#x} cannot be {:#x}",
            entry.index, entry.value
        ))
    })?;
    let (cpu, env) = (&mut *exec.cpu, &*exec.env);
    cpu.gpr = state.gpr;
    cpu.rip = state.rip;
    cpu.set_rflags(state.rflags);
    for (i, segment) in state.segments.iter().enumerate() {
        cpu.set_segment(i, *segment);
    }
    (cpu.tr, cpu.ldtr, cpu.gdtr, cpu.idtr) = (state.tr, state.ldtr, state.gdtr, state.idtr);
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    (cpu.efer, cpu.xcr0) = (state.efer, state.xcr0 | 1);
    (cpu.dr, cpu.dr6, cpu.dr7) = (state.dr, state.dr6, state.dr7);
    if state.xsave.bytes.len() >= XSAVE_SIZE {
        let bytes = &state.xsave.bytes;
        for (to, from) in cpu.fx.0.iter_mut().zip(bytes) {
            *to = *from;
        }
        cpu.mxcsr = word(bytes, 24) as u32 & 0xffff;
        for (i, ymm) in cpu.ymm.0.iter_mut().enumerate() {
            *ymm = [
                word(bytes, 160 + i * 16),
                word(bytes, 168 + i * 16),
                word(bytes, 576 + i * 16),
                word(bytes, 584 + i * 16),
            ];
        }
    }
    cpu.tsc_offset = state.tsc_offset;
    if let Some(apic) = &state.apic {
        env.apic.restore(apic, state.tsc_offset, env.clock.now_ns());
    }
    if state.nmi_pending {
        env.apic.raise_nmi();
    }
    cpu.halted = state.mp_state == MpState::Halted;
    cpu.wait_for_sipi = state.mp_state == MpState::WaitForSipi;
    cpu.interrupt_shadow = state.interrupt_shadow;
    cpu.nmi_blocked = state.nmi_blocked;
    Ok(())
}
