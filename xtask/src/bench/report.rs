//! What was measured: samples by class and machine, the table and the file of results.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::machine::{Kind, Outcome};

/// A class of the benchmark.
#[derive(Clone, Debug)]
pub struct Class {
    pub name: String,
    pub group: String,
}

/// Everything measured so far.
pub struct Report {
    machines: Vec<Kind>,
    classes: Vec<Class>,
    samples: BTreeMap<(String, &'static str), Vec<Outcome>>,
    boots: BTreeMap<&'static str, Vec<Result<Duration, String>>>,
}

/// What a class comes to on one machine.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    /// Best and worst time, in nanoseconds.
    Times {
        best: u64,
        worst: u64,
    },
    Absent,
    Failed(String),
    /// It was not run.
    None,
}

impl Report {
    pub fn new(machines: &[Kind], classes: Vec<Class>) -> Report {
        Report {
            machines: machines.to_vec(),
            classes,
            samples: BTreeMap::new(),
            boots: BTreeMap::new(),
        }
    }

    /// Notes what one turn gave.
    pub fn add(&mut self, kind: Kind, class: &str, outcome: Outcome) {
        self.samples
            .entry((class.to_owned(), kind.name()))
            .or_default()
            .push(outcome);
    }

    /// Notes one boot.
    pub fn add_boot(&mut self, kind: Kind, boot: Result<Duration, String>) {
        self.boots.entry(kind.name()).or_default().push(boot);
    }

    /// The classes that have not failed on this machine yet: failing once is enough.
    pub fn names_to_run(&self, kind: Kind) -> Vec<String> {
        let failed = |class: &Class| {
            self.outcomes(class, kind)
                .iter()
                .any(|outcome| matches!(outcome, Outcome::Failed(_)))
        };
        self.classes
            .iter()
            .filter(|class| !failed(class))
            .map(|class| class.name.clone())
            .collect()
    }

    fn outcomes(&self, class: &Class, kind: Kind) -> &[Outcome] {
        self.samples
            .get(&(class.name.clone(), kind.name()))
            .map_or(&[], Vec::as_slice)
    }

    /// The checksum that all must have: the native one, or else the first there is.
    fn checksum(&self, class: &Class) -> Option<&str> {
        let kinds = [Kind::Native, Kind::Tcg, Kind::Strata];
        kinds
            .into_iter()
            .flat_map(|kind| self.outcomes(class, kind))
            .find_map(|outcome| match outcome {
                Outcome::Ran { checksum, .. } => Some(checksum.as_str()),
                _ => None,
            })
    }

    fn verdict(&self, class: &Class, kind: Kind) -> Verdict {
        let expected = self.checksum(class);
        let mut verdict = Verdict::None;
        for outcome in self.outcomes(class, kind) {
            verdict = match (outcome, verdict) {
                (Outcome::Failed(end), _) => return Verdict::Failed(end.clone()),
                (Outcome::Absent, _) => Verdict::Absent,
                (Outcome::Ran { checksum, .. }, _) if Some(checksum.as_str()) != expected => {
                    return Verdict::Failed(format!(
                        "checksum {checksum} instead of {}",
                        expected.unwrap_or_default()
                    ));
                }
                (Outcome::Ran { nanoseconds, .. }, Verdict::Times { best, worst }) => {
                    Verdict::Times {
                        best: best.min(*nanoseconds),
                        worst: worst.max(*nanoseconds),
                    }
                }
                (Outcome::Ran { nanoseconds, .. }, _) => Verdict::Times {
                    best: *nanoseconds,
                    worst: *nanoseconds,
                },
            };
        }
        verdict
    }

    /// How many times longer `kind` takes than `base`.
    fn ratio(&self, class: &Class, kind: Kind, base: Kind) -> Option<f64> {
        match (self.verdict(class, kind), self.verdict(class, base)) {
            (Verdict::Times { best, .. }, Verdict::Times { best: base, .. }) if base > 0 => {
                Some(best as f64 / base as f64)
            }
            _ => None,
        }
    }

