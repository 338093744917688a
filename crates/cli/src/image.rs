//! `strata image`: what images are here, making them, removing them; and finding the one that `run` names.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use strata_image::{Image, ImageError, Phase, Progress, Quiet, Recipe, Store};

use crate::args::ImageCommand;
use crate::exit::{ExitCode, Failure, chain, code_of_io};
use crate::output;

/// Does one of the commands.
pub fn run(command: &ImageCommand) -> Result<(), Failure> {
    let store = store()?;
    match command {
        ImageCommand::Ls { json } => list(&store, *json),
        ImageCommand::Build { name } => {
            let image = build(&store, name, Store::build)?;
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
pub fn find_or_build(name: &str) -> Result<Image, Failure> {
    build(&store()?, name, Store::get_or_build)
}

fn store() -> Result<Store, Failure> {
    Store::default_root()
        .and_then(Store::open)
        .map_err(|error| failure(&error))
}

fn build(
    store: &Store,
    name: &str,
    work: impl Fn(&Store, &str, &dyn Progress) -> Result<Image, ImageError>,
) -> Result<Image, Failure> {
    let result = if std::io::stderr().is_terminal() {
        let bar = Bar::new(name);
        let result = work(store, name, &bar);
        bar.clear();
        result
    } else {
        work(store, name, &Quiet)
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
    size_bytes: Option<u64>,
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
        .map(|manifest| Entry {
            built: true,
            current: Recipe::get(&manifest.name).is_ok()
                && store
                    .get(&manifest.name)
                    .is_ok_and(|image| image.is_current()),
            about: manifest.about,
            size_bytes: Some(manifest.kernel.size + manifest.initrd.size),
            kernel_release: Some(manifest.kernel_release),
            created_unix_s: Some(manifest.created_unix_s),
            name: manifest.name,
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
                kernel_release: None,
                created_unix_s: None,
            });
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn failure(error: &ImageError) -> Failure {
    let code = match error {
        ImageError::BadName(_) => ExitCode::Usage,
        ImageError::NotFound(_) | ImageError::NoRecipe { .. } => ExitCode::NoInput,
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
