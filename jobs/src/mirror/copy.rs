//! One operation of the copier: a range that was dirty, and now is not.
//!
//! Lives here: locking the range, clearing its bits, finding out what it holds,
//! carrying it over. Not here: which range is next, how many at a time, and what
//! a failure means (`body`).

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use block::{Backend, InFlight, IoError, IoVec, LockRange, Node, WriteFlags, ZeroFlags};

use super::plan::{Planner, Segment, SegmentKind};
use super::pool::BufferPool;
use super::state::{DirtyOnDrop, MirrorState};

/// Most bytes of zeroes that one operation writes, so that it ends soon.
const MAX_ZERO: u64 = 64 << 20;
/// Extents that one operation asks for at most; what is left counts as data.
const MAX_EXTENTS: usize = 64;
/// Longest range that is read without asking for its extents.
const SHORT: u64 = 64 << 10;
/// Smallest unit in which zeroes are written as zeroes.
const MIN_ZERO_ALIGN: u64 = 4096;

/// Which side of the copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

/// A failed operation. Its range is dirty again.
#[derive(Clone, Debug)]
pub(crate) struct CopyError {
    pub(crate) side: Side,
    pub(crate) error: IoError,
}

/// What an operation did.
#[derive(Debug)]
pub(crate) struct Copied {
    /// The range that is done: from its start; what followed is dirty again.
    pub(crate) range: Range<u64>,
    /// Bytes that were moved, for the speed limit.
    pub(crate) charged: u64,
    /// The source has data from here to there, as far as it is known beyond the
    /// range; empty if nothing is.
    pub(crate) data: Range<u64>,
    /// All of the range read as zeroes, so it may pay to ask for more at once.
    pub(crate) was_zero: bool,
}

/// How an operation looks at its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Ask for extents; copy at most this many bytes of data.
    Probe { request: u64 },
    /// Known to be data: read it.
    Data,
    /// Short, and likely data: read it without asking, and look at the bytes.
    Short,
}

/// What operations need, shared by all of one job. Home only.
pub(crate) struct Copier {
    state: Arc<MirrorState>,
    source: Arc<Backend>,
    pool: BufferPool,
}

/// Right to use both nodes; taken with `try_enter` before the operation, so that
/// it never waits for the end of a drained section while holding its range.
pub(crate) struct Entered {
    pub(crate) source: InFlight,
    pub(crate) target: InFlight,
}

/// A range that an operation has taken on. Dropped, it is dirty first, and free
/// then.
struct Claim {
    dirty: DirtyOnDrop<Arc<MirrorState>>,
    lock: LockRange,
}

impl Copier {
    pub(crate) fn new(state: Arc<MirrorState>, source: Arc<Backend>, pool: BufferPool) -> Rc<Self> {
        Rc::new(Self {
            state,
            source,
            pool,
        })
    }

    /// The stock of buffers.
    pub(crate) fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// Enters both nodes, or neither.
    pub(crate) fn enter(&self) -> Option<Entered> {
        Some(Entered {
            source: self.source.try_enter()?,
            target: self.state.try_enter_target()?,
        })
    }

