//! In-flight accounting of a backend: requests are counted in and out, a
//! drained section closes the gate and waits for the count to become zero.
//!
//! What is drained, and why, is `graph::drain`'s business.
//!
//! # How no wake-up is lost
//!
//! Two pairs of threads meet here, both as in Dekker's algorithm: each writes
//! its own word, then reads the other's, all sequentially consistent.
//!
//! - A request adds itself to its shard, then reads `closed`. A drainer closes,
//!   then sums the shards. So either the request sees the closed gate and backs
//!   out, or the drainer sees the request.
//! - A request leaves its shard, then reads `closed`. So the last one out either
//!   sees the closed gate and wakes the drainer, or left before the drainer
//!   summed.
//!
//! Wakers are registered under the mutex, and the condition is tested after
//! that.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::leaf;
use crate::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// Threads count on different cache lines, as far as there are not more of them.
#[cfg(not(shuttle))]
const SHARDS: usize = 16;
#[cfg(shuttle)]
const SHARDS: usize = 2;

#[repr(align(128))]
#[derive(Default)]
struct Shard(AtomicUsize);

/// Where a request was counted. Its [`Gate::leave`] has to name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardIndex(usize);

impl ShardIndex {
    /// A small number; threads have different ones, as far as there are not more of them.
    pub(crate) fn index(self) -> usize {
        self.0
    }

    /// The shard of the calling thread.
    #[cfg(not(shuttle))]
    pub(crate) fn current() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        std::thread_local! {
            static INDEX: usize = NEXT.fetch_add(1, SeqCst) % SHARDS;
        }
        Self(INDEX.with(|index| *index))
    }

    /// The shard of the calling task of the model checker.
    #[cfg(shuttle)]
    pub(crate) fn current() -> Self {
        Self(usize::from(shuttle::current::me()) % SHARDS)
    }
}

/// Counts requests in flight and holds new ones back while closed.
pub(crate) struct Gate {
    /// Requests in flight by shard. Each is never below zero, because a request
    /// leaves the shard that it entered.
    shards: [Shard; SHARDS],
    /// Number of drained sections that keep the gate closed.
    closed: AtomicUsize,
    /// Whether requests wait while closed; else they are only counted. Set once.
    holds: bool,
    /// Who is to be woken. A leaf lock, taken only when someone waits or a
    /// section begins or ends.
    wakers: Mutex<Wakers>,
}

#[derive(Default)]
struct Wakers {
    /// Held requests, in order of arrival.
    entering: Vec<(u64, Waker)>,
    /// Drainers by the number of their section.
    draining: Vec<(u64, Waker)>,
    /// Next key for `entering`.
    next: u64,
}

impl Gate {
    /// An open gate. With `holds`, requests wait while it is closed.
    pub(crate) fn new(holds: bool) -> Self {
        Self {
            shards: Default::default(),
            closed: AtomicUsize::new(0),
            holds,
            wakers: Mutex::new(Wakers::default()),
        }
    }

    /// Whether requests wait while the gate is closed.
    pub(crate) fn holds(&self) -> bool {
        self.holds
    }

    /// Counts a request in, unless the gate is closed and holds.
    pub(crate) fn try_enter(&self) -> Option<ShardIndex> {
        leaf::assert_none_held("a request was begun");
        let shard = ShardIndex::current();
        self.shards[shard.0].0.fetch_add(1, SeqCst);
        if !self.holds || self.closed.load(SeqCst) == 0 {
            return Some(shard);
        }
        // A drainer may have counted this attempt, so leave as a request does.
        self.leave(shard);
        None
    }

    /// Counts a request in as soon as the gate is open.
    ///
    /// Cancel: nothing is counted, nobody else's turn is lost.
    pub(crate) fn enter(&self) -> Enter<'_> {
        Enter {
            gate: self,
            key: None,
        }
    }

    /// Counts a request out.
    pub(crate) fn leave(&self, shard: ShardIndex) {
        let before = self.shards[shard.0].0.fetch_sub(1, SeqCst);
        debug_assert!(before > 0, "a request leaves once");
        // Of several last ones, the one whose subtraction comes last sees zero.
        if self.closed.load(SeqCst) != 0 && self.in_flight() == 0 {
            self.wake_drainers();
        }
    }

    /// Requests counted in. Exact when the gate is closed and the sum is zero;
    /// else a glimpse.
    pub(crate) fn in_flight(&self) -> usize {
        self.shards.iter().map(|s| s.0.load(SeqCst)).sum()
    }

    /// Whether a section keeps the gate closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(SeqCst) != 0
    }

    /// Begins a section. Requests that come later are held.
    pub(crate) fn close(&self) {
        self.closed.fetch_add(1, SeqCst);
    }

    /// Ends a section. The last end lets the held requests go on, in order.
    pub(crate) fn open(&self) {
        let before = self.closed.fetch_sub(1, SeqCst);
        debug_assert!(before > 0, "each section ends once");
        if before == 1 {
            let held = std::mem::take(&mut lock(&self.wakers).entering);
            for (_, waker) in held {
                waker.wake();
            }
        }
    }

    /// Whether no request is in flight; if there is one, `waker` is woken when
    /// there may be none any more. `section` names the drainer.
    pub(crate) fn poll_idle(&self, section: u64, waker: &Waker) -> bool {
        {
            let mut wakers = lock(&self.wakers);
            match wakers.draining.iter_mut().find(|(id, _)| *id == section) {
                Some((_, known)) => known.clone_from(waker),
                None => wakers.draining.push((section, waker.clone())),
            }
        }
        self.in_flight() == 0
    }

    /// `section` does not wait any more.
    pub(crate) fn forget_drainer(&self, section: u64) {
        let mut wakers = lock(&self.wakers);
        wakers.draining.retain(|(id, _)| *id != section);
    }

    /// Lets those who wait for idleness look again.
    pub(crate) fn wake_drainers(&self) {
        let drainers: Vec<Waker> = lock(&self.wakers)
            .draining
            .iter()
            .map(|(_, waker)| waker.clone())
            .collect();
        for waker in drainers {
            waker.wake();
        }
    }
}

