//! What the filter and the copier of one mirror share.
//!
//! Everything here is used by the guest's iothreads and the job's home at once.
//! The protocol that keeps the target right has three rules:
//!
//! 1. A guest request that may have changed the source makes its range dirty
//!    *after* the change and *before* the guest sees its end.
//! 2. Whoever writes the target takes a place in the queue for the range, clears
//!    its bits, waits for the range, and only then looks at the source. So a
//!    change that comes later sets a bit that nobody clears before the source is
//!    read again.
//! 3. Whoever fails to write the target, or stops half-way, sets the bits again
//!    before it unlocks the range.
//!
//! Nobody waits for a second range while holding one, so waits cannot form a
//! circle. The copier does not wait at all with a range in hand except for its
//! own I/O, and has entered both backends before it locks: a drain never has to
//! wait for somebody who waits for the drain.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use block::{Backend, BitmapError, DirtyBitmap, GuestLatency, InFlight, IoError, RangeLock};

use super::active::Active;
use crate::CopyMode;
use crate::copying::{Rules, enter};
use crate::pair::{Lag, is_dirty_in};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};

/// How a target is to be written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TargetRules {
    /// Zeroes may be unmapped.
    pub(crate) unmap: bool,
    /// It gets whole chunks only: it stands on an image that is not open, so what is
    /// written beside a part would show.
    pub(crate) whole_chunks: bool,
    /// See [`Rules::explicit_zeroes`].
    pub(crate) explicit_zeroes: bool,
}

/// State shared by filter, copier and driver of one mirror.
pub(crate) struct MirrorState {
    /// Size of source and target in bytes. Set once.
    pub(crate) size: u64,
    /// Bytes per bit. Set once.
    pub(crate) granularity: u64,
    /// The job's way to the target. Set once, before the mirror is engaged.
    target: OnceLock<Arc<Backend>>,
    /// How the target is to be written. Set once.
    pub(crate) rules: TargetRules,
    /// Ranges in which the target may differ from the source. Atomic.
    pub(crate) dirty: DirtyBitmap,
    /// Ranges whose copy on the target is being written. Synchronises itself.
    pub(crate) in_flight: RangeLock,
    /// What the guest feels. Atomic.
    pub(crate) latency: GuestLatency,
    /// [`CopyMode`], made write-blocking by the monitor or the body. Atomic.
    copy_mode: AtomicU8,
    /// Whether guest requests go to the target as well until the copier has caught
    /// up, whatever `copy_mode` says. Set and cleared by the job's body. Atomic.
    catching_up: AtomicBool,
    /// Whether guest requests are recorded and mirrored: from the insertion of
    /// the filter to the pivot or the failure of the job. Atomic.
    engaged: AtomicBool,
    /// Target and source are equal, and stay so by write-blocking. Atomic; set before a
    /// look at `dirty`, and cleared after bits were set there.
    actively_synced: AtomicBool,
    /// Whether the target was written since a flush of it began. Atomic; set by
    /// whoever writes, after the write.
    target_written: AtomicBool,
    /// What guests' requests put on the target. Atomic.
    pub(crate) active: Active,
    /// Requests to the target on behalf of the guest's that are on their way, by the
    /// parity of the `generation` they began in. Atomic.
    on_their_way: [AtomicU64; 2],
    /// Moved on by the job's body, once all of the generation before have ended.
    /// Atomic.
    generation: AtomicU64,
    /// Who waits for a change of `engaged` or `catching_up`. A leaf lock, taken
    /// only by those who wait for the target, and to wake them.
    waiters: Mutex<Waiters>,
    /// Counts guest discards and zero writes: what was known of the source's
    /// extents before may be too coarse since. Atomic.
    zeroed: AtomicU64,
    /// Whether `active_error` holds something. Atomic.
    active_failed: AtomicBool,
    /// First failure of a write-blocking write since the job last looked. A leaf
    /// lock, taken for a move only, on the path of failures only.
    active_error: Mutex<Option<IoError>>,
}

