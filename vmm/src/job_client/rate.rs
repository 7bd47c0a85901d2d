//! How fast a job is, from what it said of its progress lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is older does not count, if there is enough that is newer.
const WINDOW: Duration = Duration::from_secs(5);
/// More values do not make it better.
const VALUES_MAX: usize = 64;

/// A progress over time.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    /// When it changed, and to what: jobs with a limit go in steps, which may be
    /// seconds apart.
    changes: VecDeque<(Instant, u64)>,
    /// When it was last looked at.
    looked: Option<Instant>,
}

impl Rate {
    /// Notes how far it is.
    pub fn note(&mut self, now: Instant, current: u64) {
        self.looked = Some(now);
        match self.changes.back() {
            Some((_, last)) if *last == current => return,
            // A job that begins anew.
            Some((_, last)) if *last > current => self.changes.clear(),
            _ => {}
        }
        self.changes.push_back((now, current));
        let is_old = |(then, _): &(Instant, u64)| now.duration_since(*then) > WINDOW;
        while self.changes.len() > VALUES_MAX
            || (self.changes.len() > 2 && self.changes.front().is_some_and(is_old))
        {
            self.changes.pop_front();
        }
    }

    /// Bytes per second; `None` as long as nobody knows.
    pub fn per_second(&self) -> Option<u64> {
        let (begin, from) = self.changes.front()?;
        let (_, to) = self.changes.back()?;
        let time = self.looked?.duration_since(*begin);
        if to == from && time < WINDOW || time.is_zero() {
            return None;
        }
        Some((to.saturating_sub(*from) as f64 / time.as_secs_f64()) as u64)
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
        rate.note(start, 7);
        assert_eq!(rate.per_second(), None);
        rate.note(start + Duration::from_secs(60), 7);
        assert_eq!(rate.per_second(), Some(0));
        assert_eq!(rate.time_for(u64::MAX), None);
    }

    #[test]
    fn steps_that_are_far_apart_make_a_rate_too() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for second in 0..100 {
            rate.note(start + Duration::from_secs(second), second / 10 * 1000);
        }
        let rate = rate.per_second().unwrap();
        assert!((50..=100).contains(&rate), "{rate}");
    }

    #[test]
    fn many_small_steps_do_not_pile_up() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for step in 0..10_000 {
            rate.note(start + Duration::from_millis(step), step);
        }
        assert!(rate.changes.len() <= VALUES_MAX);
        assert_eq!(rate.per_second(), Some(1000));
    }
}
