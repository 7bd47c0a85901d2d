//! The right to copy some clusters of a snapshot: who has it, and what becomes of it.

use std::ops::Range;
use std::sync::Arc;

use super::snapshot::Snapshot;

/// Clusters whose copying somebody has taken on. Dropped, they are to be copied again.
#[derive(Debug)]
#[must_use = "dropping it gives the clusters back"]
pub struct Claim {
    pub(super) snapshot: Arc<Snapshot>,
    /// Whole clusters.
    pub(super) range: Range<u64>,
}

impl Claim {
    /// The clusters, in bytes.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The clusters from `end` on (of whole clusters) are left to others: they are to be
    /// copied again.
    pub fn leave_from(&mut self, end: u64) {
        let end = end.clamp(self.range.start, self.range.end);
        let rest = end..self.range.end;
        self.range.end = end;
        self.give_back(rest);
    }

    /// The target has what the snapshot had in the clusters up to `end` (of whole
    /// clusters); the rest is still to be copied.
    pub fn copied_to(mut self, end: u64) {
        let end = end.clamp(self.range.start, self.range.end);
        let done = self.range.start..end;
        self.range.start = end;
        self.settle(done);
    }

    /// The target has what the snapshot had in all of them.
    pub fn copied(self) {
        let end = self.range.end;
        self.copied_to(end);
    }

    /// The clusters up to `end` (of whole clusters) are not part of the snapshot.
    pub(super) fn skip_to(&mut self, end: u64) {
        let end = end.clamp(self.range.start, self.range.end);
        let done = self.range.start..end;
        self.range.start = end;
        self.snapshot.leave_out(done);
    }

    fn give_back(&self, rest: Range<u64>) {
        if !rest.is_empty() {
            self.snapshot.put_back(rest);
        }
    }

    fn settle(&self, done: Range<u64>) {
        if !done.is_empty() {
            self.snapshot.settle(done);
        }
    }

    /// What the snapshot had in all of them is in memory: guests may write over it.
    pub(super) fn hold(mut self) {
        let range = self.range.clone();
        self.range.start = range.end;
        self.snapshot.hold(range);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_back(self.range.clone());
    }
}
