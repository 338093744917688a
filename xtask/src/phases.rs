//! Phases of a long command: a heading when one starts, a table of times at the end.

use std::time::{Duration, Instant};

/// The phases run so far, with how long each took.
#[derive(Default)]
pub struct Phases {
    done: Vec<(String, Duration)>,
}

impl Phases {
    /// Runs `work` under a heading and notes its time.
    pub fn run<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = work();
        self.done.push((name.to_owned(), start.elapsed()));
        result
    }

    /// Prints each phase and their sum.
    pub fn print(&self) {
        println!("\nphases");
        for (name, time) in &self.done {
            println!("  {:>8.1} s  {name}", time.as_secs_f64());
        }
        let sum: Duration = self.done.iter().map(|(_, time)| *time).sum();
        println!("  {:>8.1} s  sum", sum.as_secs_f64());
    }
}
