//! Whether what was read is a difference, or was written while it was read.
//!
//! The guest is held here, for the time that its requests in flight take to end; only
//! for what it writes all the time also for the time of a few small reads.

use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Backend, Drained, Graph, GraphError, runtime};
use futures_util::future::{Either, LocalBoxFuture, select};

use crate::JobFailure;
use crate::pair::{ActivePair, is_dirty_in};

use super::body::{Body, MAX_REQUEST};
use super::look::{Looked, Stop, push};

/// How often a candidate is looked at.
const TRIES: u32 = 14;
/// Tries after which candidates are read while requests are held.
const TRIES_BESIDE: u32 = 3;
/// First and longest wait between two tries; doubles.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(320));
/// Longest that requests are held because some of them do not end.
const HOLD_LIMIT: Duration = Duration::from_millis(100);
/// Longest that candidates are read while requests are held: at first, and how often it
/// doubles; and most bytes of them.
const HELD_TIME: Duration = Duration::from_millis(10);
const HELD_DOUBLINGS: u32 = 2;
const HELD_BYTES: u64 = 256 << 10;
/// Bytes of one such read: what was read in time need not be read again.
const HELD_PIECE: u64 = 64 << 10;
/// Wait for a mirror that copies a candidate while requests are held.
const LAG: Duration = Duration::from_millis(1);

/// All requests to both nodes are held, but for those of this job and of the mirror.
struct Held {
    _sections: [Drained; 2],
    pair: Option<ActivePair>,
}

/// Candidates on their way to being settled: in order, without overlaps.
#[derive(Default)]
struct Settled {
    differ: Vec<Range<u64>>,
    open: Vec<Range<u64>>,
}

