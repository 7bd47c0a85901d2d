//! Carries a range over from source to target: data as data, zeroes as zeroes, as much at
//! a time as one operation should.
//!
//! Not here: which range is next, who holds it meanwhile, and what a failure means.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Backend, InFlight, IoError, IoVec, Node, WriteFlags, ZeroFlags};

use super::plan::{Planner, Segment, SegmentKind};
use super::pool::BufferPool;

/// Bytes of zeroes that one operation writes: at first, and at most. It doubles as long
/// as they are written at once, and is halved when they take long, since somebody may wait
/// for the range.
const ZERO: (u64, u64) = (1 << 20, 64 << 20);
/// Time in which zeroes count as written at once, and from which on they take long.
const ZERO_TIME: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(20));
/// Extents that one operation asks for at most; what is left counts as data.
const MAX_EXTENTS: usize = 64;
/// Longest range that is read without asking for its extents.
const SHORT: u64 = 64 << 10;
/// Smallest unit in which zeroes are written as zeroes.
const MIN_ZERO_ALIGN: u64 = 4096;

/// Which side of the copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

/// A failed operation. Its range is dirty again.
#[derive(Clone, Debug)]
pub(crate) struct CopyError {
    pub(crate) side: Side,
    pub(crate) error: IoError,
}

/// What an operation did.
#[derive(Debug)]
pub(crate) struct Copied {
    /// The range that is done: from its start; what followed is dirty again. Empty if the
    /// operation gave way to a drained section.
    pub(crate) range: Range<u64>,
    /// Bytes that were moved, for the speed limit.
    pub(crate) charged: u64,
    /// The source has data from here to there, as far as it is known beyond the
    /// range; empty if nothing is.
    pub(crate) data: Range<u64>,
    /// All of the range read as zeroes, so it may pay to ask for more at once.
    pub(crate) was_zero: bool,
}

/// How an operation looks at its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Ask for extents; copy at most this many bytes of data.
    Probe { request: u64 },
    /// Known to be data: read it.
    Data,
    /// Short, and likely data: read it without asking, and look at the bytes.
    Short,
}

/// What became of runs that were to be copied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runs {
    /// So many from the first on are copied. Of the next one not all is data.
    Copied(usize),
    /// Not between these nodes, or it failed: one by one they are, or say why not.
    Impossible,
    /// Somebody drains a node, or nothing is to be begun any more.
    Held,
}

/// What holds for all of one job's operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Size of source and target in bytes.
    pub(crate) size: u64,
    /// What is done is told in whole units of this many bytes: a power of two.
    pub(crate) unit: u64,
    /// Zeroes may be unmapped on the target.
    pub(crate) unmap: bool,
    /// Zeroes have to be there on the target, and not only to be read: where nothing is
    /// allocated, something else may show one day.
    pub(crate) explicit_zeroes: bool,
    /// What the target shows of lower layers stays as it is while the job lasts: where
    /// it is zeroes, none need be written.
    pub(crate) layers_last: bool,
}

impl Rules {
    /// Whether the target has zeroes from the start of `range`, and how far that answer
    /// reaches: at least one byte. A target that cannot tell has data. The caller holds
    /// the range, so the answer stays true: nobody else writes the target there.
    pub(crate) async fn target_zeroes(
        &self,
        target: &Arc<Node>,
        range: &Range<u64>,
    ) -> (bool, u64) {
        let len = range.end - range.start;
        match target.chain_status(None, range.start, len).await {
            Ok(extent) => {
                let there = extent.depth > 0 || !self.explicit_zeroes;
                let lasts = self.layers_last || extent.depth == 1 || target.backing().is_none();
                (extent.zero && there && lasts, extent.len.clamp(1, len))
            }
            Err(_) => (false, len),
        }
    }
}

/// Why an operation stopped before its time.
enum Stop {
    /// Somebody drains a node, or nothing is to be begun any more.
    Held,
    Failed(CopyError),
}

impl From<CopyError> for Stop {
    fn from(error: CopyError) -> Self {
        Self::Failed(error)
    }
}

/// Carries ranges over. Home only.
pub(crate) struct Carrier {
    rules: Rules,
    pool: BufferPool,
    /// Nothing is to be begun any more.
    stopped: Cell<bool>,
    /// Called after each request that may have changed the target.
    written: Box<dyn Fn()>,
    /// Bytes of zeroes that one operation writes, in [`ZERO`].
    zeroes: Cell<u64>,
}

/// Right to use both nodes, for one operation.
///
/// It has its place at the target from beginning to end. Requests to the source count
/// one by one: a target that hangs holds up no drained section of the source.
pub(crate) struct Entered {
    source: Arc<Backend>,
    target: InFlight,
}

