//! Waiting for a condition that others bring about: tasks of one thread
//! ([`LocalWaiters`]), or of any ([`Waiters`]; [`Line`], one after the other).
//!
//! Whoever changes what a condition looks at calls `wake` afterwards. A waiter
//! registers before it looks, so no change is missed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sync::{Mutex, lock};

fn add(wakers: &mut Vec<Waker>, waker: &Waker) {
    if !wakers.iter().any(|known| known.will_wake(waker)) {
        wakers.push(waker.clone());
    }
}

/// Tasks of this thread that wait.
#[derive(Default)]
pub(crate) struct LocalWaiters {
    wakers: RefCell<Vec<Waker>>,
}

impl LocalWaiters {
    /// Waits until `condition` gives something. Cancel: nothing happens.
    pub(crate) fn until<T>(
        &self,
        mut condition: impl FnMut() -> Option<T>,
    ) -> impl Future<Output = T> {
        poll_fn(move |cx| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                add(&mut self.wakers.borrow_mut(), cx.waker());
                Poll::Pending
            }
        })
    }

    /// Lets all who wait look again.
    pub(crate) fn wake(&self) {
        for waker in self.wakers.take() {
            waker.wake();
        }
    }
}

/// Tasks of any thread that wait.
#[derive(Default)]
pub(crate) struct Waiters {
    /// A leaf lock; nobody is woken under it.
    wakers: Mutex<Vec<Waker>>,
}

impl Waiters {
    /// Waits until `condition` gives something. Cancel: nothing happens.
    pub(crate) fn until<T>(
        &self,
        mut condition: impl FnMut() -> Option<T>,
    ) -> impl Future<Output = T> {
        poll_fn(move |cx| {
            if let Some(value) = condition() {
                return Poll::Ready(value);
            }
            add(&mut lock(&self.wakers), cx.waker());
            // What came true in between had nobody to wake.
            match condition() {
                Some(value) => Poll::Ready(value),
                None => Poll::Pending,
            }
        })
    }

    /// Lets all who wait look again.
    pub(crate) fn wake(&self) {
        let wakers = std::mem::take(&mut *lock(&self.wakers));
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Tasks of any thread that wait for their turn, and then for something that is given to one
/// at a time.
#[derive(Default)]
pub(crate) struct Line {
    /// A leaf lock, held for a move; nobody is woken under it.
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    line: VecDeque<(u64, Waker)>,
}

impl Line {
    /// Waits until nobody is before this one and `take` succeeds (`true`), or `given_up` is
    /// true (`false`). Both are looked at again when this is woken. Cancel: nothing happens.
    pub(crate) fn turn<T, G>(&self, take: T, given_up: G) -> Turn<'_, T, G>
    where
        T: Fn() -> bool + Unpin,
        G: Fn() -> bool + Unpin,
    {
        Turn {
            line: self,
            take,
            given_up,
            ticket: None,
        }
    }

    /// Lets the first one look again.
    pub(crate) fn wake_first(&self) {
        let first = {
            let waiting = lock(&self.waiting);
            waiting.line.front().map(|(_, waker)| waker.clone())
        };
        if let Some(waker) = first {
            waker.wake();
        }
    }

    /// Lets all look again.
    pub(crate) fn wake_all(&self) {
        let all: Vec<Waker> = {
            let waiting = lock(&self.waiting);
            waiting
                .line
                .iter()
                .map(|(_, waker)| waker.clone())
                .collect()
        };
        all.into_iter().for_each(Waker::wake);
    }

    /// Whether `ticket` is first. Without one, whether nobody waits.
    fn is_first(&self, ticket: Option<u64>) -> bool {
        lock(&self.waiting).line.front().map(|(first, _)| *first) == ticket
    }

    /// Has `waker` woken for `ticket`, or for a new one.
    fn stand(&self, ticket: Option<u64>, waker: &Waker) -> u64 {
        let mut waker = waker.clone();
        let mut waiting = lock(&self.waiting);
        let known = waiting
            .line
            .iter_mut()
            .find(|(known, _)| Some(*known) == ticket);
        if let Some((ticket, known)) = known {
            let ticket = *ticket;
            std::mem::swap(known, &mut waker);
            drop(waiting);
            // The last one of a task that has gone frees it: not under the lock.
            drop(waker);
            return ticket;
        }
        waiting.next += 1;
        let ticket = waiting.next;
        waiting.line.push_back((ticket, waker));
        ticket
    }

    fn leave(&self, ticket: u64) {
        let left = {
            let line = &mut lock(&self.waiting).line;
            let place = line.iter().position(|(known, _)| *known == ticket);
            place.and_then(|place| line.remove(place))
        };
        drop(left);
        // Who is first now may not have looked since.
        self.wake_first();
    }
}

/// See [`Line::turn`].
#[must_use = "it waits when it is awaited"]
pub(crate) struct Turn<'a, T, G> {
    line: &'a Line,
    take: T,
    given_up: G,
    ticket: Option<u64>,
}

impl<T, G> Future for Turn<'_, T, G>
where
    T: Fn() -> bool + Unpin,
    G: Fn() -> bool + Unpin,
{
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        if self.ticket.is_none() && self.line.is_first(None) && (self.take)() {
            return Poll::Ready(true);
        }
        // Registered before both looks: who changes something does so before it wakes.
        let ticket = self.line.stand(self.ticket, cx.waker());
        self.ticket = Some(ticket);
        if self.line.is_first(self.ticket) && (self.take)() {
            return Poll::Ready(true);
        }
        match (self.given_up)() {
            true => Poll::Ready(false),
            false => Poll::Pending,
        }
    }
}

