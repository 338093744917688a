//! Blocks from pages that other vCPUs may still store to unnoticed: their bytes are compared until all have answered.

use iced_x86::Mnemonic as M;

use super::blocks::WINDOW;
use super::*;

/// A block, what it was made from, and the question whose answers it waits for.
pub(super) struct Provisional {
    block: u32,
    generation: u64,
    asked: u64,
    bytes: [(u64, Vec<u8>); 2],
}

impl Translated {
    /// True if memory still holds what a block was made from.
    pub(super) fn unchanged<B: AsRef<[u8]>>(&self, bytes: &[(u64, B); 2]) -> bool {
        bytes.iter().all(|(gpa, bytes)| {
            let (mut now, bytes) = ([0xff; WINDOW], bytes.as_ref());
            let Some(now) = now.get_mut(..bytes.len()) else {
                return false;
            };
            let _ = self.env.memory.read(Gpa(*gpa), now);
            now == bytes
        })
    }

    /// Remembers a new block until the question is answered, if it is not, or if it is known that its bytes changed.
    pub(super) fn watch_provisional(
        &mut self,
        block: u32,
        asked: u64,
        bytes: [(u64, &[u8]); 2],
        unchanged: bool,
    ) {
        let (peers, me) = (&self.env.peers, self.env.me.id());
        if unchanged && peers.answered(me, asked) {
            return;
        }
        // Whoever answers from here on says so.
        peers.set_curious(me, true);
        if !unchanged || peers.answered(me, asked) {
            self.cpu.raise_request(request::LOOK);
        }
        self.provisional.push(Provisional {
            block,
            generation: self.generation,
            asked,
            bytes: bytes.map(|(gpa, bytes)| (gpa, bytes.to_vec())),
        });
    }

    /// Drops provisional blocks whose bytes changed, and lets go of those that cannot change unnoticed any more.
    pub(super) fn confirm(&mut self) {
        if self.provisional.is_empty() {
            return;
        }
        let me = self.env.me.id();
        for block in std::mem::take(&mut self.provisional) {
            if block.generation != self.generation || self.code.is_dead(block.block) {
                continue;
            }
            // Asked first: what is stored after the answer is told of.
            let answered = self.env.peers.answered(me, block.asked);
            if !self.unchanged(&block.bytes) {
                let stats = &mut self.env.stats;
                self.code.invalidate(block.block, &mut self.cpu, stats);
            } else if !answered {
                self.provisional.push(block);
            }
        }
        if self.provisional.is_empty() {
            self.env.peers.set_curious(me, false);
        }
    }
}

/// Instructions after which nothing may run that was fetched before (SDM vol. 3, 9.3), and those that Linux uses so.
pub(super) fn serializes(instr: &Instruction) -> bool {
    match instr.mnemonic() {
        M::Cpuid | M::Iret | M::Iretd | M::Iretq | M::Wrmsr | M::Invlpg => true,
        M::Invd | M::Wbinvd | M::Wbnoinvd | M::Xsetbv | M::Clts | M::Lmsw => true,
        M::Lgdt | M::Lidt | M::Lldt | M::Ltr | M::Clflush | M::Clflushopt => true,
        // To and from control and debug registers.
        M::Mov => true,
        _ => false,
    }
}
