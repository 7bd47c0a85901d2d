//! The rate limit of a job as plain numbers: slices of 100 ms, a quota in each.
//!
//! Who waits, and on which clock, is not decided here.

use std::time::{Duration, Instant};

/// Length of a slice. A job passes a pause point at least this often.
pub const SLICE: Duration = Duration::from_millis(100);

/// Accounting of one job's rate limit.
///
/// Work may exceed the quota of a slice; the slice is stretched in proportion,
/// and the next request waits for its end. A slice that is over is forgotten, so
/// that an idle time cannot be saved up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RateLimit {
    /// Bytes per second; 0 is no limit.
    speed: u64,
    /// The current slice, if any.
    slice: Option<Slice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    start: Instant,
    end: Instant,
    /// Bytes charged to it.
    done: u64,
}

impl RateLimit {
    pub(crate) fn new(speed: u64) -> Self {
        Self { speed, slice: None }
    }

    /// Bytes per second; 0 is no limit.
    pub(crate) fn speed(&self) -> u64 {
        self.speed
    }

    /// Sets the limit. What was charged to the running slice stays charged; how
    /// long that lasts is computed with the new limit from the next look on.
    ///
    /// Says whether a job that waits now may have to wait less.
    pub(crate) fn set_speed(&mut self, speed: u64) -> bool {
        let faster = self.speed != 0 && (speed == 0 || speed > self.speed);
        self.speed = speed;
        faster
    }

    /// Charges `bytes` and says how long the next request has to wait.
    pub(crate) fn charge(&mut self, now: Instant, bytes: u64) -> Duration {
        if self.speed == 0 {
            self.slice = None;
            return Duration::ZERO;
        }
        // Whether the running slice is over depends on the limit of the last look:
        // what is over is forgotten, even if a lower limit came since.
        let mut slice = match self.slice {
            Some(slice) if now < slice.end => slice,
            _ => Slice {
                start: now,
                end: now + SLICE,
                done: 0,
            },
        };
        slice.done = slice.done.saturating_add(bytes);
        let quota = self.quota();
        let wait = if slice.done < quota {
            slice.end = slice.start + SLICE;
            Duration::ZERO
        } else {
            slice.end = slice.start + stretched(slice.done, quota);
            slice.end.saturating_duration_since(now)
        };
        self.slice = Some(slice);
        wait
    }

    /// Bytes per slice, at least 1.
    fn quota(&self) -> u64 {
        // Ten slices in a second.
        (self.speed / 10).max(1)
    }
}

/// How long a slice with this quota lasts when `done` bytes were charged to it.
fn stretched(done: u64, quota: u64) -> Duration {
    let nanos = u128::from(done) * SLICE.as_nanos() / u128::from(quota);
    // A limit of 1 byte/s and a large chunk give years: bounded, so that no
    // clock arithmetic overflows.
    let most = Duration::from_secs(100 * 365 * 24 * 3600);
    u64::try_from(nanos).map_or(most, |nanos| Duration::from_nanos(nanos).min(most))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{RateLimit, SLICE};

    #[test]
    fn no_limit_never_waits() {
        let mut limit = RateLimit::new(0);
        assert_eq!(limit.charge(Instant::now(), u64::MAX), Duration::ZERO);
    }

    #[test]
    fn work_within_the_quota_does_not_wait_and_a_full_slice_waits_for_its_end() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.charge(start, 60), Duration::ZERO);
        assert_eq!(limit.charge(start, 40), SLICE);
        let later = start + Duration::from_millis(30);
        assert_eq!(limit.charge(later, 0), Duration::from_millis(70));
    }

    #[test]
    fn a_chunk_larger_than_the_quota_is_let_through_and_stretches_the_slice() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.charge(start, 1000), Duration::from_secs(1));
    }

    #[test]
    fn a_slice_that_is_over_is_forgotten() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.charge(start, 100), SLICE);
        assert_eq!(limit.charge(start + SLICE, 0), Duration::ZERO);
        assert_eq!(limit.charge(start + SLICE, 99), Duration::ZERO);
    }

    #[test]
    fn raising_the_limit_shortens_the_wait_and_lowering_it_prolongs_it() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.charge(start, 1000), Duration::from_secs(1));
        assert!(limit.set_speed(10_000));
        assert_eq!(limit.charge(start, 0), SLICE);
        assert!(!limit.set_speed(100));
        assert_eq!(limit.charge(start, 0), Duration::from_secs(10));
        assert!(limit.set_speed(0));
        assert_eq!(limit.charge(start, 0), Duration::ZERO);
        assert!(!limit.set_speed(5), "an unlimited job does not wait");
    }

    #[test]
    fn the_smallest_limit_and_the_largest_chunk_do_not_overflow() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1);
        let wait = limit.charge(start, u64::MAX);
        assert!(wait > Duration::from_secs(1_000_000_000));
        assert_eq!(limit.charge(start, u64::MAX), wait);
    }
}
