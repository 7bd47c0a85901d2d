//! The driver side: what a job's body may do. Every method takes the job mutex
//! for an instant and has released it when it returns.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use block::{GraphHandle, runtime};
use futures_util::future::{Either, LocalBoxFuture, select};

use crate::backup::FleecingInfo;
use crate::compare::Comparison;
use crate::drain::OwnDrain;
use crate::event::{ErrorAction, IoSide, OnError};
use crate::home::{LocalFuture, Stay};
use crate::id::JobKey;
use crate::monitor::Jobs;
use crate::pair::ActivePair;
use crate::progress::Progress;
use crate::shared::{Shared, Slot};
use crate::state::{Event, JobState, SLICE};
use crate::sync;
use crate::sync::atomic::Ordering;

/// A job, as its own body sees it.
///
/// The methods that wait are for the task that runs the body, one at a time
/// (besides [`JobContext::kicked`], which is made for `select!`). None of them may
/// be awaited while holding anything that a drained section, a graph change or the
/// monitor could need.
pub struct JobContext {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    /// Keeps the body's thread; goes with the body, or with what it leaves behind.
    stay: Stay,
}

impl JobContext {
    pub(crate) fn new(shared: Arc<Shared>, slot: Arc<Slot>, stay: Stay) -> Self {
        Self { shared, slot, stay }
    }

    /// The job's id; `internal` for an internal job.
    pub fn id(&self) -> &str {
        self.slot.name()
    }

