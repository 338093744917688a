//! The engine of one machine: its VM, its vCPUs, its interrupts and doorbells.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_QUIRK_LINT0_REENABLED, kvm_enable_cap,
};
use kvm_ioctls::{Cap, VmFd};
use strata_engine::x86::{CpuModel, X86};
use strata_engine::{
    Doorbell, DoorbellAddress, Engine, EngineError, InterruptSink, MachineClock, Vcpu, VcpuId,
};
use strata_memory::GuestMemory;

use crate::cpuid;
use crate::doorbells::Doorbells;
use crate::interrupts::{IOAPIC_PINS, Messages};
use crate::slots::Slots;
use crate::time::Time;
use crate::vcpu::KvmVcpu;

/// The engine's name, as users write it.
pub(crate) const NAME: &str = "kvm";
/// Three pages in the hole below 4 GiB that Intel's KVM wants for real mode on old CPUs; no device is there.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What the engine needs of the kernel.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::SplitIrqchip, "a split interrupt controller"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::IrqRouting, "interrupt routes"),
    (Cap::ImmediateExit, "immediate exits"),
    (Cap::UserMemory, "user memory"),
    (Cap::ReadonlyMem, "read-only memory"),
    (Cap::Xsave, "XSAVE state"),
    (Cap::Xcrs, "XCR state"),
    (Cap::VcpuEvents, "event state"),
    (Cap::Debugregs, "debug registers"),
    (Cap::MpState, "multiprocessor state"),
    (Cap::Ioeventfd, "doorbells"),
    (Cap::GetTscKhz, "the frequency of the time-stamp counter"),
];

/// What an engine is made from.
pub struct KvmConfig {
    /// Guest-physical memory.
    pub memory: GuestMemory,
    /// Machine time.
    pub clock: Arc<MachineClock>,
    /// The CPU model, without what only the translator adds.
    pub model: CpuModel,
    /// vCPUs the machine will have.
    pub vcpus: u32,
}

/// What the parts of an engine share.
pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) model: CpuModel,
    pub(crate) vcpus: u32,
    pub(crate) slots: Slots,
    pub(crate) time: Time,
    /// The host scales the time-stamp counter: the guest's can have the machine clock's frequency.
    pub(crate) scales_tsc: bool,
}

/// The hardware engine of one machine.
pub struct Kvm {
    machine: Arc<Machine>,
    messages: Arc<Messages>,
    doorbells: Doorbells,
}

/// An ioctl that failed.
pub(crate) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::Host {
        what,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}

pub(crate) fn unsupported(reason: impl Into<String>) -> EngineError {
    EngineError::Unsupported {
        engine: NAME,
        reason: reason.into(),
    }
}

/// Opens `/dev/kvm`.
pub(crate) fn open() -> Result<kvm_ioctls::Kvm, EngineError> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| {
        unsupported(match error.errno() {
            libc::ENOENT => "there is no /dev/kvm".to_owned(),
            libc::EACCES | libc::EPERM => "this user may not open /dev/kvm".to_owned(),
            other => format!(
                "/dev/kvm cannot be opened: {}",
                std::io::Error::from_raw_os_error(other)
            ),
        })
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(unsupported(format!(
            "/dev/kvm speaks version {other}, not 12"
        ))),
    }
}

impl Kvm {
    /// Prepares the engine.
    ///
    /// # Errors
    /// If this host's KVM, or its CPU below it, lacks what the engine or the CPU model needs.
    pub fn new(config: KvmConfig) -> Result<Kvm, EngineError> {
        let kvm = open()?;
        let missing: Vec<&str> = NEEDED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(unsupported(format!("its KVM lacks {}", missing.join(", "))));
        }
        cpuid::check(&kvm, &config.model)?;
        if config.vcpus as usize > kvm.get_max_vcpus() {
            let most = kvm.get_max_vcpus();
            return Err(unsupported(format!(
                "its KVM runs at most {most} CPUs in a machine"
            )));
        }
        let vm = kvm.create_vm().map_err(failed("creating the VM"))?;
        set_up(&vm)?;
        let machine = Arc::new(Machine {
            slots: Slots::new(config.memory),
            time: Time::new(config.clock),
            model: config.model,
            vcpus: config.vcpus,
            scales_tsc: vm.check_extension(Cap::TscControl),
            vm,
        });
        machine.slots.sync(&machine.vm)?;
        let messages = Arc::new(Messages::new(Arc::clone(&machine)));
        Ok(Kvm {
            doorbells: Doorbells::new(Arc::clone(&machine)),
            machine,
            messages,
        })
    }

    /// Moves the kernel's record of pages that guests wrote into the memory's dirty log. Call it before taking the
    /// log; while vCPUs run it may miss writes that happen meanwhile, which the next call finds.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn collect_dirty(&self) -> Result<(), EngineError> {
        self.machine.slots.collect_dirty(&self.machine.vm)
    }
}

/// What Intel's KVM wants to know before the first vCPU.
pub(crate) fn set_up_for_intel(vm: &VmFd) -> Result<(), EngineError> {
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .map_err(failed("placing the identity map"))?;
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(failed("placing the TSS"))
}

fn set_up(vm: &VmFd) -> Result<(), EngineError> {
    set_up_for_intel(vm)?;
    enable(vm, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS.into())
        .map_err(failed("splitting the interrupt controller"))?;
    // Saved APIC state has the ID where the manual puts it, in both modes.
    enable(vm, KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS.into())
        .map_err(failed("setting up the x2APIC"))?;
    // After a reset LINT0 is masked, as on the chip. Older kernels do not know this; then a guest sees it open.
    let _ = enable(
        vm,
        KVM_CAP_DISABLE_QUIRKS,
        KVM_X86_QUIRK_LINT0_REENABLED.into(),
    );
    Ok(())
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

impl Engine for Kvm {
    type Arch = X86;

    fn name(&self) -> &'static str {
        NAME
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu<X86>>, EngineError> {
        let vcpu = KvmVcpu::new(Arc::clone(&self.machine), id)?;
        if id == VcpuId(0) {
            self.messages.set_first(vcpu.shared());
        }
        Ok(Box::new(vcpu))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::clone(&self.messages) as Arc<dyn InterruptSink>
    }

    fn add_doorbell(
        &self,
        at: DoorbellAddress,
        bell: Arc<dyn Doorbell>,
    ) -> Result<(), EngineError> {
        self.doorbells.add(at, bell)
    }

    fn remove_doorbell(&self, at: DoorbellAddress) {
        self.doorbells.remove(at);
    }
}
