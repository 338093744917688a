//! The code cache and its map: which block was translated from which bytes, who jumps to it, and what must go when
//! those bytes change.
//!
//! The cache is a memfd mapped twice, writable and executable, so that no page is ever both. Space is handed out
//! upwards and reclaimed all at once; an invalidated block is unlinked but its bytes stay until then, so the block
//! that is running can invalidate itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use iced_x86::Instruction;
use strata_engine::{EngineError, VcpuStats};

use crate::caches::jump_index;
use crate::cpu::Cpu;
use crate::mmu::OperandAccess;
use crate::peers::Peers;
use crate::translate::Mode;

/// Bytes of the code caches of all vCPUs together, and what one has at most and at least. The host's memory is taken
/// as they fill.
const CACHES_SIZE: usize = 512 << 20;
const CACHE_MAX: usize = 128 << 20;
const CACHE_MIN: usize = 16 << 20;
/// In place of a vector in [`InterpretSite::fault`]: a debugger's breakpoint, before which the run ends.
pub const BREAKPOINT: u8 = 0xff;
/// A translation never needs more than this.
pub const BLOCK_ROOM: usize = 64 << 10;

/// What a translation depends on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub struct Key {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// RIP (offset in CS).
    pub rip: u64,
    /// CS base; 0 in 64-bit mode.
    pub cs_base: u64,
    /// Mode word, see `translate::Mode`.
    pub mode: u32,
}

impl Key {
    /// Linear address of the first byte.
    pub fn linear(&self) -> u64 {
        Mode(self.mode).linear(self.rip, self.cs_base)
    }
}

/// A multiply-and-rotate hasher: keys are addresses the guest may choose, but it can only slow itself down.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// A map by addresses.
pub type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// A memory operand of translated code, for its slow path.
#[derive(Clone, Copy, Debug)]
pub struct MemSite {
    /// RIP of the instruction.
    pub rip: u64,
    /// Bytes of the operand.
    pub size: u16,
    /// What is done with it.
    pub access: OperandAccess,
    /// Its segment as in `Cpu::segments`.
    pub segment: u8,
    /// #SS instead of #GP.
    pub stack: bool,
    /// #GP unless the address is a multiple of this.
    pub align: u8,
    /// A pending x87 exception comes before any fault of the operand.
    pub x87: bool,
    /// The interpreter's site for this instruction, which must not touch masked lanes: it runs there unless the
    /// whole operand lies in one page of RAM.
    pub masked: Option<u32>,
    /// The operands of several instructions from this one on, which share a check; and the link to a block that checks
    /// each for itself, for when they do not all lie in one page of RAM.
    pub group: Option<u32>,
    /// It is one access to all others, wherever it lies: LOCK, or XCHG.
    pub locked: bool,
    /// Instructions of the block that retired before this one.
    pub index: u16,
    /// Where the guest goes on after a store, when it must leave the block.
    pub next: Next,
}

/// Where the guest goes on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// At this RIP.
    Known(u64),
    /// At the target in the context's scratch word 0.
    Target,
}

/// An instruction that the interpreter runs.
#[derive(Clone, Copy, Debug)]
pub struct InterpretSite {
    /// The instruction; its IP is RIP.
    pub instr: Instruction,
    /// Instructions of the block that retired before this one.
    pub index: u16,
    /// It raises this vector instead (#UD, #NM).
    pub fault: Option<u8>,
}

/// An indirect near branch, for targets that are not canonical: the branch itself faults then.
#[derive(Clone, Copy, Debug)]
pub struct BranchSite {
    /// RIP of the branch.
    pub rip: u64,
    /// What RSP moved by already.
    pub moved: u32,
    /// Counted as retired already.
    pub counted: bool,
    /// Instructions of the block that retired before this one.
    pub index: u16,
}

/// A jump that can be pointed at its target once that is translated.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Cache offset of the rel32 to patch.
    pub patch: u32,
    /// Cache offset of the code that leaves for the dispatcher.
    pub cold: u32,
    /// Where the jump goes.
    pub target: Key,
}

