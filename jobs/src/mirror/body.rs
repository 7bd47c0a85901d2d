//! The job's body: which range is copied next, how many at a time, and when the
//! mirror is ready.
//!
//! One task on the job's home. Operations (`copy`) run inside it, side by side.
//! The guest is held only in the drained sections of `converge`.

use std::ops::Range;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{CancelReach, runtime};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::copying::{
    BufferPool, Copied, CopyError, Entered, INTERVAL, Look, Pace, Side, window_of_speed,
};
use crate::{Backoff, CopyMode, ErrorAction, IoSide, JobContext, JobFailure, JobNotifier, SLICE};

use super::converge::HOLD_RETRY;
use super::copy::Copier;
use super::driver::{MirrorDriver, Places};
use super::guard::{Guard, Sight};
use super::state::MirrorState;
use super::sweep::{Flushes, Sweep, Swept};

/// Most operations in flight.
const MAX_OPERATIONS: u64 = 16;
/// Largest buffer, which is the largest request to a node.
const MAX_REQUEST: u64 = 1 << 20;
/// Smallest request while the guest is active (the granularity may be larger).
const MIN_REQUEST: u64 = 256 << 10;
/// Least that is in flight while the guest is active, if requests are as small.
const MIN_WINDOW: u64 = 512 << 10;
/// Most bytes that one operation looks at, when all before were zeroes.
const MAX_LEAP: u64 = 1 << 30;

/// Time without an answer of the target after which it counts as hung.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// An operation in flight.
struct Done {
    range: Range<u64>,
    /// What it counts for in the window.
    cost: u64,
    result: Result<Copied, CopyError>,
}

/// State of the body. Home only.
pub(super) struct Body<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) notifier: JobNotifier,
    pub(super) driver: &'a MirrorDriver,
    pub(super) places: &'a Places,
    pub(super) state: Arc<MirrorState>,
    pub(super) copier: Rc<Copier>,
    operations: FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>,
    /// What drained sections copy and flush.
    pub(super) rest: Sweep,
    max_operations: usize,
    /// Bytes in flight as the window counts them.
    window_used: u64,
    /// Bytes in flight as progress counts them.
    in_flight: u64,
    pub(super) pace: Pace,
    pub(super) guard: Guard,
    /// Where the scan of the bitmap goes on.
    cursor: u64,
    /// Bytes that were dirty when the scan last began anew.
    pass_began_with: u64,
    /// Scans that reached the end of the disk.
    pub(super) passes: u32,
    /// The source has data there, unless it was zeroed since.
    data: Range<u64>,
    zeroed_seen: u64,
    /// How much to look at at once where extents are not known.
    leap: u64,
    /// Bytes started since the last rest.
    since_rest: u64,
    /// Nothing is started before this instant (rest, failure).
    pub(super) not_before: Option<Instant>,
    backoff: Backoff,
    /// Something has failed since the last scan of the bitmap ended.
    failed_in_pass: bool,
    pub(super) failure: Option<JobFailure>,
    /// The job has said that it is ready.
    pub(super) ready: bool,
    /// Drained sections so far, and the pass in which the last one was.
    pub(super) sections: u32,
    pub(super) section_pass: u32,
    /// Wait before the next section, if the guest cannot be held.
    pub(super) hold_pause: Duration,
    /// The end was asked for when the passes were last counted.
    ending: bool,
    /// The log has it that the mirror does not converge.
    told: bool,
    /// Nothing has ended for a long time.
    pub(super) hung: bool,
    last_ended: Instant,
    /// When the guest's requests began a new generation.
    renewed: Instant,
}

