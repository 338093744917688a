//! The plan itself, and the choice of how a kernel is started.

use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::builder::Builder;
use crate::bzimage::BzImage;
use crate::elf::Elf;
use crate::memory_map::memory_map;
use crate::request::{BootRequest, BzImageMode};
use crate::{BootError, Entry, Gpa, MemoryRange, acpi, decompress, linux, multiboot, pvh};

/// Bytes that go into guest memory: borrowed from the request's files, made here, or part of an unpacked kernel.
#[derive(Clone)]
pub enum Bytes<'a> {
    /// Part of a file given in the request.
    Borrowed(&'a [u8]),
    /// A table made for this boot.
    Owned(Vec<u8>),
    /// Part of a kernel unpacked on the host, which several segments share.
    Shared(Arc<Vec<u8>>, Range<usize>),
}

impl Bytes<'_> {
    /// The same bytes, cut down to a range of them; empty if the range lies outside.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        match self {
            Bytes::Borrowed(bytes) => Bytes::Borrowed(bytes.get(range).unwrap_or_default()),
            Bytes::Owned(bytes) => Bytes::Owned(bytes.get(range).unwrap_or_default().to_vec()),
            Bytes::Shared(bytes, whole) => {
                let start = whole.start.saturating_add(range.start).min(whole.end);
                let end = whole.start.saturating_add(range.end).min(whole.end);
                Bytes::Shared(Arc::clone(bytes), start..end.max(start))
            }
        }
    }
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Borrowed(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
            Bytes::Shared(bytes, range) => bytes.get(range.clone()).unwrap_or_default(),
        }
    }
}

impl std::fmt::Debug for Bytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} bytes]", self.len())
    }
}

impl<'a> From<&'a [u8]> for Bytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Bytes::Borrowed(bytes)
    }
}

impl From<Vec<u8>> for Bytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::Owned(bytes)
    }
}

/// One piece of guest memory to fill.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// What it is, for messages.
    pub what: &'static str,
    /// Where it begins.
    pub gpa: Gpa,
    /// Its first bytes.
    pub bytes: Bytes<'a>,
    /// Its size; what follows `bytes` must be zero. Never-used RAM is zero already and need not be touched.
    pub mem_size: u64,
}

/// By which convention the kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit protocol, the kernel unpacked (a bzImage's payload or a vmlinux).
    LinuxUnpacked,
    /// Linux's 64-bit protocol, through the bzImage's own decompressor.
    Linux64,
    /// Linux's 32-bit protocol, through the bzImage's own decompressor.
    Linux32,
    /// PVH.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

/// What to do to guest memory and to the first CPU, so that the guest begins.
#[derive(Debug, Clone)]
pub struct LoadPlan<'a> {
    /// What to write; in ascending order, all inside RAM, none overlapping.
    pub segments: Vec<Segment<'a>>,
    /// The first CPU's state. The others wait for the guest to start them.
    pub entry: Entry,
    /// How the kernel is started.
    pub protocol: Protocol,
    /// The memory map the guest is told.
    pub memory_map: Vec<MemoryRange>,
    /// Where the ACPI root pointer lies.
    pub rsdp: Gpa,
}

/// What every protocol needs besides the kernel.
pub(crate) struct Context<'a, 'r> {
    pub(crate) request: &'r BootRequest<'a>,
    pub(crate) memory_map: &'r [MemoryRange],
    pub(crate) rsdp: Gpa,
}

/// Decides what lies where and how the first CPU begins.
///
/// # Errors
/// If the kernel is of no known kind or damaged, if something does not fit into the machine's memory, or if the
/// parameters contradict each other; see [`BootError`].
pub fn plan<'a>(request: &BootRequest<'a>) -> Result<LoadPlan<'a>, BootError> {
    request.check()?;
    let mut builder = Builder::new(request.layout);
    let rsdp = acpi::place_tables(&mut builder, request)?;
    let memory_map = memory_map(request.layout);
    let context = Context {
        request,
        memory_map: &memory_map,
        rsdp,
    };
    let (protocol, entry) = start(&mut builder, &context)?;
    Ok(LoadPlan {
        segments: builder.finish(),
        entry,
        protocol,
        memory_map,
        rsdp,
    })
}

/// The kernel inside a bzImage: as it was kept, or unpacked now.
fn unpacked<'a>(
    request: &BootRequest<'a>,
    image: &BzImage<'a>,
) -> Result<Option<Bytes<'a>>, BootError> {
    if let Some(kept) = request.unpacked {
        return Ok(Some(Bytes::Borrowed(kept)));
    }
    let unpacked = decompress::unpack(image)?;
    Ok(unpacked.map(|unpacked| {
        let size = unpacked.len();
        Bytes::Shared(Arc::new(unpacked), 0..size)
    }))
}

/// The rule of the crate's documentation.
fn start<'a>(
    builder: &mut Builder<'a>,
    context: &Context<'a, '_>,
) -> Result<(Protocol, Entry), BootError> {
    let kernel = context.request.kernel;
    if BzImage::is_one(kernel) {
        let image = BzImage::parse(kernel)?;
        if context.request.bzimage == BzImageMode::Unpack
            && let Some(source) = unpacked(context.request, &image)?
        {
            let elf = Elf::parse("unpacked kernel", &source)?;
            // A 32-bit kernel has no entry worth calling directly: its decompressor knows more.
            if elf.is_x86_64() {
                return linux::start_unpacked(builder, context, &elf, &source, Some(&image));
            }
        }
        return linux::start_bzimage(builder, context, &image);
    }
    let source = Bytes::Borrowed(kernel);
    let elf = if Elf::is_one(kernel) {
        Some(Elf::parse("ELF kernel", &source)?)
    } else {
        None
    };
    if let Some(elf) = &elf
        && let Some(address) = elf.pvh_entry()?
    {
        return pvh::start(builder, context, elf, &source, address);
    }
    if let Some(header) = multiboot::Header::find(kernel) {
        return multiboot::start(builder, context, &header, elf.as_ref(), &source);
    }
    match elf {
        Some(elf) if elf.is_x86_64() => {
            linux::start_unpacked(builder, context, &elf, &source, None)
        }
        Some(_) => Err(BootError::NoEntryProtocol),
        None => Err(BootError::UnknownFormat {
            len: kernel.len() as u64,
        }),
    }
}
