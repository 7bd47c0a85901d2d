//! What a disk held at one instant: which clusters of that have been copied, who
//! copies one, and who waits.
//!
//! Not here: how a cluster is carried over (`copy`; a backup job brings its own way),
//! and what becomes of a guest's request if that fails (the driver).
//!
//! # States of a cluster
//!
//! | state | `todo` | `needed` | `pending` | `access` |
//! |---|---|---|---|---|
//! | to do: only the source has it | set | set | set | set |
//! | busy: somebody copies it | clear | set | set | set |
//! | held: in memory, on its way to the target | clear | clear | set | set |
//! | done: the target has it | clear | clear | clear | set |
//! | not part of the snapshot | clear | clear | clear | clear |
//!
//! Clearing a bit of `todo` is the claim: of several who try, one gets it. A copy that
//! failed sets it again. A guest's write waits until none of its clusters is `needed`,
//! so the source keeps what the snapshot needs; one that finds it so at once has taken
//! no lock.
//!
//! Who reads the snapshot from the source *freezes* the range first, and then looks
//! whether it is still needed; who writes looks whether it is needed, and then
//! whether it is frozen. All of that is sequentially consistent, so at least one of the
//! two sees the other. What is `pending` and not `needed` is read from memory; what ceases
//! to be both ceases to be `pending` first, so nobody takes it for held.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::account::SnapshotAccount;
use super::behind::Behind;
use super::claim::Claim;
use super::copy::{MAX_MEMORY, Memory, Target};
use super::stalls::{Stalled, Stalls};
use super::waiting::{Change, Waiting};
use crate::backend::Backend;
use crate::dirty_bitmap::{BitmapError, DirtyBitmap};
use crate::driver::UnnamedBitmap;
use crate::error::{IoError, IoOp};
use crate::latency::GuestLatency;
use crate::node::{Child, Node};
use crate::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst};

/// Chunks that one step of a long walk looks at.
const STEP: u64 = 1 << 12;
/// Clusters that are looked at one by one; longer ranges are searched.
const FEW: u64 = 64;

/// Who wants to know how a snapshot gets on: a backup job. Called on whatever thread
/// it happens, with no lock held; must not block.
pub trait SnapshotObserver: Send + Sync {
    /// A guest's request has copied `len` bytes, `moved` of them as data.
    fn copied_by_guest(&self, len: u64, moved: u64);

    /// Nothing is left to be done, something is to be done (again), or the snapshot is broken.
    fn changed(&self);
}

/// The snapshot of a `copy-before-write` filter. Any thread.
pub struct Snapshot {
    size: u64,
    /// Bytes that are copied at least.
    cluster: u64,
    /// Bytes that are discarded of it at least: a cluster as users know it.
    shown: u64,
    pub(super) source: Child,
    pub(super) target: Target,
    /// Clusters to be copied that nobody copies. Atomic.
    todo: DirtyBitmap,
    /// Clusters that only the source has: they must not be written over. Atomic.
    needed: DirtyBitmap,
    /// Clusters that the target does not have yet, whether or not somebody copies them.
    /// Atomic.
    pending: DirtyBitmap,
    /// Clusters that can be read. Atomic.
    access: DirtyBitmap,
    /// Why the snapshot is not what it should be: an errno, or 0. Never taken back.
    broken: AtomicI32,
    /// Nobody needs the snapshot any more: requests pass. Never taken back.
    ended: AtomicBool,
    /// Ranges that are being read from the source.
    frozen: AtomicUsize,
    /// Copies that a guest's request began, and which may outlive it.
    pub(super) copies: AtomicUsize,
    /// Of those.
    pub(super) memory: Memory,
    /// What is saved behind the backs of guests' requests.
    pub(super) behind: Behind,
    /// Only what this node's own layer has is copied, at the cost of a look at each
    /// cluster. Atomic; set before requests come, and cleared once everything else is
    /// out of the snapshot.
    only_allocated: AtomicBool,
    waiting: Waiting,
    observer: OnceLock<Arc<dyn SnapshotObserver>>,
    /// What the guest feels, if somebody observes or listens.
    latency: GuestLatency,
    /// How many listen. Atomic.
    listeners: AtomicUsize,
    stalled: Stalled,
    /// Most bytes that were saved at once.
    most_saved: AtomicU64,
}

