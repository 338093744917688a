//! What can go wrong with images, said so that the reader knows what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Failure of an operation on the image cache.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A name that cannot be an image's.
    #[error(
        "'{0}' is not an image name: use lower-case letters, digits, '.', '_' and '-', starting with a letter or digit"
    )]
    BadName(String),
    /// No image of this name in the cache.
    #[error("there is no image '{0}' here")]
    NotFound(String),
    /// No recipe of this name.
    #[error("there is no recipe for an image '{name}' (there are: {known})")]
    NoRecipe {
        /// What was asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The environment names no place for the cache.
    #[error("no place for the image cache: set STRATA_CACHE to a directory you may write to")]
    NoCacheRoot,
    /// The cache's directory cannot be made or written to.
    #[error("cannot keep images in {}: {source}; set STRATA_CACHE to a directory you may write to", path.display())]
    CacheRoot {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A manifest that this version cannot read.
    #[error(
        "the image '{name}' cannot be read; remove it with 'strata image rm {name}' and build it again"
    )]
    BadManifest {
        /// The image.
        name: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A manifest of a later format.
    #[error(
        "the image '{name}' was written by a later version of Strata (manifest version {version})"
    )]
    LaterManifest {
        /// The image.
        name: String,
        /// The version it has.
        version: u32,
    },
    /// A blob that is not what it was when it was built.
    #[error(
        "the {part} of image '{name}' is damaged or missing; build it again with 'strata image build {name}'"
    )]
    Damaged {
        /// The image.
        name: String,
        /// "kernel", "initrd" or "disk".
        part: &'static str,
    },
    /// A program of the host is missing.
    #[error(
        "'{program}' is not installed, and images are made from Debian packages with it: run 'sudo apt-get install {package}', or build the image on a Debian or Ubuntu machine"
    )]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// The keys that verify the archive are missing.
    #[error(
        "the keys of Debian's archive are not installed: run 'sudo apt-get install debian-archive-keyring'"
    )]
    MissingKeyring,
    /// The mirror cannot be reached.
    #[error(
        "cannot fetch Debian packages: {detail}; check the network, the proxy settings and /etc/apt/sources.list*"
    )]
    Network {
        /// apt's first error.
        detail: String,
    },
    /// The archive's signature or a checksum does not hold.
    #[error("Debian packages could not be verified, nothing was used: {detail}")]
    Untrusted {
        /// apt's first error.
        detail: String,
    },
    /// A package that the archive does not have.
    #[error("there is no package '{name}' in Debian")]
    NoPackage {
        /// What was asked for.
        name: String,
    },
    /// A text that cannot be a package's name.
    #[error(
        "'{0}' is not a package name: use lower-case letters, digits, '+', '-' and '.', starting with a letter or digit"
    )]
    BadPackageName(String),
    /// A text that cannot be a mirror's address.
    #[error("'{0}' is not the address of a mirror: write it like http://deb.debian.org/debian")]
    BadMirror(String),
    /// A size that no root disk can have.
    #[error(
        "a root disk of {asked} MiB cannot hold the image: it needs at least {least} MiB, and at most {most} MiB"
    )]
    BadSize {
        /// What was asked for, in MiB.
        asked: u64,
        /// The least that works, in MiB.
        least: u64,
        /// The most that works, in MiB.
        most: u64,
    },
    /// An option that an image without a root disk has no use for.
    #[error("the image '{base}' has no root disk, so '{option}' means nothing for it")]
    NoRootDisk {
        /// What it is made from.
        base: String,
        /// The option.
        option: &'static str,
    },
    /// The name of a recipe for something else.
    #[error("'{0}' is the name of an image of its own: choose another name")]
    Reserved(String),
    /// The machine that builds a disk did not finish.
    #[error("the machine that builds the image failed: {detail}")]
    Workshop {
        /// What it said last.
        detail: String,
    },
    /// A program of the host failed in another way.
    #[error("{program} failed: {detail}")]
    Tool {
        /// The program.
        program: &'static str,
        /// Its first error.
        detail: String,
    },
    /// A package is not made the way the recipe expects.
    #[error("package {package}: {detail}")]
    Package {
        /// The package.
        package: String,
        /// What is wrong.
        detail: String,
    },
    /// A file operation failed.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ImageError {
    /// For `map_err`: a failed operation on `path`.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> ImageError {
        move |source| ImageError::Io {
            path: path.as_ref().to_owned(),
            source,
        }
    }

    /// A package that is not as expected.
    pub(crate) fn package(package: &str, detail: impl Into<String>) -> ImageError {
        ImageError::Package {
            package: package.to_owned(),
            detail: detail.into(),
        }
    }
}
