//! The dispatcher (Popek and Goldberg's): where every trap of translated code arrives and is sent on - to the
//! translator, to the allocator ([`crate::mmu`], [`crate::apic`]) or to the [`crate::interpret`]er.

use std::sync::Arc;
use std::time::Instant;

use iced_x86::Instruction;
use strata_engine::x86::{CpuState, X86};
use strata_engine::{
    EngineError, Exit, ExitCause, GuestDebug, Input, InputLog, Inputs, IoBus, Kicker, Vcpu,
    VcpuStats,
};
use strata_memory::Gpa;
use strata_verify::Inspect;

use crate::code::{BREAKPOINT, BranchSite, CodeMap, Key, Next as After};
use crate::cpu::{BOUNCE_SIZE, Context, Cpu, control, flags, request};
use crate::env::{Access, Env, Exec, Fault};
use crate::interpret::Next;
use crate::lockstep::{Leader, Tracer};
use crate::mmu::{OperandAccess, PendingStore, StoredTo, canonical};
use crate::signals::{self, FaultFrame, ThreadGuard};
use crate::stubs::{self, Callbacks, Stubs, reason};
use crate::table::FeatureSet;
use crate::translate::{Fetch, Mode, Options, Workspace, translate};

mod blocks;
mod follow;
mod inspect;
mod provisional;
mod running;

use provisional::{Provisional, serializes};
use running::{Running, block_exit, commit, slow, stored};

/// One vCPU of the software engine.
pub struct Translated {
    cpu: Box<Context>,
    env: Env,
    code: CodeMap,
    stubs: Stubs,
    features: FeatureSet,
    options: Options,
    frame: Box<FaultFrame>,
    /// Mode and CS base that each jump cache holds entries for.
    cached_mode: [(Mode, u64); 2],
    /// The lock-step side of this vCPU, if it has one.
    tracer: Option<Box<Tracer>>,
    /// Steps to go in lock-step, from the next run on.
    lockstep: u64,
    /// Block exits that lock-step found equal.
    compared: u64,
    /// RIP of an access that must be checked by itself when it runs next: its group's check failed.
    ungrouped: Option<u64>,
    /// Memory for the next translation.
    workspace: Workspace,
    /// Times the cache was flushed: link numbers are valid within one generation.
    generation: u64,
    /// Exceptions end the run instead of being delivered.
    stop_on_exception: bool,
    stopped: Option<Fault>,
    /// Blocks whose bytes others might still change unnoticed, see `peers`.
    provisional: Vec<Provisional>,
    /// The last instruction was one that serializes: old code must not run after it.
    serialized: bool,
    /// What a debugger wants.
    debug: GuestDebug,
    /// Looks at every block before it runs.
    inspector: Option<Arc<dyn Inspect>>,
}

// SAFETY: the raw pointers inside (code mappings, the context's `env` while running) belong to this value; nothing
// refers to another thread's data.
unsafe impl Send for Translated {}

impl Translated {
    pub(crate) fn new(env: Env, options: Options) -> Result<Translated, EngineError> {
        let mut cpu = Cpu::boxed();
        let mut code = CodeMap::new(Arc::clone(&env.peers), env.me.id())?;
        let stubs = stubs::build(
            &mut code,
            &Callbacks {
                slow,
                commit,
                stored,
                block_exit,
            },
        )?;
        cpu.to_stub = [
            stubs.interpret,
            stubs.lookup,
            stubs.request,
            stubs.block_exit,
        ];
        signals::install()?;
        env.me.attach(&mut cpu.request);
        cpu.wait_for_sipi = env.apic.id() != 0;
        cpu.remembers = !options.reference;
        let features = FeatureSet::of(&env.model);
        let frame = Box::new(FaultFrame {
            range: code.range(),
            resume: stubs.host_fault,
            ..FaultFrame::default()
        });
        Ok(Translated {
            cpu,
            env,
            code,
            stubs,
            features,
            options,
            frame,
            cached_mode: [(Mode(u32::MAX), 0); 2],
            tracer: None,
            lockstep: 0,
            compared: 0,
            generation: 0,
            stop_on_exception: false,
            stopped: None,
            provisional: Vec::new(),
            ungrouped: None,
            workspace: Workspace::default(),
            serialized: false,
            debug: GuestDebug::default(),
            inspector: None,
        })
    }

