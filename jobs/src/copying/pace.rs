//! How hard the copier may work: the guest comes first.
//!
//! Lives here: the controller that turns what the guest feels (`GuestLatency`) into a
//! window of bytes in flight ([`Pace`]). Not here: the speed limit a user sets (the
//! job core's), and the copying itself.
//!
//! The controller is additive increase, multiplicative decrease. Every
//! [`INTERVAL`] it compares what the guest's requests take, and how many there
//! are, with a baseline. As long as the guest keeps what [`TOLERANCE`] grants it
//! the window grows; if not it is halved, and at its floor the copier also rests
//! between requests. Latency alone would not do: where processors are what is
//! scarce, a guest gets fewer requests done, and each is as fast as before. A
//! guest that asks less of its own accord slows the copier for no reason, but
//! not for longer than until the next calm, and never below the floor.
//!
//! The baseline is measured, not guessed: now and then, and at the start, nothing
//! is copied for three intervals (a *calm*), and what the guest does in the last
//! two is the new baseline. A guest that does nothing costs nothing: the window
//! doubles up to its limit.
//!
//! A mirror that is ready has time: it is to be felt hardly at all
//! ([`READY_TOLERANCE`]), rests longer, and knows no pressure, until it is to end. Nor is
//! one in a hurry whose guest writes the target as well: what is left only becomes less,
//! and the guest pays for that already. Such a copier is *gentle*.
//!
//! Copying still ends: the floor moves data at a rate of its own, and each pass
//! over the disk that leaves about as much dirty as it found doubles the
//! tolerance (*pressure*), up to the point where the guest is not waited for.
//! What then still does not converge is dirtied faster than it can be copied.

use std::time::{Duration, Instant};

use block::Felt;

/// What is dirtied and copied in no time, in bytes: passes over so little say nothing
/// about guest and copier.
pub(crate) const LITTLE: u64 = 256 << 10;
/// Time between two decisions.
pub(crate) const INTERVAL: Duration = Duration::from_millis(10);
/// How many times the baseline's latency, and what part of its rate, is put up with
/// without pressure, in sixteenths: the guest keeps two thirds.
const TOLERANCE: u64 = 24;
/// The same for a backup: what it costs is over the sooner the more is copied, since each
/// of the guest's writes to what is not copied yet costs a copy of its own. The guest keeps
/// half of what it gets done beside those.
pub(crate) const BACKUP_TOLERANCE: u64 = 32;
/// The same for a gentle copier: the guest keeps eight ninths.
const GENTLE_TOLERANCE: u64 = 18;
/// The same when the mirror is ready: the guest keeps sixteen seventeenths.
const READY_TOLERANCE: u64 = 17;
/// Latency over the baseline that is never held against the copier; and when the
/// mirror is ready.
const SLACK_NS: u64 = 50_000;
const READY_SLACK_NS: u64 = 10_000;
/// Time between two calms while the guest is active.
const CALM_EVERY: Duration = Duration::from_secs(2);
/// Intervals of a calm that are measured, after one in which what is in flight ends.
const CALM_MEASURED: u32 = 2;
/// How long a calm waits for what is in flight.
const CALM_PATIENCE: Duration = Duration::from_millis(300);
/// How much longer than the quickest one a request of the copier may take while the guest is
/// active. What takes longer has waited for others at the target, and so do the guest's copies
/// that come after it.
const MAX_QUEUED: Duration = Duration::from_millis(10);
/// Requests per second weigh a quarter of what they were before.
const RATE_WEIGHT: u64 = 4;
/// Longest rest after a floor's worth of requests when the mirror is ready, which leaves it
/// 32 MiB/s of what is long; and for a gentle copier. For others it is the shortest one.
const MAX_READY_REST: Duration = Duration::from_millis(16);
const MAX_GENTLE_REST: Duration = Duration::from_millis(4);
/// Shortest rest that is worth a timer.
const MIN_REST: Duration = Duration::from_millis(1);
/// Pressure when somebody waits for the copier: 16 times the tolerance.
const HURRY_PRESSURE: u32 = 4;
/// Pressure at which the tolerance has no effect any more (1.5 << 8 times).
const MAX_PRESSURE: u32 = 8;

