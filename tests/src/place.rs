//! Where tests run: the shared directory with the binary and the image cache, the way to an unprivileged user, and what is missing.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use crate::Strata;

/// The user that root becomes: `nobody`.
const NOBODY: u32 = 65534;

/// Where the shared directory is seen by the program under test.
pub(crate) const SEEN_AT: &str = "/mnt";

/// What a test needs.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// The program, and a user without privileges to run it.
    Program,
    /// Also the image `tiny`, which is built on first use.
    Machine,
    /// Also the image `debian`, which is built on first use: that takes minutes.
    Debian,
    /// Also the image [`WORKBENCH`], which is built on first use: that takes minutes.
    Workbench,
}

/// The image that guests work in: `debian` with a compiler, and more programs to try a machine with.
pub const WORKBENCH: &str = "workbench";

/// What it has beyond `debian`.
const WORKBENCH_PACKAGES: &str = "gcc,libc6-dev,memtest86+,stress-ng";

/// The file in which a test that cannot run is noted as `name<TAB>reason`; `cargo xtask test` reads it.
const SKIPS_VARIABLE: &str = "STRATA_TEST_SKIPS";

/// Whether a test may go on. If not, its name and the reason are printed and noted; it has to return then.
/// Only a host that has no way to an unprivileged user is a reason: a machine that does not boot is a failure.
#[must_use]
pub fn ready(need: Need) -> bool {
    let place = shared();
    if let Err(reason) = &place.user {
        skip(reason);
        return false;
    }
    match need {
        Need::Program => {}
        Need::Machine => place.prepare_machine(),
        Need::Debian => place.prepare_image("debian", &[]),
        Need::Workbench => {
            let options = ["--from", "debian", "--package", WORKBENCH_PACKAGES];
            place.prepare_image(WORKBENCH, &options);
        }
    }
    true
}

/// Prints and notes that this test is not run, and why; the test has to return then.
pub fn skip(reason: &str) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("?");
    println!("SKIPPED {name}: {reason}");
    if let Some(path) = env::var_os(SKIPS_VARIABLE) {
        let note = |mut file: File| file.write_all(format!("{name}\t{reason}\n").as_bytes());
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(note)
            .expect("a skipped test can be noted");
    }
}

/// The shared directory and how to run in it.
pub struct Place {
    root: PathBuf,
    user: Result<Way, String>,
}

/// How to become a user without privileges.
#[derive(Copy, Clone, Debug)]
enum Way {
    /// From root, to `nobody`.
    Drop,
    /// As the same user, in a user namespace that allows hiding files.
    Namespace,
}

/// The place all tests of this build share; made on first use.
pub fn shared() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(Place::make)
}

impl Place {
    fn make() -> Place {
        let binary = env::var_os("STRATA_BINARY").map_or_else(built_binary, PathBuf::from);
        let root = built_binary().with_file_name("e2e");
        fs::create_dir_all(&root).expect("the shared directory can be made");
        // The program's own directory must be passable for another user, wherever the target directory is.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))
            .expect("the shared directory is ours");
        let place = Place {
            user: find_way(&binary),
            root,
        };
        let _lock = place.lock("place");
        for directory in ["cache", "home", "run", "tmp"] {
            place.make_directory(&place.root.join(directory));
        }
        if place.user.is_ok() {
            place.copy_binary(&binary);
        }
        place
    }

    /// The shared directory, as the tests see it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A program of this workspace that Cargo built with the tests.
    pub fn built(&self, name: &str) -> PathBuf {
        built_binary().with_file_name(name)
    }

    /// A directory of the unprivileged user's own that goes when dropped; its contents are seen at [`Place::seen`].
    pub fn scratch(&self) -> tempfile::TempDir {
        let directory = tempfile::Builder::new()
            .prefix("test-")
            .tempdir_in(self.root.join("tmp"))
            .expect("a directory can be made");
        self.make_directory(directory.path());
        directory
    }

    /// The path under which the program under test sees `path`, which lies in the shared directory.
    pub fn seen(&self, path: &Path) -> PathBuf {
        Path::new(SEEN_AT).join(
            path.strip_prefix(&self.root)
                .expect("the path is in the shared directory"),
        )
    }

    /// Kernel and RAM disk of the image `tiny`, as the program under test sees them.
    pub fn tiny_files(&self) -> (PathBuf, PathBuf) {
        let (kernel, initrd) = self.tiny_files_here();
        (self.seen(&kernel), self.seen(&initrd))
    }

    /// Kernel and RAM disk of the image `tiny`, as the tests see them.
    pub fn tiny_files_here(&self) -> (PathBuf, PathBuf) {
        let manifest = self.manifest("tiny");
        (
            self.blob(&manifest, "kernel"),
            self.blob(&manifest, "initrd"),
        )
    }

    /// What the cache says of an image.
    pub fn manifest(&self, image: &str) -> serde_json::Value {
        let path = self.root.join(format!("cache/images/{image}.json"));
        let text = fs::read_to_string(path).expect("the image is built");
        serde_json::from_str(&text).expect("the manifest is JSON")
    }

    /// One of an image's files, as the tests see it.
    pub fn blob(&self, manifest: &serde_json::Value, part: &str) -> PathBuf {
        let digest = manifest[part]["sha256"]
            .as_str()
            .expect("the manifest names its files");
        self.root.join("cache/blobs/sha256").join(digest)
    }

    /// Makes a file readable for the unprivileged user, and its own.
    pub fn give(&self, path: &Path) {
        if matches!(self.user, Ok(Way::Drop)) {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("root can give files away");
        }
    }

