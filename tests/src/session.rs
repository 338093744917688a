//! Talking to the program while it runs: send lines, wait for words.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::Strata;
use crate::run::{stop, wait};

/// A running `strata` whose standard input and output the test has in its hands. It is stopped when dropped.
#[derive(Debug)]
pub struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    chunks: Receiver<Vec<u8>>,
    /// Everything printed so far, both streams as they came.
    seen: String,
    /// Up to where `expect` has read.
    read: usize,
    patience: Duration,
}

impl Session {
    /// Starts the program with pipes.
    pub fn start(strata: &Strata) -> Session {
        Session::spawn(strata.command(), &strata.line())
    }

    fn spawn(mut command: Command, line: &str) -> Session {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        let (sender, chunks) = mpsc::channel();
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|stream| Box::new(stream) as _),
            child.stderr.take().map(|stream| Box::new(stream) as _),
        ];
        for mut stream in streams.into_iter().flatten() {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    if sender.send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Session {
            child,
            stdin,
            chunks,
            seen: String::new(),
            read: 0,
            patience: Duration::from_secs(120),
        }
    }

    /// Waits until `words` are printed after what was waited for before.
    #[track_caller]
    pub fn expect(&mut self, words: &str) -> &mut Session {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(at) = self.seen[self.read..].find(words) {
                self.read += at + words.len();
                return self;
            }
            match self
                .chunks
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(chunk) => self.seen.push_str(&String::from_utf8_lossy(&chunk)),
                Err(RecvTimeoutError::Timeout) => {
                    panic!("`{words}` did not come in time; there was:\n{}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended without `{words}`; there was:\n{}", self.seen)
                }
            }
        }
    }

    /// The line that the last `expect("\n")` ended, without its end.
    pub fn last_line(&self) -> &str {
        self.seen[..self.read]
            .lines()
            .next_back()
            .unwrap_or_default()
    }

    /// Types `text`.
    #[track_caller]
    pub fn send(&mut self, text: &str) -> &mut Session {
        let stdin = self.stdin.as_mut().expect("input has not ended");
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .expect("it reads its input");
        self
    }

    /// Sends a signal, by the name that `kill` knows.
    #[track_caller]
    pub fn signal(&mut self, name: &str) -> &mut Session {
        let status = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(status.success(), "SIG{name} cannot be sent");
        self
    }

    /// Waits for the end; returns how it ended and everything it printed.
    #[track_caller]
    pub fn finish(mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        let status = wait(&mut self.child, self.patience);
        while let Ok(chunk) = self.chunks.recv_timeout(Duration::from_secs(5)) {
            self.seen.push_str(&String::from_utf8_lossy(&chunk));
        }
        match status {
            Some(status) => (status, std::mem::take(&mut self.seen)),
            None => panic!("it did not end in time; there was:\n{}", self.seen),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}
