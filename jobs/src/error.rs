//! Refusals of the monitor side, and the failure that a job ends with.

use std::sync::Arc;

use block::IoOp;

use crate::event::IoSide;
use crate::state::{JobStatus, JobVerb};

/// Which class of error a client is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// QMP's `GenericError`.
    Generic,
    /// QMP's `DeviceNotActive`: a `block-job-*` command for no such job.
    DeviceNotActive,
}

/// Why a request of the monitor side was refused. Nothing has changed then.
///
/// The texts are QEMU's, because people and scripts search for them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// No job has this id, or the job is gone.
    #[error("Job not found")]
    NotFound,
    /// No block job has this id (a job of another kind may).
    #[error("Block job '{id}' not found")]
    NoBlockJob {
        /// What was asked for.
        id: String,
    },
    /// The id is not well-formed.
    #[error("Invalid job ID '{id}'")]
    InvalidId {
        /// What was asked for.
        id: String,
    },
    /// A listed job has this id.
    #[error("Job ID '{id}' already in use")]
    IdInUse {
        /// What was asked for.
        id: String,
    },
    /// An internal job was given an id.
    #[error("Cannot specify job ID '{id}' for an internal job")]
    InternalWithId {
        /// What was asked for.
        id: String,
    },
    /// The status does not accept the verb.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    Verb {
        /// The job (empty for an internal one).
        id: String,
        /// Its status.
        status: JobStatus,
        /// What was asked of it.
        verb: JobVerb,
    },
    /// Pause of a job that the user has paused already.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// Resume of a job that the user has not paused.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// A soft cancel of a job that the user has paused.
    #[error("The block job for device '{id}' is currently paused")]
    CancelPaused {
        /// The job.
        id: String,
    },
    /// Complete of a job that is being cancelled or that ends by itself.
    #[error("The active block job '{id}' cannot be completed")]
    CannotComplete {
        /// The job.
        id: String,
    },
    /// A negative rate limit.
    #[error("Parameter 'speed' expects a non-negative value")]
    NegativeSpeed,
    /// The job's type has nothing to change.
    #[error("Job type does not support change")]
    CannotChange,
    /// The driver refused the change.
    #[error("{0}")]
    ChangeRefused(String),
    /// A job was to join a transaction that has begun to finish.
    #[error("The job transaction is finishing already")]
    TxnClosed,
}

impl JobError {
    /// The class that a client is to see.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NoBlockJob { .. } => ErrorClass::DeviceNotActive,
            _ => ErrorClass::Generic,
        }
    }
}

/// Why a job failed: what `query-jobs` and the end event say.
///
/// Cheap enough to clone; the errno decides about nothing after the body has
/// ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct JobFailure {
    /// For people: what failed, and where.
    pub message: String,
    /// The kernel's error number, positive.
    pub errno: i32,
    /// The request that failed, if it was one.
    pub request: Option<FailedRequest>,
}

/// Where a job's request failed, for programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedRequest {
    /// Reading or writing.
    pub side: IoSide,
    /// Name of the node that failed.
    pub node: Arc<str>,
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl JobFailure {
    /// A failure with a text of its own.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            errno,
            request: None,
        }
    }

    /// A failure described by its errno only, in the C library's words
    /// (`Input/output error`).
    pub fn from_errno(errno: i32) -> Self {
        let text = std::io::Error::from_raw_os_error(errno).to_string();
        let end = text.rfind(" (os error").unwrap_or(text.len());
        Self::new(errno, &text[..end])
    }

    /// The failure of a job that was cancelled.
    pub fn cancelled() -> Self {
        Self::new(libc::ECANCELED, "Operation canceled")
    }
}

impl From<&block::IoError> for JobFailure {
    /// In the C library's words, as clients of QEMU expect; where it happened is
    /// for the log and the history.
    fn from(error: &block::IoError) -> Self {
        Self {
            request: Some(FailedRequest {
                side: match error.op {
                    IoOp::Read | IoOp::BlockStatus => IoSide::Read,
                    _ => IoSide::Write,
                },
                node: Arc::clone(&error.node),
                offset: error.offset,
                len: error.len,
            }),
            ..Self::from_errno(error.errno)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ErrorClass, JobError, JobFailure};
    use crate::state::{JobStatus, JobVerb};

    #[test]
    fn every_refusal_reads_as_recorded_from_qemu() {
        let id = || "j0".to_owned();
        let texts = [
            (JobError::NotFound, "Job not found"),
            (
                JobError::NoBlockJob { id: id() },
                "Block job 'j0' not found",
            ),
            (JobError::InvalidId { id: id() }, "Invalid job ID 'j0'"),
            (JobError::IdInUse { id: id() }, "Job ID 'j0' already in use"),
            (
                JobError::InternalWithId { id: id() },
                "Cannot specify job ID 'j0' for an internal job",
            ),
            (
                JobError::Verb {
                    id: id(),
                    status: JobStatus::Running,
                    verb: JobVerb::Finalize,
                },
                "Job 'j0' in state 'running' cannot accept command verb 'finalize'",
            ),
            (JobError::AlreadyPaused, "Job is already paused"),
            (
                JobError::NotPaused,
                "Can't resume a job that was not paused",
            ),
            (
                JobError::CancelPaused { id: id() },
                "The block job for device 'j0' is currently paused",
            ),
            (
                JobError::CannotComplete { id: id() },
                "The active block job 'j0' cannot be completed",
            ),
            (
                JobError::NegativeSpeed,
                "Parameter 'speed' expects a non-negative value",
            ),
            (JobError::CannotChange, "Job type does not support change"),
            (JobError::ChangeRefused("No".to_owned()), "No"),
            (
                JobError::TxnClosed,
                "The job transaction is finishing already",
            ),
        ];
        for (error, text) in texts {
            assert_eq!(error.to_string(), text);
            let not_active = matches!(error, JobError::NoBlockJob { .. });
            assert_eq!(error.class() == ErrorClass::DeviceNotActive, not_active);
        }
    }

    #[test]
    fn a_failure_by_errno_speaks_the_c_librarys_words() {
        assert_eq!(
            JobFailure::from_errno(libc::EIO).to_string(),
            "Input/output error"
        );
        assert_eq!(
            JobFailure::cancelled(),
            JobFailure::from_errno(libc::ECANCELED)
        );
    }
}
