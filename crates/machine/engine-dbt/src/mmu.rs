//! Linear memory: segmentation, and loads and stores of the interpreter; next door the page walk ([`walk`]) and the slow
//! path of translated code's operands ([`operand`]).

mod operand;
mod walk;

pub use operand::{OperandAccess, PendingStore, StoredTo};

use strata_memory::{Gpa, SlotKind};

use crate::cpu::{control, flags};
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
