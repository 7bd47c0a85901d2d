//! `file` and `host_device`: a regular file or block device of the host, by
//! io_uring.
//!
//! Each iothread submits to its own ring; the driver itself has no thread and no
//! lock but the ranges of unaligned O_DIRECT writes.
//!
//! # O_DIRECT
//!
//! Requests that are not aligned as the storage wants are rounded out: reads by
//! a bounce buffer, writes by reading the blocks at the edges first. Nothing
//! else may be written to such a block meanwhile, so where blocks are larger
//! than the 512 bytes that nodes count in, every write locks the blocks it
//! touches. Buffers are bounced only if their place in memory is not aligned, or
//! their segments are not of whole blocks.
//!
//! # Durability
//!
//! A flush that failed once fails for ever: the kernel reports a lost page only
//! once, so a later success would claim what is not true. So each sync of the
//! file goes through one place, that of a durable write (FUA) included.

mod copy;
mod data_runs;
mod lock;
mod open;
mod reopen;
mod resize;
mod scratch;
mod status;
mod sys;
mod zero;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use self::copy::Copies;
use self::data_runs::DataRuns;
pub use self::lock::image_is_in_use;
pub use self::reopen::FileNode;
pub(crate) use self::scratch::open_scratch;

use self::lock::ImageLock;
use self::open::{Kind, Opened};
use self::sys::DirectAlignment;
use self::zero::Support;
use crate::buffer::{AlignedBuffer, IoVec};
use crate::copy_source::{CopySource, FileRange};
use crate::driver::{BlockDriver, BoxFuture, Extent, Limits, WriteFlags, ZeroFlags};
use crate::drivers::OpenError;
use crate::error::{IoError, IoOp};
use crate::options::{CacheOptions, FileOptions};
use crate::permissions::{Perm, PermissionError, Permissions};
use crate::range_lock::{RangeGuard, RangeLock};
use crate::runtime::current_ring;
use crate::uring::{self, Hold};

/// Unit of requests that nodes know.
const SECTOR: u32 = 512;
/// Largest request to a file in memory that the calling thread carries out itself.
const AT_ONCE: usize = 64 << 10;
/// Bounce buffers are at most this large.
const BOUNCE: u64 = 1 << 20;

/// How a file is to be opened, besides what its options say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// For reading only.
    pub read_only: bool,
    /// Fall back to reading only where writing is not allowed.
    pub auto_read_only: bool,
    /// Cache behaviour.
    pub cache: CacheOptions,
}

/// An open file.
///
/// Dropping it closes the file and gives up its image locks, when the last
/// request to it has ended.
pub struct FileDriver {
    /// Name of the node, for errors.
    node: Arc<str>,
    /// Requests keep it open.
    file: Arc<File>,
    filename: String,
    kind: Kind,
    /// Lies in memory (tmpfs): nothing is waited for.
    in_memory: bool,
    host_device: bool,
    read_only: bool,
    /// Bytes; where the file ended when it was opened or resized. Written by the resize
    /// that holds `resizing`.
    size: Arc<AtomicU64>,
    /// One resize at a time, whoever waits for it. (A range that all share.)
    resizing: RangeLock,
    direct: Option<DirectAlignment>,
    no_flush: bool,
    /// Blocks being written, if blocks are larger than a sector.
    writing: Arc<RangeLock>,
    /// `None` if image locking is off.
    lock: Option<ImageLock>,
    support: Support,
    /// Where data was found last.
    data_runs: DataRuns,
    flushes: Arc<Flushes>,
    /// What is to be copied into it from other files.
    copies: Arc<Copies>,
}

/// Blocks that are locked as long as the kernel may write them.
struct LockedBlocks {
    _guard: RangeGuard,
}

impl Hold for LockedBlocks {}

/// What is known of flushes. Any thread.
#[derive(Default)]
struct Flushes {
    /// Errno of the first that failed; 0 if none did.
    failed: AtomicI32,
    /// One at a time. (A range that all share.)
    running: RangeLock,
    /// Flushes begun. Written by who holds `running`.
    begun: AtomicU64,
    /// The last one that ended well, as `begun` counted it. Written by who holds
    /// `running`.
    done: AtomicU64,
}

/// A flush that the kernel has. Its outcome is recorded whoever stops waiting.
struct RunningFlush {
    flushes: Arc<Flushes>,
    /// Its number, as `Flushes::begun` counts.
    number: u64,
    node: Arc<str>,
    _guard: RangeGuard,
}

