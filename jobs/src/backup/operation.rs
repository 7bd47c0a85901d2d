//! One operation of the body: it carries over a range that has been claimed, or short runs, or
//! writes what guests' requests did not wait for.
//!
//! Not here: what is done next, and what a failure means (`body`).

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{InFlight, Saves, Snapshot};

use crate::copying::{Carrier, Copied, CopyError, Entered, Look, Runs, Side};

use super::account::BodyClaim;

/// An operation that has ended.
pub(super) struct Done {
    /// What it counts for in the window.
    pub(super) cost: u64,
    /// Bytes of clusters that the target has now.
    pub(super) bytes: u64,
    /// Bytes that were moved.
    pub(super) moved: u64,
    /// How long it took.
    pub(super) took: Duration,
    pub(super) what: What,
    /// Why it failed. What is not done is to be done again.
    pub(super) error: Option<CopyError>,
}

/// What an operation was about.
pub(super) enum What {
    /// A range, to this end. What was found out by carrying it, unless that failed.
    Range(u64, Option<Copied>),
    /// Short runs in this range.
    Runs(Range<u64>, Runs),
    /// What guests' requests did not wait for.
    Saves,
}

/// Writes what guests' requests did not wait for.
///
/// Cancel: it is kept, for another operation.
pub(super) async fn write_saves(saves: Saves, target: InFlight) -> Done {
    let began = Instant::now();
    let saved = saves.write(target).await;
    let side = Side::Target;
    Done {
        cost: 0,
        bytes: saved.bytes,
        moved: saved.moved,
        took: began.elapsed(),
        what: What::Saves,
        error: saved.error.map(|error| CopyError { side, error }),
    }
}

/// What an operation of the body's own uses.
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
        let end = range.end;
        let claim = RefCell::new(claim);
        // The guest need not wait for what is left to others.
        let leave = |end| claim.borrow_mut().leave_from(end);
        let carried = self.carrier.carry(range, look, &self.nodes, leave).await;
        let (copied, error) = match carried {
            Ok(copied) => (Some(copied), None),
            Err(error) => (None, Some(error)),
        };
        let mut done = Done {
            cost,
            bytes: 0,
            moved: 0,
            took: self.began.elapsed(),
            what: What::Range(end, None),
            error,
        };
        if let Some(copied) = copied {
            done.bytes = copied.range.end - copied.range.start;
            done.moved = copied.charged;
            claim.into_inner().copied_to(copied.range.end).await;
            self.discard(copied.range.clone()).await;
            done.what = What::Range(end, Some(copied));
        }
        done
    }

    /// Copies short runs together, in order, if the nodes can. What is not copied is to be
    /// copied again.
    ///
    /// Cancel: as for [`Carrier::copy_runs`].
    pub(super) async fn copy_runs(self, claims: Vec<BodyClaim>) -> Done {
        let runs: Vec<_> = claims.iter().map(BodyClaim::range).collect();
        let start = runs.first().map_or(0, |first| first.start);
        let end = runs.last().map_or(0, |last| last.end);
        let cost = runs.iter().map(|run| run.end - run.start).sum();
        let became = self.carrier.copy_runs(&runs, &self.nodes).await;
        let took = self.began.elapsed();
        let copied = match became {
            Runs::Copied(copied) => copied,
            Runs::Impossible | Runs::Held => 0,
        };
        // First all that guests may be waiting for.
        for (claim, run) in claims.into_iter().zip(&runs).take(copied) {
            claim.copied_to(run.end).await;
        }
        let mut bytes = 0;
        for run in runs.into_iter().take(copied) {
            bytes += run.end - run.start;
            self.discard(run).await;
        }
        Done {
            cost,
            bytes,
            moved: bytes,
            took,
            what: What::Runs(start..end, became),
            error: None,
        }
    }

    /// Discards on the source what has been copied, if that is wanted.
    async fn discard(&self, range: Range<u64>) {
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
