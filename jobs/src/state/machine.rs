//! All jobs and transactions, and the one door through which they change.

use std::collections::BTreeMap;

use super::job::{JobSettings, JobState, SoftCancel};
use super::status::{JobStatus, JobVerb};
use super::txn::Txn;
use crate::error::{JobError, JobFailure};
use crate::event::{ErrorAction, IoSide, IoStatus, OnError};
use crate::history::JobOutcome;
use crate::id::{JobKey, TxnKey};

/// Something that happens to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its creator has set it up: the body may run.
    Start,
    /// Its creator could not set it up.
    SetUpFailed,

    /// The user asks for a pause.
    UserPause,
    /// The user takes his pause back.
    UserResume,
    /// Somebody wants it to end early.
    Cancel { force: bool },
    /// The user wants it to finish.
    Complete,
    /// The user wants its result applied.
    Finalize,
    /// The user has seen its end.
    Dismiss,
    /// The user sets its rate limit; bytes per second, 0 for none.
    SetSpeed(u64),

    /// A drained section begins on one of its edges.
    DrainedBegin,
    /// A drained section ends on one of its edges.
    DrainedEnd,
    /// The job itself begins to drain: its own edges need not wait for it.
    OwnDrainBegin,
    /// The drained section of the job's own ended.
    OwnDrainEnd,

    /// The body is quiet in a pause point and parks if it still should.
    Park,
    /// The body goes to sleep unless there is a reason not to.
    Sleep { timer: bool },
    /// The body goes on by itself: its timer fired, or it was dropped there.
    WakeSelf,
    /// The body has looked at its flags.
    Looked,
    /// The body has converged.
    Ready,
    /// The body makes no progress; bytes per second that are dirtied and copied.
    Stalled { dirty: u64, copy: u64 },
    /// A request of the body failed.
    IoFailed {
        side: IoSide,
        errno: i32,
        policy: OnError,
    },
    /// The body has returned.
    BodyReturned(Result<(), JobFailure>),

    /// The prepare hook ended.
    Prepared(Result<(), JobFailure>),
    /// The commit or abort hook and the clean hook ended.
    Finished,
}

/// What has to be done because of an event, after the job mutex is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Tell clients.
    Announce(JobKey, Announcement),
    /// Run the body at its home.
    StartBody(JobKey),
    /// Poll the body: it was re-entered or kicked.
    WakeBody(JobKey),
    /// Call a hook of the driver on main; hooks are called in order.
    Hook(JobKey, Hook),
    /// The job has ended so.
    Ended(JobKey, JobOutcome),
    /// The job is gone from the machine: let go of its driver, on main.
    Free(JobKey),
    /// A bug: a change of status that the table forbids was refused. To be logged.
    Refused {
        key: JobKey,
        from: JobStatus,
        to: JobStatus,
    },
}

/// News for clients; the shell adds the id and the progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Announcement {
    Status(JobStatus),
    Ready { speed: u64 },
    Stalled { dirty: u64, copy: u64 },
    Pending,
    Error { side: IoSide, action: ErrorAction },
    Completed { speed: u64, error: Option<String> },
    Cancelled { speed: u64 },
}

/// A hook of a driver that runs on main.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    UserResume,
    Cancel {
        force: bool,
    },
    Complete,
    SetSpeed(u64),
    /// Comes back as [`Event::Prepared`].
    Prepare,
    /// Commit or abort, then clean. Comes back as [`Event::Finished`].
    Finish {
        commit: bool,
    },
}

/// Every job and every transaction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(super) jobs: BTreeMap<JobKey, JobState>,
    pub(super) txns: BTreeMap<TxnKey, Txn>,
    last_job: u64,
    last_txn: u64,
    /// Effects of the step being made.
    pub(super) effects: Vec<Effect>,
}

impl Machine {
    /// The listed jobs, oldest first.
    pub(crate) fn jobs(&self) -> impl DoubleEndedIterator<Item = (JobKey, &JobState)> {
        self.jobs.iter().map(|(&key, job)| (key, job))
    }

    /// A job that is not gone yet.
    pub(crate) fn job(&self, key: JobKey) -> Option<&JobState> {
        self.jobs.get(&key)
    }

    /// Mutable access to what the rate limit counts.
    pub(crate) fn limit(&mut self, key: JobKey) -> Option<&mut super::limit::RateLimit> {
        self.jobs.get_mut(&key).map(|job| &mut job.limit)
    }

