//! The dispatcher (Popek and Goldberg's): where every trap of translated code arrives and is sent on - to the
//! translator, to the allocator ([`crate::mmu`], [`crate::apic`]) or to the [`crate::interpret`]er.

use std::sync::Arc;
use std::time::Instant;

use iced_x86::Instruction;
use strata_engine::x86::{CpuState, X86};
use strata_engine::{
    EngineError, Exit, ExitCause, Input, InputLog, Inputs, IoBus, Kicker, Vcpu, VcpuStats,
};
use strata_memory::Gpa;

use crate::code::{BranchSite, CodeMap, Key, Next as After};
use crate::cpu::{BOUNCE_SIZE, Context, Cpu, flags, request};
use crate::env::{Access, Env, Exec, Fault};
use crate::interpret::Next;
use crate::kick::VcpuShared;
use crate::lockstep::{Leader, Tracer};
use crate::mmu::{OperandAccess, PendingStore, canonical};
use crate::signals::{self, FaultFrame, ThreadGuard};
use crate::stubs::{self, Callbacks, Stubs, reason};
use crate::table::FeatureSet;
use crate::translate::{Fetch, Mode, Options, translate};

/// One vCPU of the software engine.
pub struct Translated {
    cpu: Box<Context>,
    env: Env,
    code: CodeMap,
    stubs: Stubs,
    features: FeatureSet,
    options: Options,
    shared: Arc<VcpuShared>,
    frame: Box<FaultFrame>,
    /// Mode and CS base that each jump cache holds entries for.
    cached_mode: [(Mode, u64); 2],
    /// The lock-step side of this vCPU, if it has one.
    tracer: Option<Box<Tracer>>,
    /// Steps to go in lock-step, from the next run on.
    lockstep: u64,
    /// Block exits that lock-step found equal.
    compared: u64,
    /// Times the cache was flushed: link numbers are valid within one generation.
    generation: u64,
    /// Exceptions end the run instead of being delivered.
    stop_on_exception: bool,
    stopped: Option<Fault>,
}

// SAFETY: the raw pointers inside (code mappings, the context's `env` while running) belong to this value; nothing
// refers to another thread's data.
unsafe impl Send for Translated {}

/// What the slow path needs while translated code runs. `Cpu::env` points here.
struct Running {
    cpu: *mut Cpu,
    env: *mut Env,
    code: *mut CodeMap,
    bus: *const dyn IoBus,
    tracer: *mut Option<Box<Tracer>>,
    reference: bool,
    count: bool,
    fault: Option<Fault>,
    pending: Option<PendingStore>,
    /// A bounced store was already told to the tracer.
    told: bool,
    /// The follower found a difference.
    diverged: bool,
}

