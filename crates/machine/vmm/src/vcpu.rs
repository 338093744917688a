//! vCPU threads: each runs one vCPU when it is told to, and says when and why it stopped.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use strata_engine::x86::{CpuState, X86};
use strata_engine::{EngineError, Exit, IoBus, Kicker, Vcpu, VcpuId, VcpuStats};

use crate::error::BuildError;
use crate::event::Event;

/// What a vCPU's thread is told.
enum Order {
    /// Run until something must be decided outside.
    Run,
    /// Take on another state.
    Load(Box<CpuState>),
    /// Something for a debugger.
    Do(Box<Work>),
}

/// A vCPU of either engine.
pub(crate) type AnyVcpu = dyn Vcpu<X86>;
/// What is done with a parked vCPU on its own thread.
pub(crate) type Work = dyn FnOnce(&mut AnyVcpu) + Send;

/// A vCPU stopped running, or could not take on a state.
#[derive(Debug)]
pub(crate) struct VcpuReport {
    pub(crate) id: VcpuId,
    pub(crate) exit: Result<Exit, EngineError>,
    pub(crate) stats: VcpuStats,
}

/// The machine's side of a vCPU's thread. Dropping it ends the thread once the vCPU is parked.
pub(crate) struct VcpuThread {
    pub(crate) id: VcpuId,
    /// The state after a hardware reset.
    pub(crate) reset_state: CpuState,
    orders: Sender<Order>,
    kicker: Arc<dyn Kicker>,
    parked: bool,
    stats: VcpuStats,
}

impl VcpuThread {
    /// Starts the thread; the vCPU is parked until [`VcpuThread::run`].
    pub(crate) fn start(
        id: VcpuId,
        mut vcpu: Box<dyn Vcpu<X86>>,
        bus: Arc<dyn IoBus>,
        events: Sender<Event>,
        first_run: Arc<OnceLock<Instant>>,
    ) -> Result<Self, BuildError> {
        let (orders, receiver) = channel();
        let reset_state = vcpu.state();
        let kicker = vcpu.kicker();
        let thread = std::thread::Builder::new().name(format!("vcpu{}", id.0));
        let work = move || serve(id, vcpu, &*bus, &receiver, &events, &first_run);
        thread.spawn(work).map_err(|source| BuildError::Host {
            what: "a thread for a CPU",
            source,
        })?;
        Ok(Self {
            id,
            reset_state,
            orders,
            kicker,
            parked: true,
            stats: VcpuStats::default(),
        })
    }

    /// Lets a parked vCPU run. False if its thread is gone.
    pub(crate) fn run(&mut self) -> bool {
        if self.parked {
            self.parked = false;
            return self.orders.send(Order::Run).is_ok();
        }
        true
    }

    /// Replaces the state of a parked vCPU. False if its thread is gone.
    pub(crate) fn load(&self, state: CpuState) -> bool {
        self.orders.send(Order::Load(Box::new(state))).is_ok()
    }

    /// Does something with a parked vCPU; nothing if its thread is gone.
    pub(crate) fn with(&self, work: Box<Work>) {
        // Whoever waits for what it does sees that it is not done.
        let _ = self.orders.send(Order::Do(work));
    }

    pub(crate) fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kicker)
    }

    pub(crate) fn is_parked(&self) -> bool {
        self.parked
    }

    /// Notes what the thread reported: the vCPU is parked now.
    pub(crate) fn has_parked(&mut self, stats: VcpuStats) {
        self.parked = true;
        self.stats = stats;
    }

    /// The counters at its last stop.
    pub(crate) fn stats(&self) -> &VcpuStats {
        &self.stats
    }
}

fn serve(
    id: VcpuId,
    mut vcpu: Box<dyn Vcpu<X86>>,
    bus: &dyn IoBus,
    orders: &Receiver<Order>,
    events: &Sender<Event>,
    first_run: &OnceLock<Instant>,
) {
    let _notice = PanicNotice { id, events };
    while let Ok(order) = orders.recv() {
        let exit = match order {
            Order::Run => {
                first_run.get_or_init(Instant::now);
                vcpu.run(bus)
            }
            Order::Load(state) => match vcpu.set_state(&state) {
                Ok(()) => continue,
                Err(error) => Err(error),
            },
            Order::Do(work) => {
                work(&mut *vcpu);
                continue;
            }
        };
        let stats = vcpu.stats();
        if events
            .send(Event::Vcpu(VcpuReport { id, exit, stats }))
            .is_err()
        {
            return;
        }
    }
}

/// Tells the machine when a vCPU's thread panics, so that it does not wait for it.
struct PanicNotice<'a> {
    id: VcpuId,
    events: &'a Sender<Event>,
}

impl Drop for PanicNotice<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let report = VcpuReport {
                id: self.id,
                exit: Err(EngineError::Internal("its thread panicked".to_owned())),
                stats: VcpuStats::default(),
            };
            // Nobody hears of it when the machine has ended.
            let _ = self.events.send(Event::Vcpu(report));
        }
    }
}

/// Kicks every vCPU: what devices hold, which are there before the vCPUs.
#[derive(Default)]
pub(crate) struct Kickers(Mutex<Vec<Arc<dyn Kicker>>>);

impl Kickers {
    pub(crate) fn add(&self, kicker: Arc<dyn Kicker>) {
        self.lock().push(kicker);
    }

    pub(crate) fn kick_all(&self) {
        for kicker in self.lock().iter() {
            kicker.kick();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn Kicker>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
