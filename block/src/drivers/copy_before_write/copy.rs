//! Copies what a guest's request is about to change.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use super::behind::Room;
use super::claim::Claim;
use super::snapshot::Snapshot;
use crate::backend::{Backend, InFlight};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::copy_source::CopySource;
use crate::driver::{WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};
use crate::sync::{Mutex, lock};
use crate::wait::Line;

/// Most bytes that are copied in one piece (or one cluster).
const PIECE: u64 = 1 << 20;
/// Longest range that is read without asking what it is.
const SHORT: u64 = 64 << 10;
/// Longest range that is kept in memory for a job to write.
const MAX_KEPT: u64 = 64 << 10;
/// Most bytes of buffers that the copies of one snapshot have in flight: guests can ask
/// for many at once, each for a large cluster.
pub(super) const MAX_MEMORY: u64 = if cfg!(test) { PIECE } else { 128 << 20 };
/// Sizes of the buffers in stock, and how many of each a thread has.
const STOCK: [(usize, usize); 3] = [(4 << 10, 512), (16 << 10, 64), (SHORT as usize, 16)];

/// Buffers that have come to another thread than the one that takes them.
#[derive(Default)]
pub(super) struct Stock {
    /// A leaf lock, held for a move.
    buffers: Mutex<Vec<Arc<AlignedBuffer>>>,
}

impl Stock {
    /// Adds buffers that their owners do not use any more.
    pub(super) fn add(&self, buffers: impl Iterator<Item = Arc<AlignedBuffer>>) {
        // Not under the lock: more may be freed than are kept.
        let buffers: Vec<_> = buffers.collect();
        lock(&self.buffers).extend(buffers);
    }

    /// Gives all to this thread.
    fn take_all(&self) {
        let buffers = std::mem::take(&mut *lock(&self.buffers));
        buffers.into_iter().for_each(give_back);
    }
}

thread_local! {
    static FREE: RefCell<[Vec<Arc<AlignedBuffer>>; STOCK.len()]> =
        const { RefCell::new([const { Vec::new() }; STOCK.len()]) };
}

/// Where the snapshot is kept.
pub(super) enum Target {
    /// A child of the filter.
    Child(Child),
    /// A job's way to it, once that is there.
    Job(OnceLock<Arc<Backend>>),
}

/// The target for the time of a request.
pub(super) enum Entered {
    Child(Arc<Node>),
    Backend(InFlight),
}

impl Target {
    /// `None`: the job's target takes no requests at this moment.
    pub(super) fn enter(&self) -> Option<Entered> {
        match self {
            Self::Child(child) => Some(Entered::Child(child.node())),
            Self::Job(backend) => backend.get()?.try_enter().map(Entered::Backend),
        }
    }
}

impl Entered {
    pub(super) fn node(&self) -> &Arc<Node> {
        match self {
            Self::Child(node) => node,
            Self::Backend(request) => request.node(),
        }
    }

    /// As [`Node::copy_from`].
    pub(super) async fn copy_from(&self, offset: u64, from: CopySource) -> bool {
        match self {
            Self::Child(node) => node.copy_from(offset, from).await,
            Self::Backend(request) => request.copy_from(offset, from).await,
        }
    }
}

/// The buffers of a snapshot's copies: no more than so many bytes at a time. Any thread.
pub(super) struct Memory {
    limit: u64,
    /// Bytes taken. Atomic.
    taken: AtomicU64,
    /// Those who wait for bytes to be given back, in the order in which they get them.
    line: Line,
}

/// Bytes that were taken, until it is dropped.
struct Taken<'a> {
    memory: &'a Memory,
    len: u64,
}

