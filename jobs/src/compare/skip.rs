//! What a bitmap leaves out of a comparison: the guest's writes since an instant.
//!
//! The bitmap is held, so it records all the time and nothing in it becomes clean: what is
//! seen dirty once stays so. What is clean may become dirty until requests are held.

use std::ops::Range;
use std::sync::Arc;

use block::{DirtyBitmap, NamedBitmap};

use super::look::push;

/// Dirty runs of at least this many bytes are not read; shorter ones are read through, and
/// then left out.
const LONG: u64 = 64 << 10;

/// The next thing to do with a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// To be read. There may be short dirty runs in it.
    Read(Range<u64>),
    /// Dirty as a whole.
    LeaveOut(Range<u64>),
}

/// A bitmap that says what is not to be compared. Any thread.
#[derive(Clone, Debug)]
pub(super) struct Skip {
    bitmap: Arc<NamedBitmap>,
    /// Its bits: the same for as long as it is held.
    bits: Arc<DirtyBitmap>,
}

impl Skip {
    /// The caller holds the bitmap for as long as this is used.
    pub(super) fn new(bitmap: &Arc<NamedBitmap>) -> Self {
        Self {
            bitmap: Arc::clone(bitmap),
            bits: bitmap.bits(),
        }
    }

    pub(super) fn name(&self) -> &str {
        self.bitmap.name()
    }

    /// Whether it has recorded all that was written until now. With all requests to its
    /// node held: looked at after its bits.
    pub(super) fn is_recording(&self) -> bool {
        self.bitmap.is_recording()
    }

    /// The first piece of a range, which is not empty: what is read is no longer than `most`.
    pub(super) fn first_piece(&self, range: &Range<u64>, most: u64) -> Piece {
        let end = range.start.saturating_add(most).min(range.end);
        let mut at = range.start;
        while let Some(run) = self.bits.next_dirty_area(at, LONG)
            && run.start < end
        {
            let start = run.start.max(at);
            if run.end - start >= LONG || run.end >= range.end {
                if start > range.start {
                    return Piece::Read(range.start..start);
                }
                let clean = self.bits.next_clean(range).unwrap_or(range.end);
                return Piece::LeaveOut(range.start..clean.min(range.end));
            }
            at = run.end;
        }
        Piece::Read(range.start..end)
    }

    /// Leaves what is dirty out of ranges that are in order, and gives its length in bytes.
    pub(super) fn leave_out(&self, ranges: &mut Vec<Range<u64>>) -> u64 {
        let mut bytes = 0;
        let mut left = Vec::new();
        for range in std::mem::take(ranges) {
            let mut at = range.start;
            while let Some(run) = self.bits.next_dirty_area(at, range.end - at)
                && run.start < range.end
            {
                let run = run.start.max(at)..run.end.min(range.end);
                if at < run.start {
                    push(&mut left, at..run.start);
                }
                bytes += run.end - run.start;
                at = run.end;
                if at == range.end {
                    break;
                }
            }
            if at < range.end {
                push(&mut left, at..range.end);
            }
        }
        *ranges = left;
        bytes
    }
}
