//! Guest benchmark: classes of guest workload, each with fixed work, timed by its own clock and verified by a checksum.
//!
//! The same static binary runs natively, as a program in a guest, or as the first process of a guest (then it mounts
//! what it needs, takes its arguments from `bench.args="…"` on the kernel's command line and powers the machine off).
//! Output is one line per class, `CLASS NANOSECONDS CHECKSUM`; equal work gives equal checksums on every machine.
//! At scale 1 a class takes 0.1 to 0.3 s on a recent CPU; emulation is 10 to 100 times slower, so give `--scale`.

mod class;
mod code;
mod copy;
mod init;
mod kernel;
mod scalar;
mod sys;
mod vector;

use std::env;
use std::process::ExitCode;

use class::{CLASSES, Class, Group};

const USAGE: &str =
    "usage: strata-guest-bench [--list] [--boot] [--class NAME,…] [--scale FACTOR[,GROUP=FACTOR…]]";

/// What to do.
#[derive(Debug, Default, PartialEq)]
struct Options {
    list: bool,
    /// Only say that userland was reached.
    boot: bool,
    /// Names of classes to run; empty is all.
    classes: Vec<String>,
    scale: Scale,
}

/// How much of each class's work is done.
#[derive(Debug, PartialEq)]
struct Scale {
    all: f64,
    groups: Vec<(Group, f64)>,
}

impl Default for Scale {
    fn default() -> Scale {
        Scale {
            all: 1.0,
            groups: Vec::new(),
        }
    }
}

impl Scale {
    fn parse(text: &str) -> Result<Scale, String> {
        let factor = |text: &str| match text.parse::<f64>() {
            Ok(factor) if factor > 0.0 && factor <= 1000.0 => Ok(factor),
            _ => Err(format!("`{text}` is no scale: give a number above 0")),
        };
        let mut scale = Scale::default();
        for part in text.split(',') {
            match part.split_once('=') {
                None => scale.all = factor(part)?,
                Some((name, value)) => {
                    let group = Group::ALL.into_iter().find(|group| group.name() == name);
                    let group = group.ok_or_else(|| format!("there is no group `{name}`"))?;
                    scale.groups.push((group, factor(value)?));
                }
            }
        }
        Ok(scale)
    }

    /// How often `class` repeats its unit of work.
    fn units(&self, class: &Class) -> u64 {
        let group = self.groups.iter().find(|(group, _)| *group == class.group);
        let factor = group.map_or(self.all, |(_, factor)| *factor);
        // The counts are far below 2^53 and the factor is positive.
        ((class.units as f64 * factor) as u64).max(1)
    }
}

impl Options {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .ok_or_else(|| format!("{argument} needs a value\n{USAGE}"))
            };
            match argument.as_str() {
                "--list" => options.list = true,
                "--boot" => options.boot = true,
                "--class" => options
                    .classes
                    .extend(value()?.split(',').map(str::to_owned)),
                "--scale" => options.scale = Scale::parse(&value()?)?,
                _ => return Err(format!("unknown argument `{argument}`\n{USAGE}")),
            }
        }
        let known = |name: &String| CLASSES.iter().any(|class| class.name == name);
        match options.classes.iter().find(|name| !known(name)) {
            Some(name) => Err(format!("there is no class `{name}`; --list shows them")),
            None => Ok(options),
        }
    }

    fn run(&self) {
        if self.boot {
            println!("bench: booted");
            return;
        }
        sys::pin_to_current_cpu();
        for class in CLASSES {
            if !self.classes.is_empty() && !self.classes.iter().any(|name| name == class.name) {
                continue;
            }
            if self.list {
                println!("{} {} {}", class.name, class.group.name(), class.units);
            } else {
                println!("{}", class.measure(self.scale.units(class)));
            }
        }
        if !self.list {
            println!("bench: done");
        }
    }
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run(|arguments| match Options::parse(arguments) {
            Ok(options) => options.run(),
            Err(error) => println!("bench: {error}"),
        });
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments
        .first()
        .is_some_and(|first| first == kernel::EXEC_CHILD)
    {
        return ExitCode::from(kernel::EXEC_STATUS);
    }
    match Options::parse(arguments.into_iter()) {
        Ok(options) => {
            options.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, String> {
        Options::parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_are_read() {
        let options = parse("--class integer,sort --scale 0.5,kernel=0.1").unwrap();
        assert_eq!(options.classes, ["integer", "sort"]);
        assert_eq!(
            options.scale,
            Scale {
                all: 0.5,
                groups: vec![(Group::Kernel, 0.1)]
            }
        );
        for wrong in [
            "--class nothing",
            "--class",
            "--scale 0",
            "--scale x",
            "--scale moon=1",
            "--fast",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_are_enough_classes_with_names_of_their_own() {
        let mut names: Vec<&str> = CLASSES.iter().map(|class| class.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CLASSES.len());
        assert!(names.len() >= 24);
    }

    #[test]
    fn equal_work_gives_equal_checksums() {
        // Not the classes that fork: a test harness has threads.
        for class in CLASSES.iter().filter(|class| class.group != Group::Kernel) {
            if (class.present)() {
                let units = class.units / 200 + 1;
                assert_eq!((class.work)(units), (class.work)(units), "{}", class.name);
            }
        }
    }
}