impl Hold for RunningFlush {
    fn completed(&self, result: i32) {
        match result {
            // It is asked for again.
            _ if result == -libc::EINTR => {}
            0.. => self.flushes.done.store(self.number, Ordering::SeqCst),
            _ => {
                self.flushes.failed.store(-result, Ordering::SeqCst);
                tracing::error!(
                    node = &*self.node,
                    "Flush failed, written data may be lost: {}",
                    io::Error::from_raw_os_error(-result)
                );
            }
        }
    }
}

/// Opens the file of node `node`.
///
/// Blocks: call it through [`unblock`](crate::runtime::unblock). Takes no image
/// lock yet; those follow the permissions.
pub fn open(node: &str, options: &FileOptions, flags: OpenFlags) -> Result<FileDriver, OpenError> {
    let opened = open::open(
        options,
        flags.read_only,
        flags.auto_read_only,
        flags.cache.direct,
    )?;
    FileDriver::new(node, options, flags, opened)
}

impl FileDriver {
    fn new(
        node: &str,
        options: &FileOptions,
        flags: OpenFlags,
        opened: Opened,
    ) -> Result<Self, OpenError> {
        let file = Arc::new(opened.file);
        let filename = options.filename.display().to_string();
        let block = opened.direct.map_or(1, |direct| u64::from(direct.request));
        let size = opened.size.next_multiple_of(u64::from(SECTOR));
        if !opened.read_only && !size.is_multiple_of(block) {
            // Writing the last block would make the file longer.
            return Err(OpenError::NotSupported {
                path: options.filename.clone(),
                what: "O_DIRECT writes, since its size is not a multiple of the storage's \
                       block size",
                remedy: "use cache.direct=off or resize it",
            });
        }
        let lockable = ImageLock::is_supported(&file);
        if options.locking == Some(true) && !lockable {
            return Err(OpenError::NotSupported {
                path: options.filename.clone(),
                what: "image locking",
                remedy: "use locking=off",
            });
        }
        let lock = (lockable && options.locking != Some(false))
            .then(|| ImageLock::new(Arc::clone(&file), filename.clone()));
        Ok(Self {
            node: node.into(),
            in_memory: sys::is_in_memory(&file),
            file,
            filename,
            kind: opened.kind,
            host_device: options.host_device,
            read_only: opened.read_only,
            size: Arc::new(AtomicU64::new(opened.size)),
            resizing: RangeLock::new(),
            direct: opened.direct,
            no_flush: flags.cache.no_flush,
            writing: Arc::new(RangeLock::new()),
            lock,
            support: Support::all(),
            data_runs: DataRuns::default(),
            flushes: Arc::default(),
            copies: Arc::default(),
        })
    }

    /// Whether it was opened for reading only, asked for or as a fallback.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    fn error(&self, op: IoOp, offset: u64, len: u64, error: &io::Error) -> IoError {
        IoError {
            op,
            node: Arc::clone(&self.node),
            offset,
            len,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    fn check_writable(&self, wanted: Permissions) -> Result<(), PermissionError> {
        let writes = Perm::WRITE | Perm::WRITE_UNCHANGED;
        if self.read_only && wanted.need.intersects(writes) {
            return Err(PermissionError::ReadOnly);
        }
        Ok(())
    }

    fn check_locks(&self, wanted: Permissions) -> Result<(), PermissionError> {
        match &self.lock {
            Some(lock) => lock.check(wanted),
            None => Ok(()),
        }
    }

    /// What O_DIRECT wants of offsets and lengths; 1 without.
    fn request_alignment(&self) -> u64 {
        self.direct.map_or(1, |direct| u64::from(direct.request))
    }

    /// `offset..offset + len`, rounded out to blocks.
    fn blocks(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        let block = self.request_alignment();
        let end = offset
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(block))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(offset - offset % block..end)
    }

    /// Locks the blocks of a write where a neighbour may be rewriting one.
    async fn lock_range(&self, offset: u64, len: u64) -> Option<Rc<dyn Hold>> {
        if self.request_alignment() <= u64::from(SECTOR) {
            return None;
        }
        // A range that overflows is refused later.
        let range = self.blocks(offset, len).unwrap_or(offset..u64::MAX);
        Some(Rc::new(LockedBlocks {
            _guard: self.writing.lock(range).await,
        }))
    }