impl Body<'_> {
    /// Settles candidates, and counts those that are differences. Nothing may be in
    /// flight.
    ///
    /// Interrupted by a pause or a cancel, the candidates are looked at again later.
    pub(super) async fn settle(&mut self) {
        let mut settled = Settled {
            differ: Vec::new(),
            open: self.take_batch(),
        };
        let mut pause = PAUSE.0;
        for attempt in 0..TRIES {
            if attempt > 0 && !settled.open.is_empty() {
                self.ctx.sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                self.leave_out(&mut settled.open);
                self.read_again(&mut settled.open).await;
            }
            if settled.open.is_empty() || self.has_to_end() {
                break;
            }
            match self.hold().await {
                Ok(Some(held)) => {
                    // All that was written is in the bitmap by now.
                    self.leave_out(&mut settled.open);
                    self.check_recording();
                    if self.has_to_end() {
                        break;
                    }
                    self.sort_out(&held, &mut settled);
                    if let Some(doublings) = attempt.checked_sub(TRIES_BESIDE) {
                        let limit = HELD_TIME * (1 << doublings.min(HELD_DOUBLINGS));
                        self.read_held(&held, limit, &mut settled).await;
                    }
                }
                // Requests of the guest hang: those that do not are to go on.
                Ok(None) => {}
                Err(failure) => self.failure = Some(failure),
            }
        }
        if self.has_to_end() {
            return;
        }
        self.leave_out(&mut settled.open);
        for range in &settled.open {
            tracing::info!(
                job = self.ctx.id(),
                start = range.start,
                end = range.end,
                "compare: not decided, since it is written all the time"
            );
        }
        self.undecided(settled.open);
        settled.differ.sort_by_key(|range| range.start);
        for range in settled.differ {
            self.tally.add(range);
        }
        self.show();
    }

    /// Fails if the bitmap may lack something that was written.
    fn check_recording(&mut self) {
        if let Some(skip) = self.skip.as_ref().filter(|skip| !skip.is_recording()) {
            let failure = JobFailure::new(
                libc::ECANCELED,
                format!(
                    "Bitmap '{}' has stopped recording: what was written since is not known",
                    skip.name()
                ),
            );
            self.failure.get_or_insert(failure);
        }
    }

    /// Decides by what was written since the candidates were read.
    fn sort_out(&self, held: &Held, settled: &mut Settled) {
        let chunk = self.places[0].written.granularity();
        let mut open = Vec::new();
        for range in std::mem::take(&mut settled.open) {
            if self.is_quiet(held, &range) {
                settled.differ.push(range);
                continue;
            }
            let mut at = range.start;
            while at < range.end {
                let end = (at / chunk + 1).saturating_mul(chunk).min(range.end);
                let into = match self.is_quiet(held, &(at..end)) {
                    true => &mut settled.differ,
                    false => &mut open,
                };
                push(into, at..end);
                at = end;
            }
        }
        settled.open = open;
    }

    /// Whether nothing can have changed in a range since it was last read.
    fn is_quiet(&self, held: &Held, range: &Range<u64>) -> bool {
        // The mirror first: what it has done by now is in the bitmaps by now.
        let is_behind = held
            .pair
            .as_ref()
            .is_some_and(|active| active.pair.lag.is_behind(range));
        !is_behind
            && !self
                .places
                .iter()
                .any(|place| is_dirty_in(&place.written, range))
    }

    /// Reads candidates again beside everything else, and leaves those that still
    /// differ.
    async fn read_again(&mut self, open: &mut Vec<Range<u64>>) {
        for place in self.places {
            let bitmap = &place.written;
            let chunk = bitmap.granularity();
            for range in open.iter() {
                // Whole chunks: a bitmap keeps what is cleared in part. All candidates
                // in them are read after this.
                let start = range.start / chunk * chunk;
                bitmap.clear(start, (range.end - start).next_multiple_of(chunk));
            }
        }
        let mut left = Vec::new();
        for range in std::mem::take(open) {
            let mut at = range.start;
            while at < range.end {
                if self.has_to_end() {
                    return;
                }
                self.ctx.pause_point().await;
                let looked = self.look(at..range.end);
                let ends = || self.ctx.is_force_cancelled();
                let looked = match self.ctx.wait_unless(looked, ends).await {
                    Ok(looked) => looked,
                    Err(rest) => {
                        self.leave(rest);
                        return;
                    }
                };
                self.ctx.notifier().charge(looked.charged);
                at = looked.end;
                self.take_in(looked, &mut at, &mut left).await;
            }
        }
        *open = left;
    }

    /// Reads from the start of a candidate.
    fn look(&self, range: Range<u64>) -> LocalBoxFuture<'static, Looked> {
        let reader = Rc::clone(&self.reader);
        let request = (range.end - range.start).min(MAX_REQUEST);
        Box::pin(async move { reader.look(range, request).await })
    }

    /// Stops waiting for a read: it ends by itself, and counts until then.
    fn leave(&self, rest: LocalBoxFuture<'static, Looked>) {
        self.ctx.leave_behind(async move {
            rest.await;
        });
    }

    /// Takes what was found in a candidate that was read again.
    async fn take_in(&mut self, looked: Looked, at: &mut u64, left: &mut Vec<Range<u64>>) {
        for range in looked.differing {
            push(left, range);
        }
        match looked.stop {
            None => {}
            Some(Stop::Drained) => runtime::sleep(LAG).await,
            Some(Stop::Moved) => self.moved(),
            Some(Stop::Failed { side, range, error }) => {
                let again = self.read_failed(side, &error);
                if !again {
                    *at = range.end;
                    self.undecided([range]);
                }
            }
        }
    }

    /// Reads a little of what is left while requests are held, for a moment.
    async fn read_held(&mut self, held: &Held, limit: Duration, settled: &mut Settled) {
        let until = Instant::now() + limit;
        let mut room = HELD_BYTES;
        let mut open = std::mem::take(&mut settled.open).into_iter();
        let mut left = Vec::new();
        for range in open.by_ref() {
            let mut at = range.start;
            while at < range.end && room > 0 && Instant::now() < until {
                let piece = at..range.end.min(at + HELD_PIECE.min(room));
                at = piece.end;
                room -= piece.end - piece.start;
                match self.read_one_held(held, &piece, until).await {
                    Some(looked) if looked.stop.is_none() && looked.end == piece.end => {
                        settled.differ.extend(looked.differing);
                    }
                    _ => push(&mut left, piece),
                }
            }
            if at < range.end {
                push(&mut left, at..range.end);
                break;
            }
        }
        left.extend(open);
        settled.open = left;
    }

    /// `None`: the mirror or the storage takes longer.
    async fn read_one_held(
        &self,
        held: &Held,
        range: &Range<u64>,
        until: Instant,
    ) -> Option<Looked> {
        if let Some(active) = &held.pair {
            while active.pair.lag.is_behind(range) {
                if Instant::now() >= until {
                    return None;
                }
                active.notifier.notify();
                runtime::sleep(LAG).await;
            }
        }
        let timer = pin!(runtime::sleep_until(until));
        match select(self.look(range.clone()), timer).await {
            Either::Left((looked, _)) => Some(looked),
            Either::Right((_, rest)) => {
                self.leave(rest);
                None
            }
        }
    }

    /// Holds all requests to both nodes, but for those of this job and of the mirror
    /// between them. `None`: some of them did not end soon.
    ///
    /// Errors: the mirror has ended; main has gone.
    async fn hold(&self) -> Result<Option<Held>, JobFailure> {
        let [first, second] = self.places;
        let ids = [first.data.id(), second.data.id()];
        let mut pairs = self.ctx.pairs().into_iter();
        let pair = pairs.find(|active| active.pair.joins(ids));
        let mut except: Vec<Arc<Backend>> = vec![first.backend.clone(), second.backend.clone()];
        if let Some(active) = &pair {
            except.extend(active.pair.backends.iter().cloned());
        }
        let nodes = [Arc::clone(&first.node), Arc::clone(&second.node)];
        let sections = self.ctx.graph().run(move |graph: Rc<Graph>| {
            Box::pin(async move {
                let except: Vec<&Arc<Backend>> = except.iter().collect();
                let [first, second] = &nodes;
                let first = graph.drain_within(first, &except, HOLD_LIMIT).await?;
                let second = graph.drain_within(second, &except, HOLD_LIMIT).await?;
                Ok::<_, GraphError>([first, second])
            })
        });
        let sections = match sections.await.and_then(|sections| sections) {
            Ok(sections) => sections,
            Err(error @ GraphError::DrainTimeout { .. }) => {
                tracing::warn!(job = self.ctx.id(), %error, "compare: requests could not be held");
                return Ok(None);
            }
            Err(error) => {
                return Err(JobFailure::new(
                    libc::ECANCELED,
                    format!("Cannot hold the requests to the nodes: {error}"),
                ));
            }
        };
        let is_mirrored = pair
            .as_ref()
            .is_some_and(|active| active.pair.lag.is_engaged());
        if self.driver.settings().is_mirrored && !is_mirrored {
            return Err(JobFailure::new(
                libc::ECANCELED,
                format!(
                    "The mirror between nodes '{}' and '{}' ended before they were compared",
                    first.node.name(),
                    second.node.name()
                ),
            ));
        }
        Ok(Some(Held {
            _sections: sections,
            pair,
        }))
    }
}
