//! Linear memory: segmentation, the page walk, soft-TLB fills, and the slow path of every access.
//!
//! Paging follows Intel SDM vol. 3, chapter 4: 4-level, PAE and 32-bit. Accessed and dirty bits are set by
//! compare-and-swap when an entry is used, so a TLB entry for stores exists only for pages already marked dirty.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use strata_memory::{Gpa, SlotKind};

use crate::caches::Walk;
use crate::cpu::{BOUNCE_SIZE, control, flags};
use crate::env::{Access, Exec, Fault};
use crate::peers::Announced;

/// Where a linear page lives.
#[derive(Clone, Copy, Debug)]
pub struct Translation {
    /// Guest-physical address of the byte asked for.
    pub gpa: u64,
    /// Stores are allowed at this privilege and the dirty bit is set.
    pub store_ready: bool,
    /// The mapping survives a CR3 write.
    pub global: bool,
}

mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

mod pf {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
}

/// A store of translated code that is not finished with the instruction that makes it.
#[derive(Debug)]
pub struct PendingStore {
    /// Linear address of the operand.
    pub linear: u64,
    /// Bytes.
    pub size: usize,
    /// Where the instruction stored.
    pub to: StoredTo,
}

/// Where the instruction of a [`PendingStore`] stored.
#[derive(Debug)]
pub enum StoredTo {
    /// The bounce buffer, from where it must be written to one or two pages.
    Bounce(Piece, Piece),
    /// Memory at this guest-physical address, of which others must hear.
    Place(u64, Option<Announced>),
}

/// One physically contiguous piece of an operand: guest-physical address and bytes.
pub type Piece = (u64, usize);

/// True if bits 63..47 are all equal.
pub fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

