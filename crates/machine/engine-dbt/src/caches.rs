//! What a vCPU remembers of memory and code, in the context where emitted code reaches it: the soft TLBs from linear
//! address to host memory, the jump caches from RIP to host code, and what INVLPG must know of both.

/// Entries of a soft TLB at least and at most: it grows where a guest's working set does not fit, and shrinks again
/// where it is emptied before it fills, because emptying it takes time for each entry.
pub const TLB_LEAST: usize = 1024;
const TLB_MOST: usize = 16384;
/// Entries of a soft TLB that are emptied one by one at a flush; where more were filled, all are looked at.
const FILLS_LISTED: usize = 256;
/// Entries of the paging-structure cache and of each cache of code pages.
const WALKS: usize = 32;
const CODE_PAGES: usize = 64;
/// Entries of each jump cache.
pub const JUMP_ENTRIES: usize = 16384;
/// Entries of a jump cache that are emptied one by one; where more are in use, all are.
const JUMPS_LISTED: usize = 1024;

/// Tags of an empty soft TLB. A tag "hits" the addresses of its page and the few bytes below it, so the empty tag of
/// entry `i` names a page whose own index is two away from `i`, however many entries there are: no address at all hits
/// an empty entry.
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
static EMPTY_TLB: [u64; TLB_MOST] = {
    let mut tags = [0; TLB_MOST];
    let mut i = 0;
    while i < TLB_MOST {
        tags[i] = ((i ^ 2) as u64 * 4096).wrapping_neg();
        i += 1;
    }
    tags
};

/// Where the jump cache holds `rip`. Functions start at multiples of 16, so the page number takes part.
pub const fn jump_index(rip: u64) -> usize {
    rip.wrapping_add(rip.rotate_right(12)) as usize % JUMP_ENTRIES
}

/// Tags of an empty jump cache: the address that would hit entry `i` has another index.
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
static EMPTY_JUMP: [u64; JUMP_ENTRIES] = {
    let mut tags = [0; JUMP_ENTRIES];
    let mut i = 0;
    while i < JUMP_ENTRIES {
        let mut other = i ^ 1;
        while jump_index(other as u64) == i {
            other += 1;
        }
        tags[i] = (other as u64).wrapping_neg();
        i += 1;
    }
    tags
};

/// A set of numbers that may hold more than was put in: one bit per number modulo 4096.
#[derive(Clone, Copy)]
#[repr(C)]
struct Residues([u64; 64]);

impl Residues {
    /// The empty set.
    const NONE: Residues = Residues([0; 64]);

    fn insert(&mut self, number: u64) {
        if let Some(word) = self.0.get_mut((number / 64 % 64) as usize) {
            *word |= 1 << (number % 64);
        }
    }

    fn contains(&self, number: u64) -> bool {
        let word = self.0.get((number / 64 % 64) as usize);
        word.is_some_and(|word| word & 1 << (number % 64) != 0)
    }
}

/// A soft TLB of one privilege class. Tags hold the negated page address, so that address + tag is the offset in
/// the page on a hit; `delta` is host address minus linear address.
#[repr(C)]
pub struct SoftTlb {
    /// Tags for loads.
    pub read: [u64; TLB_MOST],
    /// Tags for stores: the page is writable, dirty in its page-table entry, RAM, and holds no watched code.
    pub write: [u64; TLB_MOST],
    /// Host address minus linear address.
    pub delta: [u64; TLB_MOST],
    /// One bit per entry: filled from a global mapping.
    global: [u64; TLB_MOST / 64],
    /// Entries in use, a power of two; those behind mean nothing.
    entries: usize,
    /// Entries filled since it was emptied last.
    filled: usize,
    /// The first ones of them.
    listed: [u16; FILLS_LISTED],
    /// Those among them that took the place of another.
    evicted: usize,
}

