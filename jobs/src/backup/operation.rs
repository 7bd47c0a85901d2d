//! One operation of the body: it carries over a range that has been claimed, or short runs.
//!
//! Not here: what is claimed next, and what a failure means (`body`).

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::Snapshot;

use crate::copying::{Carrier, Copied, CopyError, Entered, Look, Runs};

use super::account::BodyClaim;

/// An operation that has ended.
pub(super) struct Done {
    /// What it counts for in the window.
    pub(super) cost: u64,
    /// End of what it claimed.
    pub(super) end: u64,
    /// Bytes of clusters that the target has now.
    pub(super) bytes: u64,
    /// How long it took.
    pub(super) took: Duration,
    /// Short runs that begin there are not to be copied together.
    pub(super) one_by_one: Range<u64>,
    pub(super) result: Result<Copied, CopyError>,
}

/// What an operation uses.
pub(super) struct Operation {
    pub(super) carrier: Rc<Carrier>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) nodes: Entered,
    /// What is copied is discarded on the source.
    pub(super) discards: bool,
    pub(super) began: Instant,
}

impl Operation {
    /// Carries over what is claimed, or as much from its start as one operation should.
    /// What is not carried is to be copied again.
    ///
    /// Cancel: as for [`Carrier::carry`].
    pub(super) async fn carry(self, claim: BodyClaim, look: Look, cost: u64) -> Done {
        let range = claim.range();
        let (start, end) = (range.start, range.end);
        let claim = RefCell::new(claim);
        // The guest need not wait for what is left to others.
        let leave = |end| claim.borrow_mut().leave_from(end);
        let result = self.carrier.carry(range, look, &self.nodes, leave).await;
        let mut bytes = 0;
        if let Ok(copied) = &result {
            bytes = copied.range.end - start;
            self.settle(claim.into_inner(), copied.range.end).await;
        }
        Done {
            cost,
            end,
            bytes,
            took: self.began.elapsed(),
            one_by_one: 0..0,
            result,
        }
    }

    /// Copies short runs together, in order, if the nodes can.
    ///
    /// Cancel: as for [`Carrier::copy_runs`].
    pub(super) async fn copy_runs(self, claims: Vec<BodyClaim>) -> Done {
        let runs: Vec<_> = claims.iter().map(BodyClaim::range).collect();
        let start = runs.first().map_or(0, |first| first.start);
        let end = runs.last().map_or(0, |last| last.end);
        let cost = runs.iter().map(|run| run.end - run.start).sum();
        let became = self.carrier.copy_runs(&runs, &self.nodes).await;
        let is_copied = became == Runs::Copied;
        if is_copied {
            for (claim, run) in claims.into_iter().zip(runs) {
                self.settle(claim, run.end).await;
            }
        }
        let bytes = if is_copied { cost } else { 0 };
        Done {
            cost,
            end,
            bytes,
            took: self.began.elapsed(),
            one_by_one: match became {
                Runs::Copied | Runs::Held => 0..0,
                Runs::NotOnlyData => start..end,
                Runs::Impossible => 0..u64::MAX,
            },
            result: Ok(Copied {
                range: start..if is_copied { end } else { start },
                charged: bytes,
                data: 0..0,
                was_zero: false,
            }),
        }
    }

    /// The target has what is claimed up to `end`.
    async fn settle(&self, claim: BodyClaim, end: u64) {
        let range = claim.range().start..end;
        claim.copied_to(end).await;
        // Counted at the source. Of a job that has ended nothing is discarded: somebody else
        // may write there by now.
        let may_discard = self.discards && !self.carrier.is_stopped();
        let counted = may_discard.then(|| self.nodes.source()).flatten();
        if counted.is_some()
            && let Err(error) = self.snapshot.discard_source(range).await
        {
            // It is a hint, and the copy is there.
            tracing::debug!(%error, "backup: the source is not discarded");
        }
    }
}
