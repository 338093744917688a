//! The network data plane: frames, ports, a layer-2 switch between them, and the answers of a network's gateway.
//!
//! A [`Switch`] is a value on one thread. It does no I/O, reads no clock and starts nothing: whoever owns the thread
//! hands it the frames that a port has sent ([`Switch::receive`]), takes the frames that a port is to get
//! ([`Switch::take`]), and says what time it is. So it runs the same inside the process of one machine, in a process
//! of its own for the machines of a host, and in a test.
//!
//! The way of a frame: *ingress checks* (is it well-formed, may this port send it) → *policy* (security groups) →
//! *forwarding* (VLANs, learned addresses) → *egress queues*, one set per port, from which the port's owner takes. A
//! frame that ends elsewhere is counted under its [`DropReason`].
//!
//! All memory is bounded: tables, queues and pools have limits, and what exceeds them is dropped and counted. No frame,
//! however malformed, makes it panic.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]
#![forbid(unsafe_code)]

pub mod checksum;
mod config;
mod counters;
mod fragment;
mod frame;
pub mod gateway;
mod guard;
pub mod nat;
pub mod packet;
pub mod pcapng;
pub mod policy;
mod pool;
mod port;
mod queue;
mod rate;
pub mod ring;
mod segment;
mod switch;
mod table;
mod time;
mod vlan;
pub mod vxlan;

pub use config::{Mirror, PortConfig, PortId, SwitchConfig, SwitchError};
pub use counters::{DropReason, PortCounters, Traffic};
pub use fragment::{Reassembler, split};
pub use frame::{
    Captured, Frame, HEADROOM, MAX_FRAME, NeedsChecksum, Offload, Segmentation, SegmentationKind,
};
pub use guard::Guard;
pub use pool::Pool;
pub use port::{Capabilities, Port};
pub use queue::{CLASSES, QueueConfig, QueueCounters};
pub use rate::{Bucket, Limit, Rate};
pub use segment::{Segments, SegmentsError};
pub use switch::{Switch, carry};
pub use table::MacTable;
pub use time::Time;
pub use vlan::{Vid, VidSet, VlanMode};
