//! Developer commands of the house: test, demo, bench, campaign, tidy.
fn main() {}