impl<'a> Body<'a> {
    pub(super) fn new(ctx: &'a JobContext, driver: &'a MirrorDriver, places: &'a Places) -> Self {
        let state = Arc::clone(driver.state());
        let buf_size = driver.settings().buf_size;
        let request = request_size(buf_size);
        let max_operations = (buf_size / request).clamp(1, MAX_OPERATIONS);
        let floor = MIN_WINDOW.max(state.granularity).min(buf_size);
        let copier = driver.copier(places, max_operations as usize);
        Self {
            ctx,
            notifier: ctx.notifier(),
            driver,
            places,
            rest: Sweep::new(Rc::clone(&copier), Arc::clone(&state)),
            copier,
            operations: FuturesUnordered::new(),
            max_operations: max_operations as usize,
            window_used: 0,
            in_flight: 0,
            pace: Pace::new(floor, buf_size, Instant::now()),
            guard: Guard::new(
                driver.settings().deadline,
                driver.settings().stall_after,
                Instant::now(),
            ),
            cursor: 0,
            pass_began_with: state.dirty.count_bytes(),
            passes: 0,
            data: 0..0,
            zeroed_seen: state.zeroed(),
            leap: request,
            since_rest: 0,
            not_before: None,
            backoff: Backoff::new(),
            failed_in_pass: false,
            failure: None,
            ready: false,
            sections: 0,
            section_pass: 0,
            hold_pause: HOLD_RETRY.0,
            ending: false,
            told: false,
            hung: false,
            last_ended: Instant::now(),
            renewed: Instant::now(),
            state,
        }
    }

    /// Runs until the mirror is complete, cancelled or has failed. After a
    /// success that was not forced, the driver knows what is to become of the
    /// target and holds the last drained section if there is one.
    pub(super) async fn run(mut self) -> Result<(), JobFailure> {
        self.initialize().await?;
        self.count_anew();
        self.skip_time();
        loop {
            if self.ctx.is_force_cancelled() {
                self.quiesce().await;
                return Ok(());
            }
            if let Some(error) = self.state.take_active_error() {
                self.failed(Side::Target, &error);
            }
            if let Some(failure) = self.failure.take() {
                self.quiesce().await;
                self.report_progress();
                return Err(failure);
            }
            if self.ctx.is_pause_requested() {
                self.quiesce().await;
                self.report_progress();
                self.ctx.pause_point().await;
                self.skip_time();
                continue;
            }
            if self.driver.take_user_resumed() {
                // Who resumed the job has done something about what failed.
                self.not_before = None;
                self.backoff.reset();
            }
            if self.should_end() && !self.ending {
                self.ending = true;
                self.count_anew();
                self.pace.hurry();
            }
            self.watch_over();
            if self.failure.is_some() {
                continue;
            }
            self.look_for_hang();
            self.ensure_progress();
            self.adapt();
            if self.wants_section() {
                self.quiesce().await;
                // Flushed beside the guest first: the section's own flush is short.
                let flushed = self.flush_beside_the_guest().await;
                // What ended just now may have failed, or have paused the job.
                let fine = flushed && self.failure.is_none() && !self.ctx.is_pause_requested();
                if fine && self.converge().await {
                    return Ok(());
                }
                continue;
            }
            let wait = self.start_operations();
            self.report_progress();
            if !self.operations.is_empty() {
                self.wait_for_operation(wait).await;
            } else if self.state.dirty.is_clean() {
                self.idle().await;
            } else {
                self.ctx.sleep(wait).await;
            }
        }
    }

    /// Whether the user wants the mirror to end: with the pivot, or without.
    pub(super) fn should_end(&self) -> bool {
        self.ready && (self.ctx.is_complete_requested() || self.ctx.is_soft_cancelled())
    }

    /// Waits until nothing is in flight, a flush included.
    pub(super) async fn quiesce(&mut self) {
        let state = Arc::clone(&self.state);
        if with_patience(&state, self.all_ended()).await.1 {
            // It has answered now.
            self.hung = false;
        }
    }

    async fn all_ended(&mut self) {
        while let Some(done) = self.operations.next().await {
            self.ended(done);
        }
        while let Some(ended) = self.rest.next_ended().await {
            match ended {
                Ok(Some(copied)) => account(self.ctx, &self.notifier, &copied),
                Ok(None) => {}
                Err(CopyError { side, error }) => self.failed(side, &error),
            }
        }
    }

    /// Nothing is dirty or in flight.
    async fn idle(&mut self) {
        if let Some(left) = self.wait_left() {
            self.ctx.sleep(left.min(SLICE)).await;
            return;
        }
        if !self.ready {
            let flushed = self.flush().await;
            // Much may have come while the target was flushed.
            if !flushed || !self.state.dirty.is_clean() || self.ctx.is_force_cancelled() {
                return;
            }
            self.become_ready();
        }
        if self.state.copy_mode() == CopyMode::WriteBlocking && !self.state.is_actively_synced() {
            self.state.set_actively_synced(true);
            if !self.state.dirty.is_clean() {
                self.state.set_actively_synced(false);
                return;
            }
        }
        self.copier.pool().shrink();
        self.ctx.sleep(SLICE).await;
    }

