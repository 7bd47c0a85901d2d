//! Buffers that a connection uses again and again, so that small requests cost no
//! allocation. One thread.

use std::sync::Arc;

use crate::buffer::{AlignedBuffer, IoVec};

/// Sizes are powers of two from `1 << MIN_SHIFT`; larger buffers than
/// `1 << MAX_SHIFT` bytes are not kept.
const MIN_SHIFT: u32 = 12;
const MAX_SHIFT: u32 = 20;
/// Bytes that are kept.
const MAX_KEPT: usize = 4 << 20;

/// A buffer of at least the length that was asked for.
pub(super) struct Buffer {
    memory: Arc<AlignedBuffer>,
    shift: u32,
}

impl Buffer {
    /// Its first `len` bytes.
    pub(super) fn io_vec(&self, len: usize) -> IoVec {
        self.memory.io_vec(len)
    }
}

/// Buffers that nobody uses at the moment.
#[derive(Default)]
pub(super) struct Buffers {
    /// By size.
    free: [Vec<Buffer>; (MAX_SHIFT - MIN_SHIFT + 1) as usize],
    kept: usize,
}

impl Buffers {
    /// A buffer of `len` bytes or more, with anything in it that this connection
    /// had in one. The caller bounds `len`.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let shift = len.max(1).next_power_of_two().trailing_zeros();
        let shift = shift.max(MIN_SHIFT);
        if shift > MAX_SHIFT {
            return Buffer {
                memory: AlignedBuffer::new(len),
                shift,
            };
        }
        match self.free[(shift - MIN_SHIFT) as usize].pop() {
            Some(buffer) => {
                self.kept -= 1 << shift;
                buffer
            }
            None => Buffer {
                memory: AlignedBuffer::new(1 << shift),
                shift,
            },
        }
    }

    /// Takes a buffer back that is not used any more. One that is (by a request
    /// whose end nobody waits for) is not kept.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        let size = 1 << buffer.shift.min(MAX_SHIFT);
        let reusable = buffer.shift <= MAX_SHIFT
            && self.kept + size <= MAX_KEPT
            && Arc::strong_count(&buffer.memory) == 1;
        if reusable {
            self.kept += size;
            self.free[(buffer.shift - MIN_SHIFT) as usize].push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_in_use_is_not_given_to_another_request() {
        let mut buffers = Buffers::default();
        let buffer = buffers.take(100);
        let used = buffer.io_vec(100);
        used.fill(1);
        buffers.give_back(buffer);
        let other = buffers.take(100).io_vec(100);
        other.fill(2);
        let mut byte = [0];
        used.copy_to(0, &mut byte);
        assert_eq!(byte, [1]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut buffers = Buffers::default();
        let all: Vec<Buffer> = (0..20).map(|_| buffers.take(1 << 20)).collect();
        for buffer in all {
            buffers.give_back(buffer);
        }
        assert_eq!(buffers.kept, MAX_KEPT);
        buffers.give_back(Buffers::default().take((1 << 20) + 1));
        assert_eq!(buffers.kept, MAX_KEPT);
        assert_eq!(buffers.free.iter().map(Vec::len).sum::<usize>(), 4);
    }
}
