//! Keeps a guest from filling the log.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Lets a few messages through per period, and counts the others.
pub(crate) struct RateLimit {
    start: Instant,
    /// The current period's number. Own synchronisation; a race between threads
    /// costs or spares a message.
    period: AtomicU64,
    /// Messages of the current period.
    count: AtomicU32,
    /// Messages held back since the last one that got through.
    suppressed: AtomicU32,
}

impl RateLimit {
    const PERIOD_SECS: u64 = 10;
    const BURST: u32 = 5;

    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            period: AtomicU64::new(0),
            count: AtomicU32::new(0),
            suppressed: AtomicU32::new(0),
        }
    }

    /// Whether a message may be logged now; if so, how many were held back
    /// before it.
    pub(crate) fn allow(&self) -> Option<u32> {
        self.allow_at(self.start.elapsed().as_secs() / Self::PERIOD_SECS)
    }

    fn allow_at(&self, period: u64) -> Option<u32> {
        if self.period.swap(period, Ordering::Relaxed) != period {
            self.count.store(0, Ordering::Relaxed);
        }
        if self.count.fetch_add(1, Ordering::Relaxed) < Self::BURST {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_its_size_is_told_later() {
        let limit = RateLimit::new();
        for _ in 0..RateLimit::BURST {
            assert_eq!(limit.allow_at(0), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.allow_at(0), None);
        }
        assert_eq!(limit.allow_at(1), Some(1000));
        assert_eq!(limit.allow_at(1), Some(0));
    }
}
