//! Masked moves and gathers: lanes that are masked off are neither accessed nor faulted on (Intel SDM vol. 2). And
//! VZEROALL and VZEROUPPER outside of 64-bit code.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::Flow;
use super::operand::{set_vector_lane, size_mask, vector_lane};
use crate::env::{Access, Exec, Fault};

/// Bytes of a vector register, low ones first.
fn vector_bytes(vector: [u64; 4]) -> Vec<u8> {
    vector.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Exec<'_> {
    /// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes whose mask has its top bit set go to `[rDI]`.
    pub(super) fn mask_bytes(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let (data, mask, len) = if instr.mnemonic() == M::Maskmovq {
            let data = self.mmx(instr.op1_register().number());
            let mask = self.mmx(instr.op2_register().number());
            (data.to_le_bytes().to_vec(), mask.to_le_bytes().to_vec(), 8)
        } else {
            let data = self.vector(instr.op1_register().number());
            let mask = self.vector(instr.op2_register().number());
            (vector_bytes(data), vector_bytes(mask), 16)
        };
        let bytes: Vec<(u64, u8)> = (0u64..)
            .zip(data.into_iter().zip(mask))
            .take(len)
            .filter(|(_, (_, mask))| mask & 0x80 != 0)
            .map(|(i, (byte, _))| (i, byte))
            .collect();
        let segment = self.segment_of(instr, 0);
        let offset = self.offset(instr, 0, 0);
        let width = match instr.op0_kind() {
            OpKind::MemorySegDI => size_mask(2),
            OpKind::MemorySegEDI => size_mask(4),
            _ => u64::MAX,
        };
        let mut stores = Vec::with_capacity(bytes.len());
        for (i, byte) in bytes {
            let linear = self.linear(segment, offset.wrapping_add(i) & width, 1, Access::Write)?;
            self.probe(linear, 1, Access::Write)?;
            stores.push((linear, byte));
        }
        for (linear, byte) in stores {
            self.store(linear, &[byte])?;
        }
        if instr.mnemonic() == M::Maskmovq {
            self.enter_mmx();
        }
        Ok(Flow::Next)
    }

    /// VZEROALL and VZEROUPPER: the registers that the current code can name.
    pub(super) fn zero_vectors(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let count = if self.cpu.code_64() { 16 } else { 8 };
        for [low, next, high, top] in self.cpu.ymm.0.iter_mut().take(count) {
            (*high, *top) = (0, 0);
            if instr.mnemonic() == M::Vzeroall {
                (*low, *next) = (0, 0);
            }
        }
        Ok(Flow::Next)
    }

    /// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ: loads and stores.
    pub(super) fn mask_lanes(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = if matches!(instr.mnemonic(), M::Vmaskmovps | M::Vpmaskmovd) {
            4
        } else {
            8
        };
        let mask = self.vector(instr.op1_register().number());
        let lanes = instr.op1_register().size() / size;
        let store = instr.op0_kind() == OpKind::Memory;
        let (memory, access) = if store {
            (0, Access::Write)
        } else {
            (2, Access::Read)
        };
        let mut addresses = Vec::with_capacity(lanes);
        for lane in 0..lanes {
            if vector_lane(&mask, lane, size) >> (size * 8 - 1) != 0 {
                // By single bytes: these instructions never raise #AC.
                let [first, last] = [lane * size, lane * size + size - 1].map(|by| by as u64);
                let linear = self.address_at(instr, memory, first, 1, access)?;
                self.address_at(instr, memory, last, 1, access)?;
                self.probe(linear, size, access)?;
                addresses.push((lane, linear));
            }
        }
        if store {
            let data = self.vector(instr.op2_register().number());
            for (lane, linear) in addresses {
                self.store_sized(linear, vector_lane(&data, lane, size), size)?;
            }
        } else {
            let mut result = [0; 4];
            for (lane, linear) in addresses {
                let value = self.load_sized(linear, size)?;
                set_vector_lane(&mut result, lane, size, value);
            }
            self.set_vector(instr.op0_register().number(), result);
        }
        Ok(Flow::Next)
    }

    /// VGATHER and VPGATHER in their VEX forms. Lanes loaded before a fault stay, and so do their cleared masks.
    pub(super) fn gather(&mut self, instr: &Instruction) -> Result<Flow, Fault> {
        let size = match instr.mnemonic() {
            M::Vgatherdps | M::Vgatherqps | M::Vpgatherdd | M::Vpgatherqd => 4,
            M::Vgatherdpd | M::Vgatherqpd | M::Vpgatherdq | M::Vpgatherqq => 8,
            _ => return Err(Fault::UNDEFINED),
        };
        let index = instr.memory_index();
        let [to, mask] = [instr.op0_register(), instr.op2_register()].map(|r| r.number());
        if to == mask || to == index.number() || mask == index.number() {
            return Err(Fault::UNDEFINED);
        }
        let index_size = if instr.vsib() == Some(true) { 8 } else { 4 };
        let lanes = (instr.op0_register().size() / size).min(index.size() / index_size);
        for lane in 0..lanes {
            let mut masks = self.vector(mask);
            if vector_lane(&masks, lane, size) >> (size * 8 - 1) != 0 {
                let offset = self.offset(instr, 1, lane);
                let segment = self.segment_of(instr, 1);
                // By single bytes: gathers never raise #AC.
                let last = offset.wrapping_add(size as u64 - 1) & self.address_mask(instr);
                let linear = self.linear(segment, offset, 1, Access::Read)?;
                self.linear(segment, last, 1, Access::Read)?;
                let value = self.load_sized(linear, size)?;
                let mut result = self.vector(to);
                set_vector_lane(&mut result, lane, size, value);
                self.set_vector(to, result);
            }
            set_vector_lane(&mut masks, lane, size, 0);
            self.set_vector(mask, masks);
        }
        // Everything above the lanes becomes zero, and the whole mask.
        let mut result = self.vector(to);
        for lane in lanes..32 / size {
            set_vector_lane(&mut result, lane, size, 0);
        }
        self.set_vector(to, result);
        self.set_vector(mask, [0; 4]);
        Ok(Flow::Next)
    }
}
