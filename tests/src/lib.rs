//! End-to-end tests of the `strata` binary as an ordinary user has it: harness here, one file per promise in `tests/`.
//!
//! The binary runs as a user without capabilities and with `/dev/kvm` hidden ([`Strata`]); as root the harness becomes
//! `nobody` for that, else it stays who it is. Everything it needs lies in one directory, which that user sees at `/mnt`
//! in a mount namespace of its own, so that it does not matter where the repository is.
//! A test that cannot run on this host says so by name and with a reason ([`ready`]); it never passes silently.

mod campaign;
mod disk;
mod place;
mod run;
mod session;
pub mod stress;
mod tools;

pub use campaign::slice;
pub use disk::RootDisk;
pub use place::{Need, WORKBENCH, ready, shared, skip};
pub use run::{Finished, Strata};
pub use session::Session;
pub use tools::{given, tool, workshop};

/// SHA-256 of `bytes` in lower-case hexadecimal, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// `count` bytes that do not compress, the same for the same `seed`.
pub fn random_bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// The lines of the `console` blocks in a Markdown text, in pairs of a command and what it prints.
pub fn console_blocks(markdown: &str) -> Vec<(String, String)> {
    let mut steps: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in markdown.lines() {
        match (inside, line) {
            (false, "```console") => inside = true,
            (true, "```") => inside = false,
            (true, line) => match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => steps.push((command.to_owned(), String::new())),
                (None, Some((_, output))) => {
                    output.push_str(line);
                    output.push('\n');
                }
                (None, None) => {}
            },
            (false, _) => {}
        }
    }
    steps
}

/// Whether `actual` is what `pattern` shows; `…` in it stands for anything within a line.
pub fn looks_like(pattern: &str, actual: &str) -> bool {
    let line = |pattern: &str, actual: &str| {
        let mut parts = pattern.split('…');
        let Some(mut rest) = actual.strip_prefix(parts.next().unwrap_or_default()) else {
            return false;
        };
        let mut parts: Vec<&str> = parts.collect();
        let Some(last) = parts.pop() else {
            return rest.is_empty();
        };
        for part in parts {
            let Some(at) = rest.find(part) else {
                return false;
            };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    };
    let (patterns, lines): (Vec<&str>, Vec<&str>) =
        (pattern.lines().collect(), actual.lines().collect());
    patterns.len() == lines.len()
        && patterns
            .iter()
            .zip(lines)
            .all(|(pattern, actual)| line(pattern, actual))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum() {
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn console_blocks_are_found() {
        let text = "a\n```console\n$ one\nx\ny\n$ two\n```\n$ no\n```sh\n$ no\n```\n```console\n$ three\nz\n```\n";
        let steps: Vec<(&str, &str)> = vec![("one", "x\ny\n"), ("two", ""), ("three", "z\n")];
        let found = console_blocks(text);
        assert_eq!(
            found
                .iter()
                .map(|(a, b)| (a.as_str(), b.as_str()))
                .collect::<Vec<_>>(),
            steps
        );
    }

    #[test]
    fn dots_stand_for_anything() {
        assert!(looks_like("6.1.0-…-amd64\n", "6.1.0-44-cloud-amd64\n"));
        assert!(looks_like("a…b…c", "a1b2b3c"));
        assert!(!looks_like("a…b…c", "a1c"));
        assert!(!looks_like("a\n", "a\nb\n"));
        assert!(!looks_like("abc", "ab"));
    }
}
