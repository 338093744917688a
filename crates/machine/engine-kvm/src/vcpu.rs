//! One vCPU: its run loop, and what it needs from the kernel before it can run.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, Msrs, kvm_device_attr, kvm_guest_debug, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use strata_engine::x86::{CpuState, CpuidContext, Feature, MsrIndex, X86};
use strata_engine::{
    EngineError, Exit, ExitCause, GuestDebug, IoBus, Kicker, Vcpu, VcpuId, VcpuStats,
};
use strata_memory::Gpa;

use crate::cpuid;
use crate::engine::{Machine, failed};
use crate::kick::Shared;
use crate::lapic::{self, Timer};
use crate::state;

/// `KVM_INTERRUPT`, which the wrappers lack: `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
/// `_IOW(KVMIO, 0xe1 and 0xe2, struct kvm_device_attr)`, which they lack for vCPUs on x86.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
/// DR7: exact breakpoints, and the bit that is always one.
const DR7_EXACT: u64 = 1 << 9 | 1 << 10;
/// Types of segments (Intel SDM vol. 3, 3.4.5.1 and 3.5): accessed, and readable or writable.
const CODE: u8 = 11;
const DATA: u8 = 3;
const BUSY_TSS: u8 = 11;
/// MTRRs on, everything write-back: as firmware leaves them.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Fast strings on, no branch-trace store, no event sampling.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;

/// One vCPU.
pub struct KvmVcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) machine: Arc<Machine>,
    pub(crate) id: VcpuId,
    /// Ticks per second of its time-stamp counter.
    pub(crate) tsc_hz: u64,
    /// Its counter less the machine's, wrapping.
    pub(crate) tsc_offset: u64,
    /// The part of [`crate::time::Time::correction`] that its counter has.
    corrected: u64,
    /// Its local APIC's timer when it last stopped.
    pub(crate) timer: Timer,
    /// Registers of the model that this KVM has.
    pub(crate) msrs: Vec<u32>,
    shared: Arc<Shared>,
    stats: VcpuStats,
    /// Why the state could not be read: told at the next run, because reading it cannot fail.
    broken: Option<EngineError>,
}

/// What `KVM_RUN` wants, without borrowing the vCPU.
enum Wish {
    Port { port: u16, out: bool },
    MmioRead(u64, usize),
    MmioWrite(u64, [u8; 8], usize),
    EndOfInterrupt(u8),
    Shutdown,
    Debug,
    Again,
    Fail(Failure),
}

enum Failure {
    /// The kernel could not emulate an instruction, or the like.
    Internal,
    /// The CPU refused the state.
    Entry(u64),
    Other(String),
}

impl KvmVcpu {
    pub(crate) fn new(machine: Arc<Machine>, id: VcpuId) -> Result<KvmVcpu, EngineError> {
        let mut fd = machine
            .vm
            .create_vcpu(id.0.into())
            .map_err(failed("creating a CPU"))?;
        let clock_khz = u32::try_from(machine.time.clock().tsc_hz() / 1000).unwrap_or(0);
        if machine.scales_tsc && clock_khz != 0 {
            fd.set_tsc_khz(clock_khz)
                .map_err(failed("setting the frequency of the time-stamp counter"))?;
        }
        let khz = fd
            .get_tsc_khz()
            .map_err(failed("reading the frequency of the time-stamp counter"))?;
        let tsc_hz = u64::from(khz) * 1000;
        let context = CpuidContext {
            apic_id: id.0,
            vcpus: machine.vcpus,
            apic_enabled: true,
            tsc_hz,
            ..CpuidContext::default()
        };
        cpuid::set(&fd, &machine.model, &context)?;
        let shared = Arc::new(Shared::default());
        shared.attach(&mut fd);
        let msrs = machine
            .model
            .msrs()
            .filter(|&index| read_msr(&fd, index).is_some())
            .collect();
        let mut vcpu = KvmVcpu {
            fd,
            machine,
            id,
            tsc_hz,
            tsc_offset: 0,
            corrected: 0,
            timer: Timer::default(),
            msrs,
            shared,
            stats: VcpuStats::default(),
            broken: None,
        };
        vcpu.reset_segments()?;
        for (index, value) in [
            (MsrIndex::MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
            (MsrIndex::MISC_ENABLE, MISC_ENABLE),
        ] {
            if vcpu.msrs.contains(&index.0) {
                vcpu.write_msr(index.0, value)?;
            }
        }
        Ok(vcpu)
    }

    /// Gives the segments the types that the manual gives them after a reset, which not every KVM does.
    fn reset_segments(&mut self) -> Result<(), EngineError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(failed("reading system registers"))?;
        sregs.cs.type_ = CODE;
        for data in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            data.type_ = DATA;
        }
        sregs.tr.type_ = BUSY_TSS;
        self.fd
            .set_sregs(&sregs)
            .map_err(failed("setting system registers"))
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Reads one register; `None` if KVM has none of this number.
    pub(crate) fn read_msr(&self, index: u32) -> Option<u64> {
        read_msr(&self.fd, index)
    }