    fn make_directory(&self, path: &Path) {
        fs::create_dir_all(path).expect("a directory can be made");
        self.give(path);
        if fs::metadata(path).expect("it is there").mode() & 0o777 != 0o700 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).expect("it is ours");
        }
    }

    /// A lock between the processes of the tests; released when dropped.
    pub(crate) fn lock(&self, name: &str) -> File {
        let file =
            File::create(self.root.join(format!("{name}.lock"))).expect("a lock file can be made");
        file.lock().expect("a lock can be waited for");
        file
    }

    /// Puts the binary where every user can reach it, unless it is there already.
    fn copy_binary(&self, binary: &Path) {
        let copy = self.root.join("strata");
        if mark(binary) == fs::read_to_string(self.root.join("strata.mark")).unwrap_or_default()
            && copy.is_file()
        {
            return;
        }
        // By rename: another test may be running the old one.
        let new = self.root.join("strata.new");
        fs::copy(binary, &new).expect("the binary can be copied");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("the copy is ours");
        fs::rename(&new, &copy).expect("the copy can be moved");
        fs::write(self.root.join("strata.mark"), mark(binary)).expect("the copy can be noted");
    }

    /// Makes sure that the image `tiny` is there, built by this build of the program, and that it boots.
    fn prepare_machine(&self) {
        let _lock = self.lock("machine");
        let noted = self.root.join("machine.mark");
        let mark =
            fs::read_to_string(self.root.join("strata.mark")).expect("the binary has been copied");
        if fs::read_to_string(&noted).is_ok_and(|about| about == mark) {
            return;
        }
        Strata::new()
            .args(["image", "build", "tiny"])
            .timeout(Duration::from_secs(280))
            .run()
            .expect(0);
        Strata::tiny(["true"]).run().expect(0);
        fs::write(&noted, mark).expect("that it works can be noted");
    }

    /// Makes sure that an image is there, as this build of the program would make it.
    fn prepare_image(&self, name: &str, options: &[&str]) {
        let _lock = self.lock("image");
        let list = Strata::new().args(["image", "ls", "--json"]);
        let list = list.run().expect(0).text();
        let images: serde_json::Value = serde_json::from_str(&list).expect("the list is JSON");
        let is_ready = |image: &serde_json::Value| {
            image["name"] == name && image["built"] == true && image["current"] == true
        };
        if images
            .as_array()
            .is_none_or(|images| !images.iter().any(is_ready))
        {
            Strata::new()
                .args(["image", "build", name])
                .args(options.iter().copied())
                .timeout(Duration::from_secs(580))
                .run()
                .expect(0);
        }
    }

    /// A command that runs `program` as the unprivileged user, with `/dev/kvm` hidden and the shared directory at `/mnt`.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        const SCRIPT: &str = "if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi && mount --bind \"$1\" /mnt && cd /mnt/tmp && shift && exec setpriv \"$@\"";
        let way = self
            .user
            .as_ref()
            .expect("the test has asked whether it is ready");
        let mut command = Command::new("unshare");
        if matches!(way, Way::Namespace) {
            command.args(["--user", "--map-current-user", "--keep-caps"]);
        }
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "--",
                "sh",
                "-c",
                SCRIPT,
                "sh",
            ])
            .arg(&self.root);
        if matches!(way, Way::Drop) {
            let nobody = NOBODY.to_string();
            command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]);
        }
        command
            .args([
                "--inh-caps=-all",
                "--ambient-caps=-all",
                "--bounding-set=-all",
                "--no-new-privs",
                "--",
            ])
            .arg(program);
        let path =
            format!("{SEEN_AT}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
            .env("PATH", path)
            .env("HOME", format!("{SEEN_AT}/home"))
            .env("TMPDIR", format!("{SEEN_AT}/tmp"));
        command
            .env("STRATA_CACHE", format!("{SEEN_AT}/cache"))
            .env("XDG_RUNTIME_DIR", format!("{SEEN_AT}/run"));
        command
            .env_remove("RUST_BACKTRACE")
            .env_remove("XDG_CACHE_HOME")
            .process_group(0);
        command
    }
}

/// The program that Cargo built: `target/PROFILE/strata`, beside a campaign and one level above `target/PROFILE/deps/TEST`.
fn built_binary() -> PathBuf {
    let own = env::current_exe().expect("a program has a path");
    let directory = own.parent().expect("it is in a directory");
    let profile = match directory.ends_with("deps") {
        true => directory.parent().unwrap_or(directory),
        false => directory,
    };
    profile.join("strata")
}

/// Tells one build of the binary from another.
fn mark(binary: &Path) -> String {
    let about = fs::metadata(binary).expect("the binary is there");
    format!(
        "{} {} {}.{:09}",
        binary.display(),
        about.len(),
        about.mtime(),
        about.mtime_nsec()
    )
}

fn find_way(binary: &Path) -> Result<Way, String> {
    if !binary.is_file() {
        return Err(format!(
            "there is no {}: build the whole workspace, as `cargo xtask test` does",
            binary.display()
        ));
    }
    let works = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(arguments).args([
            "--mount",
            "--propagation",
            "private",
            "--",
            "mount",
            "--bind",
            "/dev/null",
            "/dev/null",
        ]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    let own = fs::metadata("/proc/self").map(|about| about.uid());
    match own {
        Ok(0) if works(&[]) => Ok(Way::Drop),
        Ok(0) => {
            Err("root may not make mount namespaces here, so /dev/kvm cannot be hidden".to_owned())
        }
        Ok(_) if works(&["--user", "--map-current-user", "--keep-caps"]) => Ok(Way::Namespace),
        Ok(_) => {
            Err("this user may not make user namespaces, so /dev/kvm cannot be hidden".to_owned())
        }
        Err(error) => Err(format!("cannot tell who runs this: {error}")),
    }
}
