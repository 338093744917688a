//! The guest suite: small freestanding guests that print what their CPU does, the same on every engine.
//!
//! One image holds all of them; the first word of its command line says which one runs. Each prints a line per check,
//! `name value`, with what the manuals say where that differs, and ends through the port of `isa-debug-exit`. The
//! program that Cargo builds runs on the host: it lists the guests or writes the image, which `build.rs` compiles from
//! `kernel`.
#![cfg_attr(guest, no_std, no_main)]

mod guests;
#[cfg(any(guest, clippy))]
mod kernel;

#[cfg(not(guest))]
fn main() -> std::io::Result<()> {
    static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/suite"));
    match std::env::args_os().nth(1) {
        Some(path) => std::fs::write(path, IMAGE),
        None => {
            for (name, cpus) in guests::GUESTS {
                println!("{name} {cpus}");
            }
            Ok(())
        }
    }
}
