//! The copier's operations: which range is next, how many at a time, and what came of
//! them.
//!
//! Not here: one operation by itself (`copy`), and those of drained sections (`sweep`).

use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use block::{CancelReach, runtime};
use futures_util::future::{Either, LocalBoxFuture, join3, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::copying::{Copied, CopyError, Entered, INTERVAL, Look, PATIENCE, window_of_speed};
use crate::{CopyMode, JobContext, JobNotifier, SLICE};

use super::body::Body;
use super::sweep::Sweep;

/// Smallest request while the guest is active (the granularity may be larger).
const MIN_REQUEST: u64 = 256 << 10;
/// What a short request takes, as bytes of a long one.
const LEAST_EFFORT: u64 = 32 << 10;
/// Longest range that is read without asking for its extents in the first pass, which
/// finds holes.
const SHORT_AT_FIRST: u64 = 16 << 10;
/// Most bytes that one operation looks at, when all before were zeroes.
const MAX_LEAP: u64 = 1 << 30;

/// Those in flight.
pub(super) type Operations = FuturesUnordered<LocalBoxFuture<'static, Done>>;

/// An operation in flight.
pub(super) struct Done {
    range: Range<u64>,
    /// What it counts for in the window.
    cost: u64,
    began: Instant,
    result: Result<Copied, CopyError>,
}

impl Body<'_> {
    /// Lets the controller look at the guest, if it is time to.
    pub(super) fn adapt(&mut self) {
        let now = Instant::now();
        if self.pace.is_due(now) {
            self.pace
                .set_gentle(self.state.copy_mode() == CopyMode::WriteBlocking);
            self.pace.decide(self.state.latency.take(), now);
        }
    }

    /// Starts what may be started; gives the time after which there may be more
    /// to start even if nothing ends, at most a slice.
    pub(super) fn start_operations(&mut self) -> Duration {
        loop {
            if let Some(left) = self.wait_left() {
                return left.min(SLICE);
            }
            if self.pace.is_calm() {
                return INTERVAL;
            }
            if self.operations.len() >= self.max_operations {
                return SLICE;
            }
            let limited = self.ctx.throttle_wait();
            if !limited.is_zero() {
                return limited.min(SLICE);
            }
            let window = self.pace.window();
            let request = self.request_size(window);
            let Some((range, look)) = self.next_range(request) else {
                return SLICE;
            };
            let cost = (range.end - range.start).min(request);
            let window = window.min(window_of_speed(self.ctx.speed(), request));
            if self.window_used > 0 && self.window_used + cost > window {
                return SLICE;
            }
            let Some(nodes) = self.copier.enter() else {
                // Somebody drains a node; the job is about to be paused.
                return Duration::from_millis(1);
            };
            self.cursor = range.end;
            self.start(range, look, cost, nodes);
            self.since_rest += cost.max(LEAST_EFFORT);
            if self.since_rest >= self.pace.floor() {
                self.since_rest = 0;
                let rest = self.pace.rest();
                if !rest.is_zero() {
                    self.not_before = Some(Instant::now() + rest);
                }
            }
        }
    }

    fn start(&mut self, range: Range<u64>, look: Look, cost: u64, nodes: Entered) {
        let len = range.end - range.start;
        self.window_used += cost;
        self.in_flight += len;
        let began = Instant::now();
        let operation = self.copier.copy(range.clone(), look, nodes);
        self.operations.push(Box::pin(async move {
            Done {
                range,
                cost,
                began,
                result: operation.await,
            }
        }));
    }

    /// Size of a request under this window: several fit in it, so that the guest
    /// never waits for a long one.
    fn request_size(&self, window: u64) -> u64 {
        let most = self.copier.pool().buffer_size() as u64;
        (window / 4)
            .clamp(MIN_REQUEST.min(most), most)
            .max(self.state.granularity)
            / self.state.granularity
            * self.state.granularity
    }

    /// The next dirty range from the cursor on, and how to look at it.
    fn next_range(&mut self, request: u64) -> Option<(Range<u64>, Look)> {
        if self.state.zeroed() != self.zeroed_seen {
            self.zeroed_seen = self.state.zeroed();
            self.data = 0..0;
        }
        let reach = self.leap.max(request);
        let mut range = match self.state.dirty.next_dirty_area(self.cursor, reach) {
            Some(range) => range,
            None => {
                self.pass_ended();
                self.state.dirty.next_dirty_area(0, reach)?
            }
        };
        let data = if self.data.contains(&range.start) {
            let until = self.state.round_in(&(0..self.data.end)).end;
            (until > range.start).then_some(until)
        } else {
            None
        };
        let look = match data {
            Some(until) => {
                range.end = range.end.min(until).min(range.start + request);
                Look::Data
            }
            // Before the first pass has ended, a range may be all sorts.
            None if self.passes == 0 && !self.ready && range.end - range.start > SHORT_AT_FIRST => {
                Look::Probe { request }
            }
            None => self.copier.look_at_written(&range, request),
        };
        Some((range, look))
    }

    /// The scan has come to the end of the disk.
    fn pass_ended(&mut self) {
        self.cursor = 0;
        self.data = 0..0;
        if self.pass_began_with > 0 {
            let dirty = self.state.dirty.count_bytes();
            self.passes = self.passes.saturating_add(1);
            if !std::mem::take(&mut self.failed_in_pass) {
                self.retry.went_well();
            }
            if !self.ready || self.should_end() {
                self.pace.pass_ended(self.pass_began_with, dirty);
                self.tell_of_pass(dirty);
            }
        }
        self.pass_began_with = self.state.dirty.count_bytes();
    }

    fn tell_of_pass(&mut self, dirty: u64) {
        tracing::debug!(
            job = self.ctx.id(),
            passes = self.passes,
            dirty,
            pressure = self.pace.pressure(),
            window = self.pace.window(),
            rest_us = self.pace.rest().as_micros() as u64,
            "mirror: pass ended"
        );
        if self.pace.is_at_full_pressure() && !self.told {
            self.told = true;
            tracing::warn!(
                job = self.ctx.id(),
                dirty,
                "mirror: the guest writes faster than can be copied; switch to copy mode \
                 write-blocking with block-job-change"
            );
        }
    }

    pub(super) async fn wait_for_operation(&mut self, wait: Duration) {
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

    /// The target does not hang.
    pub(super) fn has_answered(&mut self) {
        self.hung = false;
        self.last_ended = Instant::now();
    }

    fn ended(&mut self, done: Done) {
        self.has_answered();
        self.window_used -= done.cost;
        self.in_flight -= done.range.end - done.range.start;
        match done.result {
            Ok(copied) => {
                account(self.ctx, &self.notifier, &copied);
                if copied.range.end < done.range.end {
                    self.cursor = self.cursor.min(copied.range.end);
                }
                if copied.was_zero && copied.range == done.range {
                    self.leap = self.leap.saturating_mul(2).min(MAX_LEAP);
                } else if !copied.was_zero {
                    self.leap = self.copier.pool().buffer_size() as u64;
                }
                if copied.data.end > self.data.end {
                    self.data = copied.data;
                }
            }
            Err(CopyError { side, error }) => self.failed(side, &error, done.began),
        }
    }

    /// Waits until nothing is in flight, a flush included; or the body has to end.
    pub(super) async fn quiesce(&mut self) {
        self.last_ended = Instant::now();
        while !self.is_quiet() && !self.has_to_end() {
            self.wait_for_any(SLICE).await;
            self.watch_over();
            self.look_for_hang();
        }
    }

    /// Whether nothing is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        self.operations.is_empty() && self.rest.is_idle() && self.left_step.is_none()
    }

    /// Waits for something in flight to end, at most `wait`, or until the job is kicked.
    async fn wait_for_any(&mut self, wait: Duration) {
        let ended = {
            let timer = pin!(runtime::sleep(wait));
            let kicked = pin!(self.ctx.kicked());
            let any = next_ended(&mut self.operations, &mut self.rest, &mut self.left_step);
            match select(pin!(any), select(timer, kicked)).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => None,
            }
        };
        match ended {
            Some(Ended::Operation(done)) => self.ended(done),
            Some(Ended::Rest(Ok(Some(copied)))) => {
                self.has_answered();
                account(self.ctx, &self.notifier, &copied);
            }
            Some(Ended::Rest(Err(CopyError { side, error }))) => {
                self.failed(side, &error, self.rest.began());
            }
            Some(Ended::Rest(Ok(None))) => self.has_answered(),
            Some(Ended::Step) | None => {}
        }
    }

    /// The job is over, as far as the body is concerned: what is in flight has a moment to
    /// end. What has not ended then is left to itself: to a task that keeps its buffers,
    /// its ranges and its places at the nodes, which stay the job's until it has ended.
    pub(super) async fn let_go(&mut self, has_failed: bool) {
        // No guest has to wait for the target any more, and nothing more is begun.
        self.state.set_engaged(false);
        self.copier.stop();
        self.wait_until_quiet(PATIENCE).await;
        if has_failed && !self.is_quiet() {
            // A cancel has done this at once: what failed may yet be told by the others.
            self.places.target.cancel_in_flight(CancelReach::Hanging);
            self.wait_until_quiet(PATIENCE).await;
        }
        if self.is_quiet() {
            return;
        }
        tracing::warn!(
            job = self.ctx.id(),
            "mirror: requests hang, and are left behind; the nodes stay in use until they end"
        );
        let mut operations = std::mem::take(&mut self.operations);
        let anew = Sweep::new(Rc::clone(&self.copier), Arc::clone(&self.state));
        let rest = std::mem::replace(&mut self.rest, anew);
        let step = self.left_step.take();
        self.ctx.leave_behind(async move {
            let operations = async { while operations.next().await.is_some() {} };
            let step = async {
                if let Some(step) = step {
                    step.await;
                }
            };
            join3(operations, rest.leave(), step).await;
        });
    }

    async fn wait_until_quiet(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.is_quiet() || left.is_zero() {
                return;
            }
            self.wait_for_any(left).await;
        }
    }
}

