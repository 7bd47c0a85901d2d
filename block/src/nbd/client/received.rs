//! Which bytes of a read have come.

use std::ops::Range;

use super::error::NbdError;

/// Servers send the chunks of a read in any order, but not in tatters: more gaps than
/// that are made to cost memory.
const MAX_PIECES: usize = 1024;

/// Ranges of bytes that have come, in order, with gaps between them.
#[derive(Debug, Default)]
pub(super) struct Received {
    pieces: Vec<Range<u64>>,
}

impl Received {
    /// Adds a range, which must not be empty.
    ///
    /// Fails if some of it has come before: which of the two is right cannot be known.
    pub(super) fn add(&mut self, range: Range<u64>) -> Result<(), NbdError> {
        let next = self
            .pieces
            .partition_point(|piece| piece.end <= range.start);
        if self
            .pieces
            .get(next)
            .is_some_and(|piece| piece.start < range.end)
        {
            return Err(NbdError::Violation("the same bytes of a read twice"));
        }
        let joins_next = self
            .pieces
            .get(next)
            .is_some_and(|piece| piece.start == range.end);
        let joins_last = next > 0 && self.pieces[next - 1].end == range.start;
        match (joins_last, joins_next) {
            (true, true) => {
                self.pieces[next - 1].end = self.pieces[next].end;
                self.pieces.remove(next);
            }
            (true, false) => self.pieces[next - 1].end = range.end,
            (false, true) => self.pieces[next].start = range.start,
            (false, false) if self.pieces.len() < MAX_PIECES => self.pieces.insert(next, range),
            (false, false) => {
                return Err(NbdError::Violation("a read that is answered in tatters"));
            }
        }
        Ok(())
    }

    /// Whether all of `range` has come, and nothing else.
    pub(super) fn is(&self, range: Range<u64>) -> bool {
        self.pieces == [range]
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn ranges_in_any_order_become_one() {
        let mut received = Received::default();
        for start in [3, 1, 5, 2, 0, 4] {
            assert!(!received.is(0..6));
            received.add(start..start + 1).unwrap();
        }
        assert!(received.is(0..6) && !received.is(0..5));
    }

    #[test]
    fn what_has_come_before_is_refused() {
        let mut received = Received::default();
        received.add(10..20).unwrap();
        received.add(30..40).unwrap();
        for range in [10..20, 0..11, 19..25, 25..31, 12..13, 0..50] {
            let error = received.add(range).unwrap_err().to_string();
            assert!(error.contains("the same bytes of a read twice"), "{error}");
        }
        received.add(20..30).unwrap();
        assert!(received.is(10..40));
    }

    #[test]
    fn tatters_cost_no_more_than_so_much() {
        let mut received = Received::default();
        let mut pieces = (0..).map(|i| 2 * i..2 * i + 1);
        let kept = pieces.by_ref().take(MAX_PIECES);
        kept.for_each(|piece| received.add(piece).unwrap());
        assert!(received.add(pieces.next().unwrap()).is_err());
        received.add(1..2).unwrap();
    }
}
