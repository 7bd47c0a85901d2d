//! Waiting longer and longer between tries of what keeps failing.

use std::time::Duration;

/// How long a body waits before it tries again what failed (policies `ignore` and
/// `stop`), so that a target that is gone neither spins a thread nor floods clients
/// with `BLOCK_JOB_ERROR`: twice as long after each failure, from 100 ms to 5 s.
///
/// The body does the waiting, with [`JobContext::sleep`](crate::JobContext::sleep) or
/// beside its requests, and recomputes what is left after an early wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The first wait.
    pub const FIRST: Duration = Duration::from_millis(100);
    /// The longest wait.
    pub const LONGEST: Duration = Duration::from_secs(5);

    /// Nothing has failed yet.
    pub fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Something has failed: how long to wait from now on.
    pub fn failed(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(Self::LONGEST);
        wait
    }

    /// All went well for a while, or the user has looked after it.
    pub fn reset(&mut self) {
        *self = Self::new();
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Backoff;

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_reset() {
        let mut backoff = Backoff::new();
        let waits: Vec<u128> = (0..9).map(|_| backoff.failed().as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        backoff.reset();
        assert_eq!(backoff.failed(), Backoff::FIRST);
    }

    /// What a client sees at most of a request that always fails: fewer than one
    /// event in four seconds, in the long run.
    #[test]
    fn the_rate_of_failures_is_bounded() {
        let mut backoff = Backoff::new();
        let mut failures = 0;
        let mut at = std::time::Duration::ZERO;
        while at.as_secs() < 600 {
            at += backoff.failed();
            failures += 1;
        }
        assert!(failures < 150, "{failures}");
    }
}
