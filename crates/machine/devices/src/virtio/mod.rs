//! Virtio devices (virtio 1.2) on PCI.
//!
//! From the driver to the host and back:
//!
//! ```text
//!   VirtioPci    registers in BAR 0, capabilities, MSI-X       pci.rs
//!   Core         status, features, queues, one lock            core.rs
//!   Queue        the split ring;  Chain: one request           queue.rs, chain.rs
//!   VirtioDevice what the requests mean                        device.rs; blk, console, net, rng, vsock
//! ```
//!
//! A doorbell is handled on the thread that rings it, which is a virtual CPU's. Devices whose host
//! side acts by itself (input, sockets) are called through a [`HostHandle`], under the same lock.

mod blk;
mod chain;
mod console;
mod core;
mod device;
mod host;
mod net;
mod pci;
mod queue;
mod rng;
mod vsock;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod testutil;

pub use blk::{Blk, SERIAL_BYTES};
pub use chain::{Buffer, Chain, Reader, Writer};
pub use console::{Console, ConsoleInput, ConsoleSize};
pub use core::HostHandle;
pub use device::{DeviceKind, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Io, VirtioDevice};
pub use net::{
    Exchange, MTU_MAX, MTU_MIN, Net, NetCounters, NetHost, NetOptions, NetPort, PAIRS_MAX,
};
pub use pci::VirtioPci;
pub use queue::QueueError;
pub use rng::Rng;
pub use vsock::{Vsock, VsockError, VsockHost};