    /// Whether a request is done best on the spot: there is nothing to wait for, and the
    /// kernel would have a thread of its own do it.
    fn is_at_once(&self, iov: &IoVec) -> bool {
        self.in_memory && self.direct.is_none() && iov.len() <= AT_ONCE
    }

    async fn read_into(&self, offset: u64, iov: &IoVec) -> io::Result<()> {
        if self.is_at_once(iov) {
            let count = sys::read(&self.file, offset, iov)?;
            iov.slice(count, iov.len() - count).fill(0);
            return Ok(());
        }
        let ring = current_ring();
        let Some(direct) = self.direct else {
            let count = uring::read(&ring, &self.file, offset, iov, 1).await?;
            iov.slice(count, iov.len() - count).fill(0);
            return Ok(());
        };
        let block = direct.request as usize;
        let blocks = self.blocks(offset, iov.len() as u64)?;
        let aligned = blocks == (offset..offset + iov.len() as u64);
        if aligned && is_direct(iov, direct) {
            let count = uring::read(&ring, &self.file, offset, iov, block).await?;
            iov.slice(count, iov.len() - count).fill(0);
            return Ok(());
        }
        let mut at = blocks.start;
        while at < blocks.end {
            let chunk = BOUNCE.min(blocks.end - at);
            let bounce = self.read_blocks(at, chunk).await?;
            // The part of the chunk that was asked for.
            let from = at.max(offset);
            let to = (at + chunk).min(offset + iov.len() as u64);
            let part = bounce.slice((from - at) as usize, (to - from) as usize);
            iov.copy_from_iov((from - offset) as usize, &part);
            at += chunk;
        }
        Ok(())
    }

    /// Whole blocks, at most `BOUNCE` bytes or one block, in memory of our own.
    async fn read_blocks(&self, offset: u64, len: u64) -> io::Result<IoVec> {
        let len = len as usize;
        let bounce = AlignedBuffer::new(len).io_vec(len);
        let block = self.request_alignment() as usize;
        // The buffer is zero where the file has ended.
        uring::read(&current_ring(), &self.file, offset, &bounce, block).await?;
        Ok(bounce)
    }

    async fn write_from(&self, offset: u64, iov: IoVec, fua: bool) -> io::Result<()> {
        let hold = self.lock_range(offset, iov.len() as u64).await;
        self.write_locked(offset, iov, hold.as_ref()).await?;
        drop(hold);
        if fua {
            // Not RWF_DSYNC: the sync after such a write takes the error of an
            // earlier write's lost page, and no flush would be told of it.
            self.make_durable().await?;
        }
        Ok(())
    }

