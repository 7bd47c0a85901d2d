//! The filter above the source: sees every guest request of a mirrored disk.
//!
//! In `background` mode it records what a request changed. In `write-blocking`
//! mode it also writes the target, from a private copy of the payload (the guest
//! may scribble over its own), source first; what it cannot mirror there and
//! then is recorded and left to the copier. The rules both follow are in
//! `state`.
//!
//! A guest request never fails because of the target, and waits for it no longer than
//! the mirror lives, or catches up: what is under way then goes on by itself.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use block::{
    BlockDriver, BoxFuture, Child, DiscardMode, Extent, IoError, IoVec, Limits, Node, RangeGuard,
    UnnamedBitmap, WriteFlags, ZeroFlags, runtime,
};
use futures_util::future::{Either, LocalBoxFuture, select};

use super::active::{ActiveRequest, CopyBudget};
use super::private_copy::PrivateCopy;
use super::state::{DirtyOnDrop, MirrorState};

/// Bytes of one write that are mirrored in one piece. Longer writes go in
/// several, so that a private copy stays small.
const ACTIVE_PIECE: u64 = 1 << 20;

/// The driver of the filter node.
pub(crate) struct MirrorTop {
    source: Child,
    state: Arc<MirrorState>,
}

impl MirrorTop {
    /// A filter over `source` that records in `state` while that is engaged.
    pub(crate) fn new(source: Child, state: Arc<MirrorState>) -> Self {
        Self { source, state }
    }

    /// Runs `request`, which may change `range` of the source, as `background`
    /// mode does: dirty afterwards, whatever becomes of it.
    async fn record<T>(
        &self,
        range: Range<u64>,
        request: impl Future<Output = Result<T, IoError>>,
    ) -> Result<T, IoError> {
        if !self.state.is_engaged() {
            return request.await;
        }
        let dirty = DirtyOnDrop::new(&*self.state, range);
        let result = request.await;
        drop(dirty);
        result
    }

    /// Locks a range, unless the guest is not to wait for the target any more.
    async fn lock(&self, range: &Range<u64>) -> Option<RangeGuard> {
        let lock = self.state.in_flight.lock(range.clone());
        match select(lock, self.state.released()).await {
            Either::Left((guard, _)) => Some(guard),
            Either::Right(_) => None,
        }
    }

    /// Waits for the target's part of a request, which is counted as on its way, as long
    /// as the guest is to wait for the target. Then it goes on by itself, and its range is
    /// copied again.
    async fn wait_for_target(&self, part: LocalBoxFuture<'static, ()>, range: Range<u64>) {
        if let Either::Right((_, part)) = select(part, self.state.released()).await {
            // The copier waits for the range, and so for what is under way, before
            // anybody takes the target for equal.
            self.state.set_dirty(range);
            runtime::spawn_local(part).detach();
        }
    }

    async fn write_pieces(
        &self,
        source: &Node,
        range: Range<u64>,
        iov: &IoVec,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let mut at = range.start;
        while self.state.holds_guest() && at < range.end {
            let piece = at..range.end.min(at + ACTIVE_PIECE);
            at = piece.end;
            let skip = (piece.start - range.start) as usize;
            let part = iov.slice(skip, (piece.end - piece.start) as usize);
            self.write_actively(source, piece, part, flags).await?;
        }
        if at < range.end {
            let rest = iov.slice((at - range.start) as usize, (range.end - at) as usize);
            self.record(at..range.end, source.write(at, rest, flags))
                .await?;
        }
        Ok(())
    }

    /// What it takes to mirror a write here and now. Else it is left to the copier, who has
    /// to wait for it if there is a guard.
    async fn begin_write(&self, range: &Range<u64>) -> Result<Begun, Option<RangeGuard>> {
        let state = &self.state;
        let budget = CopyBudget::reserve(state, range.end - range.start).ok_or(None)?;
        let lock = self.lock(range).await.ok_or(None)?;
        let mirrored = ActivePart::of(state, range);
        if mirrored.is_empty() {
            return Err(Some(lock));
        }
        let claim = mirrored.begin(state, range, lock);
        Ok((budget, claim, mirrored.range()))
    }

