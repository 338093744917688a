//! The names of the guests: what the host runs, and what the image finds on its command line.

/// A guest: its name and how many CPUs it wants.
pub const GUESTS: &[(&str, u32)] = &[
    ("paging", 1),
    ("exceptions", 1),
    ("interrupts", 1),
    ("timers", 1),
    ("code", 1),
    ("compat", 1),
    ("fpu", 1),
    ("real", 1),
    ("debug", 1),
    ("strings", 1),
    ("msrs", 1),
    ("smp", 2),
    ("smp", 4),
];
