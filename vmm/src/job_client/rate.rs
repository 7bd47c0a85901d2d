//! How fast a job is, from what it said of its progress lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is older does not count.
const WINDOW: Duration = Duration::from_secs(5);
/// More values do not make it better.
const VALUES_MAX: usize = 64;

/// A progress over time.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    values: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// Notes how far it is.
    pub fn note(&mut self, now: Instant, current: u64) {
        // A job that begins anew.
        if self.values.back().is_some_and(|(_, last)| *last > current) {
            self.values.clear();
        }
        self.values.push_back((now, current));
        while self.values.len() > VALUES_MAX
            || self
                .values
                .front()
                .is_some_and(|(then, _)| now.duration_since(*then) > WINDOW)
        {
            self.values.pop_front();
        }
    }

    /// Bytes per second; `None` as long as nobody knows.
    pub fn per_second(&self) -> Option<u64> {
        let (begin, from) = self.values.front()?;
        let (end, to) = self.values.back()?;
        let seconds = end.duration_since(*begin).as_secs_f64();
        (seconds > 0.0).then(|| (to.saturating_sub(*from) as f64 / seconds) as u64)
    }

    /// How long so many bytes will take; `None` if nobody knows.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        let rate = self.per_second().filter(|rate| *rate > 0)?;
        Some(Duration::from_secs(bytes.div_ceil(rate)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(), None);
        rate.note(start, 1 << 40);
        assert_eq!(rate.per_second(), None);
        // It began anew; then 100 bytes a second, later 10.
        for second in 0..20 {
            let moment = start + Duration::from_secs(second);
            rate.note(
                moment,
                100 * second.min(10) + 10 * second.saturating_sub(10),
            );
        }
        assert_eq!(rate.per_second(), Some(10));
        assert_eq!(rate.time_for(95), Some(Duration::from_secs(10)));
    }

    #[test]
    fn a_job_that_stands_still_has_no_time_left() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for second in 0..1000 {
            rate.note(start + Duration::from_secs(second), 7);
        }
        assert_eq!(rate.per_second(), Some(0));
        assert_eq!(rate.time_for(u64::MAX), None);
        assert!(rate.values.len() <= VALUES_MAX);
    }
}
