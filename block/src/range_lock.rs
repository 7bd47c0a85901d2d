//! A lock on ranges of bytes: who wants a range waits for all who asked for an
//! overlapping one before.
//!
//! It orders operations of one job or filter; the graph and the nodes have no
//! locks.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::sync::{Mutex, lock};

#[cfg(all(test, not(shuttle)))]
mod tests;

/// A byte-range lock. Clones share it. Any thread.
#[derive(Clone, Default)]
pub struct RangeLock {
    /// A leaf lock, held for a walk of the list.
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    /// Those who hold or want a range, in order of asking.
    entries: VecDeque<Entry>,
    next: u64,
}

struct Entry {
    key: u64,
    range: Range<u64>,
    granted: bool,
    waker: Option<Waker>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end && !a.is_empty() && !b.is_empty()
}

impl Queue {
    fn push(&mut self, range: Range<u64>) -> (u64, bool) {
        let key = self.next;
        self.next += 1;
        let granted = !self.entries.iter().any(|e| overlap(&e.range, &range));
        self.entries.push_back(Entry {
            key,
            range,
            granted,
            waker: None,
        });
        (key, granted)
    }

    /// Removes an entry and grants those who waited for it; gives their wakers.
    fn remove(&mut self, key: u64) -> Vec<Waker> {
        let Some(place) = self.entries.iter().position(|e| e.key == key) else {
            return Vec::new();
        };
        let Some(gone) = self.entries.remove(place) else {
            return Vec::new();
        };
        let mut wakers = Vec::new();
        for i in place..self.entries.len() {
            let entry = &self.entries[i];
            if entry.granted || !overlap(&entry.range, &gone.range) {
                continue;
            }
            let free = !self
                .entries
                .iter()
                .take(i)
                .any(|before| overlap(&before.range, &entry.range));
            if free {
                self.entries[i].granted = true;
                wakers.extend(self.entries[i].waker.take());
            }
        }
        wakers
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Locks `range` (bytes). Waits for all who hold, or asked before this call
    /// for, an overlapping range: first come, first served. An empty range
    /// waits for nobody.
    ///
    /// The place in the queue is taken by this call, not by the first poll.
    /// Cancel: the place is given up; those behind move on.
    pub fn lock(&self, range: Range<u64>) -> LockRange {
        let (key, _) = lock(&self.queue).push(range);
        LockRange {
            guard: Some(RangeGuard {
                queue: Arc::clone(&self.queue),
                key,
            }),
        }
    }

    /// Locks `range` if nobody holds or waits for an overlapping one.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard> {
        let (key, granted) = lock(&self.queue).push(range);
        let guard = RangeGuard {
            queue: Arc::clone(&self.queue),
            key,
        };
        granted.then_some(guard)
    }
}

/// Waits for a range; see [`RangeLock::lock`].
#[must_use = "a range is locked when this has been awaited"]
pub struct LockRange {
    guard: Option<RangeGuard>,
}

impl Future for LockRange {
    type Output = RangeGuard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard> {
        let guard = self.guard.take().expect("not polled after it was ready");
        let granted = {
            let mut queue = lock(&guard.queue);
            match queue.entries.iter_mut().find(|e| e.key == guard.key) {
                Some(entry) if !entry.granted => {
                    entry.waker = Some(cx.waker().clone());
                    false
                }
                _ => true,
            }
        };
        if granted {
            return Poll::Ready(guard);
        }
        self.guard = Some(guard);
        Poll::Pending
    }
}

/// A locked range. Dropping it, on any thread, unlocks.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeGuard {
    queue: Arc<Mutex<Queue>>,
    key: u64,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("entries", &self.entries.len())
            .finish()
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let wakers = lock(&self.queue).remove(self.key);
        for waker in wakers {
            waker.wake();
        }
    }
}
