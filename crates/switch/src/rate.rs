//! Token buckets: how much may pass per second, in bytes and in packets.

use crate::time::Time;

/// Nanoseconds per second.
const SECOND: i128 = 1_000_000_000;

/// A rate with its burst. The unit (bytes or packets) is that of the field it stands in.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units per second. Zero lets the first burst pass and nothing after it.
    pub per_second: u64,
    /// Units that may pass at once after a pause; at least one is always allowed.
    pub burst: u64,
}

/// Limits of a port in one direction.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Bytes of frames.
    pub bytes: Option<Rate>,
    /// Frames.
    pub packets: Option<Rate>,
}

/// One bucket. Its level is exact: units times nanoseconds, so that nothing is lost to rounding.
#[derive(Copy, Clone, Debug)]
struct Tokens {
    rate: Rate,
    level: i128,
    updated: Time,
}

impl Tokens {
    fn new(rate: Rate, now: Time) -> Tokens {
        Tokens {
            rate,
            level: i128::from(rate.burst.max(1)) * SECOND,
            updated: now,
        }
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.updated).as_nanos().min(u128::from(u64::MAX)) as i128;
        self.updated = self.updated.max(now);
        let full = i128::from(self.rate.burst.max(1)) * SECOND;
        self.level = (self.level + passed * i128::from(self.rate.per_second)).min(full);
    }

    /// When the level is above zero. A frame passes then and may leave a debt: so a frame larger than the burst passes
    /// too, and the rate still holds.
    fn ready(&mut self, now: Time) -> Time {
        self.refill(now);
        if self.level > 0 {
            return now;
        }
        if self.rate.per_second == 0 {
            return Time::from_nanos(u64::MAX);
        }
        let wait = (1 - self.level + i128::from(self.rate.per_second) - 1)
            / i128::from(self.rate.per_second);
        Time::from_nanos(
            now.nanos()
                .saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)),
        )
    }

    fn charge(&mut self, units: u64) {
        // The debt is bounded, so that no sum overflows.
        self.level = (self.level - i128::from(units) * SECOND).max(i128::from(i64::MIN) * SECOND);
    }
}

/// The buckets of one limit.
#[derive(Copy, Clone, Debug, Default)]
pub struct Bucket {
    bytes: Option<Tokens>,
    packets: Option<Tokens>,
}

impl Bucket {
    /// Full buckets.
    pub fn new(limit: Limit, now: Time) -> Bucket {
        Bucket {
            bytes: limit.bytes.map(|rate| Tokens::new(rate, now)),
            packets: limit.packets.map(|rate| Tokens::new(rate, now)),
        }
    }

    /// When the next frame may pass: `now` if it may at once.
    pub fn ready(&mut self, now: Time) -> Time {
        [&mut self.bytes, &mut self.packets]
            .into_iter()
            .flatten()
            .map(|tokens| tokens.ready(now))
            .fold(now, Time::max)
    }

    /// Counts a frame of `bytes` bytes, `packets` on the wire, that passed.
    pub fn charge(&mut self, bytes: u64, packets: u64) {
        if let Some(tokens) = &mut self.bytes {
            tokens.charge(bytes);
        }
        if let Some(tokens) = &mut self.packets {
            tokens.charge(packets);
        }
    }

    /// Lets a frame pass if it may, and counts it.
    pub fn pass(&mut self, bytes: u64, packets: u64, now: Time) -> bool {
        let ready = self.ready(now) <= now;
        if ready {
            self.charge(bytes, packets);
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn the_first_moment_at_which_a_frame_may_pass_is_named() {
        let limit = Limit {
            bytes: Some(Rate {
                per_second: 1_000_000,
                burst: 1500,
            }),
            packets: None,
        };
        let mut bucket = Bucket::new(limit, Time::ZERO);
        assert!(bucket.pass(1500, 1, Time::ZERO));
        let ready = bucket.ready(Time::ZERO);
        assert!(!bucket.pass(1500, 1, Time::from_nanos(ready.nanos() - 1)));
        assert!(bucket.pass(1500, 1, ready));
        assert!(bucket.ready(ready).since(Time::ZERO) <= Duration::from_millis(2));
    }

    proptest! {
        /// Over any time, no more passes than rate × time + burst + one frame, and a sender that always waits as told
        /// gets the whole rate within one frame's time.
        #[test]
        fn the_rate_is_kept(
            rate in 1_000u64..10_000_000_000,
            burst in 1u64..200_000,
            sizes in proptest::collection::vec(60u64..65_000, 10..200),
        ) {
            let limit = Limit { bytes: Some(Rate { per_second: rate, burst }), packets: None };
            let mut bucket = Bucket::new(limit, Time::ZERO);
            let (mut now, mut passed) = (Time::ZERO, 0u64);
            let mut last = 0;
            for size in sizes {
                let ready = bucket.ready(now);
                prop_assert!(ready >= now);
                now = ready;
                prop_assert!(bucket.pass(size, 1, now));
                passed += size;
                last = size;
                let bound = u128::from(now.nanos()) * u128::from(rate) / 1_000_000_000 + u128::from(burst + size + 1);
                prop_assert!(u128::from(passed) <= bound);
            }
            let lower = u128::from(now.nanos()) * u128::from(rate) / 1_000_000_000;
            prop_assert!(u128::from(passed) + 1 >= lower.saturating_sub(u128::from(last)));
        }
    }
}