    /// The context, between runs.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The context, between runs.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// Makes [`Vcpu::run`] come back as if kicked when the guest raises an exception, which is then not delivered but
    /// kept for [`Translated::take_stopped`]. For the instruction oracle.
    pub fn stop_on_exception(&mut self, on: bool) {
        self.stop_on_exception = on;
    }

    /// The exception that ended the last run.
    pub fn take_stopped(&mut self) -> Option<Fault> {
        self.stopped.take()
    }

    fn exec<'a>(&'a mut self, bus: &'a dyn IoBus) -> Exec<'a> {
        Exec {
            cpu: &mut self.cpu,
            env: &mut self.env,
            bus,
            code: &mut self.code,
        }
    }

    /// Counts a step that is no retired instruction.
    fn count_step(&mut self) {
        if self.options.count {
            self.cpu.retired += 1;
            self.env.stats.other_steps += 1;
        }
    }

    /// Runs until something must be decided outside.
    fn run_loop(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        loop {
            if let Some(error) = self.env.divergence.take() {
                return Err(EngineError::Replay(error));
            }
            let requested = self.cpu.request_bits() != 0;
            if requested || std::mem::take(&mut self.serialized) {
                self.env.me.settle();
                self.confirm();
            }
            let waits = requested
                || self.cpu.request_bits() != 0
                || self.cpu.halted
                || self.cpu.wait_for_sipi;
            if waits && let Some(exit) = self.requests(bus) {
                return Ok(exit);
            }
            if self.tracer.is_some() {
                self.trace()?;
            }
            if let Some(exit) = self.step(bus)? {
                return Ok(exit);
            }
            if self.debug.step {
                return Ok(Exit::Debug);
            }
        }
    }

    /// Looks at the request word and waits while halted.
    fn requests(&mut self, bus: &dyn IoBus) -> Option<Exit> {
        loop {
            let bits = self.cpu.take_requests();
            if bits & request::QUESTION != 0 {
                self.exec(bus).answer();
            }
            if bits & request::CODE_WRITTEN != 0 {
                for (gpa, len) in self.env.me.take_writes() {
                    let stats = &mut self.env.stats;
                    self.code.written(gpa, len, &mut self.cpu, stats);
                }
            }
            if bits & request::LOOK != 0 {
                self.env.me.settle();
                self.confirm();
            }
            if bits & request::GIVE_WAY != 0 {
                self.env.peers.give_way(&self.env.me);
                // What came meanwhile comes first.
                self.cpu.raise_request(bits & !request::QUIET);
                continue;
            }
            if bits & request::KICK != 0 {
                // Other threads do not see INIT and start-up in a state, so they come first; all else that was asked
                // for is looked at when the vCPU runs again.
                self.start_up();
                self.cpu.raise_request(request::INTERRUPT);
                return Some(Exit::Kicked);
            }
            let stepped = self.debug.step && !self.cpu.halted && !self.cpu.wait_for_sipi;
            if self.cpu.interrupt_shadow || stepped {
                self.cpu.raise_request(request::INTERRUPT);
                return None;
            }
            if let Some(exit) = self.events(bus) {
                return Some(exit);
            }
            if !self.cpu.halted && !self.cpu.wait_for_sipi {
                return None;
            }
            self.env.peers.leave(&self.env.me);
            self.env.me.wait();
            self.env.peers.enter(&self.env.me);
            self.env.me.settle();
            self.confirm();
        }
    }

    /// Accepts what the local APIC has for us.
    fn events(&mut self, bus: &dyn IoBus) -> Option<Exit> {
        self.cpu.deferred = 0;
        if !self.env.apic.pending() {
            return None;
        }
        if self.start_up() {
            // It serializes.
            self.env.me.settle();
            self.confirm();
            return None;
        }
        let waiting = self.env.apic.waiting();
        if waiting.nmi && self.cpu.nmi_blocked {
            self.env.apic.keep_one_nmi();
        } else if waiting.nmi && self.env.apic.take_nmi() {
            self.cpu.halted = false;
            self.env.inputs.arrived(Input::Interrupt {
                at: self.cpu.retired,
                vector: 2,
            });
            self.count_step();
            return self.deliver(bus, 2, true);
        }
        if !waiting.interrupt {
            return None;
        }
        if self.cpu.interrupts_on == 0 {
            self.cpu.deferred = 1;
            return None;
        }
        let vector = self.env.apic.acknowledge()?;
        self.env.inputs.arrived(Input::Interrupt {
            at: self.cpu.retired,
            vector,
        });
        self.cpu.halted = false;
        self.env.stats.interrupts += 1;
        self.count_step();
        self.deliver(bus, vector, false)
    }

