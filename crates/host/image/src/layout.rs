//! Lays packages out as `dpkg` leaves them when it has unpacked but not yet configured them: their files, and `dpkg`'s
//! own records of them, in one tar archive. A machine that unpacks it can run `dpkg --configure` at once.
//!
//! It is what debootstrap does first, with two liberties that save a guest most of the work: packages are not unpacked
//! a second time by `dpkg` itself, and scripts that want to run before their package's files are there (`preinst`) run
//! after that. No package of ours minds; packages that a user adds are installed by apt in the machine.
//!
//! `/bin`, `/lib`, `/lib64` and `/sbin` are links into `/usr`, as everywhere since Debian 12; packages that still put
//! files there find them behind the links.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Read, Write};

use md5::{Digest, Md5};

use crate::error::ImageError;
use crate::package::Package;
use crate::tar::{Entry, Kind, Writer};

/// Top directories that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Where dpkg keeps its records.
const RECORDS: &str = "var/lib/dpkg";

/// A root file system in the making.
pub struct Layout<W: Write> {
    archive: Writer<W>,
    directories: BTreeSet<String>,
    status: String,
    /// What apt says of packages that nobody asked for by name.
    extended: String,
    /// Trigger by name → packages that are told.
    triggers: BTreeMap<String, Vec<String>>,
    /// Paths with the packages that are told of changes there.
    watched: String,
    before_unpacking: Vec<String>,
}

impl<W: Write> Layout<W> {
    /// An empty one that is written to `out`.
    pub fn new(out: W) -> io::Result<Layout<W>> {
        let mut layout = Layout {
            archive: Writer::new(out),
            directories: BTreeSet::new(),
            status: String::new(),
            extended: String::new(),
            triggers: BTreeMap::new(),
            watched: String::new(),
            before_unpacking: Vec::new(),
        };
        layout.directory("usr", 0o755)?;
        for name in MERGED {
            layout.directory(&format!("usr/{name}"), 0o755)?;
            layout.archive.symlink(name, &format!("usr/{name}"))?;
        }
        for (path, mode) in [
            ("", 0o755),
            ("info", 0o755),
            ("triggers", 0o755),
            ("updates", 0o755),
        ] {
            layout.directory(format!("{RECORDS}/{path}").trim_end_matches('/'), mode)?;
        }
        Ok(layout)
    }

    /// Adds a package. `asked` says whether somebody named it, or it is there for another one.
    pub fn package(&mut self, package: &Package, asked: bool) -> Result<(), ImageError> {
        let mut records = BTreeMap::new();
        package.control(|name, data| {
            records.insert(name.to_owned(), data);
        })?;
        let text = |name: &str| {
            records
                .get(name)
                .map(|data| String::from_utf8_lossy(data).into_owned())
                .unwrap_or_default()
        };
        let control = text("control");
        // The last form may end a list of configuration files that are to be removed.
        let configuration = text("conffiles");
        let configuration: BTreeSet<&str> = configuration
            .lines()
            .filter_map(|line| line.trim_end().strip_prefix('/'))
            .collect();
        let mut digests = BTreeMap::new();
        let mut list = String::new();
        package.contents(|entry, data| {
            let _ = writeln!(
                list,
                "/{}",
                if entry.path.is_empty() {
                    "."
                } else {
                    &entry.path
                }
            );
            if configuration.contains(entry.path.as_str())
                && let Kind::File(size) = entry.kind
            {
                let contents = crate::tar::whole(data, size)?;
                digests.insert(entry.path.clone(), hex(&Md5::digest(&contents)));
                return self.entry(entry, &mut contents.as_slice());
            }
            self.entry(entry, data)
        })?;
        let record = Record::new(&control)
            .ok_or_else(|| ImageError::package(&package.id, "its description is damaged"))?;
        let added = (|| -> io::Result<()> {
            let stem = format!("{RECORDS}/info/{}", record.file_name);
            self.archive
                .file(&format!("{stem}.list"), 0o644, list.as_bytes())?;
            for (name, data) in &records {
                let mode = match name.as_str() {
                    "control" => continue,
                    "preinst" | "postinst" | "prerm" | "postrm" | "config" => 0o755,
                    _ => 0o644,
                };
                self.archive.file(&format!("{stem}.{name}"), mode, data)?;
            }
            Ok(())
        })();
        added.map_err(|error| ImageError::package(&package.id, error.to_string()))?;
        if records.contains_key("preinst") {
            self.before_unpacking
                .push(format!("{} {}", record.name, record.file_name));
        }
        self.add_triggers(&text("triggers"), &record.file_name);
        self.add_status(&control, &digests);
        if !asked && !record.is_fundamental {
            let _ = write!(
                self.extended,
                "Package: {}\nArchitecture: {}\nAuto-Installed: 1\n\n",
                record.name, record.architecture
            );
        }
        Ok(())
    }