/// Something that was in flight.
enum Ended {
    Operation(Done),
    /// Of a drained section: an operation, or a flush.
    Rest(Result<Option<Copied>, CopyError>),
    /// Of the beginning.
    Step,
}

/// Waits for something to end, whatever it is; `None` if nothing is in flight.
async fn next_ended(
    operations: &mut Operations,
    rest: &mut Sweep,
    step: &mut Option<LocalBoxFuture<'static, ()>>,
) -> Option<Ended> {
    poll_fn(|cx| {
        if let Poll::Ready(Some(done)) = operations.poll_next_unpin(cx) {
            return Poll::Ready(Some(Ended::Operation(done)));
        }
        if let Poll::Ready(Some(ended)) = rest.poll_ended(cx) {
            return Poll::Ready(Some(Ended::Rest(ended)));
        }
        if let Some(running) = step
            && running.as_mut().poll(cx).is_ready()
        {
            *step = None;
            return Poll::Ready(Some(Ended::Step));
        }
        match operations.is_empty() && rest.is_idle() && step.is_none() {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    })
    .await
}

/// Notes what an operation did, whoever started it.
pub(super) fn account(ctx: &JobContext, notifier: &JobNotifier, copied: &Copied) {
    ctx.progress()
        .add_done(copied.range.end - copied.range.start);
    notifier.charge(copied.charged);
}
