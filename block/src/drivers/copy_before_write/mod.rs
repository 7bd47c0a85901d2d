//! `copy-before-write`: before a guest's request changes something for the first time,
//! what was there is copied to a target. Source and target together then have what the
//! source had when the filter came: a snapshot.
//!
//! - `snapshot`: which clusters are copied, and who waits for one; `account` and `claim`: its
//!   beginnings, and the right to copy some; `stalls`: what guests felt of it;
//! - `copy`: carrying one over for a guest's request;
//! - `behind`: the same while the request goes on;
//! - `waiting`: the lists of who waits and who reads.
//!
//! A request to clusters that are copied takes no lock. It waits only for copies of its
//! own clusters, or for room for them in memory, and no longer than `cbw-timeout`. What becomes of it if the copy fails
//! is `on-cbw-error`: it fails, and the snapshot stays good; or it goes on, and the
//! snapshot is broken for ever.
//!
//! The snapshot is read by `snapshot-access`, and copied by backup jobs.

use std::cell::Cell;
use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};

mod account;
mod behind;
#[cfg(all(test, not(shuttle)))]
mod behind_tests;
mod claim;
mod copy;
#[cfg(all(test, not(shuttle)))]
mod fine_tests;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
mod snapshot;
mod stalls;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod waiting;

pub use self::account::SnapshotAccount;
pub use self::behind::{Saved, Saves};
pub use self::claim::Claim;
use self::copy::{Content, Target};
use self::snapshot::Place;
pub use self::snapshot::{Listening, Snapshot, SnapshotObserver};
pub use self::stalls::Stalls;
use crate::buffer::IoVec;
use crate::dirty_bitmap::{BitmapError, DirtyBitmap};
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, ExtentFlags, Limits, UnnamedBitmap,
    WriteFlags, ZeroFlags,
};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};
use crate::options::DiscardMode;
use crate::permissions::{Perm, Permissions};
use crate::runtime;
use crate::sync::atomic::Ordering::SeqCst;

/// Smallest cluster in bytes, as QEMU's.
pub const MIN_CLUSTER: u64 = 64 << 10;
/// Smallest cluster in bytes where nobody sees how large it is.
const FINE_CLUSTER: u64 = 4 << 10;
/// Most clusters of that size: larger disks have larger ones. Their bitmaps take 32 MiB.
const MAX_FINE: u64 = 64 << 20;

/// `on-cbw-error`: what a failed copy means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// The guest's request fails; the snapshot stays good.
    #[default]
    BreakGuestWrite,
    /// The guest's request goes on; the snapshot is lost.
    BreakSnapshot,
}

/// How a filter treats guests' requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CbwPolicy {
    /// What a failed copy means.
    pub on_error: OnCbwError,
    /// How long a request waits for copies; `None`: as long as they take. Then the copy
    /// counts as failed.
    pub timeout: Option<Duration>,
}

/// The filter.
pub struct CopyBeforeWriteDriver {
    file: Child,
    snapshot: Arc<Snapshot>,
    policy: CbwPolicy,
    /// What is copied is discarded on the source.
    discards: bool,
}

/// The cluster of a snapshot that is kept in `target`, in bytes: a power of two.
pub fn cluster_of(target: &Node, at_least: u64) -> u64 {
    let of_target = target.limits().cluster_size.map_or(0, u64::from);
    let cluster = MIN_CLUSTER.max(at_least).max(of_target);
    cluster.checked_next_power_of_two().unwrap_or(1 << 63)
}

/// The smallest cluster that a snapshot of `source` may be kept in on `target`, in bytes (a
/// power of two), so that a small write has no more copied than it must. `None`: the target
/// has clusters of its own, or shows what others have, and takes whole clusters.
pub fn fine_cluster(source: &Arc<Node>, target: &Arc<Node>) -> Option<u64> {
    if target.limits().cluster_size.is_some() || target.backing().is_some() {
        return None;
    }
    let alignment = |node: &Arc<Node>| u64::from(node.limits().request_alignment);
    let cluster = FINE_CLUSTER
        .max(alignment(target))
        .max(alignment(source))
        .max(source.size().div_ceil(MAX_FINE));
    cluster.checked_next_power_of_two()
}

