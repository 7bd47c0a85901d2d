//! `raw`: the bytes of another node, or a part of them.

use crate::buffer::IoVec;
use crate::debug_event::DebugEvent;
use crate::driver::{BlockDriver, BoxFuture, Extent, ExtentFlags, Limits, WriteFlags, ZeroFlags};
use crate::drivers::OpenError;
use crate::error::{IoError, IoOp};
use crate::node::{Child, SECTOR_SIZE};
use crate::options::RawOptions;

/// A window on the node below.
#[derive(Debug)]
pub struct RawDriver {
    file: Child,
    /// First byte of the window, in bytes of the node below.
    offset: u64,
    /// Length of the window; `None`: up to the end, wherever that is.
    size: Option<u64>,
}

impl RawDriver {
    /// The raw node `node` on `file`, as `options` say (whose own `file` has
    /// been looked up by the caller).
    pub fn new(node: &str, options: &RawOptions, file: Child) -> Result<Self, OpenError> {
        for (what, value) in [("Offset", Some(options.offset)), ("Size", options.size)] {
            if let Some(value) = value
                && !value.is_multiple_of(SECTOR_SIZE)
            {
                return Err(OpenError::Unaligned {
                    node: node.to_owned(),
                    what,
                    value,
                });
            }
        }
        let below = file.node();
        let available = below.size();
        let size = options.size.unwrap_or(0);
        let fits = options
            .offset
            .checked_add(size)
            .is_some_and(|end| end <= available);
        if !fits {
            return Err(OpenError::PastEnd {
                node: node.to_owned(),
                file: below.name().to_owned(),
                offset: options.offset,
                size,
                available,
            });
        }
        Ok(Self {
            file,
            offset: options.offset,
            size: options.size,
        })
    }

    /// Where byte `offset` of the window is in the node below.
    fn below(&self, op: IoOp, offset: u64, len: u64) -> Result<u64, IoError> {
        offset.checked_add(self.offset).ok_or_else(|| IoError {
            op,
            node: self.file.node().name().into(),
            offset,
            len,
            errno: libc::EINVAL,
        })
    }
}

impl BlockDriver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        let available = self.file.node().size().saturating_sub(self.offset);
        match self.size {
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
        Box::pin(async move {
            let file = self.file.node();
            if self.size.is_some() {
                return Err(file.error(IoOp::Truncate, size, 0, libc::EOPNOTSUPP));
            }
            let below = self.below(IoOp::Truncate, size, 0)?;
            file.resize(below).await
        })
    }

    fn cancel_in_flight(&self) {
        self.file.node().cancel_in_flight();
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::driver::ChildRole;
    use crate::drivers::file::{self, OpenFlags};
    use crate::node::{Node, NodeOptions};
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
            "Offset 512 and size 4096 of raw node 'r' reach past the end of 'f' (4096 bytes)"
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