impl<T, G> Drop for Turn<'_, T, G> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.line.leave(ticket);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod line_tests {
    use std::cell::Cell;

    use futures_util::poll;

    use super::*;
    use crate::runtime::EventLoop;

    fn run(test: impl Future<Output = ()>) {
        EventLoop::new("test").unwrap().block_on(test);
    }

    #[test]
    fn who_came_first_goes_first_however_much_it_wants() {
        run(async {
            let (line, room) = (Line::default(), Cell::new(0_u32));
            let take = |much: u32| {
                let room = &room;
                move || {
                    let left = room.get().checked_sub(much);
                    left.inspect(|left| room.set(*left)).is_some()
                }
            };
            let mut much = std::pin::pin!(line.turn(take(2), || false));
            assert!(poll!(much.as_mut()).is_pending());
            let mut little = std::pin::pin!(line.turn(take(1), || false));
            room.set(1);
            assert!(poll!(little.as_mut()).is_pending(), "it is not its turn");
            room.set(2);
            assert!(poll!(little.as_mut()).is_pending());
            assert_eq!(poll!(much.as_mut()), Poll::Ready(true));
            room.set(1);
            assert!(
                poll!(little.as_mut()).is_pending(),
                "until the first one has gone"
            );
        });
    }

    #[test]
    fn who_gives_up_or_goes_lets_the_next_one_look() {
        run(async {
            let (line, given_up) = (Line::default(), Cell::new(false));
            let mut first = Box::pin(line.turn(|| false, || given_up.get()));
            assert!(poll!(first.as_mut()).is_pending());
            let second = line.turn(|| true, || false);
            let mut second = std::pin::pin!(second);
            assert!(poll!(second.as_mut()).is_pending());
            given_up.set(true);
            assert_eq!(poll!(first.as_mut()), Poll::Ready(false));
            drop(first);
            assert!(second.await);
        });
    }
}

#[cfg(all(test, shuttle))]
mod tests {
    use std::sync::Arc;

    use shuttle::future::block_on;
    use shuttle::thread;

    use super::{Line, Waiters};
    use crate::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn two_who_wait_and_two_who_wake() {
        let shared = Arc::new((Waiters::default(), AtomicUsize::new(0)));
        let waiters = [1, 2].map(|enough| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (waiters, count) = &*shared;
                block_on(waiters.until(|| (count.load(SeqCst) >= enough).then_some(())));
            })
        });
        let wakers = [(); 2].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (waiters, count) = &*shared;
                count.fetch_add(1, SeqCst);
                waiters.wake();
            })
        });
        for thread in waiters.into_iter().chain(wakers) {
            thread.join().unwrap();
        }
    }

    /// Takes one of a count, and gives it back some time later.
    fn three_who_want_one() {
        let shared = Arc::new((Line::default(), AtomicUsize::new(1)));
        let threads = [(); 3].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (line, count) = &*shared;
                let take = || {
                    count
                        .fetch_update(SeqCst, SeqCst, |it| it.checked_sub(1))
                        .is_ok()
                };
                assert!(block_on(line.turn(take, || false)));
                count.fetch_add(1, SeqCst);
                line.wake_first();
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn shuttle_each_in_a_line_has_its_turn() {
        shuttle::check_random(three_who_want_one, 3_000);
        shuttle::check_pct(three_who_want_one, 3_000, 3);
    }

    // A lost wake-up is a deadlock, which shuttle reports.
    #[test]
    fn shuttle_a_change_between_looking_and_registering_is_seen() {
        shuttle::check_random(two_who_wait_and_two_who_wake, 3_000);
        shuttle::check_pct(two_who_wait_and_two_who_wake, 3_000, 3);
    }
}
