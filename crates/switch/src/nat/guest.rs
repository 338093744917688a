//! What the guest sends: which flow it belongs to, or begins.

use super::*;

impl Nat {
    /// Takes a frame of the guest.
    pub(super) fn take(&mut self, frame: &Frame, now: Time) {
        let bytes = frame.bytes();
        let Ok(content) = packet::content(bytes) else {
            self.counters.malformed += 1;
            return;
        };
        let (Content::Ip(ip), Some(mac)) = (content, packet::source(bytes)) else {
            self.counters.unknown += 1;
            return;
        };
        if ip.fragment.is_some() {
            self.counters.fragments += 1;
            return;
        }
        if packet::multicast(ip.destination).is_some() || ip.source.is_unspecified() {
            self.counters.unknown += 1;
            return;
        }
        self.see(&ip, mac);
        let trusted = frame.offload.needs_checksum.is_some() || frame.offload.checksum_valid;
        let payload = ip.payload(bytes);
        if !trusted && ip.protocol != protocol::ICMP && !checksum_is_right(&ip, payload) {
            self.counters.checksum += 1;
            return;
        }
        let done = match ip.protocol {
            protocol::TCP => self.tcp(&ip, mac, payload, now),
            protocol::UDP => {
                let size = match frame.offload.segmentation {
                    Some(how) if how.kind == SegmentationKind::Udp => usize::from(how.size),
                    _ => usize::MAX,
                };
                self.udp(&ip, mac, payload, size, now)
            }
            protocol::ICMP | protocol::ICMPV6 => self.echo(&ip, mac, payload, now),
            _ => {
                self.counters.unknown += 1;
                Some(())
            }
        };
        if done.is_none() {
            self.counters.malformed += 1;
        }
    }

    /// Remembers where the guest is.
    fn see(&mut self, ip: &Ip, mac: Mac) {
        if mac != self.config.guest_mac {
            return;
        }
        match ip.source {
            IpAddr::V4(address) => self.guest4 = address,
            IpAddr::V6(address) if !address.is_unicast_link_local() => self.guest6 = Some(address),
            IpAddr::V6(_) => {}
        }
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        address == self.config.gateway4 || address == self.config.gateway6
    }

    fn wish(&self, remote: SocketAddr, tcp: bool) -> Wish {
        match (self.is_gateway(remote.ip()), remote.port(), tcp) {
            (true, DNS_PORT, _) => Wish::Resolver {
                tcp,
                failures: self.dns_failures,
            },
            (true, port, _) => Wish::Here {
                tcp,
                port,
                v6: remote.is_ipv6(),
            },
            (false, _, true) => Wish::Tcp(remote),
            (false, _, false) => Wish::Udp(remote),
        }
    }

    /// Makes a flow and asks the host for its socket.
    pub(super) fn begin(
        &mut self,
        key: Key,
        mac: Mac,
        kind: Kind,
        wish: Wish,
        now: Time,
    ) -> Option<FlowId> {
        if self.flows.len() >= self.config.flows_max {
            self.counters.refused_full += 1;
            return None;
        }
        let id = self.flows.add(key, mac, kind, false, now);
        if !self.host.ask(id.number(), wish) {
            self.counters.refused_host += 1;
            self.flows.remove(id);
            return None;
        }
        Some(id)
    }

    fn tcp(&mut self, ip: &Ip, mac: Mac, payload: &[u8], now: Time) -> Option<()> {
        let (from, to, heard) = Heard::parse(payload)?;
        let key = Key {
            protocol: protocol::TCP,
            guest: SocketAddr::new(ip.source, from),
            remote: SocketAddr::new(ip.destination, to),
        };
        let opens = heard.flags & (flag::SYN | flag::ACK | flag::RST) == flag::SYN;
        let mut known = self.flows.find(&key);
        if let (true, Some(id)) = (opens, known)
            && let Some(flow) = self.flows.get(id)
            && let Kind::Tcp(tcp) = &flow.kind
            && tcp.is_left_by(&heard)
        {
            // The guest has forgotten the old connection and begins anew.
            self.settle(id, Fate::Aborted, now);
            known = None;
        }
        let Some(id) = known else {
            if opens {
                let tcp = Tcp::by_guest(&heard, self.isn(&key, now));
                let wish = self.wish(key.remote, true);
                let kind = Kind::Tcp(Box::new(tcp));
                match self.begin(key, mac, kind, wish, now) {
                    Some(id) => {
                        self.counters.tcp_out += 1;
                        self.settle(id, Fate::Lives, now);
                    }
                    None => self.refuse(&key, mac, &heard),
                }
            } else if heard.flags & flag::RST == 0 {
                self.refuse(&key, mac, &heard);
            }
            return Some(());
        };
        let kept = self.kept();
        let flow = self.flows.get(id)?;
        let Kind::Tcp(tcp) = &mut flow.kind else {
            return Some(());
        };
        let before = tcp.memory();
        let fate = tcp.segment(&heard, kept);
        self.acted(id, before, fate, now);
        Some(())
    }