impl Entered {
    /// `None` while somebody drains one of the nodes. To be called before the operation
    /// holds anything that a section could need.
    pub(crate) fn enter(source: &Arc<Backend>, target: &Arc<Backend>) -> Option<Self> {
        if source.is_drained() {
            return None;
        }
        Some(Self {
            source: Arc::clone(source),
            target: enter(target)?,
        })
    }

    /// Counts a request to the source in.
    pub(crate) fn source(&self) -> Option<InFlight> {
        enter(&self.source)
    }

    /// The place at the target.
    pub(crate) fn target(&self) -> &InFlight {
        &self.target
    }
}

/// Counts a request in, unless the backend is drained: for users who are told of sections
/// and whose requests are only counted.
pub(crate) fn enter(backend: &Arc<Backend>) -> Option<InFlight> {
    let in_flight = backend.try_enter()?;
    // Counted before this look, as who drains looks at the count after it has begun: a
    // section sees the request, or is seen.
    (!backend.is_drained()).then_some(in_flight)
}

impl Carrier {
    pub(crate) fn new(rules: Rules, pool: BufferPool, written: impl Fn() + 'static) -> Self {
        Self {
            rules,
            pool,
            stopped: Cell::new(false),
            written: Box::new(written),
            zeroes: Cell::new(ZERO.0),
        }
    }

