//! What the guest's own requests put on the target (`write-blocking` mode, or while the
//! mirror catches up): how much of it may be on its way, and what progress says of it.

use std::sync::{Arc, OnceLock};

use super::state::MirrorState;
use crate::Progress;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bytes of private copies that requests may hold at a time. What goes beyond is left to
/// the copier.
const COPIES_LIMIT: u64 = 64 << 20;

/// Counters of one mirror. All atomic.
#[derive(Default)]
pub(crate) struct Active {
    /// Bytes of private copies.
    copies: AtomicU64,
    /// Bytes on their way to the target.
    in_flight: AtomicU64,
    /// Bytes that came there, ever.
    done: AtomicU64,
    /// The job's. Set once, before the mirror is engaged.
    progress: OnceLock<Arc<Progress>>,
}

impl Active {
    pub(crate) fn set_progress(&self, progress: Arc<Progress>) {
        let _ = self.progress.set(progress);
    }

    /// Bytes on their way to the target.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Bytes that came there: progress counts them, though the copier did not copy them.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// A share of the budget for private copies, until dropped.
pub(crate) struct CopyBudget {
    state: Arc<MirrorState>,
    len: u64,
}

impl CopyBudget {
    /// Takes `len` bytes, if they are there.
    pub(crate) fn reserve(state: &Arc<MirrorState>, len: u64) -> Option<Self> {
        let before = state.active.copies.fetch_add(len, Ordering::Relaxed);
        let reserved = Self {
            state: Arc::clone(state),
            len,
        };
        (before + len <= COPIES_LIMIT).then_some(reserved)
    }
}

impl Drop for CopyBudget {
    fn drop(&mut self) {
        let copies = &self.state.active.copies;
        copies.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Bytes on their way to the target, as progress counts them. Dropped, they have come to
/// nothing: their range is dirty, and the body counts it when it tells what is left.
#[must_use]
pub(crate) struct ActiveRequest {
    state: Arc<MirrorState>,
    len: u64,
}

impl ActiveRequest {
    /// `len` bytes are sent.
    pub(crate) fn begin(state: &Arc<MirrorState>, len: u64) -> Self {
        state.active.in_flight.fetch_add(len, Ordering::Relaxed);
        if let Some(progress) = state.active.progress.get() {
            progress.add_remaining(len);
        }
        Self {
            state: Arc::clone(state),
            len,
        }
    }

    /// They have come there.
    pub(crate) fn done(self) {
        let active = &self.state.active;
        active.done.fetch_add(self.len, Ordering::Relaxed);
        if let Some(progress) = active.progress.get() {
            progress.add_done(self.len);
        }
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        let active = &self.state.active;
        active.in_flight.fetch_sub(self.len, Ordering::Relaxed);
    }
}