impl Memory {
    /// With `limit` bytes, [`PIECE`] at least.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            taken: AtomicU64::new(0),
            line: Line::default(),
        }
    }

    /// Takes `len` bytes, at most [`PIECE`], once they are there and nobody has waited for
    /// longer. They are to be given back ([`give_back`](Self::give_back)). `false`: `given_up`
    /// came true before ([`look_again`](Self::look_again)).
    ///
    /// Cancel: nothing is taken.
    pub(super) async fn take(&self, len: u64, given_up: impl Fn() -> bool + Unpin) -> bool {
        let more = |taken: u64| taken.checked_add(len).filter(|sum| *sum <= self.limit);
        let try_take = || self.taken.fetch_update(SeqCst, SeqCst, more).is_ok();
        self.line.turn(try_take, given_up).await
    }

    /// Lets all who wait look again.
    pub(super) fn look_again(&self) {
        self.line.wake_all();
    }

    /// Gives back what was taken.
    pub(super) fn give_back(&self, len: u64) {
        self.taken.fetch_sub(len, SeqCst);
        self.line.wake_first();
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.memory.give_back(self.len);
    }
}

/// A copy that a drained section has to wait for, even if the guest does not.
struct Counted(Arc<Snapshot>);

impl Counted {
    fn new(snapshot: &Arc<Snapshot>) -> Self {
        snapshot.copies.fetch_add(1, SeqCst);
        Self(Arc::clone(snapshot))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.copies.fetch_sub(1, SeqCst);
    }
}

/// Sees to it that `range` (whole clusters) may be overwritten: all of it is copied, by
/// this call or by others, and nobody reads it; or nobody needs it any more.
///
/// A failed copy of somebody else's is tried again. With `given_up` set nothing new is
/// begun. Errors: those of an own copy. Cancel: clusters that are being copied are to be
/// copied again.
pub(super) async fn secure(
    snapshot: Arc<Snapshot>,
    range: Range<u64>,
    given_up: Rc<Cell<bool>>,
) -> Result<(), IoError> {
    loop {
        if snapshot.lets_pass() || given_up.get() {
            return Ok(());
        }
        if let Some(todo) = snapshot.any_todo(&range) {
            let most = PIECE.max(snapshot.cluster());
            let piece = todo.start..todo.end.min(todo.start.saturating_add(most));
            if let Some(claim) = snapshot.claim(piece) {
                let _counted = Counted::new(&snapshot);
                copy(&snapshot, claim, &given_up).await?;
            }
            continue;
        }
        if snapshot.is_free(&range) {
            return Ok(());
        }
        let changes = || {
            given_up.get()
                || snapshot.lets_pass()
                || snapshot.is_free(&range)
                || snapshot.any_todo(&range).is_some()
        };
        snapshot.until(range.clone(), changes).await;
    }
}

/// Has in memory what is claimed, if a job then takes it from there. Else the claim is returned.
///
/// The target is not entered: who waits for room waits for those who do.
async fn release(
    snapshot: &Arc<Snapshot>,
    claim: Claim,
    given_up: &Cell<bool>,
) -> Result<Option<Claim>, IoError> {
    let range = claim.range();
    let len = range.end - range.start;
    if len > MAX_KEPT || snapshot.looks_at_layers() || !snapshot.behind.may_release() {
        return Ok(Some(claim));
    }
    let given_up = || snapshot.lets_pass() || given_up.get();
    let Some(room) = Room::take(snapshot, len, given_up).await else {
        return match given_up() {
            true => Err(cancelled(snapshot, &range)),
            false => Ok(Some(claim)),
        };
    };
    let content = fetch(snapshot, range).await?;
    room.keep(claim, content);
    Ok(None)
}

