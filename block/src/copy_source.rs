//! What a node writes by itself, with no memory of the caller's between or with less work than a
//! request for each of many pieces takes: a range of a file, or pieces in memory.
//!
//! Not here: how it is written (`drivers::file::copy`).

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use crate::buffer::IoVec;

/// What [`BlockDriver::copy_from`](crate::BlockDriver::copy_from) writes.
#[derive(Clone, Debug)]
pub enum CopySource {
    /// What a file holds.
    File(FileRange),
    /// What is in memory.
    Memory(Pieces),
}

impl CopySource {
    /// Bytes from the start of what is written to its end, with what is between its parts.
    #[expect(clippy::len_without_is_empty, reason = "nothing asks for that")]
    pub fn len(&self) -> u64 {
        match self {
            Self::File(range) => range.len,
            Self::Memory(pieces) => pieces.len,
        }
    }

    /// What is written: offsets in bytes from its start, in order.
    pub(crate) fn for_each_part(&self, mut each: impl FnMut(Range<u64>)) {
        match self {
            Self::File(range) => range.parts().for_each(each),
            Self::Memory(pieces) => {
                for (at, iov) in &pieces.pieces {
                    each(*at..at + iov.len() as u64);
                }
            }
        }
    }
}

impl From<FileRange> for CopySource {
    fn from(range: FileRange) -> Self {
        Self::File(range)
    }
}

/// Bytes in memory for some places of a node.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// In bytes.
    len: u64,
    /// Where each is to be, in bytes from the start of the first: in order, and apart.
    pub(crate) pieces: Vec<(u64, IoVec)>,
}

impl Pieces {
    /// Of what is to be at these offsets, and the offset of the first. `None`: there is
    /// nothing, or two are for the same place.
    pub fn new(mut pieces: Vec<(u64, IoVec)>) -> Option<(u64, Self)> {
        pieces.sort_unstable_by_key(|(at, _)| *at);
        let start = pieces.first()?.0;
        let mut end = start;
        for (at, iov) in &mut pieces {
            if *at < end {
                return None;
            }
            end = at.checked_add(iov.len() as u64)?;
            *at -= start;
        }
        let len = end - start;
        Some((start, Self { len, pieces }))
    }
}

/// A range of an open file of the host, or parts of one.
#[derive(Clone, Debug)]
pub struct FileRange {
    pub(crate) file: Arc<File>,
    /// In bytes, as the length is.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// The file is in memory: nothing is waited for.
    pub(crate) in_memory: bool,
    /// What of it is meant, from its start, in order; all of it if there are none.
    pub(crate) parts: Vec<Range<u64>>,
}

impl FileRange {
    /// Only `parts` of it, which are in order and apart: offsets in bytes from its start.
    /// What is not in the range is left out.
    pub fn only(mut self, parts: impl IntoIterator<Item = Range<u64>>) -> Self {
        let inside = |part: Range<u64>| part.start..part.end.min(self.len);
        let parts = parts.into_iter().map(inside);
        self.parts = parts.filter(|part| !part.is_empty()).collect();
        if self.parts.is_empty() {
            self.len = 0;
        }
        self
    }

    /// What of it is meant: offsets in bytes from its start.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let all = self.parts.is_empty().then_some(0..self.len);
        all.into_iter().chain(self.parts.iter().cloned())
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::buffer::AlignedBuffer;

    fn piece(at: u64, len: usize) -> (u64, IoVec) {
        (at, AlignedBuffer::new(len).io_vec(len))
    }

    #[test]
    fn pieces_are_in_order_and_know_what_they_span() {
        let all = vec![piece(8192, 512), piece(1024, 512), piece(1536, 1024)];
        let (start, pieces) = Pieces::new(all).unwrap();
        assert_eq!(start, 1024);
        let from = CopySource::Memory(pieces);
        assert_eq!(from.len(), 8192 + 512 - 1024);
        let mut parts = Vec::new();
        from.for_each_part(|part| parts.push(part));
        assert_eq!(parts, [0..512, 512..1536, 7168..7680]);
    }

    #[test]
    fn two_pieces_for_one_place_are_refused() {
        assert!(Pieces::new(vec![piece(0, 1024), piece(512, 512)]).is_none());
        assert!(Pieces::new(vec![piece(512, 512), piece(512, 512)]).is_none());
        assert!(Pieces::new(vec![piece(u64::MAX - 511, 512)]).is_none());
        assert!(Pieces::new(Vec::new()).is_none());
    }
}
