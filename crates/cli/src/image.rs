//! `strata image`: what images are here, making them, removing them; and finding the one that `run` names.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use strata_image::{
    Image, ImageError, Job, Manifest, Order, Phase, Progress, Quiet, Recipe, Store, Workshop,
};

use crate::args::{BuildArgs, ImageCommand};
use crate::exit::{ExitCode, Failure, chain, code_of_io};
use crate::output;

/// Does one of the commands.
pub fn run(command: &ImageCommand) -> Result<(), Failure> {
    let store = store()?;
    match command {
        ImageCommand::Ls { json } => list(&store, *json),
        ImageCommand::Build(args) => {
            let name = &args.name;
            let order = match &args.from {
                Some(_) => order(args)?,
                None => again(&store, args)?.map_or_else(|| order(args), Ok)?,
            };
            let image = build(name, |progress| {
                store.build(name, &order, &OwnMachines, progress)
            })?;
            let size = mebibytes(image.size());
            output::print(&format!(
                "{name}: {size}, Linux {}\n",
                image.manifest.kernel_release
            ))
        }
        ImageCommand::Rm { name } => store.remove(name).map_err(|error| failure(&error)),
    }
}

/// The image that a machine is to be made from, built first if it is missing or out of date.
///
/// One that its owner named and made stays as it is, and is said to be old when it is.
pub fn find_or_build(name: &str) -> Result<Image, Failure> {
    let store = store()?;
    let image = build(name, |progress| {
        store.get_or_build(name, &OwnMachines, progress)
    })?;
    if image.manifest.is_own() && !image.is_current() {
        let note = format!(
            "strata: the image '{name}' was made by another version of Strata; 'strata image build {name}' makes it anew"
        );
        // Nobody who reads it is no reason not to run.
        let _ = output::error_line(&note);
    }
    Ok(image)
}

/// What the image of this name was made of, if it is somebody's own and there.
fn again(store: &Store, args: &BuildArgs) -> Result<Option<Order>, Failure> {
    let manifests = store.list().map_err(|error| failure(&error))?;
    let own = manifests
        .into_iter()
        .find(|manifest| manifest.name == args.name && manifest.is_own());
    let order = own.and_then(|manifest| manifest.order);
    Ok(order.map(|order| Order {
        mirror: args.mirror.clone().or(order.mirror.clone()),
        ..order
    }))
}

fn order(args: &BuildArgs) -> Result<Order, Failure> {
    let mut packages = args.packages.clone();
    packages.sort();
    packages.dedup();
    const MIB: u64 = 1 << 20;
    Ok(Order {
        from: args.from.clone().unwrap_or_else(|| args.name.clone()),
        packages,
        size_mib: args.size.map(|size| size.get().div_ceil(MIB)),
        mirror: args.mirror.clone(),
        ssh_keys: args.ssh_key.as_deref().map(ssh_keys).transpose()?,
    })
}

/// Most bytes that a file of public keys may have.
const KEYS_MAX: u64 = 64 << 10;

