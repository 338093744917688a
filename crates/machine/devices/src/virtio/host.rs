//! A thread of the host that calls a device when a descriptor is ready.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::core::HostHandle;

/// A running thread. Dropping it ends the thread soon, without waiting: the thread itself may be
/// what drops the device.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<OwnedFd>,
}

impl Watcher {
    /// Calls the device through `host` whenever `ready` (such as an epoll instance) is readable.
    /// The call must make it unreadable, or it is made again.
    pub fn spawn(name: &str, ready: OwnedFd, host: HostHandle) -> io::Result<Watcher> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || while wait(&ready, &stopped) && host.notify_when_ready() {})?;
        Ok(Watcher { stop })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // An eventfd whose counter is zero takes the write.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }
}

/// Waits until `ready` is readable; false if the thread is to end.
fn wait(ready: &OwnedFd, stop: &OwnedFd) -> bool {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => return fds.first().is_none_or(|stop| stop.revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
