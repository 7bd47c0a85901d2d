//! `raw`: the bytes of another node, or a part of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bitmaps::kept::ImageFile;
use crate::buffer::IoVec;
use crate::copy_source::{CopySource, FileRange};
use crate::debug_event::DebugEvent;
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, ExtentFlags, Limits, Reopen, Reopened,
    WriteFlags, ZeroFlags,
};
use crate::drivers::{OpenError, ReopenError};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node, SECTOR_SIZE};
use crate::options::{DriverOptions, RawOptions};
use crate::permissions::{Perm, Permissions};

/// A window on the node below.
#[derive(Debug)]
pub struct RawDriver {
    file: Child,
    /// First byte of the window, in bytes of the node below. Written with no request
    /// in flight, as `size` is.
    offset: AtomicU64,
    /// Length of the window in bytes; [`TO_THE_END`] if that is wherever the node
    /// below ends.
    size: AtomicU64,
    /// The window that was prepared. Main only.
    pending: Mutex<Option<Window>>,
    /// It is about to take effect. Main only.
    reopening: AtomicBool,
}

/// No window is that long.
const TO_THE_END: u64 = u64::MAX;

/// A window that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    offset: u64,
    size: Option<u64>,
}

impl Window {
    /// The window of raw node `node` on `below` that `options` ask for.
    fn new(node: &str, options: &RawOptions, below: &Node) -> Result<Self, OpenError> {
        let RawOptions { offset, size, .. } = *options;
        let available = below.size();
        if offset > available {
            return Err(OpenError::OffsetPastEnd { offset, available });
        }
        if let Some(size) = size.filter(|size| *size > available - offset) {
            return Err(OpenError::PastEnd {
                offset,
                size,
                available,
            });
        }
        if size.is_some_and(|size| !size.is_multiple_of(SECTOR_SIZE)) {
            return Err(OpenError::UnalignedSize);
        }
        if !offset.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::UnalignedOffset {
                node: node.to_owned(),
                offset,
            });
        }
        Ok(Self { offset, size })
    }
}

impl RawDriver {
    /// The raw node `node` on `file`, as `options` say (whose own `file` has
    /// been looked up by the caller).
    pub fn new(node: &str, options: &RawOptions, file: Child) -> Result<Self, OpenError> {
        let window = Window::new(node, options, &file.node())?;
        Ok(Self {
            file,
            offset: AtomicU64::new(window.offset),
            size: AtomicU64::new(window.size.unwrap_or(TO_THE_END)),
            pending: Mutex::default(),
            reopening: AtomicBool::new(false),
        })
    }

    fn window(&self) -> Window {
        let size = self.size.load(Ordering::Relaxed);
        Window {
            offset: self.offset.load(Ordering::Relaxed),
            size: (size != TO_THE_END).then_some(size),
        }
    }

    fn pending(&self) -> MutexGuard<'_, Option<Window>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where byte `offset` of the window is in the node below.
    fn below(&self, op: IoOp, offset: u64, len: u64) -> Result<u64, IoError> {
        let start = self.offset.load(Ordering::Relaxed);
        offset.checked_add(start).ok_or_else(|| IoError {
            op,
            node: self.file.node().name().into(),
            offset,
            len,
            errno: libc::EINVAL,
        })
    }

    /// Size of the node below when this one has `size` bytes.
    fn resized(&self, size: u64) -> Result<u64, IoError> {
        if self.window().size.is_some() {
            let file = self.file.node();
            return Err(file.error(IoOp::Truncate, size, 0, libc::EOPNOTSUPP));
        }
        self.below(IoOp::Truncate, size, 0)
    }
}

