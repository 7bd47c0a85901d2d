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
