//! Carries out a load plan: reads kernel and initrd, fills guest memory, and gives the first vCPU's state.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use strata_boot::{BootRequest, BzImageMode, CpuSegment, Entry, Platform};
use strata_engine::x86::{CpuState, DescriptorTable, Segment};
use strata_memory::{GuestMemory, Layout};

use crate::config::BootFiles;
use crate::error::BuildError;

/// Kernels and initrds bigger than this are refused: an initrd must fit below 3 GiB anyway.
const FILE_BYTES_MAX: u64 = 2 << 30;

/// The files a machine starts from. They stay open, so that a restart finds the same ones.
pub(crate) struct BootImage {
    kernel: BootFile,
    initrd: Option<BootFile>,
    append: String,
}

struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl BootImage {
    pub(crate) fn open(files: &BootFiles) -> Result<Self, BuildError> {
        let initrd = files.initrd.as_deref();
        Ok(Self {
            kernel: BootFile::open("kernel", &files.kernel)?,
            initrd: initrd
                .map(|path| BootFile::open("initrd", path))
                .transpose()?,
            append: files.append.clone(),
        })
    }

    /// Puts everything into memory that is all zeros, and says how the first vCPU begins.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        layout: &Layout,
        cpus: u32,
    ) -> Result<Entry, BuildError> {
        let kernel = self.kernel.read()?;
        let initrd = self.initrd.as_ref().map(BootFile::read).transpose()?;
        let request = BootRequest {
            kernel: &kernel,
            initrd: initrd.as_deref(),
            cmdline: &self.append,
            layout,
            cpus,
            platform: Platform::default(),
            bzimage: BzImageMode::Unpack,
            rng_seed: random_seed(),
        };
        let plan = strata_boot::plan(&request).map_err(|source| BuildError::Boot {
            kernel: self.kernel.path.clone(),
            source,
        })?;
        for segment in &plan.segments {
            memory.load(segment.gpa, &segment.bytes)?;
        }
        Ok(plan.entry)
    }
}

impl BootFile {
    fn open(what: &'static str, path: &Path) -> Result<Self, BuildError> {
        match File::open(path) {
            Ok(file) => Ok(Self {
                what,
                path: path.to_owned(),
                file,
            }),
            Err(source) => Err(BuildError::File {
                what,
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn read(&self) -> Result<Vec<u8>, BuildError> {
        let failed = |source| BuildError::File {
            what: self.what,
            path: self.path.clone(),
            source,
        };
        let meta = self.file.metadata().map_err(failed)?;
        if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
            return Err(BuildError::NotABootFile {
                what: self.what,
                path: self.path.clone(),
            });
        }
        let mut bytes = vec![0; meta.len() as usize];
        self.file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Ok(bytes)
    }
}

/// For the guest kernel's generator; without one it has the virtio device and its own means.
fn random_seed() -> Option<[u8; 32]> {
    let mut seed = [0; 32];
    let filled = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::NONBLOCK);
    (filled == Ok(seed.len())).then_some(seed)
}

/// The first vCPU's state: `reset` with what the boot protocol says.
pub(crate) fn first_state(reset: &CpuState, entry: &Entry) -> CpuState {
    let segment = |from: CpuSegment| Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        attributes: from.rights,
    };
    let table = |from: strata_boot::Table| DescriptorTable {
        base: from.base,
        limit: from.limit,
    };
    let data = segment(entry.data);
    let mut state = CpuState {
        rip: entry.rip,
        rflags: entry.rflags,
        segments: [data, segment(entry.cs), data, data, data, data],
        tr: segment(entry.tr),
        gdtr: table(entry.gdt),
        idtr: table(entry.idt),
        cr0: entry.cr0,
        cr3: entry.cr3,
        cr4: entry.cr4,
        efer: entry.efer,
        ..reset.clone()
    };
    let [rax, _rcx, rdx, rbx, rsp, _rbp, rsi, ..] = &mut state.gpr;
    (*rax, *rbx, *rsp, *rsi) = (entry.rax, entry.rbx, entry.rsp, entry.rsi);
    // After a reset it holds the CPU's signature, which no boot protocol knows.
    *rdx = 0;
    state
}
