//! The options the kernel command line holds for us.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// What the kernel command line asks of this boot. Names that start with `strata.` are ours; those about the root file
/// system are the ones that every initial RAM disk takes from it; the rest is the kernel's.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    /// `strata.console=ttyS0`: run a root shell on this terminal of `/dev`.
    pub console: Option<String>,
    /// `strata.agent=1`: listen on vsock for the host.
    pub agent: bool,
    /// `strata.run="PATH ARG…"`, with whatever follows ` -- ` appended: run this, then power off.
    pub run: Vec<OsString>,
    /// `strata.hostname=NAME`.
    pub hostname: Option<String>,
    /// `strata.term=NAME`: TERM of the console shell.
    pub term: Option<String>,
    /// `strata.rows=N`: height of the console in characters.
    pub rows: u16,
    /// `strata.cols=N`: width of the console in characters.
    pub cols: u16,
    /// `root=UUID=…`, `root=LABEL=…` or `root=/dev/…`: mount this and hand the machine over to the system on it.
    pub root: Option<String>,
    /// `rootfstype=NAME`.
    pub root_type: Option<String>,
    /// `rw`, after any `ro`: the root file system may be written from the start; otherwise its system sees to that.
    pub root_writable: bool,
    /// `init=PATH`: the first program of the system on the root file system.
    pub init: Option<String>,
}

impl Options {
    /// Reads the options out of a kernel command line (the contents of `/proc/cmdline`).
    ///
    /// Of a repeated option the last one counts, as with the kernel's own.
    pub fn parse(command_line: &[u8]) -> Options {
        let mut options = Options::default();
        let words = words(command_line);
        let (ours, rest) = match words.iter().position(|word| word == b"--") {
            Some(end) => (&words[..end], &words[end + 1..]),
            None => (&words[..], &[][..]),
        };
        for word in ours {
            let Some(option) = word.strip_prefix(b"strata.") else {
                options.set_root(word);
                continue;
            };
            let split = option.iter().position(|&byte| byte == b'=');
            let (name, value) = match split {
                Some(at) => (&option[..at], &option[at + 1..]),
                None => (option, &b""[..]),
            };
            options.set(name, value);
        }
        if !options.run.is_empty() {
            options
                .run
                .extend(rest.iter().map(|word| OsString::from_vec(word.clone())));
        }
        options
    }

    fn set_root(&mut self, word: &[u8]) {
        let value = |name: &[u8]| {
            let value = word.strip_prefix(name)?;
            Some(String::from_utf8_lossy(value).into_owned()).filter(|text| !text.is_empty())
        };
        match word {
            b"ro" => self.root_writable = false,
            b"rw" => self.root_writable = true,
            _ => {
                for (name, field) in [
                    (&b"root="[..], &mut self.root),
                    (b"rootfstype=", &mut self.root_type),
                    (b"init=", &mut self.init),
                ] {
                    if word.starts_with(name) {
                        *field = value(name);
                    }
                }
            }
        }
    }

    fn set(&mut self, name: &[u8], value: &[u8]) {
        let text =
            || Some(String::from_utf8_lossy(value).into_owned()).filter(|text| !text.is_empty());
        let number = || text().and_then(|text| text.parse().ok()).unwrap_or(0);
        match name {
            b"console" => self.console = text(),
            b"agent" => self.agent = value == b"1",
            b"run" => {
                let words = value
                    .split(|byte| byte.is_ascii_whitespace())
                    .filter(|word| !word.is_empty());
                self.run = words
                    .map(|word| OsString::from_vec(word.to_vec()))
                    .collect();
            }
            b"hostname" => self.hostname = text(),
            b"term" => self.term = text(),
            b"rows" => self.rows = number(),
            b"cols" => self.cols = number(),
            _ => {}
        }
    }
}

/// Splits at white space outside double quotes and drops the quotes, as the kernel does (`next_arg` in `lib/cmdline.c`).
fn words(line: &[u8]) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quoted = false;
    for &byte in line {
        match byte {
            b'"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            byte if byte.is_ascii_whitespace() && !quoted => words.extend(word.take()),
            byte => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Vec<OsString> {
        Options::parse(line.as_bytes()).run
    }

    #[test]
    fn options_among_the_kernels_own() {
        let options = Options::parse(b"quiet console=ttyS0 strata.console=hvc0 strata.rows=50 strata.cols=132 strata.agent=1\n");
        let expected = Options {
            console: Some("hvc0".into()),
            agent: true,
            rows: 50,
            cols: 132,
            ..Options::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn a_root_file_system() {
        let options = Options::parse(
            b"ro root=UUID=1-2 quiet rw strata.hostname=x init=/bin/sh rootfstype=xfs",
        );
        let expected = Options {
            hostname: Some("x".into()),
            root: Some("UUID=1-2".into()),
            root_type: Some("xfs".into()),
            root_writable: true,
            init: Some("/bin/sh".into()),
            ..Options::default()
        };
        assert_eq!(options, expected);
        assert!(!Options::parse(b"root=/dev/vda rw ro").root_writable);
    }

    #[test]
    fn nothing_asked() {
        assert_eq!(Options::parse(b""), Options::default());
        assert_eq!(
            Options::parse(b"strata. strata.rows=many strata.unknown=1 strata.agent=0"),
            Options::default()
        );
    }

    #[test]
    fn program_with_arguments() {
        assert_eq!(run("strata.run=/bin/true quiet"), ["/bin/true"]);
        assert_eq!(
            run("\"strata.run=/bin/echo a  b\" quiet"),
            ["/bin/echo", "a", "b"]
        );
        assert_eq!(
            run("strata.run=\"/bin/echo a\" -- \"b c\" d"),
            ["/bin/echo", "a", "b c", "d"]
        );
        assert_eq!(run("quiet -- strata.run=/bin/true"), [""; 0]);
    }
}
