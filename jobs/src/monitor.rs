//! The monitor side: who holds the job mutex may look jobs up and act on them.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use block::runtime::IothreadHandle;
use block::{AttachmentKind, BackendUser, ChildRole, GraphHandle, Node};

use crate::context::JobNotifier;
use crate::drain::DrainUser;
use crate::driver::{JobChange, JobDetails, JobDriver, JobKind};
use crate::effects::Effects;
use crate::error::JobError;
use crate::history::EndedJob;
use crate::home::{Environment, RuntimeEnvironment};
use crate::id::{JobId, JobKey, TxnKey};
use crate::pair::ActivePair;
use crate::progress::Progress;
use crate::query::JobInfo;
use crate::shared::{Locked, Shared, Slot};
use crate::state::{Event, JobSettings, JobState, JobStatus, JobVerb};
use crate::sync;
use crate::sync::atomic::{AtomicBool, AtomicU64};

/// All jobs of this process. A handle: clones mean the same jobs.
#[derive(Clone)]
pub struct Jobs {
    pub(crate) shared: Arc<Shared>,
}

/// How a job is to be created.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// What it does.
    pub kind: JobKind,
    /// What clients call it. `None` is refused as an invalid (empty) id unless
    /// the job is internal.
    pub id: Option<String>,
    /// Not listed, and no events. Has no id.
    pub internal: bool,
    /// Apply the result without being asked. Default true.
    pub auto_finalize: bool,
    /// Forget the job at its end without being asked. Default true.
    pub auto_dismiss: bool,
    /// Rate limit in bytes/s; 0 is none.
    pub speed: u64,
    /// The transaction to join; by default one of its own.
    pub txn: Option<TxnKey>,
    /// Where the body runs; by default an iothread of its own, which lives from
    /// start to end of the job.
    pub home: Option<IothreadHandle>,
}

impl JobSpec {
    /// A job of this kind, with the defaults of every field, and so without an
    /// id.
    pub fn new(kind: JobKind) -> Self {
        Self {
            kind,
            id: None,
            internal: false,
            auto_finalize: true,
            auto_dismiss: true,
            speed: 0,
            txn: None,
            home: None,
        }
    }
}

impl Jobs {
    /// No jobs yet. Hooks and events wait until [`Jobs::attach_main`].
    pub fn new(graph: GraphHandle) -> Self {
        Self::with_environment(Box::new(RuntimeEnvironment { graph }))
    }

    pub(crate) fn with_environment(environment: Box<dyn Environment>) -> Self {
        Self {
            shared: Shared::new(environment),
        }
    }

    /// Takes the job mutex. Any thread.
    ///
    /// Hold it for a lookup and what is decided by it, drop it, and give the
    /// effects to [`Jobs::run`]. [`Jobs::act`] does all of that.
    ///
    /// # Panics
    ///
    /// In debug builds, if this thread holds it already.
    pub fn lock(&self) -> JobsGuard<'_> {
        JobsGuard {
            locked: self.shared.lock(),
        }
    }

    /// Runs effects. Any thread.
    ///
    /// # Panics
    ///
    /// In debug builds, if this thread holds the job mutex.
    pub fn run(&self, effects: Effects) {
        effects.run();
    }

    /// One critical section: takes the job mutex, lets `decide` look up and act,
    /// releases it, and runs the effects. Any thread.
    ///
    /// ```no_run
    /// # fn example(jobs: &jobs::Jobs) -> Result<(), jobs::JobError> {
    /// jobs.act(|guard| {
    ///     let key = guard.find("j0")?;
    ///     guard.pause(key)
    /// })
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// What `decide` gives.
    pub fn act<E>(
        &self,
        decide: impl FnOnce(&mut JobsGuard<'_>) -> Result<Effects, E>,
    ) -> Result<(), E> {
        let effects = decide(&mut self.lock())?;
        effects.run();
        Ok(())
    }

    /// Lets a drained section stop the job: to be given to
    /// [`block::Graph::attach`] for each of its backends. Any thread.
    pub fn backend_user(&self, key: JobKey, kind: AttachmentKind) -> Arc<dyn BackendUser> {
        Arc::new(DrainUser::new(self.clone(), key, kind))
    }

    /// Jobs that have ended, the last one last: at most [`HISTORY_LEN`](crate::HISTORY_LEN),
    /// internal ones left out. Any thread.
    pub fn history(&self) -> Vec<EndedJob> {
        self.lock().locked.core.history.list()
    }

    /// As [`Jobs::backend_user`], for what the job's `filter` uses as a child in `role`: to
    /// the graph it is the filter that does.
    pub(crate) fn backend_user_of_filter(
        &self,
        key: JobKey,
        filter: &Node,
        role: ChildRole,
    ) -> DrainUser {
        let parent = filter.name().into();
        DrainUser::new(self.clone(), key, AttachmentKind::Child { parent, role })
    }

    /// What `query-jobs` and `query-block-jobs` show, newest job first, as with
    /// QEMU. Internal jobs are left out. Any thread.
    pub fn query(&self) -> Vec<JobInfo> {
        let listed: Vec<(JobInfo, Arc<Slot>)> = self.lock().query_locked();
        listed
            .into_iter()
            .map(|(mut info, slot)| {
                let JobDetails {
                    actively_synced,
                    copy_mode,
                    rates,
                    comparison,
                    fleecing,
                } = slot.driver.query();
                info.actively_synced = actively_synced;
                info.copy_mode = copy_mode;
                info.rates = rates;
                info.comparison = comparison;
                info.fleecing = fleecing;
                info
            })
            .collect()
    }

    /// The pairs of nodes that jobs keep equal. Any thread.
    pub(crate) fn pairs(&self) -> Vec<ActivePair> {
        self.shared.pairs()
    }

    pub(crate) fn happen(&self, key: JobKey, event: Event) {
        self.shared.happen(key, event);
    }
}

