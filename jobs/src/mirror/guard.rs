//! Whether the mirror gets on: how fast the guest dirties the disk, how fast that is
//! copied, and whether what is left becomes less.
//!
//! Pure: times and counts in, a judgement out. `body` looks, and acts on it.

use std::time::{Duration, Instant};

use crate::CopyRates;

/// Time between two looks.
const SAMPLE: Duration = Duration::from_secs(1);
/// Time without any progress after which a mirror counts as stalled.
pub(super) const STALL: Duration = Duration::from_secs(10);

/// What a look sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    /// Bytes that are dirty or on their way.
    pub(super) left: u64,
    /// Bytes that the copier has done, ever.
    pub(super) done: u64,
    /// The mirror is on its way to being ready, or to its end: what is left is to
    /// become less.
    pub(super) waits: bool,
    /// The user has chosen a speed limit.
    pub(super) is_limited: bool,
}

/// Watches one mirror.
#[derive(Debug)]
pub(super) struct Guard {
    began: Instant,
    deadline: Option<Duration>,
    stall_after: Duration,
    looked: Instant,
    left: u64,
    done: u64,
    /// Bytes per second; `None` before there was a look.
    rates: Option<(u64, u64)>,
    /// Looks in a row that found something newly dirty.
    dirtying: u32,
    /// What is left was to become less at the last look.
    waits: bool,
    /// The least that was left, and since when.
    best: (u64, Instant),
    is_stalled: bool,
}

impl Guard {
    pub(super) fn new(deadline: Option<Duration>, stall_after: Duration, now: Instant) -> Self {
        Self {
            began: now,
            deadline,
            stall_after,
            looked: now,
            left: 0,
            done: 0,
            rates: None,
            dirtying: 0,
            waits: true,
            best: (u64::MAX, now),
            is_stalled: false,
        }
    }

    /// What was before `now` says nothing.
    pub(super) fn begin(&mut self, left: u64, done: u64, now: Instant) {
        self.looked = now;
        (self.left, self.done) = (left, done);
        self.best = (left, now);
    }

    /// The time between these two does not count: the job was parked. After a short one
    /// the best stays what it was, or frequent drained sections would hide a stall.
    pub(super) fn rested(&mut self, from: Instant, left: u64, done: u64, now: Instant) {
        let time = now.saturating_duration_since(from);
        if time >= SAMPLE.min(self.stall_after) {
            self.begin(left, done, now);
        } else {
            self.looked += time;
            self.best.1 += time;
        }
    }

    /// Whether it is time to look.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.looked) >= SAMPLE.min(self.stall_after)
    }

    /// Looks. `true`: the mirror has stalled since the last look.
    pub(super) fn look(&mut self, sight: Sight, now: Instant) -> bool {
        let took = now.saturating_duration_since(self.looked);
        let copied = sight.done.saturating_sub(self.done);
        let dirtied = sight.left.saturating_add(copied).saturating_sub(self.left);
        let (dirty, copy) = (per_second(dirtied, took), per_second(copied, took));
        self.rates = Some(match self.rates {
            Some(before) => (mean(before.0, dirty), mean(before.1, copy)),
            None => (dirty, copy),
        });
        self.dirtying = match dirtied {
            0 => 0,
            _ => self.dirtying.saturating_add(1),
        };
        self.waits = sight.waits;
        self.looked = now;
        (self.left, self.done) = (sight.left, sight.done);

        // With a limit and a guest that does not write, slowness is what the user wants.
        let is_chosen = sight.is_limited && dirtied == 0;
        if sight.left < self.best.0 || sight.left == 0 || !sight.waits || is_chosen {
            self.best = (sight.left, now);
        }
        let stalled = now.saturating_duration_since(self.best.1) >= self.stall_after;
        let newly = stalled && !self.is_stalled;
        self.is_stalled = stalled;
        newly
    }

    /// For how long what is left has got no less.
    pub(super) fn stuck_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.best.1)
    }

    /// The deadline, if it is over.
    pub(super) fn missed(&self, now: Instant) -> Option<Duration> {
        self.deadline
            .filter(|deadline| now.saturating_duration_since(self.began) >= *deadline)
    }

    /// What clients are shown. Of a mirror that is ready, and only has to keep up, nothing
    /// while the guest does not write for longer than a moment.
    pub(super) fn rates(&self) -> CopyRates {
        let rates = self.rates.filter(|_| self.waits || self.dirtying > 1);
        let (dirty, copy) = rates.unwrap_or_default();
        CopyRates {
            dirty,
            copy,
            eta: match copy.saturating_sub(dirty) {
                0 => None,
                gain => Some(self.left.div_ceil(gain)),
            },
            is_stalled: self.is_stalled,
        }
    }
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    let ms = took.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / ms).unwrap_or(u64::MAX)
}