/// The errno of what broke the snapshot that `node` shows, if it shows one and that is
/// broken: then it can never be read again.
pub fn broken_snapshot(node: &Arc<Node>) -> Option<i32> {
    shown_snapshot(node)?.broken()
}

/// The snapshot that `node` shows, if it, or what it filters, is a `snapshot-access`.
pub fn shown_snapshot(node: &Arc<Node>) -> Option<Arc<Snapshot>> {
    let mut node = Arc::clone(node);
    let mut shows = false;
    loop {
        let driver = node.driver();
        if let Some(snapshot) = driver.snapshot().filter(|_| shows) {
            return Some(Arc::clone(snapshot));
        }
        let below = match driver.shown_snapshot() {
            Some(keeper) => {
                shows = true;
                Some(keeper)
            }
            None => driver.filtered(),
        };
        node = below?;
    }
}

impl CopyBeforeWriteDriver {
    /// A filter on `file` that keeps in `target` what all of `file` holds now, or what
    /// `part` has set.
    ///
    /// Errors: the disk is too large for bitmaps with so small clusters.
    pub(crate) fn new(
        file: Child,
        target: Child,
        policy: CbwPolicy,
        part: Option<&DirtyBitmap>,
    ) -> Result<Self, BitmapError> {
        let cluster = cluster_of(&target.node(), 0);
        let account = SnapshotAccount::new(file.node().size(), cluster, part)?;
        Ok(Self::with_target(
            file,
            Target::Child(target),
            account,
            policy,
        ))
    }

    /// As `new`, for a job that attaches the target by itself and then says
    /// so ([`Snapshot::set_target`]).
    pub fn for_job(file: Child, account: SnapshotAccount, policy: CbwPolicy) -> Self {
        Self::with_target(file, Target::Job(OnceLock::new()), account, policy)
    }

    /// With the right to discard the source ([`Snapshot::discard_source`]).
    pub fn that_discards(mut self) -> Self {
        self.discards = true;
        self
    }

    fn with_target(
        file: Child,
        target: Target,
        account: SnapshotAccount,
        policy: CbwPolicy,
    ) -> Self {
        let snapshot = Snapshot::new(file.share(), target, account);
        Self {
            file,
            snapshot: Arc::new(snapshot),
            policy,
            discards: false,
        }
    }