/// A request that wants in. See [`Gate::enter`].
pub(crate) struct Enter<'a> {
    gate: &'a Gate,
    /// Our place among the held requests.
    key: Option<u64>,
}

impl Future for Enter<'_> {
    type Output = ShardIndex;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<ShardIndex> {
        loop {
            if let Some(shard) = self.gate.try_enter() {
                self.forget();
                return Poll::Ready(shard);
            }
            let gate = self.gate;
            let mut wakers = lock(&gate.wakers);
            // `open` lowers `closed` before it takes the list under this lock, so
            // what we register while it is closed will be woken.
            if !gate.is_closed() {
                continue;
            }
            let place = self
                .key
                .and_then(|key| wakers.entering.iter().position(|(k, _)| *k == key));
            match place {
                Some(place) => wakers.entering[place].1.clone_from(cx.waker()),
                None => {
                    let key = wakers.next;
                    wakers.next += 1;
                    wakers.entering.push((key, cx.waker().clone()));
                    self.key = Some(key);
                }
            }
            return Poll::Pending;
        }
    }
}

impl Enter<'_> {
    fn forget(&mut self) {
        if let Some(key) = self.key.take() {
            let mut wakers = lock(&self.gate.wakers);
            wakers.entering.retain(|(k, _)| *k != key);
        }
    }
}

impl Drop for Enter<'_> {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(all(test, shuttle))]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;

    use shuttle::future::block_on;
    use shuttle::thread;

    use super::*;

    const RUNS: usize = 3_000;

    /// Under random switches, and under few of them between threads that run by
    /// priority.
    fn check(test: impl Fn() + Send + Sync + Copy + 'static) {
        shuttle::check_random(test, RUNS);
        shuttle::check_pct(test, RUNS, 3);
    }

    /// A request in flight while it is counted in; the drainer looks at it.
    fn request(gate: &Gate, active: &AtomicUsize) {
        let shard = block_on(gate.enter());
        active.fetch_add(1, SeqCst);
        active.fetch_sub(1, SeqCst);
        gate.leave(shard);
    }

    fn drain(gate: &Gate, active: &AtomicUsize, section: u64) {
        gate.close();
        block_on(poll_fn(|cx| match gate.poll_idle(section, cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }));
        // Nobody comes in until the section ends.
        for _ in 0..2 {
            assert_eq!(active.load(SeqCst), 0, "a request in a drained section");
            thread::yield_now();
        }
        gate.forget_drainer(section);
        gate.open();
    }

    // A lost wake-up is a deadlock, which shuttle reports.
    #[test]
    fn shuttle_requests_and_a_drainer_wake_each_other_and_never_overlap() {
        check(|| {
            let gate = Arc::new(Gate::new(true));
            let active = Arc::new(AtomicUsize::new(0));
            let requests: Vec<_> = (0..3)
                .map(|_| {
                    let (gate, active) = (Arc::clone(&gate), Arc::clone(&active));
                    thread::spawn(move || request(&gate, &active))
                })
                .collect();
            drain(&gate, &active, 1);
            for request in requests {
                request.join().unwrap();
            }
            assert_eq!(gate.in_flight(), 0);
            assert!(!gate.is_closed());
        });
    }

    #[test]
    fn shuttle_two_drainers_and_two_requests_all_get_through() {
        check(|| {
            let gate = Arc::new(Gate::new(true));
            let active = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..4u64)
                .map(|i| {
                    let (gate, active) = (Arc::clone(&gate), Arc::clone(&active));
                    thread::spawn(move || match i {
                        0 | 1 => drain(&gate, &active, i),
                        _ => request(&gate, &active),
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(gate.try_enter().is_some());
        });
    }

    #[test]
    fn shuttle_a_waiter_that_is_dropped_takes_nobodys_wake_up() {
        check(|| {
            let gate = Arc::new(Gate::new(true));
            gate.close();
            let gives_up = thread::spawn({
                let gate = Arc::clone(&gate);
                move || {
                    let mut enter = gate.enter();
                    block_on(poll_fn(|cx| {
                        if let Poll::Ready(shard) = Pin::new(&mut enter).poll(cx) {
                            gate.leave(shard);
                        }
                        Poll::Ready(())
                    }));
                }
            });
            let waits = thread::spawn({
                let gate = Arc::clone(&gate);
                move || {
                    let shard = block_on(gate.enter());
                    gate.leave(shard);
                }
            });
            gate.open();
            gives_up.join().unwrap();
            waits.join().unwrap();
            assert!(lock(&gate.wakers).entering.is_empty());
        });
    }
}
