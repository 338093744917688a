//! From RIP to host code: the jump cache, the code map, the translator, and links between blocks.

use std::ops::Range;

use super::*;
use crate::code::Link;
use crate::translate::{NeedsNextPage, Translated as Block};

/// Guest bytes fetched for a block: what nearly all blocks of the most instructions have at most; others end there.
pub(super) const WINDOW: usize = 384;
/// How often a block is begun anew whose bytes others change while it is translated, before it is taken as it is.
const TRIES: usize = 100;

/// A block, its key, and whether its first page is mapped globally.
type Found = (u32, Key, bool);

impl Translated {
    /// The block at RIP, translated if need be.
    pub(super) fn find(
        &mut self,
        mode: Mode,
        bus: &dyn IoBus,
    ) -> Result<Result<Found, Fault>, EngineError> {
        let cs_base = if mode.bits() == 64 {
            0
        } else {
            self.cpu.segments[1].base
        };
        let rip = self.cpu.rip;
        let allowed = if mode.bits() == 64 {
            canonical(rip)
        } else {
            rip <= u64::from(self.cpu.segments[1].limit)
        };
        if !allowed {
            return Ok(Err(Fault::protection(0)));
        }
        let (linear, user) = (mode.linear(rip, cs_base), mode.user());
        let (gpa, global) = match self.exec(bus).translate_fetch(linear, user) {
            Ok(to) => (to.gpa, to.global),
            Err(fault) => return Ok(Err(fault)),
        };
        let key = Key {
            gpa,
            rip,
            cs_base,
            mode: mode.0,
        };
        if let Some(id) = self.code.find(&key) {
            let second = self.code.block(id).and_then(|block| block.second_page);
            let Some(expected) = second else {
                return Ok(Ok((id, key, global)));
            };
            let next = (linear & !0xfff).wrapping_add(4096);
            match self.exec(bus).translate_fetch(next, user) {
                Ok(to) if to.gpa >> 12 == expected => return Ok(Ok((id, key, global))),
                Ok(_) => {
                    let stats = &mut self.env.stats;
                    self.code.written(gpa, 1, &mut self.cpu, stats);
                }
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(self.translate_block(key, bus)?.map(|id| (id, key, global)))
    }

    fn translate_block(
        &mut self,
        key: Key,
        bus: &dyn IoBus,
    ) -> Result<Result<u32, Fault>, EngineError> {
        let mut tries = 0;
        loop {
            match self.try_block(key, tries >= TRIES, bus)? {
                Ok(Some(id)) => return Ok(Ok(id)),
                Ok(None) => std::thread::yield_now(),
                Err(fault) => return Ok(Err(fault)),
            }
            tries += 1;
        }
    }

    /// Begins to watch a page for stores, if this vCPU has no code from it yet.
    fn watch(&mut self, page: u64, bus: &dyn IoBus) -> u64 {
        let (asked, new) = self.code.watch(page);
        if new {
            self.exec(bus).drop_writes_to(page);
        }
        asked
    }

    /// Translates from these bytes, of which `in_page` lie in the block's first page.
    fn make(&mut self, key: Key, bytes: &[u8], in_page: usize) -> Result<Block, NeedsNextPage> {
        let fetch = Fetch { bytes, in_page };
        let (stubs, features) = (&self.stubs, &self.features);
        let (code, options) = (&mut self.code, self.options);
        let workspace = &mut self.workspace;
        translate(key, fetch, code, stubs, features, options, workspace)
    }

    /// Translates a block. `None`: its bytes changed meanwhile, and it is not taken `anyway`.
    fn try_block(
        &mut self,
        key: Key,
        anyway: bool,
        bus: &dyn IoBus,
    ) -> Result<Result<Option<u32>, Fault>, EngineError> {
        let started = Instant::now();
        let (linear, user) = (key.linear(), Mode(key.mode).user());
        if self.code.full() {
            self.code.flush(&mut self.cpu, &mut self.env.stats);
            self.generation += 1;
        }
        let mut asked = self.watch(key.gpa >> 12, bus);
        let mut bytes = [0xffu8; WINDOW + 16];
        let in_page = (4096 - (linear & 0xfff) as usize).min(WINDOW);
        let (head, tail) = bytes.split_at_mut(in_page);
        // Memory that is not there reads as ones, as on a bus that nobody answers.
        let _ = self.env.memory.read(Gpa(key.gpa), head);
        let mut second_page = None;
        let done = match self.make(key, head, in_page) {
            Ok(done) => done,
            Err(_) => {
                let next = (linear & !0xfff).wrapping_add(4096);
                let gpa = match self.exec(bus).translate_fetch(next, user) {
                    Ok(to) => to.gpa,
                    Err(fault) => return Ok(Err(fault)),
                };
                asked = asked.max(self.watch(gpa >> 12, bus));
                if let Some(more) = tail.get_mut(..15) {
                    let _ = self.env.memory.read(Gpa(gpa), more);
                }
                second_page = Some(gpa >> 12);
                let all = bytes.get(..in_page + 15).unwrap_or(&[]);
                self.make(key, all, in_page).map_err(|_| {
                    EngineError::Internal("an instruction longer than 15 bytes".into())
                })?
            }
        };
        let second_page = second_page.filter(|_| done.len as usize > in_page);
        let id = self.code.insert(
            key,
            done.len,
            second_page,
            &done.code,
            &done.links,
            &done.points,
        )?;
        self.inspect_block(id, &done)?;
        let stats = &mut self.env.stats;
        stats.blocks_translated += 1;
        stats.instructions_translated += u64::from(done.instructions);
        stats.translation_ns += u64::try_from(started.elapsed().as_nanos()).unwrap_or(0);
        let from_first = (done.len as usize).min(in_page);
        let source = |range: Range<usize>| bytes.get(range).unwrap_or(&[]);
        let made_from = [
            (key.gpa, source(0..from_first)),
            (
                second_page.map_or(key.gpa, |page| page << 12),
                source(from_first..done.len as usize),
            ),
        ];
        self.workspace.recycle(done);
        let unchanged = self.unchanged(&made_from);
        if !unchanged && !anyway {
            self.code.invalidate(id, &mut self.cpu, &mut self.env.stats);
            return Ok(Ok(None));
        }
        // A CPU may have fetched the old bytes too, until it serializes: the block may run once.
        self.watch_provisional(id, asked, made_from, unchanged);
        Ok(Ok(Some(id)))
    }

    /// The code at RIP, if the jump cache knows it: what is in there needs no walk.
    pub(super) fn recall(&self, mode: Mode) -> Option<u64> {
        let privilege = usize::from(mode.user());
        let cs_base = if mode.bits() == 64 {
            0
        } else {
            self.cpu.segments[1].base
        };
        if mode.is_single() || self.cached_mode.get(privilege) != Some(&(mode, cs_base)) {
            return None;
        }
        self.cpu.jump.get(privilege)?.get(self.cpu.rip)
    }

    /// Enters a block in the jump cache of its privilege.
    pub(super) fn remember(&mut self, mode: Mode, block: u32, key: Key, global: bool) {
        let Some(block) = self.code.block(block) else {
            return;
        };
        if mode.is_single() || mode.is_ungrouped() {
            return;
        }
        let privilege = usize::from(mode.user());
        let (Some(cached), Some(jump)) = (
            self.cached_mode.get_mut(privilege),
            self.cpu.jump.get_mut(privilege),
        ) else {
            return;
        };
        if *cached != (mode, key.cs_base) {
            *cached = (mode, key.cs_base);
            jump.clear();
        }
        jump.set(
            key.rip,
            key.linear(),
            block.second_page.is_some(),
            global,
            self.code.address(block.entry),
        );
    }

    /// A group of accesses did not lie in one page of RAM: goes on, now and from here on, in a block that checks each.
    pub(super) fn ungroup(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        self.ungrouped = Some(self.cpu.rip);
        let number = self.cpu.exit_info as u32;
        let Some(link) = self.code.link(number) else {
            return Err(EngineError::Internal("a group that is not known".into()));
        };
        // What is counted in the block before is counted by the dispatcher only.
        if self.options.count {
            return Ok(None);
        }
        match self.linked(number, &link, bus)? {
            Err(fault) => Ok(self.raise(bus, fault)),
            Ok(Some((id, key, _))) if key == link.target => {
                self.code.connect(number, id);
                self.inspect_link(&link, id)?;
                Ok(None)
            }
            Ok(_) => Ok(None),
        }
    }

    /// The block that link `number` goes to, if it lies in one page and the link still stands. None while something else
    /// comes first.
    fn linked(
        &mut self,
        number: u32,
        link: &Link,
        bus: &dyn IoBus,
    ) -> Result<Result<Option<Found>, Fault>, EngineError> {
        if self.cpu.request_bits() != 0 || self.cpu.dropped.any() {
            return Ok(Ok(None));
        }
        let generation = self.generation;
        let found = match self.find(Mode(link.target.mode), bus)? {
            Err(fault) => return Ok(Err(fault)),
            Ok(found) => found,
        };
        let lasts = generation == self.generation && !self.code.is_dead_link(number);
        let block = self.code.block(found.0);
        let whole = block.is_some_and(|block| block.second_page.is_none());
        Ok(Ok((whole && lasts).then_some(found)))
    }

    /// A direct jump whose target the jump cache does not have: points it there if both lie in one page, or if the
    /// target's page is mapped globally.
    pub(super) fn follow_link(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        let number = self.cpu.exit_info as u32;
        let Some(link) = self.code.link(number) else {
            return Err(EngineError::Internal("a jump that is not known".into()));
        };
        self.cpu.rip = link.target.rip;
        let (id, key, global) = match self.linked(number, &link, bus)? {
            Err(fault) => return Ok(self.raise(bus, fault)),
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
        };
        let far = link.target.gpa == u64::MAX;
        let there = Key {
            gpa: if far { key.gpa } else { link.target.gpa },
            ..link.target
        };
        if key != there {
            return Ok(None);
        }
        if !far {
            self.code.connect(number, id);
        } else if global {
            self.code.connect_far(number, id, key.linear() >> 12);
        } else {
            self.remember(Mode(link.target.mode), id, key, global);
            return Ok(None);
        }
        self.inspect_link(&link, id)?;
        Ok(None)
    }
}
