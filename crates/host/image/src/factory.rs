//! Makes images with a root disk: packages are laid out here, and a machine of our own makes the file system, puts them
//! there and configures them, as root of its own.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::apt::Apt;
use crate::error::ImageError;
use crate::layout::Layout;
use crate::maker::{self, INIT, Kernel, Made};
use crate::order::Order;
use crate::package::Package;
use crate::progress::{Phase, Progress};
use crate::recipe::{DiskRecipe, Recipe};
use crate::workshop::{Job, Workshop};

/// What runs in the machine that builds.
pub const SCRIPT: &str = include_str!("../../../../images/builder/build.sh");

/// The package that the machine that builds needs beyond those it installs.
const SHELL: &str = "busybox-static";

/// Memory of the machine that builds, in MiB.
const MEMORY_MIB: u32 = 1024;

/// Lines of what the machine said last that an error repeats.
const LAST_WORDS: usize = 3;

/// Follows a recipe with a root disk. `work` is a directory for what is under way; the finished disk is left there.
pub fn make(
    recipe: &Recipe,
    disk: &DiskRecipe,
    order: &Order,
    apt: &Apt,
    work: &Path,
    workshop: &dyn Workshop,
    progress: &dyn Progress,
) -> Result<Made, ImageError> {
    let names: Vec<&str> = disk.packages.iter().map(String::as_str).collect();
    let base = apt.fetch_closure(&names, &[], false, progress)?;
    let added = if order.packages.is_empty() {
        Vec::new()
    } else {
        let names: Vec<&str> = order.packages.iter().map(String::as_str).collect();
        apt.fetch_closure(&names, &base, true, progress)?
    };
    let tools = apt.fetch_closure(&[SHELL], &[], false, progress)?;
    let all = || base.iter().chain(&added).chain(&tools);
    apt.forget_older(all());

    progress.phase(Phase::Unpack);
    let builder = Recipe::builder()?;
    let is_kernel = |package: &&Package| {
        package.name().starts_with("linux-image-") && package.name() != recipe.kernel
    };
    let kernel = base
        .iter()
        .find(is_kernel)
        .ok_or_else(|| ImageError::package(&recipe.kernel, "it brought no kernel"))?;
    let kernel = Kernel::read(kernel)?;
    let initrd = maker::ram_disk(recipe, &kernel, &[])?;
    let initrd = maker::write(&initrd)?;
    let uuid = random_uuid()?;
    let command_line = format!("root=UUID={uuid} {}", recipe.command_line);

    let io = |path: &Path| ImageError::io(path.to_owned());
    let source = work.join("contents.tar");
    let file = File::create_new(&source).map_err(io(&source))?;
    let contents = Contents {
        recipe: disk,
        order,
        base: &base,
        added: &added,
        release: &kernel.release,
        initrd: &initrd,
        command_line: &command_line,
    };
    let scripts = contents
        .write(file, progress)
        .map_err(|error| match error {
            Failed::Image(error) => error,
            Failed::Io(error) => io(&source)(error),
        })?;

    let packages: Vec<Package> = base.iter().chain(&tools).cloned().collect();
    let mut archive = maker::ram_disk(&builder, &kernel, &packages)?;
    // Names of packages need no quoting beyond this.
    let job = format!(
        "UUID={uuid}\nLABEL=strata-root\nPACKAGES={}\nADDED={}\nASKED='{}'\n",
        base.len(),
        added.len(),
        order.packages.join(" ")
    );
    archive.file("etc/strata/job", 0o644, job);
    archive.file("etc/strata/preinst", 0o644, scripts);
    archive.file("build.sh", 0o755, SCRIPT);
    let place = |name: &str, data: &[u8]| -> Result<PathBuf, ImageError> {
        let path = work.join(name);
        fs::write(&path, data).map_err(io(&path))?;
        Ok(path)
    };
    let target = work.join("disk");
    let size = order.size_mib.unwrap_or(disk.size_mib) << 20;
    let blank = File::create_new(&target).and_then(|file| file.set_len(size));
    blank.map_err(io(&target))?;
    let job = Job {
        kernel: place("kernel", &kernel.image)?,
        initrd: place("initrd", &maker::write(&archive)?)?,
        command_line: format!("{} strata.run=\"/bin/sh /build.sh\"", builder.command_line),
        memory_mib: MEMORY_MIB,
        target: target.clone(),
        source,
        lock: apt.lock()?,
    };
    build(&job, workshop, progress)?;
    check(&target).map_err(io(&target))?;
    let packages = base
        .iter()
        .chain(&added)
        .map(|package| package.id.clone())
        .collect();
    Ok(Made {
        kernel: kernel.image,
        initrd,
        kernel_release: kernel.release,
        packages,
        command_line,
        disk: Some(target),
    })
}

