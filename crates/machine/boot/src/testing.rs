//! Small kernels of each format for the tests, and a look at guest memory as a plan would fill it.

use strata_memory::Layout;

use crate::view::put;
use crate::{BootRequest, BzImageMode, LoadPlan, Platform};

/// Where the test kernels are linked.
pub(crate) const KERNEL_BASE: u64 = 0x100_0000;
/// Program headers begin here in the test ELF files, and the code here.
const HEADERS_AT: usize = 64;
const CODE_AT: usize = 0x200;

/// A machine with this much RAM, in MiB.
pub(crate) fn layout(mib: u64) -> Layout {
    Layout::new(mib << 20, mib << 20).unwrap()
}

/// A request with nothing special.
pub(crate) fn request<'a>(kernel: &'a [u8], layout: &'a Layout) -> BootRequest<'a> {
    BootRequest {
        unpacked: None,
        kernel,
        initrd: None,
        cmdline: "console=ttyS0 quiet",
        layout,
        cpus: 1,
        platform: Platform::default(),
        bzimage: BzImageMode::Unpack,
        rng_seed: None,
    }
}

/// What an ELF file for a test is made of.
pub(crate) struct ElfSpec {
    pub(crate) is_64: bool,
    pub(crate) machine: u16,
    pub(crate) entry: u64,
    /// Virtual minus physical address.
    pub(crate) offset: u64,
    pub(crate) code: Vec<u8>,
    pub(crate) mem_size: u64,
    pub(crate) notes: Vec<u8>,
}

impl ElfSpec {
    /// A 64-bit kernel with one segment of code.
    pub(crate) fn linux() -> Self {
        Self {
            is_64: true,
            machine: 62,
            entry: KERNEL_BASE,
            offset: 0xffff_ffff_8000_0000,
            code: (0..=255)
                .cycle()
                .take(0x2345)
                .map(|byte: u8| byte | 1)
                .collect(),
            mem_size: 0x8000,
            notes: Vec::new(),
        }
    }

    /// A 32-bit kernel with the same code.
    pub(crate) fn bits_32() -> Self {
        Self {
            is_64: false,
            machine: 3,
            offset: 0,
            ..Self::linux()
        }
    }

    /// The file.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut file = vec![0; CODE_AT];
        put(&mut file, 0, b"\x7fELF");
        put(&mut file, 4, &[1 + u8::from(self.is_64), 1, 1]);
        put(&mut file, 16, &2u16.to_le_bytes());
        put(&mut file, 18, &self.machine.to_le_bytes());
        file.extend(&self.code);
        let notes_at = file.len();
        file.extend(&self.notes);
        let code = [
            CODE_AT as u64,
            KERNEL_BASE,
            self.code.len() as u64,
            self.mem_size,
            0x1000,
        ];
        let notes = [
            notes_at as u64,
            KERNEL_BASE,
            self.notes.len() as u64,
            self.notes.len() as u64,
            4,
        ];
        for (index, (kind, segment)) in [(1u32, code), (4, notes)].into_iter().enumerate() {
            let [offset, physical, file_size, mem_size, align] = segment;
            let virt = physical.wrapping_add(self.offset);
            if self.is_64 {
                let at = HEADERS_AT + index * 56;
                put(&mut file, at, &kind.to_le_bytes());
                for (field, value) in [offset, virt, physical, file_size, mem_size, align]
                    .into_iter()
                    .enumerate()
                {
                    put(&mut file, at + 8 + field * 8, &value.to_le_bytes());
                }
            } else {
                let at = HEADERS_AT + index * 32;
                put(&mut file, at, &kind.to_le_bytes());
                for (field, value) in [offset, virt, physical, file_size, mem_size, 5, align]
                    .into_iter()
                    .enumerate()
                {
                    put(&mut file, at + 4 + field * 4, &(value as u32).to_le_bytes());
                }
            }
        }
        if self.is_64 {
            put(&mut file, 24, &self.entry.to_le_bytes());
            put(&mut file, 32, &(HEADERS_AT as u64).to_le_bytes());
            put(&mut file, 54, &56u16.to_le_bytes());
            put(&mut file, 56, &2u16.to_le_bytes());
        } else {
            put(&mut file, 24, &(self.entry as u32).to_le_bytes());
            put(&mut file, 28, &(HEADERS_AT as u32).to_le_bytes());
            put(&mut file, 42, &32u16.to_le_bytes());
            put(&mut file, 44, &2u16.to_le_bytes());
        }
        file
    }
}

