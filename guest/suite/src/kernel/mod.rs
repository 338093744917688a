//! What runs in the guest: entry, console, traps, page tables, interrupt controllers, and the guests themselves.
#![cfg_attr(clippy, allow(dead_code))]

#[macro_use]
mod asm;
mod apic;
mod boot;
#[macro_use]
mod check;
mod paging;
mod runtime;
mod trap;
mod user;

mod code;
mod compat;
mod debug;
mod exceptions;
mod fpu;
mod interrupts;
mod msrs;
mod page_faults;
mod real;
mod smp;
mod strings;
mod timers;

/// Runs the guest that the command line names; `info` is the address of PVH's start information.
pub extern "C" fn main(info: u64) -> ! {
    trap::initialise();
    trap::initialise_cpu(0);
    let line = boot::command_line(info);
    let mut words = line.text().split(' ');
    let name = words.next().unwrap_or_default();
    let cpus = words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    check::set_emulated(words.next() == Some("emulated"));
    match name {
        "paging" => page_faults::run(),
        "exceptions" => exceptions::run(),
        "interrupts" => interrupts::run(),
        "timers" => timers::run(),
        "code" => code::run(),
        "compat" => compat::run(),
        "fpu" => fpu::run(),
        "real" => real::run(),
        "debug" => debug::run(),
        "strings" => strings::run(),
        "msrs" => msrs::run(),
        "smp" => smp::run(cpus),
        _ => say!("there is no guest '{name}'"),
    }
    check::finish(name)
}
