//! `copy-on-read`: what is read from a backing image is written to the image, so that
//! it comes from there the next time.

use std::sync::{Arc, Weak};

use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{BlockDriver, BoxFuture, ChildRole, Extent, Limits, WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};
use crate::permissions::{Perm, Permissions};
use crate::range_lock::RangeLock;

/// Bytes that are copied in one piece.
const PIECE: u64 = 1 << 20;
/// Unit of copies where the image has no clusters.
const UNIT: u64 = 64 << 10;

/// A filter on an image with backing images.
pub struct CopyOnReadDriver {
    file: Child,
    /// The lowest layer that is copied from; `None`: all are.
    bottom: Option<Weak<Node>>,
    /// Ranges that are being copied or written: a copy must not come after a write
    /// of the same place, since it has what was there before.
    busy: RangeLock,
}

impl CopyOnReadDriver {
    /// A filter on `file` that copies from the layers down to `bottom`, which is one
    /// of them.
    pub fn new(file: Child, bottom: Option<&Arc<Node>>) -> Self {
        Self {
            file,
            bottom: bottom.map(Arc::downgrade),
            busy: RangeLock::new(),
        }
    }

    /// The first layer that nothing is copied from.
    fn base(&self) -> Option<Arc<Node>> {
        self.bottom.as_ref()?.upgrade()?.backing()
    }

    async fn read_all(&self, offset: u64, iov: &IoVec) -> Result<(), IoError> {
        let file = self.file.node();
        let end = offset + iov.len() as u64;
        let mut at = offset;
        while at < end {
            let base = self.base();
            let layer = file.chain_status(base.as_ref(), at, end - at).await?;
            if layer.depth > 1 {
                self.copy(&file, at, layer.len).await?;
            }
            let part = iov.slice((at - offset) as usize, layer.len as usize);
            file.read(at, part).await?;
            at += layer.len;
        }
        Ok(())
    }

    /// Copies what a range and its surroundings have of lower layers.
    async fn copy(&self, file: &Arc<Node>, offset: u64, len: u64) -> Result<(), IoError> {
        let unit = file.limits().cluster_size.map_or(UNIT, u64::from).max(512);
        let start = offset - offset % unit;
        let end = (offset + len)
            .checked_next_multiple_of(unit)
            .unwrap_or(u64::MAX)
            .min(file.size());
        let mut at = start;
        while at < end {
            let piece = PIECE.max(unit).min(end - at);
            let _busy = self.busy.lock(at..at + piece).await;
            let base = self.base();
            // Somebody may have written it meanwhile.
            let layer = file.chain_status(base.as_ref(), at, piece).await?;
            if layer.depth > 1 && layer.zero {
                let keep = ZeroFlags::default();
                file.write_zeroes(at, layer.len, keep).await?;
            } else if layer.depth > 1 {
                let len = layer.len as usize;
                let data = AlignedBuffer::new(len).io_vec(len);
                file.read(at, data.clone()).await?;
                let flags = WriteFlags {
                    unchanged: true,
                    ..WriteFlags::default()
                };
                file.write(at, data, flags).await?;
            }
            at += layer.len;
        }
        Ok(())
    }

    fn overflow(&self, op: IoOp, offset: u64, len: u64) -> IoError {
        self.file.node().error(op, offset, len, libc::EINVAL)
    }

    /// `offset..offset + len`
    fn range(&self, op: IoOp, offset: u64, len: u64) -> Result<std::ops::Range<u64>, IoError> {
        let end = offset.checked_add(len);
        Ok(offset..end.ok_or_else(|| self.overflow(op, offset, len))?)
    }
}

impl BlockDriver for CopyOnReadDriver {
    fn name(&self) -> &'static str {
        "copy-on-read"
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
        Box::pin(async move { self.read_all(offset, &iov).await })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let range = self.range(IoOp::Write, offset, iov.len() as u64)?;
            let _busy = self.busy.lock(range).await;
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
            let _busy = self
                .busy
                .lock(self.range(IoOp::WriteZeroes, offset, len)?)
                .await;
            self.file.node().write_zeroes(offset, len, flags).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _busy = self
                .busy
                .lock(self.range(IoOp::Discard, offset, len)?)
                .await;
            self.file.node().discard(offset, len).await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().flush().await })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move { self.file.node().block_status(offset, len).await })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.file.node())
    }

    /// It writes what it copies. Where there is something to copy, nobody may write
    /// past it.
    fn child_permissions(&self, _: ChildRole, users: Permissions) -> Permissions {
        let layers = self.file.node().skip_filters().driver().has_layers();
        Permissions {
            need: users.need | Perm::WRITE_UNCHANGED,
            share: match layers {
                true => users.share.without(Perm::WRITE),
                false => users.share,
            },
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests;
