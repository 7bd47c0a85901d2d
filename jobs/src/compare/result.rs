//! What a comparison has found.

use std::ops::Range;

/// What has been found so far. Offsets and lengths in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Differing ranges: runs of 512-byte sectors that differ, as long as they can be.
    pub differences: u64,
    /// Bytes in them.
    pub differing_bytes: u64,
    /// Start of the first.
    pub first: Option<u64>,
    /// The first ranges, as many as were asked for.
    pub ranges: Vec<Range<u64>>,
    /// Bytes that could not be compared: they could not be read and the error was
    /// ignored, or were written all the time.
    pub undecided_bytes: u64,
    /// With a bitmap: bytes that are not compared, since they are dirty in it.
    pub skipped_bytes: Option<u64>,
    /// All has been looked at.
    pub is_complete: bool,
}

/// Counts ranges that are told in order.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) found: Comparison,
    /// Most ranges to list.
    list: usize,
    /// End of the last range.
    last_end: Option<u64>,
}

impl Tally {
    pub(super) fn new(list: u32) -> Self {
        Self {
            found: Comparison::default(),
            list: list as usize,
            last_end: None,
        }
    }

    /// Bytes that a bitmap leaves out.
    pub(super) fn skipped(&mut self, bytes: u64) {
        if let Some(skipped) = &mut self.found.skipped_bytes {
            *skipped += bytes;
        }
    }

    /// A range that differs. It begins where the one before ended, or after that.
    pub(super) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let found = &mut self.found;
        found.differing_bytes += range.end - range.start;
        let goes_on = self.last_end == Some(range.start);
        self.last_end = Some(range.end);
        if goes_on {
            if let Some(last) = found.ranges.last_mut()
                && last.end == range.start
            {
                last.end = range.end;
            }
            return;
        }
        found.differences += 1;
        found.first.get_or_insert(range.start);
        if found.ranges.len() < self.list {
            found.ranges.push(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_difference_and_the_list_is_bounded() {
        let mut tally = Tally::new(2);
        for range in [0..512, 512..1024, 2048..2560, 4096..8192, 8192..8704] {
            tally.add(range);
        }
        tally.add(9000..9000);
        let found = tally.found;
        assert_eq!((found.differences, found.first), (3, Some(0)));
        assert_eq!(found.differing_bytes, 1024 + 512 + 4608);
        assert_eq!(found.ranges, [0..1024, 2048..2560]);
    }

    #[test]
    fn without_a_list_everything_is_counted_all_the_same() {
        let mut tally = Tally::new(0);
        tally.add(512..1024);
        tally.add(1024..1536);
        assert_eq!((tally.found.differences, tally.found.first), (1, Some(512)));
        assert!(tally.found.ranges.is_empty());
    }
}