    async fn write_actively(
        &self,
        source: &Node,
        range: Range<u64>,
        iov: IoVec,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let state = &self.state;
        let (budget, claim, part) = match self.begin_write(&range).await {
            Ok(begun) => begun,
            Err(guard) => {
                let write = source.write(range.start, iov, flags);
                let written = self.record(range, write).await;
                drop(guard);
                return written;
            }
        };
        let copy = PrivateCopy::of(&iov);
        drop(iov);
        source.write(range.start, copy.io_vec(), flags).await?;
        let Some(target) = state.try_enter_target() else {
            // It is being drained: the copier does it, later.
            return Ok(());
        };
        let request = ActiveRequest::begin(state, part.end - part.start);
        let counted = state.send_active();
        let skip = (part.start - range.start) as usize;
        let written = Box::pin(async move {
            let data = copy.part(skip, (part.end - part.start) as usize);
            let written = target.write(part.start, data, WriteFlags::default()).await;
            claim.finish(written, request);
            copy.give_back();
            drop((target, budget, counted));
        });
        self.wait_for_target(written, range).await;
        Ok(())
    }

    async fn zero_actively(
        &self,
        source: &Node,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        let state = &self.state;
        let Some(lock) = self.lock(&range).await else {
            let len = range.end - range.start;
            return self
                .record(range.clone(), source.write_zeroes(range.start, len, flags))
                .await;
        };
        let mirrored = ActivePart::of(state, &range);
        let claim = mirrored.begin(state, &range, lock);
        source
            .write_zeroes(range.start, range.end - range.start, flags)
            .await?;
        if mirrored.is_empty() {
            return Ok(());
        }
        let Some(target) = state.try_enter_target() else {
            // It is being drained: the copier does it, later.
            return Ok(());
        };
        let part = mirrored.range();
        let zero = ZeroFlags {
            fua: false,
            may_unmap: flags.may_unmap && state.rules.unmap,
            no_fallback: false,
        };
        let len = part.end - part.start;
        let request = ActiveRequest::begin(state, len);
        let counted = state.send_active();
        let written = Box::pin(async move {
            let written = target.write_zeroes(part.start, len, zero).await;
            claim.finish(written, request);
            drop((target, counted));
        });
        self.wait_for_target(written, range).await;
        Ok(())
    }

    /// A discard leaves it to the source what its range reads as. Where that is
    /// zeroes the target gets zeroes (unmapped if it may); what else it is, the
    /// copier finds out. So source and target stay equal even if one of them
    /// ignores discards.
    async fn discard_actively(&self, source: &Node, range: Range<u64>) -> Result<(), IoError> {
        let state = &self.state;
        let len = range.end - range.start;
        let Some(lock) = self.lock(&range).await else {
            return self
                .record(range.clone(), source.discard(range.start, len))
                .await;
        };
        let mirrored = ActivePart::of(state, &range);
        let claim = mirrored.begin(state, &range, lock);
        source.discard(range.start, len).await?;
        if mirrored.is_empty() {
            return Ok(());
        }
        let reads_as_zero = source
            .block_status(range.start, len)
            .await
            .is_ok_and(|extent| extent.flags.zero && extent.len >= len);
        let target = reads_as_zero.then(|| state.try_enter_target()).flatten();
        let Some(target) = target else {
            // It is being drained: the copier does it, later.
            return Ok(());
        };
        let part = mirrored.range();
        let zero = ZeroFlags {
            fua: false,
            may_unmap: state.rules.unmap,
            no_fallback: false,
        };
        let len = part.end - part.start;
        // As in QEMU, discards are no work that progress shows.
        let request = ActiveRequest::begin(state, 0);
        let counted = state.send_active();
        let written = Box::pin(async move {
            let written = target.write_zeroes(part.start, len, zero).await;
            claim.finish(written, request);
            drop((target, counted));
        });
        self.wait_for_target(written, range).await;
        Ok(())
    }
}

/// What a write to both sides has: its share of memory, what becomes of the range, and
/// what of it goes to the target.
type Begun = (CopyBudget, Claim, Range<u64>);

/// A range that a request mirrors. Dropped, it is dirty first, and free then.
struct Claim {
    dirty: DirtyOnDrop<Arc<MirrorState>>,
    lock: RangeGuard,
    state: Arc<MirrorState>,
}