    /// The progress meter, also for other threads.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.slot.progress
    }

    /// The way to main, for what the body has to have done there.
    pub fn graph(&self) -> &GraphHandle {
        self.shared.environment.graph()
    }

    /// Lets hooks of main see what was asked of the job.
    pub fn watch(&self) -> JobWatch {
        JobWatch {
            shared: Arc::downgrade(&self.shared),
            key: self.slot.key,
        }
    }

    /// Lets I/O paths wake the body; takes no lock.
    pub fn notifier(&self) -> JobNotifier {
        JobNotifier::new(Arc::clone(&self.slot))
    }

    /// Lets `rest` end by itself, as a task of this thread, which lives until then even if
    /// the job is gone: for requests that hang, and that the body does not wait for.
    pub(crate) fn leave_behind(&self, rest: impl Future<Output = ()> + 'static) {
        let stay = self.stay.clone();
        runtime::spawn_local(async move {
            rest.await;
            drop(stay);
        })
        .detach();
    }

    /// Waits for `step`. `ends` is asked whenever the job is kicked or notified, and at
    /// least once a slice; if it says `true` first, the rest of the step is given back: to
    /// be left behind, or waited for later.
    ///
    /// Cancel: the step is dropped, which requests in flight must not be.
    pub(crate) async fn wait_unless<T>(
        &self,
        mut step: LocalBoxFuture<'static, T>,
        mut ends: impl FnMut() -> bool,
    ) -> Result<T, LocalBoxFuture<'static, T>> {
        loop {
            let timer = self.shared.environment.sleep(SLICE);
            let kicked = pin!(self.kicked());
            if let Either::Left((done, _)) = select(step.as_mut(), select(timer, kicked)).await {
                return Ok(done);
            }
            if ends() {
                return Err(step);
            }
        }
    }

    /// The pairs of nodes that jobs keep equal.
    pub(crate) fn pairs(&self) -> Vec<ActivePair> {
        self.shared.pairs()
    }

    /// What the comparison has found, for the history. Once.
    pub(crate) fn set_comparison(&self, found: Comparison) {
        let _ = self.slot.comparison.set(found);
    }

    /// How the fleecing got on, for the history. Once.
    pub(crate) fn set_fleecing(&self, info: FleecingInfo) {
        let _ = self.slot.fleecing.set(info);
    }

    /// Whether the body is to stop at once.
    pub fn is_force_cancelled(&self) -> bool {
        self.read(|job| job.force_cancel)
    }

    /// Whether the job is to finish what it has begun and then end without
    /// applying its result's effect on the graph. Never together with
    /// [`JobContext::is_force_cancelled`].
    pub fn is_soft_cancelled(&self) -> bool {
        self.read(|job| job.cancel_requested && !job.force_cancel)
    }

    /// Whether `complete` was accepted.
    pub fn is_complete_requested(&self) -> bool {
        self.read(|job| job.complete_requested)
    }

    /// Whether the next pause point will park the body.
    pub fn is_pause_requested(&self) -> bool {
        self.read(JobState::should_pause)
    }

    /// The rate limit in bytes/s; 0 is none.
    pub fn speed(&self) -> u64 {
        self.read(|job| job.limit.speed())
    }

    /// The job has converged: ready from here on, and clients are told. Once it
    /// is ready this does nothing.
    pub fn ready(&self) {
        self.happen(Event::Ready);
    }

    /// The body makes no progress, dirtied and copied being so many bytes per second:
    /// clients are told. Nothing else changes.
    pub fn stalled(&self, dirty: u64, copy: u64) {
        self.happen(Event::Stalled { dirty, copy });
    }

    /// A request of the body failed: tells clients and says what `policy` makes of
    /// it.
    ///
    /// `Report`: return the error from the body, after what is in flight has
    /// ended. `Ignore`: try the range again, later. `Stop`: the same, and the next
    /// pause point parks until the user resumes.
    pub fn io_failed(&self, side: IoSide, errno: i32, policy: OnError) -> ErrorAction {
        self.happen(Event::IoFailed {
            side,
            errno,
            policy,
        });
        policy.action(errno)
    }

    /// Parks here while the job is to be paused; else goes on at once.
    ///
    /// Calls the driver's `pause` before parking and its `resume` afterwards. A
    /// forced cancel ends the parking.
    ///
    /// Cancel: if the future is dropped while parked, the job counts as running
    /// again, without the driver's `resume`.
    pub async fn pause_point(&self) {
        sync::assert_unlocked("a pause point was reached");
        if !self.is_pause_requested() {
            return;
        }
        self.slot.driver.pause().await;
        // A pause that was taken back meanwhile leaves the body busy.
        self.happen(Event::Park);
        self.until_busy(None, false).await;
        self.slot.driver.resume().await;
    }

    /// Sleeps, then passes a pause point. Ends early when the job is kicked (by a
    /// pause, a drained section, a cancel, a completion, a higher speed) or
    /// notified, also if that came before this call and was not looked at yet.
    ///
    /// Cancel: as for [`JobContext::pause_point`].
    pub async fn sleep(&self, duration: Duration) {
        self.sleep_once(Some(duration), true).await;
        self.pause_point().await;
    }

    /// [`JobContext::sleep`] without an end of its own.
    pub async fn idle(&self) {
        self.sleep_once(None, true).await;
        self.pause_point().await;
    }

    /// Ends when the job is kicked or notified, also if that came before this call
    /// and was not looked at yet. To be selected against the body's own requests:
    /// the job stays busy, and so a drained section waits for it.
    ///
    /// Cancel: nothing is lost; a kick that was not reported stays.
    pub async fn kicked(&self) {
        sync::assert_unlocked("a kick was awaited");
        poll_fn(|cx| {
            self.slot.waker.register(cx.waker());
            // Both are taken: one look answers both.
            let notified = self.slot.notified.swap(false, Ordering::SeqCst);
            let kicked = self.read(|job| job.kicked);
            if kicked {
                self.happen(Event::Looked);
            }
            if kicked || notified {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Charges `bytes` of work to the rate limit, waits until the next request may
    /// go, and passes a pause point.
    ///
    /// Pauses, drained sections and other early wake-ups do not shorten the wait;
    /// a higher limit does, and a forced cancel ends it.
    ///
    /// Cancel: what was charged stays charged.
    pub async fn throttle(&self, bytes: u64) {
        self.pause_point().await;
        self.slot.charged.fetch_add(bytes, Ordering::SeqCst);
        loop {
            let wait = self.throttle_wait();
            if wait.is_zero() || self.is_force_cancelled() {
                return;
            }
            self.sleep_once(Some(wait), false).await;
            self.pause_point().await;
        }
    }

    /// While the guard lives, no drained section waits for this job: for a body
    /// that drains its own source. It must begin no request that the section is
    /// meant to stop.
    pub fn own_drain(&self) -> OwnDrain {
        let jobs = Jobs {
            shared: Arc::clone(&self.shared),
        };
        OwnDrain::new(jobs, self.slot.key)
    }

    /// Accounts for what was charged ([`JobNotifier::charge`]), and says how long
    /// the rate limit wants the next request to wait. For a body with several
    /// requests in flight, which cannot stop in [`JobContext::throttle`].
    pub fn throttle_wait(&self) -> Duration {
        let bytes = self.slot.charged.swap(0, Ordering::SeqCst);
        let now = self.shared.environment.now();
        let mut locked = self.shared.lock();
        locked
            .core
            .machine
            .limit(self.slot.key)
            .map_or(Duration::ZERO, |limit| limit.charge(now, bytes))
    }

    async fn sleep_once(&self, duration: Option<Duration>, notifiable: bool) {
        sync::assert_unlocked("a sleep was begun");
        let timer = duration.map(|duration| self.shared.environment.sleep(duration));
        self.happen(Event::Sleep {
            timer: timer.is_some(),
        });
        self.until_busy(timer, notifiable).await;
    }

    /// Waits until the body is re-entered, re-entering it itself when the timer
    /// fires or, if asked for, when somebody notifies.
    fn until_busy(&self, timer: Option<LocalFuture>, notifiable: bool) -> Yielded<'_> {
        Yielded {
            context: self,
            timer,
            notifiable,
            done: false,
        }
    }

    fn read<R>(&self, look: impl FnOnce(&JobState) -> R) -> R
    where
        R: Default,
    {
        let locked = self.shared.lock();
        locked
            .core
            .machine
            .job(self.slot.key)
            .map_or_else(R::default, look)
    }

    fn happen(&self, event: Event) {
        self.shared.happen(self.slot.key, event);
    }
}

/// The body has yielded, or is about to find out that it need not.
struct Yielded<'a> {
    context: &'a JobContext,
    timer: Option<LocalFuture>,
    notifiable: bool,
    done: bool,
}

impl Future for Yielded<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let context = self.context;
        // Registered before the test: who re-enters sets `busy` before it wakes.
        context.slot.waker.register(cx.waker());
        let notified = self.notifiable && context.slot.notified.swap(false, Ordering::SeqCst);
        let fired = notified
            || self
                .timer
                .as_mut()
                .is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
        if fired {
            // One of many wakers; which one wins does not matter to the body.
            context.happen(Event::WakeSelf);
        }
        // A job that is gone has nothing to wait for.
        self.done = fired || !context.read(|job| !job.busy);
        if self.done {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

impl Drop for Yielded<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.context.happen(Event::WakeSelf);
        }
    }
}

