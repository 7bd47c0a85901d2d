//! A node: one driver with a name, and the checks every request has to pass.
//!
//! - `options`: what holds whatever the driver;
//! - `child`: the edge to a node below;
//! - `write_threshold`: who wants to hear of writes.
//!
//! Who stands above and below is `graph`'s business. A node belongs to no
//! thread.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use smallvec::SmallVec;

use crate::bitmaps::NamedBitmaps;
use crate::bitmaps::kept::{Intent, Keeping, Writing};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::copy_source::{CopySource, FileRange};
use crate::debug_event::DebugEvent;
use crate::dirty_bitmap::DirtyBitmap;
use crate::driver::{BlockDriver, CancelReach, Extent, ExtentFlags, Limits, WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::options::{DetectZeroes, DiscardMode};

mod child;
mod options;
mod write_threshold;

pub use self::child::Child;
pub use self::options::NodeOptions;

use self::write_threshold::WriteThreshold;

/// Unit of all offsets and lengths that a node accepts.
pub const SECTOR_SIZE: u64 = 512;

/// Largest size that a node is given, in bytes: QEMU's.
pub(crate) const MAX_SIZE: u64 = (1 << 63) - (1 << 30);

/// Zeroes that are written as data go out in pieces of this many bytes.
const ZERO_BUFFER: u32 = 1 << 20;

/// Largest request of whole blocks that a driver with these limits wants.
fn max_transfer(limits: Limits) -> u64 {
    let unit = u64::from(limits.request_alignment).max(SECTOR_SIZE);
    match u64::from(limits.max_transfer) / unit * unit {
        0 if limits.max_transfer > 0 => unit,
        0 => u64::MAX,
        max => max,
    }
}

/// A node of the graph. Any thread may submit to it, on its own loop.
///
/// Requests come through a `Backend` (which counts them in) or from the node
/// above. Each is checked here; the driver sees only what is inside the node,
/// in units of [`SECTOR_SIZE`] and no larger than its `max_transfer`.
///
/// All I/O methods fail with an [`IoError`]: `EINVAL` for a bad range (`EIO`
/// for a read past the end, `ENOSPC` for a write past it), `EPERM` on a
/// read-only node, else what the driver says. A length of zero succeeds.
///
/// Cancel: as `BlockDriver` says; the range counts as written in the bitmaps.
pub struct Node {
    id: u64,
    name: Arc<str>,
    driver: Box<dyn BlockDriver>,
    /// What the driver said last. Written on main when the graph has changed, as
    /// `max_transfer` is.
    limits: ArcSwap<Limits>,
    /// Largest request that the driver is given, in bytes: at least a sector.
    max_transfer: AtomicU64,
    /// Packed by [`NodeOptions::pack`]. Written on main with no request in flight.
    options: AtomicU8,
    /// Bitmaps that record writes. Replaced as a whole; read when a write ends.
    bitmaps: ArcSwap<Vec<Arc<DirtyBitmap>>>,
    /// Bitmaps of users, recording or not.
    pub(crate) named_bitmaps: NamedBitmaps,
    /// Where writes may go at the moment; there is one once bitmaps have been kept.
    pub(crate) intent: OnceLock<Arc<Intent>>,
    /// Who keeps the persistent bitmaps, if there are any.
    pub(crate) keeping: Keeping,
    /// Taken out by the first write that goes past it.
    write_threshold: ArcSwapOption<WriteThreshold>,
}

impl Node {
    pub(crate) fn new(name: &str, driver: Box<dyn BlockDriver>, options: NodeOptions) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            limits: ArcSwap::from_pointee(driver.limits()),
            max_transfer: AtomicU64::new(max_transfer(driver.limits())),
            driver,
            options: AtomicU8::new(options.pack()),
            bitmaps: ArcSwap::default(),
            named_bitmaps: NamedBitmaps::default(),
            intent: OnceLock::new(),
            keeping: Keeping::default(),
            write_threshold: ArcSwapOption::empty(),
        })
    }

    /// Name, unique in the graph among nodes and devices.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A number that no other node of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// QEMU's name of the driver.
    pub fn driver_name(&self) -> &'static str {
        self.driver.name()
    }

    /// Size in bytes: the driver's, rounded up to whole sectors. What the driver
    /// has not of the last sector reads as zeroes.
    pub fn size(&self) -> u64 {
        self.driver
            .size()
            .checked_next_multiple_of(SECTOR_SIZE)
            .unwrap_or(u64::MAX - (SECTOR_SIZE - 1))
    }

    /// What the node wants of requests. Changes only when the graph does.
    pub fn limits(&self) -> Limits {
        **self.limits.load()
    }

    /// Asks the driver again what it wants of requests.
    pub(crate) fn refresh_limits(&self) {
        let limits = self.driver.limits();
        if limits != self.limits() {
            self.max_transfer
                .store(max_transfer(limits), Ordering::Relaxed);
            self.limits.store(Arc::new(limits));
        }
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.options().read_only
    }

    /// The options it was opened with, or reopened.
    pub fn options(&self) -> NodeOptions {
        NodeOptions::unpack(self.options.load(Ordering::Relaxed))
    }

    pub(crate) fn set_options(&self, options: NodeOptions) {
        self.options.store(options.pack(), Ordering::Relaxed);
    }

    /// The driver itself, for what is not I/O.
    pub fn driver(&self) -> &dyn BlockDriver {
        &*self.driver
    }

    /// From now on each write that ends marks its range in `bitmap`, including
    /// those in flight. What earlier ones marked in other bitmaps can be read there when
    /// this returns. Any thread.
    pub fn attach_bitmap(&self, bitmap: &Arc<DirtyBitmap>) {
        self.bitmaps.rcu(|all| {
            let mut all = Vec::clone(all);
            if !all.iter().any(|known| Arc::ptr_eq(known, bitmap)) {
                all.push(Arc::clone(bitmap));
            }
            all
        });
        // See `Mark`.
        fence(Ordering::SeqCst);
    }

    /// `bitmap` is not marked any more. Any thread.
    pub fn detach_bitmap(&self, bitmap: &Arc<DirtyBitmap>) {
        self.bitmaps.rcu(|all| {
            let mut all = Vec::clone(all);
            all.retain(|known| !Arc::ptr_eq(known, bitmap));
            all
        });
    }

    /// The bitmaps that record writes to this node.
    pub fn bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        Vec::clone(&self.bitmaps.load())
    }

    /// Reads `iov.len()` bytes at `offset`.
    pub async fn read(&self, offset: u64, iov: IoVec) -> Result<(), IoError> {
        let len = iov.len() as u64;
        self.check_range(IoOp::Read, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let max = self.max_transfer();
        if len <= max {
            return self.driver.read(offset, iov).await;
        }
        let mut done = 0;
        while done < len {
            let piece = max.min(len - done);
            self.driver
                .read(offset + done, iov.slice(done as usize, piece as usize))
                .await?;
            done += piece;
        }
        Ok(())
    }

    /// Writes `iov.len()` bytes at `offset`. The attached bitmaps have the range
    /// marked before this returns, also if it fails.
    pub async fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<(), IoError> {
        let len = iov.len() as u64;
        self.check_writable(IoOp::Write, offset, len)?;
        self.check_range(IoOp::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.check_write_threshold(offset + len);
        let _writing = self.begin_writing(IoOp::Write, offset, len).await?;
        let _mark = Mark {
            node: self,
            offset,
            len,
        };
        let options = self.options();
        let flags = WriteFlags {
            fua: flags.fua && !self.ignores_flushes(),
            ..flags
        };
        if options.detect_zeroes != DetectZeroes::Off && iov.is_zero() {
            let zero = ZeroFlags {
                fua: flags.fua,
                may_unmap: options.detect_zeroes == DetectZeroes::Unmap
                    && options.discard == DiscardMode::Unmap,
                no_fallback: true,
            };
            self.debug_event(DebugEvent::PWRITEV_ZERO);
            match self.driver.write_zeroes(offset, len, zero).await {
                Err(error) if error.errno == libc::EOPNOTSUPP => {}
                result => {
                    self.debug_event(DebugEvent::PWRITEV_DONE);
                    return result;
                }
            }
        }
        self.debug_event(DebugEvent::PWRITEV);
        let result = self.write_pieces(offset, &iov, flags).await;
        self.debug_event(DebugEvent::PWRITEV_DONE);
        result
    }

    /// Waits until a write to the range may go to the storage, since persistent bitmaps would
    /// not miss it even after a crash. It counts until the result is dropped: after the
    /// bitmaps are marked. Fails with `EIO` if that cannot be made sure.
    async fn begin_writing(
        &self,
        op: IoOp,
        offset: u64,
        len: u64,
    ) -> Result<Option<Writing<'_>>, IoError> {
        match self.intent.get() {
            None => Ok(None),
            Some(intent) => match intent.enter(offset, len).await {
                Ok(writing) => Ok(Some(writing)),
                Err(_) => Err(self.error(op, offset, len, libc::EIO)),
            },
        }
    }

    async fn write_pieces(
        &self,
        offset: u64,
        iov: &IoVec,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let len = iov.len() as u64;
        let max = self.max_transfer();
        if len <= max {
            return self.driver.write(offset, iov.clone(), flags).await;
        }
        let mut done = 0;
        while done < len {
            let piece = max.min(len - done);
            self.driver
                .write(
                    offset + done,
                    iov.slice(done as usize, piece as usize),
                    flags,
                )
                .await?;
            done += piece;
        }
        Ok(())
    }

    /// The range of a file that a read of this range reads, if it does nothing else:
    /// for [`copy_from`](Self::copy_from), as long as the request counts.
    pub fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        self.check_range(IoOp::Read, offset, len).ok()?;
        self.driver.file_range(offset, len)
    }

    /// Writes the content of a range of a file, or pieces in memory, at `offset`: less work
    /// than reading it and writing each part. `false`: not possible here, or it failed, and any
    /// part may have been written; read and write it instead, which tells why. Bitmaps as in
    /// [`write`](Self::write).
    pub async fn copy_from(&self, offset: u64, from: impl Into<CopySource>) -> bool {
        let from = from.into();
        let len = from.len();
        // Pieces may be far from each other, and all between would be noted as being written.
        let is_kept = self.intent.get().is_some_and(|intent| intent.is_armed());
        if is_kept && matches!(from, CopySource::Memory(_)) {
            return false;
        }
        let may = self
            .check_writable(IoOp::Write, offset, len)
            .and_then(|()| self.check_range(IoOp::Write, offset, len));
        if may.is_err() || self.options().detect_zeroes != DetectZeroes::Off {
            return false;
        }
        self.check_write_threshold(offset + len);
        let Ok(_writing) = self.begin_writing(IoOp::Write, offset, len).await else {
            return false;
        };
        let mark = |part: Range<u64>| Mark {
            node: self,
            offset: offset + part.start,
            len: part.end - part.start,
        };
        let mut marks: SmallVec<[Mark<'_>; 1]> = SmallVec::new();
        from.for_each_part(|part| marks.push(mark(part)));
        self.driver.copy_from(offset, from).await
    }

    /// Makes `len` bytes at `offset` read as zeroes; writes them as data where
    /// the driver cannot do better, unless `flags` forbid it (`EOPNOTSUPP`).
    /// Bitmaps as in [`write`](Self::write).
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.check_writable(IoOp::WriteZeroes, offset, len)?;
        self.check_range(IoOp::WriteZeroes, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.check_write_threshold(offset + len);
        let _writing = self.begin_writing(IoOp::WriteZeroes, offset, len).await?;
        let _mark = Mark {
            node: self,
            offset,
            len,
        };
        let options = self.options();
        let flags = ZeroFlags {
            fua: flags.fua && !self.ignores_flushes(),
            may_unmap: flags.may_unmap && options.discard == DiscardMode::Unmap,
            ..flags
        };
        self.debug_event(DebugEvent::PWRITEV_ZERO);
        let result = self.zeroes_or_data(offset, len, flags).await;
        self.debug_event(DebugEvent::PWRITEV_DONE);
        result
    }

    async fn zeroes_or_data(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        match self.driver.write_zeroes(offset, len, flags).await {
            Err(error) if error.errno == libc::EOPNOTSUPP && !flags.no_fallback => {}
            result => return result,
        }
        let zeroes = zero_buffer();
        let write = WriteFlags {
            fua: flags.fua,
            unchanged: false,
        };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZERO_BUFFER.into());
            self.write_pieces(offset + done, &zeroes.io_vec(piece as usize), write)
                .await?;
            done += piece;
        }
        Ok(())
    }

    /// Tells that the content of the range is not needed any more. Does nothing
    /// where the `discard` option says so. Bitmaps as in [`write`](Self::write).
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check_writable(IoOp::Discard, offset, len)?;
        self.check_range(IoOp::Discard, offset, len)?;
        if len == 0 || self.options().discard == DiscardMode::Ignore {
            return Ok(());
        }
        self.check_write_threshold(offset + len);
        let _writing = self.begin_writing(IoOp::Discard, offset, len).await?;
        let _mark = Mark {
            node: self,
            offset,
            len,
        };
        match self.driver.discard(offset, len).await {
            // A hint that cannot be followed is no failure.
            Err(error) if error.errno == libc::EOPNOTSUPP => Ok(()),
            result => result,
        }
    }

    /// Makes all writes that have ended before this call durable; with the option
    /// `no-flush` only takes them to the nodes below, which have a say of their own.
    pub async fn flush(&self) -> Result<(), IoError> {
        if self.ignores_flushes() {
            return Ok(());
        }
        self.driver.flush().await
    }

    /// Whether flushes end here, and writes need not be durable.
    fn ignores_flushes(&self) -> bool {
        self.options().cache.no_flush && !self.driver.flushes_below()
    }

    /// Kind of the extent that begins at `offset`, at most `len` bytes of it.
    /// `len` must not be 0. The result is at least one sector and inside what
    /// was asked for.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Extent, IoError> {
        self.check_range(IoOp::BlockStatus, offset, len)?;
        if len == 0 {
            return Err(self.error(IoOp::BlockStatus, offset, len, libc::EINVAL));
        }
        let extent = self.driver.block_status(offset, len).await?;
        // Whole sectors only: one that is part hole and part data is data.
        let whole = extent.len.min(len) / SECTOR_SIZE * SECTOR_SIZE;
        if whole > 0 {
            return Ok(Extent {
                len: whole,
                ..extent
            });
        }
        Ok(Extent {
            len: SECTOR_SIZE.min(len),
            flags: ExtentFlags {
                data: true,
                zero: false,
                allocated: true,
            },
        })
    }

    /// Changes the size to `size` bytes; what is new reads as zeroes.
    ///
    /// The caller has the right to, holds all requests of the node back (a drained
    /// section), and tells those above of it: `Graph::resize` does it all. The node's
    /// named bitmaps get its size. Fails with `EPERM` on a read-only node, `EFBIG` if no
    /// node can be so large, and `EBUSY` if another bitmap records the node's writes: it
    /// is as large as the node was.
    ///
    /// Cancel: the size is the old or the new one.
    pub(crate) async fn resize(&self, size: u64) -> Result<(), IoError> {
        self.resize_by(size, self.driver.resize(size)).await
    }

    /// As [`resize`](Self::resize), for a format above that needs more room; its other
    /// requests need not be held back, since it makes none past the end.
    pub(crate) async fn grow(&self, size: u64) -> Result<(), IoError> {
        self.resize_by(size, self.driver.grow(size)).await
    }

    async fn resize_by(
        &self,
        size: u64,
        resize: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        self.check_writable(IoOp::Truncate, size, 0)?;
        if size > MAX_SIZE {
            return Err(self.error(IoOp::Truncate, size, 0, libc::EFBIG));
        }
        if !self.unnamed_bitmaps().is_empty() {
            return Err(self.error(IoOp::Truncate, size, 0, libc::EBUSY));
        }
        let noted = self.note_resize(Some(size)).await;
        if let Err(error) = noted {
            tracing::error!(node = self.name(), %error, "not resized");
            return Err(self.error(IoOp::Truncate, size, 0, error.errno()));
        }
        let resized = resize.await;
        self.fit_bitmaps();
        if let Err(error) = self.note_resize(None).await {
            // Any size is taken for the disk's then: nothing is lost.
            tracing::error!(node = self.name(), %error, "bitmaps were resized in memory only");
        }
        resized.map_err(|error| IoError {
            // Not every driver knows its node.
            node: match error.errno {
                libc::EOPNOTSUPP => Arc::clone(&self.name),
                _ => error.node,
            },
            ..error
        })
    }

    /// Lets requests to this node and those below it fail that may never end, as far
    /// as `reach` says. Any thread.
    pub fn cancel_in_flight(&self, reach: CancelReach) {
        self.driver.cancel_in_flight(reach);
    }

    /// Tells the driver of a step of whoever calls. Any thread.
    pub fn debug_event(&self, event: DebugEvent) {
        self.driver.debug_event(event);
    }

    /// Tells the driver that the node above is being flushed, and is about to flush
    /// this one.
    pub(crate) fn flush_events(&self) {
        self.debug_event(DebugEvent::FLUSH_TO_OS);
        self.debug_event(DebugEvent::FLUSH_TO_DISK);
    }

    /// An error of a request to this node.
    pub fn error(&self, op: IoOp, offset: u64, len: u64, errno: i32) -> IoError {
        IoError {
            op,
            node: Arc::clone(&self.name),
            offset,
            len,
            errno,
        }
    }

    fn max_transfer(&self) -> u64 {
        self.max_transfer.load(Ordering::Relaxed)
    }

    fn check_writable(&self, op: IoOp, offset: u64, len: u64) -> Result<(), IoError> {
        if self.read_only() {
            return Err(self.error(op, offset, len, libc::EPERM));
        }
        Ok(())
    }

    fn check_range(&self, op: IoOp, offset: u64, len: u64) -> Result<(), IoError> {
        if !(offset | len).is_multiple_of(SECTOR_SIZE) {
            return Err(self.error(op, offset, len, libc::EINVAL));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => {
                let errno = match op {
                    IoOp::Write | IoOp::WriteZeroes => libc::ENOSPC,
                    IoOp::Read => libc::EIO,
                    _ => libc::EINVAL,
                };
                Err(self.error(op, offset, len, errno))
            }
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("driver", &self.driver.name())
            .field("options", &self.options())
            .finish_non_exhaustive()
    }
}

/// Marks a range in the bitmaps when the write of it ends, in whatever way: a
/// failed or abandoned one may have changed data too.
struct Mark<'a> {
    node: &'a Node,
    offset: u64,
    len: u64,
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        let mut all = self.node.bitmaps.load();
        loop {
            for bitmap in all.iter() {
                bitmap.set(self.offset, self.len);
            }
            // What is marked here may have been copied from already, into a bitmap that
            // was attached meanwhile. Either that is seen here, or it was attached after
            // this fence, and what was marked before is seen by who attached it.
            fence(Ordering::SeqCst);
            let now = self.node.bitmaps.load();
            if Arc::ptr_eq(&now, &all) {
                return;
            }
            all = now;
        }
    }
}

/// Zeroes to write from. Never read into.
fn zero_buffer() -> &'static Arc<AlignedBuffer> {
    static ZEROES: OnceLock<Arc<AlignedBuffer>> = OnceLock::new();
    ZEROES.get_or_init(|| AlignedBuffer::new(ZERO_BUFFER as usize))
}
