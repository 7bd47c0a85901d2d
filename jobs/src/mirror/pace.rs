//! How hard the copier may work: the guest comes first.
//!
//! Lives here: the measure of what the guest feels ([`GuestLatency`]) and the
//! controller that turns it into a window of bytes in flight ([`Pace`]). Not
//! here: the speed limit a user sets (the job core's), and the copying itself.
//!
//! The controller is additive increase, multiplicative decrease. Every
//! [`INTERVAL`] it compares the mean latency of the guest's requests with a
//! baseline. Up to [`TOLERANCE`] times the baseline (plus a little slack) the
//! window grows, past it it is halved, and at its floor the copier also rests
//! between requests. The baseline is measured, not guessed: now and then, and at
//! the start, nothing is copied for two intervals (a *calm*) and the second one's
//! mean is the new baseline. A guest that does nothing costs nothing: the window
//! doubles up to its limit.
//!
//! A mirror that is ready has time: it is to be felt hardly at all
//! ([`READY_TOLERANCE`]), rests longer, and knows no pressure, until it is to end.
//!
//! Copying still ends: the floor moves data at a rate of its own, and each pass
//! over the disk that leaves about as much dirty as it found doubles the
//! tolerance (*pressure*), up to the point where the guest is not waited for.
//! What then still does not converge is dirtied faster than it can be copied.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::converge::SECTION_BYTES;

/// Time between two decisions.
pub(crate) const INTERVAL: Duration = Duration::from_millis(10);
/// Mean latency over baseline that is put up with, without pressure.
pub(crate) const TOLERANCE: u64 = 2;
/// What is put up with beyond the baseline when the mirror is ready: 1/8 of it.
const READY_TOLERANCE: u64 = 8;
/// Latency over the baseline that is never held against the copier; and when the
/// mirror is ready.
const SLACK_NS: u64 = 50_000;
const READY_SLACK_NS: u64 = 10_000;
/// Time between two calms while the guest is active.
const CALM_EVERY: Duration = Duration::from_secs(2);
/// Length of a calm in intervals; the last one is measured.
const CALM_INTERVALS: u8 = 2;
/// Longest rest between two requests at the floor; and when the mirror is ready, which
/// leaves it 32 MiB/s.
const MAX_REST: Duration = Duration::from_millis(1);
const MAX_READY_REST: Duration = Duration::from_millis(8);
/// Shortest rest that is worth a timer.
const MIN_REST: Duration = Duration::from_millis(1);
/// Pressure when somebody waits for the copier: 16 times the tolerance.
const HURRY_PRESSURE: u32 = 4;
/// Pressure at which the tolerance has no effect any more (2 << 8 times).
const MAX_PRESSURE: u32 = 8;

/// Latency of the guest's requests since it was last asked for.
///
/// Both fields are atomics that any iothread adds to; a reader may see the one
/// without the other for an instant, which the mean survives.
#[derive(Debug, Default)]
pub(crate) struct GuestLatency {
    sum_ns: AtomicU64,
    count: AtomicU64,
}

impl GuestLatency {
    /// Notes one request that took `took`. Two relaxed additions.
    pub(crate) fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX >> 16);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Mean latency in nanoseconds of the requests since the last call; `None`
    /// if there were none.
    pub(crate) fn take_mean_ns(&self) -> Option<u64> {
        let count = self.count.swap(0, Ordering::Relaxed);
        let sum = self.sum_ns.swap(0, Ordering::Relaxed);
        sum.checked_div(count)
    }
}

/// The controller. Used by the job's body only.
#[derive(Debug)]
pub(crate) struct Pace {
    floor: u64,
    ceiling: u64,
    window: u64,
    rest: Duration,
    baseline_ns: Option<u64>,
    pressure: u32,
    ready: bool,
    hurries: bool,
    calm_left: u8,
    next_calm: Instant,
    next_decision: Instant,
}

impl Pace {
    /// A controller for a window of `floor..=ceiling` bytes; a guest that turns out to
    /// be active gets a calm at once.
    pub(crate) fn new(floor: u64, ceiling: u64, now: Instant) -> Self {
        let floor = floor.min(ceiling);
        Self {
            floor,
            ceiling,
            window: floor,
            rest: Duration::ZERO,
            baseline_ns: None,
            pressure: 0,
            ready: false,
            hurries: false,
            calm_left: 0,
            next_calm: now,
            next_decision: now + INTERVAL,
        }
    }

