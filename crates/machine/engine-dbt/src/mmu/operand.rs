//! The slow path of a memory operand of translated code, and what becomes of its store.

use strata_memory::{Gpa, SlotKind};

use super::{Piece, canonical};
use crate::cpu::BOUNCE_SIZE;
use crate::env::{Access, Exec, Fault};
use crate::peers::Announced;

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

impl Exec<'_> {
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
