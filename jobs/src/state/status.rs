//! The two tables: which status may follow which, and which verb is accepted in
//! which status. Nothing else lives here.

use std::fmt;

/// Where a job is in its life. Names are QMP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobStatus {
    /// Not created yet. Never seen by anybody.
    Undefined,
    /// Created, not started.
    Created,
    /// The body runs.
    Running,
    /// Parked in a pause point that was reached from `Running`.
    Paused,
    /// The body runs and has converged; waits to be completed.
    Ready,
    /// Parked in a pause point that was reached from `Ready`.
    Standby,
    /// The body is done; other members of the transaction are not.
    Waiting,
    /// All members are done; waits to be finalized.
    Pending,
    /// Failed or cancelled, being cleaned up.
    Aborting,
    /// Over; listed until it is dismissed.
    Concluded,
    /// Dismissed: the job is gone and its id is free.
    Null,
}

impl JobStatus {
    /// Every status, in the order of a job's life.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from this status to `to`.
    ///
    /// `Aborting` to itself is legal and silent: a late error of a job that is
    /// being cleaned up already.
    pub fn may_become(self, to: Self) -> bool {
        use JobStatus::*;
        match self {
            Undefined => matches!(to, Created),
            Created => matches!(to, Running | Aborting | Null),
            Running => matches!(to, Paused | Ready | Waiting | Aborting),
            Paused => matches!(to, Running),
            Ready => matches!(to, Standby | Waiting | Aborting),
            Standby => matches!(to, Ready),
            Waiting => matches!(to, Pending | Aborting),
            Pending => matches!(to, Concluded | Aborting),
            Aborting => matches!(to, Aborting | Concluded),
            Concluded => matches!(to, Null),
            Null => false,
        }
    }

    /// Whether the job counts as ready to be completed, parked or not.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready | Self::Standby)
    }

    /// Whether the body is over for good (or never ran).
    pub fn is_completed(self) -> bool {
        match self {
            Self::Undefined
            | Self::Created
            | Self::Running
            | Self::Paused
            | Self::Ready
            | Self::Standby => false,
            Self::Waiting | Self::Pending | Self::Aborting | Self::Concluded | Self::Null => true,
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a client may ask of a job. Names are QMP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobVerb {
    /// End it early.
    Cancel,
    /// Park it at its next pause point.
    Pause,
    /// Take back a pause.
    Resume,
    /// Set its rate limit.
    SetSpeed,
    /// Let a ready job finish.
    Complete,
    /// Let a pending job apply its result.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change parameters of a running job.
    Change,
}

impl JobVerb {
    /// Every verb.
    pub const ALL: [Self; 8] = [
        Self::Cancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
        Self::Change,
    ];

    /// The name in refusals.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }

    /// Whether a job in `status` accepts this verb.
    pub fn allowed_in(self, status: JobStatus) -> bool {
        use JobStatus::*;
        match status {
            Created | Running | Paused => matches!(
                self,
                Self::Cancel | Self::Pause | Self::Resume | Self::SetSpeed | Self::Change
            ),
            Ready | Standby => matches!(
                self,
                Self::Cancel
                    | Self::Pause
                    | Self::Resume
                    | Self::SetSpeed
                    | Self::Change
                    | Self::Complete
            ),
            Waiting => matches!(self, Self::Cancel),
            Pending => matches!(self, Self::Cancel | Self::Finalize),
            Concluded => matches!(self, Self::Dismiss),
            Undefined | Aborting | Null => false,
        }
    }
}

impl fmt::Display for JobVerb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::{JobStatus, JobVerb};

    /// One row per status, in the order of `ALL`; columns U C R P Y S W D X E N.
    const TRANSITIONS: [&str; 11] = [
        // U C R P Y S W D X E N
        ".y.........", // undefined
        "..y.....y.y", // created
        "...yy.y.y..", // running
        "..y........", // paused
        ".....yy.y..", // ready
        "....y......", // standby
        ".......yy..", // waiting
        "........yy.", // pending
        "........yy.", // aborting
        "..........y", // concluded
        "...........", // null
    ];

    /// One row per verb, in the order of `ALL`; same columns.
    const VERBS: [&str; 8] = [
        ".yyyyyyy...", // cancel
        ".yyyyy.....", // pause
        ".yyyyy.....", // resume
        ".yyyyy.....", // set-speed
        "....yy.....", // complete
        ".......y...", // finalize
        ".........y.", // dismiss
        ".yyyyy.....", // change
    ];

    #[test]
    fn every_pair_of_statuses_is_as_in_the_table() {
        for (from, row) in JobStatus::ALL.into_iter().zip(TRANSITIONS) {
            for (to, cell) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(from.may_become(to), cell == 'y', "{from} -> {to}");
            }
        }
    }

    #[test]
    fn every_verb_in_every_status_is_as_in_the_table() {
        for (verb, row) in JobVerb::ALL.into_iter().zip(VERBS) {
            for (status, cell) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(verb.allowed_in(status), cell == 'y', "{verb} in {status}");
            }
        }
    }

    #[test]
    fn a_job_is_ready_in_ready_and_standby_and_completed_from_waiting_on() {
        for status in JobStatus::ALL {
            assert_eq!(
                status.is_ready(),
                matches!(status, JobStatus::Ready | JobStatus::Standby)
            );
            assert_eq!(status.is_completed(), status >= JobStatus::Waiting);
        }
    }
}
