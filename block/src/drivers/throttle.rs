//! `throttle`: limits the rate of the requests to the node below, together with
//! the other members of its group.

use std::sync::Arc;

use crate::buffer::IoVec;
use crate::driver::{BlockDriver, BoxFuture, Extent, Limits, WriteFlags, ZeroFlags};
use crate::error::IoError;
use crate::node::{Child, Node};
use crate::throttle::{Direction, ThrottleGroup, ThrottleMember};

/// Reads, writes, zeroes and discards wait here until their group lets them go.
/// Flushes and questions do not.
#[derive(Debug)]
pub struct ThrottleDriver {
    file: Child,
    member: ThrottleMember,
}

impl ThrottleDriver {
    /// A filter on `file` that is a member of `group`.
    pub fn new(group: Arc<ThrottleGroup>, file: Child) -> Self {
        Self {
            file,
            member: ThrottleMember::new(group),
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
            self.member.pass(Direction::Read, iov.len() as u64).await;
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
            self.member.pass(Direction::Write, iov.len() as u64).await;
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
            self.member.pass(Direction::Write, len).await;
            self.file.node().write_zeroes(offset, len, flags).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.member.pass(Direction::Write, len).await;
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
    fn cancel_in_flight(&self) {
        self.member.let_go();
        self.file.node().cancel_in_flight();
    }

    fn drained_begin(&self) {
        self.member.drained_begin();
    }

    fn drained_end(&self) {
        self.member.drained_end();
    }

    fn close(&self) {
        self.member.leave();
    }
}
