//! What is left for the body to copy: of the snapshot itself, or, where the guest's
//! requests save into a scratch file, of what the target does not have yet.

use std::ops::Range;
use std::sync::Arc;

use block::{BitmapError, Claim, DirtyBitmap, Snapshot, SnapshotAccount};

/// Bytes from the first to the end of the last of short runs that are copied together.
const REACH: u64 = 8 << 20;

/// The account. Any thread.
#[derive(Clone)]
pub(super) enum Account {
    /// Guests' requests copy to the target too: the snapshot's own account.
    Shared(Arc<Snapshot>),
    /// Only the body copies to the target.
    Fleecing(Arc<Fleecing>),
}

/// What the target does not have yet of a snapshot that is kept in a scratch file.
pub(super) struct Fleecing {
    snapshot: Arc<Snapshot>,
    wanted: Wanted,
}

/// The bitmaps of [`Fleecing`], before there is a snapshot.
pub(super) struct Wanted {
    /// Clusters to be copied that nobody copies. Atomic.
    todo: DirtyBitmap,
    /// Clusters to be copied, whether or not somebody copies them. Atomic.
    pending: DirtyBitmap,
}

impl Wanted {
    /// All of a disk of `size` bytes in clusters of `cluster`, or what `part` has set.
    ///
    /// Errors: bad clusters for the size; not enough memory.
    pub(super) fn new(
        size: u64,
        cluster: u64,
        part: Option<&DirtyBitmap>,
    ) -> Result<Self, BitmapError> {
        let todo = DirtyBitmap::new(size, cluster)?;
        match part {
            Some(part) => copy_bits(part, &todo),
            None => todo.set_all(),
        }
        let pending = DirtyBitmap::new(size, cluster)?;
        copy_bits(&todo, &pending);
        Ok(Self { todo, pending })
    }

    /// The account of a snapshot in clusters of `cluster` bytes (no larger ones) that has
    /// all of it.
    ///
    /// Errors: as for `new`.
    pub(super) fn snapshot(&self, cluster: u64) -> Result<SnapshotAccount, BitmapError> {
        SnapshotAccount::new(self.todo.size(), cluster, Some(&self.todo))
    }

    pub(super) fn of(self, snapshot: &Arc<Snapshot>) -> Account {
        Account::Fleecing(Arc::new(Fleecing {
            snapshot: Arc::clone(snapshot),
            wanted: self,
        }))
    }
}

fn copy_bits(from: &DirtyBitmap, to: &DirtyBitmap) {
    let mut at = 0;
    while let Some(run) = from.next_dirty(at) {
        to.set(run.start, run.end - run.start);
        at = run.end;
    }
}

/// Clusters whose copying the body has taken on. Dropped, they are to be copied again.
#[must_use = "dropping it gives the clusters back"]
pub(super) enum BodyClaim {
    Shared(Claim),
    Fleecing(FleecingClaim),
}

/// See [`BodyClaim`].
pub(super) struct FleecingClaim {
    fleecing: Arc<Fleecing>,
    /// Whole clusters.
    range: Range<u64>,
}

impl FleecingClaim {
    /// The clusters from `end` on are to be copied again.
    fn leave_from(&mut self, end: u64) {
        let Range { start, end: last } = self.range;
        let end = end.clamp(start, last);
        if end < last {
            self.range.end = end;
            self.fleecing.wanted.todo.set(end, last - end);
        }
    }
}

impl Drop for FleecingClaim {
    fn drop(&mut self) {
        self.leave_from(self.range.start);
    }
}

impl BodyClaim {
    /// The clusters, in bytes.
    pub(super) fn range(&self) -> Range<u64> {
        match self {
            Self::Shared(claim) => claim.range(),
            Self::Fleecing(claim) => claim.range.clone(),
        }
    }

    /// The clusters from `end` on (of whole clusters) are left to others: they are to be
    /// copied again.
    pub(super) fn leave_from(&mut self, end: u64) {
        match self {
            Self::Shared(claim) => claim.leave_from(end),
            Self::Fleecing(claim) => claim.leave_from(end),
        }
    }

    /// The target has what the snapshot had in the clusters up to `end` (of whole
    /// clusters); the rest is still to be copied. What was saved of them for this is
    /// freed, and guests may write them without a copy.
    pub(super) async fn copied_to(self, end: u64) {
        let mut claim = match self {
            Self::Shared(claim) => return claim.copied_to(end),
            Self::Fleecing(claim) => claim,
        };
        let Range { start, end: last } = claim.range;
        let end = end.clamp(start, last);
        let fleecing = Arc::clone(&claim.fleecing);
        fleecing.wanted.pending.clear(start, end - start);
        claim.range.start = end;
        drop(claim);
        if let Err(error) = fleecing.snapshot.discard(start, end - start).await {
            // It only takes space; a broken snapshot is found by everybody.
            tracing::debug!(%error, "backup: what was copied stays in the scratch file");
        }
    }
}

