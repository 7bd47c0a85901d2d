//! A storage in memory for tests: it can hold, fail and delay chosen requests,
//! says when it holds them, and remembers what was done.
//!
//! ```
//! use block::{IoOp, test_storage::{Match, TestStorage}};
//!
//! let storage = TestStorage::new(1 << 20);
//! storage.hold(Match::op(IoOp::Write).range(0..4096));
//! let driver = storage.driver();
//! // … start a write in some task, then `storage.wait_held(1).await`,
//! // do what is to happen meanwhile, and `storage.release_all()`.
//! # drop(driver);
//! ```

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::buffer::IoVec;
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, Extent, ExtentFlags, Limits, WriteFlags, ZeroFlags,
};
use crate::error::{IoError, IoOp};
use crate::permissions::{PermissionError, Permissions};
use crate::runtime;

/// Bytes are allocated, and seen by block status, in chunks of this size.
pub const CHUNK: u64 = 4096;

/// Which requests a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    op: Option<IoOp>,
    range: Option<Range<u64>>,
}

impl Match {
    /// Every request.
    pub fn any() -> Self {
        Self {
            op: None,
            range: None,
        }
    }

    /// Requests of one kind.
    pub fn op(op: IoOp) -> Self {
        Self {
            op: Some(op),
            range: None,
        }
    }

    /// Of these, only those that touch `range` (bytes).
    pub fn range(self, range: Range<u64>) -> Self {
        Self {
            range: Some(range),
            ..self
        }
    }

    fn matches(&self, op: IoOp, offset: u64, len: u64) -> bool {
        self.op.is_none_or(|wanted| wanted == op)
            && self
                .range
                .as_ref()
                .is_none_or(|r| offset < r.end && r.start < offset.saturating_add(len))
    }
}

/// When a held request is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldAt {
    /// Before it has done anything.
    Start,
    /// After it took effect, before its completion is told.
    End,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was.
    pub op: IoOp,
    /// Its start in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// 0, or the errno that it failed with.
    pub errno: i32,
}

/// The storage and its controls. Clones share it. Any thread.
#[derive(Clone)]
pub struct TestStorage {
    shared: Arc<Shared>,
}

struct Shared {
    /// Bytes. Changed by resizes, of which there is one at a time.
    size: AtomicU64,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Allocated chunks by number. What is not there is a hole.
    chunks: BTreeMap<u64, Box<[u8]>>,
    holds: Vec<(Match, HoldAt)>,
    held: Vec<Held>,
    next_held: u64,
    /// Rules that make requests fail; with `once`, gone after the first.
    failures: Vec<(Match, i32, bool)>,
    delays: Vec<(Match, Duration)>,
    ended: Vec<Ended>,
    in_flight: usize,
    /// Drained sections that its driver was told of and that have not ended.
    sections: usize,
    /// How often requests in flight were cancelled.
    cancels: usize,
    permissions: Vec<Permissions>,
    refuse_permissions: bool,
    /// Told of every change.
    watchers: Vec<Waker>,
}

struct Held {
    key: u64,
    op: IoOp,
    offset: u64,
    released: bool,
    waker: Option<Waker>,
}

impl State {
    fn changed(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.watchers)
    }
}

fn wake(wakers: Vec<Waker>) {
    for waker in wakers {
        waker.wake();
    }
}

