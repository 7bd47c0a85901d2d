//! `throttle`: limits the rate of the requests to the node below, together with
//! the other members of its group.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::buffer::IoVec;
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, Limits, Reopen, Reopened, WriteFlags,
    ZeroFlags,
};
use crate::drivers::ReopenError;
use crate::error::IoError;
use crate::node::{Child, Node};
use crate::sync::{Mutex, lock};
use crate::throttle::{Direction, ThrottleGroup, ThrottleMember};

/// Reads, writes, zeroes and discards wait here until their group lets them go.
/// Flushes and questions do not.
#[derive(Debug)]
pub struct ThrottleDriver {
    file: Child,
    /// Replaced on main with no request in flight, under `sections`.
    member: ArcSwap<ThrottleMember>,
    /// Drained sections that the member was told of. Group locks are taken under it.
    sections: Mutex<usize>,
    /// A place in the group that was prepared to come next. Main only.
    next: Mutex<Option<Arc<ThrottleMember>>>,
}

impl ThrottleDriver {
    /// A filter on `file` that is a member of `group`.
    pub fn new(group: Arc<ThrottleGroup>, file: Child) -> Self {
        Self {
            file,
            member: ArcSwap::from_pointee(ThrottleMember::new(group)),
            sections: Mutex::default(),
            next: Mutex::default(),
        }
    }
}

impl BlockDriver for ThrottleDriver {
    fn name(&self) -> &'static str {
        "throttle"
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

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let member = self.member.load_full();
            member.pass(Direction::Read, iov.len() as u64).await;
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
            let member = self.member.load_full();
            member.pass(Direction::Write, iov.len() as u64).await;
            self.file.node().write(offset, iov, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let member = self.member.load_full();
            member.pass(Direction::Write, len).await;
            self.file.node().write_zeroes(offset, len, flags).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let member = self.member.load_full();
            member.pass(Direction::Write, len).await;
            self.file.node().discard(offset, len).await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let file = self.file.node();
            file.flush_events();
            file.flush().await
        })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move { self.file.node().block_status(offset, len).await })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.file.node())
    }

    /// Those that wait for the limit need not fail: they go.
    fn cancel_in_flight(&self, reach: CancelReach) {
        self.member.load().let_go();
        self.file.node().cancel_in_flight(reach);
    }

    fn drained_begin(&self) {
        let wakes = {
            let mut sections = lock(&self.sections);
            *sections += 1;
            self.member.load().drained_begin()
        };
        // Nobody is woken under a lock.
        wakes.wake();
    }

    fn drained_end(&self) {
        let mut sections = lock(&self.sections);
        *sections = sections.saturating_sub(1);
        self.member.load().drained_end();
    }

    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            if let Some(group) = to.throttle_group
                && !self.member.load().is_of(group)
            {
                let next = ThrottleMember::new(Arc::clone(group));
                *lock(&self.next) = Some(Arc::new(next));
            }
            Ok(to.filter(ChildRole::File, &self.file.node()))
        })
    }

    fn reopen_commit(&self) {
        let next = lock(&self.next).take();
        let Some(next) = next else {
            return;
        };
        let before = {
            let sections = lock(&self.sections);
            for _ in 0..*sections {
                // Nobody can be waiting for it yet.
                next.drained_begin().wake();
            }
            self.member.swap(next)
        };
        before.leave();
    }

    fn reopen_abort(&self) {
        let next = lock(&self.next).take();
        drop(next);
    }

    fn close(&self) {
        self.member.load().leave();
    }
}
