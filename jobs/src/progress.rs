//! The progress meter of a job.
//!
//! It has its own synchronisation (atomics) so that it can be moved by guest
//! requests and read under the job mutex alike.

use crate::sync::atomic::{AtomicU64, Ordering};

/// Work done and work there is, in bytes (or in steps, for jobs that count so).
///
/// `current` never goes back; `total` moves both ways. A reader on another thread
/// may see one of two numbers moved and the other not yet, so that for an
/// instant `current` may pass `total`; [`Progress::snapshot`] hides that.
#[derive(Debug, Default)]
pub struct Progress {
    current: AtomicU64,
    remaining: AtomicU64,
}

/// What a [`Progress`] says at one instant: `current <= total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressSnapshot {
    /// Work done.
    pub current: u64,
    /// Work done and work left.
    pub total: u64,
}

impl Progress {
    /// Nothing done, nothing to do.
    pub fn new() -> Self {
        Self::default()
    }

    /// `done` more is done. What remains becomes less by as much, not below 0.
    pub fn add_done(&self, done: u64) {
        // Remaining first: a reader in between sees too little, never more than
        // everything done.
        self.lower_remaining(done);
        saturating_add(&self.current, done);
    }

    /// `remaining` is left to do.
    pub fn set_remaining(&self, remaining: u64) {
        self.remaining.store(remaining, Ordering::SeqCst);
    }

    /// `more` came up besides the main work; it is reported done later by the
    /// same amount with [`Progress::add_done`].
    pub fn add_remaining(&self, more: u64) {
        saturating_add(&self.remaining, more);
    }

    /// Both numbers.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let current = self.current.load(Ordering::SeqCst);
        let remaining = self.remaining.load(Ordering::SeqCst);
        ProgressSnapshot {
            current,
            total: current.saturating_add(remaining),
        }
    }

    fn lower_remaining(&self, by: u64) {
        // The closure always gives Some, so this cannot fail.
        let _ = self
            .remaining
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |remaining| {
                Some(remaining.saturating_sub(by))
            });
    }
}

fn saturating_add(counter: &AtomicU64, by: u64) {
    let _ = counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |value| {
        Some(value.saturating_add(by))
    });
}