/// What was asked of a job, for hooks that outlive the body. Does not keep the job.
#[derive(Clone)]
pub struct JobWatch {
    shared: Weak<Shared>,
    key: JobKey,
}

impl JobWatch {
    /// Whether the job is to end without applying its result, also if the driver's
    /// `cancel` hook has not been called yet. Any thread; takes the job mutex.
    pub fn is_force_cancelled(&self) -> bool {
        let Some(shared) = self.shared.upgrade() else {
            return true;
        };
        let locked = shared.lock();
        let job = locked.core.machine.job(self.key);
        job.is_none_or(|job| job.force_cancel)
    }
}

/// Wakes a job's body from any thread, I/O paths included: takes no lock.
#[derive(Clone)]
pub struct JobNotifier {
    slot: Arc<Slot>,
}

impl JobNotifier {
    pub(crate) fn new(slot: Arc<Slot>) -> Self {
        Self { slot }
    }

    /// Ends the body's present or next [`JobContext::sleep`], `idle` or `kicked`.
    pub fn notify(&self) {
        if !self.slot.notified.swap(true, Ordering::SeqCst) {
            self.slot.waker.wake();
        }
    }

    /// Charges work done on the job's behalf to its rate limit, in bytes. Does not
    /// wait.
    pub fn charge(&self, bytes: u64) {
        self.slot.charged.fetch_add(bytes, Ordering::SeqCst);
    }

    /// For what the job itself keeps, directly or through nodes.
    pub(crate) fn downgrade(&self) -> WeakJobNotifier {
        WeakJobNotifier {
            slot: Arc::downgrade(&self.slot),
        }
    }
}

/// A [`JobNotifier`] that keeps no job: a notifier keeps the driver, so a driver that
/// keeps one, in a node say, would keep itself and every node that it uses.
pub(crate) struct WeakJobNotifier {
    slot: Weak<Slot>,
}

impl WeakJobNotifier {
    /// As [`JobNotifier::notify`], if the job is still there.
    pub(crate) fn notify(&self) {
        if let Some(slot) = self.slot.upgrade() {
            JobNotifier::new(slot).notify();
        }
    }

    /// As [`JobNotifier::charge`], if the job is still there.
    pub(crate) fn charge(&self, bytes: u64) {
        if let Some(slot) = self.slot.upgrade() {
            JobNotifier::new(slot).charge(bytes);
        }
    }
}
