//! The host's routes: a network of ours is to be none of those that the host reaches.

use ipnet::Ipv4Net;

/// The kernel's table of IPv4 routes (proc(5)).
const ROUTES: &str = "/proc/net/route";

/// The IPv4 networks to which the host has routes, but for the default one.
pub fn routes() -> Vec<Ipv4Net> {
    parse(&std::fs::read_to_string(ROUTES).unwrap_or_default())
}

fn parse(table: &str) -> Vec<Ipv4Net> {
    let route = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok();
        // As they lie in memory: in the network's order of bytes.
        let (to, mask) = (u32::from_be(number(1)?), u32::from_be(number(7)?));
        if mask == 0 {
            return None;
        }
        Ipv4Net::with_netmask(to.into(), mask.into()).ok()
    };
    table.lines().skip(1).filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_read() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n\
            eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\nshort\n";
        assert_eq!(parse(table), ["10.0.2.0/24".parse().unwrap()]);
    }
}