/// A host instruction that may fault, and the guest instruction it stands for.
#[derive(Clone, Copy, Debug)]
pub struct FaultPoint {
    /// Cache offset of its first byte.
    pub offset: u32,
    /// Instructions of the block that retired before.
    pub index: u16,
    /// RIP of the guest instruction.
    pub rip: u64,
}

/// One translated block.
#[derive(Debug)]
pub struct Block {
    /// What it was translated from.
    pub key: Key,
    /// Guest bytes.
    pub len: u32,
    /// Guest-physical page of the bytes past the page end, if it crosses.
    pub second_page: Option<u64>,
    /// Cache offset of its entry.
    pub entry: u32,
    incoming: Vec<u32>,
    dead: bool,
}

#[derive(Debug, Default)]
struct CodePage {
    blocks: Vec<u32>,
    /// The question to the other vCPUs that watching began with.
    asked: u64,
    /// Writes since it has had no blocks.
    empty_writes: u32,
}

/// Writes to a page without blocks after which it is not watched any more: code that is rewritten in turns with being run
/// stays watched.
const PATIENCE: u32 = 8;

/// The cache and everything known about its contents.
pub struct CodeMap {
    _fd: OwnedFd,
    size: usize,
    peers: Arc<Peers>,
    /// The vCPU's number.
    me: u32,
    writable: *mut u8,
    executable: *const u8,
    used: usize,
    /// Bytes at the start that hold the stubs and survive a flush.
    reserved: usize,
    blocks: Vec<Block>,
    keys: AddressMap<Key, u32>,
    pages: AddressMap<u64, CodePage>,
    links: Vec<Link>,
    /// The block that each link belongs to.
    link_owners: Vec<u32>,
    mem_sites: Vec<MemSite>,
    interpret_sites: Vec<InterpretSite>,
    branch_sites: Vec<BranchSite>,
    fault_points: Vec<FaultPoint>,
    /// Jumps into other pages with the blocks that they are pointed at, by the linear page that they go to, which is
    /// mapped globally: while the vCPU may remember that mapping, they may go there without a look.
    far: AddressMap<u64, Vec<(u32, u32)>>,
    /// Set whenever a block died; the slow path then leaves translated code, because it may be the running one.
    pub stale: bool,
    /// Linear addresses before whose instructions a debugger stops the run; the cache is flushed when they change.
    pub breakpoints: Vec<u64>,
}

// SAFETY: the mappings belong to this value alone; everything else is plain data.
unsafe impl Send for CodeMap {}

