//! Compiles the guests: the crate's own source once more, as a static image without a system below it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(guest)");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=image.ld");
    let variable = |name| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let image = PathBuf::from(variable("OUT_DIR")).join("suite");
    let script = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("image.ld");
    // For the host's own target, whose `core` is always there. No red zone: interrupts use the stack that they find.
    let status = Command::new(variable("RUSTC"))
        .args(["--crate-name", "suite", "--crate-type", "bin"])
        .args(["--edition", "2024", "--cfg", "guest"])
        .args(["--target", &variable("HOST")])
        // One unit: assembly here names assembly there.
        .args(["-C", "opt-level=1", "-C", "codegen-units=1"])
        .args(["-C", "panic=abort", "-A", "dead_code"])
        .args(["-C", "no-redzone=yes", "-C", "strip=symbols"])
        .args(["-C", "relocation-model=static", "-C", "target-cpu=x86-64"])
        .args(["-C", "link-arg=-nostdlib", "-C", "link-arg=-static"])
        .args(["-C", "link-arg=-Wl,--build-id=none"])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&image)
        .arg("src/main.rs")
        .status();
    match status {
        Ok(status) if status.success() => {}
        other => panic!("the guests cannot be compiled: {other:?}"),
    }
}
