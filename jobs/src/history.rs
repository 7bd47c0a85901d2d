//! What is remembered of jobs that have ended, for who missed their events.

use std::collections::VecDeque;
use std::time::SystemTime;

use crate::backup::FleecingInfo;
use crate::compare::Comparison;
use crate::error::JobFailure;
use crate::id::JobId;

/// Jobs that are remembered.
pub const HISTORY_LEN: usize = 128;

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// With success.
    Completed,
    /// By a cancellation.
    Cancelled,
    /// It failed.
    Failed(JobFailure),
}

/// A job that has ended, whether it was dismissed or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedJob {
    /// The id that it had. Later jobs may have had it too.
    pub id: JobId,
    /// The job's type (`mirror`).
    pub job_type: &'static str,
    /// Whether the `block-job-*` commands knew it.
    pub block_job: bool,
    /// When it was created.
    pub created: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
    /// Work done by then (`offset`), for block jobs in bytes.
    pub current_progress: u64,
    /// All work (`len`).
    pub total_progress: u64,
    /// How it ended.
    pub outcome: JobOutcome,
    /// What a comparison had found by then.
    pub comparison: Option<Comparison>,
    /// How the fleecing of a backup had got on by then.
    pub fleecing: Option<FleecingInfo>,
}

/// The last [`HISTORY_LEN`] of them. Behind the job mutex.
#[derive(Debug, Default)]
pub(crate) struct History {
    ended: VecDeque<EndedJob>,
}

impl History {
    pub(crate) fn push(&mut self, job: EndedJob) {
        if self.ended.len() >= HISTORY_LEN {
            self.ended.pop_front();
        }
        self.ended.push_back(job);
    }

    /// Oldest end first.
    pub(crate) fn list(&self) -> Vec<EndedJob> {
        self.ended.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten() {
        let mut history = History::default();
        for number in 0..HISTORY_LEN as u64 + 3 {
            history.push(EndedJob {
                id: JobId::new("j").unwrap(),
                job_type: "mirror",
                block_job: true,
                created: SystemTime::UNIX_EPOCH,
                ended: SystemTime::UNIX_EPOCH,
                current_progress: number,
                total_progress: number,
                outcome: JobOutcome::Completed,
                comparison: None,
                fleecing: None,
            });
        }
        let list = history.list();
        assert_eq!(list.len(), HISTORY_LEN);
        assert_eq!(list[0].current_progress, 3);
    }
}