/// A cache from linear instruction address to host code. Tags hold the negated address.
#[repr(C)]
pub struct JumpCache {
    /// Negated linear addresses.
    pub tag: [u64; JUMP_ENTRIES],
    /// Host addresses.
    pub target: [u64; JUMP_ENTRIES],
    /// Linear pages that entries may have come from.
    pages: Residues,
    /// Some entry came from a mapping that is not global.
    local: bool,
    /// Some entry's linear address is not its RIP.
    based: bool,
    /// The entries that are in use, unless there is no room left to list them.
    used: [u16; JUMPS_LISTED],
    /// How many more there is room for.
    room: usize,
}

/// Where pages of more than 4 KiB were used: the TLBs hold their 4 KiB parts, and INVLPG drops all of them.
pub struct LargePages {
    /// By size of pages, and apart for those that are not global and those that are: regions of that size.
    regions: [[Residues; 2]; 2],
}

impl LargePages {
    /// None yet.
    pub const NONE: LargePages = LargePages {
        regions: [[Residues::NONE; 2]; 2],
    };
    /// Sizes that are told apart. All up to 4 MiB count as this large: dropping more than one must is allowed.
    const SHIFTS: [u32; 2] = [22, 30];

    /// Notes the use of a page of `1 << shift` bytes.
    pub fn note(&mut self, linear: u64, shift: u32, global: bool) {
        let mut sizes = LargePages::SHIFTS.into_iter().zip(&mut self.regions);
        if let Some((known, [local, kept])) = sizes.find(|(known, _)| shift <= *known) {
            let regions = if global { kept } else { local };
            regions.insert(linear >> known);
        }
    }

    /// What must be dropped for the page at `linear`: `1 << shift` bytes.
    pub fn shift(&self, linear: u64) -> u32 {
        let mut sizes = LargePages::SHIFTS.into_iter().zip(&self.regions).rev();
        sizes
            .find(|(known, regions)| regions.iter().any(|set| set.contains(linear >> known)))
            .map_or(12, |(known, _)| known)
    }

    /// Forgets pages that are not global.
    pub fn forget_local(&mut self) {
        for [local, _] in &mut self.regions {
            *local = Residues::NONE;
        }
    }
}

/// Mappings that were dropped since the dispatcher last looked, for jumps between pages that rely on them.
pub struct Dropped {
    /// Linear addresses and the sizes of their pages, `1 << shift` bytes.
    pages: [(u64, u32); 16],
    /// How many; more than there is room for stands for all mappings.
    count: u32,
}

impl Dropped {
    /// Adds all mappings.
    pub fn all(&mut self) {
        self.count = u32::MAX;
    }

    /// Adds the page of `1 << shift` bytes at `linear`.
    pub fn page(&mut self, linear: u64, shift: u32) {
        if let Some(page) = self.pages.get_mut(self.count as usize) {
            *page = (linear, shift);
        }
        self.count = self.count.saturating_add(1);
    }

    /// True if there are any.
    pub fn any(&self) -> bool {
        self.count != 0
    }

    /// The pages, or `None` for all; and there are none any more.
    pub fn take(&mut self) -> Option<&[(u64, u32)]> {
        let count = std::mem::take(&mut self.count);
        self.pages.get(..count as usize)
    }
}

impl SoftTlb {
    /// Where `linear` belongs.
    pub fn index(&self, linear: u64) -> usize {
        (linear >> 12) as usize & (self.entries - 1)
    }

    /// Enters the page at `page`, for stores too if `store`.
    pub fn fill(&mut self, page: u64, delta: u64, store: bool, global: bool) {
        let (index, tag) = (self.index(page), page.wrapping_neg());
        let Some(&empty) = EMPTY_TLB.get(index) else {
            return;
        };
        if let (Some(read), Some(write), Some(to), Some(globals)) = (
            self.read.get_mut(index),
            self.write.get_mut(index),
            self.delta.get_mut(index),
            self.global.get_mut(index / 64),
        ) {
            if let Some(next) = self.listed.get_mut(self.filled) {
                *next = index as u16;
            }
            self.filled += 1;
            self.evicted += usize::from(*read != empty && *read != tag);
            (*read, *write) = (tag, if store { tag } else { empty });
            *to = delta;
            let bit = 1u64 << (index % 64);
            *globals = *globals & !bit | if global { bit } else { 0 };
        }
    }