/// Runs the machine that builds and listens to it.
fn build(job: &Job, workshop: &dyn Workshop, progress: &dyn Progress) -> Result<(), ImageError> {
    let mut done = false;
    let mut last_words: Vec<String> = Vec::new();
    progress.phase(Phase::Format);
    let result = workshop.run(job, &mut |line| {
        let line = line.trim();
        let Some(words) = line.strip_prefix("strata: ") else {
            if !line.is_empty() {
                last_words.push(line.to_owned());
            }
            return;
        };
        let mut numbers = words.split(' ').skip(1).map(str::parse::<u64>);
        let count = match (numbers.next(), numbers.next()) {
            (Some(Ok(count)), Some(Ok(total))) => Some((count, total)),
            _ => None,
        };
        let phase = match words.split(' ').next() {
            Some("unpack") => Phase::Fill,
            Some("configure") => Phase::Configure,
            Some("add") => Phase::Add,
            Some("finish" | "check") => Phase::Finish,
            Some("done") => {
                done = true;
                return;
            }
            Some("format") => return,
            _ => return last_words.push(words.trim_start_matches(['|', ' ']).to_owned()),
        };
        match count {
            Some((count, total)) if count > 0 => progress.advance(count, total),
            _ => progress.phase(phase),
        }
    });
    if result.is_ok() && done {
        return Ok(());
    }
    let from = last_words.len().saturating_sub(LAST_WORDS);
    let said = last_words.get(from..).unwrap_or_default().join("; ");
    let detail = match (result, said.is_empty()) {
        (Err(error), true) => error,
        (Err(error), false) => format!("{error}; it said: {said}"),
        (Ok(()), true) => "it ended too early".to_owned(),
        (Ok(()), false) => format!("it said: {said}"),
    };
    Err(ImageError::Workshop { detail })
}

/// Whether there is a clean ext4 file system. The machine has run `e2fsck`.
fn check(disk: &Path) -> io::Result<()> {
    let mut superblock = [0; 0x400];
    let mut file = File::open(disk)?;
    file.seek(SeekFrom::Start(0x400))?;
    file.read_exact(&mut superblock)?;
    let (magic, state) = (&superblock[0x38..0x3a], &superblock[0x3a..0x3c]);
    if magic == [0x53, 0xef] && state == [1, 0] {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "there is no clean file system on it",
        ))
    }
}

/// What goes onto the root disk.
struct Contents<'a> {
    recipe: &'a DiskRecipe,
    order: &'a Order,
    base: &'a [Package],
    added: &'a [Package],
    release: &'a str,
    initrd: &'a [u8],
    command_line: &'a str,
}

enum Failed {
    Image(ImageError),
    Io(io::Error),
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Failed {
        Failed::Image(error)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Io(error)
    }
}

