//! Debian packages by apt, in an apt root of our own: nothing is installed on the host, no privilege is needed, and the
//! host's lists and caches stay as they are. The host's proxies and credentials apply; apt verifies all signatures.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::error::ImageError;
use crate::package::Package;
use crate::progress::{Phase, Progress};
use crate::sources;

/// Package lists older than this are fetched again before use.
const LISTS_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// The file whose time says when the lists were fetched.
const STAMP: &str = "lists-fetched";

/// An apt root for one Debian release.
#[derive(Debug)]
pub struct Apt {
    root: PathBuf,
    /// The lock under which the root is used. apt's programs hold it, too, as their standard input: one that outlives
    /// a killed build keeps the next build waiting instead of getting in its way.
    lock: File,
}

impl Apt {
    /// Makes the root at `root` ready for a Debian release, from a mirror or from the host's own. Nothing is fetched yet.
    pub fn prepare(
        root: &Path,
        release: &str,
        mirror: Option<&str>,
        lock: File,
    ) -> Result<Apt, ImageError> {
        let sources: String = sources::choose(release, mirror, &host_sources())
            .iter()
            .map(|source| format!("{source}\n"))
            .collect();
        Apt::with_sources(root, &sources, lock)
    }

    fn with_sources(root: &Path, sources: &str, lock: File) -> Result<Apt, ImageError> {
        for (program, package) in [
            ("apt-get", "apt"),
            ("apt-cache", "apt"),
            ("dpkg-deb", "dpkg"),
        ] {
            if !in_path(program) {
                return Err(ImageError::MissingProgram { program, package });
            }
        }
        if !Path::new(sources::KEYRING).exists() {
            return Err(ImageError::MissingKeyring);
        }
        for directory in ["state/lists/partial", "cache/archives/partial", "packages"] {
            let path = root.join(directory);
            fs::create_dir_all(&path).map_err(ImageError::io(&path))?;
        }
        let apt = Apt {
            root: root.to_owned(),
            lock,
        };
        if fs::read_to_string(root.join("sources.list"))
            .ok()
            .as_deref()
            != Some(sources)
        {
            apt.write("sources.list", sources)?;
            let _ = fs::remove_file(root.join(STAMP));
        }
        apt.write("status", "")?;
        apt.write("apt.conf", &configuration(root)?)?;
        Ok(apt)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), ImageError> {
        let path = self.root.join(name);
        fs::write(&path, text).map_err(ImageError::io(path))
    }

