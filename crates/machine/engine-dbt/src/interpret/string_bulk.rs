//! Runs of string elements within a page of RAM, at memory speed.
//!
//! The result is the same, byte for byte, as one element after the other: a forward copy onto itself a few bytes on
//! repeats a pattern, and only elements that lie wholly in the page and in their segment are taken.

use super::operand::size_mask;
use super::string::{Operation, Repeat, Run, StringOp, compare_flags};
use crate::env::{Access, Exec, Fault};
use crate::peers::Announced;

/// Elements that may be accessed directly: where the current one is, and how many there are in the direction of DF.
#[derive(Clone, Copy, Debug)]
struct Window {
    at: *mut u8,
    elements: u64,
    /// Where in guest-physical memory the current one is, if stores there must be told of.
    watched: Option<u64>,
}

/// Guest-physical address and length of what is stored, and what the other vCPUs were told of it.
type ToldRun = (u64, u64, Option<Announced>);

impl Exec<'_> {
    /// Does up to `most` elements at once. None done: the next element needs the general path.
    pub(super) fn string_run(&mut self, op: &StringOp, most: u64) -> Result<Run, Fault> {
        const NONE: Run = Run {
            done: 0,
            stop: false,
        };
        let scans = matches!(op.operation, Operation::Compare | Operation::Scan);
        match op.operation {
            Operation::Move | Operation::Compare => {
                let Some(from) = self.window(op, false, Access::Read)? else {
                    return Ok(NONE);
                };
                let access = if scans { Access::Read } else { Access::Write };
                let Some(to) = self.window(op, true, access)? else {
                    return Ok(NONE);
                };
                let count = most.min(from.elements).min(to.elements);
                if scans {
                    return Ok(self.compare_run(op, Some(from), to, count));
                }
                let told = self.announce_run(op, to, count);
                // SAFETY: both windows hold `count` elements in the direction of `op.down`.
                unsafe { copy_elements(from.at, to.at, count as usize, op.size, op.down) };
                self.tell_run(told);
                Ok(Run {
                    done: count,
                    stop: false,
                })
            }
            Operation::Store => {
                let Some(to) = self.window(op, true, Access::Write)? else {
                    return Ok(NONE);
                };
                let count = most.min(to.elements);
                let told = self.announce_run(op, to, count);
                // SAFETY: the window holds `count` elements in the direction of `op.down`.
                unsafe {
                    fill_elements(
                        to.at,
                        self.string_accumulator(op),
                        count as usize,
                        op.size,
                        op.down,
                    )
                };
                self.tell_run(told);
                Ok(Run {
                    done: count,
                    stop: false,
                })
            }
            Operation::Scan => {
                let Some(to) = self.window(op, true, Access::Read)? else {
                    return Ok(NONE);
                };
                Ok(self.compare_run(op, None, to, most.min(to.elements)))
            }
            Operation::Load | Operation::In | Operation::Out => Ok(NONE),
        }
    }

    /// The current element and those after it in its page, if they are plain RAM. A fault of the current one is a
    /// fault; one further on is met when its turn comes.
    fn window(
        &mut self,
        op: &StringOp,
        destination: bool,
        access: Access,
    ) -> Result<Option<Window>, Fault> {
        let segment = if destination { 0 } else { op.segment };
        let offset = self.string_offset(op, destination);
        let size = op.size as u64;
        let linear = self.linear(segment, offset, op.size, access)?;
        let in_page = linear & 0xfff;
        if in_page + size > 0x1000 {
            return Ok(None);
        }
        let (at, watched) = match self.ram_window(linear, access)? {
            Some((at, _)) => (at, None),
            None if access == Access::Write => match self.watched_window(linear)? {
                Some((at, gpa)) => (at, Some(gpa)),
                None => return Ok(None),
            },
            None => return Ok(None),
        };
        let mut elements = if op.down {
            in_page / size + 1
        } else {
            (0x1000 - in_page) / size
        };
        // Not around the end of the address size.
        elements = elements.min(if op.down {
            (offset / size).saturating_add(1)
        } else {
            ((op.address_mask() - offset) / size).saturating_add(1)
        });
        if !self.cpu.code_64() {
            let distance = (elements - 1) * size;
            let last = if op.down {
                offset - distance
            } else {
                offset + distance
            };
            if self.linear(segment, last, op.size, access).is_err() {
                elements = 1;
            }
        }
        Ok(Some(Window {
            at,
            elements,
            watched,
        }))
    }

    /// Before `count` elements are stored at once: says so where somebody may have made code of what is there.
    fn announce_run(&self, op: &StringOp, to: Window, count: u64) -> Option<ToldRun> {
        let (gpa, len) = (to.watched?, count * op.size as u64);
        let gpa = if op.down && count > 0 {
            gpa - (len - op.size as u64)
        } else {
            gpa
        };
        (len > 0).then(|| (gpa, len, self.announce(gpa, len)))
    }

    /// After them.
    fn tell_run(&mut self, told: Option<ToldRun>) {
        if let Some((gpa, len, announced)) = told {
            self.written(gpa, len, announced);
        }
    }

    /// Compares elements with elements, or with the accumulator, until the repetition ends.
    fn compare_run(&mut self, op: &StringOp, from: Option<Window>, to: Window, count: u64) -> Run {
        let accumulator = self.string_accumulator(op);
        let (mut left, mut right) = (accumulator, accumulator);
        let mut done = 0;
        let mut stop = false;
        if op.size == 1 && !op.down && count > 0 {
            // All but the last byte by words; the last one says how it ends.
            // SAFETY: as below.
            done =
                unsafe { quiet_bytes(op.repeat, from.map(|from| from.at), left, to.at, count - 1) };
        }
        while done < count && !stop {
            let step = element_offset(done as usize, op.size, op.down);
            // SAFETY: both windows hold `count` elements in the direction of `op.down`.
            unsafe {
                if let Some(from) = from {
                    left = read_element(from.at.offset(step), op.size);
                }
                right = read_element(to.at.offset(step), op.size);
            }
            done += 1;
            stop = matches!(op.repeat, Repeat::While(equal) if equal != (left == right));
        }
        if done > 0 {
            self.cpu.arith = compare_flags(left, right, op.size);
        }
        Run { done, stop }
    }
}

