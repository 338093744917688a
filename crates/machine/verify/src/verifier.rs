//! The verifier as an inspector: judges each block before it runs, and each jump before it is pointed elsewhere.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::flow::Graph;
use crate::layout::{Emitted, Inspect, Layout};
use crate::prove::Prover;

pub use crate::prove::Counts as Proof;

/// Proves that a block stays inside its guest: that each memory operand is a field of the context, an entry of its
/// privilege's caches at a bounded index, or an operand whose check or slow path comes before it on every way; that
/// control leaves by known ways only; and that no host address gets where the guest could read it.
///
/// # Errors
/// If there is no such proof, with the place and the reason.
pub fn verify(layout: &Layout, block: &Emitted<'_>) -> Result<Proof, String> {
    let graph = Graph::of(block, layout)?;
    Prover::run(layout, block, &graph)
}

/// Proves every block of an engine and counts what was proven.
#[derive(Debug, Default)]
pub struct Verifier {
    known: Mutex<Known>,
    blocks: AtomicU64,
    links: AtomicU64,
    instructions: AtomicU64,
    context: AtomicU64,
    checked: AtomicU64,
}

/// Addresses in the code caches.
#[derive(Debug, Default)]
struct Known {
    entries: BTreeSet<u64>,
    links: BTreeSet<u64>,
}

impl Verifier {
    /// A verifier that has seen nothing.
    pub fn new() -> Verifier {
        Verifier::default()
    }

    /// Blocks proven so far.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    /// Jumps from block to block judged so far.
    pub fn links(&self) -> u64 {
        self.links.load(Ordering::Relaxed)
    }

    /// What was proven of all blocks together.
    pub fn proof(&self) -> Proof {
        Proof {
            instructions: self.instructions.load(Ordering::Relaxed),
            context: self.context.load(Ordering::Relaxed),
            checked: self.checked.load(Ordering::Relaxed),
        }
    }
}

impl Inspect for Verifier {
    fn block(&self, layout: &Layout, block: &Emitted<'_>) -> Result<(), String> {
        let proof = verify(layout, block)?;
        self.blocks.fetch_add(1, Ordering::Relaxed);
        for (sum, part) in [
            (&self.instructions, proof.instructions),
            (&self.context, proof.context),
            (&self.checked, proof.checked),
        ] {
            sum.fetch_add(part, Ordering::Relaxed);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let links = block.links.iter();
        let links: Vec<u64> = links
            .map(|link| block.address + u64::from(link.0))
            .collect();
        // Space is handed out upwards: what was known of this place and of those above it is gone.
        let range = block.address..layout.cache.1.max(block.address);
        let Known {
            entries,
            links: places,
        } = &mut *known;
        for set in [entries, places] {
            if set.range(range.clone()).next().is_some() {
                set.retain(|address| !range.contains(address));
            }
        }
        known.entries.insert(block.address);
        known.links.extend(links);
        Ok(())
    }

    fn connected(&self, _: &Layout, at: u64, target: u64) -> Result<(), String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.links.contains(&at) {
            return Err(format!("{at:#x} is no place of a jump"));
        }
        if !known.entries.contains(&target) {
            return Err(format!("{target:#x} is no block's entry"));
        }
        self.links.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
