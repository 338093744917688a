//! What can be wrong with a kernel, an initrd or the parameters of a boot.

/// Why a machine cannot be started from the given files and parameters. Each message is one sentence that names what
/// is wrong and where; file offsets, addresses and sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The kernel carries none of the signatures this crate knows.
    #[error("the kernel is not a bzImage, an x86 ELF file or a multiboot image ({len} bytes read)")]
    UnknownFormat {
        /// Size of the file.
        len: u64,
    },
    /// An ELF file that offers no way to start it.
    #[error(
        "the ELF kernel has no PVH note and no multiboot header, and is not a 64-bit x86 executable"
    )]
    NoEntryProtocol,
    /// The file ends before something it promises.
    #[error(
        "the {what} is cut short: {field} takes bytes {start:#x}..{end:#x} of a file of {len:#x} bytes"
    )]
    Truncated {
        /// Which file or part of it.
        what: &'static str,
        /// What should have been there.
        field: &'static str,
        /// Its first byte.
        start: u64,
        /// One past its last byte (saturated).
        end: u64,
        /// What there is.
        len: u64,
    },
    /// A field holds a value that cannot be right or is not supported.
    #[error("the {what} has {field} = {value:#x}: {reason}")]
    BadField {
        /// Which file or part of it.
        what: &'static str,
        /// The field's name in its specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The compressed kernel inside a bzImage is damaged.
    #[error("the bzImage's {format} payload is damaged: {reason}")]
    Payload {
        /// The compression format.
        format: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// Something would lie where there is no usable RAM.
    #[error(
        "{what} needs guest memory {start:#x}..{end:#x}, which is not usable RAM of this machine (low RAM ends at {low_end:#x})"
    )]
    OutsideRam {
        /// What is being placed.
        what: &'static str,
        /// First address.
        start: u64,
        /// One past the last address (saturated).
        end: u64,
        /// Where low RAM ends.
        low_end: u64,
    },
    /// Two things claim the same memory.
    #[error("{what} and {other} both need guest memory at {at:#x}")]
    Overlap {
        /// What is being placed.
        what: &'static str,
        /// What lies there already.
        other: &'static str,
        /// An address both contain.
        at: u64,
    },
    /// No gap is large enough.
    #[error(
        "{what} of {size} bytes does not fit into guest memory below {limit:#x}; give the machine more memory"
    )]
    NoRoom {
        /// What is being placed.
        what: &'static str,
        /// Its size.
        size: u64,
        /// Where it would have to end.
        limit: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length without the terminating zero.
        len: u64,
        /// The most the kernel takes.
        max: u64,
    },
    /// The command line contains a zero byte.
    #[error("the kernel command line has a zero byte at position {at}")]
    CmdlineHasNul {
        /// Where.
        at: usize,
    },
    /// The initrd was given but holds nothing.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// The number of CPUs is impossible.
    #[error("a machine has 1 to 254 CPUs, not {cpus}")]
    BadCpus {
        /// The number asked for.
        cpus: u32,
    },
}
