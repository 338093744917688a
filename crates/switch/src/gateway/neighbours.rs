//! Who on the network has which Ethernet address: learned from what machines say, asked for where needed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::quality::RandomState;

use crate::packet::Mac;
use crate::time::Time;

/// Neighbours known at most.
const NEIGHBOURS_MAX: usize = 4096;
/// How long one that is silent stays known.
const LIFETIME: Duration = Duration::from_secs(1200);
/// Shortest time between two questions for one address.
const ASK_EVERY: Duration = Duration::from_secs(1);

#[derive(Copy, Clone, Debug)]
struct Neighbour {
    mac: Option<Mac>,
    seen: Time,
}

/// The table.
#[derive(Debug, Default)]
pub struct Neighbours {
    known: HashMap<IpAddr, Neighbour, RandomState>,
}

impl Neighbours {
    /// Notes what a machine says of itself.
    pub fn learn(&mut self, address: IpAddr, mac: Mac, now: Time) {
        if mac.is_multicast() || address.is_unspecified() || address.is_multicast() {
            return;
        }
        self.put(
            address,
            Neighbour {
                mac: Some(mac),
                seen: now,
            },
            now,
        );
    }

    fn put(&mut self, address: IpAddr, neighbour: Neighbour, now: Time) {
        if self.known.len() >= NEIGHBOURS_MAX && !self.known.contains_key(&address) {
            self.known.retain(|_, one| now.since(one.seen) < LIFETIME);
            if self.known.len() >= NEIGHBOURS_MAX {
                return;
            }
        }
        self.known.insert(address, neighbour);
    }

    /// Its Ethernet address, if it is known.
    pub fn find(&self, address: IpAddr, now: Time) -> Option<Mac> {
        let one = self.known.get(&address)?;
        one.mac.filter(|_| now.since(one.seen) < LIFETIME)
    }

    /// Whether it is time to ask for an address that is not known. Notes that it was asked for.
    pub fn ask(&mut self, address: IpAddr, now: Time) -> bool {
        let wait = self
            .known
            .get(&address)
            .is_some_and(|one| one.mac.is_none() && now.since(one.seen) < ASK_EVERY);
        if !wait {
            self.put(
                address,
                Neighbour {
                    mac: None,
                    seen: now,
                },
                now,
            );
        }
        !wait
    }
}