    /// How to look at `range` when it was dirtied by the guest: short ranges are
    /// not worth a question.
    pub(crate) fn look_at_written(&self, range: &Range<u64>, request: u64) -> Look {
        let len = range.end - range.start;
        if len <= SHORT.min(self.pool.buffer_size() as u64) {
            Look::Short
        } else {
            Look::Probe { request }
        }
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
            let dirty = claim.dirty;
            let copied = match look {
                Look::Data => Copied {
                    range: range.clone(),
                    charged: copier.copy_data(range.clone(), &nodes).await?,
                    data: 0..0,
                    was_zero: false,
                },
                Look::Short => Copied {
                    range: range.clone(),
                    charged: copier.copy_short(range.clone(), &nodes).await?,
                    data: 0..0,
                    was_zero: false,
                },
                Look::Probe { request } => copier.probe(range.clone(), request, &nodes).await?,
            };
            if copied.range.end < range.end {
                copier.state.set_dirty(copied.range.end..range.end);
            }
            dirty.disarm();
            Ok(copied)
        }
    }

    async fn probe(
        &self,
        range: Range<u64>,
        request: u64,
        nodes: &Entered,
    ) -> Result<Copied, CopyError> {
        let first = nodes
            .source
            .node()
            .chain_status(None, range.start, range.end - range.start)
            .await
            .map_err(source_error)?;
        let first_end = range.start + first.len;
        if first.zero {
            let zeroes = self.state.round_in(&(range.start..first_end));
            if !zeroes.is_empty() {
                let range = self.zero_front(zeroes, nodes.target.node()).await?;
                return Ok(Copied {
                    data: 0..0,
                    range,
                    charged: 0,
                    was_zero: true,
                });
            }
        }
        let end = range
            .end
            .min(range.start + request.max(self.state.granularity));
        let range = range.start..end;
        let plan = self
            .plan(range.clone(), first.len, first.zero, nodes)
            .await?;
        let mut charged = 0;
        for Segment { range, kind } in plan {
            match kind {
                SegmentKind::Copy => charged += self.copy_data(range, nodes).await?,
                SegmentKind::Zero => self.zero_all(range, nodes.target.node()).await?,
            }
        }
        Ok(Copied {
            data: if first.zero || first_end <= end {
                0..0
            } else {
                end..first_end
            },
            range,
            charged,
            was_zero: false,
        })
    }

    /// Cuts `range`, whose first extent is known, into segments.
    async fn plan(
        &self,
        range: Range<u64>,
        first_len: u64,
        first_zero: bool,
        nodes: &Entered,
    ) -> Result<Vec<Segment>, CopyError> {
        let align = u64::from(nodes.target.limits().zero_alignment)
            .max(MIN_ZERO_ALIGN)
            .next_power_of_two();
        let mut planner = Planner::new(range.start, align, self.state.size);
        planner.push(first_len.min(range.end - range.start), first_zero);
        for _ in 1..MAX_EXTENTS {
            let left = range.end - planner.next();
            if left == 0 {
                break;
            }
            let extent = nodes
                .source
                .node()
                .chain_status(None, planner.next(), left)
                .await
                .map_err(source_error)?;
            planner.push(extent.len.clamp(1, left), extent.zero);
        }
        let left = range.end - planner.next();
        if left > 0 {
            planner.push(left, false);
        }
        Ok(planner.finish())
    }

    async fn copy_data(&self, range: Range<u64>, nodes: &Entered) -> Result<u64, CopyError> {
        let len = range.end - range.start;
        if self.copy_files(range.clone(), nodes).await {
            return Ok(len);
        }
        let buffer = self.pool.take();
        let mut offset = range.start;
        while offset < range.end {
            let len = (range.end - offset).min(self.pool.buffer_size() as u64);
            let iov = buffer.io_vec(len as usize);
            nodes
                .source
                .read(offset, iov.clone())
                .await
                .map_err(source_error)?;
            self.write_target(offset, iov, &nodes.target).await?;
            offset += len;
        }
        self.pool.give_back(buffer);
        Ok(len)
    }

    /// Copies `range` from file to file, where both nodes are no more than that. After a
    /// failure it is read and written, which says what failed.
    async fn copy_files(&self, range: Range<u64>, nodes: &Entered) -> bool {
        let len = range.end - range.start;
        let Some(from) = nodes.source.file_range(range.start, len) else {
            return false;
        };
        let copied = nodes.target.copy_from(range.start, from).await;
        self.state.note_target_written();
        copied
    }

    /// Copies a range that fits a buffer; zeroes go over as zeroes.
    async fn copy_short(&self, range: Range<u64>, nodes: &Entered) -> Result<u64, CopyError> {
        let len = range.end - range.start;
        let buffer = self.pool.take();
        let iov = buffer.io_vec(len as usize);
        nodes
            .source
            .read(range.start, iov.clone())
            .await
            .map_err(source_error)?;
        if iov.is_zero() {
            // Or the pool would not take the buffer back.
            drop(iov);
            self.zero_all(range, nodes.target.node()).await?;
        } else {
            self.write_target(range.start, iov, &nodes.target).await?;
        }
        self.pool.give_back(buffer);
        Ok(len)
    }

    /// Makes whole chunks from the start of `range` read as zeroes on the target,
    /// and says which. What reads as zeroes already is left alone, however long.
    async fn zero_front(
        &self,
        range: Range<u64>,
        target: &Arc<Node>,
    ) -> Result<Range<u64>, CopyError> {
        let (zero, len) = target_extent(target, &range).await;
        if zero {
            let known = self.state.round_in(&(range.start..range.start + len));
            if !known.is_empty() {
                return Ok(known);
            }
        }
        let end = self
            .state
            .round_out(&(range.start..range.start + len.min(MAX_ZERO)))
            .end
            .min(range.end);
        self.write_zeroes(range.start..end, target).await?;
        Ok(range.start..end)
    }

    /// Makes all of a short range read as zeroes on the target.
    async fn zero_all(&self, range: Range<u64>, target: &Arc<Node>) -> Result<(), CopyError> {
        let (zero, len) = target_extent(target, &range).await;
        if zero && len == range.end - range.start {
            return Ok(());
        }
        self.write_zeroes(range, target).await
    }

    async fn write_zeroes(&self, range: Range<u64>, target: &Node) -> Result<(), CopyError> {
        let flags = ZeroFlags {
            may_unmap: self.state.unmap,
            ..ZeroFlags::default()
        };
        let written = target
            .write_zeroes(range.start, range.end - range.start, flags)
            .await;
        self.state.note_target_written();
        written.map_err(target_error)
    }

    async fn write_target(
        &self,
        offset: u64,
        iov: IoVec,
        target: &InFlight,
    ) -> Result<(), CopyError> {
        let written = target.write(offset, iov, WriteFlags::default()).await;
        self.state.note_target_written();
        written.map_err(target_error)
    }
}

/// Whether the target reads as zeroes from the start of `range`, and how far
/// that answer reaches. A target that cannot tell has data. The caller holds the
/// range, so the answer stays true: nobody else writes the target there.
async fn target_extent(target: &Arc<Node>, range: &Range<u64>) -> (bool, u64) {
    let len = range.end - range.start;
    match target.chain_status(None, range.start, len).await {
        Ok(extent) => (extent.zero, extent.len.clamp(1, len)),
        Err(_) => (false, len),
    }
}

fn source_error(error: IoError) -> CopyError {
    CopyError {
        side: Side::Source,
        error,
    }
}

fn target_error(error: IoError) -> CopyError {
    CopyError {
        side: Side::Target,
        error,
    }
}
