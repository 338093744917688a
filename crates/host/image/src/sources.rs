//! Where Debian's packages come from: the mirrors this host is configured for, rewritten for the release we build from.
//!
//! Only Debian's own suites are taken over; what else a host has configured is none of our business and could fail.

use std::collections::BTreeSet;
use std::fmt;

/// Keys of Debian's archive, from the package `debian-archive-keyring`.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Names a Debian release goes by in a host's configuration.
const RELEASES: [&str; 10] = [
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// For a host that is not a Debian one.
const DEFAULTS: [(&str, &str); 3] = [
    ("http://deb.debian.org/debian", ""),
    ("http://deb.debian.org/debian", "-updates"),
    ("http://deb.debian.org/debian-security", "-security"),
];

/// One line of a sources list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    uri: String,
    suite: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "deb [signed-by={KEYRING}] {} {} main",
            self.uri, self.suite
        )
    }
}

/// The sources of `release`: from `mirror` if there is one (security updates from where the host gets them), otherwise
/// as derived from the host's.
pub fn choose(release: &str, mirror: Option<&str>, files: &[String]) -> Vec<Source> {
    let mut sources = derive(release, files);
    if let Some(mirror) = mirror {
        let security = format!("{release}-security");
        sources.retain(|source| source.suite == security);
        sources.extend(["", "-updates"].map(|pocket| Source {
            uri: mirror.trim_end_matches('/').to_owned(),
            suite: format!("{release}{pocket}"),
        }));
    }
    sources
}

/// Whether a text can be the address of a mirror: of a kind that apt fetches from, and nothing that means more to apt.
pub fn is_mirror(text: &str) -> bool {
    let known = ["http://", "https://", "file:/"]
        .iter()
        .any(|kind| text.starts_with(kind));
    known
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"[]\"'#".contains(&byte))
}

/// Makes the sources of `release` out of the texts of a host's sources files (one-line and deb822 style).
pub fn derive(release: &str, files: &[String]) -> Vec<Source> {
    let mut found = BTreeSet::new();
    for file in files {
        for (uri, suite) in configured(file) {
            let Some(pocket) = pocket(&suite) else {
                continue;
            };
            if !uri.starts_with("cdrom:") {
                found.insert(Source {
                    uri: uri.trim_end_matches('/').to_owned(),
                    suite: format!("{release}{pocket}"),
                });
            }
        }
    }
    if !found.iter().any(|source| source.suite == release) {
        let default = |(uri, pocket): (&str, &str)| Source {
            uri: uri.to_owned(),
            suite: format!("{release}{pocket}"),
        };
        return DEFAULTS.into_iter().map(default).collect();
    }
    found.into_iter().collect()
}

/// What follows the release's name in a Debian suite: nothing, `-updates` or `-security`.
fn pocket(suite: &str) -> Option<&'static str> {
    let (release, pocket) = suite.split_once('-').unwrap_or((suite, ""));
    let pocket = match pocket {
        "" => "",
        "updates" => "-updates",
        "security" => "-security",
        _ => return None,
    };
    RELEASES.contains(&release).then_some(pocket)
}

/// All pairs of address and suite with binary packages in one sources file.
fn configured(file: &str) -> Vec<(String, String)> {
    let deb822 = file
        .lines()
        .any(|line| line.to_ascii_lowercase().starts_with("types:"));
    if deb822 {
        file.split("\n\n").flat_map(stanza).collect()
    } else {
        file.lines().filter_map(one_line).collect()
    }
}

/// `deb [option=value …] URI SUITE COMPONENT…`
fn one_line(line: &str) -> Option<(String, String)> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    let line = line.strip_prefix([' ', '\t'])?.trim_start();
    let line = if line.starts_with('[') {
        line.split_once(']')?.1
    } else {
        line
    };
    let mut words = line.split_ascii_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    words
        .any(|component| component == "main")
        .then(|| (uri.to_owned(), suite.to_owned()))
}

/// `Types: deb` / `URIs: …` / `Suites: …` / `Components: …`, with continuation lines that start with a space.
fn stanza(stanza: &str) -> Vec<(String, String)> {
    let words = |field: &str| -> Vec<String> {
        let mut words = Vec::new();
        let mut inside = false;
        for line in stanza.lines().filter(|line| !line.starts_with('#')) {
            let rest = match line.split_once(':') {
                Some((name, rest)) if !line.starts_with([' ', '\t']) => {
                    inside = name.eq_ignore_ascii_case(field);
                    rest
                }
                _ => line,
            };
            if inside {
                words.extend(rest.split_ascii_whitespace().map(str::to_owned));
            }
        }
        words
    };
    let off = words("Enabled")
        .iter()
        .any(|word| word.eq_ignore_ascii_case("no"));
    let binary = words("Types").iter().any(|word| word == "deb");
    if off || !binary || !words("Components").iter().any(|word| word == "main") {
        return Vec::new();
    }
    let suites = words("Suites");
    words("URIs")
        .into_iter()
        .flat_map(|uri| {
            suites
                .iter()
                .map(move |suite| (uri.clone(), suite.clone()))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(files: &[&str], expected: &[&str]) {
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        let lines: Vec<String> = derive("bookworm", &files)
            .iter()
            .map(|source| format!("{} {}", source.uri, source.suite))
            .collect();
        assert_eq!(lines, expected);
    }

    const DEFAULT_LINES: [&str; 3] = [
        "http://deb.debian.org/debian bookworm",
        "http://deb.debian.org/debian bookworm-updates",
        "http://deb.debian.org/debian-security bookworm-security",
    ];

    #[test]
    fn nothing_or_nothing_of_debians() {
        check(&[], &DEFAULT_LINES);
        check(
            &[
                "deb http://archive.ubuntu.com/ubuntu noble main\n",
                "# deb http://x/debian bookworm main",
            ],
            &DEFAULT_LINES,
        );
        check(
            &[
                "Types: deb\nURIs: https://deb.nodesource.com/node_20.x\nSuites: nodistro\nComponents: main\n",
            ],
            &DEFAULT_LINES,
        );
    }

    #[test]
    fn one_line_style_of_another_release() {
        check(
            &[
                "deb [arch=amd64 signed-by=/x.gpg] https://mirror.example/debian/ trixie main contrib # ours\n\
               deb-src https://mirror.example/debian trixie main\n\
               deb https://mirror.example/debian trixie-backports main\n\
               deb https://mirror.example/debian-security trixie-security main\n",
            ],
            &[
                "https://mirror.example/debian bookworm",
                "https://mirror.example/debian-security bookworm-security",
            ],
        );
    }

    #[test]
    fn deb822_style() {
        check(
            &[
                "Types: deb deb-src\n# a remark\nURIs: mirror+file:///etc/apt/mirrors/debian.list\n\
               Suites: bookworm\n bookworm-updates\nComponents: main\nSigned-By:\n -----BEGIN\n .\n\n\
               Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n",
            ],
            &[
                "mirror+file:///etc/apt/mirrors/debian.list bookworm",
                "mirror+file:///etc/apt/mirrors/debian.list bookworm-updates",
            ],
        );
    }
}
