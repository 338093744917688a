//! Makes RAM disks: packages in, kernel and RAM disk out.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;

use crate::apt::Apt;
use crate::cpio::Archive;
use crate::error::ImageError;
use crate::factory;
use crate::kmod::{self, ModuleInfo};
use crate::order::Order;
use crate::package::Package;
use crate::progress::{Phase, Progress};
use crate::recipe::Recipe;
use crate::tar::{self, Kind};

/// The guest's first process, built along with this crate.
pub const INIT: &[u8] = include_bytes!(env!("STRATA_INIT"));

/// Raised when this code makes another image of the same recipe.
const VERSION: u32 = 2;

/// Where the init looks for the drivers to load. The form is described in its module `modules`.
const MODULES_LIST: &str = "etc/strata/modules";

/// A finished image. All but the disk is in memory.
pub struct Made {
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// The RAM disk.
    pub initrd: Vec<u8>,
    /// What `uname -r` will say.
    pub kernel_release: String,
    /// The packages used.
    pub packages: Vec<String>,
    /// Kernel command line of a machine that says nothing of its own.
    pub command_line: String,
    /// The root disk, if there is one.
    pub disk: Option<PathBuf>,
}

/// A text that changes when the image would: with the recipe, the init, or the [`VERSION`] of this code.
pub fn fingerprint(recipe: &Recipe) -> String {
    // FNV-1a. Nobody gains from a collision.
    let add = |hash: u64, text: &str| {
        text.bytes().fold(hash, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let mut hash = add(0xcbf2_9ce4_8422_2325, recipe.text);
    if recipe.disk.is_some() {
        hash = add(hash, factory::SCRIPT);
        hash = add(hash, Recipe::builder().map_or("", |builder| builder.text));
    }
    format!("{VERSION}-{hash:016x}-{}", env!("STRATA_INIT_HASH"))
}

/// Fetches the packages and makes an image that is all RAM disk.
pub fn make(
    recipe: &Recipe,
    order: &Order,
    apt: &Apt,
    progress: &dyn Progress,
) -> Result<Made, ImageError> {
    let names: Vec<&str> = recipe.copy.keys().map(String::as_str).collect();
    let packages = apt.fetch(&recipe.kernel, &names, progress)?;
    let (kernel_package, others) = packages
        .split_first()
        .ok_or_else(|| ImageError::package(&recipe.kernel, "missing"))?;
    let added = match order.packages.as_slice() {
        [] => Vec::new(),
        names => {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            apt.fetch_closure(&names, &[], false, progress)?
        }
    };
    apt.forget_older(added.iter());

    progress.phase(Phase::Unpack);
    let kernel = Kernel::read(kernel_package)?;
    let mut archive = ram_disk(recipe, &kernel, others)?;
    for (done, package) in (1..).zip(&added) {
        add_whole(package, &mut archive)?;
        progress.advance(done, added.len() as u64);
    }
    let initrd = write(&archive)?;
    let packages = packages
        .iter()
        .chain(&added)
        .map(|package| package.id.clone())
        .collect();
    Ok(Made {
        kernel: kernel.image,
        initrd,
        kernel_release: kernel.release,
        packages,
        command_line: recipe.command_line.clone(),
        disk: None,
    })
}

/// Makes the RAM disk of a recipe with what `packages` hold.
pub fn ram_disk(
    recipe: &Recipe,
    kernel: &Kernel,
    packages: &[Package],
) -> Result<Archive, ImageError> {
    let mut archive = skeleton(recipe);
    for (name, files) in &recipe.copy {
        let package = packages
            .iter()
            .find(|package| package.name() == name)
            .ok_or_else(|| ImageError::package(name, "missing"))?;
        copy(package, files, &mut archive)?;
    }
    kernel.add_drivers(&recipe.drivers, &mut archive)?;
    archive.file("init", 0o755, INIT);
    Ok(archive)
}

/// The archive's bytes.
pub fn write(archive: &Archive) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    archive
        .write(&mut bytes)
        .map_err(ImageError::io("initrd"))?;
    Ok(bytes)
}

/// What comes from the recipe alone.
fn skeleton(recipe: &Recipe) -> Archive {
    let mut archive = Archive::default();
    for (path, mode) in &recipe.directories {
        // A test holds all recipes to octal modes.
        archive.directory(path, u32::from_str_radix(mode, 8).unwrap_or(0o755));
    }
    for (path, text) in &recipe.files {
        let mode = if text.starts_with("#!") { 0o755 } else { 0o644 };
        archive.file(path, mode, text.as_bytes());
    }
    for (path, target) in &recipe.links {
        archive.symlink(path, target);
    }
    for applet in &recipe.applets {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    // The kernel opens it for the init before the init can mount anything.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive
}

/// The parts of a kernel package.
pub struct Kernel {
    /// What `uname -r` says.
    pub release: String,
    /// The bzImage.
    pub image: Vec<u8>,
    /// Path in the package and contents, by module name.
    modules: BTreeMap<String, (String, Vec<u8>)>,
    infos: BTreeMap<String, ModuleInfo>,
}

impl Kernel {
    /// Takes a package apart.
    pub fn read(package: &Package) -> Result<Kernel, ImageError> {
        let mut image = None;
        let mut modules = BTreeMap::new();
        let wanted = |path: &str| path.starts_with("boot/vmlinuz-") || path.ends_with(".ko");
        package.files(wanted, |path, data| {
            match path.strip_prefix("boot/vmlinuz-") {
                Some(release) => image = Some((release.to_owned(), data)),
                None => modules
                    .extend(kmod::module_name(path).map(|name| (name, (path.to_owned(), data)))),
            }
        })?;
        let (release, image) =
            image.ok_or_else(|| ImageError::package(&package.id, "it holds no kernel"))?;
        let info = |(name, (_, data)): (&String, &(String, Vec<u8>))| {
            Some((name.clone(), kmod::module_info(data)?))
        };
        let infos = modules.iter().filter_map(info).collect();
        Ok(Kernel {
            release,
            image,
            modules,
            infos,
        })
    }

    /// Adds the drivers, what they depend on, and the list the init loads them by.
    fn add_drivers(&self, drivers: &[String], archive: &mut Archive) -> Result<(), ImageError> {
        let mut list = String::new();
        let mut added = BTreeSet::new();
        let missing = |name: String| {
            ImageError::package(&self.release, format!("the kernel has no module '{name}'"))
        };
        for driver in drivers {
            let order = kmod::load_order(driver, &self.infos).map_err(missing)?;
            let mut line = Vec::new();
            for name in &order {
                let (path, data) = self
                    .modules
                    .get(name)
                    .ok_or_else(|| missing(name.clone()))?;
                let path = path.strip_prefix("usr/").unwrap_or(path);
                line.push(format!("/{path}"));
                if added.insert(name.clone()) {
                    archive.file(path, 0o644, data.as_slice());
                }
            }
            let aliases = self
                .infos
                .get(order.last().unwrap_or(driver))
                .map_or(&[][..], |info| &info.aliases);
            // Aliases with a colon name devices; others name file systems, protocols and device trees' nodes.
            let devices = aliases
                .iter()
                .filter(|alias| alias.contains(':') && !alias.starts_with("of:"));
            let devices: Vec<&str> = devices.map(String::as_str).collect();
            list.push_str(&format!("{} : {}\n", line.join(" "), devices.join(" ")));
        }
        archive.file(MODULES_LIST, 0o644, list);
        Ok(())
    }
}

/// What of a package nobody needs in a RAM disk.
const LEFT_OUT: [&str; 6] = [
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/info/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/share/bug/",
];

/// Puts the files of a package where it has them, in the place of what is there under their names. None of its scripts
/// runs, and nothing keeps record of it.
fn add_whole(package: &Package, archive: &mut Archive) -> Result<(), ImageError> {
    package.contents(|entry, data| {
        let path = archive.real(&entry.path);
        if path.is_empty() || LEFT_OUT.iter().any(|left| path.starts_with(left)) {
            return Ok(());
        }
        match &entry.kind {
            Kind::File(size) => {
                archive.file(&path, entry.mode & 0o7777, tar::whole(data, *size)?);
            }
            Kind::HardLink(target) => {
                if !archive.hard_link(&path, target) {
                    let message = format!("'{}' is a link to nothing", entry.path);
                    return Err(io::Error::other(message));
                }
            }
            // The skeleton says where its directories are.
            Kind::Directory if archive.is_directory_or_link(&path) => {}
            Kind::Directory => archive.directory(&path, entry.mode & 0o7777),
            Kind::Symlink(_) if archive.is_directory(&path) => {}
            Kind::Symlink(target) => archive.symlink(&path, target),
            Kind::Other => {}
        }
        Ok(())
    })
}

/// Copies single files out of a package; of a link, the file that it leads to.
fn copy(
    package: &Package,
    paths: &BTreeMap<String, String>,
    archive: &mut Archive,
) -> Result<(), ImageError> {
    let mut links = BTreeMap::new();
    package.contents(|entry, _| {
        if let Kind::Symlink(target) = entry.kind {
            links.insert(entry.path, target);
        }
        Ok(())
    })?;
    let mut wanted = BTreeMap::new();
    for (from, to) in paths {
        // Links between libraries lead to a neighbour.
        let leads_to = links.get(from).map(|target| match from.rsplit_once('/') {
            Some((directory, _)) => format!("{directory}/{target}"),
            None => target.clone(),
        });
        wanted.insert(leads_to.unwrap_or_else(|| from.clone()), to);
    }
    package.files(
        |path| wanted.contains_key(path),
        |path, data| {
            if let Some(to) = wanted.get(path) {
                archive.file(to, 0o755, data);
            }
        },
    )?;
    match paths.iter().find(|(_, to)| !archive.contains(to)) {
        Some((from, _)) => Err(ImageError::package(
            &package.id,
            format!("it has no file '{from}'"),
        )),
        None => Ok(()),
    }
}