    /// A transaction for jobs that are to succeed or fail together. It lives as
    /// long as it has members, or until [`Machine::close_txn`].
    pub(crate) fn new_txn(&mut self) -> TxnKey {
        self.last_txn += 1;
        let key = TxnKey(self.last_txn);
        self.txns.insert(key, Txn::new());
        key
    }

    /// The creator of a transaction lets go of it: no more members.
    pub(crate) fn close_txn(&mut self, key: TxnKey) {
        if self
            .txns
            .get(&key)
            .is_some_and(|txn| txn.members.is_empty())
        {
            self.txns.remove(&key);
        }
    }

    /// Creates a job, in `txn` or in a private transaction.
    ///
    /// # Errors
    ///
    /// The id is in use, or the transaction is finishing.
    pub(crate) fn create(
        &mut self,
        settings: JobSettings,
        speed: u64,
        txn: Option<TxnKey>,
    ) -> Result<(JobKey, Vec<Effect>), JobError> {
        if let Some(id) = &settings.id
            && self
                .jobs
                .values()
                .any(|job| job.settings.id.as_ref() == Some(id))
        {
            return Err(JobError::IdInUse {
                id: id.as_str().to_owned(),
            });
        }
        let txn = match txn {
            Some(txn) if self.txns.get(&txn).is_some_and(Txn::takes_members) => txn,
            Some(_) => return Err(JobError::TxnClosed),
            None => self.new_txn(),
        };
        self.last_job += 1;
        let key = JobKey(self.last_job);
        self.jobs.insert(key, JobState::new(settings, txn, speed));
        if let Some(txn) = self.txns.get_mut(&txn) {
            txn.members.push(key);
        }
        self.set_status(key, JobStatus::Created);
        Ok((key, std::mem::take(&mut self.effects)))
    }

    /// Lets `event` happen to `key`.
    ///
    /// # Errors
    ///
    /// Only requests of clients are refused; then nothing has changed. Anything
    /// else that comes too late, for a job that is over or gone, is ignored.
    pub(crate) fn step(&mut self, key: JobKey, event: Event) -> Result<Vec<Effect>, JobError> {
        debug_assert!(self.effects.is_empty());
        match event {
            Event::Start => self.start(key),
            Event::SetUpFailed => self.set_up_failed(key),
            Event::UserPause => self.user_pause(key)?,
            Event::UserResume => self.user_resume(key)?,
            Event::Cancel { force } => self.cancel(key, force)?,
            Event::Complete => self.complete(key)?,
            Event::Finalize => self.user_finalize(key)?,
            Event::Dismiss => {
                self.check_verb(key, JobVerb::Dismiss)?;
                self.dismiss(key);
            }
            Event::SetSpeed(speed) => self.set_speed(key, speed)?,
            Event::DrainedBegin => self.pause(key),
            Event::DrainedEnd => self.resume(key),
            Event::OwnDrainBegin => self.with(key, |job| job.own_drains += 1),
            Event::OwnDrainEnd => self.with(key, |job| {
                debug_assert!(job.own_drains > 0, "drained section ended twice");
                job.own_drains = job.own_drains.saturating_sub(1);
            }),
            Event::Park => self.park(key),
            Event::Sleep { timer } => self.sleep(key, timer),
            Event::WakeSelf => self.wake_self(key),
            Event::Looked => self.with(key, |job| job.kicked = false),
            Event::Ready => self.ready(key),
            Event::Stalled { dirty, copy } => {
                self.announce(key, Announcement::Stalled { dirty, copy });
            }
            Event::IoFailed {
                side,
                errno,
                policy,
            } => self.io_failed(key, side, errno, policy),
            Event::BodyReturned(result) => self.body_returned(key, result),
            Event::Prepared(result) => self.prepared(key, result),
            Event::Finished => self.finished(key),
        }
        Ok(std::mem::take(&mut self.effects))
    }

    /// Refuses `verb` where the table does.
    pub(crate) fn check_verb(&self, key: JobKey, verb: JobVerb) -> Result<&JobState, JobError> {
        let job = self.jobs.get(&key).ok_or(JobError::NotFound)?;
        if verb.allowed_in(job.status) {
            Ok(job)
        } else {
            Err(JobError::Verb {
                id: job.id_text(),
                status: job.status,
                verb,
            })
        }
    }