    /// Takes INIT and start-up. True if no other event may be taken.
    fn start_up(&mut self) -> bool {
        if self.env.apic.take_init(self.cpu.wait_for_sipi) {
            self.cpu.init();
            self.cpu.wait_for_sipi = self.env.apic.id() != 0;
        }
        if self.cpu.wait_for_sipi {
            if let Some(vector) = self.env.apic.take_startup() {
                self.cpu.start_at(vector);
            }
            return true;
        }
        false
    }

    fn deliver(&mut self, bus: &dyn IoBus, vector: u8, nmi: bool) -> Option<Exit> {
        let next = self.exec(bus).inject(vector, nmi);
        if self.env.apic.pending() {
            // More waits: the next look decides whether for IF or for the priority.
            self.cpu.raise_request(request::INTERRUPT);
        }
        self.after(next)
    }

    fn after(&mut self, next: Next) -> Option<Exit> {
        match next {
            Next::Continue | Next::RepeatLater => None,
            Next::Halt => {
                self.exit(ExitCause::Halt);
                self.cpu.halted = true;
                None
            }
            Next::Shutdown => Some(Exit::Shutdown),
        }
    }

    fn exit(&mut self, cause: ExitCause) {
        self.env.count_exit(cause);
    }

    /// Raises a guest exception.
    fn raise(&mut self, bus: &dyn IoBus, fault: Fault) -> Option<Exit> {
        if self.stop_on_exception {
            self.stopped = Some(fault);
            return Some(Exit::Kicked);
        }
        self.exit(ExitCause::Exception);
        self.env.stats.exceptions += 1;
        self.count_step();
        if fault.vector == 14 {
            self.env.stats.page_faults += 1;
        }
        let next = self.exec(bus).raise(fault);
        self.after(next)
    }

    /// Finds the next block, runs it and whatever is chained to it, and handles why it came back.
    fn step(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        let mut mode = Mode::of(&self.cpu);
        if self.cpu.debug_before() {
            return Ok(self.raise(bus, Fault::plain(1)));
        }
        if self.debug.step {
            mode = mode.single();
        }
        if self.ungrouped == Some(self.cpu.rip) {
            self.ungrouped = None;
            mode = mode.ungrouped();
        }
        if self.cpu.interrupt_shadow {
            self.cpu.interrupt_shadow = false;
            mode = mode.single();
            if self.env.apic.pending() {
                // It was asked for while interrupts were held off, without effect.
                self.cpu.raise_request(request::INTERRUPT);
            }
        }
        if self.cpu.dropped.any() {
            self.code.mappings_dropped(self.cpu.dropped.take());
        }
        let entry = match self.recall(mode) {
            Some(entry) => entry,
            None => {
                let (block, key, global) = match self.find(mode, bus)? {
                    Ok(found) => found,
                    Err(fault) => return Ok(self.raise(bus, fault)),
                };
                self.remember(mode, block, key, global);
                self.code
                    .block(block)
                    .map_or(0, |block| self.code.address(block.entry))
            }
        };
        let fault = self.enter(bus, entry);
        let exit = match self.cpu.exit_reason {
            reason::LOOKUP => {
                self.exit(ExitCause::Lookup);
                if !canonical(self.cpu.rip)
                    && let Some(site) = self.code.branch_site(self.cpu.exit_info as u32)
                {
                    return Ok(self.bad_target(bus, site));
                }
                None
            }
            reason::LINK => {
                self.exit(ExitCause::Lookup);
                self.follow_link(bus)?
            }
            reason::UNGROUP => {
                self.exit(ExitCause::Lookup);
                self.ungroup(bus)?
            }
            reason::INTERPRET => self.interpret(bus)?,
            reason::REQUEST => {
                self.exit(ExitCause::Request);
                if self.cpu.deferred != 0 {
                    self.cpu.raise_request(request::INTERRUPT);
                }
                None
            }
            reason::STALE => None,
            reason::FAULT => match fault {
                Some(fault) => return Ok(self.raise(bus, fault)),
                None => {
                    return Err(EngineError::Internal(
                        "a fault without its description".into(),
                    ));
                }
            },
            reason::HOST_FAULT => return self.host_fault(bus),
            other => {
                return Err(EngineError::Internal(format!(
                    "unknown exit reason {other}"
                )));
            }
        };
        self.code.stale = false;
        if self.cpu.watching() && self.cpu.exit_reason != reason::INTERPRET {
            self.cpu.system_flags &= !flags::RF;
        }
        if exit.is_none() && self.cpu.exit_reason != reason::REQUEST && self.cpu.debug_after() {
            self.env.stats.exceptions += 1;
            self.count_step();
            if self.stop_on_exception {
                self.stopped = Some(Fault::plain(1));
                return Ok(Some(Exit::Kicked));
            }
            let next = self.exec(bus).raise_trap(1);
            return Ok(self.after(next));
        }
        Ok(exit)
    }