/// The lines of a file with public keys.
pub fn ssh_keys(path: &Path) -> Result<String, Failure> {
    let io = |error: std::io::Error| {
        let message = format!("cannot read {}: {error}", path.display());
        Failure::new(code_of_io(&error), message)
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(KEYS_MAX).read_to_string(&mut text).map_err(io)?;
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    // The private half is the file with the shorter name.
    if lines.is_empty() || lines.iter().any(|line| !is_public_key(line)) {
        let message = format!(
            "{} is not a public key: give the file that ends in .pub",
            path.display()
        );
        return Err(Failure::new(ExitCode::Data, message));
    }
    Ok(lines.iter().map(|line| format!("{line}\n")).collect())
}

/// Whether a line of `authorized_keys` has a key: a word for its kind, and then its base64, which begins like that.
fn is_public_key(line: &str) -> bool {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let plain = |c: char| c == '\t' || !c.is_control();
    line.chars().all(plain) && words.windows(2).any(|pair| pair[1].starts_with("AAAA"))
}

/// Machines in processes of their own: this program, once more.
struct OwnMachines;

impl Workshop for OwnMachines {
    fn run(&self, job: &Job, heard: &mut dyn FnMut(&str)) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("cannot start a machine: {error}");
        // A comma in a name is written twice.
        let disk = |path: &Path, options: &str| {
            let path = path.as_os_str().as_bytes();
            let mut argument: Vec<u8> = Vec::with_capacity(path.len() + options.len());
            for &byte in path {
                argument.extend(if byte == b',' {
                    &b",,"[..]
                } else {
                    std::slice::from_ref(&byte)
                });
            }
            argument.extend(options.as_bytes());
            OsString::from_vec(argument)
        };
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["run", "--net", "none", "--cpus", "1", "--memory"])
            .arg(format!("{}M", job.memory_mib))
            .arg("--kernel")
            .arg(&job.kernel)
            .arg("--initrd")
            .arg(&job.initrd)
            .arg("--append")
            .arg(&job.command_line)
            .arg("--disk")
            .arg(disk(&job.target, ",format=raw"))
            .arg("--disk")
            .arg(disk(&job.source, ",ro,format=raw"))
            .args(["--on-reboot", "exit"])
            .stdin(job.lock.try_clone().map_err(failed)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(stdout) = child.stdout.take() {
            let mut lines = BufReader::new(stdout);
            let mut line = Vec::new();
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                heard(&String::from_utf8_lossy(&line));
                line.clear();
            }
        }
        let mut errors = String::new();
        if let Some(stderr) = child.stderr.take() {
            // Without its words there is still its status.
            let _ = stderr.take(64 << 10).read_to_string(&mut errors);
        }
        let status = child.wait().map_err(failed)?;
        match (status.success(), errors.lines().next()) {
            (true, _) => Ok(()),
            (false, Some(line)) => Err(line.to_owned()),
            (false, None) => Err(format!("it ended with {status}")),
        }
    }
}

fn store() -> Result<Store, Failure> {
    Store::default_root()
        .and_then(Store::open)
        .map_err(|error| failure(&error))
}

fn build(
    name: &str,
    work: impl Fn(&dyn Progress) -> Result<Image, ImageError>,
) -> Result<Image, Failure> {
    let result = if std::io::stderr().is_terminal() {
        let bar = Bar::new(name);
        let result = work(&bar);
        bar.clear();
        result
    } else {
        work(&Quiet)
    };
    result.map_err(|error| failure(&error))
}

/// A line of `image ls`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    name: String,
    /// Whether it is here, or can only be built.
    built: bool,
    /// Whether building it now would make the same.
    current: bool,
    about: String,
    /// What it takes on this host.
    size_bytes: Option<u64>,
    /// What the guest sees.
    root_disk_bytes: Option<u64>,
    kernel_release: Option<String>,
    created_unix_s: Option<u64>,
}

fn list(store: &Store, json: bool) -> Result<(), Failure> {
    let entries = entries(store)?;
    if json {
        return output::print_json(&entries);
    }
    let heading = ["NAME", "SIZE", "KERNEL", "ABOUT"].map(str::to_owned);
    let mut rows = vec![heading.to_vec()];
    rows.extend(entries.into_iter().map(|entry| {
        let state = match (entry.built, entry.current) {
            (false, _) => "not built",
            (true, false) => "out of date",
            (true, true) => "",
        };
        let size = entry.size_bytes.map(mebibytes);
        vec![
            entry.name,
            size.unwrap_or_else(|| state.to_owned()),
            entry.kernel_release.unwrap_or_default(),
            entry.about,
        ]
    }));
    output::print(&output::table(&rows))
}