    /// The geometric mean of a ratio over the classes that have it, and their number.
    fn mean(&self, group: Option<&str>, kind: Kind, base: Kind) -> Option<(f64, usize)> {
        let ratios: Vec<f64> = self
            .classes
            .iter()
            .filter(|class| group.is_none_or(|group| class.group == group))
            .filter_map(|class| self.ratio(class, kind, base))
            .collect();
        let sum: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
        (!ratios.is_empty()).then(|| ((sum / ratios.len() as f64).exp(), ratios.len()))
    }

    /// Whether something went wrong on any machine.
    pub fn has_failures(&self) -> bool {
        let failed =
            |class: &Class, kind: Kind| matches!(self.verdict(class, kind), Verdict::Failed(_));
        self.machines
            .iter()
            .any(|&kind| self.classes.iter().any(|class| failed(class, kind)))
            || self.boots.values().flatten().any(Result::is_err)
    }

    /// The table: ratios of the best turns, means per group and of all, boot times, and every failure by name.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "\nclass              native      tcg / native   strata / native   tcg / strata   spread of strata\n",
        );
        let mut failures = String::new();
        for class in &self.classes {
            let native = match self.verdict(class, Kind::Native) {
                Verdict::Times { best, .. } => format!("{:.2} ms", best as f64 / 1e6),
                _ => "-".to_owned(),
            };
            let spread = match self.verdict(class, Kind::Strata) {
                Verdict::Times { best, worst } => {
                    format!("{:.0} %", (worst as f64 / best as f64 - 1.0) * 100.0)
                }
                _ => "-".to_owned(),
            };
            let cells = [
                native,
                self.cell(class, Kind::Tcg, Kind::Native),
                self.cell(class, Kind::Strata, Kind::Native),
                self.cell(class, Kind::Tcg, Kind::Strata),
                spread,
            ];
            text.push_str(&row(&class.name, &cells));
            for &kind in &self.machines {
                if let Verdict::Failed(end) = self.verdict(class, kind) {
                    let _ = writeln!(failures, "  {} on {}: {end}", class.name, kind.name());
                }
            }
        }
        let mut groups: Vec<&str> = self
            .classes
            .iter()
            .map(|class| class.group.as_str())
            .collect();
        groups.dedup();
        text.push_str("geometric means\n");
        for group in groups.into_iter().map(Some).chain([None]) {
            let mean = |kind, base| match self.mean(group, kind, base) {
                Some((mean, count)) => format!("{mean:.2} ({count})"),
                None => "-".to_owned(),
            };
            let cells = [
                String::new(),
                mean(Kind::Tcg, Kind::Native),
                mean(Kind::Strata, Kind::Native),
                mean(Kind::Tcg, Kind::Strata),
                String::new(),
            ];
            text.push_str(&row(group.unwrap_or("all"), &cells));
        }
        self.write_boots(&mut text, &mut failures);
        if !failures.is_empty() {
            let _ = write!(text, "failed\n{failures}");
        }
        text
    }

    fn cell(&self, class: &Class, kind: Kind, base: Kind) -> String {
        match (
            self.ratio(class, kind, base),
            self.verdict(class, kind),
            self.verdict(class, base),
        ) {
            (Some(ratio), ..) => format!("{ratio:.2}"),
            (None, Verdict::Failed(_), _) | (None, _, Verdict::Failed(_)) => "failed".to_owned(),
            (None, Verdict::Absent, _) | (None, _, Verdict::Absent) => "absent".to_owned(),
            _ => "-".to_owned(),
        }
    }

    fn best_boot(&self, kind: Kind) -> Option<f64> {
        let boots = self.boots.get(kind.name())?;
        boots.iter().flatten().min().map(Duration::as_secs_f64)
    }

    fn write_boots(&self, text: &mut String, failures: &mut String) {
        let mut parts = Vec::new();
        for &kind in &self.machines {
            if let Some(seconds) = self.best_boot(kind) {
                parts.push(format!("{} {seconds:.2} s", kind.name()));
            }
            if let Some(Err(end)) = self
                .boots
                .get(kind.name())
                .and_then(|boots| boots.iter().find(|boot| boot.is_err()))
            {
                let _ = writeln!(failures, "  boot on {}: {end}", kind.name());
            }
        }
        if let (Some(tcg), Some(strata)) = (self.best_boot(Kind::Tcg), self.best_boot(Kind::Strata))
        {
            parts.push(format!("strata / tcg {:.2}", strata / tcg));
        }
        if !parts.is_empty() {
            let _ = writeln!(text, "boot, from launch to power-off: {}", parts.join(", "));
        }
    }

    /// Every sample, for later comparison.
    pub fn json(&self, scale: &str) -> String {
        let classes: Vec<Value> = self
            .classes
            .iter()
            .map(|class| {
                let machines: serde_json::Map<String, Value> = self
                    .machines
                    .iter()
                    .map(|&kind| {
                        (
                            kind.name().to_owned(),
                            self.outcomes(class, kind).iter().map(sample).collect(),
                        )
                    })
                    .collect();
                json!({ "class": class.name, "group": class.group, "samples": machines })
            })
            .collect();
        let boots: serde_json::Map<String, Value> = self
            .boots
            .iter()
            .map(|(name, boots)| {
                let seconds = |boot: &Result<Duration, String>| match boot {
                    Ok(time) => json!(time.as_secs_f64()),
                    Err(end) => json!({ "failed": end }),
                };
                ((*name).to_owned(), boots.iter().map(seconds).collect())
            })
            .collect();
        let value = json!({ "scale": scale, "classes": classes, "boot_seconds": boots });
        format!("{value:#}\n")
    }
}

