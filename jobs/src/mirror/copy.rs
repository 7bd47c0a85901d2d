//! One operation of the copier: a range that was dirty, and now is not.
//!
//! Lives here: locking the range and clearing its bits. Not here: finding out what it
//! holds and carrying it over (`copying`), which range is next, how many at a time, and
//! what a failure means (`body`).

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use block::{Backend, LockRange};

use super::state::{DirtyOnDrop, MirrorState};
use crate::copying::{BufferPool, Carrier, Copied, CopyError, Entered, Look};

/// What operations need, shared by all of one job. Home only.
pub(crate) struct Copier {
    state: Arc<MirrorState>,
    source: Arc<Backend>,
    carrier: Carrier,
}

/// A range that an operation has taken on. Dropped, it is dirty first, and free
/// then.
struct Claim {
    dirty: DirtyOnDrop<Arc<MirrorState>>,
    lock: LockRange,
}

impl Copier {
    pub(crate) fn new(state: Arc<MirrorState>, source: Arc<Backend>, pool: BufferPool) -> Rc<Self> {
        let rules = state.copy_rules();
        let written = Arc::clone(&state);
        Rc::new(Self {
            state,
            source,
            carrier: Carrier::new(rules, pool, move || written.note_target_written()),
        })
    }

    /// The stock of buffers.
    pub(crate) fn pool(&self) -> &BufferPool {
        self.carrier.pool()
    }

    /// See [`Carrier::look_at_written`].
    pub(crate) fn look_at_written(&self, range: &Range<u64>, request: u64) -> Look {
        self.carrier.look_at_written(range, request)
    }

    /// Begins no more requests: operations end with what they have under way.
    pub(crate) fn stop(&self) {
        self.carrier.stop();
    }

    /// Enters both nodes; `None` while somebody drains one of them.
    pub(crate) fn enter(&self) -> Option<Entered> {
        Entered::enter(&self.source, self.state.target()?)
    }

    /// Copies `range` (whole chunks), or as much from its start as one operation
    /// should. The range is clean, and its place in the queue for it taken, when
    /// this returns; the rest is done by the future.
    ///
    /// Cancel: the range becomes dirty again; what was being written to the
    /// target is undefined until it is copied again.
    pub(crate) fn copy(
        self: &Rc<Self>,
        range: Range<u64>,
        look: Look,
        nodes: Entered,
    ) -> impl Future<Output = Result<Copied, CopyError>> + use<> {
        let copier = Rc::clone(self);
        let claim = Claim {
            dirty: DirtyOnDrop::new(Arc::clone(&self.state), range.clone()),
            lock: self.state.in_flight.lock(range.clone()),
        };
        self.state.clear_dirty(range.clone());
        async move {
            let _guard = claim.lock.await;
            // What was written while it waited is copied with the rest.
            copier.state.clear_dirty(range.clone());
            let dirty = claim.dirty;
            // The guest waits for the whole range or for none of it.
            let leave = |_| ();
            let carried = copier.carrier.carry(range.clone(), look, &nodes, leave);
            let copied = carried.await?;
            if copied.range.end < range.end {
                copier.state.set_dirty(copied.range.end..range.end);
            }
            dirty.disarm();
            Ok(copied)
        }
    }
}