impl CodeMap {
    /// Maps an empty cache for vCPU `me`.
    pub fn new(peers: Arc<Peers>, me: u32) -> Result<CodeMap, EngineError> {
        let size = (CACHES_SIZE / peers.planned()).clamp(CACHE_MIN, CACHE_MAX);
        let host = |what| EngineError::Host {
            what,
            source: std::io::Error::last_os_error(),
        };
        // SAFETY: a plain system call with a constant name.
        let raw = unsafe { libc::memfd_create(c"strata-code".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(host("creating the code cache (memfd_create)"));
        }
        // SAFETY: the descriptor was just created and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: a plain system call on our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(host("sizing the code cache (ftruncate)"));
        }
        let map = |protection| {
            // SAFETY: a fresh mapping chosen by the kernel; nothing else is touched.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_SHARED,
                    fd.as_raw_fd(),
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                Err(host("mapping the code cache"))
            } else {
                Ok(at.cast::<u8>())
            }
        };
        let writable = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(CodeMap {
            _fd: fd,
            size,
            peers,
            me,
            writable,
            executable,
            used: 0,
            reserved: 0,
            blocks: Vec::new(),
            keys: AddressMap::default(),
            pages: AddressMap::default(),
            links: Vec::new(),
            link_owners: Vec::new(),
            mem_sites: Vec::new(),
            interpret_sites: Vec::new(),
            branch_sites: Vec::new(),
            fault_points: Vec::new(),
            far: AddressMap::default(),
            stale: false,
            breakpoints: Vec::new(),
        })
    }

    /// Where the next block will run.
    pub fn next_address(&self) -> u64 {
        self.executable as u64 + self.used as u64
    }

    /// Address of a cache offset.
    pub fn address(&self, offset: u32) -> u64 {
        self.executable as u64 + u64::from(offset)
    }

    /// Cache offset of an address, if it lies in the part in use.
    pub fn offset_of(&self, address: u64) -> Option<u32> {
        let offset = address.checked_sub(self.executable as u64)?;
        (offset < self.used as u64).then_some(offset as u32)
    }

    /// Start and end of the executable mapping.
    pub fn range(&self) -> (u64, u64) {
        (
            self.executable as u64,
            self.executable as u64 + self.size as u64,
        )
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// True if a block may not fit any more.
    pub fn full(&self) -> bool {
        self.used + BLOCK_ROOM > self.size
    }

    /// Appends code and returns its offset. The caller checked [`CodeMap::full`].
    pub fn append(&mut self, code: &[u8]) -> Result<u32, EngineError> {
        let offset = self.used;
        if offset + code.len() > self.size {
            return Err(EngineError::Internal(
                "a block does not fit the code cache".into(),
            ));
        }
        // SAFETY: the range was just checked to lie in the writable mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(offset), code.len())
        };
        self.used = (offset + code.len()).next_multiple_of(16);
        Ok(offset as u32)
    }

    /// Keeps what was appended so far through every flush.
    pub fn reserve(&mut self) {
        self.reserved = self.used;
    }

    /// Forgets all blocks. No vCPU may be in translated code.
    pub fn flush(&mut self, cpu: &mut Cpu, stats: &mut VcpuStats) {
        for &page in self.pages.keys() {
            self.peers.unwatch(self.me, page);
        }
        self.blocks.clear();
        self.keys.clear();
        self.pages.clear();
        self.links.clear();
        self.link_owners.clear();
        self.mem_sites.clear();
        self.interpret_sites.clear();
        self.branch_sites.clear();
        self.fault_points.clear();
        self.far.clear();
        self.used = self.reserved;
        self.stale = true;
        for jump in &mut cpu.jump {
            jump.clear();
        }
        stats.cache_flushes += 1;
    }

    /// The entry of a translated block.
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.keys.get(key).copied()
    }

    /// A block by number.
    pub fn block(&self, id: u32) -> Option<&Block> {
        self.blocks.get(id as usize)
    }

    /// True if a block was dropped.
    pub fn is_dead(&self, id: u32) -> bool {
        self.block(id).is_none_or(|block| block.dead)
    }

    /// Registers a memory operand.
    pub fn add_mem_site(&mut self, site: MemSite) -> u32 {
        self.mem_sites.push(site);
        self.mem_sites.len() as u32 - 1
    }

    /// A memory operand.
    pub fn mem_site(&self, id: u32) -> Option<MemSite> {
        self.mem_sites.get(id as usize).copied()
    }

    /// Registers an interpreted instruction.
    pub fn add_interpret_site(&mut self, site: InterpretSite) -> u32 {
        self.interpret_sites.push(site);
        self.interpret_sites.len() as u32 - 1
    }

    /// An interpreted instruction.
    pub fn interpret_site(&self, id: u32) -> Option<InterpretSite> {
        self.interpret_sites.get(id as usize).copied()
    }

    /// Registers an indirect branch.
    pub fn add_branch_site(&mut self, site: BranchSite) -> u32 {
        self.branch_sites.push(site);
        self.branch_sites.len() as u32 - 1
    }

    /// An indirect branch.
    pub fn branch_site(&self, id: u32) -> Option<BranchSite> {
        self.branch_sites.get(id as usize).copied()
    }

    /// The number the next link will get.
    pub fn next_link(&self) -> u32 {
        self.links.len() as u32
    }

    /// A link.
    pub fn link(&self, id: u32) -> Option<Link> {
        self.links.get(id as usize).copied()
    }

    /// The guest instruction that a host address stands for.
    pub fn fault_point(&self, address: u64) -> Option<FaultPoint> {
        let offset = self.offset_of(address)?;
        let next = self
            .fault_points
            .partition_point(|point| point.offset <= offset);
        self.fault_points.get(next.checked_sub(1)?).copied()
    }

    /// Adds a translated block with its links and fault points (offsets relative to the block's code).
    pub fn insert(
        &mut self,
        key: Key,
        len: u32,
        second_page: Option<u64>,
        code: &[u8],
        links: &[Link],
        points: &[FaultPoint],
    ) -> Result<u32, EngineError> {
        let entry = self.append(code)?;
        let id = self.blocks.len() as u32;
        self.link_owners.extend(links.iter().map(|_| id));
        for link in links {
            self.links.push(Link {
                patch: link.patch + entry,
                cold: link.cold + entry,
                target: link.target,
            });
        }
        self.fault_points.extend(points.iter().map(|p| FaultPoint {
            offset: p.offset + entry,
            ..*p
        }));
        self.blocks.push(Block {
            key,
            len,
            second_page,
            entry,
            incoming: Vec::new(),
            dead: false,
        });
        self.keys.insert(key, id);
        let head = u64::from(len).min(4096 - (key.gpa & 0xfff));
        let tail = second_page.map(|page| (page << 12, u64::from(len) - head));
        for (gpa, len) in [Some((key.gpa, head)), tail].into_iter().flatten() {
            let page = self.pages.entry(gpa >> 12).or_default();
            page.blocks.push(id);
            page.empty_writes = 0;
            self.peers.cover(gpa, len);
        }
        Ok(id)
    }

    /// Begins to watch a page that a block is about to be made from, unless it is watched already. Returns the number
    /// of the question that the other vCPUs must have answered before stores to it are sure to be told of, and whether
    /// this vCPU must drop its own tags.
    pub fn watch(&mut self, page: u64) -> (u64, bool) {
        match self.pages.entry(page) {
            Entry::Occupied(known) => (known.get().asked, false),
            Entry::Vacant(new) => {
                let asked = self.peers.watch(self.me, page);
                new.insert(CodePage {
                    asked,
                    ..CodePage::default()
                });
                (asked, true)
            }
        }
    }

    /// True if the block that link `id` belongs to was dropped.
    pub fn is_dead_link(&self, id: u32) -> bool {
        let owner = self.link_owners.get(id as usize);
        owner.is_none_or(|&owner| self.is_dead(owner))
    }

    /// Points link `id` at block `target`.
    pub fn connect(&mut self, id: u32, target: u32) {
        let Some(link) = self.link(id) else { return };
        let Some(block) = self.blocks.get_mut(target as usize) else {
            return;
        };
        block.incoming.push(id);
        let entry = block.entry;
        self.patch(link.patch, entry);
    }

    /// Points link `id` at block `target`, which begins in the linear page `page`, until that mapping is dropped.
    pub fn connect_far(&mut self, id: u32, target: u32, page: u64) {
        self.connect(id, target);
        self.far.entry(page).or_default().push((id, target));
    }

    /// Mappings were dropped, all or those of the pages of `1 << shift` bytes at linear addresses: jumps that rely on
    /// them look again.
    pub fn mappings_dropped(&mut self, pages: Option<&[(u64, u32)]>) {
        let mut links = Vec::new();
        match pages {
            None => links.extend(self.far.drain().flat_map(|(_, links)| links)),
            Some(pages) => {
                for &(linear, shift) in pages {
                    if shift == 12 {
                        links.extend(self.far.remove(&(linear >> 12)).unwrap_or_default());
                        continue;
                    }
                    let within = |page: u64| page >> (shift - 12) == linear >> shift;
                    let gone = self.far.extract_if(|&page, _| within(page));
                    links.extend(gone.flat_map(|(_, links)| links));
                }
            }
        }
        for (id, target) in links {
            if let Some(block) = self.blocks.get_mut(target as usize) {
                block.incoming.retain(|&other| other != id);
            }
            if let Some(link) = self.link(id) {
                self.patch(link.patch, link.cold);
            }
        }
    }

    fn patch(&mut self, at: u32, target: u32) {
        let rel = (i64::from(target) - i64::from(at) - 4) as i32;
        // SAFETY: `at` is the offset of a rel32 inside an appended block.
        unsafe {
            self.writable
                .add(at as usize)
                .cast::<i32>()
                .write_unaligned(rel)
        };
    }

    /// Guest memory changed: drops the blocks translated from it.
    pub fn written(&mut self, gpa: u64, len: u64, cpu: &mut Cpu, stats: &mut VcpuStats) {
        let last = gpa.saturating_add(len.max(1) - 1);
        let range = gpa >> 12..=last >> 12;
        if range.end() - range.start() < self.pages.len() as u64 {
            for page in range {
                self.page_written(page, gpa, last, cpu, stats);
            }
        } else {
            let pages: Vec<u64> = self.pages.keys().copied().collect();
            for page in pages.into_iter().filter(|page| range.contains(page)) {
                self.page_written(page, gpa, last, cpu, stats);
            }
        }
    }

    fn page_written(
        &mut self,
        page: u64,
        first: u64,
        last: u64,
        cpu: &mut Cpu,
        stats: &mut VcpuStats,
    ) {
        let Some(known) = self.pages.get(&page) else {
            return;
        };
        let hit: Vec<u32> = known
            .blocks
            .iter()
            .copied()
            .filter(|&id| {
                self.blocks
                    .get(id as usize)
                    .is_some_and(|block| overlaps(block, first, last))
            })
            .collect();
        for id in hit {
            self.invalidate(id, cpu, stats);
        }
        // A page whose translation failed has none from the start.
        self.unwatch_empty(page);
    }

    /// Ends watching a page without blocks, after some more writes: to begin again means to look through the soft TLBs,
    /// and to ask the other vCPUs.
    fn unwatch_empty(&mut self, page: u64) {
        let Entry::Occupied(mut known) = self.pages.entry(page) else {
            return;
        };
        if !known.get().blocks.is_empty() {
            return;
        }
        if known.get().empty_writes < PATIENCE {
            known.get_mut().empty_writes += 1;
            return;
        }
        known.remove();
        self.peers.unwatch(self.me, page);
    }

    /// Drops a block.
    pub fn invalidate(&mut self, id: u32, cpu: &mut Cpu, stats: &mut VcpuStats) {
        let Some(block) = self.blocks.get_mut(id as usize) else {
            return;
        };
        if block.dead {
            return;
        }
        block.dead = true;
        let (key, second) = (block.key, block.second_page);
        let incoming = std::mem::take(&mut block.incoming);
        if self.keys.get(&key) == Some(&id) {
            self.keys.remove(&key);
        }
        for link in incoming {
            if let Some(link) = self.link(link) {
                self.patch(link.patch, link.cold);
            }
        }
        for page in [Some(key.gpa >> 12), second].into_iter().flatten() {
            if let Some(known) = self.pages.get_mut(&page) {
                known.blocks.retain(|&other| other != id);
                self.unwatch_empty(page);
            }
        }
        let index = jump_index(key.rip);
        for jump in &mut cpu.jump {
            if jump.tag.get(index) == Some(&key.rip.wrapping_neg()) {
                jump.drop_entry(index);
            }
        }
        self.stale = true;
        stats.blocks_invalidated += 1;
    }
}

/// True if any byte of the block lies in `first..=last`.
fn overlaps(block: &Block, first: u64, last: u64) -> bool {
    let start = block.key.gpa;
    let head = u64::from(block.len).min(4096 - (start & 0xfff));
    let hits = |from: u64, len: u64| len > 0 && from <= last && first < from + len;
    hits(start, head)
        || block
            .second_page
            .is_some_and(|page| hits(page << 12, u64::from(block.len) - head))
}

impl Drop for CodeMap {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new`, have this size and are used by nobody else any more.
        unsafe {
            libc::munmap(self.writable.cast(), self.size);
            libc::munmap(self.executable.cast_mut().cast(), self.size);
        }
    }
}
