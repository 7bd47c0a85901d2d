//! A file below an image, which grows as the image needs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;

use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};

/// The file grows by at least that many bytes, so that not each new cluster costs
/// a change of its size.
const GROW: u64 = 1 << 20;

/// The node that holds an image, or its data. What lies past its end reads as
/// zeroes; a write there makes it longer. Any thread.
#[derive(Debug)]
pub(super) struct GrowingFile {
    child: Child,
    /// Held by who makes the file longer. A lock for tasks, not for threads.
    growing: Mutex<()>,
    /// Data was copied on write to it, which tables elsewhere are to refer to, since
    /// that was last made durable. Set by who has copied; cleared by who holds the
    /// barrier of those tables.
    copied: AtomicBool,
}

impl GrowingFile {
    pub(super) fn new(child: Child) -> Self {
        Self {
            child,
            growing: Mutex::new(()),
            copied: AtomicBool::new(false),
        }
    }

    pub(super) fn node(&self) -> Arc<Node> {
        self.child.node()
    }

    /// Reads `iov.len()` bytes at `offset`.
    pub(super) async fn read(&self, offset: u64, iov: IoVec) -> Result<(), IoError> {
        read_or_zero(&self.child.node(), offset, iov).await
    }

    /// Reads `len` bytes at `offset` into memory of our own. The caller bounds `len`.
    pub(super) async fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        let iov = AlignedBuffer::new(len).io_vec(len);
        self.read(offset, iov.clone()).await?;
        let mut bytes = vec![0; len];
        iov.copy_to(0, &mut bytes);
        Ok(bytes)
    }

    /// Writes `iov.len()` bytes at `offset`.
    pub(super) async fn write(&self, offset: u64, iov: IoVec) -> Result<(), IoError> {
        self.reach(IoOp::Write, offset, iov.len() as u64).await?;
        self.child
            .node()
            .write(offset, iov, WriteFlags::default())
            .await
    }

    /// Writes zeroes, which may or may not take space.
    pub(super) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.reach(IoOp::WriteZeroes, offset, len).await?;
        let flags = ZeroFlags {
            may_unmap: true,
            ..ZeroFlags::default()
        };
        self.child.node().write_zeroes(offset, len, flags).await
    }

    /// Gives the space of a range back, as far as the file has it.
    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let node = self.child.node();
        let len = len.min(node.size().saturating_sub(offset));
        node.discard(offset, len).await
    }

    /// Makes all writes that have ended durable.
    pub(super) async fn flush(&self) -> Result<(), IoError> {
        self.child.node().flush().await
    }

    /// Data was copied on write to the file, in which there are no tables.
    pub(super) fn set_copied(&self) {
        self.copied.store(true, Ordering::SeqCst);
    }

    /// Makes data that was copied on write durable, if there is any.
    pub(super) async fn flush_copied(&self) -> Result<(), IoError> {
        if !self.copied.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let flushed = self.flush().await;
        if flushed.is_err() {
            self.set_copied();
        }
        flushed
    }

    /// Makes the file at least as long as the range reaches. Storage that cannot
    /// grow has no space left.
    async fn reach(&self, op: IoOp, offset: u64, len: u64) -> Result<(), IoError> {
        let node = self.child.node();
        let error = |errno| node.error(op, offset, len, errno);
        let end = offset.checked_add(len).ok_or_else(|| error(libc::EFBIG))?;
        if end <= node.size() {
            return Ok(());
        }
        let _growing = self.growing.lock().await;
        if end <= node.size() {
            return Ok(());
        }
        let size = end
            .checked_next_multiple_of(GROW)
            .ok_or_else(|| error(libc::EFBIG))?;
        match node.grow(size).await {
            Ok(()) => Ok(()),
            Err(cause) => {
                tracing::debug!(node = node.name(), %cause, "the file of an image cannot grow");
                match cause.errno {
                    libc::EOPNOTSUPP | libc::EINVAL => Err(error(libc::ENOSPC)),
                    _ => Err(cause),
                }
            }
        }
    }
}

/// Reads; what lies past the end of the node is zero.
pub(super) async fn read_or_zero(node: &Node, offset: u64, iov: IoVec) -> Result<(), IoError> {
    let there = node.size().saturating_sub(offset).min(iov.len() as u64) as usize;
    if there < iov.len() {
        iov.slice(there, iov.len() - there).fill(0);
    }
    if there == 0 {
        return Ok(());
    }
    node.read(offset, iov.slice(0, there)).await
}