    /// Answers a segment of no connection (RFC 9293 section 3.10.7.1).
    fn refuse(&mut self, key: &Key, mac: Mac, heard: &Heard<'_>) {
        let ends = self.ends(key, mac);
        let (seq, flags) = match heard.flags & flag::ACK {
            0 => (0, flag::RST | flag::ACK),
            _ => (heard.ack, flag::RST),
        };
        let segment = Segment {
            from: key.remote.port(),
            to: key.guest.port(),
            seq,
            ack: heard.seq.wrapping_add(heard.len()),
            flags,
            window: 0,
            options: &[],
            mss: u16::MAX,
        };
        let frame = wire::tcp_control(&mut Pool::new(0), &ends, &segment);
        self.say(frame);
    }

    fn udp(&mut self, ip: &Ip, mac: Mac, payload: &[u8], size: usize, now: Time) -> Option<()> {
        let (from, to) = (packet::get_u16(payload, 0)?, packet::get_u16(payload, 2)?);
        let payload = payload.get(wire::UDP_HEADER..)?;
        let key = Key {
            protocol: protocol::UDP,
            guest: SocketAddr::new(ip.source, from),
            remote: SocketAddr::new(ip.destination, to),
        };
        let wish = self.wish(key.remote, false);
        if payload.is_empty() {
            self.datagram(key, mac, payload, wish, now);
        }
        for part in payload.chunks(size.max(1)) {
            self.datagram(key, mac, part, wish, now);
        }
        Some(())
    }

    fn echo(&mut self, ip: &Ip, mac: Mac, message: &[u8], now: Time) -> Option<()> {
        let (kind, v6) = (*message.first()?, ip.destination.is_ipv6());
        if kind != if v6 { 128 } else { 8 } || message.len() < wire::ECHO_HEADER {
            self.counters.unknown += 1;
            return Some(());
        }
        if self.is_gateway(ip.destination) {
            let ends = Ends {
                from_mac: self.config.mac,
                to_mac: mac,
                from: ip.destination,
                to: ip.source,
            };
            let at = ends.headers();
            let mut frame = Pool::new(0).frame(at + message.len());
            packet::put(frame.bytes_mut(), at, message);
            packet::put(frame.bytes_mut(), at, &[if v6 { 129 } else { 0 }]);
            wire::icmp(&mut frame, &ends, message.len());
            self.say(frame);
            return Some(());
        }
        let key = Key {
            protocol: ip.protocol,
            guest: SocketAddr::new(ip.source, packet::get_u16(message, 4)?),
            remote: SocketAddr::new(ip.destination, 0),
        };
        self.datagram(key, mac, message, Wish::Echo(ip.destination), now);
        Some(())
    }

    /// Sends a datagram of the guest.
    fn datagram(&mut self, key: Key, mac: Mac, payload: &[u8], wish: Wish, now: Time) {
        let id = self.flows.find(&key).or_else(|| {
            let kind = Kind::Datagrams(Box::default());
            let id = self.begin(key, mac, kind, wish, now)?;
            self.counters.datagram_flows += 1;
            Some(id)
        });
        let Some(id) = id else {
            return;
        };
        let may_wait = self.kept() == Memory::Ample;
        if let Some(flow) = self.flows.get(id)
            && let Kind::Datagrams(datagrams) = &mut flow.kind
        {
            let before = datagrams.memory();
            datagrams.send(payload, may_wait);
            self.acted(id, before, Fate::Lives, now);
        }
    }
}

pub(super) fn checksum_is_right(ip: &Ip, payload: &[u8]) -> bool {
    // None was computed (RFC 768).
    if ip.protocol == protocol::UDP && ip.source.is_ipv4() && packet::get_u16(payload, 6) == Some(0)
    {
        return true;
    }
    let ((from, count), (to, _)) = (packet::octets(ip.source), packet::octets(ip.destination));
    let pseudo = checksum::pseudo_header(
        from.get(..count).unwrap_or_default(),
        to.get(..count).unwrap_or_default(),
        ip.protocol,
        payload.len(),
    );
    checksum::fold(pseudo + checksum::sum(payload)) == 0xffff
}