    /// An indirect branch to an address that is not canonical: nothing of it has happened.
    fn bad_target(&mut self, bus: &dyn IoBus, site: BranchSite) -> Option<Exit> {
        self.cpu.rip = site.rip;
        self.cpu.gpr[4] = self.cpu.gpr[4].wrapping_sub(u64::from(site.moved));
        if self.options.count && site.counted {
            self.cpu.retired -= 1;
        } else if self.options.count {
            self.cpu.retired += u64::from(site.index);
        }
        self.raise(bus, Fault::protection(0))
    }

    /// Enters translated code at `entry`; comes back with the fault the slow path raised, if it did.
    fn enter(&mut self, bus: &dyn IoBus, entry: u64) -> Option<Fault> {
        // SAFETY: only the lifetime is changed; the pointer is used during this call alone.
        let bus: &'static dyn IoBus = unsafe { std::mem::transmute(bus) };
        self.prepare();
        let context: *mut Context = &mut *self.cpu;
        // SAFETY: the context lives as long as `self`; its room below the vCPU belongs to the stubs.
        let cpu: *mut Cpu = unsafe { &mut **context };
        let mut running = Running {
            cpu,
            env: &mut self.env,
            code: &mut self.code,
            bus,
            tracer: &mut self.tracer,
            reference: self.options.reference,
            count: self.options.count,
            fault: None,
            pending: None,
            told: false,
            alone: false,
            diverged: false,
        };
        // SAFETY: `enter` is the stub of that signature; `entry` is translated code for this context. The slow path
        // reaches this value's parts through `running` only while this function waits here.
        unsafe {
            (*cpu).env = (&raw mut running) as u64;
            let enter: unsafe extern "sysv64" fn(*mut Cpu, u64) =
                std::mem::transmute(self.stubs.enter);
            enter(cpu, entry);
            (*cpu).env = 0;
        }
        running.end();
        // SAFETY: it is a field of a value on this stack; translated code wrote it through a pointer.
        unsafe { (&raw const running.fault).read_volatile() }
    }

    /// Tells the system stubs what they may do until translated code is left.
    fn prepare(&mut self) {
        let cpu = &mut *self.cpu;
        let calls = cpu.efer & control::EFER_SCE != 0 && canonical(cpu.lstar);
        let looked_at = cpu.watching() || self.debug.step;
        let usual = !looked_at && calls;
        let [kernel, user] = self.cached_mode;
        let fast = |cached, user| u64::from(usual && cached == (Mode::usual(cpu, user), 0));
        cpu.fast = [fast(kernel, false), fast(user, true)];
        cpu.fast_iret = if self.provisional.is_empty() {
            self.env.me.unsettled().addr() as u64
        } else {
            0
        };
        cpu.traced = u64::from(self.tracer.is_some());
        let ticks = matches!(self.env.inputs, Inputs::Live) && cpu.cr4 & control::CR4_TSD == 0;
        cpu.tsc_line = if ticks {
            self.env.tsc.line().addr() as u64
        } else {
            0
        };
    }