impl Snapshot {
    /// A snapshot of `source` as it is at this moment, of which nothing is copied.
    pub(super) fn new(source: Child, target: Target, account: SnapshotAccount) -> Self {
        let SnapshotAccount {
            todo,
            needed,
            pending,
            access,
            shown,
        } = account;
        Self {
            size: todo.size(),
            cluster: todo.granularity(),
            shown,
            source,
            target,
            todo,
            needed,
            pending,
            access,
            broken: AtomicI32::new(0),
            ended: AtomicBool::new(false),
            frozen: AtomicUsize::new(0),
            copies: AtomicUsize::new(0),
            memory: Memory::new(MAX_MEMORY),
            behind: Behind::default(),
            only_allocated: AtomicBool::new(false),
            waiting: Waiting::default(),
            observer: OnceLock::new(),
            latency: GuestLatency::default(),
            stalled: Stalled::default(),
            listeners: AtomicUsize::new(0),
            most_saved: AtomicU64::new(0),
        }
    }

    /// A job's way to the target, before requests come. The first call counts.
    pub fn set_target(&self, backend: Arc<Backend>) {
        if let Target::Job(target) = &self.target {
            let _ = target.set(backend);
        }
    }

    /// Discards on the source what has been copied. The filter was made with the right
    /// to.
    pub async fn discard_source(&self, range: Range<u64>) -> Result<(), IoError> {
        let len = range.end.saturating_sub(range.start);
        self.source.node().discard(range.start, len).await
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes per cluster: a power of two.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The node below the filter at this moment.
    pub fn source(&self) -> Arc<Node> {
        self.source.node()
    }

    /// From now on `observer` is told. The first call counts.
    pub fn observe(&self, observer: Arc<dyn SnapshotObserver>) {
        let _ = self.observer.set(observer);
    }

    /// Has what the guest feels noted until the result is dropped.
    pub fn listen(self: &Arc<Self>) -> Listening {
        self.listeners.fetch_add(1, SeqCst);
        Listening(Arc::clone(self))
    }

    /// What the guest feels since somebody observes or listens.
    pub fn latency(&self) -> &GuestLatency {
        &self.latency
    }

    /// Whether requests of the guest wait at this moment until something is copied.
    pub fn holds_guests(&self) -> bool {
        self.copies.load(SeqCst) > 0 || self.waiting.is_waited_for()
    }

    /// How guests' requests had to wait until now.
    pub fn stalls(&self) -> Stalls {
        self.stalled.look()
    }

    pub(super) fn note_stall(&self, waited: Duration) {
        self.stalled.note(waited);
    }

    /// Bytes of clusters that can be read.
    pub(super) fn readable_bytes(&self) -> u64 {
        self.bytes(&self.access)
    }

    /// Bytes of clusters that the target has and that can still be read.
    pub fn saved_bytes(&self) -> u64 {
        self.readable_bytes().saturating_sub(self.pending_bytes())
    }

    /// So many bytes, as clients see bitmaps of the snapshot.
    pub(super) fn unnamed(&self, bytes: u64) -> UnnamedBitmap {
        UnnamedBitmap {
            granularity: self.shown,
            count: bytes.next_multiple_of(self.shown),
            recording: false,
        }
    }

    /// Most of [`saved_bytes`](Self::saved_bytes) that there was.
    pub fn most_saved_bytes(&self) -> u64 {
        self.most_saved.load(SeqCst)
    }

    pub(super) fn note_saved(&self) {
        self.most_saved.fetch_max(self.saved_bytes(), SeqCst);
    }

    /// The first run of clusters of `range` (whole clusters) that are not part of the
    /// snapshot any more.
    pub(super) fn first_taken_out(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let start = self.access.next_clean(range)?;
        let next = self.access.next_dirty_area(start, 1);
        let end = next.map_or(range.end, |area| area.start.min(range.end));
        Some(start..end)
    }

    pub(super) fn is_measured(&self) -> bool {
        self.observer.get().is_some() || self.listeners.load(SeqCst) > 0
    }

    /// Only what the node below has in its own layer is part of the snapshot. To be
    /// called before requests come; the caller then takes the rest out
    /// ([`skip`](Self::skip)) and says so with [`all_looked_at`](Self::all_looked_at).
    pub fn only_allocated(&self) {
        self.only_allocated.store(true, SeqCst);
    }

    /// What is not in the layer has been taken out.
    pub fn all_looked_at(&self) {
        self.only_allocated.store(false, SeqCst);
    }

    pub(super) fn looks_at_layers(&self) -> bool {
        self.only_allocated.load(SeqCst)
    }

    /// The errno of what broke the snapshot, if something did: then it is not what the
    /// disk held, and never will be. Who has copied looks at it *after* the copy.
    pub fn broken(&self) -> Option<i32> {
        match self.broken.load(SeqCst) {
            0 => None,
            errno => Some(errno),
        }
    }

    /// The snapshot is lost: guests' requests pass, reads of it fail. The first errno
    /// counts.
    pub fn set_broken(&self, errno: i32) {
        let errno = if errno == 0 { libc::EIO } else { errno };
        if self
            .broken
            .compare_exchange(0, errno, SeqCst, SeqCst)
            .is_ok()
        {
            tracing::warn!(
                source = self.source.node().name(),
                error = %std::io::Error::from_raw_os_error(errno),
                "a snapshot is broken: what the guest wrote over could not be saved"
            );
            self.let_all_look_again();
        }
    }

    /// The snapshot is not needed any more: guests' requests pass.
    pub fn end(&self) {
        self.ended.store(true, SeqCst);
        self.let_all_look_again();
    }

    fn let_all_look_again(&self) {
        self.memory.look_again();
        self.behind.forget();
        self.changed(0..self.size);
    }

    /// Whether guests' requests pass without any more copying, so that the snapshot cannot
    /// be read any more.
    pub(super) fn lets_pass(&self) -> bool {
        self.ended.load(SeqCst) || self.broken().is_some()
    }

    /// Bytes of clusters that nobody has copied or copies.
    pub fn todo_bytes(&self) -> u64 {
        self.bytes(&self.todo)
    }

    /// Bytes of clusters that are not copied yet, those being copied included.
    pub fn pending_bytes(&self) -> u64 {
        self.bytes(&self.pending)
    }

    fn bytes(&self, bitmap: &DirtyBitmap) -> u64 {
        let whole = bitmap.count_bytes();
        let excess = match self.size % self.cluster {
            0 => 0,
            short if bitmap.is_dirty(self.size - 1) => self.cluster - short,
            _ => 0,
        };
        whole.saturating_sub(excess).min(self.size)
    }

    /// Whether nothing is left to be copied, or being copied.
    pub fn is_complete(&self) -> bool {
        self.pending.is_clean()
    }

    /// A bitmap of the clusters that are not copied, those included that somebody copies.
    ///
    /// Errors: not enough memory.
    pub fn not_copied(&self) -> Result<DirtyBitmap, BitmapError> {
        let left = DirtyBitmap::new(self.size, self.cluster)?;
        let mut at = 0;
        while let Some(run) = self.pending.next_dirty(at) {
            left.set(run.start, run.end - run.start);
            at = run.end;
        }
        Ok(left)
    }

    /// The first run of clusters from `from` on that are to be copied and that nobody
    /// copies, no longer than `most` bytes (or one cluster).
    pub fn next_todo(&self, from: u64, most: u64) -> Option<Range<u64>> {
        self.todo.next_dirty_area(from, most)
    }

    /// Takes on the copying of the first run in `range` (whole clusters, bounded by
    /// the caller) that is to be copied. `None`: there is none.
    pub fn claim(self: &Arc<Self>, range: Range<u64>) -> Option<Claim> {
        let mut runs = self
            .todo
            .take(range.start, range.end - range.start)
            .into_iter();
        let first = runs.next()?;
        for run in runs {
            self.todo.set(run.start, run.end - run.start);
            // Who found it taken may be waiting for it.
            self.changed(run);
        }
        Some(Claim {
            snapshot: Arc::clone(self),
            range: first,
        })
    }

    /// Takes whole clusters inside `range` out of the snapshot, as far as nobody copies
    /// them: they need not be copied and cannot be read.
    pub fn skip(&self, range: Range<u64>) {
        let range = self.round_in(&range);
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at.saturating_add(STEP * self.cluster));
            self.access.clear(at, end - at);
            for run in self.todo.take(at, end - at) {
                self.settle(run);
            }
            at = end;
        }
    }

    /// Whether a write to `range` may go to the source at once.
    pub(super) fn is_free(&self, range: &Range<u64>) -> bool {
        // In this order: see the module's head.
        if self.any(&self.needed, range) {
            return false;
        }
        self.frozen.load(SeqCst) == 0 || !self.waiting.is_frozen(range)
    }

    pub(super) fn any_todo(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let found = self.first(&self.todo, range)?;
        Some(found..range.end)
    }

    fn any(&self, bitmap: &DirtyBitmap, range: &Range<u64>) -> bool {
        self.first(bitmap, range).is_some()
    }

    /// Start of the first cluster of `range` (whole clusters) that is set.
    fn first(&self, bitmap: &DirtyBitmap, range: &Range<u64>) -> Option<u64> {
        let mut at = range.start;
        let few = range.end.min(at.saturating_add(FEW * self.cluster));
        while at < few {
            if bitmap.is_dirty(at) {
                return Some(at);
            }
            at += self.cluster;
        }
        if at >= range.end {
            return None;
        }
        let area = bitmap.next_dirty_area(at, 1)?;
        (area.start < range.end).then_some(area.start)
    }

    /// Waits for something to change in `range` that makes `test` true.
    pub(super) fn until<'a, F>(&'a self, range: Range<u64>, test: F) -> Change<'a, F>
    where
        F: Fn() -> bool + Unpin,
    {
        self.waiting.until(range, test)
    }

    /// Something has changed in `range` that whoever copies the rest has to know.
    pub(super) fn changed(&self, range: Range<u64>) {
        self.waiting.changed(&range);
        self.tell_changed();
    }

    /// Nobody copies the clusters of `range` any more, but they are to be copied.
    pub(super) fn put_back(&self, range: Range<u64>) {
        self.todo.set(range.start, range.end - range.start);
        self.changed(range);
    }

    /// What the snapshot had in the clusters of `range` is in memory.
    pub(super) fn hold(&self, range: Range<u64>) {
        self.needed.clear(range.start, range.end - range.start);
        self.waiting.changed(&range);
    }

    /// The clusters of `range` that somebody was to copy are not part of the snapshot.
    pub(super) fn leave_out(&self, range: Range<u64>) {
        self.access.clear(range.start, range.end - range.start);
        self.settle(range);
    }

    /// The target has the clusters of `range`, or nobody needs them.
    pub(super) fn settle(&self, range: Range<u64>) {
        let len = range.end - range.start;
        // In this order: see the module's head.
        self.pending.clear(range.start, len);
        self.needed.clear(range.start, len);
        self.settled(range);
    }

    /// Tells of it. What is left for an observer to do becomes less, and only the end of
    /// that is worth waking it.
    fn settled(&self, range: Range<u64>) {
        self.waiting.changed(&range);
        self.tell_if_complete();
    }

    fn tell_if_complete(&self) {
        if self.is_complete() {
            self.tell_changed();
        }
    }

    /// The target has what was in memory of `ranges`.
    pub(super) fn saved(&self, ranges: &[Range<u64>]) {
        for range in ranges {
            self.pending.clear(range.start, range.end - range.start);
        }
        self.tell_if_complete();
        self.note_saved();
    }

    pub(super) fn tell_changed(&self) {
        if let Some(observer) = self.observer.get() {
            observer.changed();
        }
    }

    pub(super) fn tell_copied(&self, len: u64, moved: u64) {
        if let Some(observer) = self.observer.get() {
            observer.copied_by_guest(len, moved);
        }
    }

    /// Looks where the snapshot has the bytes from the start of `range` on, up to where, and
    /// sees to it that they stay there until the result is dropped.
    ///
    /// Errors: an errno; `EACCES` if the snapshot is lost, or does not have them.
    pub(super) fn look(&self, range: Range<u64>) -> Result<(Range<u64>, Place<'_>), i32> {
        let mut freeze = Freeze::new(self, range.clone());
        if self.lets_pass() {
            return Err(libc::EACCES);
        }
        let needed = self.needed.is_dirty(range.start);
        let pending = self.pending.is_dirty(range.start);
        // Whatever is taken out is not readable before it ceases to be pending.
        if !self.access.is_dirty(range.start) {
            return Err(libc::EACCES);
        }
        let end = |bitmap: &DirtyBitmap, set: bool| match set {
            true => bitmap.next_clean(&range),
            false => bitmap
                .next_dirty_area(range.start, 1)
                .map(|area| area.start),
        };
        // What is needed is read from the source, also if the target has it by now.
        let ends = [
            Some(range.end),
            end(&self.needed, needed),
            (!needed).then(|| end(&self.pending, pending)).flatten(),
            end(&self.access, true),
        ];
        let end = ends.into_iter().flatten().min().unwrap_or(range.end);
        let place = match (needed, pending) {
            (true, _) => {
                freeze.narrow(end);
                Place::Source(freeze)
            }
            (false, true) => Place::Held,
            (false, false) => Place::Target,
        };
        Ok((range.start..end, place))
    }

    /// How many wait for a change.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn waiters(&self) -> usize {
        self.waiting.waiters()
    }

    /// The range, widened to whole clusters (the last one ends with the disk).
    pub fn round_out(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start & !(self.cluster - 1);
        let end = range.end.checked_next_multiple_of(self.cluster);
        start..end.unwrap_or(self.size).min(self.size)
    }

    /// The whole clusters inside the range; empty if there are none.
    pub fn round_in(&self, range: &Range<u64>) -> Range<u64> {
        self.round_in_to(range, self.cluster)
    }

    /// The same of clusters as users know them.
    pub(super) fn round_in_shown(&self, range: &Range<u64>) -> Range<u64> {
        self.round_in_to(range, self.shown)
    }

    fn round_in_to(&self, range: &Range<u64>, cluster: u64) -> Range<u64> {
        let start = range.start.checked_next_multiple_of(cluster);
        let start = start.unwrap_or(self.size).min(self.size);
        let end = match range.end >= self.size {
            true => self.size,
            false => range.end & !(cluster - 1),
        };
        start..end.max(start)
    }

    /// An error of a request to the snapshot.
    pub(super) fn error(&self, op: IoOp, range: &Range<u64>, errno: i32) -> IoError {
        let len = range.end.saturating_sub(range.start);
        self.source.node().error(op, range.start, len, errno)
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot")
            .field("size", &self.size)
            .field("cluster", &self.cluster)
            .field("pending_bytes", &self.pending_bytes())
            .field("broken", &self.broken())
            .finish_non_exhaustive()
    }
}