    /// Adds something that belongs to no package, with the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.archive.file(&merged(path), mode, contents)
    }

    /// Adds a directory that belongs to no package, with those above it.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.parents(path)?;
        let path = merged(path);
        if self.directories.insert(path.clone()) {
            self.archive.directory(&path, mode)?;
        }
        Ok(())
    }

    /// Adds a symbolic link that belongs to no package.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        self.archive.symlink(&merged(path), target)
    }

    /// Adds a file of the host's as it is.
    pub fn copy(&mut self, path: &str, size: u64, data: &mut dyn Read) -> io::Result<()> {
        self.parents(path)?;
        let kind = Kind::File(size);
        self.archive.entry(
            &Entry {
                path: merged(path),
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: 0,
                kind,
            },
            data,
        )
    }

    /// Writes dpkg's records. The answer names, one a line, the packages that have a script to run first, and the
    /// names of their files in dpkg's records.
    pub fn finish(mut self) -> io::Result<(W, String)> {
        for (path, text) in [
            ("status", self.status.as_str()),
            ("available", ""),
            ("diversions", ""),
            ("statoverride", ""),
            ("info/format", "1\n"),
            ("triggers/File", self.watched.as_str()),
            ("triggers/Unincorp", ""),
        ] {
            self.archive
                .file(&format!("{RECORDS}/{path}"), 0o644, text.as_bytes())?;
        }
        for (name, packages) in &self.triggers {
            let text: String = packages
                .iter()
                .map(|package| format!("{package}\n"))
                .collect();
            self.archive.file(
                &format!("{RECORDS}/triggers/{name}"),
                0o644,
                text.as_bytes(),
            )?;
        }
        let extended = std::mem::take(&mut self.extended);
        self.file("var/lib/apt/extended_states", 0o644, extended.as_bytes())?;
        // Makes the accounts that the others' scripts name.
        self.before_unpacking
            .sort_by_key(|line| !line.starts_with("base-passwd "));
        let scripts = self
            .before_unpacking
            .iter()
            .map(|line| format!("{line}\n"))
            .collect();
        Ok((self.archive.finish()?, scripts))
    }

    fn entry(&mut self, entry: Entry, data: &mut dyn Read) -> io::Result<()> {
        let path = merged(&entry.path);
        if entry.kind == Kind::Directory
            && (path.is_empty() || !self.directories.insert(path.clone()))
        {
            return Ok(());
        }
        let kind = match entry.kind {
            Kind::HardLink(target) => Kind::HardLink(merged(&target)),
            kind => kind,
        };
        self.archive.entry(
            &Entry {
                path,
                kind,
                ..entry
            },
            data,
        )
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            let parent = merged(&path[..at]);
            if self.directories.insert(parent.clone()) {
                self.archive.directory(&parent, 0o755)?;
            }
        }
        Ok(())
    }

    /// deb-triggers(5): `interest[-noawait|-await] NAME-OR-PATH`. What packages activate, dpkg works out by itself.
    fn add_triggers(&mut self, text: &str, package: &str) {
        for line in text.lines() {
            let mut words = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_ascii_whitespace();
            let (Some(directive), Some(trigger)) = (words.next(), words.next()) else {
                continue;
            };
            let told = match directive {
                "interest" | "interest-await" => package.to_owned(),
                "interest-noawait" => format!("{package}/noawait"),
                _ => continue,
            };
            if trigger.starts_with('/') {
                let _ = writeln!(self.watched, "{trigger} {told}");
            } else {
                self.triggers
                    .entry(trigger.to_owned())
                    .or_default()
                    .push(told);
            }
        }
    }

    fn add_status(&mut self, control: &str, digests: &BTreeMap<String, String>) {
        for line in control.lines().filter(|line| !line.trim().is_empty()) {
            self.status.push_str(line);
            self.status.push('\n');
            if line.starts_with("Package:") {
                self.status.push_str("Status: install ok unpacked\n");
            }
        }
        if !digests.is_empty() {
            self.status.push_str("Conffiles:\n");
            for (path, digest) in digests {
                let _ = writeln!(self.status, " /{path} {digest}");
            }
        }
        self.status.push('\n');
    }
}

