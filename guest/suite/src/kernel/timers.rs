//! Timers: the local APIC's in all its modes, the power-management timer, the time-stamp counter.

use super::check::{absent, equal, holds};
use super::trap::{self, Action};
use super::{apic, asm};

const PM_TIMER: u64 = 0x608;
const TSC_DEADLINE: u64 = 0x6e0;
/// Ticks of the power-management timer per second.
const PM_HZ: u64 = 3_579_545;
/// How often waiting looks before it gives up.
const PATIENCE: u64 = 50_000_000;

/// Ticks of the power-management timer since `start`.
fn since(start: u64) -> u64 {
    asm::in32(PM_TIMER).wrapping_sub(start) & 0xff_ffff
}

/// Waits for milliseconds with interrupts let in.
fn wait(milliseconds: u64) {
    let start = asm::in32(PM_TIMER);
    while since(start) < PM_HZ * milliseconds / 1000 {
        asm::sti_cli();
    }
}

/// Waits until a number of vectors has been seen; false if they do not come.
fn seen(count: u64) -> bool {
    (0..PATIENCE).any(|_| {
        asm::sti_cli();
        trap::logged() >= count
    })
}

pub fn run() {
    apic::enable();
    for vector in 0x30..0x100 {
        trap::on(vector, Action::End);
    }
    clocks();
    one_shot();
    periodic();
    halted();
    deadline();
}

fn clocks() {
    let mut last = asm::rdtsc();
    let mut backwards = 0;
    for _ in 0..10_000 {
        let now = asm::rdtsc();
        backwards += u64::from(now < last);
        last = now;
    }
    equal("the time-stamp counter never goes back", backwards, 0);
    let start = asm::in32(PM_TIMER);
    let mut last = 0;
    let mut backwards = 0;
    for _ in 0..200 {
        let now = since(start);
        backwards += u64::from(now < last);
        last = now;
    }
    equal("the PM timer never goes back", backwards, 0);
    equal("it has 24 bits", asm::in32(PM_TIMER) >> 24, 0);

    // Both clocks agree on how long something takes, within what a busy host allows.
    let hz = asm::cpuid_ebx(0x15, 0) * 1000;
    let (tsc, pm) = (asm::rdtsc(), asm::in32(PM_TIMER));
    wait(20);
    let (ticks, pm) = (asm::rdtsc() - tsc, since(pm));
    let microseconds = ticks / (hz / 1_000_000).max(1);
    let by_pm = pm * 1_000_000 / PM_HZ;
    holds(
        "the clocks agree within a tenth",
        hz == 0 || microseconds.abs_diff(by_pm) < by_pm / 10 + 500,
    );
    holds("20 ms last at least 20 ms", by_pm >= 19_999);
}

fn one_shot() {
    apic::set(apic::DIVIDE, 0xb);
    equal("divider", apic::get(apic::DIVIDE), 0xb);
    apic::set(apic::TIMER, 0x70);
    trap::clear_log();
    apic::set(apic::INITIAL, 2_000_000);
    equal("initial count", apic::get(apic::INITIAL), 2_000_000);
    let first = apic::get(apic::CURRENT);
    holds("it counts down", first <= 2_000_000);
    holds("one shot", seen(1));
    equal("its vector", trap::log(), 0x70);
    equal("it stands at zero", apic::get(apic::CURRENT), 0);
    wait(5);
    equal("it comes once", trap::logged(), 1);
    // Masked, it counts and does not interrupt.
    trap::clear_log();
    apic::set(apic::TIMER, apic::MASKED | 0x70);
    apic::set(apic::INITIAL, 100_000);
    wait(3);
    equal("masked", trap::logged(), 0);
    equal("masked, it stands at zero", apic::get(apic::CURRENT), 0);
    // Stopped by an initial count of zero.
    apic::set(apic::TIMER, 0x70);
    apic::set(apic::INITIAL, 20_000_000);
    apic::set(apic::INITIAL, 0);
    wait(25);
    equal("stopped", trap::logged(), 0);
    equal("stopped at zero", apic::get(apic::CURRENT), 0);
    // IF clear only delays it.
    apic::set(apic::INITIAL, 100_000);
    let start = asm::in32(PM_TIMER);
    while since(start) < PM_HZ / 500 {}
    equal("not with IF clear", trap::logged(), 0);
    equal("it waits", apic::bit(apic::IRR, 0x70), 1);
    asm::sti_cli();
    equal("and comes", trap::log(), 0x70);
}

fn periodic() {
    trap::clear_log();
    apic::set(apic::TIMER, apic::PERIODIC | 0x71);
    apic::set(apic::INITIAL, 1_000_000);
    let start = asm::in32(PM_TIMER);
    holds("ten periods", seen(10));
    let elapsed = since(start) * 1_000_000 / PM_HZ;
    // Periods of a millisecond; delayed ones may come together, never before their time.
    holds("not before their time", elapsed >= 9_000);
    holds("it counts on", apic::get(apic::CURRENT) <= 1_000_000);
    apic::set(apic::TIMER, apic::MASKED | apic::PERIODIC | 0x71);
    apic::set(apic::INITIAL, 0);
    asm::sti_cli();
    trap::clear_log();
    wait(3);
    equal("no period after the end", trap::logged(), 0);
}

fn halted() {
    trap::clear_log();
    apic::set(apic::TIMER, 0x72);
    for turn in 1..=3 {
        apic::set(apic::INITIAL, 500_000);
        asm::sti_hlt();
        equal("a halted CPU wakes up", trap::logged(), turn);
    }
}

fn deadline() {
    if asm::cpuid_ecx(1, 0) >> 24 & 1 == 0 {
        return absent("deadline");
    }
    apic::set(apic::TIMER, apic::DEADLINE | 0x73);
    trap::clear_log();
    let now = asm::rdtsc();
    asm::wrmsr(TSC_DEADLINE, now + 3_000_000);
    holds(
        "deadline: it reads back",
        asm::rdmsr(TSC_DEADLINE) == now + 3_000_000,
    );
    holds("deadline: a deadline", seen(1));
    holds(
        "deadline: not before its time",
        asm::rdtsc() >= now + 3_000_000,
    );
    equal("deadline: it is over", asm::rdmsr(TSC_DEADLINE), 0);
    equal("deadline: its vector", trap::log(), 0x73);
    trap::clear_log();
    asm::wrmsr(TSC_DEADLINE, 1);
    holds("deadline: one in the past", seen(1));
    trap::clear_log();
    asm::wrmsr(TSC_DEADLINE, asm::rdtsc() + 20_000_000);
    asm::wrmsr(TSC_DEADLINE, 0);
    wait(15);
    equal("deadline: one that is taken back", trap::logged(), 0);
    asm::wrmsr(TSC_DEADLINE, asm::rdtsc() + 1_000_000);
    asm::sti_hlt();
    equal("deadline: it wakes a halted CPU", trap::logged(), 1);
    // The other modes' counts mean nothing here.
    apic::set(apic::INITIAL, 1000);
    equal(
        "deadline: no count with deadlines",
        apic::get(apic::CURRENT),
        0,
    );
}
