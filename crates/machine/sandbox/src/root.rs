//! A root directory with nothing in it but the devices that a machine must still open.

use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_move,
    mount_remount, unmount,
};

/// Where the new root is put together: directories that every host has. What they hold is hidden by it, and only here.
const PLACES: [&str; 3] = ["/tmp", "/proc", "/dev"];
/// Enough for a few mount points.
const OPTIONS: &std::ffi::CStr = c"size=64k,nr_inodes=16,mode=0555";

/// Changes this process's root directory to one that holds `devices` and nothing else, and cannot be written.
///
/// The process must have a mount namespace of its own and the right to use it.
pub(crate) fn empty(devices: &[&Path]) -> io::Result<()> {
    let kind = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", kind)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let at = PLACES
        .iter()
        .find(|at| {
            let hides = devices.iter().any(|device| device.starts_with(at));
            !hides && mount("tmpfs", **at, "tmpfs", flags, Some(OPTIONS)).is_ok()
        })
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))?;
    for device in devices {
        place(device, Path::new(at))?;
    }
    let remount = flags | MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(*at, remount, c"")?;
    rustix::process::chdir(*at)?;
    if rustix::process::pivot_root(".", ".").is_ok() {
        // The old root lies on the new one.
        unmount(".", UnmountFlags::DETACH)?;
    } else {
        // The first root of a system, which is in memory, cannot be changed for another: it is covered.
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
    }
    rustix::process::chdir("/")?;
    Ok(())
}

/// Makes one device visible in the new root at its own path.
fn place(device: &Path, root: &Path) -> io::Result<()> {
    let Ok(relative) = device.strip_prefix("/") else {
        return Ok(());
    };
    let target = root.join(relative);
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(&target, flags, Mode::from_raw_mode(0o400))?;
    mount_bind(device, &target)?;
    Ok(())
}