impl Contents<'_> {
    /// Writes it; the answer is [`Layout::finish`]'s.
    fn write(&self, file: File, progress: &dyn Progress) -> Result<String, Failed> {
        let mut layout = Layout::new(BufWriter::with_capacity(1 << 20, file))?;
        let total = self.base.len() as u64;
        for (done, package) in (1..).zip(self.base) {
            let asked = self
                .recipe
                .packages
                .iter()
                .any(|name| name == package.name());
            layout.package(package, asked)?;
            progress.advance(done, total);
        }
        for package in self.added {
            let mut file = File::open(&package.path)?;
            let size = file.metadata()?.len();
            let name = package.id.replace(':', "%3a");
            layout.copy(&format!("var/cache/strata/{name}.deb"), size, &mut file)?;
        }
        let entry = format!(
            "title Debian\nversion {release}\nlinux /boot/vmlinuz-{release}\ninitrd /boot/initrd.img-{release}\noptions {}\n",
            self.command_line,
            release = self.release,
        );
        layout.file(
            &format!("boot/initrd.img-{}", self.release),
            0o644,
            self.initrd,
        )?;
        layout.file(
            &format!("boot/loader/entries/debian-{}.conf", self.release),
            0o644,
            entry.as_bytes(),
        )?;
        layout.file("usr/lib/strata/agent", 0o755, INIT)?;
        for (path, text) in &self.recipe.files {
            layout.file(path, 0o644, text.as_bytes())?;
        }
        for (path, target) in &self.recipe.links {
            layout.symlink(path, target)?;
        }
        if let Some(keys) = &self.order.ssh_keys {
            layout.directory("root", 0o700)?;
            layout.directory("root/.ssh", 0o700)?;
            layout.file("root/.ssh/authorized_keys", 0o600, keys.as_bytes())?;
        }
        let (writer, scripts) = layout.finish()?;
        writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        Ok(scripts)
    }
}

/// A new identity for a file system.
fn random_uuid() -> Result<String, ImageError> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = fs::read_to_string(path).map_err(ImageError::io(path))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// A machine that says this and ends like that.
    struct Says(&'static str, Result<(), String>);

    impl Workshop for Says {
        fn run(&self, _: &Job, heard: &mut dyn FnMut(&str)) -> Result<(), String> {
            self.0.lines().for_each(heard);
            self.1.clone()
        }
    }

    #[derive(Default)]
    struct Steps(RefCell<Vec<String>>);

    impl Progress for Steps {
        fn phase(&self, phase: Phase) {
            self.0.borrow_mut().push(format!("{phase:?}"));
        }

        fn advance(&self, done: u64, total: u64) {
            self.0.borrow_mut().push(format!("{done}/{total}"));
        }
    }

    fn try_build(machine: Says) -> (Result<(), String>, Vec<String>) {
        let job = Job {
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            command_line: String::new(),
            memory_mib: 0,
            target: PathBuf::new(),
            source: PathBuf::new(),
            lock: File::open("/dev/null").unwrap(),
        };
        let steps = Steps::default();
        let result = build(&job, &machine, &steps).map_err(|error| error.to_string());
        (result, steps.0.into_inner())
    }

    #[test]
    fn what_the_machine_says_is_understood() {
        let words = "strata: format\nstrata: unpack\nstrata: configure 0 2\r\nstrata: configure 1 2\n\
            strata: finish\nstrata: done\n[    1.0] reboot: Power down";
        let (result, steps) = try_build(Says(words, Ok(())));
        assert_eq!(result, Ok(()));
        assert_eq!(steps, ["Format", "Fill", "Configure", "1/2", "Finish"]);
    }

    #[test]
    fn a_machine_that_fails_is_quoted() {
        let words = "strata: unpack\nstrata: failed: unpack\nstrata: | tar: no space\n";
        let (result, _) = try_build(Says(words, Ok(())));
        assert!(
            result
                .unwrap_err()
                .ends_with("it said: failed: unpack; tar: no space")
        );
        let (result, _) = try_build(Says("", Err("no memory".to_owned())));
        assert!(result.unwrap_err().ends_with("failed: no memory"));
        let (result, _) = try_build(Says("strata: configure 1 2", Ok(())));
        assert!(result.unwrap_err().ends_with("it ended too early"));
        // Even one that says it is done has not if it crashed.
        let (result, _) = try_build(Says("strata: done", Err("it crashed".to_owned())));
        assert!(result.is_err());
    }
}
