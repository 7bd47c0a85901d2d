//! The last run of data that was found in a file.
//!
//! Finding where data ends takes some file systems (tmpfs) as long as the data is
//! long, and a copier asks at each step: copying a full image then takes time by
//! the square of its size.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A run of bytes that is data as far as is known. Any thread, no lock.
///
/// To take a hole for data is never wrong, only slower: so it does not matter
/// that the ends are not read and written as one. Holes are not remembered:
/// another thread may be writing into them.
#[derive(Debug, Default)]
pub(super) struct DataRegion {
    start: AtomicU64,
    /// Not past `start` if nothing is known.
    end: AtomicU64,
    /// How often something was forgotten.
    forgotten: AtomicU64,
}

impl DataRegion {
    /// Bytes of data from `offset` on; 0 if that is not known.
    pub(super) fn data_at(&self, offset: u64) -> u64 {
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        if (start..end).contains(&offset) {
            end - offset
        } else {
            0
        }
    }

    /// To be taken before the file is asked, and given to
    /// [`remember`](Self::remember).
    pub(super) fn ask(&self) -> u64 {
        self.forgotten.load(Ordering::Acquire)
    }

    /// `range` is data, as the file said after `asked`; unless something was
    /// forgotten since.
    pub(super) fn remember(&self, asked: u64, range: Range<u64>) {
        if self.forgotten.load(Ordering::Acquire) == asked {
            self.start.store(range.start, Ordering::Relaxed);
            self.end.store(range.end, Ordering::Relaxed);
        }
    }

    /// `range` has become a hole, or may have.
    pub(super) fn forget(&self, range: Range<u64>) {
        self.forgotten.fetch_add(1, Ordering::AcqRel);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        if range.start < end && start < range.end {
            self.end.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_remembered_until_part_of_it_becomes_a_hole() {
        let region = DataRegion::default();
        assert_eq!(region.data_at(0), 0);
        region.remember(region.ask(), 100..200);
        assert_eq!(region.data_at(99), 0);
        assert_eq!(region.data_at(100), 100);
        assert_eq!(region.data_at(199), 1);
        assert_eq!(region.data_at(200), 0);
        region.forget(200..300);
        assert_eq!(region.data_at(100), 100);
        region.forget(199..200);
        assert_eq!(region.data_at(100), 0);
    }

    #[test]
    fn an_answer_from_before_a_hole_was_made_is_not_remembered() {
        let region = DataRegion::default();
        let asked = region.ask();
        region.forget(120..130);
        region.remember(asked, 100..200);
        assert_eq!(region.data_at(125), 0);
    }
}
