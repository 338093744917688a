//! Guest benchmark: classes of guest workload, each timed by its own clock and verified by a checksum.
fn main() {}
