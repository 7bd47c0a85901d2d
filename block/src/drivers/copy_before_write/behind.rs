//! Saving behind the guest's back: once what a request is about to change has been read into
//! memory, the request goes on, and a task writes that to the target.
//!
//! Only where the target belongs to a job, which can do something about a failure; and only
//! to a target that has shown that it takes what it gets: so a guest that writes to one that
//! fails is told as it was asked for (`on-cbw-error`). If one fails later, what is in memory
//! is kept and tried again, the job is told, and requests wait for their copies again.
//!
//! Requests wait once so much is in memory that the target cannot be keeping up, for no
//! longer than `cbw-timeout`.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;

use super::copy::{Content, Entered, Memory, forget_taken_out};
use super::snapshot::{Held, Snapshot};
use super::{OnCbwError, leave};
use crate::error::IoError;
use crate::runtime;
use crate::sync::atomic::{AtomicU32, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// Most bytes in memory: what a target that is as fast as the guest has not got to yet.
const ROOM: u64 = if cfg!(test) { 1 << 20 } else { 8 << 20 };
/// Copies that reach the target before one is left behind.
const PROOF: u32 = 32;
/// Time until what failed is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// How long a guest's request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saving {
    /// Until the target has what the request changes.
    Awaited,
    /// Until that is in memory, where the target can be relied on.
    Behind,
}

/// What is saved behind guests' backs. Any thread.
pub(super) struct Behind {
    saving: Saving,
    /// What a failed copy means.
    on_error: OnCbwError,
    /// Copies that have reached the target since one failed, up to [`PROOF`]. Atomic.
    proof: AtomicU32,
    room: Memory,
    /// Why what is in memory cannot be saved. A leaf lock, held for a move: by who fails,
    /// and by the job.
    failure: Mutex<Option<IoError>>,
}

impl Behind {
    pub(super) fn new(saving: Saving, on_error: OnCbwError) -> Self {
        Self {
            saving,
            on_error,
            proof: AtomicU32::new(0),
            room: Memory::new(ROOM),
            failure: Mutex::default(),
        }
    }

    /// Whether a request may go on once what it changes is in memory.
    pub(super) fn may_release(&self) -> bool {
        self.saving == Saving::Behind && self.proof.load(SeqCst) >= PROOF
    }

    /// A copy has reached the target.
    pub(super) fn has_saved(&self) {
        if self.saving == Saving::Awaited || self.proof.load(SeqCst) >= PROOF {
            return;
        }
        self.proof.fetch_add(1, SeqCst);
        // It takes what it gets again.
        drop(self.take_failure());
    }

    /// Lets all who wait for room look again.
    pub(super) fn look_again(&self) {
        self.room.look_again();
    }

    fn take_failure(&self) -> Option<IoError> {
        lock(&self.failure).take()
    }

    fn set_failure(&self, error: IoError) {
        let before = lock(&self.failure).replace(error);
        drop(before);
    }

    /// As if enough copies had reached the target.
    #[cfg(test)]
    pub(super) fn prove(&self) {
        self.proof.store(PROOF, SeqCst);
    }
}

/// Room for what is in memory, until it is dropped.
pub(super) struct Room {
    snapshot: Arc<Snapshot>,
    len: u64,
}

impl Room {
    /// Room for `len` bytes, once there is. `None`: `given_up` came true before.
    ///
    /// Cancel: nothing is taken.
    pub(super) async fn take(
        snapshot: &Arc<Snapshot>,
        len: u64,
        given_up: impl Fn() -> bool,
    ) -> Option<Self> {
        let taken = snapshot.behind.room.take(len, given_up).await;
        taken.then(|| Self {
            snapshot: Arc::clone(snapshot),
            len,
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.snapshot.behind.room.give_back(self.len);
    }
}

impl Snapshot {
    /// Why what guests' requests were not kept waiting for cannot be saved, if that has been
    /// tried more than once. It is kept in memory and tried again as long as the snapshot is
    /// needed.
    pub fn take_save_failure(&self) -> Option<IoError> {
        self.behind.take_failure()
    }
}

/// Leaves what is held to a task, which writes `content` to the target.
pub(super) fn save(held: Held, content: Content, target: Entered, room: Room) {
    leave(async move {
        let is_saved = write(&held, &content, target).await;
        drop(room);
        if is_saved {
            content.done_with();
        }
        drop(held);
    });
}

/// Writes it until the target has it (`true`), or nobody needs it.
async fn write(held: &Held, content: &Content, target: Entered) -> bool {
    let (snapshot, range) = (held.snapshot(), held.range());
    let mut target = Some(target);
    let mut has_failed = false;
    loop {
        // Looked at after it has been entered: whoever ends the snapshot then waits for this.
        let entered = target.take().or_else(|| snapshot.target.enter());
        if snapshot.lets_pass() {
            return false;
        }
        // In a drained section of the target there is none.
        if let Some(entered) = entered {
            match content.put(&entered, &range).await {
                Ok(moved) => {
                    snapshot.behind.has_saved();
                    snapshot.tell_copied(range.end - range.start, moved);
                    held.saved();
                    snapshot.note_saved();
                    forget_taken_out(snapshot, &entered, range).await;
                    return true;
                }
                Err(error) => failed(snapshot, error, &mut has_failed),
            }
        }
        let retry = pin!(runtime::sleep(RETRY));
        let ended = pin!(snapshot.until(range.clone(), || snapshot.lets_pass()));
        select(retry, ended).await;
    }
}

fn failed(snapshot: &Snapshot, error: IoError, has_failed: &mut bool) {
    snapshot.behind.proof.store(0, SeqCst);
    if snapshot.behind.on_error == OnCbwError::BreakSnapshot {
        snapshot.set_broken(error.errno);
    } else if !snapshot.lets_pass() && std::mem::replace(has_failed, true) {
        snapshot.behind.set_failure(error);
        snapshot.tell_changed();
    }
}
