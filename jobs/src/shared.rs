//! What all handles share: the job mutex and what is behind it, and per job what
//! synchronises itself.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use block::leaf::LeafMark;
use block::runtime::IothreadHandle;

use crate::backup::FleecingInfo;
use crate::compare::Comparison;
use crate::context::{JobContext, JobNotifier};
use crate::driver::JobDriver;
use crate::effects::Effects;
use crate::error::{JobError, JobFailure};
use crate::event::{BlockJobProgress, JobEvent, JobEventKind};

use crate::history::{EndedJob, History, JobOutcome};
use crate::home::{Environment, Home};
use crate::id::{JobId, JobKey};
use crate::pair::ActivePair;
use crate::progress::Progress;
use crate::state::{Announcement, Effect, Event, Hook, JobState, Machine};
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{Mutex, MutexGuard, WakerSlot};

/// The part of a job that is not behind the job mutex.
pub(crate) struct Slot {
    // Set once.
    pub(crate) key: JobKey,
    pub(crate) driver: Arc<dyn JobDriver>,
    /// `None` for an internal job.
    pub(crate) id: Option<JobId>,
    pub(crate) job_type: &'static str,
    pub(crate) block_job: bool,
    pub(crate) created: SystemTime,
    /// The home that the creator asked for.
    pub(crate) given_home: Option<IothreadHandle>,

    // Own synchronisation.
    pub(crate) progress: Arc<Progress>,
    /// The body's task.
    pub(crate) waker: WakerSlot,
    /// Somebody called [`crate::JobNotifier::notify`] since the body last looked.
    pub(crate) notified: AtomicBool,
    /// Bytes charged to the rate limit that its accounting has not seen.
    pub(crate) charged: AtomicU64,
    /// What a comparison has found; set when its body ends.
    pub(crate) comparison: OnceLock<Comparison>,
    /// How the fleecing of a backup got on; set when its body ends.
    pub(crate) fleecing: OnceLock<FleecingInfo>,
}

impl Slot {
    /// For thread names, logs and refusals.
    pub(crate) fn name(&self) -> &str {
        self.id.as_ref().map_or("internal", JobId::as_str)
    }
}

/// Work for main, with what it needs once the job is out of the list.
pub(crate) enum MainWork {
    Hook(Arc<Slot>, Hook),
    /// The last of a job: its driver's last call, and the end of its home.
    Free(Arc<Slot>, Option<Box<dyn Home>>),
}

/// Everything that the job mutex protects.
#[derive(Default)]
pub(crate) struct Core {
    pub(crate) machine: Machine,
    pub(crate) slots: BTreeMap<JobKey, Arc<Slot>>,
    homes: BTreeMap<JobKey, Box<dyn Home>>,
    /// Events that main has not delivered yet, in order.
    pub(crate) outbox: VecDeque<JobEvent>,
    sequence: u64,
    /// Calls that cannot wait, and the last of each job.
    pub(crate) quick: VecDeque<MainWork>,
    /// Hooks that may wait: of each transaction one at a time.
    pub(crate) slow: VecDeque<MainWork>,
    /// What is left of jobs that have ended.
    pub(crate) history: History,
}

/// What every [`Jobs`](crate::Jobs), [`JobContext`] and [`Effects`] points to.
pub(crate) struct Shared {
    /// **The job mutex.** A leaf: while it is held no other lock is taken,
    /// nothing is awaited, and neither a hook nor a waker nor I/O runs. If that
    /// ceased to hold, a drain or a vCPU could wait for a job that waits for it.
    core: Mutex<Core>,
    pub(crate) environment: Box<dyn Environment>,
    /// Main's task for events and quick hooks.
    pub(crate) main_quick: WakerSlot,
    /// Main's task for hooks that wait.
    pub(crate) main_slow: WakerSlot,
}

/// The job mutex, held.
pub(crate) struct Locked<'a> {
    // Dropped in this order: the mutex first, then the mark.
    pub(crate) core: MutexGuard<'a, Core>,
    pub(crate) shared: &'a Arc<Shared>,
    _mark: LeafMark,
}

