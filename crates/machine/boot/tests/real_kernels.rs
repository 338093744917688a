//! Plans for real kernel files, named by the environment variable `STRATA_TEST_KERNELS` (paths separated by colons).

use std::time::Instant;

use strata_boot::{BootRequest, BzImageMode, Platform, plan};
use strata_memory::Layout;

#[test]
fn real_kernels_are_planned() {
    let Some(paths) = std::env::var_os("STRATA_TEST_KERNELS") else {
        println!("skipped: STRATA_TEST_KERNELS names no kernels");
        return;
    };
    let layout = Layout::new(512 << 20, 512 << 20).unwrap();
    for path in std::env::split_paths(&paths) {
        let kernel = std::fs::read(&path).unwrap();
        for bzimage in [BzImageMode::Unpack, BzImageMode::Guest] {
            let request = BootRequest {
                kernel: &kernel,
                unpacked: None,
                initrd: Some(b"not really an initrd"),
                cmdline: "console=ttyS0",
                layout: &layout,
                cpus: 1,
                platform: Platform::default(),
                bzimage,
                rng_seed: Some([7; 32]),
            };
            let start = Instant::now();
            let plan = plan(&request).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            println!(
                "{} {bzimage:?}: {:?} in {:?}",
                path.display(),
                plan.protocol,
                start.elapsed()
            );
            for segment in &plan.segments {
                println!(
                    "  {} +{:#x} {:?} {}",
                    segment.gpa, segment.mem_size, segment.bytes, segment.what
                );
            }
            println!("  {:x?}", plan.entry);
        }
    }
}
