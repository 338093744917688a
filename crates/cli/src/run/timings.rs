//! How long the phases of a run took, counted from the program's start.

use std::time::Instant;

use serde_json::{Map, Value};

/// The phases so far.
pub struct Timings {
    started: Instant,
    phases: Map<String, Value>,
}

impl Timings {
    /// A run that began then.
    pub fn new(started: Instant) -> Self {
        Self {
            started,
            phases: Map::new(),
        }
    }

    /// Notes when a phase was reached.
    pub fn mark(&mut self, phase: &str, at: Instant) {
        let ms = at.saturating_duration_since(self.started).as_secs_f64() * 1000.0;
        self.phases.insert(
            format!("{phase}_ms"),
            Value::from((ms * 1000.0).round() / 1000.0),
        );
    }

    /// All of them as a line of JSON.
    pub fn line(&self) -> String {
        Value::Object(self.phases.clone()).to_string()
    }
}
