//! The leaky buckets of a group, without clock, lock or request.
//!
//! A bucket fills with what is let through and leaks at the allowed rate. While
//! it holds no more than its capacity, the next request may come, however large
//! it is; a large one is paid for by those after it. So what has gone through in
//! a time `t` is at most `capacity + rate × t` and one request.

use std::time::Duration;

use super::limits::{RateLimit, ThrottleLimits};

/// Levels are exact: in units (bytes or requests) times nanoseconds per second.
const SCALE: u128 = 1_000_000_000;

/// Which limits a request meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Reads.
    Read,
    /// Writes, zeroes and discards.
    Write,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Read, Self::Write];

    pub(super) fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }

    /// Places of the buckets that it fills: bytes and requests, each of the total
    /// and its own. As [`ThrottleLimits::each`] orders them.
    fn buckets(self) -> [usize; 4] {
        let own = 1 + self.index();
        [0, own, 3, 3 + own]
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Limiter {
    limits: ThrottleLimits,
    buckets: [Bucket; 6],
    /// Up to when the buckets have leaked, in time since the group began.
    leaked: Duration,
}

impl Limiter {
    pub(super) fn new(limits: ThrottleLimits, now: Duration) -> Self {
        Self {
            limits,
            buckets: limits.each().map(Bucket::new),
            leaked: now,
        }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limits
    }

    /// How long the next request has to wait; zero if it may come now.
    pub(super) fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        self.leak(now);
        let nanos = direction
            .buckets()
            .into_iter()
            .map(|index| self.buckets[index].wait_nanos())
            .max()
            .unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// A request of `len` bytes has been let through.
    pub(super) fn charge(&mut self, direction: Direction, len: u64) {
        let requests = match self.limits.iops_size {
            0 => SCALE,
            // One of less than this size counts as one.
            size => (u128::from(len) * SCALE / u128::from(size)).max(SCALE),
        };
        let bytes = u128::from(len) * SCALE;
        let [total, own, total_requests, own_requests] = direction.buckets();
        for (index, amount) in [
            (total, bytes),
            (own, bytes),
            (total_requests, requests),
            (own_requests, requests),
        ] {
            self.buckets[index].fill(amount);
        }
    }

    fn leak(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.leaked).as_nanos();
        if elapsed > 0 {
            self.leaked = now;
            for bucket in &mut self.buckets {
                bucket.leak(elapsed);
            }
        }
    }
}

#[derive(Debug)]
struct Bucket {
    limit: RateLimit,
    /// Leaks at the long-run rate.
    level: u128,
    /// Leaks at the rate of a burst, where bursts of more than a second would let
    /// everything through at once.
    burst_level: u128,
}

impl Bucket {
    fn new(limit: RateLimit) -> Self {
        Self {
            limit,
            level: 0,
            burst_level: 0,
        }
    }

    fn has_burst_rate(&self) -> bool {
        self.limit.burst > 0 && self.limit.burst_seconds > 1
    }

    fn leak(&mut self, nanos: u128) {
        let leaked = |rate: u64| u128::from(rate).saturating_mul(nanos);
        self.level = self.level.saturating_sub(leaked(self.limit.rate));
        self.burst_level = self.burst_level.saturating_sub(leaked(self.limit.burst));
    }

    fn fill(&mut self, amount: u128) {
        if self.limit.rate > 0 {
            self.level = self.level.saturating_add(amount);
        }
        if self.has_burst_rate() {
            self.burst_level = self.burst_level.saturating_add(amount);
        }
    }

    /// Time until both levels are back within what they may be.
    fn wait_nanos(&self) -> u128 {
        let RateLimit {
            rate,
            burst,
            burst_seconds,
        } = self.limit;
        if rate == 0 {
            return 0;
        }
        let capacity = match burst {
            0 => u128::from(rate) * SCALE / 10,
            burst => u128::from(burst) * SCALE * u128::from(burst_seconds),
        };
        let wait = self
            .level
            .saturating_sub(capacity)
            .div_ceil(u128::from(rate));
        if wait > 0 || !self.has_burst_rate() {
            return wait;
        }
        let burst_capacity = u128::from(burst) * SCALE / 10;
        self.burst_level
            .saturating_sub(burst_capacity)
            .div_ceil(u128::from(burst))
    }
}
