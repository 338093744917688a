//! Bootable images: recipes that make them from Debian packages, and the cache that keeps them.
//!
//! A [`Store`] is a directory. [`Store::build`] follows a recipe: apt fetches and verifies packages in a root of our own
//! (nothing is installed on the host, no privilege is needed), the kernel and the files the recipe names are taken out of
//! them, and a RAM disk is written with our init in it. An image with a root disk is finished by a machine, which
//! somebody else runs for us ([`Workshop`]): it makes the file system, unpacks what was laid out for it, and configures
//! the packages. [`Store::get`] gives the paths of a verified image, fast enough for every start. This crate never runs a
//! machine by itself and never writes to an image once it is there.

mod apt;
mod cpio;
mod digest;
mod error;
mod factory;
mod kmod;
mod layout;
mod maker;
mod order;
mod package;
mod progress;
mod recipe;
mod sources;
mod store;
mod tar;
mod workshop;

pub use cpio::keep_in_run;
pub use error::ImageError;
pub use order::Order;
pub use progress::{Phase, Progress, Quiet};
pub use recipe::Recipe;
pub use store::{Blob, Image, MANIFEST_VERSION, Manifest, Store};
pub use workshop::{Job, NoWorkshop, Workshop};
