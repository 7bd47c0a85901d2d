//! The job's body: which range is read next, and how many at a time.
//!
//! One task on the job's home. Operations (`look`) run inside it, side by side; when
//! candidates have gathered they are settled (`settle`) with none under way.

use std::cmp::Reverse;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::runtime;
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::copying::{BufferPool, INTERVAL, Pace, window_of_speed};
use crate::{Backoff, ErrorAction, IoSide, JobContext, JobFailure, SLICE};

use super::driver::{CompareDriver, Place};
use super::look::{Looked, Reader, Side, Stop};
use super::result::Tally;
use super::skip::{Piece, Skip};

/// Most operations in flight; each has a request to each node.
const OPERATIONS: usize = 4;
/// Largest request.
pub(super) const MAX_REQUEST: u64 = 512 << 10;
/// Smallest request, under a speed limit or while the guest is active.
const MIN_REQUEST: u64 = 64 << 10;
/// Most bytes that one operation looks at, when all before were zeroes.
const MAX_LEAP: u64 = 1 << 30;
/// Bytes that are read after a candidate before candidates are settled, and time: so
/// that they stay few, and requests are not held often.
const BATCH: u64 = 16 << 20;
const BATCH_TIME: Duration = Duration::from_secs(1);
/// Wait while somebody drains a node.
const BUSY: Duration = Duration::from_millis(1);

/// A window in which all operations have requests of this size.
const fn share(request: u64) -> u64 {
    request * OPERATIONS as u64
}

/// Size of a request under this window: several fit in it, so that the guest never waits
/// for a long one.
fn request_size(window: u64) -> u64 {
    let request = (window / OPERATIONS as u64).clamp(MIN_REQUEST, MAX_REQUEST);
    request / MIN_REQUEST * MIN_REQUEST
}

struct Done {
    range: Range<u64>,
    looked: Looked,
}

/// Candidates that wait to be settled.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) candidates: Vec<Range<u64>>,
    read: u64,
    since: Option<Instant>,
}

/// State of the body. Home only.
pub(super) struct Body<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) driver: &'a CompareDriver,
    pub(super) places: &'a [Place; 2],
    pub(super) reader: Rc<Reader>,
    /// What is not to be compared.
    pub(super) skip: Option<Skip>,
    operations: FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>,
    /// What is still to be read, lowest last.
    todo: Vec<Range<u64>>,
    pub(super) batch: Batch,
    pub(super) tally: Tally,
    /// How much to look at at once where extents are not known.
    leap: u64,
    pace: Pace,
    /// Bytes started since the last rest.
    since_rest: u64,
    /// Nothing is started before this instant (rest, failure, somebody's section).
    not_before: Option<Instant>,
    backoff: Backoff,
    pub(super) failure: Option<JobFailure>,
}

impl<'a> Body<'a> {
    pub(super) fn new(
        ctx: &'a JobContext,
        driver: &'a CompareDriver,
        places: &'a [Place; 2],
    ) -> Self {
        let side = |place: &Place| Side {
            backend: place.backend.clone(),
            node: place.node.id(),
            size: place.node.size(),
        };
        let pool = BufferPool::new(MAX_REQUEST as usize, 2 * OPERATIONS);
        let reader = Reader::new([side(&places[0]), side(&places[1])], pool);
        let whole = 0..reader.size();
        let skip = driver.skip();
        let mut tally = Tally::new(driver.settings().max_differences);
        tally.found.skipped_bytes = skip.as_ref().map(|_| 0);
        Self {
            ctx,
            driver,
            places,
            reader: Rc::new(reader),
            skip,
            operations: FuturesUnordered::new(),
            todo: Vec::from_iter((!whole.is_empty()).then_some(whole)),
            batch: Batch::default(),
            tally,
            leap: MAX_REQUEST,
            pace: Pace::new(share(MIN_REQUEST), share(MAX_REQUEST), Instant::now()),
            since_rest: 0,
            not_before: None,
            backoff: Backoff::new(),
            failure: None,
        }
    }