    /// Fetches `packages`, each a package's name; of `kernel`, a package that only depends on the kernel itself, the
    /// one it depends on. The kernel comes first in the answer.
    pub fn fetch(
        &self,
        kernel: &str,
        packages: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, ImageError> {
        self.with_lists(progress, || self.download(kernel, packages, progress))
    }

    /// Fetches `names`, each a package's name or one of apt's patterns, and all that they depend on, for a system on
    /// which there is nothing but `installed`. What is recommended is left out unless `recommended`.
    pub fn fetch_closure(
        &self,
        names: &[&str],
        installed: &[Package],
        recommended: bool,
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, ImageError> {
        self.with_lists(progress, || {
            self.download_closure(names, installed, recommended, progress)
        })
    }

    /// Does `work` with lists that are fresh enough for it.
    fn with_lists<T>(
        &self,
        progress: &dyn Progress,
        work: impl Fn() -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        if self.lists_are_fresh() {
            let done = work();
            if done.is_ok() {
                return done;
            }
            // The mirror may have moved on since the lists were fetched.
        }
        match self.update(progress) {
            Ok(()) => work(),
            // Without a network, what was fetched before will do if it is all there.
            Err(error @ ImageError::Network { .. }) => work().map_err(|_| error),
            Err(error) => Err(error),
        }
    }

    fn download_closure(
        &self,
        names: &[&str],
        installed: &[Package],
        recommended: bool,
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, ImageError> {
        progress.phase(Phase::Download);
        let status: String = installed
            .iter()
            .map(installed_record)
            .collect::<Result<_, _>>()?;
        self.write("status", &status)?;
        let recommended = format!("APT::Install-Recommends={recommended}");
        let mut arguments = vec!["-o", recommended.as_str(), "--simulate", "install"];
        arguments.extend(names);
        let plan = self.run("apt-get", &arguments, progress);
        let fetched = plan.and_then(|plan| {
            arguments.retain(|argument| *argument != "--simulate");
            arguments.push("--download-only");
            self.run("apt-get", &arguments, progress)?;
            Ok(plan)
        });
        self.write("status", "")?;
        let archives = self.root.join("cache/archives");
        let mut packages = Vec::new();
        for (name, version, architecture) in fetched?.lines().filter_map(planned) {
            let id = format!("{name}_{version}_{architecture}");
            let path = archives.join(format!("{}.deb", id.replace(':', "%3a")));
            if !path.is_file() {
                return Err(ImageError::package(name, "apt did not fetch it"));
            }
            packages.push(Package { path, id });
        }
        Ok(packages)
    }

    /// Removes other versions of packages that were fetched for a closure.
    pub fn forget_older<'a>(&self, used: impl Iterator<Item = &'a Package> + Clone) {
        for entry in fs::read_dir(self.root.join("cache/archives"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let (path, file) = (entry.path(), entry.file_name());
            let name = file.to_str().and_then(|file| file.split('_').next());
            let mut named = used
                .clone()
                .filter(|package| Some(package.name()) == name)
                .peekable();
            if named.peek().is_some() && named.all(|package| package.path != path) {
                // What stays takes space and nothing else.
                let _ = fs::remove_file(path);
            }
        }
    }

    /// The lock under which the root is used, for another process to hold too.
    pub fn lock(&self) -> Result<File, ImageError> {
        self.lock.try_clone().map_err(ImageError::io(&self.root))
    }

    fn lists_are_fresh(&self) -> bool {
        let fetched = fs::metadata(self.root.join(STAMP)).and_then(|stamp| stamp.modified());
        fetched.is_ok_and(|time| {
            SystemTime::now()
                .duration_since(time)
                .is_ok_and(|age| age < LISTS_AGE_MAX)
        })
    }

    fn update(&self, progress: &dyn Progress) -> Result<(), ImageError> {
        progress.phase(Phase::Lists);
        self.run("apt-get", &["update"], progress)?;
        self.write(STAMP, "")
    }

    fn download(
        &self,
        kernel: &str,
        packages: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, ImageError> {
        progress.phase(Phase::Download);
        let record = self.run(
            "apt-cache",
            &["show", "--no-all-versions", kernel],
            progress,
        )?;
        let (name, version) = kernel_dependency(&record)
            .ok_or_else(|| ImageError::package(kernel, "it depends on no kernel package"))?;
        let exact = format!("{name}={version}");
        let names: Vec<&str> = [exact.as_str()]
            .into_iter()
            .chain(packages.iter().copied())
            .collect();
        let mut arguments = vec!["download"];
        arguments.extend(&names);
        self.run("apt-get", &arguments, progress)?;
        self.collect(&name, packages)
    }

    /// Finds the files `apt-get download` left, and removes those of earlier versions.
    fn collect(&self, kernel: &str, packages: &[&str]) -> Result<Vec<Package>, ImageError> {
        let directory = self.root.join("packages");
        let mut found = Vec::new();
        let mut files: Vec<(SystemTime, PathBuf, String)> = Vec::new();
        for entry in fs::read_dir(&directory)
            .map_err(ImageError::io(&directory))?
            .flatten()
        {
            let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_suffix(".deb"))
                .map(str::to_owned)
            else {
                continue;
            };
            let changed = entry
                .metadata()
                .and_then(|data| data.modified())
                .unwrap_or(SystemTime::UNIX_EPOCH);
            files.push((changed, entry.path(), id));
        }
        files.sort();
        for name in [kernel].iter().chain(packages) {
            let own = |id: &str| id.split('_').next() == Some(*name);
            let (_, path, id) = files
                .iter()
                .rfind(|(_, _, id)| own(id))
                .ok_or_else(|| ImageError::package(name, "apt did not fetch it"))?;
            found.push(Package {
                path: path.clone(),
                id: id.replace("%3a", ":"),
            });
        }
        for (_, path, _) in files
            .iter()
            .filter(|(_, path, _)| found.iter().all(|package| package.path != *path))
        {
            let _ = fs::remove_file(path);
        }
        Ok(found)
    }

    /// Runs an apt program with this root's configuration and returns what it printed.
    fn run(
        &self,
        program: &'static str,
        arguments: &[&str],
        progress: &dyn Progress,
    ) -> Result<String, ImageError> {
        let errors_path = self.root.join("errors");
        let errors = File::create(&errors_path).map_err(ImageError::io(&errors_path))?;
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.root.join("apt.conf"))
            .args(arguments);
        command.current_dir(self.root.join("packages"));
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8")
            .env_remove("APT_CONFIG");
        command
            .stdin(self.lock()?)
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = command.spawn().map_err(ImageError::io(program))?;
        let mut output = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut lines = BufReader::new(stdout);
            let mut line = Vec::new();
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                let text = String::from_utf8_lossy(&line);
                match download_percent(&text) {
                    Some(percent) => progress.advance(percent, 100),
                    None => output.push_str(&text),
                }
                line.clear();
            }
        }
        let status = child.wait().map_err(ImageError::io(program))?;
        if status.success() {
            Ok(output)
        } else {
            Err(classify(program, &errors_path))
        }
    }
}

