//! What a switch and its ports are told to be: values only.

use std::time::Duration;

use ipnet::IpNet;

use crate::guard::Guard;
use crate::policy::GroupId;
use crate::port::Capabilities;
use crate::queue::QueueConfig;
use crate::rate::{Limit, Rate};
use crate::vlan::VlanMode;

/// A port of a switch. The number of a removed port is used again.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub(crate) u32);

impl PortId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    /// Its number, from 0.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// What a switch is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Ports at most.
    pub ports_max: usize,
    /// Learned addresses at most.
    pub addresses_max: usize,
    /// How long an address that is not seen stays known.
    pub ageing: Duration,
    /// Small buffers that are kept to be used again.
    pub pool: usize,
}

impl Default for SwitchConfig {
    fn default() -> SwitchConfig {
        SwitchConfig {
            ports_max: 1024,
            addresses_max: 16_384,
            ageing: Duration::from_secs(300),
            pool: 4096,
        }
    }
}

/// What a port is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its name in statistics and captures.
    pub name: String,
    /// What its receiver takes without help.
    pub capabilities: Capabilities,
    /// Longest payload of an Ethernet frame that leaves here, bytes, once segmented.
    pub mtu: u16,
    /// Its VLANs.
    pub vlan: VlanMode,
    /// Priority of frames that say none, 0 to 7.
    pub priority: u8,
    /// An isolated port exchanges frames with ports that are not isolated only.
    pub isolated: bool,
    /// What it may send. Its owner should ask [`Switch::may_receive`] and wait; what comes too early is dropped.
    pub ingress: Limit,
    /// What it gets. The rest waits in its queues.
    pub egress: Limit,
    /// Frames per second to many or unknown receivers that it may send.
    pub flood: Option<Rate>,
    /// Its egress queues.
    pub queues: QueueConfig,
    /// The addresses behind it, as far as they are known: what a guarded port may use, what its groups count as members,
    /// and, one by one, what no other guarded port may take for itself.
    pub addresses: Vec<IpNet>,
    /// Holds it to its addresses. `None`: it is trusted.
    pub guard: Option<Guard>,
    /// Security groups. `None`: it is not filtered; in no group, nothing comes in that does not answer it.
    pub groups: Option<Vec<GroupId>>,
    /// Connections that are tracked for it at most.
    pub connections_max: usize,
    /// It gets copies of what other ports send and are sent, and takes no other part.
    pub mirror: Option<Mirror>,
}

/// What a mirror port sees.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mirror {
    /// Every port.
    All,
    /// One.
    Port(PortId),
}

impl Default for PortConfig {
    /// An untagged port of VLAN 1 with an MTU of 1500 and no limits.
    fn default() -> PortConfig {
        PortConfig {
            name: String::new(),
            capabilities: Capabilities::default(),
            mtu: 1500,
            vlan: VlanMode::default(),
            priority: 0,
            isolated: false,
            ingress: Limit::default(),
            egress: Limit::default(),
            flood: None,
            queues: QueueConfig::default(),
            addresses: Vec::new(),
            guard: None,
            groups: None,
            connections_max: 16_384,
            mirror: None,
        }
    }
}

/// Why a port cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwitchError {
    /// The switch has all the ports that it may have.
    #[error("the switch has {0} ports already and takes no more")]
    TooManyPorts(usize),
    /// There is no such port.
    #[error("the switch has no port {0}")]
    NoSuchPort(u32),
}
