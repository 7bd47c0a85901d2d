//! The job's body: what is done next, and when the mirror is ready.
//!
//! One task on the job's home. `operations` run inside it, side by side; how it gets on
//! is `watch`ed. The guest is held only in the drained sections of `converge`.

use std::ops::Range;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::runtime;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;

use crate::copying::{BufferPool, CopyError, Pace, Side};
use crate::{Backoff, CopyMode, ErrorAction, IoSide, JobContext, JobFailure, JobNotifier, SLICE};

use super::converge::HOLD_RETRY;
use super::copy::Copier;
use super::driver::{MirrorDriver, Places};
use super::guard::Guard;
use super::operations::Done;
use super::state::MirrorState;
use super::sweep::{Flushes, Sweep, Swept};

/// Most operations in flight.
const MAX_OPERATIONS: u64 = 16;
/// Largest buffer, which is the largest request to a node.
const MAX_REQUEST: u64 = 1 << 20;
/// Least that is in flight while the guest is active, if requests are as small.
const MIN_WINDOW: u64 = 512 << 10;

/// Time without an answer of the target after which it counts as hung.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// State of the body. Home only.
pub(super) struct Body<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) notifier: JobNotifier,
    pub(super) driver: &'a MirrorDriver,
    pub(super) places: &'a Places,
    pub(super) state: Arc<MirrorState>,
    pub(super) copier: Rc<Copier>,
    pub(super) operations: FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>,
    /// What drained sections copy and flush.
    pub(super) rest: Sweep,
    pub(super) max_operations: usize,
    /// Bytes in flight as the window counts them.
    pub(super) window_used: u64,
    /// Bytes in flight as progress counts them.
    pub(super) in_flight: u64,
    pub(super) pace: Pace,
    pub(super) guard: Guard,
    /// Where the scan of the bitmap goes on.
    pub(super) cursor: u64,
    /// Bytes that were dirty when the scan last began anew.
    pub(super) pass_began_with: u64,
    /// Scans that reached the end of the disk.
    pub(super) passes: u32,
    /// The source has data there, unless it was zeroed since.
    pub(super) data: Range<u64>,
    pub(super) zeroed_seen: u64,
    /// How much to look at at once where extents are not known.
    pub(super) leap: u64,
    /// Bytes started since the last rest.
    pub(super) since_rest: u64,
    /// Nothing is started before this instant (rest, failure).
    pub(super) not_before: Option<Instant>,
    pub(super) backoff: Backoff,
    /// Something has failed since the last scan of the bitmap ended.
    pub(super) failed_in_pass: bool,
    pub(super) failure: Option<JobFailure>,
    /// The job has said that it is ready.
    pub(super) ready: bool,
    /// Drained sections so far, and the pass in which the last one was.
    pub(super) sections: u32,
    pub(super) section_pass: u32,
    /// Wait before the next section, if the guest cannot be held.
    pub(super) hold_pause: Duration,
    /// The end was asked for when the passes were last counted.
    pub(super) ending: bool,
    /// The log has it that the mirror does not converge.
    pub(super) told: bool,
    /// Nothing has ended for a long time.
    pub(super) hung: bool,
    pub(super) last_ended: Instant,
    /// When the guest's requests began a new generation.
    pub(super) renewed: Instant,
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

/// Size of the buffers for this `buf-size`.
pub(super) fn request_size(buf_size: u64) -> u64 {
    buf_size.min(MAX_REQUEST)
}

/// A pool of buffers for this `buf-size`.
pub(super) fn buffer_pool(buf_size: u64, keep: usize) -> BufferPool {
    BufferPool::new(request_size(buf_size) as usize, keep)
}
