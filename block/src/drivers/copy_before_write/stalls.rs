//! How guests' requests had to wait, for who asks later.

use std::time::Duration;

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// How guests' requests had to wait for copies, and for reads of the snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// How many waited.
    pub count: u64,
    /// The longest wait.
    pub longest: Duration,
    /// All waits together.
    pub total: Duration,
}

/// [`Stalls`] as they come. Atomics that any iothread adds to; a reader may see one
/// without the others.
#[derive(Debug, Default)]
pub(super) struct Stalled {
    count: AtomicU64,
    longest_ns: AtomicU64,
    total_ns: AtomicU64,
}

impl Stalled {
    pub(super) fn note(&self, waited: Duration) {
        let ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX >> 16);
        self.count.fetch_add(1, SeqCst);
        self.longest_ns.fetch_max(ns, SeqCst);
        self.total_ns.fetch_add(ns, SeqCst);
    }

    pub(super) fn look(&self) -> Stalls {
        Stalls {
            count: self.count.load(SeqCst),
            longest: Duration::from_nanos(self.longest_ns.load(SeqCst)),
            total: Duration::from_nanos(self.total_ns.load(SeqCst)),
        }
    }
}
