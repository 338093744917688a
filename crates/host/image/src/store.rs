//! The image cache: a content-addressed store on disk.
//!
//! ```text
//! ROOT/images/NAME.json      manifest: digests, kernel release, command line
//! ROOT/blobs/sha256/HEX      kernels and RAM disks, never changed once there
//! ROOT/verified/HEX          size, times and inode of a blob when its digest was last computed
//! ROOT/apt/RELEASE/          the apt root builds fetch with
//! ROOT/tmp/                  builds under way; whatever a dead one left goes with the next
//! ROOT/lock                  held while something is built or removed
//! ```
//!
//! Everything appears by rename, after its contents are on disk, so that a build cut short at any point leaves the cache
//! as it was. Readers need no lock.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::apt::Apt;
use crate::error::ImageError;
use crate::maker::{self, Made};
use crate::progress::{Phase, Progress};
use crate::recipe::Recipe;

/// The version of [`Manifest`] this code writes.
pub const MANIFEST_VERSION: u32 = 1;

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256 of the contents, lower-case hexadecimal.
    pub sha256: String,
    /// Length in bytes.
    pub size: u64,
}

/// What an image is. Written beside its blobs; the form is versioned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] when written.
    pub version: u32,
    /// The name it is run by.
    pub name: String,
    /// What it was made with: differs when a build now would differ.
    pub fingerprint: String,
    /// What the recipe says of it.
    pub about: String,
    /// When it was built, in seconds since 1970.
    pub created_unix_s: u64,
    /// What `uname -r` says in it.
    pub kernel_release: String,
    /// Kernel command line of a machine that says nothing of its own.
    pub command_line: String,
    /// The packages it was made from, as `name_version_architecture`.
    pub packages: Vec<String>,
    /// A bzImage.
    pub kernel: Blob,
    /// A cpio archive.
    pub initrd: Blob,
}

/// An image in the cache, ready to run.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it is.
    pub manifest: Manifest,
    /// The kernel's file. Never write to it.
    pub kernel: PathBuf,
    /// The RAM disk's file. Never write to it.
    pub initrd: PathBuf,
}

impl Image {
    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        self.manifest.kernel.size + self.manifest.initrd.size
    }

    /// Whether this version of Strata would build the same: false after its recipe or init has changed.
    pub fn is_current(&self) -> bool {
        Recipe::get(&self.manifest.name)
            .is_ok_and(|recipe| maker::fingerprint(&recipe) == self.manifest.fingerprint)
    }
}

