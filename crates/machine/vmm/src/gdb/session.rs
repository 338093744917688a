//! Sessions of gdb, one after another: bytes on a socket on one side, the machine on the other.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use gdbstub::common::Signal;
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Stop;
use super::target::{Gone, MachineTarget, tid};
use crate::machine::MachineHandle;

/// How long a stop is waited for until it is looked whether gdb says something.
const LOOK: Duration = Duration::from_millis(10);

/// Takes one session after another until the machine has ended.
pub(crate) fn serve(listener: &OwnedFd, mut target: MachineTarget, machine: &MachineHandle) {
    let mut first = true;
    loop {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let Ok(socket) = rustix::net::accept_with(listener, flags) else {
            return;
        };
        // At first it stands already.
        if !first && target.stop().is_err() {
            return;
        }
        first = false;
        let line = Line {
            socket,
            ahead: None,
            out: Vec::new(),
        };
        match GdbStub::new(line).run_blocking::<Session>(&mut target) {
            Ok(DisconnectReason::Kill) => {
                machine.power_off();
                return;
            }
            Ok(DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_)) => {
                return;
            }
            Ok(DisconnectReason::Disconnect) => target.leave(),
            // A connection that broke, or nonsense on it: as if it had left.
            Err(error) if error.is_connection_error() => target.leave(),
            Err(error) if error.is_target_error() => return,
            Err(_) => target.leave(),
        }
    }
}

struct Session;

impl BlockingEventLoop for Session {
    type Target = MachineTarget;
    type Connection = Line;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut MachineTarget,
        line: &mut Line,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<Gone, io::Error>> {
        loop {
            let reason = match target.stops.recv_timeout(LOOK) {
                Ok(Stop::Breakpoint(cpu)) => MultiThreadStopReason::SwBreak(tid(cpu)),
                Ok(Stop::Step(cpu)) => MultiThreadStopReason::SignalWithThread {
                    tid: tid(cpu),
                    signal: Signal::SIGTRAP,
                },
                Ok(Stop::Asked) => MultiThreadStopReason::SignalWithThread {
                    tid: tid(0),
                    signal: Signal::SIGINT,
                },
                Ok(Stop::Ended) => MultiThreadStopReason::Exited(0),
                Err(RecvTimeoutError::Disconnected) => MultiThreadStopReason::Exited(0),
                Err(RecvTimeoutError::Timeout) => {
                    let said = line.peek().map_err(WaitForStopReasonError::Connection)?;
                    if said.is_some() {
                        let byte = line.read().map_err(WaitForStopReasonError::Connection)?;
                        return Ok(Event::IncomingData(byte));
                    }
                    continue;
                }
            };
            return Ok(Event::TargetStopped(reason));
        }
    }

    fn on_interrupt(target: &mut MachineTarget) -> Result<Option<Self::StopReason>, Gone> {
        // The stop comes as any other.
        target.ask(super::Ask::Stop)?;
        Ok(None)
    }
}

/// A connection to gdb, over whatever kind of socket.
struct Line {
    socket: OwnedFd,
    /// A byte that was looked at and not yet taken.
    ahead: Option<u8>,
    out: Vec<u8>,
}

impl Connection for Line {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        let mut rest = out.as_slice();
        while !rest.is_empty() {
            let flags = rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, rest, flags) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl ConnectionExt for Line {
    fn read(&mut self) -> io::Result<u8> {
        if let Some(byte) = self.ahead.take() {
            return Ok(byte);
        }
        let mut byte = [0];
        loop {
            match rustix::io::read(&self.socket, &mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(byte[0]),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.ahead.is_none() {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            if poll(&mut fds, Some(&now))? == 0 {
                return Ok(None);
            }
            self.ahead = Some(self.read()?);
        }
        Ok(self.ahead)
    }
}
