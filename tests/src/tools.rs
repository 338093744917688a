//! Tools of the host that make and look at disks.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::{Need, ready, shared, skip};

/// Runs a tool of the host in `directory`.
#[track_caller]
pub fn tool(directory: &Path, program: &str, arguments: &[&str], input: &str) {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the tool was found before");
    let stdin = child.stdin.take().expect("it is a pipe");
    std::io::Write::write_all(&mut { stdin }, input.as_bytes()).expect("the tool reads");
    let output = child.wait_with_output().expect("the tool ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
}

/// A directory for disks; none, and a note, if a machine or a tool is missing. The test has to return then.
#[must_use]
pub fn workshop(tools: &[&str]) -> Option<TempDir> {
    if !ready(Need::Machine) {
        return None;
    }
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = |tool: &&&str| {
        path.split(':')
            .any(|place| Path::new(place).join(tool).exists())
    };
    if let Some(missing) = tools.iter().find(|tool| !found(tool)) {
        skip(&format!("{missing} is missing"));
        return None;
    }
    Some(shared().scratch())
}

/// A file as the program under test names it, which may write it.
pub fn given(directory: &TempDir, name: &str) -> (PathBuf, String) {
    let path = directory.path().join(name);
    shared().give(&path);
    let seen = shared().seen(&path).display().to_string();
    (path, seen)
}