fn mean(a: u64, b: u64) -> u64 {
    a / 2 + b / 2 + (a & b & 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Looks once a second at what is left, the copier doing `copied` in each.
    fn watch(guard: &mut Guard, began: Instant, lefts: &[u64], copied: u64) -> Vec<usize> {
        let limited = Sight {
            left: 0,
            done: 0,
            waits: true,
            is_limited: false,
        };
        let mut stalls = Vec::new();
        for (second, left) in lefts.iter().enumerate() {
            let now = began + Duration::from_secs(second as u64 + 1);
            let sight = Sight {
                left: *left,
                done: copied * (second as u64 + 1),
                ..limited
            };
            if guard.look(sight, now) {
                stalls.push(second);
            }
        }
        stalls
    }

    fn guard(left: u64) -> (Guard, Instant) {
        let began = Instant::now();
        let mut guard = Guard::new(None, STALL, began);
        guard.begin(left, 0, began);
        (guard, began)
    }

    #[test]
    fn rates_tell_what_is_dirtied_and_copied_and_when_it_ends() {
        let (mut guard, began) = guard(100 * MIB);
        // 10 MiB/s are copied and 4 MiB/s dirtied: 6 MiB/s are gained.
        watch(&mut guard, began, &[94 * MIB, 88 * MIB], 10 * MIB);
        let rates = guard.rates();
        assert_eq!((rates.dirty, rates.copy), (4 * MIB, 10 * MIB));
        assert_eq!(rates.eta, Some(15));
        assert!(!rates.is_stalled);
    }

    #[test]
    fn a_mirror_stalls_when_the_least_that_was_left_gets_no_less() {
        let (mut guard, began) = guard(100 * MIB);
        let lefts: Vec<u64> = (0..25).map(|n| (90 + n % 3) * MIB).collect();
        let stalls = watch(&mut guard, began, &lefts, 5 * MIB);
        assert_eq!(stalls, [10], "told once, 10 s after the best");
        let last = began + Duration::from_secs(25);
        assert_eq!(guard.stuck_for(last), Duration::from_secs(24));
        assert!(guard.rates().is_stalled);
        let again = watch(&mut guard, began + Duration::from_secs(25), &[80 * MIB], 0);
        assert!(again.is_empty() && !guard.rates().is_stalled);
    }

    #[test]
    fn short_rests_do_not_hide_a_stall_and_do_not_count() {
        let (mut guard, mut now) = guard(100 * MIB);
        let mut stalls = 0;
        let second = Duration::from_secs(1);
        for _ in 0..12 {
            let sight = Sight {
                left: 100 * MIB,
                done: 0,
                waits: true,
                is_limited: false,
            };
            now += second / 2;
            guard.rested(now, 100 * MIB, 0, now + second / 2);
            now += second;
            stalls += u32::from(guard.look(sight, now));
        }
        assert_eq!(guard.stuck_for(now), second * 12);
        assert_eq!(stalls, 1);
        guard.rested(now, 100 * MIB, 0, now + 60 * second);
        assert_eq!(guard.stuck_for(now + 60 * second), Duration::ZERO);
    }

    #[test]
    fn a_slow_limit_on_an_idle_guest_is_no_stall() {
        let (mut guard, began) = guard(100 * MIB);
        for second in 1..60 {
            let sight = Sight {
                left: 100 * MIB,
                done: 0,
                waits: true,
                is_limited: true,
            };
            assert!(!guard.look(sight, began + Duration::from_secs(second)));
        }
    }

    #[test]
    fn a_ready_mirror_does_not_stall() {
        let (mut guard, began) = guard(MIB);
        for second in 1..60 {
            let sight = Sight {
                left: MIB,
                done: second * MIB,
                waits: false,
                is_limited: false,
            };
            assert!(!guard.look(sight, began + Duration::from_secs(second)));
        }
    }

    #[test]
    fn a_ready_mirror_shows_rates_only_while_the_guest_goes_on_writing() {
        let (mut guard, began) = guard(0);
        let mut shown = Vec::new();
        for (second, copied) in [(1, 0), (2, 1), (3, 0), (4, 2), (5, 2), (6, 2), (7, 0)] {
            let sight = Sight {
                left: 0,
                done: guard.done + copied * MIB,
                waits: false,
                is_limited: false,
            };
            guard.look(sight, began + Duration::from_secs(second));
            shown.push(guard.rates().dirty > 0);
        }
        assert_eq!(shown, [false, false, false, false, true, true, false]);
    }

    #[test]
    fn a_deadline_is_missed_when_it_is_over_and_not_before() {
        let now = Instant::now();
        let deadline = Duration::from_secs(5);
        let guard = Guard::new(Some(deadline), STALL, now);
        assert_eq!(guard.missed(now + Duration::from_secs(4)), None);
        assert_eq!(guard.missed(now + deadline), Some(deadline));
        let none = Guard::new(None, STALL, now);
        assert_eq!(none.missed(now + Duration::from_secs(1 << 40)), None);
    }
}
