//! Saving behind the guest's back: once what a request is about to change has been read into
//! memory, the request goes on, and a job writes that to the target.
//!
//! Only while a job, which owns the target, says that it takes what there is; and only once
//! guests' copies have reached the target ([`PROOF`]): so a guest that writes to one that fails
//! is told, as it was asked for (`on-cbw-error`). What is in memory is kept until the target has
//! it, or nobody needs it, and is read from there meanwhile. The job writes what has gathered in one go: nobody waits for one of
//! them, and to wake the job for each would take longer than most of them do.
//!
//! Requests wait for room once so much is in memory that the target cannot be keeping up, for
//! no longer than `cbw-timeout`. If the job takes no more, they have their copies made as
//! without.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;

use super::claim::Claim;
use super::copy::{Content, Entered, Memory, Stock, buffer_size, forget_taken_out};
use super::snapshot::Snapshot;
use crate::backend::InFlight;
use crate::copy_source::{CopySource, Pieces};
use crate::error::IoError;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// Most bytes in memory: what a target that is as fast as the guest has not got to yet.
const ROOM: u64 = if cfg!(test) { 1 << 20 } else { 8 << 20 };
/// Copies that reach the target before a request goes on without its own.
const PROOF: u32 = 32;
/// How many are written in one go at most, and how many bytes.
const TOGETHER: (usize, u64) = if cfg!(test) {
    (4, 1 << 20)
} else {
    (128, 1 << 20)
};

/// What is saved behind guests' backs. Any thread.
pub(super) struct Behind {
    /// A job takes what is kept. Atomic.
    open: AtomicBool,
    /// Guests' copies that have reached the target since something failed there, up to
    /// [`PROOF`]. Atomic.
    proof: AtomicU32,
    room: Memory,
    /// A leaf lock, held for a move: by requests that go on, and by the job.
    queue: Mutex<Queue>,
    /// Buffers that requests may use again.
    stock: Stock,
}

#[derive(Default)]
struct Queue {
    /// What nobody is writing, the oldest first.
    kept: VecDeque<Kept>,
    /// Bytes of room that it takes.
    bytes: u64,
    /// All that is in memory, also what is being written: by its start, with its end.
    held: BTreeMap<u64, (u64, Content)>,
    /// How often some was taken and is not done with: then the job looks here again, without
    /// being told.
    taken: usize,
}

impl Queue {
    /// Adds one. Whether the job is to be told that it may take some.
    fn push(&mut self, kept: Kept) -> bool {
        let had_gathered = self.has_gathered();
        let Range { start, end } = kept.range;
        self.held.insert(start, (end, kept.content.clone()));
        self.bytes += kept.room;
        self.kept.push_back(kept);
        !had_gathered && self.has_gathered()
    }

    /// Puts back what has been taken, the oldest first.
    fn put_back(&mut self, kept: VecDeque<Kept>) {
        for last in kept.into_iter().rev() {
            self.bytes += last.room;
            self.kept.push_front(last);
        }
    }

    /// Whether there is as much as is written in one go, or nothing is being written.
    fn has_gathered(&self) -> bool {
        let (count, bytes) = match self.taken {
            0 => (1, u64::MAX),
            _ => TOGETHER,
        };
        self.kept.len() >= count || self.bytes >= bytes
    }

    /// As much as is written in one go, and one at least.
    fn take(&mut self) -> VecDeque<Kept> {
        let mut bytes = 0;
        let fits = |kept: &&Kept| {
            bytes += kept.room;
            bytes <= TOGETHER.1
        };
        let count = self.kept.iter().take(TOGETHER.0).take_while(fits).count();
        let rest = self.kept.split_off(count.max(1).min(self.kept.len()));
        let taken = std::mem::replace(&mut self.kept, rest);
        self.bytes -= taken.iter().map(|kept| kept.room).sum::<u64>();
        taken
    }
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
            queue: Mutex::default(),
            stock: Stock::default(),
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
        let kept = {
            let mut queue = lock(&self.queue);
            queue.bytes = 0;
            std::mem::take(&mut queue.kept)
        };
        self.done_with(kept.into());
        self.look_again();
    }

    /// Buffers that requests may use again.
    pub(super) fn stock(&self) -> &Stock {
        &self.stock
    }

    /// What is in memory from `offset` on: to where, and what begins there. `None`: it is
    /// not there any more.
    pub(super) fn look(&self, offset: u64) -> Option<(u64, Content, u64)> {
        let queue = lock(&self.queue);
        let (start, (end, content)) = queue.held.range(..=offset).next_back()?;
        (offset < *end).then(|| (*end, content.clone(), *start))
    }

    /// The target has them, or nobody needs them.
    fn done_with(&self, all: Vec<Kept>) {
        if all.is_empty() {
            return;
        }
        {
            let mut queue = lock(&self.queue);
            for kept in &all {
                // Not the last one to have it, so nothing is freed here.
                queue.held.remove(&kept.range.start);
            }
        }
        let mut room = 0;
        let buffers = all.into_iter().filter_map(|kept| {
            room += kept.room;
            kept.content.into_buffer()
        });
        self.stock.add(buffers);
        self.room.give_back(room);
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
        let room = taken.then(|| Self {
            snapshot: Arc::clone(snapshot),
            bytes,
        });
        // There may be room because something failed.
        room.filter(|_| behind.may_release())
    }

    /// Keeps what the snapshot has in the claimed clusters: they may be written over.
    pub(super) fn keep(mut self, claim: Claim, content: Content) {
        let kept = Kept {
            range: claim.range(),
            content,
            room: std::mem::take(&mut self.bytes),
        };
        let snapshot = &self.snapshot;
        let tell = lock(&snapshot.behind.queue).push(kept);
        claim.hold();
        if snapshot.lets_pass() {
            // Whoever ended it may have looked before this was there.
            snapshot.behind.forget();
        } else if tell {
            snapshot.tell_changed();
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.snapshot.behind.room.give_back(self.bytes);
        }
    }
}

