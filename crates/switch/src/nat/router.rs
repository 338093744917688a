//! The way out of a network: the gateway answers what is for it, and the NAT takes the rest.

use super::Nat;
use crate::frame::Frame;
use crate::gateway::Gateway;
use crate::pool::Pool;
use crate::port::{Capabilities, Port};
use crate::time::Time;

/// Gateway and NAT as one port of a switch.
pub struct Router {
    gateway: Gateway,
    nat: Nat,
    /// Whether there is room for what the NAT has for guests.
    open: bool,
    /// Whether the gateway may have something to say.
    answers: bool,
}

impl Router {
    /// Puts them together. Both must have the same addresses.
    pub fn new(gateway: Gateway, nat: Nat) -> Router {
        Router {
            gateway,
            nat,
            open: true,
            answers: true,
        }
    }

    /// The NAT.
    pub fn nat(&self) -> &Nat {
        &self.nat
    }

    /// Says whether there is room for what the NAT has for guests. What it has stays in the host's buffers meanwhile.
    pub fn set_open(&mut self, open: bool) {
        self.open = open;
    }

    /// Takes what has happened at the NAT's sockets.
    pub fn service(&mut self, now: Time, pool: &mut Pool) {
        self.nat.service(now);
        while let Some((token, message)) = self.nat.next_resolved() {
            self.gateway.dns_answer(token, &message, now, pool);
            self.answers = true;
        }
    }
}

impl Port for Router {
    fn deliver(&mut self, frame: Frame, now: Time, pool: &mut Pool) -> Result<(), Frame> {
        if let Some(frame) = self.gateway.receive(frame, now, pool) {
            return self.nat.deliver(frame, now, pool);
        }
        self.answers = true;
        while let Some(query) = self.gateway.next_query() {
            self.nat.resolve(query.token, &query.message, now);
        }
        Ok(())
    }

    fn poll(&mut self, now: Time, pool: &mut Pool) -> Option<Frame> {
        self.gateway.tick(now, pool);
        if let Some(frame) = self.gateway.next_frame() {
            return Some(frame);
        }
        self.answers = false;
        if self.open {
            self.nat.poll(now, pool)
        } else {
            // Time goes on whether the guest takes something or not.
            self.nat.timers(now);
            None
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        if self.answers {
            return Some(Time::ZERO);
        }
        let nat = if self.open {
            self.nat.next_deadline()
        } else {
            self.nat.next_timer()
        };
        match (nat, self.gateway.next_deadline()) {
            (Some(nat), Some(gateway)) => Some(nat.min(gateway)),
            (nat, gateway) => nat.or(gateway),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::ALL
    }
}