impl Shared {
    pub(crate) fn new(environment: Box<dyn Environment>) -> Arc<Self> {
        Arc::new(Self {
            core: Mutex::new(Core::default()),
            environment,
            main_quick: WakerSlot::new(),
            main_slow: WakerSlot::new(),
        })
    }

    pub(crate) fn lock(self: &Arc<Self>) -> Locked<'_> {
        let mark = LeafMark::new("the job mutex");
        // A panic of an earlier holder is a bug that was reported already; each
        // step leaves the data consistent where it can panic.
        let core = self
            .core
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Locked {
            core,
            shared: self,
            _mark: mark,
        }
    }

    /// The pairs of nodes that jobs keep equal.
    pub(crate) fn pairs(self: &Arc<Self>) -> Vec<ActivePair> {
        let slots: Vec<(Arc<Slot>, bool)> = {
            let locked = self.lock();
            let core = &locked.core;
            let of = |(key, job): (JobKey, &JobState)| {
                let slot = core.slots.get(&key)?;
                Some((Arc::clone(slot), job.status.is_ready()))
            };
            core.machine.jobs().filter_map(of).collect()
        };
        let pairs = slots.into_iter().filter_map(|(slot, ready)| {
            Some(ActivePair {
                pair: slot.driver.pair()?,
                ready,
                notifier: JobNotifier::new(slot),
            })
        });
        pairs.collect()
    }

    /// Lets an event happen that cannot be refused, and runs its effects.
    pub(crate) fn happen(self: &Arc<Self>, key: JobKey, event: Event) {
        let effects = self.lock().happen_locked(key, event);
        effects.run();
    }

    pub(crate) fn wake_main(&self) {
        self.main_quick.wake();
        self.main_slow.wake();
    }

    /// Gives the job a home and its body to it.
    pub(crate) fn start_body(self: &Arc<Self>, slot: &Arc<Slot>) {
        let home = match self.environment.home(slot.name(), slot.given_home.as_ref()) {
            Ok(home) => home,
            Err(failure) => {
                self.happen(slot.key, Event::BodyReturned(Err(failure)));
                return;
            }
        };
        let end = BodyEnd {
            shared: Arc::clone(self),
            key: slot.key,
            reported: false,
        };
        let (shared, slot_there) = (Arc::clone(self), Arc::clone(slot));
        let stay = home.stay();
        home.spawn(Box::new(move || {
            Box::pin(async move {
                let driver = Arc::clone(&slot_there.driver);
                let context = JobContext::new(shared, slot_there, stay);
                context.pause_point().await;
                let result = driver.run(context).await;
                end.report(result);
            })
        }));
        // The body may be over by now: then nobody else will end its home.
        let left = self.lock().core.keep_home(slot.key, home);
        drop(left);
    }
}

impl Core {
    /// Keeps the home until the job is gone; gives it back if it is gone.
    fn keep_home(&mut self, key: JobKey, home: Box<dyn Home>) -> Option<Box<dyn Home>> {
        if self.slots.contains_key(&key) {
            self.homes.insert(key, home)
        } else {
            Some(home)
        }
    }
}