    /// Begins no more requests: operations end with what they have under way.
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
    }

    /// Whether nothing is to be begun any more.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    fn check_on(&self) -> Result<(), Stop> {
        match self.is_stopped() {
            true => Err(Stop::Held),
            false => Ok(()),
        }
    }

    /// Counts a request to the source in.
    fn source(&self, nodes: &Entered) -> Result<InFlight, Stop> {
        self.check_on()?;
        nodes.source().ok_or(Stop::Held)
    }

    /// The stock of buffers.
    pub(crate) fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// How to look at `range` when it was dirtied by the guest: short ranges are
    /// not worth a question.
    pub(crate) fn look_at_written(&self, range: &Range<u64>, request: u64) -> Look {
        let len = range.end - range.start;
        if len <= SHORT.min(self.pool.buffer_size() as u64) {
            Look::Short
        } else {
            Look::Probe { request }
        }
    }

    /// Carries `range` (whole units) over, or as much from its start as one operation
    /// should. The caller holds the range: nobody else writes the target there. `leave` is
    /// called with the end of what is carried as soon as that is known, if it is less: the
    /// rest need not be held any more.
    ///
    /// Cancel: what was being written to the target is undefined.
    pub(crate) async fn carry(
        &self,
        range: Range<u64>,
        look: Look,
        nodes: &Entered,
        leave: impl Fn(u64),
    ) -> Result<Copied, CopyError> {
        let start = range.start;
        let carried = match look {
            Look::Data => self.copy_data(range.clone(), nodes).await,
            Look::Short => self.copy_short(range.clone(), nodes).await,
            Look::Probe { request } => {
                match self.probe(range.clone(), request, nodes, leave).await {
                    Ok(copied) => return Ok(copied),
                    Err(stop) => Err(stop),
                }
            }
        };
        let (range, charged) = match carried {
            Ok(charged) => (range, charged),
            Err(Stop::Held) => (start..start, 0),
            Err(Stop::Failed(error)) => return Err(error),
        };
        Ok(Copied {
            range,
            charged,
            data: 0..0,
            was_zero: false,
        })
    }

    /// Copies short runs (whole units, in order and apart) from file to file, in one request, as
    /// far as the source has data in all of them, from the first one on.
    /// They are held as for [`carry`](Self::carry).
    ///
    /// Cancel: what was being written to the target is undefined.
    pub(crate) async fn copy_runs(&self, runs: &[Range<u64>], nodes: &Entered) -> Runs {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else {
            return Runs::Impossible;
        };
        let (start, len) = (first.start, last.end - first.start);
        let Ok(source) = self.source(nodes) else {
            return Runs::Held;
        };
        let Some(from) = source.file_range(start, len) else {
            return Runs::Impossible;
        };
        // How many are data, and where that of the last one ends.
        let (mut of_data, mut data_end) = (0, start);
        for run in runs {
            if run.start >= data_end {
                let left = last.end - run.start;
                match source.node().chain_status(None, run.start, left).await {
                    Ok(extent) if !extent.zero => data_end = run.start + extent.len,
                    Ok(_) | Err(_) => break,
                }
            }
            if run.end > data_end {
                break;
            }
            of_data += 1;
        }
        if of_data == 0 {
            return Runs::Copied(0);
        }
        if self.is_stopped() {
            return Runs::Held;
        }
        let of_span = |run: &Range<u64>| run.start - start..run.end - start;
        let from = from.only(runs.iter().take(of_data).map(of_span));
        let copied = nodes.target.copy_from(start, from).await;
        (self.written)();
        match copied {
            true => Runs::Copied(of_data),
            false => Runs::Impossible,
        }
    }

    /// Whether the source has zeroes from the start of `range`, and how far that answer
    /// reaches. A source that cannot tell has data, as far as `request`: reading it tells
    /// what is wrong.
    async fn source_zeroes(
        &self,
        range: &Range<u64>,
        request: u64,
        nodes: &Entered,
    ) -> Result<(bool, u64), Stop> {
        let source = self.source(nodes)?;
        let len = range.end - range.start;
        let extent = source.node().chain_status(None, range.start, len).await;
        Ok(match extent {
            Ok(extent) => (extent.zero, extent.len.clamp(1, len)),
            Err(_) => (false, len.min(request.max(1))),
        })
    }

    async fn probe(
        &self,
        range: Range<u64>,
        request: u64,
        nodes: &Entered,
        leave: impl Fn(u64),
    ) -> Result<Copied, Stop> {
        let request = request.max(self.rules.unit);
        let (first_zero, first_len) = self.source_zeroes(&range, request, nodes).await?;
        let first_end = range.start + first_len;
        if first_zero {
            let zeroes = self.round_in(&(range.start..first_end));
            if !zeroes.is_empty() {
                let range = self.zero_front(zeroes, nodes.target.node(), leave).await?;
                return Ok(Copied {
                    data: 0..0,
                    range,
                    charged: 0,
                    was_zero: true,
                });
            }
        }
        let end = range.end.min(range.start + request);
        if end < range.end {
            leave(end);
        }
        let range = range.start..end;
        let plan = self
            .plan(range.clone(), first_len, first_zero, nodes)
            .await?;
        let mut charged = 0;
        for Segment { range, kind } in plan {
            match kind {
                SegmentKind::Copy => charged += self.copy_data(range, nodes).await?,
                SegmentKind::Zero => self.zero_all(range, nodes.target.node()).await?,
            }
        }
        Ok(Copied {
            data: if first_zero || first_end <= end {
                0..0
            } else {
                end..first_end
            },
            range,
            charged,
            was_zero: false,
        })
    }

    /// Cuts `range`, whose first extent is known, into segments.
    async fn plan(
        &self,
        range: Range<u64>,
        first_len: u64,
        first_zero: bool,
        nodes: &Entered,
    ) -> Result<Vec<Segment>, Stop> {
        let align = u64::from(nodes.target.limits().zero_alignment)
            .max(MIN_ZERO_ALIGN)
            .next_power_of_two();
        let mut planner = Planner::new(range.start, align, self.rules.size);
        planner.push(first_len.min(range.end - range.start), first_zero);
        for _ in 1..MAX_EXTENTS {
            let left = planner.next()..range.end;
            if left.is_empty() {
                break;
            }
            let (zero, len) = self.source_zeroes(&left, u64::MAX, nodes).await?;
            planner.push(len, zero);
        }
        let left = range.end - planner.next();
        if left > 0 {
            planner.push(left, false);
        }
        Ok(planner.finish())
    }

    async fn copy_data(&self, range: Range<u64>, nodes: &Entered) -> Result<u64, Stop> {
        let len = range.end - range.start;
        if self.copy_files(range.clone(), nodes).await? {
            return Ok(len);
        }
        let buffer = self.pool.take();
        let mut offset = range.start;
        while offset < range.end {
            let len = (range.end - offset).min(self.pool.buffer_size() as u64);
            let iov = buffer.io_vec(len as usize);
            let source = self.source(nodes)?;
            source
                .read(offset, iov.clone())
                .await
                .map_err(source_error)?;
            drop(source);
            self.write_target(offset, iov, &nodes.target).await?;
            offset += len;
        }
        self.pool.give_back(buffer);
        Ok(len)
    }

    /// Copies `range` from file to file, where both nodes are no more than that. After a
    /// failure it is read and written, which says what failed.
    async fn copy_files(&self, range: Range<u64>, nodes: &Entered) -> Result<bool, Stop> {
        let len = range.end - range.start;
        let source = self.source(nodes)?;
        let Some(from) = source.file_range(range.start, len) else {
            return Ok(false);
        };
        let copied = nodes.target.copy_from(range.start, from).await;
        (self.written)();
        Ok(copied)
    }

    /// Copies a range that fits a buffer; zeroes go over as zeroes.
    async fn copy_short(&self, range: Range<u64>, nodes: &Entered) -> Result<u64, Stop> {
        let len = range.end - range.start;
        let buffer = self.pool.take();
        let iov = buffer.io_vec(len as usize);
        let source = self.source(nodes)?;
        source
            .read(range.start, iov.clone())
            .await
            .map_err(source_error)?;
        drop(source);
        if iov.is_zero() {
            // Or the pool would not take the buffer back.
            drop(iov);
            self.zero_all(range, nodes.target.node()).await?;
        } else {
            self.write_target(range.start, iov, &nodes.target).await?;
        }
        self.pool.give_back(buffer);
        Ok(len)
    }

    /// Makes whole chunks from the start of `range` read as zeroes on the target,
    /// and says which. What reads as zeroes already is left alone, however long.
    async fn zero_front(
        &self,
        range: Range<u64>,
        target: &Arc<Node>,
        leave: impl Fn(u64),
    ) -> Result<Range<u64>, Stop> {
        let (zero, len) = self.rules.target_zeroes(target, &range).await;
        if zero {
            let known = self.round_in(&(range.start..range.start + len));
            if !known.is_empty() {
                return Ok(known);
            }
        }
        let most = self.zeroes.get();
        let end = self
            .round_out(&(range.start..range.start + len.min(most)))
            .end
            .min(range.end);
        leave(end);
        let begun = Instant::now();
        self.write_zeroes(range.start..end, target).await?;
        self.zeroes
            .set(next_zeroes(most, end - range.start, begun.elapsed()));
        Ok(range.start..end)
    }

    /// Makes all of a short range read as zeroes on the target.
    async fn zero_all(&self, range: Range<u64>, target: &Arc<Node>) -> Result<(), Stop> {
        let (zero, len) = self.rules.target_zeroes(target, &range).await;
        if zero && len == range.end - range.start {
            return Ok(());
        }
        self.write_zeroes(range, target).await
    }

    async fn write_zeroes(&self, range: Range<u64>, target: &Node) -> Result<(), Stop> {
        self.check_on()?;
        let flags = ZeroFlags {
            may_unmap: self.rules.unmap,
            ..ZeroFlags::default()
        };
        let written = target
            .write_zeroes(range.start, range.end - range.start, flags)
            .await;
        (self.written)();
        Ok(written.map_err(target_error)?)
    }

    async fn write_target(&self, offset: u64, iov: IoVec, target: &InFlight) -> Result<(), Stop> {
        self.check_on()?;
        let written = target.write(offset, iov, WriteFlags::default()).await;
        (self.written)();
        Ok(written.map_err(target_error)?)
    }

    /// The range, widened to whole units (the last one ends with the disk).
    fn round_out(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start & !(self.rules.unit - 1);
        let end = range.end.checked_next_multiple_of(self.rules.unit);
        start..end.unwrap_or(self.rules.size).min(self.rules.size)
    }

    /// The whole units inside the range; empty if there are none.
    fn round_in(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.checked_next_multiple_of(self.rules.unit);
        let start = start.unwrap_or(self.rules.size).min(self.rules.size);
        let end = match range.end >= self.rules.size {
            true => self.rules.size,
            false => range.end & !(self.rules.unit - 1),
        };
        start..end.max(start)
    }
}

/// How many zeroes are written at once after `len` bytes of them, of at most `most`, took
/// so long.
fn next_zeroes(most: u64, len: u64, took: Duration) -> u64 {
    if took >= ZERO_TIME.1 {
        return (most / 2).max(ZERO.0);
    }
    match took < ZERO_TIME.0 && len >= most {
        true => (most * 2).min(ZERO.1),
        false => most,
    }
}

fn source_error(error: IoError) -> CopyError {
    CopyError {
        side: Side::Source,
        error,
    }
}

fn target_error(error: IoError) -> CopyError {
    CopyError {
        side: Side::Target,
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_written_in_as_large_pieces_as_the_target_takes_at_once() {
        let mut most = ZERO.0;
        for _ in 0..10 {
            most = next_zeroes(most, most, Duration::ZERO);
        }
        assert_eq!(most, ZERO.1);
        assert_eq!(next_zeroes(most, most - 1, Duration::ZERO), most);
        for _ in 0..10 {
            most = next_zeroes(most, 512, ZERO_TIME.1);
        }
        assert_eq!(most, ZERO.0);
        assert_eq!(
            next_zeroes(most, 512, Duration::ZERO),
            most,
            "not by a short one"
        );
    }
}
