//! Timers of one loop.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::event_loop::LoopCore;

/// Who waits for what time.
#[derive(Default)]
pub(super) struct Timers {
    waiting: BTreeMap<(Instant, u64), Waker>,
    next_id: u64,
}

impl Timers {
    /// How long the loop may sleep.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.keys().next().map(|(at, _)| *at)
    }

    /// Takes one timer that is due at `now`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let entry = self.waiting.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}

/// Milliseconds until `at`, rounded up so that no timer is early, as far as
/// epoll can count.
pub(super) fn millis_until(at: Instant, now: Instant) -> i32 {
    let left = at.saturating_duration_since(now);
    let millis = left.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis).unwrap_or(i32::MAX)
}

/// See [`sleep_until`].
struct Sleep {
    at: Instant,
    /// Where the timer is set, once it has been polled.
    set: Option<(Rc<LoopCore>, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let at = self.at;
        let (core, id) = self.set.get_or_insert_with(|| {
            let core = LoopCore::current();
            let mut timers = core.timers.borrow_mut();
            let id = timers.next_id;
            timers.next_id += 1;
            drop(timers);
            (core, id)
        });
        let old = core
            .timers
            .borrow_mut()
            .waiting
            .insert((at, *id), cx.waker().clone());
        // Outside the borrow: a waker may own anything.
        drop(old);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((core, id)) = self.set.take() {
            let old = core.timers.borrow_mut().waiting.remove(&(self.at, id));
            drop(old);
        }
    }
}

/// Waits until `at`; never ends earlier, and under no load less than 2 ms later.
///
/// Thread: one with a loop. Cancel: leaves nothing behind.
pub async fn sleep_until(at: Instant) {
    Sleep { at, set: None }.await;
}

/// The model checker has no clock: time passes when the scheduler says so.
#[cfg(shuttle)]
pub async fn sleep(_: Duration) {
    shuttle::future::yield_now().await;
}

/// Waits for `duration`; see [`sleep_until`].
#[cfg(not(shuttle))]
pub async fn sleep(duration: Duration) {
    match Instant::now().checked_add(duration) {
        Some(at) => sleep_until(at).await,
        // Past what the clock can tell.
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_in_the_order_of_their_times_once_they_are_due() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut timers = Timers::default();
        for (id, millis) in [7, 1, 4, 1].into_iter().enumerate() {
            let waker = Waker::noop().clone();
            timers.waiting.insert((at(millis), id as u64), waker);
        }
        assert!(timers.pop_due(at(0)).is_none());
        for next in [1, 1, 4] {
            assert_eq!(timers.next(), Some(at(next)));
            assert!(timers.pop_due(at(6)).is_some());
        }
        assert!(timers.pop_due(at(6)).is_none());
        assert_eq!(timers.next(), Some(at(7)));
    }

    #[test]
    fn the_time_to_sleep_is_rounded_up() {
        let now = Instant::now();
        assert_eq!(millis_until(now, now), 0);
        assert_eq!(millis_until(now + Duration::from_nanos(1), now), 1);
        assert_eq!(millis_until(now + Duration::from_micros(1001), now), 2);
        assert_eq!(millis_until(now, now + Duration::from_secs(1)), 0);
        assert_eq!(
            millis_until(now + Duration::from_secs(1 << 32), now),
            i32::MAX
        );
    }
}
