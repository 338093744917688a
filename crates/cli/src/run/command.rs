//! CMD in the guest, through its agent: our input, output, errors and signals are its own.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use strata_agent::client::{self, Client, Output};
use strata_agent::{ClientError, Exec, ExitStatus, FailReason, Input, PORT};

use super::prepare::CommandPlan;
use super::{Happened, spawn, terminal, wire};
use crate::exit::{ExitCode, Failure, chain};

/// SIGPIPE: what a program gets whose output nobody reads.
const SIGPIPE: u8 = 13;
/// How long an agent that answered once may take to take a new connection.
const RECONNECT: Duration = Duration::from_secs(1);

/// Runs CMD from a thread of its own and reports how it goes.
pub fn start(
    plan: CommandPlan,
    socket: PathBuf,
    happened: Sender<Happened>,
) -> Result<(), Failure> {
    spawn("command", move || {
        let result = run(&plan, &socket, &happened);
        terminal::restore();
        // The one who waits may have given up.
        let _ = happened.send(Happened::Done(result));
    })
}

/// Asks the agent to power the guest off; true if it will.
pub fn ask_to_power_off(socket: &Path) -> bool {
    let Ok(stream) = client::connect(socket, PORT, RECONNECT) else {
        return false;
    };
    greet(stream).is_ok_and(|mut client| client.power_off(false).is_ok())
}

fn greet(stream: UnixStream) -> Result<Client<UnixStream>, ClientError> {
    let writer = stream.try_clone()?;
    Client::greet(stream, writer)
}

fn run(
    plan: &CommandPlan,
    socket: &Path,
    happened: &Sender<Happened>,
) -> Result<ExitStatus, Failure> {
    let stream = client::connect(socket, PORT, plan.boot_timeout).map_err(|error| {
        let seconds = plan.boot_timeout.as_secs();
        let message = format!("the guest's agent did not answer within {seconds} s: {error}");
        Failure::new(ExitCode::Guest, message)
    })?;
    let client = greet(stream).map_err(|error| agent_failure(&error))?;
    let _ = happened.send(Happened::AgentReady);
    let mut process = client
        .exec(exec(plan))
        .map_err(|error| agent_failure(&error))?;
    let input = process.input();
    let is_terminal = plan.tty && terminal::make_raw();
    let _ = happened.send(Happened::Started(input.clone()));
    feed(input.clone(), is_terminal, happened.clone())?;
    let mut outputs = Outputs::new(&input);
    loop {
        match process.next_output() {
            Ok(Output::Stdout(data)) => outputs.stdout(&data),
            Ok(Output::Stderr(data)) => outputs.stderr(&data),
            Ok(Output::Exited(status)) => return Ok(status),
            Err(error) => return Err(agent_failure(&error)),
        }
    }
}

fn exec(plan: &CommandPlan) -> Exec {
    let (cols, rows) = terminal::size().filter(|_| plan.tty).unwrap_or((0, 0));
    let mut env = Vec::new();
    if plan.tty
        && let Some(term) = std::env::var_os("TERM")
    {
        let mut setting = b"TERM=".to_vec();
        setting.extend_from_slice(term.as_encoded_bytes());
        env.push(setting);
    }
    Exec {
        argv: plan.argv.clone(),
        env,
        tty: plan.tty,
        rows,
        cols,
        ..Exec::default()
    }
}

/// Sends our standard input to CMD.
fn feed(input: Input, is_terminal: bool, happened: Sender<Happened>) -> Result<(), Failure> {
    spawn("input", move || {
        let stdin = io::stdin().lock();
        if wire::pump(is_terminal, stdin, |bytes| input.write(bytes).is_ok()) {
            let _ = happened.send(Happened::Quit);
        } else {
            // CMD may have ended.
            let _ = input.end();
        }
    })
}

/// Our standard output and error. When a reader goes away, CMD gets the signal it would get here.
struct Outputs<'a> {
    input: &'a Input,
    stdout_closed: bool,
}

impl<'a> Outputs<'a> {
    fn new(input: &'a Input) -> Self {
        Self {
            input,
            stdout_closed: false,
        }
    }

    fn stdout(&mut self, data: &[u8]) {
        if self.stdout_closed {
            return;
        }
        let mut stdout = io::stdout().lock();
        if stdout
            .write_all(data)
            .and_then(|()| stdout.flush())
            .is_err()
        {
            self.stdout_closed = true;
            let _ = self.input.signal(SIGPIPE);
        }
    }

    fn stderr(&mut self, data: &[u8]) {
        // As a program that cannot say its errors does.
        let _ = io::stderr().write_all(data);
    }
}

fn agent_failure(error: &ClientError) -> Failure {
    let code = match error {
        ClientError::Failed {
            reason: FailReason::NotFound,
            ..
        } => ExitCode::NotFound,
        ClientError::Failed {
            reason: FailReason::NotExecutable,
            ..
        } => ExitCode::NotExecutable,
        _ => ExitCode::Guest,
    };
    Failure::new(code, chain(error))
}
