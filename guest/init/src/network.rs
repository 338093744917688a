//! The network of a guest that is all RAM disk: busybox's DHCP client for each card, and waiting for a way out.
//!
//! A system on a root disk has its own means; the waiting is the same.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::system;

/// The script that the client runs with what it was told.
const SCRIPT: &str = "/etc/strata/dhcp";
/// Where resolvers are named; in some systems a link to what a service makes.
const RESOLVERS: &str = "/etc/resolv.conf";
/// Where the kernel lists its interfaces.
const INTERFACES: &str = "/sys/class/net";
/// How a virtio device says that it is a network card (virtio 1.2, section 5).
const CARD: &str = "virtio:d00000001v";
/// A program of the host is started without a network when the machine has run for this long: seconds.
const PATIENCE: f64 = 20.0;

/// Starts a client for each card. Without one on the image there is nothing to do.
pub fn start() -> io::Result<()> {
    if !Path::new(SCRIPT).exists() {
        return Ok(());
    }
    for entry in fs::read_dir(INTERFACES)?.flatten() {
        // What has no device behind it is the kernel's own.
        if !entry.path().join("device").exists() {
            continue;
        }
        let name = entry.file_name();
        system::interface_up(&name.to_string_lossy())?;
        Command::new("/bin/udhcpc")
            .args(["-f", "-t", "20", "-T", "1", "-A", "2", "-s", SCRIPT, "-i"])
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
    }
    Ok(())
}

/// Waits until there is a way out and somebody to ask for names, if there is a card and the machine has just begun.
pub fn wait() {
    let is_ready = || has_route() && Path::new(RESOLVERS).exists();
    while has_card() && !is_ready() && uptime().is_some_and(|seconds| seconds < PATIENCE) {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether there is a card, even one whose driver is not there yet.
fn has_card() -> bool {
    let devices = fs::read_dir("/sys/bus/virtio/devices")
        .into_iter()
        .flatten();
    devices.flatten().any(|device| {
        fs::read_to_string(device.path().join("modalias"))
            .is_ok_and(|alias| alias.starts_with(CARD))
    })
}

fn has_route() -> bool {
    fs::read_to_string("/proc/net/route").is_ok_and(|table| is_default(&table))
}

/// Whether a table of routes has a default one (proc(5)).
fn is_default(table: &str) -> bool {
    let to = |line: &str| line.split_ascii_whitespace().nth(1) == Some("00000000");
    table.lines().skip(1).any(to)
}

fn uptime() -> Option<f64> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    text.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes() {
        let heading = "Iface\tDestination\tGateway \tFlags\n";
        assert!(!is_default(heading));
        assert!(!is_default(&format!(
            "{heading}eth0\t0002000A\t00000000\t0001\n"
        )));
        assert!(is_default(&format!(
            "{heading}eth0\t00000000\t0102000A\t0003\n"
        )));
    }
}
