//! The page walk, and the soft-TLB entries that come of it.
//!
//! Paging follows Intel SDM vol. 3, chapter 4: 4-level, PAE and 32-bit. Accessed and dirty bits are set by
//! compare-and-swap when an entry is used, so a TLB entry for stores exists only for pages already marked dirty.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use strata_memory::{Gpa, SlotKind};

use super::Translation;
use crate::caches::Walk;
use crate::cpu::{control, flags};
use crate::env::{Access, Exec, Fault};

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

impl Exec<'_> {
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
    pub(super) fn fill(&mut self, linear: u64, to: Translation, user: bool) {
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
}
