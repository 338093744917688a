//! `cargo xtask bench network`: TCP throughput between guest and host, both ways, under Strata and under QEMU TCG with
//! `-netdev user`, in turns, with the same kernel and RAM disk.
//!
//! The guest's `nc` and `dd` move the bytes; the clock is the host's, from the connection to the last byte.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{guest, setup, shell};

/// Bytes of a piece.
const PIECE: usize = 256 << 10;
/// How long one machine may take for one direction.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often a machine is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Options of `cargo xtask bench network`.
#[derive(Args)]
pub struct NetworkArguments {
    /// How often everything runs; the best turn counts.
    #[arg(long, default_value_t = 3)]
    turns: usize,
    /// What is moved each way, in MiB.
    #[arg(long, default_value_t = 128)]
    mebibytes: usize,
    /// The `strata` to measure; by default it is built in release mode.
    #[arg(long)]
    strata: Option<PathBuf>,
}

/// MiB per second to the guest and from it.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    down: f64,
    up: f64,
}

/// Runs it and prints the table.
pub fn run(arguments: &NetworkArguments) -> Result<ExitCode> {
    setup::ensure(setup::BENCH_TOOLS)?;
    setup::ensure(setup::IMAGE_TOOLS)?;
    let strata = match &arguments.strata {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("cannot use {}", path.display()))?,
        None => guest::build_strata()?,
    };
    // An image that is out of date is built anew by its first run, and its files change.
    shell::run(shell::command(&strata).args(["run", "tiny", "--", "true"]))?;
    let (kernel, initrd) = (guest::tiny_kernel(&strata)?, guest::tiny_initrd(&strata)?);
    let mut best = [Rates::default(); 2];
    for turn in 1..=arguments.turns {
        for (at, best) in best.iter_mut().enumerate() {
            let rates = measure(arguments.mebibytes, |script| {
                if at == 0 {
                    let mut command = shell::command(&strata);
                    command.args(["run", "tiny", "--engine", "translate", "--memory", "512M"]);
                    command.args(["--net", "user,host-loopback", "--", "sh", "-c", script]);
                    return command;
                }
                let wait = "while ! ip route | grep -q ^default; do sleep 0.1; done";
                let append = format!(
                    "console=ttyS0 quiet cryptomgr.notests panic=-1 strata.run=\"/bin/sh -c\" -- \"{wait}; {script}\""
                );
                let mut command = shell::command("qemu-system-x86_64");
                command.args(["-accel", "tcg", "-cpu", "max", "-m", "512", "-nographic"]);
                command.args(["-no-reboot", "-netdev", "user,id=n"]);
                command.args(["-device", "virtio-net-pci,netdev=n", "-append", &append]);
                command
                    .arg("-kernel")
                    .arg(&kernel)
                    .arg("-initrd")
                    .arg(&initrd);
                command
            })?;
            eprintln!("== turn {turn}: {}: {rates:.1?} MiB/s", NAMES[at]);
            best.down = best.down.max(rates.down);
            best.up = best.up.max(rates.up);
        }
    }
    let [strata, tcg] = best;
    println!("MiB/s       to the guest   from the guest");
    for (name, rates) in NAMES.iter().zip(best) {
        println!("{name:<12}{:>12.1}{:>17.1}", rates.down, rates.up);
    }
    println!(
        "ratio       {:>12.1}{:>17.1}",
        strata.down / tcg.down,
        strata.up / tcg.up
    );
    Ok(ExitCode::SUCCESS)
}

const NAMES: [&str; 2] = ["strata", "tcg"];

/// Runs a machine that takes and sends; the machine is made for a script for its shell.
fn measure(mebibytes: usize, machine: impl FnOnce(&str) -> Command) -> Result<Rates> {
    let (down_port, down) = serve(mebibytes << 20, true)?;
    let (up_port, up) = serve(mebibytes << 20, false)?;
    let pieces = (mebibytes << 20) / PIECE;
    let script = format!(
        "gw=$(ip route | awk '/^default/ {{print $3}}'); nc $gw {down_port} -e dd of=/dev/null bs=256k; \
         nc $gw {up_port} -e dd if=/dev/zero bs=256k count={pieces}"
    );
    let mut command = machine(&script);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start `{}`", shell::line(&command)))?;
    let deadline = Instant::now() + PATIENCE;
    let (mut to_guest, mut from_guest) = (None, None);
    let mut runs = true;
    while runs && Instant::now() < deadline && (to_guest.is_none() || from_guest.is_none()) {
        runs = child
            .try_wait()
            .context("cannot wait for a machine")?
            .is_none();
        thread::sleep(LOOK_EVERY);
        to_guest = to_guest.or_else(|| down.try_recv().ok());
        from_guest = from_guest.or_else(|| up.try_recv().ok());
    }
    if runs {
        // It has nothing more to do, or takes too long.
        child.kill().context("cannot stop a machine")?;
    }
    child.wait().context("cannot wait for a machine")?;
    let rates = to_guest.zip(from_guest);
    match rates {
        Some((down, up)) => Ok(Rates { down, up }),
        None => bail!("`{}` moved nothing in time", shell::line(&command)),
    }
}

/// Takes one connection on a port of the loopback, sends or receives, and tells the rate.
fn serve(bytes: usize, sends: bool) -> Result<(u16, Receiver<f64>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    let port = listener
        .local_addr()
        .context("a port has no number")?
        .port();
    let (tell, told) = channel();
    thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let (start, mut piece, mut moved) = (Instant::now(), vec![0; PIECE], 0);
        if sends {
            while moved < bytes && stream.write_all(&piece).is_ok() {
                moved += piece.len();
            }
            // The peer's end comes when it has taken all.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            while stream.read(&mut piece).is_ok_and(|count| count > 0) {}
        } else {
            while let Ok(count @ 1..) = stream.read(&mut piece) {
                moved += count;
            }
        }
        if moved >= bytes {
            // Whoever waited may have given up.
            let _ = tell.send(moved as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64());
        }
    });
    Ok((port, told))
}
