//! The register file of a local APIC, without locks and without time of its own.

use strata_engine::x86::{APIC_BUS_HZ, ApicState};

use super::bus::{DeliveryMode, Destination, Message};
use super::{Invalid, Waiting};

/// Registers by page offset / 16, which is also the x2APIC MSR number less 0x800.
mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const APR: usize = 0x09;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const RRD: usize = 0x0c;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR_LOW: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const TIMER_INITIAL: usize = 0x38;
    pub const TIMER_CURRENT: usize = 0x39;
    pub const TIMER_DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
}

const REGISTERS: usize = 64;
/// Version 0x14, six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x0005_0014;
const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const SOFTWARE_ENABLE: u32 = 1 << 8;

const BASE_BOOTSTRAP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0xfee0_0000;

/// Errors as ESR bits.
mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// What a register write causes outside of the APIC.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effect {
    None,
    /// Tell the I/O APICs that a level-triggered interrupt ended.
    Broadcast(u8),
    /// Send an inter-processor interrupt.
    Send(Message),
}

pub struct Registers {
    id: u32,
    base: u64,
    values: [u32; REGISTERS],
    /// Errors since the last write of ESR.
    errors: u32,
    tsc_hz: u64,
    tsc_offset: u64,
    tsc_deadline: u64,
    deadline_ns: Option<u64>,
    /// Vector on the LINT0 pin.
    ext_int: Option<u8>,
    /// NMIs that wait: one that the processor is about to take and one behind it.
    pub nmis: u8,
    pub init: bool,
    pub startup: Option<u8>,
}

impl Registers {
    pub fn new(id: u32, tsc_hz: u64) -> Self {
        let mut registers = Registers {
            id,
            base: 0,
            values: [0; REGISTERS],
            errors: 0,
            tsc_hz: tsc_hz.max(1),
            tsc_offset: 0,
            tsc_deadline: 0,
            deadline_ns: None,
            ext_int: None,
            nmis: 0,
            init: false,
            startup: None,
        };
        registers.power_up(id == 0);
        registers
    }

    /// State after power-up (SDM vol. 3, 11.4.7.1).
    pub fn power_up(&mut self, bootstrap: bool) {
        self.base = BASE_ADDRESS | BASE_ENABLE | if bootstrap { BASE_BOOTSTRAP } else { 0 };
        self.ext_int = None;
        self.nmis = 0;
        self.init = false;
        self.startup = None;
        self.reset_registers();
    }

