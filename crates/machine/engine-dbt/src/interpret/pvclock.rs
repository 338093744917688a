//! KVM's paravirtual clock: structures in guest memory from which a guest computes time out of its time-stamp counter
//! (Linux `Documentation/virt/kvm/x86/msr.rst`; a machine's clock never jumps while it runs, so one writing lasts).

use strata_memory::Gpa;

use super::Flow;
use crate::env::{Exec, Fault};

/// In the system-time MSR: switched on.
const ENABLED: u64 = 1;
/// Time is the same on every vCPU.
const TSC_STABLE: u8 = 1;

/// Factor and shift with which a guest turns ticks into nanoseconds: `((ticks << shift) * factor) >> 32`.
fn scale(tsc_hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    // The largest factor below 2^32 has the best resolution.
    let factor = |shift: i8| {
        let ns = 1_000_000_000u128 << (64 - shift);
        (ns / u128::from(tsc_hz.max(1))) >> 32
    };
    while factor(shift) > u128::from(u32::MAX) && shift < 31 {
        shift += 1;
    }
    while factor(shift - 1) <= u128::from(u32::MAX) && shift > -31 {
        shift -= 1;
    }
    (u32::try_from(factor(shift)).unwrap_or(u32::MAX), shift)
}

/// KVM's answers to a hypercall: not known, not allowed.
const HYPERCALL_UNKNOWN: i64 = -1000;
const HYPERCALL_FORBIDDEN: i64 = -1;

impl Exec<'_> {
    /// VMCALL and VMMCALL: the paravirtual leaves name KVM, whose hypercalls exist but of which none is offered.
    pub(super) fn hypercall(&mut self) -> Result<Flow, Fault> {
        let answer = if self.cpu.cpl() == 0 {
            HYPERCALL_UNKNOWN
        } else {
            HYPERCALL_FORBIDDEN
        };
        let size = if self.cpu.code_64() { 8 } else { 4 };
        self.set_reg(0, answer as u64, size);
        Ok(Flow::Next)
    }

    /// Writes the system-time structure if the guest switched it on. Also needed after the clock was set or the
    /// time-stamp counter moved.
    pub fn publish_clock(&mut self) {
        let msr = self.msrs().kvm_system_time;
        if msr & ENABLED == 0 {
            return;
        }
        let now_ns = self.read_clock();
        let tsc = self
            .env
            .clock
            .ns_to_tsc(now_ns)
            .wrapping_add(self.cpu.tsc_offset);
        let (factor, shift) = scale(self.env.clock.tsc_hz());
        let mut body = [0; 28];
        let fields = [
            (4, &tsc.to_le_bytes()[..]),
            (12, &now_ns.to_le_bytes()),
            (20, &factor.to_le_bytes()),
            (24, &shift.to_le_bytes()),
            (25, &[TSC_STABLE]),
        ];
        for (at, bytes) in fields {
            if let Some(to) = body.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        }
        self.publish(msr & !ENABLED, &body);
    }

    /// Writes the wall-clock time at machine time 0.
    pub(super) fn publish_wall_clock(&mut self, gpa: u64) {
        let clock = std::sync::Arc::clone(&self.env.clock);
        let start_ns = self.clock_input(|| clock.wall_ns().saturating_sub(clock.now_ns()));
        let seconds = ((start_ns / 1_000_000_000) as u32).to_le_bytes();
        let nanoseconds = ((start_ns % 1_000_000_000) as u32).to_le_bytes();
        self.publish(gpa, &[seconds, nanoseconds].concat());
    }

    /// Writes a structure that starts with a version, which is odd while the rest changes. An address outside of RAM
    /// is the guest's own fault and has no effect.
    fn publish(&mut self, gpa: u64, body: &[u8]) {
        let Some(at) = Gpa(gpa).checked_add(4) else {
            return;
        };
        let memory = &self.env.memory;
        let Ok(version) = memory.read_u32(Gpa(gpa)) else {
            return;
        };
        let odd = version | 1;
        let _ = memory.write_u32(Gpa(gpa), odd);
        let _ = memory.write(at, body);
        let _ = memory.write_u32(Gpa(gpa), odd.wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn ticks_become_nanoseconds() {
        for hz in [
            1_000_000,
            999_999_999,
            1_000_000_000,
            1_000_000_001,
            2_595_123_456,
            5_000_000_000,
            24_000_000_000,
        ] {
            let (factor, shift) = scale(hz);
            assert!(factor >= 1 << 31, "{hz}");
            let ticks = u128::from(hz) * 100;
            let shifted = if shift < 0 {
                ticks >> -shift
            } else {
                ticks << shift
            };
            let ns = (shifted * u128::from(factor)) >> 32;
            assert!(ns.abs_diff(100_000_000_000) < 100, "{hz}: {ns}");
        }
    }
}
