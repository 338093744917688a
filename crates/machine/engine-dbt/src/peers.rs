//! What the vCPUs of one machine owe each other: news of stores to code that any of them translated, the end of
//! permissions to store to it, and moments in which only one of them runs.
//!
//! Each vCPU has a code cache of its own. A page that any of them translated from is *watched*: nobody gets a tag for
//! stores to it. The order in which things are done is what makes this right:
//!
//! - Who begins to watch a page first says so here and then *asks* the others to drop their tags for it. Nobody waits
//!   for the answers: until they are there, the new blocks are *provisional*, and their vCPU compares their bytes with
//!   memory after every instruction that serializes and whenever something is asked of it (see
//!   `Translated::confirm`). A vCPU that stands still (halted, parked) has answered by that.
//! - A block's lines are noted here ([`Peers::cover`]) before its bytes are compared once more. A store to a watched
//!   page looks at the lines before it is made and once more after it was, so either it finds them or the comparison
//!   finds the store.
//! - While a store to another vCPU's code is under way, that vCPU's count of unsettled stores is not zero, and it runs
//!   nothing that serializes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use strata_engine::EngineError;
use strata_memory::{Gpa, GuestMemory, WriteObserver};

use crate::code::AddressMap;
use crate::cpu::request;
use crate::kick::VcpuShared;

/// vCPUs that a machine can have: sets of them are 64-bit words.
pub const VCPUS_MAX: u32 = 64;
/// Parts of the table of watched pages, each behind a lock of its own.
const SHARDS: usize = 64;
/// A write to more pages than this is told to everybody.
const PAGES_LOOKED_UP: u64 = 64;

/// What is known of a watched page.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    /// vCPUs with blocks from it, one bit each.
    who: u64,
    /// 64-byte lines that hold bytes of a block. They stay until nobody watches the page.
    lines: u64,
    /// Number of the question to drop tags for stores.
    asked: u64,
    /// Stores under way.
    storing: u32,
}

/// A store to a watched page that was announced and not yet told of.
#[derive(Debug)]
#[must_use]
pub struct Announced {
    gpa: u64,
    len: u64,
    /// vCPUs that it keeps from serializing.
    held: u64,
}

/// Who runs alone.
#[derive(Debug, Default)]
struct Turns {
    holder: Option<u32>,
    /// vCPUs that wait to run alone. They come first: to stop the others once for all of them is cheaper, the more so
    /// where one of the others has no processor of the host at the moment and can only stop when it gets one.
    waiting: u32,
}

/// The vCPUs of one machine, as they know each other.
pub struct Peers {
    memory: GuestMemory,
    /// More than one vCPU is planned.
    several: bool,
    vcpus: Vec<OnceLock<Arc<VcpuShared>>>,
    shards: Vec<Mutex<AddressMap<u64, Watched>>>,
    /// The number of the last question.
    asked: Mutex<u64>,
    /// Questions up to this one are answered by all.
    answered: AtomicU64,
    /// vCPUs with provisional blocks.
    curious: AtomicU64,
    /// Somebody runs alone, or is about to.
    exclusive: AtomicBool,
    /// Who, and how many wait for it.
    turns: Mutex<Turns>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The 64-byte lines of a page that `len` bytes at `gpa` touch, as far as they lie in the page of `gpa`.
fn lines(gpa: u64, len: u64) -> u64 {
    let first = (gpa & 0xfff) >> 6;
    let last = ((gpa & 0xfff) + len.max(1) - 1).min(0xfff) >> 6;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// The numbers of the bits that are set.
fn bits(mut set: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (set != 0).then(|| set.trailing_zeros())?;
        set &= set - 1;
        Some(bit)
    })
}