/// See [`Snapshot::listen`].
#[derive(Debug)]
pub struct Listening(Arc<Snapshot>);

impl std::ops::Deref for Listening {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.0
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, SeqCst);
    }
}

/// Where the snapshot has a range.
pub(super) enum Place<'a> {
    /// In the source, where guests' writes wait until this is dropped.
    Source(Freeze<'a>),
    /// In memory, and soon in the target.
    Held,
    Target,
}

/// A range of the source that is being read. Dropped, it may be written.
pub(super) struct Freeze<'a> {
    snapshot: &'a Snapshot,
    key: u64,
    range: Range<u64>,
}

impl<'a> Freeze<'a> {
    fn new(snapshot: &'a Snapshot, range: Range<u64>) -> Self {
        let key = snapshot.waiting.freeze(range.clone());
        snapshot.frozen.fetch_add(1, SeqCst);
        Self {
            snapshot,
            key,
            range,
        }
    }
}

impl Freeze<'_> {
    /// What is behind `end` may be written.
    fn narrow(&mut self, end: u64) {
        if end < self.range.end {
            let rest = end..self.range.end;
            self.range.end = end;
            self.snapshot.waiting.narrow(self.key, end);
            self.snapshot.waiting.changed(&rest);
        }
    }
}

impl Drop for Freeze<'_> {
    fn drop(&mut self) {
        self.snapshot.waiting.thaw(self.key);
        self.snapshot.frozen.fetch_sub(1, SeqCst);
        self.snapshot.waiting.changed(&self.range);
    }
}