    /// What is left of a rest or of the wait after a failure.
    pub(super) fn wait_left(&self) -> Option<Duration> {
        let left = self.not_before?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Another phase begins: passes of the one before do not count.
    fn count_anew(&mut self) {
        self.passes = 0;
        self.sections = 0;
        self.pass_began_with = self.state.dirty.count_bytes();
    }

    /// Tells that the mirror is ready, with progress that says so.
    pub(super) fn become_ready(&mut self) {
        self.report_progress();
        self.ready = true;
        self.state.set_catching_up(false);
        self.count_anew();
        self.pace.relax(Instant::now());
        if self.state.copy_mode() == CopyMode::WriteBlocking {
            self.state.set_actively_synced(self.state.dirty.is_clean());
        }
        self.ctx.ready();
    }

    /// Flushes the target, again if the guest's requests have written much meanwhile.
    /// `false`: as for a single flush, or something came up that is more urgent.
    async fn flush_beside_the_guest(&mut self) -> bool {
        let mut flushes = Flushes::new();
        loop {
            let began = Instant::now();
            if !self.flush().await {
                return false;
            }
            if !self.state.mirrors_actively() || !flushes.again(began.elapsed()) {
                return true;
            }
            if self.ctx.is_force_cancelled() || self.ctx.is_pause_requested() {
                return false;
            }
        }
    }

    /// Flushes the target if it was written. `false`: it failed, and may be tried
    /// again later.
    pub(super) async fn flush(&mut self) -> bool {
        let patience = Instant::now() + PATIENCE;
        let swept = self.rest.flush(runtime::sleep_until(patience)).await;
        if matches!(swept, Swept::Stopped) && Instant::now() >= patience {
            self.hung = true;
            self.state.set_catching_up(false);
        }
        self.is_done(swept)
    }

    /// Whether all was done; notes it if something failed.
    pub(super) fn is_done(&mut self, swept: Swept) -> bool {
        match swept {
            Swept::Done => {
                self.hung = false;
                true
            }
            Swept::Stopped => {
                // If somebody drains a node, it is the next pause point's turn.
                let soon = Instant::now() + Duration::from_millis(1);
                self.not_before = self.not_before.max(Some(soon));
                false
            }
            Swept::Failed(CopyError { side, error }) => {
                self.failed(side, &error);
                false
            }
        }
    }

    /// What is dirty, being copied, or being mirrored by the guest's own requests.
    fn left(&self) -> u64 {
        self.state.dirty_bytes() + self.in_flight + self.state.active_bytes()
    }

    /// The time until now says nothing about how the mirror gets on.
    fn skip_time(&mut self) {
        let done = self.ctx.progress().snapshot().current;
        self.guard.skip(self.left(), done, Instant::now());
    }

    /// Looks how the mirror gets on: clients are told if it does not, and it fails if
    /// its time is over.
    fn watch_over(&mut self) {
        let now = Instant::now();
        if self.guard.is_due(now) {
            let sight = Sight {
                left: self.left(),
                done: self.ctx.progress().snapshot().current,
                waits: !self.ready || self.should_end(),
                is_limited: self.ctx.speed() > 0,
            };
            let stalled = self.guard.look(sight, now);
            self.driver.show_rates(self.guard.rates());
            if stalled {
                self.tell_of_stall();
                if self.driver.settings().switches && !self.hung {
                    self.switch();
                }
            }
        }
        if self.ready || self.failure.is_some() {
            return;
        }
        if let Some(deadline) = self.guard.missed(now) {
            self.tell_of_stall();
            // What it waits for there does not matter any more.
            self.places.target.cancel_in_flight(CancelReach::Hanging);
            let rates = self.guard.rates();
            self.failure = Some(JobFailure::new(
                libc::ETIMEDOUT,
                format!(
                    "The mirror was not ready within {} s: {} bytes are left, {} bytes/s are \
                     dirtied and {} bytes/s copied; use copy-mode 'auto' or 'write-blocking', \
                     a higher speed or a longer deadline",
                    deadline.as_secs(),
                    self.left(),
                    rates.dirty,
                    rates.copy
                ),
            ));
        }
    }

    fn tell_of_stall(&self) {
        let rates = self.guard.rates();
        tracing::warn!(
            job = self.ctx.id(),
            left = self.left(),
            dirty_rate = rates.dirty,
            copy_rate = rates.copy,
            "mirror: what is left gets no less"
        );
        self.ctx.stalled(rates.dirty, rates.copy);
    }

    /// A target that hangs, for the copier or for one of the guest's own requests, does
    /// not hold the guest of a mirror that only catches up.
    fn look_for_hang(&mut self) {
        if self.operations.is_empty() {
            self.last_ended = Instant::now();
        }
        if self.state.renew_generation() {
            self.renewed = Instant::now();
        }
        if self.last_ended.elapsed() >= PATIENCE || self.renewed.elapsed() >= PATIENCE {
            self.hung = true;
            self.state.set_catching_up(false);
        }
    }

    /// Lets the controller look at the guest, if it is time to.
    fn adapt(&mut self) {
        let now = Instant::now();
        if self.pace.is_due(now) {
            self.pace.decide(self.state.latency.take(), now);
        }
    }

    /// Starts what may be started; gives the time after which there may be more
    /// to start even if nothing ends, at most a slice.
    fn start_operations(&mut self) -> Duration {
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
            self.since_rest += cost;
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
        let operation = self.copier.copy(range.clone(), look, nodes);
        self.operations.push(Box::pin(async move {
            Done {
                range,
                cost,
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
            // Before the first pass has ended, a short range may be all sorts.
            None if self.passes == 0 && !self.ready => Look::Probe { request },
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
                self.backoff.reset();
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
        self.hung = false;
        self.last_ended = Instant::now();
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
            Err(CopyError { side, error }) => self.failed(side, &error),
        }
    }

    /// A request failed: acts as the policy of its side says. Its range is dirty
    /// again.
    pub(super) fn failed(&mut self, side: Side, error: &block::IoError) {
        self.state.set_actively_synced(false);
        self.failed_in_pass = true;
        let (policy, io_side) = match side {
            Side::Source => (self.driver.settings().on_source_error, IoSide::Read),
            Side::Target => (self.driver.settings().on_target_error, IoSide::Write),
        };
        if self.failure.is_some() {
            return;
        }
        let action = self.ctx.io_failed(io_side, error.errno, policy);
        tracing::warn!(job = self.ctx.id(), %error, action = action.name(), "mirror request failed");
        match action {
            ErrorAction::Report => self.failure = Some(JobFailure::from(error)),
            ErrorAction::Ignore | ErrorAction::Stop => {
                self.not_before = Some(Instant::now() + self.backoff.failed());
            }
        }
    }

    /// Tells what is left: dirty, being copied, or being mirrored by the guest's
    /// own requests.
    pub(super) fn report_progress(&self) {
        self.ctx.progress().set_remaining(self.left());
    }
}

/// Waits for `work`; if that takes long while the mirror catches up, the guest no
/// longer waits for the target. Says whether it took long.
pub(super) async fn with_patience<T>(
    state: &MirrorState,
    work: impl Future<Output = T>,
) -> (T, bool) {
    match select(pin!(work), pin!(runtime::sleep(PATIENCE))).await {
        Either::Left((done, _)) => (done, false),
        Either::Right((_, work)) => {
            state.set_catching_up(false);
            (work.await, true)
        }
    }
}

/// Notes what an operation did, whoever started it.
pub(super) fn account(ctx: &JobContext, notifier: &JobNotifier, copied: &Copied) {
    ctx.progress()
        .add_done(copied.range.end - copied.range.start);
    notifier.charge(copied.charged);
}

/// Size of the buffers for this `buf-size`.
pub(super) fn request_size(buf_size: u64) -> u64 {
    buf_size.min(MAX_REQUEST)
}

/// A pool of buffers for this `buf-size`.
pub(super) fn buffer_pool(buf_size: u64, keep: usize) -> BufferPool {
    BufferPool::new(request_size(buf_size) as usize, keep)
}
