//! The image cache: a content-addressed store on disk.
//!
//! ```text
//! ROOT/images/NAME.json      manifest: digests, kernel release, command line
//! ROOT/blobs/sha256/HEX      kernels (packed and unpacked), RAM disks and root disks, never changed once there
//! ROOT/verified/HEX          size, times and inode of a blob when its digest was last computed
//! ROOT/apt/RELEASE…/         the apt roots builds fetch with, one per mirror that was asked for
//! ROOT/tmp/                  builds under way; whatever a dead one left goes with the next
//! ROOT/lock                  held while something is built or removed
//! ```
//!
//! Everything appears by rename, after its contents are on disk, so that a build cut short at any point leaves the cache
//! as it was. Readers need no lock.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::Apt;
use crate::digest;
use crate::error::ImageError;
use crate::factory;
use crate::maker::{self, Made};
use crate::order::Order;
use crate::progress::{Phase, Progress};
use crate::recipe::Recipe;
use crate::workshop::Workshop;

/// The version of [`Manifest`] this code writes.
pub const MANIFEST_VERSION: u32 = 2;

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256 in lower-case hexadecimal: of the contents, or of a disk, of its blocks that are not all zeros.
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
    /// The ELF file inside it, so that no start has to unpack it; none if it is packed in a way that only the guest knows.
    #[serde(default)]
    pub unpacked: Option<Blob>,
    /// A cpio archive.
    pub initrd: Blob,
    /// A raw root disk, with holes where there is nothing.
    #[serde(default)]
    pub disk: Option<Blob>,
    /// Memory in MiB of a machine that says nothing of its own.
    #[serde(default)]
    pub memory_mib: Option<u32>,
    /// What was asked for; images from before there were choices are those of the recipe of their name.
    #[serde(default)]
    pub order: Option<Order>,
}

impl Manifest {
    /// The recipe it was made by.
    pub fn recipe(&self) -> &str {
        self.order.as_ref().map_or(&self.name, |order| &order.from)
    }

    /// Whether somebody made it, under a name of their own.
    pub fn is_own(&self) -> bool {
        self.name != self.recipe()
    }

    /// Whether this version of Strata would build the same: false after its recipe or init has changed.
    pub fn is_current(&self) -> bool {
        Recipe::get(self.recipe())
            .is_ok_and(|recipe| maker::fingerprint(&recipe) == self.fingerprint)
    }

    fn blobs(&self) -> impl Iterator<Item = (Part, &Blob)> {
        let files = [(Part::Kernel, &self.kernel), (Part::Initrd, &self.initrd)];
        let unpacked = self.unpacked.as_ref().map(|blob| (Part::Unpacked, blob));
        let disk = self.disk.as_ref().map(|blob| (Part::Disk, blob));
        files.into_iter().chain(unpacked).chain(disk)
    }
}

/// Which file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Kernel,
    Unpacked,
    Initrd,
    Disk,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Kernel => "kernel",
            Part::Unpacked => "unpacked kernel",
            Part::Initrd => "initrd",
            Part::Disk => "disk",
        }
    }

    fn digest(self, path: &Path) -> io::Result<String> {
        match self {
            Part::Kernel | Part::Unpacked | Part::Initrd => digest::of_file(path),
            Part::Disk => digest::of_disk(path),
        }
    }
}

/// An image in the cache, ready to run.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it is.
    pub manifest: Manifest,
    /// The kernel's file. Never write to it.
    pub kernel: PathBuf,
    /// The file of the kernel unpacked, if it could be. Never write to it.
    pub unpacked: Option<PathBuf>,
    /// The RAM disk's file. Never write to it.
    pub initrd: PathBuf,
    /// The root disk's file, if it has one. Never write to it.
    pub disk: Option<PathBuf>,
}

