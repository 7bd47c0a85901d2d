//! What clients are told about jobs, free of any wire form.

use std::time::SystemTime;

use crate::id::JobId;
use crate::state::JobStatus;

/// Something happened to a job.
///
/// Events are put in order under the job mutex, so that the order in which they
/// are delivered is the order of the changes, also across jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEvent {
    /// Counts up by one with each event of this process.
    pub sequence: u64,
    /// When it happened.
    pub time: SystemTime,
    /// The job.
    pub id: JobId,
    /// The job's type (`mirror`).
    pub job_type: &'static str,
    /// What happened.
    pub kind: JobEventKind,
}

/// What happened to a job. In the names of QMP's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEventKind {
    /// `JOB_STATUS_CHANGE`.
    StatusChange(JobStatus),
    /// `BLOCK_JOB_READY`.
    Ready(BlockJobProgress),
    /// `BLOCK_JOB_PENDING`: waits to be finalized by hand.
    Pending,
    /// `BLOCK_JOB_NOT_CONVERGING`: what is left gets no less. Not QEMU's.
    Stalled {
        /// Bytes per second that the guest dirties.
        dirty: u64,
        /// Bytes per second that are copied.
        copy: u64,
    },
    /// `BLOCK_JOB_ERROR`: a request of the body failed.
    Error {
        /// Which side failed.
        operation: IoSide,
        /// What the policy makes of it.
        action: ErrorAction,
    },
    /// `BLOCK_JOB_COMPLETED`: success, or a failure that is no cancellation.
    Completed {
        /// How far it came.
        progress: BlockJobProgress,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`: ended by a cancellation.
    Cancelled(BlockJobProgress),
}

/// The numbers that go with an event of a block job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockJobProgress {
    /// Total work in bytes.
    pub len: u64,
    /// Work done in bytes.
    pub offset: u64,
    /// The rate limit in bytes per second; 0 is none.
    pub speed: u64,
}

/// The side on which a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoSide {
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

impl IoSide {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// `on-source-error`, `on-target-error`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The range is tried again later.
    Ignore,
    /// `Stop` if there is no space, else `Report`.
    Enospc,
    /// The job is paused until the user resumes it.
    Stop,
}

impl OnError {
    /// What this policy makes of a failure with `errno`.
    pub fn action(self, errno: i32) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc if errno == libc::ENOSPC => ErrorAction::Stop,
            Self::Enospc => ErrorAction::Report,
        }
    }
}

/// What a policy made of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job fails with this error.
    Report,
    /// The range stays to be done.
    Ignore,
    /// The range stays to be done, and the job is paused for the user.
    Stop,
}

impl ErrorAction {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// `io-status`: the first error since the user last looked after the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No error.
    #[default]
    Ok,
    /// An error other than lack of space.
    Failed,
    /// No space left.
    NoSpace,
}

impl IoStatus {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}
