//! `strata ports`: which ports of this host lead to a machine.

use strata_vmm::RunDir;
use strata_vmm::control::{ClientError, Request, Status};

use crate::args::PortsArgs;
use crate::exit::Failure;
use crate::output;
use crate::stats::{client_failure, connect, run_dir_failure};

/// Prints them.
pub fn run(args: &PortsArgs) -> Result<(), Failure> {
    RunDir::find(&RunDir::root(), &args.name).map_err(|error| run_dir_failure(&error))?;
    let status = ask(args).map_err(|error| client_failure(&error))?;
    if args.json {
        return output::print_json(&status.ports);
    }
    if status.ports.is_empty() {
        return output::print("no port is published\n");
    }
    let rows: Vec<Vec<String>> = status
        .ports
        .iter()
        .map(|port| {
            let guest = format!("{}/{}", port.guest, port.protocol);
            vec![port.host.to_string(), "->".to_owned(), guest]
        })
        .collect();
    output::print(&output::table(&rows))
}

fn ask(args: &PortsArgs) -> Result<Status, ClientError> {
    let answer = connect(&args.name)?.ask(&Request::Status)?;
    serde_json::from_value(answer).map_err(|_| ClientError::Protocol)
}