/// A PVH note with an entry point, after another note as real kernels have them.
pub(crate) fn pvh_notes(entry: u32) -> Vec<u8> {
    let mut notes = note(b"GNU\0", 3, &[1, 2, 3]);
    notes.extend(note(b"Xen\0", 18, &entry.to_le_bytes()));
    notes
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, desc.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(name);
    note.extend(desc);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// A bzImage of protocol 2.15 around a payload.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP_SIZE: usize = 0x400;
    const PAYLOAD_AT: usize = 0x400;
    let mut body = vec![0x90; PAYLOAD_AT];
    body.extend(payload);
    body.resize(body.len().next_multiple_of(16), 0);
    let mut file = vec![0; SETUP_SIZE];
    let mut field = |at: usize, value: &[u8]| put(&mut file, at, value);
    field(0x1f1, &[1]);
    field(0x1f4, &(body.len() as u32 / 16).to_le_bytes());
    field(0x1fe, &0xaa55u16.to_le_bytes());
    field(0x200, &[0xeb, 0x6a]);
    field(0x202, b"HdrS");
    field(0x206, &0x020fu16.to_le_bytes());
    field(0x211, &[1]);
    field(0x22c, &0x7fff_ffffu32.to_le_bytes());
    field(0x230, &0x20_0000u32.to_le_bytes());
    field(0x234, &[1]);
    field(0x236, &0x7fu16.to_le_bytes());
    field(0x238, &2047u32.to_le_bytes());
    field(0x248, &(PAYLOAD_AT as u32).to_le_bytes());
    field(0x24c, &(payload.len() as u32).to_le_bytes());
    field(0x258, &KERNEL_BASE.to_le_bytes());
    field(0x260, &0x10_0000u32.to_le_bytes());
    file.extend(body);
    file
}

/// A payload as Linux's build makes it with LZ4: legacy format, then the unpacked size.
pub(crate) fn lz4_payload(kernel: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        payload.extend((packed.len() as u32).to_le_bytes());
        payload.extend(packed);
    }
    payload.extend((kernel.len() as u32).to_le_bytes());
    payload
}

/// A multiboot header with the given flags and addresses.
pub(crate) fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, sum]
        .iter()
        .chain(addresses)
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// A multiboot kernel that is not ELF: 256 bytes of other things, then the image with its header in front.
pub(crate) fn multiboot_kernel() -> Vec<u8> {
    let base = 0x40_0000u32;
    let mut file = vec![0xcc; 256];
    file.extend(multiboot_header(
        1 << 16 | 3,
        &[base, base, base + 0x1000, base + 0x3000, base + 0x20],
    ));
    file.resize(256 + 0x1000, 0x90);
    file
}

/// Guest memory as the plan fills it.
pub(crate) struct Memory<'p>(pub(crate) &'p LoadPlan<'p>);

impl Memory<'_> {
    pub(crate) fn read(&self, address: u64, size: usize) -> Vec<u8> {
        (address..address + size as u64)
            .map(|at| self.byte(at))
            .collect()
    }

    pub(crate) fn byte(&self, at: u64) -> u8 {
        let holds = |start: u64, size: u64| at >= start && at - start < size;
        let segment = self
            .0
            .segments
            .iter()
            .find(|segment| holds(segment.gpa.0, segment.mem_size));
        segment
            .and_then(|segment| segment.bytes.get((at - segment.gpa.0) as usize).copied())
            .unwrap_or(0)
    }

    pub(crate) fn u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().unwrap())
    }

    pub(crate) fn u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.read(address, 8).try_into().unwrap())
    }

    pub(crate) fn string(&self, address: u64) -> String {
        (address..)
            .map(|at| self.byte(at))
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect()
    }
}
