//! The thread that does a disk's requests, and what goes to it and comes back.
//!
//! Whoever holds the lock on [`Requests`] is the one at work: the thread, or a caller that cannot wait for it because
//! it holds the device's lock, which the thread wants when it reports what is done.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use strata_memory::GuestMemory;

use super::requests::{Durability, Requests};
use crate::virtio::QueueError;
use crate::virtio::chain::Chain;
use crate::virtio::core::HostHandle;

/// A request for the worker.
pub(super) struct Job {
    pub(super) queue: u16,
    pub(super) chain: Chain,
    pub(super) durability: Durability,
}

/// A request that was done.
pub(super) struct Done {
    pub(super) queue: u16,
    pub(super) chain: Chain,
    /// Bytes written to its buffers.
    pub(super) written: Result<u32, QueueError>,
}

/// The way to the worker. The thread begins with the first request and ends when this is dropped.
pub(super) struct Worker {
    host: Option<HostHandle>,
    desk: Arc<Desk>,
    begun: bool,
    /// The memory that requests are in; known from the first one on.
    memory: Option<GuestMemory>,
}

struct Desk {
    papers: Mutex<Papers>,
    /// Signalled when there is a job, or never will be again.
    changed: Condvar,
    requests: Mutex<Requests>,
}

#[derive(Default)]
struct Papers {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    ended: bool,
}

impl Desk {
    fn papers(&self) -> MutexGuard<'_, Papers> {
        lock(&self.papers)
    }

    /// Waits for a job; false if there will be none.
    fn wait(&self) -> bool {
        let mut papers = self.papers();
        while papers.jobs.is_empty() && !papers.ended {
            papers = self
                .changed
                .wait(papers)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !papers.ended
    }

    /// Does the next job, if there is one. That it was taken is not seen before it is done.
    fn work(&self, requests: &mut Requests, memory: &GuestMemory) -> bool {
        let Some(job) = self.papers().jobs.pop_front() else {
            return false;
        };
        let written = requests.request(&job.chain, memory, job.durability);
        self.papers().done.push(Done {
            queue: job.queue,
            chain: job.chain,
            written,
        });
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    pub(super) fn new(requests: Requests) -> Worker {
        let desk = Desk {
            papers: Mutex::default(),
            changed: Condvar::new(),
            requests: Mutex::new(requests),
        };
        Worker {
            host: None,
            desk: Arc::new(desk),
            begun: false,
            memory: None,
        }
    }

    /// Says who is called when something is done.
    pub(super) fn attach(&mut self, host: HostHandle) {
        self.host = Some(host);
    }

    /// Has a request done. If the host has no thread for us it waits until the machine is paused.
    pub(super) fn give(&mut self, job: Job, memory: &GuestMemory) {
        if !self.begun {
            self.begin(memory);
        }
        self.desk.papers().jobs.push_back(job);
        self.desk.changed.notify_one();
    }

    fn begin(&mut self, memory: &GuestMemory) {
        self.memory = Some(memory.clone());
        let Some(host) = self.host.clone() else {
            return;
        };
        let (desk, memory) = (self.desk.clone(), memory.clone());
        let thread = std::thread::Builder::new().name("disk".to_owned());
        let begun = thread.spawn(move || work(&desk, &memory, &host));
        self.begun = begun.is_ok();
    }

    /// What was done since this was last asked.
    pub(super) fn take_done(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.desk.papers().done)
    }

    /// Sees to it that everything given is done.
    pub(super) fn settle(&mut self) {
        let mut requests = lock(&self.desk.requests);
        if let Some(memory) = &self.memory {
            while self.desk.work(&mut requests, memory) {}
        }
    }

    /// Forgets what was given. What is being done just now is waited for.
    pub(super) fn forget(&mut self) {
        self.desk.papers().jobs.clear();
        drop(lock(&self.desk.requests));
        self.desk.papers().done.clear();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.desk.papers().ended = true;
        self.desk.changed.notify_one();
    }
}

fn work(desk: &Desk, memory: &GuestMemory, host: &HostHandle) {
    while desk.wait() {
        let mut requests = lock(&desk.requests);
        let worked = desk.work(&mut requests, memory);
        drop(requests);
        if worked && !host.notify() {
            return;
        }
    }
}
