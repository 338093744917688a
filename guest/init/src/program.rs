//! Turns a request to run something into a running process.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use strata_agent::{Exec, FailReason};

use crate::system;

/// PATH of everything we start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// TERM where nobody says better.
pub const TERM: &str = "linux";

/// A user as `/etc/passwd` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory.
    pub home: String,
}

impl User {
    /// The one everything runs as unless told otherwise.
    pub fn root() -> User {
        User {
            name: "root".to_owned(),
            uid: 0,
            gid: 0,
            home: "/root".to_owned(),
        }
    }

    /// Finds a user by name or number. A number needs no entry.
    fn find(wanted: &str, passwd: &str) -> Option<User> {
        let parse = |line: &str| {
            let fields: Vec<&str> = line.split(':').collect();
            let &[name, _, uid, gid, _, home, ..] = fields.as_slice() else {
                return None;
            };
            Some(User {
                name: name.to_owned(),
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
                home: home.to_owned(),
            })
        };
        let number = wanted.parse().ok();
        let listed = passwd
            .lines()
            .filter_map(parse)
            .find(|user| user.name == wanted || Some(user.uid) == number);
        listed.or_else(|| {
            number.map(|uid| User {
                name: wanted.to_owned(),
                uid,
                gid: uid,
                home: "/".to_owned(),
            })
        })
    }
}

/// The environment of a login of `user`.
pub fn environment(command: &mut Command, user: &User) {
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &user.home)
        .env("USER", &user.name);
    command
        .env("LOGNAME", &user.name)
        .env("SHELL", "/bin/sh")
        .env("TERM", TERM);
}

/// A running program and our ends of its streams, which never block.
pub struct Program {
    /// The process, leader of its own session and group.
    pub child: Child,
    /// Takes its input.
    pub stdin: Option<OwnedFd>,
    /// Has its output.
    pub stdout: Option<OwnedFd>,
    /// Has its errors, unless it runs on a terminal.
    pub stderr: Option<OwnedFd>,
    /// The master's end of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Starts a program, or says why not.
pub fn start(exec: &Exec) -> Result<Program, (FailReason, String)> {
    let other = |error: io::Error| {
        (
            FailReason::Other,
            format!("cannot start a program: {error}"),
        )
    };
    let mut command = prepare(exec)?;
    let name = command.get_program().display().to_string();
    let terminal = if exec.tty {
        Some(system::open_terminal().map_err(other)?)
    } else {
        None
    };
    match &terminal {
        Some((master, terminal)) => {
            if exec.rows > 0 && exec.cols > 0 {
                system::set_window_size(master.as_fd(), exec.rows, exec.cols).map_err(other)?;
            }
            let end = || terminal.try_clone().map(Stdio::from).map_err(other);
            command.stdin(end()?).stdout(end()?).stderr(end()?);
            // SAFETY: the closure only makes system calls; descriptor 0 is the terminal by then.
            unsafe { command.pre_exec(|| system::lead_session(Some(BorrowedFd::borrow_raw(0)))) };
        }
        None => {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            // SAFETY: the closure only makes system calls.
            unsafe { command.pre_exec(|| system::lead_session(None)) };
        }
    }
    let mut child = command.spawn().map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::NotFound => FailReason::NotFound,
            io::ErrorKind::PermissionDenied => FailReason::NotExecutable,
            _ => FailReason::Other,
        };
        let why = match reason {
            FailReason::NotFound => "not found".to_owned(),
            FailReason::NotExecutable => "not executable".to_owned(),
            FailReason::Other => error.to_string(),
        };
        (reason, format!("{name}: {why}"))
    })?;
    let streams = match terminal {
        Some((master, _)) => {
            let clone = || master.try_clone().map(Some).map_err(other);
            (clone()?, clone()?, None, Some(master))
        }
        None => {
            let (stdin, stdout, stderr) =
                (child.stdin.take(), child.stdout.take(), child.stderr.take());
            (
                stdin.map(OwnedFd::from),
                stdout.map(OwnedFd::from),
                stderr.map(OwnedFd::from),
                None,
            )
        }
    };
    let (stdin, stdout, stderr, terminal) = streams;
    for end in [&stdin, &stdout, &stderr].into_iter().flatten() {
        system::set_nonblocking(end.as_fd()).map_err(other)?;
    }
    Ok(Program {
        child,
        stdin,
        stdout,
        stderr,
        terminal,
    })
}

/// The command for a request, without its streams.
fn prepare(exec: &Exec) -> Result<Command, (FailReason, String)> {
    let other = |text: String| (FailReason::Other, text);
    let (program, arguments) = exec
        .argv
        .split_first()
        .ok_or_else(|| other("no program is named".to_owned()))?;
    if program.is_empty() {
        return Err((
            FailReason::NotFound,
            "a program without a name: not found".to_owned(),
        ));
    }
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));

    let user = match exec.user.as_slice() {
        b"" => User::root(),
        wanted => {
            let wanted = String::from_utf8_lossy(wanted);
            let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
            User::find(&wanted, &passwd)
                .ok_or_else(|| other(format!("there is no user '{wanted}'")))?
        }
    };
    environment(&mut command, &user);
    for setting in &exec.env {
        let at = setting
            .iter()
            .position(|&byte| byte == b'=')
            .unwrap_or(setting.len());
        let (name, value) = setting.split_at(at);
        command.env(
            OsStr::from_bytes(name),
            OsString::from_vec(value.iter().skip(1).copied().collect()),
        );
    }
    if !exec.user.is_empty() {
        command.uid(user.uid).gid(user.gid);
    }

    let cwd = if exec.cwd.is_empty() {
        Path::new("/")
    } else {
        Path::new(OsStr::from_bytes(&exec.cwd))
    };
    if !cwd.is_dir() {
        return Err(other(format!("{}: no such directory", cwd.display())));
    }
    command.current_dir(cwd);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nbob:x:1000:100::/srv/bob:/bin/sh\n";
        let bob = User {
            name: "bob".into(),
            uid: 1000,
            gid: 100,
            home: "/srv/bob".into(),
        };
        assert_eq!(
            User::find("root", passwd),
            Some(User {
                name: "root".into(),
                ..User::root()
            })
        );
        assert_eq!(User::find("bob", passwd).as_ref(), Some(&bob));
        assert_eq!(User::find("1000", passwd), Some(bob));
        assert_eq!(
            User::find("7", passwd).map(|user| (user.uid, user.gid, user.home)),
            Some((7, 7, "/".into()))
        );
        assert_eq!(User::find("eve", passwd), None);
    }
}
