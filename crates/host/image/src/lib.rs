//! Bootable images: recipes that make them from Debian packages, and the cache that keeps them.
//!
//! A [`Store`] is a directory. [`Store::build`] follows a recipe: apt fetches and verifies packages in a root of our own
//! (nothing is installed on the host, no privilege is needed), the kernel and the files the recipe names are taken out of
//! them, and a RAM disk is written with our init in it. [`Store::get`] gives the paths of a verified image, fast enough
//! for every start. This crate never runs a machine and never writes to an image once it is there.

mod apt;
mod cpio;
mod error;
mod kmod;
mod maker;
mod progress;
mod recipe;
mod sources;
mod store;
mod tar;

pub use error::ImageError;
pub use progress::{Phase, Progress, Quiet};
pub use recipe::Recipe;
pub use store::{Blob, Image, MANIFEST_VERSION, Manifest, Store};
