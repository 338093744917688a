//! Reads Debian packages. `dpkg-deb` undoes their compression; nothing is unpacked to disk.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::ImageError;
use crate::tar::{self, Entry};

/// A package in an apt root's cache, verified by apt.
#[derive(Debug, Clone)]
pub struct Package {
    /// The file.
    pub path: PathBuf,
    /// `name_version_arch`, as the archive calls it.
    pub id: String,
}

impl Package {
    /// The package's name.
    pub fn name(&self) -> &str {
        self.id.split('_').next().unwrap_or_default()
    }

    /// Hands each file that is `wanted` to `keep`.
    pub fn files(
        &self,
        wanted: impl FnMut(&str) -> bool,
        keep: impl FnMut(&str, Vec<u8>),
    ) -> Result<(), ImageError> {
        self.read("--fsys-tarfile", |archive| {
            tar::for_each_file(archive, wanted, keep)
        })
    }

    /// Hands everything that the package installs to `take`.
    pub fn contents(
        &self,
        take: impl FnMut(Entry, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), ImageError> {
        self.read("--fsys-tarfile", |archive| {
            tar::for_each_entry(archive, take)
        })
    }

    /// Hands the package's description, scripts and lists to `keep`.
    pub fn control(&self, keep: impl FnMut(&str, Vec<u8>)) -> Result<(), ImageError> {
        self.read("--ctrl-tarfile", |archive| {
            tar::for_each_file(archive, |_| true, keep)
        })
    }

    fn read(
        &self,
        part: &str,
        reader: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> Result<(), ImageError> {
        let file = File::open(&self.path).map_err(ImageError::io(&self.path))?;
        let mut child = Command::new("dpkg-deb")
            .args([part, "/dev/stdin"])
            .stdin(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(ImageError::io("dpkg-deb"))?;
        let stdout = child
            .stdout
            .take()
            .ok_or(io::ErrorKind::BrokenPipe)
            .map_err(|kind| ImageError::io("dpkg-deb")(kind.into()))?;
        let mut stdout = BufReader::with_capacity(256 << 10, stdout);
        let read = reader(&mut stdout);
        drop(stdout);
        let mut errors = String::new();
        if let Some(stderr) = child.stderr.take() {
            // Without its words there is still its status.
            let _ = stderr.take(4096).read_to_string(&mut errors);
        }
        let status = child.wait().map_err(ImageError::io("dpkg-deb"))?;
        read.map_err(|error| ImageError::package(&self.id, error.to_string()))?;
        if !status.success() {
            return Err(ImageError::package(
                &self.id,
                errors.lines().next().unwrap_or("it cannot be read"),
            ));
        }
        Ok(())
    }
}
