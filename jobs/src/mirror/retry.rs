//! When what failed is tried again. Times in, times out.

use std::time::{Duration, Instant};

use crate::Backoff;

/// A wait that becomes longer with each failure. What was begun before a failure was
/// known and fails as well is the same failure.
#[derive(Debug, Default)]
pub(super) struct Retry {
    backoff: Backoff,
    /// The last failure that counted, and the end of the wait after it.
    failed: Option<(Instant, Instant)>,
}

impl Retry {
    /// Something that was begun at `began` has failed.
    pub(super) fn failed(&mut self, began: Instant, now: Instant) {
        if self.failed.is_none_or(|(known, _)| began > known) {
            self.failed = Some((now, now + self.backoff.failed()));
        }
    }

    /// What is left of the wait.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let left = self.failed?.1.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// All went well for a while.
    pub(super) fn went_well(&mut self) {
        self.backoff.reset();
    }

    /// Whether the last failure was longer ago than the longest wait lasts.
    pub(super) fn is_long_ago(&self, now: Instant) -> bool {
        self.failed
            .is_some_and(|(_, until)| now.saturating_duration_since(until) >= Backoff::LONGEST)
    }

    /// The user has looked after it: it is tried again at once.
    pub(super) fn at_once(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_together_is_one_failure_and_what_fails_anew_another() {
        let mut retry = Retry::default();
        let began = Instant::now();
        let ms = Duration::from_millis;
        // Sixteen requests, the last of which hung for a second.
        for _ in 0..15 {
            retry.failed(began, began + ms(10));
        }
        assert_eq!(retry.left(began + ms(10)), Some(ms(100)));
        retry.failed(began, began + ms(1000));
        assert_eq!(retry.left(began + ms(1000)), None);
        retry.failed(began + ms(120), began + ms(130));
        assert_eq!(retry.left(began + ms(130)), Some(ms(200)));
        retry.went_well();
        assert_eq!(
            retry.left(began + ms(130)),
            Some(ms(200)),
            "it is still due"
        );
        retry.failed(began + ms(400), began + ms(500));
        assert_eq!(retry.left(began + ms(500)), Some(ms(100)));
        assert!(!retry.is_long_ago(began + ms(5_000)));
        assert!(retry.is_long_ago(began + ms(5_600)));
        retry.at_once();
        assert_eq!(retry.left(began + ms(500)), None);
    }
}
