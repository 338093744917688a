//! What a port has done, and why frames ended.

/// Why a frame was dropped. Each has a counter of its own.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Too short for an Ethernet header, longer than any frame, or headers that contradict each other.
    Malformed,
    /// The offload names positions outside the frame, or a segmentation that its headers do not fit.
    BadOffload,
    /// A source address that no station has: zero or a group's.
    BadSource,
    /// To an address that a bridge must not forward (IEEE 802.1Q table 8-1).
    Reserved,
    /// A tag that the port's VLANs do not include, or none where one is needed.
    Vlan,
    /// A source address that is not the port's: Ethernet, IP, or inside ARP or neighbour discovery.
    Spoofed,
    /// An answer of a DHCP server from a port that is none.
    DhcpGuard,
    /// A router advertisement from a port that is no router.
    RouterGuard,
    /// The sender's rules do not let it out.
    PolicyOut,
    /// The receiver's rules do not let it in.
    PolicyIn,
    /// The port has as many connections as it may have.
    ConnectionsFull,
    /// More than the port may send.
    RateLimit,
    /// More broadcast, multicast and unknown addresses than the port may send.
    FloodLimit,
    /// The receiver's queue was full.
    QueueFull,
    /// Longer than the receiver's MTU.
    TooBig,
    /// The receiver is behind the port that it came from, isolated from it, or there is none.
    NoReceiver,
    /// The port was removed or shut.
    PortDown,
}

impl DropReason {
    /// Every reason, in the order of the counters.
    pub const ALL: [DropReason; 17] = [
        DropReason::Malformed,
        DropReason::BadOffload,
        DropReason::BadSource,
        DropReason::Reserved,
        DropReason::Vlan,
        DropReason::Spoofed,
        DropReason::DhcpGuard,
        DropReason::RouterGuard,
        DropReason::PolicyOut,
        DropReason::PolicyIn,
        DropReason::ConnectionsFull,
        DropReason::RateLimit,
        DropReason::FloodLimit,
        DropReason::QueueFull,
        DropReason::TooBig,
        DropReason::NoReceiver,
        DropReason::PortDown,
    ];

    /// Its name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::Malformed => "malformed",
            DropReason::BadOffload => "bad-offload",
            DropReason::BadSource => "bad-source",
            DropReason::Reserved => "reserved",
            DropReason::Vlan => "vlan",
            DropReason::Spoofed => "spoofed",
            DropReason::DhcpGuard => "dhcp-guard",
            DropReason::RouterGuard => "router-guard",
            DropReason::PolicyOut => "policy-out",
            DropReason::PolicyIn => "policy-in",
            DropReason::ConnectionsFull => "connections-full",
            DropReason::RateLimit => "rate-limit",
            DropReason::FloodLimit => "flood-limit",
            DropReason::QueueFull => "queue-full",
            DropReason::TooBig => "too-big",
            DropReason::NoReceiver => "no-receiver",
            DropReason::PortDown => "port-down",
        }
    }
}

/// Frames and bytes.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames; one that stands for several packets counts once.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Traffic {
    pub(crate) fn add(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }
}

/// What a port has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Received from the port, dropped or not.
    pub received: Traffic,
    /// Taken by the port.
    pub sent: Traffic,
    /// Frames from the port that went to more than one receiver.
    pub flooded: u64,
    /// Source addresses that were not learned for lack of room.
    pub not_learned: u64,
    drops: [u64; DropReason::ALL.len()],
}

impl PortCounters {
    /// Frames dropped for this reason: on the way in at the port that sent them, on the way out at the port that was to
    /// get them.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(reason as usize).copied().unwrap_or(0)
    }

    /// Frames dropped for any reason.
    pub fn dropped_total(&self) -> u64 {
        self.drops.iter().sum()
    }

    pub(crate) fn drop(&mut self, reason: DropReason, count: u64) {
        if let Some(counter) = self.drops.get_mut(reason as usize) {
            *counter += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_counter() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{}", reason.name());
        }
    }
}
