//! Running the program from start to end.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::place;

/// How long a run may take unless the test says otherwise: far more than it needs, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A run of `strata`, to be described and then started.
#[derive(Debug)]
pub struct Strata {
    program: OsString,
    arguments: Vec<OsString>,
    stdin: Vec<u8>,
    timeout: Duration,
}

impl Default for Strata {
    fn default() -> Strata {
        Strata::new()
    }
}

impl Strata {
    /// `strata` without arguments, with nothing on standard input.
    pub fn new() -> Strata {
        Strata {
            program: "strata".into(),
            arguments: Vec::new(),
            stdin: Vec::new(),
            timeout: PATIENCE,
        }
    }

    /// A shell command in the same surroundings: `strata` is on its `PATH`.
    pub fn shell(line: &str) -> Strata {
        Strata {
            program: "sh".into(),
            ..Strata::new()
        }
        .args(["-c", line])
    }

    /// `strata run tiny -- COMMAND…`
    pub fn tiny<I: IntoIterator<Item: Into<OsString>>>(command: I) -> Strata {
        Strata::new().args(["run", "tiny", "--"]).args(command)
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, arguments: I) -> Strata {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// What standard input has; then it ends.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Strata {
        self.stdin = bytes.into();
        self
    }

    /// How long it may take.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Strata {
        self.timeout = timeout;
        self
    }

    /// Runs to the end, which has to come in time.
    pub fn run(self) -> Finished {
        match self.run_to_end() {
            Ok(finished) => finished,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`Strata::run`]; the error says what it printed until it was stopped.
    pub fn run_to_end(self) -> Result<Finished, String> {
        let line = self.line();
        let start = Instant::now();
        let mut child = self
            .command()
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {line}: {error}"))?;
        let stdin = child.stdin.take();
        let input = self.stdin;
        // A program may end without reading all of its input.
        let writer = thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let status = wait(&mut child, self.timeout);
        if status.is_none() {
            stop(&mut child);
        }
        let _ = writer.join();
        let (stdout, stderr) = (
            finish(stdout),
            String::from_utf8_lossy(&finish(stderr)).into_owned(),
        );
        match status {
            Some(status) => Ok(Finished {
                line,
                status,
                stdout,
                stderr,
                time: start.elapsed(),
            }),
            None => {
                let stdout = String::from_utf8_lossy(&stdout).into_owned();
                Err(format!(
                    "{line} was not done after {} s\nstdout: {}\nstderr: {}",
                    self.timeout.as_secs(),
                    tail(&stdout),
                    tail(&stderr)
                ))
            }
        }
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = place::shared().command(&self.program);
        command
            .args(&self.arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn line(&self) -> String {
        let arguments = self
            .arguments
            .iter()
            .map(|argument| argument.to_string_lossy().into_owned());
        let words: Vec<String> = std::iter::once(self.program.to_string_lossy().into_owned())
            .chain(arguments)
            .collect();
        format!("`{}`", words.join(" "))
    }
}

/// The last part of a long text.
fn tail(text: &str) -> &str {
    let start = text.len().saturating_sub(4000);
    text.get(start..).unwrap_or(text)
}

fn collect<R: Read + Send + 'static>(stream: Option<R>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What came before an error is what the test looks at.
            let _: io::Result<usize> = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn finish(stream: JoinHandle<Vec<u8>>) -> Vec<u8> {
    stream.join().unwrap_or_default()
}

/// Stops a program and those it started, unless they have ended; each was started as the leader of a group.
pub(crate) fn stop(child: &mut Child) {
    let group = format!("-{}", child.id());
    // Until it is waited for, no other process can have its number.
    if matches!(child.try_wait(), Ok(None)) {
        let _ = Command::new("kill")
            .args(["-s", "KILL", "--", &group])
            .status();
        let _ = child.wait();
    }
}

/// Waits for the end; `None` when it did not come in time.
pub(crate) fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            Ok(None) => return None,
            Err(error) => panic!("cannot wait for a child: {error}"),
        }
    }
}

/// A run that has ended.
#[derive(Debug)]
pub struct Finished {
    line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: String,
    /// From start to end.
    pub time: Duration,
}

impl Finished {
    /// Its exit status, unless a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What `--print-stats` printed.
    #[track_caller]
    pub fn stats(&self) -> serde_json::Value {
        self.stderr
            .lines()
            .find(|line| line.starts_with('{'))
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_else(|| panic!("no counters were printed\n{}", self.report()))
    }

    /// Fails the test unless it ended with `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Finished {
        assert_eq!(self.code(), Some(code), "{}", self.report());
        self
    }

    /// Fails the test unless it ended with an error that is one clear sentence: `code`, nothing on standard output, a
    /// line on standard error that has all of `words`, and no panic.
    #[track_caller]
    pub fn expect_error(self, code: i32, words: &[&str]) -> Finished {
        let finished = self.expect(code);
        finished.expect_no_panic();
        assert!(
            !finished.stderr.trim().is_empty(),
            "an error has to be said\n{}",
            finished.report()
        );
        for word in words {
            assert!(
                finished.stderr.contains(word),
                "the error should say `{word}`\n{}",
                finished.report()
            );
        }
        finished
    }

    /// Fails the test if the program panicked or was killed.
    #[track_caller]
    pub fn expect_no_panic(&self) {
        assert!(
            self.code().is_some() && self.code() != Some(101),
            "{}",
            self.report()
        );
        assert!(!self.stderr.contains("panicked at"), "{}", self.report());
    }

    fn report(&self) -> String {
        format!(
            "{} ended with {}\nstdout: {}\nstderr: {}",
            self.line,
            self.status,
            tail(&self.text()),
            tail(&self.stderr)
        )
    }
}