fn sample(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Ran { nanoseconds, .. } => json!(nanoseconds),
        Outcome::Absent => json!("absent"),
        Outcome::Failed(end) => json!({ "failed": end }),
    }
}

fn row(name: &str, cells: &[String; 5]) -> String {
    let [native, tcg, strata, gain, spread] = cells;
    let line = format!("{name:<16} {native:>10} {tcg:>15} {strata:>17} {gain:>14} {spread:>18}");
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(nanoseconds: u64, checksum: &str) -> Outcome {
        Outcome::Ran {
            nanoseconds,
            checksum: checksum.to_owned(),
        }
    }

    fn report() -> Report {
        let class = |name: &str, group: &str| Class {
            name: name.to_owned(),
            group: group.to_owned(),
        };
        let mut report = Report::new(
            &[Kind::Native, Kind::Tcg, Kind::Strata],
            vec![class("sort", "scalar"), class("jit", "code")],
        );
        for (kind, times) in [
            (Kind::Native, [100, 110]),
            (Kind::Tcg, [900, 800]),
            (Kind::Strata, [200, 400]),
        ] {
            times
                .into_iter()
                .for_each(|time| report.add(kind, "sort", ran(time, "a")));
        }
        report
    }

    #[test]
    fn the_best_turn_counts() {
        let report = report();
        let table = report.table();
        let line = table.lines().find(|line| line.starts_with("sort")).unwrap();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["sort", "0.00", "ms", "8.00", "2.00", "4.00", "100", "%"]
        );
        assert!(!report.has_failures());
    }

    #[test]
    fn a_wrong_checksum_is_a_failure() {
        let mut report = report();
        report.add(Kind::Strata, "sort", ran(1, "b"));
        assert!(report.has_failures());
        assert!(
            report
                .table()
                .contains("sort on strata: checksum b instead of a")
        );
        assert_eq!(report.mean(None, Kind::Strata, Kind::Native), None);
    }

    #[test]
    fn a_failed_class_is_shown_and_not_run_again() {
        let mut report = report();
        report.add(Kind::Strata, "jit", Outcome::Failed("it hangs".to_owned()));
        assert_eq!(report.names_to_run(Kind::Strata), ["sort"]);
        assert!(report.table().contains("jit on strata: it hangs"));
        assert!(report.json("1").contains("it hangs"));
    }
}
