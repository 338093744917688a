//! The process of a shared network's switch: what its hub is.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use strata_network::{Hub, NetworkConfig};
use strata_vmm::gateway::{Dhcp4Config, GatewayConfig, Mac};

use super::SwitchLaunch;

/// Longest IP packet: what every system and every tunnel takes.
const MTU: u16 = 1500;
/// The gateway's Ethernet address.
const GATEWAY_MAC: [u8; 6] = [0x02, 0x73, 0x74, 0x72, 0x61, 0x01];
/// How long an address is a machine's.
const LEASE: Duration = Duration::from_secs(24 * 3600);

/// Makes the hub of a network whose machines come to `listener`.
pub fn open(launch: &SwitchLaunch, listener: OwnedFd) -> io::Result<Hub> {
    let gateway = GatewayConfig {
        mac: Mac::from_bytes(&GATEWAY_MAC),
        ipv4: Some(launch.subnet),
        dhcp4: Some(Dhcp4Config {
            domain: launch.name.clone(),
            mtu: MTU,
            lease: LEASE,
            ..Dhcp4Config::whole(launch.subnet)
        }),
        ipv6: None,
        also: Vec::new(),
        domain: launch.name.clone(),
        mtu: MTU,
    };
    let config = NetworkConfig {
        mtu: MTU,
        gateway: Some(gateway),
    };
    Hub::new(config, listener, None)
}
