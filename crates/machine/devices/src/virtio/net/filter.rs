//! Which frames a driver wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::feature;

/// Addresses that each list of the table may hold.
pub(super) const ADDRESSES_MAX: usize = 1024;

/// TPID of 802.1Q.
const VLAN: [u8; 2] = [0x81, 0x00];

/// What the driver has asked for. Until it does it gets everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    pub(super) unicast: Vec<[u8; 6]>,
    pub(super) multicast: Vec<[u8; 6]>,
    pub(super) vlans: BTreeSet<u16>,
}

impl Default for Filter {
    fn default() -> Filter {
        Filter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: BTreeSet::new(),
        }
    }
}

impl Filter {
    /// Whether it can have come about.
    pub(super) fn is_possible(&self) -> bool {
        self.unicast.len() <= ADDRESSES_MAX
            && self.multicast.len() <= ADDRESSES_MAX
            && self.vlans.iter().all(|vlan| *vlan < 4096)
    }

    /// Whether the driver of a card with this address wants a frame.
    pub(super) fn lets_in(&self, frame: &[u8], mac: &[u8; 6], features: u64) -> bool {
        if features & feature::CTRL_VLAN != 0
            && let Some(vlan) = vlan_of(frame)
            && !self.vlans.contains(&vlan)
        {
            return false;
        }
        let Some((to, _)) = frame.split_first_chunk::<6>() else {
            return false;
        };
        if self.promiscuous || features & feature::CTRL_RX == 0 {
            return true;
        }
        if *to == [0xff; 6] {
            !self.no_broadcast
        } else if to.first().is_some_and(|first| first & 1 != 0) {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(to))
        } else {
            !self.no_unicast && (self.all_unicast || to == mac || self.unicast.contains(to))
        }
    }
}

fn vlan_of(frame: &[u8]) -> Option<u16> {
    let rest = frame.get(12..)?;
    let (kind, rest) = rest.split_first_chunk::<2>()?;
    let (tag, _) = rest.split_first_chunk::<2>()?;
    (*kind == VLAN).then_some(u16::from_be_bytes(*tag) & 0xfff)
}