impl MirrorState {
    /// State of a mirror of `size` bytes; nothing is dirty, nothing recorded.
    ///
    /// Errors: the bitmap would be too large.
    pub(crate) fn new(
        size: u64,
        granularity: u64,
        copy_mode: CopyMode,
        rules: TargetRules,
    ) -> Result<Self, BitmapError> {
        Ok(Self {
            size,
            granularity,
            target: OnceLock::new(),
            rules,
            dirty: DirtyBitmap::new(size, granularity)?,
            in_flight: RangeLock::new(),
            latency: GuestLatency::default(),
            copy_mode: AtomicU8::new(copy_mode as u8),
            catching_up: AtomicBool::new(false),
            engaged: AtomicBool::new(false),
            actively_synced: AtomicBool::new(false),
            // Whoever wrote it before may not have flushed it.
            target_written: AtomicBool::new(true),
            active: Active::default(),
            on_their_way: [AtomicU64::new(0), AtomicU64::new(0)],
            generation: AtomicU64::new(0),
            waiters: Mutex::default(),
            zeroed: AtomicU64::new(0),
            active_failed: AtomicBool::new(false),
            active_error: Mutex::new(None),
        })
    }

    pub(crate) fn set_target(&self, target: Arc<Backend>) {
        let _ = self.target.set(target);
    }

    /// The job's way to the target.
    pub(crate) fn target(&self) -> Option<&Arc<Backend>> {
        self.target.get()
    }

    /// Counts a request to the target in; `None` while somebody drains it.
    pub(crate) fn try_enter_target(&self) -> Option<InFlight> {
        enter(self.target()?)
    }

    /// What the copier keeps to.
    pub(crate) fn copy_rules(&self) -> Rules {
        Rules {
            size: self.size,
            unit: self.granularity,
            unmap: self.rules.unmap,
            explicit_zeroes: self.rules.explicit_zeroes,
            layers_last: true,
        }
    }

