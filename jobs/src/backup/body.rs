//! The job's body: copies beside the guest what nobody has copied yet.
//!
//! One task on the job's home; its operations run inside it, side by side.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Listening, Snapshot, broken_snapshot, runtime, shown_snapshot};
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::copying::{
    BACKUP_TOLERANCE, BufferPool, Carrier, CopyError, Entered, INTERVAL, PATIENCE, Pace, Rules,
    Side, enter, let_target_go, window_of_speed,
};
use crate::{Backoff, ErrorAction, IoSide, JobContext, JobFailure, JobNotifier, OnError, SLICE};

use super::account::{Account, BodyClaim};
use super::driver::{BackupDriver, Places};
use super::operation::{Done, Operation, What, write_saves};
use super::scan::{MAX_REQUEST, Scan};

/// Least that is in flight while the guest is active, and most.
const WINDOW: (u64, u64) = (512 << 10, 16 << 20);
/// Wait while somebody drains a node.
const BUSY: Duration = Duration::from_millis(1);
/// Buffers that are kept.
const BUFFERS: usize = 16;
/// Most operations for what guests' requests did not wait for.
const MAX_SAVES: usize = 4;
/// How long to wait after failures of each side.
struct PerSide {
    source: Backoff,
    target: Backoff,
}

impl PerSide {
    fn new() -> Self {
        Self {
            source: Backoff::new(),
            target: Backoff::new(),
        }
    }
}

/// State of the body. Home only.
pub(super) struct Body<'a> {
    ctx: &'a JobContext,
    notifier: JobNotifier,
    driver: &'a BackupDriver,
    places: &'a Places,
    snapshot: Arc<Snapshot>,
    /// The snapshot that the source shows: of what the guest writes, since nobody writes the
    /// source itself then.
    keeper: Option<Listening>,
    account: Account,
    carrier: Rc<Carrier>,
    operations: FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>,
    window_used: u64,
    pace: Pace,
    scan: Scan,
    /// Operations that write what guests' requests did not wait for.
    saves: usize,
    /// Bytes started since the last rest.
    since_rest: u64,
    /// Nothing is started before this instant (rest, failure).
    not_before: Option<Instant>,
    /// Nothing that guests did not wait for is written before this instant (failure of the
    /// target).
    retry_at: Option<Instant>,
    backoff: PerSide,
    /// The first failure since the policy was last asked: nothing is started until
    /// everything has ended, and the policy has been asked.
    failed: Option<CopyError>,
}

impl<'a> Body<'a> {
    pub(super) fn new(ctx: &'a JobContext, driver: &'a BackupDriver, places: &'a Places) -> Self {
        let snapshot = Arc::clone(&places.snapshot);
        let keeper = shown_snapshot(&places.source_backend.root());
        let account = places.account.clone();
        let notifier = ctx.notifier();
        let rules = Rules {
            size: snapshot.size(),
            unit: account.cluster(),
            unmap: true,
            explicit_zeroes: driver.settings().explicit_zeroes,
            // The source may be a layer of the target.
            layers_last: false,
        };
        let request = MAX_REQUEST.min(driver.settings().max_chunk);
        let pool = BufferPool::new(request as usize, BUFFERS);
        let (floor, ceiling) = (WINDOW.0.max(account.cluster()), WINDOW.1);
        Self {
            ctx,
            notifier,
            driver,
            places,
            carrier: Rc::new(Carrier::new(rules, pool, || ())),
            operations: FuturesUnordered::new(),
            window_used: 0,
            pace: Pace::new(floor, ceiling.max(floor), Instant::now())
                .with_tolerance(BACKUP_TOLERANCE),
            scan: Scan::new(account.clone(), snapshot.size(), request),
            saves: 0,
            since_rest: 0,
            not_before: None,
            retry_at: None,
            backoff: PerSide::new(),
            failed: None,
            keeper: keeper.map(|keeper| keeper.listen()),
            snapshot,
            account,
        }
    }

