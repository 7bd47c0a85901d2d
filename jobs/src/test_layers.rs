//! An image that stands on another one, for tests: both in memory, requests held at will.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use block::test_storage::TestStorage;
use block::{
    AlignedBuffer, BlockDriver, BoxFuture, Extent, IoError, IoVec, Limits, Node, WriteFlags,
    ZeroFlags,
};

/// Bytes that are allocated at once.
pub(crate) const CHUNK: u64 = 64 << 10;

/// Two layers: what is written goes to the upper one, chunk by chunk, and the rest of a
/// chunk is copied up with it.
pub(crate) struct Layers {
    upper: Box<dyn BlockDriver>,
    /// By number of the chunk. A leaf lock, taken for a look only.
    allocated: Mutex<Vec<bool>>,
    base: Arc<Node>,
}

impl Layers {
    /// Nothing of `upper` is allocated.
    pub(crate) fn new(upper: &TestStorage, base: Arc<Node>) -> Self {
        let chunks = upper.size().div_ceil(CHUNK) as usize;
        Self {
            upper: upper.driver(),
            allocated: vec![false; chunks].into(),
            base,
        }
    }

    fn is_allocated(&self, offset: u64) -> bool {
        self.allocated.lock().unwrap()[(offset / CHUNK) as usize]
    }

    fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
        let end = offset + len;
        (offset / CHUNK..end.div_ceil(CHUNK))
            .map(move |n| offset.max(n * CHUNK)..end.min((n + 1) * CHUNK))
    }

    async fn copy_up(&self, offset: u64, len: u64) -> Result<(), IoError> {
        for piece in Self::pieces(offset, len) {
            let chunk = piece.start / CHUNK * CHUNK;
            if !self.is_allocated(chunk) {
                let iov = AlignedBuffer::new(CHUNK as usize).io_vec(CHUNK as usize);
                self.base.read(chunk, iov.clone()).await?;
                self.upper.write(chunk, iov, WriteFlags::default()).await?;
            }
        }
        Ok(())
    }

    /// The upper layer has these chunks.
    pub(crate) fn allocate(&self, offset: u64, len: u64) {
        for piece in Self::pieces(offset, len) {
            self.allocated.lock().unwrap()[(piece.start / CHUNK) as usize] = true;
        }
    }
}

impl BlockDriver for Layers {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn size(&self) -> u64 {
        self.upper.size()
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn filename(&self) -> String {
        String::new()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            for piece in Self::pieces(offset, iov.len() as u64) {
                let part = iov.slice(
                    (piece.start - offset) as usize,
                    (piece.end - piece.start) as usize,
                );
                if self.is_allocated(piece.start) {
                    self.upper.read(piece.start, part).await?;
                } else {
                    self.base.read(piece.start, part).await?;
                }
            }
            Ok(())
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
            self.copy_up(offset, len).await?;
            self.upper.write(offset, iov, flags).await?;
            self.allocate(offset, len);
            Ok(())
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.copy_up(offset, len).await?;
            self.upper.write_zeroes(offset, len, flags).await?;
            self.allocate(offset, len);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, _: u64, _: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        self.upper.flush()
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            let here = len.min((offset / CHUNK + 1) * CHUNK - offset);
            // The upper storage is asked in any case: tests hold the question.
            let mut extent = self.upper.block_status(offset, here).await?;
            extent.flags.allocated = self.is_allocated(offset);
            if !extent.flags.allocated {
                extent.len = here;
                extent.flags.data = false;
                extent.flags.zero = false;
            }
            Ok(extent)
        })
    }

    fn backing(&self) -> Option<Arc<Node>> {
        Some(Arc::clone(&self.base))
    }
}