/// Copies what is claimed, or has it in memory.
async fn copy(
    snapshot: &Arc<Snapshot>,
    claim: Claim,
    given_up: &Cell<bool>,
) -> Result<(), IoError> {
    let Some(claim) = release(snapshot, claim, given_up).await? else {
        return Ok(());
    };
    let mut claim = claim;
    // Counted there from the beginning, within the guest's request: so a section of the
    // target knows of it, also when the guest has gone on without waiting.
    let target = snapshot.target.enter();
    let target = target.ok_or_else(|| cancelled(snapshot, &claim.range()))?;
    while snapshot.looks_at_layers() && !claim.range().is_empty() {
        let cluster = first_cluster(snapshot, &claim.range());
        if is_allocated(snapshot, cluster.clone()).await? {
            break;
        }
        claim.skip_to(cluster.end);
    }
    let range = claim.range();
    if range.is_empty() {
        return Ok(());
    }
    let end = match snapshot.looks_at_layers() {
        // The next one is looked at by itself.
        true => first_cluster(snapshot, &range).end,
        false => range.end,
    };
    let (mut at, mut moved) = (range.start, 0);
    while at < end {
        if snapshot.lets_pass() {
            // Nobody needs the rest, and the target may be somebody else's soon.
            return Ok(());
        }
        let piece = at..end.min(at + PIECE);
        at = piece.end;
        moved += carry_over(snapshot, &target, piece).await?;
    }
    snapshot.behind.has_copied();
    snapshot.tell_copied(end - range.start, moved);
    claim.copied_to(end);
    snapshot.note_saved();
    forget_taken_out(snapshot, &target, range.start..end).await;
    Ok(())
}

/// Discards on the target what has been taken out of the snapshot while it was copied.
/// Who took it out discards too, but may have done so before it was there.
pub(super) async fn forget_taken_out(snapshot: &Snapshot, target: &Entered, mut range: Range<u64>) {
    while let Some(run) = snapshot.first_taken_out(&range) {
        range.start = run.end;
        let len = run.end - run.start;
        if let Err(error) = target.node().discard(run.start, len).await {
            // It only takes space.
            tracing::debug!(%error, "what is not needed of a snapshot is not discarded");
        }
    }
}

fn cancelled(snapshot: &Snapshot, range: &Range<u64>) -> IoError {
    snapshot.error(IoOp::Write, range, libc::ECANCELED)
}

fn first_cluster(snapshot: &Snapshot, range: &Range<u64>) -> Range<u64> {
    range.start..range.end.min(range.start + snapshot.cluster())
}

/// Whether some of a cluster is in the topmost layer.
async fn is_allocated(snapshot: &Snapshot, cluster: Range<u64>) -> Result<bool, IoError> {
    let source = snapshot.source();
    let Some(base) = source.backing() else {
        return Ok(true);
    };
    let mut at = cluster.start;
    while at < cluster.end {
        let extent = source
            .chain_status(Some(&base), at, cluster.end - at)
            .await?;
        if extent.depth > 0 {
            return Ok(true);
        }
        at += extent.len.max(1);
    }
    Ok(false)
}

/// Copies a range of at most [`PIECE`]. Gives the bytes that were moved.
async fn carry_over(
    snapshot: &Snapshot,
    target: &Entered,
    range: Range<u64>,
) -> Result<u64, IoError> {
    let len = range.end - range.start;
    let memory = &snapshot.memory;
    if !memory.take(len, || snapshot.lets_pass()).await {
        return Err(cancelled(snapshot, &range));
    }
    let _taken = Taken { memory, len };
    let content = fetch(snapshot, range.clone()).await?;
    let moved = content.put(target, &range).await?;
    if let Some(buffer) = content.into_buffer() {
        give_back(buffer);
    }
    Ok(moved)
}

/// What the snapshot has in a range.
#[derive(Clone)]
pub(super) enum Content {
    Zeroes,
    /// As long as the range, and longer.
    Data(Arc<AlignedBuffer>),
}

/// Reads a range of at most [`PIECE`], which must not change meanwhile. Cancel: nothing is
/// left behind.
async fn fetch(snapshot: &Snapshot, range: Range<u64>) -> Result<Content, IoError> {
    let len = range.end - range.start;
    let source = snapshot.source();
    if len > SHORT {
        let extent = source.chain_status(None, range.start, len).await?;
        if extent.zero && extent.len >= len {
            return Ok(Content::Zeroes);
        }
    }
    let buffer = take_buffer(len as usize, snapshot.behind.stock());
    let iov = buffer.io_vec(len as usize);
    source.read(range.start, iov.clone()).await?;
    if !iov.is_zero() {
        return Ok(Content::Data(buffer));
    }
    drop(iov);
    give_back(buffer);
    Ok(Content::Zeroes)
}

