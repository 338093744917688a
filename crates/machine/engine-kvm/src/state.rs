//! A vCPU's state to and from the kernel.
//!
//! The order of writes matters: each step's checks look at what earlier ones set, and registers clear pending events.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use strata_engine::EngineError;
use strata_engine::x86::{
    CpuState, DescriptorTable, Feature, MpState, MsrEntry, MsrIndex, PendingEvent, Segment,
    XsaveState, xsave_size,
};

use crate::engine::failed;
use crate::lapic::{self, Timer};
use crate::vcpu::KvmVcpu;

/// Byte offsets in the XSAVE area.
const MXCSR_MASK: usize = 28;
const SOFTWARE: usize = 464;
const XSTATE_BV: usize = 512;
/// All bits of MXCSR that exist: what the mask says on every CPU that the models allow.
const MXCSR_ALL: u32 = 0xffff;
/// The `shadow` of an event after STI, MOV SS or POP SS.
const SHADOW: u8 = 3;
const NMI: u8 = 2;
/// A machine restored at most so far from the frequency it was saved at, in parts per million: what kernels accept.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Copies the whole state out.
pub fn save(vcpu: &KvmVcpu) -> Result<CpuState, EngineError> {
    let fd = &vcpu.fd;
    // First: it settles start-up messages that wait, which change everything else.
    let mp = fd
        .get_mp_state()
        .map_err(failed("reading the multiprocessor state"))?;
    let regs = fd.get_regs().map_err(failed("reading registers"))?;
    let sregs = fd.get_sregs().map_err(failed("reading system registers"))?;
    let xcrs = fd.get_xcrs().map_err(failed("reading XCR0"))?;
    let debug = fd
        .get_debug_regs()
        .map_err(failed("reading debug registers"))?;
    let events = fd.get_vcpu_events().map_err(failed("reading events"))?;
    let page = fd.get_lapic().map_err(failed("reading the local APIC"))?;
    Ok(CpuState {
        gpr: gpr(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(|s| segment(&s)),
        tr: segment(&sregs.tr),
        ldtr: segment(&sregs.ldt),
        gdtr: table(&sregs.gdt),
        idtr: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        xcr0: xcrs.xcrs.first().map_or(1, |xcr| xcr.value),
        dr: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        msrs: save_msrs(vcpu),
        xsave: save_xsave(vcpu)?,
        apic: Some(lapic::save(&page, sregs.apic_base, vcpu.timer)),
        mp_state: match mp.mp_state {
            KVM_MP_STATE_HALTED => MpState::Halted,
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_SIPI_RECEIVED => MpState::WaitForSipi,
            _ => MpState::Runnable,
        },
        interrupt_shadow: events.interrupt.shadow != 0,
        nmi_blocked: events.nmi.masked != 0,
        nmi_pending: events.nmi.pending != 0,
        pending: pending(&events),
        tsc_offset: vcpu.tsc_offset,
        tsc_hz: vcpu.tsc_hz,
    })
}

/// Takes a state over.
pub fn restore(vcpu: &mut KvmVcpu, state: &CpuState) -> Result<(), EngineError> {
    check_tsc(vcpu, state)?;
    let invalid =
        |what: &'static str| move |_| EngineError::InvalidState(format!("{what} are not possible"));
    let fd = &vcpu.fd;
    let current = fd.get_sregs().map_err(failed("reading system registers"))?;
    fd.set_mp_state(mp_state(state.mp_state))
        .map_err(failed("setting the multiprocessor state"))?;
    fd.set_regs(&regs(state))
        .map_err(invalid("its registers"))?;
    fd.set_sregs(&sregs(state, &current))
        .map_err(invalid("its system registers"))?;
    // The components first: the area may only have what XCR0 could hold, whatever XCR0 is.
    restore_xsave(vcpu, &state.xsave)?;
    let fd = &vcpu.fd;
    fd.set_xcrs(&xcrs(state))
        .map_err(invalid("the components in its XCR0"))?;
    fd.set_debug_regs(&kvm_debugregs {
        db: state.dr,
        dr6: state.dr6,
        dr7: state.dr7,
        ..Default::default()
    })
    .map_err(invalid("its debug registers"))?;
    if let Some(apic) = &state.apic {
        let now_ns = vcpu.machine.time.clock().now_ns();
        fd.set_lapic(&lapic::load(apic, now_ns))
            .map_err(invalid("its local APIC's registers"))?;
    }
    restore_msrs(vcpu, state)?;
    vcpu.fd
        .set_vcpu_events(&events(state))
        .map_err(invalid("its pending events"))?;
    vcpu.step_tsc(state.tsc_offset.wrapping_sub(vcpu.tsc_offset))?;
    vcpu.tsc_offset = state.tsc_offset;
    vcpu.timer = state.apic.as_ref().map_or(Timer::default(), |apic| Timer {
        deadline_ns: apic.timer_deadline_ns,
        tsc_deadline: apic.tsc_deadline,
    });
    Ok(())
}

/// A guest measures its time-stamp counter once and relies on it.
fn check_tsc(vcpu: &KvmVcpu, state: &CpuState) -> Result<(), EngineError> {
    let tolerance = vcpu.tsc_hz / 1_000_000 * TSC_TOLERANCE_PPM;
    if state.tsc_hz.abs_diff(vcpu.tsc_hz) <= tolerance {
        return Ok(());
    }
    Err(EngineError::InvalidState(format!(
        "its time-stamp counter runs at {} kHz, and this host's KVM only offers {} kHz",
        state.tsc_hz / 1000,
        vcpu.tsc_hz / 1000
    )))
}

fn gpr(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

fn regs(state: &CpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags | 2);
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

fn segment(from: &kvm_segment) -> Segment {
    let present = from.present != 0 && from.unusable == 0;
    let attributes = u16::from(from.type_ & 0xf)
        | u16::from(from.s & 1) << 4
        | u16::from(from.dpl & 3) << 5
        | u16::from(present) << 7
        | u16::from(from.avl & 1) << 12
        | u16::from(from.l & 1) << 13
        | u16::from(from.db & 1) << 14
        | u16::from(from.g & 1) << 15;
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        attributes,
    }
}

fn kvm_segment(from: &Segment) -> kvm_segment {
    let bit = |n: u16| (from.attributes >> n & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 0xf) as u8,
        present: bit(7),
        dpl: from.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!from.present()),
        ..Default::default()
    }
}

