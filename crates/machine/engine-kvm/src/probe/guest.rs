//! The probe's guest: a few bytes of code in long mode without interrupts; anything unexpected ends in a triple fault.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use strata_engine::{EngineError, Kicker};
use strata_memory::{Gpa, GuestMemory, SlotKind};

use crate::engine::{failed, set_up_for_intel};
use crate::kick::{Running, Shared};
use crate::slots::Slots;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// Zeros: an operand for CMPXCHG16B, and a save area in the initial state.
const DATA: u64 = 0x5000;
const MEMORY: u64 = 0x8000;

/// Present, writable, for ring 3.
const TABLE: u64 = 7;
/// A 2 MiB page.
const LARGE: u64 = 1 << 7 | TABLE;

const CR0: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
/// LME and LMA.
const EFER: u64 = 1 << 8 | 1 << 10;

/// inc rcx; jmp to it
const LOOP: &[u8] = &[0x48, 0xff, 0xc1, 0xeb, 0xfb];
const LOOP_INSTRUCTIONS: u64 = 2;
/// out 0x10, al; jmp to it
const EXITS: &[u8] = &[0xe6, 0x10, 0xeb, 0xfc];
/// cmpxchg16b [rdi]; out 0x10, al
const CMPXCHG16B: &[u8] = &[0x48, 0x0f, 0xc7, 0x0f, 0xe6, 0x10];
/// xrstor [rdi]; out 0x10, al
const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2f, 0xe6, 0x10];

/// Kicks that an instruction survives before it counts as hanging.
const PATIENCE: u32 = 3;

/// One vCPU and its memory.
pub struct Guest {
    /// Dropped before the memory that it uses; the kernel keeps the VM for as long.
    fd: VcpuFd,
    slots: Slots,
    shared: Arc<Shared>,
}

enum Step {
    Port,
    Kicked,
    /// A triple fault, or KVM gave up.
    Broken,
}

impl Guest {
    pub fn new(kvm: &kvm_ioctls::Kvm) -> Result<Guest, EngineError> {
        let memory = GuestMemory::new();
        let internal =
            |error| EngineError::Internal(format!("no memory for the probe's guest: {error}"));
        memory
            .add_slot(Gpa(0), MEMORY, SlotKind::Ram)
            .map_err(internal)?;
        for (gpa, value) in [
            (PML4, PDPT | TABLE),
            (PDPT, DIRECTORY | TABLE),
            (DIRECTORY, LARGE),
        ] {
            memory.write_u64(Gpa(gpa), value).map_err(internal)?;
        }
        let vm = kvm.create_vm().map_err(failed("creating the VM"))?;
        set_up_for_intel(&vm)?;
        let slots = Slots::new(memory);
        slots.sync(&vm)?;
        let mut fd = vm.create_vcpu(0).map_err(failed("creating a CPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("asking KVM for its CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(failed("setting CPUID"))?;
        let shared = Arc::new(Shared::default());
        shared.attach(&mut fd);
        Ok(Guest { fd, slots, shared })
    }

    pub fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.shared) as Arc<dyn Kicker>
    }

    /// The calling thread runs the guest until the result is dropped.
    pub fn enter(&self) -> Result<Running, EngineError> {
        self.shared.enter()
    }

    pub fn cmpxchg16b(&mut self, given_up: impl Fn() -> bool) -> Result<bool, EngineError> {
        self.load(CMPXCHG16B, 0, CR4)?;
        self.reaches_port(given_up)
    }

    pub fn xrstor(&mut self, given_up: impl Fn() -> bool) -> Result<bool, EngineError> {
        // A CPU without XSAVE refuses the control bit.
        if self.load(XRSTOR, 0, CR4 | CR4_OSXSAVE).is_err() {
            return Ok(false);
        }
        self.reaches_port(given_up)
    }