    /// Bytes of the disk in dirty chunks.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        let whole = self.dirty.count_bytes();
        // The last chunk may be a short one.
        let excess = match self.size % self.granularity {
            0 => 0,
            short if self.dirty.is_dirty(self.size - 1) => self.granularity - short,
            _ => 0,
        };
        whole.saturating_sub(excess).min(self.size)
    }

    pub(crate) fn copy_mode(&self) -> CopyMode {
        if self.copy_mode.load(Ordering::Acquire) == CopyMode::WriteBlocking as u8 {
            CopyMode::WriteBlocking
        } else {
            CopyMode::Background
        }
    }

    /// The copy mode is write-blocking from now on. There is no way back.
    pub(crate) fn mirror_actively_for_good(&self) {
        self.copy_mode
            .store(CopyMode::WriteBlocking as u8, Ordering::Release);
    }

    /// Whether guest requests are to write the target themselves.
    pub(crate) fn mirrors_actively(&self) -> bool {
        self.copy_mode() == CopyMode::WriteBlocking || self.is_catching_up()
    }

    /// Whether guest requests write the target for a while only.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.catching_up.load(Ordering::SeqCst)
    }

    pub(crate) fn set_catching_up(&self, catching_up: bool) {
        let before = self.catching_up.swap(catching_up, Ordering::SeqCst);
        if before && !catching_up {
            self.wake_waiters();
        }
    }

    /// Whether guest requests count.
    pub(crate) fn is_engaged(&self) -> bool {
        self.engaged.load(Ordering::SeqCst)
    }

    /// Begins or ends recording. To begin: main, inside a drained section, so that no
    /// request is half-way. To end: main, or the body when the job has failed.
    pub(crate) fn set_engaged(&self, engaged: bool) {
        self.engaged.store(engaged, Ordering::SeqCst);
        if !engaged {
            self.wake_waiters();
        }
    }

    /// Waits until nothing is recorded any more. Cancel: nothing is left behind.
    pub(crate) fn disengaged(&self) -> Until<'_> {
        self.until(|state| !state.is_engaged())
    }

    /// Waits until guest requests need not wait for the target: the mirror was
    /// cancelled, or no longer catches up. Cancel: nothing is left behind.
    pub(crate) fn released(&self) -> Until<'_> {
        self.until(|state| !state.holds_guest())
    }

    /// Whether guest requests are to write the target, and to wait for that.
    pub(crate) fn holds_guest(&self) -> bool {
        self.is_engaged() && self.mirrors_actively()
    }

    /// Waits until `test` is true of `engaged` and `catching_up`.
    fn until(&self, test: fn(&Self) -> bool) -> Until<'_> {
        Until {
            state: self,
            test,
            key: None,
        }
    }

    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.waiters
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wake_waiters(&self) {
        let woken = std::mem::take(&mut self.waiters().wakers);
        for waker in woken.into_values() {
            waker.wake();
        }
    }

    pub(crate) fn is_actively_synced(&self) -> bool {
        self.actively_synced.load(Ordering::SeqCst)
    }

    /// Nothing is in flight: notes that target and source are equal, if they are and stay
    /// so. The job's body only.
    pub(crate) fn look_whether_synced(&self) {
        if self.copy_mode() != CopyMode::WriteBlocking || self.is_actively_synced() {
            return;
        }
        // Set before the look: who makes something dirty sets the bits first, and clears
        // this then. One of the two sees the other.
        self.actively_synced.store(true, Ordering::SeqCst);
        if !self.dirty.is_clean() {
            self.not_synced();
        }
    }

    /// Target and source may differ.
    pub(crate) fn not_synced(&self) {
        // The line is shared by all who write: written only if that changes it.
        if self.is_actively_synced() {
            self.actively_synced.store(false, Ordering::SeqCst);
        }
    }

    /// Whether the target has to be flushed before it can be relied on.
    pub(crate) fn is_target_written(&self) -> bool {
        self.target_written.load(Ordering::SeqCst)
    }

    /// Notes a write of the target that has ended, well or not; or a flush that
    /// failed.
    pub(crate) fn note_target_written(&self) {
        // The line is shared by all who write: written only if that changes it.
        if !self.is_target_written() {
            self.target_written.store(true, Ordering::SeqCst);
        }
    }

    /// To be called before a flush is sent: it covers all writes noted until now.
    pub(crate) fn flush_begins(&self) {
        self.target_written.store(false, Ordering::SeqCst);
    }

    /// How many guest requests have made zeroes.
    pub(crate) fn zeroed(&self) -> u64 {
        self.zeroed.load(Ordering::Acquire)
    }

    /// Notes a guest request that makes zeroes.
    pub(crate) fn note_zeroed(&self) {
        self.zeroed.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts a request to the target on behalf of a guest's, until dropped.
    pub(crate) fn send_active(self: &Arc<Self>) -> OnItsWay {
        let generation = self.generation.load(Ordering::SeqCst);
        let slot = usize::from(generation % 2 == 1);
        self.on_their_way[slot].fetch_add(1, Ordering::SeqCst);
        OnItsWay {
            state: Arc::clone(self),
            slot,
        }
    }

    /// Begins a new generation if all requests of the one before the present have ended.
    /// `false`: they have not, and so are as old as the last new generation. The job's
    /// body only.
    pub(crate) fn renew_generation(&self) -> bool {
        let generation = self.generation.load(Ordering::SeqCst);
        let before = usize::from(generation.is_multiple_of(2));
        let ended = self.on_their_way[before].load(Ordering::SeqCst) == 0;
        if ended {
            self.generation
                .store(generation.wrapping_add(1), Ordering::SeqCst);
        }
        ended
    }

    /// Notes that a write-blocking write of the target failed.
    pub(crate) fn note_active_error(&self, error: IoError) {
        let mut slot = self
            .active_error
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        slot.get_or_insert(error);
        drop(slot);
        self.active_failed.store(true, Ordering::Release);
    }

    /// The first failure of a write-blocking write since the last call.
    pub(crate) fn take_active_error(&self) -> Option<IoError> {
        if !self.active_failed.swap(false, Ordering::AcqRel) {
            return None;
        }
        self.active_error
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take()
    }

    /// Forgets that failure if `old` says so of it.
    pub(crate) fn forget_active_error(&self, old: impl FnOnce(&IoError) -> bool) {
        let mut slot = self
            .active_error
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if slot.as_ref().is_some_and(old) {
            *slot = None;
        }
    }

    /// Cleans the whole chunks in a range. The caller holds the range.
    pub(crate) fn clear_dirty(&self, range: Range<u64>) {
        self.dirty
            .clear(range.start, range.end.saturating_sub(range.start));
    }

    /// Makes a range dirty.
    pub(crate) fn set_dirty(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.dirty.set(range.start, range.end - range.start);
        self.not_synced();
    }

    /// The whole chunks inside the range; empty if there are none.
    pub(crate) fn round_in(&self, range: &Range<u64>) -> Range<u64> {
        let start = range
            .start
            .checked_next_multiple_of(self.granularity)
            .unwrap_or(self.size)
            .min(self.size);
        let end = if range.end >= self.size {
            self.size
        } else {
            range.end & !(self.granularity - 1)
        };
        start..end.max(start)
    }
}

