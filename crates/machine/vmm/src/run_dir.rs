//! A running machine's private directory: its lock, its sockets, and the discovery of other machines.
//!
//! `$XDG_RUNTIME_DIR/strata/NAME`, or `/tmp/strata-UID/NAME` without one. Its lock file is locked for as long as the
//! machine's process lives, however that ends; a directory whose lock is free is stale and may be removed.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::MachineName;

const LOCK: &str = "lock";
/// How often a name is tried: other processes hold a lock for a moment when they look who runs, or when they remove
/// a stale directory under our hands.
const ATTEMPTS_MAX: u32 = 10;
/// Between two attempts.
const PATIENCE: Duration = Duration::from_millis(2);

/// A machine's run directory; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held for its lock.
    _lock: File,
}

/// Why there is no run directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another machine has the name.
    #[error("a machine named '{0}' is already running")]
    NameInUse(MachineName),
    /// No machine has the name.
    #[error("no machine named '{0}' is running")]
    NotRunning(MachineName),
    /// Somebody else could look into it or change it.
    #[error("{} is not a private directory of this user: it must be owned by uid {uid} with mode 0700", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Our user id.
        uid: u32,
    },
    /// A file operation failed.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { path, source }
}

impl RunDir {
    /// The directory that holds all run directories of this user.
    pub fn root() -> PathBuf {
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if Path::new(&dir).is_absolute() && Path::new(&dir).is_dir() => {
                Path::new(&dir).join("strata")
            }
            _ => PathBuf::from(format!("/tmp/strata-{}", uid())),
        }
    }

    /// Takes the name for this process and makes its directory below `root`, removing a stale one first.
    pub fn create(root: &Path, name: &MachineName) -> Result<Self, RunDirError> {
        make_private(root)?;
        let path = root.join(name.as_str());
        for _ in 0..ATTEMPTS_MAX {
            make_private(&path)?;
            let lock_path = path.join(LOCK);
            let lock = match OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&lock_path)
            {
                Ok(lock) => lock,
                // Its owner removed the directory between our two steps.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error(&lock_path)(error)),
            };
            match lock.try_lock() {
                Ok(()) if is_at(&lock, &lock_path) => {
                    remove_contents(&path)?;
                    return Ok(Self { path, _lock: lock });
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => std::thread::sleep(PATIENCE),
                Err(TryLockError::Error(error)) => return Err(io_error(&lock_path)(error)),
            }
        }
        Err(RunDirError::NameInUse(name.clone()))
    }

    /// The directory of a machine that runs.
    pub fn find(root: &Path, name: &MachineName) -> Result<PathBuf, RunDirError> {
        let path = root.join(name.as_str());
        if is_running(&path) {
            check_private(&path)?;
            Ok(path)
        } else {
            Err(RunDirError::NotRunning(name.clone()))
        }
    }

    /// The names of all machines that run, sorted; removes the directories of those that no longer do.
    pub fn list(root: &Path) -> Vec<MachineName> {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        let mut names: Vec<MachineName> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|name: &MachineName| {
                let running = is_running(&root.join(name.as_str()));
                if !running {
                    // Taking the name and dropping it removes what is stale, and nothing else.
                    drop(RunDir::create(root, name));
                }
                running
            })
            .collect();
        names.sort();
        names
    }

    /// Where the sockets of shared networks are, below `root`; made if it is missing.
    pub fn networks(root: &Path) -> Result<PathBuf, RunDirError> {
        make_private(root)?;
        // No machine has such a name.
        let path = root.join(".networks");
        make_private(&path)?;
        Ok(path)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the control socket is.
    pub fn control_socket(dir: &Path) -> PathBuf {
        dir.join("control.sock")
    }

    /// Where the vsock's Unix socket is, unless configured otherwise.
    pub fn vsock_socket(dir: &Path) -> PathBuf {
        dir.join("vsock.sock")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Nothing can be done about what cannot be removed; the next user of the name tries again.
        // The lock is held until after this, so nobody else is in here.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

fn make_private(path: &Path) -> Result<(), RunDirError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error(path)(error)),
        _ => check_private(path),
    }
}

/// Refuses links and directories that others own or can enter: `/tmp` is open to everybody.
fn check_private(path: &Path) -> Result<(), RunDirError> {
    let meta = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io_error(path))?,
    };
    if meta.is_dir() && meta.uid() == uid() && meta.mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(RunDirError::NotPrivate {
            path: path.to_owned(),
            uid: uid(),
        })
    }
}

/// Whether `file` is what the path names now.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn is_running(path: &Path) -> bool {
    match File::open(path.join(LOCK)) {
        // A shared lock, so that two who look do not see each other.
        Ok(lock) => matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

/// Removes what a dead machine left, but not the lock.
fn remove_contents(path: &Path) -> Result<(), RunDirError> {
    for entry in fs::read_dir(path).map_err(io_error(path))? {
        let entry = entry.map_err(io_error(path))?;
        if entry.file_name() != LOCK {
            let kind = entry.file_type().map_err(io_error(&entry.path()))?;
            let removed = if kind.is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            removed.map_err(io_error(&entry.path()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(name: &str) -> MachineName {
        name.parse().unwrap()
    }

    #[test]
    fn a_name_is_taken_until_it_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("strata");
        let first = RunDir::create(&root, &name("a")).unwrap();
        assert_eq!(fs::metadata(first.path()).unwrap().mode() & 0o777, 0o700);
        let error = RunDir::create(&root, &name("a")).unwrap_err();
        assert_eq!(error.to_string(), "a machine named 'a' is already running");
        let second = RunDir::create(&root, &name("b")).unwrap();
        assert_eq!(RunDir::list(&root), [name("a"), name("b")]);
        assert_eq!(RunDir::find(&root, &name("b")).unwrap(), second.path());
        drop(first);
        assert_eq!(RunDir::list(&root), [name("b")]);
        let error = RunDir::find(&root, &name("a")).unwrap_err();
        assert_eq!(error.to_string(), "no machine named 'a' is running");
        RunDir::create(&root, &name("a")).unwrap();
    }

    #[test]
    fn what_a_dead_machine_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("strata");
        drop(RunDir::create(&root, &name("keep")).unwrap());
        let stale = root.join("dead");
        DirBuilder::new().mode(0o700).create(&stale).unwrap();
        fs::write(stale.join(LOCK), "").unwrap();
        fs::write(stale.join("control.sock"), "").unwrap();
        let dir = RunDir::create(&root, &name("dead")).unwrap();
        assert!(!dir.path().join("control.sock").exists());
        drop(dir);
        DirBuilder::new().mode(0o700).create(&stale).unwrap();
        assert_eq!(RunDir::list(&root), []);
        assert!(!stale.exists());
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("strata");
        fs::create_dir(&root).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        let error = RunDir::create(&root, &name("a")).unwrap_err();
        assert!(matches!(error, RunDirError::NotPrivate { .. }), "{error}");
        fs::remove_dir(&root).unwrap();
        std::os::unix::fs::symlink("/", &root).unwrap();
        let error = RunDir::create(&root, &name("a")).unwrap_err();
        assert!(matches!(error, RunDirError::NotPrivate { .. }), "{error}");
    }
}