/// What some requests of guests did not wait for. What is dropped before the target has it is
/// kept for the next call of [`Snapshot::take_saves`].
#[must_use = "it is to be written"]
pub struct Saves {
    snapshot: Arc<Snapshot>,
    /// What the target does not have, the oldest first.
    kept: VecDeque<Kept>,
}

/// What has become of [`Saves`].
#[derive(Debug)]
pub struct Saved {
    /// Bytes of clusters that the target has now.
    pub bytes: u64,
    /// Bytes that were moved.
    pub moved: u64,
    /// Why the rest is kept. From now on requests wait for their copies again, until enough
    /// have reached the target.
    pub error: Option<IoError>,
}

impl Saves {
    /// Writes them to the target.
    ///
    /// Cancel: they are kept.
    pub async fn write(self, target: InFlight) -> Saved {
        self.write_to(Entered::Backend(target)).await
    }

    pub(super) async fn write_to(mut self, target: Entered) -> Saved {
        let (mut done, mut failed) = (Vec::new(), VecDeque::new());
        let mut saved = Saved {
            bytes: 0,
            moved: 0,
            error: None,
        };
        let written = self.write_all(&target).await;
        for (kept, written) in std::mem::take(&mut self.kept).into_iter().zip(written) {
            match written {
                Some(Ok(moved)) => {
                    saved.moved += moved;
                    saved.bytes += kept.range.end - kept.range.start;
                    done.push(kept);
                }
                Some(Err(error)) => {
                    saved.error.get_or_insert(error);
                    failed.push_back(kept);
                }
                None => failed.push_back(kept),
            }
        }
        self.kept = failed;
        let snapshot = &self.snapshot;
        if saved.error.is_some() {
            // Before there is room for one more.
            snapshot.behind.proof.store(0, SeqCst);
            snapshot.behind.look_again();
        }
        let ranges: Vec<_> = done.iter().map(|kept| kept.range.clone()).collect();
        // In this order: who does not find it in memory finds it in the target.
        snapshot.saved(&ranges);
        snapshot.behind.done_with(done);
        for range in ranges {
            forget_taken_out(snapshot, &target, range).await;
        }
        saved
    }

    /// Has the target write all data in one go, if it can, and what is left side by side. For
    /// each the bytes that were moved; `None` if nobody needs it any more.
    async fn write_all(&self, target: &Entered) -> Vec<Option<Result<u64, IoError>>> {
        let together = self.write_together(target).await;
        let write = async |kept: &Kept| match kept.content {
            Content::Data(_) if together => Some(Ok(kept.range.end - kept.range.start)),
            _ if self.snapshot.lets_pass() => None,
            _ => Some(kept.content.put(target, &kept.range).await),
        };
        join_all(self.kept.iter().map(write)).await
    }

    /// `false`: the target cannot, or it failed, and some may have been written.
    async fn write_together(&self, target: &Entered) -> bool {
        let piece = |kept: &Kept| Some((kept.range.start, kept.content.data(&kept.range)?));
        let pieces: Vec<_> = self.kept.iter().filter_map(piece).collect();
        if pieces.len() < 2 {
            return false;
        }
        let Some((start, pieces)) = Pieces::new(pieces) else {
            return false;
        };
        target.copy_from(start, CopySource::Memory(pieces)).await
    }
}

#[cfg(all(test, not(shuttle)))]
impl Saves {
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        self.kept.iter().map(|kept| kept.range.clone()).collect()
    }
}

impl Drop for Saves {
    fn drop(&mut self) {
        let behind = &self.snapshot.behind;
        {
            let mut queue = lock(&behind.queue);
            queue.taken -= 1;
            queue.put_back(std::mem::take(&mut self.kept));
        }
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

    /// The oldest of what guests' requests did not wait for and nobody is writing, once as much
    /// has gathered as is written in one go, or nothing is being written. To be called again
    /// when what was taken is done with, and when the observer is told of a change.
    pub fn take_saves(self: &Arc<Self>) -> Option<Saves> {
        let mut queue = lock(&self.behind.queue);
        if !queue.has_gathered() {
            return None;
        }
        queue.taken += 1;
        Some(Saves {
            snapshot: Arc::clone(self),
            kept: queue.take(),
        })
    }
}
