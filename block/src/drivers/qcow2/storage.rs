//! How `imago` reaches our nodes: its `Storage` trait on an edge of the graph.
//!
//! It reads and writes tables by it, and what it copies on write. What guests read
//! and write goes from the driver to the nodes without it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// What `imago` knows makes no sense: nothing of it is to be written.
    broken: Arc<AtomicBool>,
    helper: CommonStorageHelper,
}

impl NodeStorage {
    /// The image's file; `order` if it is to be written, as long as it is not `broken`.
    pub(super) fn image(
        file: Arc<GrowingFile>,
        order: Option<WriteOrder>,
        broken: Arc<AtomicBool>,
    ) -> Self {
        let target = match order {
            Some(order) => Target::Image(file, Box::new(order)),
            None => Target::Readable(file),
        };
        Self::new(target, broken)
    }

    /// The image's data file, written as long as the image is not `broken`.
    pub(super) fn data(file: Arc<GrowingFile>, broken: Arc<AtomicBool>) -> Self {
        Self::new(Target::Data(file), broken)
    }

    /// The image's backing node.
    pub(super) fn backing(child: Child) -> Self {
        Self::new(Target::Backing(child), Arc::default())
    }

    /// Fails once the image is broken: a request that was under way when that was found
    /// would write tables of which nothing is known.
    fn check_usable(&self) -> io::Result<()> {
        match self.broken.load(Ordering::Acquire) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }

    fn new(target: Target, broken: Arc<AtomicBool>) -> Self {
        Self {
            target,
            broken,
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
        self.check_usable()?;
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
        self.check_usable()?;
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
        self.check_usable()?;
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use imago::io_buffers::IoBuffer;
    use imago::storage::ext::StorageExt as _;

    use super::*;
    use crate::driver::ChildRole;
    use crate::graph::Graph;
    use crate::node::NodeOptions;
    use crate::runtime::EventLoop;
    use crate::test_storage::TestStorage;

    #[test]
    fn nothing_is_written_for_an_image_that_is_broken() {
        let graph = Graph::new();
        let storage = TestStorage::new(1 << 20);
        let node = graph
            .add_node(Some("f"), storage.driver(), NodeOptions::default())
            .unwrap();
        let file = Arc::new(GrowingFile::new(Child::new(ChildRole::DataFile, node)));
        let broken = Arc::new(AtomicBool::new(false));
        let below = NodeStorage::data(file, Arc::clone(&broken));
        let mut ones = IoBuffer::new(512, 512).unwrap();
        ones.as_mut().into_slice().fill(1);
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            below.write(&ones, 0).await.unwrap();
            broken.store(true, Ordering::Release);
            let error = below.write(&ones, 512).await.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
            assert!(below.write_zeroes(0, 512).await.is_err());
            assert!(below.resize(512, PreallocateMode::None).await.is_err());
        });
        let content = storage.snapshot();
        assert_eq!((content[0], content[512], content.len()), (1, 0, 1 << 20));
    }
}

impl fmt::Display for NodeStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node '{}'", self.name())
    }
}