impl Claim {
    /// The target has been written, or not: then the range stays to be copied.
    fn finish(self, written: Result<(), IoError>, request: ActiveRequest) {
        self.state.note_target_written();
        match written {
            Ok(()) => {
                self.dirty.disarm();
                request.done();
            }
            Err(error) => {
                drop(self.dirty);
                self.state.note_active_error(error);
            }
        }
        drop(self.lock);
    }
}

/// The part of a write-blocking request that goes to the target now.
///
/// A chunk that the request covers in part, and that is dirty, will be copied by
/// the copier anyway; its part is left out.
struct ActivePart {
    range: Range<u64>,
}

impl ActivePart {
    /// The caller holds the range lock, so the copier cannot take these chunks.
    fn of(state: &MirrorState, range: &Range<u64>) -> Self {
        let whole = state.round_in(range);
        if state.rules.whole_chunks {
            let part = if whole.is_empty() {
                range.start..range.start
            } else {
                whole
            };
            return Self { range: part };
        }
        let mut part = range.clone();
        if part.start != whole.start && state.dirty.is_dirty(part.start) {
            part.start = part
                .start
                .saturating_add(1)
                .next_multiple_of(state.granularity);
        }
        if part.end > part.start && part.end != whole.end && state.dirty.is_dirty(part.end - 1) {
            part.end = (part.end - 1) & !(state.granularity - 1);
        }
        part.end = part.end.max(part.start);
        Self { range: part }
    }

    fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Cleans the chunks that the request covers, and arms their return for the
    /// whole request.
    fn begin(&self, state: &Arc<MirrorState>, range: &Range<u64>, lock: RangeGuard) -> Claim {
        let dirty = DirtyOnDrop::new(Arc::clone(state), range.clone());
        let whole = state.round_in(range);
        if !whole.is_empty() {
            state.clear_dirty(whole);
        }
        if state.rules.whole_chunks {
            // The ends are the copier's. It waits for the range before it looks.
            state.set_dirty(range.start..self.range.start);
            state.set_dirty(self.range.end..range.end);
        }
        Claim {
            dirty,
            lock,
            state: Arc::clone(state),
        }
    }
}

impl BlockDriver for MirrorTop {
    fn name(&self) -> &'static str {
        "mirror_top"
    }

    fn size(&self) -> u64 {
        self.source.node().size()
    }

    fn limits(&self) -> Limits {
        self.source.node().limits()
    }

    fn filename(&self) -> String {
        self.source.node().driver().filename()
    }

    fn recorded(&self) -> Option<UnnamedBitmap> {
        let dirty = &self.state.dirty;
        Some(UnnamedBitmap {
            granularity: dirty.granularity(),
            count: dirty.count_bytes(),
            recording: true,
        })
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let started = Instant::now();
            let result = self.source.node().read(offset, iov).await;
            self.state.latency.record(started.elapsed());
            result
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let started = Instant::now();
            let source = self.source.node();
            let len = iov.len() as u64;
            let range = offset..offset.saturating_add(len);
            let result = if len == 0 || !self.state.holds_guest() {
                self.record(range, source.write(offset, iov, flags)).await
            } else if len <= ACTIVE_PIECE {
                self.write_actively(&source, range, iov, flags).await
            } else {
                self.write_pieces(&source, range, &iov, flags).await
            };
            self.state.latency.record(started.elapsed());
            result
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let range = offset..offset.saturating_add(len);
            let source = self.source.node();
            let result = if self.state.holds_guest() {
                self.zero_actively(&source, range, flags).await
            } else {
                self.record(range, source.write_zeroes(offset, len, flags))
                    .await
            };
            self.state.note_zeroed();
            result
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let range = offset..offset.saturating_add(len);
            let source = self.source.node();
            if source.options().discard == DiscardMode::Ignore {
                // Nothing changes. The option does not while this is on its way.
                return source.discard(offset, len).await;
            }
            let result = if self.state.holds_guest() {
                self.discard_actively(&source, range).await
            } else {
                self.record(range, source.discard(offset, len)).await
            };
            self.state.note_zeroed();
            result
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.source.node().flush().await })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move { self.source.node().block_status(offset, len).await })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.source.node())
    }
}