    /// Writes one register.
    pub(crate) fn write_msr(&mut self, index: u32, data: u64) -> Result<(), EngineError> {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let one = Msrs::from_entries(&[entry])
            .map_err(|_| EngineError::Internal("one MSR is too many".into()))?;
        match self.fd.set_msrs(&one).map_err(failed("writing an MSR"))? {
            0 => Err(EngineError::InvalidState(format!(
                "MSR {index:#x} cannot be {data:#x}"
            ))),
            _ => Ok(()),
        }
    }

    /// Moves the time-stamp counter by so many ticks, wrapping, from whatever it reads at this instant.
    pub(crate) fn step_tsc(&mut self, by: u64) -> Result<(), EngineError> {
        if by == 0 {
            return Ok(());
        }
        let mut offset = 0;
        if tsc_offset_ioctl(&self.fd, KVM_GET_DEVICE_ATTR, &mut offset) {
            offset = offset.wrapping_add(by);
            if tsc_offset_ioctl(&self.fd, KVM_SET_DEVICE_ATTR, &mut offset) {
                return Ok(());
            }
        }
        // Kernels before 5.16: as exact as two calls follow each other.
        let now = self.read_msr(MsrIndex::TSC.0).unwrap_or(0);
        self.write_msr(MsrIndex::TSC.0, now.wrapping_add(by))
    }

    /// Lets the counter go back by what the machine stood still.
    fn follow_clock(&mut self) -> Result<(), EngineError> {
        let machine = Arc::clone(&self.machine);
        let current = || {
            self.read_msr(MsrIndex::TSC.0)
                .unwrap_or(0)
                .wrapping_sub(self.tsc_offset)
        };
        let correction = machine.time.correction(&machine.vm, self.tsc_hz, current);
        if correction != self.corrected {
            self.step_tsc(correction.wrapping_sub(self.corrected))?;
            self.corrected = correction;
            self.set_timer()?;
            // The guest's watchdogs shall not count the pause. Fails if it has no paravirtual clock to tell it by.
            let _ = self.fd.kvmclock_ctrl();
        }
        Ok(())
    }

    /// Notes when the timer fires, while machine time runs.
    fn note_timer(&mut self) -> Result<(), EngineError> {
        let page = self
            .fd
            .get_lapic()
            .map_err(failed("reading the local APIC"))?;
        let now_ns = self.machine.time.clock().now_ns();
        self.timer.deadline_ns = lapic::deadline_ns(&page, now_ns);
        if self.machine.model.has(Feature::TscDeadline) {
            self.timer.tsc_deadline = self.read_msr(MsrIndex::TSC_DEADLINE.0).unwrap_or(0);
        }
        Ok(())
    }

    /// Sets the kernel's deadline anew after the counter has moved. A timer that counts down cannot be set without
    /// writing the whole local APIC, which could lose an interrupt that comes meanwhile: after a pause it fires early
    /// instead, as guests know timers of virtual machines to do.
    fn set_timer(&mut self) -> Result<(), EngineError> {
        match self.timer.tsc_deadline {
            0 => Ok(()),
            deadline => self.write_msr(MsrIndex::TSC_DEADLINE.0, deadline),
        }
    }

    /// Notes a counter that the guest has moved, while machine time and the counter run alike.
    fn note_tsc_offset(&mut self) {
        let Some(now) = self.read_msr(MsrIndex::TSC.0) else {
            return;
        };
        let offset = now.wrapping_sub(self.machine.time.tsc(self.tsc_hz));
        // The two cannot be read at once, and drift apart: only a difference that somebody made counts.
        let moved = (offset.wrapping_sub(self.tsc_offset) as i64).unsigned_abs();
        if moved > self.tsc_hz {
            self.tsc_offset = offset;
        }
    }