    /// Runs until all is copied, or the job is cancelled or has failed.
    pub(super) async fn run(mut self) -> Result<(), JobFailure> {
        self.report_progress();
        if self.driver.settings().only_top {
            self.skip_lower_layers().await?;
        }
        loop {
            if self.ctx.is_force_cancelled() {
                self.let_go().await;
                return Ok(());
            }
            if let Some(failure) = BackupDriver::broken(self.places) {
                self.let_go().await;
                return Err(failure);
            }
            if let Some(error) = &self.failed {
                self.snapshot.save_behind(false);
                match self.is_to_be_reported(error) {
                    // All that fail together are told once; but what hangs does not
                    // keep the failure.
                    true => self.wait_until_quiet(PATIENCE).await,
                    false => self.quiesce().await,
                }
                if self.has_to_end() {
                    continue;
                }
                self.report_progress();
                if let Err(failure) = self.ask_policy() {
                    self.let_go().await;
                    return Err(failure);
                }
            }
            if self.ctx.is_pause_requested() {
                // What is kept stays so.
                self.snapshot.save_behind(false);
                self.quiesce().await;
                self.report_progress();
                if self.failed.is_none() && !self.has_to_end() {
                    self.ctx.pause_point().await;
                }
                continue;
            }
            if self.driver.take_user_resumed() {
                // Who resumed the job has done something about what failed.
                self.not_before = None;
                self.retry_at = None;
                self.backoff = PerSide::new();
            }
            if self.is_complete() {
                self.report_progress();
                if self.flush().await {
                    // Looked at after the last copy.
                    return BackupDriver::broken(self.places).map_or(Ok(()), Err);
                }
                continue;
            }
            // While it backs off from the target guests wait for their copies, and not for it.
            let saves = self.driver.settings().saves_behind && !self.is_backing_off();
            self.snapshot.save_behind(saves);
            self.adapt();
            self.start_saves();
            let wait = self.start_operations();
            self.report_progress();
            if self.operations.is_empty() {
                self.ctx.sleep(wait).await;
            } else {
                self.wait_for_operation(wait).await;
            }
        }
    }

    fn is_complete(&self) -> bool {
        !self.driver.settings().only_guest
            && self.operations.is_empty()
            && self.account.is_complete()
    }

    /// Whether the body is to return, with what is in flight left to itself.
    fn has_to_end(&self) -> bool {
        self.ctx.is_force_cancelled() || self.snapshot.broken().is_some()
    }

    /// Waits until nothing of the body's own is in flight, or it has to end.
    async fn quiesce(&mut self) {
        while !self.operations.is_empty() && !self.has_to_end() {
            self.wait_for_operation(SLICE).await;
        }
    }

