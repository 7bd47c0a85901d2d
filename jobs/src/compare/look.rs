//! Reading a range of both nodes and comparing it.
//!
//! Each request counts by itself, for one node: a node whose storage hangs does not
//! hold up a drained section of the other.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use block::{Backend, InFlight, IoError, IoVec, SECTOR_SIZE};
use futures_util::future::join;

use crate::copying::{BufferPool, PooledBuffer};

/// Extents that one operation asks for at most.
const MAX_EXTENTS: u32 = 64;
/// Extents shorter than this are read, whatever they are: not worth a question each.
const SHORT: u64 = 64 << 10;
/// Compared at once. Buffers are copied out of in pieces of this many bytes.
const BLOCK: usize = 4096;

/// One of the two nodes.
pub(super) struct Side {
    pub(super) backend: Arc<Backend>,
    /// Id of the node that was to be compared.
    pub(super) node: u64,
    /// Its size when the job began, in bytes.
    pub(super) size: u64,
}

/// Why an operation stopped.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// Somebody drains a node.
    Drained,
    /// Another node has taken the place of one that is compared.
    Moved,
    /// A side could not be read in this range.
    Failed {
        side: usize,
        range: Range<u64>,
        error: IoError,
    },
}

/// What an operation found.
#[derive(Debug)]
pub(super) struct Looked {
    /// How far it got.
    pub(super) end: u64,
    /// Runs of sectors that differ, in order.
    pub(super) differing: Vec<Range<u64>>,
    /// Bytes that were read, of each side.
    pub(super) charged: u64,
    /// All of it was zeroes on both sides.
    pub(super) was_zero: bool,
    /// Why it got no further, if it was to.
    pub(super) stop: Option<Stop>,
}

/// Reads both nodes. Home only.
pub(super) struct Reader {
    sides: [Side; 2],
    pool: BufferPool,
    /// Nothing more is to be read: the job may have left its nodes.
    stopped: Cell<bool>,
}

impl Reader {
    pub(super) fn new(sides: [Side; 2], pool: BufferPool) -> Self {
        Self {
            sides,
            pool,
            stopped: Cell::new(false),
        }
    }

    /// Size of the larger one in bytes.
    pub(super) fn size(&self) -> u64 {
        self.sides[0].size.max(self.sides[1].size)
    }

    /// Has operations that go on by themselves begin no further requests.
    pub(super) fn stop(&self) {
        self.stopped.set(true);
    }

    /// Frees buffers, for times when nothing is read.
    pub(super) fn shrink(&self) {
        self.pool.shrink();
    }

    /// Compares from the start of `range`: all of it where it is zeroes, and else up to
    /// `request` bytes from its start, which fit a buffer. What one node has not, since
    /// it is smaller, counts as zeroes.
    ///
    /// Cancel: requests go on in the kernel; leave it to a task instead.
    pub(super) async fn look(&self, range: Range<u64>, request: u64) -> Looked {
        let mut looked = Looked {
            end: range.start,
            differing: Vec::new(),
            charged: 0,
            was_zero: true,
            stop: None,
        };
        let most = range.start.saturating_add(request).min(range.end);
        for _ in 0..MAX_EXTENTS {
            if looked.end >= range.end {
                break;
            }
            if let Err(stop) = self.step(&range, most, &mut looked).await {
                looked.stop = Some(stop);
                break;
            }
            if !looked.was_zero && looked.end >= most {
                break;
            }
        }
        looked
    }

    async fn step(&self, range: &Range<u64>, most: u64, looked: &mut Looked) -> Result<(), Stop> {
        let at = looked.end;
        let left = range.end - at;
        let (first, second) = join(self.zeroes(0, at, left), self.zeroes(1, at, left)).await;
        let (first, second) = (first?, second?);
        let len = first.1.min(second.1);
        if first.0 && second.0 {
            looked.end = at + len;
            return Ok(());
        }
        looked.was_zero = false;
        if at >= most {
            // Where data begins behind zeroes, the next operation begins.
            looked.stop = None;
            return Ok(());
        }
        let mut end = (at + len.max(SHORT)).min(most);
        for side in self.sides.iter().filter(|side| at < side.size) {
            end = end.min(side.size);
        }
        let whole = end <= at + len;
        let zero = [first.0, second.0];
        let known_zero = |side: usize| at >= self.sides[side].size || (whole && zero[side]);
        let piece = at..end;
        let (first, second) = join(
            self.read(0, &piece, known_zero(0)),
            self.read(1, &piece, known_zero(1)),
        )
        .await;
        let (first, second) = (first?, second?);
        let len = (end - at) as usize;
        {
            let io_vec =
                |buffer: &Option<PooledBuffer>| buffer.as_ref().map(|buffer| buffer.io_vec(len));
            differing(
                at,
                len,
                [io_vec(&first), io_vec(&second)],
                &mut looked.differing,
            );
        }
        for buffer in [first, second].into_iter().flatten() {
            self.pool.give_back(buffer);
        }
        looked.charged += end - at;
        looked.end = end;
        Ok(())
    }