    fn run_inside(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        loop {
            self.machine.slots.sync(&self.machine.vm)?;
            self.offer_ext_int();
            let wish = match self.fd.run() {
                Ok(exit) => wish(exit),
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.count(ExitCause::Request);
                        if self.shared.take_kick() {
                            return Ok(Exit::Kicked);
                        }
                        Wish::Again
                    }
                    libc::EAGAIN => Wish::Again,
                    _ => return Err(self.refused(error)),
                },
            };
            match wish {
                Wish::Again => {}
                Wish::Port { port, out } => {
                    self.count(ExitCause::Port);
                    self.port(bus, port, out)?;
                }
                Wish::MmioRead(gpa, len) => {
                    self.count(ExitCause::Mmio);
                    self.mmio_read(bus, gpa, len)?;
                }
                Wish::MmioWrite(gpa, data, len) => {
                    self.count(ExitCause::Mmio);
                    self.mmio_write(bus, gpa, data.get(..len).unwrap_or_default())?;
                }
                Wish::EndOfInterrupt(vector) => bus.end_of_interrupt(vector),
                Wish::Shutdown => return Ok(Exit::Shutdown),
                Wish::Debug => return Ok(Exit::Debug),
                Wish::Fail(failure) => return Err(self.describe(failure)),
            }
        }
    }

    fn count(&mut self, cause: ExitCause) {
        *self.stats.exits.entry(cause).or_default() += 1;
    }

    /// Carries out a port access, which may be many for a string instruction.
    fn port(&mut self, bus: &dyn IoBus, port: u16, out: bool) -> Result<(), EngineError> {
        let size = self.machine.vm.run_size();
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit was KVM_EXIT_IO, for which the kernel fills this member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (width, len) = (
            usize::from(io.size),
            usize::from(io.size).saturating_mul(io.count as usize),
        );
        let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        if !matches!(width, 1 | 2 | 4) || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(EngineError::Internal(
                "KVM describes a port access outside its page".into(),
            ));
        }
        // SAFETY: the range lies in the mapping of `size` bytes that begins with `run`, checked above; the kernel does
        // not touch it before the next KVM_RUN, and nothing else refers to it.
        let data = unsafe {
            std::slice::from_raw_parts_mut((&raw mut *run).cast::<u8>().add(offset), len)
        };
        for item in data.chunks_exact_mut(width) {
            match out {
                true => bus.port_out(port, item),
                false => bus.port_in(port, item),
            }
        }
        Ok(())
    }

    fn mmio_read(&mut self, bus: &dyn IoBus, gpa: u64, len: usize) -> Result<(), EngineError> {
        let mut buffer = [0xff; 8];
        let data = buffer.get_mut(..len).unwrap_or_default();
        if self.is_memory(gpa)? {
            // It may be gone again: then nothing answers.
            let _ = self.machine.slots.memory().read(Gpa(gpa), data);
        } else {
            for (gpa, piece) in (gpa..).step_by(piece(len)).zip(data.chunks_mut(piece(len))) {
                bus.mmio_read(gpa, piece);
            }
        }
        // SAFETY: the exit was KVM_EXIT_MMIO, for which the kernel uses this member.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        for (to, from) in mmio.data.iter_mut().zip(data) {
            *to = *from;
        }
        Ok(())
    }

    fn mmio_write(&mut self, bus: &dyn IoBus, gpa: u64, data: &[u8]) -> Result<(), EngineError> {
        if self.is_memory(gpa)? {
            // Writes to ROM have no effect.
            let _ = self.machine.slots.memory().write(Gpa(gpa), data);
        } else {
            let len = piece(data.len());
            for (gpa, piece) in (gpa..).step_by(len).zip(data.chunks(len)) {
                bus.mmio_write(gpa, piece);
            }
        }
        Ok(())
    }

    /// Whether memory is there, of which the kernel did not know yet or which is ROM.
    fn is_memory(&self, gpa: u64) -> Result<bool, EngineError> {
        self.machine.slots.sync(&self.machine.vm)?;
        let table = self.machine.slots.memory().slots();
        Ok(table.find(Gpa(gpa)).is_some())
    }

    /// Passes an 8259's interrupt to the vCPU as soon as it takes interrupts.
    fn offer_ext_int(&mut self) {
        let vector = self.shared.ext_int();
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = u8::from(vector.is_some());
        if let Some(vector) = vector
            && run.ready_for_interrupt_injection != 0
        {
            run.request_interrupt_window = 0;
            let number = u32::from(vector);
            // SAFETY: `number` has the layout of `struct kvm_interrupt`, which the kernel only reads.
            let done =
                unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_INTERRUPT, &raw const number) };
            if done == 0 {
                self.shared.take_ext_int();
                self.stats.interrupts += 1;
            }
        }
    }

    fn refused(&self, error: kvm_ioctls::Error) -> EngineError {
        EngineError::Internal(format!(
            "KVM cannot run CPU {}: {} {}",
            self.id.0,
            std::io::Error::from_raw_os_error(error.errno()),
            self.place()
        ))
    }

    fn describe(&mut self, failure: Failure) -> EngineError {
        let place = self.place();
        let what = match failure {
            Failure::Internal => {
                // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member.
                let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                match internal.suberror {
                    kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                        "KVM cannot emulate an instruction".to_owned()
                    }
                    other => format!("KVM gave up (internal error {other})"),
                }
            }
            Failure::Entry(reason) => {
                format!("the CPU refused the guest's state (reason {reason:#x})")
            }
            Failure::Other(exit) => {
                format!("KVM left the guest for a reason not known here ({exit})")
            }
        };
        EngineError::Internal(format!("{what} {place}"))
    }

    /// Where the vCPU is, and the bytes there if they can be read.
    fn place(&self) -> String {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return String::new();
        };
        let linear = regs.rip.wrapping_add(sregs.cs.base);
        let mut bytes = [0_u8; 15];
        let physical = self
            .fd
            .translate_gva(linear)
            .ok()
            .filter(|t| t.valid != 0)
            .map(|t| t.physical_address);
        let read = physical.is_some_and(|gpa| {
            self.machine
                .slots
                .memory()
                .read(Gpa(gpa), &mut bytes)
                .is_ok()
        });
        match read {
            true => format!("at {linear:#x}: {bytes:02x?}"),
            false => format!("at {linear:#x}"),
        }
    }
}

