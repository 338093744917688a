//! Exit statuses, and errors that carry one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// With what status the program ends, unless a guest's program decides it. After `sysexits.h`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[repr(u8)]
pub enum ExitCode {
    /// The command line is wrong.
    Usage = 64,
    /// A kernel, an initrd or an image is damaged or of an unknown kind.
    Data = 65,
    /// A file, an image or a machine that was named does not exist.
    NoInput = 66,
    /// This host lacks something: a CPU feature, a program, the network.
    Unavailable = 69,
    /// A fault of Strata itself.
    Internal = 70,
    /// The system refused a resource.
    System = 71,
    /// A file or directory cannot be made.
    CannotCreate = 73,
    /// Reading or writing failed.
    Io = 74,
    /// Something is in use: try again later.
    Busy = 75,
    /// The guest crashed, or does not speak as it should.
    Guest = 76,
    /// Not permitted.
    Permission = 77,
    /// `run … -- CMD`: Strata failed around CMD.
    AroundCommand = 125,
    /// `run … -- CMD`: CMD cannot be executed.
    NotExecutable = 126,
    /// `run … -- CMD`: there is no CMD.
    NotFound = 127,
}

/// What `--help` says of exit statuses.
pub const HELP: &str = "\
Exit status:
  0        success; without CMD: the guest powered off
  64       the command line is wrong
  65       a kernel, an initrd or an image is damaged or of an unknown kind
  66       a file, an image or a machine that was named does not exist
  69       this host lacks something: a CPU feature, a program, the network, a layer of the jail
  70       a fault of Strata itself, or its jail stopped the machine
  71       the system refused a resource
  73       a file or directory cannot be made
  74       reading or writing failed
  75       something is in use: try again later
  76       the guest crashed, or does not speak as it should
  77       not permitted
With `run ... -- CMD` it is CMD's own, or:
  125      Strata failed around CMD
  126      CMD cannot be executed
  127      there is no CMD
  128+N    CMD was ended by signal N";

/// Status of a process ended by a signal, as shells have it.
pub const SIGNAL_BASE: u8 = 128;

/// An error as a user sees it: one sentence, and perhaps more lines that help.
#[derive(Debug)]
pub struct Failure {
    /// The status to end with.
    pub code: ExitCode,
    /// One sentence without a full stop; causes follow after colons.
    pub message: String,
    /// Printed after the sentence: the last lines of a guest's console, a tip.
    pub more: Vec<String>,
}

impl Failure {
    /// A failure with this sentence.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            more: Vec::new(),
        }
    }

    /// A failure that tells an error with all its causes.
    pub fn from_error(code: ExitCode, error: &dyn std::error::Error) -> Self {
        Self::new(code, chain(error))
    }

    /// The same with lines that follow the sentence.
    pub fn with(mut self, more: Vec<String>) -> Self {
        self.more = more;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "strata: {}", self.message)?;
        self.more.iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

/// An error's sentence and those of its causes. A cause that its effect already tells is left out, and so are the
/// numbers of system errors.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = without_numbers(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let sentence = without_numbers(&error.to_string());
        if !text.contains(&sentence) {
            text = format!("{text}: {sentence}");
        }
        cause = error.source();
    }
    text
}

/// The text without each ` (os error 2)`, which says nothing that the words before it do not.
fn without_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(
            part.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-')
                .trim_start_matches(')'),
        );
    }
    kept
}

/// The status for an I/O error on something the user named.
pub fn code_of_io(error: &std::io::Error) -> ExitCode {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound | Kind::IsADirectory | Kind::NotADirectory => ExitCode::NoInput,
        Kind::PermissionDenied => ExitCode::Permission,
        Kind::OutOfMemory => ExitCode::System,
        _ => ExitCode::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_documented() {
        for code in [
            ExitCode::Usage,
            ExitCode::Data,
            ExitCode::NoInput,
            ExitCode::Unavailable,
            ExitCode::Internal,
            ExitCode::System,
            ExitCode::CannotCreate,
            ExitCode::Io,
            ExitCode::Busy,
            ExitCode::Guest,
            ExitCode::Permission,
            ExitCode::AroundCommand,
            ExitCode::NotExecutable,
            ExitCode::NotFound,
        ] {
            let line = format!("\n  {:<8} ", code as u8);
            assert!(HELP.contains(&line), "{code:?}");
        }
    }

    #[test]
    fn causes_are_told_once() {
        let check = |context: &'static str, expected: &str| {
            let cause = std::io::Error::from_raw_os_error(2);
            let error = anyhow::Error::new(cause).context(context);
            let failure = Failure::from_error(ExitCode::Io, error.as_ref());
            assert_eq!(failure.with(vec!["line".into()]).to_string(), expected);
        };
        let message = "strata: cannot read x: No such file or directory";
        check("cannot read x", &format!("{message}\nline"));
        let tells = "cannot read x: No such file or directory (os error 2); try y";
        check(tells, &format!("{message}; try y\nline"));
    }
}
