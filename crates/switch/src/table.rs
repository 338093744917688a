//! Which address is behind which port: learned, aged, bounded.

use std::time::Duration;

use foldhash::quality::RandomState;
use std::collections::HashMap;

use crate::config::PortId;
use crate::packet::Mac;
use crate::time::Time;
use crate::vlan::Vid;

/// Entries that one port may have learned.
const PER_PORT_MAX: usize = 1024;

#[derive(Copy, Clone, Debug)]
struct Entry {
    port: PortId,
    seen: Time,
}

/// The table of learned addresses, one for all VLANs.
#[derive(Debug)]
pub struct MacTable {
    /// By VLAN and address, in one number. The hash has a key drawn at start: guests choose addresses.
    entries: HashMap<u64, Entry, RandomState>,
    /// Entries of each port, by its index.
    per_port: Vec<usize>,
    limit: usize,
    ageing: Duration,
}

fn key(vid: Vid, mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac.0;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | u64::from(vid.get()) << 48
}

impl MacTable {
    /// Empty; holds at most `limit` addresses, each until it has not been seen for `ageing`.
    pub fn new(limit: usize, ageing: Duration) -> MacTable {
        MacTable {
            entries: HashMap::default(),
            per_port: Vec::new(),
            limit,
            ageing,
        }
    }

    fn count(&mut self, port: PortId) -> Option<&mut usize> {
        let index = port.index();
        if self.per_port.len() <= index {
            self.per_port.resize(index.saturating_add(1), 0);
        }
        self.per_port.get_mut(index)
    }

    /// Notes that `mac` is behind `port`. False if it was not noted, because the table or the port's share is full:
    /// frames to it will be flooded.
    pub fn learn(&mut self, vid: Vid, mac: Mac, port: PortId, now: Time) -> bool {
        let key = key(vid, mac);
        let full = self.entries.len() >= self.limit;
        let before = match self.entries.get_mut(&key) {
            Some(entry) if entry.port == port => {
                entry.seen = now;
                return true;
            }
            other => other.map(|entry| entry.port),
        };
        let own = self.count(port).map_or(0, |count| *count);
        if own >= PER_PORT_MAX || (full && before.is_none()) {
            return false;
        }
        if let Some(count) = before.and_then(|port| self.count(port)) {
            *count = count.saturating_sub(1);
        }
        self.entries.insert(key, Entry { port, seen: now });
        if let Some(count) = self.count(port) {
            *count += 1;
        }
        true
    }

    /// The port behind which `mac` was last seen, if that is not too long ago.
    pub fn find(&self, vid: Vid, mac: Mac, now: Time) -> Option<PortId> {
        let entry = self.entries.get(&key(vid, mac))?;
        (now.since(entry.seen) <= self.ageing).then_some(entry.port)
    }

    /// Forgets what has not been seen for too long.
    pub fn age(&mut self, now: Time) {
        let (ageing, per_port) = (self.ageing, &mut self.per_port);
        self.entries.retain(|_, entry| {
            let keep = now.since(entry.seen) <= ageing;
            if !keep && let Some(count) = per_port.get_mut(entry.port.index()) {
                *count = count.saturating_sub(1);
            }
            keep
        });
    }

    /// Forgets what is behind `port`.
    pub fn forget(&mut self, port: PortId) {
        self.entries.retain(|_, entry| entry.port != port);
        if let Some(count) = self.count(port) {
            *count = 0;
        }
    }

    /// Addresses known.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no address is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every entry: VLAN, address, port.
    pub fn iter(&self) -> impl Iterator<Item = (Vid, Mac, PortId)> {
        self.entries.iter().filter_map(|(key, entry)| {
            let [_, _, mac @ ..] = key.to_be_bytes();
            Some((
                Vid::new((key >> 48) as u16)?,
                Mac::from_bytes(&mac),
                entry.port,
            ))
        })
    }
}
