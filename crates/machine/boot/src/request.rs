//! What the vmm says about the machine to be started.

use strata_memory::Layout;

use crate::BootError;

/// Fixed port addresses and interrupt lines of the `modern` platform, as the ACPI tables tell them to the guest.
pub mod ports {
    /// First serial port (8 ports).
    pub const COM1: u16 = 0x3f8;
    /// Global system interrupt of the first serial port.
    pub const COM1_GSI: u32 = 4;
    /// CMOS clock: index and data port.
    pub const RTC: u16 = 0x70;
    /// ACPI PM1a event block: status and enable, 2 bytes each.
    pub const PM1A_EVENT: u16 = 0x600;
    /// ACPI PM1a control register, 2 bytes.
    pub const PM1A_CONTROL: u16 = 0x604;
    /// ACPI PM timer, 4 bytes, 3.579545 MHz.
    pub const PM_TIMER: u16 = 0x608;
    /// Reset register.
    pub const RESET: u16 = 0xcf9;
    /// Value that resets the machine when it is written to [`RESET`].
    pub const RESET_VALUE: u8 = 0x06;
    /// pvpanic event port.
    pub const PVPANIC: u16 = 0x505;
    /// System control interrupt: level, active high.
    pub const SCI_GSI: u8 = 9;
    /// `SLP_TYP` of the soft-off state S5 in [`PM1A_CONTROL`].
    pub const S5_SLEEP_TYPE: u8 = 5;
}

/// Which of the platform's optional devices are there, for the ACPI tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Platform {
    /// The first serial port.
    pub com1: bool,
    /// The pvpanic device.
    pub pvpanic: bool,
}

impl Default for Platform {
    /// All of them.
    fn default() -> Self {
        Self {
            com1: true,
            pvpanic: true,
        }
    }
}

/// How a bzImage is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BzImageMode {
    /// Unpack the kernel on the host if its format is known, else as [`BzImageMode::Guest`].
    #[default]
    Unpack,
    /// Let the guest's own decompressor run (it also randomises the kernel's address).
    Guest,
}

/// Everything [`plan`](crate::plan) needs to know.
#[derive(Debug, Clone, Copy)]
pub struct BootRequest<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// What [`extract_vmlinux`](crate::extract_vmlinux) gave for this kernel, if somebody kept it: it spares the work.
    pub unpacked: Option<&'a [u8]>,
    /// The initial RAM disk; for a multiboot kernel, its only module.
    pub initrd: Option<&'a [u8]>,
    /// The whole kernel command line; nothing is added to it.
    pub cmdline: &'a str,
    /// Where RAM and the PCI windows are.
    pub layout: &'a Layout,
    /// Number of CPUs; CPU n has the local APIC id n.
    pub cpus: u32,
    /// Which optional devices the ACPI tables list.
    pub platform: Platform,
    /// How to start a bzImage.
    pub bzimage: BzImageMode,
    /// Random bytes for the guest kernel's generator (Linux 64-bit protocol; ignored by other protocols).
    pub rng_seed: Option<[u8; 32]>,
}

impl BootRequest<'_> {
    /// Checks the parameters that do not come from a file.
    pub(crate) fn check(&self) -> Result<(), BootError> {
        // APIC id 255 is the broadcast address.
        if !(1..=254).contains(&self.cpus) {
            return Err(BootError::BadCpus { cpus: self.cpus });
        }
        match self.cmdline.bytes().position(|byte| byte == 0) {
            Some(at) => Err(BootError::CmdlineHasNul { at }),
            None if self.initrd.is_some_and(<[u8]>::is_empty) => Err(BootError::EmptyInitrd),
            None => Ok(()),
        }
    }
}
