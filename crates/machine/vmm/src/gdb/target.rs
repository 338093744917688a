//! The machine as gdb's target: every wish becomes an [`Ask`] to the machine's event loop.

use std::sync::mpsc::{Receiver, Sender};

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::{Answer, Ask, Runs, Stop, ask, registers};
use crate::event::Event;

/// The machine has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the machine has ended")]
pub(crate) struct Gone;

/// A machine, as its gdb thread has it.
pub(crate) struct MachineTarget {
    events: Sender<Event>,
    pub(crate) stops: Receiver<Stop>,
    cpus: u32,
    breakpoints: Vec<u64>,
    steps: Vec<u32>,
    /// vCPUs that are to go on by name.
    named: Vec<u32>,
    locked: bool,
}

impl MachineTarget {
    pub(crate) fn new(events: Sender<Event>, stops: Receiver<Stop>, cpus: u32) -> Self {
        Self {
            events,
            stops,
            cpus,
            breakpoints: Vec::new(),
            steps: Vec::new(),
            named: Vec::new(),
            locked: false,
        }
    }

    pub(crate) fn ask(&self, wish: Ask) -> Result<Answer, Gone> {
        ask(&self.events, wish).ok_or(Gone)
    }

    /// Without breakpoints and without a debugger the machine goes on.
    pub(crate) fn leave(&mut self) {
        self.breakpoints.clear();
        // It may have ended.
        let _ = self.ask(Ask::Leave);
        while self.stops.try_recv().is_ok_and(|stop| stop != Stop::Ended) {}
    }

    /// Stops the machine for a debugger that comes.
    pub(crate) fn stop(&mut self) -> Result<(), Gone> {
        self.ask(Ask::Stop)?;
        // The debugger asks for itself why it is stopped.
        while self.stops.try_recv().is_ok() {}
        Ok(())
    }

    fn done(&self, wish: Ask) -> TargetResult<(), Self> {
        match self.ask(wish).map_err(TargetError::Fatal)? {
            Answer::Refused => Err(TargetError::NonFatal),
            _ => Ok(()),
        }
    }

    fn set_breakpoints(&mut self, wanted: Vec<u64>) -> TargetResult<bool, Self> {
        match self.done(Ask::Breakpoints(wanted.clone())) {
            Ok(()) => self.breakpoints = wanted,
            Err(TargetError::NonFatal) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn add(&mut self, at: u64) -> TargetResult<bool, Self> {
        let mut wanted = self.breakpoints.clone();
        if !wanted.contains(&at) {
            wanted.push(at);
        }
        self.set_breakpoints(wanted)
    }

    fn remove(&mut self, at: u64) -> TargetResult<bool, Self> {
        let mut wanted = self.breakpoints.clone();
        wanted.retain(|other| *other != at);
        self.set_breakpoints(wanted)
    }
}

/// gdb's threads count from 1.
fn cpu(tid: Tid) -> u32 {
    u32::try_from(tid.get() - 1).unwrap_or(u32::MAX)
}

/// The thread of a vCPU.
pub(crate) fn tid(cpu: u32) -> Tid {
    Tid::MIN.saturating_add(cpu as usize)
}

impl Target for MachineTarget {
    type Arch = X86_64_SSE;
    type Error = Gone;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for MachineTarget {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        match self.ask(Ask::State(cpu(tid))).map_err(TargetError::Fatal)? {
            Answer::State(state) => *regs = registers::to_gdb(&state),
            _ => return Err(TargetError::NonFatal),
        }
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        match self.ask(Ask::State(cpu(tid))).map_err(TargetError::Fatal)? {
            Answer::State(mut state) => {
                registers::from_gdb(regs, &mut state);
                self.done(Ask::SetState(cpu(tid), state))
            }
            _ => Err(TargetError::NonFatal),
        }
    }

    fn read_addrs(&mut self, at: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let wish = Ask::Read(cpu(tid), at, data.len());
        match self.ask(wish).map_err(TargetError::Fatal)? {
            Answer::Bytes(bytes) => {
                for (to, from) in data.iter_mut().zip(&bytes) {
                    *to = *from;
                }
                Ok(bytes.len().min(data.len()))
            }
            _ => Err(TargetError::NonFatal),
        }
    }

    fn write_addrs(&mut self, at: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        self.done(Ask::Write(cpu(tid), at, data.to_vec()))
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), Gone> {
        (0..self.cpus).map(tid).for_each(register);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for MachineTarget {
    fn thread_extra_info(&self, tid: Tid, into: &mut [u8]) -> Result<usize, Gone> {
        let text = format!("CPU {}", cpu(tid));
        for (to, from) in into.iter_mut().zip(text.as_bytes()) {
            *to = *from;
        }
        Ok(text.len().min(into.len()))
    }
}

impl MultiThreadResume for MachineTarget {
    fn resume(&mut self) -> Result<(), Gone> {
        let runs = match self.locked {
            true => Runs::Only(self.named.clone()),
            false => Runs::All,
        };
        let steps = self.steps.clone();
        self.ask(Ask::Resume { steps, runs }).map(drop)
    }

    fn clear_resume_actions(&mut self) -> Result<(), Gone> {
        (self.steps, self.named, self.locked) = (Vec::new(), Vec::new(), false);
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Gone> {
        self.named.push(cpu(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for MachineTarget {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Gone> {
        self.steps.push(cpu(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for MachineTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Gone> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for MachineTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

/// Of the same kind as the others: nothing is written into the guest's code.
impl SwBreakpoint for MachineTarget {
    fn add_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.add(at)
    }

    fn remove_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.remove(at)
    }
}

impl HwBreakpoint for MachineTarget {
    fn add_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.add(at)
    }

    fn remove_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.remove(at)
    }
}