impl Locked<'_> {
    /// One step of the machine.
    pub(crate) fn step_locked(&mut self, key: JobKey, event: Event) -> Result<Effects, JobError> {
        let effects = self.core.machine.step(key, event)?;
        Ok(self.absorb_locked(effects))
    }

    /// One step that cannot be refused.
    pub(crate) fn happen_locked(&mut self, key: JobKey, event: Event) -> Effects {
        match self.step_locked(key, event) {
            Ok(effects) => effects,
            Err(error) => {
                debug_assert!(false, "refused: {error}");
                Effects::none(self.shared)
            }
        }
    }

    /// Queues what main is to do and to tell; what remains is run after unlock.
    pub(crate) fn absorb_locked(&mut self, list: Vec<Effect>) -> Effects {
        let mut effects = Effects::none(self.shared);
        let core = &mut *self.core;
        for effect in list {
            match effect {
                Effect::Announce(key, what) => core.announce_locked(key, what),
                Effect::StartBody(key) => effects.start.extend(core.slots.get(&key).cloned()),
                Effect::WakeBody(key) => effects.wake.extend(core.slots.get(&key).cloned()),
                Effect::Hook(key, hook) => {
                    let Some(slot) = core.slots.get(&key).cloned() else {
                        continue;
                    };
                    let work = MainWork::Hook(slot, hook);
                    match hook {
                        Hook::Prepare | Hook::Finish { .. } => core.slow.push_back(work),
                        Hook::UserResume
                        | Hook::Cancel { .. }
                        | Hook::Complete
                        | Hook::SetSpeed(_) => core.quick.push_back(work),
                    }
                }
                Effect::Ended(key, outcome) => core.remember_locked(key, outcome),
                Effect::Free(key) => {
                    let home = core.homes.remove(&key);
                    if let Some(slot) = core.slots.remove(&key) {
                        core.quick.push_back(MainWork::Free(slot, home));
                    }
                }
                Effect::Refused { key, from, to } => {
                    effects.refused.push((key, from, to));
                    continue;
                }
            }
            effects.main = true;
        }
        effects
    }
}

impl Core {
    /// Internal jobs are nobody's business.
    fn remember_locked(&mut self, key: JobKey, outcome: JobOutcome) {
        let Some(slot) = self.slots.get(&key) else {
            return;
        };
        let Some(id) = slot.id.clone() else {
            return;
        };
        let progress = slot.progress.snapshot();
        self.history.push(EndedJob {
            id,
            job_type: slot.job_type,
            block_job: slot.block_job,
            created: slot.created,
            ended: SystemTime::now(),
            current_progress: progress.current,
            total_progress: progress.total,
            outcome,
            comparison: slot.comparison.get().cloned(),
            fleecing: slot.fleecing.get().copied(),
        });
    }

    fn announce_locked(&mut self, key: JobKey, what: Announcement) {
        let Some(slot) = self.slots.get(&key) else {
            return;
        };
        let Some(id) = slot.id.clone() else {
            return;
        };
        let snapshot = slot.progress.snapshot();
        let progress = |speed| BlockJobProgress {
            len: snapshot.total,
            offset: snapshot.current,
            speed,
        };
        let kind = match what {
            Announcement::Status(status) => JobEventKind::StatusChange(status),
            Announcement::Ready { speed } => JobEventKind::Ready(progress(speed)),
            Announcement::Pending => JobEventKind::Pending,
            Announcement::Stalled { dirty, copy } => JobEventKind::Stalled { dirty, copy },
            Announcement::Error { side, action } => JobEventKind::Error {
                operation: side,
                action,
            },
            Announcement::Completed { speed, error } => JobEventKind::Completed {
                progress: progress(speed),
                error,
            },
            Announcement::Cancelled { speed } => JobEventKind::Cancelled(progress(speed)),
        };
        self.sequence += 1;
        self.outbox.push_back(JobEvent {
            sequence: self.sequence,
            time: SystemTime::now(),
            id,
            job_type: slot.job_type,
            kind,
        });
    }
}

/// Reports the end of a body, whichever way it ends.
struct BodyEnd {
    shared: Arc<Shared>,
    key: JobKey,
    reported: bool,
}

impl BodyEnd {
    fn report(mut self, result: Result<(), JobFailure>) {
        self.reported = true;
        self.shared.happen(self.key, Event::BodyReturned(result));
    }
}

impl Drop for BodyEnd {
    fn drop(&mut self) {
        if !self.reported {
            let failure = JobFailure::new(libc::EIO, "The job's iothread ended before the job");
            self.shared
                .happen(self.key, Event::BodyReturned(Err(failure)));
        }
    }
}
