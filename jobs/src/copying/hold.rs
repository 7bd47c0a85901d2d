//! Who a job's filter is to the graph.

use block::{AttachmentKind, BackendUser};

/// Keeps others from using the filter node. It has no requests of its own, and is
/// not told of drained sections: the job hears of them at source and target.
pub(crate) struct FilterHold {
    pub(crate) job_id: String,
    pub(crate) job_type: &'static str,
}

impl BackendUser for FilterHold {
    fn holds_requests(&self) -> bool {
        false
    }

    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn blocker(&self) -> Option<String> {
        Some(format!(
            "block device is in use by block job: {}",
            self.job_type
        ))
    }

    fn describe(&self) -> String {
        format!("filter of {} job '{}'", self.job_type, self.job_id)
    }
}
