//! Saving behind the guest's back: once what a request is about to change has been read into
//! memory, the request goes on, and a job writes that to the target.
//!
//! Only while a job, which owns the target, says that it takes what there is; and only once
//! guests' copies have reached the target ([`PROOF`]): so a guest that writes to one that fails
//! is told, as it was asked for (`on-cbw-error`). What is in memory is kept until the target has
//! it, or nobody needs it.
//!
//! Requests wait for room once so much is in memory that the target cannot be keeping up, for
//! no longer than `cbw-timeout`. If the job takes no more, they have their copies made as
//! without.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::copy::{Content, Entered, Memory, buffer_size, forget_taken_out};
use super::snapshot::{Claim, Snapshot};
use crate::backend::InFlight;
use crate::error::IoError;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// Most bytes in memory: what a target that is as fast as the guest has not got to yet.
const ROOM: u64 = if cfg!(test) { 1 << 20 } else { 8 << 20 };
/// Copies that reach the target before a request goes on without its own.
const PROOF: u32 = 32;

/// What is saved behind guests' backs. Any thread.
pub(super) struct Behind {
    /// A job takes what is kept. Atomic.
    open: AtomicBool,
    /// Guests' copies that have reached the target since something failed there, up to
    /// [`PROOF`]. Atomic.
    proof: AtomicU32,
    room: Memory,
    /// What nobody is writing, the oldest first. A leaf lock, held for a move: by requests
    /// that go on, and by the job.
    kept: Mutex<VecDeque<Kept>>,
}

/// What the snapshot had in some clusters.
struct Kept {
    /// Whole clusters.
    range: Range<u64>,
    content: Content,
    /// Bytes of room that it takes.
    room: u64,
}

impl Default for Behind {
    fn default() -> Self {
        Self {
            open: AtomicBool::new(false),
            proof: AtomicU32::new(0),
            room: Memory::new(ROOM),
            kept: Mutex::default(),
        }
    }
}

impl Behind {
    /// Whether a request may go on once what it changes is in memory.
    pub(super) fn may_release(&self) -> bool {
        self.open.load(SeqCst) && self.proof.load(SeqCst) >= PROOF
    }

    /// A guest's copy has reached the target.
    pub(super) fn has_copied(&self) {
        if self.proof.load(SeqCst) < PROOF {
            self.proof.fetch_add(1, SeqCst);
        }
    }

    /// Lets all who wait for room look again.
    pub(super) fn look_again(&self) {
        self.room.look_again();
    }

    /// Nobody needs what is kept.
    pub(super) fn forget(&self) {
        let kept = std::mem::take(&mut *lock(&self.kept));
        for one in kept {
            self.done_with(one);
        }
        self.look_again();
    }

    fn done_with(&self, kept: Kept) {
        self.room.give_back(kept.room);
        kept.content.done_with();
    }

    /// As if enough copies had reached the target, and a job took what is kept.
    #[cfg(test)]
    pub(super) fn prove(&self) {
        self.proof.store(PROOF, SeqCst);
        self.open.store(true, SeqCst);
    }
}

/// Room for what is to be in memory, until it is dropped.
pub(super) struct Room {
    snapshot: Arc<Snapshot>,
    bytes: u64,
}

impl Room {
    /// Room for `len` bytes, once there is. `None`: `given_up` came true before, or requests do
    /// not go on any more without their copies.
    ///
    /// Cancel: nothing is taken.
    pub(super) async fn take(
        snapshot: &Arc<Snapshot>,
        len: u64,
        given_up: impl Fn() -> bool,
    ) -> Option<Self> {
        let bytes = buffer_size(len as usize) as u64;
        let behind = &snapshot.behind;
        let given_up = || given_up() || !behind.may_release();
        let taken = behind.room.take(bytes, given_up).await;
        taken.then(|| Self {
            snapshot: Arc::clone(snapshot),
            bytes,
        })
    }

    /// Keeps what the snapshot has in the claimed clusters: they may be written over.
    pub(super) fn keep(mut self, claim: Claim, content: Content) {
        let kept = Kept {
            range: claim.range(),
            content,
            room: std::mem::take(&mut self.bytes),
        };
        let snapshot = &self.snapshot;
        let is_first = {
            let mut all = lock(&snapshot.behind.kept);
            all.push_back(kept);
            all.len() == 1
        };
        claim.hold();
        if snapshot.lets_pass() {
            // Whoever ended it may have looked before this was there.
            snapshot.behind.forget();
        } else if is_first {
            snapshot.tell_changed();
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.snapshot.behind.room.give_back(self.bytes);
    }
}

/// What a guest's request did not wait for. Dropped before the target has it, it is kept for
/// the next call of [`Snapshot::take_save`].
#[must_use = "it is to be written"]
pub struct Save {
    snapshot: Arc<Snapshot>,
    /// There until the target has it.
    kept: Option<Kept>,
}

impl Save {
    /// The clusters, in bytes.
    pub fn range(&self) -> Range<u64> {
        self.kept.as_ref().map_or(0..0, |kept| kept.range.clone())
    }

    /// Writes it to the target, and gives the bytes that were moved.
    ///
    /// Errors: it is kept. From now on requests wait for their copies again, until enough have
    /// reached the target. Cancel: it is kept.
    pub async fn write(self, target: InFlight) -> Result<u64, IoError> {
        self.write_to(Entered::Backend(target)).await
    }

    pub(super) async fn write_to(mut self, target: Entered) -> Result<u64, IoError> {
        let Some(kept) = &self.kept else {
            return Ok(0);
        };
        let range = kept.range.clone();
        let written = kept.content.put(&target, &range).await;
        if written.is_err() {
            self.snapshot.behind.proof.store(0, SeqCst);
            self.snapshot.behind.look_again();
        }
        let moved = written?;
        if let Some(kept) = self.kept.take() {
            self.snapshot.behind.done_with(kept);
        }
        self.snapshot.saved(range.clone());
        forget_taken_out(&self.snapshot, &target, range).await;
        Ok(moved)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        let behind = &self.snapshot.behind;
        lock(&behind.kept).push_front(kept);
        if self.snapshot.lets_pass() {
            behind.forget();
        }
    }
}

impl Snapshot {
    /// Whether a job takes what guests' requests did not wait for: then they go on as soon as
    /// that is in memory. If not they wait, and what is in memory is kept.
    pub fn save_behind(&self, open: bool) {
        if self.behind.open.swap(open, SeqCst) && !open {
            self.behind.look_again();
        }
    }

    /// The oldest of what guests' requests did not wait for, and nobody is writing.
    pub fn take_save(self: &Arc<Self>) -> Option<Save> {
        let kept = lock(&self.behind.kept).pop_front()?;
        Some(Save {
            snapshot: Arc::clone(self),
            kept: Some(kept),
        })
    }
}
