//! The job's body: what is done next, and when the mirror is ready.
//!
//! One task on the job's home. `operations` run inside it, side by side; how it gets on
//! is `watch`ed. The guest is held only in the drained sections of `converge`.

use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::runtime;
use futures_util::future::{Either, LocalBoxFuture, select};

use crate::copying::{BufferPool, CopyError, PATIENCE, Pace, Side};
use crate::{ErrorAction, IoSide, JobContext, JobFailure, JobNotifier, SLICE};

use super::converge::{HOLD_RETRY, over_at};
use super::copy::Copier;
use super::driver::{MirrorDriver, Places};
use super::guard::Guard;
use super::operations::Operations;
use super::retry::Retry;
use super::state::MirrorState;
use super::sweep::{Flushes, Sweep, Swept};

/// Most operations in flight.
const MAX_OPERATIONS: u64 = 16;
/// Largest buffer, which is the largest request to a node.
const MAX_REQUEST: u64 = 1 << 20;
/// Least that is in flight while the guest is active, if requests are as small.
const MIN_WINDOW: u64 = 512 << 10;

/// State of the body. Home only.
pub(super) struct Body<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) notifier: JobNotifier,
    pub(super) driver: &'a MirrorDriver,
    pub(super) places: &'a Places,
    pub(super) state: Arc<MirrorState>,
    pub(super) copier: Rc<Copier>,
    pub(super) operations: Operations,
    /// What drained sections copy and flush.
    pub(super) rest: Sweep,
    /// While the beginning is found out: bytes that were not looked at yet.
    pub(super) to_look_at: Option<u64>,
    /// A step of the beginning that nobody waits for any more.
    pub(super) left_step: Option<LocalBoxFuture<'static, ()>>,
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
    /// Nothing is started before this instant (rest, drained section).
    pub(super) not_before: Option<Instant>,
    /// When the copier tries again what failed.
    pub(super) retry: Retry,
    /// When failures of the guest's own requests are looked at again.
    pub(super) active_retry: Retry,
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
    /// Room for bitmaps was asked for.
    pub(super) has_room: bool,
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
            operations: Operations::new(),
            to_look_at: None,
            left_step: None,
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
            retry: Retry::default(),
            active_retry: Retry::default(),
            failed_in_pass: false,
            failure: None,
            ready: false,
            sections: 0,
            section_pass: 0,
            hold_pause: HOLD_RETRY.0,
            has_room: false,
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
        self.initialize().await;
        self.count_anew();
        self.watch_anew();
        loop {
            if self.ctx.is_force_cancelled() {
                self.let_go(false).await;
                return Ok(());
            }
            self.look_for_active_errors();
            if let Some(failure) = self.failure.take() {
                self.let_go(true).await;
                self.report_progress();
                return Err(failure);
            }
            if self.ctx.is_pause_requested() {
                self.quiesce().await;
                self.report_progress();
                if !self.has_to_end() {
                    self.pause_point().await;
                }
                continue;
            }
            if self.driver.take_user_resumed() {
                // Who resumed the job has done something about what failed.
                self.not_before = None;
                self.retry.at_once();
                self.active_retry.at_once();
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
                if self.has_to_end() {
                    continue;
                }
                self.make_room_for_bitmaps().await;
                // Flushed beside the guest first: the section's own flush is short.
                let flushed = self.flush_beside_the_guest().await;
                // What ended just now may have failed, or have paused the job; and the
                // guest may have written much while the target was flushed.
                let stays = flushed && !self.has_to_end() && !self.ctx.is_pause_requested();
                if stays && self.wants_section() && self.converge().await {
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

    /// Whether the body is to return at once, with what is in flight left to itself.
    pub(super) fn has_to_end(&self) -> bool {
        self.failure.is_some() || self.ctx.is_force_cancelled()
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
        self.state.look_whether_synced();
        if !self.state.dirty.is_clean() {
            return;
        }
        self.copier.pool().shrink();
        self.ctx.sleep(SLICE).await;
    }

    /// What is left of a rest or of the wait after a failure.
    pub(super) fn wait_left(&self) -> Option<Duration> {
        let now = Instant::now();
        let rest = self.not_before.map(|at| at.saturating_duration_since(now));
        let rest = rest.filter(|left| !left.is_zero());
        rest.max(self.retry.left(now))
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
        self.state.look_whether_synced();
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
        let swept = self.rest.flush(over_at(self.ctx, patience)).await;
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
                self.failed(side, &error, self.rest.began());
                false
            }
        }
    }

    /// Acts on a failure of the guest's own requests, which go on meanwhile: with a policy
    /// that ignores them their number is bounded.
    fn look_for_active_errors(&mut self) {
        let now = Instant::now();
        if self.active_retry.left(now).is_some() {
            return;
        }
        let Some(error) = self.state.take_active_error() else {
            return;
        };
        if self.active_retry.is_long_ago(now) {
            self.active_retry.went_well();
        }
        if self.is_to_be_ignored(Side::Target, &error) {
            self.active_retry.failed(now, now);
        }
    }

    /// A request of the copier's that was begun at `began` has failed. Its range is dirty
    /// again.
    pub(super) fn failed(&mut self, side: Side, error: &block::IoError, began: Instant) {
        self.failed_in_pass = true;
        if self.failure.is_none() && self.is_to_be_ignored(side, error) {
            self.retry.failed(began, Instant::now());
        }
    }

    /// Acts on a failure as the policy of its side says. `false`: the job fails.
    fn is_to_be_ignored(&mut self, side: Side, error: &block::IoError) -> bool {
        self.state.not_synced();
        let (policy, io_side) = match side {
            Side::Source => (self.driver.settings().on_source_error, IoSide::Read),
            Side::Target => (self.driver.settings().on_target_error, IoSide::Write),
        };
        let action = self.ctx.io_failed(io_side, error.errno, policy);
        tracing::warn!(job = self.ctx.id(), %error, action = action.name(), "mirror request failed");
        match action {
            ErrorAction::Report => {
                self.failure = Some(JobFailure::from(error));
                false
            }
            ErrorAction::Ignore | ErrorAction::Stop => true,
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