impl BlockDriver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn image_file(&self) -> Option<ImageFile> {
        self.file.node().driver().image_file()
    }

    fn bitmap_layer(&self) -> Option<String> {
        Some(match self.window() {
            Window {
                offset: 0,
                size: None,
            } => "raw".to_owned(),
            Window { offset, size } => format!("raw from {offset} of {size:?}"),
        })
    }

    fn size(&self) -> u64 {
        let window = self.window();
        let available = self.file.node().size().saturating_sub(window.offset);
        match window.size {
            // The node below may have shrunk.
            Some(size) => size.min(available),
            None => available,
        }
    }

    fn limits(&self) -> Limits {
        self.file.node().limits()
    }

    fn filename(&self) -> String {
        self.file.node().driver().filename()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let at = self.below(IoOp::Read, offset, iov.len() as u64)?;
            let file = self.file.node();
            file.debug_event(DebugEvent::READ_AIO);
            file.read(at, iov).await
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let at = self.below(IoOp::Write, offset, iov.len() as u64)?;
            let file = self.file.node();
            file.debug_event(DebugEvent::WRITE_AIO);
            file.write(at, iov, flags).await
        })
    }

    fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        let at = self.below(IoOp::Read, offset, len).ok()?;
        self.file.node().file_range(at, len)
    }

    fn copy_from<'a>(&'a self, offset: u64, from: CopySource) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            match self.below(IoOp::Write, offset, from.len()) {
                Ok(at) => self.file.node().copy_from(at, from).await,
                Err(_) => false,
            }
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let at = self.below(IoOp::WriteZeroes, offset, len)?;
            self.file.node().write_zeroes(at, len, flags).await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let at = self.below(IoOp::Discard, offset, len)?;
            self.file.node().discard(at, len).await
        })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let file = self.file.node();
            file.flush_events();
            file.flush().await
        })
    }

    fn flushes_below(&self) -> bool {
        true
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            let at = self.below(IoOp::BlockStatus, offset, len)?;
            let extent = self.file.node().block_status(at, len).await?;
            Ok(Extent {
                flags: ExtentFlags {
                    // A raw image has no backing image.
                    allocated: true,
                    ..extent.flags
                },
                ..extent
            })
        })
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().resize(self.resized(size)?).await })
    }

    fn grow<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.file.node().grow(self.resized(size)?).await })
    }

    /// A window that does not move with the end of the node below must not lose
    /// what it shows.
    fn child_permissions(&self, _: ChildRole, users: Permissions) -> Permissions {
        let pending = match self.reopening.load(Ordering::Relaxed) {
            true => *self.pending(),
            false => None,
        };
        let window = pending.unwrap_or_else(|| self.window());
        if window.offset == 0 && window.size.is_none() {
            return users;
        }
        Permissions {
            share: users.share.without(Perm::RESIZE),
            ..users
        }
    }

    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            let DriverOptions::Raw(options) = to.driver else {
                return Err(ReopenError::CannotChange("driver".to_owned()));
            };
            let now = self.file.node();
            let below = to.child(ChildRole::File).unwrap_or(&now);
            let window = Window::new(to.node, options, below)?;
            *self.pending() = Some(window);
            let stays = below.id() == now.id() && window == self.window();
            let to_the_end = || below.size().saturating_sub(window.offset);
            Ok(Reopened {
                read_only: to.options.read_only,
                size: (!stays).then(|| window.size.unwrap_or_else(to_the_end)),
            })
        })
    }

    fn reopen_begin(&self) {
        self.reopening.store(true, Ordering::Relaxed);
    }

    fn reopen_commit(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        let window = self.pending().take();
        if let Some(window) = window {
            self.offset.store(window.offset, Ordering::Relaxed);
            self.size
                .store(window.size.unwrap_or(TO_THE_END), Ordering::Relaxed);
        }
    }

    fn reopen_abort(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        *self.pending() = None;
    }

    fn cancel_in_flight(&self, reach: CancelReach) {
        self.file.node().cancel_in_flight(reach);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::drivers::file::{self, OpenFlags};
    use crate::node::NodeOptions;
    use crate::options::{BlockdevRef, FileOptions};
    use crate::runtime::EventLoop;

    fn options(offset: u64, size: Option<u64>) -> RawOptions {
        RawOptions {
            file: BlockdevRef::Name("f".into()),
            offset,
            size,
        }
    }

    fn file_node(content: &[u8]) -> (tempfile::NamedTempFile, Arc<Node>) {
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), content).unwrap();
        let options = FileOptions {
            filename: image.path().to_owned(),
            locking: None,
            host_device: false,
            bitmap_file: None,
        };
        let driver = file::open("f", &options, OpenFlags::default()).unwrap();
        let node = Node::new("f", Box::new(driver), NodeOptions::default());
        (image, node)
    }

    fn raw(node: &Arc<Node>, options: &RawOptions) -> Result<RawDriver, OpenError> {
        let child = Child::new(ChildRole::File, Arc::clone(node));
        RawDriver::new("r", options, child)
    }

    #[test]
    fn a_window_past_the_end_is_refused() {
        let (_image, node) = file_node(&[0; 4096]);
        let error = raw(&node, &options(512, Some(4096))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "The sum of offset (512) and size (4096) has to be smaller or equal to the  actual size \
             of the containing file (4096)"
        );
        assert!(raw(&node, &options(4608, None)).is_err());
        assert!(raw(&node, &options(u64::MAX - 511, Some(512))).is_err());
        assert!(raw(&node, &options(7, None)).is_err());
        assert!(raw(&node, &options(0, Some(1000))).is_err());
        assert_eq!(raw(&node, &options(4096, None)).unwrap().size(), 0);
    }

    #[test]
    fn requests_are_moved_by_the_offset() {
        let (image, node) = file_node(&(0..4096).map(|i| (i / 512) as u8).collect::<Vec<_>>());
        let driver = raw(&node, &options(1024, Some(2048))).unwrap();
        assert_eq!(driver.size(), 2048);
        assert_eq!(driver.filename(), image.path().display().to_string());
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            let iov = AlignedBuffer::new(1024).io_vec(1024);
            driver.read(512, iov.clone()).await.unwrap();
            let mut bytes = [0; 1024];
            iov.copy_to(0, &mut bytes);
            assert!(bytes[..512].iter().all(|b| *b == 3));
            assert!(bytes[512..].iter().all(|b| *b == 4));
            iov.fill(9);
            driver
                .write(0, iov.slice(0, 512), WriteFlags::default())
                .await
                .unwrap();
            driver
                .write_zeroes(1536, 512, ZeroFlags::default())
                .await
                .unwrap();
            driver.flush().await.unwrap();
            let extent = driver.block_status(0, 512).await.unwrap();
            assert!(extent.flags.data && extent.flags.allocated);
        });
        let content = std::fs::read(image.path()).unwrap();
        let sectors: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(sectors, [0, 1, 9, 3, 4, 0, 6, 7]);
    }
}