    /// How many entries it should have: more if they take each other's place, fewer if most are not used from one time
    /// that it is emptied to the next.
    pub fn wanted(&self, emptied: bool) -> usize {
        if self.evicted > 2 * self.entries {
            (self.entries * 4).min(TLB_MOST)
        } else if emptied && self.filled < self.entries / 8 {
            (self.entries / 4).max(TLB_LEAST)
        } else {
            self.entries
        }
    }

    /// Entries in use.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Empties it and gives it another size.
    pub fn resize(&mut self, entries: usize) {
        self.entries = entries.clamp(TLB_LEAST, TLB_MOST);
        self.flush(true);
    }

    /// The tags for loads, those for stores, deltas, and what the first two are when empty, of the entries in use.
    fn used(&mut self) -> (&mut [u64], &mut [u64], &[u64], &'static [u64]) {
        let range = ..self.entries;
        (
            self.read.get_mut(range).unwrap_or_default(),
            self.write.get_mut(range).unwrap_or_default(),
            self.delta.get(range).unwrap_or_default(),
            EMPTY_TLB.get(range).unwrap_or_default(),
        )
    }

    /// Empties it; entries of global mappings stay unless `global`.
    pub fn flush(&mut self, global: bool) {
        let filled = std::mem::take(&mut self.filled);
        self.evicted = 0;
        if !global && filled <= FILLS_LISTED {
            for n in 0..filled {
                let index = usize::from(self.listed.get(n).copied().unwrap_or(0));
                let kept = self.global.get(index / 64).copied().unwrap_or(0);
                if kept & 1 << (index % 64) == 0 {
                    self.drop_entry(index);
                }
            }
            return;
        }
        let words = self.entries / 64;
        let all = global || self.global.iter().take(words).all(|&bits| bits == 0);
        if all {
            let (read, write, _, empty) = self.used();
            read.copy_from_slice(empty);
            write.copy_from_slice(empty);
            self.global
                .iter_mut()
                .take(words)
                .for_each(|bits| *bits = 0);
            return;
        }
        for (word, &bits) in self.global.iter().take(words).enumerate() {
            if bits == u64::MAX {
                continue;
            }
            let start = word * 64;
            let reads = self.read.iter_mut().skip(start).take(64);
            let writes = self.write.iter_mut().skip(start).take(64);
            let empty = EMPTY_TLB.iter().skip(start);
            for (i, ((read, write), &tag)) in reads.zip(writes).zip(empty).enumerate() {
                if bits & (1 << i) == 0 {
                    *read = tag;
                    *write = tag;
                }
            }
        }
    }

    /// Empties one entry.
    fn drop_entry(&mut self, index: usize) {
        if let (Some(read), Some(write), Some(&tag)) = (
            self.read.get_mut(index),
            self.write.get_mut(index),
            EMPTY_TLB.get(index),
        ) {
            *read = tag;
            *write = tag;
        }
    }

    /// Empties what is held of the page of `1 << shift` bytes at `linear`.
    pub fn drop_page(&mut self, linear: u64, shift: u32) {
        if shift == 12 {
            return self.drop_entry(self.index(linear));
        }
        let (reads, writes, _, empty) = self.used();
        for ((read, write), &empty) in reads.iter_mut().zip(writes).zip(empty) {
            if (read.wrapping_neg() ^ linear) >> shift == 0 {
                (*read, *write) = (empty, empty);
            }
        }
    }

    /// Makes stores to every page take the slow path once more.
    pub fn drop_writes(&mut self) {
        let (_, write, _, empty) = self.used();
        write.copy_from_slice(empty);
    }

    /// Makes stores to the page at host address `host` take the slow path once more, so that a newly watched page is
    /// seen.
    pub fn drop_writes_to(&mut self, host: u64) {
        // Some entries at a time, without a branch for each: this runs whenever a page begins to hold code.
        const TOGETHER: usize = 16;
        let (_, tags, deltas, empty) = self.used();
        let tags = tags.chunks_exact_mut(TOGETHER);
        let rest = deltas.chunks_exact(TOGETHER);
        for ((tags, deltas), empty) in tags.zip(rest).zip(empty.chunks_exact(TOGETHER)) {
            let is = |(tag, delta): (&u64, &u64)| delta.wrapping_sub(*tag) == host;
            if tags.iter().zip(deltas).fold(false, |any, of| any | is(of)) {
                for ((tag, delta), &empty) in tags.iter_mut().zip(deltas).zip(empty) {
                    if is((tag, delta)) {
                        *tag = empty;
                    }
                }
            }
        }
    }
}