    /// Runs until all is compared, or the job is cancelled or has failed.
    pub(super) async fn run(mut self) -> Result<(), JobFailure> {
        self.ctx.progress().set_remaining(self.reader.size());
        loop {
            if self.ctx.is_force_cancelled() {
                self.leave_operations();
                return Ok(());
            }
            if let Some(failure) = self.failure.take() {
                // Whatever they find: a read that hangs keeps no failure.
                self.leave_operations();
                return Err(failure);
            }
            if self.ctx.is_pause_requested() {
                self.quiesce().await;
                if !self.has_to_end() {
                    self.reader.shrink();
                    self.ctx.pause_point().await;
                }
                continue;
            }
            let all_begun = self.todo.is_empty();
            if all_begun || self.wants_to_settle() {
                self.quiesce().await;
                if self.has_to_end() || self.ctx.is_pause_requested() {
                    continue;
                }
                if !self.batch.candidates.is_empty() {
                    self.settle().await;
                    continue;
                }
                if self.todo.is_empty() {
                    break;
                }
            }
            self.adapt();
            let wait = self.start_operations();
            if self.operations.is_empty() {
                self.ctx.sleep(wait).await;
            } else {
                self.wait_for_operation(wait).await;
            }
        }
        self.finish()
    }

    fn finish(mut self) -> Result<(), JobFailure> {
        self.tally.found.is_complete = true;
        self.show();
        let found = &self.tally.found;
        match found.undecided_bytes {
            0 => Ok(()),
            bytes => Err(JobFailure::new(
                libc::EAGAIN,
                format!(
                    "{bytes} bytes could not be compared: they cannot be read, or were written \
                     all the time; {} bytes of the rest differ",
                    found.differing_bytes
                ),
            )),
        }
    }

    fn wants_to_settle(&self) -> bool {
        let batch = &self.batch;
        batch
            .since
            .is_some_and(|since| batch.read >= BATCH || since.elapsed() >= BATCH_TIME)
    }

    /// For the next queries.
    pub(super) fn show(&self) {
        self.driver.show(self.tally.found.clone());
    }

    /// Whether the body is to return, with what is in flight left to itself.
    pub(super) fn has_to_end(&self) -> bool {
        self.failure.is_some() || self.ctx.is_force_cancelled()
    }

    /// Waits until nothing is in flight, or the body has to end.
    async fn quiesce(&mut self) {
        while !self.operations.is_empty() && !self.has_to_end() {
            self.wait_for_operation(SLICE).await;
        }
    }

    /// Stops waiting for what is in flight: it ends by itself, and counts until then.
    fn leave_operations(&mut self) {
        self.reader.stop();
        let mut operations = std::mem::take(&mut self.operations);
        if !operations.is_empty() {
            self.ctx
                .leave_behind(async move { while operations.next().await.is_some() {} });
        }
    }

    /// Lets the controller look at the guest, if it is time to.
    fn adapt(&mut self) {
        let now = Instant::now();
        if self.pace.is_due(now) && !self.pace.is_settling(!self.operations.is_empty(), now) {
            self.pace.decide(self.driver.felt(), now);
        }
    }

    /// Starts what may be started; gives the time after which there may be more to
    /// start even if nothing ends.
    fn start_operations(&mut self) -> Duration {
        loop {
            let now = Instant::now();
            if let Some(left) = self.not_before.map(|at| at.saturating_duration_since(now))
                && !left.is_zero()
            {
                return left.min(SLICE);
            }
            if self.pace.is_calm() {
                return INTERVAL;
            }
            let limited = self.ctx.throttle_wait();
            if !limited.is_zero() {
                return limited.min(SLICE);
            }
            let window = self.pace.window();
            let window = window.min(window_of_speed(self.ctx.speed(), MIN_REQUEST));
            let request = request_size(window);
            if self.operations.len() as u64 >= (window / request).min(OPERATIONS as u64) {
                return SLICE;
            }
            let Some(range) = self.next_range(request) else {
                return SLICE;
            };
            let reader = Rc::clone(&self.reader);
            self.operations.push(Box::pin(async move {
                let looked = reader.look(range.clone(), request).await;
                Done { range, looked }
            }));
            self.since_rest += request;
            let rest = self.pace.rest();
            if self.since_rest >= self.pace.floor() {
                self.since_rest = 0;
                if !rest.is_zero() {
                    self.not_before = Some(Instant::now() + rest);
                }
            }
        }
    }

