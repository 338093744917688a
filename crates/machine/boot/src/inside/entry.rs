//! What boot loaders are told to start: Boot Loader Specification entries and `extlinux.conf`; and names of kernels
//! with what belongs to them. A `grub.cfg` is a program, and not run here.

use std::cmp::Ordering;

/// A kernel, what it is given, and how it is called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct BootEntry {
    pub(super) kernel: String,
    pub(super) initrds: Vec<String>,
    pub(super) options: String,
    /// What entries are sorted by; the greatest is the newest.
    pub(super) version: String,
}

/// Reads an entry of the Boot Loader Specification (type 1). None if it names no kernel.
pub(super) fn loader_entry(name: &str, text: &str) -> Option<BootEntry> {
    let mut entry = BootEntry {
        version: name.trim_end_matches(".conf").to_owned(),
        ..BootEntry::default()
    };
    for line in text.lines() {
        let (key, value) = split_word(line);
        match key {
            "linux" => entry.kernel = value.to_owned(),
            "initrd" => entry
                .initrds
                .extend(value.split_whitespace().map(str::to_owned)),
            "options" => {
                entry.options.push(' ');
                entry.options.push_str(value);
            }
            "version" => entry.version = value.to_owned(),
            _ => {}
        }
    }
    // Variables of GRUB, which some write into entries, mean nothing here.
    entry.initrds.retain(|path| !path.starts_with('$'));
    (!entry.kernel.is_empty()).then_some(entry)
}

/// The default of an `extlinux.conf`, or its first entry. Of a menu, whose program is then the default, it is the entry
/// that says so itself.
pub(super) fn extlinux(text: &str) -> Option<BootEntry> {
    let mut default = None;
    let mut entries: Vec<(String, BootEntry)> = Vec::new();
    for line in text.lines() {
        let (key, value) = split_word(line);
        let key = key.to_ascii_lowercase();
        if let ("menu", Some((label, _))) = (key.as_str(), entries.last())
            && value.eq_ignore_ascii_case("default")
        {
            default = Some(label.clone());
        }
        let entry = entries.last_mut().map(|(_, entry)| entry);
        match (key.as_str(), entry) {
            ("default", _) => default = Some(value.to_owned()),
            ("label", _) => entries.push((value.to_owned(), BootEntry::default())),
            ("linux" | "kernel", Some(entry)) => entry.kernel = value.to_owned(),
            ("initrd", Some(entry)) => {
                entry.initrds = value.split(',').map(str::to_owned).collect()
            }
            ("append", Some(entry)) => entry.options = value.to_owned(),
            _ => {}
        }
    }
    let is_default = |(label, _): &&(String, BootEntry)| Some(label) == default.as_ref();
    let chosen = entries.iter().find(is_default).or(entries.first());
    let mut entry = chosen.map(|(_, entry)| entry.clone())?;
    // It may also stand among the parameters.
    if entry.initrds.is_empty() {
        let named = entry
            .options
            .split_whitespace()
            .find_map(|word| word.strip_prefix("initrd="));
        entry.initrds = named
            .into_iter()
            .flat_map(|names| names.split(','))
            .map(str::to_owned)
            .collect();
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

fn split_word(line: &str) -> (&str, &str) {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (word, rest.trim())
}

/// The version in the name of a kernel's file; none if it is no such name.
pub(super) fn kernel_version(name: &str) -> Option<&str> {
    let version = match name {
        "vmlinuz" | "vmlinux" | "bzImage" => Some(""),
        _ => ["vmlinuz-", "vmlinux-", "bzImage-", "kernel-"]
            .into_iter()
            .find_map(|stem| name.strip_prefix(stem)),
    }?;
    let other = ["rescue", ".old", ".sig", ".hmac", ".bak"];
    (!other.iter().any(|word| version.contains(word))).then_some(version)
}

/// Names that the initial RAM disk of a kernel of this version may have.
pub(super) fn initrd_names(version: &str) -> Vec<String> {
    if version.is_empty() {
        return ["initrd.img", "initramfs.img", "initrd", "initramfs"]
            .map(str::to_owned)
            .to_vec();
    }
    vec![
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initramfs-{version}"),
        format!("initrd-{version}"),
        format!("initrd-{version}.img"),
    ]
}

/// Compares versions: runs of digits as numbers, everything else as text.
pub(super) fn compare_versions(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one, other);
    loop {
        let (a, b) = (run(one), run(other));
        let digits = |run: &str| run.starts_with(|c: char| c.is_ascii_digit());
        let order = if digits(a) && digits(b) {
            // Numbers of any length: the longer is the greater.
            let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            a.cmp(b)
        };
        if order != Ordering::Equal || (a.is_empty() && b.is_empty()) {
            return order;
        }
        one = one.get(a.len()..).unwrap_or_default();
        other = other.get(b.len()..).unwrap_or_default();
    }
}

/// The digits or non-digits that a text begins with.
fn run(text: &str) -> &str {
    let digit = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digit);
    end.and_then(|end| text.get(..end)).unwrap_or(text)
}
