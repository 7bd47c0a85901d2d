//! Buffers that the copier reuses.

use std::cell::RefCell;
use std::sync::Arc;

use block::{AlignedBuffer, IoVec};

/// A bounded stock of aligned buffers of one size. Used on the job's home only.
///
/// The pool bounds what it keeps; how many are out at a time is bounded by the
/// number of operations that the copier has in flight.
#[derive(Debug)]
pub(crate) struct BufferPool {
    buffer_size: usize,
    keep: usize,
    free: RefCell<Vec<PooledBuffer>>,
}

/// One buffer on loan. Dropping it without [`BufferPool::give_back`] frees it
/// once the kernel, too, is done with it.
pub(crate) struct PooledBuffer(Arc<AlignedBuffer>);

impl std::fmt::Debug for PooledBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PooledBuffer")
    }
}

impl PooledBuffer {
    /// The first `len` bytes.
    pub(crate) fn io_vec(&self, len: usize) -> IoVec {
        self.0.io_vec(len)
    }
}

impl BufferPool {
    /// A pool of buffers of `buffer_size` bytes that keeps up to `keep` of them.
    pub(crate) fn new(buffer_size: usize, keep: usize) -> Self {
        Self {
            buffer_size,
            keep,
            free: RefCell::new(Vec::new()),
        }
    }

    /// Size of each buffer in bytes.
    pub(crate) fn buffer_size(&self) -> usize {
        self.buffer_size
    }

    /// A buffer: a used one with its old content, or a new one.
    pub(crate) fn take(&self) -> PooledBuffer {
        let used = self.free.borrow_mut().pop();
        used.unwrap_or_else(|| PooledBuffer(AlignedBuffer::new(self.buffer_size)))
    }

    /// Returns a buffer whose I/O has ended.
    pub(crate) fn give_back(&self, buffer: PooledBuffer) {
        // Somebody who still holds a list over it might write to it later.
        if Arc::strong_count(&buffer.0) != 1 {
            return;
        }
        let mut free = self.free.borrow_mut();
        if free.len() < self.keep {
            free.push(buffer);
        }
    }

    /// Frees the stock, for times when nothing is copied.
    pub(crate) fn shrink(&self) {
        self.free.borrow_mut().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_unless_somebody_still_uses_it() {
        let pool = BufferPool::new(8192, 2);
        let first = pool.take();
        first.io_vec(1).fill(7);
        let held = first.io_vec(8192);
        pool.give_back(first);
        assert_eq!(pool.free.borrow().len(), 0);
        drop(held);
        let second = pool.take();
        assert!(second.io_vec(8192).is_zero(), "a new one");
        second.io_vec(1).fill(7);
        pool.give_back(second);
        assert!(!pool.take().io_vec(8192).is_zero(), "the used one");
    }

    #[test]
    fn the_stock_is_bounded() {
        let pool = BufferPool::new(4096, 2);
        let out: Vec<_> = (0..5).map(|_| pool.take()).collect();
        for buffer in out {
            pool.give_back(buffer);
        }
        assert_eq!(pool.free.borrow().len(), 2);
        pool.shrink();
        assert_eq!(pool.free.borrow().len(), 0);
    }
}
