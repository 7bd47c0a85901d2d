//! How requests get from the threads that make them to the thread of the
//! connection.
//!
//! What does not live here: what the connection does with them (`transmission`),
//! and when it is lost or back (`link`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use futures_util::task::AtomicWaker;

use crate::buffer::IoVec;
use crate::driver::CancelReach;
use crate::range_lock::RangeGuard;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, lock};

/// What a request gives: nothing, or a block status; else an errno.
pub(super) type Answer = Result<Option<Status>, i32>;

/// First extent of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// Length in bytes; at least 1. The peer's word.
    pub(crate) len: u64,
    /// Flags of `base:allocation`.
    pub(crate) flags: u64,
}

/// What is asked of the server. Kept until it has answered, and asked again after a
/// reconnect.
#[derive(Clone)]
pub(crate) struct Command {
    /// Which ([`command`](crate::nbd::protocol::command)).
    pub(crate) kind: u16,
    /// How ([`command_flag`](crate::nbd::protocol::command_flag)).
    pub(crate) flags: u16,
    /// First byte.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Data of a write, memory of a read: `len` bytes.
    pub(crate) iov: Option<IoVec>,
    /// Keeps others off the range until the command has ended, whoever has stopped
    /// waiting.
    pub(crate) _range: Option<Arc<RangeGuard>>,
}

/// A command and who waits for it.
pub(super) struct Request {
    pub(super) command: Command,
    /// Dropped unanswered only with the connection's thread.
    done: oneshot::Sender<Answer>,
    /// How many cancels there had been when it was submitted.
    cancels: u64,
    /// When a connection first broke with it.
    lost: Option<Instant>,
}

impl Request {
    /// Tells the result. Nobody may be waiting any more.
    pub(super) fn finish(self, answer: Answer) {
        let _ = self.done.send(answer);
    }

    /// Whether it was among the requests in flight when `abandoned` said so
    /// ([`Queue::abandoned`]).
    pub(super) fn is_abandoned(&self, abandoned: u64) -> bool {
        self.cancels < abandoned
    }
}

/// What becomes of new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// They are sent.
    Connected,
    /// There is no connection; they wait for one.
    Waiting,
    /// There is no connection; they fail.
    Lost,
    /// The node is being closed; they fail.
    Closed,
}

/// Shared by submitting threads and the connection's thread.
pub(super) struct Queue {
    /// A leaf lock, held for a few instructions.
    inner: Mutex<Inner>,
    /// See [`abandoned`](Self::abandoned). Written under the lock, read without.
    abandoned: AtomicU64,
    /// Wakes the connection's task: requests, room for them, a close, or a failed
    /// request that makes another attempt worth while. Synchronises itself.
    pub(super) task: AtomicWaker,
}

