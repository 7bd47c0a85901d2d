//! Runs of data that were found in a file.
//!
//! Finding where data ends takes some file systems (tmpfs) as long as the data is
//! long, and a copier asks at each step: copying a full image then takes time by
//! the square of its size. And asking takes a helper thread, which is woken for it. So
//! one look finds several runs, and they are remembered.

use std::ops::Range;

use crate::sync::{Mutex, lock};

/// Runs that are data as far as is known, and what lies between them. Any thread.
///
/// To take a hole for data is never wrong, only slower. Holes are not remembered:
/// others may be writing into them, other processes too.
#[derive(Debug, Default)]
pub(super) struct DataRuns {
    /// A leaf lock, held for a few instructions.
    known: Mutex<Known>,
}

/// What one look at a file has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Runs of data, in order.
    pub(super) runs: Vec<Range<u64>>,
    /// What was looked at.
    pub(super) span: Range<u64>,
    /// Where the holes in it end was found at once.
    pub(super) quick: bool,
}

#[derive(Debug, Default)]
struct Known {
    look: Look,
    /// How often something was forgotten.
    forgotten: u64,
}

impl DataRuns {
    /// Bytes of data from `offset` on; 0 if that is not known.
    pub(super) fn data_at(&self, offset: u64) -> u64 {
        let known = lock(&self.known);
        let runs = &known.look.runs;
        let next = runs.partition_point(|run| run.end <= offset);
        runs.get(next)
            .filter(|run| run.start <= offset)
            .map_or(0, |run| run.end - offset)
    }

    /// Whether `offset` is in what was looked at.
    pub(super) fn covers(&self, offset: u64) -> bool {
        lock(&self.known).look.span.contains(&offset)
    }

    /// Whether the end of a hole at `offset` is likely to be found at once.
    pub(super) fn is_quick_at(&self, offset: u64) -> bool {
        let known = lock(&self.known);
        known.look.quick && known.look.span.contains(&offset)
    }

    /// To be taken before the file is asked, and given to
    /// [`remember`](Self::remember).
    pub(super) fn ask(&self) -> u64 {
        lock(&self.known).forgotten
    }

    /// Remembers what the file said after `asked`, instead of what was known; unless
    /// something was forgotten since.
    pub(super) fn remember(&self, asked: u64, look: Look) {
        let mut known = lock(&self.known);
        if known.forgotten == asked {
            known.look = look;
        }
    }

    /// `range` has become a hole, or may have.
    pub(super) fn forget(&self, range: Range<u64>) {
        let mut known = lock(&self.known);
        known.forgotten += 1;
        known
            .look
            .runs
            .retain(|run| range.start >= run.end || run.start >= range.end);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn look(runs: &[Range<u64>]) -> Look {
        Look {
            runs: runs.to_vec(),
            span: 0..1000,
            quick: true,
        }
    }

    #[test]
    fn data_is_remembered_until_part_of_it_becomes_a_hole() {
        let known = DataRuns::default();
        assert_eq!(known.data_at(0), 0);
        known.remember(known.ask(), look(&[100..200, 300..400, 500..600]));
        let at = |known: &DataRuns| [99, 100, 199, 200, 299, 300, 550].map(|at| known.data_at(at));
        assert_eq!(at(&known), [0, 100, 1, 0, 0, 100, 50]);
        known.forget(200..300);
        assert_eq!(at(&known), [0, 100, 1, 0, 0, 100, 50]);
        known.forget(199..301);
        assert_eq!(at(&known), [0, 0, 0, 0, 0, 0, 50]);
        known.forget(0..u64::MAX);
        assert_eq!(at(&known), [0; 7]);
    }

    #[test]
    fn an_answer_from_before_a_hole_was_made_is_not_remembered() {
        let known = DataRuns::default();
        let asked = known.ask();
        known.forget(120..130);
        known.remember(asked, look(&[100..200, 300..400]));
        assert_eq!(known.data_at(125), 0);
        assert!(!known.covers(125) && !known.is_quick_at(125));
        known.remember(known.ask(), look(&[]));
        assert!(known.covers(125) && known.is_quick_at(125) && !known.covers(1000));
    }
}