    /// Writes; the blocks are locked by the caller (`hold`), if need be.
    async fn write_locked(
        &self,
        offset: u64,
        iov: IoVec,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        if self.is_at_once(&iov) {
            return match self.copies.write(&self.file, offset, &iov).await {
                Some(written) => written,
                None => sys::write(&self.file, offset, &iov),
            };
        }
        let ring = current_ring();
        let Some(direct) = self.direct else {
            return uring::write(&ring, &self.file, offset, &iov, 1, hold).await;
        };
        let block = u64::from(direct.request);
        let end = offset + iov.len() as u64;
        let blocks = self.blocks(offset, iov.len() as u64)?;
        if blocks != (offset..end) && hold.is_none() {
            // Nodes ask for whole sectors only.
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // First block, if not whole; what is whole; last block, if not whole.
        let first = if offset == blocks.start {
            offset
        } else {
            (blocks.start + block).min(end)
        };
        let last = if end == blocks.end {
            end
        } else {
            (blocks.end - block).max(first)
        };
        let part = |from: u64, to: u64| iov.slice((from - offset) as usize, (to - from) as usize);
        if offset < first {
            self.rewrite_block(offset, part(offset, first), hold)
                .await?;
        }
        let mut at = first;
        while at < last {
            let rest = part(at, last);
            if is_direct(&rest, direct) {
                uring::write(&ring, &self.file, at, &rest, direct.request as usize, hold).await?;
                break;
            }
            let chunk = BOUNCE.min(last - at);
            let bounce = AlignedBuffer::new(chunk as usize).io_vec(chunk as usize);
            bounce.copy_from_iov(0, &rest.slice(0, chunk as usize));
            uring::write(
                &ring,
                &self.file,
                at,
                &bounce,
                direct.request as usize,
                hold,
            )
            .await?;
            at += chunk;
        }
        if last < end {
            self.rewrite_block(last, part(last, end), hold).await?;
        }
        Ok(())
    }

    /// Writes a part of one block, with what is around it.
    async fn rewrite_block(
        &self,
        offset: u64,
        iov: IoVec,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        let block = self.request_alignment();
        let start = offset - offset % block;
        let bounce = self.read_blocks(start, block).await?;
        bounce.copy_from_iov((offset - start) as usize, &iov);
        uring::write(
            &current_ring(),
            &self.file,
            start,
            &bounce,
            block as usize,
            hold,
        )
        .await
    }

    /// Makes all that was written durable, unless that was switched off.
    async fn make_durable(&self) -> io::Result<()> {
        if self.no_flush {
            return Ok(());
        }
        let flushes = &self.flushes;
        let asked = flushes.begun.load(Ordering::SeqCst);
        // One at a time, since the kernel tells of a lost page to one of them
        // only; who waited meanwhile shares the next.
        let guard = flushes.running.lock(0..1).await;
        match flushes.failed.load(Ordering::SeqCst) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        if flushes.done.load(Ordering::SeqCst) > asked {
            return Ok(());
        }
        let running: Rc<dyn Hold> = Rc::new(RunningFlush {
            flushes: Arc::clone(flushes),
            number: flushes.begun.fetch_add(1, Ordering::SeqCst) + 1,
            node: Arc::clone(&self.node),
            _guard: guard,
        });
        uring::fdatasync(&current_ring(), &self.file, &running).await
    }
}

/// Whether O_DIRECT takes the memory as it is. Linux before 6.18 wants each
/// segment to be of whole blocks, wherever the memory may begin; so a request cut
/// after any number of segments is of whole blocks, too.
fn is_direct(iov: &IoVec, direct: DirectAlignment) -> bool {
    iov.is_aligned(direct.memory as usize, direct.request as usize)
}

impl BlockDriver for FileDriver {
    fn name(&self) -> &'static str {
        if self.host_device {
            "host_device"
        } else {
            "file"
        }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        let request_alignment = self.direct.map_or(SECTOR, |direct| direct.request);
        Limits {
            request_alignment,
            zero_alignment: match self.kind {
                // Block of the file systems in use.
                Kind::Regular => 4096,
                Kind::Device { sector } => sector,
            },
            max_transfer: 0,
            cluster_size: None,
            can_zero_fast: true,
        }
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.read_into(offset, &iov)
                .await
                .map_err(|error| self.error(IoOp::Read, offset, iov.len() as u64, &error))
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            self.write_from(offset, iov, flags.fua)
                .await
                .map_err(|error| self.error(IoOp::Write, offset, len, &error))
        })
    }

    fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        self.copyable_range(offset, len)
    }

    fn copy_from<'a>(&'a self, offset: u64, from: CopySource) -> BoxFuture<'a, bool> {
        Box::pin(self.copy(offset, from))
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.zero(offset, len, flags)
                .await
                .map_err(|error| self.error(IoOp::WriteZeroes, offset, len, &error))
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.discard_range(offset, len)
                .await
                .map_err(|error| self.error(IoOp::Discard, offset, len, &error))
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            self.make_durable()
                .await
                .map_err(|error| self.error(IoOp::Flush, 0, 0, &error))
        })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            self.status(offset, len)
                .await
                .map_err(|error| self.error(IoOp::BlockStatus, offset, len, &error))
        })
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.set_size(size)
                .await
                .map_err(|error| self.error(IoOp::Truncate, size, 0, &error))
        })
    }

    fn check_permissions(&self, wanted: Permissions) -> Result<(), PermissionError> {
        self.check_writable(wanted)?;
        self.check_locks(wanted)
    }

    fn set_permissions(&self) {
        if let Some(lock) = &self.lock {
            lock.commit();
        }
    }

    fn abort_permissions(&self) {
        if let Some(lock) = &self.lock {
            lock.abort();
        }
    }

    fn close(&self) {
        let requests = Arc::strong_count(&self.file) > 1 + usize::from(self.lock.is_some());
        if let Some(lock) = &self.lock
            // What is still in flight, though nobody waits for it, may write.
            // Then the lock goes when the last of it closes the file.
            && !requests
        {
            lock.release();
        }
    }
}

#[cfg(all(test, not(shuttle)))]
pub(super) mod tests;