    /// Runs one instruction in the interpreter.
    fn interpret(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        self.exit(ExitCause::Interpret);
        let Some(site) = self.code.interpret_site(self.cpu.exit_info as u32) else {
            return Err(EngineError::Internal(
                "an instruction that is not known".into(),
            ));
        };
        self.cpu.rip = site.instr.ip();
        if self.options.count {
            self.cpu.retired += u64::from(site.index);
        }
        if site.fault == Some(BREAKPOINT) {
            return Ok(Some(Exit::Debug));
        }
        if let Some(vector) = site.fault {
            let fault = match vector {
                13 => Fault::protection(0),
                _ => Fault::plain(vector),
            };
            return Ok(self.raise(bus, fault));
        }
        let instr: Instruction = site.instr;
        self.serialized = serializes(&instr);
        let result = self.exec(bus).interpret(&instr);
        match result {
            Ok(next) => {
                if next == Next::RepeatLater {
                    self.count_step();
                } else if self.options.count {
                    self.cpu.retired += 1;
                }
                if let Some(Tracer::Leader(leader)) = self.tracer.as_deref_mut() {
                    leader.device_writes(self.cpu.retired, &mut self.env.inputs);
                }
                if self.env.apic.pending() {
                    self.cpu.raise_request(request::INTERRUPT);
                }
                Ok(self.after(next))
            }
            Err(fault) => Ok(self.raise(bus, fault)),
        }
    }

    /// An instruction run as itself faulted on the host: the same exception for the guest.
    fn host_fault(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        let Some(point) = self.code.fault_point(self.frame.pc) else {
            return Err(EngineError::Internal(format!(
                "host fault {} at an address that stands for no guest instruction",
                self.frame.vector
            )));
        };
        self.cpu.rip = point.rip;
        if self.options.count {
            self.cpu.retired += u64::from(point.index);
        }
        let fault = match self.frame.vector {
            // A system that knows nothing of these exceptions sees an undefined instruction.
            19 if self.cpu.cr4 & crate::cpu::control::CR4_OSXMMEXCPT == 0 => Fault::UNDEFINED,
            vector @ (0 | 6 | 16 | 19) => Fault::plain(vector),
            13 => Fault::protection(0),
            17 => Fault {
                vector: 17,
                error: Some(0),
                cr2: 0,
            },
            other => {
                return Err(EngineError::Internal(format!(
                    "host fault {other} (address {:#x}) in the code of guest RIP {:#x}",
                    self.frame.address, point.rip
                )));
            }
        };
        Ok(self.raise(bus, fault))
    }
}

impl Vcpu<X86> for Translated {
    fn run(&mut self, bus: &dyn IoBus) -> Result<Exit, EngineError> {
        if self.lockstep > 0 && self.tracer.is_none() {
            self.env.inputs = Inputs::Record(InputLog::default());
            let leader = Leader::start(self)?;
            self.tracer = Some(Box::new(Tracer::Leader(leader)));
        }
        let _guard = ThreadGuard::enter(&mut *self.frame)?;
        self.env.slots = self.env.memory.slots();
        self.cpu.load_fpu();
        self.env.tsc.resume(&self.env.clock);
        self.env.peers.enter(&self.env.me);
        let result = self.run_loop(bus);
        self.env.peers.leave(&self.env.me);
        self.cpu.store_fpu();
        if result.is_ok() {
            self.settle()?;
        }
        result
    }

    fn state(&mut self) -> CpuState {
        crate::state::save(&mut self.exec(&NoBus))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        // A follower cannot follow a jump in state; lock-step starts anew with the next run.
        self.tracer = None;
        crate::state::restore(&mut self.exec(&NoBus), state)?;
        self.cpu.flush_tlb(true);
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.env.me) as Arc<dyn Kicker>
    }

    fn debug(&mut self, wish: &GuestDebug) -> Result<(), EngineError> {
        if wish.breakpoints != self.debug.breakpoints {
            self.code.breakpoints.clone_from(&wish.breakpoints);
            self.code.flush(&mut self.cpu, &mut self.env.stats);
            self.generation += 1;
        }
        self.debug.clone_from(wish);
        Ok(())
    }

    fn stats(&self) -> VcpuStats {
        let instructions = self.cpu.retired - self.env.stats.other_steps;
        let exits = self.env.exits();
        VcpuStats {
            instructions,
            compared_exits: self.compared,
            exits,
            ..self.env.stats.clone()
        }
    }
}

/// A bus without devices: between runs there is nobody to ask, and a follower's reads come from its recording.
pub(crate) struct NoBus;

impl IoBus for NoBus {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn port_in(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_out(&self, _: u16, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
}

impl Drop for Translated {
    fn drop(&mut self) {
        self.env.me.detach();
        self.code.flush(&mut self.cpu, &mut self.env.stats);
    }
}