struct Inner {
    pending: VecDeque<Request>,
    state: LinkState,
    /// A request came while the connection was lost.
    wanted: bool,
    /// Calls of [`Queue::cancel`]. What was submitted before the last one does not
    /// wait for another connection.
    cancels: u64,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                pending: VecDeque::new(),
                state: LinkState::Connected,
                wanted: false,
                cancels: 0,
            }),
            abandoned: AtomicU64::new(0),
            task: AtomicWaker::new(),
        }
    }

    /// Queues a command, or fails it: there is no connection and none is awaited.
    pub(super) fn submit(&self, command: Command) -> oneshot::Receiver<Answer> {
        let (done, answer) = oneshot::channel();
        let refused = {
            let mut inner = lock(&self.inner);
            let request = Request {
                command,
                done,
                cancels: inner.cancels,
                lost: None,
            };
            match inner.state {
                LinkState::Connected | LinkState::Waiting => {
                    inner.pending.push_back(request);
                    None
                }
                LinkState::Lost | LinkState::Closed => {
                    inner.wanted = true;
                    Some(request)
                }
            }
        };
        self.task.wake();
        if let Some(request) = refused {
            request.finish(Err(libc::EIO));
        }
        answer
    }

    /// Takes the next request, if there is one.
    pub(super) fn take(&self) -> Option<Request> {
        lock(&self.inner).pending.pop_front()
    }

    pub(super) fn state(&self) -> LinkState {
        lock(&self.inner).state
    }

    /// Whether a request has come since the last call that could not be served.
    pub(super) fn take_wanted(&self) -> bool {
        std::mem::take(&mut lock(&self.inner).wanted)
    }

    /// Registers `waker` as the connection's task.
    pub(super) fn register(&self, waker: &Waker) {
        self.task.register(waker);
    }

    /// The connection is there (again). Nothing happens once closed.
    pub(super) fn connected(&self) {
        let mut inner = lock(&self.inner);
        if inner.state != LinkState::Closed {
            inner.state = LinkState::Connected;
        }
    }

    /// The connection has gone, with `unanswered` requests in it, oldest first. They
    /// and those to come wait for another, but for those that were cancelled, and those
    /// with which a connection broke first `patience` ago: one that makes each server
    /// fail is not asked for ever.
    pub(super) fn lost(&self, unanswered: Vec<Request>, patience: Duration) {
        let now = Instant::now();
        let failed: Vec<Request> = {
            let mut inner = lock(&self.inner);
            for mut request in unanswered.into_iter().rev() {
                request.lost.get_or_insert(now);
                inner.pending.push_front(request);
            }
            if inner.state != LinkState::Closed {
                inner.state = LinkState::Waiting;
            }
            let cancels = inner.cancels;
            let is_over = |request: &Request| {
                let lost = request.lost.map_or(Duration::ZERO, |lost| now - lost);
                request.cancels < cancels || lost > patience
            };
            let (failed, left): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut inner.pending)
                .into_iter()
                .partition(is_over);
            inner.pending = left;
            failed.into()
        };
        for request in failed {
            request.finish(Err(libc::EIO));
        }
        if patience.is_zero() {
            self.give_up();
        }
    }

    /// Nobody wants to wait for a server's return any more: what waits, or is in
    /// flight and comes to wait, fails; what comes later fails until it has returned,
    /// if it is away. With [`CancelReach::Hanging`], what is in flight is
    /// [`abandoned`](Self::abandoned). Any thread.
    pub(super) fn cancel(&self, reach: CancelReach) {
        {
            let mut inner = lock(&self.inner);
            inner.cancels += 1;
            if reach == CancelReach::Hanging {
                self.abandoned.store(inner.cancels, Ordering::Release);
            }
        }
        self.give_up();
        if reach == CancelReach::Hanging {
            self.task.wake();
        }
    }

    /// Which requests are not worth a silent connection: those that
    /// [`Request::is_abandoned`] knows by this number. 0: none.
    pub(super) fn abandoned(&self) -> u64 {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Requests wait for a connection no longer: those that do fail. Any thread.
    pub(super) fn give_up(&self) {
        let failed = {
            let mut inner = lock(&self.inner);
            match inner.state {
                LinkState::Waiting => inner.state = LinkState::Lost,
                LinkState::Connected => return,
                LinkState::Lost | LinkState::Closed => {}
            }
            std::mem::take(&mut inner.pending)
        };
        for request in failed {
            request.finish(Err(libc::EIO));
        }
    }

    /// The node is being closed: new requests fail, those that are queued are done
    /// if there is a connection. Any thread.
    pub(super) fn close(&self) {
        let connected = {
            let mut inner = lock(&self.inner);
            let before = std::mem::replace(&mut inner.state, LinkState::Closed);
            before == LinkState::Connected
        };
        if !connected {
            self.give_up();
        }
        self.task.wake();
    }
}

/// Fails what is queued, and what would be, when the connection's task has ended in
/// whatever way.
pub(super) struct CloseOnDrop(pub(super) Arc<Queue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
        self.0.give_up();
    }
}