fn table(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: from.base,
        limit: from.limit,
    }
}

fn sregs(state: &CpuState, current: &kvm_sregs) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.map(|s| kvm_segment(&s));
    let table = |from: DescriptorTable| kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..Default::default()
    };
    kvm_sregs {
        es,
        cs,
        ss,
        ds,
        fs,
        gs,
        tr: kvm_segment(&state.tr),
        ldt: kvm_segment(&state.ldtr),
        gdt: table(state.gdtr),
        idt: table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: state
            .apic
            .as_ref()
            .map_or(current.apic_base, |apic| apic.base),
        interrupt_bitmap: [0; 4],
    }
}

fn xcrs(state: &CpuState) -> kvm_xcrs {
    let mut all = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    if let Some(first) = all.xcrs.first_mut() {
        *first = kvm_xcr {
            xcr: 0,
            reserved: 0,
            value: state.xcr0 | 1,
        };
    }
    all
}

fn mp_state(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // The state in which a start-up message works without another INIT.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

fn pending(events: &kvm_vcpu_events) -> Option<PendingEvent> {
    let exception = &events.exception;
    if exception.injected != 0 || exception.pending != 0 {
        let error = (exception.has_error_code != 0).then_some(exception.error_code);
        return Some(PendingEvent {
            vector: exception.nr,
            error,
            exception: true,
        });
    }
    // A software interrupt starts again from its instruction.
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        return Some(PendingEvent {
            vector: events.interrupt.nr,
            error: None,
            exception: false,
        });
    }
    (events.nmi.injected != 0).then_some(PendingEvent {
        vector: NMI,
        error: None,
        exception: false,
    })
}

