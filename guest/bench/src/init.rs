//! As the first process of a guest: mounts, arguments from the kernel's command line, power-off.

use std::ffi::CStr;
use std::fs;
use std::ptr;

/// Runs `work` with the arguments of `bench.args="…"` and powers the machine off.
pub fn run(work: impl FnOnce(std::vec::IntoIter<String>)) -> ! {
    mount(c"proc", c"/proc");
    mount(c"sysfs", c"/sys");
    mount(c"devtmpfs", c"/dev");
    mount(c"tmpfs", c"/tmp");
    open_console();
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    // Firmware and kernel may have left the cursor anywhere.
    println!("\nbench: started");
    work(arguments(&line).into_iter());
    // SAFETY: writes out and powers off; neither takes memory of ours.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::park();
    }
}

/// Mounts a file system of the kernel's; one that is there already is fine.
fn mount(kind: &CStr, on: &CStr) {
    // SAFETY: all strings end in NUL and live during the calls.
    unsafe {
        libc::mkdir(on.as_ptr(), 0o755);
        libc::mount(kind.as_ptr(), on.as_ptr(), kind.as_ptr(), 0, ptr::null());
    }
}

/// Makes the console standard input, output and error: the kernel had none to give when the image has no `/dev`.
fn open_console() {
    // SAFETY: opens and duplicates descriptors; nothing else in this process uses them yet.
    unsafe {
        let console = libc::open(c"/dev/console".as_ptr(), libc::O_RDWR);
        if console >= 0 {
            for descriptor in 0..3 {
                libc::dup2(console, descriptor);
            }
            if console > 2 {
                libc::close(console);
            }
        }
    }
}

/// The words of `bench.args=…`, which may be in quotation marks.
fn arguments(line: &str) -> Vec<String> {
    let Some((_, rest)) = line.split_once("bench.args=") else {
        return Vec::new();
    };
    let value = match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => rest.split_whitespace().next(),
    };
    value
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_come_from_the_command_line() {
        assert_eq!(
            arguments("quiet bench.args=\"--class a,b --scale 2\" panic=-1\n"),
            ["--class", "a,b", "--scale", "2"]
        );
        assert_eq!(arguments("bench.args=--boot quiet"), ["--boot"]);
        assert!(arguments("quiet").is_empty());
    }
}