impl Translated {
    pub(crate) fn new(
        env: Env,
        options: Options,
        shared: Arc<VcpuShared>,
    ) -> Result<Translated, EngineError> {
        let mut cpu = Cpu::new();
        let mut code = CodeMap::new()?;
        let stubs = stubs::build(
            &mut code,
            &Callbacks {
                slow,
                commit,
                stored,
                block_exit,
            },
        )?;
        signals::install()?;
        shared.attach(&mut cpu.request);
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
            shared,
            frame,
            cached_mode: [(Mode(u32::MAX), 0); 2],
            tracer: None,
            lockstep: 0,
            compared: 0,
            generation: 0,
            stop_on_exception: false,
            stopped: None,
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

    /// Runs in lock-step with the reference configuration from the next run on, up to that many steps.
    pub(crate) fn start_lockstep(&mut self, steps: u64) {
        self.lockstep = steps;
    }

    /// The surroundings, between runs.
    pub(crate) fn env(&self) -> &Env {
        &self.env
    }

    pub(crate) fn set_tracer(&mut self, tracer: Tracer) {
        self.tracer = Some(Box::new(tracer));
    }

    /// The rolling hash of a follower's stores.
    pub(crate) fn stores(&self) -> u64 {
        match self.tracer.as_deref() {
            Some(Tracer::Follower { stores }) => *stores,
            _ => 0,
        }
    }

    /// Prepares this thread to run this vCPU, for a follower.
    pub(crate) fn enter_thread(&mut self) -> Result<ThreadGuard, EngineError> {
        let guard = ThreadGuard::enter(&mut *self.frame)?;
        self.cpu.load_fpu();
        Ok(guard)
    }

    /// From here on, inputs come from what [`Translated::push_input`] is given.
    pub(crate) fn replay(&mut self) {
        self.env.inputs = Inputs::replay(InputLog::default());
    }

    /// Appends to what a follower replays.
    pub(crate) fn push_input(&mut self, input: Input) {
        if let Inputs::Replay { log, .. } = &mut self.env.inputs {
            log.inputs.push_back(input);
        }
    }

    /// One step of a follower: an arrival that is due, or one instruction.
    pub(crate) fn follow_step(&mut self, bus: &dyn IoBus) -> Result<(), EngineError> {
        while let Some(at) = self
            .env
            .inputs
            .next_arrival()
            .filter(|&at| at <= self.cpu.retired)
        {
            let arrival = match &mut self.env.inputs {
                Inputs::Replay { log, .. } => log.inputs.pop_front(),
                _ => None,
            };
            match arrival {
                Some(Input::DeviceWrite { gpa, bytes, .. }) => {
                    let _ = self.env.memory.write(Gpa(gpa), &bytes);
                    let len = bytes.len() as u64;
                    self.code.written(
                        gpa,
                        len,
                        &mut self.cpu,
                        &self.env.memory,
                        &mut self.env.stats,
                    );
                }
                Some(Input::Interrupt { vector, .. }) if at == self.cpu.retired => {
                    let nmi = vector == 2;
                    if !nmi {
                        self.env.apic.force(vector);
                    }
                    self.cpu.halted = false;
                    self.cpu.retired += 1;
                    self.deliver(bus, vector, nmi);
                    return Ok(());
                }
                other => return Err(EngineError::Diverged(format!("{other:?} arrived late"))),
            }
        }
        if self.cpu.halted {
            return Err(EngineError::Diverged(
                "the reference halted and nothing arrived".into(),
            ));
        }
        let exit = self.step(bus)?;
        if let Some(error) = self.env.divergence.take() {
            return Err(EngineError::Replay(error));
        }
        match exit {
            None => Ok(()),
            Some(exit) => Err(EngineError::Diverged(format!(
                "the reference left with {exit:?}"
            ))),
        }
    }

    /// Tells the tracer that the guest goes on at RIP.
    fn trace(&mut self) -> Result<(), EngineError> {
        let Some(Tracer::Leader(leader)) = self.tracer.as_deref_mut() else {
            return Ok(());
        };
        leader.device_writes(self.cpu.retired, &mut self.env.inputs);
        let equal = leader.exit(&self.cpu, self.cpu.rip, &mut self.env.inputs);
        if equal && self.cpu.retired < self.lockstep {
            return Ok(());
        }
        self.settle()?;
        if self.cpu.retired >= self.lockstep {
            self.end_lockstep();
        }
        Ok(())
    }

    /// The steps asked for are compared: goes on alone, at full speed.
    fn end_lockstep(&mut self) {
        self.tracer = None;
        self.lockstep = 0;
        self.options.trace = false;
        self.env.inputs = Inputs::Live;
        self.env.memory.set_recorder(None);
        self.code
            .flush(&mut self.cpu, &self.env.memory, &mut self.env.stats);
        self.generation += 1;
    }

    /// Waits for the follower's verdict on everything so far.
    fn settle(&mut self) -> Result<(), EngineError> {
        if let Some(Tracer::Leader(leader)) = self.tracer.as_deref_mut() {
            self.compared = leader.settle()?;
        }
        Ok(())
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
            if self.cpu.request_bits() != 0 || self.cpu.halted || self.cpu.wait_for_sipi {
                if let Some(exit) = self.requests(bus) {
                    return Ok(exit);
                }
            }
            if self.tracer.is_some() {
                self.trace()?;
            }
            if let Some(exit) = self.step(bus)? {
                return Ok(exit);
            }
        }
    }