impl TestStorage {
    /// A hole of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self::with_limits(size, Limits::default())
    }

    /// As [`new`](Self::new), with other limits.
    pub fn with_limits(size: u64, limits: Limits) -> Self {
        Self {
            shared: Arc::new(Shared {
                size: AtomicU64::new(size),
                limits,
                state: Mutex::default(),
            }),
        }
    }

    /// A driver of this storage, for `Graph::add_node`.
    pub fn driver(&self) -> Box<dyn BlockDriver> {
        Box::new(TestDriver {
            storage: self.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that match are held from now on, before they do anything, until
    /// they are released.
    pub fn hold(&self, what: Match) {
        self.hold_at(what, HoldAt::Start);
    }

    /// As [`hold`](Self::hold), at the given moment.
    pub fn hold_at(&self, what: Match, at: HoldAt) {
        self.state().holds.push((what, at));
    }

    /// No more requests are held. Those that are stay so.
    pub fn stop_holding(&self) {
        self.state().holds.clear();
    }

    /// How many requests are held.
    pub fn held(&self) -> usize {
        self.state().held.iter().filter(|h| !h.released).count()
    }

    /// Kind and offset of the requests that are held, in order.
    pub fn held_requests(&self) -> Vec<(IoOp, u64)> {
        self.state()
            .held
            .iter()
            .filter(|h| !h.released)
            .map(|h| (h.op, h.offset))
            .collect()
    }

    /// Waits until at least `count` requests are held.
    pub async fn wait_held(&self, count: usize) {
        self.wait_until(|state| state.held.iter().filter(|h| !h.released).count() >= count)
            .await;
    }

    /// Waits until at least `count` requests have ended, ever.
    pub async fn wait_ended(&self, count: usize) {
        self.wait_until(|state| state.ended.len() >= count).await;
    }

    async fn wait_until(&self, done: impl Fn(&State) -> bool) {
        poll_fn(|cx| {
            let mut state = self.state();
            if done(&state) {
                return Poll::Ready(());
            }
            state.watchers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Lets the request go on that is held for the longest. Whether there was one.
    pub fn release_one(&self) -> bool {
        self.release_first(|_| true)
    }

    /// As [`release_one`](Self::release_one), of those that begin at `offset`.
    pub fn release_at(&self, offset: u64) -> bool {
        self.release_first(|held| held.offset == offset)
    }

    fn release_first(&self, which: impl Fn(&Held) -> bool) -> bool {
        let (found, waker) = {
            let mut state = self.state();
            let mut held = state.held.iter_mut();
            match held.find(|h| !h.released && which(h)) {
                Some(held) => {
                    held.released = true;
                    (true, held.waker.take())
                }
                None => (false, None),
            }
        };
        wake(waker.into_iter().collect());
        found
    }

    /// Lets all held requests go on, and holds no more.
    pub fn release_all(&self) {
        self.stop_holding();
        while self.release_one() {}
    }

    /// The next request that matches fails with `errno`, without effect.
    pub fn fail_once(&self, what: Match, errno: i32) {
        self.state().failures.push((what, errno, true));
    }

    /// Requests that match fail with `errno` from now on, without effect.
    pub fn fail(&self, what: Match, errno: i32) {
        self.state().failures.push((what, errno, false));
    }

    /// No more requests fail.
    pub fn stop_failing(&self) {
        self.state().failures.clear();
    }

    /// Requests that match take `time` longer.
    pub fn delay(&self, what: Match, time: Duration) {
        self.state().delays.push((what, time));
    }

    /// No more requests are delayed.
    pub fn stop_delaying(&self) {
        self.state().delays.clear();
    }

    /// All requests that have ended, in that order.
    pub fn ended(&self) -> Vec<Ended> {
        self.state().ended.clone()
    }

    /// Forgets which requests have ended.
    pub fn forget_ended(&self) {
        self.state().ended.clear();
    }

    /// Requests that have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.state().in_flight
    }

    /// Drained sections that the driver is in.
    pub fn sections(&self) -> usize {
        self.state().sections
    }

    /// How often requests in flight were cancelled.
    pub fn cancels(&self) -> usize {
        self.state().cancels
    }

    /// All permissions that were set, the last one last.
    pub fn permissions(&self) -> Vec<Permissions> {
        self.state().permissions.clone()
    }

    /// Whether to refuse new permissions, as if another process held the image.
    pub fn refuse_permissions(&self, refuse: bool) {
        self.state().refuse_permissions = refuse;
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size.load(Ordering::SeqCst)
    }

    /// All bytes.
    pub fn snapshot(&self) -> Vec<u8> {
        self.peek(0, self.size() as usize)
    }

    /// `len` bytes at `offset`.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let state = self.state();
        for (chunk, within, at, n) in pieces(offset, len as u64) {
            if let Some(data) = state.chunks.get(&chunk) {
                bytes[at..at + n].copy_from_slice(&data[within..within + n]);
            }
        }
        bytes
    }

    /// Puts bytes there, as if they had always been.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        for (chunk, within, at, n) in pieces(offset, bytes.len() as u64) {
            let data = state
                .chunks
                .entry(chunk)
                .or_insert_with(|| vec![0; CHUNK as usize].into());
            data[within..within + n].copy_from_slice(&bytes[at..at + n]);
        }
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) {
        let mut state = self.state();
        for (chunk, within, _, n) in pieces(offset, len) {
            if unmap && n as u64 == CHUNK {
                state.chunks.remove(&chunk);
            } else {
                state
                    .chunks
                    .entry(chunk)
                    .or_insert_with(|| vec![0; CHUNK as usize].into())[within..within + n]
                    .fill(0);
            }
        }
    }

    fn status(&self, offset: u64, len: u64) -> Extent {
        let state = self.state();
        let allocated = |at: u64| state.chunks.contains_key(&(at / CHUNK));
        let data = allocated(offset);
        let mut end = offset;
        while end < offset + len && allocated(end) == data {
            end = (end / CHUNK + 1) * CHUNK;
        }
        Extent {
            len: end.min(offset + len) - offset,
            flags: ExtentFlags {
                data,
                zero: !data,
                allocated: data,
            },
        }
    }

    /// Runs one request by the rules; `effect` is what it does.
    async fn request<R>(
        &self,
        op: IoOp,
        offset: u64,
        len: u64,
        effect: impl FnOnce() -> R,
    ) -> Result<R, IoError> {
        let _counted = Counted::new(self);
        self.pass(op, offset, len, HoldAt::Start).await;
        let (errno, delay) = self.rules(op, offset, len);
        if let Some(delay) = delay {
            runtime::sleep(delay).await;
        }
        let result = (errno == 0).then(effect);
        self.pass(op, offset, len, HoldAt::End).await;
        let watchers = {
            let mut state = self.state();
            state.ended.push(Ended {
                op,
                offset,
                len,
                errno,
            });
            state.changed()
        };
        wake(watchers);
        result.ok_or_else(|| IoError {
            op,
            node: "test".into(),
            offset,
            len,
            errno,
        })
    }

    fn rules(&self, op: IoOp, offset: u64, len: u64) -> (i32, Option<Duration>) {
        let mut state = self.state();
        let failure = state
            .failures
            .iter()
            .position(|(what, _, _)| what.matches(op, offset, len));
        let errno = match failure {
            Some(i) if state.failures[i].2 => state.failures.remove(i).1,
            Some(i) => state.failures[i].1,
            None => 0,
        };
        let delay = state
            .delays
            .iter()
            .find(|(what, _)| what.matches(op, offset, len))
            .map(|(_, time)| *time);
        (errno, delay)
    }

    /// Waits while a request is held.
    async fn pass(&self, op: IoOp, offset: u64, len: u64, moment: HoldAt) {
        let (key, watchers) = {
            let mut state = self.state();
            let held = state
                .holds
                .iter()
                .any(|(what, at)| *at == moment && what.matches(op, offset, len));
            if !held {
                return;
            }
            let key = state.next_held;
            state.next_held += 1;
            state.held.push(Held {
                key,
                op,
                offset,
                released: false,
                waker: None,
            });
            (key, state.changed())
        };
        wake(watchers);
        let place = HeldPlace { storage: self, key };
        poll_fn(|cx| {
            let mut state = place.storage.state();
            match state.held.iter_mut().find(|h| h.key == place.key) {
                Some(held) if !held.released => {
                    held.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
    }
}

/// Takes a held request off the list, also when its future is dropped.
struct HeldPlace<'a> {
    storage: &'a TestStorage,
    key: u64,
}

impl Drop for HeldPlace<'_> {
    fn drop(&mut self) {
        self.storage.state().held.retain(|h| h.key != self.key);
    }
}

struct Counted<'a>(&'a TestStorage);

impl<'a> Counted<'a> {
    fn new(storage: &'a TestStorage) -> Self {
        storage.state().in_flight += 1;
        Self(storage)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.state().in_flight -= 1;
    }
}

/// Cuts a range at chunk borders: chunk, offset in it, offset in the range,
/// length.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= offset + len {
            return None;
        }
        let within = at % CHUNK;
        let n = (CHUNK - within).min(offset + len - at);
        let piece = (
            at / CHUNK,
            within as usize,
            (at - offset) as usize,
            n as usize,
        );
        at += n;
        Some(piece)
    })
}