/// What page tables above the last level say of 2 MiB regions (SDM vol. 3, 4.10.3). Any flush of mappings empties it,
/// and so does a fault, for its region.
pub struct WalkCache {
    entries: [Option<Walk>; WALKS],
    used: bool,
}

/// The last level's table for a region, and what the levels above it allow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Walk {
    region: u64,
    /// Guest-physical address of the table.
    pub table: u64,
    /// All levels allow stores.
    pub writable: bool,
    /// All levels allow user code.
    pub user: bool,
    /// Some level forbids execution.
    pub no_exec: bool,
}

impl WalkCache {
    /// An empty cache.
    pub const EMPTY: WalkCache = WalkCache {
        entries: [None; WALKS],
        used: false,
    };

    /// What is known of the region that `linear` lies in.
    pub fn get(&self, linear: u64) -> Option<Walk> {
        let region = linear >> 21;
        let walk = *self.entries.get(region as usize % WALKS)?;
        walk.filter(|walk| walk.region == region)
    }

    /// Remembers a walk.
    pub fn set(&mut self, linear: u64, table: u64, writable: bool, user: bool, no_exec: bool) {
        let region = linear >> 21;
        if let Some(entry) = self.entries.get_mut(region as usize % WALKS) {
            *entry = Some(Walk {
                region,
                table,
                writable,
                user,
                no_exec,
            });
            self.used = true;
        }
    }

    /// Forgets the region that `linear` lies in.
    pub fn forget(&mut self, linear: u64) {
        if let Some(entry) = self.entries.get_mut((linear >> 21) as usize % WALKS) {
            *entry = None;
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.used) {
            self.entries = [None; WALKS];
        }
    }
}

/// Where the pages are that code of one privilege was fetched from: what the soft TLB is for data.
pub struct CodePages {
    entries: [Option<CodePage>; CODE_PAGES],
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct CodePage {
    linear: u64,
    frame: u64,
    global: bool,
}

impl CodePages {
    /// None yet.
    pub const NONE: CodePages = CodePages {
        entries: [None; CODE_PAGES],
    };

    /// Guest-physical address of code at `linear`, and whether that mapping is global.
    pub fn get(&self, linear: u64) -> Option<(u64, bool)> {
        let entry = *self.entries.get((linear >> 12) as usize % CODE_PAGES)?;
        let page = entry.filter(|page| page.linear == linear >> 12)?;
        Some((page.frame << 12 | linear & 0xfff, page.global))
    }

    /// Remembers where code at `linear` is.
    pub fn set(&mut self, linear: u64, gpa: u64, global: bool) {
        if let Some(entry) = self.entries.get_mut((linear >> 12) as usize % CODE_PAGES) {
            *entry = Some(CodePage {
                linear: linear >> 12,
                frame: gpa >> 12,
                global,
            });
        }
    }

    /// Forgets all; pages that are mapped globally stay unless `global`.
    pub fn flush(&mut self, global: bool) {
        for entry in &mut self.entries {
            if entry.is_some_and(|page| global || !page.global) {
                *entry = None;
            }
        }
    }

    /// Forgets the page of `1 << shift` bytes at `linear`.
    pub fn drop_page(&mut self, linear: u64, shift: u32) {
        if shift > 12 {
            return self.flush(true);
        }
        if let Some(entry) = self.entries.get_mut((linear >> 12) as usize % CODE_PAGES) {
            *entry = None;
        }
    }
}

impl JumpCache {
    /// Empties the cache, unless all its entries come from global mappings and those stay.
    pub fn flush(&mut self, global: bool) {
        if global || self.local {
            self.clear();
        }
    }

