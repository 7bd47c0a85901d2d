//! Private copies of guest payloads, from a small stock per thread.

use std::cell::RefCell;
use std::sync::Arc;

use block::{AlignedBuffer, IoVec};

/// Size of the buffers in stock; longer payloads get one of their own.
const STOCK_BUFFER: usize = 128 << 10;
/// Buffers in stock per thread.
const STOCK: usize = 32;

thread_local! {
    static FREE: RefCell<Vec<Arc<AlignedBuffer>>> = const { RefCell::new(Vec::new()) };
}

/// A copy of a payload that the guest cannot change.
pub(crate) struct PrivateCopy {
    buffer: Arc<AlignedBuffer>,
    len: usize,
}

impl PrivateCopy {
    /// Copies the bytes as they are now. The caller bounds the length.
    pub(crate) fn of(payload: &IoVec) -> Self {
        let len = payload.len();
        let used = if len <= STOCK_BUFFER {
            FREE.with_borrow_mut(Vec::pop)
        } else {
            None
        };
        let buffer = used.unwrap_or_else(|| AlignedBuffer::new(len.max(STOCK_BUFFER)));
        let copy = Self { buffer, len };
        copy.io_vec().copy_from_iov(0, payload);
        copy
    }

    /// The copy.
    pub(crate) fn io_vec(&self) -> IoVec {
        self.buffer.io_vec(self.len)
    }

    /// `len` bytes of the copy from `skip` on.
    pub(crate) fn part(&self, skip: usize, len: usize) -> IoVec {
        match skip == 0 && len == self.len {
            true => self.io_vec(),
            false => self.io_vec().slice(skip, len),
        }
    }

    /// Returns the buffer to the stock of this thread. Without this call it is
    /// freed, once nobody (the kernel) uses it any more.
    pub(crate) fn give_back(self) {
        if self.len > STOCK_BUFFER || Arc::strong_count(&self.buffer) != 1 {
            return;
        }
        FREE.with_borrow_mut(|free| {
            if free.len() < STOCK {
                free.push(self.buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_does_not_change_with_the_original() {
        let original = AlignedBuffer::new(10_000).io_vec(10_000);
        original.fill(1);
        let copy = PrivateCopy::of(&original);
        original.fill(2);
        let mut bytes = vec![0; 10_000];
        copy.io_vec().copy_to(0, &mut bytes);
        assert!(bytes.iter().all(|b| *b == 1));
    }

    #[test]
    fn buffers_are_used_again_only_when_nobody_else_has_them() {
        let payload = AlignedBuffer::new(512).io_vec(512);
        let copy = PrivateCopy::of(&payload);
        let held = copy.io_vec();
        copy.give_back();
        assert_eq!(FREE.with_borrow(Vec::len), 0);
        drop(held);
        PrivateCopy::of(&payload).give_back();
        assert_eq!(FREE.with_borrow(Vec::len), 1);
        let _copy = PrivateCopy::of(&payload);
        assert_eq!(FREE.with_borrow(Vec::len), 0);
    }
}