    /// Looks at the request word and waits while halted.
    fn requests(&mut self, bus: &dyn IoBus) -> Option<Exit> {
        loop {
            let bits = self.cpu.take_requests();
            if bits & request::MEMORY_MAP != 0 {
                self.env.slots = self.env.memory.slots();
                self.cpu.flush_tlb(true);
            }
            if bits & request::CODE_WRITTEN != 0 {
                for (gpa, len) in self.shared.take_writes() {
                    self.code.written(
                        gpa,
                        len,
                        &mut self.cpu,
                        &self.env.memory,
                        &mut self.env.stats,
                    );
                }
            }
            if bits & request::KICK != 0 {
                return Some(Exit::Kicked);
            }
            if !self.cpu.interrupt_shadow
                && let Some(exit) = self.events(bus)
            {
                return Some(exit);
            }
            if !self.cpu.halted && !self.cpu.wait_for_sipi {
                return None;
            }
            self.shared.wait();
        }
    }

    /// Accepts what the local APIC has for us.
    fn events(&mut self, bus: &dyn IoBus) -> Option<Exit> {
        self.cpu.deferred = 0;
        if !self.env.apic.pending() {
            return None;
        }
        let waiting = self.env.apic.waiting();
        if waiting.init && self.env.apic.take_init() {
            self.cpu.reset();
            self.cpu.wait_for_sipi = self.env.apic.id() != 0;
            return None;
        }
        if self.cpu.wait_for_sipi {
            if let Some(vector) = self.env.apic.take_startup() {
                self.cpu.start_at(vector);
            }
            return None;
        }
        if waiting.nmi && !self.cpu.nmi_blocked && self.env.apic.take_nmi() {
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

    fn deliver(&mut self, bus: &dyn IoBus, vector: u8, nmi: bool) -> Option<Exit> {
        let next = self.exec(bus).inject(vector, nmi);
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
        if self.cpu.interrupt_shadow {
            self.cpu.interrupt_shadow = false;
            mode = mode.single();
            if self.env.apic.pending() {
                // It was asked for while interrupts were held off, without effect.
                self.cpu.raise_request(request::INTERRUPT);
            }
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
            (&raw const running.fault).read_volatile()
        }
    }

    /// The block at RIP, translated if need be.
    fn find(
        &mut self,
        mode: Mode,
        bus: &dyn IoBus,
    ) -> Result<Result<(u32, Key, bool), Fault>, EngineError> {
        let cs_base = if mode.bits() == 64 {
            0
        } else {
            self.cpu.segments[1].base
        };
        let rip = self.cpu.rip;
        let mut linear = rip.wrapping_add(cs_base);
        if mode.bits() == 64 {
            if !canonical(rip) {
                return Ok(Err(Fault::protection(0)));
            }
        } else {
            linear &= 0xffff_ffff;
        }
        if mode.bits() != 64 && rip > u64::from(self.cpu.segments[1].limit) {
            return Ok(Err(Fault::protection(0)));
        }
        let user = mode.user();
        let (gpa, global) = match self.exec(bus).translate(linear, Access::Fetch, user) {
            Ok(to) => (to.gpa, to.global),
            Err(fault) => return Ok(Err(fault)),
        };
        let key = Key {
            gpa,
            rip,
            cs_base,
            mode: mode.0,
        };
        if let Some(id) = self.code.find(&key) {
            let second = self.code.block(id).and_then(|block| block.second_page);
            let Some(expected) = second else {
                return Ok(Ok((id, key, global)));
            };
            let next = (linear & !0xfff).wrapping_add(4096);
            match self.exec(bus).translate(next, Access::Fetch, user) {
                Ok(to) if to.gpa >> 12 == expected => return Ok(Ok((id, key, global))),
                Ok(_) => {
                    self.code
                        .written(gpa, 1, &mut self.cpu, &self.env.memory, &mut self.env.stats);
                }
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(self
            .translate_block(key, linear, user, bus)?
            .map(|id| (id, key, global)))
    }

    fn translate_block(
        &mut self,
        key: Key,
        linear: u64,
        user: bool,
        bus: &dyn IoBus,
    ) -> Result<Result<u32, Fault>, EngineError> {
        let started = Instant::now();
        if self.code.full() {
            self.code
                .flush(&mut self.cpu, &self.env.memory, &mut self.env.stats);
            self.generation += 1;
        }
        let mut bytes = [0xffu8; 4096 + 16];
        let in_page = 4096 - (linear & 0xfff) as usize;
        let (head, tail) = bytes.split_at_mut(in_page);
        // Memory that is not there reads as ones, as on a bus that nobody answers.
        let _ = self.env.memory.read(Gpa(key.gpa), head);
        let fetch = Fetch {
            bytes: head,
            in_page,
        };
        let mut second_page = None;
        let done = match translate(
            key,
            fetch,
            &mut self.code,
            &self.stubs,
            &self.features,
            self.options,
        ) {
            Ok(done) => done,
            Err(_) => {
                let next = (linear & !0xfff).wrapping_add(4096);
                let gpa = match self.exec(bus).translate(next, Access::Fetch, user) {
                    Ok(to) => to.gpa,
                    Err(fault) => return Ok(Err(fault)),
                };
                if let Some(more) = tail.get_mut(..15) {
                    let _ = self.env.memory.read(Gpa(gpa), more);
                }
                second_page = Some(gpa >> 12);
                let all = bytes.get(..in_page + 15).unwrap_or(&[]);
                let fetch = Fetch {
                    bytes: all,
                    in_page,
                };
                match translate(
                    key,
                    fetch,
                    &mut self.code,
                    &self.stubs,
                    &self.features,
                    self.options,
                ) {
                    Ok(done) => done,
                    Err(_) => {
                        return Err(EngineError::Internal(
                            "an instruction longer than 15 bytes".into(),
                        ));
                    }
                }
            }
        };
        let second_page = second_page.filter(|_| done.len as usize > in_page);
        let id = self.code.insert(
            key,
            done.len,
            second_page,
            &done.code,
            &done.links,
            &done.points,
            &self.env.memory,
            &mut self.cpu,
        )?;
        let stats = &mut self.env.stats;
        stats.blocks_translated += 1;
        stats.instructions_translated += u64::from(done.instructions);
        stats.translation_ns += u64::try_from(started.elapsed().as_nanos()).unwrap_or(0);
        Ok(Ok(id))
    }

    /// The code at RIP, if the jump cache knows it: what is in there needs no walk.
    fn recall(&self, mode: Mode) -> Option<u64> {
        let privilege = usize::from(mode.user());
        let cs_base = if mode.bits() == 64 {
            0
        } else {
            self.cpu.segments[1].base
        };
        if mode.is_single() || self.cached_mode.get(privilege) != Some(&(mode, cs_base)) {
            return None;
        }
        self.cpu.jump.get(privilege)?.get(self.cpu.rip)
    }

    /// Enters a block in the jump cache of its privilege.
    fn remember(&mut self, mode: Mode, block: u32, key: Key, global: bool) {
        let Some(block) = self.code.block(block) else {
            return;
        };
        if mode.is_single() {
            return;
        }
        let privilege = usize::from(mode.user());
        let (Some(cached), Some(jump)) = (
            self.cached_mode.get_mut(privilege),
            self.cpu.jump.get_mut(privilege),
        ) else {
            return;
        };
        if *cached != (mode, key.cs_base) {
            *cached = (mode, key.cs_base);
            jump.clear();
        }
        let linear = key.rip.wrapping_add(key.cs_base);
        jump.set(
            key.rip,
            linear,
            block.second_page.is_some(),
            global,
            self.code.address(block.entry),
        );
    }

    /// A direct jump came here for the first time: points it at its target if both lie in one page.
    fn follow_link(&mut self, bus: &dyn IoBus) -> Result<Option<Exit>, EngineError> {
        let number = self.cpu.exit_info as u32;
        let Some(link) = self.code.link(number) else {
            return Err(EngineError::Internal("a jump that is not known".into()));
        };
        self.cpu.rip = link.target.rip;
        if link.target.gpa == u64::MAX || self.cpu.request_bits() != 0 {
            return Ok(None);
        }
        let generation = self.generation;
        match self.find(Mode(link.target.mode), bus)? {
            Err(fault) => Ok(self.raise(bus, fault)),
            Ok((id, key, _)) => {
                let whole = self
                    .code
                    .block(id)
                    .is_some_and(|block| block.second_page.is_none());
                if generation == self.generation
                    && key == link.target
                    && whole
                    && !self.code.is_dead_link(number)
                {
                    self.code.connect(number, id);
                }
                Ok(None)
            }
        }
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
        if let Some(vector) = site.fault {
            return Ok(self.raise(bus, Fault::plain(vector)));
        }
        let instr: Instruction = site.instr;
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

impl Running {
    fn exec(&mut self) -> Exec<'_> {
        // SAFETY: the pointers come from `Translated::enter`, which waits for translated code to leave and touches
        // nothing meanwhile; this is the only way to them until then.
        unsafe {
            Exec {
                cpu: &mut *self.cpu,
                env: &mut *self.env,
                bus: &*self.bus,
                code: &mut *self.code,
            }
        }
    }

    fn tracer(&mut self) -> Option<&mut Tracer> {
        // SAFETY: as in `exec`; no `Exec` is alive where this is called.
        unsafe { (*self.tracer).as_deref_mut() }
    }

    /// Notes device writes made by the instruction that is `retired` into its block.
    fn device_writes(&mut self, retired: u16) {
        // SAFETY: as in `exec`: nobody else uses these parts while translated code runs.
        let (env, at) = unsafe { (&mut *self.env, (*self.cpu).retired + u64::from(retired)) };
        if let Some(Tracer::Leader(leader)) = self.tracer() {
            leader.device_writes(at, &mut env.inputs);
        }
    }

    /// A store of traced code was made.
    fn stored(&mut self, site: u32) {
        if std::mem::take(&mut self.told) {
            return;
        }
        let exec = &mut self.exec();
        let Some(site) = exec.code.mem_site(site) else {
            return;
        };
        let mut linear = exec.cpu.temp[7];
        if !exec.cpu.code_64() {
            linear &= 0xffff_ffff;
        }
        let mut data = [0u8; BOUNCE_SIZE];
        let Some(bytes) = data.get_mut(..usize::from(site.size)) else {
            return;
        };
        // It was just stored there, so it can be read.
        let _ = exec.load(linear, bytes);
        if let Some(tracer) = self.tracer() {
            tracer.stored(linear, bytes);
        }
    }

    /// Traced code leaves a block for `rip`.
    fn block_exit(&mut self, rip: u64) -> u64 {
        self.told = false;
        // SAFETY: as in `device_writes`.
        let (env, cpu) = unsafe { (&mut *self.env, &*self.cpu) };
        let Some(Tracer::Leader(leader)) = self.tracer() else {
            return 1;
        };
        leader.device_writes(cpu.retired, &mut env.inputs);
        if leader.exit(cpu, rip, &mut env.inputs) {
            return 1;
        }
        self.diverged = true;
        self.leave(reason::REQUEST, rip, 0)
    }

    /// Leaves translated code with `reason` at `rip`, `retired` instructions of the block done.
    fn leave(&mut self, reason: u64, rip: u64, retired: u16) -> u64 {
        let count = self.count;
        let exec = self.exec();
        exec.cpu.exit_reason = reason;
        exec.cpu.rip = rip;
        if count {
            exec.cpu.retired += u64::from(retired);
        }
        0
    }

    fn slow(&mut self, site: u32, linear: u64) -> u64 {
        let reference = self.reference;
        let mut pending = None;
        self.told = false;
        let exec = &mut self.exec();
        let Some(site) = exec.code.mem_site(site) else {
            return self.leave(0, 0, 0);
        };
        let linear = if exec.cpu.code_64() {
            linear
        } else {
            linear & 0xffff_ffff
        };
        let size = usize::from(site.size);
        if let Some(interpret) = site.masked {
            let access = if site.access == OperandAccess::Read {
                Access::Read
            } else {
                Access::Write
            };
            if (linear & 0xfff) as usize + size <= 4096
                && canonical(linear)
                && let Ok(Some((host, _))) = exec.ram_window(linear, access)
            {
                return host as u64;
            }
            exec.cpu.exit_info = u64::from(interpret);
            return self.leave(reason::INTERPRET, site.rip, 0);
        }
        let checked = exec.check_operand(site.segment.into(), linear, size, site.access);
        let result = if let Err(fault) = checked {
            Err(fault)
        } else if linear & u64::from(site.align).wrapping_sub(1) != 0 {
            Err(Fault::protection(0))
        } else {
            exec.slow_access(
                linear,
                size,
                site.access,
                site.stack,
                reference,
                &mut pending,
            )
        };
        match result {
            Ok(host) => {
                exec.cpu.temp[2] = u64::from(pending.is_some());
                self.pending = pending;
                host as u64
            }
            Err(fault) => {
                let pending = site.x87 && x87_exception_pending();
                self.fault = Some(if pending { Fault::plain(16) } else { fault });
                self.leave(reason::FAULT, site.rip, site.index)
            }
        }
    }

    fn commit(&mut self, site: u32) -> u64 {
        let Some(store) = self.pending.take() else {
            return 1;
        };
        let exec = &mut self.exec();
        exec.cpu.temp[2] = 0;
        let Some(site) = exec.code.mem_site(site) else {
            return self.leave(0, 0, 0);
        };
        exec.code.stale = false;
        let offset = (store.linear & 63) as usize;
        let bounce = exec.cpu.bounce.0;
        if let Err(fault) = exec.commit(store) {
            self.fault = Some(fault);
            return self.leave(reason::FAULT, site.rip, site.index);
        }
        if let Some(tracer) = self.tracer() {
            tracer.stored(
                store.linear,
                bounce.get(offset..offset + store.size).unwrap_or(&[]),
            );
            self.told = true;
            self.device_writes(site.index + 1);
        }
        let exec = &mut self.exec();
        if !exec.code.stale {
            return 1;
        }
        let rip = match site.next {
            After::Known(rip) => rip,
            After::Target => exec.cpu.temp[0],
        };
        self.leave(reason::STALE, rip, site.index + 1)
    }
}

/// True if the x87 unit, which holds the guest's state, has an unmasked exception pending.
fn x87_exception_pending() -> bool {
    let status: u16;
    // SAFETY: FNSTSW only reads the status word.
    unsafe {
        std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags))
    };
    status & 0x80 != 0
}

/// Slow path of a memory operand, see `Stubs::slow`.
unsafe extern "sysv64" fn slow(cpu: *mut Cpu, site: u64, linear: u64) -> u64 {
    // SAFETY: the stub passes the context; `enter` set `env` to the `Running` below us on the stack.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.slow(site as u32, linear)
}

/// Write-back of a bounced operand, see `Stubs::commit`.
unsafe extern "sysv64" fn commit(cpu: *mut Cpu, site: u64, _: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.commit(site as u32)
}

/// A traced store, see `Stubs::stored`.
unsafe extern "sysv64" fn stored(cpu: *mut Cpu, site: u64, _: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.stored(site as u32);
    1
}

/// A traced block exit, see `Stubs::block_exit`.
unsafe extern "sysv64" fn block_exit(cpu: *mut Cpu, _: u64, rip: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.block_exit(rip)
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
        let result = self.run_loop(bus);
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
        Arc::clone(&self.shared) as Arc<dyn Kicker>
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

/// Between runs there is nobody to ask.
struct NoBus;

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
        self.shared.detach();
    }
}