    /// Counts a request in.
    fn enter(&self, side: usize) -> Result<InFlight, Stop> {
        if self.stopped.get() {
            return Err(Stop::Drained);
        }
        let Side { backend, node, .. } = &self.sides[side];
        let in_flight = backend.try_enter().ok_or(Stop::Drained)?;
        // Counted before this look, so that a section sees it or is seen. The job's
        // requests are only counted, and not held by the backend.
        if backend.is_drained() {
            return Err(Stop::Drained);
        }
        if in_flight.node().id() != *node {
            return Err(Stop::Moved);
        }
        Ok(in_flight)
    }

    /// Whether a node reads as zeroes from `at` on, and how far that answer reaches.
    async fn zeroes(&self, side: usize, at: u64, len: u64) -> Result<(bool, u64), Stop> {
        let size = self.sides[side].size;
        if at >= size {
            return Ok((true, len));
        }
        let len = len.min(size - at);
        let in_flight = self.enter(side)?;
        match in_flight.node().chain_status(None, at, len).await {
            Ok(extent) => {
                let whole = extent.len / SECTOR_SIZE * SECTOR_SIZE;
                Ok((extent.zero && whole > 0, whole.clamp(SECTOR_SIZE, len)))
            }
            // Reading it will tell what is wrong.
            Err(_) => Ok((false, len)),
        }
    }

    /// Reads a range that fits a buffer; `None` if it is known to be zeroes.
    async fn read(
        &self,
        side: usize,
        range: &Range<u64>,
        zero: bool,
    ) -> Result<Option<PooledBuffer>, Stop> {
        if zero {
            return Ok(None);
        }
        let in_flight = self.enter(side)?;
        let buffer = self.pool.take();
        let iov = buffer.io_vec((range.end - range.start) as usize);
        match in_flight.read(range.start, iov).await {
            Ok(()) => Ok(Some(buffer)),
            Err(error) => Err(Stop::Failed {
                side,
                range: range.clone(),
                error,
            }),
        }
    }
}

/// Adds the runs of sectors that differ; no data is zeroes. `at` is where it begins.
fn differing(at: u64, len: usize, data: [Option<IoVec>; 2], into: &mut Vec<Range<u64>>) {
    let mut blocks = [[0; BLOCK]; 2];
    let mut done = 0;
    while done < len {
        let n = BLOCK.min(len - done);
        for (data, block) in data.iter().zip(&mut blocks) {
            if let Some(data) = data {
                data.copy_to(done, &mut block[..n]);
            }
        }
        let [first, second] = &blocks;
        if first[..n] != second[..n] {
            let sector = SECTOR_SIZE as usize;
            let sectors = first[..n].chunks(sector).zip(second[..n].chunks(sector));
            for (index, (first, second)) in sectors.enumerate() {
                if first != second {
                    let start = at + (done + index * sector) as u64;
                    push(into, start..start + first.len() as u64);
                }
            }
        }
        done += n;
    }
}

/// Adds a range behind the others, as part of the last one if it follows on it.
pub(super) fn push(into: &mut Vec<Range<u64>>, range: Range<u64>) {
    match into.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => into.push(range),
    }
}

#[cfg(test)]
mod tests {
    use block::AlignedBuffer;

    use super::*;

    #[test]
    fn runs_of_differing_sectors_are_found_to_the_sector() {
        let buffer = || AlignedBuffer::new(3 * BLOCK).io_vec(2 * BLOCK + 512);
        let (first, second) = (buffer(), buffer());
        second.copy_from(511, &[1, 1]);
        second.copy_from(BLOCK - 1, &[1, 1]);
        second.copy_from(2 * BLOCK + 511, &[1]);
        let mut found = Vec::new();
        differing(
            1 << 20,
            2 * BLOCK + 512,
            [Some(first), Some(second.clone())],
            &mut found,
        );
        let base = 1 << 20;
        let expected = [
            base..base + 1024,
            base + 3584..base + 4608,
            base + 8192..base + 8704,
        ];
        assert_eq!(found, expected);
        let mut found = Vec::new();
        differing(base, 2 * BLOCK + 512, [None, Some(second)], &mut found);
        assert_eq!(found, expected);
        let mut found = Vec::new();
        differing(base, BLOCK, [None, Some(buffer())], &mut found);
        assert_eq!(found, []);
    }
}