impl Peers {
    /// For a machine that will have `vcpus`.
    pub fn new(memory: GuestMemory, vcpus: u32) -> Arc<Peers> {
        Arc::new(Peers {
            memory,
            several: vcpus > 1,
            vcpus: (0..vcpus).map(|_| OnceLock::new()).collect(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            asked: Mutex::new(0),
            answered: AtomicU64::new(0),
            curious: AtomicU64::new(0),
            exclusive: AtomicBool::new(false),
            turns: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Adds vCPU `id`. Each id once.
    pub fn join(&self, id: u32) -> Result<Arc<VcpuShared>, EngineError> {
        let shared = Arc::new(VcpuShared::new(id));
        let slot = self.vcpus.get(id as usize);
        if slot.is_some_and(|slot| slot.set(Arc::clone(&shared)).is_ok()) {
            return Ok(shared);
        }
        Err(EngineError::Internal(format!(
            "vCPU {id} was created before or is one too many"
        )))
    }

    /// How many vCPUs there will be, at least one.
    pub fn planned(&self) -> usize {
        self.vcpus.len().max(1)
    }

    /// True if the machine has more than one vCPU.
    pub fn several(&self) -> bool {
        self.several
    }

    fn vcpu(&self, id: u32) -> Option<&VcpuShared> {
        self.vcpus.get(id as usize)?.get().map(Arc::as_ref)
    }

    fn others(&self, me: u32) -> impl Iterator<Item = &VcpuShared> {
        self.vcpus
            .iter()
            .filter_map(OnceLock::get)
            .map(Arc::as_ref)
            .filter(move |vcpu| vcpu.id() != me)
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, AddressMap<u64, Watched>> {
        let index = (page ^ page >> 6) as usize % SHARDS;
        match self.shards.get(index) {
            Some(shard) => lock(shard),
            // Cannot happen: there are that many.
            None => std::process::abort(),
        }
    }

    /// vCPU `me` is about to translate from `page` for the first time. The caller drops its own tags for stores to
    /// the page. Returns the number of the question that the others were asked.
    pub fn watch(&self, me: u32, page: u64) -> u64 {
        let mut shard = self.shard(page);
        let known = shard.entry(page).or_default();
        let first = known.who == 0;
        known.who |= 1 << me;
        if !first {
            return known.asked;
        }
        self.memory.watch_page(page);
        if self.several {
            known.asked = self.ask(me, |vcpu, number| vcpu.ask_page(page, number));
        }
        known.asked
    }

    /// vCPU `me` has no block from `page` any more.
    pub fn unwatch(&self, me: u32, page: u64) {
        let mut shard = self.shard(page);
        let Some(known) = shard.get_mut(&page) else {
            return;
        };
        known.who &= !(1 << me);
        if known.who == 0 && known.storing == 0 {
            shard.remove(&page);
            self.memory.unwatch_page(page);
        }
    }

    /// Notes that `len` bytes at `gpa`, of one watched page, are part of a block now. Its bytes must be compared with
    /// memory afterwards.
    pub fn cover(&self, gpa: u64, len: u64) {
        loop {
            let mut shard = self.shard(gpa >> 12);
            let Some(known) = shard.get_mut(&(gpa >> 12)) else {
                return;
            };
            known.lines |= lines(gpa, len);
            // A store that has not seen these lines must have ended before the comparison.
            if known.storing == 0 {
                return;
            }
            drop(shard);
            std::thread::yield_now();
        }
    }

    fn ask(&self, me: u32, question: impl Fn(&VcpuShared, u64)) -> u64 {
        let mut asked = lock(&self.asked);
        *asked += 1;
        let number = *asked;
        for vcpu in self.others(me) {
            question(vcpu, number);
        }
        if let Some(vcpu) = self.vcpu(me) {
            vcpu.asked_itself(number);
        }
        number
    }

    /// True if everybody but `me` has dropped what question `number` was about.
    pub fn answered(&self, me: u32, number: u64) -> bool {
        if number <= self.answered.load(Ordering::SeqCst) {
            return true;
        }
        let all = self.others(me).all(|vcpu| vcpu.has_answered(number));
        if all && self.vcpu(me).is_none_or(|vcpu| vcpu.has_answered(number)) {
            self.answered.fetch_max(number, Ordering::SeqCst);
        }
        all
    }

    /// vCPU `me` has provisional blocks, or has none.
    pub fn set_curious(&self, me: u32, on: bool) {
        if on {
            self.curious.fetch_or(1 << me, Ordering::SeqCst);
        } else {
            self.curious.fetch_and(!(1 << me), Ordering::SeqCst);
        }
    }

    /// vCPU `me` has answered: those with provisional blocks look again.
    pub fn tell_answer(&self, me: u32) {
        let curious = self.curious.load(Ordering::SeqCst) & !(1 << me);
        for vcpu in bits(curious).filter_map(|id| self.vcpu(id)) {
            vcpu.raise(request::LOOK);
        }
    }

    /// vCPU `me` is about to store `len` bytes at `gpa`, in one watched page.
    pub fn announce(&self, me: u32, gpa: u64, len: u64) -> Announced {
        let mut shard = self.shard(gpa >> 12);
        let mut held = 0;
        if let Some(known) = shard.get_mut(&(gpa >> 12)) {
            known.storing += 1;
            if known.lines & lines(gpa, len) != 0 {
                held = known.who & !(1 << me);
            }
        } else {
            // Nobody watches it any more; who begins to now compares its bytes when everybody has answered.
            return Announced { gpa, len: 0, held };
        }
        for vcpu in bits(held).filter_map(|id| self.vcpu(id)) {
            vcpu.hold();
        }
        Announced { gpa, len, held }
    }

    /// The announced store was made, or not. True if it hit lines with code of vCPU `me` itself.
    pub fn stored(&self, me: u32, store: Announced) -> bool {
        if store.len == 0 {
            return false;
        }
        let page = store.gpa >> 12;
        let mut shard = self.shard(page);
        let mut who = 0;
        if let Some(known) = shard.get_mut(&page) {
            known.storing = known.storing.saturating_sub(1);
            if known.lines & lines(store.gpa, store.len) != 0 {
                who = known.who;
            }
            if known.who == 0 && known.storing == 0 {
                shard.remove(&page);
                self.memory.unwatch_page(page);
            }
        }
        drop(shard);
        for vcpu in bits(who & !(1 << me)).filter_map(|id| self.vcpu(id)) {
            vcpu.code_written(store.gpa, store.len);
        }
        for vcpu in bits(store.held).filter_map(|id| self.vcpu(id)) {
            vcpu.release();
        }
        who & 1 << me != 0
    }

    /// Guest-physical memory is another, or the dirty log was started: returns when no vCPU uses what it remembers of
    /// memory any more. Not for a vCPU's own thread.
    pub fn memory_changed(&self) {
        let number = self.ask(u32::MAX, VcpuShared::ask_everything);
        while !self.answered(u32::MAX, number) {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    // Who runs.

    /// vCPU `me` is about to use what it remembers of memory. Waits while somebody else runs alone, or is to.
    pub fn enter(&self, me: &VcpuShared) {
        let mut turns = lock(&self.turns);
        while turns.holder.is_some() || turns.waiting > 0 {
            turns = self.wait(turns);
        }
        me.set_running(true);
    }

    fn wait<'a>(&self, turns: MutexGuard<'a, Turns>) -> MutexGuard<'a, Turns> {
        let woken = self.changed.wait(turns);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPU `me` stands still until [`Peers::enter`].
    pub fn leave(&self, me: &VcpuShared) {
        me.set_running(false);
        self.tell_answer(me.id());
        if self.exclusive.load(Ordering::SeqCst) {
            drop(lock(&self.turns));
            self.changed.notify_all();
        }
    }

    /// Gives way to a vCPU that wants to run alone.
    pub fn give_way(&self, me: &VcpuShared) {
        self.leave(me);
        self.enter(me);
    }

    /// Returns when no other vCPU runs; none does until [`Peers::end_alone`]. To be called between two accesses to
    /// memory: `me` itself counts as standing still meanwhile, so it must see to questions before the next access.
    pub fn run_alone(&self, me: &VcpuShared) {
        self.leave(me);
        let mut turns = lock(&self.turns);
        turns.waiting += 1;
        while turns.holder.is_some() {
            turns = self.wait(turns);
        }
        turns.waiting -= 1;
        turns.holder = Some(me.id());
        self.exclusive.store(true, Ordering::SeqCst);
        for vcpu in self.others(me.id()).filter(|vcpu| vcpu.is_running()) {
            vcpu.raise(request::GIVE_WAY);
        }
        while self.others(me.id()).any(VcpuShared::is_running) {
            turns = self.wait(turns);
        }
    }

    /// Ends what [`Peers::run_alone`] began.
    pub fn end_alone(&self, me: &VcpuShared) {
        let mut turns = lock(&self.turns);
        turns.holder = None;
        self.exclusive.store(false, Ordering::SeqCst);
        me.set_running(true);
        drop(turns);
        self.changed.notify_all();
    }
}

impl WriteObserver for Peers {
    /// A device wrote to a watched page.
    fn device_wrote(&self, gpa: Gpa, len: u64) {
        let (first, last) = (gpa.0 >> 12, gpa.0.saturating_add(len.max(1) - 1) >> 12);
        let mut who = 0;
        if last - first < PAGES_LOOKED_UP {
            for page in first..=last {
                let start = gpa.0.max(page << 12);
                let len = (gpa.0.saturating_add(len.max(1))).min((page + 1) << 12) - start;
                if let Some(known) = self.shard(page).get(&page)
                    && known.lines & lines(start, len) != 0
                {
                    who |= known.who;
                }
            }
        } else {
            who = u64::MAX;
        }
        for vcpu in bits(who).filter_map(|id| self.vcpu(id)) {
            vcpu.code_written(gpa.0, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_range() {
        assert_eq!(lines(0x1000, 1), 1);
        assert_eq!(lines(0x103f, 2), 3);
        assert_eq!(lines(0x1fff, 8), 1 << 63);
        assert_eq!(lines(0x1000, 0x2000), u64::MAX);
        assert_eq!(bits(0b1010).collect::<Vec<_>>(), [1, 3]);
    }
}