    /// State after INIT: all but the ID and IA32_APIC_BASE.
    pub fn reset_registers(&mut self) {
        self.values = [0; REGISTERS];
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
            self.set(lvt, MASKED);
        }
        self.errors = 0;
        self.tsc_deadline = 0;
        self.deadline_ns = None;
    }

    fn get(&self, index: usize) -> u32 {
        self.values.get(index).copied().unwrap_or(0)
    }

    fn set(&mut self, index: usize, value: u32) {
        if let Some(slot) = self.values.get_mut(index) {
            *slot = value;
        }
    }

    // Vectors: 256-bit sets of eight registers each.

    fn is_set(&self, bank: usize, vector: u8) -> bool {
        self.get(bank + usize::from(vector >> 5)) >> (vector & 31) & 1 != 0
    }

    fn set_vector(&mut self, bank: usize, vector: u8, on: bool) {
        let index = bank + usize::from(vector >> 5);
        let bit = 1 << (vector & 31);
        let old = self.get(index);
        self.set(index, if on { old | bit } else { old & !bit });
    }

    fn highest(&self, bank: usize) -> Option<u8> {
        (0..8).rev().find_map(|i| {
            let word = self.get(bank + i);
            (word != 0).then(|| (i as u32 * 32 + word.ilog2()) as u8)
        })
    }

    pub fn is_level(&self, vector: u8) -> bool {
        self.is_set(reg::TMR, vector)
    }

    // Priorities (SDM vol. 3, 11.8.3).

    pub fn task_priority(&self) -> u8 {
        self.get(reg::TPR) as u8
    }

    pub fn set_task_priority(&mut self, value: u8) {
        self.set(reg::TPR, u32::from(value));
    }

    pub fn processor_priority(&self) -> u8 {
        let task = self.task_priority();
        let service = self.highest(reg::ISR).unwrap_or(0);
        if task >> 4 >= service >> 4 {
            task
        } else {
            service & 0xf0
        }
    }

    /// The vector that may interrupt the processor now.
    fn deliverable(&self) -> Option<u8> {
        if !self.is_software_enabled() {
            return None;
        }
        self.highest(reg::IRR)
            .filter(|vector| vector >> 4 > self.processor_priority() >> 4)
    }

    /// The vector of the 8259-like controller, if LINT0 lets it through. A disabled APIC is a wire.
    fn external(&self) -> Option<u8> {
        let lvt = self.get(reg::LVT_LINT0);
        let open = !self.is_enabled() || (lvt & MASKED == 0 && lvt >> 8 & 7 == 7);
        self.ext_int.filter(|_| open)
    }

    pub fn waiting(&self) -> Waiting {
        Waiting {
            init: self.init,
            startup: self.startup,
            nmi: self.nmis > 0,
            interrupt: self.deliverable().is_some() || self.external().is_some(),
        }
    }

    pub fn acknowledge(&mut self) -> Option<u8> {
        if let Some(vector) = self.deliverable() {
            self.force(vector);
            return Some(vector);
        }
        let vector = self.external()?;
        self.ext_int = None;
        Some(vector)
    }

    pub fn force(&mut self, vector: u8) {
        self.set_vector(reg::IRR, vector, false);
        self.set_vector(reg::ISR, vector, true);
    }

    pub fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.highest(reg::ISR) else {
            return Effect::None;
        };
        self.set_vector(reg::ISR, vector, false);
        if self.is_level(vector) {
            Effect::Broadcast(vector)
        } else {
            Effect::None
        }
    }

    // What arrives.

    pub fn accept(&mut self, mode: DeliveryMode, vector: u8, level: bool) {
        if !self.is_enabled() {
            return;
        }
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.accept_fixed(vector, level),
            DeliveryMode::Nmi => self.raise_nmi(),
            DeliveryMode::Init => {
                self.init = true;
                // A start-up message counts only after it.
                self.startup = None;
            }
            DeliveryMode::Startup => self.startup = Some(vector),
            DeliveryMode::ExtInt => self.ext_int = Some(vector),
        }
    }

    fn accept_fixed(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.raise_error(error::RECEIVED_ILLEGAL_VECTOR);
        } else if self.is_software_enabled() {
            self.set_vector(reg::IRR, vector, true);
            self.set_vector(reg::TMR, vector, level);
        }
    }

    fn raise_error(&mut self, bit: u32) {
        self.errors |= bit;
        let lvt = self.get(reg::LVT_ERROR);
        let vector = lvt as u8;
        // An illegal vector in the error entry itself must not report itself for ever.
        if lvt & MASKED == 0 && vector >= 16 {
            self.accept_fixed(vector, false);
        }
    }

    fn raise_local(&mut self, lvt: usize) {
        let entry = self.get(lvt);
        if entry & MASKED != 0 {
            return;
        }
        match DeliveryMode::from_bits(entry >> 8) {
            Some(DeliveryMode::Fixed) => self.accept_fixed(entry as u8, entry & LEVEL != 0),
            Some(DeliveryMode::Nmi) => self.raise_nmi(),
            Some(DeliveryMode::Init) => self.init = true,
            _ => {}
        }
    }

    pub fn lint0(&mut self, vector: Option<u8>) {
        let rising = vector.is_some() && self.ext_int.is_none();
        self.ext_int = vector;
        if rising {
            self.raise_local(reg::LVT_LINT0);
        }
    }

    pub fn raise_nmi(&mut self) {
        self.nmis = (self.nmis + 1).min(2);
    }

    pub fn lint1(&mut self) {
        if self.is_enabled() {
            self.raise_local(reg::LVT_LINT1);
        } else {
            self.raise_nmi();
        }
    }

    pub fn is_addressed(&self, destination: Destination) -> bool {
        if !self.is_enabled() {
            return false;
        }
        match destination {
            Destination::Physical(id) => {
                id == self.id || id == u32::MAX || (id == 0xff && !self.is_x2apic())
            }
            Destination::Logical(id) if self.is_x2apic() => {
                let mine = self.logical_x2apic();
                id == u32::MAX || (id >> 16 == mine >> 16 && id & mine & 0xffff != 0)
            }
            Destination::Logical(id) => {
                let mine = self.get(reg::LDR) >> 24;
                match self.get(reg::DFR) >> 28 {
                    0xf => id & mine & 0xff != 0,
                    0 => id == 0xff || (id >> 4 == mine >> 4 && id & mine & 15 != 0),
                    _ => false,
                }
            }
            Destination::Myself | Destination::All | Destination::Others => true,
        }
    }

    fn logical_x2apic(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    // Modes.

    pub fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.get(reg::SVR) & SOFTWARE_ENABLE != 0
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    pub fn page(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & !0xfff)
    }

    pub fn set_base(&mut self, value: u64, x2apic: bool, address_bits: u32) -> Result<(), Invalid> {
        let address = (1u64 << address_bits) - 0x1000;
        let modes = BASE_ENABLE | if x2apic { BASE_X2APIC } else { 0 };
        if value & !(address | modes | BASE_BOOTSTRAP) != 0 {
            return Err(Invalid);
        }
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        match (mode(self.base), mode(value)) {
            // x2APIC without the APIC is no mode; from x2APIC only off, and into x2APIC only from xAPIC.
            (_, (false, true)) | ((_, true), (true, false)) | ((false, _), (true, true)) => {
                return Err(Invalid);
            }
            ((true, _), (false, _)) => self.reset_registers(),
            _ => {}
        }
        self.base = value & !BASE_BOOTSTRAP | self.base & BASE_BOOTSTRAP;
        Ok(())
    }

    // Register access.

    pub fn read(&mut self, index: usize, now_ns: u64) -> Result<u32, Invalid> {
        Ok(match index {
            reg::ID if self.is_x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::PPR => u32::from(self.processor_priority()),
            reg::LDR if self.is_x2apic() => self.logical_x2apic(),
            reg::TIMER_CURRENT => self.timer_count(now_ns),
            reg::EOI | reg::SELF_IPI => 0,
            reg::TPR | reg::APR | reg::RRD..=reg::SVR | reg::TIMER_INITIAL | reg::TIMER_DIVIDE => {
                self.get(index)
            }
            reg::ISR..=reg::ESR | reg::ICR_LOW..=reg::LVT_ERROR => self.get(index),
            _ => {
                self.raise_illegal_register();
                return Err(Invalid);
            }
        })
    }

    /// A reserved register was accessed; as an MSR that is #GP and nothing else (SDM vol. 3, 12.5.3).
    fn raise_illegal_register(&mut self) {
        if !self.is_x2apic() {
            self.raise_error(error::ILLEGAL_REGISTER);
        }
    }

    pub fn msr_read(&mut self, index: usize, now_ns: u64) -> Result<u64, Invalid> {
        match index {
            _ if !self.is_x2apic() => Err(Invalid),
            // Write-only, or only on the page.
            reg::EOI | reg::SELF_IPI | reg::DFR | reg::APR | reg::RRD | reg::ICR_HIGH => {
                Err(Invalid)
            }
            reg::ICR_LOW => {
                Ok(u64::from(self.get(reg::ICR_HIGH)) << 32 | u64::from(self.get(reg::ICR_LOW)))
            }
            _ => self.read(index, now_ns).map(u64::from),
        }
    }

    pub fn write(&mut self, index: usize, value: u32, now_ns: u64) -> Result<Effect, Invalid> {
        match index {
            reg::TPR => self.set(index, value & 0xff),
            reg::EOI => return Ok(self.end_of_interrupt()),
            reg::LDR => self.set(index, value & 0xff00_0000),
            reg::DFR => self.set(index, value | 0x0fff_ffff),
            reg::SVR => self.write_spurious(value),
            reg::ESR => {
                let errors = std::mem::take(&mut self.errors);
                self.set(index, errors);
            }
            reg::ICR_LOW => {
                self.set(index, value & 0x000c_cfff);
                return Ok(self.command());
            }
            reg::ICR_HIGH => self.set(
                index,
                value
                    & if self.is_x2apic() {
                        u32::MAX
                    } else {
                        0xff00_0000
                    },
            ),
            reg::LVT_TIMER => self.write_timer_entry(value),
            reg::LVT_THERMAL..=reg::LVT_ERROR => {
                self.set(index, self.lvt_value(value & lvt_mask(index)))
            }
            reg::TIMER_INITIAL => self.write_timer_count(value, now_ns),
            reg::TIMER_DIVIDE => self.write_timer_divide(value & 0xb, now_ns),
            reg::ID | reg::VERSION | reg::APR | reg::PPR | reg::RRD | reg::TIMER_CURRENT => {}
            reg::ISR..reg::ESR => {}
            _ => {
                self.raise_illegal_register();
                return Err(Invalid);
            }
        }
        Ok(Effect::None)
    }

    pub fn msr_write(&mut self, index: usize, value: u64, now_ns: u64) -> Result<Effect, Invalid> {
        let allowed: u64 = match index {
            _ if !self.is_x2apic() => return Err(Invalid),
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::ICR_LOW => 0xffff_ffff_000c_cfff,
            reg::LVT_TIMER..=reg::LVT_ERROR => u64::from(lvt_mask(index)) | 1 << 12 | 1 << 14,
            reg::TIMER_INITIAL => 0xffff_ffff,
            reg::TIMER_DIVIDE => 0xb,
            _ => return Err(Invalid),
        };
        if value & !allowed != 0 {
            return Err(Invalid);
        }
        match index {
            reg::ICR_LOW => self.set(reg::ICR_HIGH, (value >> 32) as u32),
            reg::SELF_IPI => {
                let mode = DeliveryMode::Fixed;
                let destination = Destination::Myself;
                return Ok(Effect::Send(Message {
                    destination,
                    mode,
                    vector: value as u8,
                    level: false,
                }));
            }
            _ => {}
        }
        self.write(index, value as u32, now_ns)
    }

    fn write_spurious(&mut self, value: u32) {
        self.set(reg::SVR, value & 0x1ff);
        if value & SOFTWARE_ENABLE == 0 {
            for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
                self.set(lvt, self.get(lvt) | MASKED);
            }
        }
    }

    /// While the APIC is switched off by software, LVT entries stay masked.
    fn lvt_value(&self, value: u32) -> u32 {
        if self.get(reg::SVR) & SOFTWARE_ENABLE == 0 {
            value | MASKED
        } else {
            value
        }
    }

    /// Turns the ICR into a message (SDM vol. 3, 11.6.1).
    fn command(&mut self) -> Effect {
        let low = self.get(reg::ICR_LOW);
        let high = self.get(reg::ICR_HIGH);
        let vector = low as u8;
        let Some(mode) = DeliveryMode::from_bits(low >> 8) else {
            return Effect::None;
        };
        let assert = low & 1 << 14 != 0;
        let level = low & LEVEL != 0;
        // INIT level de-assert only concerned processors before the Pentium 4.
        if mode == DeliveryMode::ExtInt || (mode == DeliveryMode::Init && level && !assert) {
            return Effect::None;
        }
        if vector < 16 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        let id = if self.is_x2apic() { high } else { high >> 24 };
        let destination = match low >> 18 & 3 {
            1 => Destination::Myself,
            2 => Destination::All,
            3 => Destination::Others,
            _ if low & 1 << 11 != 0 => Destination::Logical(id),
            _ => Destination::Physical(id),
        };
        Effect::Send(Message {
            destination,
            mode,
            vector,
            level: false,
        })
    }

    // The timer.

    fn timer_mode(&self) -> TimerMode {
        match self.get(reg::LVT_TIMER) >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// Nanoseconds per tick of the count registers.
    fn tick_ns(&self) -> u64 {
        let code = self.get(reg::TIMER_DIVIDE);
        let exponent = ((code & 3 | code >> 1 & 4) + 1) & 7;
        (1 << exponent) * (1_000_000_000 / APIC_BUS_HZ)
    }

    fn write_timer_entry(&mut self, value: u32) {
        let before = self.timer_mode();
        self.set(
            reg::LVT_TIMER,
            self.lvt_value(value & lvt_mask(reg::LVT_TIMER)),
        );
        let deadline = |mode| mode == TimerMode::TscDeadline;
        if deadline(before) != deadline(self.timer_mode()) {
            self.tsc_deadline = 0;
            self.deadline_ns = None;
            self.set(reg::TIMER_INITIAL, 0);
        }
    }

    fn write_timer_count(&mut self, value: u32, now_ns: u64) {
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        self.set(reg::TIMER_INITIAL, value);
        self.deadline_ns =
            (value != 0).then(|| now_ns.saturating_add(u64::from(value) * self.tick_ns()));
    }

    fn write_timer_divide(&mut self, value: u32, now_ns: u64) {
        let left = self.timer_count(now_ns);
        self.set(reg::TIMER_DIVIDE, value);
        if self.deadline_ns.is_some() && self.timer_mode() != TimerMode::TscDeadline {
            self.deadline_ns = Some(now_ns.saturating_add(u64::from(left) * self.tick_ns()));
        }
    }

    fn timer_count(&self, now_ns: u64) -> u32 {
        if self.timer_mode() == TimerMode::TscDeadline {
            return 0;
        }
        let Some(at) = self.deadline_ns else { return 0 };
        let late = now_ns.saturating_sub(at);
        let left_ns = if self.timer_mode() == TimerMode::Periodic && late > 0 {
            // The next period has begun, whether its interrupt was raised yet or not.
            let period = (u64::from(self.get(reg::TIMER_INITIAL)) * self.tick_ns()).max(1);
            period - late % period
        } else {
            at.saturating_sub(now_ns)
        };
        u32::try_from(left_ns.div_ceil(self.tick_ns())).unwrap_or(u32::MAX)
    }

    pub fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    pub fn poll(&mut self, now_ns: u64) {
        let Some(due) = self.deadline_ns.filter(|&at| at <= now_ns) else {
            return;
        };
        self.deadline_ns = match self.timer_mode() {
            TimerMode::Periodic => {
                // Periods that were slept through are one interrupt, as the IRR has one bit.
                let period = (u64::from(self.get(reg::TIMER_INITIAL)) * self.tick_ns()).max(1);
                Some(due + ((now_ns - due) / period + 1) * period)
            }
            _ => None,
        };
        self.tsc_deadline = 0;
        self.raise_local(reg::LVT_TIMER);
    }

    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    pub fn set_tsc_deadline(&mut self, value: u64, now_ns: u64) {
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        self.tsc_deadline = value;
        self.arm_tsc_deadline(now_ns);
        // A deadline in the past is due at once, not when the timer's thread gets to it.
        self.poll(now_ns);
    }

    fn arm_tsc_deadline(&mut self, now_ns: u64) {
        self.deadline_ns = (self.tsc_deadline != 0).then(|| {
            let hz = u128::from(self.tsc_hz);
            let now =
                ((u128::from(now_ns) * hz / 1_000_000_000) as u64).wrapping_add(self.tsc_offset);
            let left = u128::from(self.tsc_deadline.saturating_sub(now));
            let left_ns = (left * 1_000_000_000).div_ceil(hz);
            now_ns
                .saturating_add(u64::try_from(left_ns).unwrap_or(u64::MAX))
                .min(u64::MAX - 1)
        });
    }

    pub fn set_tsc_offset(&mut self, offset: u64, now_ns: u64) {
        self.tsc_offset = offset;
        if self.tsc_deadline != 0 {
            self.arm_tsc_deadline(now_ns);
        }
    }

    // Saved state.

    pub fn save(&mut self, now_ns: u64) -> ApicState {
        let mut registers = self.values.to_vec();
        for index in [
            reg::ID,
            reg::VERSION,
            reg::PPR,
            reg::LDR,
            reg::TIMER_CURRENT,
        ] {
            if let (Ok(value), Some(slot)) = (self.read(index, now_ns), registers.get_mut(index)) {
                *slot = value;
            }
        }
        let timer_deadline_ns = self.deadline_ns.filter(|_| self.tsc_deadline == 0);
        ApicState {
            base: self.base,
            registers,
            tsc_deadline: self.tsc_deadline,
            timer_deadline_ns,
        }
    }

    pub fn restore(&mut self, state: &ApicState, tsc_offset: u64, now_ns: u64) {
        self.base = state.base;
        for (to, from) in self.values.iter_mut().zip(&state.registers) {
            *to = *from;
        }
        // A vector below 16 cannot be requested; a saved state could say so.
        for bank in [reg::IRR, reg::ISR] {
            self.set(bank, self.get(bank) & !0xffff);
        }
        self.tsc_offset = tsc_offset;
        self.tsc_deadline = state.tsc_deadline;
        self.deadline_ns = state.timer_deadline_ns;
        if self.tsc_deadline != 0 {
            self.arm_tsc_deadline(now_ns);
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

/// Writable bits of an LVT entry.
fn lvt_mask(index: usize) -> u32 {
    match index {
        reg::LVT_TIMER => 0x0007_00ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x0001_a7ff,
        reg::LVT_ERROR => 0x0001_00ff,
        _ => 0x0001_07ff,
    }
}
