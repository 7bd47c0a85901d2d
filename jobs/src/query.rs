//! What queries show of a job.

use crate::backup::FleecingInfo;
use crate::compare::Comparison;
use crate::driver::{CopyMode, CopyRates};
use crate::event::IoStatus;
use crate::id::JobId;
use crate::progress::ProgressSnapshot;
use crate::state::{JobState, JobStatus};

/// Everything that `query-jobs` and `query-block-jobs` show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// The job's id; also the `device` of a block job.
    pub id: JobId,
    /// The job's type (`mirror`).
    pub job_type: &'static str,
    /// Whether `query-block-jobs` lists it.
    pub block_job: bool,
    /// Its status.
    pub status: JobStatus,
    /// Work done (`current-progress`, `offset`).
    pub current_progress: u64,
    /// All work (`total-progress`, `len`).
    pub total_progress: u64,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Whether the body is at work just now.
    pub busy: bool,
    /// Whether anything wants it parked, a drained section included.
    pub paused: bool,
    /// Rate limit in bytes/s; 0 is none.
    pub speed: u64,
    /// The first error since the user last looked after it.
    pub io_status: IoStatus,
    /// Whether it waits to be completed.
    pub ready: bool,
    /// Whether it applies its result without being asked.
    pub auto_finalize: bool,
    /// Whether it is forgotten at its end without being asked.
    pub auto_dismiss: bool,
    /// Mirror: source and target are the same at each completed write.
    pub actively_synced: Option<bool>,
    /// Mirror that may change it by itself: the copy mode of this moment.
    pub copy_mode: Option<CopyMode>,
    /// Mirror: how it gets on.
    pub rates: Option<CopyRates>,
    /// Comparison: what it has found so far.
    pub comparison: Option<Comparison>,
    /// Backup that fleeces: how that gets on.
    pub fleecing: Option<FleecingInfo>,
}

impl JobInfo {
    /// `None` for an internal job.
    pub(crate) fn new(
        job: &JobState,
        job_type: &'static str,
        progress: ProgressSnapshot,
    ) -> Option<Self> {
        Some(Self {
            id: job.settings.id.clone()?,
            job_type,
            block_job: job.settings.block_job,
            status: job.status,
            current_progress: progress.current,
            total_progress: progress.total,
            error: job.failure.as_ref().map(|failure| failure.message.clone()),
            busy: job.shows_busy(),
            paused: job.pause_count > 0,
            speed: job.limit.speed(),
            io_status: job.io_status,
            ready: job.status.is_ready(),
            auto_finalize: job.settings.auto_finalize,
            auto_dismiss: job.settings.auto_dismiss,
            actively_synced: None,
            copy_mode: None,
            rates: None,
            comparison: None,
            fleecing: None,
        })
    }
}