    /// Time of an exit, over at least `duration` of this thread's time. Nothing if the guest fails.
    pub fn exit_ns(
        &mut self,
        duration: Duration,
        given_up: impl Fn() -> bool,
    ) -> Result<Option<u64>, EngineError> {
        self.load(EXITS, 0, CR4)?;
        let (start, mut exits) = (thread_time(), 0_u64);
        loop {
            match self.step(&given_up)? {
                Step::Port => exits += 1,
                Step::Kicked => {}
                Step::Broken => return Ok(None),
            }
            let passed = thread_time().saturating_sub(start);
            // One exit may take longer than all that there should be.
            if passed >= duration && exits > 0 {
                return Ok(Some(
                    u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX) / exits,
                ));
            }
        }
    }

    /// Instructions per second of a loop in this ring. Nothing if the guest fails.
    pub fn loop_per_s(
        &mut self,
        ring: u8,
        duration: Duration,
        given_up: impl Fn() -> bool,
    ) -> Result<Option<u64>, EngineError> {
        self.load(LOOP, ring, CR4)?;
        let start = thread_time();
        loop {
            match self.step(&given_up)? {
                Step::Kicked => {}
                Step::Port | Step::Broken => return Ok(None),
            }
            let passed = thread_time().saturating_sub(start);
            if passed >= duration {
                let rounds = self.fd.get_regs().map_err(failed("reading registers"))?.rcx;
                let instructions = u128::from(rounds) * u128::from(LOOP_INSTRUCTIONS);
                let rate = instructions * 1_000_000_000 / passed.as_nanos().max(1);
                return Ok(Some(u64::try_from(rate).unwrap_or(u64::MAX)));
            }
        }
    }

    /// True if the guest comes to its port access.
    fn reaches_port(&mut self, given_up: impl Fn() -> bool) -> Result<bool, EngineError> {
        for _ in 0..PATIENCE {
            match self.step(&given_up)? {
                Step::Port => return Ok(true),
                Step::Broken => return Ok(false),
                Step::Kicked => {}
            }
        }
        Ok(false)
    }

    fn step(&mut self, given_up: &impl Fn() -> bool) -> Result<Step, EngineError> {
        if given_up() {
            return Err(EngineError::Internal("the probe was given up".into()));
        }
        match self.fd.run() {
            Ok(VcpuExit::IoOut(..)) => Ok(Step::Port),
            Ok(VcpuExit::Intr) => Ok(Step::Kicked),
            Ok(_) => Ok(Step::Broken),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.shared.take_kick();
                Ok(Step::Kicked)
            }
            Err(error) => Err(failed("running a CPU")(error)),
        }
    }

    /// Puts code in place and the vCPU before it.
    fn load(&mut self, code: &[u8], ring: u8, cr4: u64) -> Result<(), EngineError> {
        let memory = self.slots.memory();
        memory
            .write(Gpa(CODE), code)
            .map_err(|error| EngineError::Internal(error.to_string()))?;
        let before = self
            .fd
            .get_sregs()
            .map_err(failed("reading system registers"))?;
        let data = kvm_segment {
            type_: 3,
            db: 1,
            l: 0,
            selector: 0x10 | u16::from(ring),
            ..code_segment(ring)
        };
        let sregs = kvm_sregs {
            cs: code_segment(ring),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            cr0: CR0,
            cr3: PML4,
            cr4,
            efer: EFER,
            ..before
        };
        self.fd
            .set_sregs(&sregs)
            .map_err(failed("setting system registers"))?;
        let regs = kvm_regs {
            rip: CODE,
            rdi: DATA,
            rsp: MEMORY,
            rflags: 2,
            rax: 3,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(failed("setting registers"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.detach();
    }
}

fn code_segment(ring: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8 | u16::from(ring),
        type_: 11,
        present: 1,
        dpl: ring,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    }
}

/// CPU time of this thread, guests included: other programs on a loaded host do not count.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes the structure, and cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
