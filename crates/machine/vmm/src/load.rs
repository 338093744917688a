//! Carries out a load plan: reads kernel and initrd, fills guest memory, and gives the first vCPU's state.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_boot::{BootRequest, BzImageMode, CpuSegment, Entry, Platform};
use strata_disk::DiskBackend;
use strata_engine::x86::{CpuState, DescriptorTable, Segment};
use strata_memory::{GuestMemory, Layout};

use crate::MachineConfig;
use crate::config::BootSource;
use crate::error::BuildError;

/// Kernels and initrds bigger than this are refused: an initrd must fit below 3 GiB anyway.
const FILE_BYTES_MAX: u64 = 2 << 30;

/// What a machine starts from. Files and disks stay open, so that a restart finds the same ones.
pub(crate) enum BootImage {
    /// Files of the host.
    Files {
        kernel: BootFile,
        unpacked: Option<BootFile>,
        initrd: Option<BootFile>,
        append: String,
    },
    /// What is inside a disk at the time of the start.
    Disk {
        disk: Arc<dyn DiskBackend>,
        path: PathBuf,
        append: String,
    },
}

pub(crate) struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

/// What is loaded.
struct Contents {
    /// What the kernel is called in an error.
    name: PathBuf,
    kernel: Vec<u8>,
    unpacked: Option<Vec<u8>>,
    initrd: Option<Vec<u8>>,
    cmdline: String,
}

impl BootImage {
    /// Opens what the configuration names; `disks` are its disks.
    pub(crate) fn open(
        config: &MachineConfig,
        disks: &[Arc<dyn DiskBackend>],
    ) -> Result<Self, BuildError> {
        match &config.boot {
            BootSource::Files(files) => {
                let open = |what, path: &Option<PathBuf>| {
                    let path = path.as_deref();
                    path.map(|path| BootFile::open(what, path)).transpose()
                };
                Ok(Self::Files {
                    kernel: BootFile::open("kernel", &files.kernel)?,
                    unpacked: open("unpacked kernel", &files.unpacked)?,
                    initrd: open("initrd", &files.initrd)?,
                    append: files.append.clone(),
                })
            }
            BootSource::Disk(boot) => match (disks.first(), config.disks.first()) {
                (Some(disk), Some(named)) => Ok(Self::Disk {
                    disk: Arc::clone(disk),
                    path: named.path.clone(),
                    append: boot.append.clone(),
                }),
                _ => Err(BuildError::NoBootDisk),
            },
            BootSource::Image(name) => Err(BuildError::UnresolvedImage(name.clone())),
        }
    }

    fn read(&self) -> Result<Contents, BuildError> {
        match self {
            Self::Files {
                kernel,
                unpacked,
                initrd,
                append,
            } => Ok(Contents {
                name: kernel.path.clone(),
                kernel: kernel.read()?,
                unpacked: unpacked.as_ref().map(BootFile::read).transpose()?,
                initrd: initrd.as_ref().map(BootFile::read).transpose()?,
                cmdline: append.clone(),
            }),
            Self::Disk { disk, path, append } => {
                let append = Some(append.as_str()).filter(|append| !append.is_empty());
                let found = strata_boot::find_kernel(disk, append);
                let found = found.map_err(|source| BuildError::Inside {
                    disk: path.clone(),
                    source,
                })?;
                Ok(Contents {
                    name: format!("{} of {}", found.path, path.display()).into(),
                    kernel: found.kernel,
                    unpacked: None,
                    initrd: found.initrd,
                    cmdline: found.cmdline,
                })
            }
        }
    }

    /// Puts everything into memory that is all zeros, and says how the first vCPU begins.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        layout: &Layout,
        cpus: u32,
    ) -> Result<Entry, BuildError> {
        let contents = self.read()?;
        let request = BootRequest {
            kernel: &contents.kernel,
            unpacked: contents.unpacked.as_deref(),
            initrd: contents.initrd.as_deref(),
            cmdline: &contents.cmdline,
            layout,
            cpus,
            platform: Platform::default(),
            bzimage: BzImageMode::Unpack,
            rng_seed: random_seed(),
        };
        let plan = strata_boot::plan(&request).map_err(|source| BuildError::Boot {
            kernel: contents.name.clone(),
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
