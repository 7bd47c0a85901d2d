//! Who waits for a range of a snapshot, and which ranges are being read from the
//! source.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// Those who wait, and those who read. Any thread.
#[derive(Default)]
pub(super) struct Waiting {
    /// How many wait.
    waiters: AtomicUsize,
    /// A leaf lock, held for a walk of the lists: by those who wait or read the source,
    /// and by those who end while somebody waits.
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    next: u64,
    frozen: Vec<(u64, Range<u64>)>,
    waiters: Vec<(u64, Range<u64>, Option<Waker>)>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Lists {
    fn key(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Waiting {
    /// Notes a range that is read, and gives its key.
    pub(super) fn freeze(&self, range: Range<u64>) -> u64 {
        let mut lists = lock(&self.lists);
        let key = lists.key();
        lists.frozen.push((key, range));
        key
    }

    /// Of a range that is read, what is behind `end` is not.
    pub(super) fn narrow(&self, key: u64, end: u64) {
        let mut lists = lock(&self.lists);
        let of_key = lists.frozen.iter_mut().find(|(known, _)| *known == key);
        if let Some((_, range)) = of_key {
            range.end = end;
        }
    }

    /// The range is not read any more.
    pub(super) fn thaw(&self, key: u64) {
        lock(&self.lists).frozen.retain(|(known, _)| *known != key);
    }

    /// Whether some of `range` is being read.
    pub(super) fn is_frozen(&self, range: &Range<u64>) -> bool {
        let lists = lock(&self.lists);
        lists
            .frozen
            .iter()
            .any(|(_, frozen)| overlap(frozen, range))
    }

    #[cfg(all(test, not(shuttle)))]
    pub(super) fn waiters(&self) -> usize {
        self.waiters.load(SeqCst)
    }

    /// Whether anybody waits.
    pub(super) fn is_waited_for(&self) -> bool {
        self.waiters.load(SeqCst) > 0
    }

    /// Wakes those who wait for some of `range`. What they wait for is there already.
    pub(super) fn changed(&self, range: &Range<u64>) {
        if self.waiters.load(SeqCst) == 0 {
            return;
        }
        let woken: Vec<Waker> = {
            let mut lists = lock(&self.lists);
            let waiters = lists.waiters.iter_mut();
            let of_range = waiters.filter(|(_, wanted, _)| overlap(wanted, range));
            of_range.filter_map(|(_, _, waker)| waker.take()).collect()
        };
        for waker in woken {
            waker.wake();
        }
    }

    /// Waits until `test` is true, which is looked at whenever `range` changes.
    ///
    /// Cancel: nothing is left behind.
    pub(super) fn until<F>(&self, range: Range<u64>, test: F) -> Change<'_, F>
    where
        F: Fn() -> bool + Unpin,
    {
        Change {
            waiting: self,
            range,
            test,
            key: None,
        }
    }
}

/// See [`Waiting::until`].
#[must_use = "it waits when it is awaited"]
pub(super) struct Change<'a, F> {
    waiting: &'a Waiting,
    range: Range<u64>,
    test: F,
    key: Option<u64>,
}

impl<F: Fn() -> bool + Unpin> Future for Change<'_, F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Registered before the test: who changes something does so before it wakes.
        let waker = cx.waker().clone();
        let range = self.range.clone();
        {
            let mut lists = lock(&self.waiting.lists);
            match self.key {
                Some(key) => {
                    if let Some(entry) = lists.waiters.iter_mut().find(|(known, ..)| *known == key)
                    {
                        entry.2 = Some(waker);
                    }
                }
                None => {
                    let key = lists.key();
                    lists.waiters.push((key, range, Some(waker)));
                    self.waiting.waiters.fetch_add(1, SeqCst);
                    drop(lists);
                    self.key = Some(key);
                }
            }
        }
        match (self.test)() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

impl<F> Drop for Change<'_, F> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.waiting.waiters.fetch_sub(1, SeqCst);
            lock(&self.waiting.lists)
                .waiters
                .retain(|(known, ..)| *known != key);
        }
    }
}
