//! What hangs on a port of the switch.

use crate::frame::{Frame, Offload, SegmentationKind};
use crate::pool::Pool;
use crate::time::Time;

/// What the receiver behind a port takes without help.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Frames with a missing transport checksum.
    pub checksum: bool,
    /// Unsegmented TCP over IPv4. Needs `checksum`.
    pub tcp4: bool,
    /// Unsegmented TCP over IPv6. Needs `checksum`.
    pub tcp6: bool,
    /// Unsegmented UDP. Needs `checksum`.
    pub udp: bool,
}

impl Capabilities {
    /// A receiver that takes everything: one on the same host that looks at the payload only.
    pub const ALL: Capabilities = Capabilities {
        checksum: true,
        tcp4: true,
        tcp6: true,
        udp: true,
    };

    /// Whether a frame with this offload can be given as it is.
    pub fn takes(self, offload: &Offload) -> bool {
        (self.checksum || offload.needs_checksum.is_none())
            && match offload.segmentation.map(|how| how.kind) {
                None => true,
                Some(_) if !self.checksum => false,
                Some(SegmentationKind::Tcp4) => self.tcp4,
                Some(SegmentationKind::Tcp6) => self.tcp6,
                Some(SegmentationKind::Udp) => self.udp,
            }
    }
}

/// Something behind a port that lives on the switch's thread: a gateway, a tunnel, a machine's network card. Frames in,
/// frames out, no waiting.
///
/// The thread's owner carries the frames: it gives `deliver` what [`Switch::take`](crate::Switch::take) yields and gives
/// [`Switch::receive`](crate::Switch::receive) what `poll` yields, in batches, port after port, and calls `poll` again
/// when `next_deadline` has come or when the port's own descriptors say so. [`carry`](crate::carry) does one round.
pub trait Port {
    /// Takes a frame from the switch. It comes back if there is no room now: the switch's queue keeps it, and the owner
    /// tries again when the port says that there is room (by whatever wakes its thread).
    ///
    /// # Errors
    /// The frame, when there is no room.
    fn deliver(&mut self, frame: Frame, now: Time, pool: &mut Pool) -> Result<(), Frame>;

    /// The next frame that this port sends into the switch, if there is one. Timers that are due are served here.
    fn poll(&mut self, now: Time, pool: &mut Pool) -> Option<Frame>;

    /// When `poll` has something to do even if nothing arrives.
    fn next_deadline(&self) -> Option<Time> {
        None
    }

    /// What `deliver` takes.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
}