/// `Inst NAME (VERSION ORIGIN… [ARCHITECTURE])`, possibly with the version there was in between: a line of a simulation.
fn planned(line: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let (_, rest) = rest.split_once('(')?;
    let (version, rest) = rest.split_once(' ')?;
    let (_, rest) = rest.split_once('[')?;
    let (architecture, _) = rest.split_once(']')?;
    Some((name.split(':').next()?, version, architecture))
}

/// A package in the form in which dpkg notes that it is installed.
fn installed_record(package: &Package) -> Result<String, ImageError> {
    let mut record = String::new();
    package.control(|name, data| {
        if name == "control" {
            let text = String::from_utf8_lossy(&data).into_owned();
            let (first, rest) = text.trim_end().split_once('\n').unwrap_or((&text, ""));
            record = format!("{first}\nStatus: install ok installed\n{rest}\n\n");
        }
    })?;
    Ok(record)
}

/// `dlstatus:1:23.4567:Retrieving file 1 of 2`: apt's machine-readable progress.
fn download_percent(line: &str) -> Option<u64> {
    let percent = line.strip_prefix("dlstatus:")?.split(':').nth(1)?;
    percent
        .parse::<f64>()
        .ok()
        .map(|percent| percent.clamp(0.0, 100.0) as u64)
}

/// Name and version of the kernel package in the dependencies of `apt-cache show`'s first record.
fn kernel_dependency(record: &str) -> Option<(String, String)> {
    let depends = record
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))?;
    let dependency = depends
        .split([',', '|'])
        .map(str::trim)
        .find(|name| name.starts_with("linux-image-"))?;
    let (name, version) = dependency.split_once(" (= ")?;
    Some((name.to_owned(), version.strip_suffix(')')?.to_owned()))
}

/// Says in one error why apt failed.
fn classify(program: &'static str, errors: &Path) -> ImageError {
    let mut text = String::new();
    // An unreadable file leaves the text empty, which is answered below.
    let _ = File::open(errors).and_then(|file| file.take(64 << 10).read_to_string(&mut text));
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("E: ").or(line.strip_prefix("W: ")))
        .collect();
    let has = |needles: &[&str]| {
        lines
            .iter()
            .find(|line| needles.iter().any(|needle| line.contains(needle)))
    };
    let untrusted = [
        "GPG error",
        "not signed",
        "NO_PUBKEY",
        "Hash Sum mismatch",
        "EXPKEYSIG",
        "BADSIG",
        "couldn't be verified",
        "unexpected size",
    ];
    let network = [
        "Could not resolve",
        "Temporary failure",
        "Could not connect",
        "Unable to connect",
        "Failed to fetch",
        "Connection",
        "Cannot initiate",
        "Unable to fetch",
        "timed out",
    ];
    if let Some(detail) = has(&untrusted) {
        return ImageError::Untrusted {
            detail: (*detail).to_owned(),
        };
    }
    if let Some(detail) = has(&network) {
        return ImageError::Network {
            detail: (*detail).to_owned(),
        };
    }
    if let Some(name) = lines.iter().copied().find_map(unknown_package) {
        return ImageError::NoPackage {
            name: name.to_owned(),
        };
    }
    let detail = lines
        .first()
        .copied()
        .unwrap_or("it gave no reason")
        .to_owned();
    ImageError::Tool { program, detail }
}

/// The package that apt says, in an error, it does not know.
fn unknown_package(line: &str) -> Option<&str> {
    line.strip_prefix("Unable to locate package ").or_else(|| {
        line.strip_prefix("Package '")?
            .strip_suffix("' has no installation candidate")
    })
}

/// The root's apt configuration. It is read after the host's, whose hooks would touch the host.
fn configuration(root: &Path) -> Result<String, ImageError> {
    let root = root
        .to_str()
        .filter(|root| !root.contains(['"', '\n', '\\']))
        .ok_or_else(|| ImageError::Io {
            path: root.to_owned(),
            source: std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "apt cannot use a directory of this name",
            ),
        })?;
    Ok(format!(
        r##"// Written by Strata.
Dir::State "{root}/state";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
// apt's unprivileged user cannot enter a private cache.
APT::Sandbox::User "";
APT::Status-Fd "1";
APT::Update::Error-Mode "any";
APT::Get::Assume-Yes "true";
APT::Install-Suggests "false";
#clear APT::Default-Release;
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
DPkg::Lock::Timeout "300";
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::Contents-deb;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Update::Post-Invoke-Stats;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
quiet "2";
"##
    ))
}

