//! Doorbells: guest writes that the kernel turns into events, and the thread that waits for them.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{Error, IoEventAddress, NoDatamatch};
use strata_engine::{Doorbell, DoorbellAddress, DoorbellSpace, EngineError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::{Machine, failed};

/// The event that ends the thread.
const STOP: u64 = 0;

/// All doorbells of a machine. The thread starts with the first and ends with this value.
pub struct Doorbells {
    machine: Arc<Machine>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    listener: Option<Listener>,
    /// Which event each address rings.
    numbers: BTreeMap<DoorbellAddress, u64>,
    last: u64,
}

struct Listener {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    bells: Mutex<BTreeMap<u64, Bell>>,
}

struct Bell {
    event: EventFd,
    /// What ringing passes on: the kernel keeps no other value than the one asked for.
    value: u32,
    target: Arc<dyn Doorbell>,
}

impl Doorbells {
    /// For this machine.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds an address; an earlier doorbell there is replaced.
    pub fn add(&self, at: DoorbellAddress, target: Arc<dyn Doorbell>) -> Result<(), EngineError> {
        self.remove(at);
        let event = new_event()?;
        let mut inner = self.lock();
        if inner.listener.is_none() {
            inner.listener = Some(Listener::start()?);
        }
        inner.last += 1;
        let number = inner.last;
        let Some(listener) = &inner.listener else {
            return Ok(());
        };
        listen(&listener.shared.epoll, &event, number)?;
        self.bind(&event, at)
            .map_err(failed("binding a doorbell"))?;
        listener.shared.lock().insert(
            number,
            Bell {
                event,
                value: at.value.unwrap_or(0),
                target,
            },
        );
        inner.numbers.insert(at, number);
        Ok(())
    }

    /// Takes a doorbell away. Its target may still be called by a ring that came before.
    pub fn remove(&self, at: DoorbellAddress) {
        let mut inner = self.lock();
        let Some(number) = inner.numbers.remove(&at) else {
            return;
        };
        let bell = inner
            .listener
            .as_ref()
            .and_then(|listener| listener.shared.lock().remove(&number));
        if let Some(bell) = bell {
            self.unbind(&bell.event, at);
        }
    }

    fn bind(&self, event: &EventFd, at: DoorbellAddress) -> Result<(), Error> {
        let vm = &self.machine.vm;
        let Some(value) = at.value else {
            return vm.register_ioevent(event, &address(at), NoDatamatch);
        };
        // A match is of one width; guests write queue numbers with 16 or 32 bits.
        vm.register_ioevent(event, &address(at), value)?;
        match u16::try_from(value) {
            Ok(short) => vm.register_ioevent(event, &address(at), short),
            Err(_) => Ok(()),
        }
    }

    fn unbind(&self, event: &EventFd, at: DoorbellAddress) {
        let vm = &self.machine.vm;
        // They were bound, so this cannot fail; closing the event would take them away as well.
        let _ = match at.value {
            None => vm.unregister_ioevent(event, &address(at), NoDatamatch),
            Some(value) => vm
                .unregister_ioevent(event, &address(at), value)
                .and_then(|()| {
                    u16::try_from(value).map_or(Ok(()), |short| {
                        vm.unregister_ioevent(event, &address(at), short)
                    })
                }),
        };
    }
}

fn address(at: DoorbellAddress) -> IoEventAddress {
    match at.space {
        DoorbellSpace::Mmio => IoEventAddress::Mmio(at.address),
        DoorbellSpace::Port => IoEventAddress::Pio(at.address),
    }
}

fn new_event() -> Result<EventFd, EngineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| host("making an event", source))
}

fn listen(epoll: &Epoll, event: &EventFd, number: u64) -> Result<(), EngineError> {
    epoll
        .ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, number),
        )
        .map_err(|source| host("waiting for doorbells", source))
}

fn host(what: &'static str, source: std::io::Error) -> EngineError {
    EngineError::Host { what, source }
}

impl Listener {
    fn start() -> Result<Listener, EngineError> {
        let epoll = Epoll::new().map_err(|source| host("waiting for doorbells", source))?;
        let stop = new_event()?;
        listen(&epoll, &stop, STOP)?;
        let shared = Arc::new(Shared {
            epoll,
            stop,
            bells: Mutex::default(),
        });
        let thread = std::thread::Builder::new().name("doorbells".into());
        let mine = Arc::clone(&shared);
        let thread = thread
            .spawn(move || mine.serve())
            .map_err(|source| host("starting a thread", source))?;
        Ok(Listener {
            shared,
            thread: Some(thread),
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Bell>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut events = [EpollEvent::default(); 32];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
                Err(_) => return,
            };
            for event in events.iter().take(count) {
                let number = event.data();
                if number == STOP {
                    return;
                }
                // The target may take long or want the lock: it is called without.
                let rung = self.lock().get(&number).and_then(|bell| {
                    bell.event
                        .read()
                        .ok()
                        .map(|_| (bell.value, Arc::clone(&bell.target)))
                });
                if let Some((value, target)) = rung {
                    target.ring(value);
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // An event counter that is full is readable all the same.
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
