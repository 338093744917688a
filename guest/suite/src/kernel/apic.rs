//! The local APIC and the I/O APIC.

use super::asm;

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;

pub const ID: u64 = 0x20;
pub const VERSION: u64 = 0x30;
pub const TPR: u64 = 0x80;
pub const PPR: u64 = 0xa0;
pub const EOI: u64 = 0xb0;
pub const LDR: u64 = 0xd0;
pub const SPURIOUS: u64 = 0xf0;
pub const ISR: u64 = 0x100;
pub const TMR: u64 = 0x180;
pub const IRR: u64 = 0x200;
pub const ESR: u64 = 0x280;
pub const ICR: u64 = 0x300;
pub const ICR_HIGH: u64 = 0x310;
pub const TIMER: u64 = 0x320;
pub const LINT0: u64 = 0x350;
pub const INITIAL: u64 = 0x380;
pub const CURRENT: u64 = 0x390;
pub const DIVIDE: u64 = 0x3e0;

pub const MASKED: u64 = 1 << 16;
pub const PERIODIC: u64 = 1 << 17;
pub const DEADLINE: u64 = 2 << 17;
/// Destinations of an IPI.
pub const SELF: u64 = 1 << 18;
pub const OTHERS: u64 = 3 << 18;
pub const ALL: u64 = 2 << 18;

pub fn get(register: u64) -> u64 {
    asm::read32(LOCAL + register)
}

pub fn set(register: u64, value: u64) {
    asm::write32(LOCAL + register, value);
}

/// Switches the APIC on, with the spurious vector 0xff.
pub fn enable() {
    set(SPURIOUS, 0x1ff);
    set(TPR, 0);
}

pub fn end() {
    set(EOI, 0);
}

/// Sends an IPI.
pub fn send(command: u64) {
    set(ICR_HIGH, 0);
    set(ICR, command);
}

/// Sends an IPI to one CPU.
pub fn send_to(cpu: u64, command: u64) {
    set(ICR_HIGH, cpu << 24);
    set(ICR, command);
}

/// One bit of a register of 256.
pub fn bit(register: u64, vector: u64) -> u64 {
    get(register + vector / 32 * 16) >> (vector % 32) & 1
}

pub fn io_get(register: u64) -> u64 {
    asm::write32(IO, register);
    asm::read32(IO + 0x10)
}

pub fn io_set(register: u64, value: u64) {
    asm::write32(IO, register);
    asm::write32(IO + 0x10, value);
}

/// Sets the redirection of a pin to CPU 0.
pub fn route(pin: u64, low: u64) {
    io_set(0x11 + pin * 2, 0);
    io_set(0x10 + pin * 2, low);
}
