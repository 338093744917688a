//! Building what runs in guests, the program itself, and finding the kernel of an image.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// Static and for the host's own target: no second Rust target is needed.
const STATIC: &str = "-C target-feature=+crt-static -C relocation-model=static";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds a guest program as one static file; returns its path.
pub fn build(package: &str) -> Result<PathBuf> {
    // In a directory of its own: other flags would make Cargo build everything anew, back and forth.
    let directory = shell::target_dir().join("guest");
    let mut command = shell::cargo();
    command.args([
        "build",
        "--quiet",
        "--release",
        "--target",
        TARGET,
        "--package",
        package,
        "--target-dir",
    ]);
    shell::run(
        command
            .arg(&directory)
            .env("RUSTFLAGS", STATIC)
            .env("CARGO_PROFILE_RELEASE_STRIP", "true"),
    )?;
    Ok(directory.join(TARGET).join("release").join(package))
}

/// Builds `strata` as it is meant to be used; returns its path.
pub fn build_strata() -> Result<PathBuf> {
    shell::run(shell::cargo().args(["build", "--package", "strata", "--release"]))?;
    Ok(shell::target_dir().join("release/strata"))
}

/// Builds the image `tiny` with `strata`, unless it is there.
pub fn build_tiny(strata: &Path) -> Result<()> {
    if tiny_manifest()?.is_file() {
        return Ok(());
    }
    if strata.as_os_str().is_empty() {
        bail!(
            "the image `tiny` is not built yet: type `strata image build tiny`, or give a --kernel"
        );
    }
    shell::run(shell::command(strata).args(["image", "build", "tiny"]))
}

/// The kernel of the image `tiny`.
pub fn tiny_kernel(strata: &Path) -> Result<PathBuf> {
    tiny_part(strata, "kernel")
}

/// The RAM disk of the image `tiny`.
pub fn tiny_initrd(strata: &Path) -> Result<PathBuf> {
    tiny_part(strata, "initrd")
}

fn tiny_part(strata: &Path, part: &str) -> Result<PathBuf> {
    build_tiny(strata)?;
    let manifest = tiny_manifest()?;
    let text = fs::read_to_string(&manifest)
        .with_context(|| format!("cannot read {}", manifest.display()))?;
    let value: Value = serde_json::from_str(&text)
        .with_context(|| format!("cannot understand {}", manifest.display()))?;
    let digest = value[part]["sha256"]
        .as_str()
        .with_context(|| format!("{} names no {part}", manifest.display()))?;
    Ok(cache()?.join("blobs/sha256").join(digest))
}

fn tiny_manifest() -> Result<PathBuf> {
    Ok(cache()?.join("images/tiny.json"))
}

/// Where `strata` keeps images.
pub fn cache() -> Result<PathBuf> {
    let variable = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("STRATA_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|path| path.join("strata")))
        .or_else(|| variable("HOME").map(|path| path.join(".cache/strata")))
        .context("HOME is not set, so there is no place for images: set STRATA_CACHE")
}