/// The texts of the host's sources files.
fn host_sources() -> Vec<String> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    paths.extend(parts.filter(|path| {
        path.extension()
            .is_some_and(|kind| kind == "list" || kind == "sources")
    }));
    paths.sort();
    paths
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect()
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_of_the_metapackage() {
        let record = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: x, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nSize: 1\n";
        let expected = (
            "linux-image-6.1.0-56-cloud-amd64".to_owned(),
            "6.1.192-2".to_owned(),
        );
        assert_eq!(kernel_dependency(record), Some(expected));
        assert_eq!(kernel_dependency("Depends: libc6\n"), None);
    }

    #[test]
    fn simulations_are_read() {
        let check = |line, expected| assert_eq!(planned(line), expected, "{line}");
        check(
            "Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64]) []",
            Some(("libc6", "2.36-9+deb12u14", "amd64")),
        );
        check(
            "Inst tzdata [2024a] (2025b Debian:12.15/oldstable, Debian-Security:12/x [all])",
            Some(("tzdata", "2025b", "all")),
        );
        check("Conf libc6 (2.36 Debian:12.15/oldstable [amd64])", None);
        check("Inst", None);
    }

    #[test]
    fn apt_progress() {
        assert_eq!(
            download_percent("dlstatus:1:41.9:Retrieving file 1 of 2\n"),
            Some(41)
        );
        assert_eq!(download_percent("Get:1 http://deb.debian.org"), None);
    }

    fn no_lock() -> File {
        File::open("/dev/null").unwrap()
    }

    /// A repository on disk with one package.
    fn repository(directory: &Path) -> String {
        let release = "Origin: Debian\nSuite: bookworm\nCodename: bookworm\nSHA256:\n";
        fs::write(directory.join("Packages"), "").unwrap();
        fs::write(directory.join("Release"), release).unwrap();
        format!(
            "deb [signed-by={}] file:{} ./\n",
            sources::KEYRING,
            directory.display()
        )
    }

    #[test]
    fn an_archive_without_a_signature_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let sources = repository(directory.path());
        let apt = Apt::with_sources(&directory.path().join("root"), &sources, no_lock()).unwrap();
        let error = apt
            .fetch("linux-image-cloud-amd64", &[], &crate::progress::Quiet)
            .unwrap_err();
        assert!(matches!(error, ImageError::Untrusted { .. }), "{error:?}");
    }

    #[test]
    fn an_archive_signed_by_somebody_else_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let sources = repository(directory.path());
        let signed = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\nOrigin: Debian\n-----BEGIN PGP SIGNATURE-----\n\nAAAA\n=AAAA\n-----END PGP SIGNATURE-----\n";
        fs::write(directory.path().join("InRelease"), signed).unwrap();
        let apt = Apt::with_sources(&directory.path().join("root"), &sources, no_lock()).unwrap();
        let error = apt
            .fetch("linux-image-cloud-amd64", &[], &crate::progress::Quiet)
            .unwrap_err();
        assert!(matches!(error, ImageError::Untrusted { .. }), "{error:?}");
    }

    #[test]
    fn a_mirror_out_of_reach_is_said_to_be() {
        let directory = tempfile::tempdir().unwrap();
        let sources = format!(
            "deb [signed-by={}] http://127.0.0.1:9/debian bookworm main\n",
            sources::KEYRING
        );
        let apt = Apt::with_sources(directory.path(), &sources, no_lock()).unwrap();
        let error = apt
            .fetch("linux-image-cloud-amd64", &[], &crate::progress::Quiet)
            .unwrap_err();
        assert!(matches!(error, ImageError::Network { .. }), "{error:?}");
    }

    #[test]
    fn errors_of_apt_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("errors");
        let check = |text: &str| {
            fs::write(&path, text).unwrap();
            classify("apt-get", &path)
        };
        assert!(matches!(
            check("E: Failed to fetch http://x  Could not resolve 'x'\n"),
            ImageError::Network { .. }
        ));
        assert!(matches!(
            check(
                "W: GPG error: http://x InRelease: NO_PUBKEY 1\nE: The repository is not signed.\n"
            ),
            ImageError::Untrusted { .. }
        ));
        assert!(matches!(
            check("E: Failed to fetch http://x  Hash Sum mismatch\n"),
            ImageError::Untrusted { .. }
        ));
        assert!(matches!(
            check("E: Unable to locate package y\n"),
            ImageError::NoPackage { name } if name == "y"
        ));
        assert!(matches!(
            check("E: Package 'y' has no installation candidate\n"),
            ImageError::NoPackage { name } if name == "y"
        ));
        assert!(matches!(
            check("E: something else\n"),
            ImageError::Tool { .. }
        ));
        assert!(matches!(check(""), ImageError::Tool { .. }));
    }
}