impl Exec<'_> {
    /// Linear address of `offset` in segment `seg`, checked as a `size`-byte access would be: canonical in 64-bit
    /// mode; base and limit elsewhere. Fails with #GP(0), or #SS(0) for SS.
    pub fn linear(
        &self,
        seg: usize,
        offset: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Fault> {
        let fault = if seg == 2 {
            Fault::stack(0)
        } else {
            Fault::protection(0)
        };
        let Some(segment) = self.cpu.segments.get(seg) else {
            return Err(fault);
        };
        if self.cpu.code_64() {
            let base = if seg >= 4 { segment.base } else { 0 };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(size.max(1) as u64 - 1);
            if !canonical(linear) || !canonical(last) {
                return Err(fault);
            }
            return self.aligned(linear, size).map(|()| linear);
        }
        let linear = segment.base.wrapping_add(offset) & 0xffff_ffff;
        if self.cpu.cr0 & control::CR0_PE == 0 || self.cpu.system_flags & flags::VM != 0 {
            // Real mode: 64 KiB limit unless a larger one was left in the hidden part.
            let last = (offset & 0xffff_ffff) + size.max(1) as u64 - 1;
            return if last <= u64::from(segment.limit) {
                Ok(linear)
            } else {
                Err(fault)
            };
        }
        if segment.null() && seg != 1 && segment.attributes & 0x80 == 0 {
            return Err(fault);
        }
        let code = segment.attributes & 8 != 0;
        let writable = !code && segment.attributes & 2 != 0;
        let readable = !code || segment.attributes & 2 != 0;
        match access {
            Access::Write if !writable => return Err(fault),
            Access::Read if !readable => return Err(fault),
            _ => {}
        }
        let first = offset & 0xffff_ffff;
        let last = first + size.max(1) as u64 - 1;
        let expand_down = !code && segment.attributes & 4 != 0;
        let inside = if expand_down {
            let top = if segment.default_32() {
                0xffff_ffff
            } else {
                0xffff
            };
            first > u64::from(segment.limit) && last <= top
        } else {
            last <= u64::from(segment.limit)
        };
        if !inside {
            return Err(fault);
        }
        self.aligned(linear, size).map(|()| linear)
    }

    /// Reads one page-table entry; memory that is not RAM reads as not present.
    fn entry64(&self, gpa: u64) -> u64 {
        self.ram(gpa, 8).map_or(0, |host| {
            // SAFETY: `ram` says that 8 bytes of guest RAM are mapped there; entries are 8-byte aligned.
            unsafe { AtomicU64::from_ptr(host.cast()) }.load(Ordering::Acquire)
        })
    }

    fn entry32(&self, gpa: u64) -> u32 {
        self.ram(gpa, 4).map_or(0, |host| {
            // SAFETY: as above, 4 bytes.
            unsafe { AtomicU32::from_ptr(host.cast()) }.load(Ordering::Acquire)
        })
    }

    /// Sets bits in an entry if it still has the value `old`. False if another CPU changed it.
    fn mark64(&mut self, gpa: u64, old: u64, bits: u64) -> bool {
        let Some(host) = self.ram(gpa, 8) else {
            return true;
        };
        let announced = self.announce(gpa, 8);
        // SAFETY: as in `entry64`.
        let done = unsafe { AtomicU64::from_ptr(host.cast()) }
            .compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        self.written(gpa, 8, announced);
        done
    }

    fn mark32(&mut self, gpa: u64, old: u32, bits: u32) -> bool {
        let Some(host) = self.ram(gpa, 4) else {
            return true;
        };
        let announced = self.announce(gpa, 4);
        // SAFETY: as in `entry32`.
        let done = unsafe { AtomicU32::from_ptr(host.cast()) }
            .compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        self.written(gpa, 4, announced);
        done
    }

    /// Before a store to RAM, to `len` bytes of one page.
    pub fn announce(&self, gpa: u64, len: u64) -> Option<Announced> {
        let env = &self.env;
        let watched = env
            .slots
            .find(Gpa(gpa))
            .is_some_and(|slot| slot.is_watched(gpa >> 12));
        watched.then(|| env.peers.announce(env.me.id(), gpa, len))
    }

    /// After the store: the dirty log and whoever translated from there hear of it.
    pub fn written(&mut self, gpa: u64, len: u64, announced: Option<Announced>) {
        self.env.memory.mark_dirty(Gpa(gpa), len);
        if let Some(announced) = announced
            && self.env.peers.stored(self.env.me.id(), announced)
        {
            self.code.written(gpa, len, self.cpu, &mut self.env.stats);
        }
    }

    /// Drops what the other vCPUs asked this one to drop. Not while an address from the soft TLB is in use.
    pub fn answer(&mut self) {
        let (questions, number) = self.env.me.take_questions();
        if questions.everything {
            self.env.slots = self.env.memory.slots();
            self.cpu.flush_tlb(true);
        }
        if questions.all {
            for tlb in &mut self.cpu.tlb {
                tlb.drop_writes();
            }
        }
        for page in questions.pages {
            self.drop_writes_to(page);
        }
        self.env.me.answer(number);
        self.env.peers.tell_answer(self.env.me.id());
    }

    /// Drops the tags for stores to a guest-physical page.
    pub fn drop_writes_to(&mut self, page: u64) {
        if let Some(host) = self.ram(page << 12, 4096) {
            for tlb in &mut self.cpu.tlb {
                tlb.drop_writes_to(host as u64);
            }
        }
    }

    /// Host address of `len` bytes of RAM that lie in one page.
    fn ram(&self, gpa: u64, len: usize) -> Option<*mut u8> {
        let slot = self.env.slots.find(Gpa(gpa))?;
        let offset = gpa - slot.gpa().0;
        if offset + len as u64 > slot.size() {
            return None;
        }
        // SAFETY: the offset lies inside the slot's mapping.
        Some(unsafe { slot.host().as_ptr().add(offset as usize) })
    }

    /// Walks the page tables for one byte at `linear`, sets accessed and dirty bits, or says which #PF is due.
    pub fn translate(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
    ) -> Result<Translation, Fault> {
        if self.cpu.cr0 & control::CR0_PG == 0 {
            return Ok(Translation {
                gpa: linear & 0xffff_ffff,
                store_ready: true,
                global: true,
            });
        }
        if self.cpu.cr4 & control::CR4_PAE == 0 {
            return self.walk_32(linear, access, user);
        }
        let long = self.cpu.long_mode();
        let top = if long { 4 } else { 3 };
        loop {
            let known = self.cpu.walks.get(linear);
            match self.walk_64(linear, access, user, top, known) {
                Ok(Some(done)) => return Ok(done),
                Ok(None) => {}
                // A fault drops what was remembered; without that there may be none.
                Err(_) if known.is_some() => self.cpu.walks.forget(linear),
                Err(fault) => return Err(fault),
            }
        }
    }

    /// [`Exec::translate`] for the first byte of code, which remembers the page.
    pub fn translate_fetch(&mut self, linear: u64, user: bool) -> Result<Translation, Fault> {
        let pages = self.cpu.code_pages.get(usize::from(user));
        if let Some((gpa, global)) = pages.and_then(|pages| pages.get(linear)) {
            return Ok(Translation {
                gpa,
                store_ready: false,
                global,
            });
        }
        let to = self.translate(linear, Access::Fetch, user)?;
        if self.cpu.remembers
            && let Some(pages) = self.cpu.code_pages.get_mut(usize::from(user))
        {
            pages.set(linear, to.gpa, to.global);
        }
        Ok(to)
    }

    fn page_fault(&self, linear: u64, access: Access, user: bool, extra: u32) -> Fault {
        let mut code = extra;
        if access == Access::Write {
            code |= pf::W;
        }
        if user {
            code |= pf::U;
        }
        let nx = self.cpu.efer & control::EFER_NXE != 0 && self.cpu.cr4 & control::CR4_PAE != 0;
        if access == Access::Fetch && (nx || self.cpu.cr4 & control::CR4_SMEP != 0) {
            code |= pf::I;
        }
        Fault::page(linear, code)
    }

    /// One walk over 8-byte entries, or its last step if the others are `known`. `None`: an entry changed under us, walk
    /// again.
    fn walk_64(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
        top: u32,
        known: Option<Walk>,
    ) -> Result<Option<Translation>, Fault> {
        let nxe = self.cpu.efer & control::EFER_NXE != 0;
        let address_bits = (1u64 << self.env.model.address_bits()) - 1;
        let reserved = (!address_bits & 0x000f_ffff_ffff_f000) | if nxe { 0 } else { pte::NX };
        let frame_mask = 0x000f_ffff_ffff_f000;
        let mut table = if top == 4 {
            self.cpu.cr3 & frame_mask
        } else {
            self.cpu.cr3 & 0xffff_ffe0
        };
        let (mut writable, mut user_ok, mut no_exec) = (true, true, false);
        let mut level = top;
        if let Some(walk) = known {
            table = walk.table;
            (writable, user_ok, no_exec) = (walk.writable, walk.user, walk.no_exec);
            level = 1;
        }
        loop {
            let index =
                (linear >> (12 + 9 * (level - 1))) & if level == 3 && top == 3 { 3 } else { 511 };
            let at = table + index * 8;
            let entry = self.entry64(at);
            if entry & pte::P == 0 {
                return Err(self.page_fault(linear, access, user, 0));
            }
            let pdpte = level == 3 && top == 3;
            let leaf =
                level == 1 || (entry & pte::PS != 0 && (level == 2 || (level == 3 && top == 4)));
            let mut bad = if pdpte {
                !address_bits & 0x000f_ffff_ffff_f000
            } else {
                reserved
            };
            if level == 4 {
                bad |= pte::PS;
            }
            if leaf && level > 1 {
                bad |= ((1u64 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
            }
            if entry & bad != 0 {
                return Err(self.page_fault(linear, access, user, pf::RSVD | pf::P));
            }
            if !pdpte {
                writable &= entry & pte::W != 0;
                user_ok &= entry & pte::U != 0;
                no_exec |= entry & pte::NX != 0;
            }
            if !leaf {
                if !pdpte && entry & pte::A == 0 && !self.mark64(at, entry, pte::A) {
                    return Ok(None);
                }
                table = entry & frame_mask;
                level -= 1;
                if level == 1 && self.cpu.remembers {
                    let walks = &mut self.cpu.walks;
                    walks.set(linear, table, writable, user_ok, no_exec);
                }
                continue;
            }
            let store_allowed = self.check(linear, access, user, writable, user_ok, no_exec)?;
            let mut bits = pte::A;
            if access == Access::Write {
                bits |= pte::D;
            }
            if entry & bits != bits && !self.mark64(at, entry, bits) {
                return Ok(None);
            }
            let shift = 12 + 9 * (level - 1);
            let offset_mask = (1u64 << shift) - 1;
            let global = entry & pte::G != 0 && self.cpu.cr4 & control::CR4_PGE != 0;
            if level > 1 {
                self.cpu.large.note(linear, shift, global);
            }
            return Ok(Some(Translation {
                gpa: (entry & frame_mask & !offset_mask) | (linear & offset_mask),
                store_ready: store_allowed && (entry | bits) & pte::D != 0,
                global,
            }));
        }
    }

    /// The access rights of a leaf (SDM vol. 3, 4.6). Returns whether a store would be allowed.
    fn check(
        &self,
        linear: u64,
        access: Access,
        user: bool,
        writable: bool,
        user_page: bool,
        no_exec: bool,
    ) -> Result<bool, Fault> {
        let fault = self.page_fault(linear, access, user, pf::P);
        let store_allowed = writable || (!user && self.cpu.cr0 & control::CR0_WP == 0);
        let smep = self.cpu.cr4 & control::CR4_SMEP != 0;
        let smap = self.cpu.cr4 & control::CR4_SMAP != 0 && self.cpu.system_flags & flags::AC == 0;
        let denied = match access {
            _ if user && !user_page => true,
            Access::Fetch => no_exec || (!user && user_page && smep),
            Access::Read => !user && user_page && smap,
            Access::Write => !store_allowed || (!user && user_page && smap),
        };
        if denied {
            Err(fault)
        } else {
            Ok(store_allowed)
        }
    }

    fn walk_32(&mut self, linear: u64, access: Access, user: bool) -> Result<Translation, Fault> {
        loop {
            let pde_at = (self.cpu.cr3 & 0xffff_f000) + ((linear >> 22) & 1023) * 4;
            let pde = self.entry32(pde_at);
            if u64::from(pde) & pte::P == 0 {
                return Err(self.page_fault(linear, access, user, 0));
            }
            let large = u64::from(pde) & pte::PS != 0 && self.cpu.cr4 & control::CR4_PSE != 0;
            let (at, entry, writable, user_ok) = if large {
                (
                    pde_at,
                    pde,
                    u64::from(pde) & pte::W != 0,
                    u64::from(pde) & pte::U != 0,
                )
            } else {
                if u64::from(pde) & pte::A == 0 && !self.mark32(pde_at, pde, pte::A as u32) {
                    continue;
                }
                let at = u64::from(pde & 0xffff_f000) + ((linear >> 12) & 1023) * 4;
                let entry = self.entry32(at);
                let both = u64::from(pde & entry);
                (at, entry, both & pte::W != 0, both & pte::U != 0)
            };
            if u64::from(entry) & pte::P == 0 {
                return Err(self.page_fault(linear, access, user, 0));
            }
            let store_allowed = self.check(linear, access, user, writable, user_ok, false)?;
            let mut bits = pte::A as u32;
            if access == Access::Write {
                bits |= pte::D as u32;
            }
            if entry & bits != bits && !self.mark32(at, entry, bits) {
                continue;
            }
            let gpa = if large {
                u64::from(entry & 0xffc0_0000)
                    | (u64::from(entry >> 13) & 0xff) << 32
                    | (linear & 0x3f_ffff)
            } else {
                u64::from(entry & 0xffff_f000) | (linear & 0xfff)
            };
            let global = u64::from(entry) & pte::G != 0 && self.cpu.cr4 & control::CR4_PGE != 0;
            if large {
                self.cpu.large.note(linear, 22, global);
            }
            return Ok(Translation {
                gpa,
                store_ready: store_allowed && u64::from(entry | bits) & pte::D != 0,
                global,
            });
        }
    }

    /// Fills the soft TLB for the page of `linear` after a successful walk.
    fn fill(&mut self, linear: u64, to: Translation, user: bool) {
        let page = linear & !0xfff;
        let Some(host) = self.ram(to.gpa & !0xfff, 4096) else {
            return;
        };
        let Some(slot) = self.env.slots.find(Gpa(to.gpa)) else {
            return;
        };
        let frame = to.gpa >> 12;
        let logged = self.env.memory.dirty_log_on();
        let store =
            to.store_ready && slot.kind() == SlotKind::Ram && !logged && !slot.is_watched(frame);
        let delta = (host as u64).wrapping_sub(page);
        self.cpu.fill_tlb(page, delta, store, to.global, user);
        self.env.stats.tlb_fills += 1;
    }

    /// The pieces of an operand, at most one per page, all checked for `access` first.
    fn pieces(
        &mut self,
        linear: u64,
        size: usize,
        access: Access,
        user: bool,
    ) -> Result<(Piece, Piece), Fault> {
        let first_len = size.min(4096 - (linear & 0xfff) as usize);
        let first = self.translate(linear, access, user)?;
        if first_len == size {
            self.fill(linear, first, user);
            return Ok(((first.gpa, size), (0, 0)));
        }
        let next = if self.cpu.code_64() {
            linear.wrapping_add(first_len as u64)
        } else {
            linear.wrapping_add(first_len as u64) & 0xffff_ffff
        };
        let second = self.translate(next, access, user)?;
        Ok(((first.gpa, first_len), (second.gpa, size - first_len)))
    }

    /// Reads guest-physical memory: RAM or a device.
    fn read_physical(&mut self, gpa: u64, into: &mut [u8]) {
        if let Some(host) = self.ram(gpa, into.len()) {
            // SAFETY: `ram` says that this many bytes are mapped; the guest may race, so plain byte copies only.
            unsafe { copy_from_guest(host, into) };
            return;
        }
        self.env.count_exit(strata_engine::ExitCause::Mmio);
        let mut at = gpa;
        for chunk in into.chunks_mut(8) {
            self.mmio_read(at, chunk);
            at += chunk.len() as u64;
        }
    }

    /// Writes guest-physical memory: RAM (telling the code map), ROM (ignored) or a device.
    fn write_physical(&mut self, gpa: u64, from: &[u8]) {
        if let Some(host) = self.ram(gpa, from.len()) {
            if self
                .env
                .slots
                .find(Gpa(gpa))
                .is_some_and(|slot| slot.kind() != SlotKind::Ram)
            {
                return;
            }
            let announced = self.announce(gpa, from.len() as u64);
            // SAFETY: as above.
            unsafe { copy_to_guest(host, from) };
            self.written(gpa, from.len() as u64, announced);
            return;
        }
        self.env.count_exit(strata_engine::ExitCause::Mmio);
        let mut at = gpa;
        for chunk in from.chunks(8) {
            self.mmio_write(at, chunk);
            at += chunk.len() as u64;
        }
    }

    /// Reads a device; the local APIC's page is the vCPU's own.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        if self.env.apic.owns(gpa) {
            let now = self.env.clock.now_ns();
            self.env.apic.mmio_read(gpa, data, now);
            if self.env.inputs.is_live() {
                return;
            }
        }
        let mut value = [0u8; 8];
        let len = data.len();
        let bus = self.bus;
        let mut own = [0u8; 8];
        for (to, from) in own.iter_mut().zip(data.iter()) {
            *to = *from;
        }
        let own = self.env.apic.owns(gpa).then_some(u64::from_le_bytes(own));
        let taken = self.env.inputs.take(
            "device read",
            || {
                // The timer's count runs with the clock, so reads of the local APIC are inputs, too.
                if let Some(value) = own {
                    return value;
                }
                let mut bytes = [0u8; 8];
                if let Some(part) = bytes.get_mut(..len) {
                    bus.mmio_read(gpa, part);
                }
                u64::from_le_bytes(bytes)
            },
            |value| strata_engine::Input::MmioRead { gpa, value },
            |input| match input {
                strata_engine::Input::MmioRead { value, .. } => Some(*value),
                _ => None,
            },
        );
        match taken {
            Ok(read) => value = read.to_le_bytes(),
            Err(error) => self.env.diverged(error),
        }
        for (to, from) in data.iter_mut().zip(value) {
            *to = from;
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if self.env.apic.owns(gpa) {
            let now = self.env.clock.now_ns();
            self.env.apic.mmio_write(gpa, data, now, self.bus);
        } else if !self.env.inputs.is_replay()
            && !self
                .env
                .ring_doorbell(strata_engine::DoorbellSpace::Mmio, gpa, data)
        {
            self.bus.mmio_write(gpa, data);
        }
    }

    /// Host address of `size` bytes whose page the soft TLB holds for this access: plain RAM, without a page walk.
    fn hit(&self, linear: u64, size: usize, access: Access, user: bool) -> Option<*mut u8> {
        let tlb = self.cpu.tlb.get(usize::from(user))?;
        let index = tlb.index(linear);
        let tags = if access == Access::Write {
            &tlb.write
        } else {
            &tlb.read
        };
        let in_page = linear.wrapping_add(*tags.get(index)?);
        (in_page <= 4096u64.checked_sub(size as u64)?)
            .then(|| linear.wrapping_add(tlb.delta.get(index).copied().unwrap_or(0)) as *mut u8)
    }

    /// Loads from linear memory at the current privilege.
    pub fn load(&mut self, linear: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.cpu
            .note_access(linear, data.len(), crate::debug::Watched::Read);
        let user = self.cpu.cpl() == 3;
        self.load_as(linear, data, user)
    }

    /// Loads from linear memory as supervisor: descriptor tables, TSS.
    pub fn load_system(&mut self, linear: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.load_as(linear, data, false)
    }

    fn load_as(&mut self, linear: u64, data: &mut [u8], user: bool) -> Result<(), Fault> {
        if let Some(host) = self.hit(linear, data.len(), Access::Read, user) {
            // SAFETY: the TLB says that this page of guest RAM is mapped there.
            unsafe { copy_from_guest(host, data) };
            return Ok(());
        }
        let mut at = linear;
        for chunk in data.chunks_mut(4096) {
            let (first, second) = self.pieces(at, chunk.len(), Access::Read, user)?;
            let (head, tail) = chunk.split_at_mut(first.1.min(chunk.len()));
            self.read_physical(first.0, head);
            if !tail.is_empty() {
                self.read_physical(second.0, tail);
            }
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Stores to linear memory at the current privilege. All of it or, on a fault, nothing (up to 4 KiB).
    pub fn store(&mut self, linear: u64, data: &[u8]) -> Result<(), Fault> {
        self.cpu
            .note_access(linear, data.len(), crate::debug::Watched::Write);
        let user = self.cpu.cpl() == 3;
        self.store_as(linear, data, user)
    }

    /// Stores to linear memory as supervisor.
    pub fn store_system(&mut self, linear: u64, data: &[u8]) -> Result<(), Fault> {
        self.store_as(linear, data, false)
    }

    fn store_as(&mut self, linear: u64, data: &[u8], user: bool) -> Result<(), Fault> {
        if let Some(host) = self.hit(linear, data.len(), Access::Write, user) {
            // SAFETY: as above; a tag for stores promises that the page is writable RAM without watched code.
            unsafe { copy_to_guest(host, data) };
            return Ok(());
        }
        let mut at = linear;
        for chunk in data.chunks(4096) {
            let (first, second) = self.pieces(at, chunk.len(), Access::Write, user)?;
            let (head, tail) = chunk.split_at(first.1.min(chunk.len()));
            self.write_physical(first.0, head);
            if !tail.is_empty() {
                self.write_physical(second.0, tail);
            }
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Checks that all `len` bytes allow `access` at the current privilege.
    pub fn probe(&mut self, linear: u64, len: usize, access: Access) -> Result<(), Fault> {
        let user = self.cpu.cpl() == 3;
        let mut at = linear;
        let mut left = len.max(1) as u64;
        loop {
            self.translate(at, access, user)?;
            let step = 4096 - (at & 0xfff);
            if step >= left {
                return Ok(());
            }
            left -= step;
            at = at.wrapping_add(step);
        }
    }

    /// Host address of `linear` and the bytes left in its page, if it is RAM that may be accessed directly.
    pub fn ram_window(
        &mut self,
        linear: u64,
        access: Access,
    ) -> Result<Option<(*mut u8, usize)>, Fault> {
        if self.cpu.watching() {
            return Ok(None);
        }
        let user = self.cpu.cpl() == 3;
        let left = 4096 - (linear & 0xfff) as usize;
        if let Some(host) = self.hit(linear, 1, access, user) {
            return Ok(Some((host, left)));
        }
        let to = self.translate(linear, access, user)?;
        let Some(host) = self.ram(to.gpa, left) else {
            return Ok(None);
        };
        if access == Access::Write {
            let Some(slot) = self.env.slots.find(Gpa(to.gpa)) else {
                return Ok(None);
            };
            if slot.kind() != SlotKind::Ram
                || slot.is_watched(to.gpa >> 12)
                || self.env.memory.dirty_log_on()
            {
                return Ok(None);
            }
        }
        self.fill(linear, to, user);
        Ok(Some((host, left)))
    }

    /// Host and guest-physical address of `linear`, if it is writable RAM, watched or logged: who stores there, within
    /// the page, announces it before and tells of it after.
    pub fn watched_window(&mut self, linear: u64) -> Result<Option<(*mut u8, u64)>, Fault> {
        if self.cpu.watching() {
            return Ok(None);
        }
        let user = self.cpu.cpl() == 3;
        let to = self.translate(linear, Access::Write, user)?;
        let slot = self.env.slots.find(Gpa(to.gpa));
        if slot.is_none_or(|slot| slot.kind() != SlotKind::Ram) {
            return Ok(None);
        }
        let left = 4096 - (linear & 0xfff) as usize;
        Ok(self.ram(to.gpa, left).map(|host| (host, to.gpa)))
    }

    /// The alignment that user code may ask for.
    fn aligned(&self, linear: u64, size: usize) -> Result<(), Fault> {
        let boundary = if size == 10 { 8 } else { size as u64 };
        if matches!(size, 2 | 4 | 8 | 10)
            && !linear.is_multiple_of(boundary)
            && self.cpu.alignment_checked()
        {
            return Err(Fault {
                vector: 17,
                error: Some(0),
                cr2: 0,
            });
        }
        Ok(())
    }

    /// What the soft TLB knows nothing of: segment limits and rights outside of 64-bit code, breakpoints, and the
    /// alignment that user code may ask for. The mode word sees to it that every access that needs this comes here.
    pub fn check_operand(
        &mut self,
        segment: usize,
        linear: u64,
        size: usize,
        access: OperandAccess,
    ) -> Result<(), Fault> {
        let kind = if access == OperandAccess::Read {
            Access::Read
        } else {
            Access::Write
        };
        if !self.cpu.code_64() {
            let base = self
                .cpu
                .segments
                .get(segment)
                .map_or(0, |segment| segment.base);
            self.linear(segment, linear.wrapping_sub(base) & 0xffff_ffff, size, kind)?;
        }
        let last = linear.wrapping_add(size as u64 - 1);
        if !self.cpu.code_64() || (canonical(linear) && canonical(last)) {
            self.aligned(linear, size)?;
        }
        let what = if access == OperandAccess::Read {
            crate::debug::Watched::Read
        } else {
            crate::debug::Watched::Write
        };
        self.cpu.note_access(linear, size, what);
        Ok(())
    }

    /// The slow path of an operand of translated code: fills the TLB and returns the host address, or copies the
    /// operand to the bounce buffer and returns that. A store then waits in `pending` for [`Exec::commit`].
    pub fn slow_access(
        &mut self,
        linear: u64,
        size: usize,
        access: OperandAccess,
        stack: bool,
        always_bounce: bool,
        pending: &mut Option<PendingStore>,
    ) -> Result<*mut u8, Fault> {
        let user = self.cpu.cpl() == 3;
        let last = linear.wrapping_add(size as u64 - 1);
        if self.cpu.code_64() && !(canonical(linear) && canonical(last)) {
            return Err(if stack {
                Fault::stack(0)
            } else {
                Fault::protection(0)
            });
        }
        let kind = if access == OperandAccess::Read {
            Access::Read
        } else {
            Access::Write
        };
        let crosses = (linear & 0xfff) as usize + size > 4096;
        // With other vCPUs about, what is one access must stay one.
        let several = self.env.peers.several();
        if !crosses && (!always_bounce || several) {
            let to = self.translate(linear, kind, user)?;
            if let Some(host) = self.ram(to.gpa, size) {
                let slot = self.env.slots.find(Gpa(to.gpa));
                let direct = kind == Access::Read
                    || slot.is_some_and(|slot| {
                        slot.kind() == SlotKind::Ram
                            && !slot.is_watched(to.gpa >> 12)
                            && !self.env.memory.dirty_log_on()
                    });
                if direct {
                    if !always_bounce {
                        self.fill(linear, to, user);
                    }
                    return Ok(host);
                }
                if slot.is_some_and(|slot| slot.kind() == SlotKind::Ram) {
                    if !always_bounce {
                        self.fill(linear, to, user);
                    }
                    self.env.stats.bounced += 1;
                    let announced = self.announce(to.gpa, size as u64);
                    *pending = Some(PendingStore {
                        linear,
                        size,
                        to: StoredTo::Place(to.gpa, announced),
                    });
                    return Ok(host);
                }
            }
        }
        self.env.stats.bounced += 1;
        let offset = (linear & 63) as usize;
        let (first, second) = self.pieces(linear, size, kind, user)?;
        let mut data = [0u8; BOUNCE_SIZE];
        let Some(operand) = data.get_mut(..size) else {
            return Err(Fault::UNDEFINED);
        };
        let device = self.ram(first.0, first.1).is_none();
        if access != OperandAccess::Write || !device {
            let (head, tail) = operand.split_at_mut(first.1.min(size));
            self.read_physical(first.0, head);
            if !tail.is_empty() {
                self.read_physical(second.0, tail);
            }
        }
        let Some(bounce) = self.cpu.bounce.0.get_mut(offset..offset + size) else {
            return Err(Fault::UNDEFINED);
        };
        bounce.copy_from_slice(operand);
        let host = bounce.as_mut_ptr();
        if access != OperandAccess::Read {
            *pending = Some(PendingStore {
                linear,
                size,
                to: StoredTo::Bounce(first, second),
            });
        }
        Ok(host)
    }

    /// Finishes a store after its instruction ran: writes a bounced operand back, tells others of one made in place.
    pub fn commit(&mut self, store: PendingStore) {
        let size = store.size;
        let (first, second) = match store.to {
            StoredTo::Bounce(first, second) => (first, second),
            StoredTo::Place(gpa, announced) => return self.written(gpa, size as u64, announced),
        };
        let offset = (store.linear & 63) as usize;
        let mut data = [0u8; BOUNCE_SIZE];
        let (Some(to), Some(from)) = (
            data.get_mut(..size),
            self.cpu.bounce.0.get(offset..offset + size),
        ) else {
            return;
        };
        to.copy_from_slice(from);
        let (head, tail) = to.split_at(first.1.min(size));
        self.write_physical(first.0, head);
        if !tail.is_empty() {
            self.write_physical(second.0, tail);
        }
    }

    /// The instruction of a pending store faulted: it has stored nothing.
    pub fn abandon(&mut self, store: PendingStore) {
        if let StoredTo::Place(_, Some(announced)) = store.to {
            let _ = self.env.peers.stored(self.env.me.id(), announced);
        }
    }
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum OperandAccess {
    /// Loads it.
    Read = 0,
    /// Stores it.
    Write = 1,
    /// Loads, then stores it.
    ReadWrite = 2,
}

macro_rules! loads {
    ($($name:ident: $int:ty),*) => {
        impl Exec<'_> {
            $(
                /// Loads a little-endian value at the current privilege.
                pub fn $name(&mut self, linear: u64) -> Result<$int, Fault> {
                    let mut bytes = [0; size_of::<$int>()];
                    self.load(linear, &mut bytes)?;
                    Ok(<$int>::from_le_bytes(bytes))
                }
            )*
        }
    };
}

loads!(load_u8: u8, load_u16: u16, load_u32: u32, load_u64: u64);

macro_rules! stores {
    ($($name:ident: $int:ty),*) => {
        impl Exec<'_> {
            $(
                /// Stores a little-endian value at the current privilege.
                pub fn $name(&mut self, linear: u64, value: $int) -> Result<(), Fault> {
                    self.store(linear, &value.to_le_bytes())
                }
            )*
        }
    };
}

stores!(store_u8: u8, store_u16: u16, store_u32: u32, store_u64: u64);

/// Copies out of guest RAM, naturally sized where possible so that aligned accesses are single ones.
///
/// # Safety
/// `host` points at `into.len()` mapped bytes.
unsafe fn copy_from_guest(host: *const u8, into: &mut [u8]) {
    // SAFETY: the caller's promise; volatile accesses tolerate concurrent guest stores.
    unsafe {
        match into.len() {
            4 if host.addr().is_multiple_of(4) => {
                into.copy_from_slice(&host.cast::<u32>().read_volatile().to_ne_bytes())
            }
            8 if host.addr().is_multiple_of(8) => {
                into.copy_from_slice(&host.cast::<u64>().read_volatile().to_ne_bytes())
            }
            2 if host.addr().is_multiple_of(2) => {
                into.copy_from_slice(&host.cast::<u16>().read_volatile().to_ne_bytes())
            }
            len => std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), len),
        }
    }
}

/// Copies into guest RAM, see [`copy_from_guest`].
///
/// # Safety
/// `host` points at `from.len()` mapped, writable bytes.
unsafe fn copy_to_guest(host: *mut u8, from: &[u8]) {
    // SAFETY: the caller's promise.
    unsafe {
        match (from.len(), from.try_into(), from.try_into()) {
            (8, Ok(bytes), _) if host.addr().is_multiple_of(8) => {
                host.cast::<u64>().write_volatile(u64::from_ne_bytes(bytes))
            }
            (4, _, Ok(bytes)) if host.addr().is_multiple_of(4) => {
                host.cast::<u32>().write_volatile(u32::from_ne_bytes(bytes))
            }
            (2, ..) if host.addr().is_multiple_of(2) => {
                if let &[low, high] = from {
                    let value = u16::from_ne_bytes([low, high]);
                    host.cast::<u16>().write_volatile(value);
                }
            }
            (len, _, _) => std::ptr::copy_nonoverlapping(from.as_ptr(), host, len),
        }
    }
}
