//! The kernel's local APIC page to and from the state that engines share.

use kvm_bindings::kvm_lapic_state;
use strata_engine::x86::{APIC_BUS_HZ, ApicState};

/// Registers of [`ApicState`].
const REGISTERS: usize = 64;

/// Register numbers: page offset / 16.
const LVT_TIMER: usize = 0x32;
const TIMER_INITIAL: usize = 0x38;
const TIMER_CURRENT: usize = 0x39;
const TIMER_DIVIDE: usize = 0x3e;

/// When a local APIC's timer fires next. The kernel's runs on while the machine stands, so this is noted when a vCPU
/// stops.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Timer {
    /// Machine nanoseconds, if it counts down.
    pub deadline_ns: Option<u64>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

/// The machine time at which the timer fires, if it counts down.
pub fn deadline_ns(page: &kvm_lapic_state, now_ns: u64) -> Option<u64> {
    let armed = counts_down(read(page, LVT_TIMER)) && read(page, TIMER_CURRENT) != 0;
    let left_ns = u64::from(read(page, TIMER_CURRENT)) * tick_ns(read(page, TIMER_DIVIDE));
    armed.then(|| now_ns.saturating_add(left_ns))
}

/// The page as values.
pub fn save(page: &kvm_lapic_state, base: u64, timer: Timer) -> ApicState {
    ApicState {
        base,
        registers: (0..REGISTERS).map(|index| read(page, index)).collect(),
        tsc_deadline: timer.tsc_deadline,
        timer_deadline_ns: timer.deadline_ns,
    }
}

/// Values as the page. The kernel starts the timer from the current count.
pub fn load(state: &ApicState, now_ns: u64) -> kvm_lapic_state {
    let mut page = kvm_lapic_state::default();
    for (index, value) in state.registers.iter().enumerate().take(REGISTERS) {
        write(&mut page, index, *value);
    }
    if counts_down(read(&page, LVT_TIMER)) {
        // One that is due fires as soon as the vCPU runs.
        let ticks = state.timer_deadline_ns.map_or(0, |at| {
            let left = at
                .saturating_sub(now_ns)
                .div_ceil(tick_ns(read(&page, TIMER_DIVIDE)));
            left.clamp(1, u64::from(read(&page, TIMER_INITIAL)).max(1))
        });
        write(&mut page, TIMER_CURRENT, ticks as u32);
    }
    page
}

/// One-shot or periodic, not TSC deadline.
fn counts_down(lvt: u32) -> bool {
    lvt >> 17 & 3 < 2
}

/// Nanoseconds of one tick by the divide configuration register (Intel SDM vol. 3, figure 11-10).
fn tick_ns(divide: u32) -> u64 {
    let exponent = (divide & 3 | divide >> 1 & 4).wrapping_add(1) & 7;
    (1 << exponent) * (1_000_000_000 / APIC_BUS_HZ)
}

fn read(page: &kvm_lapic_state, index: usize) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(page.regs.iter().skip(index * 16)) {
        *to = *from as u8;
    }
    u32::from_le_bytes(bytes)
}

fn write(page: &mut kvm_lapic_state, index: usize, value: u32) {
    for (to, from) in page
        .regs
        .iter_mut()
        .skip(index * 16)
        .zip(value.to_le_bytes())
    {
        *to = from as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_timer_keeps_its_deadline() {
        let mut registers: Vec<u32> = (0..64).map(|i| i * 0x0101_0101).collect();
        registers[LVT_TIMER] = 0x2_00ec;
        registers[TIMER_DIVIDE] = 0b0011;
        registers[TIMER_INITIAL] = 1000;
        registers[TIMER_CURRENT] = 0;
        let state = ApicState {
            base: 0xfee0_0900,
            registers,
            tsc_deadline: 0,
            timer_deadline_ns: Some(9_600),
        };
        let page = load(&state, 8_000);
        assert_eq!(read(&page, TIMER_CURRENT), 100, "1,600 ns at 16 ns a tick");
        assert_eq!(deadline_ns(&page, 8_000), state.timer_deadline_ns);
        let saved = save(&page, state.base, Timer::default());
        assert_eq!(saved.registers[0x20], state.registers[0x20]);
        assert_eq!(read(&load(&state, 20_000), TIMER_CURRENT), 1, "overdue");
    }

    #[test]
    fn dividers() {
        let powers: Vec<u64> = [0, 1, 2, 3, 8, 9, 10, 11].map(tick_ns).to_vec();
        assert_eq!(powers, [2, 4, 8, 16, 32, 64, 128, 1]);
    }
}
