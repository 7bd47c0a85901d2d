//! `snapshot-access`: shows the snapshot that a `copy-before-write` filter below keeps.
//! It cannot be written; what is discarded is taken out of the snapshot.

use std::sync::Arc;

use crate::buffer::IoVec;
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, Limits, WriteFlags, ZeroFlags,
};
use crate::drivers::copy_before_write::Snapshot;
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};
use crate::permissions::Permissions;

/// A view of the snapshot of a filter.
pub struct SnapshotAccessDriver {
    file: Child,
}

impl SnapshotAccessDriver {
    /// The view of the filter in `file`, or below filters in it. Without one, all requests
    /// fail with `EOPNOTSUPP`.
    pub(crate) fn new(file: Child) -> Self {
        Self { file }
    }

    /// The node whose snapshot it is.
    fn keeper(&self, op: IoOp, offset: u64, len: u64) -> Result<Keeper, IoError> {
        let mut node = self.file.node();
        while node.driver().snapshot().is_none() {
            match node.driver().filtered() {
                Some(below) => node = below,
                None => return Err(self.refused(op, offset, len)),
            }
        }
        Ok(Keeper(node))
    }

    fn refused(&self, op: IoOp, offset: u64, len: u64) -> IoError {
        self.file.node().error(op, offset, len, libc::EOPNOTSUPP)
    }
}

/// A node that keeps a snapshot.
struct Keeper(Arc<Node>);

impl Keeper {
    fn snapshot(&self, op: IoOp, offset: u64, len: u64) -> Result<&Arc<Snapshot>, IoError> {
        let refused = || self.0.error(op, offset, len, libc::EOPNOTSUPP);
        self.0.driver().snapshot().ok_or_else(refused)
    }
}

impl BlockDriver for SnapshotAccessDriver {
    fn name(&self) -> &'static str {
        "snapshot-access"
    }

    fn size(&self) -> u64 {
        self.file.node().size()
    }

    fn limits(&self) -> Limits {
        Limits {
            cluster_size: None,
            ..self.file.node().limits()
        }
    }

    fn filename(&self) -> String {
        self.file.node().driver().filename()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            let keeper = self.keeper(IoOp::Read, offset, len)?;
            let snapshot = keeper.snapshot(IoOp::Read, offset, len)?;
            snapshot.read(offset, iov).await
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        _: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        let len = iov.len() as u64;
        Box::pin(async move { Err(self.refused(IoOp::Write, offset, len)) })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        _: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        // Not `EOPNOTSUPP`: then zeroes would be written as data, to the same end.
        let refused = IoError {
            errno: libc::EACCES,
            ..self.refused(IoOp::WriteZeroes, offset, len)
        };
        Box::pin(async move { Err(refused) })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let keeper = self.keeper(IoOp::Discard, offset, len)?;
            let snapshot = keeper.snapshot(IoOp::Discard, offset, len)?;
            snapshot.discard(offset, len).await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            let keeper = self.keeper(IoOp::BlockStatus, offset, len)?;
            let snapshot = keeper.snapshot(IoOp::BlockStatus, offset, len)?;
            snapshot.block_status(offset, len).await
        })
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { Err(self.refused(IoOp::Truncate, size, 0)) })
    }

    fn shown_snapshot(&self) -> Option<Arc<Node>> {
        Some(self.file.node())
    }

    fn cancel_in_flight(&self, reach: CancelReach) {
        self.file.node().cancel_in_flight(reach);
    }

    /// It does nothing that the filter's users could be against.
    fn child_permissions(&self, _: ChildRole, _: Permissions) -> Permissions {
        Permissions::IDLE
    }
}
