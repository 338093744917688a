//! The table of classes, and how one is measured.

use std::fmt;

use crate::{code, copy, kernel, scalar, sys, vector};

/// What a class mostly exercises; ratios are averaged per group.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// Integer code of programs: branches, calls, memory.
    Scalar,
    /// Floating point, SIMD and bulk copies.
    Vector,
    /// Time spent in the guest's kernel: calls, faults, processes.
    Kernel,
    /// Code that changes, and what a translator has to be careful about.
    Code,
}

impl Group {
    pub const ALL: [Group; 4] = [Group::Scalar, Group::Vector, Group::Kernel, Group::Code];

    pub fn name(self) -> &'static str {
        match self {
            Group::Scalar => "scalar",
            Group::Vector => "vector",
            Group::Kernel => "kernel",
            Group::Code => "code",
        }
    }
}

/// One class of guest workload.
pub struct Class {
    pub name: &'static str,
    pub group: Group,
    /// How many units of work there are at scale 1.
    pub units: u64,
    /// Does that many units; returns a checksum that depends on nothing but their number.
    pub work: fn(u64) -> u64,
    /// Whether this CPU can.
    pub present: fn() -> bool,
}

/// What measuring a class gave.
pub struct Measurement {
    name: &'static str,
    result: Option<(u64, u64)>,
}

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Some((nanoseconds, checksum)) => {
                write!(f, "{} {nanoseconds} {checksum:016x}", self.name)
            }
            None => write!(f, "{} absent -", self.name),
        }
    }
}

impl Class {
    /// Runs the class once, after a short warm-up outside the measured time.
    pub fn measure(&self, units: u64) -> Measurement {
        let result = (self.present)().then(|| {
            (self.work)((units / 100).max(1));
            let start = sys::monotonic_ns();
            let checksum = (self.work)(units);
            (sys::monotonic_ns() - start, checksum)
        });
        Measurement {
            name: self.name,
            result,
        }
    }
}

const fn class(name: &'static str, group: Group, units: u64, work: fn(u64) -> u64) -> Class {
    Class {
        name,
        group,
        units,
        work,
        present: always,
    }
}

const fn optional(
    name: &'static str,
    units: u64,
    work: fn(u64) -> u64,
    present: fn() -> bool,
) -> Class {
    Class {
        name,
        group: Group::Vector,
        units,
        work,
        present,
    }
}

fn always() -> bool {
    true
}

/// All classes, in the order they run.
#[rustfmt::skip]
pub const CLASSES: &[Class] = &[
    class("integer", Group::Scalar, 50_000_000, scalar::integer),
    class("divide", Group::Scalar, 20_000_000, scalar::divide),
    class("branches", Group::Scalar, 20_000_000, scalar::branches),
    class("sort", Group::Scalar, 30, scalar::sort),
    class("pointer_chase", Group::Scalar, 10_000_000, scalar::pointer_chase),
    class("hash", Group::Scalar, 30_000_000, scalar::hash),
    class("sha256", Group::Scalar, 500_000, scalar::sha256),
    class("bits", Group::Scalar, 20_000_000, scalar::bits),
    class("strings", Group::Scalar, 3_000, scalar::strings),
    class("indirect_calls", Group::Scalar, 20_000_000, scalar::indirect_calls),
    class("interpreter", Group::Scalar, 20_000_000, scalar::interpreter),
    class("recursion", Group::Scalar, 300, scalar::recursion),
    class("tlb_misses", Group::Scalar, 5_000_000, scalar::tlb_misses),
    class("locked", Group::Scalar, 10_000_000, scalar::locked),
    class("double", Group::Vector, 2_000, vector::double),
    class("x87", Group::Vector, 5_000_000, vector::x87),
    class("sse2", Group::Vector, 40_000_000, vector::sse2),
    optional("avx2", 20_000_000, vector::avx2, vector::has_avx2),
    optional("fma", 100_000_000, vector::fma, vector::has_fma),
    optional("crypto", 30_000_000, vector::crypto, vector::has_crypto),
    class("rep_movs", Group::Vector, 25_000, copy::rep_movs),
    class("rep_scan", Group::Vector, 10_000, copy::rep_scan),
    class("copy_loop", Group::Vector, 50_000, copy::copy_loop),
    class("memcpy", Group::Vector, 6_000_000, copy::memcpy),
    class("system_calls", Group::Kernel, 500_000, kernel::system_calls),
    class("page_faults", Group::Kernel, 100, kernel::page_faults),
    class("copy_on_write", Group::Kernel, 60, kernel::copy_on_write),
    class("fork", Group::Kernel, 1_000, kernel::fork),
    class("exec", Group::Kernel, 200, kernel::exec),
    class("pipes", Group::Kernel, 5_000, kernel::pipes),
    class("context_switch", Group::Kernel, 25_000, kernel::context_switch),
    class("futex", Group::Kernel, 25_000, kernel::futex),
    class("threads", Group::Kernel, 5_000, kernel::threads),
    class("signals", Group::Kernel, 50_000, kernel::signals),
    class("mmap", Group::Kernel, 20_000, kernel::mmap),
    class("files", Group::Kernel, 30_000, kernel::files),
    class("clock", Group::Kernel, 4_000_000, kernel::clock),
    class("self_modifying", Group::Code, 1_000_000, code::self_modifying),
    class("jit", Group::Code, 10_000, code::jit),
    class("page_end", Group::Code, 100_000_000, code::page_end),
    class("cold_code", Group::Code, 3_000, code::cold_code),
];