/// How many of `count` bytes at the least do not end a repetition: those at `to` compared with those at `from`, or with
/// the byte `value`, eight at a time.
///
/// # Safety
/// `count` bytes are mapped at both.
unsafe fn quiet_bytes(
    repeat: Repeat,
    from: Option<*mut u8>,
    value: u64,
    to: *mut u8,
    count: u64,
) -> u64 {
    const ONES: u64 = u64::MAX / 0xff;
    let Repeat::While(equal) = repeat else {
        return 0;
    };
    let word = |at: *mut u8, offset: u64| {
        // SAFETY: the caller's promise; the guest may write meanwhile, so volatile.
        u64::from_le_bytes(unsafe { at.add(offset as usize).cast::<[u8; 8]>().read_volatile() })
    };
    let mut done = 0;
    while done + 8 <= count {
        let left = from.map_or((value & 0xff) * ONES, |from| word(from, done));
        let differ = left ^ word(to, done);
        let end = if equal {
            differ.trailing_zeros()
        } else {
            // The lowest byte without a difference: exact for that one.
            (differ.wrapping_sub(ONES) & !differ & (ONES << 7)).trailing_zeros()
        };
        done += u64::from(end / 8);
        if end < 64 {
            break;
        }
    }
    done
}

/// Bytes from the first element to element `index`.
fn element_offset(index: usize, size: usize, down: bool) -> isize {
    let bytes = (index * size) as isize;
    if down { -bytes } else { bytes }
}

/// # Safety
/// `at` points at `size` mapped bytes.
unsafe fn read_element(at: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise; the guest may write meanwhile, so volatile.
    unsafe {
        match size {
            1 => at.read_volatile().into(),
            2 => u16::from_le_bytes(at.cast::<[u8; 2]>().read_volatile()).into(),
            4 => u32::from_le_bytes(at.cast::<[u8; 4]>().read_volatile()).into(),
            _ => u64::from_le_bytes(at.cast::<[u8; 8]>().read_volatile()),
        }
    }
}

/// Copies elements in order, so that overlapping ones see what was just written.
///
/// # Safety
/// Both pointers are at elements with `count - 1` further mapped ones in the direction of `down`.
unsafe fn copy_elements(from: *const u8, to: *mut u8, count: usize, size: usize, down: bool) {
    let bytes = count * size;
    let distance = to.addr().wrapping_sub(from.addr());
    // SAFETY: the caller's promise. A bulk move is the same as element by element unless the destination starts
    // inside what is still to be read, in the direction of the copy.
    unsafe {
        if !down && distance >= bytes {
            std::ptr::copy(from, to, bytes);
        } else if down && distance.wrapping_neg() >= bytes {
            let first = element_offset(count - 1, size, true);
            std::ptr::copy(from.offset(first), to.offset(first), bytes);
        } else {
            for i in 0..count {
                let step = element_offset(i, size, down);
                std::ptr::copy(from.offset(step), to.offset(step), size);
            }
        }
    }
}

/// Fills elements with the low bytes of `value`.
///
/// # Safety
/// `to` is at an element with `count - 1` further mapped ones in the direction of `down`.
unsafe fn fill_elements(to: *mut u8, value: u64, count: usize, size: usize, down: bool) {
    let first = if down {
        element_offset(count - 1, size, true)
    } else {
        0
    };
    let pattern = value & size_mask(size);
    let uniform = (pattern & 0xff) * (size_mask(size) / 0xff) == pattern;
    // SAFETY: the caller's promise.
    unsafe {
        let to = to.offset(first);
        if uniform {
            std::ptr::write_bytes(to, value as u8, count * size);
        } else {
            for i in 0..count {
                std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), to.add(i * size), size);
            }
        }
    }
}