    async fn wait_until_quiet(&mut self, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.operations.is_empty() || left.is_zero() {
                return;
            }
            self.wait_for_operation(left).await;
        }
    }

    /// The job is over, as far as the body is concerned: what is in flight has a moment to
    /// end. What has not ended then is left to itself: to a task that keeps its buffers,
    /// its clusters and its places at the nodes, which stay the job's until it has ended.
    async fn let_go(&mut self) {
        // No guest has to wait for the target any more, and nothing more is begun.
        self.snapshot.end();
        self.carrier.stop();
        // What the target has is good for nothing, so nobody waits for a server either.
        let_target_go(&self.places.target_backend);
        self.wait_until_quiet(PATIENCE).await;
        self.report_progress();
        if self.operations.is_empty() {
            return;
        }
        tracing::warn!(
            job = self.ctx.id(),
            "backup: requests hang, and are left behind; the nodes stay in use until they end"
        );
        let mut operations = std::mem::take(&mut self.operations);
        self.ctx
            .leave_behind(async move { while operations.next().await.is_some() {} });
    }

    /// Waits for one request. `None`: the job has to end, and the request has been left to
    /// itself.
    async fn wait_for_step<T: 'static>(
        &self,
        step: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        let step = self.ctx.wait_unless(Box::pin(step), || self.has_to_end());
        match step.await {
            Ok(done) => Some(done),
            Err(rest) => {
                self.ctx.leave_behind(async move {
                    rest.await;
                });
                None
            }
        }
    }

    /// Takes what lower layers have out of the snapshot. Until that is done, guests'
    /// requests look at the layers themselves. Ends early if the job has to end.
    ///
    /// Errors: the source could not be asked.
    async fn skip_lower_layers(&mut self) -> Result<(), JobFailure> {
        // What lower layers have begins here, as far as it is not left out yet.
        let mut lower = 0;
        let mut offset = 0;
        while offset < self.snapshot.size() {
            self.ctx.pause_point().await;
            if self.has_to_end() {
                return Ok(());
            }
            let Some(source) = enter(&self.places.reader) else {
                runtime::sleep(BUSY).await;
                continue;
            };
            let Some(base) = source.node().backing() else {
                break;
            };
            let left = self.snapshot.size() - offset;
            let step = async move { source.node().chain_status(Some(&base), offset, left).await };
            let Some(extent) = self.wait_for_step(step).await else {
                return Ok(());
            };
            // Whatever the policy: what is not known cannot be left out.
            let extent = extent.map_err(|error| JobFailure::from(&error))?;
            let end = offset + extent.len.clamp(1, left);
            if extent.depth == 0 {
                // With what was left of the extent before, if that is to go, too.
                self.snapshot.skip(lower..end);
                lower = self.snapshot.round_in(&(lower..end)).end.max(lower);
            } else {
                lower = end;
            }
            offset = end;
            self.report_progress();
        }
        self.snapshot.all_looked_at();
        Ok(())
    }

    fn enter(&self) -> Option<Entered> {
        Entered::enter(&self.places.reader, &self.places.target_backend)
    }

    /// Flushes the target. `false`: it failed, or something more urgent came up.
    async fn flush(&mut self) -> bool {
        let Some(target) = enter(&self.places.target_backend) else {
            self.ctx.sleep(BUSY).await;
            return false;
        };
        match self
            .wait_for_step(async move { target.flush().await })
            .await
        {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                let side = Side::Target;
                self.failed.get_or_insert(CopyError { side, error });
                false
            }
            None => false,
        }
    }

    /// Lets the controller look at the guest, if it is time to.
    fn adapt(&mut self) {
        let now = Instant::now();
        if !self.pace.is_due(now) || self.pace.is_settling(!self.operations.is_empty(), now) {
            return;
        }
        let guest = self.keeper.as_deref().unwrap_or(&self.snapshot);
        match guest.latency().take() {
            None if guest.holds_guests() => self.pace.guest_waits(now),
            felt => self.pace.decide(felt, now),
        }
    }

    fn wait_left(&self) -> Option<Duration> {
        let left = self.not_before?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Whether a failure of the target was not long ago.
    fn is_backing_off(&self) -> bool {
        self.retry_at.is_some_and(|at| at > Instant::now())
    }

    /// Writes what guests' requests did not wait for.
    fn start_saves(&mut self) {
        while self.saves < MAX_SAVES && self.failed.is_none() && !self.is_backing_off() {
            let Some(saves) = self.snapshot.take_saves() else {
                return;
            };
            // Not while somebody drains the target; then it is kept.
            let Some(target) = enter(&self.places.target_backend) else {
                return;
            };
            self.saves += 1;
            self.operations.push(Box::pin(write_saves(saves, target)));
        }
    }

    /// Starts what may be started; gives the time after which there may be more to start
    /// even if nothing ends, at most a slice.
    fn start_operations(&mut self) -> Duration {
        loop {
            if self.driver.settings().only_guest || self.failed.is_some() {
                return SLICE;
            }
            if let Some(left) = self.wait_left() {
                return left.min(SLICE);
            }
            if self.pace.is_calm() {
                return INTERVAL;
            }
            if self.operations.len() - self.saves >= self.driver.settings().max_workers {
                return SLICE;
            }
            let limited = self.ctx.throttle_wait();
            if !limited.is_zero() {
                return limited.min(SLICE);
            }
            let window = self.pace.window();
            let request = self.scan.request_size(window);
            let Some((range, look)) = self.scan.next(request, &self.carrier) else {
                return SLICE;
            };
            let mut cost = (range.end - range.start).min(request);
            // One request at least goes out, since nothing is under way then.
            let window = window.min(window_of_speed(self.ctx.speed(), 0));
            if self.window_used > 0 && self.window_used + cost > window {
                return SLICE;
            }
            let Some(nodes) = self.enter() else {
                // Somebody drains a node; the job is about to be paused.
                return BUSY;
            };
            // A guest's request may have been first.
            let Some(claim) = self.account.claim(range.clone()) else {
                continue;
            };
            let operation = Operation {
                carrier: Rc::clone(&self.carrier),
                snapshot: Arc::clone(&self.snapshot),
                nodes,
                discards: self.driver.settings().discard_source,
                began: Instant::now(),
            };
            if let Some(runs) = self.scan.runs_with(&range) {
                // As many as the window has room for.
                let most = request.min(window.saturating_sub(self.window_used));
                let claims = self.account.gather(claim, most, runs);
                cost = self.start_runs(operation, claims);
            } else {
                self.scan.has_begun_to(claim.range().end);
                self.window_used += cost;
                self.operations
                    .push(Box::pin(operation.carry(claim, look, cost)));
            }
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

    /// Gives the bytes of the runs.
    fn start_runs(&mut self, operation: Operation, claims: Vec<BodyClaim>) -> u64 {
        let mut cost = 0;
        for range in claims.iter().map(BodyClaim::range) {
            self.scan.has_begun_to(range.end);
            cost += range.end - range.start;
        }
        self.window_used += cost;
        self.operations.push(Box::pin(operation.copy_runs(claims)));
        cost
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
        // What else has ended by now: a look at all the rest for each would take longer than
        // many of them did.
        while let Some(Some(done)) = self.operations.next().now_or_never() {
            self.ended(done);
        }
    }

    fn ended(&mut self, done: Done) {
        self.window_used -= done.cost;
        self.ctx.progress().add_done(done.bytes);
        self.notifier.charge(done.moved);
        let has_copied = done.bytes > 0 && done.error.is_none();
        match done.what {
            What::Saves => {
                self.saves -= 1;
                if has_copied {
                    self.backoff.target.reset();
                }
            }
            What::Range(end, copied) => {
                if has_copied {
                    self.backoff = PerSide::new();
                }
                if done.moved > 0 {
                    self.pace.note_request(done.took);
                }
                if let Some(copied) = copied {
                    self.scan.learn(end, copied);
                }
            }
            What::Runs(range, became) => {
                if has_copied {
                    self.backoff = PerSide::new();
                }
                if done.bytes < done.cost {
                    self.scan.come_back_to(range.start);
                }
                if done.bytes > 0 {
                    self.pace.note_request(done.took);
                }
                self.scan.learn_of_runs(range, &became, done.took);
            }
        }
        if let Some(error) = done.error {
            self.failed.get_or_insert(error);
        }
    }

    /// Acts on a failure as the policy of its side says. What failed is to be copied
    /// again.
    ///
    /// Errors: the job is to fail.
    fn ask_policy(&mut self) -> Result<(), JobFailure> {
        let Some(CopyError { side, error }) = self.failed.take() else {
            return Ok(());
        };
        let (policy, io_side) = self.policy(side);
        let action = self.ctx.io_failed(io_side, error.errno, policy);
        tracing::warn!(job = self.ctx.id(), %error, action = action.name(), "backup request failed");
        match action {
            ErrorAction::Report => Err(JobFailure::from(&error)),
            ErrorAction::Ignore | ErrorAction::Stop => {
                self.scan.start_over();
                let backoff = match side {
                    Side::Source => &mut self.backoff.source,
                    Side::Target => &mut self.backoff.target,
                };
                let retry_at = Instant::now() + backoff.failed();
                self.not_before = Some(retry_at);
                if matches!(side, Side::Target) {
                    self.retry_at = Some(retry_at);
                }
                Ok(())
            }
        }
    }

    fn policy(&self, side: Side) -> (OnError, IoSide) {
        let settings = self.driver.settings();
        match side {
            // It will fail for ever, whatever is done.
            Side::Source if self.source_is_broken() => (OnError::Report, IoSide::Read),
            Side::Source => (settings.on_source_error, IoSide::Read),
            Side::Target => (settings.on_target_error, IoSide::Write),
        }
    }

    /// Whether a failure ends the job, as its policy says.
    fn is_to_be_reported(&self, CopyError { side, error }: &CopyError) -> bool {
        let (policy, _) = self.policy(*side);
        policy.action(error.errno) == ErrorAction::Report
    }

    /// Whether the source shows a snapshot that is broken: of another job or of a filter
    /// of the user's.
    fn source_is_broken(&self) -> bool {
        broken_snapshot(&self.places.source_backend.root()).is_some()
    }

    /// Tells what is left: to be copied, or being copied by anybody.
    fn report_progress(&self) {
        let left = self.account.pending_bytes();
        self.ctx.progress().set_remaining(left);
    }
}
