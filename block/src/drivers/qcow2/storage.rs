//! How `imago` reaches our nodes: its `Storage` trait on an edge of the graph.
//!
//! It reads and writes tables by it, and what it copies on write. What guests read
//! and write goes from the driver to the nodes without it.

use std::fmt;
use std::io;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::file::{GrowingFile, read_or_zero};
use super::header::HARMLESS_TO_READERS;
use super::order::WriteOrder;
use crate::buffer::{AlignedBuffer, IoVec};
use crate::error::IoError;
use crate::node::{Child, SECTOR_SIZE};

/// Where the incompatible features are in a version 3 header.
const INCOMPATIBLE_AT: usize = 72;

/// What a storage is to the image.
enum Target {
    /// The image itself, only read.
    Readable(Arc<GrowingFile>),
    /// The image itself.
    Image(Arc<GrowingFile>, Box<WriteOrder>),
    /// Its data, in a file of its own.
    Data(Arc<GrowingFile>),
    /// Its backing image: as long as anybody wants it.
    Backing(Child),
}

/// A node as `imago` sees it. Any thread; its futures end on the thread they began
/// on, as all I/O on nodes does.
pub(super) struct NodeStorage {
    target: Target,
    helper: CommonStorageHelper,
}

impl NodeStorage {
    /// The image's file; `order` if it is to be written.
    pub(super) fn image(file: Arc<GrowingFile>, order: Option<WriteOrder>) -> Self {
        Self::new(match order {
            Some(order) => Target::Image(file, Box::new(order)),
            None => Target::Readable(file),
        })
    }

    /// The image's data file.
    pub(super) fn data(file: Arc<GrowingFile>) -> Self {
        Self::new(Target::Data(file))
    }

    /// The image's backing node.
    pub(super) fn backing(child: Child) -> Self {
        Self::new(Target::Backing(child))
    }

    fn new(target: Target) -> Self {
        Self {
            target,
            helper: CommonStorageHelper::default(),
        }
    }

    fn name(&self) -> String {
        let node = match &self.target {
            Target::Readable(file) | Target::Image(file, _) | Target::Data(file) => file.node(),
            Target::Backing(child) => child.node(),
        };
        node.name().to_owned()
    }
}

fn io_error(error: IoError) -> io::Error {
    io::Error::from_raw_os_error(error.errno)
}

/// Copies what is to be written, since the kernel may have it for longer than the
/// caller waits.
fn copied(bytes: &IoVector<'_>) -> io::Result<IoVec> {
    let len = usize::try_from(bytes.len()).map_err(io::Error::other)?;
    let iov = AlignedBuffer::new(len).io_vec(len);
    let mut block = vec![0; len];
    bytes.copy_into_slice(&mut block);
    iov.copy_from(0, &block);
    Ok(iov)
}

/// Takes from a header what does not hinder who only reads.
fn hide_features(offset: u64, bytes: &mut [u8]) {
    if offset != 0 {
        return;
    }
    if let Some(word) = bytes.get_mut(INCOMPATIBLE_AT..INCOMPATIBLE_AT + 8) {
        let mut features = [0; 8];
        features.copy_from_slice(word);
        let features = u64::from_be_bytes(features) & !HARMLESS_TO_READERS;
        word.copy_from_slice(&features.to_be_bytes());
    }
}

impl Storage for NodeStorage {
    fn req_align(&self) -> usize {
        SECTOR_SIZE as usize
    }

    fn size(&self) -> io::Result<u64> {
        Ok(match &self.target {
            Target::Readable(file) | Target::Image(file, _) | Target::Data(file) => {
                file.node().size()
            }
            // It may be replaced by a longer one, and `imago` asks only once.
            Target::Backing(_) => i64::MAX as u64 / SECTOR_SIZE * SECTOR_SIZE,
        })
    }

    async unsafe fn pure_readv(&self, bytes: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let len = usize::try_from(bytes.len()).map_err(io::Error::other)?;
        let iov = AlignedBuffer::new(len).io_vec(len);
        match &self.target {
            Target::Readable(file) | Target::Image(file, _) | Target::Data(file) => {
                file.read(offset, iov.clone()).await
            }
            Target::Backing(child) => read_or_zero(&child.node(), offset, iov.clone()).await,
        }
        .map_err(io_error)?;
        let mut done = 0;
        for mut part in bytes.into_inner() {
            iov.copy_to(done, &mut part);
            if done == 0 && matches!(self.target, Target::Readable(_)) {
                hide_features(offset, &mut part);
            }
            done += part.len();
        }
        Ok(())
    }

    async unsafe fn pure_writev(&self, bytes: IoVector<'_>, offset: u64) -> io::Result<()> {
        match &self.target {
            Target::Image(file, order) => {
                let iov = copied(&bytes)?;
                order.write(file, &self.helper, offset, iov).await
            }
            Target::Data(file) => {
                let written = file.write(offset, copied(&bytes)?).await;
                file.set_copied();
                written
            }
            Target::Readable(_) | Target::Backing(_) => {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
        .map_err(io_error)
    }

    async unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.target {
            Target::Image(file, order) => order.write_zeroes(file, offset, len).await,
            Target::Data(file) => {
                let written = file.write_zeroes(offset, len).await;
                file.set_copied();
                written
            }
            Target::Readable(_) | Target::Backing(_) => {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
        .map_err(io_error)
    }

    /// Nothing is kept here. The driver makes things durable by itself, outside of
    /// `imago`'s locks.
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    /// The driver's futures are not dropped before they end, so no write is under
    /// way that nobody waits for.
    async fn settle_writes(&self) -> io::Result<()> {
        Ok(())
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    async fn resize(&self, size: u64, _: PreallocateMode) -> io::Result<()> {
        match &self.target {
            Target::Data(file) => file.node().resize(size).await.map_err(io_error),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl fmt::Debug for NodeStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeStorage").field(&self.name()).finish()
    }
}

impl fmt::Display for NodeStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node '{}'", self.name())
    }
}