struct TestDriver {
    storage: TestStorage,
}

impl BlockDriver for TestDriver {
    fn name(&self) -> &'static str {
        "test"
    }

    fn size(&self) -> u64 {
        self.storage.size()
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.storage
                .request(IoOp::Truncate, size, 1, || {
                    let old = self.storage.size();
                    if size < old {
                        self.storage.poke(size, &vec![0; (old - size) as usize]);
                    }
                    self.storage.shared.size.store(size, Ordering::SeqCst);
                })
                .await
        })
    }

    fn drained_begin(&self) {
        self.storage.state().sections += 1;
    }

    fn drained_end(&self) {
        self.storage.state().sections -= 1;
    }

    fn cancel_in_flight(&self, _reach: CancelReach) {
        self.storage.state().cancels += 1;
    }

    fn limits(&self) -> Limits {
        self.storage.shared.limits
    }

    fn filename(&self) -> String {
        String::new()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let len = iov.len();
            self.storage
                .request(IoOp::Read, offset, len as u64, || {
                    iov.copy_from(0, &self.storage.peek(offset, len));
                })
                .await
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        _flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let len = iov.len();
            self.storage
                .request(IoOp::Write, offset, len as u64, || {
                    let mut bytes = vec![0; len];
                    iov.copy_to(0, &mut bytes);
                    self.storage.poke(offset, &bytes);
                })
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
            self.storage
                .request(IoOp::WriteZeroes, offset, len, || {
                    self.storage.zero(offset, len, flags.may_unmap);
                })
                .await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.storage
                .request(IoOp::Discard, offset, len, || {
                    self.storage.zero(offset, len, true);
                })
                .await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.storage.request(IoOp::Flush, 0, 0, || ()).await })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            self.storage
                .request(IoOp::BlockStatus, offset, len, || {
                    self.storage.status(offset, len)
                })
                .await
        })
    }

    fn check_permissions(&self, wanted: Permissions) -> Result<(), PermissionError> {
        let mut state = self.storage.state();
        if state.refuse_permissions {
            return Err(PermissionError::Locked {
                perm: crate::permissions::Perm::WRITE,
                shared: false,
                filename: "test".to_owned(),
            });
        }
        state.permissions.push(wanted);
        Ok(())
    }

    fn abort_permissions(&self) {
        self.storage.state().permissions.pop();
    }
}