    /// The only place where a status changes.
    ///
    /// # Panics
    ///
    /// In debug builds, on a transition that the table forbids. A release build
    /// logs and refuses it.
    pub(super) fn set_status(&mut self, key: JobKey, to: JobStatus) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        let from = job.status;
        if !from.may_become(to) {
            self.effects.push(Effect::Refused { key, from, to });
            debug_assert!(false, "illegal transition {from} -> {to} of {key:?}");
            return;
        }
        job.status = to;
        if from != to {
            self.announce(key, Announcement::Status(to));
        }
    }

    pub(super) fn announce(&mut self, key: JobKey, what: Announcement) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        let block_jobs_only = !matches!(what, Announcement::Status(_));
        if job.settings.id.is_some() && (job.settings.block_job || !block_jobs_only) {
            self.effects.push(Effect::Announce(key, what));
        }
    }

    pub(super) fn hook(&mut self, key: JobKey, hook: Hook) {
        self.effects.push(Effect::Hook(key, hook));
    }

    fn with(&mut self, key: JobKey, change: impl FnOnce(&mut JobState)) {
        if let Some(job) = self.jobs.get_mut(&key) {
            change(job);
        }
    }

    // The creator's side.

    fn start(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        // Cancelled in between: its transaction ends it.
        if job.status != JobStatus::Created {
            return;
        }
        job.pause_count -= 1;
        job.parked = false;
        job.started = true;
        job.busy = true;
        self.set_status(key, JobStatus::Running);
        self.effects.push(Effect::StartBody(key));
    }

    fn set_up_failed(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        if job.status != JobStatus::Created {
            return;
        }
        let txn = job.txn;
        self.leave_txn(key);
        self.gone(key);
        // The others may have waited for this one only.
        self.all_waiting(txn);
        self.all_aborted(txn);
    }

    /// Null, and out of the list.
    pub(super) fn gone(&mut self, key: JobKey) {
        self.set_status(key, JobStatus::Null);
        self.jobs.remove(&key);
        self.effects.push(Effect::Free(key));
    }

    // The user's side.

    fn user_pause(&mut self, key: JobKey) -> Result<(), JobError> {
        if self.check_verb(key, JobVerb::Pause)?.user_paused {
            return Err(JobError::AlreadyPaused);
        }
        self.with(key, |job| job.user_paused = true);
        self.pause(key);
        Ok(())
    }

    fn user_resume(&mut self, key: JobKey) -> Result<(), JobError> {
        let job = self.jobs.get(&key).ok_or(JobError::NotFound)?;
        if !job.user_paused {
            return Err(JobError::NotPaused);
        }
        self.check_verb(key, JobVerb::Resume)?;
        self.lift_user_pause(key);
        self.resume(key);
        Ok(())
    }

    /// The user looked after the job: his pause and the error are history. The
    /// counter is the caller's.
    fn lift_user_pause(&mut self, key: JobKey) {
        self.with(key, |job| {
            job.user_paused = false;
            job.io_status = IoStatus::Ok;
        });
        self.hook(key, Hook::UserResume);
    }

    fn cancel(&mut self, key: JobKey, force: bool) -> Result<(), JobError> {
        let job = self.jobs.get(&key).ok_or(JobError::NotFound)?;
        if job.user_paused && !force {
            return Err(JobError::CancelPaused { id: job.id_text() });
        }
        self.check_verb(key, JobVerb::Cancel)?;
        // Its result is being applied, or waits only for other members' results
        // to be applied: too late to take it back.
        if self.is_committing(key) {
            return Ok(());
        }
        self.request_cancel(key, force);
        let Some(job) = self.jobs.get(&key) else {
            return Ok(());
        };
        if job.status == JobStatus::Created || job.deferred {
            if job.force_cancel {
                self.fail(key, JobFailure::cancelled());
            }
        } else {
            self.enter(key);
        }
        Ok(())
    }

    /// Sets the flags of a cancel and lifts a user's pause.
    pub(super) fn request_cancel(&mut self, key: JobKey, force: bool) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        let finishes =
            job.settings.soft_cancel == SoftCancel::FinishesWhenReady && job.status.is_ready();
        let force = force || !finishes || job.status == JobStatus::Created;
        job.cancel_requested = true;
        job.force_cancel |= force;
        if job.user_paused {
            job.pause_count -= 1;
            self.lift_user_pause(key);
        }
        self.hook(key, Hook::Cancel { force });
    }

    fn complete(&mut self, key: JobKey) -> Result<(), JobError> {
        let job = self.check_verb(key, JobVerb::Complete)?;
        if job.cancel_requested || !job.settings.completes {
            return Err(JobError::CannotComplete { id: job.id_text() });
        }
        self.with(key, |job| job.complete_requested = true);
        self.hook(key, Hook::Complete);
        self.enter(key);
        Ok(())
    }

    fn user_finalize(&mut self, key: JobKey) -> Result<(), JobError> {
        let txn = self.check_verb(key, JobVerb::Finalize)?.txn;
        self.finalize(txn);
        Ok(())
    }

    pub(super) fn dismiss(&mut self, key: JobKey) {
        self.gone(key);
    }

    fn set_speed(&mut self, key: JobKey, speed: u64) -> Result<(), JobError> {
        self.check_verb(key, JobVerb::SetSpeed)?;
        let Some(job) = self.jobs.get_mut(&key) else {
            return Ok(());
        };
        // A body between computing its wait and sleeping is kicked as well as
        // one that sleeps.
        let wake = job.limit.set_speed(speed) && (job.sleeping || job.busy);
        self.hook(key, Hook::SetSpeed(speed));
        if wake {
            self.enter(key);
        }
        Ok(())
    }

    // Pauses of all kinds.

    fn pause(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        job.pause_count += 1;
        if !job.parked {
            self.enter(key);
        }
    }

    fn resume(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        debug_assert!(job.pause_count > 0, "resumed more often than paused");
        job.pause_count = job.pause_count.saturating_sub(1);
        // A timer is the rate limit's: it holds through pauses.
        if job.pause_count == 0 && !job.sleeping {
            self.enter(key);
        }
    }

    /// Re-enters a body that has yielded: a test-and-set of `busy`, so that one
    /// waker wins. A body that runs is told to look at its flags.
    pub(super) fn enter(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if !job.started || job.deferred {
            return;
        }
        if job.busy {
            if !job.kicked {
                job.kicked = true;
                self.effects.push(Effect::WakeBody(key));
            }
            return;
        }
        if job.parked && job.should_pause() {
            return;
        }
        self.make_busy(key);
        self.effects.push(Effect::WakeBody(key));
    }

    /// The body runs again; a parked job gets the status back that it had.
    fn make_busy(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        job.busy = true;
        job.sleeping = false;
        job.settled = false;
        if std::mem::take(&mut job.parked) {
            let back = match job.status {
                JobStatus::Standby => JobStatus::Ready,
                _ => JobStatus::Running,
            };
            self.set_status(key, back);
        }
    }

    // The body's side.

    fn park(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if !job.busy || !job.should_pause() {
            return;
        }
        let status = match job.status {
            JobStatus::Running => JobStatus::Paused,
            JobStatus::Ready => JobStatus::Standby,
            _ => return,
        };
        job.busy = false;
        job.parked = true;
        job.kicked = false;
        self.set_status(key, status);
    }

    fn sleep(&mut self, key: JobKey, timer: bool) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if !job.busy || job.deferred {
            return;
        }
        // Checked together with giving up `busy`: what came after the body last
        // looked has left its kick here.
        if std::mem::take(&mut job.kicked) || job.force_cancel || job.should_pause() {
            return;
        }
        job.busy = false;
        job.sleeping = timer;
    }

    pub(super) fn wake_self(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        if !job.busy && !job.deferred && job.started {
            self.make_busy(key);
        }
    }

    fn ready(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        // A cancel may have come since the body last looked.
        if job.status != JobStatus::Running || job.force_cancel {
            return;
        }
        job.settled = true;
        let first = !std::mem::replace(&mut job.ready_announced, true);
        let speed = job.limit.speed();
        self.set_status(key, JobStatus::Ready);
        if first {
            self.announce(key, Announcement::Ready { speed });
        }
    }

    fn io_failed(&mut self, key: JobKey, side: IoSide, errno: i32, policy: OnError) {
        let action = policy.action(errno);
        self.announce(key, Announcement::Error { side, action });
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if action != ErrorAction::Stop || job.deferred {
            return;
        }
        if job.io_status == IoStatus::Ok {
            job.io_status = if errno == libc::ENOSPC {
                IoStatus::NoSpace
            } else {
                IoStatus::Failed
            };
        }
        // As if the user had paused it: only he can resume it.
        if !std::mem::replace(&mut job.user_paused, true) {
            self.pause(key);
        }
    }
}