    /// Empties the cache.
    pub fn clear(&mut self) {
        if self.room == 0 {
            self.tag.copy_from_slice(&EMPTY_JUMP);
        } else {
            for &index in self.used.iter().take(JUMPS_LISTED - self.room) {
                let index = usize::from(index);
                if let (Some(tag), Some(&empty)) = (self.tag.get_mut(index), EMPTY_JUMP.get(index))
                {
                    *tag = empty;
                }
            }
        }
        self.room = JUMPS_LISTED;
        self.pages = Residues::NONE;
        self.local = false;
        self.based = false;
    }

    /// Drops the entries that may depend on the mapping of the page of `1 << shift` bytes at `linear`: those whose code
    /// begins in it, or in the 4 KiB before and may reach into it.
    pub fn drop_page(&mut self, linear: u64, shift: u32) {
        if shift == 12 && !self.pages.contains(linear >> 12) {
            return;
        }
        if self.based {
            return self.clear();
        }
        let first = (linear >> shift << shift).wrapping_sub(4096);
        for (tag, &empty) in self.tag.iter_mut().zip(&EMPTY_JUMP) {
            if tag.wrapping_neg().wrapping_sub(first) < (1 << shift) + 4096 {
                *tag = empty;
            }
        }
    }

    /// Empties one entry.
    pub fn drop_entry(&mut self, index: usize) {
        if let (Some(tag), Some(&empty)) = (self.tag.get_mut(index), EMPTY_JUMP.get(index)) {
            *tag = empty;
        }
    }

    /// The host address remembered for `rip`.
    pub fn get(&self, rip: u64) -> Option<u64> {
        let index = jump_index(rip);
        let hit = *self.tag.get(index)? == rip.wrapping_neg();
        hit.then(|| self.target.get(index).copied()).flatten()
    }

    /// Remembers that `rip`, whose code starts at `linear` and may reach into the next page, is at host address
    /// `target`.
    pub fn set(&mut self, rip: u64, linear: u64, crosses: bool, global: bool, target: u64) {
        let page = linear >> 12;
        for page in page..=page + u64::from(crosses) {
            self.pages.insert(page);
        }
        self.local |= !global;
        self.based |= linear != rip;
        let index = jump_index(rip);
        let empty = EMPTY_JUMP.get(index);
        if let (Some(tag), Some(to)) = (self.tag.get_mut(index), self.target.get_mut(index)) {
            if Some(&*tag) == empty
                && let Some(next) = self.used.get_mut(JUMPS_LISTED - self.room)
            {
                *next = index as u16;
                self.room -= 1;
            }
            *tag = rip.wrapping_neg();
            *to = target;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_hits_an_empty_entry() {
        for (index, tag) in EMPTY_JUMP.iter().enumerate() {
            assert_ne!(jump_index(tag.wrapping_neg()), index);
        }
        for (index, tag) in EMPTY_TLB.iter().enumerate() {
            let page = (tag.wrapping_neg() >> 12) as usize;
            for entries in [TLB_LEAST, TLB_MOST] {
                assert_ne!(page % entries, index % entries);
                // What begins below the page and reaches into it.
                assert_ne!(page.wrapping_sub(1) % entries, index % entries);
            }
        }
    }

    #[test]
    fn a_tlb_grows_with_its_work_and_shrinks_without() {
        let mut cpu = crate::cpu::Cpu::boxed();
        assert_eq!(cpu.tlb_mask, 0x3ff000);
        for page in (0..8 * TLB_LEAST as u64).cycle().take(20 * TLB_LEAST) {
            cpu.fill_tlb(page << 12, 7, true, false, false);
        }
        assert!(cpu.tlb_mask > 0x3ff000, "{:#x}", cpu.tlb_mask);
        for tlb in &cpu.tlb {
            assert_eq!(tlb.entries() as u64, (cpu.tlb_mask >> 12) + 1);
        }
        for _ in 0..4 {
            cpu.flush_tlb(false);
        }
        assert_eq!(cpu.tlb_mask, 0x3ff000);
        assert!(cpu.tlb.iter().all(|tlb| tlb.entries() == TLB_LEAST));
    }
}