impl Account {
    /// Bytes per cluster: a power of two.
    pub(super) fn cluster(&self) -> u64 {
        match self {
            Self::Shared(snapshot) => snapshot.cluster(),
            Self::Fleecing(fleecing) => fleecing.wanted.todo.granularity(),
        }
    }

    /// Bytes that are not copied yet, those being copied included.
    pub(super) fn pending_bytes(&self) -> u64 {
        let fleecing = match self {
            Self::Shared(snapshot) => return snapshot.pending_bytes(),
            Self::Fleecing(fleecing) => fleecing,
        };
        let pending = &fleecing.wanted.pending;
        let (size, cluster) = (pending.size(), pending.granularity());
        let excess = match size % cluster {
            0 => 0,
            short if pending.is_dirty(size - 1) => cluster - short,
            _ => 0,
        };
        pending.count_bytes().saturating_sub(excess).min(size)
    }

    /// Whether nothing is left to be copied, or being copied.
    pub(super) fn is_complete(&self) -> bool {
        match self {
            Self::Shared(snapshot) => snapshot.is_complete(),
            Self::Fleecing(fleecing) => fleecing.wanted.pending.is_clean(),
        }
    }

    /// A bitmap of the clusters that are not copied, those included that somebody copies.
    ///
    /// Errors: not enough memory.
    pub(super) fn not_copied(&self) -> Result<DirtyBitmap, BitmapError> {
        let fleecing = match self {
            Self::Shared(snapshot) => return snapshot.not_copied(),
            Self::Fleecing(fleecing) => fleecing,
        };
        let pending = &fleecing.wanted.pending;
        let left = DirtyBitmap::new(pending.size(), pending.granularity())?;
        copy_bits(pending, &left);
        Ok(left)
    }

    /// The first run of clusters from `from` on that are to be copied and that nobody
    /// copies, no longer than `most` bytes (or one cluster).
    pub(super) fn next_todo(&self, from: u64, most: u64) -> Option<Range<u64>> {
        match self {
            Self::Shared(snapshot) => snapshot.next_todo(from, most),
            Self::Fleecing(fleecing) => fleecing.wanted.todo.next_dirty_area(from, most),
        }
    }

    /// Takes on the copying of the first run in `range` (whole clusters, bounded by the
    /// caller) that is to be copied. `None`: there is none.
    pub(super) fn claim(&self, range: Range<u64>) -> Option<BodyClaim> {
        let fleecing = match self {
            Self::Shared(snapshot) => return snapshot.claim(range).map(BodyClaim::Shared),
            Self::Fleecing(fleecing) => fleecing,
        };
        let todo = &fleecing.wanted.todo;
        // Nobody else takes any, so it is what `next_todo` found.
        let mut runs = todo.take(range.start, range.end - range.start).into_iter();
        let first = runs.next()?;
        for run in runs {
            todo.set(run.start, run.end - run.start);
        }
        Some(BodyClaim::Fleecing(FleecingClaim {
            fleecing: Arc::clone(fleecing),
            range: first,
        }))
    }

    /// Takes on more runs behind `first`, until all are `most` bytes together, or `runs`.
    pub(super) fn gather(&self, first: BodyClaim, most: u64, runs: usize) -> Vec<BodyClaim> {
        let Range { start, end } = first.range();
        let (mut bytes, mut from) = (end - start, end);
        let mut claims = vec![first];
        while bytes < most && claims.len() < runs {
            let next = self.next_todo(from, most - bytes);
            let Some(next) = next.filter(|next| next.end - start <= REACH) else {
                break;
            };
            from = next.end;
            // A guest's request may have been first.
            if let Some(claim) = self.claim(next) {
                let range = claim.range();
                bytes += range.end - range.start;
                claims.push(claim);
            }
        }
        claims
    }

    /// The whole clusters inside the range; empty if there are none.
    pub(super) fn round_in(&self, range: &Range<u64>) -> Range<u64> {
        let (fleecing, cluster) = match self {
            Self::Shared(snapshot) => return snapshot.round_in(range),
            Self::Fleecing(fleecing) => (fleecing, self.cluster()),
        };
        let size = fleecing.wanted.todo.size();
        let start = range.start.checked_next_multiple_of(cluster);
        let start = start.unwrap_or(size).min(size);
        let end = match range.end >= size {
            true => size,
            false => range.end & !(cluster - 1),
        };
        start..end.max(start)
    }
}