fn entries(store: &Store) -> Result<Vec<Entry>, Failure> {
    let manifests = store.list().map_err(|error| failure(&error))?;
    let mut entries: Vec<Entry> = manifests
        .into_iter()
        .map(|manifest| {
            let image = store.get(&manifest.name).ok();
            Entry {
                built: true,
                current: image.is_some() && manifest.is_current(),
                about: about(&manifest),
                size_bytes: image.map(|image| image.size()),
                root_disk_bytes: manifest.disk.as_ref().map(|disk| disk.size),
                kernel_release: Some(manifest.kernel_release),
                created_unix_s: Some(manifest.created_unix_s),
                name: manifest.name,
            }
        })
        .collect();
    for name in Recipe::names() {
        if entries.iter().all(|entry| entry.name != name) {
            let about = Recipe::get(name).map_or_else(|_| String::new(), |recipe| recipe.about);
            entries.push(Entry {
                name: name.to_owned(),
                built: false,
                current: false,
                about,
                size_bytes: None,
                root_disk_bytes: None,
                kernel_release: None,
                created_unix_s: None,
            });
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// What an image is; of one's own, what it was made of.
fn about(manifest: &Manifest) -> String {
    let Some(order) = manifest.order.as_ref().filter(|_| manifest.is_own()) else {
        return manifest.about.clone();
    };
    let mut about = format!("from {}", order.from);
    if !order.packages.is_empty() {
        about.push_str(&format!(" with {}", order.packages.join(", ")));
    }
    if !manifest.is_current() {
        about.push_str(" (out of date)");
    }
    about
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn failure(error: &ImageError) -> Failure {
    let code = match error {
        ImageError::BadName(_)
        | ImageError::BadPackageName(_)
        | ImageError::BadMirror(_)
        | ImageError::BadSize { .. }
        | ImageError::NoRootDisk { .. }
        | ImageError::Reserved(_) => ExitCode::Usage,
        ImageError::NotFound(_) | ImageError::NoRecipe { .. } | ImageError::NoPackage { .. } => {
            ExitCode::NoInput
        }
        ImageError::BadManifest { .. }
        | ImageError::LaterManifest { .. }
        | ImageError::Damaged { .. }
        | ImageError::Package { .. } => ExitCode::Data,
        ImageError::NoCacheRoot => ExitCode::CannotCreate,
        ImageError::Io { source, .. } => code_of_io(source),
        _ => ExitCode::Unavailable,
    };
    let mut message = chain(error);
    if let ImageError::BadName(name)
    | ImageError::NotFound(name)
    | ImageError::NoRecipe { name, .. } = error
        && let Some(similar) = similar(name, Recipe::names())
    {
        message = format!("{message}; did you mean '{similar}'?");
    }
    Failure::new(code, message)
}

/// The candidate that is nearest to a mistyped name, if one is near.
fn similar<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let near = |candidate: &&str| distance(name, candidate) <= 1 + candidate.len() / 4;
    candidates
        .filter(near)
        .min_by_key(|candidate| distance(name, candidate))
}

/// Levenshtein's: insertions, deletions and replacements from one to the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (to, above) in b.chars().zip(row.iter().skip(1)) {
            left = (diagonal + usize::from(from != to))
                .min(left + 1)
                .min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

/// How often the time shown changes.
const TICK: Duration = Duration::from_millis(120);

/// Progress on a terminal: what is being done, how far it is, and since when.
struct Bar {
    bar: ProgressBar,
    name: String,
    /// The unit changes with the phase, so the style is set when a phase first counts.
    counting: Mutex<Option<bool>>,
}

impl Bar {
    /// Nothing is shown before the first phase: an image that is there needs none.
    fn new(name: &str) -> Self {
        Self {
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            name: name.to_owned(),
            counting: Mutex::new(None),
        }
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn style(&self, counting: bool) {
        let mut was = self
            .counting
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if *was != Some(counting) {
            *was = Some(counting);
            let template = if counting {
                "{spinner} {msg} [{bar:30}] {percent}% ({elapsed})"
            } else {
                "{spinner} {msg} ({elapsed})"
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style);
            }
        }
    }
}

impl Progress for Bar {
    fn phase(&self, phase: Phase) {
        if self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.enable_steady_tick(TICK);
        }
        self.style(false);
        self.bar
            .set_message(format!("image {}: {phase}", self.name));
    }

    fn advance(&self, done: u64, total: u64) {
        self.style(true);
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistyped_names_are_recognised() {
        let known = ["tiny", "debian"];
        let check =
            |name, expected| assert_eq!(similar(name, known.into_iter()), expected, "{name}");
        check("tinny", Some("tiny"));
        check("tyni", Some("tiny"));
        check("debain", Some("debian"));
        check("Tiny", Some("tiny"));
        check("no-such-image", None);
        check("", None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn an_unknown_image_gets_a_suggestion() {
        let error = ImageError::NoRecipe {
            name: "tinny".to_owned(),
            known: "tiny".to_owned(),
        };
        let failure = failure(&error);
        assert_eq!(failure.code, ExitCode::NoInput);
        assert!(
            failure.message.ends_with("did you mean 'tiny'?"),
            "{}",
            failure.message
        );
    }
}
