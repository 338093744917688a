//! What translated code calls while it runs: the slow path of memory operands, and the tracer's hooks.

use super::*;

/// What the slow path needs while translated code runs. `Cpu::env` points here.
pub(super) struct Running {
    pub(super) cpu: *mut Cpu,
    pub(super) env: *mut Env,
    pub(super) code: *mut CodeMap,
    pub(super) bus: *const dyn IoBus,
    pub(super) tracer: *mut Option<Box<Tracer>>,
    pub(super) reference: bool,
    pub(super) count: bool,
    pub(super) fault: Option<Fault>,
    pub(super) pending: Option<PendingStore>,
    /// A bounced store was already told to the tracer.
    pub(super) told: bool,
    /// All other vCPUs stand still until the store in `pending` is made.
    pub(super) alone: bool,
    /// The follower found a difference.
    pub(super) diverged: bool,
}

impl Running {
    pub(super) fn exec(&mut self) -> Exec<'_> {
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

    pub(super) fn tracer(&mut self) -> Option<&mut Tracer> {
        // SAFETY: as in `exec`; no `Exec` is alive where this is called.
        unsafe { (*self.tracer).as_deref_mut() }
    }

    /// Notes device writes made by the instruction that is `retired` into its block.
    pub(super) fn device_writes(&mut self, retired: u16) {
        // SAFETY: as in `exec`: nobody else uses these parts while translated code runs.
        let (env, at) = unsafe { (&mut *self.env, (*self.cpu).retired + u64::from(retired)) };
        if let Some(Tracer::Leader(leader)) = self.tracer() {
            leader.device_writes(at, &mut env.inputs);
        }
    }

    /// A store of traced code was made.
    pub(super) fn stored(&mut self, site: u32) {
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
    pub(super) fn block_exit(&mut self, rip: u64) -> u64 {
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
    pub(super) fn leave(&mut self, reason: u64, rip: u64, retired: u16) -> u64 {
        let count = self.count;
        let exec = self.exec();
        exec.cpu.exit_reason = reason;
        exec.cpu.rip = rip;
        if count {
            exec.cpu.retired += u64::from(retired);
        }
        0
    }

    pub(super) fn slow(&mut self, site: u32, linear: u64) -> u64 {
        let reference = self.reference;
        let mut pending = None;
        let mut alone = false;
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
        if site.masked.is_some() || site.group.is_some() {
            let access = if site.access == OperandAccess::Read {
                Access::Read
            } else {
                Access::Write
            };
            if (linear & 0xfff) as usize + size <= 4096
                && canonical(linear)
                && let Ok(Some((host, _))) = exec.ram_window(linear, access)
            {
                exec.cpu.temp[2] = 0;
                return host as u64;
            }
            if let Some(interpret) = site.masked {
                exec.cpu.exit_info = u64::from(interpret);
                return self.leave(reason::INTERPRET, site.rip, 0);
            }
            exec.cpu.exit_info = site.group.unwrap_or_default().into();
            return self.leave(reason::UNGROUP, site.rip, site.index);
        }
        let result = if linear & u64::from(site.align).wrapping_sub(1) != 0 {
            Err(Fault::protection(0))
        } else if let Err(fault) =
            exec.check_operand(site.segment.into(), linear, size, site.access)
        {
            Err(fault)
        } else {
            if site.locked && (linear & 0xfff) as usize + size > 4096 && exec.env.peers.several() {
                exec.env.peers.run_alone(&exec.env.me);
                alone = true;
            }
            exec.slow_access(
                linear,
                size,
                site.access,
                site.stack,
                reference,
                &mut pending,
            )
        };
        self.alone = alone;
        match result {
            Ok(host) => {
                self.exec().cpu.temp[2] = u64::from(pending.is_some());
                self.pending = pending;
                host as u64
            }
            Err(fault) => {
                self.end();
                let pending = site.x87 && x87_exception_pending();
                self.fault = Some(if pending { Fault::plain(16) } else { fault });
                self.leave(reason::FAULT, site.rip, site.index)
            }
        }
    }

    /// Ends what a store began that faulted, and the time in which this vCPU runs alone.
    pub(super) fn end(&mut self) {
        let pending = self.pending.take();
        let alone = std::mem::take(&mut self.alone);
        let exec = &mut self.exec();
        if let Some(store) = pending {
            exec.abandon(store);
        }
        if alone {
            exec.env.peers.end_alone(&exec.env.me);
            // Questions since then count as answered.
            exec.answer();
        }
    }

    pub(super) fn commit(&mut self, site: u32) -> u64 {
        let Some(store) = self.pending.take() else {
            return 1;
        };
        let exec = &mut self.exec();
        exec.cpu.temp[2] = 0;
        let Some(site) = exec.code.mem_site(site) else {
            return self.leave(0, 0, 0);
        };
        exec.code.stale = false;
        let (linear, size) = (store.linear, store.size);
        let bounced = matches!(store.to, StoredTo::Bounce(..));
        let bounce = exec.cpu.bounce.0;
        exec.commit(store);
        self.end();
        if self.tracer().is_some() {
            let offset = (linear & 63) as usize;
            let mut data = [0u8; BOUNCE_SIZE];
            let bytes = data.get_mut(..size).unwrap_or(&mut []);
            if bounced {
                bytes.copy_from_slice(bounce.get(offset..offset + size).unwrap_or(&[]));
            } else {
                // As in `stored`.
                let _ = self.exec().load(linear, bytes);
            }
            if let Some(tracer) = self.tracer() {
                tracer.stored(linear, bytes);
            }
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
pub(super) unsafe extern "sysv64" fn slow(cpu: *mut Cpu, site: u64, linear: u64) -> u64 {
    // SAFETY: the stub passes the context; `enter` set `env` to the `Running` below us on the stack.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.slow(site as u32, linear)
}

/// Write-back of a bounced operand, see `Stubs::commit`.
pub(super) unsafe extern "sysv64" fn commit(cpu: *mut Cpu, site: u64, _: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.commit(site as u32)
}

/// A traced store, see `Stubs::stored`.
pub(super) unsafe extern "sysv64" fn stored(cpu: *mut Cpu, site: u64, _: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.stored(site as u32);
    1
}

/// A traced block exit, see `Stubs::block_exit`.
pub(super) unsafe extern "sysv64" fn block_exit(cpu: *mut Cpu, _: u64, rip: u64) -> u64 {
    // SAFETY: as in `slow`.
    let running = unsafe { &mut *((*cpu).env as *mut Running) };
    running.block_exit(rip)
}