    /// Whether nothing is to be started, so that the guest can be measured alone.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm_left > 0
    }

    /// Bytes that may be in flight. One request may always be, whatever its size.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// The smallest window in bytes; after as much, the copier rests if it has to.
    pub(crate) fn floor(&self) -> u64 {
        self.floor
    }

    /// Rest before the next request; zero if there is no need.
    pub(crate) fn rest(&self) -> Duration {
        self.rest
    }

    /// Whether it is time for [`decide`](Self::decide).
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        now >= self.next_decision
    }

    /// Adapts to the mean latency of the guest's requests in the last interval.
    pub(crate) fn decide(&mut self, guest_mean_ns: Option<u64>, now: Instant) {
        self.next_decision = now + INTERVAL;
        let Some(mean) = guest_mean_ns else {
            self.calm_left = 0;
            self.next_calm = now;
            self.rest = Duration::ZERO;
            self.window = self.window.saturating_mul(2).min(self.ceiling);
            return;
        };
        if self.hurries {
            if mean <= self.limit_ns() {
                self.grow();
            }
            return;
        }
        if self.calm_left > 0 {
            self.calm_left -= 1;
            if self.calm_left == 0 {
                self.baseline_ns = Some(mean);
            }
            return;
        }
        if now >= self.next_calm {
            self.next_calm = now + CALM_EVERY;
            self.calm_left = CALM_INTERVALS;
            return;
        }
        if mean > self.limit_ns() {
            if self.window > self.floor {
                self.window = (self.window / 2).max(self.floor);
            } else {
                let most = if self.ready { MAX_READY_REST } else { MAX_REST };
                self.rest = (self.rest * 2).clamp(MIN_REST, most);
            }
        } else if !self.rest.is_zero() {
            self.rest = match self.rest / 2 {
                rest if rest < MIN_REST => Duration::ZERO,
                rest => rest,
            };
        } else {
            self.grow();
        }
    }

    fn grow(&mut self) {
        let step = (self.window / 8).max(self.floor / 4);
        self.window = self.window.saturating_add(step).min(self.ceiling);
    }

    /// The mirror is ready: what the way there took is over, and what the guest feels
    /// is measured anew.
    pub(crate) fn relax(&mut self, now: Instant) {
        self.pressure = 0;
        self.ready = true;
        self.next_calm = now;
    }

    /// The mirror is to end: somebody waits for the copier now, and what is left is
    /// little. So it does not give way any more, nor measure.
    pub(crate) fn hurry(&mut self) {
        self.pressure = self.pressure.max(HURRY_PRESSURE);
        self.rest = Duration::ZERO;
        self.hurries = true;
        self.calm_left = 0;
    }

    /// Notes the end of a pass over the disk: it began with `before` dirty
    /// bytes and left `after`.
    ///
    /// Where little is dirty the scan is soon round again, and a drained section does
    /// the rest: that says nothing about guest and copier.
    pub(crate) fn pass_ended(&mut self, before: u64, after: u64) {
        if before <= SECTION_BYTES {
            return;
        }
        if after > before / 4 * 3 {
            self.pressure = (self.pressure + 1).min(MAX_PRESSURE);
        } else if after < before / 2 {
            self.pressure = self.pressure.saturating_sub(1);
        }
    }

    /// How often in a row passes did not help, bounded.
    pub(crate) fn pressure(&self) -> u32 {
        self.pressure
    }

    /// Whether the guest is not waited for any more, because nothing else helps.
    pub(crate) fn is_at_full_pressure(&self) -> bool {
        self.pressure == MAX_PRESSURE
    }

    fn limit_ns(&self) -> u64 {
        let baseline = self.baseline_ns.unwrap_or(u64::MAX);
        if self.ready && !self.hurries {
            return baseline
                .saturating_add(baseline / READY_TOLERANCE)
                .saturating_add(READY_SLACK_NS);
        }
        baseline
            .saturating_mul(TOLERANCE << self.pressure)
            .saturating_add(SLACK_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    /// A guest whose latency grows with what the copier has in flight.
    fn run(pace: &mut Pace, intervals: usize, latency: impl Fn(u64) -> Option<u64>) {
        let mut now = pace.next_decision;
        for _ in 0..intervals {
            let in_flight = if pace.is_calm() { 0 } else { pace.window() };
            pace.decide(latency(in_flight), now);
            now += INTERVAL;
        }
    }

    #[test]
    fn an_idle_guest_leaves_the_whole_window_to_the_copier() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 10, |_| None);
        assert_eq!(pace.window(), 16384 * KIB);
        assert_eq!(pace.rest(), Duration::ZERO);
    }

    #[test]
    fn a_guest_that_does_not_feel_the_copying_does_not_slow_it() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 150, |_| Some(100_000));
        assert_eq!(pace.window(), 16384 * KIB);
    }

    #[test]
    fn a_guest_that_feels_the_copying_holds_the_window_down() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        // 100 us alone, and 100 us more for each MiB in flight.
        run(&mut pace, 1000, |window| {
            Some(100_000 + 100_000 * window / (1024 * KIB))
        });
        let window = pace.window();
        assert!((256 * KIB..=4096 * KIB).contains(&window), "{window}");
    }

    #[test]
    fn at_the_floor_the_copier_rests_and_recovers() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 3, |_| Some(100_000));
        run(&mut pace, 20, |_| Some(1_000_000));
        assert_eq!(pace.window(), 256 * KIB);
        assert_eq!(pace.rest(), MAX_REST);
        run(&mut pace, 20, |_| Some(100_000));
        assert_eq!(pace.rest(), Duration::ZERO);
        assert!(pace.window() > 256 * KIB);
    }

    #[test]
    fn a_workload_that_changed_gets_a_new_baseline() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 10, |_| Some(100_000));
        // Ten times as slow by itself, whatever the copier does.
        run(&mut pace, 600, |_| Some(1_000_000));
        assert_eq!(pace.window(), 16384 * KIB);
    }

    #[test]
    fn passes_without_progress_raise_the_pressure_until_the_guest_is_not_waited_for() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        for _ in 0..20 {
            pace.pass_ended(1024 * KIB, 1024 * KIB);
        }
        assert!(pace.is_at_full_pressure());
        run(&mut pace, 400, |window| Some(100_000 + window / 10));
        assert_eq!(pace.window(), 16384 * KIB);
        for _ in 0..20 {
            pace.pass_ended(1024 * KIB, 100 * KIB);
        }
        assert_eq!(pace.pressure(), 0);
    }

    #[test]
    fn passes_over_little_raise_no_pressure() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        for _ in 0..20 {
            pace.pass_ended(SECTION_BYTES, SECTION_BYTES);
        }
        assert_eq!(pace.pressure(), 0);
    }

    #[test]
    fn a_mirror_that_became_ready_gives_way_to_the_guest_again() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        for _ in 0..20 {
            pace.pass_ended(1024 * KIB, 1024 * KIB);
        }
        let latency = |window: u64| Some(100_000 + 100_000 * window / (1024 * KIB));
        run(&mut pace, 1000, latency);
        assert_eq!(pace.window(), 16384 * KIB);
        pace.relax(pace.next_decision);
        run(&mut pace, 100, latency);
        let window = pace.window();
        assert!(window <= 4096 * KIB, "{window}");
    }

    #[test]
    fn a_mirror_that_ends_gives_way_no_more() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 50, |_| Some(100_000));
        let window = pace.window();
        assert!(window > 256 * KIB);
        // Somewhere in a calm.
        pace.next_calm = pace.next_decision;
        run(&mut pace, 1, |_| Some(100_000));
        assert!(pace.is_calm());
        pace.hurry();
        assert!(!pace.is_calm());
        run(&mut pace, 1000, |_| Some(1_000_000_000));
        assert_eq!(pace.window(), window);
        assert_eq!(pace.rest(), Duration::ZERO);
    }

    #[test]
    fn the_guest_is_measured_while_nothing_is_copied() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        assert!(!pace.is_calm(), "nothing is known of the guest yet");
        // Slow as long as anything is copied.
        for _ in 0..3 {
            let mean = if pace.is_calm() { 100_000 } else { 900_000 };
            run(&mut pace, 1, |_| Some(mean));
        }
        assert_eq!(pace.baseline_ns, Some(100_000));
        assert!(!pace.is_calm());
    }

    #[test]
    fn an_idle_guest_ends_a_calm() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 1, |_| Some(100_000));
        assert!(pace.is_calm());
        run(&mut pace, 1, |_| None);
        assert!(!pace.is_calm());
    }

    #[test]
    fn a_ready_mirror_is_hardly_felt_until_it_is_to_end() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        let latency = |window: u64| Some(200_000 + 100_000 * window / (1024 * KIB));
        run(&mut pace, 3, |_| Some(200_000));
        run(&mut pace, 150, latency);
        assert!(pace.window() > 1024 * KIB);
        pace.relax(pace.next_decision);
        run(&mut pace, 3, |_| Some(200_000));
        run(&mut pace, 50, |_| Some(300_000));
        assert_eq!(
            (pace.window(), pace.rest()),
            (256 * KIB, MAX_READY_REST),
            "half as slow again is too much"
        );
        pace.hurry();
        run(&mut pace, 50, |_| Some(300_000));
        assert!(pace.window() > 1024 * KIB && pace.rest().is_zero());
    }

    #[test]
    fn latency_is_a_mean_and_starts_anew() {
        let latency = GuestLatency::default();
        assert_eq!(latency.take_mean_ns(), None);
        latency.record(Duration::from_nanos(100));
        latency.record(Duration::from_nanos(300));
        assert_eq!(latency.take_mean_ns(), Some(200));
        assert_eq!(latency.take_mean_ns(), None);
    }
}