impl Image {
    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        let on_disk = |path: &Path| fs::metadata(path).map_or(0, |data| data.blocks() * 512);
        let disk = self.disk.as_deref().map_or(0, on_disk);
        let unpacked = self.unpacked.as_deref().map_or(0, on_disk);
        self.manifest.kernel.size + unpacked + self.manifest.initrd.size + disk
    }

    /// Whether this version of Strata would build the same: false after its recipe or init has changed.
    pub fn is_current(&self) -> bool {
        self.manifest.is_current()
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

    fn names(&self) -> Result<Vec<String>, ImageError> {
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
        Ok(names)
    }

    /// The manifests of all images, by name. Unreadable ones are left out; [`Store::get`] says what is wrong with them.
    pub fn list(&self) -> Result<Vec<Manifest>, ImageError> {
        let names = self.names()?;
        Ok(names
            .iter()
            .filter_map(|name| self.manifest(name).ok())
            .collect())
    }

    /// An image, with its blobs verified.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        let manifest = self.manifest(name)?;
        for (part, blob) in manifest.blobs() {
            if !self.verify(part, blob) {
                return Err(ImageError::Damaged {
                    name: name.to_owned(),
                    part: part.name(),
                });
            }
        }
        let path = |blob: &Blob| self.blob_path(&blob.sha256);
        Ok(Image {
            kernel: path(&manifest.kernel),
            unpacked: manifest.unpacked.as_ref().map(path),
            initrd: path(&manifest.initrd),
            disk: manifest.disk.as_ref().map(path),
            manifest,
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

    /// Builds an image, in place of any earlier one of that name.
    ///
    /// Waits while another process builds. Takes the network only if the packages are not in the cache already.
    pub fn build(
        &self,
        name: &str,
        order: &Order,
        workshop: &dyn Workshop,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        self.build_unless(name, order, workshop, progress, || None)
    }

    /// Builds an image unless there is one after all once the lock is held.
    fn build_unless(
        &self,
        name: &str,
        order: &Order,
        workshop: &dyn Workshop,
        progress: &dyn Progress,
        found: impl Fn() -> Option<Image>,
    ) -> Result<Image, ImageError> {
        self.manifest_path(name)?;
        let recipe = Recipe::get(&order.from)?;
        order.check(name, &recipe)?;
        let lock = self.lock(progress)?;
        if let Some(image) = found() {
            return Ok(image);
        }
        let mirror = order.mirror.as_deref();
        let mut root = recipe.release.clone();
        if let Some(mirror) = mirror {
            let digest = digest::of_bytes(mirror.as_bytes());
            root.push_str(&format!("-{}", digest.get(..16).unwrap_or_default()));
        }
        let root = self.directory("apt")?.join(root);
        let apt = Apt::prepare(&root, &recipe.release, mirror, lock)?;
        let temporary = self.directory("tmp")?;
        let work = tempfile::tempdir_in(&temporary).map_err(ImageError::io(&temporary))?;
        let made = match &recipe.disk {
            Some(disk) => {
                factory::make(&recipe, disk, order, &apt, work.path(), workshop, progress)?
            }
            None => maker::make(&recipe, order, &apt, progress)?,
        };
        progress.phase(Phase::Write);
        self.install(name, order, &recipe, made, work.path())
    }

    /// Puts a finished image in the cache. Needs the lock.
    fn install(
        &self,
        name: &str,
        order: &Order,
        recipe: &Recipe,
        made: Made,
        work: &Path,
    ) -> Result<Image, ImageError> {
        let path = self.manifest_path(name)?;
        // A kernel that cannot be unpacked here unpacks itself.
        let unpacked = strata_boot::extract_vmlinux(&made.kernel).ok().flatten();
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            name: name.to_owned(),
            fingerprint: maker::fingerprint(recipe),
            about: recipe.about.clone(),
            created_unix_s: std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |age| age.as_secs()),
            kernel_release: made.kernel_release,
            command_line: made.command_line,
            packages: made.packages,
            kernel: self.add_blob(work, Part::Kernel, &made.kernel)?,
            unpacked: unpacked
                .map(|kernel| self.add_blob(work, Part::Unpacked, &kernel))
                .transpose()?,
            initrd: self.add_blob(work, Part::Initrd, &made.initrd)?,
            disk: made
                .disk
                .as_deref()
                .map(|disk| self.add_disk(disk))
                .transpose()?,
            memory_mib: match &recipe.disk {
                Some(disk) => Some(disk.memory_mib),
                None => memory_for(made.initrd.len()),
            },
            order: Some(order.clone()),
        };
        let mut text =
            serde_json::to_vec_pretty(&manifest).map_err(|source| ImageError::BadManifest {
                name: name.to_owned(),
                source,
            })?;
        text.push(b'\n');
        self.directory("images")?;
        publish(work, &text, &path)?;
        self.remove_unused_blobs()?;
        self.get(name)
    }

    /// The image, built first if it is missing, damaged, or of an earlier recipe. Images that somebody made under a name
    /// of their own are taken as they are.
    pub fn get_or_build(
        &self,
        name: &str,
        workshop: &dyn Workshop,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        let usable = || {
            self.get(name)
                .map(|image| (image.manifest.is_own() || image.is_current()).then_some(image))
        };
        let error = match usable() {
            Ok(Some(image)) => return Ok(image),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        let is_recipe = Recipe::get(name).is_ok();
        match error {
            Some(error @ (ImageError::Damaged { .. } | ImageError::BadManifest { .. }))
                if !is_recipe =>
            {
                Err(error)
            }
            None
            | Some(
                ImageError::NotFound(_)
                | ImageError::Damaged { .. }
                | ImageError::BadManifest { .. },
            ) => {
                let order = Order::plain(name);
                self.build_unless(name, &order, workshop, progress, || usable().ok().flatten())
            }
            Some(error) => Err(error),
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
        if !manifest.blobs().all(|(_, blob)| digest(blob)) {
            return Err(bad(serde::de::Error::custom("a digest is not one")));
        }
        Ok(manifest)
    }

    /// Whether a blob is what its name says. The digest is computed once; after that, a file with the same size, times
    /// and inode is taken to be the same (the change time cannot be set by ordinary means).
    fn verify(&self, part: Part, blob: &Blob) -> bool {
        let path = self.blob_path(&blob.sha256);
        let Ok(data) = fs::metadata(&path) else {
            return false;
        };
        if data.len() != blob.size {
            return false;
        }
        let state = file_state(&data);
        let stamp = self.root.join("verified").join(&blob.sha256);
        if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == state) {
            return true;
        }
        if part.digest(&path).ok().as_deref() != Some(&blob.sha256) {
            return false;
        }
        self.note_verified(blob);
        true
    }

    /// A cache that may only be read costs the time to verify again.
    fn note_verified(&self, blob: &Blob) {
        let note = || {
            let data = fs::metadata(self.blob_path(&blob.sha256)).ok()?;
            let directory = self.directory("verified").ok()?;
            let stamp = directory.join(&blob.sha256);
            publish(&directory, file_state(&data).as_bytes(), &stamp).ok()
        };
        let _: Option<()> = note();
    }

    fn add_blob(&self, work: &Path, part: Part, data: &[u8]) -> Result<Blob, ImageError> {
        let blob = Blob {
            sha256: digest::of_bytes(data),
            size: data.len() as u64,
        };
        self.directory("blobs/sha256")?;
        let path = self.blob_path(&blob.sha256);
        publish(work, data, &path)?;
        // What was written is read back once, so that the first start finds it verified.
        if self.verify(part, &blob) {
            Ok(blob)
        } else {
            Err(ImageError::io(path)(io::ErrorKind::InvalidData.into()))
        }
    }

    /// Takes a disk over, which must lie in the cache's own file system.
    fn add_disk(&self, disk: &Path) -> Result<Blob, ImageError> {
        self.directory("blobs/sha256")?;
        let add = || -> io::Result<Blob> {
            let blob = Blob {
                sha256: digest::of_disk(disk)?,
                size: fs::metadata(disk)?.len(),
            };
            fs::set_permissions(disk, std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
            File::open(disk)?.sync_all()?;
            let path = self.blob_path(&blob.sha256);
            fs::rename(disk, &path)?;
            File::open(path.parent().unwrap_or(&path))?.sync_all()?;
            Ok(blob)
        };
        let blob = add().map_err(ImageError::io(disk))?;
        // What was digested is what was moved.
        self.note_verified(&blob);
        Ok(blob)
    }

    /// Needs the lock.
    fn remove_unused_blobs(&self) -> Result<(), ImageError> {
        let names = self.names()?;
        let images: Result<Vec<_>, _> = names.iter().map(|name| self.manifest(name)).collect();
        // What cannot be read, such as an image of a later version, may use any of them.
        let Ok(images) = images else { return Ok(()) };
        let used = |name: &str| {
            images
                .iter()
                .flat_map(Manifest::blobs)
                .any(|(_, blob)| blob.sha256 == name)
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

/// Memory in MiB of a machine whose RAM disk is so large that the usual size is too little: the archive and what it holds
/// are both there while the kernel unpacks it.
fn memory_for(initrd: usize) -> Option<u32> {
    const SMALL_MIB: usize = 64;
    const BESIDES_MIB: usize = 256;
    let mib = initrd.div_ceil(1 << 20);
    let needed = 2 * mib + BESIDES_MIB;
    (mib > SMALL_MIB)
        .then(|| u32::try_from(needed.next_multiple_of(256)).ok())
        .flatten()
        .map(|needed| needed.max(512))
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

/// What of a file changes whenever its contents do.
fn file_state(data: &fs::Metadata) -> String {
    format!(
        "{} {}.{:09} {}.{:09} {}\n",
        data.len(),
        data.mtime(),
        data.mtime_nsec(),
        data.ctime(),
        data.ctime_nsec(),
        data.ino()
    )
}

#[cfg(test)]
mod tests;