fn events(state: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    events.interrupt.shadow = if state.interrupt_shadow { SHADOW } else { 0 };
    events.nmi.masked = state.nmi_blocked.into();
    events.nmi.pending = state.nmi_pending.into();
    match state.pending {
        Some(PendingEvent {
            vector,
            error,
            exception: true,
        }) => {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = error.is_some().into();
            events.exception.error_code = error.unwrap_or(0);
        }
        Some(PendingEvent { vector: NMI, .. }) => events.nmi.injected = 1,
        Some(PendingEvent { vector, .. }) => {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        None => {}
    }
    events
}

fn save_xsave(vcpu: &KvmVcpu) -> Result<XsaveState, EngineError> {
    let area = vcpu
        .fd
        .get_xsave()
        .map_err(failed("reading the extended state"))?;
    let mask = vcpu.machine.model.xcr0_mask();
    let mut bytes: Vec<u8> = area
        .region
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    bytes.truncate(xsave_size(mask) as usize);
    // The kernel fills in the initial values of components that are in their initial state: all are valid.
    put(&mut bytes, XSTATE_BV, &mask.to_le_bytes());
    // What the kernel says of the host's CPU in the part left to software is no business of the guest's state.
    put(&mut bytes, SOFTWARE, &[0; XSTATE_BV - SOFTWARE]);
    put(&mut bytes, MXCSR_MASK, &MXCSR_ALL.to_le_bytes());
    Ok(XsaveState { bytes })
}

fn restore_xsave(vcpu: &KvmVcpu, state: &XsaveState) -> Result<(), EngineError> {
    let mask = vcpu.machine.model.xcr0_mask();
    let mut bytes = state.bytes.clone();
    bytes.resize(4096, 0);
    let present = bytes
        .get(XSTATE_BV..XSTATE_BV + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes);
    put(&mut bytes, XSTATE_BV, &(present & mask).to_le_bytes());
    let mut area = kvm_xsave::default();
    for (to, from) in area.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *to = from.try_into().map_or(0, u32::from_le_bytes);
    }
    // SAFETY: without dynamically enabled features, which the models do not have, the kernel reads 4 KiB.
    unsafe { vcpu.fd.set_xsave(&area) }
        .map_err(|_| EngineError::InvalidState("its extended state is not possible".into()))
}

fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + from.len()) {
        to.copy_from_slice(from);
    }
}

/// Registers of the model that this KVM lacks read as zero.
fn save_msrs(vcpu: &KvmVcpu) -> Vec<MsrEntry> {
    let value = |index| {
        if vcpu.msrs.contains(&index) {
            vcpu.read_msr(index).unwrap_or(0)
        } else {
            0
        }
    };
    vcpu.machine
        .model
        .msrs()
        .map(|index| MsrEntry {
            index,
            value: value(index),
        })
        .collect()
}

fn restore_msrs(vcpu: &mut KvmVcpu, state: &CpuState) -> Result<(), EngineError> {
    for entry in &state.msrs {
        // Kernels log writes to registers that they only let be read, whatever the value.
        let there = if vcpu.msrs.contains(&entry.index) {
            vcpu.read_msr(entry.index)
        } else {
            Some(0)
        };
        if there != Some(entry.value) {
            vcpu.write_msr(entry.index, entry.value)?;
        }
    }
    // After the local APIC, whose mode says whether it counts.
    let deadline = state.apic.as_ref().map_or(0, |apic| apic.tsc_deadline);
    if vcpu.machine.model.has(Feature::TscDeadline) {
        vcpu.write_msr(MsrIndex::TSC_DEADLINE.0, deadline)?;
    }
    Ok(())
}
