//! What a guest feels: the latency of its requests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the guest felt for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Felt {
    /// Mean latency of its requests in nanoseconds.
    pub mean_ns: u64,
    /// How many there were: at least 1.
    pub count: u64,
}

/// Latency of the guest's requests since it was last asked for.
///
/// Both fields are atomics that any iothread adds to; a reader may see the one
/// without the other for an instant, which the mean survives.
#[derive(Debug, Default)]
pub struct GuestLatency {
    sum_ns: AtomicU64,
    count: AtomicU64,
}

impl GuestLatency {
    /// Notes one request that took `took`. Two relaxed additions.
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX >> 16);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// What the guest felt since the last call; `None` if it asked for nothing.
    pub fn take(&self) -> Option<Felt> {
        let count = self.count.swap(0, Ordering::Relaxed);
        let sum = self.sum_ns.swap(0, Ordering::Relaxed);
        let mean_ns = sum.checked_div(count)?;
        Some(Felt { mean_ns, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_a_mean_and_starts_anew() {
        let latency = GuestLatency::default();
        assert_eq!(latency.take(), None);
        latency.record(Duration::from_nanos(100));
        latency.record(Duration::from_nanos(300));
        let (mean_ns, count) = (200, 2);
        assert_eq!(latency.take(), Some(Felt { mean_ns, count }));
        assert_eq!(latency.take(), None);
    }
}
