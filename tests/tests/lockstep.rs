//! The translator and its reference configuration agree, block exit by block exit, while Debian's kernel boots.

use std::time::Duration;

use strata_tests::{Need, Strata, ready, shared};

/// Steps to compare: the kernel's first seconds. The whole boot is the campaign `lockstep`.
const STEPS: u64 = 12_000_000;

#[test]
fn the_kernel_boots_in_lock_step_with_the_reference() {
    if !ready(Need::Machine) {
        return;
    }
    let (kernel, initrd) = shared().tiny_files();
    let run = Strata::new()
        .args(["run", "--print-stats", "--memory", "256M"])
        .args([format!("--lockstep={STEPS}")])
        .args(["--kernel".into(), kernel.into_os_string()])
        .args(["--initrd".into(), initrd.into_os_string()])
        .args([
            "--append",
            "console=ttyS0 quiet cryptomgr.notests strata.run=/bin/true",
        ])
        .timeout(Duration::from_secs(240))
        .run()
        .expect(0);
    let compared = run.stats()["vcpus"][0]["compared-exits"]
        .as_u64()
        .expect("exits are counted");
    assert!(
        compared > STEPS / 20,
        "only {compared} block exits were compared"
    );
}
