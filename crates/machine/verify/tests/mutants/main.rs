//! Seeded faulty translations: every mutant of a real block that changes what it may touch must be refused.
//!
//! A mutant is made by a rule that says why it is one: each rule below takes away or changes something without which
//! the block could leave its guest. Changes that are *equivalent* are not made by them, and those are: a check that is
//! stricter than its operand asks for (a larger access, the tag for stores of a load), a miss where there was a hit
//! (only slower), another field of the context that blocks may use anyway (the guest computes something else, inside
//! its own registers), a jump to another instruction where the same checks hold, and other arithmetic on the guest's
//! own values. The second test makes some of these and sees that they pass: the verifier does not refuse everything.

mod flow;
mod guest;
mod mutate;

use std::collections::BTreeMap;

use mutate::{Mutant, equivalents, mutants};
use strata_verify::{Inspect, Verifier};

/// Of the mutants of a block, one in so many is judged, each block's others.
const STRIDE: usize = 3;

#[test]
fn every_mutant_that_could_leave_the_guest_is_refused() {
    let mut rules: BTreeMap<&str, u64> = BTreeMap::new();
    let mut missed = Vec::new();
    for (n, block) in guest::blocks().iter().enumerate() {
        block
            .judge(&block.code, &block.links)
            .expect("the block itself");
        for Mutant {
            rule,
            code,
            links,
            what,
        } in mutants(block).into_iter().skip(n % STRIDE).step_by(STRIDE)
        {
            *rules.entry(rule).or_default() += 1;
            if block.judge(&code, &links).is_ok() {
                missed.push(format!("{rule}: {what}"));
            }
        }
    }
    let total: u64 = rules.values().sum();
    println!("{total} mutants by {} rules: {rules:#?}", rules.len());
    assert!(
        missed.is_empty(),
        "{} of {total} mutants pass:\n{}",
        missed.len(),
        missed.join("\n")
    );
    assert!(total >= 1000, "only {total} mutants");
    assert!(rules.len() >= 40, "only {} rules", rules.len());
}

#[test]
fn equivalent_mutants_pass() {
    let mut passed = 0;
    for block in guest::blocks() {
        for Mutant {
            rule,
            code,
            links,
            what,
        } in equivalents(&block)
        {
            if let Err(why) = block.judge(&code, &links) {
                panic!("{rule}: {what}: {why}");
            }
            passed += 1;
        }
    }
    assert!(passed >= 100, "only {passed} equivalent mutants");
}

#[test]
fn jumps_are_pointed_at_entries_alone() {
    let blocks = guest::blocks();
    let cache = blocks[0].layout.cache;
    // Those of the first vCPU: the cache of the next one may be where this one's was.
    let mut next = 0;
    let first = blocks.iter().take_while(|block| {
        let goes_on = block.layout.cache == cache && block.address >= next;
        next = block.address + 1;
        goes_on
    });
    let blocks: Vec<_> = first.collect();
    let verifier = Verifier::new();
    for block in &blocks {
        block.show(&verifier).expect("the block itself");
    }
    let linked = |block: &&&guest::Block| !block.links.is_empty();
    let from = blocks.iter().find(linked).expect("some block has a link");
    let (layout, place) = (&from.layout, from.address + u64::from(from.links[0].0));
    let target = blocks[1].address;
    verifier.connected(layout, place, target).expect("an entry");
    for (place, target) in [(place + 1, target), (from.address, target)] {
        assert!(verifier.connected(layout, place, target).is_err());
    }
    for wrong in [target + 1, cache.0, cache.1, layout.stubs.slow] {
        assert!(verifier.connected(layout, place, wrong).is_err());
    }
    // The cache was emptied and its first block made again: those behind it are no more.
    blocks[0].show(&verifier).expect("the block itself");
    assert!(verifier.connected(layout, place, target).is_err());
}