    /// The snapshot that it keeps.
    pub fn kept(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Runs a request that changes `range` of the source, once that may be changed.
    async fn change<T>(
        &self,
        op: IoOp,
        range: Range<u64>,
        request: impl Future<Output = Result<T, IoError>>,
    ) -> Result<T, IoError> {
        let clusters = self.snapshot.round_out(&range);
        if !self.snapshot.is_free(&clusters) && !self.snapshot.lets_pass() {
            let began = Instant::now();
            let waited = self.wait(op, &range, clusters).await;
            self.snapshot.note_stall(began.elapsed());
            waited?;
        }
        request.await
    }

    async fn wait(
        &self,
        op: IoOp,
        range: &Range<u64>,
        clusters: Range<u64>,
    ) -> Result<(), IoError> {
        let snapshot = &self.snapshot;
        let given_up = Rc::new(Cell::new(false));
        let secured = copy::secure(Arc::clone(snapshot), clusters.clone(), Rc::clone(&given_up));
        let timeout = async {
            match self.policy.timeout {
                Some(timeout) => runtime::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        // The snapshot may cease to be needed while its target hangs.
        let released = snapshot.until(clusters, || snapshot.lets_pass());
        let (timeout, released) = (pin!(timeout), pin!(released));
        let stop = select(timeout, released);
        let result = match select(Box::pin(secured), stop).await {
            Either::Left((result, _)) => result,
            Either::Right((why, secured)) => {
                // What is under way ends some time; the target is in use until then.
                given_up.set(true);
                leave(secured);
                match why {
                    Either::Left(_) => Err(snapshot.error(op, range, libc::ETIMEDOUT)),
                    Either::Right(_) => Ok(()),
                }
            }
        };
        match (result, self.policy.on_error) {
            (Ok(()), _) => Ok(()),
            // Whoever asked for the end of the snapshot does not need the copy.
            (Err(_), _) if self.snapshot.lets_pass() => Ok(()),
            (Err(error), OnCbwError::BreakGuestWrite) => Err(error),
            (Err(error), OnCbwError::BreakSnapshot) => {
                self.snapshot.set_broken(error.errno);
                Ok(())
            }
        }
    }

    fn range(&self, op: IoOp, offset: u64, len: u64) -> Result<Range<u64>, IoError> {
        let end = offset.checked_add(len);
        let refused = || self.file.node().error(op, offset, len, libc::EINVAL);
        Ok(offset..end.ok_or_else(refused)?)
    }
}

/// Lets a copy go on that nobody waits for.
#[cfg(not(shuttle))]
fn leave(copy: impl Future<Output = Result<(), IoError>> + 'static) {
    runtime::spawn_local(copy).detach();
}

/// The model has no loops.
#[cfg(shuttle)]
fn leave(copy: impl Future<Output = Result<(), IoError>> + 'static) {
    drop(shuttle::future::spawn_local(copy));
}

impl Snapshot {
    /// Reads what the disk held.
    ///
    /// Errors: `EACCES` if the snapshot is broken or has ended, or the range is not part of
    /// it. Cancel: nothing is left behind.
    pub async fn read(&self, offset: u64, iov: IoVec) -> Result<(), IoError> {
        let end = offset.saturating_add(iov.len() as u64);
        let mut at = offset;
        while at < end {
            let denied = |errno| self.error(IoOp::Read, &(at..end), errno);
            let (range, place) = self.look(at..end).map_err(denied)?;
            let part = iov.slice((at - offset) as usize, (range.end - at) as usize);
            match place {
                Place::Source(_frozen) => {
                    self.source().read(at, part).await?;
                    // The guest may have gone on without waiting for this.
                    if self.lets_pass() {
                        return Err(denied(libc::EACCES));
                    }
                }
                Place::Held => {
                    let Some((end, content, start)) = self.behind.look(at) else {
                        // The target has it by now, or nobody has.
                        continue;
                    };
                    let end = end.min(range.end);
                    content.copy_to((at - start) as usize, &part.slice(0, (end - at) as usize));
                    if self.lets_pass() {
                        return Err(denied(libc::EACCES));
                    }
                    at = end;
                    continue;
                }
                Place::Target => {
                    let target = self.target.enter().ok_or_else(|| denied(libc::EACCES))?;
                    target.node().read(at, part).await?;
                }
            }
            at = range.end;
        }
        Ok(())
    }

    /// What kind of data the disk held. Errors, cancel: as [`read`](Self::read).
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Extent, IoError> {
        let range = offset..offset.saturating_add(len);
        let denied = |errno| self.error(IoOp::BlockStatus, &range, errno);
        let (len, data, zero) = loop {
            let (place_range, place) = self.look(range.clone()).map_err(denied)?;
            let len = place_range.end - offset;
            match place {
                Place::Source(_frozen) => {
                    let extent = self.source().chain_status(None, offset, len).await?;
                    if self.lets_pass() {
                        return Err(denied(libc::EACCES));
                    }
                    break (extent.len, extent.data, extent.zero);
                }
                Place::Held => {
                    if let Some((end, content, _)) = self.behind.look(offset) {
                        let zero = matches!(content, Content::Zeroes);
                        break (len.min(end - offset), !zero, zero);
                    }
                }
                Place::Target => {
                    let target = self.target.enter().ok_or_else(|| denied(libc::EACCES))?;
                    let extent = target.node().chain_status(None, offset, len).await?;
                    break (extent.len, extent.data, extent.zero);
                }
            }
        };
        Ok(Extent {
            len,
            flags: ExtentFlags {
                data,
                zero,
                allocated: true,
            },
        })
    }

    /// Whole clusters (as users know them) of the range are not needed any more: they cannot
    /// be read from now on, are not copied, and their copies are discarded.
    ///
    /// Errors: as [`read`](Self::read). Cancel: they are out of the snapshot or not.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let range = offset..offset.saturating_add(len);
        if self.lets_pass() {
            return Err(self.error(IoOp::Discard, &range, libc::EACCES));
        }
        let clusters = self.round_in_shown(&range);
        if clusters.is_empty() {
            return Ok(());
        }
        self.skip(clusters.clone());
        match self.target.enter() {
            Some(target) => {
                let len = clusters.end - clusters.start;
                target.node().discard(clusters.start, len).await
            }
            None => Ok(()),
        }
    }
}

impl BlockDriver for CopyBeforeWriteDriver {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn size(&self) -> u64 {
        self.file.node().size()
    }

    fn limits(&self) -> Limits {
        self.file.node().limits()
    }

    fn filename(&self) -> String {
        self.file.node().driver().filename()
    }

    fn recorded(&self) -> Option<UnnamedBitmap> {
        Some(self.snapshot.unnamed(self.snapshot.pending_bytes()))
    }

    fn own_bitmaps(&self) -> Vec<UnnamedBitmap> {
        let snapshot = &self.snapshot;
        // As with QEMU: what can be read of the snapshot, and what of it was saved.
        [snapshot.readable_bytes(), snapshot.saved_bytes()]
            .map(|bytes| snapshot.unnamed(bytes))
            .into()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _measured = Measured::begin(&self.snapshot);
            self.file.node().read(offset, iov).await
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _measured = Measured::begin(&self.snapshot);
            let file = self.file.node();
            if flags.unchanged {
                return file.write(offset, iov, flags).await;
            }
            let range = self.range(IoOp::Write, offset, iov.len() as u64)?;
            self.change(IoOp::Write, range, file.write(offset, iov, flags))
                .await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _measured = Measured::begin(&self.snapshot);
            let file = self.file.node();
            let range = self.range(IoOp::WriteZeroes, offset, len)?;
            let request = file.write_zeroes(offset, len, flags);
            self.change(IoOp::WriteZeroes, range, request).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _measured = Measured::begin(&self.snapshot);
            let file = self.file.node();
            let range = self.range(IoOp::Discard, offset, len)?;
            if file.options().discard == DiscardMode::Ignore {
                // Nothing changes, so there is nothing to save.
                return Ok(());
            }
            self.change(IoOp::Discard, range, file.discard(offset, len))
                .await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().flush().await })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move { self.file.node().block_status(offset, len).await })
    }

    /// As long as the snapshot is needed, what would be cut off has not been saved, and
    /// what would be new has no place in it.
    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let file = self.file.node();
            if !self.snapshot.lets_pass() {
                return Err(file.error(IoOp::Truncate, size, 0, libc::EBUSY));
            }
            file.resize(size).await
        })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.file.node())
    }

    fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        Some(&self.snapshot)
    }

    /// Also the target's: a guest's request may be waiting for that.
    fn cancel_in_flight(&self, reach: CancelReach) {
        self.file.node().cancel_in_flight(reach);
        if let Target::Child(target) = &self.snapshot.target {
            target.node().cancel_in_flight(reach);
        }
    }

    /// Copies that outlive the requests which began them use the target. A job has its
    /// own count of them.
    fn drained_poll(&self) -> bool {
        matches!(self.snapshot.target, Target::Child(_)) && self.snapshot.copies.load(SeqCst) > 0
    }

    fn child_permissions(&self, role: ChildRole, users: Permissions) -> Permissions {
        if role == ChildRole::Target {
            // The source may be a layer of the target, so others may write that.
            return Permissions {
                need: Perm::WRITE,
                share: Perm::ALL.without(Perm::RESIZE),
            };
        }
        let mut need = users.need;
        if need.contains(Perm::WRITE) {
            need |= Perm::CONSISTENT_READ;
        }
        if self.discards {
            need |= Perm::WRITE;
        }
        Permissions {
            need,
            // Nobody may write past the filter.
            share: users.share.without(Perm::WRITE | Perm::RESIZE),
        }
    }

    /// A filter that is not in place yet stands in nobody's way.
    fn unused_child_permissions(&self, role: ChildRole) -> Permissions {
        match role {
            ChildRole::Target => self.child_permissions(role, Permissions::IDLE),
            _ => Permissions::IDLE,
        }
    }
}

/// Measures a guest's request, if somebody wants to know.
struct Measured<'a> {
    snapshot: &'a Snapshot,
    began: Option<Instant>,
}

impl<'a> Measured<'a> {
    fn begin(snapshot: &'a Snapshot) -> Self {
        let began = snapshot.is_measured().then(Instant::now);
        Self { snapshot, began }
    }
}

impl Drop for Measured<'_> {
    fn drop(&mut self) {
        if let Some(began) = self.began {
            self.snapshot.latency().record(began.elapsed());
        }
    }
}