/// The job mutex, held: the only way to the operations of the monitor side.
///
/// Between taking and dropping it no job changes but by it. It is a leaf: no other
/// lock is taken, nothing awaited and no effect run while it lives. It cannot
/// leave its thread, so a task that may move cannot keep it over an await:
///
/// ```compile_fail
/// fn spawn(_: impl Future<Output = ()> + Send) {}
/// fn wrong(jobs: &'static jobs::Jobs) {
///     spawn(async move {
///         let guard = jobs.lock();
///         std::future::ready(()).await;
///         drop(guard);
///     });
/// }
/// ```
///
/// ```compile_fail,E0277
/// fn wrong(jobs: &jobs::Jobs) {
///     let guard = jobs.lock();
///     std::thread::scope(|scope| {
///         scope.spawn(move || drop(guard));
///     });
/// }
/// ```
///
/// And the verbs are nowhere else:
///
/// ```compile_fail,E0599
/// fn wrong(jobs: &jobs::Jobs, key: jobs::JobKey) {
///     let _ = jobs.pause(key);
/// }
/// ```
pub struct JobsGuard<'a> {
    locked: Locked<'a>,
}

impl JobsGuard<'_> {
    /// Creates a job; its body does not run before [`JobsGuard::start`].
    ///
    /// # Errors
    ///
    /// The id is malformed or in use, or the transaction takes no more members.
    pub fn create(
        &mut self,
        spec: JobSpec,
        driver: &Arc<dyn JobDriver>,
    ) -> Result<(JobKey, Effects), JobError> {
        let id = match (spec.id, spec.internal) {
            (None, true) => None,
            (Some(id), true) => return Err(JobError::InternalWithId { id }),
            (id, false) => Some(JobId::new(id.as_deref().unwrap_or(""))?),
        };
        let settings = JobSettings {
            id: id.clone(),
            block_job: spec.kind.block_job,
            auto_finalize: spec.auto_finalize,
            auto_dismiss: spec.auto_dismiss,
            soft_cancel: spec.kind.soft_cancel,
            completes: spec.kind.completes,
        };
        let core = &mut *self.locked.core;
        let (key, effects) = core.machine.create(settings, spec.speed, spec.txn)?;
        core.slots.insert(
            key,
            Arc::new(Slot {
                key,
                driver: Arc::clone(driver),
                id,
                job_type: spec.kind.name,
                block_job: spec.kind.block_job,
                created: SystemTime::now(),
                given_home: spec.home,
                progress: Arc::new(Progress::new()),
                waker: sync::WakerSlot::new(),
                notified: AtomicBool::new(false),
                charged: AtomicU64::new(0),
                comparison: OnceLock::new(),
                fleecing: OnceLock::new(),
            }),
        );
        Ok((key, self.locked.absorb_locked(effects)))
    }

    /// Starts a created job: it is running from here on, or was cancelled in
    /// between.
    pub fn start(&mut self, key: JobKey) -> Effects {
        self.locked.happen_locked(key, Event::Start)
    }

    /// Takes back a creation: no hook but `free` is called.
    pub fn set_up_failed(&mut self, key: JobKey) -> Effects {
        self.locked.happen_locked(key, Event::SetUpFailed)
    }

    /// A transaction for jobs that succeed or fail together, to be named in their
    /// [`JobSpec::txn`].
    ///
    /// Create all of its jobs, let go of it with [`JobsGuard::close_txn`], and start
    /// them all: it takes members until the first of them has ended. If one of them
    /// cannot be created, cancel those that were (by force: none has been started, so
    /// nothing but their status is told) and let go of it. Its members keep it.
    pub fn new_txn(&mut self) -> TxnKey {
        self.locked.core.machine.new_txn()
    }

    /// The creator of a transaction lets go of it. One that no job has joined is gone;
    /// others go with their last member.
    pub fn close_txn(&mut self, txn: TxnKey) {
        self.locked.core.machine.close_txn(txn);
    }

    /// Looks a job up for a `job-*` command.
    ///
    /// # Errors
    ///
    /// [`JobError::NotFound`].
    pub fn find(&self, id: &str) -> Result<JobKey, JobError> {
        self.find_any(id, false).ok_or(JobError::NotFound)
    }

    /// Looks a job up for a `block-job-*` command, which sees block jobs only.
    ///
    /// # Errors
    ///
    /// [`JobError::NoBlockJob`].
    pub fn find_block_job(&self, id: &str) -> Result<JobKey, JobError> {
        self.find_any(id, true)
            .ok_or_else(|| JobError::NoBlockJob { id: id.to_owned() })
    }

    fn find_any(&self, id: &str, block_jobs_only: bool) -> Option<JobKey> {
        self.locked
            .core
            .machine
            .jobs()
            .find(|(_, job)| {
                job.settings.id.as_ref().is_some_and(|it| it.as_str() == id)
                    && (job.settings.block_job || !block_jobs_only)
            })
            .map(|(key, _)| key)
    }

    /// Asks for a pause on the user's behalf. Noted, not done yet.
    ///
    /// # Errors
    ///
    /// The verb is refused, or the user has paused the job already.
    pub fn pause(&mut self, key: JobKey) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::UserPause)
    }

    /// Takes the user's pause back.
    ///
    /// # Errors
    ///
    /// The user has not paused the job, or the verb is refused.
    pub fn resume(&mut self, key: JobKey) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::UserResume)
    }

    /// Asks the job to end early. Noted, not done yet.
    ///
    /// While the job's result is being applied this is accepted and comes too
    /// late.
    ///
    /// # Errors
    ///
    /// The verb is refused, or the cancel is a soft one of a job that the user has
    /// paused.
    pub fn cancel(&mut self, key: JobKey, force: bool) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::Cancel { force })
    }

    /// Lets a ready job finish. Noted, not done yet.
    ///
    /// # Errors
    ///
    /// The verb is refused, a cancel was requested, or the job ends by itself.
    pub fn complete(&mut self, key: JobKey) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::Complete)
    }

    /// Lets a pending job, and with it its transaction, apply its result.
    ///
    /// # Errors
    ///
    /// The verb is refused.
    pub fn finalize(&mut self, key: JobKey) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::Finalize)
    }

    /// Forgets a concluded job.
    ///
    /// # Errors
    ///
    /// The verb is refused.
    pub fn dismiss(&mut self, key: JobKey) -> Result<Effects, JobError> {
        self.locked.step_locked(key, Event::Dismiss)
    }

    /// Sets the rate limit in bytes/s; 0 is none.
    ///
    /// # Errors
    ///
    /// The verb is refused, or `speed` is negative.
    pub fn set_speed(&mut self, key: JobKey, speed: i64) -> Result<Effects, JobError> {
        self.locked
            .core
            .machine
            .check_verb(key, JobVerb::SetSpeed)?;
        let speed = u64::try_from(speed).map_err(|_| JobError::NegativeSpeed)?;
        self.locked.step_locked(key, Event::SetSpeed(speed))
    }

    /// Changes a parameter of a running job: the job's driver is asked with
    /// [`ChangeRequest::apply`], after the guard is dropped. `None` is a change that
    /// no type of job knows.
    ///
    /// # Errors
    ///
    /// The verb is refused, or [`JobError::CannotChange`].
    pub fn change(
        &mut self,
        key: JobKey,
        change: Option<JobChange>,
    ) -> Result<ChangeRequest, JobError> {
        self.locked.core.machine.check_verb(key, JobVerb::Change)?;
        let change = change.ok_or(JobError::CannotChange)?;
        let slot = self.locked.core.slots.get(&key).ok_or(JobError::NotFound)?;
        Ok(ChangeRequest {
            driver: Arc::clone(&slot.driver),
            change,
        })
    }

    /// A drained section begins on one edge of the job.
    pub fn drained_begin(&mut self, key: JobKey) -> Effects {
        self.locked.happen_locked(key, Event::DrainedBegin)
    }

    /// A drained section ends on one edge of the job.
    pub fn drained_end(&mut self, key: JobKey) -> Effects {
        self.locked.happen_locked(key, Event::DrainedEnd)
    }

    /// The progress meter of a job, for whoever sets it up.
    ///
    /// # Errors
    ///
    /// [`JobError::NotFound`].
    pub fn progress(&self, key: JobKey) -> Result<Arc<Progress>, JobError> {
        let slot = self.locked.core.slots.get(&key).ok_or(JobError::NotFound)?;
        Ok(Arc::clone(&slot.progress))
    }

    /// Lets I/O paths wake the job's body, which need not have begun.
    ///
    /// # Errors
    ///
    /// [`JobError::NotFound`].
    pub(crate) fn notifier(&self, key: JobKey) -> Result<JobNotifier, JobError> {
        let slot = self.locked.core.slots.get(&key).ok_or(JobError::NotFound)?;
        Ok(JobNotifier::new(Arc::clone(slot)))
    }

    /// Whether main applies the result of the job's transaction, or is to.
    pub(crate) fn is_finishing_locked(&self, key: JobKey) -> bool {
        self.locked.core.machine.is_finishing(key)
    }

    /// Force-cancels all jobs that can be cancelled and dismisses the concluded.
    pub(crate) fn cancel_all_locked(&mut self) -> Effects {
        let jobs: Vec<(JobKey, JobStatus)> = self
            .locked
            .core
            .machine
            .jobs()
            .filter(|(_, job)| !job.force_cancel || job.status == JobStatus::Concluded)
            .map(|(key, job)| (key, job.status))
            .collect();
        let mut effects = Effects::none(self.locked.shared);
        for (key, status) in jobs {
            let event = if JobVerb::Dismiss.allowed_in(status) {
                Event::Dismiss
            } else {
                Event::Cancel { force: true }
            };
            // Refused only where the job ends by itself already.
            if let Ok(more) = self.locked.step_locked(key, event) {
                effects = effects.and(more);
            }
        }
        effects
    }

    pub(crate) fn is_empty_locked(&self) -> bool {
        self.locked.core.machine.jobs().next().is_none()
    }

    pub(crate) fn ids_locked(&self) -> Vec<String> {
        let core = &self.locked.core;
        core.slots
            .values()
            .map(|slot| slot.name().to_owned())
            .collect()
    }

    /// Who it is ("mirror job 'j0'"), and the type of a job that is listed.
    pub(crate) fn describe_locked(&self, key: JobKey) -> (String, Option<&'static str>) {
        match self.locked.core.slots.get(&key) {
            Some(slot) => (
                format!("{} job '{}'", slot.job_type, slot.name()),
                slot.id.as_ref().map(|_| slot.job_type),
            ),
            None => ("a job".to_owned(), None),
        }
    }

    /// The driver, if a drained section has to ask it whether to wait for the
    /// job.
    pub(crate) fn drain_busy_locked(&self, key: JobKey) -> Option<Arc<dyn JobDriver>> {
        let core = &self.locked.core;
        let busy = core.machine.job(key).is_some_and(JobState::is_drain_busy);
        let slot = core.slots.get(&key).filter(|_| busy)?;
        Some(Arc::clone(&slot.driver))
    }

    fn query_locked(&self) -> Vec<(JobInfo, Arc<Slot>)> {
        let core = &self.locked.core;
        core.machine
            .jobs()
            .rev()
            .filter_map(|(key, job)| {
                let slot = core.slots.get(&key)?;
                let info = JobInfo::new(job, slot.job_type, slot.progress.snapshot())?;
                Some((info, Arc::clone(slot)))
            })
            .collect()
    }
}

/// A change that the state of the job allows; its driver has the last word.
#[must_use = "nothing is changed before `apply`"]
pub struct ChangeRequest {
    driver: Arc<dyn JobDriver>,
    change: JobChange,
}

impl ChangeRequest {
    /// Asks the driver. Not while holding a [`JobsGuard`].
    ///
    /// # Errors
    ///
    /// [`JobError::ChangeRefused`] with the driver's text.
    pub fn apply(self) -> Result<(), JobError> {
        sync::assert_unlocked("a hook was called");
        self.driver
            .change(&self.change)
            .map_err(JobError::ChangeRefused)
    }
}
