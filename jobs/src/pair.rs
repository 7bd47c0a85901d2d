//! What a job that keeps two nodes equal tells another job that looks at both.

use std::ops::Range;
use std::sync::Arc;

use block::{Backend, DirtyBitmap};

use crate::JobNotifier;

/// Where the target of such a job may lag behind its source. Any thread.
pub(crate) trait Lag: Send + Sync {
    /// Whether the job still brings the target up to date.
    fn is_engaged(&self) -> bool;

    /// Whether the job has yet to copy something of `range`, or is doing so.
    ///
    /// With all requests to the source held: once this is `false` it stays so, and
    /// what the job wrote to the target there is in the bitmaps of the target's node.
    fn is_behind(&self, range: &Range<u64>) -> bool;
}

/// Whether a bitmap has something of `range`. Nothing that others clear meanwhile elsewhere
/// hides it.
pub(crate) fn is_dirty_in(bitmap: &DirtyBitmap, range: &Range<u64>) -> bool {
    let chunk = bitmap.granularity();
    let mut at = range.start / chunk * chunk;
    while at < range.end {
        if bitmap.is_dirty(at) {
            return true;
        }
        at = at.saturating_add(chunk);
    }
    false
}

/// Two nodes that a job keeps equal, as its driver knows them.
pub struct CopyPair {
    /// Ids of the nodes below the filters of source and target.
    pub(crate) nodes: [u64; 2],
    /// Id of the job's own filter above the source.
    pub(crate) filter: u64,
    /// The job's ways to both.
    pub(crate) backends: Vec<Arc<Backend>>,
    pub(crate) lag: Arc<dyn Lag>,
}

/// A pair, and its job as the core knows it.
pub(crate) struct ActivePair {
    pub(crate) pair: CopyPair,
    /// The job is ready: what is behind is only what was written lately.
    pub(crate) ready: bool,
    /// Has the job look at once at what there is to copy.
    pub(crate) notifier: JobNotifier,
}

impl CopyPair {
    /// Whether it is about these two, whichever is the source.
    pub(crate) fn joins(&self, nodes: [u64; 2]) -> bool {
        self.nodes == nodes || self.nodes == [nodes[1], nodes[0]]
    }
}
