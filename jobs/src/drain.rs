//! Drained sections and jobs: a job parks when one begins on an edge of it.

use std::time::Duration;

use block::{AttachmentKind, BackendUser, Node, Serves};

use crate::id::JobKey;
use crate::monitor::Jobs;
use crate::state::Event;
use crate::sync;

/// What a job's backend tells the job.
pub(crate) struct DrainUser {
    jobs: Jobs,
    key: JobKey,
    kind: AttachmentKind,
    description: String,
    blocker: Option<String>,
    /// See [`BackendUser::serves`].
    serves: Option<Serves>,
}

impl DrainUser {
    pub(crate) fn new(jobs: Jobs, key: JobKey, kind: AttachmentKind) -> Self {
        let (description, job_type) = jobs.lock().describe_locked(key);
        Self {
            jobs,
            key,
            kind,
            description,
            blocker: job_type.map(|it| format!("block device is in use by block job: {it}")),
            serves: None,
        }
    }

    /// The same for where `filter` saves what guests' requests are about to change, which wait
    /// no longer than `patience` for that.
    pub(crate) fn serving(self, filter: &Node, patience: Option<Duration>) -> Self {
        Self {
            serves: Some(Serves {
                node: filter.id(),
                patience,
            }),
            ..self
        }
    }

    /// The same for a node that others may use beside the job, as far as permissions go.
    pub(crate) fn beside_others(self) -> Self {
        Self {
            blocker: None,
            ..self
        }
    }
}

impl BackendUser for DrainUser {
    fn drained_begin(&self) {
        self.jobs.happen(self.key, Event::DrainedBegin);
    }

    fn drained_poll(&self) -> bool {
        let busy = self.jobs.lock().drain_busy_locked(self.key);
        sync::assert_unlocked("a hook was called");
        busy.is_some_and(|driver| driver.drained_poll())
    }

    fn drained_end(&self) {
        self.jobs.happen(self.key, Event::DrainedEnd);
    }

    /// A job hears of sections and parks; what it has in flight is only counted.
    fn holds_requests(&self) -> bool {
        false
    }

    fn serves(&self) -> Option<Serves> {
        self.serves
    }

    fn kind(&self) -> AttachmentKind {
        self.kind.clone()
    }

    fn blocker(&self) -> Option<String> {
        self.blocker.clone()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

/// A drained section that the job itself holds: while this lives no drained
/// section waits for the job.
///
/// Any thread; dropping it ends that.
#[must_use = "dropping this at once protects nothing"]
pub struct OwnDrain {
    jobs: Jobs,
    key: JobKey,
}

impl OwnDrain {
    pub(crate) fn new(jobs: Jobs, key: JobKey) -> Self {
        jobs.happen(key, Event::OwnDrainBegin);
        Self { jobs, key }
    }
}

impl Drop for OwnDrain {
    fn drop(&mut self) {
        self.jobs.happen(self.key, Event::OwnDrainEnd);
    }
}
