//! Builds the guest's static init, so that an installed `strata` can make images by itself.
//!
//! The nested cargo has a target directory of its own: it cannot wait for the lock the outer one holds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Static, at a fixed address (no relocations to process at start), for the host's own target: no second Rust target.
const RUSTFLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the init is made from, relative to the workspace.
const SOURCES: [&str; 4] = [
    "guest/init/src",
    "guest/init/Cargo.toml",
    "crates/machine/agent/src",
    "crates/machine/agent/Cargo.toml",
];

/// How the outer cargo reaches its registry and toolchain.
const KEPT: [&str; 6] = [
    "CARGO_HOME",
    "CARGO_HTTP_",
    "CARGO_NET_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "RUSTUP_",
];

fn main() {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = here
        .ancestors()
        .nth(3)
        .expect("this crate lies three levels below the workspace");
    for source in SOURCES {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(source).display()
        );
    }
    println!("cargo::rerun-if-changed=build.rs");
    let init = build_init(workspace, &PathBuf::from(variable("OUT_DIR")));
    println!("cargo::rustc-env=STRATA_INIT={}", init.display());
    println!("cargo::rustc-env=STRATA_INIT_HASH={:016x}", hash(&init));
}

/// FNV-1a of a file: here and not at run time, where it would be part of every start. Nobody gains from a collision.
fn hash(path: &Path) -> u64 {
    let contents = std::fs::read(path).expect("cargo has built the init");
    contents.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn build_init(workspace: &Path, out: &Path) -> PathBuf {
    let target_dir = out.join("guest");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(workspace).args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "strata-init",
        "--target",
        TARGET,
    ]);
    cargo.arg("--target-dir").arg(&target_dir);
    // The outer cargo's settings are for the host's program: wrappers such as clippy's, coverage flags, profiles.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let foreign = ["CARGO", "RUST", "CLIPPY"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if foreign && !KEPT.iter().any(|prefix| name.starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo.env("RUSTFLAGS", RUSTFLAGS);
    for (setting, value) in [
        ("OPT_LEVEL", "s"),
        ("LTO", "true"),
        ("CODEGEN_UNITS", "1"),
        ("PANIC", "abort"),
        ("STRIP", "true"),
        ("DEBUG", "false"),
    ] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    let status = cargo.status().expect("cargo starts");
    assert!(
        status.success(),
        "the guest's init does not build: {cargo:?}"
    );
    target_dir.join(TARGET).join("release/strata-init")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"))
}
