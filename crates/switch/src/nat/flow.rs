//! The table of flows: each a guest's address and port, a remote one, and what is between them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{Ipv6Addr, SocketAddr};

use foldhash::fast::RandomState;

use super::datagram::Datagrams;
use super::tcp::Tcp;
use crate::packet::Mac;
use crate::time::Time;

/// Entries that a queue may have before those of flows that are gone are looked for.
pub const QUEUE_MIN: usize = 64;

/// What tells flows apart. The ports of an ICMP echo flow are its identifier and zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// IP protocol number.
    pub protocol: u8,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other end, as the guest sees it.
    pub remote: SocketAddr,
}

impl Key {
    /// The key of a question to a resolver, which no packet has.
    pub fn of_question(token: u64) -> Key {
        let nobody = SocketAddr::new(Ipv6Addr::from(u128::from(token)).into(), 0);
        Key {
            protocol: 0,
            guest: nobody,
            remote: nobody,
        }
    }
}

/// A flow.
#[derive(Debug)]
pub struct Flow {
    /// What it is known by.
    pub key: Key,
    /// The guest's Ethernet address.
    pub mac: Mac,
    /// The protocol's part.
    pub kind: Kind,
    /// Whether a peer of the host began it, not the guest.
    pub by_peer: bool,
    /// Whether it is in the queue of those with something for the guest.
    pub listed: bool,
    /// When its timer runs out.
    pub deadline: Time,
    /// The earliest entry of the timer queue for it.
    pub queued: Option<Time>,
}

/// What a flow is.
#[derive(Debug)]
pub enum Kind {
    /// A TCP connection.
    Tcp(Box<Tcp>),
    /// UDP datagrams, or ICMP echo.
    Datagrams(Box<Datagrams>),
    /// A question of the gateway's to a resolver, with its token.
    Question(Box<Datagrams>, u64),
}

/// A number for a flow that is never used again: what the host is asked and answers by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// Place in the table.
    pub index: u32,
    /// How often the place was used before.
    pub generation: u32,
}

impl FlowId {
    /// As one number.
    pub fn number(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// From one number.
    pub fn of(number: u64) -> FlowId {
        FlowId {
            index: number as u32,
            generation: (number >> 32) as u32,
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flow: Option<Flow>,
}

/// All flows, with their timers.
#[derive(Debug, Default)]
pub struct Flows {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32, RandomState>,
    by_peers: usize,
    timers: BinaryHeap<Reverse<(Time, u32, u32)>>,
}

impl Flows {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// How many of them peers of the host began.
    pub fn by_peers(&self) -> usize {
        self.by_peers
    }

    /// Adds a flow; an older one of the same key must be gone.
    pub fn add(&mut self, key: Key, mac: Mac, kind: Kind, by_peer: bool, deadline: Time) -> FlowId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        self.by_key.insert(key, index);
        self.by_peers += usize::from(by_peer);
        let mut generation = 0;
        if let Some(slot) = self.slots.get_mut(index as usize) {
            generation = slot.generation;
            slot.flow = Some(Flow {
                key,
                mac,
                kind,
                by_peer,
                listed: false,
                deadline,
                queued: None,
            });
        }
        let id = FlowId { index, generation };
        self.set_timer(id, deadline);
        id
    }

    /// The flow of this number, if it still is.
    pub fn get(&mut self, id: FlowId) -> Option<&mut Flow> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        slot.flow.as_mut()
    }

    /// The flow with this key.
    pub fn find(&self, key: &Key) -> Option<FlowId> {
        let index = *self.by_key.get(key)?;
        let generation = self.slots.get(index as usize)?.generation;
        Some(FlowId { index, generation })
    }

    /// Takes a flow out of the table.
    pub fn remove(&mut self, id: FlowId) -> Option<Flow> {
        self.get(id)?;
        let slot = self.slots.get_mut(id.index as usize)?;
        let flow = slot.flow.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.by_key.remove(&flow.key);
        self.by_peers = self.by_peers.saturating_sub(usize::from(flow.by_peer));
        self.free.push(id.index);
        Some(flow)
    }

    /// Has a flow's timer run out at `deadline`, not before and not after.
    pub fn set_timer(&mut self, id: FlowId, deadline: Time) {
        let Some(flow) = self.get(id) else {
            return;
        };
        flow.deadline = deadline;
        // A later deadline is looked at when the earlier entry comes up.
        if flow.queued.is_none_or(|queued| deadline < queued) {
            flow.queued = Some(deadline);
            self.timers
                .push(Reverse((deadline, id.index, id.generation)));
            self.tidy_timers();
        }
    }

    /// Takes out entries that no flow waits for any more, once they are the greater part.
    fn tidy_timers(&mut self) {
        if self.timers.len() <= 2 * self.len() + QUEUE_MIN {
            return;
        }
        let slots = &self.slots;
        self.timers.retain(|&Reverse((at, index, generation))| {
            slots.get(index as usize).is_some_and(|slot| {
                let waits = |flow: &Flow| flow.queued == Some(at);
                slot.generation == generation && slot.flow.as_ref().is_some_and(waits)
            })
        });
    }

    /// When the next timer may run out.
    pub fn next_timer(&self) -> Option<Time> {
        self.timers.peek().map(|Reverse((at, ..))| *at)
    }

    /// A flow whose timer has run out. Its timer is to be set again, or the flow to be removed.
    pub fn expired(&mut self, now: Time) -> Option<FlowId> {
        while let Some(Reverse((at, index, generation))) = self.timers.peek().copied() {
            if at > now {
                return None;
            }
            self.timers.pop();
            let id = FlowId { index, generation };
            let Some(flow) = self.get(id).filter(|flow| flow.queued == Some(at)) else {
                continue;
            };
            flow.queued = None;
            if flow.deadline <= now {
                return Some(id);
            }
            let deadline = flow.deadline;
            self.set_timer(id, deadline);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flows that come and go leave nothing behind, long before their time is over.
    #[test]
    fn timers_of_flows_that_are_gone_are_forgotten() {
        let mut flows = Flows::default();
        let far = Time::from_nanos(1 << 40);
        let kind = || Kind::Datagrams(Box::default());
        let stays = flows.add(Key::of_question(0), Mac::default(), kind(), false, far);
        for token in 1..10_000 {
            let id = flows.add(Key::of_question(token), Mac::default(), kind(), false, far);
            flows.remove(id);
            // So do deadlines that move to and fro.
            flows.set_timer(stays, Time::from_nanos(token));
            assert_eq!(flows.expired(Time::from_nanos(token)), Some(stays));
            flows.set_timer(stays, far);
            assert!(flows.timers.len() <= QUEUE_MIN + 4);
        }
        assert_eq!(flows.expired(far), Some(stays));
    }
}
