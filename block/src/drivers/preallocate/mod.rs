//! `preallocate`: a filter below a format that takes space of the file in large pieces
//! before the format needs it, and gives back what is left over in the end.
//!
//! Between, the file is longer than the node: a process that is killed leaves it so,
//! with zeroes past its data. Formats do not mind. Only what grows for a format
//! (`Node::grow`) is taken in advance: a size that a user asks for is what the file
//! gets, and guests cannot write past the end of a disk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use tokio::sync::Mutex;

use crate::buffer::IoVec;
use crate::copy_source::{CopySource, FileRange};
use crate::driver::{
    BlockDriver, BoxFuture, ChildRole, Extent, Limits, Reopen, Reopened, WriteFlags, ZeroFlags,
};
use crate::drivers::{OpenError, ReopenError};
use crate::error::IoError;
use crate::node::{Child, Node, SECTOR_SIZE};
use crate::options::{DriverOptions, PreallocateOptions};
use crate::permissions::{Perm, Permissions};

#[cfg(all(test, not(shuttle)))]
mod tests;

/// Nothing was taken in advance: the node is as long as the file.
const NO_RESERVE: u64 = u64::MAX;

/// How much is taken. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    /// Past what is needed.
    reserve: u64,
    /// The file then ends at a multiple of this, which is one of the sector size.
    align: u64,
}

impl Sizes {
    /// Checks what options say; they are checked when a node is opened, after its
    /// children, as QEMU does.
    fn new(options: &PreallocateOptions) -> Result<Self, OpenError> {
        let number =
            |name, value: i64| u64::try_from(value).map_err(|_| OpenError::NegativeSize(name));
        let align = number("prealloc-align", options.align)?;
        let reserve = number("prealloc-size", options.size)?;
        if !align.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::PreallocateAlignment);
        }
        Ok(Self {
            reserve,
            align: align.max(SECTOR_SIZE),
        })
    }

    /// Where the file is to end if `size` bytes are needed; `None`: nothing more is
    /// wanted, or there is no such place.
    fn end(self, size: u64) -> Option<u64> {
        let end = size.checked_add(self.reserve)?;
        let end = end.checked_next_multiple_of(self.align)?;
        (end > size).then_some(end)
    }
}

/// See the module.
#[derive(Debug)]
pub struct PreallocateDriver {
    file: Child,
    /// Replaced on main.
    reserve: AtomicU64,
    align: AtomicU64,
    /// What comes next. Main only.
    next: std::sync::Mutex<Option<Sizes>>,
    /// Where the node ends, if the file is longer; else [`NO_RESERVE`]. Written by who
    /// holds `growing`.
    data_end: AtomicU64,
    /// Space could not be taken in advance: it is not tried again before the reserve was
    /// given back. Written by who holds `growing`.
    refused: AtomicBool,
    /// Held by who changes the size of the file. A lock for tasks, not for threads.
    growing: Mutex<()>,
}

impl PreallocateDriver {
    /// A filter on `file` as `options` say (whose own `file` has been looked up by the
    /// caller).
    pub fn new(options: &PreallocateOptions, file: Child) -> Result<Self, OpenError> {
        let Sizes { reserve, align } = Sizes::new(options)?;
        Ok(Self {
            file,
            reserve: AtomicU64::new(reserve),
            align: AtomicU64::new(align),
            next: std::sync::Mutex::default(),
            data_end: AtomicU64::new(NO_RESERVE),
            refused: AtomicBool::new(false),
            growing: Mutex::new(()),
        })
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            reserve: self.reserve.load(Ordering::Relaxed),
            align: self.align.load(Ordering::Relaxed),
        }
    }

    fn next(&self) -> std::sync::MutexGuard<'_, Option<Sizes>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the node `size` bytes long, which is more than it is.
    async fn grow_to(&self, size: u64) -> Result<(), IoError> {
        let _growing = self.growing.lock().await;
        let file = self.file.node();
        let file_end = file.size();
        if size <= self.size() {
            return Ok(());
        }
        if size <= file_end {
            let left = size < file_end;
            let end = if left { size } else { NO_RESERVE };
            self.data_end.store(end, Ordering::Release);
            return Ok(());
        }
        let wanted = self.sizes().end(size);
        if let Some(end) = wanted.filter(|_| !self.refused.load(Ordering::Relaxed)) {
            // The file becomes longer before the node does.
            self.data_end.store(self.size(), Ordering::Release);
            match take(&file, file_end, end).await {
                Ok(()) => {
                    self.data_end.store(size, Ordering::Release);
                    return Ok(());
                }
                Err(error) => {
                    tracing::debug!(node = file.name(), %error, "no space was taken in advance");
                    self.refused.store(true, Ordering::Relaxed);
                }
            }
        }
        file.resize(size).await?;
        self.data_end.store(NO_RESERVE, Ordering::Release);
        Ok(())
    }
}

/// Makes the file longer, with space of its own behind what is new.
async fn take(file: &Arc<Node>, from: u64, end: u64) -> Result<(), IoError> {
    file.resize(end).await?;
    let flags = ZeroFlags {
        // Space is what is wanted, not zeroes.
        no_fallback: true,
        ..ZeroFlags::default()
    };
    file.write_zeroes(from, end - from, flags).await
}

impl BlockDriver for PreallocateDriver {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn size(&self) -> u64 {
        match self.data_end.load(Ordering::Acquire) {
            NO_RESERVE => self.file.node().size(),
            end => end,
        }
    }

    fn limits(&self) -> Limits {
        self.file.node().limits()
    }

    fn filename(&self) -> String {
        self.file.node().driver().filename()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().read(offset, iov).await })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().write(offset, iov, flags).await })
    }

    fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        self.file.node().file_range(offset, len)
    }

    fn copy_from<'a>(&'a self, offset: u64, from: CopySource) -> BoxFuture<'a, bool> {
        Box::pin(async move { self.file.node().copy_from(offset, from).await })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().write_zeroes(offset, len, flags).await })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().discard(offset, len).await })
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

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _growing = self.growing.lock().await;
            self.file.node().resize(size).await?;
            self.data_end.store(NO_RESERVE, Ordering::Release);
            Ok(())
        })
    }

    fn grow<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.grow_to(size))
    }

    fn release_reserve<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let _growing = self.growing.lock().await;
            self.refused.store(false, Ordering::Relaxed);
            let end = self.data_end.load(Ordering::Acquire);
            if end == NO_RESERVE {
                return Ok(());
            }
            self.file.node().resize(end).await?;
            self.data_end.store(NO_RESERVE, Ordering::Release);
            Ok(())
        })
    }

    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.file.node())
    }

    /// Whoever writes may make the file longer, which nobody else may use meanwhile:
    /// what is past the data is given back.
    fn child_permissions(&self, _: ChildRole, users: Permissions) -> Permissions {
        let writes = Perm::WRITE | Perm::RESIZE;
        match users.need.intersects(writes) {
            false => users,
            true => Permissions {
                need: users.need | writes,
                share: users.share.without(writes),
            },
        }
    }

    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            if let DriverOptions::Preallocate(options) = to.driver {
                *self.next() = Some(Sizes::new(options)?);
            }
            Ok(to.filter(ChildRole::File, &self.file.node()))
        })
    }

    fn reopen_commit(&self) {
        let next = self.next().take();
        if let Some(Sizes { reserve, align }) = next {
            self.reserve.store(reserve, Ordering::Relaxed);
            self.align.store(align, Ordering::Relaxed);
        }
    }

    fn reopen_abort(&self) {
        self.next().take();
    }
}