    /// Takes the lowest range that is to be read.
    fn next_range(&mut self, request: u64) -> Option<Range<u64>> {
        loop {
            let range = self.todo.pop()?;
            let most = self.leap.max(request);
            let piece = match &self.skip {
                Some(skip) => skip.first_piece(&range, most),
                None => Piece::Read(range.start..range.end.min(range.start.saturating_add(most))),
            };
            let (Piece::Read(taken) | Piece::LeaveOut(taken)) = &piece;
            let rest = taken.end..range.end;
            if !rest.is_empty() {
                self.todo.push(rest);
            }
            match piece {
                Piece::Read(taken) => return Some(taken),
                Piece::LeaveOut(taken) => {
                    let len = taken.end - taken.start;
                    self.tally.skipped(len);
                    self.ctx.progress().add_done(len);
                }
            }
        }
    }

    fn put_back(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.todo.push(range);
            self.todo.sort_by_key(|range| Reverse(range.start));
        }
    }

    async fn wait_for_operation(&mut self, wait: Duration) {
        let timer = pin!(runtime::sleep(wait.min(SLICE)));
        let kicked = pin!(self.ctx.kicked());
        let done = match select(self.operations.next(), select(timer, kicked)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => None,
        };
        if let Some(done) = done {
            self.ended(done);
        }
    }

    fn ended(&mut self, done: Done) {
        let Done { range, mut looked } = done;
        self.leave_out_of(&(range.start..looked.end), &mut looked.differing);
        self.ctx.progress().add_done(looked.end - range.start);
        self.ctx.notifier().charge(looked.charged);
        if self.batch.since.is_some() {
            self.batch.read += looked.charged;
        } else if !looked.differing.is_empty() {
            self.batch.since = Some(Instant::now());
            self.batch.read = 0;
        }
        self.batch.candidates.extend(looked.differing);
        if !looked.was_zero {
            self.leap = MAX_REQUEST;
        } else if looked.end == range.end {
            self.leap = self.leap.saturating_mul(2).min(MAX_LEAP);
        }
        let rest = looked.end..range.end;
        match looked.stop {
            None => {
                if looked.end > range.start {
                    self.backoff.reset();
                }
                self.put_back(rest);
            }
            Some(Stop::Drained) => {
                self.put_back(rest);
                self.not_before = Some(Instant::now() + BUSY);
            }
            Some(Stop::Failed { side, range, error }) => {
                if self.read_failed(side, &error) {
                    self.put_back(rest);
                } else {
                    // The user does not mind: the rest is compared all the same.
                    self.undecided([range.clone()]);
                    self.ctx.progress().add_done(range.end - range.start);
                    self.put_back(range.end..rest.end);
                    self.show();
                }
            }
            Some(Stop::Moved) => {
                self.put_back(rest);
                self.moved();
            }
        }
    }

    /// Leaves out of what differs in a range that was read what is not to be compared.
    fn leave_out_of(&mut self, read: &Range<u64>, differing: &mut Vec<Range<u64>>) {
        if self.skip.is_some() {
            // What becomes dirty after this is left out when candidates are settled.
            let mut compared = Vec::from_iter((!read.is_empty()).then(|| read.clone()));
            self.leave_out(&mut compared);
            *differing = overlaps(differing, &compared);
        }
    }

    /// Counts what cannot be compared, in order; but for what is not to be.
    pub(super) fn undecided(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) {
        let mut ranges = Vec::from_iter(ranges);
        self.leave_out(&mut ranges);
        let lengths = ranges.iter().map(|range| range.end - range.start);
        self.tally.found.undecided_bytes += lengths.sum::<u64>();
    }

    /// Leaves out what is not to be compared, as it is known by now.
    pub(super) fn leave_out(&mut self, ranges: &mut Vec<Range<u64>>) {
        if let Some(skip) = &self.skip {
            self.tally.skipped(skip.leave_out(ranges));
        }
    }

    /// A node is not where it was: what is there now is not what was to be compared.
    pub(super) fn moved(&mut self) {
        self.failure.get_or_insert_with(|| {
            let [first, second] = self.places;
            JobFailure::new(
                libc::ECANCELED,
                format!(
                    "Another node has taken the place of node '{}' or '{}' before they were \
                     compared",
                    first.node.name(),
                    second.node.name()
                ),
            )
        });
    }

    /// A read failed: acts as the policy of its side says. `true`: the range is to be
    /// read again, some time.
    pub(super) fn read_failed(&mut self, side: usize, error: &block::IoError) -> bool {
        if self.failure.is_some() {
            return true;
        }
        let policy = self.driver.settings().on_error[side];
        let action = self.ctx.io_failed(IoSide::Read, error.errno, policy);
        tracing::warn!(job = self.ctx.id(), %error, action = action.name(), "compare: a read failed");
        match action {
            ErrorAction::Report => {
                self.failure = Some(JobFailure::from(error));
                true
            }
            ErrorAction::Stop => {
                self.not_before = Some(Instant::now() + self.backoff.failed());
                true
            }
            ErrorAction::Ignore => false,
        }
    }

    /// The candidates below everything that is still to be read, in order, so that they
    /// can be counted; the others wait.
    pub(super) fn take_batch(&mut self) -> Vec<Range<u64>> {
        let mut candidates = std::mem::take(&mut self.batch).candidates;
        candidates.sort_by_key(|range| range.start);
        // Whole chunks of the bitmaps, since their bits are cleared.
        let chunk = self.places[0].written.granularity();
        let end = self.todo.last().map_or(u64::MAX, |range| range.start) / chunk * chunk;
        let mut below = Vec::new();
        for range in candidates {
            let cut = end.clamp(range.start, range.end);
            if range.start < cut {
                below.push(range.start..cut);
            }
            if cut < range.end {
                self.batch.candidates.push(cut..range.end);
                self.batch.since.get_or_insert_with(Instant::now);
            }
        }
        below
    }
}