/// In how many bytes at a time to carry out an access of `len` bytes: the bus knows powers of two. Others come from
/// operands that cross pages.
fn piece(len: usize) -> usize {
    if len.is_power_of_two() { len } else { 1 }
}

fn wish(exit: VcpuExit<'_>) -> Wish {
    match exit {
        VcpuExit::IoIn(port, _) => Wish::Port { port, out: false },
        VcpuExit::IoOut(port, _) => Wish::Port { port, out: true },
        VcpuExit::MmioRead(gpa, data) => Wish::MmioRead(gpa, data.len()),
        VcpuExit::MmioWrite(gpa, data) => {
            let mut bytes = [0; 8];
            for (to, from) in bytes.iter_mut().zip(data) {
                *to = *from;
            }
            Wish::MmioWrite(gpa, bytes, data.len())
        }
        VcpuExit::IoapicEoi(vector) => Wish::EndOfInterrupt(vector),
        VcpuExit::Shutdown => Wish::Shutdown,
        VcpuExit::Debug(_) => Wish::Debug,
        // The kernel halts by itself; the others only give us a chance to act.
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => Wish::Again,
        VcpuExit::InternalError => Wish::Fail(Failure::Internal),
        VcpuExit::FailEntry(reason, _) => Wish::Fail(Failure::Entry(reason)),
        other => Wish::Fail(Failure::Other(format!("{other:?}"))),
    }
}

fn read_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .ok()?;
    match fd.get_msrs(&mut one) {
        Ok(1) => one.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// Gets or sets what is added to the host's counter; false if this kernel does not do that.
fn tsc_offset_ioctl(fd: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> bool {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw mut *offset) as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the structure, and reads or writes the 8 bytes of `offset`.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const attribute) == 0 }
}

impl Vcpu<X86> for KvmVcpu {
    fn run(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let running = self.shared.enter()?;
        self.follow_clock()?;
        let exit = self.run_inside(bus);
        drop(running);
        self.note_tsc_offset();
        self.note_timer()?;
        exit
    }

    fn state(&mut self) -> CpuState {
        match state::save(self) {
            Ok(state) => state,
            Err(error) => {
                self.broken = Some(error);
                CpuState::default()
            }
        }
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        state::restore(self, state)
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.shared) as Arc<dyn Kicker>
    }

    fn debug(&mut self, wish: &GuestDebug) -> Result<(), EngineError> {
        let mut debug = kvm_guest_debug::default();
        let [registers @ .., _, _, _, control] = &mut debug.arch.debugreg;
        if wish.breakpoints.len() > registers.len() {
            return Err(EngineError::InvalidState(
                "a CPU has four breakpoints".to_owned(),
            ));
        }
        for (index, (register, address)) in registers.iter_mut().zip(&wish.breakpoints).enumerate()
        {
            *register = *address;
            // Globally on, at an instruction: DR7 (Intel SDM vol. 3, 18.2.4).
            *control |= 2 << (2 * index) | DR7_EXACT;
        }
        if !wish.breakpoints.is_empty() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        }
        if wish.step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(failed("setting breakpoints"))
    }

    fn stats(&self) -> VcpuStats {
        self.stats.clone()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.shared.detach();
    }
}
