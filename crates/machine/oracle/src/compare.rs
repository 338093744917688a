//! What differs between two ends of a case.

use std::fmt::Write;

use crate::state::{DONE, Lines, State};

/// RFLAGS bits compared: CF PF AF ZF SF TF DF OF NT AC ID. RF is pushed by the CPU as faults happen; IF and IOPL
/// cannot change here.
pub const FLAGS: u64 = 0x24_4dd5;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// What need not be equal in one case, and why it is known to differ stands where the case was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// Flags without a defined value.
    pub flags: u64,
    /// Linear addresses of bytes that need not be equal.
    pub bytes: [(u64, u64); 2],
    /// More than one fault of memory operands is due, and any may come first.
    pub any_fault: bool,
    /// The processor may do either: nothing is compared.
    pub either: bool,
}

/// Lists the differences; empty if there are none.
pub fn differences(
    native: &State,
    native_lines: &Lines,
    guest: &State,
    guest_lines: &Lines,
    tolerance: Tolerance,
) -> String {
    let mut out = String::new();
    if tolerance.either {
        return out;
    }
    // Of #PF and #AC either may come first.
    if native.vector == 17 && guest.vector == 14 && native.rip == guest.rip {
        return out;
    }
    let memory_fault = |vector| matches!(vector, 12..=14 | 17);
    if tolerance.any_fault
        && memory_fault(native.vector)
        && memory_fault(guest.vector)
        && native.rip == guest.rip
    {
        return out;
    }
    let mut word = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(out, "  {name}: native {a:#x}, translated {b:#x}");
        }
    };
    word("vector", native.vector, guest.vector);
    if native.vector != DONE || guest.vector != DONE {
        word("rip", native.rip, guest.rip);
    }
    if native.vector == guest.vector {
        match native.vector {
            14 => {
                // Linux sets the P bit for addresses of the kernel's half and beyond.
                let hidden = if native.cr2 >= 0x7fff_ffff_f000 { 1 } else { 0 };
                word("error", native.error | hidden, guest.error | hidden);
                if native.cr2 != guest.cr2 {
                    word("cr2", native.cr2, guest.cr2);
                }
            }
            12 | 13 | 17 => word("error", native.error, guest.error),
            _ => {}
        }
    }
    for (name, (a, b)) in NAMES.iter().zip(native.gpr.iter().zip(&guest.gpr)) {
        word(name, *a, *b);
    }
    let mask = FLAGS & !tolerance.flags;
    word("rflags", native.rflags & mask, guest.rflags & mask);
    word("fs base", native.fs, guest.fs);
    word("gs base", native.gs, guest.gs);
    for (i, (a, b)) in native.ymm.iter().zip(&guest.ymm).enumerate() {
        if a != b {
            let _ = writeln!(out, "  ymm{i}: native {a:x?}, translated {b:x?}");
        }
    }
    let (a, b) = (&native.fx.0, &guest.fx.0);
    for (name, range) in [
        ("fcw", 0..2),
        ("fsw", 2..4),
        ("ftw", 4..5),
        ("mxcsr", 24..28),
    ] {
        if a[range.clone()] != b[range.clone()] {
            let _ = writeln!(
                out,
                "  {name}: native {:x?}, translated {:x?}",
                &a[range.clone()],
                &b[range]
            );
        }
    }
    for i in 0..8 {
        let range = 32 + i * 16..42 + i * 16;
        if a[range.clone()] != b[range.clone()] {
            let _ = writeln!(
                out,
                "  st{i}: native {:x?}, translated {:x?}",
                &a[range.clone()],
                &b[range]
            );
        }
    }
    if !native_lines.iter().eq(guest_lines.iter()) {
        let mut left = native_lines.iter().peekable();
        let mut right = guest_lines.iter().peekable();
        let mut shown = 0;
        while (left.peek().is_some() || right.peek().is_some()) && shown < 4 {
            let l = left.peek().map_or(u16::MAX, |x| x.0);
            let r = right.peek().map_or(u16::MAX, |x| x.0);
            let at = l.min(r);
            let a = left.next_if(|x| x.0 == at).map(|x| x.1);
            let b = right.next_if(|x| x.0 == at).map(|x| x.1);
            if a != b {
                shown += 1;
                let text =
                    |x: Option<&[u64; 8]>| x.map_or("unchanged".to_owned(), |x| format!("{x:x?}"));
                let _ = writeln!(
                    out,
                    "  memory line {at}: native {}, translated {}",
                    text(a),
                    text(b)
                );
            }
        }
    }
    out
}
