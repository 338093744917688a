//! Lock-step as the dispatcher sees it: the leader reports, the follower takes one step at a time.

use super::*;

impl Translated {
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
                    let stats = &mut self.env.stats;
                    self.code.written(gpa, len, &mut self.cpu, stats);
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
    pub(super) fn trace(&mut self) -> Result<(), EngineError> {
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
    pub(super) fn end_lockstep(&mut self) {
        self.tracer = None;
        self.lockstep = 0;
        self.options.trace = false;
        self.env.inputs = Inputs::Live;
        self.env.memory.set_recorder(None);
        self.code.flush(&mut self.cpu, &mut self.env.stats);
        self.generation += 1;
    }

    /// Waits for the follower's verdict on everything so far.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        if let Some(Tracer::Leader(leader)) = self.tracer.as_deref_mut() {
            self.compared = leader.settle()?;
        }
        Ok(())
    }
}