/// An image cache.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Where images are kept: `$STRATA_CACHE`, or `strata` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub fn default_root() -> Result<PathBuf, ImageError> {
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|value: &OsString| !value.is_empty())
                .map(PathBuf::from)
        };
        variable("STRATA_CACHE")
            .or_else(|| {
                variable("XDG_CACHE_HOME")
                    .filter(|path| path.is_absolute())
                    .map(|path| path.join("strata"))
            })
            .or_else(|| variable("HOME").map(|home| home.join(".cache/strata")))
            .ok_or(ImageError::NoCacheRoot)
    }

    /// Opens the cache at `root`. Nothing is written before something is built.
    pub fn open(root: impl Into<PathBuf>) -> Result<Store, ImageError> {
        let root = root.into();
        let root = std::path::absolute(&root).map_err(ImageError::io(root))?;
        Ok(Store { root })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The manifests of all images, by name. Unreadable ones are left out; [`Store::get`] says what is wrong with them.
    pub fn list(&self) -> Result<Vec<Manifest>, ImageError> {
        let directory = self.root.join("images");
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ImageError::io(directory)(error)),
        };
        let name = |entry: fs::DirEntry| {
            Some(
                entry
                    .file_name()
                    .to_str()?
                    .strip_suffix(".json")?
                    .to_owned(),
            )
        };
        let mut names: Vec<String> = entries.flatten().filter_map(name).collect();
        names.sort();
        Ok(names
            .iter()
            .filter_map(|name| self.manifest(name).ok())
            .collect())
    }

    /// An image, with its blobs verified.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        let manifest = self.manifest(name)?;
        for (part, blob) in [("kernel", &manifest.kernel), ("initrd", &manifest.initrd)] {
            if !self.verify(blob) {
                return Err(ImageError::Damaged {
                    name: name.to_owned(),
                    part,
                });
            }
        }
        let (kernel, initrd) = (
            self.blob_path(&manifest.kernel.sha256),
            self.blob_path(&manifest.initrd.sha256),
        );
        Ok(Image {
            manifest,
            kernel,
            initrd,
        })
    }

    /// Removes an image, and the blobs no other image has. Machines that run it keep what they have open.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let path = self.manifest_path(name)?;
        if !path.exists() {
            return Err(ImageError::NotFound(name.to_owned()));
        }
        let _lock = self.lock(&crate::progress::Quiet)?;
        fs::remove_file(&path).map_err(ImageError::io(&path))?;
        self.remove_unused_blobs()
    }

    /// Builds an image by its recipe, in place of any earlier one of that name.
    ///
    /// Waits while another process builds. Takes the network only if the packages are not in the cache already.
    pub fn build(&self, name: &str, progress: &dyn Progress) -> Result<Image, ImageError> {
        self.build_unless(name, progress, || None)
    }

    /// Builds an image unless there is one after all once the lock is held.
    fn build_unless(
        &self,
        name: &str,
        progress: &dyn Progress,
        found: impl Fn() -> Option<Image>,
    ) -> Result<Image, ImageError> {
        let path = self.manifest_path(name)?;
        let recipe = Recipe::get(name)?;
        let lock = self.lock(progress)?;
        if let Some(image) = found() {
            return Ok(image);
        }
        let apt = Apt::prepare(
            &self.directory("apt")?.join(&recipe.release),
            &recipe.release,
            lock,
        )?;
        let made = maker::make(&recipe, &apt, progress)?;
        progress.phase(Phase::Write);
        self.install(name, &path, &recipe, made)
    }

    /// Puts a finished image in the cache. Needs the lock.
    fn install(
        &self,
        name: &str,
        path: &Path,
        recipe: &Recipe,
        made: Made,
    ) -> Result<Image, ImageError> {
        let temporary = self.directory("tmp")?;
        let work = tempfile::tempdir_in(&temporary).map_err(ImageError::io(&temporary))?;
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            name: name.to_owned(),
            fingerprint: maker::fingerprint(recipe),
            about: recipe.about.clone(),
            created_unix_s: std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |age| age.as_secs()),
            kernel_release: made.kernel_release,
            command_line: recipe.command_line.clone(),
            packages: made.packages,
            kernel: self.add_blob(work.path(), &made.kernel)?,
            initrd: self.add_blob(work.path(), &made.initrd)?,
        };
        let mut text =
            serde_json::to_vec_pretty(&manifest).map_err(|source| ImageError::BadManifest {
                name: name.to_owned(),
                source,
            })?;
        text.push(b'\n');
        self.directory("images")?;
        publish(work.path(), &text, path)?;
        self.remove_unused_blobs()?;
        self.get(name)
    }

    /// The image, built first if it is missing, damaged, or of an earlier recipe.
    pub fn get_or_build(&self, name: &str, progress: &dyn Progress) -> Result<Image, ImageError> {
        let usable = || {
            self.get(name)
                .map(|image| image.is_current().then_some(image))
        };
        match usable() {
            Ok(Some(image)) => Ok(image),
            Ok(None)
            | Err(
                ImageError::NotFound(_)
                | ImageError::Damaged { .. }
                | ImageError::BadManifest { .. },
            ) => self.build_unless(name, progress, || usable().ok().flatten()),
            Err(error) => Err(error),
        }
    }

    fn manifest(&self, name: &str) -> Result<Manifest, ImageError> {
        let path = self.manifest_path(name)?;
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::NotFound(name.to_owned()));
            }
            Err(error) => return Err(ImageError::io(path)(error)),
        };
        let bad = |source| ImageError::BadManifest {
            name: name.to_owned(),
            source,
        };
        // The version alone first: a later form may not parse as ours.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(&text).map_err(bad)?;
        if version > MANIFEST_VERSION {
            return Err(ImageError::LaterManifest {
                name: name.to_owned(),
                version,
            });
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(bad)?;
        let digest = |blob: &Blob| {
            blob.sha256.len() == 64 && blob.sha256.bytes().all(|b| b.is_ascii_hexdigit())
        };
        if !digest(&manifest.kernel) || !digest(&manifest.initrd) {
            return Err(bad(serde::de::Error::custom("a digest is not one")));
        }
        Ok(manifest)
    }

    /// Whether a blob is what its name says. The digest is computed once; after that, a file with the same size, times
    /// and inode is taken to be the same (the change time cannot be set by ordinary means).
    fn verify(&self, blob: &Blob) -> bool {
        let path = self.blob_path(&blob.sha256);
        let Ok(data) = fs::metadata(&path) else {
            return false;
        };
        if data.len() != blob.size {
            return false;
        }
        let state = format!(
            "{} {}.{:09} {}.{:09} {}\n",
            data.len(),
            data.mtime(),
            data.mtime_nsec(),
            data.ctime(),
            data.ctime_nsec(),
            data.ino()
        );
        let stamp = self.root.join("verified").join(&blob.sha256);
        if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == state) {
            return true;
        }
        if digest_of_file(&path).ok().as_deref() != Some(&blob.sha256) {
            return false;
        }
        // A cache that may only be read costs the time to verify again.
        let _ = self
            .directory("verified")
            .and_then(|directory| publish(&directory, state.as_bytes(), &stamp));
        true
    }

    fn add_blob(&self, work: &Path, data: &[u8]) -> Result<Blob, ImageError> {
        let blob = Blob {
            sha256: hex(&Sha256::digest(data)),
            size: data.len() as u64,
        };
        self.directory("blobs/sha256")?;
        let path = self.blob_path(&blob.sha256);
        publish(work, data, &path)?;
        // What was written is read back once, so that the first start finds it verified.
        if self.verify(&blob) {
            Ok(blob)
        } else {
            Err(ImageError::io(path)(io::ErrorKind::InvalidData.into()))
        }
    }

    /// Needs the lock.
    fn remove_unused_blobs(&self) -> Result<(), ImageError> {
        let images = self.list()?;
        let used = |name: &str| {
            images
                .iter()
                .any(|image| image.kernel.sha256 == name || image.initrd.sha256 == name)
        };
        for directory in [self.root.join("blobs/sha256"), self.root.join("verified")] {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if !entry.file_name().to_str().is_some_and(used) {
                    let path = entry.path();
                    fs::remove_file(&path).map_err(ImageError::io(path))?;
                }
            }
        }
        Ok(())
    }

    /// Waits for the lock and clears what dead builds left. The lock ends with the value, or with the process.
    fn lock(&self, progress: &dyn Progress) -> Result<File, ImageError> {
        let path = self.root.join("lock");
        let open = || {
            fs::create_dir_all(&self.root)?;
            File::options().create(true).append(true).open(&path)
        };
        let lock = open().map_err(|source| ImageError::CacheRoot {
            path: self.root.clone(),
            source,
        })?;
        if lock.try_lock().is_err() {
            progress.phase(Phase::Waiting);
            lock.lock().map_err(ImageError::io(&path))?;
        }
        let temporary = self.root.join("tmp");
        for entry in fs::read_dir(&temporary).into_iter().flatten().flatten() {
            let path = entry.path();
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(ImageError::io(path))?;
        }
        Ok(lock)
    }

    fn directory(&self, name: &str) -> Result<PathBuf, ImageError> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(ImageError::io(&path))?;
        Ok(path)
    }

    fn manifest_path(&self, name: &str) -> Result<PathBuf, ImageError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let good = name.len() <= 64
            && name.bytes().next().is_some_and(plain)
            && name
                .bytes()
                .all(|byte| plain(byte) || b"._-".contains(&byte));
        if good {
            Ok(self.root.join("images").join(format!("{name}.json")))
        } else {
            Err(ImageError::BadName(name.to_owned()))
        }
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.root.join("blobs/sha256").join(digest)
    }
}

/// Writes `data` in `work`, makes sure it is on disk, and moves it to `path`, all or nothing.
fn publish(work: &Path, data: &[u8], path: &Path) -> Result<(), ImageError> {
    let write = || -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(work)?;
        file.write_all(data)?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        file.as_file().set_permissions(permissions)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        path.parent()
            .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    };
    write().map_err(ImageError::io(path))
}

fn digest_of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