/// What matters of a package's description.
struct Record {
    name: String,
    architecture: String,
    /// What dpkg's files about it are called.
    file_name: String,
    /// Whether every system has it.
    is_fundamental: bool,
}

impl Record {
    fn new(control: &str) -> Option<Record> {
        let field = |name: &str| {
            control
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let (name, architecture) = (
            field("Package")?.to_owned(),
            field("Architecture")?.to_owned(),
        );
        let file_name = match field("Multi-Arch") {
            Some("same") => format!("{name}:{architecture}"),
            _ => name.clone(),
        };
        let is_fundamental =
            field("Essential") == Some("yes") || field("Priority") == Some("required");
        Some(Record {
            name,
            architecture,
            file_name,
            is_fundamental,
        })
    }
}

/// Where a path of a package really is.
fn merged(path: &str) -> String {
    let top = path.split('/').next().unwrap_or_default();
    if MERGED.contains(&top) {
        format!("usr/{path}")
    } else {
        path.to_owned()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    /// A package with a configuration file, a file in `/bin`, a script and a trigger.
    fn package(directory: &Path) -> Package {
        let root = directory.join("root");
        for (path, text) in [
            (
                "DEBIAN/control",
                "Package: hello\nVersion: 1:2-3\nArchitecture: amd64\nMulti-Arch: same\nMaintainer: x <x@example.org>\nDescription: words\n and more\n",
            ),
            ("DEBIAN/conffiles", "/etc/hello.conf\n"),
            (
                "DEBIAN/triggers",
                "interest-noawait /usr/share/words\ninterest greet\nactivate ldconfig # no\n",
            ),
            ("DEBIAN/preinst", "#!/bin/sh\n"),
            ("etc/hello.conf", "abc"),
            ("bin/hello", "#!/bin/sh\n"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            let mode = if text.starts_with('#') { 0o755 } else { 0o644 };
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        }
        let path = directory.join("hello.deb");
        let built = Command::new("dpkg-deb")
            .args(["--root-owner-group", "--build"])
            .args([&root, &path])
            .output()
            .unwrap();
        assert!(built.status.success(), "{built:?}");
        let id = "hello_1:2-3_amd64".to_owned();
        Package { path, id }
    }

    #[test]
    fn a_package_is_laid_out_as_dpkg_would() {
        let directory = tempfile::tempdir().unwrap();
        let package = package(directory.path());
        let mut layout = Layout::new(Vec::new()).unwrap();
        layout.package(&package, false).unwrap();
        layout.file("lib/extra/file", 0o600, b"x").unwrap();
        let (archive, scripts) = layout.finish().unwrap();
        assert_eq!(scripts, "hello hello:amd64\n");

        let mut entries = BTreeMap::new();
        crate::tar::for_each_entry(archive.as_slice(), |entry, data| {
            let mut text = String::new();
            data.read_to_string(&mut text)?;
            let twice = entries.insert(entry.path.clone(), (entry.kind, entry.mode, text));
            assert!(twice.is_none(), "{}", entry.path);
            Ok(())
        })
        .unwrap();
        let text = |path: &str| entries[path].2.as_str();
        assert_eq!(entries["bin"].0, Kind::Symlink("usr/bin".to_owned()));
        assert_eq!(
            (entries["usr/bin/hello"].1, entries["usr/lib/extra/file"].1),
            (0o755, 0o600)
        );
        assert_eq!(
            text("var/lib/dpkg/info/hello:amd64.list"),
            "/.\n/bin\n/bin/hello\n/etc\n/etc/hello.conf\n"
        );
        assert_eq!(entries["var/lib/dpkg/info/hello:amd64.preinst"].1, 0o755);
        assert_eq!(
            text("var/lib/dpkg/triggers/File"),
            "/usr/share/words hello:amd64/noawait\n"
        );
        assert_eq!(text("var/lib/dpkg/triggers/greet"), "hello:amd64\n");
        assert!(!entries.contains_key("var/lib/dpkg/triggers/ldconfig"));
        let status = text("var/lib/dpkg/status");
        assert!(
            status.starts_with("Package: hello\nStatus: install ok unpacked\nVersion: 1:2-3\n"),
            "{status}"
        );
        let digest = "Conffiles:\n /etc/hello.conf 900150983cd24fb0d6963f7d28e17f72\n\n";
        assert!(status.ends_with(digest), "{status}");
        let auto = "Package: hello\nArchitecture: amd64\nAuto-Installed: 1\n\n";
        assert_eq!(text("var/lib/apt/extended_states"), auto);
    }
}
