//! Waiting for a condition that others bring about: tasks of one thread
//! ([`LocalWaiters`]), or of any ([`Waiters`]).
//!
//! Whoever changes what a condition looks at calls `wake` afterwards. A waiter
//! registers before it looks, so no change is missed.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::task::{Poll, Waker};

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

#[cfg(all(test, shuttle))]
mod tests {
    use std::sync::Arc;

    use shuttle::future::block_on;
    use shuttle::thread;

    use super::Waiters;
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

    // A lost wake-up is a deadlock, which shuttle reports.
    #[test]
    fn shuttle_a_change_between_looking_and_registering_is_seen() {
        shuttle::check_random(two_who_wait_and_two_who_wake, 3_000);
        shuttle::check_pct(two_who_wait_and_two_who_wake, 3_000, 3);
    }
}