/// What the guest gets when nothing is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Baseline {
    mean_ns: u64,
    /// Requests per second.
    rate: u64,
}

/// Where a calm has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Calm {
    /// What was in flight ends.
    Begins,
    /// The guest is measured.
    Measures,
}

/// The controller. Used by the job's body only.
#[derive(Debug)]
pub(crate) struct Pace {
    floor: u64,
    ceiling: u64,
    window: u64,
    rest: Duration,
    baseline: Option<Baseline>,
    /// Requests of the guest per second, smoothed.
    rate: u64,
    /// See [`TOLERANCE`].
    tolerance: u64,
    pressure: u32,
    ready: bool,
    gentle: bool,
    hurries: bool,
    calm: Option<Calm>,
    next_calm: Instant,
    last_decision: Instant,
    next_decision: Instant,
    /// When the calm began that is, or was last.
    calm_began: Instant,
    /// What the copier's quickest request took, and a quarter more for each calm since.
    quickest: Option<Duration>,
    /// How much longer one has taken since the last decision, at most.
    queued: Duration,
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
            baseline: None,
            rate: 0,
            tolerance: TOLERANCE,
            pressure: 0,
            ready: false,
            gentle: false,
            hurries: false,
            calm: None,
            next_calm: now,
            last_decision: now,
            next_decision: now + INTERVAL,
            calm_began: now,
            quickest: None,
            queued: Duration::ZERO,
        }
    }

    /// Puts up with as many sixteenths of the baseline's latency.
    pub(crate) fn with_tolerance(mut self, sixteenths: u64) -> Self {
        self.tolerance = sixteenths;
        self
    }

    /// Whether nothing is to be started, so that the guest can be measured alone.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm.is_some()
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

    /// Whether a calm has to wait with its measuring, since what the copier has in
    /// flight is not through yet (`busy`), which takes a slow target its time.
    pub(crate) fn is_settling(&self, busy: bool, now: Instant) -> bool {
        busy && self.calm == Some(Calm::Begins)
            && now.saturating_duration_since(self.calm_began) < CALM_PATIENCE
    }

    /// A request of the copier, which moved something, took so long.
    pub(crate) fn note_request(&mut self, took: Duration) {
        let quickest = self.quickest.map_or(took, |quickest| quickest.min(took));
        self.quickest = Some(quickest);
        self.queued = self.queued.max(took - quickest);
    }

    /// Requests of the guest wait for copies, and none has ended since the last
    /// decision: it is not idle, but cannot go on.
    pub(crate) fn guest_waits(&mut self, now: Instant) {
        self.last_decision = now;
        self.next_decision = now + INTERVAL;
        self.rate = self.rate.saturating_mul(RATE_WEIGHT - 1) / RATE_WEIGHT;
        match self.calm {
            Some(Calm::Begins) => {
                self.calm = Some(Calm::Measures);
                self.next_decision = now + INTERVAL * CALM_MEASURED;
            }
            // Nothing was to be learned from it.
            Some(Calm::Measures) => self.calm = None,
            None if self.hurries => {}
            None => self.give_way(),
        }
    }

    /// Adapts to what the guest felt since the last decision.
    pub(crate) fn decide(&mut self, felt: Option<Felt>, now: Instant) {
        let took = now.saturating_duration_since(self.last_decision);
        self.last_decision = now;
        self.next_decision = now + INTERVAL;
        let is_queued = std::mem::take(&mut self.queued) > MAX_QUEUED;
        let Some(felt) = felt else {
            self.calm = None;
            self.next_calm = now;
            self.rest = Duration::ZERO;
            self.window = self.window.saturating_mul(2).min(self.ceiling);
            return;
        };
        let rate = per_second(felt.count, took);
        self.rate = (self.rate.saturating_mul(RATE_WEIGHT - 1)).saturating_add(rate) / RATE_WEIGHT;
        if self.hurries {
            if self.is_fine(felt.mean_ns) {
                self.grow();
            }
            return;
        }
        match self.calm {
            Some(Calm::Begins) => {
                self.calm = Some(Calm::Measures);
                self.next_decision = now + INTERVAL * CALM_MEASURED;
                return;
            }
            Some(Calm::Measures) => {
                self.calm = None;
                // The nodes may have become slower.
                self.quickest = self.quickest.map(|quickest| quickest * 5 / 4);
                self.rate = rate;
                // One calm may have been disturbed by others.
                let before = self.baseline.map_or(0, |before| before.rate);
                self.baseline = Some(Baseline {
                    mean_ns: felt.mean_ns,
                    rate: rate.max(before / 8 * 7),
                });
                return;
            }
            None => {}
        }
        if now >= self.next_calm {
            self.next_calm = now + CALM_EVERY;
            self.calm = Some(Calm::Begins);
            self.calm_began = now;
            return;
        }
        if is_queued || !self.is_fine(felt.mean_ns) {
            self.give_way();
        } else if !self.rest.is_zero() {
            let rest = match self.ready || self.gentle {
                // There is time: it is felt out slowly.
                true => self.rest / 8 * 7,
                false => Duration::ZERO,
            };
            self.rest = if rest < MIN_REST {
                Duration::ZERO
            } else {
                rest
            };
        } else {
            self.grow();
        }
    }

    fn give_way(&mut self) {
        if self.window > self.floor {
            self.window = (self.window / 2).max(self.floor);
        } else {
            let most = match (self.ready, self.gentle) {
                (true, _) => MAX_READY_REST,
                (false, true) => MAX_GENTLE_REST,
                (false, false) => MIN_REST,
            };
            self.rest = (self.rest * 2).clamp(MIN_REST, most);
        }
    }

    fn grow(&mut self) {
        let step = (self.window / 8).max(self.floor / 4);
        self.window = self.window.saturating_add(step).min(self.ceiling);
    }

    /// Whether what is left becomes less however slowly it is copied.
    pub(crate) fn set_gentle(&mut self, gentle: bool) {
        self.gentle = gentle;
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
        self.calm = None;
    }

    /// Notes the end of a pass over the disk: it began with `before` dirty
    /// bytes and left `after`.
    ///
    /// Where little is dirty the scan is soon round again, and a drained section does
    /// the rest: that says nothing about guest and copier.
    pub(crate) fn pass_ended(&mut self, before: u64, after: u64) {
        if before <= LITTLE {
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

    /// Whether the guest keeps what it is to keep, at this mean latency.
    fn is_fine(&self, mean_ns: u64) -> bool {
        let Some(baseline) = self.baseline else {
            return true;
        };
        let (sixteenths, slack) = match (self.ready && !self.hurries, self.gentle) {
            (true, _) => (READY_TOLERANCE, READY_SLACK_NS),
            (false, true) => (GENTLE_TOLERANCE << self.pressure, SLACK_NS),
            (false, false) => (self.tolerance << self.pressure, SLACK_NS),
        };
        let limit_ns = (baseline.mean_ns / 16)
            .saturating_mul(sixteenths)
            .saturating_add(slack);
        let least = baseline.rate.saturating_mul(16) / sixteenths;
        mean_ns <= limit_ns && self.rate >= least
    }
}

fn per_second(count: u64, took: Duration) -> u64 {
    let ns = took.as_nanos().max(1);
    u64::try_from(u128::from(count) * 1_000_000_000 / ns).unwrap_or(u64::MAX)
}

/// Most bytes in flight under this speed limit, in bytes/s: what it lets through in a
/// tenth of a second, or one request. It is charged when requests end, so a whole window
/// would be on its way before the limit is felt.
pub(crate) fn window_of_speed(speed: u64, request: u64) -> u64 {
    match speed {
        0 => u64::MAX,
        speed => (speed / 10).max(request),
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
            let felt = latency(in_flight).map(|mean_ns| Felt {
                mean_ns,
                // Always the same rate.
                count: now.duration_since(pace.last_decision).as_millis() as u64 * 10,
            });
            pace.decide(felt, now);
            now = pace.next_decision;
        }
    }

    /// A guest that gets ever fewer requests done the more is copied, each as fast.
    fn run_starved(pace: &mut Pace, intervals: usize, count: impl Fn(u64) -> u64) {
        for _ in 0..intervals {
            let copying = !pace.is_calm() && pace.rest() < Duration::from_millis(4);
            let now = pace.next_decision;
            let ms = now.duration_since(pace.last_decision).as_millis() as u64;
            let felt = Felt {
                mean_ns: 5_000,
                count: count(if copying { pace.window() } else { 0 }) * ms / 10,
            };
            pace.decide(Some(felt), now);
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
    fn a_backup_puts_up_with_more_than_a_mirror() {
        let felt = |pace: &mut Pace| {
            // As fast alone, and almost twice as slow as long as anything is copied.
            run(pace, 3, |_| Some(1_000_000));
            run(pace, 150, |in_flight| {
                Some(if in_flight > 0 { 1_900_000 } else { 1_000_000 })
            });
            pace.window()
        };
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        assert_eq!(felt(&mut pace), 256 * KIB);
        let mut pace =
            Pace::new(256 * KIB, 16384 * KIB, Instant::now()).with_tolerance(BACKUP_TOLERANCE);
        assert_eq!(felt(&mut pace), 16384 * KIB);
    }

    #[test]
    fn what_waits_at_a_slow_target_is_kept_short_while_the_guest_is_active() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        let mut longest = |guest: Option<u64>| {
            for _ in 0..200 {
                // A target of 64 MiB/s.
                pace.note_request(Duration::from_millis(4));
                pace.note_request(Duration::from_micros(pace.window() / 64));
                run(&mut pace, 1, |_| guest);
            }
            pace.window()
        };
        assert!(longest(Some(1_000_000)) < 1280 * KIB);
        assert_eq!(longest(None), 16384 * KIB, "nobody waits behind it");
    }

    #[test]
    fn a_target_that_has_become_slower_is_not_held_to_what_it_once_did() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        pace.note_request(Duration::from_millis(1));
        let mut window_after = |intervals| {
            for _ in 0..intervals {
                pace.note_request(Duration::from_millis(20));
                run(&mut pace, 1, |_| Some(100_000));
            }
            pace.window()
        };
        assert_eq!(window_after(200), 256 * KIB, "one may have been slow");
        assert_eq!(window_after(4000), 16384 * KIB);
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
        assert_eq!(pace.rest(), MIN_REST);
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
            pace.pass_ended(LITTLE, LITTLE);
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
        assert_eq!(pace.baseline.map(|alone| alone.mean_ns), Some(100_000));
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
    fn a_guest_that_gets_less_done_holds_the_window_down_however_fast_its_requests_are() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        // Half as much with 4 MiB in flight.
        let count = |window: u64| 700 - 350 * window.min(8192 * KIB) / (8192 * KIB);
        run_starved(&mut pace, 600, count);
        let window = pace.window();
        assert!((2048 * KIB..=8192 * KIB).contains(&window), "{window}");
        // When it is ready, any copying is felt too much.
        pace.relax(pace.next_decision);
        run_starved(&mut pace, 60, |window| if window > 0 { 500 } else { 700 });
        assert_eq!(pace.window(), 256 * KIB);
        assert!(pace.rest() >= Duration::from_millis(2), "{:?}", pace.rest());
    }

    #[test]
    fn a_guest_whose_requests_wait_is_not_idle() {
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, Instant::now());
        run(&mut pace, 150, |_| Some(100_000));
        assert_eq!(pace.window(), 16384 * KIB);
        let mut now = pace.next_decision;
        for _ in 0..20 {
            pace.guest_waits(now);
            now = pace.next_decision;
        }
        assert_eq!((pace.window(), pace.rest()), (256 * KIB, MIN_REST));
    }

    #[test]
    fn a_calm_measures_when_what_was_in_flight_has_ended_or_takes_too_long() {
        let begun = Instant::now();
        let mut pace = Pace::new(256 * KIB, 16384 * KIB, begun);
        assert!(!pace.is_settling(true, begun), "there is no calm yet");
        run(&mut pace, 1, |_| Some(100_000));
        let now = pace.next_decision;
        assert!(pace.is_calm() && pace.is_settling(true, now));
        assert!(!pace.is_settling(false, now));
        assert!(!pace.is_settling(true, now + CALM_PATIENCE));
        // A guest that cannot go on tells nothing, and ends the calm.
        pace.guest_waits(now);
        assert!(pace.is_calm() && !pace.is_settling(true, now));
        pace.guest_waits(pace.next_decision);
        assert!(!pace.is_calm());
        assert_eq!(pace.baseline, None);
    }
}
