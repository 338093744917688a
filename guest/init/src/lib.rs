//! The first process of our guests, and the agent inside them: one small static binary.
//!
//! It mounts what programs expect, loads the modules this machine's devices need, and then does what the kernel command
//! line asks for ([`options::Options`]): serve the host's agent connections, give a root shell on a console, run one
//! program, or hand the machine over to the system on a root disk. In such a system the same binary, started as `agent`,
//! is the agent only. It owns nothing on disk and keeps no state. It never guesses: what it cannot do it says on the
//! console.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the options on the kernel command line |
//! | [`modules`] | loading kernel modules by the devices present |
//! | [`supervisor`] | process 1: starts the others, reaps, ends the machine |
//! | [`agent`] | listens for the host, one process per connection |
//! | [`session`] | one connection of the host: one program from start to end |
//! | [`root`] | from the RAM disk to a system on a disk |
//! | [`network`] | addresses for network cards, and waiting for them |
//! | [`program`] | from a request to a running program |
//! | [`system`] | safe wrappers of system calls |

pub mod agent;
pub mod modules;
pub mod network;
pub mod options;
pub mod program;
pub mod root;
pub mod session;
pub mod supervisor;
pub mod system;

use std::fs;
use std::io;

use options::Options;

/// Boots the guest. Returns only if that is impossible.
pub fn boot() -> io::Error {
    match mount_all() {
        Ok(()) => {}
        Err(error) => return error,
    }
    let options = match fs::read("/proc/cmdline") {
        Ok(line) => Options::parse(&line),
        Err(error) => return error,
    };
    supervisor::run(&options)
}

/// Mounts the kernel's file systems. Order matters: `/dev/pts` lies in `/dev`.
fn mount_all() -> io::Result<()> {
    let plain = libc::MS_NOSUID | libc::MS_NODEV;
    let quiet = plain | libc::MS_NOEXEC;
    let table = [
        (c"proc", c"/proc", quiet, c""),
        (c"sysfs", c"/sys", quiet, c""),
        (c"devtmpfs", c"/dev", libc::MS_NOSUID, c"mode=755"),
        (
            c"devpts",
            c"/dev/pts",
            libc::MS_NOSUID | libc::MS_NOEXEC,
            c"mode=620,gid=5,ptmxmode=666",
        ),
        (c"tmpfs", c"/dev/shm", plain, c"mode=1777"),
        (c"tmpfs", c"/run", plain, c"mode=755"),
        (c"tmpfs", c"/tmp", plain, c"mode=1777"),
    ];
    for (kind, target, flags, data) in table {
        if matches!(target.to_bytes(), b"/dev/pts" | b"/dev/shm") {
            fs::create_dir_all(target.to_string_lossy().as_ref())?;
        }
        system::mount(kind, target, flags, data).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot mount {}: {error}", target.to_string_lossy()),
            )
        })?;
    }
    Ok(())
}