impl Lag for MirrorState {
    fn is_engaged(&self) -> bool {
        Self::is_engaged(self)
    }

    fn is_behind(&self, range: &Range<u64>) -> bool {
        let is_dirty = || is_dirty_in(&self.dirty, range);
        // Who copies has the range before it cleans it, and makes it dirty again before
        // it lets go. So one that began before the first look, and failed after it, is
        // seen by the second.
        is_dirty() || self.in_flight.try_lock(range.clone()).is_none() || is_dirty()
    }
}

#[derive(Default)]
struct Waiters {
    next: u64,
    wakers: BTreeMap<u64, Waker>,
}

/// See [`MirrorState::disengaged`].
#[must_use = "it waits when it is awaited"]
pub(crate) struct Until<'a> {
    state: &'a MirrorState,
    test: fn(&MirrorState) -> bool,
    key: Option<u64>,
}

impl Future for Until<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Registered before the test: who changes the state does so before it wakes.
        let mut waiters = self.state.waiters();
        let key = match self.key {
            Some(key) => key,
            None => {
                waiters.next += 1;
                waiters.next
            }
        };
        waiters.wakers.insert(key, cx.waker().clone());
        drop(waiters);
        self.key = Some(key);
        if (self.test)(self.state) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

impl Drop for Until<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.state.waiters().wakers.remove(&key);
        }
    }
}

/// A request to the target on behalf of a guest's, until dropped.
#[must_use]
pub(crate) struct OnItsWay {
    state: Arc<MirrorState>,
    slot: usize,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.state.on_their_way[self.slot].fetch_sub(1, Ordering::SeqCst);
    }
}

/// Makes a range dirty when dropped, unless [disarmed](Self::disarm): armed
/// before the first wait of whatever may leave source and target different.
#[must_use]
pub(crate) struct DirtyOnDrop<S: Deref<Target = MirrorState>> {
    state: S,
    range: Range<u64>,
}

impl<S: Deref<Target = MirrorState>> DirtyOnDrop<S> {
    pub(crate) fn new(state: S, range: Range<u64>) -> Self {
        Self { state, range }
    }

    /// Source and target are equal in the range as far as the holder knows.
    pub(crate) fn disarm(mut self) {
        self.range = 0..0;
    }
}

impl<S: Deref<Target = MirrorState>> Drop for DirtyOnDrop<S> {
    fn drop(&mut self) {
        if !self.range.is_empty() {
            self.state.set_dirty(self.range.clone());
        }
    }
}
