//! Loads the kernel modules this machine's devices need, and no others.
//!
//! `/etc/strata/modules` holds one driver per line, in loading order: the paths of the modules it depends on and its
//! own, then ` : ` and the device aliases it serves (shell patterns, as in `modules.alias`). A line without aliases is
//! loaded whether or not there is a device.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Where the image's builder leaves the list.
pub const LIST: &str = "/etc/strata/modules";

/// The buses whose devices are there from the start.
const FIXED_BUSES: [&str; 2] = ["pci", "acpi"];

/// What the processor can do, in the form of a device's alias.
const PROCESSOR: &str = "/sys/devices/system/cpu/modalias";

/// Walks the list one driver at a time.
pub struct Loader<'a> {
    lines: std::str::Lines<'a>,
    loaded: HashSet<&'a str>,
    present: Vec<String>,
}

impl<'a> Loader<'a> {
    /// Looks at the devices of this machine. `/sys` must be mounted.
    pub fn new(list: &'a str) -> Loader<'a> {
        let processor = fs::read_to_string(PROCESSOR).ok();
        let present = FIXED_BUSES
            .iter()
            .flat_map(|bus| device_aliases(bus))
            .chain(processor.map(|text| text.trim_end().to_owned()))
            .collect();
        Loader {
            lines: list.lines(),
            loaded: HashSet::new(),
            present,
        }
    }

    /// Considers the next driver and loads it if it is wanted; false after the last one.
    ///
    /// A module that does not load is reported on the console and left: the machine may well do without.
    pub fn step(&mut self) -> bool {
        let Some(line) = self.lines.next() else {
            return false;
        };
        let (modules, aliases) = line.split_once(" : ").unwrap_or((line, ""));
        if !self.serves_something(aliases) {
            return true;
        }
        for path in modules.split_ascii_whitespace() {
            if self.loaded.insert(path)
                && let Err(error) = insert(path)
            {
                eprintln!("strata-init: {path}: {error}");
            }
        }
        // A driver of a PCI function makes virtio devices.
        self.present.extend(device_aliases("virtio"));
        true
    }

    fn serves_something(&self, aliases: &str) -> bool {
        let mut patterns = aliases.split_ascii_whitespace().peekable();
        patterns.peek().is_none()
            || patterns.any(|pattern| {
                self.present
                    .iter()
                    .any(|alias| matches(pattern.as_bytes(), alias.as_bytes()))
            })
    }
}

/// The aliases of the devices on one bus; none if the kernel has no such bus.
fn device_aliases(bus: &str) -> Vec<String> {
    let Ok(devices) = fs::read_dir(Path::new("/sys/bus").join(bus).join("devices")) else {
        return Vec::new();
    };
    let alias = |device: fs::DirEntry| fs::read_to_string(device.path().join("modalias")).ok();
    devices
        .flatten()
        .filter_map(alias)
        .map(|text| text.trim_end().to_owned())
        .collect()
}

/// Inserts one module. One that is already there is fine.
fn insert(path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::default();
    // SAFETY: the descriptor is open and the parameter string ends in NUL; the kernel copies both arguments.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

/// Whether a shell pattern of `*`, `?` and plain characters covers the whole text.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to resume when the last `*` has to swallow one more character.
    let mut retry = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(&wanted) if wanted == b'?' || wanted == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((after_star, start)) = retry else {
                    return false;
                };
                retry = Some((after_star, start + 1));
                (p, t) = (after_star, start + 1);
            }
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_real_modules() {
        let check = |pattern: &str, text: &str| matches(pattern.as_bytes(), text.as_bytes());
        assert!(check(
            "pci:v00001AF4d*sv*sd*bc*sc*i*",
            "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc80i00"
        ));
        assert!(!check(
            "pci:v00001AF4d*sv*sd*bc*sc*i*",
            "pci:v00008086d00001237sv00001AF4sd00001100bc06sc00i00"
        ));
        assert!(check("virtio:d00000002v*", "virtio:d00000002v00001AF4"));
        assert!(!check("virtio:d00000002v*", "virtio:d00000013v00001AF4"));
        assert!(check("acpi*:QEMU0001:*", "acpi:QEMU0001:"));
        assert!(check("", "") && check("*", "") && check("**", "ab") && check("a?c*e", "abcdde"));
        assert!(!check("a", "") && !check("", "a") && !check("a?c", "ac"));
    }
}
