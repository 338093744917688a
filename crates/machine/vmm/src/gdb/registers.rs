//! A vCPU's registers as gdb numbers them, and back.

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use strata_engine::x86::CpuState;

/// gdb's order of general registers by ours, which is the encoding's: RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 on.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
/// Offsets in the area of FXSAVE (Intel SDM vol. 1, 10.5.1).
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;

/// gdb's view of a state.
pub(crate) fn to_gdb(state: &CpuState) -> X86_64CoreRegs {
    let mut regs = X86_64CoreRegs::default();
    for (to, from) in regs.regs.iter_mut().zip(ORDER) {
        *to = state.gpr.get(from).copied().unwrap_or_default();
    }
    regs.rip = state.rip;
    regs.eflags = state.rflags as u32;
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(|s| u32::from(s.selector));
    let to = &mut regs.segments;
    (to.cs, to.ss, to.ds, to.es, to.fs, to.gs) = (cs, ss, ds, es, fs, gs);
    let area = &state.xsave.bytes;
    let half = |at| u32::from(u16::from_le_bytes(bytes(area, at)));
    let word = |at| u32::from_le_bytes(bytes(area, at));
    regs.mxcsr = word(MXCSR);
    for (index, st) in regs.st.iter_mut().enumerate() {
        *st = bytes(area, ST + 16 * index);
    }
    for (index, xmm) in regs.xmm.iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(bytes(area, XMM + 16 * index));
    }
    let fpu = &mut regs.fpu;
    (fpu.fctrl, fpu.fstat, fpu.ftag) = (half(FCW), half(FSW), half(FTW));
    (fpu.fop, fpu.fioff, fpu.fooff) = (half(FOP), word(FIP), word(FDP));
    regs
}

/// Takes over what gdb has changed. Segments stay: gdb knows selectors alone, and a selector is not a segment.
pub(crate) fn from_gdb(regs: &X86_64CoreRegs, state: &mut CpuState) {
    for (from, to) in regs.regs.iter().zip(ORDER) {
        if let Some(to) = state.gpr.get_mut(to) {
            *to = *from;
        }
    }
    state.rip = regs.rip;
    state.rflags = state.rflags & !0xffff_ffff | u64::from(regs.eflags) | 2;
    let area = &mut state.xsave.bytes;
    put(area, MXCSR, &(regs.mxcsr & 0xffff).to_le_bytes());
    for (index, st) in regs.st.iter().enumerate() {
        put(area, ST + 16 * index, st);
    }
    for (index, xmm) in regs.xmm.iter().enumerate() {
        put(area, XMM + 16 * index, &xmm.to_le_bytes());
    }
    put(area, FCW, &(regs.fpu.fctrl as u16).to_le_bytes());
    put(area, FSW, &(regs.fpu.fstat as u16).to_le_bytes());
}

fn bytes<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    area.get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = area.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_engine::x86::XsaveState;

    #[test]
    fn what_gdb_sees_is_what_it_gives_back() {
        let mut state = CpuState {
            gpr: std::array::from_fn(|index| index as u64 + 100),
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            xsave: XsaveState {
                bytes: (0..832_u32).map(|index| index as u8).collect(),
            },
            ..CpuState::default()
        };
        put(&mut state.xsave.bytes, MXCSR, &0x1f80_u32.to_le_bytes());
        let regs = to_gdb(&state);
        // RBX and RSP are where gdb has them.
        assert_eq!((regs.regs[1], regs.regs[7]), (103, 104));
        assert_eq!(regs.mxcsr, 0x1f80);
        assert_eq!(regs.xmm[1] as u8, 176);
        let mut back = state.clone();
        back.gpr = [0; 16];
        (back.rip, back.rflags) = (0, 0);
        from_gdb(&regs, &mut back);
        assert_eq!(back, state);
    }
}
