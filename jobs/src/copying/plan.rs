//! What to do with each part of a range that is to be copied.
//!
//! Pure: extents in, segments out. Who asks for the extents, and who carries the
//! segments out, is `copy`.

use std::ops::Range;

/// What a segment needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentKind {
    /// Read the source, write the target.
    Copy,
    /// Make the target read as zeroes.
    Zero,
}

/// A part of the range, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: Range<u64>,
    pub(crate) kind: SegmentKind,
}

/// Cuts a range into segments as its extents become known, front to back.
///
/// Zeroes are only written as zeroes where they fill whole units of `align`
/// bytes (or reach the end of the disk); their ragged ends are copied, because a
/// partial zero write would make most targets read, modify and write.
#[derive(Debug)]
pub(crate) struct Planner {
    align: u64,
    disk_end: u64,
    next: u64,
    segments: Vec<Segment>,
}

impl Planner {
    /// A plan that begins at `start`. `align` is a power of two.
    pub(crate) fn new(start: u64, align: u64, disk_end: u64) -> Self {
        debug_assert!(align.is_power_of_two());
        Self {
            align,
            disk_end,
            next: start,
            segments: Vec::new(),
        }
    }

    /// The next extent, `len` bytes long, reads as zeroes or has data.
    pub(crate) fn push(&mut self, len: u64, zero: bool) {
        let start = self.next;
        let end = start + len;
        self.next = end;
        if !zero {
            self.append(start..end, SegmentKind::Copy);
            return;
        }
        let zero_start = start.next_multiple_of(self.align);
        let zero_end = if end == self.disk_end {
            end
        } else {
            end & !(self.align - 1)
        };
        if zero_start >= zero_end {
            self.append(start..end, SegmentKind::Copy);
            return;
        }
        self.append(start..zero_start, SegmentKind::Copy);
        self.append(zero_start..zero_end, SegmentKind::Zero);
        self.append(zero_end..end, SegmentKind::Copy);
    }

    /// First byte that is not planned yet.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// The segments in order; neighbours differ in kind.
    pub(crate) fn finish(self) -> Vec<Segment> {
        self.segments
    }

    fn append(&mut self, range: Range<u64>, kind: SegmentKind) {
        if range.is_empty() {
            return;
        }
        match self.segments.last_mut() {
            Some(last) if last.kind == kind && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.segments.push(Segment { range, kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(start: u64, extents: &[(u64, bool)], disk_end: u64) -> Vec<(u64, u64, SegmentKind)> {
        let mut planner = Planner::new(start, 4096, disk_end);
        for (len, zero) in extents {
            planner.push(*len, *zero);
        }
        planner
            .finish()
            .into_iter()
            .map(|s| (s.range.start, s.range.end, s.kind))
            .collect()
    }

    use SegmentKind::{Copy, Zero};

    #[test]
    fn aligned_extents_stay_as_they_are() {
        assert_eq!(
            plan(4096, &[(4096, false), (8192, true), (4096, false)], 1 << 20),
            [
                (4096, 8192, Copy),
                (8192, 16384, Zero),
                (16384, 20480, Copy)
            ]
        );
    }

    #[test]
    fn ragged_ends_of_zeroes_are_copied_with_their_neighbours() {
        assert_eq!(
            plan(0, &[(512, false), (12288, true), (512, false)], 1 << 20),
            [(0, 4096, Copy), (4096, 12288, Zero), (12288, 13312, Copy)]
        );
    }

    #[test]
    fn zeroes_too_short_for_the_target_are_copied() {
        assert_eq!(
            plan(0, &[(4608, false), (3000, true), (584, false)], 1 << 20),
            [(0, 8192, Copy)]
        );
    }

    #[test]
    fn zeroes_at_the_end_of_the_disk_need_no_alignment() {
        assert_eq!(plan(0, &[(5120, true)], 5120), [(0, 5120, Zero)]);
    }

    #[test]
    fn data_extents_are_joined() {
        assert_eq!(
            plan(0, &[(4096, false), (4096, false)], 1 << 20),
            [(0, 8192, Copy)]
        );
    }
}
