//! Devices of one machine: buses, interrupts, clocks, serial, PCI and virtio.