/// What two lists of ranges have in common; both are in order.
fn overlaps(first: &[Range<u64>], second: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut common = Vec::new();
    let (mut first, mut second) = (first.iter().peekable(), second.iter().peekable());
    while let (Some(one), Some(other)) = (first.peek(), second.peek()) {
        let (start, end) = (one.start.max(other.start), one.end.min(other.end));
        if start < end {
            common.push(start..end);
        }
        match one.end <= other.end {
            true => first.next(),
            false => second.next(),
        };
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_lists_have_in_common_is_found() {
        let first = [0..10, 20..30, 40..41];
        let second = [5..22, 24..26, 29..100];
        assert_eq!(
            overlaps(&first, &second),
            [5..10, 20..22, 24..26, 29..30, 40..41]
        );
        assert_eq!(overlaps(&first, &[]), []);
        assert_eq!(overlaps(&[], &second), []);
    }

    #[test]
    fn requests_are_small_while_little_may_be_in_flight_and_are_whole_pieces() {
        assert_eq!(request_size(1), MIN_REQUEST);
        assert_eq!(request_size(share(MIN_REQUEST) + 4096), MIN_REQUEST);
        assert_eq!(request_size(share(MAX_REQUEST)), MAX_REQUEST);
        assert_eq!(request_size(u64::MAX), MAX_REQUEST);
        for window in (0..share(MAX_REQUEST)).step_by(12_345) {
            let request = request_size(window);
            assert!(request.is_multiple_of(MIN_REQUEST) && request <= MAX_REQUEST);
        }
    }
}
