//! Copies what is dirty as fast as it can, and flushes the target: for drained
//! sections, in which the guest waits, and just before them.
//!
//! It can be left at any moment. What is in flight then stays so, holding its ranges,
//! until it is waited for beside the guest ([`Sweep::poll_ended`]): a request is never
//! dropped before it has ended.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use block::IoError;
use futures_util::future::{Either, LocalBoxFuture, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::copying::{Copied, CopyError, Side};

use super::copy::Copier;
use super::state::MirrorState;

/// Operations side by side.
pub(super) const OPERATIONS: usize = 8;
/// Flushes before a section at most.
const MOST_FLUSHES: u32 = 6;
/// A flush that need not get shorter.
const SHORT_FLUSH: Duration = Duration::from_millis(2);

/// How a copying or a flush ended.
#[derive(Debug)]
pub(super) enum Swept {
    /// There was no more to be done.
    Done,
    /// `stop` came, or a node is being drained by somebody else.
    Stopped,
    /// A request failed. Its range is dirty again.
    Failed(CopyError),
}

/// How often the target is flushed beside the guest before a section.
///
/// Where the guest's requests write the target, a flush finds what they wrote during the
/// one before: after a long one much, and the guest would wait for it in the section. So
/// it is flushed again as long as that gets shorter.
pub(super) struct Flushes {
    left: u32,
    before: Duration,
}

impl Flushes {
    pub(super) fn new() -> Self {
        Self {
            left: MOST_FLUSHES,
            before: Duration::MAX,
        }
    }

    /// Whether another flush pays, after one that took `took`.
    pub(super) fn again(&mut self, took: Duration) -> bool {
        self.left = self.left.saturating_sub(1);
        let pays = self.left > 0 && took > SHORT_FLUSH && took < self.before / 4 * 3;
        self.before = took;
        pays
    }
}

/// Operations, and at most one flush, that may outlive a drained section.
pub(super) struct Sweep {
    copier: Rc<Copier>,
    state: Arc<MirrorState>,
    operations: FuturesUnordered<LocalBoxFuture<'static, Result<Copied, CopyError>>>,
    flush: Option<LocalBoxFuture<'static, Result<(), IoError>>>,
    cursor: u64,
    began: Instant,
}

impl Sweep {
    pub(super) fn new(copier: Rc<Copier>, state: Arc<MirrorState>) -> Self {
        Self {
            copier,
            state,
            operations: FuturesUnordered::new(),
            flush: None,
            cursor: 0,
            began: Instant::now(),
        }
    }

    /// Copies until no more than `enough` bytes are dirty and nothing is in flight.
    /// `done` is told of each operation.
    pub(super) async fn copy(
        &mut self,
        enough: u64,
        mut done: impl FnMut(&Copied),
        stop: impl Future<Output = ()>,
    ) -> Swept {
        let mut stop = pin!(stop);
        self.began = Instant::now();
        loop {
            if !self.start_operations(enough) {
                return Swept::Stopped;
            }
            match select(stop.as_mut(), self.operations.next()).await {
                Either::Left(_) => return Swept::Stopped,
                Either::Right((None, _)) => return Swept::Done,
                Either::Right((Some(Ok(copied)), _)) => done(&copied),
                Either::Right((Some(Err(error)), _)) => return Swept::Failed(error),
            }
        }
    }

    /// `false`: somebody drains a node.
    fn start_operations(&mut self, enough: u64) -> bool {
        let request = self.copier.pool().buffer_size() as u64;
        while self.operations.len() < OPERATIONS && self.state.dirty_bytes() > enough {
            let dirty = &self.state.dirty;
            let range = dirty
                .next_dirty_area(self.cursor, request)
                .or_else(|| dirty.next_dirty_area(0, request));
            let Some(range) = range else { break };
            let Some(nodes) = self.copier.enter() else {
                return false;
            };
            self.cursor = range.end;
            let look = self.copier.look_at_written(&range, request);
            let operation = self.copier.copy(range, look, nodes);
            self.operations.push(Box::pin(operation));
        }
        true
    }

    /// Makes the target keep all that was written to it before this call.
    pub(super) async fn flush(&mut self, stop: impl Future<Output = ()>) -> Swept {
        let mut stop = pin!(stop);
        self.began = Instant::now();
        let mut fresh = false;
        loop {
            if let Some(flush) = &mut self.flush {
                match select(stop.as_mut(), flush).await {
                    Either::Left(_) => return Swept::Stopped,
                    Either::Right((result, _)) => {
                        if let Err(error) = self.flush_ended(result) {
                            return Swept::Failed(error);
                        }
                    }
                }
                // One that had begun before does not cover everything.
                if fresh {
                    return Swept::Done;
                }
            }
            if !self.state.is_target_written() {
                return Swept::Done;
            }
            let Some(nodes) = self.copier.enter() else {
                return Swept::Stopped;
            };
            self.state.flush_begins();
            self.flush = Some(Box::pin(async move { nodes.target().flush().await }));
            fresh = true;
        }
    }

    fn flush_ended(&mut self, result: Result<(), IoError>) -> Result<(), CopyError> {
        self.flush = None;
        result.map_err(|error| {
            self.state.note_target_written();
            CopyError {
                side: Side::Target,
                error,
            }
        })
    }

    /// When the last copying or flush began.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.operations.is_empty() && self.flush.is_none()
    }

    /// Polls for something in flight to end; `None` if nothing is.
    pub(super) fn poll_ended(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Option<Copied>, CopyError>>> {
        if let Poll::Ready(Some(ended)) = self.operations.poll_next_unpin(cx) {
            return Poll::Ready(Some(ended.map(Some)));
        }
        let Some(flush) = &mut self.flush else {
            return match self.operations.is_empty() {
                true => Poll::Ready(None),
                false => Poll::Pending,
            };
        };
        let result = ready!(flush.as_mut().poll(cx));
        Poll::Ready(Some(self.flush_ended(result).map(|()| None)))
    }

    /// Lets what is in flight end, and begins no more.
    pub(super) async fn leave(mut self) {
        self.copier.stop();
        while poll_fn(|cx| self.poll_ended(cx)).await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(took_ms: impl Fn(u32) -> u64) -> u32 {
        let mut flushes = Flushes::new();
        let mut done = 0;
        loop {
            let took = Duration::from_millis(took_ms(done));
            done += 1;
            if !flushes.again(took) {
                return done;
            }
        }
    }

    #[test]
    fn flushes_go_on_while_they_get_shorter_and_are_not_short() {
        assert_eq!(count(|_| 1), 1);
        assert_eq!(count(|_| 20), 2, "no shorter");
        assert_eq!(count(|n| [400, 100, 25, 1][n as usize]), 4);
        assert_eq!(count(|n| 1000 >> n), MOST_FLUSHES);
    }
}
