//! Choosing a network's addresses so that they collide with nothing the host can reach.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// A number that stays the same for a name (FNV-1a).
fn number(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A private /24 for the network `name` that overlaps none of `taken` (the host's routes but for the default one, and
/// the subnets of other networks); the address in it is the gateway's, the first. The same name gets the same subnet as
/// long as that is free. `None` if all 65,536 of 10.0.0.0/8 and those of 172.16.0.0/12 are taken.
pub fn choose(name: &str, taken: &[Ipv4Net]) -> Option<Ipv4Net> {
    let free = |network: &Ipv4Net| {
        !taken.iter().any(|other| {
            other.prefix_len() > 0
                && (other.contains(&network.network()) || network.contains(&other.network()))
        })
    };
    let start = number(name);
    let ten = (0..65_536u64).map(|step| {
        let place = (start.wrapping_add(step) & 0xffff) as u32;
        0x0a00_0000 | place << 8
    });
    let more = (0..4096u32).map(|step| 0xac10_0000 | step << 8);
    ten.chain(more)
        .filter_map(|base| Ipv4Net::new(Ipv4Addr::from(base | 1), 24).ok())
        .find(free)
}

/// A unique local /64 for the network `name` of the host `host` (RFC 4193: 40 bits that are unlikely to be another's);
/// the address in it is the gateway's.
pub fn unique_local(host: &str, name: &str) -> Option<Ipv6Net> {
    let global = u128::from(number(host) >> 24 & 0xff_ffff_ffff);
    let subnet = u128::from(number(name) & 0xffff);
    let address = 0xfd << 120 | global << 80 | subnet << 64 | 1;
    Ipv6Net::new(Ipv6Addr::from(address), 64).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_keeps_its_subnet_until_it_collides() {
        let first = choose("lab", &[]).unwrap();
        assert_eq!(
            choose("lab", &[net("0.0.0.0/0"), net("192.168.0.0/16")]),
            Some(first)
        );
        let other = choose("lab", &[first]).unwrap();
        assert!(!other.contains(&first.addr()) && other != first);
        assert_eq!(first.addr().octets()[3], 1);
        // A route to a single host within it, and one around it.
        assert_ne!(
            choose(
                "lab",
                &[Ipv4Net::new(Ipv4Addr::from(u32::from(first.addr()) + 7), 32).unwrap()]
            ),
            Some(first)
        );
        assert!(net("172.16.0.0/12").contains(&choose("lab", &[net("10.0.0.0/8")]).unwrap()));
        assert_eq!(
            choose("lab", &[net("10.0.0.0/8"), net("172.16.0.0/12")]),
            None
        );
    }

    #[test]
    fn local_prefixes_differ() {
        let one = unique_local("host", "lab").unwrap();
        assert!(one.addr().octets()[0] == 0xfd && one.prefix_len() == 64);
        assert_ne!(Some(one), unique_local("host", "lab2"));
        assert_ne!(Some(one), unique_local("host2", "lab"));
    }
}
