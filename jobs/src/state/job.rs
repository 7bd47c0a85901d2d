//! The state of one job: every flag there is.

use super::limit::RateLimit;
use super::status::JobStatus;
use crate::error::JobFailure;
use crate::event::IoStatus;
use crate::id::{JobId, TxnKey};

/// What a soft cancel (`block-job-cancel` without `force`) means to a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SoftCancel {
    /// The same as a forced one: the body just stops.
    #[default]
    Forces,
    /// Once ready the job finishes what it has begun, and then ends with success
    /// (a mirror's target becomes a copy of that moment, without pivot). Before
    /// that it is the same as a forced one.
    FinishesWhenReady,
}

/// What is set at creation and never changes.
#[derive(Clone, Debug)]
pub(crate) struct JobSettings {
    /// `None` for an internal job: not listed, no events.
    pub(crate) id: Option<JobId>,
    /// Whether the `block-job-*` commands and events know it.
    pub(crate) block_job: bool,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    pub(crate) soft_cancel: SoftCancel,
    /// Whether the `complete` verb means something to it.
    pub(crate) completes: bool,
}

/// One job. All of it is protected by the job mutex, or is set at creation.
#[derive(Clone, Debug)]
pub(crate) struct JobState {
    pub(crate) settings: JobSettings,
    pub(crate) txn: TxnKey,
    pub(crate) status: JobStatus,
    /// Reasons to be parked: creation, the user, each drained edge.
    pub(crate) pause_count: u32,
    /// One of those reasons is the user (or an error policy on his behalf).
    pub(crate) user_paused: bool,
    /// The body was started. Never cleared.
    pub(crate) started: bool,
    /// The body runs. False while it has yielded and may be re-entered, before
    /// its start and after its end.
    pub(crate) busy: bool,
    /// Parked in a pause point; also from creation to start.
    pub(crate) parked: bool,
    /// The body was told to look at its flags and has not looked yet.
    pub(crate) kicked: bool,
    /// The body has yielded with a timer armed: only its end or a kick wakes it,
    /// a resume does not.
    pub(crate) sleeping: bool,
    /// The body has returned.
    pub(crate) deferred: bool,
    /// A cancel was asked for, softly or not. Never cleared.
    pub(crate) cancel_requested: bool,
    /// The body is to stop at once. Implies `cancel_requested`. Never cleared.
    pub(crate) force_cancel: bool,
    /// `complete` was accepted. Never cleared.
    pub(crate) complete_requested: bool,
    /// BLOCK_JOB_READY was sent.
    pub(crate) ready_announced: bool,
    /// The body has become ready and was not woken since: nothing is left to do.
    pub(crate) settled: bool,
    /// Drained sections that the job itself holds: these do not wait for it.
    pub(crate) own_drains: u32,
    pub(crate) io_status: IoStatus,
    pub(crate) limit: RateLimit,
    /// Why the job failed. Set at most once.
    pub(crate) failure: Option<JobFailure>,
}

impl JobState {
    /// A job before its creation.
    pub(super) fn new(settings: JobSettings, txn: TxnKey, speed: u64) -> Self {
        Self {
            settings,
            txn,
            status: JobStatus::Undefined,
            // Taken back by start.
            pause_count: 1,
            user_paused: false,
            started: false,
            busy: false,
            parked: true,
            kicked: false,
            sleeping: false,
            deferred: false,
            cancel_requested: false,
            force_cancel: false,
            complete_requested: false,
            ready_announced: false,
            settled: false,
            own_drains: 0,
            io_status: IoStatus::Ok,
            limit: RateLimit::new(speed),
            failure: None,
        }
    }

    /// Whether a pause point has to park the body.
    pub(crate) fn should_pause(&self) -> bool {
        self.pause_count > 0 && !self.force_cancel
    }

    /// Whether clients see the body at work. One that has just said that it is ready
    /// goes to sleep next, and who asks at that news is not to see how soon.
    pub(crate) fn shows_busy(&self) -> bool {
        self.busy && !(self.settled && self.status == JobStatus::Ready)
    }

    /// Whether a drained section has to wait for this job.
    pub(crate) fn is_drain_busy(&self) -> bool {
        self.busy && self.own_drains == 0 && !self.status.is_completed()
    }

    /// The id as text; empty for an internal job.
    pub(crate) fn id_text(&self) -> String {
        self.settings
            .id
            .as_ref()
            .map_or_else(String::new, |id| id.as_str().to_owned())
    }
}