impl Content {
    /// Writes it to its `range` of the target. Gives the bytes that were moved. May be
    /// called again.
    pub(super) async fn put(&self, target: &Entered, range: &Range<u64>) -> Result<u64, IoError> {
        let Some(iov) = self.data(range) else {
            zero(target, range.clone()).await?;
            return Ok(0);
        };
        let len = range.end - range.start;
        let flags = WriteFlags::default();
        match target {
            Entered::Child(node) => node.write(range.start, iov, flags).await?,
            Entered::Backend(request) => request.write(range.start, iov, flags).await?,
        }
        Ok(len)
    }

    /// What is to be written to `range`, if it is not zeroes.
    pub(super) fn data(&self, range: &Range<u64>) -> Option<IoVec> {
        match self {
            Self::Zeroes => None,
            Self::Data(buffer) => Some(buffer.io_vec((range.end - range.start) as usize)),
        }
    }

    /// Copies what begins at `offset` of it to all of `into`.
    pub(super) fn copy_to(&self, offset: usize, into: &IoVec) {
        match self {
            Self::Zeroes => into.fill(0),
            Self::Data(buffer) => {
                let end = offset + into.len();
                into.copy_from_iov(0, &buffer.io_vec(end).slice(offset, into.len()));
            }
        }
    }

    /// It is not needed any more.
    pub(super) fn into_buffer(self) -> Option<Arc<AlignedBuffer>> {
        match self {
            Self::Zeroes => None,
            Self::Data(buffer) => Some(buffer),
        }
    }
}

async fn zero(target: &Entered, range: Range<u64>) -> Result<(), IoError> {
    let len = range.end - range.start;
    if has_zeroes(target.node(), &range).await {
        return Ok(());
    }
    let flags = ZeroFlags {
        may_unmap: true,
        ..ZeroFlags::default()
    };
    match target {
        Entered::Child(node) => node.write_zeroes(range.start, len, flags).await,
        Entered::Backend(request) => request.write_zeroes(range.start, len, flags).await,
    }
}

/// Whether `node` itself has zeroes there. What is only read, because nothing is there,
/// may be something else one day: lower layers may change, one may even be the source,
/// and others may not be open.
async fn has_zeroes(node: &Arc<Node>, range: &Range<u64>) -> bool {
    let len = range.end - range.start;
    match node.chain_status(None, range.start, len).await {
        Ok(extent) => extent.depth == 1 && extent.zero && extent.len >= len,
        Err(_) => false,
    }
}

/// Size of the buffer for `len` bytes.
pub(super) fn buffer_size(len: usize) -> usize {
    let in_stock = STOCK.iter().map(|(size, _)| *size);
    in_stock.clone().find(|size| len <= *size).unwrap_or(len)
}

fn take_buffer(len: usize, stock: &Stock) -> Arc<AlignedBuffer> {
    let size = buffer_size(len);
    let of_size = STOCK.iter().position(|(of_stock, _)| size == *of_stock);
    let take = || of_size.and_then(|of_size| FREE.with_borrow_mut(|free| free[of_size].pop()));
    if let Some(buffer) = take() {
        return buffer;
    }
    stock.take_all();
    take().unwrap_or_else(|| AlignedBuffer::new(size))
}

/// Keeps a buffer that nobody (the kernel) uses any more.
fn give_back(mut buffer: Arc<AlignedBuffer>) {
    let size = STOCK.iter().position(|(size, _)| buffer.len() == *size);
    let (Some(size), Some(_)) = (size, Arc::get_mut(&mut buffer)) else {
        return;
    };
    FREE.with_borrow_mut(|free| {
        if free[size].len() < STOCK[size].1 {
            free[size].push(buffer);
        }
    });
}
